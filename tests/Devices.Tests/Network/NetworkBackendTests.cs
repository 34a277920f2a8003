// The life of a network interface: its nodes, its connections, what guests do wrong, and its end.
using CsCheck;
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

public sealed class NetworkBackendTests
{
    [Test]
    public async Task The_nodes_are_libxls_and_netbacks()
    {
        await using var fixture = new VifFixture(static options => options with
        {
            DeviceId = 3, Bridge = "br7", Ip = "10.0.0.2", InterfaceName = "guest0", Mtu = 9000, Trusted = false,
            Rate = new TransmitRate(1_250_000, TimeSpan.FromMilliseconds(50)),
        });
        fixture.AwaitState(XenbusState.InitWait);
        var expected = new Dictionary<string, string>
        {
            ["frontend"] = "/local/domain/7/device/vif/3", ["frontend-id"] = "7", ["online"] = "1", ["state"] = "2",
            ["script"] = "/etc/xen/scripts/vif-bridge", ["vifname"] = "guest0", ["mac"] = "00:16:3e:00:00:02", ["ip"] = "10.0.0.2",
            ["rate"] = "1250000,50000", ["mtu"] = "9000", ["bridge"] = "br7", ["handle"] = "3", ["type"] = "vif", ["hotplug-status"] = "connected",
            ["feature-sg"] = "1", ["feature-gso-tcpv4"] = "1", ["feature-gso-tcpv6"] = "1", ["feature-ipv6-csum-offload"] = "1",
            ["feature-rx-copy"] = "1", ["feature-rx-flip"] = "0", ["feature-multicast-control"] = "1", ["feature-split-event-channels"] = "1",
            ["feature-dynamic-multicast-control"] = "0", ["feature-xdp-headroom"] = "0", ["feature-ctrl-ring"] = "0", ["multi-queue-max-queues"] = "4",
        };
        Assert.That(Nodes(fixture.Store, "/local/domain/0/backend/vif/7/3"), Is.EquivalentTo(expected));
        Assert.That(Nodes(fixture.Store, "/local/domain/7/device/vif/3"), Is.EquivalentTo(new Dictionary<string, string>
        {
            ["backend"] = "/local/domain/0/backend/vif/7/3", ["backend-id"] = "0", ["state"] = "1", ["handle"] = "3", ["mac"] = "00:16:3e:00:00:02",
            ["mtu"] = "9000", ["trusted"] = "0",
        }));
        Assert.That(NetworkBackend.NextId(fixture.Store, 7), Is.EqualTo(4));
        Assert.That(NetworkBackend.NextId(fixture.Store, 8), Is.Zero);
        Assert.That(NetworkBackend.InterfaceName(7, new NetworkDeviceOptions { DeviceId = 3 }), Is.EqualTo("vif7.3"));
    }

    [Test]
    public async Task Frames_go_both_ways([Values] bool split, [Values(1, 3)] int queues)
    {
        await using var fixture = new VifFixture();
        fixture.Connect(queues, split);
        Assert.That(fixture.Backend.QueueCount, Is.EqualTo(queues));
        for (int i = 0; i < queues; i++)
        {
            byte[] frame = Plain(Alice, Bob, 60 + i);
            fixture.SendFrame(frame, i);
            VifFixture.Await(() => fixture.Port.Frames.Count == i + 1, "the frame goes out");
            Assert.That(fixture.Port.Frames[i].Data, Is.EqualTo(frame));
            fixture.PutPage(8 + i, i);
        }

        // Of many flows each queue gets one at least; there is a page for the first of each.
        for (ushort port = 1; port <= 100; port++)
            Assert.That(fixture.Port.Give(Udp(4, [1, 2, 3], port)), Is.EqualTo(new FrameDelivery.Result(1, 45, false)));
        VifFixture.Await(() => Enumerable.Range(0, queues).All(i => fixture.Receive(i).Responses == 1), "each queue gives one to the guest");
        for (int i = 0; i < queues; i++)
            Assert.That(fixture.Data(8 + i)[..34].SequenceEqual(Udp(4, [1, 2, 3]).AsSpan(0, 34)), Is.True);
        VifFixture.Await(() => fixture.Backend.Statistics.TransmittedFrames == queues, "a frame is counted when it has been taken");
    }

    [Test]
    public async Task A_front_end_gets_only_what_it_says_it_takes()
    {
        await using var fixture = new VifFixture();
        fixture.AwaitState(XenbusState.InitWait);
        fixture.Publish();
        foreach (string feature in new[] { "feature-sg", "feature-ipv6-csum-offload" })
            fixture.Write(feature, 0);
        fixture.Write("feature-no-csum-offload", 1);
        fixture.SetState(XenbusState.Connected);
        fixture.AwaitState(XenbusState.Connected);
        for (int i = 0; i < 4; i++)
            fixture.PutPage(i);
        Assert.That(fixture.Port.Give(Tcp(4, new byte[4000]), OffloadTests.Cut(4, 1448, 54, 0)).Frames, Is.EqualTo(3));
        VifFixture.Await(() => fixture.Receive().Responses == 3, "three segments");
        Assert.That(HasRightChecksums(fixture.Data(0)[..(54 + 1448)]), Is.True);
        Assert.That(fixture.Port.Give(Plain(Bob, Alice, 4097)).Dropped, Is.True, "more than a page");
    }

    [Test]
    public async Task Groups_are_filtered_when_the_guest_asks_for_that()
    {
        await using var fixture = new VifFixture();
        fixture.AwaitState(XenbusState.InitWait);
        fixture.Publish();
        fixture.Write("request-multicast-control", 1);
        fixture.SetState(XenbusState.Connected);
        fixture.AwaitState(XenbusState.Connected);
        fixture.PutPage(0);
        fixture.PutPage(1);
        _ = fixture.Port.Give(Plain(new MacAddress(0x01005e_000001), Alice, 60));
        _ = fixture.Port.Give(Plain(MacAddress.Broadcast, Alice, 61));
        VifFixture.Await(() => fixture.Receive().Responses == 1, "only the broadcast");
        Assert.That(fixture.Data(0)[..6].ToArray(), Is.All.EqualTo((byte)0xff));
    }

    [TestCase("request-rx-copy", "0")]
    [TestCase("request-rx-copy", null)]
    [TestCase("request-rx-copy", "yes")]
    [TestCase("multi-queue-num-queues", "0")]
    [TestCase("multi-queue-num-queues", "5")]
    [TestCase("multi-queue-num-queues", "2")]
    [TestCase("multi-queue-num-queues", "-1")]
    [TestCase("tx-ring-ref", null)]
    [TestCase("tx-ring-ref", "99999")]
    [TestCase("rx-ring-ref", "99999999999999999999")]
    [TestCase("rx-ring-ref", "0x10")]
    [TestCase("event-channel-tx", "0")]
    [TestCase("event-channel-tx", "3000000000")]
    [TestCase("event-channel-rx", null)]
    [TestCase("event-channel-rx", "")]
    [TestCase("feature-gso-tcpv4", "1 ")]
    public async Task A_front_end_that_says_nonsense_is_told_so_and_may_start_anew(string node, string? value)
    {
        await using var fixture = new VifFixture();
        fixture.AwaitState(XenbusState.InitWait);
        fixture.Publish();
        if (value == null)
            fixture.Store.Remove($"{fixture.Front}/{node}");
        else
            fixture.Write(node, value);
        fixture.SetState(XenbusState.Connected);
        fixture.AwaitState(XenbusState.Closing);
        Assert.That(fixture.Error, Does.Match("^[0-9]+ .+"));
        Assert.That(fixture.HasMappings(), Is.False);
        VifFixture.Await(() => fixture.Reports.Count == 1, "people are told");
        Assert.That(fixture.Reports.Single(), Does.StartWith("vif 0 of domain 7: "));
        Assert.That(fixture.Port.Give(Plain(Bob, Alice, 60)).Frames, Is.EqualTo(1));
        Assert.That(fixture.Backend.Statistics.ReceiveDrops, Is.EqualTo(1));

        fixture.SetState(XenbusState.Closed);
        fixture.AwaitState(XenbusState.Closed);
        fixture.ClosePorts();
        foreach (string name in fixture.Store.List(fixture.Front).Where(static name => name.StartsWith("multi", StringComparison.Ordinal)))
            fixture.Store.Remove($"{fixture.Front}/{name}");
        fixture.SetState(XenbusState.Initialising);
        fixture.Connect();
        fixture.SendFrame(Plain(Alice, Bob, 60));
        VifFixture.Await(() => fixture.Port.Frames.Count == 1, "the frame goes out");
    }

    [Test]
    public async Task A_front_end_that_breaks_its_ring_loses_the_connection()
    {
        await using var fixture = new VifFixture();
        fixture.Connect();
        fixture.Transmit().Put(FakeNetfront.Request(VifFixture.DataReference(0), 4090, 0, 1, 100));
        fixture.SendFrame(Plain(Alice, Bob, 60));
        fixture.AwaitState(XenbusState.Closing);
        Assert.That(fixture.Error, Does.Contain("beyond its page"));
        Assert.That(fixture.HasMappings(), Is.False);
        Assert.That(fixture.Port.Frames, Is.Empty);
        Assert.That(fixture.Backend.QueueCount, Is.Zero);
    }

    /// <summary>As after a module is loaded again, or a resume.</summary>
    [Test]
    public async Task A_front_end_may_come_again()
    {
        await using var fixture = new VifFixture();
        for (int i = 0; i < 3; i++)
        {
            fixture.Connect(queues: 1, split: true);
            fixture.SendFrame(Plain(Alice, Bob, 60));
            VifFixture.Await(() => fixture.Port.Frames.Count == i + 1, "the frame goes out");
            fixture.SetState(XenbusState.Closing);
            fixture.AwaitState(XenbusState.Closing);
            fixture.SetState(XenbusState.Closed);
            fixture.AwaitState(XenbusState.Closed);
            Assert.That(fixture.HasMappings(), Is.False);
            fixture.ClosePorts();
            fixture.SetState(XenbusState.Initialising);
        }
    }

    [Test]
    public async Task An_interface_is_taken_away_when_the_guest_has_closed_it()
    {
        await using var fixture = new VifFixture();
        fixture.Connect();
        Task<bool> removal = fixture.Backend.RemoveAsync(VifFixture.Patience, force: false);
        fixture.AwaitState(XenbusState.Closing);
        Assert.That((fixture.Store.Read(fixture.Back + "/online"), removal.IsCompleted, fixture.Port.IsDisposed), Is.EqualTo(("0", false, false)));
        fixture.SetState(XenbusState.Closed);
        Assert.That(await removal, Is.True);
        Assert.That((fixture.Port.IsDisposed, fixture.Store.Exists(fixture.Back)), Is.EqualTo((true, false)));
    }

    [Test]
    public async Task An_interface_can_be_taken_from_a_guest_that_keeps_it()
    {
        await using var fixture = new VifFixture();
        fixture.Connect();
        Assert.That(await fixture.Backend.RemoveAsync(TimeSpan.FromMilliseconds(20), force: false), Is.False);
        Assert.That(await fixture.Backend.RemoveAsync(TimeSpan.FromMilliseconds(20), force: true), Is.True);
        Assert.That((fixture.Port.IsDisposed, fixture.HasMappings()), Is.EqualTo((true, false)));
    }

    [Test]
    public async Task A_domain_that_ends_leaves_nothing()
    {
        await using var fixture = new VifFixture();
        fixture.Connect();
        for (int i = 0; i < 100; i++)
            _ = fixture.Port.Give(Plain(Bob, Alice, 1514));
        fixture.SendFrame(Plain(Alice, Bob, 60));
        fixture.EndDomain();
        VifFixture.Await(() => fixture.Backend.QueueCount == 0, "the connection ends with the domain");
        _ = fixture.Port.Give(Plain(Bob, Alice, 60));
    }

    /// <summary>Whatever a guest writes, it can connect when it has put its nodes right.</summary>
    [Test]
    public void Any_nodes_hurt_nobody()
    {
        string[] names =
        [
            "state", "tx-ring-ref", "rx-ring-ref", "event-channel", "event-channel-tx", "event-channel-rx", "request-rx-copy", "feature-sg",
            "feature-rx-notify", "multi-queue-num-queues", "queue-0/tx-ring-ref", "queue-1", "backend", "mac", "request-multicast-control",
        ];
        Gen<string> values = Gen.OneOf(
            Gen.Int[-1, 9].Select(static n => n.ToString(System.Globalization.CultureInfo.InvariantCulture)), Gen.Int[99, 104].Select(static n => $"{n}"),
            Gen.String[0, 20], Gen.Const("18446744073709551616"));
        Gen.Select(Gen.Int[0, names.Length - 1], values, Gen.Bool).Array[1, 12].Sample(
            changes =>
            {
                var fixture = new VifFixture();
                fixture.AwaitState(XenbusState.InitWait);
                fixture.Publish();
                foreach ((int name, string value, bool settles) in changes)
                {
                    fixture.Write(names[name], value);
                    if (settles)
                        fixture.SetState(XenbusState.Connected);
                }

                // Nonsense is over: the driver is loaded again.
                fixture.SetState(XenbusState.Closed);
                fixture.AwaitState(XenbusState.Closed);
                fixture.ClosePorts();
                foreach (string name in names)
                    fixture.Store.Remove($"{fixture.Front}/{name}");
                fixture.SetState(XenbusState.Initialising);
                fixture.Connect();
                fixture.DisposeAsync().AsTask().GetAwaiter().GetResult();
            },
            iter: 60, threads: 1);
    }

    [Test]
    public async Task Options_that_make_no_sense_are_refused()
    {
        await using var fixture = new VifFixture();
        foreach (NetworkDeviceOptions options in new NetworkDeviceOptions[]
                 {
                     new() { Mac = MacAddress.Broadcast }, new() { Mac = new MacAddress(0) }, new() { Rate = new TransmitRate(0, TimeSpan.FromSeconds(1)) },
                     new() { Rate = new TransmitRate(1, TimeSpan.Zero) }, new() { Mtu = 67 }, new() { Mtu = 65536 }, new() { MaximumQueues = 0 },
                     new() { MaximumQueues = 65 },
                 })
        {
            using var port = new FakePort();
            Assert.That(() => NetworkBackend.Create(fixture.Guest.Fake.Domain, fixture.Store, options with { DeviceId = 9 }, port), Throws.ArgumentException);
        }

        using var second = new FakePort();
        Assert.That(() => NetworkBackend.Create(fixture.Guest.Fake.Domain, fixture.Store, new NetworkDeviceOptions(), second), Throws.InvalidOperationException);
    }

    private static Dictionary<string, string> Nodes(XenstoreAccessor store, string folder)
        => store.List(folder).ToDictionary(static name => name, name => store.Read($"{folder}/{name}")!);
}
