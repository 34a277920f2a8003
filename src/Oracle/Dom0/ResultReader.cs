// Reads what dom0's init script (init.sh) sends: results of guests, and what went wrong.
using System.Globalization;
using System.Text;
using XenSharp.Oracle.Beds;

namespace XenSharp.Oracle.Dom0;

/// <summary>The host's end of the channel; the script says what goes over it.</summary>
/// <param name="stream">The channel.</param>
/// <param name="guests">The guests in the order of their indexes.</param>
sealed class ResultReader(Stream stream, IReadOnlyList<BedGuest> guests)
{
    // A longer line is no line of the script's.
    const int LongestLine = 200;

    // More than a guest can print in a day: a number that is larger was damaged on the way.
    const int LargestPart = 1 << 30;

    readonly BufferedStream input = new(stream, 64 * 1024);
    int delivered;

    /// <summary>Whether dom0 has said that it is done with all guests.</summary>
    public bool IsDone { get; private set; }

    /// <summary>The next result, or null when dom0 is done or the channel ends, wherever that is.</summary>
    /// <exception cref="OracleException">dom0 says that it cannot go on, or says what it never should.</exception>
    public async Task<GuestRun?> ReadAsync()
    {
        try
        {
            return await ReadNextAsync().ConfigureAwait(false);
        }
        catch (EndOfStreamException)
        {
            return null;
        }
    }

    async Task<GuestRun?> ReadNextAsync()
    {
        while (await ReadLineAsync().ConfigureAwait(false) is { } line)
        {
            switch (line.Split(' '))
            {
                case ["ready"]:
                    break;
                case ["done"] when delivered == guests.Count:
                    IsDone = true;
                    return null;
                case ["failed", var size] when TryParse(size, out int bytes):
                    throw new OracleException(
                        $"Xen's tools cannot run the guests: {Encoding.UTF8.GetString(await ReadPartAsync(bytes).ConfigureAwait(false)).Trim()}");
                case ["guest", var index, [var ending], var console, var report]
                    when TryParse(index, out int i) && i == delivered && i < guests.Count
                        && TryParse(console, out int consoleBytes) && TryParse(report, out int reportBytes):
                    GuestRun run = Result(
                        guests[i].Name,
                        await ReadPartAsync(consoleBytes).ConfigureAwait(false),
                        ending,
                        Encoding.Latin1.GetString(await ReadPartAsync(reportBytes).ConfigureAwait(false)),
                        await ReadLineAsync().ConfigureAwait(false));
                    delivered++;
                    return run;
                default:
                    throw new OracleException($"dom0 sent \"{line}\" where a result was expected; try again, and if it stays so, report it.");
            }
        }
        return null;
    }

    static GuestRun Result(string name, byte[] console, char letter, string log, string? end)
    {
        if (end is null)
            throw new EndOfStreamException();
        if (end.Length != 0)
            throw new OracleException($"The result of guest {name} came damaged out of dom0; try again, and if it stays so, report it.");
        const string Prefix = "(XEN) ";
        StringBuilder report = new();
        foreach (string line in log.Split('\n', StringSplitOptions.RemoveEmptyEntries))
            report.Append(line.StartsWith(Prefix, StringComparison.Ordinal) ? line[Prefix.Length..].TrimEnd('\r') : line.TrimEnd('\r')).Append('\n');
        // xl list's letters, in the order of SHUTDOWN_ reasons; public sched.h.
        GuestEnding? ending = letter switch
        {
            '-' => GuestEnding.PowerOff,
            'r' => GuestEnding.Reboot,
            's' => GuestEnding.Suspend,
            'c' => GuestEnding.Crash,
            'w' => GuestEnding.Watchdog,
            'S' => GuestEnding.SoftReset,
            'T' => GuestEnding.TimedOut,
            _ => null,
        };
        if (ending is null)
            report.Append("The domain gave a reason for its shutdown that Xen's interface does not know.\n");
        return new GuestRun(name, Encoding.Latin1.GetString(console), ending ?? GuestEnding.Crash, report.ToString());
    }

    static bool TryParse(string text, out int number) =>
        int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out number) && number <= LargestPart;

    // Without its end; null at the end of the channel.
    async Task<string?> ReadLineAsync()
    {
        StringBuilder line = new();
        byte[] one = new byte[1];
        while (await input.ReadAsync(one).ConfigureAwait(false) != 0)
        {
            if (one[0] == '\n')
                return line.ToString();
            if (line.Length == LongestLine)
                throw new OracleException("dom0 sent something that is no result; try again, and if it stays so, report it.");
            line.Append((char)one[0]);
        }
        return null;
    }

    async Task<byte[]> ReadPartAsync(int length)
    {
        byte[] part = new byte[length];
        await input.ReadExactlyAsync(part).ConfigureAwait(false);
        return part;
    }
}
