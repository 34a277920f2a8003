// From the bytes of a kernel file to a validated description of what to place in a PV domain's memory. No side effects.

using System.Collections.Immutable;

namespace XenSharp.Domains.Builder;

/// <summary>
/// A 64-bit PV kernel, unpacked and checked: what goes where in guest memory, and what the kernel asked of its domain.
/// Immutable. The rules are those of Xen's loader (libelf and the tools' domain builder, 4.17); the notes are described in Xen's
/// public elfnote.h. Addresses are in bytes.
/// </summary>
public sealed class KernelImage
{
    /// <summary>No kernel may unpack to more than this many bytes (1 GiB), as in Xen's tools.</summary>
    public const int LargestUnpackedSize = 1 << 30;

    /// <summary>
    /// Where to load what, in the order of the program headers. Segments that overlap are loaded in this order, so that a later one
    /// wins, bytes it zeroes included. All lie within [<see cref="GuestPhysicalStart"/>, <see cref="GuestPhysicalEnd"/>).
    /// </summary>
    public required ImmutableArray<KernelSegment> Segments { get; init; }

    /// <summary>Where pfn 0 appears in the initial mapping (VIRT_BASE, default 0).</summary>
    public required ulong VirtualBase { get; init; }

    /// <summary>Virtual address of the lowest byte of any segment; not below <see cref="VirtualBase"/>.</summary>
    public required ulong VirtualKernelStart { get; init; }

    /// <summary>Virtual address behind the highest byte of any segment, a loaded symbol table included; not page aligned.</summary>
    public required ulong VirtualKernelEnd { get; init; }

    /// <summary>First instruction (ENTRY, default e_entry); within the kernel.</summary>
    public required ulong VirtualEntry { get; init; }

    /// <summary>
    /// Virtual address of the page to fill with hypercall stubs, or null if the kernel wants none. Its page,
    /// <c>(HypercallPage - VirtualBase) / 4096</c> as a pfn, begins before <see cref="GuestPhysicalEnd"/>.
    /// </summary>
    public required ulong? HypercallPage { get; init; }

    /// <summary>
    /// Where the kernel wants the p2m list mapped (INIT_P2M), outside its image; null if it is to follow the image as usual. Xen's
    /// rules are applied: page aligned and below <see cref="VirtualBase"/>, or else null.
    /// </summary>
    public required ulong? InitP2M { get; init; }

    /// <summary>
    /// The kernel can take an initial ramdisk that is not in its initial mapping: start_info.mod_start is a pfn and
    /// SIF_MOD_START_PFN is set.
    /// </summary>
    public required bool ModStartPfn { get; init; }

    /// <summary>
    /// What p_paddr is ahead of pseudo-physical addresses (PADDR_OFFSET; default 0, with a legacy section
    /// <see cref="VirtualBase"/>). Already taken off in <see cref="Segments"/>.
    /// </summary>
    public required ulong PaddrOffset { get; init; }

    public required PaeMode PaeMode { get; init; }

    /// <summary>HV_START_LOW, or null. Means nothing to a 64-bit domain.</summary>
    public required ulong? HypervisorStartLow { get; init; }

    /// <summary>The kernel copes with a suspend that is cancelled (SUSPEND_CANCEL).</summary>
    public required bool SuspendCancel { get; init; }

    /// <summary>L1_MFN_VALID, empty if not given.</summary>
    public required ImmutableArray<L1MfnValidity> L1MfnValid { get; init; }

    /// <summary>The kernel asked for its symbol table (BSD_SYMTAB); if it has one, the last of <see cref="Segments"/> holds it.</summary>
    public required bool BsdSymbolTable { get; init; }

    /// <summary>GUEST_OS, such as "linux"; empty if not given. Untrusted text, as the other three.</summary>
    public required string GuestOs { get; init; }

    /// <summary>GUEST_VERSION, such as "2.6"; empty if not given.</summary>
    public required string GuestVersion { get; init; }

    /// <summary>LOADER, normally "generic"; empty if not given.</summary>
    public required string Loader { get; init; }

    /// <summary>XEN_VERSION, always beginning with "xen-3.0".</summary>
    public required string XenVersion { get; init; }

    /// <summary>FEATURES and SUPPORTED_FEATURES together.</summary>
    public required XenFeatures SupportedFeatures { get; init; }

    /// <summary>Features that FEATURES marks with '!'; a subset of <see cref="SupportedFeatures"/> and of what was offered.</summary>
    public required XenFeatures RequiredFeatures { get; init; }

    /// <summary>Where the parameters were found; never <see cref="KernelNoteSource.None"/>.</summary>
    public required KernelNoteSource NoteSource { get; init; }

    /// <summary>The file is a bzImage, possibly within a compressed file.</summary>
    public required bool IsBzImage { get; init; }

    /// <summary>How the ELF kernel was compressed, in the bzImage or by itself.</summary>
    public required KernelCompression Compression { get; init; }

    /// <summary>Lowest pseudo-physical address of any segment.</summary>
    public ulong GuestPhysicalStart => VirtualKernelStart - VirtualBase;

    /// <summary>Pseudo-physical address behind the last segment; the domain must have more memory than this.</summary>
    public ulong GuestPhysicalEnd => VirtualKernelEnd - VirtualBase;

    /// <summary>
    /// The ELF image in a kernel file of any kind that <see cref="Parse"/> takes, for a place where unpacking it is slow.
    /// </summary>
    /// <param name="file">The whole file; an ELF image is given back as it is.</param>
    /// <exception cref="KernelImageException">Not a kernel, or it does not unpack; no other exception is thrown for any input.</exception>
    public static ReadOnlyMemory<byte> Unpack(ReadOnlyMemory<byte> file) => KernelContainer.Unpack(file, out _, out _);

    /// <summary>
    /// Reads a kernel: a bzImage (boot protocol 2.08 or later, any of the kernel's compressions), an ELF64 x86-64 executable, or
    /// either of them compressed as a whole.
    /// </summary>
    /// <param name="file">The whole file, from anywhere: nothing in it is trusted. Uncompressed segments refer to this memory.</param>
    /// <param name="offered">Features a kernel may require; one that requires another is refused.</param>
    /// <exception cref="KernelImageException">The kernel cannot be loaded; no other exception is thrown for any input.</exception>
    public static KernelImage Parse(ReadOnlyMemory<byte> file, XenFeatures offered = XenFeatureNames.OfferedToPv64)
    {
        ReadOnlyMemory<byte> elf = KernelContainer.Unpack(file, out bool isBzImage, out KernelCompression compression);
        return KernelLayout.Describe(new ElfFile(elf), offered, isBzImage, compression);
    }
}
