// vcpu_op: life and areas of vCPUs, the calling one and others.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class VcpuScript
{
    private const long Millisecond = 1_000_000;
    private static readonly TimeSpan s_ample = TimeSpan.FromSeconds(10);
    private static readonly TimeSpan s_joined = TimeSpan.FromSeconds(3);

    // Fields of struct vcpu_runstate_info.
    private const int RunstateState = 0;
    private const int RunstateEntryTime = 8;
    private const int RunstateTimes = 16;
    private const int RunstateBlocked = 2;
    private const int RunstateSize = 48;

    // Fields of struct vcpu_guest_context.
    private const int ContextGdtEntries = 4960;
    private const int ContextCr3 = 5008;

    /// <summary>VMASST_TYPE_runstate_update_flag.</summary>
    private const int RunstateUpdateFlag = 5;

    public static AbiScript CreateOwn() => new("vcpu-op", "vcpu_op", script =>
    {
        script.LevelPorts();
        script.Case("the vCPU that runs", c =>
        {
            c.VcpuOp(VcpuOperation.IsUp, 0, "", 0);
            c.VcpuOp(VcpuOperation.Up, 0, "", 0);
            c.VcpuOp(VcpuOperation.IsUp, 0, "with a bad pointer", BadAddress.NonCanonical);
            c.VcpuOp(VcpuOperation.Initialise, 0, "a context", c.Buffer("context", 5168));
            c.VcpuOp(VcpuOperation.Initialise, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.Initialise, 0, c.PageEnd(2048));
        });
        script.Case("vCPUs that no domain has", c =>
        {
            foreach (VcpuOperation operation in Enum.GetValues<VcpuOperation>())
            {
                c.VcpuOp(operation, 8192, "", 0);
                c.VcpuOp(operation, 0xffff_ffffU, "", 0);
            }
        });
        script.Case("unknown operations", c =>
        {
            foreach (long operation in (long[])[14, 255, -1])
            {
                c.Hypercall(GuestCalls.VcpuOp, $"vcpu_op({operation}, 0)", AnswerFormat.Result, operation, 0, 0);
                c.Hypercall(GuestCalls.VcpuOp, $"vcpu_op({operation}, 8192)", AnswerFormat.Result, operation, 8192, 0);
            }
        });
        script.Case("the operation and the vCPU are the low halves of their arguments", c =>
            c.Hypercall(GuestCalls.VcpuOp, "vcpu_op(is_up with high bits, 0 with high bits)", AnswerFormat.Result,
                0x1_0000_0000UL | (ulong)VcpuOperation.IsUp, 0x1_0000_0000UL, 0));
        script.Case("the physical identity of a vCPU that is pinned to nothing", c =>
        {
            ScriptBuffer id = c.Buffer("id", 8);
            c.VcpuOp(VcpuOperation.GetPhysid, 0, id);
            c.Load(id);
        });
        script.Case("an NMI with an argument", c => c.VcpuOp(VcpuOperation.SendNmi, 0, "1", 1));
    });

    public static AbiScript CreateRunstate() => new("runstate", "vcpu_op", script =>
    {
        script.LevelPorts();
        script.Case("the caller runs", c =>
        {
            ScriptBuffer info = c.Structure("runstate", RunstateSize, (RunstateState, 8, -1L));
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, info);
            c.Load(info[RunstateState], 4);
            c.Load(info[4], 4);
            c.Show(((Value.SystemTime - Value.Load(info[RunstateEntryTime]) + EventSteps.ClockTolerance) >> 63).Named("entered in the future"));
        });
        script.Case("its times add up to the time that passes", c =>
        {
            // On an emulated machine the hypervisor's clock is corrected by milliseconds at a time.
            const long tolerance = 10 * Millisecond;
            ScriptBuffer first = c.Buffer("first", RunstateSize);
            ScriptBuffer second = c.Buffer("second", RunstateSize);
            Value before = c.Keep(Value.SystemTime, "before");
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, first);
            Value between = c.Keep(Value.SystemTime, "between");
            c.Poll("no port, 100 ms", 0, 0, Value.SystemTime + 100 * Millisecond);
            Value later = c.Keep(Value.SystemTime, "later");
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, second);
            Value after = c.Keep(Value.SystemTime, "after");
            Value passed = c.Keep(Sum(second) - Sum(first), "passed");
            c.Show(((passed - (later - between) + tolerance) >> 63).Named("too little"));
            c.Show(((after - before - passed + tolerance) >> 63).Named("too much"));
        });
        script.Case("waiting is counted as being blocked", c =>
        {
            ScriptBuffer first = c.Buffer("first", RunstateSize);
            ScriptBuffer second = c.Buffer("second", RunstateSize);
            Value port = c.Keep(c.BindIpi(0), "port");
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, first);
            c.Poll(port, "50 ms", Value.SystemTime + 50 * Millisecond);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, second);
            c.Show(((Time(second, RunstateBlocked) - Time(first, RunstateBlocked) - 30 * Millisecond) >> 63).Named("blocked for less than 30 ms"));
            c.ClosePort(port);
        });
        script.Case("places where it cannot be written", c =>
        {
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, BadAddress.NonCanonical);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, BadAddress.Hypervisor);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, c.UnmappedPage().At);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, c.ReadOnlyPageOf().At);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 0, c.PageEnd(40));
        });
        script.Case("areas that are refused", c =>
        {
            c.VcpuOp(VcpuOperation.RegisterRunstateMemoryArea, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.RegisterRunstateMemoryArea, 0, BadAddress.NonCanonical);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.NonCanonical);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.Hypervisor);
        });
        script.Case("areas that cannot be written are taken all the same", c =>
        {
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.Null);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, c.UnmappedPage().At);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, c.ReadOnlyPageOf().At);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.LastLowHalf);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.Null);
        });
        script.Case("an area follows the vCPU", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            ScriptBuffer area = c.Structure("area", RunstateSize, (RunstateState, 8, -1L));
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, area);
            c.Load(area[RunstateState], 4);
            Value blocked = c.Keep(Time(area, RunstateBlocked), "blocked");
            c.Poll(port, "50 ms", Value.SystemTime + 50 * Millisecond);
            c.Load(area[RunstateState], 4);
            c.Show(((Time(area, RunstateBlocked) - blocked - 30 * Millisecond) >> 63).Named("blocked for less than 30 ms"));
            c.Show((Value.Load(area[RunstateEntryTime]) >> 63).Named("update flag"));
            c.ClosePort(port);
        });
        script.Case("with the update flag asked for", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Hypercall(GuestHypercall.VmAssist, 0, RunstateUpdateFlag);
            ScriptBuffer area = c.Buffer("area", RunstateSize);
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, area);
            Value blocked = c.Keep(Time(area, RunstateBlocked), "blocked");
            c.Poll(port, "50 ms", Value.SystemTime + 50 * Millisecond);
            c.Show(((Time(area, RunstateBlocked) - blocked - 30 * Millisecond) >> 63).Named("blocked for less than 30 ms"));
            c.Show((Value.Load(area[RunstateEntryTime]) >> 63).Named("update flag"));
            c.Load(area[RunstateState], 4);
            c.ClosePort(port);
        });
        script.Case("an area across two pages", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            ScratchPage page = c.Page();
            c.Page();
            Value area = page[ProbeLayout.PageSize - 16].Named("area");
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, area);
            Value blocked = c.Keep(Time(area, RunstateBlocked), "blocked");
            c.Poll(port, "50 ms", Value.SystemTime + 50 * Millisecond);
            c.Show(((Time(area, RunstateBlocked) - blocked - 30 * Millisecond) >> 63).Named("blocked for less than 30 ms"));
            Area(c, VcpuOperation.RegisterRunstateMemoryArea, BadAddress.Null);
            c.ClosePort(port);
        });
    });

    public static AbiScript CreateVcpuInfo() => new("vcpu-info", "vcpu_op", script =>
    {
        script.LevelPorts();
        script.Case("places that are refused", c =>
        {
            ScratchPage page = c.Page();
            Register(c, "offset 4", page.Mfn, 4);
            Register(c, "offset 7", page.Mfn, 7);
            Register(c, "across the page's end", page.Mfn, 4096 - VcpuInfoField.Size + 8);
            Register(c, "behind the page", page.Mfn, 4096);
            Register(c, "a huge offset", page.Mfn, 0xffff_fff8U);
            Register(c, "a frame of nobody", 0xff_ffff_ffffUL, 0);
            Register(c, "no frame", -1L, 0);
            Register(c, "the root table", c.Root, 0);
        });
        script.Case("registrations that cannot be read", c =>
        {
            c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 0, BadAddress.NonCanonical);
            c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 0, c.PageEnd(8));
        });
        script.Case("vcpu_info moves to a page of the guest's", c =>
        {
            ScratchPage page = c.Page();
            Value info = page[4096 - VcpuInfoField.Size].Named("info");
            c.Store(ProbeLayout.SharedInfoPage + 16, 8, 0x1234_5678);
            Register(c, "the last place of a page", page.Mfn, 4096 - VcpuInfoField.Size);
            c.SetVcpuInfo(info);
            c.ShowUpcallState();
            c.Load(info + 16);
            c.Show((Value.Load(info + VcpuInfoField.Time) & 1).Named("clock's version is odd"));
            Register(c, "again", page.Mfn, 0);
        });
        script.Case("everything is pending in the new place", c =>
        {
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.ShowUpcallState();
            c.QuietEvents();
        });
        script.Case("events come to the new place only", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1, 0);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.PendingSelector, 8, 0);
            c.Unmask(port);
            c.Send(port);
            c.ShowUpcallState();
            c.Load(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1);
            c.Load(ProbeLayout.SharedInfoPage + VcpuInfoField.PendingSelector);
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.QuietEvents();
            c.ClosePort(port);
        });
        script.Case("the fault address is there too", c =>
        {
            ScratchPage unmapped = c.UnmappedPage();
            c.Load(unmapped[8]);
        });
    });

    public static AbiScript CreateTime() => new("time", "vcpu_op", script =>
    {
        const int wallClock = 3072;
        const int time = VcpuInfoField.Time;
        script.LevelPorts();
        script.Case("the clock of vcpu_info", c =>
        {
            Value info = Value.Load(ProbeLayout.VcpuInfoPointer(0));
            c.Show((Value.Load(info + time) & 1).Named("version is odd"));
            c.Show(EventSteps.Field32(info + time + 24, "multiplier") >> 31);
            Value first = c.Keep(Value.SystemTime, "first");
            Value second = c.Keep(Value.SystemTime, "second");
            c.Show(((second - first) >> 63).Named("backwards"));
            c.Show(((first - Value.Load(info + time + 16)) >> 63).Named("before its own stamp"));
        });
        script.Case("the clock goes forward over its corrections", c =>
        {
            Value first = c.Keep(Value.SystemTime, "first");
            c.Pause(TimeSpan.FromMilliseconds(1200));
            Value passed = c.Keep(Value.SystemTime - first, "passed");
            c.Show(((passed - 1200 * Millisecond) >> 63).Named("too little"));
        });
        script.Case("the wall clock", c =>
        {
            Value shared = Value.Constant(ProbeLayout.SharedInfoPage + wallClock, "wall clock");
            c.Show((Value.Load(shared) & 1).Named("version is odd"));
            const long year2020 = 1_577_836_800;
            const long year2100 = 4_102_444_800;
            Value seconds = EventSteps.Field32(shared + 4, "seconds");
            c.Show(((seconds - year2020) >> 63).Named("before 2020"));
            c.Show(((Value)year2100 - seconds >> 63).Named("after 2100"));
            c.Show(((EventSteps.Field32(shared + 8, "nanoseconds") - 1_000_000_000) >> 63).Named("less than a second of nanoseconds"));
            c.Show(EventSteps.Field32(shared + 12, "high seconds"));
        });
        script.Case("a second clock", c =>
        {
            ScriptBuffer area = c.Structure("area", 32, (0, 8, -1L), (16, 8, -1L));
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, area);
            Value info = Value.Load(ProbeLayout.VcpuInfoPointer(0));
            c.Show((Value.Load(area) & 1).Named("version is odd"));
            c.Show((Value.Load(area[16]) - Value.Load(info + time + 16)).Named("time between the two"));
            c.Show((Value.Load(area[24]) - Value.Load(info + time + 24)).Named("rates' difference"));
        });
        script.Case("areas that are refused", c =>
        {
            c.VcpuOp(VcpuOperation.RegisterVcpuTimeMemoryArea, 0, BadAddress.Null);
            c.VcpuOp(VcpuOperation.RegisterVcpuTimeMemoryArea, 0, BadAddress.Hypervisor);
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, BadAddress.NonCanonical);
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, BadAddress.Hypervisor);
        });
        script.Case("areas that cannot be written are taken all the same", c =>
        {
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, c.UnmappedPage().At);
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, c.ReadOnlyPageOf().At);
            Area(c, VcpuOperation.RegisterVcpuTimeMemoryArea, BadAddress.Null);
        });
    });

    public static AbiScript CreateSecond() => new("vcpu-second", "vcpu_op", script =>
    {
        script.LevelPorts();
        script.Case("a vCPU that was not initialised", c =>
        {
            c.VcpuOp(VcpuOperation.IsUp, 1, "", 0);
            c.VcpuOp(VcpuOperation.Up, 1, "", 0);
            c.VcpuOp(VcpuOperation.Down, 1, "", 0);
            c.VcpuOp(VcpuOperation.SetSingleshotTimer, 1, BadAddress.Null);
            c.VcpuOp(VcpuOperation.StopSingleshotTimer, 1, "", 0);
            ScriptBuffer info = c.Buffer("runstate", RunstateSize);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 1, info);
            c.Load(info[RunstateState], 4);
        });
        script.Case("contexts that are refused", c =>
        {
            ScriptBuffer context = c.VcpuContext(1, static _ => { });
            c.VcpuOp(VcpuOperation.Initialise, 1, BadAddress.Null);
            c.VcpuOp(VcpuOperation.Initialise, 1, c.PageEnd(2048));
            c.Put(context[ContextCr3], 8, 0xff_ffff_ffff_f000UL);
            c.VcpuOp(VcpuOperation.Initialise, 1, "a root of nobody", context);
            c.Put(context[ContextCr3], 8, c.Root << 12);
            c.Put(context[ContextGdtEntries], 8, 7169);
            c.VcpuOp(VcpuOperation.Initialise, 1, "too large a GDT", context);
            c.Put(context[ContextGdtEntries], 8, 0);
            c.VcpuOp(VcpuOperation.IsUp, 1, "", 0);
        });
        script.Case("a vCPU runs its own steps", c =>
        {
            c.StartVcpu(1, one =>
            {
                one.Hypercall(GuestHypercall.XenVersion, 0, 0);
                one.VcpuOp(VcpuOperation.IsUp, 1, "", 0);
                one.VcpuOp(VcpuOperation.IsUp, 0, "", 0);
                one.Kernel("ud2", static a => a.ud2());
                one.VcpuOp(VcpuOperation.StopPeriodicTimer, 1, "", 0);
            });
            c.Join(1, s_joined);
        });
        script.Case("it is down again, and was initialised", c =>
        {
            c.Pause(TimeSpan.FromMilliseconds(100));
            c.VcpuOp(VcpuOperation.IsUp, 1, "", 0);
            c.VcpuOp(VcpuOperation.Initialise, 1, "a context", c.Buffer("context", 5168));
            ScriptBuffer info = c.Buffer("runstate", RunstateSize);
            c.VcpuOp(VcpuOperation.GetRunstateInfo, 1, info);
            c.Load(info[RunstateState], 4);
        });
        script.Case("an IPI to another vCPU", c =>
        {
            Value port = c.Keep(c.BindIpi(2), "port");
            c.PortStatus(DomainIds.Self, port);
            c.Unmask(port);
            c.StartVcpu(2, two =>
            {
                two.Put(Value.Load(ProbeLayout.VcpuInfoPointer(2)) + VcpuInfoField.UpcallMask, 1, 0);
                two.WaitUpcalls(1, s_ample);
            });
            c.Send(port);
            c.Join(2, s_joined);
            c.ClosePort(port);
            c.QuietEvents();
        });
        script.Case("a port that is moved to another vCPU", c =>
        {
            Value far = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "far");
            Value near = c.Keep(c.BindInterdomain(DomainIds.Self, far), "near");
            c.QuietEvents();
            c.BindVcpu(near, 3);
            c.PortStatus(DomainIds.Self, near);
            c.Unmask(near);
            c.StartVcpu(3, three =>
            {
                three.Put(Value.Load(ProbeLayout.VcpuInfoPointer(3)) + VcpuInfoField.UpcallMask, 1, 0);
                three.WaitUpcalls(1, s_ample);
            });
            c.Send(far);
            c.ShowUpcallState();
            c.Join(3, s_joined);
            c.ClosePort(near);
            c.ClosePort(far);
            c.QuietEvents();
        });
        script.Case("bindings to other vCPUs", c =>
        {
            Value timer = c.Keep(c.BindVirq(Virq.Timer, 1), "timer port");
            c.PortStatus(DomainIds.Self, timer);
            c.BindVcpu(timer, 0);
            c.BindVirq(Virq.Console, 1);
            Value console = c.Keep(c.BindVirq(Virq.Console, 0), "console port");
            c.BindVcpu(console, 1);
            c.PortStatus(DomainIds.Self, console);
            c.ClosePort(timer);
            c.ClosePort(console);
        });
        script.Case("the vcpu_info of a vCPU that is down, and of one that is not", c =>
        {
            ScratchPage page = c.Page();
            c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 1, "of a vCPU that is down", c.Structure("registration", 16, (0, 8, page.Mfn)));
            c.Load(page.At, 1);
            c.Load(page[VcpuInfoField.PendingSelector]);
            c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 1, "again", c.Structure("registration", 16, (0, 8, page.Mfn)));
        });
    });

    public static AbiScript CreateFailsafe() => new("vcpu-failsafe", "vcpu_op", script =>
    {
        const int nothing = 0x1233;
        const int flatData = 0xe02b;
        void Start(AbiCase c, int vcpu, string name, (int Ds, int Es, int Fs, int Gs) selectors, bool masksEvents = false)
        {
            c.StartVcpuOnFailsafe(vcpu, name, selectors, masksEvents);
            c.Join(vcpu, s_joined);
        }

        script.Case("a vCPU whose DS cannot be loaded starts at the failsafe callback", c =>
            Start(c, 1, "ds of nothing", (nothing, 0, 0, 0)));
        script.Case("one whose GS cannot, with events masked", c =>
            Start(c, 2, "gs of nothing", (flatData, flatData, flatData, nothing), masksEvents: true));
        script.Case("several, and what is loaded beside them", c =>
            Start(c, 3, "es and fs of nothing", (flatData & ~3, nothing, 0x17, 3)));
    });

    public static AbiScript CreateLastDown() => new("vcpu-down-last", "vcpu_op", script =>
        script.Case("the last vCPU that goes down takes the domain with it", c => c.VcpuOp(VcpuOperation.Down, 0, "", 0)));

    private static void Register(AbiCase c, string text, Value frame, Value offset)
        => c.VcpuOp(VcpuOperation.RegisterVcpuInfo, 0, text, c.Structure("registration", 16, (0, 8, frame), (8, 4, offset)));

    private static void Area(AbiCase c, VcpuOperation operation, Value address)
        => c.VcpuOp(operation, 0, $"at {address.Text}", c.Structure("registration", 8, (0, 8, address)));

    private static Value Time(Value info, int state) => Value.Load(info + (RunstateTimes + (8 * state)));

    private static Value Sum(Value info) => Time(info, 0) + Time(info, 1) + Time(info, 2) + Time(info, 3);
}
