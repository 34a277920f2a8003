// What a program of this host needs beside its own file to run on another Linux: its loader and its shared libraries.
using XenSharp.Guests.Fetching;

namespace XenSharp.Oracle.Nested;

/// <summary>Finds the shared libraries of a dynamically linked program, as the host's own loader would find them.</summary>
internal static class SharedLibraries
{
    /// <summary>Where the x86-64 psABI has the loader.</summary>
    private const string Loader = "/lib64/ld-linux-x86-64.so.2";

    /// <summary>
    /// What XenSharp opens by name at run time, so that no header of its file says so; since glibc 2.34 these are empty and lie
    /// beside libc.so.6.
    /// </summary>
    private static readonly string[] OpenedByName = ["libpthread.so.0"];

    /// <summary>Paths at which the program's loader and libraries are found, on this host and on any to which they are copied.</summary>
    /// <param name="program">Path of the program.</param>
    /// <param name="cancellation">Ends the search.</param>
    /// <exception cref="OracleException">The host's loader does not know the program, or a library is missing.</exception>
    public static async Task<IReadOnlyList<string>> OfAsync(string program, CancellationToken cancellation)
    {
        CommandResult listed;
        try
        {
            listed = await new CommandRunner().RunAsync(new Command(Loader, "--list", program), cancellation).ConfigureAwait(false);
        }
        catch (CommandNotFoundException e)
        {
            throw new OracleException($"{Loader} is not on this host, so it is no glibc system; run this on Debian or its like.", e);
        }
        if (listed.ExitCode != 0)
            throw new OracleException($"{program} is no program that this host can run: {listed.Error.Trim()} Build it here, with dotnet publish.");

        List<string> files = [Loader];
        foreach (string line in listed.Output.Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries))
        {
            // "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)"; the vDSO and the loader itself have no arrow or no path.
            string[] words = line.Split(' ');
            if (words is [string name, "=>", "not", ..])
                throw new OracleException($"{program} needs {name}, which is not on this host; install the package that has it.");
            if (words is [_, "=>", ['/', ..] path, ..])
                files.Add(path);
        }

        string folder = Path.GetDirectoryName(files.Find(static file => Path.GetFileName(file) == "libc.so.6"))
            ?? throw new OracleException($"{program} does not use glibc; publish it for linux-x64.");
        files.AddRange(OpenedByName.Select(name => Path.Combine(folder, name)).Where(File.Exists));
        return [.. files.Distinct(StringComparer.Ordinal)];
    }
}
