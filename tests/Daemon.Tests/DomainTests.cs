// Domains by the API: the typed client against the daemon, with tiny guests.

using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Guests;
using XenSharp.Kvm;

namespace XenSharp.Daemon.Tests;

[TestFixture]
[Category("Kvm")]
[CancelAfter(120_000)]
public sealed class DomainTests : DaemonFixture
{
    [SetUp]
    public void NeedKvm()
    {
        try
        {
            _ = Host.Capabilities;
        }
        catch (KvmException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [Test]
    public async Task A_domain_from_a_configuration_file_is_looked_at_typed_to_and_destroyed()
    {
        CreateDomainResult made = await CreateAsync(TinyGuestBehaviour.EchoInput, "ready\n", "memory=16\nvcpus=1\ncpuid=[\"0xb:eax=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1\"]\nnonsense=1");
        Assert.That(made.Domain!.Name, Is.EqualTo("tiny"));
        Assert.That(made.Warnings, Has.Some.Contains("nonsense").And.Some.Contains("cpuid"));
        Assert.That(made.Configuration!.Text, Does.Contain("memory"));

        await using (Stream console = await Client.AttachConsoleAsync("tiny"))
        {
            Assert.That(await ReadAsync(console, 6), Is.EqualTo("ready\n"));
            await console.WriteAsync("abc\n"u8.ToArray());
            Assert.That(await ReadAsync(console, 3), Is.EqualTo("ABC"));
        }

        Assert.That(Encoding.ASCII.GetString(await Client.GetConsoleHistoryAsync("tiny")), Does.StartWith("ready\nABC"));
        await Client.PauseAsync("tiny");
        Assert.That((await Client.GetAsync("tiny")).State.Paused, Is.True);
        await Client.UnpauseAsync("tiny");
        _ = await RefusedAsync(() => Client.UnpauseAsync("tiny"), ProblemKind.WrongState, 409);
        DomainInfo renamed = await Client.RenameAsync("tiny", "other");
        Assert.That((await Client.ListAsync()).Single().Name, Is.EqualTo("other"));
        Assert.That((await Client.ListVcpusAsync("other")).Single().Online, Is.True);
        _ = await RefusedAsync(() => Client.SetVcpusAsync("other", 2), ProblemKind.BadRequest, 400);
        _ = await RefusedAsync(() => Client.SetMemoryTargetAsync("other", 1L << 40), ProblemKind.BadRequest, 400);
        await Client.SetMemoryTargetAsync("other", 12 << 10);
        await Client.SysrqAsync("other", "s");
        await Client.TriggerAsync("other", new TriggerRequest { Trigger = DomainTrigger.Nmi });
        await Client.ShutdownAsync("other");
        Assert.That((await Client.GetConfigurationAsync("other")).Text, Does.Contain("other"));
        Assert.That(await Client.ListBlockDevicesAsync("other"), Is.Empty);
        Assert.That(await Client.ListNetworkDevicesAsync("other"), Is.Empty);

        await using Stream last = await Client.AttachConsoleAsync("other", history: false);
        await Client.DestroyAsync(renamed.Uuid.ToString("D"));
        Assert.That(await ReadAsync(last, 1), Is.Empty, "the console ends with the domain");
        _ = await RefusedAsync(() => Client.GetAsync("other"), ProblemKind.NoSuchDomain, 404);
        Assert.That(await Client.ListAsync(), Is.Empty);
    }

    [Test]
    public async Task The_configuration_that_is_told_makes_the_same_domain_again()
    {
        CreateDomainResult first = await CreateAsync(TinyGuestBehaviour.SpinForever);
        await Client.DestroyAsync("tiny");
        var again = new DomainConfigurationDocument { Json = first.Configuration!.Json, Settings = ["memory=20"] };
        CreateDomainResult second = await Client.CreateAsync(new CreateDomainRequest { Configuration = again, Paused = true });
        Assert.That((second.Domain!.Uuid, second.Domain.State.Letters), Is.EqualTo((first.Domain!.Uuid, "--p---")));
        Assert.That(second.Domain.TargetMemoryKiB, Is.EqualTo(20 << 10));
        _ = await RefusedAsync(() => Client.CreateAsync(new CreateDomainRequest { Configuration = again }), ProblemKind.NameTaken, 409);
    }

    /// <summary>The kernel comes through a pipe, so that the daemon is in the middle of making the domain when the client gives up.</summary>
    [TestCase(true)]
    [TestCase(false)]
    public async Task Who_gives_up_a_domain_leaves_none(bool isKernel)
    {
        string pipe = FileOf("pipe");
        using (var mkfifo = System.Diagnostics.Process.Start("mkfifo", pipe))
            await mkfifo.WaitForExitAsync();
        var request = new CreateDomainRequest
        {
            Configuration = new DomainConfigurationDocument { Text = $"name=\"tiny\"\nkernel=\"{pipe}\"\nmemory=16" }, Uuid = Guid.NewGuid(),
        };
        using var cancellation = new CancellationTokenSource();
        Task<CreateDomainResult> making = Client.CreateAsync(request, cancellation.Token);
        Task gone;

        // It opens when the daemon reads.
        await using (FileStream kernel = await Task.Run(() => new FileStream(pipe, FileMode.Open, FileAccess.Write, FileShare.ReadWrite)))
        {
            await cancellation.CancelAsync();
            Assert.That(async () => await making, Throws.InstanceOf<OperationCanceledException>());
            gone = Client.DestroyAsync(request.Uuid.Value.ToString("D"));
            Assert.That(gone.IsCompleted, Is.False, "there is something to be taken back yet");
            await kernel.WriteAsync(isKernel ? TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.SpinForever }) : [1, 2, 3]);
        }

        try
        {
            await gone;
        }
        catch (DaemonException none) when (none.Kind == ProblemKind.NoSuchDomain)
        {
            // It had heard that nobody waits.
        }

        Assert.That(await Client.ListAsync(), Is.Empty);
        CreateDomainResult next = await CreateAsync(TinyGuestBehaviour.SpinForever);
        Assert.That(next.Domain!.Name, Is.EqualTo("tiny"), "the name is free");
        Assert.That(next.Domain.Uuid, Is.Not.EqualTo(request.Uuid.Value));
    }

    [Test]
    public async Task Channels_are_listed()
    {
        _ = await CreateAsync(TinyGuestBehaviour.SpinForever, settings: $"memory=16\nchannel=[\"name=a,connection=pty\", \"name=b,connection=socket,path={FileOf("b")}\"]");
        IReadOnlyList<ChannelInfo> channels = await Client.ListChannelsAsync("tiny");
        Assert.That(channels.Select(static channel => (channel.DeviceId, channel.Name, channel.Connection)), Is.EqualTo(new[] { (1, "a", "pty"), (2, "b", "socket") }));
        Assert.That(channels[0].Path, Does.StartWith("/dev/pts/"));
        Assert.That(channels[1].Path, Is.EqualTo(FileOf("b")));
        Assert.That((channels[0].State, channels[0].EventChannel, channels[0].RingReference), Is.EqualTo((1, (long?)null, (long?)null)));
    }

    [Test]
    public async Task A_dry_run_makes_nothing()
    {
        CreateDomainResult result = await Client.CreateAsync(new CreateDomainRequest { Configuration = Tiny(TinyGuestBehaviour.SpinForever), DryRun = true });
        Assert.That(result.Domain, Is.Null);
        Assert.That(await Client.ListAsync(), Is.Empty);
    }

    [Test]
    public async Task A_disk_comes_and_goes()
    {
        string image = FileOf("disk.img");
        await File.WriteAllBytesAsync(image, new byte[1 << 20]);
        _ = await CreateAsync(TinyGuestBehaviour.SpinForever, settings: $"disk=['{image},raw,xvda,w']");
        Assert.That((await Client.ListBlockDevicesAsync("tiny")).Single().VirtualDevice, Is.EqualTo(51712));
        ApiProblem inUse = await RefusedAsync(
            () => Client.AttachBlockDeviceAsync("tiny", new AttachDeviceRequest { Specification = [$"{image},raw,xvdb,w"] }), ProblemKind.BadConfiguration, 422);
        Assert.That(inUse.Detail, Does.Contain("in use"));
        await Client.DetachBlockDeviceAsync("tiny", "xvda");
        BlockDeviceInfo attached = await Client.AttachBlockDeviceAsync("tiny", new AttachDeviceRequest { Specification = [$"{image}", "raw", "xvdb", "r"] });
        Assert.That((attached.Name, attached.ReadOnly, attached.Target), Is.EqualTo(("xvdb", true, image)));
        Assert.That((await Client.GetAsync("tiny")).Io.BlockDevices, Is.EqualTo(1));
        _ = await RefusedAsync(() => Client.DetachBlockDeviceAsync("tiny", "xvdc"), ProblemKind.NoSuchDevice, 404);
        _ = await RefusedAsync(
            () => Client.AttachBlockDeviceAsync("tiny", new AttachDeviceRequest { Specification = ["nonsense=1"] }), ProblemKind.BadRequest, 400);
        await Client.DetachBlockDeviceAsync("tiny", "51728");
        Assert.That(await Client.ListBlockDevicesAsync("tiny"), Is.Empty);
    }

    [Test]
    public async Task A_network_interface_comes_and_goes()
    {
        _ = await CreateAsync(TinyGuestBehaviour.SpinForever, settings: "vif=['bridge=xs-test-lan']");
        NetworkDeviceInfo first = (await Client.ListNetworkDevicesAsync("tiny")).Single();
        Assert.That((first.DeviceId, first.Bridge), Is.EqualTo((0, "xs-test-lan")));
        Assert.That(first.Mac, Does.StartWith("00:16:3e:"));
        NetworkDeviceInfo second = await Client.AttachNetworkDeviceAsync(
            "tiny", new AttachDeviceRequest { Specification = ["mac=00:16:3e:01:02:03", "bridge=xs-test-lan"] });
        Assert.That(second.DeviceId, Is.EqualTo(1));
        await Client.DetachNetworkDeviceAsync("tiny", "00:16:3e:01:02:03");
        await Client.DetachNetworkDeviceAsync("tiny", "0");
        Assert.That(await Client.ListNetworkDevicesAsync("tiny"), Is.Empty);
    }

    [Test]
    public async Task A_core_is_dumped_with_its_progress()
    {
        _ = await CreateAsync(TinyGuestBehaviour.SpinForever);
        string core = FileOf("core");
        var updates = new List<OperationUpdate>();
        await Client.DumpCoreAsync("tiny", new DumpCoreRequest { Path = core }, updates.Add);
        Assert.That(updates[^1].Finished, Is.True);
        Assert.That(new FileInfo(core).Length, Is.GreaterThan(1 << 20));
        _ = await RefusedAsync(() => Client.DumpCoreAsync("tiny", new DumpCoreRequest { Path = "core" }), ProblemKind.BadRequest, 400);
        _ = await RefusedAsync(() => Client.DumpCoreAsync("tiny", new DumpCoreRequest { Path = FileOf("none/core") }), ProblemKind.BadRequest, 400);
        _ = await RefusedAsync(() => Client.RestoreAsync(new RestoreDomainRequest { Path = core }), ProblemKind.BadRequest, 400);
    }

    private static async Task<string> ReadAsync(Stream stream, int count)
    {
        byte[] bytes = new byte[count];
        using var patience = new CancellationTokenSource(TimeSpan.FromSeconds(60));
        int length = await stream.ReadAtLeastAsync(bytes, count, throwOnEndOfStream: false, patience.Token);
        return Encoding.ASCII.GetString(bytes, 0, length);
    }

    private DomainConfigurationDocument Tiny(TinyGuestBehaviour behaviour, string message = "", string settings = "")
    {
        File.WriteAllBytes(FileOf("kernel"), TinyGuest.Build(new TinyGuestOptions { Behaviour = behaviour, Message = message }));
        return new DomainConfigurationDocument { Text = $"name='tiny'\nkernel='kernel'\nmemory=16\n{settings}\n", Folder = FileOf("."), FileName = "tiny.cfg" };
    }

    private Task<CreateDomainResult> CreateAsync(TinyGuestBehaviour behaviour, string message = "", string settings = "")
        => Client.CreateAsync(new CreateDomainRequest { Configuration = Tiny(behaviour, message, settings) });
}
