// Guests that write what they like into everything they share, and call what they like with it.
using CsCheck;
using XenSharp.Core;

namespace XenSharp.EventChannels.Tests;

[TestFixture]
public sealed unsafe class HostileGuestTests
{
    private static readonly long[] s_errors = [0, -1, -2, -3, -11, -13, -14, -16, -17, -22, -28, -38, -95];

    /// <summary>One step of a guest: what it writes over shared_info, and what it calls.</summary>
    private readonly record struct Step(int Domain, int Vcpu, int Operation, uint A, uint B, uint C, uint Noise, int Address);

    /// <summary>Pairs of domain ids, and frames, as an operation's first word.</summary>
    private static readonly uint[] s_domains = [0x7ff0, 0x7ff0_0000, 0x1_0002, 0x2_0001, 0x2_7ff0, (uint)FakeDomain.FifoFrame, (uint)FakeDomain.FifoFrame + 1];

    private static readonly Gen<uint> s_word = Gen.OneOf(
        Gen.UInt[0, 8], Gen.UInt[0, 70], Gen.UInt[0, 4100], Gen.UInt, Gen.Int[0, 6].Select(i => s_domains[i]));

    private static readonly Gen<Step> s_step = Gen.Select(
        Gen.Select(Gen.Int[0, 1], Gen.Int[0, 1], Gen.Int[0, 20]), Gen.Select(s_word, s_word, s_word), Gen.UInt, Gen.Int[0, 40])
        .Select(t => new Step(t.Item1.Item1, t.Item1.Item2, t.Item1.Item3, t.Item2.Item1, t.Item2.Item2, t.Item2.Item3, t.Item3, t.Item4));

    [Test]
    public void NothingThrowsNothingIsTouchedAndTheTablesStaySound()
    {
        // The same steps in every run.
        var random = new PCG(1, 20260);
        Gen<Step[]> guests = s_step.Array[1, 400];
        for (int i = 0; i < 150; i++)
            Run(guests.Generate(random, null, out _), fifo: i % 2 == 1);
    }

    /// <summary>Another vCPU never stops changing the words that a sender has to change.</summary>
    [Test]
    public void SenderIsNotHeldUpByWhoFightsForItsWords()
    {
        using var guest = new FakeDomain(1, 2);
        uint port = guest.BindIpi(1);
        nint pending = (nint)(guest.Context->SharedInfo + SharedInfoLayout.EvtchnPending);
        nint info = (nint)guest.Info(1);
        bool stop = false;
        var fighter = new Thread(() =>
        {
            while (!Volatile.Read(ref stop))
            {
                Interlocked.Increment(ref *(ulong*)pending);
                Interlocked.Increment(ref ((VcpuInfo*)info)->EvtchnPendingSel);
                Interlocked.Exchange(ref ((VcpuInfo*)info)->EvtchnUpcallPending, 0xfe);
            }
        });
        fighter.Start();
        long result = 0;
        for (int i = 0; i < 100_000; i++)
            result |= guest.Port(EventChannelOperation.Send, port) | guest.Port(EventChannelOperation.Unmask, port);
        Volatile.Write(ref stop, true);
        fighter.Join();
        Assert.That(result, Is.Zero);
        Assert.That(guest.CanariesIntact);
    }

    private static void Run(Step[] steps, bool fifo)
    {
        var directory = new Dictionary<ushort, EventChannelDomain>();
        using var first = new FakeDomain(1, 2, directory, maxPort: 200);
        using var second = new FakeDomain(2, 2, directory);
        EventChannelBackend backend = first.Channels.AllocateBackend(out _);
        FakeDomain[] domains = [first, second];
        if (fifo)
            second.EnterFifo(pages: 4);
        foreach (Step step in steps)
        {
            FakeDomain domain = domains[step.Domain];
            new Random((int)step.Noise).NextBytes(domain.SharedInfo);
            new Random((int)step.Noise).NextBytes(domain.FifoPages);
            uint* words = (uint*)domain.ArgumentPage;
            (words[0], words[1], words[2]) = (step.A, step.B, step.C);
            long result = Take(domain, step, backend);
            if (Array.IndexOf(s_errors, result) < 0)
                throw new InvalidOperationException($"{step} returned {result}");
            if (!first.CanariesIntact || !second.CanariesIntact)
                throw new InvalidOperationException($"{step} wrote beside the domain's memory");
            CheckTables(first.Channels.Context, first.Channels, directory);
            CheckTables(second.Channels.Context, second.Channels, directory);
            CheckQueues(first);
            CheckQueues(second);
        }
    }

    private static long Take(FakeDomain domain, Step step, EventChannelBackend backend)
    {
        ulong address = step.Address switch { 0 => FakeDomain.Unmapped, 1 => FakeDomain.ReadOnly, 2 => step.A * 0x1_0001_0001UL, _ => FakeDomain.Arguments };
        VcpuContext* vcpu = domain.Vcpu(step.Vcpu);
        switch (step.Operation)
        {
            case <= 15:
                return domain.Channels.Execute(vcpu, new HypercallArguments { A0 = (ulong)step.Operation, A1 = address });
            case 16:
                return domain.Channels.ExecuteCompat(vcpu, new HypercallArguments { A0 = address });
            case 17:
                backend.Notify();
                return 0;
            case 18:
                domain.Channels.SendVirq((int)(step.B % 128), (int)(step.C % Virq.Count));
                return 0;
            case 19:
                domain.Channels.BeginPoll(step.Vcpu);
                long pending = domain.Channels.IsPending(step.B);
                domain.Channels.NarrowPoll(step.Vcpu, step.A);
                return Math.Min(pending, 0);
            default:
                domain.Channels.EndPoll(step.Vcpu);
                domain.Channels.VcpuInfoMoved(step.Vcpu);
                return 0;
        }
    }

    private static void CheckQueues(FakeDomain domain)
    {
        EventChannelContext* context = domain.Channels.Context;
        bool sound = domain.Channels.HeldFrames.Count == domain.Held.Total && (context->Fifo->InUse != 0 || domain.Held.Total == 0);
        for (int vcpu = 0; vcpu < EventChannelState.MaxVcpus; vcpu++)
        {
            for (int priority = 0; priority < FifoAbi.Priorities; priority++)
            {
                FifoQueue queue = context->FifoVcpus[vcpu].Queues[priority];
                sound &= queue.Lock == 0 && (queue.Tail == 0 || queue.Tail < context->Fifo->Words);
            }
        }

        if (!sound)
            throw new InvalidOperationException($"the queues of domain {domain.Channels.Id.Value} are unsound");
    }

    private static void CheckTables(EventChannelContext* context, EventChannelDomain self, Dictionary<ushort, EventChannelDomain> directory)
    {
        uint active = 0;
        for (uint port = 1; port < context->State->ValidPorts; port++)
        {
            EventChannelPortState state = context->Ports[port];
            active += state.IsUsable ? 1u : 0;
            bool sound = state.Lock == 0 && state is { NotifyVcpu: < 2, Priority: < FifoAbi.Priorities, LastQueue: < 2 * FifoAbi.Priorities } && (!state.IsUsable || port < context->State->ValidPorts);
            if (state.State == ChannelState.Virq)
                sound &= context->Vcpus[Virq.IsGlobal(state.Virq) ? 0 : state.NotifyVcpu].Virqs[state.Virq] == port;
            if (state.State == ChannelState.Interdomain && state.RemoteDomain != 0)
            {
                EventChannelPortState far = directory[state.RemoteDomain].Context->Ports[state.RemotePort];
                sound &= far.State == ChannelState.Interdomain && far.RemotePort == port && far.RemoteDomain == self.Id.Value;
            }

            if (!sound)
                throw new InvalidOperationException($"port {port} of domain {self.Id.Value} is {state.State} and unsound");
        }

        if (active != context->State->ActivePorts)
            throw new InvalidOperationException($"{active} ports are in use, {context->State->ActivePorts} are counted");
    }
}
