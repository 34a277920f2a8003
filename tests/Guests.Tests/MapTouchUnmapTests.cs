// The program that maps, touches and unmaps is a Linux program, so it can be run where the tests are.
using System.Diagnostics;
using XenSharp.Guests.Benchmark;

namespace XenSharp.Guests.Tests;

sealed class MapTouchUnmapTests
{
    [Test]
    [CancelAfter(60_000)]
    public async Task ItGoesItsRoundsAndEndsWell(CancellationToken cancellation)
    {
        const int Bytes = 16 << 20;
        string file = Path.Combine(Path.GetTempPath(), $"xensharp-map-{Environment.ProcessId}");
        try
        {
            await File.WriteAllBytesAsync(file, MapTouchUnmap.Build(Bytes, rounds: 3), cancellation);
            File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserExecute);

            using Process alone = Process.Start(file);
            await alone.WaitForExitAsync(cancellation);
            Assert.That(alone.ExitCode, Is.Zero);

            // With less address space than it wants, it says that it failed.
            using Process poor = Process.Start("/bin/sh", ["-c", $"ulimit -v {Bytes >> 10}; exec {file}"]);
            await poor.WaitForExitAsync(cancellation);
            Assert.That(poor.ExitCode, Is.EqualTo(1));
        }
        finally
        {
            File.Delete(file);
        }
    }

    [TestCase(0, 1)]
    [TestCase(4095, 1)]
    [TestCase(4096, 0)]
    public void SizesAndRoundsMakeSense(int bytes, int rounds)
        => Assert.That(() => MapTouchUnmap.Build(bytes, rounds), Throws.InstanceOf<ArgumentOutOfRangeException>());
}
