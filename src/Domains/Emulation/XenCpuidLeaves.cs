// CPUID leaves 0x40000000-0x40000005: how a guest finds Xen.
using System.Numerics;
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>Xen's own leaves (xen/arch-x86/cpuid.h), as a PV domain reads them.</summary>
internal sealed class XenCpuidLeaves
{
    /// <summary>The Xen that the ABI is: 4.17.</summary>
    public const uint Version = (4 << 16) | 17;

    /// <summary>First MSR of the hypervisor: writing to it installs a hypercall page.</summary>
    public const uint MsrBase = 0x40000000;

    private const uint Base = 0x40000000;
    private const uint LastIndex = 5;

    private readonly CpuidLeaf _tsc;
    private readonly CpuidLeaf _tscScale;
    private readonly uint _hostTscKiloHertz;
    private readonly uint _machineAddressBits;

    public XenCpuidLeaves(CpuidOptions options, bool hostHasRdtscp)
    {
        const uint hostTscSafe = 1 << 1;
        const uint rdtscp = 1 << 2;
        _tsc = new CpuidLeaf((options.TscReliable ? hostTscSafe : 0) | (hostHasRdtscp ? rdtscp : 0), 0, options.TscKiloHertz, 0);
        (uint multiplier, int shift) = Scale(options.TscKiloHertz);
        _tscScale = new CpuidLeaf(0, 0, multiplier, (uint)shift);
        _hostTscKiloHertz = options.HostTscKiloHertz;
        ulong end = options.EndOfMachineFrames.Value;
        _machineAddressBits = (uint)(end == 0 ? 0 : BitOperations.Log2(end) + 1) + Paging.PageShift;
    }

    /// <summary>A leaf in 0x40000000–0x400001ff.</summary>
    public CpuidLeaf Query(uint leaf, uint subleaf) => (leaf - Base, subleaf) switch
    {
        // "XenVMMXenVMM" in EBX, ECX, EDX.
        (0, _) => new CpuidLeaf(Base + LastIndex, 0x566e6558, 0x65584d4d, 0x4d4d566e),
        (1, _) => new CpuidLeaf(Version, 0, 0, 0),

        // One hypercall page, its MSR, and MMU_PT_UPDATE_PRESERVE_AD.
        (2, _) => new CpuidLeaf(1, MsrBase, 1, 0),

        // The TSC is native: not emulated, mode "default", never migrated.
        (3, 0) => _tsc,
        (3, 1) => _tscScale,
        (3, 2) => new CpuidLeaf(_hostTscKiloHertz, 0, 0, 0),
        (5, 0) => new CpuidLeaf(0, _machineAddressBits, 0, 0),
        _ => default,
    };

    // ns = (ticks shifted left by shift) × multiplier / 2^32, with the multiplier as large as it can be.
    private static (uint Multiplier, int Shift) Scale(uint kiloHertz)
    {
        if (kiloHertz == 0)
            return (0, 0);
        const ulong nanoseconds = 1_000_000_000;
        ulong ticks = kiloHertz * 1000UL;
        int shift = 0;
        for (; ticks > nanoseconds * 2; ticks >>= 1)
            shift--;
        for (; ticks <= nanoseconds; ticks <<= 1)
            shift++;
        return ((uint)((nanoseconds << 32) / ticks), shift);
    }
}
