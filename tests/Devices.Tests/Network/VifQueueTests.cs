// The loops that serve a queue: nothing waits for ever, nothing is served twice.
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;
using static XenSharp.Devices.Tests.Network.TestFrames;

namespace XenSharp.Devices.Tests.Network;

[CancelAfter(60_000)]
public sealed class VifQueueTests
{
    private FakeChannel _transmitChannel = null!;
    private VifCounters _counters = null!;
    private Collector _world = null!;
    private FakeNetfront _guest = null!;
    private FakeChannel _receiveChannel = null!;
    private VifQueue _queue = null!;
    private CancellationTokenSource _stop = null!;
    private Task _run = null!;

    [TearDown]
    public async Task TearDown()
    {
        await _stop.CancelAsync();
        await _run;
        _guest.Dispose();
        _stop.Dispose();
    }

    /// <summary>Each frame finds the loop somewhere else on its way to sleep.</summary>
    [Test]
    public async Task Each_frame_for_the_guest_arrives([Values] bool isShared, CancellationToken cancellation)
    {
        Begin(isShared, polls: false);
        for (int i = 0; i < 4000; i++)
        {
            int count = 1 + (i % 3);
            _guest.PutPages(count);
            if (i % 5 == 0)
                _receiveChannel.Send();
            _guest.Receive.Rearm();
            for (int k = 0; k < count; k++)
                Give(i + k);
            for (int k = 0; k < count; k++)
            {
                while (_guest.Receive.Responses == 0)
                    await _receiveChannel.Interrupt.WaitAsync(cancellation);
                Assert.That(BitConverter.ToInt32(_guest.TakeReceived().Data, 14), Is.EqualTo(i + k));
                _guest.Receive.Rearm();
            }
        }
    }

    /// <summary>The guest gives pages only when it has none left, so that frames wait for pages all the time.</summary>
    [Test]
    public async Task Frames_that_wait_for_pages_go_on_when_there_are_some([Values] bool isShared, [Values] bool polls, CancellationToken cancellation)
    {
        Begin(isShared, polls);
        int rounds = polls ? 10 : 500;
        for (int i = 0; i < rounds * 4; i++)
            Give(i);
        for (int i = 0; i < rounds; i++)
        {
            _guest.PutPages(2);
            if (!polls)
                _receiveChannel.Send();
            for (int k = 0; k < 2; k++)
            {
                _guest.Receive.Rearm();
                while (_guest.Receive.Responses == 0)
                    await _receiveChannel.Interrupt.WaitAsync(cancellation);
                Assert.That(BitConverter.ToInt32(_guest.TakeReceived().Data, 14), Is.EqualTo((i * 2) + k));
            }
        }
    }

    [Test]
    public async Task Each_frame_of_the_guest_goes_out([Values] bool isShared, CancellationToken cancellation)
    {
        Begin(isShared, polls: false);
        int sent = 0;
        for (int i = 0; i < 3000; i++)
        {
            _guest.Transmit.Rearm();
            for (int k = 0; k <= i % 4; k++, sent++)
                _ = _guest.PutFrame(Plain(Bob, Alice, 60));
            if (_guest.Transmit.Push())
                _transmitChannel.Send();
            while (_world.Frames.Count < sent || _guest.Transmit.Responses < 1 + (i % 4))
                await Task.WhenAny(_transmitChannel.Interrupt.WaitAsync(cancellation), Task.Delay(1, cancellation));
            for (int k = 0; k <= i % 4; k++)
                Assert.That(_guest.TakeTransmitted().Status, Is.Zero);
            _world.Clear();
            sent = 0;
        }
    }

    [Test]
    public void A_guest_that_breaks_its_ring_ends_the_queue()
    {
        Begin(isShared: true, polls: false);
        _guest.Transmit.RequestProducer = 1000;
        _transmitChannel.Send();
        Assert.That(() => _run, Throws.TypeOf<XenbusException>());
        _run = Task.CompletedTask;
        Assert.That(Give(1), Is.False);
    }

    [Test]
    public async Task A_closed_channel_is_no_end_and_the_end_lets_go_of_all()
    {
        Begin(isShared: false, polls: false);
        for (int i = 0; i < 10; i++)
            Give(i);
        _transmitChannel.Close();
        _receiveChannel.Close();
        await Task.Delay(20);
        Assert.That(_run.IsCompleted, Is.False);
        await _stop.CancelAsync();
        await _run;
        Assert.That(_counters.Read().ReceiveDrops, Is.EqualTo(10));
    }

    private bool Give(int number)
    {
        byte[] data = Plain(Bob, Alice, 60);
        BitConverter.TryWriteBytes(data.AsSpan(14), number);
        NetworkFrame frame = ToFrame(data);
        bool taken = _queue.TryEnqueue(frame);
        frame.Release();
        return taken;
    }

    private unsafe void Begin(bool isShared, bool polls)
    {
        _guest = new FakeNetfront();
        _world = new Collector();
        _counters = new VifCounters();
        _transmitChannel = new FakeChannel();
        _receiveChannel = isShared ? _transmitChannel : new FakeChannel();
        _queue = new VifQueue(
            new TransmitQueue(_guest.TransmitPage, _guest, _world, null, new MulticastFilter(), _counters),
            new ReceiveQueue(_guest.ReceivePage, _guest, _counters, TimeProvider.System),
            _transmitChannel, _receiveChannel, polls, TimeProvider.System);
        _stop = new CancellationTokenSource();
        _run = _queue.RunAsync(_stop.Token);
    }
}
