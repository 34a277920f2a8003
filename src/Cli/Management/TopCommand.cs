// top: what domains do, as they do it.

using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Shows domains in xentop's columns, anew every few seconds.</summary>
internal static class TopCommand
{
    private const double LongestDelay = 3600;

    /// <summary>How long a key may wait until it is looked at.</summary>
    private static readonly TimeSpan s_keyPatience = TimeSpan.FromMilliseconds(100);

    internal static Command Create()
    {
        var delay = new Option<double>("--delay", "-d")
        {
            Description = "Seconds between two looks.",
            HelpName = "SECONDS",
            DefaultValueFactory = static _ => 3,
            CustomParser = static result =>
            {
                if (double.TryParse(result.Tokens[0].Value, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double seconds) && seconds is > 0 and <= LongestDelay)
                    return seconds;
                result.AddError($"--delay takes seconds, up to {LongestDelay}; \"{result.Tokens[0].Value}\" is no such number.");
                return 1;
            },
        };
        var batch = new Option<bool>("--batch", "-b") { Description = "Print one table after another, for files and pipes." };
        var iterations = new Option<int?>("--iterations", "-i")
        {
            Description = "End after so many looks.",
            HelpName = "N",
            CustomParser = static result =>
            {
                if (int.TryParse(result.Tokens[0].Value, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number > 0)
                    return number;
                result.AddError($"--iterations takes a number from 1 on; \"{result.Tokens[0].Value}\" is none.");
                return null;
            },
        };
        var command = new ManagementCommand("top", "Shows what domains do, as they do it; q leaves.") { delay, batch, iterations };
        command.Does((parsed, daemon, cancellation) =>
        {
            bool plain = parsed.GetValue(batch);
            if (!plain && Console.IsOutputRedirected)
                throw new UsageException("Standard output is no terminal; top --batch prints tables into files and pipes.");
            return RunAsync(daemon, TimeSpan.FromSeconds(parsed.GetValue(delay)), plain, parsed.GetValue(iterations) ?? int.MaxValue, cancellation);
        });
        return command;
    }

    private static async Task RunAsync(DaemonClient daemon, TimeSpan delay, bool plain, int iterations, CancellationToken cancellation)
    {
        if (!plain)
            await Console.Out.WriteAsync("\e[?1049h\e[?25l").ConfigureAwait(false);
        try
        {
            var table = new TopTable();
            for (int at = 0; at < iterations; at++)
            {
                HostInfo host = await daemon.GetHostAsync(cancellation).ConfigureAwait(false);
                IReadOnlyList<string> lines = table.Next(await daemon.ListAsync(cancellation).ConfigureAwait(false), host, Stopwatch.GetTimestamp());
                if (plain)
                    await Console.Out.WriteLineAsync(string.Join(Environment.NewLine, lines)).ConfigureAwait(false);
                else
                    await Console.Out.WriteAsync(Screen(lines)).ConfigureAwait(false);
                if (at + 1 < iterations && await WasLeftAsync(delay, keys: !plain && !Console.IsInputRedirected, cancellation).ConfigureAwait(false))
                    return;
            }
        }
        finally
        {
            if (!plain)
                await Console.Out.WriteAsync("\e[?25h\e[?1049l").ConfigureAwait(false);
        }
    }

    /// <summary>The lines, cut to what the terminal has room for.</summary>
    private static string Screen(IReadOnlyList<string> lines)
    {
        int width = Math.Max(1, Console.WindowWidth);
        int height = Math.Max(1, Console.WindowHeight - 1);
        return "\e[H" + string.Concat(lines.Take(height).Select(line => (line.Length > width ? line[..width] : line) + "\e[K\r\n")) + "\e[J";
    }

    /// <summary>Waits for the next look.</summary>
    /// <returns>Whether the user wants no more.</returns>
    private static async Task<bool> WasLeftAsync(TimeSpan delay, bool keys, CancellationToken cancellation)
    {
        if (!keys)
        {
            await Task.Delay(delay, cancellation).ConfigureAwait(false);
            return false;
        }

        long start = Stopwatch.GetTimestamp();
        while (Stopwatch.GetElapsedTime(start) < delay)
        {
            while (Console.KeyAvailable)
            {
                ConsoleKeyInfo key = Console.ReadKey(intercept: true);
                if (key.Key is ConsoleKey.Q or ConsoleKey.Escape)
                    return true;
                if (key.Key is ConsoleKey.Spacebar or ConsoleKey.Enter)
                    return false;
            }

            await Task.Delay(s_keyPatience, cancellation).ConfigureAwait(false);
        }

        return false;
    }
}
