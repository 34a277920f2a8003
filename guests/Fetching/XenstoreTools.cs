// Xen's own xenstore tools, from Debian's packages in the cache, to be run on this host against a store of ours.
namespace XenSharp.Guests.Fetching;

/// <summary>
/// Debian's xenstore-ls, xenstore-watch and their like, with their own loader and libraries, so that the host needs to be no Debian
/// of the same release. They find a store by the variable XENSTORED_PATH.
/// </summary>
/// <param name="root">The folder that stands for the root of the file system of the packages.</param>
public sealed class XenstoreTools(string root)
{
    const string Control = "usr/lib/xen-4.17/bin/xenstore-control";

    // xen-utils for xenstore-control alone: it depends on Python, which that does not need.
    static readonly PackageSet Packages = new("xenstore-tools", Control)
    {
        WithDependencies = ["xenstore-utils", "libxenmisc4.17"],
        Alone = ["xen-utils-4.17"],
        Advice = "They are in Debian 12 (bookworm).",
    };

    /// <summary>Gets the tools out of the cache, where they are fetched first if they are not there.</summary>
    /// <exception cref="GuestFetchException">They cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public static async Task<XenstoreTools> GetAsync(
        GuestCache cache, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(cache);
        return new XenstoreTools(await cache.GetPackagesAsync(Packages, progress, cancellation).ConfigureAwait(false));
    }

    /// <summary>A run of one of the tools.</summary>
    /// <param name="tool">Its name, such as xenstore-ls.</param>
    /// <param name="arguments">Its arguments.</param>
    public Command Command(string tool, params IReadOnlyList<string> arguments)
    {
        string libraries = string.Join(':', Path.Combine(root, "lib/x86_64-linux-gnu"), Path.Combine(root, "usr/lib/x86_64-linux-gnu"));
        string program = Path.Combine(root, tool == "xenstore-control" ? Control : "usr/bin/" + tool);
        return new Command(Path.Combine(root, "lib64/ld-linux-x86-64.so.2"), ["--library-path", libraries, program, .. arguments]);
    }
}
