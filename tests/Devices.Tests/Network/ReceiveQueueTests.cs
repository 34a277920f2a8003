// How frames come into a guest's receive ring.
using CsCheck;
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

public sealed unsafe class ReceiveQueueTests
{
    private const int DataValidated = 1;
    private const int ChecksumBlank = 2;

    private readonly ManualTime _time = new();
    private FakeNetfront _guest = null!;
    private VifCounters _counters = null!;
    private ReceiveQueue _queue = null!;

    [SetUp]
    public void SetUp() => Begin();

    [TearDown]
    public void TearDown()
    {
        _queue.Close();
        _guest.Dispose();
    }

    [Test]
    public void Frames_of_all_lengths_arrive_whole([Values(0u, 0xffff_ffc0u)] uint start)
    {
        Begin(start);
        foreach (int length in new[] { 14, 60, 1514, 4095, 4096, 4097, 8192, 65549 })
        {
            byte[] frame = [.. Enumerable.Range(0, length).Select(i => (byte)(i * 3 + length))];
            _guest.PutPages(17);
            Assert.That(Enqueue(frame), Is.True);
            Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
            ReceivedFrame received = _guest.TakeReceived();
            Assert.That(received.Data, Is.EqualTo(frame));
            Assert.That((received.Flags, received.Segmentation), Is.EqualTo((0, 0)));
            Assert.That(_guest.Receive.Responses, Is.Zero);
        }
    }

    [Test]
    public void What_is_left_to_do_is_told()
    {
        _guest.PutPages(8);
        byte[] tcp = Tcp(6, new byte[9000]);
        Assert.That(Enqueue(tcp, OffloadTests.Cut(6, 1400, 74, 0)), Is.True);
        Assert.That(Enqueue(tcp[..100], new FrameOffload { Checksum = ChecksumState.BlankIpv6, ChecksumStart = 54, ChecksumOffset = 16 }), Is.True);
        Assert.That(Enqueue(tcp[..100], new FrameOffload { Checksum = ChecksumState.Validated }), Is.True);
        Assert.That(Enqueue(tcp[..100], OffloadTests.Cut(4, 20, 54, 0)), Is.True);
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        ReceivedFrame first = _guest.TakeReceived();
        Assert.That((first.Flags, first.Segmentation, first.SegmentSize), Is.EqualTo((DataValidated | ChecksumBlank, 2, 1400)));
        Assert.That(first.Data, Is.EqualTo(tcp));
        ReceivedFrame second = _guest.TakeReceived();
        Assert.That((second.Flags, second.Segmentation), Is.EqualTo((DataValidated | ChecksumBlank, 0)));
        ReceivedFrame third = _guest.TakeReceived();
        Assert.That((third.Flags, third.Segmentation), Is.EqualTo((DataValidated, 0)));
        ReceivedFrame last = _guest.TakeReceived();
        Assert.That((last.Segmentation, last.Data.Length, last.SegmentSize), Is.EqualTo((1, 100, 20)), "an extra info after the only part");
    }

    [Test]
    public void A_frame_waits_for_as_many_pages_as_it_needs()
    {
        Assert.That(Enqueue(new byte[9000]), Is.True);
        Assert.That(Process(), Is.EqualTo(QueueStep.NoPages));
        Assert.That(_queue.HasFrames, Is.True);
        Assert.That(_guest.Receive.RequestEvent, Is.EqualTo(1), "it wants to know of the next page");
        _guest.PutPages(2);
        Assert.That(Process(), Is.EqualTo(QueueStep.NoPages));
        Assert.That((_guest.Receive.Responses, _guest.Receive.RequestEvent), Is.EqualTo((0, 3)));
        _guest.PutPages(1);
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        Assert.That(_guest.TakeReceived().Data, Has.Length.EqualTo(9000));
        Assert.That(_queue.HasFrames, Is.False);
        Assert.That(_guest.Channel.Notifications, Is.EqualTo(1));
    }

    [Test]
    public void A_slow_guest_costs_a_bounded_amount_and_loses_the_newest()
    {
        int taken = 0;
        while (taken < 5000 && Enqueue(Plain(Bob, Alice, 60)))
            taken++;
        Assert.That(taken, Is.EqualTo(ReceiveQueue.MaximumFrames));
        _queue.Close();
        Assert.That(_counters.Read().ReceiveDrops, Is.EqualTo(taken));
        Assert.That(Enqueue(Plain(Bob, Alice, 60)), Is.False, "closed");

        Begin();
        taken = 0;
        while (taken < 5000 && Enqueue(new byte[65000]))
            taken++;
        Assert.That(taken, Is.InRange(100, ReceiveQueue.MaximumMemory / 65000));
    }

    [Test]
    public void A_frame_that_waited_too_long_is_dropped()
    {
        Assert.That(Enqueue(Plain(Bob, Alice, 60, 1)), Is.True);
        _time.Advance(TimeSpan.FromSeconds(9));
        Assert.That(Enqueue(Plain(Bob, Alice, 60, 2)), Is.True);
        _time.Advance(TimeSpan.FromSeconds(2));
        _guest.PutPages(4);
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        Assert.That(_guest.TakeReceived().Data[59], Is.EqualTo(2));
        Assert.That((_guest.Receive.Responses, _counters.Read().ReceiveDrops), Is.EqualTo((0, 1)));
    }

    [Test]
    public void A_page_that_cannot_be_written_to_is_an_error_to_the_guest()
    {
        _guest.PutPages(3);
        _guest.Revoke(_guest.NextPage);
        Assert.That(Enqueue(new byte[100]), Is.True);
        Assert.That(Enqueue(Plain(Bob, Alice, 70)), Is.True);
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        ReceivedFrame first = _guest.TakeReceived();
        Assert.That((first.Status, first.Data.Length), Is.EqualTo((-1, 0)));
        Assert.That(_guest.TakeReceived().Data, Is.EqualTo(Plain(Bob, Alice, 70)));
        Assert.That(_counters.Read().ReceiveErrors, Is.EqualTo(1));
    }

    [Test]
    public void More_requests_than_slots_end_the_connection()
    {
        _guest.Receive.RequestProducer = 257;
        Assert.That(Enqueue(new byte[100]), Is.True);
        Assert.That(() => Process(), Throws.TypeOf<XenbusException>());
    }

    [Test]
    public void Any_bytes_in_the_ring_hurt_nobody()
        => Gen.Select(Gen.Byte.Array[4096, 4096], Gen.UInt, Gen.UInt, Gen.Int[14, 30000].Array[0, 6]).Sample((bytes, start, producer, lengths) =>
        {
            Begin(start);
            bytes.AsSpan(64).CopyTo(new Span<byte>(_guest.ReceivePage + 64, 4032));
            _guest.Receive.RequestProducer = start + (producer % 300);
            foreach (int length in lengths)
                _ = Enqueue(new byte[length]);
            try
            {
                _ = Process();
                Assert.That(producer % 300, Is.LessThanOrEqualTo(256).Or.GreaterThan(lengths.Length == 0 ? 0 : 256));
            }
            catch (XenbusException)
            {
                Assert.That(producer % 300, Is.GreaterThan(256));
            }

            _queue.Close();
        }, iter: 1000, threads: 1);

    private bool Enqueue(byte[] data, FrameOffload offload = default)
    {
        NetworkFrame frame = ToFrame(data, offload);
        bool taken = _queue.TryEnqueue(frame);
        frame.Release();
        return taken;
    }

    private QueueStep Process() => _queue.Process(64, _guest.Channel);

    private void Begin(uint start = 0)
    {
        _queue?.Close();
        _guest?.Dispose();
        _guest = new FakeNetfront(start);
        _counters = new VifCounters();
        _queue = new ReceiveQueue(_guest.ReceivePage, _guest, _counters, _time);
    }
}
