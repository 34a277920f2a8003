// Watches: when they fire, in which form, in which order, and who may see what.
using System.Collections.Concurrent;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreWatchTests
{
    private StoreFixture _store = null!;
    private FakeGuest _guest = null!;
    private FakeGuest _other = null!;

    [SetUp]
    public void SetUp()
    {
        _store = new StoreFixture();
        _guest = _store.Guest(5);
        _other = _store.Guest(6);
    }

    [TearDown]
    public void TearDown() => _store.Dispose();

    [Test]
    public void A_watch_fires_at_first_and_on_every_change_at_or_below()
    {
        Assert.That(_guest.Watch("a", "token"), Is.Empty);
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "a|token" }), "even though there is no such node");
        _guest.Write("a/b/c", "1");
        _guest.Write("a/b/c", "2");
        _guest.Write("ab", "not below");
        _guest.Do(XenstoreMessageType.MakeDirectory, "a/b\0");
        _guest.Do(XenstoreMessageType.MakeDirectory, "a/new\0");
        _guest.Do(XenstoreMessageType.SetPermissions, "a/new\0r5\0");
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "a/b/c|token", "a/b/c|token", "a/new|token", "a/new|token" }));
    }

    [Test]
    public void Removal_is_told_for_every_node_that_goes()
    {
        _guest.Write("a/b/c", "");
        _guest.Write("a/b/d", "");
        foreach (string path in new[] { "a", "a/b", "a/b/c", "a/b/d", "a/b/absent" })
            _guest.Watch(path, "t");
        _guest.AllEvents();
        _guest.Do(XenstoreMessageType.Remove, "a/b\0");
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "a/b/c|t", "a/b/d|t", "a/b|t", "a/b|t" }));
        _guest.Do(XenstoreMessageType.Remove, "a/b\0");
        Assert.That(_guest.AllEvents(), Is.Empty, "nothing went");
    }

    [Test]
    public void Paths_come_back_as_they_were_given()
    {
        _guest.Watch("a", "relative");
        _guest.Watch("/local/domain/5/a", "absolute");
        _guest.Watch("/local/domain/5", "folder");
        _guest.AllEvents();
        _guest.Write("a/b", "");
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[]
            { "a/b|relative", "/local/domain/5/a/b|absolute", "/local/domain/5/a/b|folder" }));
    }

    [Test]
    public void Same_path_and_token_is_one_watch_and_unwatch_ends_it()
    {
        Assert.That(_guest.Watch("a", "t"), Is.Empty);
        Assert.That(_guest.Watch("/local/domain/5/a", "t"), Is.EqualTo("EEXIST"), "the same node");
        Assert.That(_guest.Watch("a", "\xff\x01 t"), Is.Empty, "any bytes make a token");
        Assert.That(_guest.Do(XenstoreMessageType.Unwatch, "a\0t\0"), Is.Empty);
        Assert.That(_guest.Do(XenstoreMessageType.Unwatch, "a\0t\0"), Is.EqualTo("ENOENT"));
        _guest.AllEvents();
        _guest.Write("a", "");
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "a|\xff\x01 t" }));
        Assert.That(_guest.Do(XenstoreMessageType.ResetWatches, "\0"), Is.Empty);
        _guest.Write("a", "");
        Assert.That(_guest.AllEvents(), Is.Empty);
    }

    [Test]
    public void Only_readers_of_the_node_or_its_parent_are_told()
    {
        _guest.Write("hidden", "");
        _guest.Write("shared", "");
        _guest.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0r6\0");
        _other.Watch("/local/domain/5", "t");
        _other.AllEvents();
        _guest.Write("hidden", "1");
        Assert.That(_other.AllEvents(), Is.Empty);
        _guest.Write("shared", "1");
        Assert.That(_other.AllEvents(), Is.EqualTo(new[] { "/local/domain/5/shared|t" }));
        _guest.Write("shared/child", "");
        Assert.That(_other.AllEvents(), Is.EqualTo(new[] { "/local/domain/5/shared/child|t" }));
        _guest.Do(XenstoreMessageType.SetPermissions, "shared/child\0n5\0");
        _other.AllEvents();
        _guest.Write("shared/child", "1");
        Assert.That(_other.AllEvents(), Is.EqualTo(new[] { "/local/domain/5/shared/child|t" }), "as its parent is readable");
        _guest.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0");
        Assert.That(_other.AllEvents(), Is.EqualTo(new[] { "/local/domain/5/shared|t" }), "it was readable before");
        _guest.Write("shared", "2");
        Assert.That(_other.AllEvents(), Is.Empty);
        _guest.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0r6\0");
        _other.AllEvents();
        _guest.Do(XenstoreMessageType.Remove, "shared\0");
        Assert.That(_other.AllEvents(), Does.Contain("/local/domain/5/shared|t"));
    }

    [Test]
    public void Domains_coming_and_going_are_told_to_those_allowed()
    {
        FakeGuest tool = _store.Tool();
        foreach (FakeGuest client in new[] { tool, _guest })
        {
            client.Watch("@introduceDomain", "i");
            client.Watch("@releaseDomain", "r");
            Assert.That(client.AllEvents(), Is.EqualTo(new[] { "@introduceDomain|i", "@releaseDomain|r" }));
        }
        _store.Guest(7);
        Assert.That(tool.AllEvents(), Is.EqualTo(new[] { "@introduceDomain|i" }));
        _store.Server.AnnounceShutdown(7);
        _store.Server.AnnounceShutdown(7);
        Assert.That(tool.AllEvents(), Is.EqualTo(new[] { "@releaseDomain|r" }), "once");
        _store.Server.ResumeDomain(7);
        _store.Server.AnnounceShutdown(7);
        Assert.That(tool.AllEvents(), Is.EqualTo(new[] { "@releaseDomain|r" }));
        Assert.That(_guest.AllEvents(), Is.Empty);

        Assert.That(tool.Do(XenstoreMessageType.SetPermissions, "@releaseDomain\0n0\0r5\0"), Is.Empty);
        Assert.That(_store.Server.ReleaseDomainAsync(7).AsTask().Result, Is.True);
        Assert.That(tool.AllEvents(), Is.EqualTo(new[] { "@releaseDomain|r" }));
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "@releaseDomain|r" }));
        Assert.That(_store.Server.ReleaseDomainAsync(7).AsTask().Result, Is.False);
    }

    [Test]
    public void Events_precede_the_reply_to_the_request_that_caused_them()
    {
        _guest.Watch("a", "t");
        _guest.AllEvents();
        uint id = _guest.Send(XenstoreMessageType.Write, 0, "a\0v");
        Assert.That(_guest.Receive().Type, Is.EqualTo(XenstoreMessageType.WatchEvent));
        Assert.That(_guest.Receive().RequestId, Is.EqualTo(id));
    }

    [Test]
    public void Callbacks_of_the_host_come_in_order_and_end_with_the_watch()
    {
        BlockingCollection<string> seen = [];
        IDisposable watch = _store.Domain0.Watch("/local/domain/5/n", seen.Add);
        Assert.That(seen.Take(), Is.EqualTo("/local/domain/5/n"));
        List<string> expected = [];
        for (int index = 0; index < 200; index++)
        {
            _guest.Write($"n/{index}", "");
            expected.Add($"/local/domain/5/n/{index}");
        }
        List<string> received = [];
        while (received.Count < expected.Count)
            received.Add(seen.Take());
        Assert.That(received, Is.EqualTo(expected));
        watch.Dispose();
        watch.Dispose();
        _guest.Write("n/after", "");
        Assert.That(_store.Server.Database.Domain0.Memory, Is.Positive);
        Assert.That(seen, Is.Empty);
    }

    [Test]
    public void A_failing_callback_is_reported_and_others_go_on()
    {
        BlockingCollection<Exception> failures = [];
        using StoreFixture store = new(new XenstoreOptions { CallbackFailed = failures.Add });
        BlockingCollection<string> seen = [];
        using IDisposable bad = store.Domain0.Watch("/x", static _ => throw new InvalidOperationException("broken"));
        using IDisposable good = store.Domain0.Watch("relative", seen.Add);
        Assert.That(failures.Take().Message, Is.EqualTo("broken"));
        Assert.That(seen.Take(), Is.EqualTo("relative"));
        store.Domain0.Write("relative/y", "");
        Assert.That(seen.Take(), Is.EqualTo("relative/y"));
    }

    [Test]
    public void A_callback_may_use_the_store()
    {
        using ManualResetEventSlim done = new();
        using IDisposable watch = _store.Domain0.Watch("/local/domain/5/ask", path =>
        {
            if (_store.Domain0.Read(path) is { } question)
            {
                _store.Domain0.Write("/local/domain/5/answer", question + "!");
                done.Set();
            }
        });
        _guest.Write("ask", "why");
        Assert.That(done.Wait(TimeSpan.FromSeconds(20)), Is.True);
        Assert.That(_guest.Read("answer"), Is.EqualTo("why!"));
    }

    [TestCase("0", "w|t")]
    [TestCase("1", "w|t w/a|t w/c|t")]
    [TestCase("2", "w|t w/a|t w/a/b|t w/c|t")]
    [TestCase("2147483647", "w|t w/a|t w/a/b|t w/a/b/deep|t w/c|t")]
    public void A_watch_can_be_limited_in_depth(string depth, string events)
    {
        Assert.That(_guest.Do(XenstoreMessageType.Watch, $"w\0t\0{depth}\0"), Is.Empty);
        _guest.AllEvents();
        foreach (string path in new[] { "w", "w/a", "w/a/b", "w/a/b/deep", "w/c", "ww" })
            _guest.Write(path, "");
        Assert.That(string.Join(' ', _guest.AllEvents()), Is.EqualTo(events));
    }

    [Test]
    public void The_root_can_be_watched_in_depth()
    {
        FakeGuest tool = _store.Tool();
        Assert.That(tool.Do(XenstoreMessageType.Watch, "/\0t\01\0"), Is.Empty);
        tool.AllEvents();
        tool.Write("/a/b", "");
        tool.Write("/a", "");
        Assert.That(tool.AllEvents(), Is.EqualTo(new[] { "/a|t" }));
    }

    [TestCase("w\0t\0-1\0")]
    [TestCase("w\0t\0one\0")]
    [TestCase("w\0t\0\0")]
    [TestCase("w\0t\099999999999\0")]
    [TestCase("w\0t\01\02\0")]
    [TestCase("@releaseDomain\0t\00\0")]
    [TestCase("@releaseDomain\0t\02\0")]
    public void A_depth_that_means_nothing_is_refused(string payload)
    {
        Assert.That(_guest.Do(XenstoreMessageType.Watch, payload), Is.EqualTo("EINVAL"));
        Assert.That(_guest.AllEvents(), Is.Empty);
    }

    [Test]
    public void Special_events_can_name_the_domain()
    {
        FakeGuest tool = _store.Tool();
        Assert.That(tool.Do(XenstoreMessageType.Watch, "@releaseDomain\0any\01\0"), Is.Empty);
        Assert.That(tool.Watch("@releaseDomain", "old"), Is.Empty);
        Assert.That(tool.Watch("@releaseDomain/6", "six"), Is.Empty);
        Assert.That(tool.Do(XenstoreMessageType.Watch, "@introduceDomain\0new\01\0"), Is.Empty);
        Assert.That(tool.AllEvents(), Is.EqualTo(
            new[] { "@releaseDomain|any", "@releaseDomain|old", "@releaseDomain/6|six", "@introduceDomain|new" }));
        _ = _store.Guest(7);
        _store.Server.AnnounceShutdown(5);
        _store.Server.AnnounceShutdown(6);
        Assert.That(tool.AllEvents(), Is.EqualTo(new[]
        {
            "@introduceDomain/7|new", "@releaseDomain/5|any", "@releaseDomain|old", "@releaseDomain/6|any", "@releaseDomain|old",
            "@releaseDomain/6|six",
        }));
    }

    [Test]
    public void The_manager_can_watch_in_depth()
    {
        BlockingCollection<string> seen = [];
        using IDisposable watch = _store.Domain0.Watch("/top", seen.Add, depth: 1);
        using IDisposable released = _store.Domain0.Watch("@releaseDomain", seen.Add, depth: 1);
        _store.Domain0.Write("/top/a/b", "");
        _store.Domain0.Write("/top/c", "");
        _store.Server.AnnounceShutdown(5);
        string[] expected = ["/top", "@releaseDomain", "/top/c", "@releaseDomain/5"];
        foreach (string path in expected)
        {
            Assert.That(seen.TryTake(out string? next, TimeSpan.FromSeconds(20)));
            Assert.That(next, Is.EqualTo(path));
        }
    }
}
