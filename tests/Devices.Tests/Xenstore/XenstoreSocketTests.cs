// The store's Unix socket: how it comes and goes, the client of the wire format, clients that are many, slow, gone or mad.
using System.Net.Sockets;
using System.Text;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
[CancelAfter(60_000)]
[System.Runtime.Versioning.SupportedOSPlatform("linux")]
internal sealed class XenstoreSocketTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(30);

    private string _folder = null!;
    private StoreFixture _store = null!;
    private XenstoreListener _listener = null!;

    private string SocketPath => Path.Combine(_folder, "socket");

    [SetUp]
    public void SetUp()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-store-").FullName;
        _store = new StoreFixture(new XenstoreOptions { EventBacklog = 500 });
        _listener = XenstoreListener.Start(_store.Server, SocketPath);
    }

    [TearDown]
    public async Task TearDown()
    {
        await _listener.DisposeAsync();
        Assert.That(_listener.Clients, Is.Zero);
        _store.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task Nodes_are_written_read_listed_and_removed()
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        byte[] binary = [.. Enumerable.Range(0, 256).Select(static value => (byte)value)];
        await client.WriteAsync("/test/b", binary);
        await client.WriteAsync("/test/a", Array.Empty<byte>());
        await client.MakeDirectoryAsync("/test/c/d");
        Assert.That(await client.ReadAsync("/test/b"), Is.EqualTo(binary));
        Assert.That(await client.ReadAsync("/test/a"), Is.Empty);
        Assert.That(await client.ListAsync("/test"), Is.EqualTo(new[] { "b", "a", "c" }));
        Assert.That(await client.ListAsync("/test/a"), Is.Empty);
        await client.RemoveAsync("/test/c");
        Assert.That(_store.Domain0.Exists("/test/c/d"), Is.False);
        await client.WriteAsync("relative", "x"u8.ToArray());
        Assert.That(_store.Domain0.Read("/local/domain/0/relative"), Is.EqualTo("x"));
    }

    [Test]
    public async Task Permissions_are_read_and_set()
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await client.WriteAsync("/test", Array.Empty<byte>());
        Assert.That((await client.GetPermissionsAsync("/test")).ToString(), Is.EqualTo("n0"));
        XenstorePermissions permissions = new(new XenstorePermission(7, XenstoreAccess.Both), new XenstorePermission(0, XenstoreAccess.Read));
        await client.SetPermissionsAsync("/test", permissions);
        Assert.That(await client.GetPermissionsAsync("/test"), Is.EqualTo(permissions));
    }

    [Test]
    public async Task A_list_longer_than_a_message_comes_whole()
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        string[] names = [.. Enumerable.Range(0, 1500).Select(static number => $"child-{number}")];
        _store.Domain0.Transact(transaction =>
        {
            foreach (string name in names)
                transaction.Write("/many/" + name, "");
        });
        Assert.That(await client.ListAsync("/many"), Is.EqualTo(names));
    }

    [TestCase("/absent", XenstoreError.ENOENT)]
    [TestCase("/double//slash", XenstoreError.EINVAL)]
    public async Task Refusals_are_exceptions_with_the_stores_error(string path, XenstoreError error)
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        XenstoreException refusal = Assert.ThrowsAsync<XenstoreException>(() => client.ReadAsync(path))!;
        Assert.That(refusal.Error, Is.EqualTo(error));
        Assert.That(refusal.Message, Does.StartWith($"xenstore read of \"{path}\" failed with {error}: "));
        Assert.That(async () => await client.WriteAsync("/a", new byte[4096]), Throws.InstanceOf<XenstoreException>(), "longer than a message");
        Assert.That(await client.ListAsync("/tool"), Is.EqualTo(new[] { "xenstored" }), "the connection is as good as before");
    }

    [Test]
    public async Task Requests_of_several_threads_go_over_one_connection()
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await Task.WhenAll(Enumerable.Range(0, 20).Select(async number =>
        {
            for (int round = 0; round < 20; round++)
            {
                byte[] value = Encoding.ASCII.GetBytes($"{number}:{round}");
                await client.WriteAsync($"/n/{number}", value);
                Assert.That(await client.ReadAsync($"/n/{number}"), Is.EqualTo(value));
            }
        }));
    }

    [Test]
    public async Task Watches_tell_changes_in_order()
    {
        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await client.WatchAsync("/w", "all");
        await client.WatchAsync("/w", "one", depth: 1);
        await client.WatchAsync("@releaseDomain", "");
        _store.Domain0.Write("/w/a/b", "1");
        _store.Domain0.Write("/w/c", "2");
        List<XenstoreEvent> events = [];
        while (events.Count < 6)
            events.Add(await client.Events.ReadAsync().AsTask().WaitAsync(Patience));
        Assert.That(events, Is.EqualTo(new XenstoreEvent[]
        {
            new("/w", "all"), new("/w", "one"), new("@releaseDomain", ""), new("/w/a/b", "all"), new("/w/c", "all"), new("/w/c", "one"),
        }));
        await client.UnwatchAsync("/w", "all");
        Assert.That(Assert.ThrowsAsync<XenstoreException>(() => client.UnwatchAsync("/w", "all"))!.Error, Is.EqualTo(XenstoreError.ENOENT));
    }

    [Test]
    public async Task Conflicting_transactions_of_several_clients_lose_nothing()
    {
        const int Clients = 6;
        const int Rounds = 40;
        _store.Domain0.Write("/sum", "0");
        int[] conflicts = await Task.WhenAll(Enumerable.Range(0, Clients).Select(async number =>
        {
            await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
            int again = 0;
            for (int done = 0; done < Rounds;)
            {
                uint transaction = await client.BeginTransactionAsync();
                int sum = int.Parse(Encoding.ASCII.GetString(await client.ReadAsync("/sum", transaction)));
                await client.WriteAsync("/sum", Encoding.ASCII.GetBytes($"{sum + 1}"), transaction);
                await client.WriteAsync($"/done/{number}/{done}", Encoding.ASCII.GetBytes($"{sum}"), transaction);
                if (await client.EndTransactionAsync(transaction, commit: true))
                    done++;
                else
                    again++;
            }
            return again;
        }));
        Assert.That(_store.Domain0.Read("/sum"), Is.EqualTo($"{Clients * Rounds}"));
        HashSet<string> seen = [.. Enumerable.Range(0, Clients).SelectMany(number =>
            Enumerable.Range(0, Rounds).Select(round => _store.Domain0.Read($"/done/{number}/{round}")!))];
        Assert.That(seen, Has.Count.EqualTo(Clients * Rounds), "two saw the same sum, so one was lost");
        Assert.That(conflicts.Sum(), Is.Positive, "nothing was tested");
    }

    [Test]
    public async Task Many_replies_for_one_who_reads_late_are_all_there_in_order()
    {
        const int Requests = 1500;
        _store.Domain0.Write("/big", new string('b', 3000));
        using Socket client = Connect();
        Task sending = Task.Run(() =>
        {
            for (uint id = 1; id <= Requests; id++)
                Send(client, FakeGuest.Message(XenstoreMessageType.Read, id, 0, "/big\0"u8));
        });
        await Task.Delay(50);
        using NetworkStream stream = new(client);
        byte[] message = new byte[XenstoreWire.HeaderSize + 3000];
        for (uint id = 1; id <= Requests; id++)
        {
            await stream.ReadExactlyAsync(message);
            XenstoreHeader header = XenstoreHeader.Decode(message);
            Assert.That((header.Type, header.RequestId, header.Length), Is.EqualTo((XenstoreMessageType.Read, id, 3000u)));
            Assert.That(message.AsSpan(XenstoreWire.HeaderSize).IndexOfAnyExcept((byte)'b'), Is.EqualTo(-1));
        }
        await sending;
    }

    [Test]
    public async Task A_client_that_does_not_read_its_events_is_cut_off_and_nobody_else()
    {
        using Socket slow = Connect();
        Send(slow, FakeGuest.Message(XenstoreMessageType.Watch, 1, 0, "/\0t\0"u8));
        await using XenstoreSocketClient reader = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await reader.WatchAsync("/", "t");
        FakeGuest.Until(() => _listener.Clients == 2, "both are connected");
        FakeGuest.Until(() => Watches() == 2, "both watch");
        int written = 0;
        while (_listener.Clients == 2)
        {
            // As fast as the one who reads takes it, so that only the other is slow.
            _store.Domain0.Write($"/{new string('x', 1000)}/{written++}", "");
            _ = await reader.Events.ReadAsync().AsTask().WaitAsync(Patience);
            Assert.That(written, Is.LessThan(100_000), "nobody cuts it off");
        }
        FakeGuest.Until(() => Watches() == 1, "its watch is gone");
        Assert.That(await reader.ReadAsync("/tool"), Is.Empty);

        int Watches()
        {
            lock (_store.Server.Database.Gate)
                return _store.Server.Database.WatchCount;
        }
    }

    [Test]
    public async Task Vanished_clients_leave_nothing()
    {
        await using XenstoreSocketClient steady = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await steady.WriteAsync("/steady", "here"u8.ToArray());
        int descriptors = Descriptors();
        byte[] watch = FakeGuest.Message(XenstoreMessageType.Watch, 1, 0, "/\0token\0"u8);
        byte[] begin = FakeGuest.Message(XenstoreMessageType.TransactionStart, 2, 0, "\0"u8);
        for (int number = 0; number < 60; number++)
        {
            using Socket client = Connect();
            Send(client, watch);
            Send(client, begin);

            // In the middle of a message, and without having read a byte.
            Send(client, watch.AsSpan(0, number % watch.Length));
        }

        // Those who connect are served in turn: once this one is answered, all before it have been accepted, and none comes later.
        await using (XenstoreSocketClient last = await XenstoreSocketClient.ConnectAsync(SocketPath))
            Assert.That(await last.ReadAsync("/steady"), Is.EqualTo("here"u8.ToArray()));
        FakeGuest.Until(() => _listener.Clients == 1, "the clients are forgotten");
        FakeGuest.Until(() => Descriptors() <= descriptors, "their descriptors are closed");
        lock (_store.Server.Database.Gate)
        {
            Assert.That(_store.Server.Database.WatchCount, Is.Zero);
            Assert.That(_store.Server.Database.Domain0.Memory, Is.GreaterThanOrEqualTo(0));
        }
        Assert.That(await steady.ReadAsync("/steady"), Is.EqualTo("here"u8.ToArray()));
    }

    [Test]
    public async Task A_message_that_is_too_long_ends_its_connection()
    {
        using Socket client = Connect();
        byte[] header = new byte[XenstoreWire.HeaderSize];
        new XenstoreHeader(XenstoreMessageType.Read, 1, 0, XenstoreWire.PayloadMaximum + 1).Encode(header);
        Send(client, header);
        client.ReceiveTimeout = (int)Patience.TotalMilliseconds;
        Assert.That(client.Receive(new byte[1]), Is.Zero, "the end of the stream");
        await using XenstoreSocketClient other = await XenstoreSocketClient.ConnectAsync(SocketPath);
        Assert.That(await other.ListAsync("/"), Is.EqualTo(new[] { "tool" }));
    }

    [Test]
    public async Task Random_and_mutated_messages_harm_only_those_who_send_them()
    {
        const int Seed = 4711;
        await using XenstoreSocketClient steady = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await steady.WriteAsync("/steady", "here"u8.ToArray());
        Random random = new(Seed);
        string[] words = ["/steady2", "/", "x", "T", "F", "0", "5", "-1", "@releaseDomain", "n0", "b5", "r65535", "check", "quota", "set", "nodes", "99999999999", "", "/a/b/c"];
        for (int connection = 0; connection < 200; connection++)
        {
            using Socket client = Connect();
            Task draining = connection % 3 == 0 ? Task.CompletedTask : DrainAsync(client);
            for (int count = 0; count < 40; count++)
            {
                byte[] payload = Encoding.Latin1.GetBytes(string.Join('\0', random.GetItems(words, random.Next(6))) + (random.Next(4) == 0 ? "" : "\0"));
                byte[] message = FakeGuest.Message(
                    (XenstoreMessageType)random.Next(26), (uint)random.Next(), random.Next(3) == 0 ? (uint)random.Next(4) : 0, payload);
                if (random.Next(3) == 0 && message.Length > XenstoreWire.HeaderSize)
                    message[XenstoreWire.HeaderSize + random.Next(payload.Length)] = (byte)random.Next(256);
                if (random.Next(40) == 0)
                    message[random.Next(XenstoreWire.HeaderSize)] ^= (byte)(1 << random.Next(8));
                if (random.Next(60) == 0)
                    random.NextBytes(message);
                try
                {
                    Send(client, message);
                }
                catch (SocketException)
                {
                    // It has had enough of us.
                    break;
                }
            }
            Assert.That(await steady.ReadAsync("/steady").WaitAsync(Patience), Is.EqualTo("here"u8.ToArray()), $"after connection {connection}");
            client.Shutdown(SocketShutdown.Both);
            await draining.WaitAsync(Patience);
        }
        FakeGuest.Until(() => _listener.Clients == 1, "the clients are forgotten");
        Assert.That(await steady.ControlAsync("check"), Is.EqualTo("OK"));

        static async Task DrainAsync(Socket client)
        {
            byte[] buffer = new byte[4096];
            try
            {
                while (await client.ReceiveAsync(buffer) > 0)
                {
                }
            }
            catch (SocketException)
            {
            }
        }
    }

    [Test]
    public async Task No_more_clients_are_taken_than_allowed()
    {
        string path = Path.Combine(_folder, "few");
        await using XenstoreListener few = XenstoreListener.Start(_store.Server, path, new XenstoreListenerOptions { MaximumClients = 2 });
        await using XenstoreSocketClient first = await XenstoreSocketClient.ConnectAsync(path);
        await using XenstoreSocketClient second = await XenstoreSocketClient.ConnectAsync(path);
        Assert.That(await first.ListAsync("/"), Is.EqualTo(await second.ListAsync("/")));
        await using (XenstoreSocketClient third = await XenstoreSocketClient.ConnectAsync(path))
        {
            IOException failure = Assert.ThrowsAsync<IOException>(() => third.ReadAsync("/"))!;
            Assert.That(failure.Message, Does.Contain(path).And.Contain("ended the connection"));
        }
        await second.DisposeAsync();
        FakeGuest.Until(() => few.Clients == 1, "one has gone");
        await using XenstoreSocketClient next = await XenstoreSocketClient.ConnectAsync(path);
        Assert.That(await next.ReadAsync("/"), Is.Empty);
    }

    [Test]
    public async Task The_socket_has_the_mode_asked_for_and_goes_with_the_listener()
    {
        Assert.That(File.GetUnixFileMode(SocketPath), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite), "as xenstored's");
        const UnixFileMode Mode = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.GroupWrite;
        string path = Path.Combine(_folder, "other");
        await using (XenstoreListener other = XenstoreListener.Start(_store.Server, path, new XenstoreListenerOptions { Mode = Mode }))
            Assert.That(File.GetUnixFileMode(path), Is.EqualTo(Mode));
        Assert.That(File.Exists(path), Is.False);
    }

    [Test]
    public async Task A_socket_left_by_the_dead_is_replaced_and_no_other()
    {
        string path = Path.Combine(_folder, "left");
        using (Socket dead = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            // Moved away, so that closing it does not remove it.
            dead.Bind(new UnixDomainSocketEndPoint(path));
            File.Move(path, path + "2");
        }
        File.Move(path + "2", path);
        await using (XenstoreListener.Start(_store.Server, path))
        {
            await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(path);
            Assert.That(await client.ReadAsync("/"), Is.Empty);
            IOException busy = Assert.Throws<IOException>(() => XenstoreListener.Start(_store.Server, path))!;
            Assert.That(busy.Message, Does.Contain($"Somebody serves {path} already"));
        }

        await File.WriteAllTextAsync(path, "precious");
        Assert.That(() => XenstoreListener.Start(_store.Server, path), Throws.InstanceOf<IOException>().With.Message.Contains("no socket"));
        Assert.That(await File.ReadAllTextAsync(path), Is.EqualTo("precious"));
        Assert.That(() => XenstoreListener.Start(_store.Server, Path.Combine(_folder, "nowhere", "socket")),
            Throws.InstanceOf<IOException>().With.Message.Contains("folder must exist"));
        Assert.That(() => XenstoreListener.Start(_store.Server, Path.Combine(_folder, new string('l', 120))),
            Throws.InstanceOf<IOException>().With.Message.Contains("too long"));
    }

    [Test]
    public async Task Clients_are_told_when_there_is_no_store()
    {
        string path = Path.Combine(_folder, "none");
        Assert.That(async () => await XenstoreSocketClient.ConnectAsync(path),
            Throws.InstanceOf<IOException>().With.Message.Contains("No xenstore answers at " + path));

        await using XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(SocketPath);
        await client.WatchAsync("/", "t");
        _ = await client.Events.ReadAsync().AsTask().WaitAsync(Patience);
        await _listener.DisposeAsync();
        await client.Events.Completion.WaitAsync(Patience);
        Assert.That(async () => await client.ReadAsync("/"), Throws.InstanceOf<IOException>().With.Message.Contains("is the daemon still there?"));
    }

    private static int Descriptors() => Directory.GetFileSystemEntries("/proc/self/fd").Length;

    private static void Send(Socket client, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
            bytes = bytes[client.Send(bytes)..];
    }

    private Socket Connect()
    {
        Socket client = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { SendTimeout = (int)Patience.TotalMilliseconds };
        client.Connect(new UnixDomainSocketEndPoint(SocketPath));
        return client;
    }
}
