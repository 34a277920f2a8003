using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>What emulated instructions reach, for one vCPU.</summary>
internal sealed unsafe class PrivilegedState(Vcpu vcpu) : IPrivilegedState
{
    private const ulong Cr4Tsd = 1 << 2;
    private const ulong Cr4Fsgsbase = 1 << 16;
    private readonly Vcpu _vcpu = vcpu;

    public CpuidPolicy Cpuid => _vcpu.Domain.Cpuid;

    public IoPorts Ports => _vcpu.Domain.Ports;

    public ulong ReadTimeStampCounter() => _vcpu.Domain.Time.GuestTsc;

    public void SetTaskSwitched(bool value) => _vcpu.Cpu.SetTaskSwitched(value);

    public Errno SetPageTableRoot(Mfn root) => MmuextOp.NewBaseptr(_vcpu.Context, root);

    public void SetControlRegister4(ulong value) => LoadControlRegister4(_vcpu);

    public void SetXcr0(ulong value) => _vcpu.Cpu.SetXcr0(value);

    public void SetDebugRegister(int register, ulong value) => LoadDebugRegisters(_vcpu);

    public void SetTscAux(uint value)
    {
        // RDTSCP and RDPID are not offered (CpuidOptions.TscAuxUsable): the register is the guest's only to read back.
    }

    public void NoteGsBaseRead(ulong rip, int length) => _vcpu.NoteGsBaseRead(rip, length);

    public bool InstallHypercallPage(Mfn frame)
    {
        FrameInfo* info;
        Errno error;
        while ((error = PageTables.GetPageAndType(_vcpu.Context, frame, PageType.Writable, out info)) == Errno.ERESTART)
        {
            // It was a page table up to now, and other vCPUs have to notice.
            _vcpu.Cpu.Settle();
            _ = Thread.Yield();
        }

        if (error != Errno.None)
            return false;
        HypercallPage.Fill(new Span<byte>(_vcpu.Context->Domain->Memory.Page(frame), (int)Paging.PageSize));
        GuestAccess.Written(_vcpu.Context, frame, 0, Paging.PageSize);
        _ = PageTables.PutPageAndType(_vcpu.Context, frame, info);
        return true;
    }

    /// <summary>Loads what the processor itself has of the guest's CR4.</summary>
    public static void LoadControlRegister4(Vcpu vcpu)
    {
        ulong value = vcpu.Context->State->Cr4;
        vcpu.Cpu.SetTimeStampDisable((value & Cr4Tsd) != 0);
        vcpu.Cpu.SetFsgsbase((value & Cr4Fsgsbase) != 0);
    }

    /// <summary>Loads the processor's debug registers after <see cref="DebugRegisters.Set"/> changed one of them.</summary>
    /// <param name="vcpu">The vCPU.</param>
    /// <param name="hardware">The register to load, or negative for none.</param>
    public static void LoadDebugRegister(Vcpu vcpu, int hardware)
    {
        if (hardware >= 0)
            LoadDebugRegisters(vcpu);
    }

    /// <summary>Loads all of the processor's debug registers.</summary>
    public static void LoadDebugRegisters(Vcpu vcpu)
    {
        VcpuState* state = vcpu.Context->State;
        Span<ulong> values = stackalloc ulong[8];
        ((ReadOnlySpan<ulong>)state->DebugRegisters).CopyTo(values);
        values[6] |= DebugRegisters.StatusOnes;
        values[7] = DebugRegisters.HardwareControl(state) | DebugRegisters.ControlOnes;
        vcpu.Cpu.SetDebugRegisters(values);
    }
}
