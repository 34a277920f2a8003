// Every request of the wire protocol, its answers and its errors, through a ring.
using System.Text;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreRequestTests
{
    private StoreFixture _store = null!;
    private FakeGuest _guest = null!;
    private FakeGuest _tool = null!;

    [SetUp]
    public void SetUp()
    {
        _store = new StoreFixture();
        _guest = _store.Guest(5);
        _tool = _store.Tool();
    }

    [TearDown]
    public void TearDown() => _store.Dispose();

    [Test]
    public void What_is_written_is_read_with_relative_and_absolute_paths()
    {
        Assert.That(_guest.Write("data/x", "value\0with\0nuls"), Is.Empty);
        Assert.That(_guest.Call(XenstoreMessageType.Read, "/local/domain/5/data/x\0").Text, Is.EqualTo("value\0with\0nuls"));
        Assert.That(_guest.Read("data"), Is.Empty, "the parent was created empty");
        Assert.That(_store.Domain0.Read("/local/domain/5/data/x"), Is.EqualTo("value\0with\0nuls"));
        Assert.That(_guest.Write("data/x", ""), Is.Empty);
        Assert.That(_guest.Call(XenstoreMessageType.Read, "data/x\0").Payload, Is.Empty);
    }

    [TestCase(XenstoreMessageType.Read, "nothing\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Read, "no-nul", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "a\0b\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "a//b\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "a/\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "a b\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "\xe4\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "@releaseDomain\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Read, "/tool\0", "EACCES")]
    [TestCase(XenstoreMessageType.Read, "/nowhere\0", "EACCES")]
    [TestCase(XenstoreMessageType.Directory, "nothing\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Directory, "/\0", "EACCES")]
    [TestCase(XenstoreMessageType.DirectoryPart, "nothing\00\0", "ENOENT")]
    [TestCase(XenstoreMessageType.DirectoryPart, "nothing\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Write, "no-nul", "EINVAL")]
    [TestCase(XenstoreMessageType.Write, "/new\0v", "EACCES")]
    [TestCase(XenstoreMessageType.MakeDirectory, "/new\0", "EACCES")]
    [TestCase(XenstoreMessageType.MakeDirectory, "a\0b\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Remove, "no/parent\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Remove, "a", "EINVAL")]
    [TestCase(XenstoreMessageType.GetPermissions, "nothing\0", "ENOENT")]
    [TestCase(XenstoreMessageType.SetPermissions, "nothing\0n5\0", "ENOENT")]
    [TestCase(XenstoreMessageType.SetPermissions, "nothing\0", "EINVAL")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0x5\0", "EINVAL")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0n\0", "EINVAL")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0n70000\0", "EINVAL")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0n0\0", "EPERM")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0n99\0", "ENOENT")]
    [TestCase(XenstoreMessageType.SetPermissions, "/local/domain/5\0n5\0r0\0r0\0r0\0r0\0r0\0", "ENOSPC")]
    [TestCase(XenstoreMessageType.SetPermissions, "@releaseDomain\0n5\0", "EACCES")]
    [TestCase(XenstoreMessageType.SetPermissions, "@other\0n5\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Watch, "a\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Watch, "a\0t\01\02\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Watch, "a//b\0t\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Unwatch, "a\0t\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Unwatch, "a\0", "EINVAL")]
    [TestCase(XenstoreMessageType.TransactionEnd, "T\0", "ENOENT")]
    [TestCase(XenstoreMessageType.TransactionEnd, "X\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "check\0", "EACCES")]
    [TestCase(XenstoreMessageType.Introduce, "6\01\01\0", "EACCES")]
    [TestCase(XenstoreMessageType.Release, "5\0", "EACCES")]
    [TestCase(XenstoreMessageType.IsDomainIntroduced, "5\0", "EACCES")]
    [TestCase(XenstoreMessageType.Resume, "5\0", "EACCES")]
    [TestCase(XenstoreMessageType.SetTarget, "5\00\0", "EACCES")]
    [TestCase(XenstoreMessageType.GetDomainPath, "", "EINVAL")]
    [TestCase(XenstoreMessageType.WatchEvent, "a\0t\0", "ENOSYS")]
    [TestCase(XenstoreMessageType.Error, "EINVAL\0", "ENOSYS")]
    [TestCase((XenstoreMessageType)20, "\0", "ENOSYS")]
    [TestCase((XenstoreMessageType)23, "\0", "ENOSYS")]
    [TestCase((XenstoreMessageType)0xffff, "\0", "ENOSYS")]
    [TestCase((XenstoreMessageType)uint.MaxValue, "", "ENOSYS")]
    public void A_guest_is_told_what_xenstored_tells(XenstoreMessageType type, string payload, string error)
    {
        Assert.That(_guest.Call(type, payload).Error, Is.EqualTo(error));
        Assert.That(_guest.Read(""), Is.EqualTo("EINVAL"), "the connection goes on");
    }

    [TestCase(XenstoreMessageType.Release, "0\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Release, "77\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Resume, "77\0", "ENOENT")]
    [TestCase(XenstoreMessageType.SetTarget, "5\077\0", "ENOENT")]
    [TestCase(XenstoreMessageType.SetTarget, "5\00\0", "EINVAL")]
    [TestCase(XenstoreMessageType.SetTarget, "5\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Introduce, "6\01\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Introduce, "6\01\00\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Introduce, "0\01\01\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Introduce, "6\01\01\0", "ENOSYS")]
    [TestCase(XenstoreMessageType.Control, "", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "live-update\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "quota\0set\0nodes\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "quota\0set\0nodes\00\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "quota\0set\0nonsense\05\0", "EINVAL")]
    [TestCase(XenstoreMessageType.Control, "quota\077\0", "ENOENT")]
    [TestCase(XenstoreMessageType.Remove, "/\0", "EINVAL")]
    public void A_tool_is_told_what_xenstored_tells(XenstoreMessageType type, string payload, string error) =>
        Assert.That(_tool.Call(type, payload).Error, Is.EqualTo(error));

    [Test]
    public void Directory_lists_children_in_the_order_of_creation()
    {
        foreach (string name in new[] { "z", "a", "m" })
            _guest.Write("dir/" + name, "");
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "dir\0").Strings, Is.EqualTo(new[] { "z", "a", "m" }));
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "dir/a\0").Payload, Is.Empty);
        _guest.Do(XenstoreMessageType.Remove, "dir/z\0");
        _guest.Write("dir/z", "");
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "dir\0").Strings, Is.EqualTo(new[] { "a", "m", "z" }));
    }

    [Test]
    public void A_list_too_long_for_one_message_is_read_in_parts()
    {
        string[] names = [.. Enumerable.Range(0, 600).Select(index => $"child-number-{index}")];
        foreach (string name in names)
            _store.Domain0.Write("/big/" + name, "");
        Assert.That(_tool.Call(XenstoreMessageType.Directory, "/big\0").Error, Is.EqualTo("E2BIG"));

        StringBuilder list = new();
        string? generation = null;
        while (true)
        {
            Reply part = _tool.Call(XenstoreMessageType.DirectoryPart, $"/big\0{list.Length}\0");
            Assert.That(part.Payload.Length, Is.LessThanOrEqualTo(4096));
            int end = part.Text.IndexOf('\0');
            generation ??= part.Text[..end];
            Assert.That(part.Text[..end], Is.EqualTo(generation));
            string names1 = part.Text[(end + 1)..];
            bool last = names1.Length == 1 || names1.EndsWith("\0\0", StringComparison.Ordinal);
            list.Append(last ? names1[..^1] : names1);
            if (last)
                break;
        }
        Assert.That(list.ToString().TrimEnd('\0').Split('\0'), Is.EqualTo(names));

        _store.Domain0.Write("/big/another", "");
        Assert.That(_tool.Call(XenstoreMessageType.DirectoryPart, "/big\00\0").Strings[0], Is.Not.EqualTo(generation));
        Assert.That(_tool.Call(XenstoreMessageType.DirectoryPart, "/big\0100000\0").Text, Does.Match("^[0-9]+\0\0$"));
        Assert.That(_tool.Call(XenstoreMessageType.DirectoryPart, "/big\0-1\0").Text, Does.Match("^[0-9]+\0\0$"));
    }

    [Test]
    public void Mkdir_keeps_what_is_there()
    {
        Assert.That(_guest.Do(XenstoreMessageType.MakeDirectory, "a/b/c\0"), Is.Empty);
        _guest.Write("a/b", "kept");
        Assert.That(_guest.Do(XenstoreMessageType.MakeDirectory, "a/b\0"), Is.Empty);
        Assert.That(_guest.Read("a/b"), Is.EqualTo("kept"));
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "a/b\0").Strings, Is.EqualTo(new[] { "c" }));
    }

    [Test]
    public void Rm_is_idempotent_where_the_parent_exists()
    {
        _guest.Write("a/b/c", "");
        Assert.That(_guest.Do(XenstoreMessageType.Remove, "a/b\0"), Is.Empty);
        Assert.That(_guest.Do(XenstoreMessageType.Remove, "a/b\0"), Is.Empty);
        Assert.That(_guest.Do(XenstoreMessageType.Remove, "a/b/c\0"), Is.EqualTo("ENOENT"));
        Assert.That(_guest.Read("a/b/c"), Is.EqualTo("ENOENT"));
        Assert.That(_guest.Call(XenstoreMessageType.Directory, "a\0").Payload, Is.Empty);
    }

    [Test]
    public void Permissions_are_told_as_set()
    {
        _guest.Write("a", "");
        Assert.That(_guest.Call(XenstoreMessageType.GetPermissions, "a\0").Strings, Is.EqualTo(new[] { "n5" }));
        Assert.That(_guest.Do(XenstoreMessageType.SetPermissions, "a\0b5\0r0\0"), Is.Empty);
        Assert.That(_guest.Call(XenstoreMessageType.GetPermissions, "a\0").Strings, Is.EqualTo(new[] { "b5", "r0" }));
        _guest.Write("a/child", "");
        Assert.That(_guest.Call(XenstoreMessageType.GetPermissions, "a/child\0").Strings, Is.EqualTo(new[] { "b5", "r0" }), "inherited");
    }

    [Test]
    public void Domain_paths_need_no_domain()
    {
        Assert.That(_guest.Call(XenstoreMessageType.GetDomainPath, "5\0").Text, Is.EqualTo("/local/domain/5\0"));
        Assert.That(_guest.Call(XenstoreMessageType.GetDomainPath, " 007x\0").Text, Is.EqualTo("/local/domain/7\0"));
    }

    [Test]
    public void Tools_ask_about_domains()
    {
        string Introduced(string domain) => _tool.Call(XenstoreMessageType.IsDomainIntroduced, domain + "\0").Text;
        Assert.That(Introduced("5"), Is.EqualTo("T\0"));
        Assert.That(Introduced("0"), Is.EqualTo("T\0"));
        Assert.That(Introduced("32752"), Is.EqualTo("T\0"), "DOMID_SELF");
        Assert.That(Introduced("6"), Is.EqualTo("F\0"));
        Assert.That(Introduced("99999"), Is.EqualTo("F\0"));
        Assert.That(_tool.Do(XenstoreMessageType.Resume, "5\0"), Is.Empty);
        Assert.That(_tool.Do(XenstoreMessageType.Release, "5\0"), Is.Empty);
        Assert.That(Introduced("5"), Is.EqualTo("F\0"));
        Assert.That(_store.Domain0.Exists("/local/domain/5"), Is.False, "the guest's own nodes go with it");
    }

    [Test]
    public void A_tool_introduces_through_the_connector_and_restarts_a_connection()
    {
        FakeGuest late = _store.Stranger();
        List<(ushort, ulong, uint)> asked = [];
        using StoreFixture store = new(new XenstoreOptions
        {
            Connector = (domain, frame, port) =>
            {
                asked.Add((domain, frame, port));
                return domain == 9 ? late.Ring : null;
            },
        });
        FakeGuest tool = store.Tool();
        Assert.That(tool.Do(XenstoreMessageType.Introduce, "8\01\02\0"), Is.EqualTo("EINVAL"));
        Assert.That(tool.Do(XenstoreMessageType.Introduce, "9\04095\02\0"), Is.Empty);
        Assert.That(asked, Is.EqualTo(new (ushort, ulong, uint)[] { (8, 1, 2), (9, 4095, 2) }));
        store.Domain0.Write("/local/domain/9", "", new XenstorePermissions(new XenstorePermission(9, XenstoreAccess.None)));
        Assert.That(late.Watch("x", "t"), Is.Empty);
        Assert.That(late.NextEvent(), Is.EqualTo("x|t"));

        late.SendRaw([1, 2, 3]);
        Assert.That(tool.Do(XenstoreMessageType.Introduce, "9\04095\02\0"), Is.Empty);
        FakeGuest.Until(() => Volatile.Read(ref late.Page.Word(FakeGuest.RequestProducer)) == 0, "the ring is reset");
        Assert.That(late.Watch("x", "t"), Is.Empty, "the earlier watch is gone, the half message too");
        Assert.That(asked, Has.Count.EqualTo(2));
    }

    [Test]
    public void Control_prints_and_logs_where_the_manager_wants_it()
    {
        List<string> lines = [];
        using StoreFixture store = new(new XenstoreOptions { Log = lines.Add });
        FakeGuest tool = store.Tool();
        FakeGuest guest = store.Guest(5);
        Assert.That(tool.Do(XenstoreMessageType.Control, "print\0to\u0001 all\0"), Is.Empty);
        Assert.That(lines, Is.EqualTo(new[] { "to? all" }));

        lines.Clear();
        Assert.That(tool.Do(XenstoreMessageType.Control, "memreport\0"), Is.Empty);
        Assert.That(lines, Has.Some.Match("^domain 5: 1 nodes, [0-9]+ bytes, 0 messages waiting$"));

        Assert.That(tool.Do(XenstoreMessageType.Control, "log\0on\0"), Is.Empty);
        lines.Clear();
        guest.Write("x", new string('v', 1000));
        guest.Read("absent");
        Assert.That(tool.Do(XenstoreMessageType.Control, "log\0off\0"), Is.Empty);
        guest.Read("x");
        Assert.That(lines, Has.Count.EqualTo(2));
        Assert.That(lines[0], Does.Match("^domain 5, client [0-9]+: Write \"x\\|v+\\.\\.\\.\": OK$"));
        Assert.That(lines[1], Does.Match("^domain 5, client [0-9]+: Read \"absent\\|\": ENOENT$"));
        foreach (string wrong in new[] { "log\0", "log\0maybe\0", "print\0", "memreport\0/tmp/file\0", "logfile\0/tmp/file\0" })
            Assert.That(tool.Do(XenstoreMessageType.Control, wrong), Is.EqualTo("EINVAL"), wrong);
    }

    [Test]
    public void Control_tells_and_sets_quotas()
    {
        Assert.That(_tool.Do(XenstoreMessageType.Control, "check\0"), Is.Empty);
        Assert.That(_tool.Call(XenstoreMessageType.Control, "help\0").Text, Does.Contain("quota"));
        Assert.That(_tool.Call(XenstoreMessageType.Control, "quota\0").Text, Does.Match("watches +: +128"));
        Assert.That(_tool.Do(XenstoreMessageType.Control, "quota\0set\0watches\01\0"), Is.Empty);
        Assert.That(_tool.Call(XenstoreMessageType.Control, "quota\0").Text, Does.Match("watches +: +1 "));
        Assert.That(_guest.Watch("a", "1"), Is.Empty);
        Assert.That(_guest.Watch("a", "2"), Is.Empty);
        Assert.That(_guest.Watch("a", "3"), Is.EqualTo("E2BIG"));
        Assert.That(_tool.Call(XenstoreMessageType.Control, "quota\05\0").Text, Does.Match("nodes +: +1\n").And.Match("watches +: +2\n"));
    }

    [Test]
    public void Set_target_lends_the_rights_of_another_domain()
    {
        FakeGuest other = _store.Guest(6);
        _guest.Write("secret", "s");
        Assert.That(other.Read("/local/domain/5/secret"), Is.EqualTo("EACCES"));
        Assert.That(_tool.Do(XenstoreMessageType.SetTarget, "6\05\0"), Is.Empty);
        Assert.That(other.Read("/local/domain/5/secret"), Is.EqualTo("s"));
        Assert.That(_guest.Read("/local/domain/6"), Is.EqualTo("EACCES"));
        _tool.Do(XenstoreMessageType.Release, "5\0");
        _store.Guest(5).Write("secret", "new");
        Assert.That(other.Read("/local/domain/5/secret"), Is.EqualTo("EACCES"), "another domain of that number");
    }

    [TestCase(2048, "")]
    [TestCase(2049, "EINVAL")]
    public void Paths_are_limited_beyond_the_domain_folder(int length, string error)
    {
        _store.Domain0.Write("/open", "", new XenstorePermissions(new XenstorePermission(0, XenstoreAccess.Both)));
        string name = string.Concat(Enumerable.Repeat("a/", 1024)) + "bc";
        Assert.That(_tool.Write(name[..(length - 1)] + "x", ""), Is.EqualTo(error), "relative");
        Assert.That(_tool.Write("/local/domain/1234/" + name[..(length - 1)] + "x", ""), Is.EqualTo(error), "absolute");
        Assert.That(_tool.Write("/" + name[..(length - 2)] + "x", ""), Is.EqualTo(error), "elsewhere");
    }
}
