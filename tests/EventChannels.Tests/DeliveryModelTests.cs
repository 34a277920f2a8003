// The protocol between who sends an event and the vCPU that goes to sleep, in all interleavings of its steps.
using System.Collections.Immutable;

namespace XenSharp.EventChannels.Tests;

/// <summary>
/// A model of <see cref="TwoLevelAbi"/>, <see cref="VcpuNotificationQueue"/> and a vCPU thread as their remarks prescribe it. Each
/// step is one atomic access to what they share; every state that any order of steps reaches is looked at.
/// </summary>
[TestFixture]
public sealed class DeliveryModelTests
{
    /// <summary>Mistakes that the model must be able to find.</summary>
    public enum Fault
    {
        None,
        NoKick,
        KickBeforeBits,
        UpcallBeforeSelector,
        MaskCheckedBeforePending,
        SleepWithoutLooking,
        KickForgottenAtSleep,
        UnmaskWithoutLooking,
        PollWithoutAnnouncing,
        PollersNotChecked,
    }

    private const int Done = 99;

    /// <summary>Two ports (bits 0 and 1) of one word; agents are the senders 0 and 1, and who unmasks port 0.</summary>
    private readonly record struct State
    {
        public int Pending { get; init; }

        public int Mask { get; init; }

        public bool Selector { get; init; }

        public bool Upcall { get; init; }

        public bool Posted { get; init; }

        public bool Kicked { get; init; }

        public bool Polling { get; init; }

        public bool SeenSelector { get; init; }

        public int Delivered { get; init; }

        public int Sender0 { get; init; }

        public int Sender1 { get; init; }

        public int Unmasker { get; init; }

        public int Vcpu { get; init; }

        public bool MaskSeen { get; init; }
    }

    [Test]
    public void NoWakeupIsLost()
        => Assert.That(Explore(new State { Unmasker = Done }, Fault.None, polls: false).Lost, Is.False);

    [Test]
    public void NoWakeupIsLostWhileAPortIsBeingUnmasked()
        => Assert.That(Explore(new State { Mask = 1 }, Fault.None, polls: false).Lost, Is.False);

    [Test]
    public void NoPollIsLostForAMaskedPort()
        => Assert.That(Explore(new State { Mask = 3, Unmasker = Done }, Fault.None, polls: true).Lost, Is.False);

    [TestCase(Fault.NoKick), TestCase(Fault.KickBeforeBits), TestCase(Fault.UpcallBeforeSelector), TestCase(Fault.SleepWithoutLooking)]
    [TestCase(Fault.KickForgottenAtSleep)]
    public void FaultsOfSenderAndSleeperAreFound(Fault fault)
        => Assert.That(Explore(new State { Unmasker = Done }, fault, polls: false).Lost);

    [TestCase(Fault.MaskCheckedBeforePending), TestCase(Fault.UnmaskWithoutLooking)]
    public void FaultsOfUnmaskingAreFound(Fault fault) => Assert.That(Explore(new State { Mask = 1 }, fault, polls: false).Lost);

    [TestCase(Fault.PollWithoutAnnouncing), TestCase(Fault.PollersNotChecked)]
    public void FaultsOfPollingAreFound(Fault fault)
        => Assert.That(Explore(new State { Mask = 3, Unmasker = Done }, fault, polls: true).Lost);

    [Test]
    public void TheModelIsNotTrivial()
    {
        Assert.That(Explore(new State { Mask = 1 }, Fault.None, polls: false).States, Is.GreaterThan(1000));
        Assert.That(Explore(new State { Mask = 3, Unmasker = Done }, Fault.None, polls: true).States, Is.GreaterThan(50));
    }

    private static (bool Lost, int States) Explore(State start, Fault fault, bool polls)
    {
        var seen = new HashSet<State> { start };
        var open = new Stack<State>();
        open.Push(start);
        bool lost = false;
        while (open.TryPop(out State state))
        {
            ImmutableArray<State> next =
            [
                .. Sender(state, state.Sender0, 1, fault, (s, pc) => s with { Sender0 = pc }),
                .. Sender(state, state.Sender1, 2, fault, (s, pc) => s with { Sender1 = pc }),
                .. Unmask(state, fault),
                .. polls ? Poller(state, fault) : Vcpu(state, fault),
            ];

            // Nobody can do anything any more. The vCPU sleeps; nothing may be there for it.
            if (next.IsEmpty)
                lost |= polls ? state.Vcpu != Done : (state.Pending & ~state.Mask) != 0 || (state.Mask == 0 && state.Delivered != 3);
            foreach (State one in next.Where(seen.Add))
                open.Push(one);
        }

        return (lost, seen.Count);
    }

    private static IEnumerable<State> Sender(State s, int at, int port, Fault fault, Func<State, int, State> to)
    {
        switch (at)
        {
            case 0 when fault == Fault.KickBeforeBits:
                yield return to(s with { Posted = true, Kicked = true }, 1);
                break;
            case 0 when fault == Fault.MaskCheckedBeforePending && port == 1:
                yield return to(s with { MaskSeen = (s.Mask & port) != 0 }, 1);
                break;
            case 0 or 1:
                yield return to(s with { Pending = s.Pending | port }, (s.Pending & port) != 0 ? Done : 2);
                break;
            case 2:
                bool masked = fault == Fault.MaskCheckedBeforePending && port == 1 ? s.MaskSeen : (s.Mask & port) != 0;
                yield return to(s, masked ? 7 : fault == Fault.UpcallBeforeSelector ? 4 : 3);
                break;
            case 3:
                yield return to(s with { Selector = true }, s.Selector ? 7 : fault == Fault.UpcallBeforeSelector ? 5 : 4);
                break;
            case 4 when fault == Fault.UpcallBeforeSelector:
                yield return to(s with { Upcall = true }, 3);
                break;
            case 4:
                yield return to(s with { Upcall = true }, s.Upcall ? 7 : 5);
                break;
            case 5:
                yield return to(s with { Posted = true }, 6);
                break;
            case 6:
                yield return to(s with { Kicked = s.Kicked || fault is not (Fault.NoKick or Fault.KickBeforeBits) }, 7);
                break;
            case 7:
                // Whoever removes the poller from the set kicks it.
                bool wakes = s.Polling && fault != Fault.PollersNotChecked;
                yield return to(s with { Polling = s.Polling && !wakes }, wakes ? 8 : Done);
                break;
            case 8:
                yield return to(s with { Posted = true, Kicked = true }, Done);
                break;
        }
    }

    private static IEnumerable<State> Unmask(State s, Fault fault)
    {
        switch (s.Unmasker)
        {
            case 0:
                yield return s with { Mask = s.Mask & ~1, Unmasker = fault == Fault.UnmaskWithoutLooking ? Done : 1 };
                break;
            case 1:
                yield return s with { Unmasker = (s.Pending & 1) != 0 ? 2 : Done };
                break;
            case 2:
                yield return s with { Selector = true, Unmasker = s.Selector ? Done : 3 };
                break;
            case 3:
                yield return s with { Upcall = true, Unmasker = s.Upcall ? Done : 4 };
                break;
            case 4:
                yield return s with { Posted = true, Unmasker = 5 };
                break;
            case 5:
                yield return s with { Kicked = true, Unmasker = Done };
                break;
        }
    }

    /// <summary>Manager: take the notification, look, sleep. Guest: clear upcall, take selector, take ports.</summary>
    private static IEnumerable<State> Vcpu(State s, Fault fault)
    {
        switch (s.Vcpu)
        {
            case 0:
                yield return s with { Posted = false, Vcpu = 1 };
                break;
            case 1:
                yield return s with { Vcpu = s.Upcall ? 2 : fault == Fault.KickForgottenAtSleep ? 6 : 5 };
                break;
            case 2:
                yield return s with { Upcall = false, Vcpu = 3 };
                break;
            case 3:
                yield return s with { SeenSelector = s.Selector, Selector = false, Vcpu = 4 };
                break;
            case 4:
                int taken = s.SeenSelector ? s.Pending & ~s.Mask : 0;
                yield return s with
                {
                    Pending = s.Pending & ~taken,
                    Delivered = s.Delivered | taken,
                    SeenSelector = false,
                    Vcpu = fault == Fault.SleepWithoutLooking ? 6 : 0,
                };
                break;
            case 5 when s.Kicked:
                yield return s with { Kicked = false, Vcpu = 0 };
                break;
            case 6:
                yield return s with { Kicked = false, Vcpu = 5 };
                break;
        }
    }

    /// <summary>SCHEDOP_poll for both ports: announce, look at each, sleep.</summary>
    private static IEnumerable<State> Poller(State s, Fault fault)
    {
        switch (s.Vcpu)
        {
            case 0:
                yield return s with { Polling = fault != Fault.PollWithoutAnnouncing, Vcpu = 1 };
                break;
            case 1 or 2:
                yield return s with { Vcpu = (s.Pending & s.Vcpu) != 0 ? Done : s.Vcpu + 1 };
                break;
            case 3 when s.Kicked:
                yield return s with { Kicked = false, Vcpu = s.Polling ? 3 : Done };
                break;
        }
    }
}
