// Debian's stress-ng, a program that loads an operating system from all sides.
using XenSharp.Guests.Fetching;

namespace XenSharp.Guests.Initramfs;

/// <summary>Gets stress-ng out of the cache, where it is fetched first if it is not there.</summary>
public static class StressPrograms
{
    // Its packages by name: with all that they depend on would come the whole of Mesa, for one stressor of graphics processors.
    static readonly PackageSet Packages = new("stress-ng", "usr/bin/stress-ng")
    {
        Alone =
        [
            "stress-ng", "libapparmor1", "libbsd0", "libc6", "libcrypt1", "libdrm2", "libegl1", "libexpat1", "libffi8", "libgbm1", "libgcc-s1",
            "libgles2", "libglvnd0", "libipsec-mb1", "libjpeg62-turbo", "libjudydebian1", "libkmod2", "liblzma5", "libmd0", "libsctp1", "libssl3",
            "libwayland-server0", "libxxhash0", "libzstd1", "zlib1g",
        ],
        Advice = "They are in Debian 12 (bookworm); elsewhere, add bookworm to the host's package sources.",
    };

    /// <summary>bin/stress-ng and its libraries, for <see cref="BusyboxInitramfsOptions.Files"/>.</summary>
    /// <exception cref="GuestFetchException">They cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public static async Task<IReadOnlyList<InitramfsFile>> GetAsync(
        GuestCache cache, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(cache);
        string root = await cache.GetPackagesAsync(Packages, progress, cancellation).ConfigureAwait(false);
        return DebianPrograms.Collect(root, [Packages.Content]);
    }
}
