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

/// <summary>Packages that are unpacked into one folder as if it were a file system's root; nothing of the host's is in it.</summary>
/// <param name="Name">The folder's name, and what people are told it is: of a single package its own name.</param>
/// <param name="Content">A path relative to the root that must be there in the end, with no wildcard.</param>
public sealed record PackageSet(string Name, string Content)
{
    /// <summary>Packages to be taken with all that they depend on, down to the C library.</summary>
    public IReadOnlyList<string> WithDependencies { get; init; } = [];

    /// <summary>Packages to be taken without what they depend on.</summary>
    public IReadOnlyList<string> Alone { get; init; } = [];

    /// <summary>A sentence that says what to do where the packages cannot be had; may be empty.</summary>
    public string Advice { get; init; } = string.Empty;
}

/// <summary>How far a fetch has come.</summary>
/// <param name="Stage">What is being done, in a few words.</param>
/// <param name="Fraction">How much of the stage is done, 0 to 1; null where that is not known.</param>
public readonly record struct FetchProgress(string Stage, double? Fraction);

/// <summary>The guest could not be fetched; the message says why and what to do.</summary>
public sealed class GuestFetchException(string message, Exception? inner = null) : Exception(message, inner);
