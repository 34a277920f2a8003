// What comes of what a guest puts into its transmit ring.
using CsCheck;
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

public sealed unsafe class TransmitQueueTests
{
    private const int Okay = 0;
    private const int Error = -1;
    private const int Null = 1;
    private const int ChecksumBlank = 1;
    private const int DataValidated = 2;
    private const int MoreData = 4;
    private const int ExtraInfo = 8;

    private readonly ManualTime _time = new();
    private FakeNetfront _guest = null!;
    private Collector _world = null!;
    private MulticastFilter _groups = null!;
    private VifCounters _counters = null!;
    private TransmitQueue _queue = null!;

    [SetUp]
    public void SetUp() => Begin();

    [TearDown]
    public void TearDown() => _guest.Dispose();

    [Test]
    public void A_frame_of_one_part_comes_through([Values(0u, 0xffff_fff0u)] uint start)
    {
        Begin(start);
        for (int i = 0; i < 40; i++)
        {
            byte[] frame = Plain(Bob, Alice, 60 + i, (byte)i);
            List<int> ids = _guest.PutFrame(frame, DataValidated, offset: 4096 - frame.Length);
            _ = _guest.Transmit.Push();
            Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
            Assert.That(_guest.TakeTransmitted(), Is.EqualTo((ids[0], Okay)));
            Assert.That(_world.Frames[i].Data, Is.EqualTo(frame));
            Assert.That(_world.Frames[i].Offload, Is.EqualTo(new FrameOffload { Checksum = ChecksumState.Validated }));
        }

        NetworkDeviceStatistics statistics = _counters.Read();
        Assert.That((statistics.TransmittedFrames, statistics.TransmittedBytes, statistics.GrantCopies), Is.EqualTo((40, 40 * 60 + 780, 40)));
    }

    [Test]
    public void A_frame_of_many_parts_is_put_together()
    {
        byte[] frame = Tcp(4, [.. Enumerable.Range(0, 65535 - 54).Select(static i => (byte)(i * 7))]);
        List<int> ids = _guest.PutFrame(Blank(frame, 4), ChecksumBlank, [FakeNetfront.Gso(1, 1448)], part: 3641);
        Assert.That(ids, Has.Count.EqualTo(19), "18 parts and an extra info");
        _ = _guest.Transmit.Push();
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        foreach (int id in ids)
            Assert.That(_guest.TakeTransmitted(), Is.EqualTo(id < 0 ? (0, Null) : (id, Okay)));
        (byte[] data, FrameOffload offload) = _world.Frames.Single();
        Assert.That(data.AsSpan(54).SequenceEqual(frame.AsSpan(54)), Is.True);
        Assert.That(offload, Is.EqualTo(OffloadTests.Cut(4, 1448, 54, 0)));
    }

    [Test]
    public void What_is_left_to_do_on_a_frame_is_found_in_it()
        => Gen.Select(Gen.Bool.Select(static isNew => isNew ? 6 : 4), Gen.Byte.Array[0, 4000], Gen.Int[0, 3000], Gen.Int[0, 2], Gen.Int[100, 4096]).Sample(
            (version, payload, size, vlans, part) =>
            {
                Begin();
                byte[] right = Tcp(version, payload, vlans: vlans);
                byte[][]? extras = size < 50 ? null : [FakeNetfront.Gso(version == 4 ? 1 : 2, size)];
                part = Math.Max(part, (right.Length / 19) + 1);
                _ = _guest.PutFrame(Blank(right, version, vlans: vlans), size % 2 == 0 || extras == null ? ChecksumBlank : 0, extras, part);
                _ = _guest.Transmit.Push();
                Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
                (byte[] data, FrameOffload offload) = _world.Frames.Single();
                bool isCut = extras != null && payload.Length > size;
                Assert.That(offload.Segmentation, Is.EqualTo(!isCut ? SegmentationKind.None : version == 4 ? SegmentationKind.TcpV4 : SegmentationKind.TcpV6));

                // Whoever fills in the checksum by what it says has the frame as it should be.
                InternetChecksum.Complete(data.AsSpan(offload.ChecksumStart), offload.ChecksumOffset);
                Assert.That(data, Is.EqualTo(right));
            }, iter: 400, threads: 1);

    [Test]
    public void Padding_is_no_part_of_a_checksum()
    {
        byte[] right = Udp(4, [1, 2, 3]);
        _ = _guest.PutFrame([.. Blank(right, 4, 6), .. new byte[] { 0xff, 0xff, 0xff }], ChecksumBlank);
        _ = _guest.Transmit.Push();
        _ = Process();
        (byte[] data, FrameOffload offload) = _world.Frames.Single();
        InternetChecksum.Complete(data.AsSpan(offload.ChecksumStart), offload.ChecksumOffset);
        Assert.That(data, Is.EqualTo(right));
    }

    /// <summary>The guest loses the frame, and nothing else.</summary>
    [TestCase("short")]
    [TestCase("no page")]
    [TestCase("second page")]
    [TestCase("blank of nothing")]
    [TestCase("gso of udp")]
    [TestCase("gso of other version")]
    [TestCase("gso of too many")]
    [TestCase("sum of parts")]
    [TestCase("19 parts")]
    public void A_frame_that_is_none_is_dropped(string what)
    {
        byte[] tcp = Tcp(4, new byte[3000]);
        switch (what)
        {
            case "short":
                _ = _guest.PutFrame(new byte[13]);
                break;
            case "no page":
                _guest.Transmit.Put(FakeNetfront.Request(0x7fff_ffff, 0, 0, 1, 100));
                break;
            case "second page":
                _ = _guest.PutFrame(tcp[..100], MoreData);
                _guest.Transmit.Put(FakeNetfront.Request(0x7fff_ffff, 0, 0, 1, 50));
                break;
            case "blank of nothing":
                _ = _guest.PutFrame(Plain(Bob, Alice, 100), ChecksumBlank);
                break;
            case "gso of udp":
                _ = _guest.PutFrame(Udp(4, new byte[3000]), ChecksumBlank, [FakeNetfront.Gso(1, 1448)]);
                break;
            case "gso of other version":
                _ = _guest.PutFrame(tcp, ChecksumBlank, [FakeNetfront.Gso(2, 1448)]);
                break;
            case "gso of too many":
                _ = _guest.PutFrame(tcp, ChecksumBlank, [FakeNetfront.Gso(1, 1)]);
                break;
            case "sum of parts":
                // 64 KiB and more: the size has wrapped.
                _ = _guest.PutFrame(tcp[..100], MoreData);
                _guest.Transmit.Put(FakeNetfront.Request(_guest.Grant(out _), 0, 0, 1, 101));
                break;
            default:
                _ = _guest.PutFrame(new byte[4000], 0, null, part: 200);
                break;
        }

        _ = _guest.Transmit.Push();
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        int count = _guest.Transmit.Responses;
        Assert.That(count, Is.GreaterThan(0));
        for (int i = 0; i < count; i++)
            Assert.That(_guest.TakeTransmitted().Status, Is.EqualTo(Error).Or.EqualTo(Null));
        Assert.That(_world.Frames, Is.Empty);
        Assert.That(_counters.Read().TransmitErrors, Is.EqualTo(1));

        byte[] good = Plain(Bob, Alice, 60);
        _ = _guest.PutFrame(good);
        _ = _guest.Transmit.Push();
        _ = Process();
        Assert.That(_world.Frames.Single().Data, Is.EqualTo(good));
        Assert.That(_guest.TakeTransmitted().Status, Is.EqualTo(Okay));
    }

    /// <summary>No front end does such things: the connection ends.</summary>
    [TestCase("producer")]
    [TestCase("page end")]
    [TestCase("page end of a part")]
    [TestCase("missing extra")]
    [TestCase("unknown extra")]
    [TestCase("extra of type 0")]
    [TestCase("missing part")]
    [TestCase("21 parts")]
    [TestCase("gso of 0")]
    [TestCase("gso of unknown type")]
    public void Nonsense_ends_the_connection(string what)
    {
        byte[] frame = Tcp(4, new byte[2000]);
        switch (what)
        {
            case "producer":
                _guest.Transmit.RequestProducer += 257;
                break;
            case "page end":
                _guest.Transmit.Put(FakeNetfront.Request(_guest.Grant(out _), 4000, 0, 1, 97));
                break;
            case "page end of a part":
                _ = _guest.PutFrame(frame[..100], MoreData);
                _guest.Transmit.Put(FakeNetfront.Request(_guest.Grant(out _), 4096, 0, 1, 1));
                break;
            case "missing extra":
                _ = _guest.PutFrame(frame, ExtraInfo);
                break;
            case "unknown extra":
                _ = _guest.PutFrame(frame, 0, [[5, .. new byte[11]]]);
                break;
            case "extra of type 0":
                _ = _guest.PutFrame(frame, 0, [new byte[12]]);
                break;
            case "missing part":
                _ = _guest.PutFrame(frame, MoreData);
                break;
            case "21 parts":
                _ = _guest.PutFrame(new byte[2200], 0, null, part: 100);
                break;
            case "gso of 0":
                _ = _guest.PutFrame(frame, 0, [FakeNetfront.Gso(1, 0)]);
                break;
            default:
                _ = _guest.PutFrame(frame, 0, [FakeNetfront.Gso(3, 1000)]);
                break;
        }

        if (what != "producer")
            _ = _guest.Transmit.Push();
        Assert.That(() => Process(), Throws.TypeOf<XenbusException>());
        Assert.That(_world.Frames, Is.Empty);
    }

    [Test]
    public void Groups_come_as_extra_infos_without_a_frame()
    {
        byte[] Group(byte type, byte last, bool more = false) => [type, more ? (byte)1 : (byte)0, 0x01, 0, 0x5e, 0, 0, last, 0, 0, 0, 0];
        _groups = new MulticastFilter { IsActive = true };
        _queue = new TransmitQueue(_guest.TransmitPage, _guest, _world, null, _groups, _counters);
        _guest.Transmit.Put(FakeNetfront.Request(0, 0, ExtraInfo, 5, 0));
        _guest.Transmit.Put(Group(2, 1, more: true));
        _guest.Transmit.Put(Group(2, 2));
        _guest.Transmit.Put(FakeNetfront.Request(0, 0, ExtraInfo, 6, 0));
        _guest.Transmit.Put(Group(3, 2));
        _ = _guest.Transmit.Push();
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        Assert.That(Enumerable.Range(0, 5).Select(_ => _guest.TakeTransmitted()), Is.EqualTo(new[] { (5, Okay), (0, Null), (0, Null), (6, Okay), (0, Null) }));
        Assert.That(_groups.Wants(new MacAddress(0x01005e_000001)), Is.True);
        Assert.That(_groups.Wants(new MacAddress(0x01005e_000002)), Is.False);
        Assert.That(_groups.Wants(MacAddress.Broadcast) && _groups.Wants(Bob), Is.True);

        for (int i = 0; i < 70; i++)
        {
            _guest.Transmit.Put(FakeNetfront.Request(0, 0, ExtraInfo, i, 0));
            _guest.Transmit.Put(Group(2, 9));
        }

        _ = _guest.Transmit.Push();
        while (Process() == QueueStep.More)
        {
        }

        int[] states = [.. Enumerable.Range(0, 70).Select(_ => (_guest.TakeTransmitted().Status, _guest.TakeTransmitted()).Status)];
        Assert.That(states.Count(static status => status == Okay), Is.EqualTo(MulticastFilter.MaximumGroups - 1));
    }

    [Test]
    public void Events_are_as_ring_h_says()
    {
        byte[] frame = Plain(Bob, Alice, 60);
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        _ = _guest.PutFrame(frame);
        Assert.That(_guest.Transmit.Push(), Is.True, "the back end wants to know of the first request");
        _ = _guest.PutFrame(frame);
        Assert.That(_guest.Transmit.Push(), Is.False, "and not of others before it has looked");
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        Assert.That(_guest.Channel.Notifications, Is.EqualTo(1), "the guest wanted to know of the first response");
        _ = _guest.PutFrame(frame);
        Assert.That(_guest.Transmit.Push(), Is.True);
        _ = Process();
        Assert.That(_guest.Channel.Notifications, Is.EqualTo(1), "it has not asked again");
        while (_guest.Transmit.Responses > 0)
            _ = _guest.TakeTransmitted();
        _guest.Transmit.Rearm();
        _ = _guest.PutFrame(frame);
        _ = _guest.Transmit.Push();
        _ = Process();
        Assert.That(_guest.Channel.Notifications, Is.EqualTo(2));
    }

    [Test]
    public void Others_have_their_turn()
    {
        for (int i = 0; i < 100; i++)
            _ = _guest.PutFrame(Plain(Bob, Alice, 60));
        _ = _guest.Transmit.Push();
        Assert.That(Process(), Is.EqualTo(QueueStep.More));
        Assert.That(_world.Frames, Has.Count.EqualTo(64));
        Assert.That(_guest.Transmit.Responses, Is.EqualTo(64));
        Assert.That(Process(), Is.EqualTo(QueueStep.Idle));
        Assert.That(_world.Frames, Has.Count.EqualTo(100));
    }

    [Test]
    public void A_guest_sends_no_more_than_its_rate()
    {
        // 10 KB each 50 ms, for 2 s: 400 KB, and what an idle interface has saved up.
        var rate = new TransmitRate(10_000, TimeSpan.FromMilliseconds(50));
        Begin(0, new TransmitLimit(rate, _time));
        Assert.That(rate.ToString(), Is.EqualTo("10000,50000"));
        TimeSpan passed = TimeSpan.Zero;
        long sent = 0;
        while (passed < TimeSpan.FromSeconds(2))
        {
            while (_guest.Transmit.Responses > 0)
                _ = _guest.TakeTransmitted();
            while (_guest.Transmit.RequestProducer - _guest.Transmit.ResponseProducer < 200)
            {
                _ = _guest.PutFrame(Plain(Bob, Alice, 1500));
                _ = _guest.Transmit.Push();
            }

            QueueStep step = _queue.Process(64, _guest.Channel, out TimeSpan wait);
            sent += _world.Frames.Sum(static frame => frame.Data.Length);
            _world.Clear();
            if (step != QueueStep.Later)
                continue;
            Assert.That(wait, Is.GreaterThan(TimeSpan.Zero).And.LessThanOrEqualTo(rate.Interval));
            _time.Advance(wait);
            passed += wait;
        }

        Assert.That(sent, Is.InRange(380_000, 410_000));
    }

    [Test]
    public void A_frame_larger_than_the_rate_goes_in_the_end()
    {
        var limit = new TransmitLimit(new TransmitRate(100, TimeSpan.FromMilliseconds(1)), _time);
        int waits = 0;
        while (!limit.TryTake(65535, out TimeSpan wait))
        {
            _time.Advance(wait);
            waits++;
        }

        Assert.That(waits, Is.InRange(655, 657));
    }

    /// <summary>Whatever is in the ring: frames, drops, or the end of the connection.</summary>
    [Test]
    public void Any_bytes_in_the_ring_hurt_nobody()
        => Gen.Select(Gen.Byte.Array[4096, 4096], Gen.UInt, Gen.Int[0, 300], Gen.Int[0, 3]).Sample((bytes, start, count, kind) =>
        {
            Begin(start);
            for (int i = 0; i < 8; i++)
                Tcp(4, new byte[4042]).CopyTo(GrantedPage(), 0);
            var ring = new Span<byte>(_guest.TransmitPage, 4096);
            bytes.AsSpan(64).CopyTo(ring[64..]);
            for (uint i = 0; i < 256 && kind > 0; i++)
            {
                // Requests of which some make sense.
                Span<byte> slot = _guest.Transmit.Slot(i);
                slot[0] = (byte)(8 + (slot[0] % 10));
                slot[1..4].Clear();
                slot[5] &= 0x03;
                slot[7] = 0;
                slot[6] &= (byte)(kind == 1 ? 0x03 : 0x0f);
                slot[11] &= 0x07;
                if (kind == 3)
                    slot[6] |= 0x08;
            }

            _guest.Transmit.RequestProducer = start + (uint)count;
            _guest.Transmit.ResponseEvent = (uint)bytes[0] << 24;
            try
            {
                for (int turn = 0; turn < 10 && Process() == QueueStep.More; turn++)
                {
                }

                Assert.That(count, Is.LessThanOrEqualTo(256));
                Assert.That(_guest.Transmit.ResponseProducer, Is.EqualTo(start + (uint)count), "each request is answered");
            }
            catch (XenbusException)
            {
                // The front end's doing, told to it and to people.
            }

            NetworkDeviceStatistics statistics = _counters.Read();
            Assert.That(statistics.TransmittedFrames, Is.EqualTo(_world.Frames.Count));
        }, iter: 2000, threads: 1);

    private byte[] GrantedPage()
    {
        _ = _guest.Grant(out byte[] page);
        return page;
    }

    private QueueStep Process() => _queue.Process(64, _guest.Channel, out _);

    private void Begin(uint start = 0, TransmitLimit? limit = null)
    {
        _guest?.Dispose();
        _guest = new FakeNetfront(start);
        _world = new Collector();
        _groups = new MulticastFilter();
        _counters = new VifCounters();
        _queue = new TransmitQueue(_guest.TransmitPage, _guest, _world, limit, _groups, _counters);
    }
}
