// Debian's kernel with a busybox initramfs, as the tests of this project boot it in their own process.
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Makes images; the test is skipped where Debian's packages cannot be had.</summary>
internal static class DebianGuest
{
    /// <summary>An image of a kernel and what the initramfs is to hold.</summary>
    internal static Task<DomainImage> ImageAsync(
        DebianKernelFlavour flavour, BusyboxInitramfsOptions options, bool reusable, CancellationToken cancellation = default)
        => ImageAsync(flavour, _ => Task.FromResult(options), reusable, cancellation);

    /// <summary>The same, for an initramfs with files that are fetched too.</summary>
    /// <param name="flavour">The kernel.</param>
    /// <param name="options">Says what the initramfs is to hold, and may fetch it.</param>
    /// <param name="reusable">Whether several domains are made from it.</param>
    /// <param name="cancellation">Ends the wait.</param>
    internal static async Task<DomainImage> ImageAsync(
        DebianKernelFlavour flavour, Func<GuestCache, Task<BusyboxInitramfsOptions>> options, bool reusable, CancellationToken cancellation = default)
    {
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            DebianKernel kernel = await cache.GetKernelAsync(flavour, null, cancellation);
            string busybox = await cache.GetBusyboxAsync(null, cancellation);
            byte[] ramdisk = await BusyboxInitramfs.BuildAsync(busybox, await options(cache), cancellation);
            return new DomainImage(KernelImage.Parse(await File.ReadAllBytesAsync(kernel.Image, cancellation)), ramdisk) { Reusable = reusable };
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
    }
}
