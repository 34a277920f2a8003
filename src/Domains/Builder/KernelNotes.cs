// What a kernel says about itself before any default applies: the values of its Xen notes, from whichever place they were found.

namespace XenSharp.Domains.Builder;

/// <summary>
/// PAE_MODE as Xen's loader reads it. It concerns 32-bit kernels only; a 64-bit one may say anything.
/// </summary>
public enum PaeMode
{
    No,
    Yes,

    /// <summary>"yes" in a note, "yes[extended-cr3]" in the legacy section: page directories above 4 GiB are understood.</summary>
    ExtendedCr3,
    Bimodal,
}

/// <summary>Where a kernel keeps its Xen parameters; it decides some defaults.</summary>
public enum KernelNoteSource
{
    /// <summary>Nowhere: not a Xen kernel.</summary>
    None,

    /// <summary>Notes named "Xen" in PT_NOTE segments.</summary>
    Segments,

    /// <summary>Notes named "Xen" in SHT_NOTE sections.</summary>
    Sections,

    /// <summary>The text in the section __xen_guest, which kernels before Linux 2.6.20 and old NetBSD used.</summary>
    LegacySection,
}

/// <summary>
/// A pair of L1_MFN_VALID: a non-present level-1 entry <c>e</c> carries a valid machine frame if <c>(e &amp; Mask) == Value</c>.
/// </summary>
public readonly record struct L1MfnValidity(ulong Mask, ulong Value);

/// <summary>The parameters a kernel gave; null is "did not say".</summary>
internal sealed class KernelNotes
{
    public KernelNoteSource Source { get; set; }

    public ulong? VirtualBase { get; set; }

    public ulong? VirtualEntry { get; set; }

    public ulong? PaddrOffset { get; set; }

    public ulong? HypercallPage { get; set; }

    public ulong? InitP2M { get; set; }

    public ulong? HypervisorStartLow { get; set; }

    /// <summary>PHYS32_ENTRY, where a PVH domain would start; of no use to a PV domain but to tell PVH kernels by.</summary>
    public ulong? Phys32Entry { get; set; }

    public bool ModStartPfn { get; set; }

    public bool SuspendCancel { get; set; }

    public bool BsdSymbolTable { get; set; }

    public PaeMode PaeMode { get; set; }

    public string XenVersion { get; set; } = "";

    public string GuestOs { get; set; } = "";

    public string GuestVersion { get; set; } = "";

    public string Loader { get; set; } = "";

    public XenFeatures SupportedFeatures { get; set; }

    public XenFeatures RequiredFeatures { get; set; }

    public IReadOnlyList<L1MfnValidity> L1MfnValid { get; set; } = [];

    /// <summary>Finds the parameters where Xen's loader looks: note segments, else note sections, else __xen_guest.</summary>
    /// <exception cref="KernelImageException">A note is malformed or demands what no Xen has.</exception>
    public static KernelNotes Read(ElfFile elf)
    {
        KernelNotes notes = new();
        XenNoteReader reader = new(notes);
        foreach (ElfProgramHeader header in elf.ProgramHeaders)
        {
            // Some versions of binutils leave p_offset of note segments at 0.
            if (header.Type == ElfProgramHeader.TypeNote && header.Offset != 0
                && reader.ReadAll(elf.Range(header.Offset, header.FileSize, "its notes").Span))
                notes.Source = KernelNoteSource.Segments;
        }

        if (notes.Source != KernelNoteSource.None)
            return notes;
        for (int index = 1; index < elf.SectionCount; index++)
        {
            ElfSectionHeader section = elf.Section(index);
            if (section.Type == ElfSectionHeader.TypeNote
                && reader.ReadAll(elf.Range(section.Offset, section.Size, "its notes").Span))
                notes.Source = KernelNoteSource.Sections;
        }

        if (notes.Source != KernelNoteSource.None)
            return notes;
        if (elf.FindSection("__xen_guest"u8) is { } legacy)
        {
            LegacyGuestSection.Read(elf.Range(legacy.Offset, legacy.Size, "its section __xen_guest").Span, notes);
            notes.Source = KernelNoteSource.LegacySection;
        }

        return notes;
    }

    /// <summary>Adds a FEATURES list.</summary>
    public void AddFeatures(string list)
    {
        (XenFeatures supported, XenFeatures required) = XenFeatureNames.Parse(list);
        SupportedFeatures |= supported;
        RequiredFeatures |= required;
    }
}
