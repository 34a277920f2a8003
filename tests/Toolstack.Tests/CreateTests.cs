// Domains are made whole, or nothing of them stays.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Configuration.Devices;
using XenSharp.Guests;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class CreateTests : ManagementFixture
{
    [Test]
    public async Task A_domain_is_made_paused_runs_and_is_gone_when_it_powers_off()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.PowerOff, message: Hello), paused: true);
        DomainInfo paused = domain.Describe();
        Assert.Multiple(() =>
        {
            Assert.That(paused.State.Letters, Is.EqualTo("--p---"));
            Assert.That(paused.FirstEntryTime, Is.Null);
            Assert.That((paused.Id, paused.Name, paused.OnlineVcpus, paused.MaximumVcpus), Is.EqualTo((1, "tiny", 1, 1)));
            Assert.That(paused.MemoryKiB, Is.InRange(15 << 10, 17 << 10));
            Assert.That(Toolstack.Find("tiny"), Is.SameAs(domain));
            Assert.That(Toolstack.Find("1"), Is.SameAs(domain));
            Assert.That(Toolstack.Find(paused.Uuid.ToString("D")), Is.SameAs(domain));
            Assert.That(Toolstack.Context.Store.Domain0.Read("/local/domain/1/name"), Is.EqualTo("tiny"));
            Assert.That(Directory.GetFiles(Path.Combine(StateFolder, "domains")), Has.Length.EqualTo(1));
        });
        domain.Unpause();
        await domain.Gone;
        Assert.That(System.Text.Encoding.ASCII.GetString(domain.Console.ReadHistory()), Is.EqualTo(Hello));
        Assert.That(File.ReadAllText(FileOf("console/guest-tiny.log")), Is.EqualTo(Hello));
        ExpectNothing();
    }

    [Test]
    public async Task A_domain_tells_when_it_was_asked_for_and_when_it_began()
    {
        DateTimeOffset before = DateTimeOffset.UtcNow;
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        await EventuallyAsync(() => domain.Describe().FirstEntryTime is not null, "the guest has begun");
        DomainInfo began = domain.Describe();
        Assert.That(new[] { before, began.RequestTime!.Value, began.StartTime, began.FirstEntryTime!.Value }, Is.Ordered);
    }

    [Test]
    public async Task Vcpus_run_where_the_configuration_and_later_somebody_says()
    {
        IReadOnlyList<int> online = HostMachine.OnlineProcessors;
        if (online.Count < 2)
            Assert.Ignore("One processor leaves no choice.");
        string first = $"{online[0]}";
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever) with { Vcpus = 1, MaxVcpus = 2, Processors = [first] });
        await EventuallyAsync(() => domain.Describe().FirstEntryTime is not null, "the guest has begun");
        Assert.That(domain.DescribeVcpus().Select(static vcpu => vcpu.Processors), Is.EqualTo(new[] { first, null }));
        Assert.That(domain.DescribeVcpus()[0].Processor, Is.EqualTo(online[0]).Or.Null);

        string second = $"{online[1]}";
        domain.SetProcessors(null, second);
        Assert.That(domain.DescribeVcpus().Select(static vcpu => vcpu.Processors), Is.EqualTo(new[] { second, second }));
        domain.SetProcessors(0, "all");
        Assert.That(domain.DescribeVcpus().Select(static vcpu => vcpu.Processors), Is.EqualTo(new[] { null, second }));
        Assert.That(() => domain.SetProcessors(2, "all"), Throws.InstanceOf<ToolstackException>().With.Message.Contains("no vCPU 2"));
        Assert.That(() => domain.SetProcessors(0, $"{online[^1] + 1}"), Throws.InstanceOf<ToolstackException>().With.Message.Contains("This host has no processor"));

        Assert.That(
            async () => await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever, name: "other") with { Processors = ["all,^all"] }),
            Throws.InstanceOf<ToolstackException>().With.Message.Contains("leaves no processor"));
        Assert.That(Toolstack.Domains, Is.EqualTo(new[] { domain }));
    }

    [Test]
    public async Task Whatever_step_fails_nothing_stays()
    {
        // What is loaded and started when the first one is made stays.
        ManagedDomain first = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        await Toolstack.DestroyAsync(first);
        int descriptors = CountDescriptors();
        foreach (CreateStep step in Enum.GetValues<CreateStep>())
        {
            FailingStep = step;
            Assert.That(async () => await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever)), Throws.InstanceOf<IOException>(), $"{step}");
            ExpectNothing($"{step}");
        }

        FailingStep = null;
        ManagedDomain last = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        await Toolstack.DestroyAsync(last);
        ExpectNothing();
        await EventuallyAsync(() => CountDescriptors() <= descriptors, $"{CountDescriptors()} descriptors, and {descriptors} before");
        await EventuallyAsync(() => VcpuThreads() == 0, "threads that have ended, which the kernel lists for a moment longer");
    }

    [Test]
    public void What_cannot_be_made_gets_a_sentence()
    {
        DomainConfiguration tiny = Tiny(TinyGuestBehaviour.PowerOff);
        void Expect(DomainConfiguration configuration, string kind, string sentence)
        {
            ToolstackException? refusal = Assert.ThrowsAsync<ToolstackException>(async () => await Toolstack.CreateAsync(configuration));
            Assert.That((refusal!.Kind, refusal.Message), Is.EqualTo((kind, refusal.Message)));
            Assert.That(refusal.Message, Does.Contain(sentence));
            ExpectNothing(sentence);
        }

        File.WriteAllText(FileOf("text"), "no kernel");
        Expect(tiny with { Kernel = FileOf("missing") }, ProblemKind.BadConfiguration, "There is no file");
        Expect(tiny with { Kernel = FileOf("text") }, ProblemKind.BadConfiguration, FileOf("text"));
        Expect(tiny with { Kernel = null }, ProblemKind.BadConfiguration, "has no kernel");
        Expect(tiny with { Kernel = "vmlinuz" }, ProblemKind.BadConfiguration, "relative path");
        Expect(tiny with { MemoryMiB = 1 << 30 }, ProblemKind.HostCannot, "give it less");
        Expect(tiny with { Disks = [new DiskConfiguration { Target = FileOf("none.img"), VirtualDevice = "xvda" }] }, ProblemKind.BadConfiguration, "none.img");
        Expect(tiny with { Bootloader = new BootloaderConfiguration() }, ProblemKind.BadConfiguration, "has none");
    }

    [Test]
    public async Task A_drive_may_be_empty()
    {
        var drive = new DiskConfiguration { Format = DiskFormat.Empty, VirtualDevice = "xvdc", Cdrom = true, ReadOnly = true };
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever) with { Disks = [drive] });
        BlockDeviceInfo listed = domain.DescribeDisks().Single();
        Assert.That((listed.Name, listed.Target, listed.Format, listed.ReadOnly, listed.CdRom), Is.EqualTo(("xvdc", "", "empty", true, true)));
        Assert.That(Toolstack.Context.Store.Domain0.Read($"{listed.BackendPath}/removable"), Is.EqualTo("1"));
        await domain.DetachDiskAsync("xvdc", force: true, CancellationToken.None);
        Assert.That(domain.DescribeDisks(), Is.Empty);
        Assert.That(domain.Configuration.Disks, Is.Empty);
        _ = await domain.AttachAsync(drive, CancellationToken.None);
        Assert.That(domain.DescribeDisks(), Has.Count.EqualTo(1));
    }

    /// <summary>Who has given up a domain waits, by the UUID that it was to have, until nothing of it is there.</summary>
    [Test]
    public async Task A_domain_in_the_making_is_waited_for()
    {
        DomainConfiguration tiny = Tiny(TinyGuestBehaviour.SpinForever) with { Uuid = Guid.NewGuid() };
        string uuid = tiny.Uuid.Value.ToString("D");
        Assert.That(Toolstack.WaitForMakingAsync(uuid).IsCompleted, Is.True, "nothing is being made");
        Task? made = null;
        OnStep = step => made ??= step == CreateStep.Devices ? Toolstack.WaitForMakingAsync(uuid) : null;
        ManagedDomain domain = await Toolstack.CreateAsync(tiny);
        await made!;
        Assert.That(Toolstack.Find(uuid), Is.SameAs(domain));
        await Toolstack.DestroyAsync(domain);

        using var cancellation = new CancellationTokenSource();
        Task? given = null;
        OnStep = step =>
        {
            if (step != CreateStep.Devices)
                return;
            given = Toolstack.WaitForMakingAsync(uuid);
            Assert.That(given.IsCompleted, Is.False);
            cancellation.Cancel();
        };
        Assert.That(async () => await Toolstack.CreateAsync(tiny, cancellation: cancellation.Token), Throws.InstanceOf<OperationCanceledException>());
        await given!;
        ExpectNothing();
    }

    [Test]
    public async Task Names_and_UUIDs_are_one_domains_only()
    {
        DomainConfiguration tiny = Tiny(TinyGuestBehaviour.SpinForever);
        ManagedDomain first = await Toolstack.CreateAsync(tiny);
        ToolstackException? refusal = Assert.ThrowsAsync<ToolstackException>(async () => await Toolstack.CreateAsync(tiny));
        Assert.That(refusal!.Kind, Is.EqualTo(ProblemKind.NameTaken));
        refusal = Assert.ThrowsAsync<ToolstackException>(async () => await Toolstack.CreateAsync(tiny with { Name = "other", Uuid = first.Uuid }));
        Assert.That(refusal!.Kind, Is.EqualTo(ProblemKind.NameTaken));
        ManagedDomain second = await Toolstack.CreateAsync(tiny with { Name = "other" });
        refusal = Assert.Throws<ToolstackException>(() => Toolstack.Rename(second, "tiny"));
        Assert.That(refusal!.Kind, Is.EqualTo(ProblemKind.NameTaken));
        Toolstack.Rename(second, "third");
        Assert.That(Toolstack.Find("third"), Is.SameAs(second));
        Assert.That(Toolstack.Context.Store.Domain0.Read("/local/domain/2/name"), Is.EqualTo("third"));
        Assert.That(() => Toolstack.Find("other"), Throws.TypeOf<ToolstackException>());
        Assert.That(() => Toolstack.Rename(second, "a/b"), Throws.TypeOf<ToolstackException>());
    }

    [Test]
    public async Task A_hundred_domains_one_after_the_other_leave_nothing()
    {
        DomainConfiguration tiny = Tiny(TinyGuestBehaviour.SpinForever);
        async Task CycleAsync()
        {
            ManagedDomain domain = await Toolstack.CreateAsync(tiny);
            await Toolstack.DestroyAsync(domain);
        }

        for (int i = 0; i < 10; i++)
            await CycleAsync();
        int descriptors = CountDescriptors();
        int threads = CountThreads();
        long resident = Resident();
        for (int i = 0; i < 100; i++)
            await CycleAsync();
        ExpectNothing();
        await EventuallyAsync(() => CountDescriptors() <= descriptors, $"{CountDescriptors()} descriptors, and {descriptors} before");
        await EventuallyAsync(() => CountThreads() <= threads + 10, $"{CountThreads()} threads, and {threads} before");
        await EventuallyAsync(() => VcpuThreads() == 0, "threads that have ended, which the kernel lists for a moment longer");

        // A domain has 16 MiB: a leak of one in ten would be more than this.
        Assert.That(Resident() - resident, Is.LessThan(64 << 20));
    }

    private static int CountThreads() => Directory.GetFileSystemEntries("/proc/self/task").Length;

    /// <summary>Without those of assemblies, which the runtime opens when it first needs them and keeps.</summary>
    private static int CountDescriptors()
        => new DirectoryInfo("/proc/self/fd").GetFileSystemInfos().Count(static file => file.LinkTarget?.EndsWith(".dll", StringComparison.Ordinal) == false);

    private static int VcpuThreads() => Directory.GetDirectories("/proc/self/task").Count(static task =>
    {
        try
        {
            return File.ReadAllText(Path.Combine(task, "comm")).Contains("vcpu");
        }
        catch (IOException)
        {
            return false; // It has ended meanwhile.
        }
    });

    private static long Resident()
    {
        GC.Collect();
        return Environment.WorkingSet;
    }

    private void ExpectNothing(string when = "")
    {
        Assert.Multiple(() =>
        {
            Assert.That(Toolstack.Domains, Is.Empty, when);
            Assert.That(Toolstack.Context.Domains.Domains, Is.Empty, when);
            Assert.That(Directory.GetFiles(Path.Combine(StateFolder, "domains")), Is.Empty, when);
            Assert.That(Toolstack.Context.Store.Domain0.List("/local/domain"), Is.EqualTo(new[] { "0" }), when);
            Assert.That(Toolstack.Context.Store.Domain0.List("/vm"), Is.Empty, when);
            Assert.That(Toolstack.Context.Store.Domain0.List("/libxl"), Is.Empty, when);
            Assert.That(Toolstack.Context.Store.Domain0.List("/local/domain/0/backend/console"), Is.Empty, when);
        });
    }
}
