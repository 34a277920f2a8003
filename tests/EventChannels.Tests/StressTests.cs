// Senders and receivers on real threads.
using XenSharp.Core;
using static XenSharp.EventChannels.EventChannelOperation;

namespace XenSharp.EventChannels.Tests;

[TestFixture]
public sealed unsafe class StressTests
{
    private const int PortsPerSender = 64;
    private const int Rounds = 4000;

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    /// <summary>
    /// Four threads (two back ends, two vCPUs with IPIs) send on 64 ports each and then wait until each was delivered:
    /// 4 × 64 × 4000 sends, each of which must be delivered exactly once.
    /// </summary>
    [Test]
    public void AMillionSendsNoneLostNoneDoubled()
    {
        using var guest = new FakeDomain(1, 3);
        int[] delivered = new int[4096];
        bool stop = false;
        string? failure = null;
        var receiver = new Thread(() => Receive(guest, delivered, ref stop));
        receiver.Start();

        Action<int>[][] senders =
        [
            .. Enumerable.Range(0, 2).Select(_ => BackendSends(guest)),
            .. Enumerable.Range(1, 2).Select(vcpu => IpiSends(guest, vcpu)),
        ];
        uint port = 1;
        var threads = new List<Thread>();
        foreach (Action<int>[] sends in senders)
        {
            uint first = port;
            port += PortsPerSender;
            threads.Add(new Thread(() => SendRounds(sends, delivered, first, ref failure)));
        }

        threads.ForEach(thread => thread.Start());
        threads.ForEach(thread => thread.Join());
        Volatile.Write(ref stop, true);
        guest.Cpus[0].Kick();
        receiver.Join();
        Assert.That(failure, Is.Null);
        Assert.That(delivered[1..(int)port], Is.All.EqualTo(Rounds));
        Assert.That(delivered.Sum(), Is.EqualTo(4 * PortsPerSender * Rounds));
    }

    /// <summary>
    /// A million events between two domains, half of them each way: a number is put into a page that both have and sent for. What is read
    /// on an upcall never goes back, the last number is read, and there are no more upcalls than there were sends.
    /// </summary>
    [Test]
    public void AMillionEventsBetweenTwoDomainsKeepTheirOrder()
    {
        const int ports = 8;
        const int sends = 1_000_000 / (2 * ports);
        var directory = new Dictionary<ushort, EventChannelDomain>();
        using var first = new FakeDomain(1, 1, directory);
        using var second = new FakeDomain(2, 1, directory);
        uint[] remote = [.. Enumerable.Range(0, ports).Select(_ => second.AllocUnbound(1))];
        uint[] local = [.. remote.Select(port => first.BindInterdomain(2, port))];
        int[] toSecond = new int[4096];
        int[] toFirst = new int[4096];
        var counts = (First: new Arrivals(), Second: new Arrivals());
        Thread[] threads =
        [
            new(() => SendNumbers(first, local, remote, toSecond, sends)), new(() => SendNumbers(second, remote, local, toFirst, sends)),
            new(() => ReceiveNumbers(first, toFirst, local, sends, counts.First)), new(() => ReceiveNumbers(second, toSecond, remote, sends, counts.Second)),
        ];
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            Assert.That(thread.Join(s_patience * 4), "An event was lost.");
        foreach (Arrivals arrivals in (Arrivals[])[counts.First, counts.Second])
        {
            Assert.That(arrivals.Trouble, Is.Null);
            Assert.That(arrivals.Count, Is.InRange(ports, ports * sends));
        }
    }

    /// <summary>The same between a domain and a back end, which answers each number that it finds.</summary>
    [Test]
    public void EventsBetweenADomainAndABackendKeepTheirOrder()
    {
        const int sends = 500_000;
        using var guest = new FakeDomain(1, 2);
        EventChannelBackend backend = guest.Channels.AllocateBackend(out EventChannelPort port);
        int[] asked = new int[1];
        int[] answers = new int[4096];
        var arrivals = new Arrivals();
        var receiver = new Thread(() => ReceiveNumbers(guest, answers, [port.Value], sends, arrivals));
        receiver.Start();
        var sender = new Thread(() =>
        {
            for (int number = 1; number <= sends; number++)
            {
                Volatile.Write(ref asked[0], number);
                _ = guest.Port(Send, port.Value, vcpu: 1);
            }
        });
        sender.Start();
        int last = 0;
        int waits = 0;
        while (last < sends)
        {
            Assert.That(Wait(backend), Is.True);
            waits++;
            int number = Volatile.Read(ref asked[0]);
            Assert.That(number, Is.GreaterThanOrEqualTo(last));
            last = number;
            Volatile.Write(ref answers[port.Value], number);
            backend.Notify();
        }

        Assert.That(receiver.Join(s_patience), "An answer was lost.");
        sender.Join();
        Assert.That(arrivals.Trouble, Is.Null);
        Assert.That(waits, Is.InRange(1, sends));
        Assert.That(arrivals.Count, Is.InRange(1, waits));
    }

    /// <summary>
    /// A guest that does nothing but send to a back end, and one that floods itself, while nobody listens: nothing grows, and another
    /// domain's events come as before.
    /// </summary>
    [Test]
    public void AStormTakesNoMemoryAndNobodyElsesTurn()
    {
        const int pings = 200;
        using var hostile = new FakeDomain(1, 2);
        using var other = new FakeDomain(2, 1);
        EventChannelBackend flooded = hostile.Channels.AllocateBackend(out EventChannelPort floodedPort);
        uint ipi = hostile.BindIpi(1);
        bool stop = false;
        long allocated = -1;
        long sent = 0;
        Thread[] storm =
        [
            new(() =>
            {
                long before = 0;
                while (!Volatile.Read(ref stop))
                {
                    if (sent == 10_000)
                        before = GC.GetAllocatedBytesForCurrentThread();
                    _ = hostile.Port(Send, floodedPort.Value);
                    sent++;
                }

                allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            }),
            new(() => Repeat(ref stop, () =>
            {
                hostile.Acknowledge(1);
                _ = hostile.Port(Send, ipi, vcpu: 1);
            })),
        ];
        foreach (Thread thread in storm)
            thread.Start();
        Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref sent) > 20_000, s_patience));
        EventChannelBackend backend = other.Channels.AllocateBackend(out EventChannelPort port);
        for (int i = 0; i < pings; i++)
        {
            Assert.That(other.Port(Send, port.Value), Is.Zero);
            Assert.That(Wait(backend), Is.True);
            other.Acknowledge(0);
            other.SetPending(port.Value, false);
            backend.Notify();
            Assert.That(other.IsPending(port.Value));
        }

        Volatile.Write(ref stop, true);
        foreach (Thread thread in storm)
            thread.Join();
        Assert.That(allocated, Is.Zero, $"{sent} sends");

        // However many there were, they are one.
        Assert.That(Wait(flooded), Is.True);
        Assert.That(flooded.WaitAsync().AsTask().Wait(50), Is.False);
    }

    /// <summary>One side sends, the other closes and binds again, a third thread notifies, a fourth reads the status.</summary>
    [Test]
    public void ConnectionsBreakAndComeBackUnderFire()
    {
        var directory = new Dictionary<ushort, EventChannelDomain>();
        using var first = new FakeDomain(1, 2, directory);
        using var second = new FakeDomain(2, 2, directory);
        uint remote = second.AllocUnbound(1);
        uint local = first.BindInterdomain(2, remote);
        uint forBackend = second.AllocUnbound(0);
        bool stop = false;
        int sends = 0;
        long unexpected = 0;
        Thread[] threads =
        [
            new(() => Repeat(ref stop, () =>
            {
                long result = first.Port(Send, local);
                if (result is not (0 or -22))
                    unexpected = result;
                sends++;
            })),
            new(() => Repeat(ref stop, () => _ = second.Port(Send, remote, vcpu: 1))),
            new(() => Repeat(ref stop, () =>
            {
                using EventChannelBackend backend = second.Channels.BindBackend(new EventChannelPort(forBackend));
                backend.Notify();
            })),
        ];
        foreach (Thread thread in threads)
            thread.Start();
        Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref sends) > 0, s_patience));
        for (int i = 0; i < 20_000; i++)
        {
            Assert.That(first.Port(Close, local, vcpu: 1), Is.Zero);
            var bind = new EvtchnBindInterdomain { RemoteDomain = 2, RemotePort = remote };
            Assert.That(first.Call(BindInterdomain, ref bind, vcpu: 1), Is.Zero);
            Assert.That(bind.LocalPort, Is.EqualTo(local));
        }

        Volatile.Write(ref stop, true);
        foreach (Thread thread in threads)
            thread.Join();
        Assert.That((unexpected, sends), Is.EqualTo((0L, sends)));
    }

    /// <summary>Both close the same connection at once: the locks of both domains are asked for in opposite directions.</summary>
    [Test]
    public void BothEndsCloseAtOnce()
    {
        var directory = new Dictionary<ushort, EventChannelDomain>();
        using var first = new FakeDomain(1, 1, directory);
        using var second = new FakeDomain(2, 1, directory);
        using var barrier = new Barrier(2);
        var closer = new Thread(() => CloseMany(second, barrier)) { IsBackground = true };
        closer.Start();
        for (int i = 0; i < 2000; i++)
        {
            uint remote = second.AllocUnbound(1);
            uint local = first.BindInterdomain(2, remote);
            *(uint*)(second.ArgumentPage + 64) = remote;
            barrier.SignalAndWait();
            long result = first.Port(Close, local);
            barrier.SignalAndWait();
            Assert.That(result, Is.Zero);
            Assert.That(first.Channels.Context->State->ActivePorts, Is.Zero);
            Assert.That(second.Channels.Context->State->ActivePorts, Is.Zero);
        }

        closer.Join();
    }

    /// <summary>Domains end while back ends, timers and another domain still send to them.</summary>
    [Test]
    public void DomainsEndUnderFire()
    {
        for (int round = 0; round < 40; round++)
        {
            var directory = new Dictionary<ushort, EventChannelDomain>();
            using var survivor = new FakeDomain(1, 1, directory);
            var victim = new FakeDomain(2, 1, directory);
            uint local = survivor.BindInterdomain(2, victim.AllocUnbound(1));
            victim.BindVirq(Virq.Timer, 0);
            EventChannelBackend backend = victim.Channels.AllocateBackend(out _);
            EventChannelDomain channels = victim.Channels;
            bool stop = false;
            Thread[] threads =
            [
                new(() => Repeat(ref stop, backend.Notify)),
                new(() => Repeat(ref stop, () => channels.SendVirq(0, Virq.Timer))),
                new(() => Repeat(ref stop, () => _ = survivor.Port(Send, local))),
            ];
            foreach (Thread thread in threads)
                thread.Start();
            Thread.Yield();
            victim.Dispose();
            Volatile.Write(ref stop, true);
            foreach (Thread thread in threads)
                thread.Join();
            Assert.That(survivor.Status(local).Status, Is.EqualTo(EvtchnStatus.Unbound));
        }
    }

    /// <summary>While the lock of a port is held, as by who closes it, nothing is sent from it and nothing becomes pending on it.</summary>
    [Test]
    public void SendersWaitForThePortsLock()
    {
        using var guest = new FakeDomain(1, 1);
        uint ipi = guest.BindIpi(0);
        uint timer = guest.BindVirq(Virq.Timer, 0);
        EventChannelBackend backend = guest.Channels.AllocateBackend(out EventChannelPort port);
        EventChannelPortState* ports = guest.Channels.Context->Ports;
        foreach ((uint held, Action send) in new (uint, Action)[]
        {
            (ipi, () => guest.Port(Send, ipi)), (timer, () => guest.Channels.SendVirq(0, Virq.Timer)), (port.Value, backend.Notify),
        })
        {
            PortLock.Enter(ports + held);
            var sender = new Thread(() => send());
            sender.Start();
            bool early = sender.Join(30) || guest.IsPending(held);
            PortLock.Exit(ports + held);
            sender.Join();
            Assert.That((early, guest.IsPending(held)), Is.EqualTo((false, true)));
        }
    }

    [Test]
    public void SendingAllocatesNothing()
    {
        using var guest = new FakeDomain(1, 2);
        uint ipi = guest.BindIpi(1);
        guest.BindVirq(Virq.Timer, 1);
        EventChannelBackend backend = guest.Channels.AllocateBackend(out EventChannelPort port);
        long before = 0;
        for (int i = 0; i < 2000; i++)
        {
            // The first rounds pay for what is made once.
            if (i == 1000)
                before = GC.GetAllocatedBytesForCurrentThread();
            guest.Acknowledge(0);
            guest.Acknowledge(1);
            _ = guest.CallAt(Send, FakeDomain.Unmapped);
            *(uint*)guest.ArgumentPage = i % 2 == 0 ? ipi : port.Value;
            _ = guest.CallAt(Send, FakeDomain.Arguments);
            _ = guest.CallAt(Unmask, FakeDomain.Arguments);
            guest.Channels.SendVirq(1, Virq.Timer);
            backend.Notify();
            guest.Channels.NotificationQueue(0).TryTake();
            guest.Channels.NotificationQueue(1).TryTake();
        }

        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
        Assert.That(guest.Cpus[1].Kicks, Is.GreaterThanOrEqualTo(2000));
    }

    private static bool Wait(EventChannelBackend backend) => backend.WaitAsync().AsTask().WaitAsync(s_patience).GetAwaiter().GetResult();

    /// <summary>What came to a vCPU.</summary>
    private sealed class Arrivals
    {
        public int Count { get; set; }

        public string? Trouble { get; set; }
    }

    /// <summary>Sends on ports in turn, each with the next number in the far port's word.</summary>
    private static void SendNumbers(FakeDomain domain, uint[] ports, uint[] farPorts, int[] page, int sends)
    {
        for (int number = 1; number <= sends; number++)
        {
            for (int i = 0; i < ports.Length; i++)
            {
                Volatile.Write(ref page[farPorts[i]], number);
                _ = domain.Port(Send, ports[i]);
            }
        }
    }

    /// <summary>Takes upcalls until the last number of every port was read.</summary>
    private static void ReceiveNumbers(FakeDomain domain, int[] page, uint[] ports, int sends, Arrivals arrivals)
    {
        int[] last = new int[page.Length];
        int open = ports.Length;
        while (open > 0 && arrivals.Trouble == null)
        {
            TakeEvents(domain, port =>
            {
                int number = Volatile.Read(ref page[port]);
                arrivals.Count++;
                if (number < last[port])
                    arrivals.Trouble = $"port {port}: {number} after {last[port]}";
                open -= number == sends && last[port] != sends ? 1 : 0;
                last[port] = number;
            });
        }
    }

    private static void CloseMany(FakeDomain domain, Barrier barrier)
    {
        for (int i = 0; i < 2000; i++)
        {
            barrier.SignalAndWait();
            _ = domain.CallAt(Close, FakeDomain.Arguments + 64);
            barrier.SignalAndWait();
        }
    }

    private static void Repeat(ref bool stop, Action action)
    {
        while (!Volatile.Read(ref stop))
            action();
    }

    private static Action<int>[] BackendSends(FakeDomain guest)
    {
        var sends = new Action<int>[PortsPerSender];
        for (int i = 0; i < PortsPerSender; i++)
        {
            EventChannelBackend backend = guest.Channels.AllocateBackend(out _);
            sends[i] = _ => backend.Notify();
        }

        return sends;
    }

    private static Action<int>[] IpiSends(FakeDomain guest, int vcpu)
    {
        var sends = new Action<int>[PortsPerSender];
        for (int i = 0; i < PortsPerSender; i++)
        {
            uint port = guest.BindIpi(0);
            sends[i] = _ => guest.Port(Send, port, vcpu);
        }

        return sends;
    }

    private static void SendRounds(Action<int>[] sends, int[] delivered, uint first, ref string? failure)
    {
        for (int round = 1; round <= Rounds; round++)
        {
            foreach (Action<int> send in sends)
                send(round);
            long start = Environment.TickCount64;
            for (int i = 0; i < PortsPerSender; i++)
            {
                int count;
                while ((count = Volatile.Read(ref delivered[first + i])) < round)
                {
                    Thread.Yield();
                    if (Environment.TickCount64 - start > s_patience.TotalMilliseconds)
                    {
                        failure = $"port {first + i} in round {round}: lost";
                        return;
                    }
                }

                if (count > round)
                    failure = $"port {first + i} in round {round}: delivered {count} times";
            }
        }
    }

    /// <summary>The vCPU's thread and the guest's upcall handler in one.</summary>
    private static void Receive(FakeDomain guest, int[] delivered, ref bool stop)
    {
        while (!Volatile.Read(ref stop))
            TakeEvents(guest, port => Volatile.Write(ref delivered[port], delivered[port] + 1));
    }

    /// <summary>Waits for vCPU 0 to be kicked or to have an upcall due, and takes what is pending.</summary>
    private static void TakeEvents(FakeDomain guest, Action<int> take)
    {
        VcpuInfo* info = guest.Info(0);
        ulong* pending = (ulong*)(guest.Context->SharedInfo + SharedInfoLayout.EvtchnPending);
        guest.Channels.NotificationQueue(0).TryTake();
        if (!guest.Vcpu(0)->UpcallDue)
        {
            guest.Cpus[0].WaitForKick(long.MaxValue);
            return;
        }

        Interlocked.Exchange(ref info->EvtchnUpcallPending, 0);
        ulong selector = Interlocked.Exchange(ref info->EvtchnPendingSel, 0);
        for (int word = 0; word < 64; word++)
        {
            if ((selector >> word & 1) == 0)
                continue;
            ulong bits = Volatile.Read(ref pending[word]);
            for (int bit = 0; bit < 64; bit++)
            {
                if ((bits >> bit & 1) == 0)
                    continue;
                _ = Interlocked.And(ref pending[word], ~(1UL << bit));
                take((word * 64) + bit);
            }
        }
    }
}
