// Xen as QEMU's multiboot kernel: how its modules are named, and what is said when a boot breaks down.
namespace XenSharp.Oracle.Qemu;

/// <summary>What both beds of real Xen need.</summary>
static class Multiboot
{
    const int LastLines = 15;

    /// <summary>An element of QEMU's comma-separated -initrd: a file and its command line.</summary>
    public static string Module(string file, string commandLine = "")
    {
        // QEMU takes what is before the first space for the file.
        if (file.Contains(' ', StringComparison.Ordinal))
            throw new OracleException($"QEMU cannot load {file}, whose path has a space in it; set XENSHARP_CACHE and TMPDIR to folders without.");
        string module = commandLine.Length == 0 ? file : $"{file} {commandLine}";
        return module.Replace(",", ",,", StringComparison.Ordinal);
    }

    /// <summary>A sentence for a machine that ended as it should not have, with the last lines that it said.</summary>
    public static string BrokeDown(string what, QemuResult end)
    {
        string how = end switch
        {
            _ when end.SerialOutput.Contains("Panic on CPU", StringComparison.Ordinal) => "Xen panicked",
            { TimedOut: true } => "its time was up",
            { ExitCode: not 0 } => $"QEMU ended with status {end.ExitCode}",
            _ => "the machine switched itself off",
        };
        string[] lines = [.. (end.SerialOutput + end.Error).Split('\n', StringSplitOptions.RemoveEmptyEntries).TakeLast(LastLines)];
        string said = lines.Length == 0 ? "It said nothing." : $"The last that it said:\n{string.Join('\n', lines)}";
        return $"{what} under QEMU broke down: {how}. Try again; if it stays so, report it. {said}";
    }
}
