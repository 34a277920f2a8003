// Peels the wrappings off a kernel file until the ELF image is bare.

namespace XenSharp.Domains.Builder;

/// <summary>Decides what kind of file a kernel is: ELF, bzImage, or either compressed as a whole.</summary>
internal static class KernelContainer
{
    /// <exception cref="KernelImageException">Not a kernel, or it does not unpack.</exception>
    public static ReadOnlyMemory<byte> Unpack(ReadOnlyMemory<byte> file, out bool isBzImage, out KernelCompression compression)
    {
        isBzImage = false;
        compression = KernelCompression.None;
        if (file.IsEmpty)
            throw new KernelImageException("The kernel file is empty; copy or download it again.");

        // BzImage goes first: its first sector is free and may look like anything.
        if (!BzImage.IsBzImage(file.Span) && !file.Span.StartsWith(ElfFile.Magic))
        {
            compression = KernelDecompressor.Identify(file.Span) ?? throw NotAKernel("This file");
            file = KernelDecompressor.Decompress(
                compression, file, KernelImage.LargestUnpackedSize, likelySize: file.Length * 4L);
        }

        if (BzImage.IsBzImage(file.Span))
        {
            isBzImage = true;
            ReadOnlyMemory<byte> kernel = BzImage.Unpack(file, KernelImage.LargestUnpackedSize, out compression);
            return kernel.Span.StartsWith(ElfFile.Magic) ? kernel : throw NotAKernel("What this bzImage unpacks to");
        }

        return file.Span.StartsWith(ElfFile.Magic) ? file : throw NotAKernel("What this file unpacks to");
    }

    private static KernelImageException NotAKernel(string what) => new(
        $"{what} is not a kernel: it is neither a Linux bzImage nor an ELF image, compressed or not. "
        + "Give the kernel itself (vmlinuz, bzImage or vmlinux), not a ramdisk or a disk image.");
}
