// What a configuration says about one register of a CPUID leaf.

using System.Text.Json.Serialization;

namespace XenSharp.Configuration;

/// <summary>A register in which CPUID answers.</summary>
[JsonConverter(typeof(KebabCaseEnumConverter<CpuidRegister>))]
public enum CpuidRegister
{
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// <summary>Bits of a CPUID leaf that a domain is to see otherwise than the policy has them (xc_xend_cpuid).</summary>
/// <param name="Leaf">The leaf (EAX).</param>
/// <param name="Subleaf">The subleaf (ECX); null for a leaf without any.</param>
/// <param name="Register">The register.</param>
/// <param name="Set">Bits that are 1.</param>
/// <param name="Clear">Bits that are 0.</param>
/// <param name="Host">Bits that are as the host's processor has them (k).</param>
public sealed record CpuidMask(uint Leaf, uint? Subleaf, CpuidRegister Register, uint Set, uint Clear, uint Host)
{
    /// <summary>The register with the mask laid over it.</summary>
    /// <param name="policy">What the domain would see without.</param>
    /// <param name="host">What the host's processor says.</param>
    public uint Apply(uint policy, uint host) => (policy & ~(Set | Clear | Host)) | Set | (host & Host);

    /// <summary>The 32 characters of libxl's policy string, the highest bit first.</summary>
    public string ToBits() => string.Create(32, this, static (text, mask) =>
    {
        for (int at = 0; at < text.Length; at++)
        {
            uint bit = 0x8000_0000 >> at;
            text[at] = (mask.Set & bit) != 0 ? '1' : (mask.Clear & bit) != 0 ? '0' : (mask.Host & bit) != 0 ? 'k' : 'x';
        }
    });
}
