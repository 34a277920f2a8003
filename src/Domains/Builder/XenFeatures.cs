// The XENFEAT_* bits a kernel names in its notes, and the parser of the FEATURES string.

namespace XenSharp.Domains.Builder;

/// <summary>
/// Features a kernel says it supports or requires: bit N is XENFEAT number N of Xen's public features.h. Bits without a name here
/// may be set in <see cref="KernelImage.SupportedFeatures"/>, since the numeric note carries any of 32.
/// </summary>
[Flags]
public enum XenFeatures : uint
{
    None = 0,
    WritablePageTables = 1u << 0,
    WritableDescriptorTables = 1u << 1,
    AutoTranslatedPhysmap = 1u << 2,
    SupervisorModeKernel = 1u << 3,
    PaePageDirectoryAbove4Gb = 1u << 4,
    MmuPtUpdatePreserveAd = 1u << 5,
    HighmemAssist = 1u << 6,
    GrantMapAvailableBits = 1u << 7,
    HvmCallbackVector = 1u << 8,
    HvmSafePvclock = 1u << 9,
    HvmPirqs = 1u << 10,
    Dom0 = 1u << 11,
    GrantMapIdentity = 1u << 12,
    MemoryOpVnodeSupported = 1u << 13,
    ArmSmcccSupported = 1u << 14,
    LinuxRsdpUnrestricted = 1u << 15,
    NotDirectMapped = 1u << 16,
    DirectMapped = 1u << 17,
}

/// <summary>Feature names as the FEATURES note and the legacy section spell them.</summary>
public static class XenFeatureNames
{
    /// <summary>
    /// What a 64-bit PV domain may insist on. writable_page_tables: its writes to its own page tables are emulated, and every
    /// Linux kernel requires it (XENVER_get_features does not report it all the same, for the tables stay read-only).
    /// pae_pgdir_above_4gb: true of any 64-bit domain.
    /// </summary>
    public const XenFeatures OfferedToPv64 = XenFeatures.WritablePageTables | XenFeatures.PaePageDirectoryAbove4Gb;

    // Exactly the names that Xen's loader knows; a kernel that requires any other does not start on Xen 4.17 either.
    private static readonly (string Name, XenFeatures Feature)[] Names =
    [
        ("writable_page_tables", XenFeatures.WritablePageTables),
        ("writable_descriptor_tables", XenFeatures.WritableDescriptorTables),
        ("auto_translated_physmap", XenFeatures.AutoTranslatedPhysmap),
        ("supervisor_mode_kernel", XenFeatures.SupervisorModeKernel),
        ("pae_pgdir_above_4gb", XenFeatures.PaePageDirectoryAbove4Gb),
        ("hvm_callback_vector", XenFeatures.HvmCallbackVector),
        ("dom0", XenFeatures.Dom0),
    ];

    /// <summary>
    /// Reads a list such as <c>!writable_page_tables|pae_pgdir_above_4gb</c>; a '!' marks a required feature, which is a supported
    /// one too. Unknown names are skipped unless required.
    /// </summary>
    /// <exception cref="KernelImageException">A required feature has an unknown name.</exception>
    internal static (XenFeatures Supported, XenFeatures Required) Parse(string list)
    {
        XenFeatures supported = XenFeatures.None;
        XenFeatures required = XenFeatures.None;
        foreach (Range range in list.AsSpan().Split('|'))
        {
            ReadOnlySpan<char> name = list.AsSpan(range);
            bool isRequired = name.StartsWith('!');
            if (isRequired)
                name = name[1..];

            XenFeatures feature = Find(name);
            if (isRequired && feature == XenFeatures.None)
                throw new KernelImageException(
                    $"The kernel requires the Xen feature \"{Printable.Of(name)}\", which neither Xen 4.17 nor this program knows; "
                    + "use a kernel that runs on Xen 4.17 as an unprivileged PV guest.");
            supported |= feature;
            if (isRequired)
                required |= feature;
        }

        return (supported, required);
    }

    /// <summary>The names of the features in a set, for messages; bits without a name are shown by their number.</summary>
    public static string Describe(XenFeatures features)
    {
        List<string> names = [];
        for (int bit = 0; bit < 32; bit++)
        {
            XenFeatures feature = (XenFeatures)(1u << bit);
            if ((features & feature) == 0)
                continue;
            string? name = null;
            foreach ((string knownName, XenFeatures known) in Names)
                if (known == feature)
                    name = knownName;
            names.Add(name ?? $"XENFEAT number {bit}");
        }

        return names.Count == 0 ? "none" : string.Join(", ", names);
    }

    private static XenFeatures Find(ReadOnlySpan<char> name)
    {
        foreach ((string knownName, XenFeatures feature) in Names)
            if (name.SequenceEqual(knownName))
                return feature;
        return XenFeatures.None;
    }
}
