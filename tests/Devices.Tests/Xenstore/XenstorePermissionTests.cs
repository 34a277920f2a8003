// Who may read, write and own what: two guests and the host.
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstorePermissionTests
{
    private const string Shared = "/local/domain/5/shared";
    private StoreFixture _store = null!;
    private FakeGuest _owner = null!;
    private FakeGuest _other = null!;

    [SetUp]
    public void SetUp()
    {
        _store = new StoreFixture();
        _owner = _store.Guest(5);
        _other = _store.Guest(6);
        _owner.Write("shared", "value");
    }

    [TearDown]
    public void TearDown() => _store.Dispose();

    [TestCase("n5", "EACCES", "EACCES")]
    [TestCase("r5", "value", "EACCES")]
    [TestCase("w5", "EACCES", "")]
    [TestCase("b5", "value", "")]
    [TestCase("n5 r6", "value", "EACCES")]
    [TestCase("n5 w6", "EACCES", "")]
    [TestCase("n5 b6", "value", "")]
    [TestCase("b5 n6", "EACCES", "EACCES")]
    [TestCase("n5 r0", "EACCES", "EACCES")]
    [TestCase("n5 n6 b6", "EACCES", "EACCES", Description = "the first entry that fits counts")]
    public void Access_is_what_the_list_says(string list, string read, string write)
    {
        Assert.That(_owner.Do(XenstoreMessageType.SetPermissions, "shared\0" + list.Replace(' ', '\0') + "\0"), Is.Empty);
        Assert.That(_other.Read(Shared), Is.EqualTo(read));
        Assert.That(_other.Write(Shared, "changed"), Is.EqualTo(write));
        Assert.That(_owner.Read("shared"), Is.EqualTo(write.Length == 0 ? "changed" : "value"));
        Assert.That(_other.Do(XenstoreMessageType.SetPermissions, Shared + "\0b6\0"), Is.EqualTo("EACCES"), "not the owner");
    }

    [Test]
    public void Who_may_not_see_is_not_told_what_exists()
    {
        Assert.That(_other.Read("/local/domain/5/absent"), Is.EqualTo("EACCES"));
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0r5\0");
        Assert.That(_other.Read(Shared + "/absent"), Is.EqualTo("ENOENT"));
        Assert.That(_other.Write(Shared + "/absent", ""), Is.EqualTo("EACCES"));
        _owner.Write("shared/private", "");
        _owner.Do(XenstoreMessageType.SetPermissions, "shared/private\0n5\0");
        Assert.That(_other.Read(Shared + "/private"), Is.EqualTo("EACCES"));
        Assert.That(_other.Call(XenstoreMessageType.Directory, Shared + "\0").Strings, Is.EqualTo(new[] { "private" }));
    }

    [Test]
    public void What_one_creates_in_anothers_folder_is_ones_own()
    {
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0b6\0");
        Assert.That(_other.Write(Shared + "/new", "mine"), Is.Empty);
        Assert.That(_other.Call(XenstoreMessageType.GetPermissions, Shared + "/new\0").Strings, Is.EqualTo(new[] { "n6", "b6" }));
        Assert.That(_owner.Read("shared/new"), Is.EqualTo("EACCES"));
        Assert.That(_owner.Do(XenstoreMessageType.Remove, "shared\0"), Is.Empty, "but removing one's own takes all below along");
        Assert.That(_store.Domain0.Exists(Shared), Is.False);
    }

    [Test]
    public void Only_a_writer_removes()
    {
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0r6\0");
        Assert.That(_other.Do(XenstoreMessageType.Remove, Shared + "\0"), Is.EqualTo("EACCES"));
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0w6\0");
        Assert.That(_other.Do(XenstoreMessageType.Remove, Shared + "\0"), Is.Empty);
    }

    [Test]
    public void A_later_domain_of_the_same_number_inherits_nothing()
    {
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0b6\0");
        _other.Write("/local/domain/6/own", "");
        Assert.That(_store.Server.ReleaseDomainAsync(6).AsTask().Result, Is.True);
        FakeGuest later = _store.Guest(6);
        Assert.That(later.Read(Shared), Is.EqualTo("EACCES"));
        _owner.Write("shared", "rewritten");
        Assert.That(later.Read(Shared), Is.EqualTo("EACCES"), "a write does not revive it");
        _owner.Write("shared/child", "");
        Assert.That(later.Read(Shared + "/child"), Is.EqualTo("EACCES"));
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0b6\0");
        Assert.That(later.Read(Shared), Is.EqualTo("rewritten"), "given anew");
    }

    [Test]
    public void A_permission_given_before_the_domain_exists_does_not_count()
    {
        Assert.That(_owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0b7\0"), Is.Empty);
        FakeGuest later = _store.Guest(7);
        Assert.That(later.Read(Shared), Is.EqualTo("EACCES"));
    }

    [Test]
    public void The_nodes_of_a_released_domain_go_wherever_they_are()
    {
        _owner.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0b6\0");
        _other.Write(Shared + "/by-6/deep", "");
        _owner.Watch("shared", "t");
        _owner.AllEvents();
        Assert.That(_store.Server.ReleaseDomainAsync(6).AsTask().Result, Is.True);
        Assert.That(_owner.Call(XenstoreMessageType.Directory, "shared\0").Payload, Is.Empty);
        Assert.That(_owner.AllEvents(), Does.Contain("shared/by-6|t"));
        Assert.That(_store.Domain0.Exists("/local/domain/6"), Is.False);
    }

    [TestCase("n0", 0, XenstoreAccess.None)]
    [TestCase("r5", 5, XenstoreAccess.Read)]
    [TestCase("w32751", 32751, XenstoreAccess.Write)]
    [TestCase("b65535", 65535, XenstoreAccess.Both)]
    public void Entries_have_one_form(string text, int domain, XenstoreAccess access)
    {
        Assert.That(XenstorePermission.TryParse(text, out XenstorePermission permission), Is.True);
        Assert.That(permission, Is.EqualTo(new XenstorePermission((ushort)domain, access)));
        Assert.That(permission.ToString(), Is.EqualTo(text));
    }

    [TestCase("")]
    [TestCase("n")]
    [TestCase("x0")]
    [TestCase("n-1")]
    [TestCase("n65536")]
    [TestCase("n1 ")]
    [TestCase("N1")]
    public void Other_forms_are_refused(string text) => Assert.That(XenstorePermission.TryParse(text, out _), Is.False);

    [Test]
    public void A_list_needs_an_owner()
    {
        Assert.That(() => new XenstorePermissions(), Throws.ArgumentException);
        XenstorePermissions list = new(new XenstorePermission(5, XenstoreAccess.None), new XenstorePermission(0, XenstoreAccess.Read));
        Assert.That(list.ToString(), Is.EqualTo("n5 r0"));
        Assert.That(list, Is.EqualTo(new XenstorePermissions([.. list.Entries])));
        Assert.That(list.GetHashCode(), Is.EqualTo(new XenstorePermissions([.. list.Entries]).GetHashCode()));
        Assert.That(list, Is.Not.EqualTo(XenstorePermissions.Domain0Only));
    }
}
