// What a PV domain's kernel is told about its processor.
using System.Numerics;
using System.Runtime.Intrinsics.X86;
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>The four registers that CPUID returns.</summary>
public readonly record struct CpuidLeaf(uint Eax, uint Ebx, uint Ecx, uint Edx);

/// <summary>Where a policy takes the host's leaves from.</summary>
public delegate CpuidLeaf CpuidSource(uint leaf, uint subleaf);

/// <summary>Who made the processor, where the rules differ.</summary>
public enum CpuVendor
{
    /// <summary>Neither of the others.</summary>
    Other,
    Intel,

    /// <summary>AMD, and Hygon, which follows AMD's manuals.</summary>
    Amd,
}

/// <summary>What a policy depends on beside the host's CPUID.</summary>
public sealed record CpuidOptions
{
    /// <summary>vCPUs of the domain, 1–255: shown as the cores of one package.</summary>
    public int VcpuCount { get; init; } = 1;

    /// <summary>XCR0 bits that the VM lets a guest set (KVM_SET_XCRS accepts them).</summary>
    public ulong SupportedXcr0 { get; init; } = 0xe7;

    /// <summary>RDTSCP and RDPID at CPL 3 return what <see cref="IPrivilegedState.SetTscAux"/> set.</summary>
    public bool TscAuxUsable { get; init; }

    /// <summary>The guest's TSC frequency in kHz.</summary>
    public uint TscKiloHertz { get; init; }

    /// <summary>The host's TSC frequency in kHz.</summary>
    public uint HostTscKiloHertz { get; init; }

    /// <summary>All processors' TSCs tick together and never stop.</summary>
    public bool TscReliable { get; init; }

    /// <summary>The host's microcode revision, as /proc/cpuinfo tells it; 0 for unknown.</summary>
    public uint MicrocodeRevision { get; init; }

    /// <summary>What is to be otherwise than Xen's default policy has it.</summary>
    public IReadOnlyList<CpuidOverride> Overrides { get; init; } = [];

    /// <summary>One past the highest machine frame that a page-table entry may name.</summary>
    public Mfn EndOfMachineFrames { get; init; }
}

/// <summary>The vCPU state that some leaves show.</summary>
/// <param name="Vcpu">Number of the vCPU: its APIC id.</param>
/// <param name="Cr4">The guest's CR4.</param>
/// <param name="Xcr0">The guest's XCR0.</param>
/// <param name="ForcedInKernel">
/// Asked by the kernel through the forced-emulation prefix. Such a caller sees OSXSAVE before it has set CR4.OSXSAVE: kernels came
/// to rely on it, so it is part of the PV ABI.
/// </param>
public readonly record struct CpuidContext(int Vcpu, ulong Cr4, ulong Xcr0, bool ForcedInKernel);

/// <summary>
/// The CPUID leaves of a domain: the host's, reduced as Xen 4.17 reduces them for PV guests by default, and Xen's own from
/// 0x40000000. Built once, then read by any thread.
/// </summary>
/// <remarks>
/// CPUID executed at CPL 3 may not trap, so user space may see the host's leaves instead. Therefore nothing is shown that
/// the host lacks, but for HYPERVISOR and the two bits that only say that a core count is given (HTT, CmpLegacy).
/// </remarks>
public sealed class CpuidPolicy
{
    private const uint LastBasicLeaf = 0xd;
    private const uint LastExtendedLeafIntel = 0x80000008;
    private const uint LastExtendedLeafAmd = 0x80000021;
    private const uint LastFeatureSubleaf = 2;
    private const int CacheSubleaves = 6;
    private const uint Cr4OsXsave = 1 << 18;
    private const uint OsXsaveBit = 1 << 27;

    // Bits that leaf 0x80000001 EDX repeats from leaf 1 EDX on AMD.
    internal const uint CommonFeatureBits = 0x0183_f3ff;

    private readonly CpuidLeaf[] _basic = new CpuidLeaf[LastBasicLeaf + 1];
    private readonly CpuidLeaf[] _extended = new CpuidLeaf[(LastExtendedLeafAmd & 0xffff) + 1];
    private readonly CpuidLeaf[] _features = new CpuidLeaf[LastFeatureSubleaf + 1];
    private readonly CpuidLeaf[] _caches = new CpuidLeaf[CacheSubleaves];
    private readonly XenCpuidLeaves _xen;
    private readonly FeatureSet _set;

    /// <summary>Builds the policy of a domain.</summary>
    /// <param name="host">The host's CPUID.</param>
    /// <param name="options">The rest.</param>
    /// <exception cref="ArgumentOutOfRangeException">The number of vCPUs is not 1–255.</exception>
    public CpuidPolicy(CpuidSource host, CpuidOptions options)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(options.VcpuCount, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(options.VcpuCount, 255);
        CpuidLeaf identity = host(0, 0);
        Vendor = VendorOf(identity);
        MicrocodeRevision = options.MicrocodeRevision;
        MaxBasicLeaf = Math.Min(identity.Eax, LastBasicLeaf);
        uint maxHostExtended = host(0x80000000, 0).Eax;
        MaxExtendedLeaf = maxHostExtended < 0x80000000
            ? 0x80000000
            : Math.Min(maxHostExtended, Vendor == CpuVendor.Amd ? LastExtendedLeafAmd : LastExtendedLeafIntel);
        uint maxFeatureSubleaf = MaxBasicLeaf < 7 ? 0 : Math.Min(host(7, 0).Eax, LastFeatureSubleaf);

        _set = ReadFeatures(host, maxFeatureSubleaf);
        _set.Intersect(FeatureSet.Offered());
        TakeFeatures(options.Overrides);
        Xstate = new XstateLayout(host, options.SupportedXcr0);
        if (MaxBasicLeaf < LastBasicLeaf || !Xstate.IsUsable)
            _set.Set(CpuFeature.Xsave, false);
        if (!Xstate.Supports(XstateLayout.Avx))
            _set.Set(CpuFeature.Avx, false);
        if (!Xstate.Supports(XstateLayout.Avx512))
            _set.Set(CpuFeature.Avx512F, false);
        if (!options.TscAuxUsable)
        {
            _set.Set(CpuFeature.Rdtscp, false);
            _set.Set(CpuFeature.Rdpid, false);
        }

        _set.Set(CpuFeature.Hypervisor, true);
        _set.Set(CpuFeature.Htt, options.VcpuCount > 1);
        _set.Set(CpuFeature.CmpLegacy, options.VcpuCount > 1 && Vendor == CpuVendor.Amd);
        _set.Sanitise();
        Xstate.Restrict((_set.Has(CpuFeature.Avx) ? XstateLayout.Avx : 0)
            | (_set.Has(CpuFeature.Avx512F) ? XstateLayout.Avx512 : 0));

        FillBasic(host, identity, options, maxFeatureSubleaf);
        FillExtended(host, options);
        _xen = new XenCpuidLeaves(options, (host(0x80000001, 0).Edx & (1 << 27)) != 0 && maxHostExtended > 0x80000000);
    }

    /// <summary>Whose rules the leaves and MSRs follow.</summary>
    public CpuVendor Vendor { get; }

    /// <summary>Microcode revision that the guest may read.</summary>
    public uint MicrocodeRevision { get; }

    /// <summary>Largest basic leaf.</summary>
    public uint MaxBasicLeaf { get; }

    /// <summary>Largest leaf of the 0x80000000 range.</summary>
    public uint MaxExtendedLeaf { get; }

    /// <summary>XCR0 bits that a guest may set; 0 without XSAVE.</summary>
    public ulong MaxXcr0 => _set.Has(CpuFeature.Xsave) ? Xstate.Mask : 0;

    /// <summary>CR4 bits that a guest chooses and this policy lets it: TSD, DE, FSGSBASE, OSXSAVE.</summary>
    public ulong GuestCr4Mask
        => (_set.Has(CpuFeature.Tsc) ? 1UL << 2 : 0) | (_set.Has(CpuFeature.De) ? 1UL << 3 : 0)
            | (_set.Has(CpuFeature.Fsgsbase) ? 1UL << 16 : 0) | (_set.Has(CpuFeature.Xsave) ? Cr4OsXsave : 0);

    /// <summary>RDTSCP is offered.</summary>
    public bool HasRdtscp => _set.Has(CpuFeature.Rdtscp);

    /// <summary>The TSC_AUX MSR exists.</summary>
    public bool HasTscAux => _set.Has(CpuFeature.Rdtscp) || _set.Has(CpuFeature.Rdpid);

    /// <summary>Pages may be marked not executable.</summary>
    public bool HasNx => _set.Has(CpuFeature.Nx);

    /// <summary>Display family (Intel SDM volume 2, CPUID leaf 1).</summary>
    public int Family
    {
        get
        {
            int family = (int)(_basic[1].Eax >> 8) & 15;
            return family == 15 ? family + ((int)(_basic[1].Eax >> 20) & 255) : family;
        }
    }

    internal XstateLayout Xstate { get; }

    internal FeatureSet Features => _set;

    /// <summary>Builds the policy from the processor that this runs on.</summary>
    public static CpuidPolicy FromHost(CpuidOptions options) => new(HostLeaf, options);

    /// <summary>The host's own CPUID, as a <see cref="CpuidSource"/>.</summary>
    public static CpuidLeaf HostLeaf(uint leaf, uint subleaf)
    {
        (int eax, int ebx, int ecx, int edx) = X86Base.CpuId((int)leaf, (int)subleaf);
        return new CpuidLeaf((uint)eax, (uint)ebx, (uint)ecx, (uint)edx);
    }

    /// <summary>True for an XCR0 that this policy allows and the processor would accept (Intel SDM volume 1, 13.3).</summary>
    public bool IsValidXcr0(ulong value)
    {
        const ulong x87 = 1;
        const ulong sse = 2;
        if ((value & ~MaxXcr0) != 0 || (value & x87) == 0)
            return false;
        if ((value & XstateLayout.Avx) != 0 && (value & sse) == 0)
            return false;
        ulong wide = value & XstateLayout.Avx512;
        return wide == 0 || (wide == XstateLayout.Avx512 && (value & XstateLayout.Avx) != 0);
    }

    /// <summary>The guest's leaf. Leaves that are out of range are zero.</summary>
    public CpuidLeaf Query(uint leaf, uint subleaf, in CpuidContext context)
    {
        if (leaf is >= 0x40000000 and <= 0x400001ff)
            return _xen.Query(leaf, subleaf);
        if (leaf >= 0x80000000)
            return leaf <= MaxExtendedLeaf ? _extended[leaf & 0xffff] : default;
        if (leaf > MaxBasicLeaf)
            return default;
        switch (leaf)
        {
            case 1:
                CpuidLeaf value = _basic[1];
                bool xsaveOpen = (context.Cr4 & Cr4OsXsave) != 0 || (context.ForcedInKernel && _set.Has(CpuFeature.Xsave));
                return value with
                {
                    Ebx = value.Ebx | ((uint)context.Vcpu << 24),
                    Ecx = value.Ecx | (xsaveOpen ? OsXsaveBit : 0),
                };
            case 4:
                return subleaf < CacheSubleaves ? _caches[subleaf] : default;
            case 7:
                return subleaf < _features.Length ? _features[subleaf] : default;
            case 0xd:
                return _set.Has(CpuFeature.Xsave) ? Xstate.Query(subleaf, context.Xcr0, _set[FeatureWord.XstateEax]) : default;
            default:
                return _basic[leaf];
        }
    }

    private static CpuVendor VendorOf(in CpuidLeaf identity) => (identity.Ebx, identity.Edx, identity.Ecx) switch
    {
        (0x756e6547, 0x49656e69, 0x6c65746e) => CpuVendor.Intel, // GenuineIntel
        (0x68747541, 0x69746e65, 0x444d4163) => CpuVendor.Amd, // AuthenticAMD
        (0x6f677948, 0x6e65476e, 0x656e6975) => CpuVendor.Amd, // HygonGenuine
        _ => CpuVendor.Other,
    };

    private FeatureSet ReadFeatures(CpuidSource host, uint maxFeatureSubleaf)
    {
        CpuidLeaf Basic(uint leaf, uint subleaf = 0) => leaf <= MaxBasicLeaf ? host(leaf, subleaf) : default;
        CpuidLeaf Extended(uint leaf) => leaf <= MaxExtendedLeaf ? host(leaf, 0) : default;
        CpuidLeaf first = Basic(1);
        CpuidLeaf structured = Basic(7);
        CpuidLeaf extended = Extended(0x80000001);
        return new FeatureSet
        {
            [FeatureWord.Leaf1Edx] = first.Edx,
            [FeatureWord.Leaf1Ecx] = first.Ecx,
            [FeatureWord.Extended1Edx] = extended.Edx,
            [FeatureWord.Extended1Ecx] = extended.Ecx,
            [FeatureWord.XstateEax] = Basic(0xd, 1).Eax,
            [FeatureWord.Leaf7Ebx] = structured.Ebx,
            [FeatureWord.Leaf7Ecx] = structured.Ecx,
            [FeatureWord.Leaf7Edx] = structured.Edx,
            [FeatureWord.Leaf7Sub1Eax] = maxFeatureSubleaf >= 1 ? Basic(7, 1).Eax : 0,
            [FeatureWord.Leaf7Sub2Edx] = maxFeatureSubleaf >= 2 ? Basic(7, 2).Edx : 0,
            [FeatureWord.Extended7Edx] = Extended(0x80000007).Edx,
            [FeatureWord.Extended8Ebx] = Extended(0x80000008).Ebx,
            [FeatureWord.Extended21Eax] = Extended(0x80000021).Eax,
        };
    }

    /// <summary>Takes features away. What is here is all that the host and a PV guest can have, so that none can be added.</summary>
    private void TakeFeatures(IReadOnlyList<CpuidOverride> overrides)
    {
        foreach (CpuidOverride one in overrides)
        {
            if (one.Word is { } word)
                _set[word] &= ~(one.Clear & ~CannotBeHidden(word));
        }
    }

    /// <summary>Bits that say how the x87 unit behaves, whatever a guest is told.</summary>
    private static uint CannotBeHidden(FeatureWord word)
        => word == FeatureWord.Leaf7Ebx ? (1u << ((int)CpuFeature.FdpExceptionOnly & 31)) | (1u << ((int)CpuFeature.NoFpuSelectors & 31)) : 0;

    private void FillBasic(CpuidSource host, in CpuidLeaf identity, CpuidOptions options, uint maxFeatureSubleaf)
    {
        int vcpus = options.VcpuCount;
        _basic[0] = identity with { Eax = MaxBasicLeaf };

        // Family and stepping without the processor type; brand and cache line size; cores, with the APIC id added per vCPU.
        CpuidLeaf first = host(1, 0);
        _basic[1] = new CpuidLeaf(
            first.Eax & 0x0fff_0fff,
            (first.Ebx & 0xffff) | (uint)(vcpus << 16),
            _set[FeatureWord.Leaf1Ecx],
            _set[FeatureWord.Leaf1Edx]);

        // Signature and brand: the bits that are left of the host's.
        foreach (CpuidOverride one in options.Overrides)
        {
            if (one is { Leaf: 1, Register: CpuidRegister.Eax })
                _basic[1] = _basic[1] with { Eax = one.Apply(_basic[1].Eax, first.Eax) & 0x0fff_0fff };
            else if (one is { Leaf: 1, Register: CpuidRegister.Ebx })
                _basic[1] = _basic[1] with { Ebx = (_basic[1].Ebx & 0xffff_0000) | (one.Apply(_basic[1].Ebx, first.Ebx) & 0xffff) };
        }

        // Cache descriptors; the low byte says that one query gives them all.
        if (Vendor == CpuVendor.Intel && MaxBasicLeaf >= 2)
        {
            CpuidLeaf descriptors = host(2, 0);
            _basic[2] = descriptors with { Eax = (descriptors.Eax & ~0xffu) | 1 };
            FillCaches(host, vcpus);
        }

        _features[0] = new CpuidLeaf(
            maxFeatureSubleaf, _set[FeatureWord.Leaf7Ebx], _set[FeatureWord.Leaf7Ecx], _set[FeatureWord.Leaf7Edx]);
        _features[1] = new CpuidLeaf(_set[FeatureWord.Leaf7Sub1Eax], 0, 0, 0);
        _features[2] = new CpuidLeaf(0, 0, 0, _set[FeatureWord.Leaf7Sub2Edx]);

        // The rest stays zero as on Xen: MONITOR, thermal and power, performance counters, x2APIC topology.
    }

    private void FillCaches(CpuidSource host, int vcpus)
    {
        if (MaxBasicLeaf < 4)
            return;
        uint cores = (uint)Math.Min(vcpus - 1, 63);
        uint sharing = (uint)Math.Min((int)BitOperations.RoundUpToPowerOf2((uint)vcpus) - 1, 0xfff);
        for (uint i = 0; i < CacheSubleaves; i++)
        {
            CpuidLeaf cache = host(4, i);
            uint type = cache.Eax & 31;
            if (type is 0 or > 3)
                break;

            // Level 3 and beyond is shared by the whole package; a core has no second thread.
            uint level = (cache.Eax >> 5) & 7;
            _caches[i] = cache with
            {
                Eax = (cache.Eax & 0x3ff) | (level >= 3 ? sharing << 14 : 0) | (cores << 26),
                Edx = cache.Edx & 7,
            };
        }
    }

    private void FillExtended(CpuidSource host, CpuidOptions options)
    {
        int vcpus = options.VcpuCount;
        bool amd = Vendor == CpuVendor.Amd;
        for (uint leaf = 0x80000000; leaf <= MaxExtendedLeaf; leaf++)
            _extended[leaf & 0xffff] = ExtendedLeaf(leaf, host(leaf, 0), amd, vcpus);
        foreach (CpuidOverride one in options.Overrides)
        {
            if (one.IsName && one.Leaf <= MaxExtendedLeaf)
                _extended[one.Leaf & 0xffff] = one.Apply(_extended[one.Leaf & 0xffff], host(one.Leaf, 0));
        }
    }

    private CpuidLeaf ExtendedLeaf(uint leaf, CpuidLeaf host, bool amd, int vcpus)
    {
        switch (leaf)
        {
            case 0x80000000:
                return amd ? _basic[0] with { Eax = MaxExtendedLeaf } : new CpuidLeaf(MaxExtendedLeaf, 0, 0, 0);

            case 0x80000001:
                uint common = amd ? _set[FeatureWord.Leaf1Edx] & CommonFeatureBits : 0;
                return new CpuidLeaf(
                    amd ? _basic[1].Eax : 0,
                    amd ? host.Ebx & 0xff00_ffff : 0,
                    _set[FeatureWord.Extended1Ecx],
                    (_set[FeatureWord.Extended1Edx] & ~CommonFeatureBits) | common);

            case >= 0x80000002 and <= 0x80000004:
                return host;

            case 0x80000005:
                return amd ? host : default;

            case 0x80000006:
                return amd ? host : new CpuidLeaf(0, 0, host.Ecx, 0);

            case 0x80000007:
                return new CpuidLeaf(0, 0, 0, _set[FeatureWord.Extended7Edx]);

            case 0x80000008:
                // Physical addresses as the host has, at least 36 bits; linear addresses of four-level paging.
                uint physical = Math.Clamp(host.Eax & 0xff, 36, 52);
                uint idBits = (uint)BitOperations.Log2(BitOperations.RoundUpToPowerOf2((uint)vcpus));
                return new CpuidLeaf(
                    physical | (48 << 8),
                    _set[FeatureWord.Extended8Ebx],
                    amd ? (uint)(vcpus - 1) | (idBits << 12) : 0,
                    0);

            case 0x8000001a:
                return amd ? host : default;

            case 0x80000021:
                return new CpuidLeaf(_set[FeatureWord.Extended21Eax], 0, 0, 0);

            default:
                return default;
        }
    }
}
