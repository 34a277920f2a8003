// The program that measures networks, on the host's own kernel.
using System.Diagnostics;
using System.Net;
using XenSharp.Guests.Benchmark;

namespace XenSharp.Guests.Tests;

[TestFixture]
[Platform("Linux")]
[CancelAfter(60_000)]
sealed class TcpStreamTests
{
    [Test]
    public async Task AStreamArrives(CancellationToken cancellation)
    {
        using var probe = new System.Net.Sockets.TcpListener(IPAddress.Loopback, 0);
        probe.Start();
        var address = (IPEndPoint)probe.LocalEndpoint;
        probe.Stop();
        using Process receiver = await StartAsync(TcpStream.BuildReceiver(address), cancellation);
        int status;
        do
        {
            // Nobody listens yet.
            using Process sender = await StartAsync(TcpStream.BuildSender(address, 100), cancellation);
            await sender.WaitForExitAsync(cancellation);
            status = sender.ExitCode;
        }
        while (status != 0 && !receiver.HasExited);
        await receiver.WaitForExitAsync(cancellation);
        Assert.That((status, receiver.ExitCode), Is.EqualTo((0, 0)));
    }

    [Test]
    public void OnlyIpv4AddressesAreTaken()
        => Assert.That(() => TcpStream.BuildReceiver(new IPEndPoint(IPAddress.IPv6Loopback, 1)), Throws.ArgumentException);

    static async Task<Process> StartAsync(byte[] program, CancellationToken cancellation)
    {
        string file = Path.Combine(Directory.CreateTempSubdirectory("xensharp-stream-").FullName, "program");
        await File.WriteAllBytesAsync(file, program, cancellation);
        File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        Process process = Process.Start(file);
        process.EnableRaisingEvents = true;
        process.Exited += (_, _) => Directory.Delete(Path.GetDirectoryName(file)!, recursive: true);
        return process;
    }
}
