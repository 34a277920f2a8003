// What the one who makes a domain wants CPUID to answer otherwise.
namespace XenSharp.Domains.Emulation;

/// <summary>A register that CPUID returns.</summary>
public enum CpuidRegister
{
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// <summary>Bits of a leaf that are to be otherwise than the policy has them: what libxl's cpuid setting says of a register.</summary>
/// <param name="Leaf">The leaf.</param>
/// <param name="Subleaf">The subleaf; 0 for a leaf without any.</param>
/// <param name="Register">The register.</param>
/// <param name="Set">Bits that are to be 1.</param>
/// <param name="Clear">Bits that are to be 0.</param>
/// <param name="Host">Bits that are to be the host's.</param>
/// <remarks>
/// As with Xen, a feature can be taken from a guest and not be given to it: what the host or a PV guest cannot have stays 0. What is
/// built on a feature that is taken goes with it.
/// </remarks>
public sealed record CpuidOverride(uint Leaf, uint Subleaf, CpuidRegister Register, uint Set, uint Clear, uint Host)
{
    /// <summary>Whether it changes anything: it is about features, the processor's signature, its brand, or its name.</summary>
    public bool IsHeeded => Word is not null || (Leaf == 1 && Register is CpuidRegister.Eax or CpuidRegister.Ebx) || IsName;

    /// <summary>It is about the processor's name (0x80000002 to 0x80000004).</summary>
    internal bool IsName => Leaf is >= 0x80000002 and <= 0x80000004;

    /// <summary>The word of features that it is about; null for none.</summary>
    internal FeatureWord? Word => (Leaf, Subleaf, Register) switch
    {
        (1, _, CpuidRegister.Edx) => FeatureWord.Leaf1Edx,
        (1, _, CpuidRegister.Ecx) => FeatureWord.Leaf1Ecx,
        (7, 0, CpuidRegister.Ebx) => FeatureWord.Leaf7Ebx,
        (7, 0, CpuidRegister.Ecx) => FeatureWord.Leaf7Ecx,
        (7, 0, CpuidRegister.Edx) => FeatureWord.Leaf7Edx,
        (7, 1, CpuidRegister.Eax) => FeatureWord.Leaf7Sub1Eax,
        (7, 2, CpuidRegister.Edx) => FeatureWord.Leaf7Sub2Edx,
        (0xd, 1, CpuidRegister.Eax) => FeatureWord.XstateEax,
        (0x80000001, _, CpuidRegister.Edx) => FeatureWord.Extended1Edx,
        (0x80000001, _, CpuidRegister.Ecx) => FeatureWord.Extended1Ecx,
        (0x80000007, _, CpuidRegister.Edx) => FeatureWord.Extended7Edx,
        (0x80000008, _, CpuidRegister.Ebx) => FeatureWord.Extended8Ebx,
        (0x80000021, _, CpuidRegister.Eax) => FeatureWord.Extended21Eax,
        _ => null,
    };

    /// <summary>A register with the override laid over it.</summary>
    internal uint Apply(uint policy, uint host) => (policy & ~(Set | Clear | Host)) | Set | (host & Host);

    /// <summary>A leaf with the override laid over its register.</summary>
    internal CpuidLeaf Apply(in CpuidLeaf policy, in CpuidLeaf host) => Register switch
    {
        CpuidRegister.Eax => policy with { Eax = Apply(policy.Eax, host.Eax) },
        CpuidRegister.Ebx => policy with { Ebx = Apply(policy.Ebx, host.Ebx) },
        CpuidRegister.Ecx => policy with { Ecx = Apply(policy.Ecx, host.Ecx) },
        _ => policy with { Edx = Apply(policy.Edx, host.Edx) },
    };
}
