// The program that reads and writes blocks is a Linux program, so it can be run where the tests are.
using System.Diagnostics;
using System.Globalization;
using XenSharp.Guests.Benchmark;

namespace XenSharp.Guests.Tests;

sealed class QueuedTransfersTests
{
    private const int BlockSize = 8192;
    private const int Blocks = 16;

    [Test]
    [CancelAfter(60_000)]
    public async Task ItWritesAllBlocksAndSaysHowLongItTook(CancellationToken cancellation)
    {
        string program = Path.Combine(Path.GetTempPath(), $"xensharp-transfers-{Environment.ProcessId}");
        string disk = program + ".img";
        try
        {
            await File.WriteAllBytesAsync(disk, new byte[BlockSize * Blocks], cancellation);
            (int status, string[] lines) = await RunAsync(program, disk, Plan() with { IsWrite = true }, cancellation);
            Assert.That(status, Is.Zero);
            Assert.That(lines, Has.Length.EqualTo(2));
            Assert.That(lines[0], Is.EqualTo("@from"));
            Assert.That(lines[1], Does.Match("^@to [0-9a-f]{16}$"));
            Assert.That(ulong.Parse(lines[1].AsSpan(4), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture), Is.Not.Zero);
            byte[] written = await File.ReadAllBytesAsync(disk, cancellation);
            for (int page = 0; page < written.Length; page += 4096)
                Assert.That(BitConverter.ToUInt64(written, page), Is.Not.Zero, $"page at {page}");

            (status, _) = await RunAsync(program, disk, Plan() with { IsRandom = true }, cancellation);
            Assert.That(status, Is.Zero);

            // Half of it is not there.
            await File.WriteAllBytesAsync(disk, new byte[BlockSize * Blocks / 2], cancellation);
            (status, lines) = await RunAsync(program, disk, Plan(), cancellation);
            Assert.That((status, lines.Length), Is.EqualTo((1, 1)));
        }
        finally
        {
            File.Delete(program);
            File.Delete(disk);
        }
    }

    [Test]
    public void PlansMakeSense()
    {
        Assert.That(Building(Plan() with { Depth = 65 }), Throws.InstanceOf<ArgumentOutOfRangeException>());
        Assert.That(Building(Plan() with { Count = 9 }), Throws.InstanceOf<ArgumentOutOfRangeException>());
        Assert.That(Building(Plan() with { BlockSize = 4095 }), Throws.InstanceOf<ArgumentOutOfRangeException>());
        Assert.That(Building(Plan() with { Blocks = 3 }), Throws.InstanceOf<ArgumentOutOfRangeException>());
    }

    private static QueuedTransferPlan Plan() => new() { Depth = 8, Count = 64, BlockSize = BlockSize, Blocks = Blocks };

    private static Action Building(QueuedTransferPlan plan) => () => _ = QueuedTransfers.Build(plan, "@from", "@to");

    private static async Task<(int Status, string[] Lines)> RunAsync(string program, string disk, QueuedTransferPlan plan, CancellationToken cancellation)
    {
        File.Delete(program);
        await File.WriteAllBytesAsync(program, QueuedTransfers.Build(plan, "@from", "@to"), cancellation);
        File.SetUnixFileMode(program, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        var start = new ProcessStartInfo(program) { RedirectStandardOutput = true };
        start.ArgumentList.Add(disk);
        using Process process = Process.Start(start)!;
        string output = await process.StandardOutput.ReadToEndAsync(cancellation);
        await process.WaitForExitAsync(cancellation);
        return (process.ExitCode, output.Split('\n', StringSplitOptions.RemoveEmptyEntries));
    }
}
