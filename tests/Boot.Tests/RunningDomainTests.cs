// Tiny guests run in this process: how each ends, what it leaves behind, what its owner may do to it.

using System.Text;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class RunningDomainTests : KvmFixture
{
    private const string Hello = "hello\n";

    private readonly record struct End(DomainExit Exit, string Output);

    [Test]
    public async Task A_guest_prints_and_powers_off()
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.PowerOff, message: Hello));
        Assert.That(end, Is.EqualTo(new End(new DomainExit(ShutdownReason.PowerOff), Hello)));
    }

    [Test]
    public async Task A_guest_asks_for_a_reboot()
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.Reboot));
        Assert.That(end.Exit, Is.EqualTo(new DomainExit(ShutdownReason.Reboot)));
    }

    [Test]
    public async Task A_guest_that_says_it_crashed_gets_a_report()
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.Crash, message: Hello));
        Assert.That(end.Exit.Reason, Is.EqualTo(ShutdownReason.Crash));
        Assert.That(end.Exit.Report, Does.Contain("reported that it has crashed").And.Contain("EventChannelOp("));
        Assert.That(end.Output, Is.EqualTo(Hello));
    }

    [Test]
    public async Task An_exception_without_a_handler_gets_a_report_with_the_code()
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.UndefinedInstruction, message: Hello));
        Assert.That(end.Exit.Reason, Is.EqualTo(ShutdownReason.Crash));
        Assert.That(end.Exit.Report, Does.Contain("InvalidOpcode").And.Contain("Code: 0f0b").And.Contain("ud2"));
        Assert.That(end.Output, Is.EqualTo(Hello));
    }

    [Test]
    public async Task A_guest_that_spins_is_destroyed()
    {
        using var output = new MemoryStream();
        await using RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.SpinForever), new StreamSink(output));
        domain.Start();
        await Task.Delay(100);
        Assert.That(domain.Stopped.IsCompleted, Is.False);
        domain.Destroy();
        _ = await domain.Completion;
        Assert.That(domain.Destroyed);
    }

    /// <summary>Slot 261, whose first word guest kernels may write to where their SYSCALL entry does.</summary>
    private const ulong KernelWindow = 0xffff_8280_0000_0000;

    /// <summary>Addresses that are the hypervisor's, or nobody's: the monitor's own pages and everything around them.</summary>
    private static IEnumerable<ulong> ForeignAddresses()
    {
        for (ulong slot = 256; slot < 272; slot++)
            yield return 0xffff_8000_0000_0000 + ((slot - 256) << 39);

        // The monitor in slot 258: its SYSCALL entry, code, tables and stacks lie on its first pages.
        for (ulong page = 1; page < 12; page++)
            yield return 0xffff_8100_0000_0000 + (page << 12);
        yield return 0xffff_8180_0010_0000; // Its view of its own memory.
        yield return 0xffff_8181_0000_0000; // Its view of the domain's memory.
        yield return 0xffff_8200_0000_e008; // The GDT's reserved page.
        yield return 0xffff_87ff_ffff_fff8; // The last word of the last slot.
        yield return 0xffff_87ff_ffff_fffc; // Half of it.
        yield return 0xffff_8800_0000_0000; // The guest's, but not mapped.
        yield return 0xffff_ffff_ffff_fff8;
        yield return 0xffff_ffff_ffff_ffff;
        yield return 0x0000_7fff_ffff_fff8;
        yield return 0x0000_7fff_ffff_ffff;
        yield return 0x0000_8000_0000_0000; // Not canonical.
        yield return 0x8000_0000_0000_0000;
        yield return 0xffff_7fff_ffff_ffff;
        yield return 0;
    }

    [TestCaseSource(nameof(ForeignAddresses))]
    public async Task A_write_to_what_is_not_the_guests_ends_it_with_a_report(ulong address)
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.WriteTo, address));
        if (end.Output.Length != 0)
            Assert.That(Host.Capabilities.SyscallEntryLevel == 3 && address == KernelWindow, $"{address:x} was written to");
        else
            CheckReport(end);
    }

    private bool IsOpenToTheKernel(ulong address)
        => address is >= 0xffff_8000_0000_0000 and < 0xffff_8100_0000_0000
            || (Host.Capabilities.SyscallEntryLevel == 3 && address is (>= 0xffff_8100_0000_0000 and < 0xffff_8100_0010_0000) or KernelWindow);

    [TestCaseSource(nameof(ForeignAddresses))]
    public async Task A_read_of_what_is_not_the_guests_ends_it_with_a_report(ulong address)
    {
        End end = await RunAsync(Tiny(TinyGuestBehaviour.ReadFrom, address));

        // Xen's guests may read the machine-to-physical table, in slots 256 and 257; and the page of the SYSCALL entry holds
        // no secret, where it must be open, nor does what the kernel shares with it in slot 261.
        if (end.Output.Length != 0)
            Assert.That(IsOpenToTheKernel(address), $"{address:x} was read");
        else
            CheckReport(end);
    }

    [TestCaseSource(nameof(ForeignAddresses))]
    public async Task A_jump_to_what_is_not_the_guests_ends_it_with_a_report(ulong address)
    {
        await using RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.JumpTo, address));
        domain.Start();
        if (Host.Capabilities.SyscallEntryLevel == 3 && address is >= 0xffff_8100_0000_0000 and < 0xffff_8100_0010_0000)
        {
            // Where SYSCALL stays at CPL 3, jumping to its entry is making a hypercall that returns to RCX: the guest goes
            // round in circles, which is its own affair.
            _ = await Task.WhenAny(domain.Stopped, Task.Delay(500));
            domain.Destroy();
            DomainExit circling = await domain.Stopped;
            Assert.That(circling.Report ?? "", Does.Not.Contain("XenSharp failed"));
            return;
        }
        CheckReport(new End(await domain.Stopped, ""));
    }

    [Test]
    public async Task What_is_typed_reaches_the_guest()
    {
        using var output = new MemoryStream();
        await using RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.EchoInput), new StreamSink(output));
        domain.Start();
        string text = string.Concat(Enumerable.Range(0, 500).Select(i => $"line {i} of what is typed\n"));
        Assert.That(await domain.WriteInputAsync(Encoding.ASCII.GetBytes(text)));
        Assert.That(await domain.WriteInputAsync(new byte[] { 4 }));
        DomainExit exit = await domain.Completion;
        Assert.That(exit, Is.EqualTo(new DomainExit(ShutdownReason.PowerOff)));
        Assert.That(Encoding.ASCII.GetString(output.ToArray()), Is.EqualTo(text.ToUpperInvariant()));
        Assert.That(await domain.WriteInputAsync("more"u8.ToArray()), Is.False);
    }

    [Test]
    public async Task Fifty_megabytes_of_output_arrive_byte_for_byte()
    {
        const long Length = 50_000_000;
        var check = new FloodCheck();
        await using RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.ConsoleFlood, floodBytes: Length), check);
        domain.Start();
        DomainExit exit = await domain.Completion;
        Assert.That(check.FirstWrong, Is.Null);
        Assert.That(check.Count, Is.EqualTo(Length));
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff));
    }

    [Test]
    public async Task A_domain_that_was_never_started_is_disposed()
    {
        RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.PowerOff));
        await domain.DisposeAsync();
        await domain.DisposeAsync();
        Assert.That(() => domain.Start(), Throws.InstanceOf<ObjectDisposedException>());
        Assert.That(await domain.WriteInputAsync("x"u8.ToArray()), Is.False);
    }

    [Test]
    public async Task A_domain_is_started_once()
    {
        await using RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.SpinForever));
        domain.Start();
        Assert.That(() => domain.Start(), Throws.InvalidOperationException);
    }

    [Test]
    public async Task A_domain_whose_output_nobody_takes_is_disposed_with_its_input_waiting()
    {
        var stuck = new StuckSink();
        RunningDomain domain = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.ConsoleFlood, floodBytes: 1 << 20), stuck);
        domain.Start();
        await stuck.Reached;
        Task<bool> typing = domain.WriteInputAsync(new byte[10_000]).AsTask();
        Task<bool> queued = domain.WriteInputAsync(new byte[10_000]).AsTask();
        await domain.DisposeAsync();
        Assert.That(await typing, Is.False);
        Assert.That(await queued, Is.False);
    }

    [Test]
    public void Memory_that_is_too_small_for_the_kernel_gets_a_sentence()
    {
        DomainSpecification specification = Tiny(TinyGuestBehaviour.PowerOff, memoryMiB: 16) with
        {
            Image = new DomainImage(KernelImage.Parse(TinyGuest.Build()), new byte[20 << 20]),
        };
        Assert.That(() => RunningDomain.Create(Host, specification), Throws.InstanceOf<DomainBuildException>()
            .With.Message.Contains("16 MiB of memory are too few").And.Message.Contains("--memory"));
    }

    [Test]
    public async Task Twenty_domains_leave_nothing_behind()
    {
        async Task RunOneAsync(int number)
        {
            // Ends of every kind; the destroyed ones are in the middle of things.
            TinyGuestBehaviour behaviour = (TinyGuestBehaviour)(number % 5);
            await using RunningDomain domain = RunningDomain.Create(Host, Tiny(behaviour, message: Hello), new StreamSink(Stream.Null));
            if (number % 7 == 6)
                return;
            domain.Start();
            if (behaviour != TinyGuestBehaviour.SpinForever)
                _ = await domain.Completion;
        }

        for (int i = 0; i < 7; i++)
            await RunOneAsync(i);
        int descriptors = Directory.GetFileSystemEntries("/proc/self/fd").Length;
        int tasks = Directory.GetFileSystemEntries("/proc/self/task").Length;
        for (int i = 0; i < 20; i++)
            await RunOneAsync(i);

        // A thread that was joined may be in the kernel's list for a moment longer; the thread pool may have grown by a few.
        Assert.That(SettlesAt(0, () => Directory.GetDirectories("/proc/self/task").Select(ThreadName)
            .Count(name => name.Contains("vcpu") || name.StartsWith("console "))), Is.Zero, "threads of domains");
        Assert.That(Directory.GetFileSystemEntries("/proc/self/task"), Has.Length.LessThan(tasks + 10), "threads");
        Assert.That(SettlesAt(descriptors, () => Directory.GetFileSystemEntries("/proc/self/fd").Length), Is.EqualTo(descriptors), "descriptors");
        string[] maps = File.ReadAllLines("/proc/self/maps");
        Assert.That(maps.Where(line => line.Contains("xensharp-") && line.Contains("memfd") || line.Contains("kvm-vcpu")), Is.Empty, "mappings");
    }

    private static void CheckReport(End end)
    {
        Assert.Multiple(() =>
        {
            Assert.That(end.Exit.Reason, Is.EqualTo(ShutdownReason.Crash));
            Assert.That(end.Exit.Report, Does.StartWith("Domain 1 (tiny) crashed on vCPU 0: The guest raised").And.Contain("rip ").And.Contain("Last hypercalls"));
            Assert.That(end.Exit.Report, Does.Not.Contain("XenSharp failed").And.Not.Contain("   at "));
            Assert.That(end.Output, Is.Empty);
        });
    }

    private async Task<End> RunAsync(DomainSpecification specification)
    {
        using var output = new MemoryStream();
        await using RunningDomain domain = RunningDomain.Create(Host, specification, new StreamSink(output));
        domain.Start();
        DomainExit exit = await domain.Completion;
        return new End(exit, Encoding.ASCII.GetString(output.ToArray()));
    }

    /// <summary>Counts until the number is right, or five seconds are over.</summary>
    private static int SettlesAt(int wanted, Func<int> count)
    {
        int last = 0;
        _ = SpinWait.SpinUntil(() => (last = count()) == wanted, TimeSpan.FromSeconds(5));
        return last;
    }

    private static string ThreadName(string task)
    {
        try
        {
            return File.ReadAllText(Path.Combine(task, "comm"));
        }
        catch (IOException)
        {
            return ""; // It has ended meanwhile.
        }
    }

    /// <summary>Compares what it is given with what the flood should be.</summary>
    private sealed class FloodCheck : IConsoleSink
    {
        internal long Count { get; private set; }

        internal string? FirstWrong { get; private set; }

        public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
        {
            foreach (byte value in bytes)
            {
                if (value != TinyGuest.FloodByte(Count))
                    FirstWrong ??= $"byte {Count} is {value:x2} and should be {TinyGuest.FloodByte(Count):x2}";
                Count++;
            }
            return bytes.Length;
        }
    }

    /// <summary>Takes nothing until it is cancelled.</summary>
    private sealed class StuckSink : IConsoleSink
    {
        private readonly TaskCompletionSource _reached = new(TaskCreationOptions.RunContinuationsAsynchronously);

        internal Task Reached => _reached.Task;

        public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
        {
            _reached.TrySetResult();
            cancellation.WaitHandle.WaitOne();
            throw new OperationCanceledException(cancellation);
        }
    }
}
