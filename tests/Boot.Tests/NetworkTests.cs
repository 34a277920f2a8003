// Stock Linux with its own netfront: two guests on a switch, a guest and the host through a TAP device, attaching and detaching.

using System.Globalization;
using XenSharp.Cli.Hosting;
using XenSharp.Devices.Network;
using XenSharp.Domains;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 20 MB.</summary>
[TestFixture]
[Category("Debian")]
[CancelAfter(180_000)]
public sealed class NetworkTests : KvmFixture
{
    private const int StreamMiB = 8;

    [Test]
    public async Task Two_guests_reach_each_other_over_a_switch(CancellationToken cancellation)
    {
        DomainImage image = await NetworkGuest.ImageAsync(cancellation);
        var manager = new DomainManager();
        var network = new NetworkSwitch("xenbr0");
        await using NetworkGuest first = NetworkGuest.Create(Host, image, "first", 2, manager);
        await using NetworkGuest second = NetworkGuest.Create(Host, image, "second", 1, manager);
        NetworkBackend[] vifs =
        [
            first.Attach(network.AddPort("vif1.0"), new NetworkDeviceOptions { MaximumQueues = 2 }),
            second.Attach(network.AddPort("vif2.0"), new NetworkDeviceOptions { MaximumQueues = 2 }),
        ];
        first.Domain.Start();
        second.Domain.Start();
        using IDisposable show = new Show(() => TestContext.Out.WriteLine($"{DateTime.Now} FIRST\n{first.Console}\nSECOND\n{second.Console}\n" + string.Join('\n', vifs.Select(static vif => $"{vif.Device} {vif.QueueCount} {vif.Statistics} {vif.PortStatistics}"))));
        await Task.WhenAll(UpAsync(first, 1, cancellation), UpAsync(second, 2, cancellation));

        string ping = await first.RunAsync("ping -c 3 -i 0.2 -q 10.0.0.2", cancellation);
        Assert.That(ping, Does.Contain("3 packets received, 0% packet loss"));
        await StreamAsync(first, second, "10.0.0.2", cancellation);
        TestContext.Out.WriteLine(string.Join('\n', vifs.Select(static vif => $"{vif.Device} {vif.QueueCount} {vif.Statistics} {vif.PortStatistics}")));
        TestContext.Out.WriteLine($"{first.Domain.Domain.HypercallCount} {second.Domain.Domain.HypercallCount}");
    }

    private sealed class Show(Action a) : IDisposable { public void Dispose() => a(); }

    private static async Task UpAsync(NetworkGuest guest, int number, CancellationToken cancellation)
    {
        _ = await guest.RunAsync("insmod /xen-netfront.ko", cancellation);
        _ = await guest.RunAsync("for i in 1 2 3 4 5 6 7 8 9; do ip link show eth0 && break; sleep 0.2; done", cancellation);
        _ = await guest.RunAsync(string.Create(CultureInfo.InvariantCulture, $"ip addr add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up"), cancellation);
    }

    private static async Task StreamAsync(NetworkGuest from, NetworkGuest to, string address, CancellationToken cancellation)
    {
        Task<string> received = to.RunAsync("nc -l -p 5000 | md5sum", cancellation);
        string sent = await from.RunAsync($"dd if=/dev/urandom of=/stream bs=1M count={StreamMiB} 2>/dev/null; md5sum </stream", cancellation);
        string result = await from.RunAsync($"time nc {address} 5000 </stream", cancellation);
        TestContext.Out.WriteLine(result);
        Assert.That(await received, Is.EqualTo(sent));
    }
}
