using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>What a PV guest may learn about the processor, on invented hosts and on this one.</summary>
public sealed class CpuidPolicyTests
{
    private static readonly CpuidContext s_fresh = new(0, 0, 3, false);

    // Every register that holds features, with the bits that are the policy's own word (HYPERVISOR, HTT, CmpLegacy, OSXSAVE).
    private static readonly (uint Leaf, uint Subleaf, char Register, uint Own)[] s_words =
    [
        (1, 0, 'd', 1u << 28), (1, 0, 'c', 1u << 31 | 1u << 27), (7, 0, 'b', 0), (7, 0, 'c', 0), (7, 0, 'd', 0), (7, 1, 'a', 0),
        (7, 2, 'd', 0), (0xd, 1, 'a', 0), (0x80000001, 0, 'c', 1u << 1), (0x80000001, 0, 'd', 0x0183_f3ff),
        (0x80000007, 0, 'd', 0), (0x80000008, 0, 'b', 0), (0x80000021, 0, 'a', 0),
    ];

    private static uint Word(CpuidLeaf leaf, char register) => register switch
    {
        'a' => leaf.Eax,
        'b' => leaf.Ebx,
        'c' => leaf.Ecx,
        _ => leaf.Edx,
    };

    private static bool Has(CpuidPolicy policy, uint leaf, char register, int bit)
        => (Word(policy.Query(leaf, 0, s_fresh), register) & (1u << bit)) != 0;

    private static void AssertNothingInvented(CpuidSource host, CpuidPolicy policy)
    {
        foreach ((uint leaf, uint subleaf, char register, uint own) in s_words)
        {
            uint shown = Word(policy.Query(leaf, subleaf, s_fresh), register) & ~own;
            Assert.That(shown & ~Word(host(leaf, subleaf), register), Is.Zero, $"leaf {leaf:x}.{subleaf} {register}");
        }
    }

    [Test]
    public void NothingIsInventedOnThisHost()
    {
        Assume.That(System.Runtime.Intrinsics.X86.X86Base.IsSupported, "these leaves are an x86 processor's");
        var policy = CpuidPolicy.FromHost(HostProcessor.Options);
        AssertNothingInvented(CpuidPolicy.HostLeaf, policy);
        Assert.That(policy.Query(1, 0, s_fresh).Eax, Is.EqualTo(CpuidPolicy.HostLeaf(1, 0).Eax & 0x0fff_0fff));
    }

    [Test]
    public void NothingIsInventedOnRandomHosts([Range(0, 199)] int seed)
    {
        var random = new Random(seed);
        var words = new Dictionary<(uint, uint, char), uint>();
        foreach ((uint leaf, uint subleaf, char register, _) in s_words)
            words[(leaf, subleaf, register)] = (uint)random.NextInt64(1L << 32) | (uint)random.NextInt64(1L << 32);
        CpuidSource host = HostProcessor.WithFeatures(seed % 2 == 0 ? HostProcessor.Intel : HostProcessor.Amd, w => words[w]);
        var policy = new CpuidPolicy(host, HostProcessor.Options with { TscAuxUsable = seed % 3 == 0 });
        AssertNothingInvented(host, policy);

        // A feature comes with everything that it is built on: AVX-512 VBMI, BW, F, AVX2, AVX, XSAVE.
        bool avx = Has(policy, 1, 'c', 28);
        bool avx512 = Has(policy, 7, 'b', 16);
        if (Has(policy, 7, 'c', 1))
            Assert.That((Has(policy, 7, 'b', 30), avx512), Is.EqualTo((true, true)));
        if (avx512)
            Assert.That((Has(policy, 7, 'b', 5), avx), Is.EqualTo((true, true)));
        if (avx)
            Assert.That(Has(policy, 1, 'c', 26), Is.True);
        Assert.That(policy.MaxXcr0, Is.EqualTo((Has(policy, 1, 'c', 26) ? 3UL : 0) | (avx ? 4UL : 0) | (avx512 ? 0xe0UL : 0)));
    }

    // Leaf, subleaf, register and bit of what Xen hides from PV guests, or nothing here could serve.
    [TestCase(1u, 0u, 'd', 1, TestName = "VME")]
    [TestCase(1u, 0u, 'd', 3, TestName = "PSE")]
    [TestCase(1u, 0u, 'd', 11, TestName = "SEP")]
    [TestCase(1u, 0u, 'd', 12, TestName = "MTRR")]
    [TestCase(1u, 0u, 'd', 13, TestName = "PGE")]
    [TestCase(1u, 0u, 'd', 17, TestName = "PSE36")]
    [TestCase(1u, 0u, 'd', 21, TestName = "DS")]
    [TestCase(1u, 0u, 'd', 29, TestName = "TM")]
    [TestCase(1u, 0u, 'c', 3, TestName = "MONITOR")]
    [TestCase(1u, 0u, 'c', 5, TestName = "VMX")]
    [TestCase(1u, 0u, 'c', 17, TestName = "PCID")]
    [TestCase(1u, 0u, 'c', 21, TestName = "x2APIC")]
    [TestCase(1u, 0u, 'c', 24, TestName = "TSC deadline")]
    [TestCase(1u, 0u, 'c', 27, TestName = "OSXSAVE")]
    [TestCase(7u, 0u, 'b', 2, TestName = "SGX")]
    [TestCase(7u, 0u, 'b', 7, TestName = "SMEP")]
    [TestCase(7u, 0u, 'b', 10, TestName = "INVPCID")]
    [TestCase(7u, 0u, 'b', 14, TestName = "MPX")]
    [TestCase(7u, 0u, 'b', 20, TestName = "SMAP")]
    [TestCase(7u, 0u, 'c', 2, TestName = "UMIP")]
    [TestCase(7u, 0u, 'c', 3, TestName = "PKU")]
    [TestCase(7u, 0u, 'c', 4, TestName = "OSPKE")]
    [TestCase(7u, 0u, 'c', 7, TestName = "CET shadow stacks")]
    [TestCase(7u, 0u, 'c', 16, TestName = "LA57")]
    [TestCase(7u, 0u, 'd', 26, TestName = "IBRS")]
    [TestCase(7u, 0u, 'd', 29, TestName = "ARCH_CAPABILITIES")]
    [TestCase(7u, 0u, 'd', 31, TestName = "SSBD")]
    [TestCase(0xdu, 1u, 'a', 3, TestName = "XSAVES")]
    [TestCase(0x80000001u, 0u, 'c', 2, TestName = "SVM")]
    [TestCase(0x80000001u, 0u, 'c', 22, TestName = "TOPOEXT")]
    [TestCase(0x80000001u, 0u, 'd', 26, TestName = "1 GB pages")]
    [TestCase(0x80000007u, 0u, 'd', 8, TestName = "Invariant TSC")]
    public void HiddenFeaturesAreHidden(uint leaf, uint subleaf, char register, int bit)
    {
        foreach (CpuidLeaf vendor in (CpuidLeaf[])[HostProcessor.Intel, HostProcessor.Amd])
        {
            var policy = new CpuidPolicy(HostProcessor.Everything(vendor), HostProcessor.Options);
            Assert.That(Word(policy.Query(leaf, subleaf, s_fresh), register) & (1u << bit), Is.Zero);
        }
    }

    [TestCase(1u, 0u, 'd', 2, TestName = "Shown: DE")]
    [TestCase(1u, 0u, 'd', 16, TestName = "Shown: PAT")]
    [TestCase(1u, 0u, 'd', 28, TestName = "Shown: HTT")]
    [TestCase(1u, 0u, 'c', 26, TestName = "Shown: XSAVE")]
    [TestCase(1u, 0u, 'c', 31, TestName = "Shown: hypervisor")]
    [TestCase(7u, 0u, 'b', 0, TestName = "Shown: FSGSBASE")]
    [TestCase(7u, 0u, 'b', 16, TestName = "Shown: AVX512F")]
    [TestCase(0xdu, 1u, 'a', 1, TestName = "Shown: XSAVEC")]
    [TestCase(0x80000001u, 0u, 'd', 11, TestName = "Shown: SYSCALL")]
    [TestCase(0x80000001u, 0u, 'd', 20, TestName = "Shown: NX")]
    [TestCase(0x80000001u, 0u, 'd', 27, TestName = "Shown: RDTSCP")]
    [TestCase(0x80000001u, 0u, 'd', 29, TestName = "Shown: LM")]
    public void OfferedFeaturesAreShown(uint leaf, uint subleaf, char register, int bit)
    {
        var policy = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options);
        Assert.That(Word(policy.Query(leaf, subleaf, s_fresh), register) & (1u << bit), Is.Not.Zero);
    }

    [Test]
    public void RangesEndWhereXensEnd()
    {
        var intel = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options);
        var amd = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options);
        Assert.That(intel.Query(0, 0, s_fresh), Is.EqualTo(HostProcessor.Intel with { Eax = 0xd }));
        Assert.That(intel.Query(0x80000000, 0, s_fresh), Is.EqualTo(new CpuidLeaf(0x80000008, 0, 0, 0)));
        Assert.That(amd.Query(0x80000000, 0, s_fresh), Is.EqualTo(HostProcessor.Amd with { Eax = 0x80000021 }));
        foreach (uint leaf in (uint[])[3, 5, 6, 8, 9, 0xa, 0xb, 0xc, 0xe, 0x15, 0x3fffffff, 0x40000006, 0x40000200, 0x80000022, uint.MaxValue])
        {
            Assert.That(intel.Query(leaf, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)), $"{leaf:x}");
            Assert.That(amd.Query(leaf, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)), $"{leaf:x}");
        }

        foreach (uint leaf in (uint[])[4, 7, 0xd])
            Assert.That(intel.Query(leaf, 1000, s_fresh), Is.EqualTo(default(CpuidLeaf)), $"{leaf:x}");
    }

    [Test]
    public void OneVcpuIsOneCoreOfThePackage()
    {
        var intel = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options with { VcpuCount = 6 });
        Assert.That(intel.Query(1, 0, s_fresh with { Vcpu = 5 }).Ebx, Is.EqualTo(0x0506_0800));
        Assert.That(intel.Query(4, 0, s_fresh).Eax, Is.EqualTo(0x1400_0121), "a level 1 cache of its own, 6 cores");
        Assert.That(intel.Query(4, 1, s_fresh).Eax, Is.EqualTo(0x1401_c163), "a level 3 cache shared by all");
        var amd = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options with { VcpuCount = 6 });
        Assert.That(amd.Query(0x80000008, 0, s_fresh).Ecx, Is.EqualTo(0x3005));
        Assert.That(amd.Query(4, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)));
        var single = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options with { VcpuCount = 1 });
        Assert.That(single.Query(1, 0, s_fresh).Edx & (1 << 28), Is.Zero);
        Assert.That(single.Query(0x80000008, 0, s_fresh).Ecx, Is.Zero);
        Assert.That(
            () => new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options with { VcpuCount = 0 }),
            Throws.TypeOf<ArgumentOutOfRangeException>());
    }

    [Test]
    public void OsxsaveFollowsCr4()
    {
        var policy = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options);
        Assert.That(policy.Query(1, 0, s_fresh with { Cr4 = 1 << 18 }).Ecx & (1 << 27), Is.Not.Zero);
        Assert.That(policy.Query(1, 0, s_fresh with { ForcedInKernel = true }).Ecx & (1 << 27), Is.Not.Zero);
        var none = new CpuidPolicy(
            HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options with { SupportedXcr0 = 0 });
        Assert.That(none.Query(1, 0, s_fresh with { ForcedInKernel = true }).Ecx & (3 << 26), Is.Zero);
        Assert.That(none.Query(0xd, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)));
        Assert.That(Has(none, 1, 'c', 28), Is.False, "AVX");
        Assert.That(none.IsValidXcr0(1), Is.False);
    }

    [TestCase(1UL, 576u, 576u)]
    [TestCase(3UL, 576u, 576u)]
    [TestCase(7UL, 832u, 832u)]
    [TestCase(0xe7UL, 2432u, 2432u)]
    public void XsaveSizesFollowXcr0(ulong xcr0, uint standard, uint compacted)
    {
        var policy = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options);
        CpuidContext context = s_fresh with { Xcr0 = xcr0 };
        Assert.That(policy.Query(0xd, 0, context), Is.EqualTo(new CpuidLeaf(0xe7, standard, 2432, 0)));
        Assert.That(policy.Query(0xd, 1, context), Is.EqualTo(new CpuidLeaf(7, compacted, 0, 0)));
        Assert.That(policy.Query(0xd, 9, context), Is.EqualTo(default(CpuidLeaf)), "protection keys");
        Assert.That(policy.Query(0xd, 6, context), Is.EqualTo(new CpuidLeaf(512, 896, 2, 0)));
    }

    [Test]
    public void WithoutAvx512TheVmShowsNone()
    {
        var policy = new CpuidPolicy(
            HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options with { SupportedXcr0 = 7, TscAuxUsable = false });
        Assert.That(policy.Query(7, 0, s_fresh).Ebx & 0xf031_0000 & ~(1u << 20 | 1u << 29), Is.Zero);
        Assert.That(policy.MaxXcr0, Is.EqualTo(7));
        Assert.That((policy.HasRdtscp, policy.HasTscAux), Is.EqualTo((false, false)));
    }

    [Test]
    public void XenIntroducesItself()
    {
        var policy = new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options);
        CpuidLeaf first = policy.Query(0x40000000, 0, s_fresh);
        Assert.That(first.Eax, Is.EqualTo(0x40000005));
        byte[] signature = [.. BitConverter.GetBytes(first.Ebx), .. BitConverter.GetBytes(first.Ecx), .. BitConverter.GetBytes(first.Edx)];
        Assert.That(System.Text.Encoding.ASCII.GetString(signature), Is.EqualTo("XenVMMXenVMM"));
        Assert.That(policy.Query(0x40000001, 0, s_fresh), Is.EqualTo(new CpuidLeaf(0x0004_0011, 0, 0, 0)));
        Assert.That(policy.Query(0x40000002, 0, s_fresh), Is.EqualTo(new CpuidLeaf(1, 0x40000000, 1, 0)));
        Assert.That(policy.Query(0x40000003, 0, s_fresh), Is.EqualTo(new CpuidLeaf(6, 0, 2_000_000, 0)));
        Assert.That(policy.Query(0x40000003, 1, s_fresh), Is.EqualTo(new CpuidLeaf(0, 0, 0x8000_0000, 0)));
        Assert.That(policy.Query(0x40000003, 2, s_fresh), Is.EqualTo(new CpuidLeaf(2_000_000, 0, 0, 0)));
        Assert.That(policy.Query(0x40000005, 0, s_fresh), Is.EqualTo(new CpuidLeaf(0, 33, 0, 0)));
        Assert.That(policy.Query(0x40000004, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)));
    }

    [Test]
    public void OldProcessorsHaveShortRanges()
    {
        CpuidSource host = (leaf, _) => leaf switch
        {
            0 => HostProcessor.Intel with { Eax = 1 },
            1 => new CpuidLeaf(0x633, 0, uint.MaxValue, uint.MaxValue),
            _ => new CpuidLeaf(7, 7, 7, 7),
        };
        var policy = new CpuidPolicy(host, HostProcessor.Options);
        Assert.That((policy.MaxBasicLeaf, policy.MaxExtendedLeaf), Is.EqualTo((1u, 0x80000000u)));
        Assert.That(policy.Query(7, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)));
        Assert.That(policy.Query(0x80000001, 0, s_fresh), Is.EqualTo(default(CpuidLeaf)));
        Assert.That(policy.Query(1, 0, s_fresh).Ecx & (1 << 26), Is.Zero);
    }
}
