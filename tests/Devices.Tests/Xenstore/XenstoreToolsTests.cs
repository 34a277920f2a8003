// Debian's own xenstore-utils and libxenstore, as they come, against the socket. Fetched by apt into the cache; nothing is installed.
using System.Diagnostics;
using XenSharp.Devices.Xenstore;
using XenSharp.Guests.Fetching;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
[CancelAfter(120_000)]
internal sealed class XenstoreToolsTests
{
    private XenstoreTools _tools = null!;
    private string _folder = null!;
    private StoreFixture _store = null!;
    private XenstoreListener _listener = null!;

    [OneTimeSetUp]
    public async Task Fetch()
    {
        try
        {
            _tools = await XenstoreTools.GetAsync(new GuestCache(GuestCache.DefaultRoot()));
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [SetUp]
    public void SetUp()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-tools-").FullName;
        _store = new StoreFixture();
        _listener = XenstoreListener.Start(_store.Server, Path.Combine(_folder, "socket"));
    }

    [TearDown]
    public async Task TearDown()
    {
        await _listener.DisposeAsync();
        _store.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task Nodes_are_written_read_listed_and_removed()
    {
        Assert.That(await RunAsync("xenstore-write", "/a/b", "one", "/a/c", "two\\n\\x7f"), Is.Empty);
        Assert.That(_store.Domain0.Read("/a/c"), Is.EqualTo("two\n\u007f"));
        Assert.That(await RunAsync("xenstore-read", "/a/b", "/a/c"), Is.EqualTo("one\ntwo\\n\\x7f\n"));
        Assert.That(await RunAsync("xenstore-list", "-p", "/a"), Is.EqualTo("/a/b\n/a/c\n"));
        Assert.That(await RunAsync("xenstore-exists", "/a/b"), Is.Empty);
        Assert.That(await StatusAsync("xenstore-exists", "/a/d"), Is.EqualTo(1));
        Assert.That(await StatusAsync("xenstore-read", "/a/d"), Is.EqualTo(1));
        Assert.That(await RunAsync("xenstore-rm", "-t", "/a/b"), Is.Empty);
        Assert.That(await RunAsync("xenstore-list", "/a"), Is.EqualTo("c\n"));
        Assert.That(await RunAsync("xenstore-rm", "-t", "/a/c"), Is.Empty);
        Assert.That(_store.Domain0.Exists("/a"), Is.False, "an empty node above goes, too");
    }

    [Test]
    public async Task Trees_and_permissions_are_shown_and_changed()
    {
        _store.Server.AnnounceDomain(5);
        Assert.That(await RunAsync("xenstore-write", "/t/x/y", "v"), Is.Empty);
        Assert.That(await RunAsync("xenstore-chmod", "-r", "/t/x", "b0", "r5"), Is.Empty);
        Assert.That(_store.Domain0.GetPermissions("/t/x/y")!.ToString(), Is.EqualTo("b0 r5"));
        Assert.That(await RunAsync("xenstore-ls", "-f", "-p", "/t"), Is.EqualTo("/t/x = \"\"   (b0,r5)\n/t/x/y = \"v\"   (b0,r5)\n"));
        Assert.That(await RunAsync("xenstore-ls"), Does.StartWith("tool = \"\"\n xenstored = \"\"\nt = \"\"\n x = \"\"\n  y = \"v\"\n"));
        Assert.That(await RunAsync("xenstore-chmod", "-u", "/t/x/y", "n0"), Is.Empty);
        Assert.That(_store.Domain0.GetPermissions("/t/x")!.ToString(), Is.EqualTo("n0"));
    }

    [Test]
    public async Task A_list_longer_than_a_message_is_shown_whole()
    {
        _store.Domain0.Transact(static transaction =>
        {
            for (int number = 0; number < 1000; number++)
                transaction.Write($"/many/child-{number}", "");
        });
        string[] names = (await RunAsync("xenstore-list", "/many")).TrimEnd().Split('\n');
        Assert.That(names, Is.EqualTo(Enumerable.Range(0, 1000).Select(static number => $"child-{number}")));
    }

    [Test]
    public async Task A_watch_tells_what_others_write_meanwhile()
    {
        const int Writes = 300;

        // The first event comes with the watch itself.
        using Process watcher = Start("xenstore-watch", "-n", $"{Writes + 1}", "/w");
        Task<string?> first = watcher.StandardOutput.ReadLineAsync();
        Assert.That(await first, Is.EqualTo("/w"));
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(_listener.Path);
        for (int number = 0; number < Writes; number++)
            await client.WriteAsync($"/w/{number}", new byte[number % 100]);
        string rest = await watcher.StandardOutput.ReadToEndAsync();
        await watcher.WaitForExitAsync();
        Assert.That(rest.TrimEnd().Split('\n'), Is.EqualTo(Enumerable.Range(0, Writes).Select(static number => $"/w/{number}")));
        Assert.That(watcher.ExitCode, Is.Zero);
    }

    [Test]
    public async Task The_store_is_controlled()
    {
        Assert.That(await RunAsync("xenstore-control", "check"), Is.EqualTo("OK\n"));
        Assert.That(await RunAsync("xenstore-control", "quota"), Does.StartWith("Quota settings:\nnodes "));
        Assert.That(await RunAsync("xenstore-control", "quota", "set", "watches", "77"), Is.EqualTo("OK\n"));
        Assert.That(await RunAsync("xenstore-control", "quota"), Does.Match("watches +: +77 "));
        using Process unknown = Start("xenstore-control", "frobnicate");
        Task<string> complaint = unknown.StandardError.ReadToEndAsync();
        await unknown.WaitForExitAsync();
        Assert.That(unknown.ExitCode, Is.EqualTo(3));
        Assert.That(await complaint, Does.Contain("Valid commands are").And.Contain("quota"));
    }

    [Test]
    public async Task Transactions_of_several_tools_at_once_lose_nothing()
    {
        // Two nodes in one command are a transaction; "/both" is touched by all.
        await Task.WhenAll(Enumerable.Range(0, 8).Select(async number =>
            Assert.That(await RunAsync("xenstore-write", $"/each/{number}", $"{number}", "/both", $"{number}"), Is.Empty)));
        Assert.That(_store.Domain0.List("/each"), Has.Count.EqualTo(8));
        Assert.That(_store.Domain0.Read("/both"), Is.Not.Null);
    }

    private async Task<string> RunAsync(string program, params string[] arguments)
    {
        using Process process = Start(program, arguments);
        Task<string> error = process.StandardError.ReadToEndAsync();
        string output = await process.StandardOutput.ReadToEndAsync();
        await process.WaitForExitAsync();
        Assert.That((process.ExitCode, await error), Is.EqualTo((0, "")), $"{program} {string.Join(' ', arguments)}");
        return output;
    }

    private async Task<int> StatusAsync(string program, params string[] arguments)
    {
        using Process process = Start(program, arguments);
        await process.WaitForExitAsync();
        return process.ExitCode;
    }

    private Process Start(string tool, params string[] arguments)
    {
        Command command = _tools.Command(tool, arguments);
        ProcessStartInfo start = new(command.Program, command.Arguments) { RedirectStandardOutput = true, RedirectStandardError = true };
        start.Environment["XENSTORED_PATH"] = _listener.Path;
        return Process.Start(start)!;
    }
}
