// Steps that the scripts of two domains share.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Pairs;

/// <summary>Steps made of both areas' hypercalls, for one domain towards the other.</summary>
internal static class PairSteps
{
    /// <summary>EVTCHNSTAT_* of public event_channel.h.</summary>
    private const int Unbound = 1;

    /// <summary>
    /// Pseudo-physical frames that "a" has and "b", which has half as much memory, has not: their machine frames are no numbers of b's,
    /// even where each domain's are counted from the same start.
    /// </summary>
    private const ulong FirstFarPfn = 40UL << (20 - 12);

    /// <summary>Bytes of an entry of a grant table of version 1.</summary>
    public const int EntrySize = 8;

    /// <summary>Levels the ports of both and stops their periodic timers.</summary>
    public static void LevelPortsOfBoth(this AbiScript script) => script.Case("the low ports are taken", static (a, b) =>
    {
        foreach (AbiCase c in (AbiCase[])[a, b])
        {
            c.LevelPorts();
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
        }
    });

    /// <summary>An unbound port that the other domain may bind to; its number.</summary>
    public static Value Offer(this AbiCase c, string name = "port") => c.Tell(c.AllocUnbound(DomainIds.Self, c.Peer), name);

    /// <summary>Binds to a port of the other domain; the number of one's own.</summary>
    public static Value Bind(this AbiCase c, Value far, string name = "near") => c.Tell(c.BindInterdomain(c.Peer, far), name);

    /// <summary>A channel that the one domain offers and the other binds to: the port of each.</summary>
    public static (Value Offered, Value Bound) Connect(AbiCase from, AbiCase to, string name = "")
    {
        Value offered = from.Offer($"far{name}");
        return (offered, to.Bind(offered, $"near{name}"));
    }

    /// <summary>The status of a port of one's own, with what it says about its other end.</summary>
    public static void ShowPort(this AbiCase c, Value port)
    {
        ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
        c.ShowOther((Value.Load(status[StatusField.Detail]) & 0xffff).Named("domain of the far end"), c.Peer);
        c.Show(EventSteps.Field32(status[StatusField.RemotePort], "far port"));
    }

    /// <summary>A frame of "a" that "b" can tell from all of its own.</summary>
    /// <param name="c">The case of "a".</param>
    /// <param name="index">Which; the script's business.</param>
    /// <returns>Its machine frame, for either.</returns>
    public static Value FarFrame(this AbiCase c, int index = 0) => c.Tell(Value.Mfn(FirstFarPfn + (ulong)index), "frame of a");

    /// <summary>The frame that an L1 entry leads to, as the domain's own table has it.</summary>
    public static Value FrameAt(this AbiCase c, ScratchPage page)
        => c.Keep((c.Get(MemoryCalls.EntryInBootMapping(page.At, 1)) & Pte.Frame) >> 12, "the granted frame");

    /// <summary>Shows whether a number, which is another in each run, is not the one that it should be.</summary>
    public static void ShowOther(this AbiCase c, Value number, Value expected)
        => c.Show((number ^ expected).Named($"{number.Text} other than {expected.Text}"), AnswerFormat.Sign);

    /// <summary>Takes events by upcalls: nothing is pending, the own ports are unmasked.</summary>
    public static void TakeEvents(this AbiCase c)
    {
        c.QuietEvents();
        c.UnmaskOwnPorts();
        c.MaskUpcalls(false);
    }

    /// <summary>A hypercall that does nothing, on the way back from which what is due is delivered.</summary>
    public static void Nothing(this AbiCase c) => c.SchedOp(SchedulerOperation.Yield, "", 0);

    /// <summary>
    /// Waits until the other domain is gone: its end of a channel with it. Then until what is done after that is done, which nothing shows.
    /// </summary>
    /// <param name="c">The case.</param>
    /// <param name="port">A port that is bound to one of the other domain's.</param>
    public static void WaitForEnd(this AbiCase c, Value port)
    {
        c.WaitUnbound(port);
        c.Pause(TimeSpan.FromSeconds(1));
    }

    /// <summary>Waits until a port has no other end any more.</summary>
    public static void WaitUnbound(this AbiCase c, Value port)
    {
        ScriptBuffer status = c.Structure("status", StatusField.Size, (StatusField.Domain, 2, DomainIds.Self), (StatusField.Port, 4, port));
        c.Kernel($"status of {port.Text} until it is unbound", a =>
        {
            Label again = a.CreateLabel();
            a.Label(ref again);
            a.mov(edi, (int)SchedulerOperation.Yield);
            a.xor(esi, esi);
            a.mov(eax, (int)GuestHypercall.SchedOp);
            a.syscall();
            a.mov(edi, (int)EventOperation.Status);
            a.mov(rsi, status.Address);
            a.mov(eax, (int)GuestHypercall.EventChannelOp);
            a.syscall();
            a.mov(rdx, status.Address + StatusField.Status);
            a.cmp(__dword_ptr[rdx], Unbound);
            a.jne(again);
        }, show: [Register64.Rax]);
    }

    /// <summary>Shows the flags of an entry of version 1.</summary>
    public static void ShowFlags(this AbiCase c, ScratchPage table, int reference) => c.Load(table[reference * EntrySize], 2);

    /// <summary>XENMEM_current_reservation: how many pages the domain has.</summary>
    public static Value PageCount(this AbiCase c)
        => c.MemoryOp("current_reservation", Xenmem.CurrentReservation, c.Structure("domain", 8, (0, 2, DomainIds.Self)), AnswerFormat.Sign);
}
