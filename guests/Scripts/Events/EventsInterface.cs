// The numbers and structures of Xen's public headers that the scripts of this folder use, and steps made of them.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

/// <summary>EVTCHNOP_* of public event_channel.h.</summary>
internal enum EventOperation
{
    BindInterdomain = 0,
    BindVirq = 1,
    BindPirq = 2,
    Close = 3,
    Send = 4,
    Status = 5,
    AllocUnbound = 6,
    BindIpi = 7,
    BindVcpu = 8,
    Unmask = 9,
    Reset = 10,
    InitControl = 11,
    ExpandArray = 12,
    SetPriority = 13,
    ResetContinue = 14,
}

/// <summary>SCHEDOP_* of public sched.h.</summary>
internal enum SchedulerOperation
{
    Yield = 0,
    Block = 1,
    Shutdown = 2,
    Poll = 3,
    RemoteShutdown = 4,
    ShutdownCode = 5,
    Watchdog = 6,
    PinOverride = 7,
}

/// <summary>VCPUOP_* of public vcpu.h.</summary>
internal enum VcpuOperation
{
    Initialise = 0,
    Up = 1,
    Down = 2,
    IsUp = 3,
    GetRunstateInfo = 4,
    RegisterRunstateMemoryArea = 5,
    SetPeriodicTimer = 6,
    StopPeriodicTimer = 7,
    SetSingleshotTimer = 8,
    StopSingleshotTimer = 9,
    RegisterVcpuInfo = 10,
    SendNmi = 11,
    GetPhysid = 12,
    RegisterVcpuTimeMemoryArea = 13,
}

/// <summary>VIRQ_* of public xen.h.</summary>
internal static class Virq
{
    public const int Timer = 0;
    public const int Debug = 1;
    public const int Console = 2;
    public const int DomExc = 3;
    public const int Tbuf = 4;
    public const int Debugger = 6;
    public const int Xenoprof = 7;
    public const int ConRing = 8;
    public const int PcpuState = 9;
    public const int MemEvent = 10;
    public const int Argo = 11;
    public const int Enomem = 12;
    public const int Xenpmu = 13;
    public const int Arch0 = 16;
    public const int Count = 24;
}

/// <summary>DOMID_* of public xen.h, and a domain that nobody has.</summary>
internal static class DomainIds
{
    public static readonly Value Zero = Value.Constant(0, "domain 0");
    public static readonly Value Self = Value.Constant(0x7ff0, "self");
    public static readonly Value Io = Value.Constant(0x7ff1, "DOMID_IO");
    public static readonly Value Xen = Value.Constant(0x7ff2, "DOMID_XEN");
    public static readonly Value Invalid = Value.Constant(0x7ff4, "DOMID_INVALID");
    public static readonly Value Absent = Value.Constant(0x5a5a, "absent domain");
}

/// <summary>Addresses that no hypercall can use, wherever the guest has its memory.</summary>
internal static class BadAddress
{
    public static readonly Value Null = Value.Constant(0, "null");
    public static readonly Value NonCanonical = Value.Constant(0x8000_0000_0000_0000, "non-canonical");
    public static readonly Value Hypervisor = Value.Constant(0xffff_8300_0000_0000, "hypervisor's");
    public static readonly Value LastLowHalf = Value.Constant(0x7fff_ffff_fffc, "end of the lower half");
}

/// <summary>Fields of struct vcpu_info (public xen.h), and of its struct vcpu_time_info.</summary>
internal static class VcpuInfoField
{
    public const int UpcallPending = 0;
    public const int UpcallMask = 1;
    public const int PendingSelector = 8;
    public const int Time = 32;
    public const int Size = 64;
}

/// <summary>Fields of struct evtchn_status; its results follow the domain and the port.</summary>
internal static class StatusField
{
    public const int Domain = 0;
    public const int Port = 4;
    public const int Status = 8;
    public const int Vcpu = 12;

    /// <summary>The far domain of an unbound or interdomain port; the number of a VIRQ.</summary>
    public const int Detail = 16;
    public const int RemotePort = 20;
    public const int Size = 24;
}

/// <summary>Steps that the scripts share.</summary>
internal static class EventSteps
{
    /// <summary>UVMF_INVLPG.</summary>
    private const int InvalidatePage = 2;

    /// <summary>Present, accessed; without the writable bit.</summary>
    private const ulong ReadOnlyPage = 0x61;

    private const int LevelPort = 15;

    private const long Millisecond = 1_000_000;

    /// <summary>Nanoseconds by which the hypervisor's and the guest's clock may differ.</summary>
    public const long ClockTolerance = Millisecond;

    /// <summary>First port that is free after <see cref="LevelPorts(AbiCase)"/>.</summary>
    public const int FirstPort = LevelPort + 1;

    /// <summary>Ports below <see cref="FirstPort"/>, which are the toolstack's or only there to be taken.</summary>
    private const ulong OwnPorts = ~0xffffUL;

    private const ulong LowHalf = 0xffff_ffff;

    /// <summary>
    /// Takes all ports below <see cref="FirstPort"/> that are free. Which ones those are is the toolstack's business; the hypervisor
    /// gives the lowest that is free, so from here on the numbers are the same wherever the script runs.
    /// </summary>
    public static void LevelPorts(this AbiCase c)
    {
        ScriptBuffer request = c.Structure("request", 8, (0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
        c.Kernel($"alloc_unbound until port {LevelPort}", a =>
        {
            Iced.Intel.Label next = a.CreateLabel();
            Iced.Intel.Label done = a.CreateLabel();
            a.Label(ref next);
            a.mov(edi, (int)EventOperation.AllocUnbound);
            a.mov(rsi, request.Address);
            a.mov(eax, (int)GuestHypercall.EventChannelOp);
            a.syscall();
            a.test(rax, rax);
            a.jnz(done);
            a.mov(rsi, request.Address);
            a.cmp(__dword_ptr[rsi + 4], LevelPort);
            a.jb(next);
            a.Label(ref done);
            a.nop();
        }, show: [Register64.Rax]);
    }

    /// <summary>Levels the ports in a case of its own, and stops the timer of 100 Hz that every vCPU starts with.</summary>
    public static void LevelPorts(this AbiScript script) => script.Case("the low ports are taken", static c =>
    {
        c.LevelPorts();
        c.VcpuOp(VcpuOperation.StopPeriodicTimer, 0, "", 0);
    });

    /// <summary>
    /// Quietly lets the console's other end come to rest. It notifies the guest of what it took, which ends every poll for other than one
    /// port.
    /// </summary>
    public static void Settle(this AbiCase c) => c.Pause(TimeSpan.FromMilliseconds(200));

    /// <summary>event_channel_op with a structure of one's own.</summary>
    public static Value EventChannelOp(this AbiCase c, EventOperation operation, string arguments, Value structure)
        => c.Hypercall(
            (ulong)GuestHypercall.EventChannelOp, $"event_channel_op({Name(operation)}, {arguments})", AnswerFormat.Result, (int)operation, structure);

    /// <summary>event_channel_op whose pointer is what the step is about.</summary>
    public static Value EventChannelOp(this AbiCase c, EventOperation operation, Value structure)
        => c.EventChannelOp(operation, structure.Text, structure);

    /// <summary>EVTCHNOP_alloc_unbound.</summary>
    /// <returns>The port.</returns>
    public static Value AllocUnbound(this AbiCase c, Value domain, Value remote, string name = "port")
    {
        ScriptBuffer s = c.Structure("request", 16, (0, 2, domain), (2, 2, remote));
        c.EventChannelOp(EventOperation.AllocUnbound, $"of {domain.Text} for {remote.Text}", s);
        return Field32(s[4], name);
    }

    /// <summary>EVTCHNOP_bind_interdomain.</summary>
    /// <returns>The local port.</returns>
    public static Value BindInterdomain(this AbiCase c, Value remote, Value remotePort, string name = "local port")
    {
        ScriptBuffer s = c.Structure("request", 16, (0, 2, remote), (4, 4, remotePort));
        c.EventChannelOp(EventOperation.BindInterdomain, $"{remote.Text}, {remotePort.Text}", s);
        return Field32(s[8], name);
    }

    /// <summary>EVTCHNOP_bind_virq.</summary>
    /// <returns>The port.</returns>
    public static Value BindVirq(this AbiCase c, Value virq, Value vcpu, string name = "virq port")
    {
        ScriptBuffer s = c.Structure("request", 16, (0, 4, virq), (4, 4, vcpu));
        c.EventChannelOp(EventOperation.BindVirq, $"VIRQ {virq.Text}, vCPU {vcpu.Text}", s);
        return Field32(s[8], name);
    }

    /// <summary>EVTCHNOP_bind_ipi.</summary>
    /// <returns>The port.</returns>
    public static Value BindIpi(this AbiCase c, Value vcpu, string name = "ipi port")
    {
        ScriptBuffer s = c.Structure("request", 16, (0, 4, vcpu));
        c.EventChannelOp(EventOperation.BindIpi, $"vCPU {vcpu.Text}", s);
        return Field32(s[4], name);
    }

    /// <summary>EVTCHNOP_bind_pirq.</summary>
    public static void BindPirq(this AbiCase c, Value pirq, Value flags)
    {
        ScriptBuffer s = c.Structure("request", 16, (0, 4, pirq), (4, 4, flags));
        c.EventChannelOp(EventOperation.BindPirq, $"{pirq.Text}, flags {flags.Text}", s);
    }

    /// <summary>EVTCHNOP_bind_vcpu.</summary>
    public static void BindVcpu(this AbiCase c, Value port, Value vcpu)
    {
        ScriptBuffer s = c.Structure("request", 8, (0, 4, port), (4, 4, vcpu));
        c.EventChannelOp(EventOperation.BindVcpu, $"{port.Text}, vCPU {vcpu.Text}", s);
    }

    /// <summary>EVTCHNOP_close.</summary>
    public static void ClosePort(this AbiCase c, Value port) => PortOperation(c, EventOperation.Close, port);

    /// <summary>EVTCHNOP_send.</summary>
    public static void Send(this AbiCase c, Value port) => PortOperation(c, EventOperation.Send, port);

    /// <summary>EVTCHNOP_unmask.</summary>
    public static void Unmask(this AbiCase c, Value port) => PortOperation(c, EventOperation.Unmask, port);

    /// <summary>EVTCHNOP_set_priority.</summary>
    public static void SetPriority(this AbiCase c, Value port, Value priority)
    {
        ScriptBuffer s = c.Structure("request", 8, (0, 4, port), (4, 4, priority));
        c.EventChannelOp(EventOperation.SetPriority, $"{port.Text}, {priority.Text}", s);
    }

    /// <summary>EVTCHNOP_status; shows the state and the vCPU.</summary>
    /// <returns>The structure.</returns>
    public static ScriptBuffer PortStatus(this AbiCase c, Value domain, Value port)
    {
        // What the hypervisor does not set is seen to stay.
        ScriptBuffer s = c.Structure(
            "status", StatusField.Size, (StatusField.Domain, 2, domain), (StatusField.Port, 4, port), (StatusField.Status, 4, 77),
            (StatusField.Vcpu, 4, 77), (StatusField.Detail, 4, 77), (StatusField.RemotePort, 4, 77));
        c.EventChannelOp(EventOperation.Status, $"{port.Text} of {domain.Text}", s);
        c.Show(Field32(s[StatusField.Status], "status"));
        c.Show(Field32(s[StatusField.Vcpu], "vcpu"));
        return s;
    }

    /// <summary>Unmasks the ports from <see cref="FirstPort"/> to 63 by a store; the toolstack's would bring what its back ends send.</summary>
    public static void UnmaskOwnPorts(this AbiCase c)
        => c.Store(
            Value.Constant(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnMask, "event masks"), 8, Value.Constant(~OwnPorts, "own ports unmasked"));

    /// <summary>Shows which ports from <see cref="FirstPort"/> to 63 are pending, a bit each.</summary>
    public static void ShowPending(this AbiCase c)
        => c.Show((Value.Load(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending) & OwnPorts).Named("pending ports"));

    /// <summary>Shows which ports from <see cref="FirstPort"/> to 63 are masked, a bit each.</summary>
    public static void ShowMasked(this AbiCase c)
        => c.Show((Value.Load(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnMask) & OwnPorts).Named("masked ports"));

    /// <summary>Shows what vcpu_info says about events.</summary>
    public static void ShowUpcallState(this AbiCase c)
    {
        Value info = Value.Load(ProbeLayout.VcpuInfoPointer(0));
        c.Load((info + VcpuInfoField.UpcallPending).Named("upcall pending"), 1);
        c.Load((info + VcpuInfoField.UpcallMask).Named("upcall mask"), 1);
        c.Load((info + VcpuInfoField.PendingSelector).Named("pending selector"));
    }

    /// <summary>Quietly clears everything that is pending, and masks all ports.</summary>
    public static void QuietEvents(this AbiCase c)
    {
        Value info = Value.Load(ProbeLayout.VcpuInfoPointer(0));
        c.MaskUpcalls(true);
        c.Fill(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnMask, 64, 8, -1L);
        c.Fill(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending, 64, 8, 0);
        c.Put(info + VcpuInfoField.PendingSelector, 8, 0);
        c.Put(info + VcpuInfoField.UpcallPending, 1, 0);
    }

    /// <summary>Quietly takes all pending ports' events away; what is masked stays so.</summary>
    public static void ClearPending(this AbiCase c) => c.Fill(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending, 64, 8, 0);

    /// <summary>SCHEDOP_poll for one port.</summary>
    /// <param name="c">The case.</param>
    /// <param name="port">The port.</param>
    /// <param name="text">The timeout, for the transcript.</param>
    /// <param name="timeout">System time at which to give up; 0 for never.</param>
    public static void Poll(this AbiCase c, Value port, string text, Value timeout)
        => c.Poll($"{port.Text}, {text}", c.Structure("ports", 8, (0, 4, port)), 1, timeout);

    /// <summary>SCHEDOP_poll with arguments of one's own.</summary>
    public static void Poll(this AbiCase c, string text, Value ports, Value count, Value timeout)
        => c.SchedOp(SchedulerOperation.Poll, text, c.Structure("poll", 24, (0, 8, ports), (8, 4, count), (16, 8, timeout)));

    /// <summary>
    /// Shows whether a time has not come yet. The hypervisor's clock and the one that the guest computes are the same but for what a
    /// correction of the one has not told the other yet: that much is left out.
    /// </summary>
    /// <param name="c">The case.</param>
    /// <param name="start">A system time.</param>
    /// <param name="milliseconds">How long after it.</param>
    public static void ShowEarly(this AbiCase c, Value start, int milliseconds)
        => c.Show(((Value.SystemTime - start - (milliseconds * Millisecond) + ClockTolerance) >> 63).Named("before its time"));

    /// <summary>sched_op.</summary>
    public static Value SchedOp(this AbiCase c, SchedulerOperation operation, string arguments, Value argument)
        => c.Hypercall(
            (ulong)GuestHypercall.SchedOp, $"sched_op({Name(operation)}{(arguments.Length == 0 ? "" : ", ")}{arguments})", AnswerFormat.Result,
            (int)operation, argument);

    /// <summary>vcpu_op.</summary>
    public static Value VcpuOp(this AbiCase c, VcpuOperation operation, Value vcpu, string arguments, Value argument, AnswerFormat format = AnswerFormat.Result)
        => c.Hypercall(
            (ulong)GuestHypercall.VcpuOp, $"vcpu_op({Name(operation)}, {vcpu.Text}{(arguments.Length == 0 ? "" : ", ")}{arguments})", format,
            (int)operation, vcpu, argument);

    /// <summary>vcpu_op whose pointer is what the step is about.</summary>
    public static Value VcpuOp(this AbiCase c, VcpuOperation operation, Value vcpu, Value argument)
        => c.VcpuOp(operation, vcpu, argument.Text, argument);

    /// <summary>A scratch page that is not mapped any more.</summary>
    public static ScratchPage UnmappedPage(this AbiCase c, string name = "unmapped")
    {
        ScratchPage page = c.Page(name);
        c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, 0, InvalidatePage);
        return page;
    }

    /// <summary>A scratch page that can only be read.</summary>
    public static ScratchPage ReadOnlyPageOf(this AbiCase c, params (int Offset, int Size, Value Value)[] fields)
    {
        ScratchPage page = c.Page("readonly");
        foreach ((int offset, int size, Value value) in fields)
            c.Put(page[offset], size, value);
        c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(ReadOnlyPage), InvalidatePage);
        return page;
    }

    /// <summary>The last bytes of a page that has nothing mapped behind it.</summary>
    /// <param name="c">The case.</param>
    /// <param name="bytes">How many of them are there.</param>
    public static Value PageEnd(this AbiCase c, int bytes)
    {
        ScratchPage page = c.Page();
        c.UnmappedPage("behind");
        return page[ProbeLayout.PageSize - bytes].Named($"{bytes} bytes before a page's end");
    }

    /// <summary>A 32-bit field of a structure.</summary>
    public static Value Field32(Value address, string name) => (Value.Load(address) & LowHalf).Named(name);

    /// <summary>A name as the headers have it.</summary>
    public static string Name<T>(T operation)
        where T : struct, Enum
        => string.Concat(operation.ToString().Select(static (letter, i) => (i > 0 && char.IsUpper(letter) ? "_" : "") + char.ToLowerInvariant(letter)));

    private static void PortOperation(AbiCase c, EventOperation operation, Value port)
    {
        ScriptBuffer s = c.Structure("request", 8, (0, 4, port));
        c.EventChannelOp(operation, port.Text, s);
    }

    /// <summary>An event_channel_op that has to succeed, in a kernel step which cannot print any more.</summary>
    public static void EmitOperation(Iced.Intel.Assembler code, EventOperation operation, ScriptBuffer structure, Iced.Intel.Label failed)
    {
        code.mov(edi, (int)operation);
        code.mov(rsi, structure.Address);
        code.mov(eax, (int)GuestHypercall.EventChannelOp);
        code.syscall();
        code.test(rax, rax);
        code.jnz(failed);
    }

    /// <summary>Ends the domain in one of two ways: here when all went well, and from where <paramref name="failed"/> leads.</summary>
    public static void EmitVerdict(Iced.Intel.Assembler code, ScriptBuffer good, ScriptBuffer bad, ref Iced.Intel.Label failed)
    {
        Iced.Intel.Label shutdown = code.CreateLabel();
        code.mov(rsi, good.Address);
        code.jmp(shutdown);
        code.Label(ref failed);
        code.mov(rsi, bad.Address);
        code.Label(ref shutdown);
        code.mov(edi, (int)SchedulerOperation.Shutdown);
        code.mov(eax, (int)GuestHypercall.SchedOp);
        code.syscall();
    }
}
