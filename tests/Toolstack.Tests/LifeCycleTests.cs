// What becomes of domains, and what can be done with them while they run.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Guests;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class LifeCycleTests : ManagementFixture
{
    [Test]
    public async Task A_guest_that_reboots_is_made_again_under_its_name_and_with_its_console()
    {
        ManagedDomain first = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.Reboot, message: Hello));
        ManagedDomain later = first;
        await EventuallyAsync(() => Toolstack.Domains is [{ Id: > 2 } third] && (later = third) == third, "the third incarnation");
        Assert.That((later.Name, later.Uuid), Is.EqualTo((first.Name, first.Uuid)));
        Assert.That(later.Console, Is.SameAs(first.Console));

        // What would be made next powers off. An incarnation that is just going does not pass that on, so each is told.
        await EventuallyAsync(
            () =>
            {
                End("tiny");
                return Directory.GetFiles(Path.Combine(StateFolder, "domains")).Length == 0;
            },
            "the end, and not between two incarnations");
        Assert.That(Toolstack.Domains, Is.Empty);
        Assert.That(System.Text.Encoding.ASCII.GetString(first.Console.ReadHistory()), Does.StartWith(Hello + Hello));
    }

    /// <summary>As Xen's console daemon has it: the store says where, and a program that knows nothing of the manager can use it.</summary>
    [Test]
    public async Task The_console_has_a_terminal_that_the_store_names()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.EchoInput, message: Hello));
        string path = Toolstack.Context.Store.Domain0.Read($"/local/domain/{domain.Id}/console/tty")!;
        Assert.That(path, Does.Match("^/dev/pts/[0-9]+$").And.EqualTo(domain.Console.Terminal));
        await using var screen = new FileStream(path, new FileStreamOptions { Mode = FileMode.Open, Access = FileAccess.ReadWrite, BufferSize = 0 });
        byte[] seen = new byte[Hello.Length];
        screen.ReadExactly(seen);
        Assert.That(System.Text.Encoding.ASCII.GetString(seen), Is.EqualTo(Hello));
        screen.Write("typed"u8);
        seen = new byte[5];
        screen.ReadExactly(seen);
        Assert.That(System.Text.Encoding.ASCII.GetString(seen), Is.EqualTo("TYPED"));
        screen.Write("\u0004"u8);
        await domain.Gone;
        Assert.That(ReadEnd, Throws.Nothing, "gone with the domain");

        // To one who is reading when the other end goes it is an error.
        void ReadEnd()
        {
            try
            {
                Assert.That(screen.ReadByte(), Is.EqualTo(-1));
            }
            catch (IOException)
            {
            }
        }
    }

    [Test]
    public async Task A_crashed_domain_is_preserved_until_it_is_destroyed()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.UndefinedInstruction) with { OnCrash = ShutdownAction.Preserve });
        await EventuallyAsync(() => domain.Describe().State.Letters == "---sc-", "the crash");
        DomainInfo crashed = domain.Describe();
        Assert.That(crashed.State.Reason, Is.EqualTo(DomainShutdownReason.Crash));
        Assert.That(crashed.CrashReport, Does.Contain("InvalidOpcode"));
        Assert.That(domain.Pause, Throws.TypeOf<ToolstackException>().With.Property("Kind").EqualTo(ProblemKind.WrongState));
        string core = FileOf("core");
        await domain.DumpCoreAsync(core, null, default);
        Assert.That(File.ReadAllBytes(core).AsSpan(0, 4).SequenceEqual("\u007fELF"u8));
        await Toolstack.DestroyAsync(domain);
        Assert.That(domain.Describe, Throws.TypeOf<ToolstackException>().With.Property("Kind").EqualTo(ProblemKind.NoSuchDomain));
        Assert.That(Toolstack.Domains, Is.Empty);
    }

    [Test]
    public async Task A_crashed_domain_is_kept_under_another_name_and_made_again()
    {
        ManagedDomain first = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.Crash) with { OnCrash = ShutdownAction.RenameRestart });
        await EventuallyAsync(() => Toolstack.Domains.Count >= 2, "the next incarnation");
        Assert.That(first.Name, Does.Match("^tiny-[0-9]+$"));
        Assert.That(first.Describe().State.Letters, Is.EqualTo("---sc-"));
        Assert.That(Toolstack.Domains.Select(static domain => domain.Uuid), Is.Unique);
    }

    [Test]
    public async Task A_core_is_left_of_a_crashed_domain_where_that_is_asked_for()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.Crash) with { OnCrash = ShutdownAction.CoredumpDestroy });
        await domain.Gone;
        Assert.That(Directory.GetFiles(Path.Combine(StateFolder, "dump"), "tiny-*.core"), Has.Length.EqualTo(1));
    }

    [Test]
    public async Task Pauses_are_counted_as_Xen_counts_them()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        await EventuallyAsync(() => domain.Describe().ProcessorSeconds > 0, "some processor time");
        Assert.That(domain.Describe().State.Letters, Is.EqualTo("r-----"));
        domain.Pause();
        domain.Pause();
        domain.Unpause();
        Assert.That(domain.Describe().State.Letters, Is.EqualTo("--p---"));
        double before = domain.Describe().ProcessorSeconds;
        VcpuInfo vcpu = domain.DescribeVcpus().Single();
        Assert.That(vcpu.Letters, Is.EqualTo("--p"));
        Assert.That(vcpu.Processor, Is.InRange(0, Environment.ProcessorCount - 1));
        Assert.That(domain.Describe().ProcessorSeconds - before, Is.LessThan(0.2));
        domain.Unpause();
        Assert.That(domain.Unpause, Throws.TypeOf<ToolstackException>());
    }

    [Test]
    public async Task What_the_guest_is_asked_stands_in_its_store()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever) with { MaxMemoryMiB = 32, MaxVcpus = 2 });
        string? Node(string name) => Toolstack.Context.Store.Domain0.Read($"/local/domain/{domain.Id}/{name}");
        Assert.That((Node("cpu/0/availability"), Node("cpu/1/availability")), Is.EqualTo(("online", "offline")));
        domain.SetVcpus(2);
        Assert.That(Node("cpu/1/availability"), Is.EqualTo("online"));
        domain.SetMemoryTarget(20 << 10);
        Assert.That((Node("memory/target"), domain.Describe().TargetMemoryKiB), Is.EqualTo(("20480", 20L << 10)));
        domain.SendSysrq("s");
        Assert.That(Node("control/sysrq"), Is.EqualTo("s"));
        domain.RequestShutdown(reboot: true);
        Assert.That(Node("control/shutdown"), Is.EqualTo("reboot"));
        domain.RequestShutdown(reboot: false);
        Assert.That(Node("control/shutdown"), Is.EqualTo("poweroff"));
        domain.Trigger(DomainTrigger.Nmi, 1);
        Assert.Multiple(() =>
        {
            Assert.That(() => domain.SetVcpus(3), Throws.TypeOf<ToolstackException>().With.Message.Contains("1 to 2"));
            Assert.That(() => domain.SetVcpus(0), Throws.TypeOf<ToolstackException>());
            Assert.That(() => domain.SetMemoryTarget(33 << 10), Throws.TypeOf<ToolstackException>().With.Message.Contains("32768"));
            Assert.That(() => domain.SetMemoryMaximum(19 << 10), Throws.TypeOf<ToolstackException>());
            Assert.That(() => domain.SendSysrq("ab"), Throws.TypeOf<ToolstackException>());
            Assert.That(() => domain.Trigger(DomainTrigger.Nmi, 2), Throws.TypeOf<ToolstackException>());
            Assert.That(() => domain.Trigger(DomainTrigger.Power, 0), Throws.TypeOf<ToolstackException>().With.Property("Kind").EqualTo(ProblemKind.NotSupported));
        });
        domain.SetMemoryMaximum(24 << 10);
        Assert.That(domain.Describe().MaximumMemoryKiB, Is.EqualTo(24 << 10));
        Assert.That((domain.Configuration.Vcpus, domain.Configuration.MemoryMiB), Is.EqualTo((2, 20)));
    }

    [Test]
    public async Task What_is_saved_is_what_the_domain_has_and_not_what_its_next_incarnation_gets()
    {
        DomainConfiguration configuration = Tiny(TinyGuestBehaviour.SpinForever) with { MaxMemoryMiB = 32, MaxVcpus = 2 };
        ManagedDomain domain = await Toolstack.CreateAsync(configuration);
        domain.SetMemoryTarget((20 << 10) + 1);
        domain.SetMemoryMaximum(24 << 10);
        domain.SetVcpus(2);
        domain.SetConfiguration(configuration with
        {
            MemoryMiB = 64, MaxMemoryMiB = 128, MaxVcpus = 4, CommandLine = "next", Disks = [new() { Target = "/none", VirtualDevice = "xvda" }],
        });
        DomainConfiguration saved = domain.RetrieveConfiguration();
        Assert.That((saved.Name, saved.Uuid), Is.EqualTo((domain.Name, (Guid?)domain.Uuid)));
        Assert.That((saved.MemoryMiB, saved.MaxMemoryMiB, saved.Vcpus, saved.MaxVcpus), Is.EqualTo((21, 32, 2, 2)));
        Assert.That((saved.CommandLine, saved.Disks.Count), Is.EqualTo(("next", 0)));
    }

    [Test]
    public async Task A_guest_that_does_not_suspend_runs_on_and_leaves_no_file()
    {
        ManagedDomain domain = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        string file = FileOf("saved");
        ToolstackException? refusal = Assert.ThrowsAsync<ToolstackException>(async () => await Toolstack.SaveAsync(domain, file, keep: false, paused: false));
        Assert.That(refusal!.Kind, Is.EqualTo(ProblemKind.GuestTimeout));
        Assert.That(Toolstack.Context.Store.Domain0.Read($"/local/domain/{domain.Id}/control/shutdown"), Is.Empty);
        Assert.That(Directory.GetFiles(FileOf("."), "saved*"), Is.Empty);
        Assert.That(domain.Describe().State.Shutdown, Is.False);
    }

    [Test]
    public async Task Closing_asks_guests_and_destroys_those_that_do_not_listen()
    {
        _ = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever));
        await Toolstack.CloseAsync(TimeSpan.FromMilliseconds(100));
        Assert.That(Toolstack.Domains, Is.Empty);
        Assert.That(async () => await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.SpinForever)), Throws.TypeOf<ToolstackException>());
    }

    [Test]
    public async Task Events_tell_of_a_domains_life()
    {
        using var enough = new CancellationTokenSource();
        var kinds = new List<DomainEventKind>();
        Task following = Task.Run(async () =>
        {
            await foreach (DomainEvent happened in Toolstack.Events.FollowAsync(enough.Token))
            {
                lock (kinds)
                    kinds.Add(happened.Kind);
                if (happened.Kind == DomainEventKind.Destroyed)
                    break;
            }
        });
        await EventuallyAsync(() => { lock (kinds) return kinds.Count == 1; }, "the first event");
        _ = await Toolstack.CreateAsync(Tiny(TinyGuestBehaviour.PowerOff));
        await following.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.That(kinds, Is.EqualTo(new[] { DomainEventKind.Ready, DomainEventKind.Created, DomainEventKind.Shutdown, DomainEventKind.Destroyed }));
    }

    /// <summary>Sets that the domain's next incarnation powers off, unless it is between two at that moment.</summary>
    private void End(string name)
    {
        try
        {
            Toolstack.Find(name).SetConfiguration(Tiny(TinyGuestBehaviour.PowerOff));
        }
        catch (ToolstackException)
        {
            // There is none now.
        }
    }
}
