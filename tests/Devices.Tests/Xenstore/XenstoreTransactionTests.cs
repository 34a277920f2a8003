// Transactions: isolation, conflicts, events on commit.
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreTransactionTests
{
    private StoreFixture _store = null!;
    private FakeGuest _guest = null!;

    [SetUp]
    public void SetUp()
    {
        _store = new StoreFixture();
        _guest = _store.Guest(5);
    }

    [TearDown]
    public void TearDown() => _store.Dispose();

    [Test]
    public void Changes_are_seen_inside_at_once_and_outside_after_commit()
    {
        uint transaction = _guest.Begin();
        Assert.That(transaction, Is.Not.Zero);
        _guest.Write("a/b", "1", transaction);
        Assert.That(_guest.Read("a/b", transaction), Is.EqualTo("1"));
        Assert.That(_guest.Read("a/b"), Is.EqualTo("ENOENT"));
        Assert.That(_guest.End(transaction), Is.Empty);
        Assert.That(_guest.Read("a/b"), Is.EqualTo("1"));
        Assert.That(_guest.Read("a/b", transaction), Is.EqualTo("ENOENT"), "no such transaction");
        Assert.That(_guest.End(transaction), Is.EqualTo("ENOENT"));
    }

    [Test]
    public void A_discarded_transaction_leaves_nothing()
    {
        uint transaction = _guest.Begin();
        _guest.Write("a", "1", transaction);
        _guest.Do(XenstoreMessageType.Remove, "/local/domain/5\0", transaction);
        Assert.That(_guest.End(transaction, commit: false), Is.Empty);
        Assert.That(_guest.Read("a"), Is.EqualTo("ENOENT"));
        Assert.That(_guest.Call(XenstoreMessageType.Read, "/local/domain/5\0").Error, Is.Empty);
    }

    [Test]
    public void Transactions_do_not_nest_and_must_exist()
    {
        uint transaction = _guest.Begin();
        Assert.That(_guest.Call(XenstoreMessageType.TransactionStart, "\0", transaction).Error, Is.EqualTo("EBUSY"));
        Assert.That(_guest.Call(XenstoreMessageType.TransactionStart, "\0", 999).Error, Is.EqualTo("ENOENT"));
        Assert.That(_guest.Do(XenstoreMessageType.Watch, "a\0t\0", 999), Is.Empty, "a watch ignores the transaction");
        Assert.That(_guest.Do(XenstoreMessageType.ResetWatches, "\0"), Is.Empty);
        Assert.That(_guest.End(transaction), Is.EqualTo("ENOENT"), "reset takes transactions along");
    }

    [TestCase("read", "write", "EAGAIN")]
    [TestCase("read", "chmod", "EAGAIN")]
    [TestCase("read", "rm", "EAGAIN")]
    [TestCase("absent", "create", "EAGAIN")]
    [TestCase("list", "create", "EAGAIN")]
    [TestCase("write", "write", "EAGAIN")]
    [TestCase("rm", "below", "EAGAIN")]
    [TestCase("create", "create", "EAGAIN")]
    [TestCase("read", "elsewhere", "")]
    [TestCase("read", "below", "")]
    [TestCase("write", "elsewhere", "")]
    [TestCase("write", "below", "")]
    [TestCase("list", "write", "")]
    [TestCase("rm", "elsewhere", "")]
    public void Conflicts_are_what_was_looked_at_and_changed(string inside, string outside, string result)
    {
        _guest.Write("dir/node/below", "0");
        _guest.Write("dir/other", "0");
        uint transaction = _guest.Begin();
        switch (inside)
        {
            case "read": _guest.Read("dir/node", transaction); break;
            case "absent": _guest.Read("dir/new", transaction); break;
            case "list": _guest.Call(XenstoreMessageType.Directory, "dir\0", transaction); break;
            case "write": _guest.Write("dir/node", "inside", transaction); break;
            case "rm": _guest.Do(XenstoreMessageType.Remove, "dir/node\0", transaction); break;
            case "create": _guest.Write("dir/mine", "inside", transaction); break;
        }
        switch (outside)
        {
            case "write": _guest.Write("dir/node", "outside"); break;
            case "chmod": _guest.Do(XenstoreMessageType.SetPermissions, "dir/node\0r5\0"); break;
            case "rm": _guest.Do(XenstoreMessageType.Remove, "dir/node\0"); break;
            case "create": _guest.Write("dir/new", "outside"); break;
            case "below": _guest.Write("dir/node/below", "outside"); break;
            case "elsewhere": _guest.Write("dir/other", "outside"); break;
        }
        Assert.That(_guest.End(transaction), Is.EqualTo(result));
        if (result.Length != 0)
            return;
        string[] children = _guest.Call(XenstoreMessageType.Directory, "dir\0").Strings;
        Assert.That(children, Is.EqualTo(inside == "rm" ? new[] { "other" } : ["node", "other"]));
        if (outside == "elsewhere")
            Assert.That(_guest.Read("dir/other"), Is.EqualTo("outside"));
        if (outside == "below")
            Assert.That(_guest.Read("dir/node/below"), Is.EqualTo("outside"));
        if (inside == "write")
            Assert.That(_guest.Read("dir/node"), Is.EqualTo("inside"));
    }

    [Test]
    public void The_snapshot_does_not_move()
    {
        _guest.Write("a", "old");
        uint transaction = _guest.Begin();
        _guest.Write("a", "new");
        Assert.That(_guest.Read("a", transaction), Is.EqualTo("old"));
        Assert.That(_guest.End(transaction), Is.EqualTo("EAGAIN"));
    }

    [Test]
    public void Events_come_with_the_commit_and_once_per_node()
    {
        _guest.Write("a/gone", "");
        _guest.Watch("a", "t");
        _guest.AllEvents();
        uint transaction = _guest.Begin();
        _guest.Write("a/x", "1", transaction);
        _guest.Write("a/x", "2", transaction);
        _guest.Write("a/brief", "", transaction);
        _guest.Do(XenstoreMessageType.Remove, "a/brief\0", transaction);
        _guest.Do(XenstoreMessageType.Remove, "a/gone\0", transaction);
        Assert.That(_guest.AllEvents(), Is.Empty);
        Assert.That(_guest.End(transaction), Is.Empty);
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "a/x|t", "a/gone|t" }), "what never was is not told");
    }

    [Test]
    public void Removing_and_creating_anew_leaves_nothing_of_the_old()
    {
        _guest.Write("a/old/deep", "");
        uint transaction = _guest.Begin();
        _guest.Do(XenstoreMessageType.Remove, "a\0", transaction);
        _guest.Write("a/new", "", transaction);
        _guest.Write("sibling", "");
        Assert.That(_guest.End(transaction), Is.EqualTo("EAGAIN"), "the list of the parent changed");

        transaction = _guest.Begin();
        _guest.Do(XenstoreMessageType.Remove, "a\0", transaction);
        _guest.Write("a/new", "", transaction);
        _guest.Write("sibling/below", "");
        Assert.That(_guest.End(transaction), Is.Empty);
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "a\0").Strings, Is.EqualTo(new[] { "new" }));
        Assert.That(_guest.Read("sibling/below"), Is.Empty);
    }

    [Test]
    public void The_host_retries_until_it_can_commit()
    {
        _store.Domain0.Write("/count", "0");
        Parallel.For(0, 4, _ =>
        {
            for (int round = 0; round < 50; round++)
                _store.Domain0.Transact(transaction => transaction.Write("/count", $"{int.Parse(transaction.Read("/count")!) + 1}"));
        });
        Assert.That(_store.Domain0.Read("/count"), Is.EqualTo("200"));

        using XenstoreTransaction open = _store.Domain0.BeginTransaction();
        open.Write("/count", "x");
        open.Dispose();
        Assert.That(() => open.Read("/count"), Throws.TypeOf<ObjectDisposedException>());
        Assert.That(_store.Domain0.Read("/count"), Is.EqualTo("200"));
    }

    [Test]
    public void Nodes_for_a_domain_that_is_gone_are_not_committed()
    {
        _store.Guest(6);
        using XenstoreTransaction transaction = _store.Domain0.BeginTransaction();
        transaction.Write("/given", "", new XenstorePermissions(new XenstorePermission(6, XenstoreAccess.None)));
        Assert.That(_store.Server.ReleaseDomainAsync(6).AsTask().Result, Is.True);
        Assert.That(() => transaction.TryCommit(), Throws.TypeOf<XenstoreException>()
            .With.Property(nameof(XenstoreException.Error)).EqualTo(XenstoreError.ENOMEM));
        Assert.That(_store.Domain0.Exists("/given"), Is.False);
    }
}
