// The names by which a configuration speaks of the processor's features.

using System.Collections.Frozen;

namespace XenSharp.Configuration;

/// <summary>
/// Where each feature of libxl's CPUID syntax is: those of Xen's public arch-x86/cpufeatureset.h in small letters with hyphens, and
/// the names that libxl has of its own (4.17).
/// </summary>
internal static class CpuidFeatures
{
    private static readonly Register[] s_registers =
    [
        new(0x00000001, null, CpuidRegister.Edx,
            "fpu=0 vme=1 de=2 pse=3 tsc=4 msr=5 pae=6 mce=7 cmpxchg8=8 cx8=8 apic=9 sep=11 sysenter=11 mtrr=12 pge=13 mca=14 "
            + "cmov=15 pat=16 pse36=17 psn=18 clfsh=19 ds=21 acpi=22 mmx=23 fxsr=24 sse=25 sse2=26 ss=27 htt=28 tm=29 tm1=29 ia64=30 "
            + "pbe=31"),
        new(0x00000001, null, CpuidRegister.Ecx,
            "sse3=0 pclmulqdq=1 dtes64=2 monitor=3 dscpl=4 vmx=5 smx=6 eist=7 est=7 tm2=8 ssse3=9 cntxid=10 fma=12 cmpxchg16=13 "
            + "cx16=13 xtpr=14 pdcm=15 pcid=17 dca=18 sse4-1=19 sse4.1=19 sse4_1=19 sse4-2=20 sse4.2=20 sse4_2=20 x2apic=21 movbe=22 "
            + "popcnt=23 tsc-deadline=24 aes=25 aesni=25 xsave=26 osxsave=27 avx=28 f16c=29 rdrand=30 hypervisor=31"),
        new(0x80000001, null, CpuidRegister.Edx,
            "syscall=11 nx=20 mmxext=22 ffxsr=25 page1gb=26 rdtscp=27 lm=29 3dnowext=30 3dnow=31"),
        new(0x80000001, null, CpuidRegister.Ecx,
            "lahf-lm=0 lahfsahf=0 cmp-legacy=1 cmplegacy=1 svm=2 extapic=3 altmovcr8=4 cr8-legacy=4 abm=5 sse4a=6 misalignsse=7 "
            + "3dnowprefetch=8 osvw=9 ibs=10 xop=11 skinit=12 wdt=13 lwp=15 fma4=16 nodeid=19 nodeid-msr=19 tbm=21 topoext=22 "
            + "perfctr_core=23 perfctr_nb=24 dbext=26 monitorx=29"),
        new(0x0000000d, 1, CpuidRegister.Eax,
            "xsaveopt=0 xsavec=1 xgetbv1=2 xsaves=3"),
        new(0x00000007, 0, CpuidRegister.Ebx,
            "fsgsbase=0 tsc-adjust=1 tsc_adjust=1 sgx=2 bmi1=3 hle=4 avx2=5 fdp-excp-only=6 smep=7 bmi2=8 erms=9 invpcid=10 rtm=11 "
            + "cmt=12 pqm=12 no-fpu-sel=13 mpx=14 pqe=15 avx512f=16 avx512dq=17 rdseed=18 adx=19 smap=20 avx512-ifma=21 "
            + "clflushopt=23 clwb=24 proc-trace=25 avx512pf=26 avx512er=27 avx512cd=28 sha=29 avx512bw=30 avx512vl=31"),
        new(0x00000007, 0, CpuidRegister.Ecx,
            "prefetchwt1=0 avx512-vbmi=1 umip=2 pku=3 ospke=4 avx512-vbmi2=6 cet-ss=7 gfni=8 vaes=9 vpclmulqdq=10 avx512-vnni=11 "
            + "avx512-bitalg=12 avx512-vpopcntdq=14 rdpid=22 cldemote=25 movdiri=27 movdir64b=28 enqcmd=29"),
        new(0x80000007, null, CpuidRegister.Edx,
            "hw-pstate=7 invtsc=8 itsc=8 cpb=9 efro=10"),
        new(0x80000008, null, CpuidRegister.Ebx,
            "clzero=0 rstr-fp-err-ptrs=2 wbnoinvd=9 ibpb=12 ibrs=14 amd-stibp=15 ibrs-always=16 stibp-always=17 ibrs-fast=18 "
            + "ibrs-same-mode=19 no-lmsl=20 amd-ppin=23 ppin=23 amd-ssbd=24 virt-ssbd=25 ssb-no=26 psfd=28 btc-no=29 ibpb-ret=30"),
        new(0x00000007, 0, CpuidRegister.Edx,
            "avx512-4vnniw=2 avx512-4fmaps=3 fsrm=4 avx512-vp2intersect=8 srbds-ctrl=9 md-clear=10 rtm-always-abort=11 "
            + "tsx-force-abort=13 serialize=14 hybrid=15 tsxldtrk=16 cet-ibt=20 avx512-fp16=23 ibrsb=26 stibp=27 l1d-flush=28 "
            + "arch-caps=29 core-caps=30 ssbd=31"),
        new(0x00000007, 1, CpuidRegister.Eax,
            "avx-vnni=4 avx512-bf16=5 fzrm=10 fsrs=11 fsrcs=12"),
        new(0x80000021, null, CpuidRegister.Eax,
            "lfence+=2 lfence-dispatch=2 verw-clear=5 nscb=6 auto-ibrs=8 sbpb=27 ibpb-brtype=28 srso-no=29 srso-us-no=30 "
            + "srso-msr-fix=31"),
        new(0x00000007, 1, CpuidRegister.Ebx,
            "intel-ppin=0"),
        new(0x00000007, 2, CpuidRegister.Edx,
            "intel-psfd=0 ipred-ctrl=1 rrsba-ctrl=2 bhi-ctrl=4 mcdt-no=5"),
        new(0x00000007, 1, CpuidRegister.Edx,
            "cet-sss=18"),
        new(0x80000021, null, CpuidRegister.Ecx,
            "tsa-sq-no=1 tsa-l1-no=2"),
        new(0x00000006, null, CpuidRegister.Eax, "arat=2"),
        new(0x8000000a, null, CpuidRegister.Edx,
            "svm_npt=0 svm_lbrv=1 svm_nrips=3 svm_tscrate=4 svm_vmcbclean=5 svm_decode=7 svm_pausefilt=10"),
    ];

    /// <summary>Features that an MSR (ARCH_CAPABILITIES) shows, and no CPUID leaf.</summary>
    private static readonly FrozenSet<string> s_inMsrs =
        ("rdcl-no eibrs rsba skip-l1dfl intel-ssb-no mds-no if-pschange-mc-no tsx-ctrl taa-no mcu-ctrl misc-pkg-ctrl "
            + "energy-filtering doitm sbdr-ssdp-no fbsdp-no psdp-no fb-clear fb-clear-ctrl rrsba bhi-no xapic-status ovrclk-status "
            + "pbrsb-no gds-ctrl gds-no rfds-no rfds-clear its-no").Split(' ').ToFrozenSet(StringComparer.Ordinal);

    /// <summary>Keys that take a number: fields of more than one bit.</summary>
    private static readonly FrozenDictionary<string, CpuidField> s_fields = new Dictionary<string, CpuidField>(StringComparer.Ordinal)
    {
        ["maxleaf"] = new(0x00000000, null, CpuidRegister.Eax, 0, 32),
        ["stepping"] = new(0x00000001, null, CpuidRegister.Eax, 0, 4),
        ["model"] = new(0x00000001, null, CpuidRegister.Eax, 4, 8),
        ["family"] = new(0x00000001, null, CpuidRegister.Eax, 8, 8),
        ["brandid"] = new(0x00000001, null, CpuidRegister.Ebx, 0, 8),
        ["clflush"] = new(0x00000001, null, CpuidRegister.Ebx, 8, 8),
        ["proccount"] = new(0x00000001, null, CpuidRegister.Ebx, 16, 8),
        ["localapicid"] = new(0x00000001, null, CpuidRegister.Ebx, 24, 8),
        ["procpkg"] = new(0x00000004, 0, CpuidRegister.Eax, 26, 6),
        ["nc"] = new(0x80000008, null, CpuidRegister.Ecx, 0, 8),
        ["apicidsize"] = new(0x80000008, null, CpuidRegister.Ecx, 12, 4),
        ["maxhvleaf"] = new(0x40000000, null, CpuidRegister.Eax, 0, 8),
    }.ToFrozenDictionary(StringComparer.Ordinal);

    private static readonly FrozenDictionary<string, CpuidField> s_bits = s_registers
        .SelectMany(static register => register.Names())
        .ToFrozenDictionary(static named => named.Name, static named => named.Field, StringComparer.Ordinal);

    /// <summary>Finds what a name stands for.</summary>
    internal static bool TryFind(string name, out CpuidField field) => s_fields.TryGetValue(name, out field) || s_bits.TryGetValue(name, out field);

    /// <summary>Whether a name is that of a feature which is in no CPUID leaf.</summary>
    internal static bool IsInMsr(string name) => s_inMsrs.Contains(name);

    private sealed record Register(uint Leaf, uint? Subleaf, CpuidRegister Which, string Features)
    {
        internal IEnumerable<(string Name, CpuidField Field)> Names()
        {
            foreach (string feature in Features.Split(' '))
            {
                int equals = feature.LastIndexOf('=');
                yield return (feature[..equals], new CpuidField(Leaf, Subleaf, Which, byte.Parse(feature.AsSpan(equals + 1)), 1));
            }
        }
    }
}

/// <summary>A field of a CPUID register.</summary>
/// <param name="Leaf">The leaf.</param>
/// <param name="Subleaf">The subleaf; null for a leaf without any.</param>
/// <param name="Register">The register.</param>
/// <param name="FirstBit">Its lowest bit.</param>
/// <param name="Bits">How many bits it has.</param>
internal readonly record struct CpuidField(uint Leaf, uint? Subleaf, CpuidRegister Register, byte FirstBit, byte Bits)
{
    /// <summary>The field's bits in the register.</summary>
    internal uint Mask => (uint)(((1UL << Bits) - 1) << FirstBit);
}
