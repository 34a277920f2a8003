// The ping-pong program is a Linux program, so it can be run where the tests are.
using System.Diagnostics;
using XenSharp.Guests.Benchmark;

namespace XenSharp.Guests.Tests;

sealed class PipePingPongTests
{
    [Test]
    [CancelAfter(60_000)]
    public async Task ItPlaysItsRoundsAndEndsWell(CancellationToken cancellation)
    {
        string file = Path.Combine(Path.GetTempPath(), $"xensharp-ping-pong-{Environment.ProcessId}");
        try
        {
            await File.WriteAllBytesAsync(file, PipePingPong.Build(100), cancellation);
            File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserExecute);
            using Process process = Process.Start(file);
            await process.WaitForExitAsync(cancellation);
            Assert.That(process.ExitCode, Is.Zero);
        }
        finally
        {
            File.Delete(file);
        }
    }

    [Test]
    public void RoundsArePositive() => Assert.That(() => PipePingPong.Build(0), Throws.InstanceOf<ArgumentOutOfRangeException>());
}
