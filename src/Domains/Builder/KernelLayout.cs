// Applies Xen's defaults and checks to what a kernel says about itself, and computes where it goes.

using System.Collections.Immutable;

namespace XenSharp.Domains.Builder;

/// <summary>Turns an ELF file and its Xen notes into a <see cref="KernelImage"/>, or says why it cannot run.</summary>
internal static class KernelLayout
{
    private const ulong PageSize = 4096;

    // L4 slots 256 to 271 belong to Xen in every PV domain.
    private const ulong XenAreaStart = 0xFFFF_8000_0000_0000;
    private const ulong XenAreaEnd = 0xFFFF_8800_0000_0000;
    private const ulong LowHalfEnd = 0x0000_8000_0000_0000;

    private const string BuildAdvice = "build it with CONFIG_XEN_PV, or use a kernel that can run as a Xen PV guest";

    public static KernelImage Describe(ElfFile elf, XenFeatures offered, bool isBzImage, KernelCompression compression)
    {
        KernelNotes notes = KernelNotes.Read(elf);
        RequirePvKernel(elf, notes);
        RequireFeatures(notes.RequiredFeatures, offered);

        if (notes is { PaddrOffset: not null, VirtualBase: null })
            throw new KernelImageException(
                "The kernel gives PADDR_OFFSET without VIRT_BASE, so where it wants to be mapped is unknown; "
                + "it does not start on Xen either: use another build of it.");
        ulong virtualBase = notes.VirtualBase ?? 0;
        ulong paddrOffset = notes.PaddrOffset ?? (notes.Source == KernelNoteSource.LegacySection ? virtualBase : 0);

        List<KernelSegment> segments = LoadSegments(elf, virtualBase, paddrOffset);
        ulong start = ulong.MaxValue;
        ulong end = 0;
        foreach (KernelSegment segment in segments)
        {
            start = Math.Min(start, segment.GuestPhysicalAddress);
            end = Math.Max(end, segment.GuestPhysicalEnd);
        }

        RequireBoundedCopying(segments, end - start);
        if (notes.BsdSymbolTable && KernelSymbolTable.Build(elf) is { } symbols)
        {
            // Aligned as a p_paddr, before PADDR_OFFSET is taken off.
            ulong address = unchecked(((paddrOffset + end + 7) & ~7UL) - paddrOffset);
            segments.Add(new KernelSegment(address, unchecked(virtualBase + address), symbols, (ulong)symbols.Length));
            end = address + (ulong)symbols.Length;
        }

        RequireMappable(virtualBase, end);
        ulong virtualStart = virtualBase + start;
        ulong virtualEnd = virtualBase + end;
        ulong entry = notes.VirtualEntry ?? elf.Entry;
        if (entry < virtualStart || entry > virtualEnd)
            throw new KernelImageException(
                $"The kernel's entry point 0x{entry:x} is outside the kernel itself (0x{virtualStart:x} to 0x{virtualEnd:x}); "
                + "it does not start on Xen either: use another build of it.");

        return new KernelImage
        {
            Segments = [.. segments],
            VirtualBase = virtualBase,
            VirtualKernelStart = virtualStart,
            VirtualKernelEnd = virtualEnd,
            VirtualEntry = entry,
            HypercallPage = CheckHypercallPage(notes.HypercallPage, virtualBase, virtualEnd),
            InitP2M = CheckInitP2M(notes.InitP2M, virtualBase, virtualStart, virtualEnd),
            ModStartPfn = notes.ModStartPfn,
            PaddrOffset = paddrOffset,
            PaeMode = notes.PaeMode,
            HypervisorStartLow = notes.HypervisorStartLow,
            SuspendCancel = notes.SuspendCancel,
            L1MfnValid = [.. notes.L1MfnValid],
            BsdSymbolTable = notes.BsdSymbolTable,
            GuestOs = notes.GuestOs,
            GuestVersion = notes.GuestVersion,
            Loader = notes.Loader,
            XenVersion = notes.XenVersion,
            SupportedFeatures = notes.SupportedFeatures,
            RequiredFeatures = notes.RequiredFeatures,
            NoteSource = notes.Source,
            IsBzImage = isBzImage,
            Compression = compression,
        };
    }

    private static void RequirePvKernel(ElfFile elf, KernelNotes notes)
    {
        if (notes.Source == KernelNoteSource.None)
            throw new KernelImageException(
                $"This is not a Xen PV kernel: it has no Xen notes and no section __xen_guest; {BuildAdvice}.");

        // An image made for PVH says where PVH starts, and nothing of PV or only the addresses: Linux without CONFIG_XEN_PV has no
        // ENTRY, and its e_entry is a physical address.
        if (notes is { Phys32Entry: not null, VirtualEntry: null } && (notes.VirtualBase is null || elf.Entry < notes.VirtualBase))
            throw new KernelImageException($"This kernel can start as a Xen PVH guest only, not as a PV guest; {BuildAdvice}.");
        if (!notes.Loader.StartsWith("generic", StringComparison.Ordinal)
            && !notes.GuestOs.StartsWith("linux", StringComparison.Ordinal))
            throw new KernelImageException(
                $"The kernel wants the loader \"{Printable.Of(notes.Loader)}\" (guest system \"{Printable.Of(notes.GuestOs)}\"), "
                + $"but only kernels for the loader \"generic\" and Linux can be loaded; {BuildAdvice}.");
        if (!notes.XenVersion.StartsWith("xen-3.0", StringComparison.Ordinal))
            throw new KernelImageException(
                $"The kernel was built for the Xen interface \"{Printable.Of(notes.XenVersion)}\" instead of \"xen-3.0\"; {BuildAdvice}.");
    }

    private static void RequireFeatures(XenFeatures required, XenFeatures offered)
    {
        if ((required & XenFeatures.Dom0 & ~offered) != 0)
            throw new KernelImageException(
                "This kernel can only be the privileged domain of a Xen host (it requires the feature dom0); "
                + "use one that runs as an unprivileged guest.");
        XenFeatures missing = required & ~offered;
        if (missing != XenFeatures.None)
            throw new KernelImageException(
                $"The kernel requires Xen features that a 64-bit PV domain does not have: {XenFeatureNames.Describe(missing)}; "
                + "use a build of it that does not insist on them.");
    }

    private static List<KernelSegment> LoadSegments(ElfFile elf, ulong virtualBase, ulong paddrOffset)
    {
        List<KernelSegment> segments = [];
        foreach (ElfProgramHeader header in elf.ProgramHeaders)
        {
            if (!header.IsLoadable || (header.MemorySize == 0 && header.FileSize == 0))
                continue;
            if (header.FileSize > header.MemorySize)
                throw new KernelImageException(
                    $"A segment of the kernel has more bytes in the file ({header.FileSize}) than it takes in memory "
                    + $"({header.MemorySize}): the file is damaged, so copy or download it again.");
            if (header.PhysicalAddress < paddrOffset)
                throw new KernelImageException(
                    $"A segment of the kernel is at physical address 0x{header.PhysicalAddress:x}, below its PADDR_OFFSET "
                    + $"0x{paddrOffset:x}; it does not start on Xen either: use another build of it.");
            ulong address = header.PhysicalAddress - paddrOffset;
            if (header.MemorySize > LowHalfEnd || address > LowHalfEnd)
                throw new KernelImageException(
                    $"A segment of the kernel ({header.MemorySize} bytes at 0x{header.PhysicalAddress:x}) does not fit any memory: "
                    + "the file is damaged, or built with another PADDR_OFFSET than it says.");
            segments.Add(new KernelSegment(
                address,
                unchecked(virtualBase + address),
                elf.Range(header.Offset, header.FileSize, "the end of one of its segments"),
                header.MemorySize));
        }

        return segments.Count > 0
            ? segments
            : throw new KernelImageException(
                "The kernel's ELF file has nothing to load (no PT_LOAD segment); use the vmlinux or bzImage of the kernel's build.");
    }

    /// <summary>Overlaps are allowed, but as in Xen's loader no more than twice the image may be written in all.</summary>
    private static void RequireBoundedCopying(List<KernelSegment> segments, ulong span)
    {
        ulong budget = 2 * ((span + PageSize - 1) & ~(PageSize - 1));
        foreach (KernelSegment segment in segments)
        {
            if (segment.MemorySize > budget)
                throw new KernelImageException(
                    "The kernel's segments lie on top of one another many times over: the file is damaged, so copy or download it again.");
            budget -= segment.MemorySize;
        }
    }

    /// <summary>The initial mapping runs from VIRT_BASE to beyond the kernel's end, within what a PV guest may map.</summary>
    private static void RequireMappable(ulong virtualBase, ulong size)
    {
        ulong end = unchecked(virtualBase + size);
        bool fits = end > virtualBase
            && (virtualBase < LowHalfEnd ? end <= LowHalfEnd : virtualBase >= XenAreaEnd);
        if (!fits)
            throw new KernelImageException(
                $"The kernel wants {Printable.Size(size)} mapped from VIRT_BASE 0x{virtualBase:x}, which is not within one half of the "
                + $"address space or is in the part that Xen keeps (0x{XenAreaStart:x} to 0x{XenAreaEnd - 1:x}); use another build of it.");
    }

    private static ulong? CheckHypercallPage(ulong? page, ulong virtualBase, ulong virtualEnd)
    {
        // Xen fills whatever page the address is in; one outside the image would destroy the boot structures behind it.
        if (page is { } address && (address < virtualBase || (address & ~(PageSize - 1)) >= virtualEnd))
            throw new KernelImageException(
                $"The kernel's hypercall page 0x{address:x} is outside the kernel itself (0x{virtualBase:x} to 0x{virtualEnd:x}); "
                + "use another build of it.");
        return page;
    }

    private static ulong? CheckInitP2M(ulong? initP2M, ulong virtualBase, ulong virtualStart, ulong virtualEnd)
    {
        if (initP2M is not { } address)
            return null;
        if (address >= virtualStart && address < virtualEnd)
            throw new KernelImageException(
                $"The kernel wants the p2m list at 0x{address:x} (INIT_P2M), in the middle of itself (0x{virtualStart:x} to "
                + $"0x{virtualEnd:x}); it does not start on Xen either: use another build of it.");
        if (address >= virtualBase || address % PageSize != 0)
            return null;
        return address is < LowHalfEnd or >= XenAreaEnd
            ? address
            : throw new KernelImageException(
                $"The kernel wants the p2m list at 0x{address:x} (INIT_P2M), where no PV guest may map anything; use another build of it.");
    }
}
