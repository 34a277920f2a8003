// What the fetcher of Debian guests takes and gives: flavours, results, progress, failures.
namespace XenSharp.Guests.Fetching;

/// <summary>Which of Debian's amd64 kernels.</summary>
public enum DebianKernelFlavour
{
    /// <summary>linux-image-amd64: every driver.</summary>
    Amd64,

    /// <summary>linux-image-cloud-amd64: only the drivers virtual machines need; a quarter of the download.</summary>
    CloudAmd64,
}

/// <summary>An unpacked Debian kernel.</summary>
/// <param name="Image">Path of its bzImage.</param>
/// <param name="Release">What <c>uname -r</c> says in it, such as 6.1.0-53-amd64.</param>
/// <param name="PackageVersion">The version of the Debian package.</param>
/// <param name="Modules">The folder of its modules (the one named after the release), or null if the package has none.</param>
public sealed record DebianKernel(string Image, string Release, string PackageVersion, string? Modules);

/// <summary>How far a fetch has come.</summary>
/// <param name="Stage">What is being done, in a few words.</param>
/// <param name="Fraction">How much of the stage is done, 0 to 1; null where that is not known.</param>
public readonly record struct FetchProgress(string Stage, double? Fraction);

/// <summary>The guest could not be fetched; the message says why and what to do.</summary>
public sealed class GuestFetchException(string message, Exception? inner = null) : Exception(message, inner);
