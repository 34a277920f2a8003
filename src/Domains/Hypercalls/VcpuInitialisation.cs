// VCPUOP_initialise: the state that a new vCPU starts in (arch_set_info_guest).
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Mmu;

namespace XenSharp.Domains.Hypercalls;

/// <summary>Takes over a struct vcpu_guest_context for a vCPU that was never up.</summary>
internal static unsafe class VcpuInitialisation
{
    private const ulong FpuValid = 1 << 0;
    private const ulong InKernel = 1 << 2;
    private const int FirstCallbackFlag = 3;
    private const ulong Online = 1 << 5;
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
        ulong gdtFrames = (guest.GdtEntries + (Paging.PageSize / sizeof(ulong)) - 1) / (Paging.PageSize / sizeof(ulong));
        if (!IsValid(guest) || guest.GdtEntries > DescriptorTables.MaxGdtEntries || ((guest.Flags & InKernel) == 0 && guest.ControlRegisters[1] == 0))
            return Errno.EINVAL;
        VcpuContext* context = target.Context;
        if (PageTables.FinishDeferred(caller.Context) != Errno.None)
            return Errno.ERESTART;
        ReadOnlySpan<ulong> frames = guest.GdtFrames;
        Errno error = DescriptorTables.SetGdt(caller.Context, context, frames[..(int)gdtFrames], (uint)guest.GdtEntries);
        if (error == Errno.None)
            error = SetRoots(caller.Context, context, new Mfn(guest.ControlRegisters[3] >> Paging.PageShift), new Mfn(guest.ControlRegisters[1] >> Paging.PageShift));
        if (error != Errno.None)
        {
            _ = DescriptorTables.SetGdt(caller.Context, context, [], 0);
            return error;
        }

        SetRegisters(context, guest);
        SetState(context->State, target.Domain.Cpuid, guest);
        target.Cpu.SetTaskSwitched(context->State->TaskSwitched != 0);
        for (int i = 0; i < 8; i++)
            _ = DebugRegisters.Set(context->State, i, guest.DebugRegisters[i], out _);
        PrivilegedState.LoadDebugRegisters(target);
        if ((guest.Flags & FpuValid) != 0)
            target.Cpu.SetFpu(guest.Fpu);
        if ((guest.Flags & Online) != 0)
            target.BringUp();
        return Errno.None;
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
        bool strict = caller->Domain->State->Has(VmAssist.M2PStrict);
        Errno error;
        if (kernel.Value == 0)
            return Errno.EINVAL;
        if (target->State->KernelRoot != kernel.Value)
        {
            DropKernelRoot(caller, target);
            error = PageTables.GetPageAndType(caller, kernel, PageType.L4PageTable, out _);
            if (error != Errno.None)
                return error;
            if (!strict)
                PageTables.ShowMachineToPhys(caller, kernel, shown: true);
            target->State->KernelRoot = kernel.Value;
        }

        if (user.Value == 0)
            return Errno.None;
        error = PageTables.GetPageAndType(caller, user, PageType.L4PageTable, out _);
        if (error == Errno.None)
        {
            if (strict)
                PageTables.ShowMachineToPhys(caller, user, shown: false);
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
        const ulong taskSwitched = 1 << 3;
        state->KernelMode = (guest.Flags & InKernel) != 0 ? 1 : 0;
        state->Iopl = guest.Registers.Rflags & (ulong)Rflags.Iopl;
        state->Traps = guest.Traps;
        for (int i = 0; i < 256; i++)
            state->Traps[i].Cs |= 3;
        state->LdtBase = guest.LdtEntries == 0 ? 0 : guest.LdtBase;
        state->LdtEntries = (uint)guest.LdtEntries;
        state->KernelSs = guest.KernelSs | 3;
        state->KernelSp = guest.KernelSp;
        state->TaskSwitched = (guest.ControlRegisters[0] & taskSwitched) != 0 ? 1 : 0;
        state->Cr4 = PrivilegedEmulator.GuestCr4(cpuid, guest.ControlRegisters[4]);
        state->EventCallback = guest.EventCallback;
        state->FailsafeCallback = guest.FailsafeCallback;
        state->SyscallCallback = guest.SyscallCallback;
        state->CallbackFlags = (CallbackFlags)((guest.Flags >> FirstCallbackFlag) & (ulong)(CallbackFlags.FailsafeDisablesEvents | CallbackFlags.SyscallDisablesEvents));
    }
}
