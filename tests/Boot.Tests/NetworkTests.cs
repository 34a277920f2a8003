// Stock Linux with its own netfront: two guests on a switch, a guest and the host through a TAP device, attaching and detaching.

using System.Net.Sockets;
using System.Net;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using XenSharp.Devices.Network;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 20 MB.</summary>
[TestFixture]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed partial class NetworkTests : KvmFixture
{
    private const int NewNetwork = 0x4000_0000;

    private static readonly TimeSpan s_bootTime = TimeSpan.FromMinutes(4);
    private static readonly TimeSpan s_detachTime = TimeSpan.FromMinutes(1);

    private ToolstackContext? _toolstack;
    private readonly NetworkSwitch _switch = new("xenbr0");
    private NetworkGuest _first = null!;
    private NetworkGuest _second = null!;

    /// <summary>A port that takes and gives nothing but whole frames with checksums, so that all else is done in software.</summary>
    private sealed class PlainPort(INetworkPort port) : INetworkPort
    {
        public string Name => port.Name;

        public FrameCapabilities Capabilities => new(AcceptedOffloads.None, 1514);

        public PortStatistics Statistics => port.Statistics;

        public long Longest { get; private set; }

        public void Connect(IFrameReceiver? peer) => port.Connect(peer);

        public void Receive(NetworkFrame frame)
        {
            Longest = Math.Max(Longest, frame.Length);
            port.Receive(frame);
        }

        public void Dispose() => port.Dispose();
    }

    [OneTimeSetUp]
    public async Task BootAsync()
    {
        using var end = new CancellationTokenSource(s_bootTime);
        DomainImage image = await NetworkGuest.ImageAsync(end.Token);
        _toolstack = new ToolstackContext(Host);
        _first = NetworkGuest.Create(_toolstack, image, "first", 2);
        _second = NetworkGuest.Create(_toolstack, image, "second", 1);
        NetworkGuest[] guests = [_first, _second];
        foreach (NetworkGuest guest in guests)
        {
            _ = guest.Attach(_switch.AddPort(guest.Domain.Specification.Name), new NetworkDeviceOptions { MaximumQueues = 2 });
            guest.Domain.Start();
        }

        await Task.WhenAll(guests.Select(guest => guest.RunAsync("insmod /xen-netfront.ko", end.Token)));
        await Task.WhenAll(_first.UpAsync(0, "10.0.0.1/24", end.Token), _second.UpAsync(0, "10.0.0.2/24", end.Token));
    }

    /// <summary>What a test that failed leaves to look at.</summary>
    [TearDown]
    public void Show()
    {
        foreach (NetworkGuest guest in new[] { _first, _second })
            TestContext.Out.WriteLine($"{guest.Summary}\n{guest.Console}");
    }

    [OneTimeTearDown]
    public async Task EndAsync()
    {
        if (_first != null)
            await _first.DisposeAsync();
        if (_second != null)
            await _second.DisposeAsync();
        Assert.That(_switch.Ports, Is.Empty);
        if (_toolstack != null)
            await _toolstack.DisposeAsync();
    }

    [Test]
    public async Task Two_guests_reach_each_other_over_a_switch(CancellationToken cancellation)
    {
        Assert.That(await _first.RunAsync("ping -c 3 -i 0.2 -q 10.0.0.2", cancellation), Does.Contain("3 packets received"));
        Assert.That((_first.Interfaces[0].QueueCount, _second.Interfaces[0].QueueCount), Is.EqualTo((2, 1)), "a queue for each vCPU");
        await StreamAsync(_first, _second, "10.0.0.2", cancellation);

        NetworkDeviceStatistics sent = _first.Interfaces[0].Statistics;
        Assert.That(sent.TransmittedBytes, Is.GreaterThan(sent.TransmittedFrames * 1600), "frames go over uncut");
        Assert.That((sent.TransmitErrors, sent.ReceiveErrors), Is.EqualTo((0, 0)));
        Assert.That(_second.Interfaces[0].Statistics.TransmitErrors, Is.Zero);
    }

    [Test]
    public async Task They_do_also_where_all_is_done_in_software_and_interfaces_come_and_go(CancellationToken cancellation)
    {
        var network = new NetworkSwitch("plain");
        PlainPort[] ports = [new(network.AddPort("first")), new(network.AddPort("second"))];
        NetworkBackend[] vifs =
        [
            _first.Attach(ports[0], new NetworkDeviceOptions { DeviceId = 1 }), _second.Attach(ports[1], new NetworkDeviceOptions { DeviceId = 1 }),
        ];
        await Task.WhenAll(_first.UpAsync(1, "10.0.1.1/24", cancellation), _second.UpAsync(1, "10.0.1.2/24", cancellation));
        await StreamAsync(_first, _second, "10.0.1.2", cancellation);
        Assert.That(ports[0].Longest, Is.EqualTo(1514));

        foreach (NetworkBackend vif in vifs)
            Assert.That(await vif.RemoveAsync(s_detachTime, force: false, cancellation), Is.True);
        Assert.That(await _first.RunAsync("ls /sys/bus/xen/devices", cancellation), Does.Contain("vif-0").And.Not.Contain("vif-1"));
        Assert.That(network.Ports, Is.Empty);
    }

    [Test]
    public async Task A_guest_and_the_host_reach_each_other_through_a_TAP_device(CancellationToken cancellation)
    {
        (TapDevice tap, Socket listener) = HostSide();
        using Socket socket = listener;
        NetworkBackend vif = _first.Attach(tap, new NetworkDeviceOptions { DeviceId = 2 });
        await _first.UpAsync(2, "10.0.2.2/24", cancellation);
        Assert.That(await _first.RunAsync("ping -c 2 -i 0.2 -q 10.0.2.1", cancellation), Does.Contain("2 packets received"));

        // The guest's stream comes back to it.
        Task<byte[]> echo = EchoAsync(listener, cancellation);
        string sums = await _first.RunAsync(
            $"dd if=/dev/urandom of=/stream bs=1M count={NetworkGuest.StreamMiB} 2>/dev/null; md5sum </stream; nc 10.0.2.1 5000 </stream | md5sum", cancellation);
        string[] lines = sums.Split('\n');
        Assert.That(Convert.ToHexStringLower(MD5.HashData(await echo)) + "  -", Is.EqualTo(lines[0]));
        Assert.That(lines[1], Is.EqualTo(lines[0]));
        NetworkDeviceStatistics traffic = vif.Statistics;
        Assert.That(traffic.TransmittedBytes, Is.GreaterThan(NetworkGuest.StreamMiB << 20));
        Assert.That((traffic.TransmitErrors, traffic.ReceiveErrors), Is.EqualTo((0, 0)));
        Assert.That(await vif.RemoveAsync(s_detachTime, force: false, cancellation), Is.True);
    }

    private static async Task StreamAsync(NetworkGuest from, NetworkGuest to, string address, CancellationToken cancellation)
    {
        Task<string> received = to.RunAsync("nc -l -p 5000 | md5sum", cancellation);
        string sent = await from.RunAsync(
            $"dd if=/dev/urandom of=/stream bs=1M count={NetworkGuest.StreamMiB} 2>/dev/null; until nc {address} 5000 </stream; do sleep 0.1; done; md5sum </stream",
            cancellation);
        Assert.That(await received, Is.EqualTo(sent));
    }

    private static async Task<byte[]> EchoAsync(Socket listener, CancellationToken cancellation)
    {
        using Socket peer = await listener.AcceptAsync(cancellation);
        using var all = new MemoryStream();
        await using var stream = new NetworkStream(peer);
        await stream.CopyToAsync(all, cancellation);
        await stream.WriteAsync(all.GetBuffer().AsMemory(0, (int)all.Length), cancellation);
        peer.Shutdown(SocketShutdown.Send);
        return all.ToArray();
    }

    /// <summary>
    /// A TAP device and a socket that listens behind it, in a network namespace that is there as long as they are. Both stay in it, whatever
    /// thread uses them.
    /// </summary>
    internal static (TapDevice Tap, Socket Listener) HostSide()
    {
        (TapDevice, Socket)? made = null;
        Exception? failure = null;
        var thread = new Thread(() =>
        {
            try
            {
                if (Unshare(NewNetwork) != 0 || !File.Exists("/dev/net/tun"))
                    Assert.Ignore("No network namespace or no TAP device can be made here.");
                TapDevice tap = TapDevice.Open("xstest0");
                using (var ip = System.Diagnostics.Process.Start("ip", "addr add 10.0.2.1/24 dev xstest0"))
                    ip.WaitForExit();
                var listener = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
                listener.Bind(new IPEndPoint(IPAddress.Parse("10.0.2.1"), 5000));
                listener.Listen();
                made = (tap, listener);
            }
            catch (Exception exception)
            {
                failure = exception;
            }
        });
        thread.Start();
        thread.Join();
        if (failure != null)
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(failure);
        return made!.Value;
    }

    [LibraryImport("libc", EntryPoint = "unshare", SetLastError = true)]
    private static partial int Unshare(int flags);
}
