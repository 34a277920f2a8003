// VCPUOP_initialise: the state that a new vCPU starts in (arch_set_info_guest); and the same state of one that there is.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Mmu;

namespace XenSharp.Domains.Hypercalls;

/// <summary>Takes over a struct vcpu_guest_context for a vCPU that was never up.</summary>
internal static unsafe class VcpuInitialisation
{
    internal const ulong FpuValid = 1 << 0;
    private const ulong InKernel = 1 << 2;
    private const int FirstCallbackFlag = 3;
    private const CallbackFlags ContextCallbackFlags = CallbackFlags.FailsafeDisablesEvents | CallbackFlags.SyscallDisablesEvents;
    private const ulong Online = 1 << 5;

    /// <summary>In CR1: there is a root of user mode.</summary>
    internal const ulong UserRootValid = 1;

    // CR0 of a PV guest as it is told: PG AM WP NE ET MP PE.
    private const ulong Cr0 = 0x8005_0033;
    private const ulong Cr0TaskSwitched = 1 << 3;
    private const ulong MaxLdtEntries = 8192;

    /// <summary>struct vcpu_guest_context (xen/arch-x86/xen.h), 64-bit.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct GuestContext
    {
        public FxsaveArea Fpu;

        /// <summary>VGCF_*.</summary>
        public ulong Flags;
        public UserRegisters Registers;
        public VcpuState.TrapTable Traps;
        public ulong LdtBase, LdtEntries;
        public GdtFrameList GdtFrames;
        public ulong GdtEntries;
        public ulong KernelSs, KernelSp;

        /// <summary>CR0–CR7: 1 is the root of user mode, 3 that of kernel mode.</summary>
        public EightRegisters ControlRegisters;
        public EightRegisters DebugRegisters;
        public ulong EventCallback, FailsafeCallback, SyscallCallback;
        public ulong VmAssists;
        public ulong FsBase, GsBaseKernel, GsBaseUser;
    }

    /// <summary>struct cpu_user_regs.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct UserRegisters
    {
        public ulong R15, R14, R13, R12, Rbp, Rbx, R11, R10, R9, R8, Rax, Rcx, Rdx, Rsi, Rdi;
        private ulong _errorCodeAndVector;
        public ulong Rip;

        /// <summary>The selector in the low 16 bits.</summary>
        public ulong Cs;
        public ulong Rflags, Rsp, Ss, Es, Ds, Fs, Gs;
    }

    [InlineArray(512)]
    internal struct FxsaveArea
    {
        private byte _element;
    }

    [InlineArray(16)]
    internal struct GdtFrameList
    {
        private ulong _element;
    }

    [InlineArray(8)]
    internal struct EightRegisters
    {
        private ulong _element;
    }

    /// <summary>Initialises a vCPU; on an error nothing of it is in use.</summary>
    /// <param name="caller">The calling vCPU.</param>
    /// <param name="target">A vCPU whose lock the caller holds.</param>
    /// <param name="guest">What the guest wants.</param>
    /// <returns>ERESTART when it has to be asked for again.</returns>
    public static Errno Execute(Vcpu caller, Vcpu target, in GuestContext guest)
    {
        Errno error = Load(caller, target, guest);
        if (error != Errno.None)
            return error;
        if ((guest.Flags & FpuValid) != 0)
            target.Cpu.SetFpu(guest.Fpu);
        if ((guest.Flags & Online) != 0)
            target.BringUp();
        return Errno.None;
    }

    /// <summary>Gives a vCPU that was never up all of a context but its x87 and SSE state; on an error nothing of it is in use.</summary>
    /// <param name="caller">The calling vCPU, or the target where no vCPU of the domain runs yet.</param>
    /// <param name="target">The vCPU.</param>
    /// <param name="guest">The context, which may say anything.</param>
    /// <returns>ERESTART when it has to be asked for again.</returns>
    public static Errno Load(Vcpu caller, Vcpu target, in GuestContext guest)
    {
        ulong gdtFrames = (guest.GdtEntries + (Paging.PageSize / sizeof(ulong)) - 1) / (Paging.PageSize / sizeof(ulong));
        if (!IsValid(guest) || guest.GdtEntries > DescriptorTables.MaxGdtEntries || ((guest.Flags & InKernel) == 0 && guest.ControlRegisters[1] == 0))
            return Errno.EINVAL;
        VcpuContext* context = target.Context;
        if (PageTables.FinishDeferred(caller.Context) != Errno.None)
            return Errno.ERESTART;
        ReadOnlySpan<ulong> frames = guest.GdtFrames;
        Errno error = DescriptorTables.SetGdt(caller.Context, context, frames[..(int)gdtFrames], (uint)guest.GdtEntries);
        if (error == Errno.None)
        {
            var kernel = new Mfn(guest.ControlRegisters[3] >> Paging.PageShift);
            error = SetRoots(caller.Context, context, kernel, new Mfn(guest.ControlRegisters[1] >> Paging.PageShift));
        }

        if (error != Errno.None)
        {
            _ = DescriptorTables.SetGdt(caller.Context, context, [], 0);
            return error;
        }

        SetRegisters(context, guest);
        SetState(context->State, target.Domain.Cpuid, guest);
        target.Cpu.SetTaskSwitched(context->State->TaskSwitched != 0);
        PrivilegedState.LoadControlRegister4(target);
        for (int i = 0; i < 8; i++)
            _ = DebugRegisters.Set(context->State, i, guest.DebugRegisters[i], out _);
        PrivilegedState.LoadDebugRegisters(target);
        return Errno.None;
    }

    /// <summary>The context of a vCPU that is at rest (arch_get_info_guest), with machine frames.</summary>
    /// <param name="vcpu">The vCPU.</param>
    /// <param name="extendedState">Its extended state, which begins as FXSAVE writes it.</param>
    /// <param name="guest">The context.</param>
    public static void Capture(Vcpu vcpu, ReadOnlySpan<byte> extendedState, out GuestContext guest)
    {
        VcpuState* state = vcpu.Context->State;
        SegmentRegisters* segments = vcpu.Context->Segments;
        bool inKernel = state->KernelMode != 0;
        guest = new GuestContext
        {
            Flags = FpuValid | (inKernel ? InKernel : 0) | ((ulong)(state->CallbackFlags & ContextCallbackFlags) << FirstCallbackFlag)
                | (vcpu.IsUp ? Online : 0),
            Registers = CaptureRegisters(vcpu.Context),
            Traps = state->Traps,
            LdtBase = state->LdtBase,
            LdtEntries = state->LdtEntries,
            GdtEntries = state->GdtEntries,
            KernelSs = state->KernelSs,
            KernelSp = state->KernelSp,
            EventCallback = state->EventCallback,
            FailsafeCallback = state->FailsafeCallback,
            SyscallCallback = state->SyscallCallback,
            VmAssists = vcpu.Domain.Context->State->VmAssists,
            FsBase = segments->FsBase,
            GsBaseKernel = inKernel ? segments->GsBase : state->InactiveGsBase,
            GsBaseUser = inKernel ? state->InactiveGsBase : segments->GsBase,
        };
        extendedState[..sizeof(FxsaveArea)].CopyTo(guest.Fpu);
        ReadOnlySpan<ulong> frames = state->GdtFrames;
        frames.CopyTo(guest.GdtFrames);
        guest.ControlRegisters[0] = Cr0 | (state->TaskSwitched != 0 ? Cr0TaskSwitched : 0);
        guest.ControlRegisters[1] = state->UserRoot != 0 ? (state->UserRoot << Paging.PageShift) | UserRootValid : 0;
        guest.ControlRegisters[2] = state->Cr2;
        guest.ControlRegisters[3] = state->KernelRoot << Paging.PageShift;
        guest.ControlRegisters[4] = state->Cr4;
        ReadOnlySpan<ulong> debug = state->DebugRegisters;
        debug.CopyTo(guest.DebugRegisters);
    }

    private static UserRegisters CaptureRegisters(VcpuContext* vcpu)
    {
        CpuRegisters* from = vcpu->Registers;
        SegmentRegisters* segments = vcpu->Segments;
        return new UserRegisters
        {
            Rax = from->Rax,
            Rbx = from->Rbx,
            Rcx = from->Rcx,
            Rdx = from->Rdx,
            Rsi = from->Rsi,
            Rdi = from->Rdi,
            Rsp = from->Rsp,
            Rbp = from->Rbp,
            R8 = from->R8,
            R9 = from->R9,
            R10 = from->R10,
            R11 = from->R11,
            R12 = from->R12,
            R13 = from->R13,
            R14 = from->R14,
            R15 = from->R15,
            Rip = from->Rip,

            // The virtual IOPL, as the guest is to see it.
            Rflags = (from->Rflags & ~(ulong)Rflags.Iopl) | vcpu->State->Iopl,
            Cs = segments->Cs,
            Ss = segments->Ss,
            Ds = segments->Ds,
            Es = segments->Es,
            Fs = segments->Fs,
            Gs = segments->Gs,
        };
    }

    private static bool IsValid(in GuestContext guest)
    {
        ReadOnlySpan<ulong> addresses =
        [
            guest.Registers.Rip, guest.Registers.Rsp, guest.KernelSp, guest.LdtEntries != 0 ? guest.LdtBase : 0, guest.FsBase,
            guest.GsBaseKernel, guest.GsBaseUser, guest.EventCallback, guest.SyscallCallback, guest.FailsafeCallback,
        ];
        foreach (ulong address in addresses)
        {
            if (!new VirtualAddress(address).IsCanonical)
                return false;
        }

        for (int i = 0; i < 256; i++)
        {
            if (!new VirtualAddress(guest.Traps[i].Address).IsCanonical)
                return false;
        }

        return !new VirtualAddress(guest.LdtBase).IsHypervisorReserved && (guest.LdtBase & Paging.PageOffsetMask) == 0
            && guest.LdtEntries <= MaxLdtEntries;
    }

    private static Errno SetRoots(VcpuContext* caller, VcpuContext* target, Mfn kernel, Mfn user)
    {
        Errno error;
        if (kernel.Value == 0)
            return Errno.EINVAL;
        if (target->State->KernelRoot != kernel.Value)
        {
            DropKernelRoot(caller, target);
            error = PageTables.GetPageAndType(caller, kernel, PageType.L4PageTable, out _);
            if (error != Errno.None)
                return error;
            PageTables.ShowToKernel(caller, kernel);
            target->State->KernelRoot = kernel.Value;
        }

        if (user.Value == 0)
            return Errno.None;
        error = PageTables.GetPageAndType(caller, user, PageType.L4PageTable, out _);
        if (error == Errno.None)
        {
            PageTables.HideFromUser(caller, user, kernel);
            target->State->UserRoot = user.Value;
        }
        else if (error != Errno.ERESTART)
        {
            // What was only interrupted comes again, and finds the kernel's done.
            DropKernelRoot(caller, target);
        }

        return error;
    }

    private static void DropKernelRoot(VcpuContext* caller, VcpuContext* target)
    {
        var root = new Mfn(target->State->KernelRoot);
        if (root.Value == 0)
            return;
        target->State->KernelRoot = 0;
        FrameTable* frames = FrameTable.Of(caller->Domain);
        FrameInfo* info = frames->Find(root);
        PageTables.Release(caller, root, info);
        frames->PutPage(info);
    }

    private static void SetRegisters(VcpuContext* target, in GuestContext guest)
    {
        ref readonly UserRegisters from = ref guest.Registers;
        *target->Registers = new CpuRegisters
        {
            Rax = from.Rax,
            Rbx = from.Rbx,
            Rcx = from.Rcx,
            Rdx = from.Rdx,
            Rsi = from.Rsi,
            Rdi = from.Rdi,
            Rsp = from.Rsp,
            Rbp = from.Rbp,
            R8 = from.R8,
            R9 = from.R9,
            R10 = from.R10,
            R11 = from.R11,
            R12 = from.R12,
            R13 = from.R13,
            R14 = from.R14,
            R15 = from.R15,
            Rip = from.Rip,
            Rflags = (from.Rflags & ~(ulong)Rflags.Iopl) | (ulong)(Rflags.Fixed | Rflags.InterruptEnable),
        };
        bool inKernel = (guest.Flags & InKernel) != 0;
        *target->Segments = new SegmentRegisters
        {
            Cs = (ushort)(from.Cs | 3),
            Ss = (ushort)(from.Ss | 3),
            Ds = (ushort)from.Ds,
            Es = (ushort)from.Es,
            Fs = (ushort)from.Fs,
            Gs = (ushort)from.Gs,
            FsBase = guest.FsBase,
            GsBase = inKernel ? guest.GsBaseKernel : guest.GsBaseUser,
        };
        target->State->InactiveGsBase = inKernel ? guest.GsBaseUser : guest.GsBaseKernel;
    }

    private static void SetState(VcpuState* state, CpuidPolicy cpuid, in GuestContext guest)
    {
        state->KernelMode = (guest.Flags & InKernel) != 0 ? 1 : 0;
        state->Iopl = guest.Registers.Rflags & (ulong)Rflags.Iopl;
        state->Traps = guest.Traps;
        for (int i = 0; i < 256; i++)
            state->Traps[i].Cs |= 3;
        state->LdtBase = guest.LdtEntries == 0 ? 0 : guest.LdtBase;
        state->LdtEntries = (uint)guest.LdtEntries;
        state->KernelSs = guest.KernelSs | 3;
        state->KernelSp = guest.KernelSp;
        state->TaskSwitched = (guest.ControlRegisters[0] & Cr0TaskSwitched) != 0 ? 1 : 0;
        state->Cr4 = PrivilegedEmulator.GuestCr4(cpuid, guest.ControlRegisters[4]);
        state->EventCallback = guest.EventCallback;
        state->FailsafeCallback = guest.FailsafeCallback;
        state->SyscallCallback = guest.SyscallCallback;
        state->CallbackFlags = (CallbackFlags)(guest.Flags >> FirstCallbackFlag) & ContextCallbackFlags;
    }
}
