// Who gets which frame of a switch.
using XenSharp.Devices.Network;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

public sealed class NetworkSwitchTests
{
    private readonly ManualTime _time = new();
    private NetworkSwitch _switch = null!;
    private INetworkPort[] _ports = [];
    private Collector[] _stations = [];

    [SetUp]
    public void SetUp()
    {
        _switch = new NetworkSwitch("test", _time);
        _ports = [.. Enumerable.Range(0, 4).Select(i => _switch.AddPort($"port{i}"))];
        _stations = [.. _ports.Select(static _ => new Collector())];
        for (int i = 0; i < _ports.Length; i++)
            _ports[i].Connect(_stations[i]);
    }

    [TearDown]
    public void TearDown()
    {
        foreach (INetworkPort port in _ports)
            port.Dispose();
        Assert.That((_switch.Ports.Count, _switch.StationCount), Is.EqualTo((0, 0)));
    }

    [Test]
    public void A_station_that_has_spoken_is_known()
    {
        Send(0, Bob, Alice);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 1, 1, 1 }), "nobody knows where Bob is");
        Send(2, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 1, 0, 0, 0 }));
        Send(0, Bob, Alice);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 1, 0 }));
        Assert.That(_switch.FloodedFrames, Is.EqualTo(1));
        PortStatistics port = _ports[2].Statistics;
        Assert.That((port.FramesIn, port.FramesOut, port.BytesOut, port.DropsOut), Is.EqualTo((1, 2, 120, 0)));
    }

    [Test]
    public void A_station_that_moves_is_found_where_it_spoke_last()
    {
        Send(0, Bob, Alice);
        Send(3, Bob, Alice);
        _ = Received();
        Send(1, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 0, 1 }));
    }

    [Test]
    public void A_station_that_says_nothing_is_forgotten()
    {
        Send(0, Bob, Alice);
        _time.Advance(MacTable<object>.Age);
        _ = Received();
        Send(1, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 1, 0, 0, 0 }));
        _time.Advance(TimeSpan.FromSeconds(1));
        Send(1, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 1, 0, 1, 1 }));
    }

    [Test]
    public void No_frame_goes_back()
    {
        Send(0, Bob, Alice);
        _ = Received();
        Send(0, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 0, 0 }), "Alice is behind the same port");
    }

    [Test]
    public void Groups_go_to_all_and_link_local_ones_to_nobody()
    {
        Send(1, MacAddress.Broadcast, Alice);
        Send(1, new MacAddress(0x01005e_000001), Alice);
        Assert.That(Received(), Is.EqualTo(new[] { 2, 0, 2, 2 }));
        Send(1, new MacAddress(0x0180c2_00000e), Alice);
        Send(1, Bob, MacAddress.Broadcast);
        Send(1, Bob, new MacAddress(0));
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 0, 0 }));
        Assert.That(_ports[1].Statistics.DropsIn, Is.EqualTo(3));
    }

    [Test]
    public void A_port_that_makes_up_addresses_forgets_only_its_own()
    {
        Send(0, Bob, Alice);
        for (ulong i = 0; i < 3000; i++)
            Send(1, MacAddress.Broadcast, new MacAddress(0x020000_000000 + i));
        Assert.That(_switch.StationCount, Is.EqualTo(1 + MacTable<object>.StationsPerPort));
        _ = Received();
        Send(2, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 1, 0, 0, 0 }));

        // Once those are old there is room again.
        _time.Advance(MacTable<object>.Age + TimeSpan.FromSeconds(1));
        Send(1, Alice, new MacAddress(0x020000_ffffff));
        _ = Received();
        Send(2, new MacAddress(0x020000_ffffff), Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 1, 0, 0 }));
    }

    [Test]
    public void A_port_that_is_gone_has_no_stations()
    {
        Send(0, Bob, Alice);
        _ = Received();
        _ports[0].Dispose();
        Assert.That(_switch.StationCount, Is.Zero);
        Send(1, Alice, Bob);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 1, 1 }));
        Send(0, Bob, Alice);
        Assert.That(Received(), Is.EqualTo(new[] { 0, 0, 0, 0 }));
        Assert.That(_ports[0].Statistics.DropsIn, Is.EqualTo(1));
    }

    [Test]
    public void Each_port_gets_what_it_can_take()
    {
        var plain = new Collector(AcceptedOffloads.None, 1514);
        _ports[2].Connect(plain);
        _ports[3].Connect(null);
        NetworkFrame frame = ToFrame(Tcp(4, new byte[5000]), OffloadTests.Cut(4, 1460, 54, 0));
        _ports[0].Receive(frame);
        Assert.That(_stations[1].Frames.Single().Data, Is.EqualTo(frame.Data.ToArray()));
        Assert.That(plain.Frames.Select(static item => item.Data.Length), Is.EqualTo(new[] { 1514, 1514, 1514, 674 }));
        Assert.That(_ports[2].Statistics.FramesOut, Is.EqualTo(4));
        Assert.That(_ports[3].Statistics.DropsOut, Is.EqualTo(1));
        frame.Release();
    }

    [Test]
    public void A_switch_is_there_as_long_as_it_has_ports()
    {
        var switches = new NetworkSwitches();
        INetworkPort first = switches.AddPort("b", "1");
        INetworkPort second = switches.AddPort("b", "2");
        using INetworkPort other = switches.AddPort("a", "3");
        Assert.That(switches.All.Select(static item => item.Name), Is.EqualTo(new[] { "a", "b" }));
        var receiver = new Collector();
        second.Connect(receiver);
        NetworkFrame frame = ToFrame(Plain(Bob, Alice, 60));
        first.Receive(frame);
        frame.Release();
        Assert.That(receiver.Frames, Has.Count.EqualTo(1));
        first.Dispose();
        second.Dispose();
        Assert.That(switches.All.Single().Name, Is.EqualTo("a"));
    }

    [Test]
    public void Many_at_once_lose_nothing()
    {
        const int Each = 2000;
        Parallel.For(0, 4, port =>
        {
            for (int i = 0; i < Each; i++)
                Send(port, new MacAddress(0x020000_000000 + (ulong)((port + 1) % 4)), new MacAddress(0x020000_000000 + (ulong)port));
        });
        for (int port = 0; port < 4; port++)
        {
            var source = new MacAddress(0x020000_000000 + (ulong)((port + 3) % 4));
            Assert.That(_stations[port].Frames.Count(item => MacAddress.Read(item.Data.AsSpan(6)) == source), Is.EqualTo(Each));
        }
    }

    private void Send(int port, MacAddress destination, MacAddress source)
    {
        NetworkFrame frame = ToFrame(Plain(destination, source, 60));
        _ports[port].Receive(frame);
        frame.Release();
    }

    private int[] Received()
    {
        int[] counts = [.. _stations.Select(static station => station.Frames.Count)];
        foreach (Collector station in _stations)
            station.Clear();
        return counts;
    }
}
