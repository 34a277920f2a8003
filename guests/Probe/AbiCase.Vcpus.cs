// Steps with more than one vCPU.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

public sealed partial class AbiCase
{
    // struct vcpu_guest_context (public arch-x86/xen.h), by offset, for 64-bit guests.
    private const int ContextSize = 5168;
    private const int ContextFlags = 512;
    private const int ContextR11 = 568;
    private const int ContextRcx = 608;
    private const int ContextRdi = 632;
    private const int ContextRip = 648;
    private const int ContextCs = 656;
    private const int ContextRflags = 664;
    private const int ContextRsp = 672;
    private const int ContextSs = 680;
    private const int ContextEs = 688;
    private const int ContextDs = 696;
    private const int ContextFs = 704;
    private const int ContextGs = 712;
    private const int ContextKernelSs = 4968;
    private const int ContextKernelSp = 4976;
    private const int ContextCr3 = 5008;
    private const int ContextEventCallback = 5112;
    private const int ContextFailsafeCallback = 5120;
    private const int ContextSyscallCallback = 5128;

    private const ulong InKernel = 1 << 2;
    private const int FailsafeDisablesEvents = 1 << 3;
    private const ulong FlatKernelCs = 0xe033;
    private const ulong FlatKernelSs = 0xe02b;

    // VCPUOP_* of public vcpu.h.
    private const int Initialise = 0;
    private const int Up = 1;

    /// <summary>A struct vcpu_guest_context that starts another vCPU on steps of its own.</summary>
    /// <param name="vcpu">1 to <see cref="ProbeLayout.MaxVcpus"/> − 1.</param>
    /// <param name="steps">Writes its steps; they are printed when it is joined.</param>
    public ScriptBuffer VcpuContext(int vcpu, Action<AbiCase> steps)
    {
        ArgumentNullException.ThrowIfNull(steps);
        ArgumentOutOfRangeException.ThrowIfLessThan(vcpu, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(vcpu, ProbeLayout.MaxVcpus);
        _script.RequireVcpus(vcpu + 1);
        ulong script = _script.DefineScript(_guest, steps);
        return Structure(
            $"context{vcpu}", ContextSize,
            (ContextFlags, 8, InKernel),
            (ContextRdi, 8, script),
            (ContextRip, 8, Value.Load(_guest.Variables.SecondaryEntry)),
            (ContextCs, 2, FlatKernelCs),
            (ContextRflags, 8, 2),
            (ContextRsp, 8, ProbeLayout.InterpreterStack(vcpu)),
            (ContextSs, 2, FlatKernelSs),
            (ContextKernelSs, 8, FlatKernelSs),
            (ContextKernelSp, 8, ProbeLayout.EntryStack(vcpu)),
            (ContextCr3, 8, Root << 12),
            (ContextEventCallback, 8, UpcallHandler),
            (ContextFailsafeCallback, 8, Handler((int)ProbeEntry.Failsafe)),
            (ContextSyscallCallback, 8, Handler((int)ProbeEntry.Syscall)));
    }

    /// <summary>
    /// Initialises another vCPU with data selectors that may not be loadable. Its steps start by the failsafe callback, and show the
    /// frame that they find; an address without a page is where they start if it is not called.
    /// </summary>
    /// <param name="vcpu">1 to <see cref="ProbeLayout.MaxVcpus"/> − 1.</param>
    /// <param name="name">What the context is called, and what is special about it.</param>
    /// <param name="selectors">DS, ES, FS, GS.</param>
    /// <param name="masksEvents">VGCF_failsafe_disables_events.</param>
    public void StartVcpuOnFailsafe(int vcpu, string name, (int Ds, int Es, int Fs, int Gs) selectors, bool masksEvents)
    {
        const int frameSize = 11 * sizeof(ulong);
        const ulong start = 0x1110;
        ulong stack = ProbeLayout.InterpreterStack(vcpu);
        ScriptBuffer context = VcpuContext(vcpu, one =>
        {
            foreach ((int index, string field) in (ReadOnlySpan<(int, string)>)
                [(0, "rcx"), (1, "r11"), (2, "ds"), (3, "es"), (4, "fs"), (5, "gs"), (6, "rip"), (7, "cs and mask"), (8, "rflags"), (9, "rsp"), (10, "ss")])
                one.Show(Value.Load(stack - frameSize + ((ulong)index * sizeof(ulong))).Named(field));
            one.Show((Value.Load(Value.Load(ProbeLayout.VcpuInfoPointer(vcpu)) + 1) & 0xff).Named("mask"));
        });
        Put(context[ContextFlags], 8, InKernel | (masksEvents ? (ulong)FailsafeDisablesEvents : 0));
        Put(context[ContextRcx], 8, 0xcccc);
        Put(context[ContextR11], 8, 0x1111);
        Put(context[ContextRip], 8, start);
        Put(context[ContextDs], 2, selectors.Ds);
        Put(context[ContextEs], 2, selectors.Es);
        Put(context[ContextFs], 2, selectors.Fs);
        Put(context[ContextGs], 2, selectors.Gs);
        Put(context[ContextFailsafeCallback], 8, Value.Load(_guest.Variables.SecondaryEntry));
        Hypercall((ulong)GuestHypercall.VcpuOp, $"vcpu_op(initialise, {vcpu}, {name})", AnswerFormat.Result, Initialise, vcpu, context);
        Hypercall((ulong)GuestHypercall.VcpuOp, $"vcpu_op(up, {vcpu})", AnswerFormat.Result, Up, vcpu, 0);
    }

    /// <summary>Initialises another vCPU and brings it up on steps of its own.</summary>
    public void StartVcpu(int vcpu, Action<AbiCase> steps)
    {
        ScriptBuffer context = VcpuContext(vcpu, steps);
        Hypercall((ulong)GuestHypercall.VcpuOp, $"vcpu_op(initialise, {vcpu}, {context.Name})", AnswerFormat.Result, Initialise, vcpu, context);
        Hypercall((ulong)GuestHypercall.VcpuOp, $"vcpu_op(up, {vcpu})", AnswerFormat.Result, Up, vcpu, 0);
    }

    /// <summary>Waits until another vCPU is done with its steps. It goes down by itself.</summary>
    public void Join(int vcpu, TimeSpan timeout)
        => Step(StepOperation.Join, $"join vCPU {vcpu}", AnswerFormat.Number, [], [vcpu, (ulong)timeout.TotalNanoseconds]);
}
