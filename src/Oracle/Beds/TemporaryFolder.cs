// A folder for the files of one boot.
namespace XenSharp.Oracle.Beds;

/// <summary>A new folder that is gone with all that is in it after <see cref="Dispose"/>.</summary>
sealed class TemporaryFolder : IDisposable
{
    /// <summary>Its absolute path.</summary>
    public string Path { get; } = Directory.CreateTempSubdirectory("xensharp-bed-").FullName;

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
