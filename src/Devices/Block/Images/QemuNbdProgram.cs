// Which qemu-nbd is run, and how.
namespace XenSharp.Devices.Block.Images;

/// <summary>A qemu-nbd that can be run.</summary>
/// <param name="Path">The file to execute.</param>
public sealed record QemuNbdProgram(string Path)
{
    private const string Name = "qemu-nbd";

    /// <summary>Arguments that go before all others.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>The one in PATH; null if there is none.</summary>
    public static QemuNbdProgram? Find()
    {
        foreach (string folder in (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries))
        {
            string file = System.IO.Path.Combine(folder, Name);
            if (File.Exists(file))
                return new QemuNbdProgram(file);
        }

        return null;
    }
}
