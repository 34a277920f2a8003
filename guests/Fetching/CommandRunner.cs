// Runs the host's command-line tools and hands back what they said.
using System.Diagnostics;
using System.Text;

namespace XenSharp.Guests.Fetching;

/// <summary>One run of a program.</summary>
/// <param name="Program">A name to look up in the search path, or a path with a slash.</param>
/// <param name="Arguments">Its arguments, passed on as they are.</param>
public sealed record Command(string Program, params IReadOnlyList<string> Arguments)
{
    /// <summary>The folder it runs in; null for the current one.</summary>
    public string? WorkingDirectory { get; init; }

    /// <summary>Called with every line of its standard output, from another thread; null for none.</summary>
    public Action<string>? OnOutputLine { get; init; }
}

/// <summary>How a run ended.</summary>
/// <param name="ExitCode">The exit status; 128 plus the signal's number when a signal ended it.</param>
/// <param name="Output">Standard output.</param>
/// <param name="Error">Standard error.</param>
public sealed record CommandResult(int ExitCode, string Output, string Error);

/// <summary>The program is not on this machine or may not be run.</summary>
public sealed class CommandNotFoundException(string message, Exception? inner = null) : Exception(message, inner);

/// <summary>Finds programs in a search path and runs them with the C locale and nothing on standard input.</summary>
/// <param name="searchPath">Folders separated by ':'; null for the PATH of this process.</param>
public sealed class CommandRunner(string? searchPath = null)
{
    /// <summary>This process's PATH and the folders of programs for administrators, mkfs among them, that not everybody's has.</summary>
    public static string SystemSearchPath => $"{Environment.GetEnvironmentVariable("PATH") ?? "/usr/bin:/bin"}:/usr/sbin:/sbin";

    /// <summary>Where the program is, or null when it is in none of the folders.</summary>
    public string? Find(string program)
    {
        if (program.Contains('/', StringComparison.Ordinal))
            return IsExecutable(program) ? program : null;
        string path = searchPath ?? Environment.GetEnvironmentVariable("PATH") ?? "/usr/bin:/bin";
        return path.Split(':', StringSplitOptions.RemoveEmptyEntries)
            .Select(folder => Path.Combine(folder, program)).FirstOrDefault(IsExecutable);
    }

    /// <summary>Runs the program to its end.</summary>
    /// <exception cref="CommandNotFoundException">There is no such program.</exception>
    /// <exception cref="OperationCanceledException">The run was cancelled; the program and its children are dead.</exception>
    public async Task<CommandResult> RunAsync(Command command, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(command);
        cancellation.ThrowIfCancellationRequested();
        string file = Find(command.Program)
            ?? throw new CommandNotFoundException($"There is no program \"{command.Program}\" that can be run.");
        ProcessStartInfo start = new(file, command.Arguments)
        {
            WorkingDirectory = command.WorkingDirectory ?? "",
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        start.Environment["LC_ALL"] = "C";
        if (searchPath is not null)
            start.Environment["PATH"] = searchPath;

        StringBuilder output = new();
        StringBuilder error = new();
        using Process process = new() { StartInfo = start };
        process.OutputDataReceived += (_, line) =>
        {
            if (line.Data is null)
                return;
            output.Append(line.Data).Append('\n');
            command.OnOutputLine?.Invoke(line.Data);
        };
        process.ErrorDataReceived += (_, line) =>
        {
            if (line.Data is not null)
                error.Append(line.Data).Append('\n');
        };
        try
        {
            process.Start();
        }
        catch (System.ComponentModel.Win32Exception e)
        {
            throw new CommandNotFoundException($"{file} cannot be run: {e.Message}", e);
        }
        process.StandardInput.Close();
        process.BeginOutputReadLine();
        process.BeginErrorReadLine();
        try
        {
            await process.WaitForExitAsync(cancellation).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
            await process.WaitForExitAsync(CancellationToken.None).ConfigureAwait(false);
            throw;
        }
        return new CommandResult(process.ExitCode, output.ToString(), error.ToString());
    }

    static bool IsExecutable(string file)
    {
        const UnixFileMode AnyExecute = UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;
        return File.Exists(file) && (OperatingSystem.IsWindows() || (File.GetUnixFileMode(file) & AnyExecute) != 0);
    }
}
