// The FIFO ABI on plain memory: going over and back, many ports, what senders leave in words, and a guest that takes events meanwhile.
using XenSharp.Core;
using static XenSharp.EventChannels.EventChannelOperation;

namespace XenSharp.EventChannels.Tests;

[TestFixture]
public sealed unsafe class FifoTests
{
    private const long ENOENT = -2;
    private const long EACCES = -13;
    private const long EINVAL = -22;
    private const long ENOSPC = -28;
    private const long ENOSYS = -38;
    private const long EOPNOTSUPP = -95;

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(60);

    [Test]
    public void ControlBlocksThatAreRefusedLeaveTwoLevels()
    {
        using var guest = new FakeDomain(1, 2);
        Assert.That(guest.InitControl(FakeDomain.FifoFrame, 0, 2), Is.EqualTo(ENOENT));
        Assert.That(guest.InitControl(FakeDomain.FifoFrame, 4, 0), Is.EqualTo(EINVAL));
        Assert.That(guest.InitControl(FakeDomain.FifoFrame, 4032, 0), Is.EqualTo(EINVAL));
        Assert.That(guest.InitControl(FakeDomain.FirstFrame, 0, 0), Is.EqualTo(EINVAL));
        Assert.That(guest.ExpandArray(FakeDomain.FifoFrame), Is.EqualTo(EOPNOTSUPP));
        Assert.That(guest.SetPriority(guest.BindIpi(0), 0), Is.EqualTo(ENOSYS));
        Assert.That(guest.Held.Total, Is.Zero);
        Assert.That(guest.InitControl(FakeDomain.FifoFrame, 4024, 1), Is.Zero);
        Assert.That(guest.InitControl(FakeDomain.FifoFrame, 0, 1), Is.EqualTo(EINVAL));
        Assert.That(guest.ExpandArray(FakeDomain.FirstFrame), Is.EqualTo(EINVAL));
        Assert.That(guest.SetPriority(1, 16), Is.EqualTo(EINVAL));
        Assert.That(guest.SetPriority(2, 16), Is.EqualTo(EACCES));
        Assert.That(guest.SetPriority(64, 0), Is.EqualTo(EINVAL));
        Assert.That(guest.Held.Total, Is.EqualTo(1));
    }

    [TestCase(InitControl), TestCase(ExpandArray)]
    public void AFrameThatAnotherVcpuHasToNoticeIsAskedForAgain(EventChannelOperation operation)
    {
        using var guest = new FakeDomain(1, 1);
        if (operation == ExpandArray)
            guest.EnterFifo(pages: 0);
        int held = guest.Held.Total;
        guest.Held.Error = Errno.ERESTART;
        *(EvtchnInitControl*)guest.ArgumentPage = new EvtchnInitControl { Frame = FakeDomain.FifoFrame + 1 };
        _ = guest.CallAt(operation, FakeDomain.Arguments);
        Assert.That(guest.Vcpu(0)->Continuation.Pending, Is.EqualTo(1));
        Assert.That(guest.Vcpu(0)->Continuation.Arguments.A0, Is.EqualTo((ulong)operation));
        guest.Held.Error = Errno.None;
        Assert.That(guest.CallAt(operation, FakeDomain.Arguments), Is.Zero);
        Assert.That(guest.Held.Total, Is.EqualTo(held + 1));
    }

    [Test]
    public void ManyPortsCanBeHadAndAResetGivesTheFramesBack()
    {
        using var guest = new FakeDomain(1, 2, maxPort: FifoAbi.PortCount - 1);
        for (uint port = 1; port < 4096; port++)
            Assert.That(guest.BindIpi(1), Is.EqualTo(port));
        var ipi = new EvtchnBindIpi();
        Assert.That(guest.Call(BindIpi, ref ipi), Is.EqualTo(ENOSPC));
        guest.EnterFifo(pages: 4);
        guest.FifoPages[4096..].Clear();
        Assert.That(guest.ExpandArray(FakeDomain.FifoFrame + 4), Is.Zero, "one frame may be there twice");
        Assert.That(guest.BindIpi(1), Is.EqualTo(4096));
        Assert.That(guest.Port(Send, 4096), Is.Zero);
        Assert.That(*guest.Word(3 * 1024), Is.EqualTo(FifoAbi.Pending | FifoAbi.Linked), "word 0 of the fifth page");
        Assert.That((guest.Block(1)[0], guest.Block(1)[2 + FifoAbi.DefaultPriority]), Is.EqualTo((1u << FifoAbi.DefaultPriority, 4096u)));
        for (uint port = 4097; port < FifoAbi.PortCount; port++)
            Assert.That(guest.BindIpi(1), Is.EqualTo(port));
        Assert.That(guest.Call(BindIpi, ref ipi), Is.EqualTo(ENOSPC));
        Assert.That(guest.Channels.HeldFrames, Has.Count.EqualTo(guest.Held.Total).And.Count.EqualTo(7));
        ushort domain = DomainId.Self.Value;
        Assert.That(guest.Call(Reset, ref domain), Is.Zero);
        Assert.That(guest.Held.Total, Is.Zero);
        Assert.That(guest.Channels.HeldFrames, Is.Empty);
        Assert.That(guest.BindIpi(0), Is.EqualTo(1));
        Assert.That(guest.Port(Send, 1), Is.Zero);
        Assert.That(guest.IsPending(1));
        guest.EnterFifo(pages: 0);
        Assert.That(guest.Held.Total, Is.EqualTo(2));
    }

    [Test]
    public void APortThatIsPendingBeforeItsWordIsThereIsRaisedWithIt()
    {
        using var guest = new FakeDomain(1, 2);
        uint before = guest.BindIpi(0);
        guest.Port(Send, before);
        guest.EnterFifo(pages: 0);
        uint after = guest.BindVirq(Virq.Timer, 1);
        guest.Channels.SendVirq(1, Virq.Timer);
        Assert.That(guest.Channels.IsPending(before), Is.Zero);
        guest.Acknowledge(0);
        guest.Acknowledge(1);
        int kicks = guest.Cpus[1].Kicks;
        Assert.That(guest.ExpandArray(FakeDomain.FifoFrame + 1), Is.Zero);
        Assert.That((*guest.Word(before), *guest.Word(after)), Is.EqualTo((FifoAbi.Pending | FifoAbi.Linked, FifoAbi.Pending | FifoAbi.Linked)));
        Assert.That((guest.Block(0)[2 + 7], guest.Block(1)[2 + 7]), Is.EqualTo((before, after)));
        Assert.That(guest.Cpus[1].Kicks, Is.EqualTo(kicks + 1));
        Assert.That(guest.Channels.IsPending(before), Is.EqualTo(1));
    }

    [Test]
    public void APollEndsForAMaskedPort()
    {
        using var guest = new FakeDomain(1, 2);
        guest.EnterFifo();
        uint port = guest.BindIpi(0);
        *guest.Word(port) = FifoAbi.Masked;
        guest.Channels.BeginPoll(1);
        guest.Channels.NarrowPoll(1, port);
        Assert.That(guest.Channels.IsPending(port), Is.Zero);
        Assert.That(guest.Port(Send, port), Is.Zero);
        Assert.That(guest.Channels.IsPolling(1), Is.False);
        Assert.That(*guest.Word(port), Is.EqualTo(FifoAbi.Pending | FifoAbi.Masked));
        Assert.That(guest.Block(0)[0], Is.Zero);
    }

    /// <summary>A guest that never leaves the tail's word alone loses its own event, and holds nobody up.</summary>
    [Test]
    public void SenderIsNotHeldUpByWhoFightsForTheWords()
    {
        using var guest = new FakeDomain(1, 1);
        guest.EnterFifo();
        uint[] ports = [guest.BindIpi(0), guest.BindIpi(0)];
        var words = (nint)guest.Word(0);
        var block = (nint)guest.Block(0);
        bool stop = false;
        var fighter = new Thread(() =>
        {
            var random = new Random(1);
            while (!Volatile.Read(ref stop))
            {
                _ = Interlocked.Add(ref ((uint*)words)[ports[0]], 0x1000_0001);
                _ = Interlocked.Exchange(ref ((uint*)words)[ports[1]], (uint)random.Next() * 2);
                _ = Interlocked.Exchange(ref ((uint*)block)[0], (uint)random.Next(2));
                _ = Interlocked.Exchange(ref ((uint*)block)[2 + 7], (uint)random.Next());
            }
        });
        fighter.Start();
        long result = 0;
        for (int i = 0; i < 200_000; i++)
            result |= guest.Port(Send, ports[i % 2]) | guest.Port(Unmask, ports[i % 2]) | guest.SetPriority(ports[0], (uint)i % 16);
        Volatile.Write(ref stop, true);
        fighter.Join();
        Assert.That(result, Is.Zero);
        Assert.That(guest.CanariesIntact);
    }

    /// <summary>
    /// Senders on threads of their own, each waiting for its events before it sends again; the guest takes them on another, as Linux does.
    /// Some ports change their priority and vCPU all the time.
    /// </summary>
    [Test]
    public void EveryEventComesOnce()
    {
        const int perSender = 6;
        const int senders = 3;
        const int rounds = 4000;
        using var guest = new FakeDomain(1, 1 + senders);
        guest.EnterFifo();
        uint[] ports = [.. Enumerable.Range(0, senders * perSender).Select(_ => guest.BindIpi(0))];
        int[] delivered = new int[64];
        bool stop = false;
        string? failure = null;
        var consumer = new Thread(() => Consume(guest, delivered, ref stop));
        consumer.Start();
        Thread[] threads = [.. Enumerable.Range(0, senders).Select(sender => new Thread(() =>
        {
            uint[] own = ports[(sender * perSender)..((sender + 1) * perSender)];
            for (int round = 1; round <= rounds && failure == null; round++)
            {
                foreach (uint port in own)
                {
                    EventChannelContext* context = guest.Channels.Context;
                    if (round % 3 == 0)
                        _ = EventDelivery.SetPriority(context, port, (uint)((round + port) % FifoAbi.Priorities));
                    _ = guest.Port(Send, port, vcpu: 1 + sender);
                }

                long start = Environment.TickCount64;
                foreach (uint port in own)
                {
                    while (Volatile.Read(ref delivered[port]) < round && failure == null)
                    {
                        Thread.Yield();
                        if (Environment.TickCount64 - start > s_patience.TotalMilliseconds)
                            failure = $"port {port} in round {round}: lost, word {*guest.Word(port):x8}, READY {*guest.Block(0):x}";
                    }
                }
            }
        }))];
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            thread.Join();
        Volatile.Write(ref stop, true);
        guest.Cpus[0].Kick();
        consumer.Join();
        Assert.That(failure, Is.Null);
        Assert.That(ports.Select(port => delivered[port]), Is.All.EqualTo(rounds));
        Assert.That(guest.CanariesIntact);
    }

    /// <summary>The guest's half: READY, then ports from the heads of its queues, until none is ready.</summary>
    private static void Consume(FakeDomain guest, int[] delivered, ref bool stop)
    {
        uint* block = guest.Block(0);
        uint[] heads = new uint[FifoAbi.Priorities];
        while (!Volatile.Read(ref stop))
        {
            guest.Channels.NotificationQueue(0).TryTake();
            if (!guest.Vcpu(0)->UpcallDue)
            {
                guest.Cpus[0].WaitForKick(long.MaxValue);
                continue;
            }

            Interlocked.Exchange(ref guest.Info(0)->EvtchnUpcallPending, 0);
            uint ready = Interlocked.Exchange(ref block[0], 0);
            while (ready != 0)
            {
                int priority = System.Numerics.BitOperations.TrailingZeroCount(ready);
                uint port = heads[priority] != 0 ? heads[priority] : Volatile.Read(ref block[2 + priority]);
                uint* word = guest.Word(port);
                uint link = Interlocked.And(ref *word, ~(FifoAbi.Linked | FifoAbi.LinkMask)) & FifoAbi.LinkMask;
                if (link == 0)
                    ready &= ~(1U << priority);
                heads[priority] = link;
                if ((Volatile.Read(ref *word) & FifoAbi.Pending) != 0)
                {
                    _ = Interlocked.And(ref *word, ~FifoAbi.Pending);
                    Volatile.Write(ref delivered[port], delivered[port] + 1);
                }

                ready |= Interlocked.Exchange(ref block[0], 0);
            }
        }
    }
}
