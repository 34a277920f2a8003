// The ring itself: wrapping, full rings, broken indexes, oversized messages, reconnection.
using System.Text;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreRingTests
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
    public void Introduction_puts_the_page_in_order()
    {
        Assert.That(_guest.Page.Word(FakeGuest.RequestConsumer), Is.Zero);
        Assert.That(_guest.Page.Word(FakeGuest.ReplyProducer), Is.Zero);
        Assert.That(_guest.Page.Word(FakeGuest.Connection), Is.Zero);
        Assert.That(_guest.Page.Word(FakeGuest.Error), Is.Zero);
        Assert.That(_guest.Page.Word(FakeGuest.Features), Is.EqualTo(3u));
    }

    [TestCase(0u)]
    [TestCase(1u)]
    [TestCase(1023u)]
    [TestCase(0x7ffffff0u)]
    [TestCase(0xfffffffbu)]
    public void Messages_wrap_anywhere(uint position)
    {
        FakeGuest tool = _store.Tool(position);
        foreach (int length in new[] { 0, 1, 15, 1000, 1024, 1500, 1990 })
        {
            string value = new('v', length);
            Assert.That(tool.Write("x", value), Is.Empty);
            Assert.That(tool.Read("x"), Is.EqualTo(value));
        }
    }

    [Test]
    public void A_request_can_come_byte_by_byte()
    {
        byte[] message = FakeGuest.Message(XenstoreMessageType.Write, 7, 0, Encoding.Latin1.GetBytes("a\0value"));
        foreach (byte part in message)
        {
            _guest.SendRaw([part]);
            FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.RequestConsumer)) ==
                _guest.Page.Word(FakeGuest.RequestProducer), "the store takes the byte");
        }
        Assert.That(_guest.ReceiveReply().RequestId, Is.EqualTo(7));
        Assert.That(_guest.Read("a"), Is.EqualTo("value"));
    }

    [Test]
    public void The_longest_payload_passes()
    {
        _store.Domain0.Write("/local/domain/5/big", new string('b', 4096));
        Assert.That(_guest.Read("big"), Has.Length.EqualTo(4096));
        Assert.That(_guest.Write("x", new string('v', 4096 - 2)), Is.EqualTo("ENOSPC"), "a payload of 4096, but too big for a node");
        _store.Domain0.Write("/local/domain/5/big", new string('b', 4097));
        Assert.That(_guest.Read("big"), Is.EqualTo("E2BIG"));
    }

    [Test]
    public void Many_requests_at_once_are_answered_in_order()
    {
        Task sender = Task.Run(() =>
        {
            for (uint id = 0; id < 500; id++)
                _guest.SendRaw(FakeGuest.Message(XenstoreMessageType.GetDomainPath, id, 0, "5\0"u8));
        });
        for (uint id = 0; id < 500; id++)
            Assert.That(_guest.ReceiveReply().RequestId, Is.EqualTo(id));
        sender.Wait();
    }

    [Test]
    public void A_guest_that_never_reads_is_not_read_either()
    {
        _guest.Write("x", new string('v', 1900));
        int sent = 0;
        byte[] request = FakeGuest.Message(XenstoreMessageType.Read, 1, 0, "x\0"u8);
        Assert.That(1024 % request.Length, Is.Not.Zero);

        // Fill the request ring as long as the store makes room.
        int quota = new XenstoreQuotas().Outstanding;
        while (true)
        {
            FakeGuest.Until(() => Room() >= request.Length || IsHeldUp(), "the store makes room, or reads no more");
            if (Room() < request.Length)
                break;
            _guest.SendRaw(request);
            _guest.Channel.Send();
            sent++;
            Assert.That(sent, Is.LessThan(quota + (1024 / request.Length) + 2));
        }
        Assert.That(_store.Connections[0].QueuedMessages, Is.InRange(1, quota));
        for (int index = 0; index < sent; index++)
            Assert.That(_guest.ReceiveReply().Payload, Has.Length.EqualTo(1900));
        Assert.That(_guest.Read("x"), Has.Length.EqualTo(1900));

        bool IsHeldUp()
        {
            lock (_store.Server.Database.Gate)
                return _store.Connections[0].Session.Throttled;
        }

        int Room() => 1024 - (int)(_guest.Page.Word(FakeGuest.RequestProducer) -
            Volatile.Read(ref _guest.Page.Word(FakeGuest.RequestConsumer)));
    }

    [Test]
    public void A_tool_that_never_reads_does_not_grow_the_store()
    {
        FakeGuest tool = _store.Tool();
        Task sender = Task.Run(() =>
        {
            for (uint id = 0; id < 3000; id++)
                tool.SendRaw(FakeGuest.Message(XenstoreMessageType.GetDomainPath, id, 0, "5\0"u8));
        });
        FakeGuest.Until(() => _store.Connections[1].QueuedMessages == 1024, "the store stops reading");
        Assert.That(sender.IsCompleted, Is.False);
        for (uint id = 0; id < 3000; id++)
            Assert.That(tool.ReceiveReply().RequestId, Is.EqualTo(id));
        sender.Wait();
    }

    [Test]
    public void The_same_event_waits_only_once()
    {
        _guest.Watch("x", "t");
        _guest.AllEvents();

        // A reply that does not fit holds up what follows.
        _store.Domain0.Write("/local/domain/5/big", new string('b', 4000));
        _guest.Send(XenstoreMessageType.Read, 0, "big\0");
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.ReplyProducer)) - _guest.Page.Word(FakeGuest.ReplyConsumer) == 1024,
            "the reply fills the ring");
        for (int index = 0; index < 1000; index++)
            _store.Domain0.Write("/local/domain/5/x", $"{index}");
        Assert.That(_store.Connections[0].QueuedMessages, Is.EqualTo(1));
        Assert.That(_guest.ReceiveReply().Payload, Has.Length.EqualTo(4000));
        Assert.That(_guest.AllEvents(), Is.EqualTo(new[] { "x|t" }));
    }

    [TestCase(FakeGuest.RequestProducer, 1025u)]
    [TestCase(FakeGuest.RequestProducer, 0xffffffffu)]
    [TestCase(FakeGuest.RequestConsumer, 0x80000000u)]
    public void Contradicting_indexes_end_only_that_connection(int offset, uint value)
    {
        FakeGuest other = _store.Guest(6);
        Volatile.Write(ref _guest.Page.Word(offset), value);
        _guest.Channel.Send();
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.Error)) == 2, "XENSTORE_ERROR_RINGIDX");
        Assert.That(other.Write("x", "fine"), Is.Empty);
    }

    [Test]
    public void Contradicting_reply_indexes_end_it_too()
    {
        Volatile.Write(ref _guest.Page.Word(FakeGuest.ReplyProducer), 5000);
        _guest.SendRaw(FakeGuest.Message(XenstoreMessageType.Read, 1, 0, "x\0"u8));
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.Error)) == 2, "XENSTORE_ERROR_RINGIDX");
    }

    [TestCase(4097u)]
    [TestCase(0x7fffffffu)]
    [TestCase(0xffffffffu)]
    public void An_oversized_message_ends_the_connection_until_the_guest_reconnects(uint length)
    {
        _guest.Watch("x", "t");
        uint transaction = _guest.Begin();
        byte[] header = new byte[16];
        new XenstoreHeader(XenstoreMessageType.Read, 1, 0, length).Encode(header);
        _guest.SendRaw(header);
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.Error)) == 3, "XENSTORE_ERROR_PROTO");
        Assert.That(_store.Connections[0].Error, Is.EqualTo(XenstoreConnectionError.Protocol));
        _store.Domain0.Write("/local/domain/5/x", "nobody watches any longer");
        Assert.That(_store.Connections[0].QueuedMessages, Is.Zero);

        Volatile.Write(ref _guest.Page.Word(FakeGuest.Connection), 1);
        _guest.Channel.Send();
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.Connection)) == 0, "reconnected");
        Assert.That(_guest.Page.Word(FakeGuest.Error), Is.Zero);
        Assert.That(_guest.End(transaction), Is.EqualTo("ENOENT"));
        Assert.That(_guest.Watch("x", "t"), Is.Empty);
        Assert.That(_guest.NextEvent(), Is.EqualTo("x|t"));
    }

    [Test]
    public void Reconnection_drops_what_is_half_done()
    {
        _guest.SendRaw(FakeGuest.Message(XenstoreMessageType.Write, 1, 0, "x\0value"u8)[..18]);
        Volatile.Write(ref _guest.Page.Word(FakeGuest.Connection), 1);
        _guest.Channel.Send();
        FakeGuest.Until(() => Volatile.Read(ref _guest.Page.Word(FakeGuest.Connection)) == 0, "reconnected");
        Assert.That(_guest.Page.Word(FakeGuest.RequestProducer), Is.Zero);
        Assert.That(_guest.Read("x"), Is.EqualTo("ENOENT"));
    }

    [Test]
    public void A_closed_event_channel_ends_the_service()
    {
        _guest.Write("x", "1");
        _guest.Channel.Close();
        Assert.That(_store.Connections[0].Completion.Wait(TimeSpan.FromSeconds(20)), Is.True);
        Assert.That(_store.Connections[0].Error, Is.EqualTo(XenstoreConnectionError.None));
        Assert.That(_store.Domain0.Read("/local/domain/5/x"), Is.EqualTo("1"), "what it wrote stays until it is released");
    }

    [Test]
    public void A_released_domain_has_its_ring_back()
    {
        _guest.Write("x", "1");
        _store.Domain0.Write("/local/domain/5/of-the-host", "", XenstorePermissions.Domain0Only);
        Assert.That(_store.Server.ReleaseDomainAsync(5).AsTask().Wait(TimeSpan.FromSeconds(20)), Is.True);
        Assert.That(_store.Connections[0].Completion.IsCompleted, Is.True);
        Assert.That(_store.Domain0.Exists("/local/domain/5"), Is.False);
        _guest.SendRaw([1, 2, 3]);
        Thread.Sleep(20);
        Assert.That(_guest.Page.Word(FakeGuest.RequestConsumer), Is.LessThan(_guest.Page.Word(FakeGuest.RequestProducer)));
    }

    [Test]
    public void A_second_introduction_replaces_the_connection()
    {
        _guest.Watch("x", "t");
        FakeGuest again = _store.Guest(5);
        Assert.That(again.Write("x", "1"), Is.Empty, "at once");
        Assert.That(again.AllEvents(), Is.Empty);
        Assert.That(_store.Connections[0].Completion.Wait(TimeSpan.FromSeconds(20)), Is.True);

        // The same ring again, while it is in use.
        for (int round = 0; round < 20; round++)
        {
            again.Send(XenstoreMessageType.Read, 0, "x\0");
            _store.Connections.Add(_store.Server.IntroduceDomain(5, again.Ring));
            Assert.That(again.Write("y", $"{round}"), Is.Empty);
        }
    }

    [Test]
    public unsafe void A_ring_needs_a_page()
    {
        Assert.That(() => new XenstoreRing(null, _guest.Channel), Throws.ArgumentException);
        Assert.That(() => new XenstoreRing(_guest.Page.Start + 1, _guest.Channel), Throws.ArgumentException);
        Assert.That(() => new XenstoreRing(_guest.Page.Start, null!), Throws.ArgumentNullException);
        Assert.That(() => _store.Server.IntroduceDomain(0, _guest.Ring), Throws.TypeOf<ArgumentOutOfRangeException>());
        Assert.That(() => _store.Server.IntroduceDomain(0x7ff0, _guest.Ring), Throws.TypeOf<ArgumentOutOfRangeException>());
    }
}
