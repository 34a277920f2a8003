// What the nested bed says and leaves behind when its machine, its command or a guest is not fit.

using XenSharp.Guests;
using XenSharp.Guests.Fetching;
using XenSharp.Oracle;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Nested;
using XenSharp.Oracle.Qemu;

namespace XenSharp.Nested.Tests;

[TestFixture]
[Category("Nested")]
[CancelAfter(300_000)]
public sealed class BrokenMachineTests
{
    private static readonly BedGuest Tiny = new("tiny", TinyGuest.Build()) { Timeout = TimeSpan.FromSeconds(60) };

    private GuestCache _cache = null!;
    private string _command = null!;

    [OneTimeSetUp]
    public async Task PrepareAsync()
    {
        _command = await NativeCommand.GetAsync();
        _cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            _ = await _cache.GetKernelAsync(DebianKernelFlavour.Amd64);
            _ = await _cache.GetBusyboxAsync();
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [TearDown]
    public void NothingIsLeft()
    {
        Assert.That(Emulators(), Is.Empty, "processes of QEMU");
    }

    [Test]
    public void A_processor_without_svm_gets_a_sentence()
    {
        OracleException failure = Fails(new(_cache, _command, true, null) { Cpu = QemuOptions.DefaultCpu + ",-svm" }, Tiny);
        Assert.That(failure.Message, Does.StartWith("The module kvm-amd does not load in the emulated machine: ").And.Contain("SVM"));
    }

    [Test]
    public void A_kernel_that_panics_is_reported_with_its_last_lines()
    {
        OracleException failure = Fails(new(_cache, _command, true, null) { KernelArguments = "rdinit=/nowhere root=none" }, Tiny);
        Assert.That(failure.Message, Does.StartWith("The kernel of the emulated machine panicked").And.Contain("Unable to mount root fs"));
    }

    [Test]
    public void A_guest_that_is_no_kernel_gets_the_sentence_of_the_command()
    {
        OracleException failure = Fails(new(_cache, _command, true, null), new("text", "no kernel"u8.ToArray()));
        Assert.That(failure.Message, Does.StartWith("xensharp could not run the guest text in the emulated machine (status 2): ")
            .And.Contain("is not a kernel"));
    }

    [Test]
    public async Task A_run_that_is_broken_off_or_cancelled_leaves_nothing()
    {
        var bed = new NestedKvmBed(_cache, _command, nestedPaging: true);
        BedGuest spinning = new("spin", TinyGuest.Build(new() { Behaviour = TinyGuestBehaviour.SpinForever })) { Timeout = TimeSpan.FromMinutes(5) };
        await foreach (GuestRun run in bed.RunAsync([Tiny, spinning]))
        {
            Assert.That(run, Is.EqualTo(new GuestRun("tiny", new TinyGuestOptions().Message, GuestEnding.PowerOff)));
            Assert.That(Emulators(), Has.Length.EqualTo(1));
            break;
        }
        Assert.That(Emulators(), Is.Empty);

        using CancellationTokenSource soon = new(TimeSpan.FromSeconds(2));
        Assert.That(async () => await RunAsync(bed, [spinning], soon.Token), Throws.InstanceOf<OperationCanceledException>());
    }

    [Test]
    public async Task An_emulator_that_is_killed_is_reported()
    {
        var bed = new NestedKvmBed(_cache, _command, nestedPaging: true);
        Task run = RunAsync(bed, [Tiny]);
        Assert.That(SpinWait.SpinUntil(() => Emulators().Length == 1, TimeSpan.FromSeconds(60)));
        using (var emulator = System.Diagnostics.Process.GetProcessById(Emulators()[0]))
            emulator.Kill();
        Assert.That(async () => await run, Throws.InstanceOf<OracleException>().With.Message.StartsWith("QEMU ended with status 137"));
    }

    [Test]
    public void A_command_that_is_no_dynamic_program_gets_a_sentence()
    {
        string text = typeof(BrokenMachineTests).Assembly.Location;
        Assert.That(Fails(new(_cache, text, true, null), Tiny).Message, Does.Contain($"{text} is no program that this host can run"));
    }

    [TestCase("")]
    [TestCase("Tiny")]
    [TestCase("a guest")]
    [TestCase("../guest")]
    public void A_bad_name_is_refused(string name) =>
        Assert.That(async () => await RunAsync(new(_cache, _command, nestedPaging: true), [Tiny with { Name = name }]), Throws.ArgumentException);

    [Test]
    public void Two_guests_of_one_name_are_refused()
    {
        var bed = new NestedKvmBed(_cache, _command, nestedPaging: true);
        Assert.That(async () => await RunAsync(bed, [Tiny, Tiny]), Throws.ArgumentException);
    }

    private static OracleException Fails(NestedMachine machine, BedGuest guest) =>
        Assert.ThrowsAsync<OracleException>(() => RunAsync(new NestedKvmBed(machine, nestedPaging: true), [guest]))!;

    private static async Task RunAsync(NestedKvmBed bed, BedGuest[] guests, CancellationToken cancellation = default)
    {
        await foreach (GuestRun _ in bed.RunAsync(guests, cancellation))
        {
        }
    }

    /// <summary>Processes of QEMU that this process has started and that have not ended.</summary>
    private static int[] Emulators() =>
    [
        .. Directory.GetDirectories("/proc").Select(Path.GetFileName).Where(static name => char.IsAsciiDigit(name![0]))
            .Where(static name => IsEmulator(name!)).Select(static name => int.Parse(name!)),
    ];

    private static bool IsEmulator(string process)
    {
        try
        {
            // One that was fetched is run by its own dynamic loader, and has that one's name; a process that has ended has no arguments.
            // proc(5): "pid (comm) state ppid …".
            string state = File.ReadAllText($"/proc/{process}/stat");
            return File.ReadAllText($"/proc/{process}/cmdline").Contains("qemu-system-x86_64")
                && int.Parse(state[(state.LastIndexOf(')') + 2)..].Split(' ')[1]) == Environment.ProcessId;
        }
        catch (IOException)
        {
            return false; // It has ended meanwhile.
        }
    }
}
