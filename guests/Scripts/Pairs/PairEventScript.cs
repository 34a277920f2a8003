// event_channel_op between two domains.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairEventScript
{
    private const int NoPort = 60;
    private const int LastPort = 4095;

    /// <summary>The end of the page that both domains have, which no value comes to.</summary>
    private const ulong LastNote = ProbeLayout.PairPage + ProbeLayout.PageSize - 8;

    public static AbiScript CreateChannels() => AbiScript.OfPair("pair-event-channels", "event_channel_op between domains", script =>
    {
        script.LevelPortsOfBoth();
        script.Case("a port that waits for the other domain", static (a, b) =>
        {
            Value port = a.Offer();
            a.Show(port);
            a.ShowPort(port);
            b.PortStatus(b.Peer, port);
            b.PortStatus(DomainIds.Self, port);
            b.Send(port);
            b.ClosePort(port);
            a.ShowPort(port);
            a.Send(port);
            a.ShowPending();
            b.ShowPending();
            a.ClosePort(port);
            a.PortStatus(DomainIds.Self, port);
        });
        script.Case("both ends of a channel", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.Show(near);
            b.ShowPending();
            a.ShowPending();
            a.ShowPort(far);
            b.ShowPort(near);
            b.ClosePort(near);
            b.ShowPending();
            b.PortStatus(DomainIds.Self, near);
            a.ShowPort(far);
            a.ClosePort(far);
            a.PortStatus(DomainIds.Self, far);
        });
        script.Case("a second channel that goes the other way", static (a, b) =>
        {
            (Value farOfA, Value nearOfB) = PairSteps.Connect(a, b, " of a");
            (Value farOfB, Value nearOfA) = PairSteps.Connect(b, a, " of b");
            a.ShowPort(farOfA);
            a.ShowPort(nearOfA);
            b.ShowPort(farOfB);
            b.ShowPort(nearOfB);
            a.QuietEvents();
            b.QuietEvents();
            a.Send(nearOfA);
            b.ShowPending();
            b.Send(nearOfB);
            a.ShowPending();
            a.ClosePort(farOfA);
            a.ClosePort(nearOfA);
            b.ClosePort(farOfB);
            b.ClosePort(nearOfB);
        });
        script.Case("domains that bind_interdomain refuses", static (a, b) =>
        {
            Value port = a.Offer();
            foreach (Value domain in (Value[])[DomainIds.Self, DomainIds.Absent, DomainIds.Xen, DomainIds.Io, DomainIds.Invalid, b.Own])
                b.BindInterdomain(domain, port);
            a.BindInterdomain(DomainIds.Self, port);
            a.BindInterdomain(a.Own, port);
            a.BindInterdomain(a.Peer, port);
            a.ShowPort(port);
            b.ShowPending();
            a.ClosePort(port);
        });
        script.Case("far ports that bind_interdomain refuses", static (a, b) =>
        {
            Value absent = a.Tell(a.AllocUnbound(DomainIds.Self, DomainIds.Absent), "for an absent domain");
            Value own = a.Tell(a.AllocUnbound(DomainIds.Self, DomainIds.Self), "for itself");
            Value ipi = a.Tell(a.BindIpi(0), "ipi port");
            Value virq = a.Tell(a.BindVirq(Virq.Debug, 0), "virq port");
            foreach (Value port in (Value[])[absent, own, ipi, virq, 0, NoPort, 64, LastPort, LastPort + 1, 0xffff_ffffU])
                b.BindInterdomain(b.Peer, port);
            Value next = b.Tell(b.AllocUnbound(DomainIds.Self, DomainIds.Self), "next");
            b.Show(next);
            b.ClosePort(next);
            foreach (Value port in (Value[])[absent, own, ipi, virq])
                a.ClosePort(port);
        });
        script.Case("a channel cannot be bound to twice", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.BindInterdomain(b.Peer, far);
            a.BindInterdomain(a.Peer, near);
            a.ShowPort(far);
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("what is for privileged domains", static (a, b) =>
        {
            b.AllocUnbound(b.Peer, b.Own);
            b.AllocUnbound(b.Peer, DomainIds.Self);
            b.AllocUnbound(b.Own, b.Peer, "own");
            b.ClosePort(EventSteps.FirstPort);
            b.PortStatus(b.Peer, 1);
            b.EventChannelOp(EventOperation.Reset, "b of a", b.Structure("domain", 8, (0, 2, b.Peer)));
            b.EventChannelOp(EventOperation.ResetContinue, "b of a", b.Structure("domain", 8, (0, 2, b.Peer)));
            a.PortStatus(DomainIds.Self, 1);
        });
        script.Case("events go both ways", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            a.QuietEvents();
            b.QuietEvents();
            a.Send(far);
            a.ShowPending();
            b.ShowPending();
            b.ShowUpcallState();
            a.Send(far);
            b.ShowPending();
            b.Send(near);
            a.ShowPending();
            b.QuietEvents();
            b.Send(near);
            b.ShowPending();
            a.QuietEvents();
            a.ShowPending();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("events are taken by upcalls", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            a.TakeEvents();
            b.TakeEvents();
            for (int i = 0; i < 3; i++)
            {
                a.Send(far);
                b.Send(near);
            }

            a.QuietEvents();
            b.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("an event of a masked port is delivered when it is unmasked", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.QuietEvents();
            b.MaskUpcalls(false);
            a.Send(far);
            b.ShowPending();
            b.ShowMasked();
            b.ShowUpcallState();
            b.Unmask(near);
            b.ShowMasked();
            a.Send(far);
            b.Nothing();
            b.QuietEvents();
            b.ClosePort(near);
            a.ClosePort(far);
        });
        script.Case("an event waits while upcalls are masked", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.QuietEvents();
            b.UnmaskOwnPorts();
            a.Send(far);
            b.ShowPending();
            b.ShowUpcallState();
            a.Send(far);
            b.MaskUpcalls(false);
            b.Nothing();
            b.ShowUpcallState();
            b.QuietEvents();
            b.ClosePort(near);
            a.ClosePort(far);
        });
        script.Case("pending before the far end is bound", static (a, b) =>
        {
            Value far = a.Offer("far");
            a.QuietEvents();
            a.Store(Value.Constant(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending, "event bits"), 8, 1UL << EventSteps.FirstPort);
            b.QuietEvents();
            b.UnmaskOwnPorts();
            b.MaskUpcalls(false);
            Value near = b.Bind(far);
            b.ShowPending();
            a.ShowPending();
            a.ShowUpcallState();
            a.Unmask(far);
            a.ShowUpcallState();
            a.QuietEvents();
            b.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("the end that was offered is closed, and then bound to from there", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.QuietEvents();
            a.ClosePort(far);
            b.ShowPending();
            b.ShowPort(near);
            b.Send(near);
            b.ShowPending();
            a.PortStatus(DomainIds.Self, far);
            Value again = a.Bind(near, "again");
            a.Show(again);
            a.ShowPending();
            b.ShowPending();
            b.ShowPort(near);
            b.Send(near);
            a.ShowPending();
            a.QuietEvents();
            b.ClosePort(near);
            a.ShowPort(again);
            a.ClosePort(again);
        });
        script.Case("the end that was bound is closed and bound again", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.ClosePort(near);
            a.Send(far);
            a.ShowPort(far);
            b.ShowPending();
            Value again = b.Bind(far, "again");
            b.ShowPending();
            b.ShowOther(again, near);
            a.ShowPort(far);
            b.QuietEvents();
            b.ClosePort(again);
            a.ClosePort(far);
        });
        script.Case("closing takes the own event away and leaves the other's", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            a.QuietEvents();
            b.QuietEvents();
            a.Send(far);
            b.Send(near);
            a.ClosePort(far);
            a.ShowPending();
            b.ShowPending();
            b.ClosePort(near);
            b.ShowPending();
            a.QuietEvents();
            b.QuietEvents();
        });
        script.Case("ports with events of their own", static (a, b) =>
        {
            var channels = new List<(Value Far, Value Near)>();
            for (int i = 0; i < 5; i++)
                channels.Add(PairSteps.Connect(a, b, $"{i}"));
            a.QuietEvents();
            b.QuietEvents();
            foreach (int i in (int[])[0, 2, 4])
                a.Send(channels[i].Far);
            foreach (int i in (int[])[1, 2, 3])
                b.Send(channels[i].Near);
            a.ShowPending();
            b.ShowPending();
            a.QuietEvents();
            b.QuietEvents();
            a.ClosePort(channels[2].Far);
            a.Send(channels[3].Far);
            b.Send(channels[2].Near);
            a.ShowPending();
            b.ShowPending();
            Value again = a.Offer("again");
            a.ShowOther(again, channels[2].Far);
            b.BindInterdomain(b.Peer, again);
            a.ClosePort(again);
            foreach ((int i, (Value far, Value near)) in channels.Index())
            {
                if (i != 2)
                    a.ClosePort(far);
                b.ClosePort(near);
            }

            b.ClosePort(EventSteps.FirstPort + 5);
        });
        script.Case("a channel is moved to another vCPU", static (a, b) =>
        {
            b.VcpuContext(1, static _ => { });
            (Value far, Value near) = PairSteps.Connect(a, b);
            Value other = Value.Load(ProbeLayout.VcpuInfoPointer(0)) + VcpuInfoField.Size;
            b.QuietEvents();
            b.BindVcpu(near, 1);
            b.ShowPort(near);
            b.UnmaskOwnPorts();
            a.Send(far);
            b.ShowPending();
            b.ShowUpcallState();
            b.Load((other + VcpuInfoField.UpcallPending).Named("upcall pending of vCPU 1"), 1);
            b.Load((other + VcpuInfoField.PendingSelector).Named("pending selector of vCPU 1"));
            b.BindVcpu(near, 0);
            b.ShowUpcallState();
            b.ClearPending();
            a.Send(far);
            b.ShowUpcallState();
            b.BindVcpu(near, 100);
            b.ClosePort(near);
            b.BindVcpu(near, 0);
            a.BindVcpu(far, 0);
            a.ShowPort(far);
            a.ClosePort(far);
            b.QuietEvents();
        });
        script.Case("polling for an event of the other domain", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.QuietEvents();
            a.Send(far);
            b.Poll(near, "without a timeout", 0);
            b.ShowPending();
            b.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("the other domain's event ends a poll", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.QuietEvents();
            a.SendLater(1, far);
            b.Poll(near, "10 s", Value.SystemTime + Seconds(10));
            b.ShowPending();
            a.Join(1, TimeSpan.FromSeconds(5));
            b.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("the other domain's event ends a block", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.TakeEvents();
            a.SendLater(2, far);
            b.SchedOp(SchedulerOperation.Block, "", 0);
            a.Join(2, TimeSpan.FromSeconds(5));
            b.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
    });

    /// <summary>One side has queues, then both have.</summary>
    public static AbiScript CreateFifo() => AbiScript.OfPair("pair-event-fifo", "event_channel_op between domains", script =>
    {
        const uint Masked = 1U << 30;
        const int DefaultPriority = 7;
        ScratchPage block = null!;
        ScratchPage array = null!;
        Value far = null!;
        Value near = null!;
        Value Word(Value port) => (array.At + (port << 2)).Named($"word of {port.Text}");
        script.LevelPortsOfBoth();
        script.Case("a channel from before one side had queues", (a, b) =>
        {
            block = a.Page("block");
            array = a.Page("array");
            (far, near) = PairSteps.Connect(a, b);
            a.QuietEvents();
            b.QuietEvents();
            a.InitControl(block.Mfn, 0, 0);

            // The toolstack's ports are not to be seen; they are masked in pairs.
            a.Fill(array.At, EventSteps.FirstPort / 2, 8, ((ulong)Masked << 32) | Masked);
            a.ExpandArray(array.Mfn);
            b.Send(near);
            a.Load(Word(far), 4);
            a.ShowQueues(block, 0, DefaultPriority);
            a.ShowUpcallState();
            a.ShowPending();
            a.Send(far);
            b.ShowPending();
            b.QuietEvents();
            a.ClearQueues(block, 0, array);
        });
        script.Case("a new channel, offered by the side with queues", (a, b) =>
        {
            (Value offered, Value bound) = PairSteps.Connect(a, b, " with queues");
            b.ShowPending();
            b.Send(bound);
            a.Load(Word(offered), 4);
            a.ShowQueues(block, 0, DefaultPriority);
            b.ClosePort(bound);
            a.Load(Word(offered), 4);
            a.ClosePort(offered);
            a.Load(Word(offered), 4);
            a.ClearQueues(block, 0, array);
            b.QuietEvents();
        });
        script.Case("a channel that the side with queues binds to", (a, b) =>
        {
            (Value offered, Value bound) = PairSteps.Connect(b, a, " the other way");
            a.Load(Word(bound), 4);
            a.ShowQueues(block, 0, DefaultPriority);
            a.Send(bound);
            b.ShowPending();
            a.ClosePort(bound);
            a.Load(Word(bound), 4);
            a.ClearQueues(block, 0, array);
            b.ShowPort(offered);
            b.ClosePort(offered);
            b.QuietEvents();
        });
        script.Case("priorities", (a, b) =>
        {
            a.SetPriority(far, 2);
            b.SetPriority(near, 3);
            b.Send(near);
            a.ShowQueues(block, 0, 2, DefaultPriority);
            a.ClearQueues(block, 0, array);
        });
        script.Case("masked words", (a, b) =>
        {
            a.Put(Word(far), 4, Masked);
            b.Send(near);
            a.Load(Word(far), 4);
            a.ShowQueues(block, 0, 2);
            a.Unmask(far);
            a.Load(Word(far), 4);
            a.ShowQueues(block, 0, 2);
            a.ClearQueues(block, 0, array);
        });
        script.Case("upcalls on the side with queues", (a, b) =>
        {
            a.ClearQueues(block, 0, array);
            b.Send(near);
            a.ShowUpcallState();
            a.ClearQueues(block, 0, array);
            b.Send(near);
            b.Send(near);
            a.ShowQueues(block, 0, 2);
            a.ClearQueues(block, 0, array);
        });
        script.Case("queues on both sides", (a, b) =>
        {
            ScratchPage second = b.Page("block of b");
            ScratchPage words = b.Page("array of b");
            b.InitControl(second.Mfn, 64, 0);
            b.Fill(words.At, EventSteps.FirstPort / 2, 8, ((ulong)Masked << 32) | Masked);
            b.ExpandArray(words.Mfn);
            a.Send(far);
            b.Load((words.At + (near << 2)).Named("word of near"), 4);
            b.ShowQueues(second, 64, 3, DefaultPriority);
            b.Send(near);
            a.ShowQueues(block, 0, 2);
            a.ClosePort(far);
            b.ShowPort(near);
            b.Send(near);
            b.ClosePort(near);
        });
    });

    /// <summary>EVTCHNOP_reset closes the console's port, so that the domain which calls it can only end then.</summary>
    public static AbiScript CreateReset() => AbiScript.OfPair("pair-event-reset", "event_channel_op between domains", script =>
    {
        script.LevelPortsOfBoth();
        script.Case("one side resets its channels", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            (Value farOfB, Value nearOfA) = PairSteps.Connect(b, a, " of b");
            Value offered = b.Offer("offered by b");
            a.QuietEvents();
            a.Send(far);
            b.Send(near);
            b.ResetAndEnd();
            a.WaitUnbound(far);
            a.WaitUnbound(nearOfA);
            a.Pause(TimeSpan.FromMilliseconds(100));
            a.ShowPending();
            a.ShowPort(far);
            a.ShowPort(nearOfA);
            a.Send(far);
            a.Send(nearOfA);
            foreach (Value port in (Value[])[near, farOfB, offered, 1])
                a.BindInterdomain(a.Peer, port);
            a.ClosePort(far);
            a.ClosePort(nearOfA);
            a.LetEnd();
        });
    });

    /// <summary>Another vCPU of the domain, which can do so once, sends when the other domain has had time to go to sleep.</summary>
    private static void SendLater(this AbiCase c, int vcpu, Value port) => c.StartVcpu(vcpu, later =>
    {
        later.Pause(TimeSpan.FromMilliseconds(300));
        later.Send(port);
    });

    private static ulong Seconds(int seconds) => (ulong)seconds * 1_000_000_000;

    /// <summary>Resets all channels, waits until the other domain lets it end, and ends.</summary>
    private static void ResetAndEnd(this AbiCase c)
    {
        ScriptBuffer domain = c.Structure("domain", 8, (0, 2, DomainIds.Self));
        ScriptBuffer reason = c.Structure("reason", 8, (0, 4, (int)GuestShutdownReason.PowerOff));
        c.End("reset, and the end when a lets it", a =>
        {
            Iced.Intel.Label wait = a.CreateLabel();
            a.mov(edi, (int)EventOperation.Reset);
            a.mov(rsi, domain.Address);
            a.mov(eax, (int)GuestHypercall.EventChannelOp);
            a.syscall();
            a.Label(ref wait);
            a.mov(edi, (int)SchedulerOperation.Yield);
            a.xor(esi, esi);
            a.mov(eax, (int)GuestHypercall.SchedOp);
            a.syscall();
            a.mov(rdx, LastNote);
            a.cmp(__qword_ptr[rdx], 0);
            a.je(wait);
            a.mov(edi, (int)SchedulerOperation.Shutdown);
            a.mov(rsi, reason.Address);
            a.mov(eax, (int)GuestHypercall.SchedOp);
            a.syscall();
        });
    }

    private static void LetEnd(this AbiCase c) => c.Put(LastNote, 8, 1);
}
