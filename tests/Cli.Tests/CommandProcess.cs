// The xensharp command as a process of its own, as a shell starts it.

using System.Diagnostics;
using System.Text;

namespace XenSharp.Cli.Tests;

/// <summary>How a command ended.</summary>
internal sealed record CommandEnd(int Status, string Output, string Error);

internal sealed class CommandProcess : IDisposable
{
    private static readonly string Dotnet =
        Path.GetFullPath(Path.Combine(Path.GetDirectoryName(typeof(object).Assembly.Location)!, "../../../dotnet"));

    private static readonly string Assembly = Path.Combine(AppContext.BaseDirectory, "xensharp.dll");

    private readonly StringBuilder _error = new();
    private readonly Process _process;
    private readonly Task _errorRead;

    private CommandProcess(ProcessStartInfo start)
    {
        start.RedirectStandardError = true;

        // Nothing of the one who runs the tests: colours, width, signals that are ignored.
        start.Environment["TERM"] = "dumb";
        start.ArgumentList.Insert(0, start.FileName);
        start.ArgumentList.Insert(0, "--default-signal=HUP,INT,QUIT");
        start.FileName = "/usr/bin/env";
        _process = Process.Start(start)!;
        _errorRead = ReadErrorAsync();
    }

    /// <summary>What runs the command.</summary>
    internal static string Host => Dotnet;

    /// <summary>The command itself, for that.</summary>
    internal static string Program => Assembly;

    internal int Id => _process.Id;

    internal StreamWriter Input => _process.StandardInput;

    internal Stream Output => _process.StandardOutput.BaseStream;

    /// <summary>What it has said on standard error so far.</summary>
    internal string Error
    {
        get
        {
            lock (_error)
                return _error.ToString();
        }
    }

    /// <summary>Starts it between two pipes.</summary>
    internal static CommandProcess Start(params IEnumerable<string> arguments) => new(
        new ProcessStartInfo(Dotnet, ["exec", Assembly, .. arguments]) { RedirectStandardInput = true, RedirectStandardOutput = true });

    /// <summary>Starts it through a shell, with "$0" "$@" being the command, for redirections and the like.</summary>
    internal static CommandProcess StartInShell(string script, params IEnumerable<string> arguments) => new(
        new ProcessStartInfo("/bin/sh", ["-c", script, Dotnet, "exec", Assembly, .. arguments]) { RedirectStandardInput = true, RedirectStandardOutput = true });

    /// <summary>Starts it at a terminal.</summary>
    internal static CommandProcess StartAt(string terminal, params IEnumerable<string> arguments) => new(
        new ProcessStartInfo(
            "/bin/sh", ["-c", "terminal=$1; shift; exec \"$0\" \"$@\" <\"$terminal\" >\"$terminal\"", Dotnet, terminal, "exec", Assembly, .. arguments]));

    /// <summary>Runs the command of another folder to its end, with nothing on standard input.</summary>
    internal static async Task<CommandEnd> RunIn(string folder, IEnumerable<string> arguments)
    {
        using var process = new CommandProcess(
            new ProcessStartInfo(Dotnet, ["exec", Path.Combine(folder, "xensharp.dll"), .. arguments]) { RedirectStandardInput = true, RedirectStandardOutput = true });
        return await process.FinishAsync();
    }

    /// <summary>Runs it to its end, with nothing on standard input.</summary>
    internal static Task<CommandEnd> RunAsync(params IEnumerable<string> arguments) => RunAsync("", arguments);

    /// <summary>Runs it to its end, with <paramref name="input"/> piped in.</summary>
    internal static async Task<CommandEnd> RunAsync(string input, IEnumerable<string> arguments)
    {
        using CommandProcess process = Start(arguments);
        return await process.FinishAsync(input);
    }

    /// <summary>Pipes the input in and reads all there is to the end of the process.</summary>
    internal async Task<CommandEnd> FinishAsync(string input = "")
    {
        Task<string> output = new StreamReader(Output, Encoding.Latin1).ReadToEndAsync();
        try
        {
            await Input.WriteAsync(input);
            Input.Close();
        }
        catch (IOException)
        {
            // It has ended without reading.
        }
        string all = await output;
        int status = await WaitAsync();
        return new CommandEnd(status, all, Error);
    }

    /// <summary>Waits for its end.</summary>
    /// <returns>The exit status.</returns>
    internal async Task<int> WaitAsync()
    {
        using var patience = new CancellationTokenSource(TimeSpan.FromMinutes(2));
        await _process.WaitForExitAsync(patience.Token);
        await _errorRead;
        return _process.ExitCode;
    }

    internal void Send(int signal) => Assert.That(Tmds.Linux.LibC.kill(Id, signal), Is.Zero);

    public void Dispose()
    {
        if (!_process.HasExited)
            _process.Kill();
        _process.Dispose();
    }

    private async Task ReadErrorAsync()
    {
        var buffer = new char[1024];
        int count;
        while ((count = await _process.StandardError.ReadAsync(buffer)) > 0)
        {
            lock (_error)
                _error.Append(buffer, 0, count);
        }
    }
}
