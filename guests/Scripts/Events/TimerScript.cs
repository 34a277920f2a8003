// Timers of a vCPU: set_timer_op, the single-shot and the periodic timer of vcpu_op, and VIRQ_TIMER, by which all of them tell.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class TimerScript
{
    private const long Millisecond = 1_000_000;
    private static readonly TimeSpan s_ample = TimeSpan.FromSeconds(10);
    private static readonly TimeSpan s_shortWait = TimeSpan.FromMilliseconds(200);

    public static AbiScript CreateSetTimer() => new("set-timer-op", "set_timer_op", script =>
    {
        script.LevelPorts();
        script.Case("a time to come", c => Timer(c, () => SetTimer(c, Value.SystemTime + 5 * Millisecond)));
        script.Case("now", c => Timer(c, () => SetTimer(c, Value.SystemTime)));
        script.Case("a time that is past", c => Timer(c, () => SetTimer(c, 1)));
        script.Case("a negative time fires all the same", c => Timer(c, () => SetTimer(c, -1L)));
        script.Case("the most negative time", c => Timer(c, () => SetTimer(c, long.MinValue)));
        script.Case("a time that is too far off fires all the same", c => Timer(c, () => SetTimer(c, Value.SystemTime + (1L << 51))));
        script.Case("zero stops it", c =>
        {
            Value port = Open(c);
            SetTimer(c, Value.SystemTime + 100 * Millisecond);
            SetTimer(c, 0);
            c.WaitUpcalls(1, s_shortWait);
            Close(c, port);
        });
        script.Case("a later time takes the place of an earlier one", c =>
        {
            Value port = Open(c);
            SetTimer(c, Value.SystemTime + 100 * Millisecond);
            SetTimer(c, Value.SystemTime + 3_600_000 * Millisecond);
            c.WaitUpcalls(1, s_shortWait);
            SetTimer(c, 0);
            Close(c, port);
        });
        script.Case("it does not come before its time", c =>
        {
            Value port = Open(c);
            Value start = c.Keep(Value.SystemTime, "start");
            SetTimer(c, start + 20 * Millisecond);
            c.WaitUpcalls(1, s_ample);
            c.ShowEarly(start, 20);
            Close(c, port);
        });
        script.Case("nobody bound the VIRQ", c =>
        {
            SetTimer(c, Value.SystemTime);
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(20));
            c.ShowPending();
        });
        script.Case("a closed port gets no more", c =>
        {
            Value port = Open(c);
            SetTimer(c, Value.SystemTime + 20 * Millisecond);
            c.ClosePort(port);
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(60));
            c.QuietEvents();
        });
        script.Case("a masked port keeps it", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.MaskUpcalls(false);
            SetTimer(c, 1);
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(20));
            c.ShowPending();
            c.Unmask(port);
            Close(c, port);
        });
    });

    public static AbiScript CreateVcpuTimers() => new("vcpu-timers", "vcpu_op", script =>
    {
        script.Case("a vCPU starts with a periodic timer", c =>
        {
            c.LevelPorts();
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Pause(TimeSpan.FromMilliseconds(30));
            c.ShowPending();
            c.ClearPending();
            c.Pause(TimeSpan.FromMilliseconds(30));
            c.ShowPending();
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            Close(c, port);
        });
        script.Case("a single shot to come", c => Timer(c, () => Singleshot(c, "now + 5 ms", Value.SystemTime + 5 * Millisecond, 0)));
        script.Case("a single shot that is past", c => Timer(c, () => Singleshot(c, "1", 1, 0)));
        script.Case("a single shot that is past, with VCPU_SSHOTTMR_future", c =>
        {
            Value port = Open(c);
            Singleshot(c, "1", 1, 1);
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(50));
            Close(c, port);
        });
        script.Case("a single shot with unknown flags", c => Timer(c, () => Singleshot(c, "now", Value.SystemTime, 0xffff_fffeU)));
        script.Case("a single shot at the end of time", c =>
        {
            Value port = Open(c);
            Singleshot(c, "the largest signed number", long.MaxValue, 0);
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(50));
            c.VcpuOp(VcpuOperation.StopSingleshotTimer, 0, "", 0);
            Close(c, port);
        });
        script.Case("a single shot that is stopped", c =>
        {
            Value port = Open(c);
            Singleshot(c, "now + 100 ms", Value.SystemTime + 100 * Millisecond, 0);
            c.VcpuOp(VcpuOperation.StopSingleshotTimer, 0, "", 0);
            c.WaitUpcalls(1, s_shortWait);
            Close(c, port);
        });
        script.Case("set_timer_op and the single shot are one timer", c =>
        {
            Value port = Open(c);
            Singleshot(c, "now + 100 ms", Value.SystemTime + 100 * Millisecond, 0);
            SetTimer(c, 0);
            c.WaitUpcalls(1, s_shortWait);
            Close(c, port);
        });
        script.Case("single shots that are refused", c =>
        {
            c.VcpuOp(VcpuOperation.SetSingleshotTimer, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.SetSingleshotTimer, 0, BadAddress.NonCanonical);
            c.VcpuOp(VcpuOperation.SetSingleshotTimer, 0, c.PageEnd(8));
            c.VcpuOp(VcpuOperation.SetSingleshotTimer, 100, BadAddress.Null);
            c.VcpuOp(VcpuOperation.StopSingleshotTimer, 100, "", 0);
        });
        script.Case("a periodic timer goes on", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            Periodic(c, 10 * Millisecond);
            for (int i = 0; i < 3; i++)
            {
                c.Pause(TimeSpan.FromMilliseconds(30));
                c.ShowPending();
                c.ClearPending();
            }

            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            Close(c, port);
        });
        script.Case("a periodic timer rests while its vCPU waits", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            Periodic(c, 300 * Millisecond);
            c.ClearPending();
            Value start = c.Keep(Value.SystemTime, "start");
            c.Poll(port, "500 ms", start + 500 * Millisecond);
            c.ShowEarly(start, 500);
            c.ShowPending();
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            Close(c, port);
        });
        script.Case("a periodic timer that is stopped", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            Periodic(c, 10 * Millisecond);
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            c.ClearPending();
            c.Poll(port, "50 ms", Value.SystemTime + 50 * Millisecond);
            c.ShowPending();
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            Close(c, port);
        });
        script.Case("periods", c =>
        {
            Periodic(c, 0);
            Periodic(c, Millisecond - 1);
            Periodic(c, Millisecond);
            Periodic(c, long.MaxValue >> 1);
            Periodic(c, (long.MaxValue >> 1) + 1);
            Periodic(c, -1);
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
            c.VcpuOp(VcpuOperation.SetPeriodicTimer, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.SetPeriodicTimer, 0, BadAddress.Hypervisor);
            c.VcpuOp(VcpuOperation.SetPeriodicTimer, 100, BadAddress.Null);
            c.VcpuOp(VcpuOperation.StopPeriodicTimer, 100, "", 0);
        });
    });

    /// <summary>Sets the timer, waits for its one upcall, and sees that there is no other.</summary>
    private static void Timer(AbiCase c, Action set)
    {
        // Set while upcalls are masked, so that the upcall is the wait's, however fast the timer is.
        Value port = Open(c);
        c.MaskUpcalls(true);
        set();
        c.MaskUpcalls(false);
        c.WaitUpcalls(1, s_ample);
        c.WaitUpcalls(1, TimeSpan.FromMilliseconds(30));
        Close(c, port);
    }

    private static Value Open(AbiCase c)
    {
        Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
        c.Unmask(port);
        c.MaskUpcalls(false);
        return port;
    }

    private static void Close(AbiCase c, Value port)
    {
        c.QuietEvents();
        c.ClosePort(port);
        c.QuietEvents();
    }

    private static void SetTimer(AbiCase c, Value time) => c.Hypercall(GuestHypercall.SetTimerOp, time);

    private static void Singleshot(AbiCase c, string text, Value time, Value flags)
        => c.VcpuOp(VcpuOperation.SetSingleshotTimer, 0, $"{text}, flags {flags.Text}", c.Structure("timer", 16, (0, 8, time), (8, 4, flags)));

    private static void Periodic(AbiCase c, long period)
    {
        Value value = period;
        c.VcpuOp(VcpuOperation.SetPeriodicTimer, 0, value.Text, c.Structure("period", 8, (0, 8, value)));
    }
}
