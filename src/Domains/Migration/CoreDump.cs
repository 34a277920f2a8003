// A domain's memory and registers as an ELF file, the way Xen's toolstack dumps them (docs/misc/dump-core-format.txt of Xen's sources).
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Text;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Writes the file from its first byte to its last. Pages are all that the domain owns, under the pfns that the M2P table has for them: that
/// is there from the start, and is not only the word of a kernel which may have crashed.
/// </summary>
/// <param name="domain">A domain whose vCPUs are at rest.</param>
/// <param name="progress">Is told of the pages.</param>
/// <param name="cancellation">Ends the work.</param>
internal sealed unsafe class CoreDump(Domain domain, IProgress<PageProgress>? progress, CancellationToken cancellation)
{
    private const int ElfHeaderSize = 64;
    private const int SectionHeaderSize = 64;
    private const int PagesAtOnce = 256;

    /// <summary>A pfn from which on it is none: the M2P table may hold anything.</summary>
    private const ulong EndOfPfns = 1UL << 40;

    /// <summary>XC_CORE_MAGIC.</summary>
    private const ulong PvMagic = 0xf00febed;

    // XEN_ELFNOTE_DUMPCORE_* of xen/elfnote.h.
    private const uint NoteNone = 0x200_0000;
    private const uint NoteHeader = 0x200_0001;
    private const uint NoteXenVersion = 0x200_0002;
    private const uint NoteFormatVersion = 0x200_0003;

    private readonly DomainContext* _context = domain.Context;

    /// <summary>SHT_*.</summary>
    private enum SectionType : uint
    {
        Null = 0,
        Data = 1,
        Strings = 3,
        Note = 7,
    }

    /// <summary>struct xen_dumpcore_p2m.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private readonly record struct P2MEntry(ulong Pfn, ulong Mfn);

    /// <summary>A section; those without a place yet get the next one.</summary>
    private readonly record struct Section(string Name, SectionType Type, ulong Size, ulong Alignment, ulong ElementSize);

    /// <summary>Writes all of it.</summary>
    public void Write(Stream stream)
    {
        List<P2MEntry> pages = FindPages();
        byte[] contexts = Contexts(out int vcpus);
        byte[] notes = Notes(vcpus, pages.Count);
        ReadOnlySpan<Section> sections =
        [
            new(string.Empty, SectionType.Null, 0, 0, 0),
            new(".note.Xen", SectionType.Note, (ulong)notes.Length, 4, 0),
            new(".xen_prstatus", SectionType.Data, (ulong)contexts.Length, 8, (ulong)sizeof(VcpuInitialisation.GuestContext)),
            new(".xen_shared_info", SectionType.Data, Paging.PageSize, 8, Paging.PageSize),
            new(".xen_pages", SectionType.Data, (ulong)pages.Count << Paging.PageShift, Paging.PageSize, Paging.PageSize),
            new(".xen_p2m", SectionType.Data, (ulong)(pages.Count * sizeof(P2MEntry)), 8, (ulong)sizeof(P2MEntry)),
            new(".shstrtab", SectionType.Strings, 0, 1, 0),
        ];
        byte[] names = Encoding.ASCII.GetBytes(string.Concat(sections.ToArray().Select(static section => section.Name + '\0')));
        byte[] headers = Headers(sections, names.Length, out ulong pagesAt);
        try
        {
            stream.Write(headers);
            stream.Write(notes);
            stream.Write(contexts);
            stream.Write(new ReadOnlySpan<byte>(_context->SharedInfo, (int)Paging.PageSize));
            stream.Write(new byte[pagesAt - (ulong)(headers.Length + notes.Length + contexts.Length) - Paging.PageSize]);
            WritePages(stream, pages);
            stream.Write(MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(pages)));
            stream.Write(names);
            stream.Flush();
        }
        catch (IOException failure)
        {
            throw new MigrationException($"The core cannot be written: {failure.Message.TrimEnd('.')}.", failure);
        }
    }

    private List<P2MEntry> FindPages()
    {
        var pages = new List<P2MEntry>((int)domain.OwnedPages);
        for (ulong i = 0; i < _context->Memory.FrameCount; i++)
        {
            Mfn frame = _context->Memory.FirstFrame + i;
            ulong pfn = _context->MachineToPhys[i];
            if (pfn < EndOfPfns && GuestP2M.IsOwn(_context, frame))
                pages.Add(new P2MEntry(pfn, frame.Value));
        }

        pages.Sort(static (one, other) => one.Pfn.CompareTo(other.Pfn));
        return pages;
    }

    /// <summary>The contexts of the vCPUs that have one, whether they are up or not.</summary>
    private byte[] Contexts(out int count)
    {
        var contexts = new List<byte>();
        byte[] area = new byte[ExtendedState.Size];
        count = 0;
        foreach (Vcpu vcpu in domain.Vcpus)
        {
            if (!vcpu.IsInitialised)
                continue;
            vcpu.Cpu.GetExtendedState(area);
            VcpuInitialisation.Capture(vcpu, area, out VcpuInitialisation.GuestContext guest);
            contexts.AddRange(MemoryMarshal.AsBytes(new ReadOnlySpan<VcpuInitialisation.GuestContext>(ref guest)));
            count++;
        }

        return [.. contexts];
    }

    private static byte[] Notes(int vcpus, int pages)
    {
        var notes = new List<byte>();
        AddNote(notes, NoteNone, []);
        AddNote(notes, NoteHeader, [.. Words(PvMagic, (ulong)vcpus, (ulong)pages, Paging.PageSize)]);
        AddNote(notes, NoteXenVersion,
        [
            .. Words(XenVersion.Version >> 16, XenVersion.Version & 0xffff), .. XenVersion.Texts(),
            .. Words(Paging.HypervisorVirtualStart, Paging.PageSize),
        ]);

        // Major version in the upper half, minor in the lower.
        AddNote(notes, NoteFormatVersion, Words(1));
        return [.. notes];
    }

    private static byte[] Words(params ReadOnlySpan<ulong> words) => MemoryMarshal.AsBytes(words).ToArray();

    private static void AddNote(List<byte> notes, uint type, ReadOnlySpan<byte> description)
    {
        Span<byte> head = stackalloc byte[16];
        BinaryPrimitives.WriteInt32LittleEndian(head, 4);
        BinaryPrimitives.WriteInt32LittleEndian(head[4..], description.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(head[8..], type);
        "Xen\0"u8.CopyTo(head[12..]);
        notes.AddRange(head);
        notes.AddRange(description);
    }

    /// <summary>The ELF header and the section headers, behind which the sections follow in their order.</summary>
    private static byte[] Headers(ReadOnlySpan<Section> sections, int namesLength, out ulong pagesAt)
    {
        const byte class64 = 2, littleEndian = 1, version = 1;
        const ushort core = 4, x8664 = 62;
        byte[] bytes = new byte[ElfHeaderSize + (sections.Length * SectionHeaderSize)];
        Span<byte> header = bytes;
        "\u007fELF"u8.CopyTo(header);
        (header[4], header[5], header[6]) = (class64, littleEndian, version);
        BinaryPrimitives.WriteUInt16LittleEndian(header[16..], core);
        BinaryPrimitives.WriteUInt16LittleEndian(header[18..], x8664);
        BinaryPrimitives.WriteUInt32LittleEndian(header[20..], version);
        BinaryPrimitives.WriteUInt64LittleEndian(header[40..], ElfHeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[52..], ElfHeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[58..], SectionHeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[60..], (ushort)sections.Length);
        BinaryPrimitives.WriteUInt16LittleEndian(header[62..], (ushort)(sections.Length - 1));

        ulong at = (ulong)bytes.Length;
        int name = 0;
        pagesAt = 0;
        for (int i = 0; i < sections.Length; i++)
        {
            ref readonly Section section = ref sections[i];
            if (section.Type != SectionType.Null)
            {
                // Only the pages begin farther on than the section in front of them ends: all others are whole words.
                at = (at + section.Alignment - 1) & ~(section.Alignment - 1);
                if (section.Alignment == Paging.PageSize)
                    pagesAt = at;
                ulong size = section.Type == SectionType.Strings ? (ulong)namesLength : section.Size;
                Span<byte> entry = header[(ElfHeaderSize + (i * SectionHeaderSize))..];
                BinaryPrimitives.WriteInt32LittleEndian(entry, name);
                BinaryPrimitives.WriteUInt32LittleEndian(entry[4..], (uint)section.Type);
                BinaryPrimitives.WriteUInt64LittleEndian(entry[24..], at);
                BinaryPrimitives.WriteUInt64LittleEndian(entry[32..], size);
                BinaryPrimitives.WriteUInt64LittleEndian(entry[48..], section.Alignment);
                BinaryPrimitives.WriteUInt64LittleEndian(entry[56..], section.ElementSize);
                at += size;
            }

            name += section.Name.Length + 1;
        }

        return bytes;
    }

    private void WritePages(Stream stream, List<P2MEntry> pages)
    {
        byte[] data = new byte[PagesAtOnce << Paging.PageShift];
        var empty = new EmptyFrames(domain.Outside.Machine);
        progress?.Report(new PageProgress(0, (ulong)pages.Count));
        for (int done = 0; done < pages.Count;)
        {
            cancellation.ThrowIfCancellationRequested();
            int count = Math.Min(PagesAtOnce, pages.Count - done);
            for (int i = 0; i < count; i++)
            {
                var frame = new Mfn(pages[done + i].Mfn);
                Span<byte> to = data.AsSpan(i << Paging.PageShift, (int)Paging.PageSize);
                if (empty.Contains(frame))
                    to.Clear();
                else
                    new ReadOnlySpan<byte>(_context->Memory.Page(frame), to.Length).CopyTo(to);
            }

            stream.Write(data.AsSpan(0, count << Paging.PageShift));
            done += count;
            progress?.Report(new PageProgress((ulong)done, (ulong)pages.Count));
        }
    }
}
