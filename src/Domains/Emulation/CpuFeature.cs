// The CPUID feature bits that a PV guest may be offered.
namespace XenSharp.Domains.Emulation;

/// <summary>
/// Feature bits that Xen 4.17 offers PV guests by default (xen/arch-x86/cpufeatureset.h, those marked "A"). The value is
/// 32 × word + bit; the words are <see cref="FeatureWord"/>. A bit that is not here is never shown.
/// </summary>
internal enum CpuFeature : ushort
{
    // Leaf 1, EDX.
    Fpu = 0, De = 2, Tsc = 4, Msr = 5, Pae = 6, Mce = 7, Cx8 = 8, Apic = 9, Sep = 11, Mca = 14, Cmov = 15, Pat = 16, ClFlush = 19,
    Acpi = 22, Mmx = 23, Fxsr = 24, Sse = 25, Sse2 = 26, SelfSnoop = 27, Htt = 28,

    // Leaf 1, ECX.
    Sse3 = 32, Pclmulqdq = 33, Ssse3 = 41, Fma = 44, Cx16 = 45, Sse41 = 51, Sse42 = 52, Movbe = 54, Popcnt = 55, Aesni = 57,
    Xsave = 58, Avx = 60, F16c = 61, Rdrand = 62, Hypervisor = 63,

    // Leaf 0x80000001, EDX.
    Syscall = 75, Nx = 84, MmxExt = 86, Ffxsr = 89, Rdtscp = 91, Lm = 93, ThreeDNowExt = 94, ThreeDNow = 95,

    // Leaf 0x80000001, ECX.
    LahfLm = 96, CmpLegacy = 97, Abm = 101, Sse4a = 102, MisalignSse = 103, ThreeDNowPrefetch = 104, Xop = 107, Fma4 = 112,
    Tbm = 117, Dbext = 122,

    // Leaf 0xD subleaf 1, EAX.
    Xsaveopt = 128, Xsavec = 129, Xgetbv1 = 130,

    // Leaf 7, EBX. The two about the x87 state describe the processor and cannot be hidden.
    Fsgsbase = 160, Bmi1 = 163, Avx2 = 165, FdpExceptionOnly = 166, Bmi2 = 168, Erms = 169, Rtm = 171, NoFpuSelectors = 173,
    Avx512F = 176, Avx512Dq = 177, Rdseed = 178, Adx = 179, Avx512Ifma = 181, ClFlushOpt = 183, Clwb = 184, Avx512Pf = 186,
    Avx512Er = 187, Avx512Cd = 188, Sha = 189, Avx512Bw = 190, Avx512Vl = 191,

    // Leaf 7, ECX.
    PrefetchWt1 = 192, Avx512Vbmi = 193, Avx512Vbmi2 = 198, Gfni = 200, Vaes = 201, Vpclmulqdq = 202, Avx512Vnni = 203,
    Avx512Bitalg = 204, Avx512Vpopcntdq = 206, Rdpid = 214, ClDemote = 217,

    // Leaf 0x80000008, EBX.
    Clzero = 256, RstrFpErrPtrs = 258, Ibpb = 268, SsbNo = 282, BtcNo = 285, IbpbRet = 286,

    // Leaf 7, EDX.
    Avx5124Vnniw = 290, Avx5124Fmaps = 291, Fsrm = 292, MdClear = 298, Serialize = 302, Ibrsb = 314, Stibp = 315, ArchCaps = 317,
    Ssbd = 319,

    // Leaf 7 subleaf 1, EAX.
    AvxVnni = 324, Avx512Bf16 = 325, Fzrm = 330, Fsrs = 331, Fsrcs = 332,

    // Leaf 0x80000021, EAX.
    LfenceDispatch = 354, NullSelectorClearsBase = 358, Sbpb = 379, IbpbBrtype = 380, SrsoNo = 381,

    // Leaf 7 subleaf 2, EDX.
    IntelPsfd = 416, McdtNo = 421,
}

/// <summary>The words of a feature set: registers of CPUID leaves.</summary>
internal enum FeatureWord
{
    Leaf1Edx = 0,
    Leaf1Ecx = 1,
    Extended1Edx = 2,
    Extended1Ecx = 3,
    XstateEax = 4,
    Leaf7Ebx = 5,
    Leaf7Ecx = 6,
    Extended7Edx = 7,
    Extended8Ebx = 8,
    Leaf7Edx = 9,
    Leaf7Sub1Eax = 10,
    Extended21Eax = 11,
    Leaf7Sub2Edx = 13,
    Count = 14,
}

/// <summary>A set of <see cref="CpuFeature"/>.</summary>
internal sealed class FeatureSet
{
    /// <summary>
    /// What cannot work here although Xen has it. SYSENTER has no entry into the monitor (and Xen hides it itself on AMD); the
    /// speculation controls and breakpoint masks are MSRs of the host, which no guest reaches.
    /// </summary>
    private static readonly CpuFeature[] s_unavailable =
    [
        CpuFeature.Sep, CpuFeature.Ibrsb, CpuFeature.Ibpb, CpuFeature.ArchCaps, CpuFeature.Dbext,
    ];

    /// <summary>What needs what: the manuals' prerequisites, first the feature, then those built on it.</summary>
    private static readonly (CpuFeature Needed, CpuFeature[] By)[] s_dependents =
    [
        (CpuFeature.Fpu, [CpuFeature.Mmx, CpuFeature.RstrFpErrPtrs]),
        (CpuFeature.Pae, [CpuFeature.Lm, CpuFeature.Nx]),
        (CpuFeature.Tsc, [CpuFeature.Rdtscp]),
        (CpuFeature.Mmx, [CpuFeature.MmxExt, CpuFeature.ThreeDNow]),
        (CpuFeature.Fxsr, [CpuFeature.Ffxsr, CpuFeature.Sse]),
        (CpuFeature.Sse, [CpuFeature.Sse2, CpuFeature.MisalignSse]),
        (CpuFeature.Sse2, [CpuFeature.Sse3, CpuFeature.Lm, CpuFeature.Aesni, CpuFeature.Pclmulqdq, CpuFeature.Sha, CpuFeature.Gfni]),
        (CpuFeature.Sse3, [CpuFeature.Ssse3, CpuFeature.Sse4a]),
        (CpuFeature.Ssse3, [CpuFeature.Sse41]),
        (CpuFeature.Sse41, [CpuFeature.Sse42]),
        (CpuFeature.Xsave, [CpuFeature.Xsaveopt, CpuFeature.Xsavec, CpuFeature.Xgetbv1, CpuFeature.Avx]),
        (CpuFeature.Avx, [CpuFeature.Fma, CpuFeature.Fma4, CpuFeature.F16c, CpuFeature.Avx2, CpuFeature.Xop]),
        (CpuFeature.Lm, [CpuFeature.Cx16, CpuFeature.LahfLm]),
        (CpuFeature.ThreeDNow, [CpuFeature.ThreeDNowExt]),
        (CpuFeature.Avx2, [CpuFeature.Avx512F, CpuFeature.Vaes, CpuFeature.Vpclmulqdq, CpuFeature.AvxVnni]),
        (CpuFeature.Avx512F,
        [
            CpuFeature.Avx512Dq, CpuFeature.Avx512Ifma, CpuFeature.Avx512Pf, CpuFeature.Avx512Er, CpuFeature.Avx512Cd,
            CpuFeature.Avx512Bw, CpuFeature.Avx512Vl, CpuFeature.Avx5124Vnniw, CpuFeature.Avx5124Fmaps, CpuFeature.Avx512Vnni,
            CpuFeature.Avx512Vpopcntdq,
        ]),
        (CpuFeature.Avx512Bw,
            [CpuFeature.Avx512Vbmi, CpuFeature.Avx512Vbmi2, CpuFeature.Avx512Bitalg, CpuFeature.Avx512Bf16]),
        (CpuFeature.Pclmulqdq, [CpuFeature.Vpclmulqdq]),
        (CpuFeature.Aesni, [CpuFeature.Vaes]),
        (CpuFeature.Ibrsb, [CpuFeature.Stibp, CpuFeature.Ssbd, CpuFeature.IntelPsfd]),
        (CpuFeature.Ibpb, [CpuFeature.IbpbRet, CpuFeature.Sbpb, CpuFeature.IbpbBrtype]),
    ];

    private readonly uint[] _words = new uint[(int)FeatureWord.Count];

    /// <summary>The features that PV guests may have on any host.</summary>
    public static FeatureSet Offered()
    {
        var set = new FeatureSet();
        foreach (CpuFeature feature in Enum.GetValues<CpuFeature>())
            set.Set(feature, true);
        foreach (CpuFeature feature in s_unavailable)
            set.Set(feature, false);
        return set;
    }

    public uint this[FeatureWord word]
    {
        get => _words[(int)word];
        set => _words[(int)word] = value;
    }

    public bool Has(CpuFeature feature) => (_words[(int)feature >> 5] & (1u << ((int)feature & 31))) != 0;

    public void Set(CpuFeature feature, bool value)
    {
        uint bit = 1u << ((int)feature & 31);
        if (value)
            _words[(int)feature >> 5] |= bit;
        else
            _words[(int)feature >> 5] &= ~bit;
    }

    /// <summary>Keeps what is in both sets.</summary>
    public void Intersect(FeatureSet other)
    {
        for (int i = 0; i < _words.Length; i++)
            _words[i] &= other._words[i];
    }

    /// <summary>Drops every feature whose prerequisite is missing, until none is left.</summary>
    public void Sanitise()
    {
        bool changed;
        do
        {
            changed = false;
            foreach ((CpuFeature needed, CpuFeature[] by) in s_dependents)
            {
                if (Has(needed))
                    continue;
                foreach (CpuFeature dependent in by)
                {
                    changed |= Has(dependent);
                    Set(dependent, false);
                }
            }
        }
        while (changed);
    }
}
