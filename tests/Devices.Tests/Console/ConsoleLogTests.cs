// Console log files: rotation, reopening, and files that cannot be written, which must not stop the guest.

using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
[Parallelizable(ParallelScope.Children)]
public sealed class ConsoleLogTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("xensharp-console-log-").FullName;

    private string Log => Path.Combine(_folder, "guest.log");

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task The_log_has_all_when_the_console_is_complete()
    {
        byte[] all = new byte[500_000];
        new Random(3).NextBytes(all);
        await using (ConsoleHub hub = new(new ConsoleHubOptions
            { HistoryBytes = ConsoleHubOptions.MinimumHistoryBytes, Patience = TimeSpan.FromSeconds(30), Log = new ConsoleLogOptions(Log) }))
        {
            for (int at = 0; at < all.Length;)
                at += hub.Write(all.AsSpan(at), default);
            await hub.CompleteAsync().WaitAsync(TimeSpan.FromSeconds(30));
            Assert.That((await File.ReadAllBytesAsync(Log)).AsSpan().SequenceEqual(all));
            Assert.That(hub.Viewers, Is.Zero, "the log is no viewer");
        }

        // The next console of that name goes on behind it.
        await using ConsoleHub next = new(new ConsoleHubOptions { Log = new ConsoleLogOptions(Log) });
        _ = next.Write("next"u8, default);
        await next.CompleteAsync();
        Assert.That(new FileInfo(Log).Length, Is.EqualTo(all.Length + 4));
    }

    [Test]
    public void Long_files_make_room_for_new_ones()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log) { MaximumBytes = 10, Generations = 2 });
        foreach (string text in new[] { "aaaa", "bbbb", "cccc", "dddd", "eeeeeeeeeeeeeeee", "ffff" })
            log.Write(Encoding.ASCII.GetBytes(text));
        Assert.That(File.ReadAllText(Log), Is.EqualTo("ffff"));
        Assert.That(File.ReadAllText(Log + ".1"), Is.EqualTo("eeeeeeeeeeeeeeee"), "one write is not torn");
        Assert.That(File.ReadAllText(Log + ".2"), Is.EqualTo("ccccdddd"));
        Assert.That(Directory.GetFiles(_folder), Has.Length.EqualTo(3), "older ones are gone");
    }

    [Test]
    public void Without_generations_a_long_file_is_begun_anew()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log) { MaximumBytes = 10, Generations = 0 });
        foreach (string text in new[] { "aaaaaa", "bbbbbb" })
            log.Write(Encoding.ASCII.GetBytes(text));
        Assert.That(File.ReadAllText(Log), Is.EqualTo("bbbbbb"));
        Assert.That(Directory.GetFiles(_folder), Has.Length.EqualTo(1));
    }

    [Test]
    public void A_file_that_others_cut_short_is_not_rotated_early()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log) { MaximumBytes = 10, Generations = 2 });
        log.Write("aaaaaaaa"u8);
        File.WriteAllText(Log, "");
        log.Write("bbbb"u8);
        Assert.That(File.ReadAllText(Log), Is.EqualTo("bbbb"), "and no hole where the old bytes were");
        Assert.That(File.Exists(Log + ".1"), Is.False);
    }

    [Test]
    public void A_file_that_was_moved_away_is_made_anew_on_request()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log));
        log.Write("one"u8);
        File.Move(Log, Log + ".old");
        log.Write("two"u8);
        Assert.That(log.Reopen(), Is.True);
        log.Write("three"u8);
        Assert.That(File.ReadAllText(Log + ".old"), Is.EqualTo("onetwo"));
        Assert.That(File.ReadAllText(Log), Is.EqualTo("three"));
    }

    [Test]
    public async Task A_full_disk_does_not_stop_the_guest()
    {
        await using ConsoleHub hub = new(new ConsoleHubOptions { Log = new ConsoleLogOptions("/dev/full") { MaximumBytes = 0 } });
        using ConsoleViewer viewer = hub.Attach();
        _ = hub.Write("text"u8, default);
        byte[] seen = new byte[10];
        Assert.That(await viewer.ReadAsync(seen), Is.EqualTo(4));
        ConsoleLog log = hub.Log!;
        await hub.CompleteAsync();
        Assert.That(log.Failure, Is.EqualTo("/dev/full cannot be written: No space left on device."));
        Assert.That(log.Lost, Is.EqualTo(4));
    }

    [Test]
    public void What_is_missing_is_told_when_the_file_can_be_written_again()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log) { RetryInterval = TimeSpan.Zero });
        log.Write("one\n"u8);
        File.Move(Log, Log + ".old");
        Directory.CreateDirectory(Log);
        Assert.That(log.Reopen(), Is.False);
        log.Write("two\n"u8);
        Assert.That(log.Failure, Does.Contain(Log).And.Contain("directory"));
        Assert.That(log.Lost, Is.EqualTo(4));
        Directory.Delete(Log);
        log.Write("three\n"u8);
        Assert.That(File.ReadAllText(Log), Does.StartWith("\n[xensharp: 4 bytes of console output are missing here: ").And.EndsWith("]\nthree\n"));
        Assert.That((log.Failure, log.Lost), Is.EqualTo(((string?)null, 0L)));
    }

    [Test]
    public void A_file_that_failed_is_left_alone_for_a_while()
    {
        using ConsoleLog log = new(new ConsoleLogOptions(Log) { RetryInterval = TimeSpan.FromHours(1) });
        Directory.Move(_folder, _folder + "-away");
        Assert.That(log.Reopen(), Is.False);
        Directory.Move(_folder + "-away", _folder);
        log.Write("lost"u8);
        Assert.That(log.Lost, Is.EqualTo(4));
        Assert.That(log.Reopen(), Is.True, "who asks for it need not wait");
        log.Write("back"u8);
        Assert.That(File.ReadAllText(Log), Does.EndWith("back"));
    }

    [Test]
    public void A_file_that_cannot_be_opened_at_first_is_an_error()
    {
        string nowhere = Path.Combine(_folder, "nowhere", "guest.log");
        Assert.That(() => new ConsoleHub(new ConsoleHubOptions { Log = new ConsoleLogOptions(nowhere) }),
            Throws.InstanceOf<IOException>().With.Message.Contains(nowhere));
    }
}
