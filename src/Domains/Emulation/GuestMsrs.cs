// RDMSR and WRMSR of a PV guest. No access reaches the host.
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>
/// One vCPU's model-specific registers, as Xen 4.17 answers an unprivileged PV guest on a host of the policy's vendor. Registers
/// that Xen reads from the host (MISC_ENABLE, PLATFORM_ID) have fixed values here, because a program without privileges
/// cannot read them.
/// </summary>
/// <param name="vcpu">The vCPU.</param>
/// <param name="machine">Its machine.</param>
public sealed unsafe class GuestMsrs(VcpuContext* vcpu, IPrivilegedState machine)
{
    private const ulong ApicDefaultBase = 0xfee0_0000;
    private const ulong ApicEnabled = 1 << 11;
    private const ulong ApicBootProcessor = 1 << 8;

    /// <summary>The page-attribute table that the PV ABI fixes: WB, WT, UC-, UC, WC, WP, UC, UC.</summary>
    private const ulong XenPat = 0x0501_0007_0406;

    private const ulong EferSyscall = 1 << 0;
    private const ulong EferLongMode = (1 << 8) | (1 << 10);
    private const ulong EferNoExecute = 1 << 11;
    private const ulong FeatureControlLocked = 1;
    private const ulong LfenceSerialising = 1 << 1;

    // Fast strings; branch trace and PEBS unavailable; xTPR disabled: what Xen leaves of a usual Intel host's value.
    private const ulong IntelMiscEnable = (1 << 0) | (1 << 11) | (1 << 12) | (1 << 23);

    private const uint MachineCheckBanks = 2;

    // The architecture's ranges for 32 banks.
    private const uint MachineCheckBankRegisters = 32 * 4;
    private const uint MachineCheckControl2Registers = 32;

    // Corrected-error interrupt, threshold status, software error recovery; and the banks.
    private const ulong IntelMachineCheckCapability = (1 << 10) | (1 << 11) | (1 << 24) | MachineCheckBanks;

    private uint _tscAux;
    private ulong _machineCheckStatus;
    private BankControls _bankControl2;

    [System.Runtime.CompilerServices.InlineArray((int)MachineCheckBanks)]
    private struct BankControls
    {
        private ulong _element;
    }

    private bool IsIntel => machine.Cpuid.Vendor == CpuVendor.Intel;

    private bool IsAmd => machine.Cpuid.Vendor == CpuVendor.Amd;

    private ulong Efer => EferSyscall | EferLongMode | (machine.Cpuid.HasNx ? EferNoExecute : 0);

    /// <summary>Reads a register.</summary>
    /// <returns>False for #GP(0).</returns>
    public bool TryRead(uint number, out ulong value)
    {
        if (TryReadKnown(number, out value))
            return true;

        // A kernel that has no #GP handler yet would die; Xen gives it zero, but for the hypervisor's own range.
        value = 0;
        return vcpu->State->Traps[(int)ExceptionVector.GeneralProtection].Address == 0 && number >> 16 != Msr.Hypervisor >> 16;
    }

    /// <summary>Writes a register.</summary>
    /// <returns>False for #GP(0): nothing was changed.</returns>
    public bool TryWrite(uint number, ulong value)
    {
        switch (number)
        {
            case Msr.FsBase when new VirtualAddress(value).IsCanonical:
                vcpu->Segments->FsBase = value;
                return true;
            case Msr.GsBase when new VirtualAddress(value).IsCanonical:
                vcpu->Segments->GsBase = value;
                return true;
            case Msr.KernelGsBase when new VirtualAddress(value).IsCanonical:
                vcpu->State->InactiveGsBase = value;
                return true;

            // Kernels write back what they read.
            case Msr.Efer:
                return value == Efer;

            case Msr.TscAux when machine.Cpuid.HasTscAux && value <= uint.MaxValue:
                _tscAux = (uint)value;
                machine.SetTscAux(_tscAux);
                return true;

            case Msr.MicrocodeRevision:
                return IsIntel && value == 0;
            case Msr.MiscFeaturesEnables:
                return value == 0;
            case Msr.MiscEnable:
                return IsIntel;
            case Msr.PerformanceControl:
            case Msr.ThermalControl:
            case Msr.EnergyPerformanceBias:
                return IsIntel;
            case Msr.MaximumPerformanceCount:
            case Msr.ActualPerformanceCount:
                return IsIntel || IsAmd;
            case Msr.AmdNorthbridgeConfiguration:
                return true;
            case Msr.AmdMmioConfigurationBase:
                return HasMmioConfiguration;
            case Msr.AmdHardwareConfiguration:
            case Msr.AmdDecodeConfiguration:
                return IsAmd;

            case Msr.MachineCheckCapability:
            case Msr.MachineCheckControl:
                return true;
            case Msr.MachineCheckStatus:
                _machineCheckStatus = value;
                return true;

            case Msr.Hypervisor:
                return (value & Paging.PageOffsetMask) == 0 && machine.InstallHypercallPage(new Mfn(value >> Paging.PageShift));
        }

        if (IsPstate(number) || IsPerformanceCounter(number))
            return true;
        return TryWriteMachineCheckBank(number, value);
    }

    private bool HasMmioConfiguration => IsAmd && machine.Cpuid.Family is >= 0x10 and < 0x17;

    private bool TryReadKnown(uint number, out ulong value)
    {
        value = 0;
        switch (number)
        {
            case Msr.FsBase:
                value = vcpu->Segments->FsBase;
                return true;
            case Msr.GsBase:
                value = vcpu->Segments->GsBase;
                return true;
            case Msr.KernelGsBase:
                value = vcpu->State->InactiveGsBase;
                return true;
            case Msr.Efer:
                value = Efer;
                return true;
            case Msr.TimeStampCounter:
                value = machine.ReadTimeStampCounter();
                return true;
            case Msr.TscAux:
                value = _tscAux;
                return machine.Cpuid.HasTscAux;
            case Msr.ApicBase:
                value = ApicDefaultBase | ApicEnabled | (vcpu->State->Id == 0 ? ApicBootProcessor : 0);
                return true;
            case Msr.PageAttributeTable:
                value = XenPat;
                return true;
            case Msr.MiscEnable:
                value = IntelMiscEnable;
                return IsIntel;
            case Msr.FeatureControl:
                value = FeatureControlLocked;
                return IsIntel;
            case Msr.PlatformId:
            case Msr.PerformanceStatus:
            case Msr.PerformanceControl:
            case Msr.ThermalStatus:
                return IsIntel;
            case Msr.MicrocodeRevision:
                // Intel has it in the upper half.
                value = (ulong)machine.Cpuid.MicrocodeRevision << (IsIntel ? 32 : 0);
                return IsIntel || IsAmd;
            case Msr.PlatformInfo:
            case Msr.MiscFeaturesEnables:
            case Msr.PerformanceCapabilities:
            case Msr.Hypervisor:
            case Msr.AmdNorthbridgeConfiguration:
                return true;
            case Msr.AmdMmioConfigurationBase:
                return HasMmioConfiguration;
            case Msr.AmdHardwareConfiguration:
                return IsAmd;
            case Msr.AmdDecodeConfiguration:
                value = LfenceSerialising;
                return IsAmd;
            case Msr.MachineCheckCapability:
                value = IsIntel ? IntelMachineCheckCapability : MachineCheckBanks;
                return true;
            case Msr.MachineCheckStatus:
                value = _machineCheckStatus;
                return true;

            // No MCG_CTL in the capabilities: reads as zero.
            case Msr.MachineCheckControl:
                return true;
        }

        if (IsPstate(number) || IsPerformanceCounter(number))
            return true;
        return TryReadMachineCheckBank(number, ref value);
    }

    private bool TryReadMachineCheckBank(uint number, ref ulong value)
    {
        // In the banks that exist every error source is enabled and no error was ever seen; the others read as zero.
        if (number - Msr.MachineCheckBank0 < MachineCheckBankRegisters)
        {
            if (number - Msr.MachineCheckBank0 < MachineCheckBanks * 4 && (number & 3) == 0)
                value = ulong.MaxValue;
            return true;
        }

        if (IsIntel && number - Msr.MachineCheckControl2 < MachineCheckBanks)
            value = _bankControl2[(int)(number - Msr.MachineCheckControl2)];
        return number - Msr.MachineCheckControl2 < MachineCheckControl2Registers || number <= Msr.PentiumMachineCheckType;
    }

    private bool TryWriteMachineCheckBank(uint number, ulong value)
    {
        // Control registers keep what they are; status, address and misc of the banks that exist can only be cleared.
        if (number - Msr.MachineCheckBank0 < MachineCheckBankRegisters)
            return (number & 3) == 0 || value == 0 || number - Msr.MachineCheckBank0 >= MachineCheckBanks * 4;
        if (IsIntel && number - Msr.MachineCheckControl2 < MachineCheckBanks)
            _bankControl2[(int)(number - Msr.MachineCheckControl2)] = value;
        return number - Msr.MachineCheckControl2 < MachineCheckControl2Registers;
    }

    private bool IsPstate(uint number)
        => IsAmd && number is (Msr.AmdFidVidControl or Msr.AmdFidVidStatus or (>= Msr.AmdPstateLimit and <= Msr.AmdPstate7));

    // Without a virtual PMU the counters stand still.
    private bool IsPerformanceCounter(uint number)
    {
        if (IsIntel)
        {
            return number - Msr.PerformanceCounter0 < 8 || number - Msr.EventSelect0 < 4 || number - Msr.FixedCounter0 < 3
                || number - Msr.FixedCounterControl < 4;
        }

        return IsAmd && (number - Msr.AmdEventSelect0 < 8 || number - Msr.AmdCoreEventSelect0 < 12);
    }
}
