// Events by the code of this process and by that of the image: alike on memory of their own, and together on the same lock.
using XenSharp.Core;
using XenSharp.EventChannels;

namespace XenSharp.Freestanding.Tests;

public sealed unsafe class EventTests
{
    private HotImage _image = null!;

    [OneTimeSetUp]
    public void Place() => _image = new HotImage(HotImage.FilePath);

    [OneTimeTearDown]
    public void Remove() => _image.Dispose();

    [Test]
    public void Image_does_what_the_manager_does([Range(0, 3)] int seed, [Values] bool fifo)
    {
        var inside = new EventCodeInside(_image);
        var random = new Random(seed);
        using var one = new EventDomain(seed, fifo);
        using var other = new EventDomain(seed, fifo);
        using var oneFar = new EventDomain(seed + 100, !fifo);
        using var otherFar = new EventDomain(seed + 100, !fifo);
        one.Connect(oneFar, seed);
        other.Connect(otherFar, seed);
        int woken = 0;
        int sentFar = 0;
        for (int step = 0; step < 4000; step++)
        {
            // What the guest does to its bits meanwhile: mostly it takes events.
            int offset = random.Next(4) switch
            {
                0 => SharedInfoLayout.EvtchnMask + random.Next((int)EventDomain.Ports / 8),
                1 => SharedInfoLayout.EvtchnPending + random.Next((int)EventDomain.Ports / 8),
                _ => (random.Next(EventDomain.Vcpus) * sizeof(VcpuInfo)) + (random.Next(2) * 8),
            };
            byte value = (byte)(random.Next(4) == 0 ? random.Next(256) : 0);
            one.Context->Domain->SharedInfo[offset] = value;
            other.Context->Domain->SharedInfo[offset] = value;
            int fifoOffset = random.Next(2) == 0 ? random.Next(EventDomain.Vcpus * 128) : 4096 + random.Next((int)EventDomain.Ports * 4);
            one.FifoMemory[fifoOffset] = value;
            other.FifoMemory[fifoOffset] = value;
            bool takesAll = fifo && random.Next(8) == 0;
            int poller = random.Next(EventDomain.Vcpus);
            int awaited = random.Next(-1, (int)EventDomain.Ports);
            foreach (EventDomain domain in (EventDomain[])[one, other, oneFar, otherFar])
            {
                // At the far end nobody else clears a bit.
                bool isFar = domain == oneFar || domain == otherFar;
                if (isFar && (step & 7) == 0)
                    new Span<byte>(domain.Context->Domain->SharedInfo, 4096).Clear();
                if (takesAll || (isFar && (step & 7) == 0))
                    domain.TakeAll();
                domain.Context->Vcpus[poller].PollPort = awaited;
                VcpuMask.AtomicAdd(&domain.Context->State->Polling, poller);
            }

            VcpuMask wokenByOne = default;
            VcpuMask wokenByOther = default;
            uint port = (uint)random.Next((int)EventDomain.Ports + 8);
            int virq = random.Next(Virq.Count);
            int operation = random.Next(4);
            if (one.Context->IsValid(port))
                one.Context->Ports[port].Priority = other.Context->Ports[port].Priority = (byte)random.Next(FifoAbi.Priorities);
            EventChannelContext* oneTarget;
            EventChannelContext* otherTarget;
            long oneResult = EventCodeOutside.Call(operation, one.Context, port, poller, virq, &oneTarget, &wokenByOne);
            long otherResult = inside.Call(operation, other.Context, port, poller, virq, &otherTarget, &wokenByOther);
            bool alike = oneResult == otherResult
                && Bytes(&wokenByOne, sizeof(VcpuMask)).SequenceEqual(Bytes(&wokenByOther, sizeof(VcpuMask)))
                && (oneTarget == oneFar.Context) == (otherTarget == otherFar.Context)
                && (oneTarget == one.Context) == (otherTarget == other.Context)
                && one.Snapshot().AsSpan().SequenceEqual(other.Snapshot())
                && oneFar.Snapshot().AsSpan().SequenceEqual(otherFar.Snapshot());
            if (!alike)
            {
                Assert.Fail(
                    $"Step {step}: operation {operation}, port {port}, vCPU {poller}, VIRQ {virq}: outside {oneResult}, "
                    + $"inside {otherResult}.");
            }

            woken += wokenByOne.IsEmpty ? 0 : 1;
            sentFar += oneTarget == oneFar.Context && !wokenByOne.IsEmpty ? 1 : 0;
        }

        Assert.That(woken, Is.GreaterThan(100));
        Assert.That(sentFar, Is.GreaterThan(10), "vCPUs of the far domain were woken");
    }

    [Test]
    public void Both_codes_hold_the_same_port_lock()
    {
        using var domain = new EventDomain(seed: 1, fifo: false);
        var inside = new EventCodeInside(_image);
        const uint port = EventDomain.IpiPort;
        EventChannelContext* context = domain.Context;
        using var started = new ManualResetEventSlim();
        long polled = -1;
        var thread = new Thread(() =>
        {
            started.Set();
            Volatile.Write(ref polled, inside.Poll(context, port));
        });
        PortLock.Enter(context->Ports + port);
        thread.Start();
        started.Wait();
        Assert.That(thread.Join(100), Is.False, "it waits for who holds the lock");
        Assert.That(Volatile.Read(ref polled), Is.EqualTo(-1));
        PortLock.Exit(context->Ports + port);
        thread.Join();
        Assert.That(polled, Is.Zero);
    }

    private static ReadOnlySpan<byte> Bytes(void* start, int length) => new(start, length);
}
