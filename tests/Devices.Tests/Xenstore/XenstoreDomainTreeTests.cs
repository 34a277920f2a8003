// The toolstack's nodes, and what a stock Linux guest does with them when it boots.
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreDomainTreeTests
{
    private static readonly Guid Uuid = Guid.Parse("0f0e0d0c-0b0a-0908-0706-050403020100");

    private StoreFixture _store = null!;
    private FakeGuest _guest = null!;

    [SetUp]
    public void SetUp()
    {
        _store = new StoreFixture();
        XenstoreDomainTree.WriteDomain0(_store.Domain0);
        XenstoreDomainTree.Create(_store.Domain0, Description);
        _guest = _store.Stranger();
        _store.Connections.Add(_store.Server.IntroduceDomain(3, _guest.Ring));
    }

    [TearDown]
    public void TearDown() => _store.Dispose();

    private static XenstoreDomainDescription Description => new()
    {
        DomainId = 3,
        Name = "guest",
        Uuid = Uuid,
        MaximumMemoryKiB = 131072,
        TargetMemoryKiB = 65536,
        MaximumVcpus = 2,
        OnlineVcpus = 1,
        ConsolePort = 2,
        ConsoleFrame = 4097,
        StorePort = 1,
        StoreFrame = 4096,
        Kernel = "vmlinuz",
        CommandLine = "console=hvc0",
        StartTime = DateTimeOffset.FromUnixTimeMilliseconds(1700000000123),
    };

    [TestCase("name", "guest", "n0 r3")]
    [TestCase("domid", "3", "n0 r3")]
    [TestCase("vm", "/vm/0f0e0d0c-0b0a-0908-0706-050403020100", "n0 r3")]
    [TestCase("memory/static-max", "131072", "n0 r3")]
    [TestCase("memory/target", "65536", "n0 r3")]
    [TestCase("memory/videoram", "0", "n0 r3")]
    [TestCase("cpu/0/availability", "online", "n0 r3")]
    [TestCase("cpu/1/availability", "offline", "n0 r3")]
    [TestCase("store/port", "1", "n0 r3")]
    [TestCase("store/ring-ref", "4096", "n0 r3")]
    [TestCase("console/port", "2", "n0 r3")]
    [TestCase("console/ring-ref", "4097", "n0 r3")]
    [TestCase("console/limit", "1048576", "n0 r3")]
    [TestCase("console/type", "xenconsoled", "n0 r3")]
    [TestCase("console/output", "pty", "n0 r3")]
    [TestCase("console/tty", "", "n0 r3")]
    [TestCase("console/backend", "/local/domain/0/backend/console/3/0", "n0 r3")]
    [TestCase("console/backend-id", "0", "n3 r0")]
    [TestCase("control/shutdown", "", "n3")]
    [TestCase("control/feature-poweroff", "", "n3")]
    [TestCase("control/sysrq", "", "n3")]
    [TestCase("control/platform-feature-xs_reset_watches", "1", "n0 r3")]
    [TestCase("device/suspend/event-channel", "", "n3")]
    [TestCase("device", "", "n0 r3")]
    [TestCase("data", "", "n3")]
    [TestCase("drivers", "", "n3")]
    [TestCase("feature", "", "n3")]
    [TestCase("attr", "", "n3")]
    [TestCase("error", "", "n3")]
    [TestCase("/local/domain/0/backend/console/3/0/state", "1", "n0 r3")]
    [TestCase("/local/domain/0/backend/console/3/0/frontend", "/local/domain/3/console", "n0 r3")]
    [TestCase("/vm/0f0e0d0c-0b0a-0908-0706-050403020100/name", "guest", "n0 r3")]
    [TestCase("/vm/0f0e0d0c-0b0a-0908-0706-050403020100/start_time", "1700000000.12", "n0 r3")]
    [TestCase("/vm/0f0e0d0c-0b0a-0908-0706-050403020100/image/cmdline", "console=hvc0", "n0 r3")]
    public void The_guest_finds_what_it_finds_under_xl(string path, string value, string permissions)
    {
        Assert.That(_guest.Read(path), Is.EqualTo(value));
        Assert.That(_guest.Call(XenstoreMessageType.GetPermissions, path + "\0").Strings, Is.EqualTo(permissions.Split(' ')));
    }

    [Test]
    public void The_guest_cannot_change_what_is_the_hosts()
    {
        foreach (string path in new[] { "name", "memory/target", "console/tty", "console/ring-ref", "vm", "new", "control/new" })
            Assert.That(_guest.Write(path, "x"), Is.EqualTo("EACCES"), path);
        Assert.That(_guest.Do(XenstoreMessageType.Remove, "/local/domain/3\0"), Is.EqualTo("EACCES"));
        Assert.That(_guest.Read("/libxl/3/type"), Is.EqualTo("EACCES"));
        Assert.That(_store.Domain0.Read("/libxl/3/type"), Is.EqualTo("pv"));
        Assert.That(_guest.Write("data/x", "its own"), Is.Empty);
    }

    /// <summary>
    /// What drivers/xen of Linux 6.1 asks on boot: xenbus_probe_frontend, manage.c, cpu_hotplug.c, xen-balloon.c and the
    /// xenbus file system's user. Tokens are kernel addresses.
    /// </summary>
    [Test]
    public void Linux_boots()
    {
        Assert.That(_guest.Read("control/platform-feature-xs_reset_watches"), Is.EqualTo("1"));
        Assert.That(_guest.Do(XenstoreMessageType.ResetWatches, "\0"), Is.Empty);

        // Devices: list, watch, and for each device its state.
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "device\0").Strings, Is.EqualTo(new[] { "suspend" }));
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "device/suspend\0").Strings, Is.EqualTo(new[] { "event-channel" }));
        Assert.That(_guest.Read("device/suspend/event-channel/state"), Is.EqualTo("ENOENT"));
        Assert.That(_guest.Watch("device", "FFFFFFFF82A4B3C0"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("device|FFFFFFFF82A4B3C0"));

        // Shutdown requests and their acknowledgement.
        Assert.That(_guest.Watch("control/shutdown", "FFFFFFFF82A4A000"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("control/shutdown|FFFFFFFF82A4A000"));
        Assert.That(_guest.Watch("control/sysrq", "FFFFFFFF82A4A100"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("control/sysrq|FFFFFFFF82A4A100"));
        uint transaction = _guest.Begin();
        Assert.That(_guest.Read("control/shutdown", transaction), Is.Empty);
        Assert.That(_guest.End(transaction, commit: false), Is.Empty);
        foreach (string feature in new[] { "poweroff", "reboot", "suspend" })
            Assert.That(_guest.Write("control/feature-" + feature, "1"), Is.Empty);

        // vCPUs and memory.
        Assert.That(_guest.Watch("cpu", "FFFFFFFF82A4A200"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("cpu|FFFFFFFF82A4A200"));
        Assert.That(_guest.Read("cpu/1/availability"), Is.EqualTo("offline"));
        Assert.That(_guest.Watch("memory/target", "FFFFFFFF82A4A300"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("memory/target|FFFFFFFF82A4A300"));
        Assert.That(_guest.Read("memory/static-max"), Is.EqualTo("131072"));

        // The host wants memory back.
        XenstoreDomainTree.SetMemoryTarget(_store.Domain0, 3, 40960);
        Assert.That(_guest.NextEvent(), Is.EqualTo("memory/target|FFFFFFFF82A4A300"));
        Assert.That(_guest.Read("memory/target"), Is.EqualTo("40960"));
        Assert.That(_guest.Read("/vm/0f0e0d0c-0b0a-0908-0706-050403020100/memory"), Is.EqualTo("40"), "in MiB");

        // The host asks for a shutdown, the guest takes the request and acknowledges it.
        _store.Domain0.Write("/local/domain/3/control/shutdown", "poweroff");
        Assert.That(_guest.NextEvent(), Is.EqualTo("control/shutdown|FFFFFFFF82A4A000"));
        transaction = _guest.Begin();
        Assert.That(_guest.Read("control/shutdown", transaction), Is.EqualTo("poweroff"));
        Assert.That(_guest.Write("control/shutdown", "", transaction), Is.Empty);
        Assert.That(_guest.End(transaction), Is.Empty);
        Assert.That(_store.Domain0.Read("/local/domain/3/control/shutdown"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("control/shutdown|FFFFFFFF82A4A000"), "its own write");

        // The host plugs a vCPU.
        _store.Domain0.Write("/local/domain/3/cpu/1/availability", "online");
        Assert.That(_guest.NextEvent(), Is.EqualTo("cpu/1/availability|FFFFFFFF82A4A200"));
    }

    [Test]
    public void A_domain_leaves_nothing_behind()
    {
        Assert.That(_guest.Write("data/x", ""), Is.Empty);
        Assert.That(_store.Server.ReleaseDomainAsync(3).AsTask().Result, Is.True);
        XenstoreDomainTree.Remove(_store.Domain0, 3);
        Assert.That(_store.Domain0.List("/local/domain"), Is.EqualTo(new[] { "0" }));
        Assert.That(_store.Domain0.List("/vm"), Is.Empty);
        Assert.That(_store.Domain0.List("/libxl"), Is.Empty);
        Assert.That(_store.Domain0.List("/local/domain/0/backend/console"), Is.Empty);
        XenstoreDomainTree.Remove(_store.Domain0, 3);
        XenstoreDomainTree.Create(_store.Domain0, Description);
        Assert.That(_store.Domain0.List("/local/domain/3/data"), Is.Empty);
    }

    [Test]
    public void Senseless_domains_are_refused()
    {
        Assert.That(() => XenstoreDomainTree.Create(_store.Domain0, Description with { DomainId = 0 }), Throws.ArgumentException);
        Assert.That(() => XenstoreDomainTree.Create(_store.Domain0, Description with { OnlineVcpus = 3 }), Throws.ArgumentException);
        Assert.That(() => XenstoreDomainTree.Create(_store.Domain0, Description with { OnlineVcpus = 0 }), Throws.ArgumentException);
    }

    [Test]
    public void The_host_is_told_what_it_did_wrong()
    {
        Assert.That(() => _store.Domain0.Write("/a b", ""), Throws.TypeOf<XenstoreException>()
            .With.Message.Contains("write of \"/a b\" failed with EINVAL"));
        Assert.That(() => _store.Domain0.Remove("/"), Throws.TypeOf<XenstoreException>());
        Assert.That(() => _store.Domain0.SetPermissions("/none", XenstorePermissions.Domain0Only), Throws.TypeOf<XenstoreException>()
            .With.Property(nameof(XenstoreException.Error)).EqualTo(XenstoreError.ENOENT));
        Assert.That(() => _store.Domain0.Watch("//", static _ => { }), Throws.TypeOf<XenstoreException>());
        Assert.That(_store.Domain0.Read("/none"), Is.Null);
        Assert.That(_store.Domain0.GetPermissions("/none"), Is.Null);
        Assert.That(_store.Domain0.List("/none"), Is.Empty);
        Assert.That(() => _store.Domain0.Remove("/none/below"), Throws.Nothing);
    }
}
