// The XSAVE area: which state components a guest has, where they lie, and CPUID leaf 0xD.
using System.Numerics;

namespace XenSharp.Domains.Emulation;

/// <summary>State components and sizes of the XSAVE area (Intel SDM volume 1, 13.4), taken from the host, whose format it is.</summary>
internal sealed class XstateLayout
{
    /// <summary>XCR0 bit of the upper halves of YMM.</summary>
    public const ulong Avx = 1 << 2;

    /// <summary>XCR0 bits of AVX-512: opmask, upper halves of ZMM0–15, ZMM16–31.</summary>
    public const ulong Avx512 = 7 << 5;

    private const ulong X87AndSse = 3;
    private const uint LegacyAndHeader = 512 + 64;

    // The components that Xen offers PV guests end at ZMM16–31; protection keys do not exist there.
    private const int Components = 8;

    private readonly CpuidLeaf[] _components = new CpuidLeaf[Components];

    public XstateLayout(CpuidSource host, ulong supported)
    {
        if (host(0, 0).Eax < 0xd)
            return;
        CpuidLeaf main = host(0xd, 0);
        Mask = supported & (main.Eax | ((ulong)main.Edx << 32)) & (X87AndSse | Avx | Avx512);
        for (uint i = 2; i < Components; i++)
        {
            if ((Mask & (1UL << (int)i)) != 0)
                _components[i] = host(0xd, i);
        }
    }

    /// <summary>XCR0 bits that may be set.</summary>
    public ulong Mask { get; private set; }

    /// <summary>The legacy components are there: without them XSAVE is of no use.</summary>
    public bool IsUsable => (Mask & X87AndSse) == X87AndSse;

    /// <summary>All of these components are there.</summary>
    public bool Supports(ulong components) => (Mask & components) == components;

    /// <summary>Keeps the legacy components and those given.</summary>
    public void Restrict(ulong components) => Mask &= X87AndSse | components;

    /// <summary>Leaf 0xD for a guest that has XSAVE.</summary>
    /// <param name="subleaf">The subleaf.</param>
    /// <param name="xcr0">The guest's XCR0: two sizes depend on it.</param>
    /// <param name="instructions">EAX of subleaf 1: XSAVEOPT, XSAVEC, XGETBV with ECX 1.</param>
    public CpuidLeaf Query(uint subleaf, ulong xcr0, uint instructions)
    {
        switch (subleaf)
        {
            case 0:
                return new CpuidLeaf((uint)Mask, StandardSize(xcr0 & Mask), StandardSize(Mask), (uint)(Mask >> 32));
            case 1:
                const uint xsavec = 2;
                return new CpuidLeaf(instructions, (instructions & xsavec) != 0 ? CompactedSize(xcr0 & Mask) : 0, 0, 0);
            case < Components when (Mask & (1UL << (int)subleaf)) != 0:
                CpuidLeaf component = _components[subleaf];
                const uint alignedWhenCompacted = 2;
                return new CpuidLeaf(component.Eax, component.Ebx, component.Ecx & alignedWhenCompacted, 0);
            default:
                return default;
        }
    }

    /// <summary>Bytes of the XSAVE area in its standard form, with these components.</summary>
    public uint StandardSize(ulong components)
    {
        uint size = LegacyAndHeader;
        for (ulong left = components & ~X87AndSse; left != 0; left &= left - 1)
        {
            CpuidLeaf component = _components[BitOperations.TrailingZeroCount(left)];
            size = Math.Max(size, component.Ebx + component.Eax);
        }

        return size;
    }

    private uint CompactedSize(ulong components)
    {
        uint size = LegacyAndHeader;
        for (ulong left = components & ~X87AndSse; left != 0; left &= left - 1)
        {
            CpuidLeaf component = _components[BitOperations.TrailingZeroCount(left)];
            if ((component.Ecx & 2) != 0)
                size = (size + 63) & ~63u;
            size += component.Eax;
        }

        return size;
    }
}
