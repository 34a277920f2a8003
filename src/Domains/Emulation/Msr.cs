// Numbers of model-specific registers.
namespace XenSharp.Domains.Emulation;

/// <summary>MSR numbers (Intel SDM volume 4; AMD APM volume 2, appendix A) that the emulation tells apart.</summary>
public static class Msr
{
    public const uint PentiumMachineCheckType = 0x1;
    public const uint TimeStampCounter = 0x10;
    public const uint PlatformId = 0x17;
    public const uint ApicBase = 0x1b;
    public const uint FeatureControl = 0x3a;
    public const uint MicrocodeRevision = 0x8b;
    public const uint PerformanceCounter0 = 0xc1;
    public const uint PlatformInfo = 0xce;
    public const uint MaximumPerformanceCount = 0xe7;
    public const uint ActualPerformanceCount = 0xe8;
    public const uint MiscFeaturesEnables = 0x140;
    public const uint MachineCheckCapability = 0x179;
    public const uint MachineCheckStatus = 0x17a;
    public const uint MachineCheckControl = 0x17b;
    public const uint EventSelect0 = 0x186;
    public const uint PerformanceStatus = 0x198;
    public const uint PerformanceControl = 0x199;
    public const uint ThermalControl = 0x19a;
    public const uint ThermalStatus = 0x19c;
    public const uint MiscEnable = 0x1a0;
    public const uint EnergyPerformanceBias = 0x1b0;
    public const uint PageAttributeTable = 0x277;
    public const uint MachineCheckControl2 = 0x280;
    public const uint FixedCounter0 = 0x309;
    public const uint PerformanceCapabilities = 0x345;
    public const uint FixedCounterControl = 0x38d;
    public const uint MachineCheckBank0 = 0x400;
    public const uint Hypervisor = 0x40000000;
    public const uint Efer = 0xc0000080;
    public const uint FsBase = 0xc0000100;
    public const uint GsBase = 0xc0000101;
    public const uint KernelGsBase = 0xc0000102;
    public const uint TscAux = 0xc0000103;
    public const uint AmdEventSelect0 = 0xc0010000;
    public const uint AmdHardwareConfiguration = 0xc0010015;
    public const uint AmdNorthbridgeConfiguration = 0xc001001f;
    public const uint AmdFidVidControl = 0xc0010041;
    public const uint AmdFidVidStatus = 0xc0010042;
    public const uint AmdMmioConfigurationBase = 0xc0010058;
    public const uint AmdPstateLimit = 0xc0010061;
    public const uint AmdPstate7 = 0xc001006b;
    public const uint AmdCoreEventSelect0 = 0xc0010200;
    public const uint AmdDecodeConfiguration = 0xc0011029;
}
