// xensharp xenstore against a store in the test's process, and beside Debian's own tools. No KVM is needed.

using System.Diagnostics;
using System.Text;
using System.Text.Json;
using XenSharp.Devices.Xenstore;
using XenSharp.Guests.Fetching;

namespace XenSharp.Cli.Tests;

[TestFixture]
[CancelAfter(120_000)]
[Parallelizable(ParallelScope.Children)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class XenstoreCommandTests : IAsyncDisposable
{
    private readonly string _folder;
    private readonly XenstoreServer _store;
    private readonly XenstoreListener _listener;

    public XenstoreCommandTests()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-cli-store-").FullName;
        _store = new XenstoreServer();
        _listener = XenstoreListener.Start(_store, Path.Combine(_folder, "socket"));
    }

    public async ValueTask DisposeAsync()
    {
        await _listener.DisposeAsync();
        await _store.DisposeAsync();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task Values_are_written_read_and_removed()
    {
        Assert.That(await RunAsync("write", "/a/b", "one", "/a/c", @"\x01\101\t\\ü\q"), Is.EqualTo(""));
        Assert.That(_store.Domain0.ReadBytes("/a/c"), Is.EqualTo(new byte[] { 1, (byte)'A', 9, (byte)'\\', 0xc3, 0xbc, (byte)'q' }));
        Assert.That(await RunAsync("read", "-p", "/a/b", "/a/c"), Is.EqualTo("/a/b: one\n/a/c: \\001A\\t\\\\\\xc3\\xbcq\n"));
        Assert.That(await RunAsync("write", "-R", "/a/b", @"\t"), Is.EqualTo(""));
        Assert.That(await RunAsync("read", "--raw", "/a/b"), Is.EqualTo(@"\t"));
        Assert.That(await RunAsync("list", "-p", "/a"), Is.EqualTo("/a/b\n/a/c\n"));
        Assert.That(await RunAsync("rm", "-t", "/a/b", "/a/c"), Is.EqualTo(""));
        Assert.That(_store.Domain0.Exists("/a"), Is.False);
    }

    [Test]
    public async Task What_fails_is_a_sentence_and_changes_nothing()
    {
        _store.Domain0.Write("/a", "old");
        CommandEnd end = await EndAsync("read", "/a", "/absent");
        Assert.That((end.Status, end.Output), Is.EqualTo((2, "old\n")));
        Assert.That(end.Error, Is.EqualTo(
            "xensharp: xenstore read of \"/absent\" failed with ENOENT: there is no such node, watch, transaction or domain.\n"));
        end = await EndAsync("write", "/a", "new", "//bad", "x");
        Assert.That((end.Status, end.Error.Split(':')[1]), Is.EqualTo((2, " xenstore write of \"//bad\" failed with EINVAL")));
        Assert.That(_store.Domain0.Read("/a"), Is.EqualTo("old"), "all or nothing");
        Assert.That((await EndAsync("write", "/a")).Error, Does.Contain("A value is missing"));
        Assert.That((await EndAsync("chmod", "/a", "x5")).Error, Does.Contain("\"x5\" is no mode"));
        end = await CommandProcess.RunAsync("xenstore", "ls", "--socket", Path.Combine(_folder, "none"));
        Assert.That((end.Status, end.Error), Is.EqualTo((2,
            $"xensharp: No xenstore answers at {_folder}/none (there is no such file); start the daemon, or name its socket.\n")));
    }

    [Test]
    public async Task Existence_is_a_status()
    {
        _store.Domain0.Write("/a/b", "");
        Assert.That((await EndAsync("exists", "/a", "/a/b")).Status, Is.Zero);
        Assert.That(await EndAsync("exists", "/a", "/a/c"), Is.EqualTo(new CommandEnd(1, "", "")));
    }

    [Test]
    public async Task Modes_are_set_for_trees_and_branches()
    {
        _store.Domain0.Write("/t/x/y", "");
        _store.Domain0.Write("/t/z", "");
        Assert.That(await RunAsync("chmod", "-r", "/t/x", "n0", "r5"), Is.EqualTo(""));
        Assert.That(await RunAsync("chmod", "-u", "/t/z", "b7"), Is.EqualTo(""));
        Assert.That(string.Join("; ", new[] { "/t", "/t/x", "/t/x/y", "/t/z" }.Select(path => _store.Domain0.GetPermissions(path))),
            Is.EqualTo("b7; n0 r5; n0 r5; b7"));
    }

    [Test]
    public async Task A_watch_prints_changes_as_they_come()
    {
        using CommandProcess watch = CommandProcess.Start("xenstore", "--socket", _listener.Path, "watch", "-n", "3", "/w");
        using StreamReader output = new(watch.Output);
        Assert.That(await output.ReadLineAsync(), Is.EqualTo("/w"));
        _store.Domain0.Write("/w/a", "1");
        Assert.That(await output.ReadLineAsync(), Is.EqualTo("/w/a"));
        _store.Domain0.Write("/w/b", "1");
        Assert.That(await output.ReadToEndAsync(), Is.EqualTo("/w/b\n"));
        Assert.That(await watch.WaitAsync(), Is.Zero);
    }

    [Test]
    public async Task A_watch_ends_with_a_sentence_when_the_store_does()
    {
        using CommandProcess watch = CommandProcess.Start("xenstore", "--socket", _listener.Path, "watch", "/w");
        using StreamReader output = new(watch.Output);
        Assert.That(await output.ReadLineAsync(), Is.EqualTo("/w"));
        await _listener.DisposeAsync();
        Assert.That(await watch.WaitAsync(), Is.EqualTo(2));
        Assert.That(watch.Error, Does.Contain("has ended the connection"));
    }

    [Test]
    public async Task Json_is_an_object_a_line()
    {
        _store.Domain0.Write("/t/x", "v\n");
        Assert.That(await RunAsync("ls", "--json", "/t"), Is.EqualTo("{\"path\":\"/t/x\",\"value\":\"v\\\\n\",\"permissions\":[\"n0\"]}\n"));
        using JsonDocument names = JsonDocument.Parse(await RunAsync("list", "--json", "/t"));
        Assert.That(names.RootElement[0].GetString(), Is.EqualTo("x"));
        using JsonDocument value = JsonDocument.Parse(await RunAsync("read", "--json", "/t/x"));
        Assert.That(value.RootElement.GetProperty("value").GetString(), Is.EqualTo("v\\n"));
    }

    [Test]
    public async Task A_store_that_changes_is_read_at_one_moment()
    {
        using CancellationTokenSource stop = new();
        Change(0);
        Task changing = Task.Run(async () =>
        {
            for (int number = 1; !stop.IsCancellationRequested; number++)
            {
                Change(number);
                await Task.Delay(1);
            }
        });
        string[] values = (await RunAsync("read", "/same/a", "/same/b")).TrimEnd().Split('\n');
        await stop.CancelAsync();
        await changing;
        Assert.That(values, Has.Length.EqualTo(2));
        Assert.That(values[0], Is.EqualTo(values[1]));

        void Change(int number) => _store.Domain0.Transact(transaction =>
        {
            transaction.Write("/same/a", $"{number}");
            transaction.Write("/same/b", $"{number}");
        });
    }

    [Test]
    public async Task Output_is_that_of_Debians_tools()
    {
        XenstoreTools tools;
        try
        {
            tools = await XenstoreTools.GetAsync(new GuestCache(GuestCache.DefaultRoot()));
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            return;
        }
        byte[] all = [.. Enumerable.Range(1, 255).Select(static value => (byte)value)];
        _store.Domain0.Write("/t/all-bytes", all);
        _store.Domain0.Write("/t/deep/er/and/deeper", "value");
        _store.Domain0.Write("/t/" + new string('n', 90), "a long name");
        for (int length = 60; length < 75; length++)
            _store.Domain0.Write($"/t/length-{length}", new string('v', length));
        for (int length = 0; length < 60; length += 7)
            _store.Domain0.Write($"/t/deep/{new string('l', length + 1)}", new string('v', length));
        _store.Domain0.SetPermissions("/t/deep/er", new XenstorePermissions(new(3, XenstoreAccess.None), new(0, XenstoreAccess.Both), new(9, XenstoreAccess.Write)));
        foreach (string[] words in new[]
        {
            ["ls"], ["ls", "-p"], ["ls", "-f", "/t"], ["ls", "-f", "-p", "/t"], ["ls", "/t/deep", "/tool"], ["read", "-p", "/t/all-bytes", "/t/deep"],
            (string[])["read", "-R", "/t/all-bytes"], ["list", "/t"], ["list", "-p", "/t", "/tool"],
        })
        {
            Command command = tools.Command("xenstore-" + words[0], words[1..]);
            ProcessStartInfo start = new(command.Program, command.Arguments) { RedirectStandardOutput = true, StandardOutputEncoding = Encoding.Latin1 };
            start.Environment["XENSTORED_PATH"] = _listener.Path;
            using Process debian = Process.Start(start)!;
            string expected = await debian.StandardOutput.ReadToEndAsync();
            await debian.WaitForExitAsync();
            Assert.That(debian.ExitCode, Is.Zero);
            Assert.That(await RunAsync(words), Is.EqualTo(expected), string.Join(' ', words));
        }
    }

    private async Task<string> RunAsync(params string[] words)
    {
        CommandEnd end = await EndAsync(words);
        Assert.That((end.Status, end.Error), Is.EqualTo((0, "")), string.Join(' ', words));
        return end.Output;
    }

    private Task<CommandEnd> EndAsync(params string[] words) => CommandProcess.RunAsync(["xenstore", "--socket", _listener.Path, .. words]);
}
