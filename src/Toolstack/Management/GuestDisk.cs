// The kernel out of a domain's own disk, as bootloader="pygrub" asks for it.

using XenSharp.Configuration;
using XenSharp.Configuration.Boot;
using XenSharp.Configuration.Devices;
using XenSharp.Devices.Block.Images;

namespace XenSharp.Toolstack.Management;

/// <summary>Reads boot menus, kernels and ramdisks from the first disk of a domain.</summary>
internal static class GuestDisk
{
    /// <summary>Reads what the first disk says is to be booted.</summary>
    /// <exception cref="BootException">There is nothing that can be booted.</exception>
    /// <exception cref="BlockImageException">The image cannot be opened.</exception>
    internal static GuestBoot Load(DomainConfiguration configuration, BootloaderConfiguration bootloader)
    {
        // What kernel and ramdisk name is inside the image, too: libxl hands them to pygrub.
        bootloader = bootloader with { Kernel = bootloader.Kernel ?? configuration.Kernel, Ramdisk = bootloader.Ramdisk ?? configuration.Ramdisk };
        DiskConfiguration disk = configuration.Disks[0];
        using ImageReader image = disk.Format == DiskFormat.Raw ? new RawImageReader(disk.Target) : OpenQemu(disk.Target);
        return GuestBootLoader.Load(image, bootloader, configuration.CommandLine);
    }

    private static BlockImageReader OpenQemu(string path)
        => new(QemuImage.OpenAsync(path, BlockImageFormat.Qcow2, readOnly: true).GetAwaiter().GetResult());
}
