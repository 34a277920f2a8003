// Properties: the tree beside a naive model, transactions included; random bytes and indexes in the ring; random requests.
using System.Text;
using CsCheck;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstorePropertyTests
{
    private static readonly Gen<string> Paths = Among("a", "b", "c").Array[1, 3].Select(static names => "/" + string.Join('/', names));

    private static Gen<string> Among(params string[] values) => Gen.Int[0, values.Length - 1].Select(index => values[index]);

    private enum Kind
    {
        Write,
        MakeDirectory,
        Remove,
        Read,
        List,
        Begin,
        Commit,
        Abort,
    }

    private sealed record Operation(Kind Kind, int Slot, string Path, string Value);

    private static readonly Gen<Operation> Operations = Gen.Select(
        Gen.Frequency(
            (6, Gen.Const(Kind.Write)), (2, Gen.Const(Kind.MakeDirectory)), (3, Gen.Const(Kind.Remove)), (3, Gen.Const(Kind.Read)),
            (2, Gen.Const(Kind.List)), (2, Gen.Const(Kind.Begin)), (2, Gen.Const(Kind.Commit)), (1, Gen.Const(Kind.Abort))),
        Gen.Int[0, 3], Paths, Among("", "1", "2"),
        static (kind, slot, path, value) => new Operation(kind, slot, path, value));

    /// <summary>
    /// The naive store: a dictionary from path to value and a version for value and list of children each. A transaction is a
    /// copy and the versions of what it looked at. Slot 0 is outside transactions, 1 to 3 are transactions.
    /// </summary>
    private sealed class Model
    {
        public Dictionary<string, (string Value, int Version)> Nodes { get; init; } = new() { ["/"] = ("", 0) };

        public Dictionary<string, int> Seen { get; } = [];

        public HashSet<string> Changed { get; } = [];

        public Model Copy() => new() { Nodes = new(Nodes) };

        public int VersionOf(string path) => Nodes.TryGetValue(path, out (string Value, int Version) node) ? node.Version : -1;

        public IEnumerable<string> Below(string path) => Nodes.Keys.Where(key => key.StartsWith(path + "/", StringComparison.Ordinal));

        public string[] Children(string path) =>
            [.. Nodes.Keys.Where(key => key != "/" && XenstorePath.ParentOf(key) == path).Select(XenstorePath.NameOf).Order()];
    }

    [Test]
    public void The_tree_does_what_a_dictionary_does() => Operations.Array[1, 60].Sample(
        static operations =>
        {
            XenstoreDatabase database = new(new XenstoreOptions());
            TestSession session = new(database);
            database.Remove(session, null, "/tool", null);
            XenstoreTransactionState?[] transactions = new XenstoreTransactionState?[4];
            Model[] models = [new Model(), new Model(), new Model(), new Model()];
            Model[] starts = [.. models];
            int version = 0;
            foreach (Operation operation in operations)
            {
                int slot = operation.Slot;
                if (operation.Kind == Kind.Begin && slot > 0 && transactions[slot] is null)
                {
                    database.StartTransaction(session, out transactions[slot]);
                    models[slot] = models[0].Copy();
                    starts[slot] = models[0].Copy();
                    continue;
                }
                if (operation.Kind is Kind.Begin || (slot > 0 && transactions[slot] is null))
                    continue;
                if (operation.Kind is Kind.Commit or Kind.Abort)
                {
                    if (slot == 0)
                        continue;
                    XenstoreError ended = database.EndTransaction(session, transactions[slot]!, operation.Kind == Kind.Commit, null);
                    transactions[slot] = null;
                    bool conflict = models[slot].Seen.Any(seen => models[0].VersionOf(seen.Key) != seen.Value);
                    Assert.That(ended, Is.EqualTo(
                        operation.Kind == Kind.Commit && conflict ? XenstoreError.EAGAIN : XenstoreError.None));
                    if (operation.Kind == Kind.Commit && !conflict)
                    {
                        foreach (string path in models[slot].Changed)
                        {
                            if (models[slot].Nodes.TryGetValue(path, out (string Value, int Version) node))
                                models[0].Nodes[path] = node;
                            else
                                models[0].Nodes.Remove(path);
                        }
                    }
                    Compare(database, models[0]);
                    continue;
                }
                Apply(database, session, transactions[slot], models[slot], starts[slot], operation, slot > 0, ref version);
            }
            Compare(database, models[0]);
            Assert.That(database.IsConsistent(), Is.True);
        },
        iter: 2000, threads: 1);

    private static void Apply(
        XenstoreDatabase database, TestSession session, XenstoreTransactionState? transaction, Model model, Model start,
        Operation operation, bool inTransaction, ref int version)
    {
        string path = operation.Path;
        bool exists = model.Nodes.ContainsKey(path);
        string parent = XenstorePath.ParentOf(path);
        See(path);
        switch (operation.Kind)
        {
            case Kind.Write:
            case Kind.MakeDirectory:
                XenstoreError written = operation.Kind == Kind.Write
                    ? database.Write(session, transaction, path, Encoding.Latin1.GetBytes(operation.Value), null)
                    : database.MakeDirectory(session, transaction, path, null);
                Assert.That(written, Is.EqualTo(XenstoreError.None));
                if (!exists)
                {
                    // The missing ones above, and the node that gets a new child.
                    string above = parent;
                    for (; !model.Nodes.ContainsKey(above); above = XenstorePath.ParentOf(above))
                    {
                        See(above);
                        Change(above, "", ref version);
                    }
                    See(above);
                    Change(above, model.Nodes[above].Value, ref version);
                }
                if (!exists || operation.Kind == Kind.Write)
                    Change(path, operation.Kind == Kind.Write ? operation.Value : "", ref version);
                break;
            case Kind.Remove:
                XenstoreError removed = database.Remove(session, transaction, path, null);
                if (!exists)
                {
                    SeeNearest(path);
                    Assert.That(removed, Is.EqualTo(model.Nodes.ContainsKey(parent) ? XenstoreError.None : XenstoreError.ENOENT));
                    break;
                }
                Assert.That(removed, Is.EqualTo(XenstoreError.None));
                See(parent);
                foreach (string below in model.Below(path).Append(path).ToArray())
                {
                    See(below);
                    model.Nodes.Remove(below);
                    model.Changed.Add(below);
                }
                Change(parent, model.Nodes[parent].Value, ref version);
                break;
            default:
                XenstoreError read = database.Read(session, transaction, path, out XenstoreNode? node);
                Assert.That(read, Is.EqualTo(exists ? XenstoreError.None : XenstoreError.ENOENT));
                if (!exists)
                    SeeNearest(path);
                else if (operation.Kind == Kind.Read)
                    Assert.That(Encoding.Latin1.GetString(node!.Value), Is.EqualTo(model.Nodes[path].Value));
                else
                    Assert.That(node!.Children.Select(static child => child.Name).Order(), Is.EqualTo(model.Children(path)));
                break;
        }

        // Looking for an absent node looks at those above it up to the first that is there.
        void SeeNearest(string absent)
        {
            string above = absent;
            do
            {
                above = XenstorePath.ParentOf(above);
                See(above);
            }
            while (!model.Nodes.ContainsKey(above));
        }

        void See(string seen)
        {
            if (inTransaction)
                model.Seen.TryAdd(seen, start.VersionOf(seen));
        }

        void Change(string changed, string value, ref int version)
        {
            model.Nodes[changed] = (value, ++version);
            model.Changed.Add(changed);
        }
    }

    private static void Compare(XenstoreDatabase database, Model model)
    {
        Dictionary<string, string> found = [];
        Walk("/", database.Root);
        Assert.That(found, Is.EquivalentTo(model.Nodes.ToDictionary(static pair => pair.Key, static pair => pair.Value.Value)));

        void Walk(string path, XenstoreNode node)
        {
            found.Add(path, Encoding.Latin1.GetString(node.Value));
            Assert.That(node.ChildListLength, Is.EqualTo(node.Children.Sum(static child => child.Name.Length + 1)));
            foreach (XenstoreNode child in node.Children)
                Walk(XenstorePath.Join(path, child.Name), child);
        }
    }

    /// <summary>
    /// Random bytes everywhere in the ring page, indexes included, again and again while the store works on it. The pages around
    /// are inaccessible, and the rest of the page is watched by the fixture.
    /// </summary>
    [Test]
    public void Noise_in_the_page_harms_nobody_else()
    {
        using StoreFixture store = new();
        FakeGuest noisy = store.Guest(5);
        FakeGuest calm = store.Guest(6);
        int round = 0;
        Gen.Select(Gen.Byte.Array[2048], Gen.UInt.Array[7], Gen.Int[0, 3], Gen.Int[0, 1024]).Sample(
            (bytes, words, mode, length) =>
            {
                bytes.CopyTo(noisy.Page.Bytes);
                if (mode == 0)
                {
                    // A sane header in front of noise is read further than noise alone.
                    new XenstoreHeader((XenstoreMessageType)(words[0] % 24), words[1], words[2] % 4, words[3] % 5000).Encode(noisy.Page.Bytes);
                }
                for (int index = 0; index < 4 && mode != 3; index++)
                    Volatile.Write(ref noisy.Page.Word(2048 + (4 * index)), mode == 2 ? words[index] : 0);
                if (mode is 0 or 1)
                    Volatile.Write(ref noisy.Page.Word(FakeGuest.RequestProducer), (uint)length);
                noisy.Channel.Send();
                if (words[4] % 3 == 0)
                    Volatile.Write(ref noisy.Page.Word(FakeGuest.Connection), 1);
                if (mode == 3)
                    Volatile.Write(ref noisy.Page.Word(2048 + (4 * (int)(words[5] % 7))), words[6]);
                noisy.Channel.Send();
                if (++round % 50 == 0)
                    Assert.That(calm.Write("alive", $"{round}"), Is.Empty);
            },
            iter: 3000, threads: 1);
        Assert.That(calm.Write("alive", "still"), Is.Empty);
        Assert.That(noisy.Page.RestUntouched, Is.True);
        Assert.That(store.Connections[0].QueuedMessages, Is.LessThan(1000));

        // The noisy guest can start over.
        noisy.Page.Bytes[..GuardedPage.InterfaceEnd].Clear();
        Volatile.Write(ref noisy.Page.Word(FakeGuest.Connection), 1);
        noisy.Channel.Send();
        FakeGuest.Until(() => Volatile.Read(ref noisy.Page.Word(FakeGuest.Connection)) == 0, "reconnected");
        Assert.That(noisy.Write("back", "1"), Is.Empty);
    }

    private static readonly Gen<string> Payloads = Gen.OneOf(
        Gen.Select(Among("a", "a/b", "/local/domain/5", "/local/domain/6/x", "/", "@releaseDomain", "", "b//", "T", "F", "5", "x"),
            Among("\0", "", "\0t\0", "\0n5\0", "\0b5\0r6\0", "\0value", "\0\0\0", "\07\0", "\0set\0nodes\0"), static (path, rest) => path + rest),
        Gen.Byte.Array[0, 60].Select(static bytes => Encoding.Latin1.GetString(bytes)));

    /// <summary>Random but well-framed requests of two guests: every one is answered, in order, and the accounts stay right.</summary>
    [Test]
    public void Every_request_is_answered()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Nodes = 30, Watches = 5, Memory = 60_000 } });
        FakeGuest[] guests = [store.Guest(5), store.Guest(6)];
        Gen.Select(Gen.Int[0, 1], Gen.UInt[0, 24], Payloads, Gen.UInt[0, 4]).Array[1, 20].Sample(
            requests =>
            {
                foreach ((int who, uint type, string payload, uint transaction) in requests)
                {
                    Reply reply = guests[who].Call((XenstoreMessageType)type, payload, transaction);
                    if (reply.Type == XenstoreMessageType.Error)
                        Assert.That(Enum.TryParse(reply.Error, out XenstoreError _), Is.True, reply.Error);

                    // The other guest takes its events, too, or its silence would hold up this one.
                    guests[1 - who].AllEvents();
                }
                lock (store.Server.Database.Gate)
                {
                    Assert.That(store.Server.Database.IsConsistent(), Is.True);
                    foreach (ushort domain in new ushort[] { 5, 6 })
                    {
                        Assert.That(store.Server.Database.FindDomain(domain)!.Nodes, Is.LessThanOrEqualTo(30));
                        Assert.That(store.Server.Database.FindDomain(domain)!.Memory, Is.InRange(0, 70_000));
                    }
                }
            },
            iter: 300, threads: 1);
        foreach (FakeGuest guest in guests)
            Assert.That(guest.Do(XenstoreMessageType.ResetWatches, "\0"), Is.Empty);
    }

    private sealed class TestSession(XenstoreDatabase database) : XenstoreSession(database, database.Domain0, privileged: true)
    {
        public override void Wake()
        {
        }
    }
}
