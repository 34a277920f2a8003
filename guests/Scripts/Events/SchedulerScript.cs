// sched_op: giving up the processor, waiting, and what else it does short of ending the domain.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class SchedulerScript
{
    private const long Millisecond = 1_000_000;

    /// <summary>Ports that one poll can name.</summary>
    private const int MaxPollPorts = 128;

    public static AbiScript CreatePoll() => new("sched-poll", "sched_op", script =>
    {
        script.LevelPorts();
        script.Case("a port that is pending", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            c.Poll(port, "for ever", 0);
            c.ShowPending();
            c.Poll(port, "for ever", 0);
            End(c, port);
        });
        script.Case("a port that is not, until the time is up", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            Value start = c.Keep(Value.SystemTime, "start");
            c.Poll(port, "20 ms", start + 20 * Millisecond);
            c.ShowEarly(start, 20);
            c.ShowPending();
            End(c, port);
        });
        script.Case("a time that is past", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Poll(port, "1", 1);
            c.Poll(port, "now", Value.SystemTime);
            End(c, port);
        });
        script.Case("no port at all is a sleep", c =>
        {
            c.Settle();
            Value start = c.Keep(Value.SystemTime, "start");
            c.Poll("no port, 20 ms", 0, 0, start + 20 * Millisecond);
            c.ShowEarly(start, 20);
        });
        script.Case("a timer's port", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 10 * Millisecond);
            c.Poll(port, "for ever", 0);
            c.ShowPending();
            End(c, port);
        });
        script.Case("two ports, the second of which is pending", c =>
        {
            Value first = c.Keep(c.BindIpi(0), "first");
            Value second = c.Keep(c.BindIpi(0), "second");
            c.Send(second);
            c.Poll("two ports, for ever", c.Structure("ports", 8, (0, 4, first), (4, 4, second)), 2, 0);
            c.ShowPending();
            End(c, first, second);
        });
        script.Case("two ports, one of which comes", c =>
        {
            Value first = c.Keep(c.BindIpi(0), "first");
            Value timer = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 400 * Millisecond);
            c.Settle();
            c.Poll("two ports, for ever", c.Structure("ports", 8, (0, 4, first), (4, 4, timer)), 2, 0);
            c.ShowPending();
            End(c, first, timer);
        });
        script.Case("an event on another port does not end it", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            Value timer = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            Value start = c.Keep(Value.SystemTime, "start");
            c.Hypercall(GuestHypercall.SetTimerOp, start + 5 * Millisecond);
            c.Poll(port, "40 ms", start + 40 * Millisecond);
            c.ShowEarly(start, 40);
            c.ShowPending();
            End(c, port, timer);
        });
        script.Case("an upcall ends it", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            Value timer = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Unmask(timer);
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 50 * Millisecond);
            c.Poll(port, "for ever", 0);
            End(c, port, timer);
        });
        script.Case("an unmasked event ends it, though upcalls are masked", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            Value timer = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Unmask(timer);
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 20 * Millisecond);
            c.Poll(port, "for ever", 0);
            c.ShowUpcallState();
            End(c, port, timer);
        });
        script.Case("a due upcall comes before all ports are looked at", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.MaskUpcalls(false);
            c.Poll("a bad port behind a due upcall", c.Structure("ports", 8, (0, 4, 0xffff_ffffU)), 1, 0);
            End(c, port);
        });
        script.Case("ports that are not in use", c =>
        {
            foreach (uint port in (uint[])[0, 60, 64, 4095, 4096, 0xffff_ffff])
                c.Poll(port, "for ever", 0);
        });
        script.Case("a pending port before a bad one", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            c.Poll("pending, bad", c.Structure("ports", 8, (0, 4, port), (4, 4, 0)), 2, 0);
            c.Poll("bad, pending", c.Structure("ports", 8, (0, 4, 0), (4, 4, port)), 2, 0);
            End(c, port);
        });
        script.Case("numbers of ports", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            ScriptBuffer ports = c.Buffer("ports", 4 * (MaxPollPorts + 1));
            c.Fill(ports, (MaxPollPorts + 1) / 2, 8, port | (port << 32));
            c.Poll("128 ports", ports, MaxPollPorts, 0);
            c.Poll("129 ports", ports, MaxPollPorts + 1, 0);
            c.Poll("all ports", ports, 0xffff_ffffU, 0);
            End(c, port);
        });
        script.Case("bad pointers", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            c.SchedOp(SchedulerOperation.Poll, "null", BadAddress.Null);
            c.SchedOp(SchedulerOperation.Poll, "non-canonical", BadAddress.NonCanonical);
            c.SchedOp(SchedulerOperation.Poll, "cut off", c.PageEnd(16));
            ScratchPage unmapped = c.UnmappedPage();
            c.Poll("ports at null", 0, 1, 0);
            c.Poll("ports in a page that is not mapped", unmapped.At, 1, 0);
            c.Poll("ports at a non-canonical address", BadAddress.NonCanonical, 1, 0);
            c.Poll("ports in the hypervisor's range", BadAddress.Hypervisor, 1, 0);
            c.Poll("no ports in the hypervisor's range, 1", BadAddress.Hypervisor, 0, 1);
            End(c, port);
        });
        script.Case("a pending port before one that cannot be read", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            Value idle = c.Keep(c.BindIpi(0), "idle port");
            c.Send(port);
            Value end = c.PageEnd(4);
            c.Put(end, 4, port);
            c.Poll("pending, not mapped", end, 2, 0);
            c.Put(end, 4, idle);
            c.Poll("idle, not mapped", end, 2, 0);
            End(c, port, idle);
        });
    });

    public static AbiScript CreateOthers() => new("sched-op", "sched_op", script =>
    {
        script.LevelPorts();
        script.Case("yield", c =>
        {
            c.SchedOp(SchedulerOperation.Yield, "", 0);
            c.SchedOp(SchedulerOperation.Yield, "with a bad pointer", BadAddress.NonCanonical);
        });
        script.Case("block until a timer's event", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Unmask(port);
            c.MaskUpcalls(true);
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 20 * Millisecond);
            c.SchedOp(SchedulerOperation.Block, "", 0);
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("block when there is an event already", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.SchedOp(SchedulerOperation.Block, "", 0);
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("block again after its event", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Unmask(port);
            for (int i = 0; i < 2; i++)
            {
                c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 10 * Millisecond);
                c.SchedOp(SchedulerOperation.Block, "with a bad pointer", BadAddress.NonCanonical);
            }

            End(c, port);
        });
        script.Case("unknown operations", c =>
        {
            foreach (long operation in (long[])[8, 255, -1])
                c.Hypercall(GuestCalls.SchedOp, $"sched_op({operation})", AnswerFormat.Result, operation, 0);
        });
        script.Case("the operation is the low half of its argument", c =>
            c.Hypercall(GuestCalls.SchedOp, "sched_op(yield with high bits)", AnswerFormat.Result, 0x1_0000_0000UL, 0));
        script.Case("the older form", c =>
        {
            c.Hypercall(GuestCalls.SchedOpCompat, "sched_op_compat(yield)", AnswerFormat.Result, 0, 0);
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.Hypercall(GuestCalls.SchedOpCompat, "sched_op_compat(block)", AnswerFormat.Result, 1, 0);
            foreach (long operation in (long[])[3, 4, 5, 6, 7, 8, -1])
                c.Hypercall(GuestCalls.SchedOpCompat, $"sched_op_compat({operation})", AnswerFormat.Result, operation, 0);
            End(c, port);
        });
        script.Case("shutdown that cannot be read", c =>
        {
            foreach (SchedulerOperation operation in (SchedulerOperation[])[SchedulerOperation.Shutdown, SchedulerOperation.ShutdownCode, SchedulerOperation.RemoteShutdown, SchedulerOperation.Watchdog])
            {
                c.SchedOp(operation, "null", BadAddress.Null);
                c.SchedOp(operation, "non-canonical", BadAddress.NonCanonical);
                c.SchedOp(operation, "hypervisor's", BadAddress.Hypervisor);
                c.SchedOp(operation, "cut off", c.PageEnd(1));
            }
        });
        script.Case("remote_shutdown of domains that do not exist", c =>
        {
            foreach (Value domain in (Value[])[DomainIds.Absent, DomainIds.Self, DomainIds.Xen, DomainIds.Invalid])
                c.SchedOp(SchedulerOperation.RemoteShutdown, domain.Text, c.Structure("request", 8, (0, 2, domain)));
        });
        script.Case("watchdogs", c =>
        {
            Watchdog(c, 0, 1000);
            Watchdog(c, 0, 1000);
            Watchdog(c, 0, 1000);
            Watchdog(c, 1, 2000);
            Watchdog(c, 1, 0);
            Watchdog(c, 1, 0);
            Watchdog(c, 1, 1000);
            Watchdog(c, 0, 0xffff_ffffU);
            Watchdog(c, 2, 0);
            Watchdog(c, 1, 0);
            Watchdog(c, 2, 1000);
            Watchdog(c, 3, 1000);
            Watchdog(c, 0xffff_ffffU, 0);
        });
        script.Case("a watchdog that is kicked in time", c =>
        {
            Watchdog(c, 0, 30);
            Watchdog(c, 1, 30);
            Watchdog(c, 1, 0);
        });
    });

    private static void Watchdog(AbiCase c, Value id, Value timeout)
        => c.SchedOp(SchedulerOperation.Watchdog, $"{id.Text}, {timeout.Text} s", c.Structure("watchdog", 8, (0, 4, id), (4, 4, timeout)));

    private static void End(AbiCase c, params Value[] ports)
    {
        c.QuietEvents();
        foreach (Value port in ports)
            c.ClosePort(port);
        c.QuietEvents();
    }
}
