// What a configuration can take from a guest's CPUID, and what it cannot give.

using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

[TestFixture]
public sealed class CpuidOverrideTests
{
    private static readonly CpuidContext s_fresh = new(0, 0, 3, false);

    [Test]
    public void AFeatureIsTakenWithAllThatIsBuiltOnIt()
    {
        CpuidPolicy full = Policy();
        CpuidPolicy less = Policy(new CpuidOverride(1, 0, CpuidRegister.Ecx, 0, 1u << 28, 0));
        Assert.That(Bit(full.Query(1, 0, s_fresh).Ecx, 28) && Bit(full.Query(7, 0, s_fresh).Ebx, 5), Is.True, "AVX and AVX2 are there without it");
        Assert.Multiple(() =>
        {
            Assert.That(Bit(less.Query(1, 0, s_fresh).Ecx, 28), Is.False, "AVX");
            Assert.That(Bit(less.Query(1, 0, s_fresh).Ecx, 12), Is.False, "FMA");
            Assert.That(Bit(less.Query(7, 0, s_fresh).Ebx, 5), Is.False, "AVX2");
            Assert.That(Bit(less.Query(7, 0, s_fresh).Ebx, 16), Is.False, "AVX512F");
            Assert.That(less.MaxXcr0, Is.EqualTo(3), "no state to save for it either");
            Assert.That(Bit(less.Query(1, 0, s_fresh).Ecx, 0), Is.True, "SSE3 stays");
        });
    }

    [Test]
    public void WhatAGuestCannotHaveIsNotGiven()
    {
        // VMX is no PV guest's; SSE3 is, and this host has none.
        CpuidSource host = HostProcessor.WithFeatures(HostProcessor.Intel, static word => word is (1, 0, 'c') ? ~1u : uint.MaxValue);
        var policy = new CpuidPolicy(host, HostProcessor.Options with { Overrides = [new CpuidOverride(1, 0, CpuidRegister.Ecx, (1u << 5) | 1, 0, 0)] });
        Assert.That(policy.Query(1, 0, s_fresh).Ecx & ((1u << 5) | 1), Is.Zero);
    }

    [Test]
    public void HowTheX87BehavesCannotBeHidden()
    {
        const uint x87 = (1u << 6) | (1u << 13);
        CpuidPolicy policy = Policy(new CpuidOverride(7, 0, CpuidRegister.Ebx, 0, uint.MaxValue, 0));
        Assert.That(policy.Query(7, 0, s_fresh).Ebx, Is.EqualTo(x87));
    }

    [Test]
    public void SignatureAndNameAreWhatWasAskedFor()
    {
        uint before = Policy().Query(1, 0, s_fresh).Eax;
        CpuidPolicy policy = Policy(
            new CpuidOverride(1, 0, CpuidRegister.Eax, 0x600, 0x0ff0_0900, 0),
            new CpuidOverride(0x80000003, 0, CpuidRegister.Edx, 0x4121_0000, 0xbede_ffff, 0));
        Assert.That(policy.Query(1, 0, s_fresh).Eax, Is.EqualTo((before & ~0x0ff0_0f00u) | 0x600));
        Assert.That(policy.Family, Is.EqualTo(6));
        Assert.That(policy.Query(0x80000003, 0, s_fresh).Edx, Is.EqualTo(0x4121_0000));
    }

    [TestCase(1u, 0u, CpuidRegister.Edx, true)]
    [TestCase(1u, 0u, CpuidRegister.Eax, true)]
    [TestCase(7u, 1u, CpuidRegister.Eax, true)]
    [TestCase(7u, 3u, CpuidRegister.Eax, false)]
    [TestCase(0x80000004u, 0u, CpuidRegister.Ebx, true)]
    [TestCase(0u, 0u, CpuidRegister.Eax, false)]
    [TestCase(0x40000000u, 0u, CpuidRegister.Eax, false)]
    public void WhatIsHeededIsSaid(uint leaf, uint subleaf, CpuidRegister register, bool heeded)
        => Assert.That(new CpuidOverride(leaf, subleaf, register, 1, 0, 0).IsHeeded, Is.EqualTo(heeded));

    private static CpuidPolicy Policy(params CpuidOverride[] overrides)
        => new(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options with { Overrides = overrides });

    private static bool Bit(uint word, int bit) => (word & (1u << bit)) != 0;
}
