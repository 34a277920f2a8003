// How fast a stream goes between two guests and between a guest and the host, and what that takes; for people to read.

using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using XenSharp.Devices.Network;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Nothing is asserted of the times: they are the machine's.</summary>
[TestFixture]
[Category("Debian")]
[Category("Long")]
[CancelAfter(600_000)]
public sealed class NetworkThroughputTests : KvmFixture
{
    private const int Chunks = 512;
    private const double MiB = 1 << 20;
    private const double StreamMiB = Chunks * TcpStream.ChunkSize / MiB;

    [Test]
    public async Task Streams_take_so_many_hypercalls_and_copies(CancellationToken cancellation)
    {
        var second = new IPEndPoint(IPAddress.Parse("10.0.0.2"), 5001);
        var host = new IPEndPoint(IPAddress.Parse("10.0.2.1"), 5000);
        InitramfsFile[] programs =
        [
            new("receive", TcpStream.BuildReceiver(second), Executable: true),
            new("send", TcpStream.BuildSender(second, Chunks), Executable: true),
            new("send-host", TcpStream.BuildSender(host, Chunks), Executable: true),
        ];
        DomainImage image = await NetworkGuest.ImageAsync(cancellation, programs);
        await using var toolstack = new ToolstackContext(Host);
        var network = new NetworkSwitch("xenbr0");
        await using NetworkGuest sender = NetworkGuest.Create(toolstack, image, "sender", 1);
        await using NetworkGuest receiver = NetworkGuest.Create(toolstack, image, "receiver", 1);
        _ = sender.Attach(network.AddPort("sender"), new NetworkDeviceOptions());
        _ = receiver.Attach(network.AddPort("receiver"), new NetworkDeviceOptions());
        (TapDevice tap, Socket listener) = NetworkTests.HostSide();
        using Socket socket = listener;
        NetworkBackend uplink = sender.Attach(tap, new NetworkDeviceOptions { DeviceId = 2 });
        foreach (NetworkGuest guest in new[] { sender, receiver })
        {
            guest.Domain.Start();
            _ = await guest.RunAsync("insmod /xen-netfront.ko", cancellation);
        }

        await sender.UpAsync(0, "10.0.0.1/24", cancellation);
        await receiver.UpAsync(0, "10.0.0.2/24", cancellation);
        await sender.UpAsync(2, "10.0.2.2/24", cancellation);

        Task<string> received = receiver.RunAsync("/receive", cancellation);
        await ReportAsync("guest to guest", sender, "until /send; do sleep 0.1; done", [sender, receiver], [sender.Interfaces[0], receiver.Interfaces[0]], cancellation);
        _ = await received;

        Task draining = DrainAsync(listener, cancellation);
        await ReportAsync("guest to host", sender, "/send-host", [sender], [uplink], cancellation);
        await draining;
    }

    private static async Task ReportAsync(
        string what, NetworkGuest guest, string command, NetworkGuest[] guests, NetworkBackend[] vifs, CancellationToken cancellation)
    {
        ulong[] calls = [.. guests.Select(static item => item.Domain.Domain.HypercallCount)];
        NetworkDeviceStatistics[] before = [.. vifs.Select(static vif => vif.Statistics)];
        var watch = Stopwatch.StartNew();
        _ = await guest.RunAsync(command, cancellation);
        double seconds = watch.Elapsed.TotalSeconds;
        TestContext.Out.WriteLine($"{what}: {StreamMiB / seconds:0.0} MiB/s");
        for (int i = 0; i < guests.Length; i++)
        {
            NetworkDeviceStatistics after = vifs[i].Statistics;
            TestContext.Out.WriteLine(
                $"  {guests[i].Domain.Specification.Name}, per MiB: {(guests[i].Domain.Domain.HypercallCount - calls[i]) / StreamMiB:0} hypercalls, "
                + $"{(after.GrantCopies - before[i].GrantCopies) / StreamMiB:0} grant copies, {(after.Notifications - before[i].Notifications) / StreamMiB:0} events, "
                + $"{(after.TransmittedFrames - before[i].TransmittedFrames) / StreamMiB:0} frames out, {(after.ReceivedFrames - before[i].ReceivedFrames) / StreamMiB:0} in; "
                + $"{after.ReceiveDrops - before[i].ReceiveDrops} dropped");
        }

        // The sender writes 64 KiB at once, and has the rest of the way to cut them.
        NetworkDeviceStatistics sent = vifs[0].Statistics;
        long bytes = sent.TransmittedBytes - before[0].TransmittedBytes;
        Assert.That(bytes, Is.GreaterThan((long)(StreamMiB * MiB)));
        Assert.That(bytes, Is.GreaterThan((sent.TransmittedFrames - before[0].TransmittedFrames) * 1600), "frames go over uncut");
    }

    private static async Task DrainAsync(Socket listener, CancellationToken cancellation)
    {
        using Socket peer = await listener.AcceptAsync(cancellation);
        byte[] buffer = new byte[1 << 20];
        while (await peer.ReceiveAsync(buffer, cancellation) > 0)
        {
        }
    }
}
