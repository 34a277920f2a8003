// The ways in which a domain ends itself, one a script.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class ShutdownScript
{
    public static IEnumerable<AbiScript> Create() =>
    [
        .. Enum.GetValues<GuestShutdownReason>().Select(static reason => Ending(
            $"shutdown-{EventSteps.Name(reason).Replace('_', '-')}", "sched_op", $"the reason {(int)reason}", c => Shutdown(c, (int)reason))),
        Ending("shutdown-compat", "sched_op_compat", "reboot by the older form", static c =>
            c.Hypercall(GuestCalls.SchedOpCompat, "sched_op_compat(shutdown, reboot)", AnswerFormat.Result, (int)SchedulerOperation.Shutdown, (int)GuestShutdownReason.Reboot)),
        Ending("shutdown-reason-byte", "sched_op", "the reason is the lowest byte", static c => Shutdown(c, 0x1_0000 | (int)GuestShutdownReason.Reboot)),
        Ending("shutdown-code", "sched_op", "a reason given before counts, and the first of them", static c =>
        {
            c.SchedOp(SchedulerOperation.ShutdownCode, "reboot", c.Structure("code", 8, (0, 4, (int)GuestShutdownReason.Reboot)));
            c.SchedOp(SchedulerOperation.ShutdownCode, "crash", c.Structure("code", 8, (0, 4, (int)GuestShutdownReason.Crash)));
            Shutdown(c, (int)GuestShutdownReason.PowerOff);
        }),
        Ending("shutdown-multicall", "multicall", "a shutdown among other hypercalls", static c =>
        {
            const int entry = 64;
            ScriptBuffer reason = c.Structure("reason", 8, (0, 4, (int)GuestShutdownReason.Reboot));
            ScriptBuffer list = c.Structure("list", 2 * entry, (0, 8, (int)GuestHypercall.SchedOp), (16, 8, (int)SchedulerOperation.Shutdown), (24, 8, reason), (entry, 8, (int)GuestHypercall.XenVersion));
            c.Hypercall(GuestHypercall.Multicall, list, 2);
        }),
        Ending("watchdog-expires", "sched_op", "a watchdog that is not kicked", static c =>
        {
            c.SchedOp(SchedulerOperation.Watchdog, "0, 1 s", c.Structure("watchdog", 8, (4, 4, 1)));
            c.WaitUpcalls(1, TimeSpan.FromSeconds(20));
        }),
        Ending("watchdog-at-once", "sched_op", "a watchdog of no time", static c =>
        {
            // How soon at once is, nobody promises: nothing is printed any more.
            ScriptBuffer watchdog = c.Buffer("watchdog", 8);
            c.Kernel("sched_op(watchdog, 0, 0 s), and wait", a =>
            {
                Iced.Intel.Label again = a.CreateLabel();
                a.mov(edi, (int)SchedulerOperation.Watchdog);
                a.mov(rsi, watchdog.Address);
                a.mov(eax, (int)GuestHypercall.SchedOp);
                a.syscall();
                a.Label(ref again);
                a.pause();
                a.jmp(again);
            });
        }),
    ];

    private static AbiScript Ending(string name, string subject, string text, Action<AbiCase> steps) => new(name, subject, script => script.Case(text, steps));

    private static void Shutdown(AbiCase c, int reason)
        => c.SchedOp(SchedulerOperation.Shutdown, $"0x{reason:x}", c.Structure("reason", 8, (0, 4, reason)));
}
