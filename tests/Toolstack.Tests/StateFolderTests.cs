// What stays of domains when the manager's process does not end as it should; and what else needs no KVM.

using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
public sealed class StateFolderTests
{
    private static readonly DomainConfiguration s_configuration = new() { Name = "web", Kernel = "/boot/vmlinuz" };

    private TemporaryFolder _folder = null!;
    private ManagerLog _log = null!;

    [SetUp]
    public void SetUp() => (_folder, _log) = (new TemporaryFolder(), new ManagerLog());

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void A_folder_is_one_managers()
    {
        using StateFolder first = StateFolder.Open(_folder.Path, _log);
        ToolstackException? refusal = Assert.Throws<ToolstackException>(() => StateFolder.Open(_folder.Path, _log));
        Assert.That(refusal!.Message, Does.Contain($"(process {Environment.ProcessId})").And.Contain("--state"));
        first.Dispose();
        StateFolder.Open(_folder.Path, _log).Dispose();
    }

    [Test]
    public void What_ran_is_lost_and_listed_until_it_is_forgotten()
    {
        DomainRecord record = Record();
        using (StateFolder first = StateFolder.Open(_folder.Path, _log))
            first.Save(record);

        // What a manager was about to write when it was killed, and what nobody can read.
        File.WriteAllText(_folder.File("domains/half.json.new"), "{");
        File.WriteAllText(_folder.File("domains/bad.json"), "{");
        using (StateFolder second = StateFolder.Open(_folder.Path, _log))
        {
            LostDomain lost = second.ListLost().Single();
            Assert.That((lost.Name, lost.Uuid, lost.Id), Is.EqualTo(("web", record.Uuid, 7)));
            Assert.That(DomainConfigurationJson.Read(lost.Configuration.Json!.Value.GetRawText(), "lost").Kernel, Is.EqualTo("/boot/vmlinuz"));
            Assert.That(_log.Text, Does.Contain("web (number 7)").And.Contain("bad.json"));
            Assert.That(Directory.GetFiles(_folder.File("domains")).Select(Path.GetFileName), Is.EqualTo(new[] { "bad.json.bad" }));
        }

        using StateFolder third = StateFolder.Open(_folder.Path, _log);
        Assert.That(third.ListLost(), Has.Count.EqualTo(1), "still");
        Assert.That((third.ForgetLost(record.Uuid), third.ForgetLost(record.Uuid)), Is.EqualTo((true, false)));
        Assert.That(third.ListLost(), Is.Empty);
    }

    [Test]
    public void A_domain_that_runs_again_is_not_lost()
    {
        DomainRecord record = Record();
        using (StateFolder first = StateFolder.Open(_folder.Path, _log))
            first.Save(record);
        using StateFolder second = StateFolder.Open(_folder.Path, _log);
        second.Save(record);
        Assert.That(second.ListLost(), Is.Empty);
        second.Remove(record.Uuid);
    }

    [Test]
    public void A_folder_that_cannot_be_used_gets_a_sentence()
    {
        File.WriteAllText(_folder.File("file"), "");
        Assert.That(() => StateFolder.Open(_folder.File("file/state"), _log), Throws.TypeOf<ToolstackException>().With.Message.Contains("--state"));
    }

    [Test]
    public void The_log_keeps_the_newest_lines()
    {
        for (int i = 0; i < 100_000; i++)
            _log.Write($"line {i}");
        Assert.That(_log.Text, Has.Length.LessThanOrEqualTo(ManagerLog.Capacity));
        Assert.That(_log.Text, Does.EndWith("line 99999\n").And.Not.Contain("line 5\n"));
        _log.Clear();
        Assert.That(_log.Text, Is.Empty);
    }

    [Test]
    public void A_guest_cannot_fill_the_log_nor_forge_lines_of_it()
    {
        var sink = new GuestLogSink(_log, static () => 3);
        _log.Write("before");
        _ = sink.Write("one\r\n\u001b[2Jtwo\nhalf"u8, default);
        Assert.That(_log.Text, Does.Contain("(d3) one\n").And.Contain("(d3) [2Jtwo\n").And.Not.Contain("half"));
        for (int i = 0; i < 10_000; i++)
            _ = sink.Write(Encoding.ASCII.GetBytes(new string('x', 300) + "\n"), default);
        Assert.That(_log.Text, Does.Contain("before\n").And.Contain("more is not shown"));
    }

    [Test]
    public async Task A_listener_that_does_not_keep_up_is_told()
    {
        var events = new DomainEvents();
        await using IAsyncEnumerator<DomainEvent> listener = events.FollowAsync().GetAsyncEnumerator();
        Assert.That(await listener.MoveNextAsync(), Is.True);
        Assert.That(listener.Current.Kind, Is.EqualTo(DomainEventKind.Ready));
        DomainEvent Event(int id) => new() { Kind = DomainEventKind.Created, Time = DateTimeOffset.UtcNow, Id = id };
        for (int i = 1; i <= 1000; i++)
            events.Publish(Event(i));
        int read = 0;
        for (; read < 250 && await listener.MoveNextAsync(); read++)
            Assert.That(listener.Current.Id, Is.EqualTo(read + 1));
        events.Publish(Event(1001));
        events.End();
        var rest = new List<DomainEvent>();
        while (await listener.MoveNextAsync())
            rest.Add(listener.Current);
        Assert.That(rest[^2].Kind, Is.EqualTo(DomainEventKind.Overrun));
        Assert.That(rest[^1].Id, Is.EqualTo(1001));
    }

    [Test]
    public void A_saved_domains_header_is_read_back_and_a_damaged_one_gets_a_sentence()
    {
        using var file = new MemoryStream();
        SavedDomainFile.WriteHeader(file, s_configuration);
        file.Write("image"u8);
        file.Position = 0;
        Assert.That(SavedDomainFile.ReadHeader(file, "f").Kernel, Is.EqualTo(s_configuration.Kernel));
        Assert.That(file.Length - file.Position, Is.EqualTo(5), "at the image");
        byte[] whole = file.ToArray();
        for (int length = 0; length < whole.Length - 5; length++)
            Assert.That(() => SavedDomainFile.ReadHeader(new MemoryStream(whole[..length]), "f"), Throws.TypeOf<ToolstackException>(), $"{length}");
        foreach (int at in (int[])[0, 23, 24, 28, 31, 40])
        {
            byte[] damaged = [.. whole];
            damaged[at] ^= 0xff;
            Assert.That(() => SavedDomainFile.ReadHeader(new MemoryStream(damaged), "f"), Throws.TypeOf<ToolstackException>(), $"{at}");
        }
    }

    private static DomainRecord Record() => new()
    {
        Name = "web",
        Uuid = Guid.NewGuid(),
        Id = 7,
        StartTime = DateTimeOffset.UtcNow,
        Configuration = JsonSerializer.SerializeToElement(s_configuration, DomainConfigurationJson.Default.DomainConfiguration),
    };
}
