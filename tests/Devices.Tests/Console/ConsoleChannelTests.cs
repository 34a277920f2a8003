// Channels: a front end of the test's own on a domain that does not run, and programs of the host's at a socket and at a terminal.

using System.Globalization;
using System.Net.Sockets;
using System.Text;
using XenSharp.Core;
using XenSharp.Devices.Console;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Grants;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ConsoleChannelTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(20);

    private string _folder = null!;
    private DomainManager _manager = null!;
    private GrantDomain _guest = null!;
    private XenstoreServer _server = null!;
    private List<string> _reports = null!;
    private bool _domainGone;

    private string SocketPath => Path.Combine(_folder, "channel");

    [SetUp]
    public void SetUp()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-channel-").FullName;
        _manager = new DomainManager();
        _guest = new GrantDomain(manager: _manager);
        _server = new XenstoreServer();
        _reports = [];
        _domainGone = false;
    }

    [TearDown]
    public async Task TearDown()
    {
        if (!_domainGone)
        {
            _guest.Audit();
            _guest.Dispose();
        }
        Assert.That(_manager.Domains, Is.Empty, "nobody holds memory of the domain");
        await _server.DisposeAsync();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task A_program_at_the_socket_and_the_guest_talk()
    {
        await using ConsoleChannel channel = Create(SocketPath);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        using Socket program = Meet(front);
        front.Print("hello\n");
        Assert.That(await ReceiveAsync(program, 6), Is.EqualTo("hello\n"));
        program.Send("answer"u8);
        Assert.That(front.Read(6), Is.EqualTo("answer"));
    }

    [Test]
    public async Task The_nodes_are_those_of_libxl()
    {
        await using ConsoleChannel channel = Create(SocketPath);
        Assert.That(Node("backend/console/7/1", "name", "connection", "path", "protocol", "frontend-id", "online"),
            Is.EqualTo($"org.example.agent.0 socket {SocketPath} vt100 7 1"));
        const string Front = "/local/domain/7/device/console/1";
        string[] names = ["name", "limit", "type", "output", "tty", "protocol", "backend-id"];
        Assert.That(string.Join(' ', names.Select(name => _server.Domain0.Read($"{Front}/{name}"))),
            Is.EqualTo("org.example.agent.0 1048576 ioemu chardev:libxl-channel1  vt100 0"));
        Assert.That(_server.Domain0.GetPermissions(Front + "/output")!.ToString(), Is.EqualTo("n0 r7"), "the guest can only read it");
        Assert.That(_server.Domain0.GetPermissions(Front + "/state")!.ToString(), Is.EqualTo("n7 r0"));
        Assert.That(() => Create(null), Throws.InvalidOperationException, "there is one of that number");
        Assert.That(() => ConsoleChannel.Create(_guest.Fake.Domain, _server.Domain0, new ConsoleChannelOptions(0, "x")), Throws.ArgumentException);
        Assert.That(() => ConsoleChannel.Create(_guest.Fake.Domain, _server.Domain0, new ConsoleChannelOptions(2, "")), Throws.ArgumentException);
        await channel.DisposeAsync();
        Assert.That(_server.Domain0.Exists(Front), Is.False);
        Assert.That(File.Exists(SocketPath), Is.False);

        string Node(string folder, params string[] nodes) => string.Join(' ', nodes.Select(name => _server.Domain0.Read($"/local/domain/0/{folder}/{name}")));
    }

    [Test]
    public async Task Much_goes_both_ways_without_a_byte_lost()
    {
        await using ConsoleChannel channel = Create(SocketPath);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        using Socket program = Meet(front);
        string text = string.Concat(Enumerable.Range(0, 20_000).Select(static number => $"{number}\n"));

        // The program's echo is slower than the guest's print: the guest waits.
        Task echo = Task.Run(async () =>
        {
            byte[] buffer = new byte[700];
            for (int total = 0; total < text.Length;)
            {
                int count = await program.ReceiveAsync(buffer);
                for (int sent = 0; sent < count;)
                    sent += await program.SendAsync(buffer.AsMemory(sent, count - sent));
                total += count;
            }
        });
        Task<string> reading = Task.Run(() => front.Read(text.Length));
        front.Print(text);
        Assert.That(await reading, Is.EqualTo(text));
        await echo;
    }

    [Test]
    public async Task What_a_guest_says_to_nobody_does_not_hold_it_up()
    {
        await using ConsoleChannel channel = Create(SocketPath);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        front.Print(new string('x', 100_000));
        front.AwaitEmpty();
        using (Socket first = Meet(front))
        {
            front.Print("a");
            Assert.That(await ReceiveAsync(first, 1), Is.EqualTo("a"));
        }

        // The next one comes when the first has left, even if that had stopped reading.
        using (Socket stuck = Meet(front))
        {
            Task printing = Task.Run(() => front.Print(new string('y', 2_000_000)));
            Assert.That(await ReceiveAsync(stuck, 1), Is.EqualTo("y"));
            stuck.Close();
            await printing.WaitAsync(Patience);
            front.AwaitEmpty();
        }
        using Socket second = Meet(front);
        front.Print("z");
        Assert.That(await ReceiveAsync(second, 1), Is.EqualTo("z"));
    }

    [Test]
    public async Task A_program_can_be_there_before_the_guest_and_after_it()
    {
        await using ConsoleChannel channel = Create(SocketPath);
        using Socket program = Dial();
        program.Send("early"u8);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        Assert.That(front.Read(5), Is.EqualTo("early"));
        front.Print("last words");
        front.Disconnect();
        Assert.That(await ReceiveAsync(program, 10), Is.EqualTo("last words"));

        front.Restart();
        front.Connect();
        front.Print("again");
        Assert.That(await ReceiveAsync(program, 5), Is.EqualTo("again"));
        _domainGone = true;
        _guest.Fake.Domain.Destroy();
        await _guest.Fake.Domain.Completion.WaitAsync(Patience);
        await channel.DisposeAsync();
        Assert.That(await ReceiveAsync(program, 1), Is.Empty, "the end of the stream");
        _guest.Dispose();
    }

    [Test]
    public async Task A_guest_that_lets_go_loses_the_channel()
    {
        ConsoleChannel channel = Create(SocketPath);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        Task<bool> removal = channel.RemoveAsync(Patience);
        front.AwaitState(XenbusState.Closing);
        front.SetState(XenbusState.Closed);
        Assert.That(await removal, Is.True);
        Assert.That(_server.Domain0.Exists(front.Folder), Is.False);
    }

    [TestCase("ring-ref", "4711")]
    [TestCase("ring-ref", "-1")]
    [TestCase("ring-ref", "")]
    [TestCase("port", "999")]
    [TestCase("port", "x")]
    public async Task Nodes_that_mean_nothing_end_in_an_error_and_not_for_good(string name, string value)
    {
        await using ConsoleChannel channel = Create(SocketPath);
        Frontend front = new(_guest, _server.Domain0);
        front.AwaitState(XenbusState.InitWait);
        front.Publish();
        _server.Domain0.Write($"{front.Folder}/{name}", value);
        front.SetState(XenbusState.Initialised);
        front.AwaitState(XenbusState.Closing);
        Assert.That(_server.Domain0.Read("/local/domain/0/error/backend/console/7/1/error"), Is.Not.Empty.And.Not.Null);
        Assert.That(SpinWait.SpinUntil(() => Reports() == 1, Patience), Is.True, "people are told");
        front.SetState(XenbusState.Closed);
        front.AwaitState(XenbusState.Closed);
        front.Restart();
        front.Connect();
        using Socket program = Meet(front);
        front.Print("well");
        Assert.That(await ReceiveAsync(program, 4), Is.EqualTo("well"));
        Assert.That(Reports(), Is.EqualTo(1), "and told once");

        int Reports()
        {
            lock (_reports)
                return _reports.Count;
        }
    }

    [Test]
    public async Task Whoever_opens_the_terminal_is_connected()
    {
        int descriptors = Directory.GetFileSystemEntries("/proc/self/fd").Length;
        ConsoleChannel channel = Create(null);
        Frontend front = new(_guest, _server.Domain0);
        front.Connect();
        string terminal = channel.Terminal!;
        Assert.That(_server.Domain0.Read(front.Folder + "/tty"), Is.EqualTo(terminal));
        Assert.That(_server.Domain0.Read(front.Folder + "/output"), Is.EqualTo("pty"));
        front.Print(new string('n', 50_000));
        front.AwaitEmpty();
        for (int time = 0; time < 2; time++)
        {
            await using FileStream program = new(terminal, new FileStreamOptions { Mode = FileMode.Open, Access = FileAccess.ReadWrite, BufferSize = 0 });

            // Raw: an interrupt's character and ends of lines are like any other byte.
            program.Write("to\u0003\r\n"u8);
            Assert.That(front.Read(5), Is.EqualTo("to\u0003\r\n"));
            front.Print("fro\r\n\u0003");
            byte[] seen = new byte[6];
            program.ReadExactly(seen);
            Assert.That(Encoding.ASCII.GetString(seen), Is.EqualTo("fro\r\n\u0003"));
        }
        await channel.DisposeAsync();
        Assert.That(
            SpinWait.SpinUntil(() => Directory.GetFileSystemEntries("/proc/self/fd").Length <= descriptors, Patience), Is.True, "its descriptors are closed");
    }

    private static async Task<string> ReceiveAsync(Socket socket, int count)
    {
        byte[] bytes = new byte[count];
        int at = 0;
        while (at < count)
        {
            int more = await socket.ReceiveAsync(bytes.AsMemory(at)).AsTask().WaitAsync(Patience);
            if (more == 0)
                break;
            at += more;
        }
        return Encoding.ASCII.GetString(bytes, 0, at);
    }

    private ConsoleChannel Create(string? path) => ConsoleChannel.Create(
        _guest.Fake.Domain, _server.Domain0, new ConsoleChannelOptions(1, "org.example.agent.0") { SocketPath = path }, sentence =>
        {
            lock (_reports)
                _reports.Add(sentence);
        });

    /// <summary>Connects, and makes sure that the channel knows.</summary>
    private Socket Meet(Frontend front)
    {
        Socket socket = Dial();
        socket.Send("?"u8);
        Assert.That(front.Read(1), Is.EqualTo("?"));
        return socket;
    }

    private Socket Dial()
    {
        Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.Connect(new UnixDomainSocketEndPoint(SocketPath));
        return socket;
    }

    /// <summary>A front end, as Linux's hvc_xen: one granted page and a port.</summary>
    private sealed unsafe class Frontend(GrantDomain guest, XenstoreClient store)
    {
        private const uint Reference = 100;
        private const ulong AllocUnbound = 6;
        private const ulong SendOperation = 4;
        private const ulong Close = 3;
        private const int Input = 0;
        private const int Output = 1024;
        private const int Indexes = 3072;

        private readonly byte* _page = guest.Fake.Host(GrantDomain.AddressOf(0));
        private uint _port;

        public string Folder => $"/local/domain/{GrantDomain.Id}/device/console/1";

        public void Connect()
        {
            AwaitState(XenbusState.InitWait);
            Publish();
            SetState(XenbusState.Initialised);
            AwaitState(XenbusState.Connected);
            SetState(XenbusState.Connected);
        }

        public void Publish()
        {
            new Span<byte>(_page, 4096).Clear();
            guest.PutEntry(Reference, GrantFlags.PermitAccess, GrantDomain.FrameOf(0), domain: 0);
            lock (guest)
            {
                guest.Fake.Write(GrantDomain.Request, (uint)GrantDomain.Self);
                Assert.That(guest.Fake.Call(HypercallNumber.EventChannelOp, AllocUnbound, GrantDomain.Request), Is.Zero);
                _port = guest.Fake.Read<uint>(GrantDomain.Request + 4);
            }
            store.Write(Folder + "/ring-ref", $"{Reference}");
            store.Write(Folder + "/port", $"{_port}");
        }

        public void Disconnect()
        {
            SetState(XenbusState.Closing);
            AwaitState(XenbusState.Closing);
            SetState(XenbusState.Closed);
            AwaitState(XenbusState.Closed);
            lock (guest)
            {
                guest.Fake.Write(GrantDomain.Request, _port);
                Assert.That(guest.Fake.Call(HypercallNumber.EventChannelOp, Close, GrantDomain.Request), Is.Zero);
            }
        }

        public void Restart()
        {
            SetState(XenbusState.Initialising);
            AwaitState(XenbusState.InitWait);
        }

        public void SetState(XenbusState state) => store.Write(Folder + "/state", ((int)state).ToString(CultureInfo.InvariantCulture));

        public void AwaitState(XenbusState state)
        {
            string node = $"/local/domain/0/backend/console/{GrantDomain.Id}/1/state";
            string wanted = ((int)state).ToString(CultureInfo.InvariantCulture);
            Assert.That(SpinWait.SpinUntil(() => store.Read(node) == wanted, Patience), Is.True, $"the back end comes from {store.Read(node)} to {state}");
        }

        public void Print(string text)
        {
            foreach (char character in text)
            {
                uint producer = Word(3);
                if (producer - Volatile.Read(ref Word(2)) >= 2048)
                {
                    Notify();
                    Assert.That(SpinWait.SpinUntil(() => Word(3) - Volatile.Read(ref Word(2)) < 2048, Patience), Is.True, "there is no room");
                }
                _page[Output + (producer & 2047)] = (byte)character;
                Volatile.Write(ref Word(3), producer + 1);
            }
            Notify();
        }

        public void AwaitEmpty() =>
            Assert.That(SpinWait.SpinUntil(() => Word(3) == Volatile.Read(ref Word(2)), Patience), Is.True, "it is not taken");

        public string Read(int count)
        {
            StringBuilder text = new();
            while (text.Length < count)
            {
                uint consumer = Word(0);
                Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref Word(1)) != consumer, Patience), Is.True, $"nothing comes after \"{text}\"");
                uint producer = Volatile.Read(ref Word(1));
                while (consumer != producer && text.Length < count)
                    text.Append((char)_page[Input + (consumer++ & 1023)]);
                Volatile.Write(ref Word(0), consumer);
                Notify();
            }
            return text.ToString();
        }

        private ref uint Word(int index) => ref ((uint*)(_page + Indexes))[index];

        private void Notify()
        {
            lock (guest)
            {
                guest.Fake.Write(GrantDomain.Request, _port);
                Assert.That(guest.Fake.Call(HypercallNumber.EventChannelOp, SendOperation, GrantDomain.Request), Is.Zero);
            }
        }
    }
}
