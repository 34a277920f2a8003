// TAP devices in a network namespace of the test's own.
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using XenSharp.Devices.Network;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

/// <summary>Needs the right to make network namespaces and TAP devices, and is skipped without it.</summary>
public sealed partial class TapDeviceTests
{
    private const int NewNetwork = 0x4000_0000;

    [Test]
    public void What_a_program_of_the_host_sends_comes_out_and_the_answer_goes_in() => InNamespace(() =>
    {
        using TapDevice tap = TapDevice.Open("xstest0");
        var guest = new Collector();
        tap.Connect(guest);
        Ip("addr add 10.9.0.1/24 dev xstest0");
        Ip("neigh add 10.9.0.2 lladdr 00:16:3e:00:00:02 dev xstest0");
        using var socket = new UdpClient(new IPEndPoint(IPAddress.Parse("10.9.0.1"), 5555));
        byte[] question = [.. "a question"u8];
        _ = socket.Send(question, new IPEndPoint(IPAddress.Parse("10.9.0.2"), 6666));
        Assert.That(SpinWait.SpinUntil(() => guest.Frames.Any(IsQuestion), VifFixture.Patience), Is.True);
        (byte[] data, FrameOffload offload) = guest.Frames.First(IsQuestion);
        Assert.That(offload.Checksum, Is.EqualTo(ChecksumState.BlankIpv4), "the kernel leaves the checksum to others");
        InternetChecksum.Complete(data.AsSpan(offload.ChecksumStart), offload.ChecksumOffset);
        Assert.That(HasRightChecksums(data), Is.True);

        // The answer has a blank checksum as well, which the kernel must not mind.
        byte[] answer = Udp(4, [.. "an answer"u8], 6666, 5555);
        data.AsSpan(0, 6).CopyTo(answer.AsSpan(6));
        data.AsSpan(6, 6).CopyTo(answer);
        new byte[] { 10, 9, 0, 2, 10, 9, 0, 1 }.CopyTo(answer, 26);
        answer[24] = answer[25] = 0;
        ushort header = (ushort)~Sum([answer[14..34]]);
        (answer[24], answer[25]) = ((byte)(header >> 8), (byte)header);
        FrameHeaders headers = FrameHeaders.Parse(answer);
        ushort pseudo = headers.PseudoHeaderSum(answer);
        (answer[40], answer[41]) = ((byte)(pseudo >> 8), (byte)pseudo);
        NetworkFrame frame = ToFrame(answer, new FrameOffload { Checksum = ChecksumState.BlankIpv4, ChecksumStart = 34, ChecksumOffset = 6 });
        tap.Receive(frame);
        frame.Release();
        socket.Client.ReceiveTimeout = (int)VifFixture.Patience.TotalMilliseconds;
        IPEndPoint from = new(IPAddress.Any, 0);
        Assert.That(socket.Receive(ref from), Is.EqualTo("an answer"u8.ToArray()));
        Assert.That((tap.Statistics.FramesIn, tap.Statistics.DropsIn), Is.EqualTo((1, 0)));
        Assert.That(tap.Statistics.FramesOut, Is.GreaterThanOrEqualTo(1));

        static bool IsQuestion((byte[] Data, FrameOffload Offload) item) => item.Data.AsSpan().IndexOf("a question"u8) == 42;
    });

    [Test]
    public void A_bridge_of_the_host_joins_devices_and_a_name_that_is_none_is_a_switch() => InNamespace(() =>
    {
        Ip("link add br9 type bridge");
        Ip("link set br9 up");
        var network = new HostNetwork();
        using INetworkPort first = network.Open("br9", "vif1.0");
        using INetworkPort second = network.Open("br9", "vif2.0");
        Assert.That(new[] { first, second }, Is.All.InstanceOf<TapDevice>());
        var receiver = new Collector();
        second.Connect(receiver);
        byte[] sent = Plain(MacAddress.Broadcast, Alice, 77);

        // A bridge's port needs a moment until it forwards.
        Assert.That(SpinWait.SpinUntil(
            () =>
            {
                NetworkFrame frame = ToFrame(sent);
                first.Receive(frame);
                frame.Release();
                Thread.Sleep(5);
                return receiver.Frames.Any(item => item.Data.AsSpan().SequenceEqual(sent));
            },
            VifFixture.Patience), Is.True);

        using INetworkPort third = network.Open("none", "vif3.0");
        Assert.That(third, Is.Not.InstanceOf<TapDevice>());
        Assert.That(network.Switches.All.Single().Name, Is.EqualTo("none"));
    });

    [Test]
    public void What_cannot_be_done_is_said_in_a_sentence() => InNamespace(() =>
    {
        using TapDevice tap = TapDevice.Open("xstest1");
        Assert.That(() => TapDevice.Open("xstest1"), Throws.TypeOf<HostNetworkException>().With.Message.Contains("is taken"));
        Ip("link add dummy9 type bridge");
        Assert.That(() => TapDevice.Open("dummy9"), Throws.TypeOf<HostNetworkException>().With.Message.Contains("no TAP device"));
        Assert.That(() => TapDevice.Open("xstest2", "xstest1"), Throws.TypeOf<HostNetworkException>().With.Message.Contains("no bridge"));
        Assert.That(() => TapDevice.Open("xstest2", "nowhere"), Throws.TypeOf<HostNetworkException>().With.Message.Contains("There is no bridge nowhere"));
        Assert.That(HostInterface.Exists("xstest2"), Is.False, "nothing is left of it");
        foreach (string name in new[] { "", "sixteen-letters-", "a b", "a/b", ".", ".." })
            Assert.That(() => TapDevice.Open(name), Throws.TypeOf<HostNetworkException>().With.Message.Contains("cannot be an interface's name"));
    });

    [Test]
    public void A_persistent_device_stays_and_another_goes() => InNamespace(() =>
    {
        TapDevice.Open("xstest3", persistent: true).Dispose();
        Assert.That(HostInterface.Exists("xstest3"), Is.True);
        TapDevice.Open("xstest3").Dispose();
        Assert.That(HostInterface.Exists("xstest3"), Is.True, "it was there before");
        TapDevice.Open("xstest6").Dispose();
        Assert.That(HostInterface.Exists("xstest6"), Is.False);
    });

    [Test]
    public void A_device_that_is_deleted_on_the_host_is_reported() => InNamespace(() =>
    {
        var reports = new List<string>();
        using TapDevice tap = TapDevice.Open("xstest4", report: text =>
        {
            lock (reports)
                reports.Add(text);
        });
        Ip("link del xstest4");
        Assert.That(SpinWait.SpinUntil(() => { lock (reports) return reports.Count > 0; }, VifFixture.Patience), Is.True);
        NetworkFrame frame = ToFrame(Plain(Bob, Alice, 60));
        tap.Receive(frame);
        frame.Release();
        Assert.That(tap.Statistics.DropsIn, Is.EqualTo(1));
        Assert.That(reports.Single(), Does.StartWith("The TAP device xstest4 is lost"));
    });

    [Test]
    public void A_switch_can_have_the_host_on_it() => InNamespace(() =>
    {
        var network = new HostNetwork();
        using IDisposable host = network.OpenHostInterface("lan", "xstest5");
        using INetworkPort guest = network.Open("lan", "vif1.0");
        var receiver = new Collector();
        guest.Connect(receiver);
        Ip("addr add 10.9.1.1/24 dev xstest5");
        Ip("neigh add 10.9.1.2 lladdr 00:16:3e:00:00:02 dev xstest5");
        using var socket = new UdpClient(new IPEndPoint(IPAddress.Parse("10.9.1.1"), 5555));
        _ = socket.Send("hello"u8.ToArray(), new IPEndPoint(IPAddress.Parse("10.9.1.2"), 6666));
        Assert.That(SpinWait.SpinUntil(() => receiver.Frames.Any(static item => item.Data.AsSpan().IndexOf("hello"u8) == 42), VifFixture.Patience), Is.True);
    });

    /// <summary>Two network namespaces with a cable between their TAP devices: the kernels do not cut, nor sum up, on either side.</summary>
    [Test]
    public void A_stream_goes_through_two_devices_uncut([Values(4, 6)] int version)
    {
        const int Port = 5000;
        const int Length = 4 << 20;
        AddressFamily family = version == 4 ? AddressFamily.InterNetwork : AddressFamily.InterNetworkV6;
        string prefix = version == 4 ? "10.9.2." : "fd00::";
        string mask = version == 4 ? "/24" : "/64 nodad";
        TapDevice[] taps = new TapDevice[2];
        Socket? server = null;
        Socket? client = null;
        for (int i = 0; i < 2; i++)
        {
            InNamespace(() =>
            {
                taps[i] = TapDevice.Open("xstest");
                Ip($"addr add {prefix}{i + 1}{mask} dev xstest");
                var socket = new Socket(family, SocketType.Stream, ProtocolType.Tcp);
                if (i == 0)
                {
                    socket.Bind(new IPEndPoint(IPAddress.Parse(prefix + "1"), Port));
                    socket.Listen();
                    server = socket;
                }
                else
                {
                    client = socket;
                }
            });
        }

        using var link = new PortLink(taps[0], taps[1]);
        long early;
        using (server)
        using (client)
        {
            byte[] sent = new byte[Length];
            new Random(1).NextBytes(sent);
            Task<byte[]> receiving = Task.Run(() =>
            {
                using Socket peer = server!.Accept();
                byte[] all = new byte[Length];
                int at = 0;
                for (int count; at < Length && (count = peer.Receive(all.AsSpan(at))) > 0;)
                    at += count;
                return all[..at];
            });
            client!.Connect(new IPEndPoint(IPAddress.Parse(prefix + "1"), Port));

            // What the kernels said when their devices came up (of groups, for one) may have found no link yet.
            early = Drops();
            for (int at = 0; at < Length;)
                at += client.Send(sent.AsSpan(at));
            Assert.That(receiving.Wait(VifFixture.Patience), Is.True);
            Assert.That(receiving.Result.AsSpan().SequenceEqual(sent), Is.True);
        }

        PortStatistics traffic = taps[1].Statistics;
        Assert.That(Drops(), Is.EqualTo(early));
        Assert.That(traffic.BytesOut, Is.GreaterThan(traffic.FramesOut * 5000));

        long Drops() => taps[1].Statistics.DropsOut + taps[0].Statistics.DropsIn;
    }

    [Test]
    public void Headers_say_what_is_left_to_do()
    {
        byte[] tcp = Tcp(6, new byte[4000]);
        FrameOffload offload = OffloadTests.Cut(6, 1400, 74, 0);
        NetworkFrame frame = ToFrame(tcp, offload);
        byte[] header = new byte[10];
        TapDevice.WriteHeader(frame, header);
        Assert.That(header, Is.EqualTo(new byte[] { 1, 4, 74, 0, 0x78, 0x05, 54, 0, 16, 0 }));
        Assert.That(TapDevice.TryReadHeader(header, tcp, out FrameOffload read), Is.True);
        Assert.That(read, Is.EqualTo(offload));
        frame.Release();

        header[1] = 3;
        Assert.That(TapDevice.TryReadHeader(header, tcp, out _), Is.False, "UDP fragmentation was not offered");
        byte[] tail = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 16, 0];
        Assert.That(TapDevice.TryReadHeader(tail, tcp, out _), Is.False, "beyond the frame");
        byte[] other = [1, 0, 0, 0, 0, 0, 60, 0, 4, 0];
        Assert.That(TapDevice.TryReadHeader(other, tcp, out read), Is.True);
        Assert.That(read.Checksum, Is.EqualTo(ChecksumState.BlankOther));
    }

    /// <summary>Runs something on a thread with a network namespace of its own, which goes with the thread.</summary>
    internal static void InNamespace(Action work)
    {
        System.Runtime.ExceptionServices.ExceptionDispatchInfo? failure = null;
        var thread = new Thread(() =>
        {
            try
            {
                if (Unshare(NewNetwork) != 0)
                    Assert.Ignore($"No network namespace can be made here: {Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}.");
                if (!File.Exists("/dev/net/tun"))
                    Assert.Ignore("There is no /dev/net/tun here: load the module tun.");
                Ip("link set lo up");
                work();
            }
            catch (Exception exception)
            {
                failure = System.Runtime.ExceptionServices.ExceptionDispatchInfo.Capture(exception);
            }
        });
        thread.Start();
        thread.Join();
        failure?.Throw();
    }

    /// <summary>Runs ip(8), which finds itself in the namespace of the thread that starts it.</summary>
    internal static void Ip(string arguments)
    {
        // Process.Start forks on the calling thread, and the child has that thread's namespaces.
        using System.Diagnostics.Process process = System.Diagnostics.Process.Start(
            new System.Diagnostics.ProcessStartInfo("ip", arguments) { RedirectStandardError = true })!;
        string errors = process.StandardError.ReadToEnd();
        process.WaitForExit();
        Assert.That(process.ExitCode, Is.Zero, $"ip {arguments}: {errors}");
    }

    [LibraryImport("libc", EntryPoint = "unshare", SetLastError = true)]
    private static partial int Unshare(int flags);
}
