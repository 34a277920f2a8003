// The FIFO ABI's protocol between who appends to a queue and the guest that takes from it, in all interleavings of their steps.
namespace XenSharp.EventChannels.Tests;

/// <summary>
/// A model of <see cref="FifoAbi"/> and of Linux's consumer. Each step is one atomic access to what they share; every state that any
/// order of steps reaches is looked at. Port 1 moves from queue 0 to queue 1 between its two events; both of port 2's are on queue 0.
/// </summary>
[TestFixture]
public sealed class FifoModelTests
{
    /// <summary>Mistakes that the model must be able to find.</summary>
    public enum Fault
    {
        None,
        NoLock,
        HeadNotSet,
        ReadyBeforeLinking,
        MaskCheckedBeforePending,
        LinkedTailNotLooked,
        TailNotInvalidated,
        UnmaskWithoutLooking,
    }

    private const int Done = 99;
    private const int Rounds = 2;

    private struct State : IEquatable<State>
    {
        /// <summary>A bit for each port.</summary>
        public int Pending, Masked, Linked;

        /// <summary>By port.</summary>
        public Pair Link, Sent, Seen, Delivered, LastQueue, At, Round, WasMasked, Appended;

        /// <summary>By queue.</summary>
        public Pair Tail, Head, Taken;

        public int Ready, Upcall, Lock, Unmasker;

        /// <summary>The consumer's.</summary>
        public int Vcpu, Seeing, Queue, Port, WrongQueue;

        public readonly bool Equals(State other)
            => System.Runtime.InteropServices.MemoryMarshal.AsBytes(new ReadOnlySpan<State>(in this))
                .SequenceEqual(System.Runtime.InteropServices.MemoryMarshal.AsBytes(new ReadOnlySpan<State>(in other)));

        public override readonly bool Equals(object? other) => other is State state && Equals(state);

        public override readonly int GetHashCode()
        {
            var hash = default(HashCode);
            hash.AddBytes(System.Runtime.InteropServices.MemoryMarshal.AsBytes(new ReadOnlySpan<State>(in this)));
            return hash.ToHashCode();
        }
    }

    [System.Runtime.CompilerServices.InlineArray(3)]
    private struct Pair
    {
        private int _element;
    }

    [Test]
    public void NothingIsLostAndNothingIsDoubled()
        => Assert.That(Explore(new State { Unmasker = Done }, Fault.None).Wrong, Is.Null);

    [Test]
    public void NothingIsLostWhileAPortIsBeingUnmasked()
        => Assert.That(Explore(new State { Masked = 1 << 1 }, Fault.None).Wrong, Is.Null);

    [TestCase(Fault.NoLock), TestCase(Fault.HeadNotSet), TestCase(Fault.ReadyBeforeLinking), TestCase(Fault.LinkedTailNotLooked)]
    [TestCase(Fault.TailNotInvalidated)]
    public void FaultsOfAppendingAreFound(Fault fault)
        => Assert.That(Explore(new State { Unmasker = Done }, fault).Wrong, Is.Not.Null);

    [TestCase(Fault.None), TestCase(Fault.MaskCheckedBeforePending), TestCase(Fault.UnmaskWithoutLooking)]
    public void FaultsOfUnmaskingAreFound(Fault fault)
    {
        // The last event only: an earlier one would be pending, and looked at.
        var start = new State { Masked = 1 << 1 };
        start.Round[1] = start.Sent[1] = Rounds - 1;
        Assert.That(Explore(start, fault).Wrong, fault == Fault.None ? Is.Null : Is.Not.Null);
    }

    [Test]
    public void TheModelIsNotTrivial() => Assert.That(Explore(new State { Masked = 1 << 1 }, Fault.None).States, Is.GreaterThan(10_000));

    private static (string? Wrong, int States) Explore(State start, Fault fault)
    {
        var seen = new HashSet<State> { start };
        var open = new Stack<State>();
        open.Push(start);
        string? wrong = null;
        while (wrong == null && open.TryPop(out State state))
        {
            bool moved = false;
            for (int agent = 0; agent < 4; agent++)
            {
                State next = state;
                bool moves = agent switch { 0 => Consume(ref next), 3 => Unmask(ref next, fault), _ => Send(ref next, agent, fault) };
                moved |= moves;
                if (moves && seen.Add(next))
                    open.Push(next);
            }

            if (state.WrongQueue != 0)
                wrong = "a port was taken from a queue that it is not on";
            for (int port = 1; port <= 2; port++)
            {
                if (state.Delivered[port] > state.Sent[port])
                    wrong = $"port {port} came more often than it was sent";

                // Nobody can do anything any more.
                if (!moved && state.Seen[port] != Rounds)
                    wrong = $"the last event of port {port} was lost";
            }
        }

        return (wrong, seen.Count);
    }

    private static bool Send(ref State s, int port, Fault fault)
    {
        int bit = 1 << port;
        int queue = port == 1 ? s.Round[port] : 0;
        switch (s.At[port])
        {
            case 0 when s.Round[port] == Rounds || (s.Lock != 0 && fault != Fault.NoLock):
                return false;
            case 0:
                s.Lock = port;
                s.Sent[port]++;
                s.Appended[port] = 1;
                s.WasMasked[port] = s.Masked & bit;
                s.At[port] = fault == Fault.ReadyBeforeLinking ? 8 : 1;
                return true;
            case 1:
                s.Pending |= bit;
                s.At[port] = 2;
                return true;
            case 2:
                bool masked = fault == Fault.MaskCheckedBeforePending ? s.WasMasked[port] != 0 : (s.Masked & bit) != 0;
                s.At[port] = masked ? 7 : 3;
                return true;
            case 3:
                s.At[port] = (s.Linked & bit) != 0 ? 7 : 4;
                s.Linked |= bit;
                return true;
            case 4:
                // What only who holds the lock knows goes with the step.
                if (s.Tail[s.LastQueue[port]] == port && fault != Fault.TailNotInvalidated)
                    s.Tail[s.LastQueue[port]] = 0;
                s.LastQueue[port] = queue;
                int tail = s.Tail[queue];
                bool linked = tail != 0 && ((s.Linked & (1 << tail)) != 0 || fault == Fault.LinkedTailNotLooked);
                if (linked)
                    s.Link[tail] = port;
                s.Appended[port] = linked ? 1 : 0;
                s.At[port] = 5;
                return true;
            case 5:
                if (s.Appended[port] == 0 && fault != Fault.HeadNotSet)
                    s.Head[queue] = port;
                s.At[port] = 6;
                return true;
            case 6:
                s.Tail[queue] = port;
                s.At[port] = 7;
                return true;
            case 7:
                s.Lock = 0;
                s.At[port] = s.Appended[port] == 0 && fault != Fault.ReadyBeforeLinking ? 8 : 10;
                return true;
            case 8:
                s.At[port] = (s.Ready & (1 << queue)) != 0 ? (fault == Fault.ReadyBeforeLinking ? 1 : 10) : 9;
                s.Ready |= 1 << queue;
                return true;
            case 9:
                s.Upcall = 1;
                s.At[port] = fault == Fault.ReadyBeforeLinking ? 1 : 10;
                return true;
            default:
                s.Round[port]++;
                s.At[port] = 0;
                return true;
        }
    }

    /// <summary>Unmasks port 1: by itself where it is not pending, else by the hypercall, which appends it under the lock.</summary>
    private static bool Unmask(ref State s, Fault fault)
    {
        switch (s.Unmasker)
        {
            case 0 when (s.Pending & 2) == 0 || fault == Fault.UnmaskWithoutLooking:
                s.Masked = 0;
                s.Unmasker = Done;
                return true;
            case 0:
                s.Unmasker = 1;
                return true;
            case 1:
                s.Masked = 0;
                s.Unmasker = 2;
                return true;
            case 2 when (s.Pending & 2) == 0:
                s.Unmasker = Done;
                return true;
            case 2 when s.Lock == 0:
                // As a sender does, in one step: the steps themselves are looked at with the senders.
                s.Unmasker = Done;
                if ((s.Linked & 2) != 0)
                    return true;
                int queue = Math.Min(s.Round[1], Rounds - 1);
                s.Pending |= 2;
                s.Linked |= 2;
                if (s.Tail[s.LastQueue[1]] == 1)
                    s.Tail[s.LastQueue[1]] = 0;
                s.LastQueue[1] = queue;
                int tail = s.Tail[queue];
                s.Tail[queue] = 1;
                if (tail != 0 && (s.Linked & (1 << tail)) != 0)
                {
                    s.Link[tail] = 1;
                    return true;
                }

                s.Head[queue] = 1;
                s.Unmasker = (s.Ready & (1 << queue)) != 0 ? Done : 3;
                s.Ready |= 1 << queue;
                return true;
            case 3:
                s.Upcall = 1;
                s.Unmasker = Done;
                return true;
            default:
                return false;
        }
    }

    /// <summary>The guest: clear the upcall, take READY, take ports from the queues' heads while there are any.</summary>
    private static bool Consume(ref State s)
    {
        switch (s.Vcpu)
        {
            case 0 when s.Upcall == 0:
                return false;
            case 0:
                s.Upcall = 0;
                s.Vcpu = 1;
                return true;
            case 1:
                s.Seeing |= s.Ready;
                s.Ready = 0;
                s.Vcpu = s.Seeing == 0 ? 0 : 2;
                return true;
            case 2:
                s.Queue = (s.Seeing & 1) != 0 ? 0 : 1;
                s.Port = s.Taken[s.Queue] != 0 ? s.Taken[s.Queue] : s.Head[s.Queue];
                s.Vcpu = s.Port == 0 ? 5 : 3;
                return true;
            case 3:
                s.WrongQueue |= s.LastQueue[s.Port] == s.Queue ? 0 : 1;
                s.Linked &= ~(1 << s.Port);
                s.Taken[s.Queue] = s.Link[s.Port];
                s.Link[s.Port] = 0;
                if (s.Taken[s.Queue] == 0)
                    s.Seeing &= ~(1 << s.Queue);
                s.Vcpu = (s.Pending & ~s.Masked & (1 << s.Port)) != 0 ? 4 : 1;
                return true;
            case 4:
                s.Pending &= ~(1 << s.Port);
                s.Delivered[s.Port]++;
                s.Vcpu = 6;
                return true;
            case 5:
                // A queue that is said to be ready and has nothing.
                s.Seeing &= ~(1 << s.Queue);
                s.Vcpu = 1;
                return true;
            default:
                s.Seen[s.Port] = s.Sent[s.Port];
                s.Vcpu = 1;
                return true;
        }
    }
}
