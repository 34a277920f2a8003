// The formats that images have, by the names that xl gives them.
namespace XenSharp.Devices.Block.Images;

/// <summary>How a disk is laid out in its file.</summary>
public enum BlockImageFormat
{
    /// <summary>Byte for byte.</summary>
    Raw,
    Qcow,
    Qcow2,
    Qed,

    /// <summary>Microsoft's older format, "vhd" to xl and "vpc" to QEMU.</summary>
    Vhd,
    Vhdx,
    Vmdk,
    Vdi,
}

/// <summary>Opens images, and knows their formats' names.</summary>
public static class BlockImage
{
    /// <summary>The format of a name as in xl's disk specifications: raw (or aio), qcow, qcow2, qed, vhd (or vpc), vhdx, vmdk, vdi.</summary>
    /// <returns>False for another name.</returns>
    public static bool TryParseFormat(string name, out BlockImageFormat format)
    {
        (bool known, format) = name switch
        {
            "raw" or "aio" => (true, BlockImageFormat.Raw),
            "qcow" => (true, BlockImageFormat.Qcow),
            "qcow2" => (true, BlockImageFormat.Qcow2),
            "qed" => (true, BlockImageFormat.Qed),
            "vhd" or "vpc" => (true, BlockImageFormat.Vhd),
            "vhdx" => (true, BlockImageFormat.Vhdx),
            "vmdk" => (true, BlockImageFormat.Vmdk),
            "vdi" => (true, BlockImageFormat.Vdi),
            _ => (false, default),
        };
        return known;
    }

    /// <summary>Opens an image: a raw one directly, all others by a qemu-nbd that serves this process alone.</summary>
    /// <param name="path">The file or block device.</param>
    /// <param name="format">Its format; it is never guessed, as a guest could make a raw disk look like another format.</param>
    /// <param name="readOnly">Whether it is only read.</param>
    /// <param name="program">The qemu-nbd to use; null for the one in PATH.</param>
    /// <param name="direct">Whether it is used past the host's page cache (O_DIRECT).</param>
    /// <param name="cancellation">Ends the wait for qemu-nbd.</param>
    /// <exception cref="BlockImageException">It cannot be opened or is in use; the message says what to do.</exception>
    public static async Task<IBlockImage> OpenAsync(
        string path, BlockImageFormat format, bool readOnly, QemuNbdProgram? program = null, bool direct = false,
        CancellationToken cancellation = default)
        => format == BlockImageFormat.Raw
            ? RawImage.Open(path, readOnly, direct)
            : await QemuImage.OpenAsync(path, format, readOnly, program, direct, cancellation).ConfigureAwait(false);

    /// <summary>The name of a format as QEMU has it.</summary>
    internal static string QemuName(BlockImageFormat format) => format switch
    {
        BlockImageFormat.Raw => "raw",
        BlockImageFormat.Qcow => "qcow",
        BlockImageFormat.Qcow2 => "qcow2",
        BlockImageFormat.Qed => "qed",
        BlockImageFormat.Vhd => "vpc",
        BlockImageFormat.Vhdx => "vhdx",
        BlockImageFormat.Vmdk => "vmdk",
        BlockImageFormat.Vdi => "vdi",
        _ => throw new ArgumentOutOfRangeException(nameof(format), format, "There is no such image format."),
    };
}
