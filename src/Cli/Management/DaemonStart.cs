// Starts a daemon for commands that make domains, where none runs: somebody who has just installed xensharp can type "create" at once.

using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Devices;

namespace XenSharp.Cli.Management;

/// <summary>Starts a daemon of its own session, which ends by itself when it has had no domain for a while.</summary>
internal static class DaemonStart
{
    /// <summary>Seconds without a domain after which such a daemon ends.</summary>
    private const int IdleSeconds = 10;

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);
    private static readonly TimeSpan s_rivalPatience = TimeSpan.FromSeconds(3);
    private static readonly TimeSpan s_lookInterval = TimeSpan.FromMilliseconds(20);

    /// <summary>Starts a daemon unless one answers.</summary>
    /// <param name="daemon">Names the socket.</param>
    /// <param name="cancellation">Ends the wait for it.</param>
    /// <exception cref="UsageException">It cannot be started; the sentence says what it said.</exception>
    internal static async Task EnsureAsync(DaemonClient daemon, CancellationToken cancellation)
    {
        string socket = Path.GetFullPath(daemon.Socket);
        if (Answers(socket))
            return;

        // Records of a daemon at a place of somebody's own are not to mix with those of the machine's.
        bool isUsual = socket == Path.Combine(DaemonSocket.RuntimeFolder, Path.GetFileName(DaemonSocket.DefaultPath));
        string state = isUsual ? DaemonSocket.StateFolder : Path.Combine(Path.GetDirectoryName(socket)!, "state");
        string log = Path.Combine(state, "daemon.log");
        try
        {
            _ = Directory.CreateDirectory(state);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new UsageException($"No daemon answers at {socket}, and none can be started: {failure.Message}");
        }

        long before = File.Exists(log) ? new FileInfo(log).Length : 0;

        // A session of its own keeps the terminal's signals from it, and files of its own let the one who reads this command's output end.
        var start = new ProcessStartInfo("/bin/sh", ["-c", "log=$1; shift; exec setsid \"$@\" </dev/null >>\"$log\" 2>&1", "sh", log, .. Self()]);
        foreach (string argument in (string[])["daemon", "--socket", socket, "--state", state, "--idle-exit", IdleSeconds.ToString(CultureInfo.InvariantCulture)])
            start.ArgumentList.Add(argument);
        using Process process = Process.Start(start)!;
        long began = Stopwatch.GetTimestamp();
        TimeSpan patience = s_patience;
        while (!Answers(socket))
        {
            // Another command may have started one at the same time, which is the one that answers then.
            if (process.HasExited && patience == s_patience)
                patience = Stopwatch.GetElapsedTime(began) + s_rivalPatience;
            if (Stopwatch.GetElapsedTime(began) > patience)
                throw new UsageException($"No daemon answers at {socket}, and the one that was started {(process.HasExited ? "has ended" : "does not either")}: {Said(log, before)}");
            await Task.Delay(s_lookInterval, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>Whether somebody listens; where that cannot be found out, what is asked for next says why.</summary>
    private static bool Answers(string path)
    {
        try
        {
            return LocalSocket.Look(path, out SocketException? failure) == LocalSocketState.Served
                || failure is { SocketErrorCode: not SocketError.ConnectionRefused };
        }
        catch (IOException failure)
        {
            throw new UsageException(failure.Message);
        }
    }

    /// <summary>How this program is started: as itself, or by the runtime's host.</summary>
    internal static string[] Self()
        => Path.GetFileNameWithoutExtension(Environment.ProcessPath) == "dotnet"
            ? [Environment.ProcessPath!, "exec", Path.Combine(AppContext.BaseDirectory, $"{Tool.Name}.dll")]
            : [Environment.ProcessPath!];

    /// <summary>The last line of the log that is not older than this start.</summary>
    private static string Said(string log, long before)
    {
        try
        {
            using var file = new FileStream(log, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
            _ = file.Seek(Math.Min(before, file.Length), SeekOrigin.Begin);
            using var reader = new StreamReader(file);
            string? last = reader.ReadToEnd().Split('\n', StringSplitOptions.RemoveEmptyEntries).LastOrDefault();
            return last ?? $"it says nothing in {log}.";
        }
        catch (IOException failure)
        {
            return failure.Message;
        }
    }
}
