// X86_CPUID_POLICY: the CPUID leaves that a saved domain was shown, and whether a domain here can do with those of this host.
using System.Runtime.InteropServices;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Writes a policy's leaves (x86_cpuid_copy_to_buffer), and compares those of an image with another policy: what the guest's kernel found at
/// its boot must still be there. What there is beyond that does not disturb it.
/// </summary>
internal static class CpuidRecord
{
    private const uint Extended = 0x8000_0000;
    private const uint CacheLeaf = 4;
    private const uint FeatureLeaf = 7;
    private const uint XstateLeaf = 0xd;

    /// <summary>Subleaves of leaf 0xD.</summary>
    private const uint XstateSubleaves = 63;

    /// <summary>Leaf 1 ECX: not a feature, but a copy of CR4.OSXSAVE.</summary>
    private const uint OsXsave = 1 << 27;

    /// <summary>
    /// Features that tell of the domain and not of the processor; and two that say what the x87 unit does not store, so that a guest which
    /// was shown one finds more on a processor without it, and which no processor can hide.
    /// </summary>
    private static readonly CpuFeature[] s_notRequired =
        [CpuFeature.Hypervisor, CpuFeature.Htt, CpuFeature.CmpLegacy, CpuFeature.FdpExceptionOnly, CpuFeature.NoFpuSelectors];

    /// <summary>Where the words of a feature set come from; the register is 0 for EAX to 3 for EDX.</summary>
    private static readonly (FeatureWord Word, uint Leaf, uint Subleaf, int Register)[] s_words =
    [
        (FeatureWord.Leaf1Edx, 1, 0, 3), (FeatureWord.Leaf1Ecx, 1, 0, 2), (FeatureWord.Extended1Edx, 0x80000001, 0, 3),
        (FeatureWord.Extended1Ecx, 0x80000001, 0, 2), (FeatureWord.XstateEax, XstateLeaf, 1, 0), (FeatureWord.Leaf7Ebx, FeatureLeaf, 0, 1),
        (FeatureWord.Leaf7Ecx, FeatureLeaf, 0, 2), (FeatureWord.Extended7Edx, 0x80000007, 0, 3), (FeatureWord.Extended8Ebx, 0x80000008, 0, 1),
        (FeatureWord.Leaf7Edx, FeatureLeaf, 0, 3), (FeatureWord.Leaf7Sub1Eax, FeatureLeaf, 1, 0), (FeatureWord.Extended21Eax, 0x80000021, 0, 0),
        (FeatureWord.Leaf7Sub2Edx, FeatureLeaf, 2, 3),
    ];

    /// <summary>struct xen_cpuid_leaf.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Leaf
    {
        public uint Number, Subleaf, Eax, Ebx, Ecx, Edx;
    }

    /// <summary>The leaves of a policy, as the record has them; the hypervisor's own are made anew wherever the domain is restored.</summary>
    public static byte[] Write(CpuidPolicy policy)
    {
        var leaves = new List<Leaf>();
        for (uint leaf = 0; leaf <= policy.MaxBasicLeaf; leaf++)
            AddBasic(leaves, policy, leaf);
        for (uint leaf = Extended; leaf <= policy.MaxExtendedLeaf; leaf++)
            Add(leaves, policy, leaf, MigrationFormat.NoSubleaf);
        return MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(leaves)).ToArray();
    }

    /// <summary>Sees to it that a domain with this policy has all that an image's has.</summary>
    /// <param name="record">The record's body, whole leaves.</param>
    /// <param name="policy">The policy of the domain that the image is restored to.</param>
    /// <exception cref="MigrationException">Something is missing.</exception>
    public static void Check(ReadOnlySpan<byte> record, CpuidPolicy policy)
    {
        foreach (Leaf leaf in MemoryMarshal.Cast<byte, Leaf>(record))
            CheckVendor(leaf, policy);
        FeatureSet saved = FeaturesOf(record);
        foreach (CpuFeature feature in s_notRequired)
            saved.Set(feature, false);
        saved[FeatureWord.Leaf1Ecx] &= ~OsXsave;

        // AMD repeats bits of leaf 1 there.
        saved[FeatureWord.Extended1Edx] &= ~CpuidPolicy.CommonFeatureBits;
        var missing = new List<string>();
        for (var word = FeatureWord.Leaf1Edx; word < FeatureWord.Count; word++)
        {
            for (uint left = saved[word] & ~policy.Features[word]; left != 0; left &= left - 1)
            {
                var feature = (CpuFeature)(((int)word * 32) + System.Numerics.BitOperations.TrailingZeroCount(left));
                missing.Add(Enum.IsDefined(feature) ? feature.ToString() : $"bit {(int)feature & 31} of {word}");
            }
        }

        if (missing.Count != 0)
        {
            throw new MigrationException(
                $"The saved domain was shown a processor with {string.Join(", ", missing)}, which this host's domains lack. "
                + "Restore it on a host that has " + (missing.Count == 1 ? "it." : "them."));
        }
    }

    /// <summary>
    /// What makes of a policy that passes <see cref="Check"/> the one that the guest knows: it has no more features than were saved, and the
    /// saved signature, brand and name. So a guest that wanders on can go back to where it came from.
    /// </summary>
    /// <param name="record">The record's body.</param>
    public static IReadOnlyList<CpuidOverride> Overrides(ReadOnlySpan<byte> record)
    {
        FeatureSet saved = FeaturesOf(record);
        List<CpuidOverride> overrides =
            [.. s_words.Select(word => new CpuidOverride(word.Leaf, word.Subleaf, (CpuidRegister)word.Register, Set: 0, Clear: ~saved[word.Word], Host: 0))];
        foreach (Leaf leaf in MemoryMarshal.Cast<byte, Leaf>(record))
        {
            ReadOnlySpan<uint> registers = [leaf.Eax, leaf.Ebx, leaf.Ecx, leaf.Edx];
            for (int i = 0; i < registers.Length; i++)
            {
                var exact = new CpuidOverride(leaf.Number, 0, (CpuidRegister)i, Set: registers[i], Clear: ~registers[i], Host: 0);
                if (exact is { IsHeeded: true, Word: null })
                    overrides.Add(exact);
            }
        }

        return overrides;
    }

    private static FeatureSet FeaturesOf(ReadOnlySpan<byte> record)
    {
        var saved = new FeatureSet();
        foreach (Leaf leaf in MemoryMarshal.Cast<byte, Leaf>(record))
        {
            foreach ((FeatureWord word, uint number, uint subleaf, int register) in s_words)
            {
                if (leaf.Number == number && (leaf.Subleaf == MigrationFormat.NoSubleaf ? 0 : leaf.Subleaf) == subleaf)
                    saved[word] = register switch { 0 => leaf.Eax, 1 => leaf.Ebx, 2 => leaf.Ecx, _ => leaf.Edx };
            }
        }

        return saved;
    }

    private static void CheckVendor(in Leaf leaf, CpuidPolicy policy)
    {
        if (leaf.Number != 0)
            return;
        CpuidLeaf here = policy.Query(0, 0, default);
        if ((leaf.Ebx, leaf.Ecx, leaf.Edx) != (here.Ebx, here.Ecx, here.Edx))
            throw new MigrationException("The saved domain was shown a processor of another vendor. Restore it on a host with one of the same.");
    }

    private static void AddBasic(List<Leaf> leaves, CpuidPolicy policy, uint leaf)
    {
        switch (leaf)
        {
            case CacheLeaf:
                // The one that says that there is none more comes too.
                const uint typeMask = 31;
                for (uint i = 0; ; i++)
                {
                    Add(leaves, policy, leaf, i);
                    if ((policy.Query(leaf, i, default).Eax & typeMask) == 0)
                        return;
                }

            case FeatureLeaf:
                for (uint i = 0; i <= policy.Query(leaf, 0, default).Eax; i++)
                    Add(leaves, policy, leaf, i);
                return;
            case XstateLeaf:
                for (uint i = 0; i < XstateSubleaves; i++)
                {
                    if (i < 2 || (policy.MaxXcr0 & (1UL << (int)i)) != 0)
                        Add(leaves, policy, leaf, i);
                }

                return;
            default:
                Add(leaves, policy, leaf, MigrationFormat.NoSubleaf);
                return;
        }
    }

    private static void Add(List<Leaf> leaves, CpuidPolicy policy, uint leaf, uint subleaf)
    {
        CpuidLeaf value = policy.Query(leaf, subleaf == MigrationFormat.NoSubleaf ? 0 : subleaf, new CpuidContext(0, 0, policy.MaxXcr0, false));
        leaves.Add(new Leaf { Number = leaf, Subleaf = subleaf, Eax = value.Eax, Ebx = value.Ebx, Ecx = value.Ecx, Edx = value.Edx });
    }
}
