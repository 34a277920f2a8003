// Reads ELF notes named "Xen" (XEN_ELFNOTE_* of Xen's public elfnote.h).

using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Domains.Builder;

/// <summary>Puts the Xen notes of one or more note segments or sections into a <see cref="KernelNotes"/>; the last of a kind counts.</summary>
internal sealed class XenNoteReader(KernelNotes notes)
{
    // Xen's own limits: they bound the work that overlapping note segments could make.
    private const int MostNotes = 65536;
    private const int LongestText = 4096;

    private const int HeaderSize = 12;

    private int _noteCount;

    private enum NoteType : uint
    {
        Entry = 1,
        HypercallPage = 2,
        VirtualBase = 3,
        PaddrOffset = 4,
        XenVersion = 5,
        GuestOs = 6,
        GuestVersion = 7,
        Loader = 8,
        PaeMode = 9,
        Features = 10,
        BsdSymtab = 11,
        HypervisorStartLow = 12,
        L1MfnValid = 13,
        SuspendCancel = 14,
        InitP2M = 15,
        ModStartPfn = 16,
        SupportedFeatures = 17,
        Phys32Entry = 18,
    }

    /// <summary>Reads the notes in <paramref name="area"/>.</summary>
    /// <returns>True if at least one was Xen's.</returns>
    /// <exception cref="KernelImageException">A note does not fit its area, or says something impossible.</exception>
    public bool ReadAll(ReadOnlySpan<byte> area)
    {
        bool found = false;
        // Fewer bytes than a header at the end are padding.
        while (area.Length >= HeaderSize)
        {
            if (++_noteCount > MostNotes)
                throw new KernelImageException(
                    $"The kernel has more than {MostNotes} ELF notes, which no kernel needs; copy or download the file again.");
            uint nameSize = BinaryPrimitives.ReadUInt32LittleEndian(area);
            uint descriptionSize = BinaryPrimitives.ReadUInt32LittleEndian(area[4..]);
            uint type = BinaryPrimitives.ReadUInt32LittleEndian(area[8..]);

            // Name and description are each padded to four bytes, the very last one not always.
            ulong descriptionOffset = HeaderSize + (((ulong)nameSize + 3) & ~3UL);
            ulong end = descriptionOffset + descriptionSize;
            if (end > (ulong)area.Length)
                throw new KernelImageException(
                    "An ELF note of the kernel does not fit its segment: the file is damaged, so copy or download it again.");
            ReadOnlySpan<byte> name = area.Slice(HeaderSize, (int)nameSize);
            if (name.StartsWith("Xen\0"u8) || name.SequenceEqual("Xen"u8))
            {
                Take((NoteType)type, area[(int)descriptionOffset..(int)end]);
                found = true;
            }

            area = area[(int)Math.Min((end + 3) & ~3UL, (ulong)area.Length)..];
        }

        return found;
    }

    private void Take(NoteType type, ReadOnlySpan<byte> description)
    {
        switch (type)
        {
            case NoteType.Entry:
                notes.VirtualEntry = Number(description);
                break;
            case NoteType.HypercallPage:
                notes.HypercallPage = Number(description);
                break;
            case NoteType.VirtualBase:
                notes.VirtualBase = Number(description);
                break;
            case NoteType.PaddrOffset:
                notes.PaddrOffset = Number(description);
                break;
            case NoteType.XenVersion:
                notes.XenVersion = Text(description);
                break;
            case NoteType.GuestOs:
                notes.GuestOs = Text(description);
                break;
            case NoteType.GuestVersion:
                notes.GuestVersion = Text(description);
                break;
            case NoteType.Loader:
                notes.Loader = Text(description);
                break;
            case NoteType.PaeMode:
                string mode = Text(description);
                if (mode.Contains("bimodal", StringComparison.Ordinal))
                    notes.PaeMode = PaeMode.Bimodal;
                else if (mode == "yes")
                    notes.PaeMode = PaeMode.ExtendedCr3;
                break;
            case NoteType.Features:
                notes.AddFeatures(Text(description));
                break;
            case NoteType.BsdSymtab:
                notes.BsdSymbolTable |= Text(description) == "yes";
                break;
            case NoteType.HypervisorStartLow:
                notes.HypervisorStartLow = Number(description);
                break;
            case NoteType.L1MfnValid:
                notes.L1MfnValid = Pairs(description);
                break;
            case NoteType.SuspendCancel:
                notes.SuspendCancel = Number(description) != 0;
                break;
            case NoteType.InitP2M:
                notes.InitP2M = Number(description);
                break;
            case NoteType.ModStartPfn:
                notes.ModStartPfn = Number(description) != 0;
                break;
            case NoteType.SupportedFeatures:
                // An array of 32-bit submaps, of which there is one; kernels built for more may have a longer one.
                if (description.Length >= 4 && description.Length % 4 == 0)
                    notes.SupportedFeatures |= (XenFeatures)BinaryPrimitives.ReadUInt32LittleEndian(description);
                break;
            case NoteType.Phys32Entry:
                notes.Phys32Entry = Number(description);
                break;
        }
    }

    /// <summary>A number of 1, 2, 4 or 8 bytes. Any other size counts as 0 in Xen's loader, and so here. All ones is "unset" there.</summary>
    private static ulong? Number(ReadOnlySpan<byte> description)
    {
        ulong value = description.Length switch
        {
            1 => description[0],
            2 => BinaryPrimitives.ReadUInt16LittleEndian(description),
            4 => BinaryPrimitives.ReadUInt32LittleEndian(description),
            8 => BinaryPrimitives.ReadUInt64LittleEndian(description),
            _ => 0,
        };
        return value == ulong.MaxValue ? null : value;
    }

    /// <summary>Text up to its NUL or the end of the note: Linux writes some without a NUL.</summary>
    private static string Text(ReadOnlySpan<byte> description)
    {
        int end = description.IndexOf((byte)0);
        if (end >= 0)
            description = description[..end];
        if (description.Length > LongestText)
            throw new KernelImageException(
                $"A Xen note of the kernel is longer than {LongestText} characters, which no kernel needs; "
                + "copy or download the file again.");
        return Encoding.Latin1.GetString(description);
    }

    private static L1MfnValidity[] Pairs(ReadOnlySpan<byte> description)
    {
        const int PairSize = 16;
        L1MfnValidity[] pairs = new L1MfnValidity[Math.Min(description.Length, LongestText) / PairSize];
        for (int index = 0; index < pairs.Length; index++)
        {
            ReadOnlySpan<byte> pair = description.Slice(index * PairSize, PairSize);
            pairs[index] = new L1MfnValidity(
                BinaryPrimitives.ReadUInt64LittleEndian(pair), BinaryPrimitives.ReadUInt64LittleEndian(pair[8..]));
        }

        return pairs;
    }
}
