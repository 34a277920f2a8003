// The upcall mask, and ports that move between vCPUs, in all interleavings of their steps.
namespace XenSharp.EventChannels.Tests;

/// <summary>
/// Models of what the run loop, SCHEDOP_block, iret and bind_vcpu do with the bits that <see cref="TwoLevelAbi"/> sets. Each step is one
/// atomic access; every state that any order of steps reaches is looked at.
/// </summary>
[TestFixture]
public sealed class UpcallModelTests
{
    /// <summary>Mistakes that the models must be able to find.</summary>
    public enum Fault
    {
        None,

        /// <summary>SCHEDOP_block sleeps as soon as it has opened the mask.</summary>
        BlockWithoutLooking,

        /// <summary>The way back from iret, which opens the mask, does not look for an upcall.</summary>
        IretWithoutLooking,

        /// <summary>A kick that finds the mask closed counts for the sleep that follows.</summary>
        KickKeptFromLooking,

        /// <summary>A sender reads twice which vCPU it is to notify.</summary>
        TargetReadTwice,

        /// <summary>A move forgets the selector that was set for the old vCPU.</summary>
        MoveTakesSelector,
    }

    private const int Done = 99;

    /// <summary>One vCPU and two senders, of port 0 and of port 1.</summary>
    private readonly record struct Masked
    {
        public int Pending { get; init; }

        public bool Selector { get; init; }

        public bool Upcall { get; init; }

        public bool Mask { get; init; }

        public bool Kicked { get; init; }

        public int Sender0 { get; init; }

        public int Sender1 { get; init; }

        public int Delivered { get; init; }

        /// <summary>What the vCPU does next; the handler's steps are from 10 on.</summary>
        public int At { get; init; }

        /// <summary>Where the handler returns to.</summary>
        public int Interrupted { get; init; }

        /// <summary>Critical sections that are left.</summary>
        public int Sections { get; init; }
    }

    /// <summary>Two vCPUs, and a port that is sent on twice while it moves from the first to the second.</summary>
    private readonly record struct Moving
    {
        public bool Pending { get; init; }

        public int Target { get; init; }

        public int Selectors { get; init; }

        public int Upcalls { get; init; }

        public int Kicks { get; init; }

        public int Seen { get; init; }

        public int First { get; init; }

        public int Second { get; init; }

        public int Sender { get; init; }

        public int Chosen { get; init; }

        public int Sends { get; init; }

        public bool Moved { get; init; }

        public int Taken { get; init; }
    }

    [Test]
    public void NoUpcallIsLostToTheMask() => Assert.That(ExploreMask(Fault.None).Lost, Is.False);

    [TestCase(Fault.BlockWithoutLooking), TestCase(Fault.IretWithoutLooking), TestCase(Fault.KickKeptFromLooking)]
    public void FaultsOfTheMaskAreFound(Fault fault) => Assert.That(ExploreMask(fault).Lost);

    [Test]
    public void NoEventIsLostToAMove() => Assert.That(ExploreMove(Fault.None).Lost, Is.False);

    [TestCase(Fault.TargetReadTwice), TestCase(Fault.MoveTakesSelector)]
    public void FaultsOfMovingAreFound(Fault fault) => Assert.That(ExploreMove(fault).Lost);

    [Test]
    public void TheModelsAreNotTrivial()
    {
        Assert.That(ExploreMask(Fault.None).States, Is.GreaterThan(1000));
        Assert.That(ExploreMove(Fault.None).States, Is.GreaterThan(300));
    }

    private static (bool Lost, int States) ExploreMask(Fault fault)
        => Explore(
            new Masked { Sections = 2 },
            state =>
            [
                .. Send(state, state.Sender0, 1, (s, pc) => s with { Sender0 = pc }),
                .. Send(state, state.Sender1, 2, (s, pc) => s with { Sender1 = pc }),
                .. Vcpu(state, fault),
            ],
            static end => end.Pending != 0 || end.Delivered != 3);

    private static (bool Lost, int States) ExploreMove(Fault fault)
        => Explore(
            new Moving { Sends = 2 },
            state =>
            [
                .. Send(state, fault),
                .. Move(state, fault),
                .. Vcpu(state, 1, state.First, (s, pc) => s with { First = pc }),
                .. Vcpu(state, 2, state.Second, (s, pc) => s with { Second = pc }),
            ],
            static end => end.Pending || end.Taken == 0);

    private static (bool Lost, int States) Explore<T>(T start, Func<T, List<T>> steps, Func<T, bool> isLost)
        where T : struct
    {
        var seen = new HashSet<T> { start };
        var open = new Stack<T>();
        open.Push(start);
        bool lost = false;
        while (open.TryPop(out T state))
        {
            List<T> next = steps(state);

            // Nobody can do anything any more: whoever is left sleeps.
            lost |= next.Count == 0 && isLost(state);
            foreach (T one in next.Where(seen.Add))
                open.Push(one);
        }

        return (lost, seen.Count);
    }

    private static IEnumerable<Masked> Send(Masked s, int at, int port, Func<Masked, int, Masked> to)
    {
        switch (at)
        {
            case 0:
                yield return to(s with { Pending = s.Pending | port }, 1);
                break;
            case 1:
                yield return to(s with { Selector = true }, s.Selector ? Done : 2);
                break;
            case 2:
                yield return to(s with { Upcall = true }, s.Upcall ? Done : 3);
                break;
            case 3:
                yield return to(s with { Kicked = true }, Done);
                break;
        }
    }

    /// <summary>
    /// The guest closes the mask and opens it again, as often as it has sections, looking afterwards; then it closes it once more and has
    /// SCHEDOP_block open it, for ever.
    /// </summary>
    private static IEnumerable<Masked> Vcpu(Masked s, Fault fault)
    {
        // A kick finds the guest anywhere, and the manager looks before it goes on.
        if (s.Kicked && s.At is < 4 or >= 10 && !(fault == Fault.KickKeptFromLooking && s.Mask))
            yield return Enter(s with { Kicked = false }, s.At);
        switch (s.At)
        {
            case 0:
                yield return s with { At = s.Sections == 0 ? 3 : 1, Mask = true };
                break;
            case 1:
                yield return s with { Mask = false, At = 2 };
                break;
            case 2:
                // The guest asks for the upcall where one is pending.
                yield return s.Upcall ? Enter(s with { Sections = s.Sections - 1 }, 0) : s with { Sections = s.Sections - 1, At = 0 };
                break;
            case 3:
                yield return s with { Mask = false, At = fault == Fault.BlockWithoutLooking ? 5 : 4 };
                break;
            case 4:
                yield return s.Upcall && !s.Mask ? Enter(s, 3) : s with { At = 5 };
                break;
            case 5 when s.Kicked:
                yield return s with { Kicked = false, At = fault == Fault.KickKeptFromLooking ? 5 : 4 };
                break;
            case 10:
                yield return s with { Upcall = false, At = 11 };
                break;
            case 11:
                yield return s with { Selector = false, At = s.Selector ? 12 : 13 };
                break;
            case 12:
                yield return s with { Delivered = s.Delivered | s.Pending, Pending = 0, At = 13 };
                break;
            case 13:
                Masked back = s with { Mask = false };
                yield return fault == Fault.IretWithoutLooking ? back with { At = s.Interrupted == 3 ? 5 : s.Interrupted } : Enter(back, s.Interrupted);
                break;
        }
    }

    /// <summary>The way into the guest: by the handler, where an upcall is due.</summary>
    private static Masked Enter(Masked s, int at)
        => s.Upcall && !s.Mask ? s with { Mask = true, At = 10, Interrupted = at } : s with { At = at };

    private static IEnumerable<Moving> Send(Moving s, Fault fault)
    {
        switch (s.Sender)
        {
            case 0 when s.Sends > 0:
                yield return s with { Pending = true, Sender = s.Pending ? 5 : 1 };
                break;
            case 1:
                yield return s with { Chosen = s.Target, Sender = 2 };
                break;
            case 2:
                int vcpu = 1 << s.Chosen;
                yield return s with { Selectors = s.Selectors | vcpu, Sender = (s.Selectors & vcpu) != 0 ? 5 : fault == Fault.TargetReadTwice ? 6 : 3 };
                break;
            case 3:
                yield return s with { Upcalls = s.Upcalls | (1 << s.Chosen), Sender = (s.Upcalls & (1 << s.Chosen)) != 0 ? 5 : 4 };
                break;
            case 4:
                yield return s with { Kicks = s.Kicks | (1 << s.Chosen), Sender = 5 };
                break;
            case 5:
                yield return s with { Sends = s.Sends - 1, Sender = 0 };
                break;
            case 6:
                yield return s with { Chosen = s.Target, Sender = 3 };
                break;
        }
    }

    private static IEnumerable<Moving> Move(Moving s, Fault fault)
    {
        if (!s.Moved)
            yield return s with { Target = 1, Moved = true, Selectors = fault == Fault.MoveTakesSelector ? s.Selectors & ~1 : s.Selectors };
    }

    private static IEnumerable<Moving> Vcpu(Moving s, int bit, int at, Func<Moving, int, Moving> to)
    {
        switch (at)
        {
            case 0:
                yield return to(s, (s.Upcalls & bit) != 0 ? 1 : 4);
                break;
            case 1:
                yield return to(s with { Upcalls = s.Upcalls & ~bit }, 2);
                break;
            case 2:
                yield return to(s with { Seen = (s.Seen & ~bit) | (s.Selectors & bit), Selectors = s.Selectors & ~bit }, 3);
                break;
            case 3:
                bool takes = (s.Seen & bit) != 0 && s.Pending;
                yield return to(s with { Pending = s.Pending && !takes, Taken = s.Taken + (takes ? 1 : 0) }, 0);
                break;
            case 4 when (s.Kicks & bit) != 0:
                yield return to(s with { Kicks = s.Kicks & ~bit }, 0);
                break;
        }
    }
}
