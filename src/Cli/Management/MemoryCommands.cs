// mem-set and mem-max.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>The memory of domains.</summary>
internal static class MemoryCommands
{
    internal static Command CreateSet() => Create(
        "mem-set", "Sets how much memory a domain's balloon driver leaves it.", static (daemon, domain, size, cancellation) => daemon.SetMemoryTargetAsync(domain, size, cancellation));

    internal static Command CreateMax() => Create(
        "mem-max", "Sets how much memory a domain may have at most.", static (daemon, domain, size, cancellation) => daemon.SetMemoryMaximumAsync(domain, size, cancellation));

    /// <summary>xl's notation of an amount: MiB, or with b, k, m, g or t behind it.</summary>
    /// <returns>KiB; null if the text is none.</returns>
    internal static long? ParseSize(string text)
    {
        int shift = text.Length > 0 ? char.ToLowerInvariant(text[^1]) switch { 'b' => -10, 'k' => 0, 'm' => 10, 'g' => 20, 't' => 30, _ => 10 } : 10;
        ReadOnlySpan<char> digits = text.Length > 0 && char.IsAsciiLetter(text[^1]) && "bkmgt".Contains(char.ToLowerInvariant(text[^1])) ? text.AsSpan(0, text.Length - 1) : text;
        if (!long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out long number) || (shift > 0 && number > long.MaxValue >> shift))
            return null;
        long size = shift < 0 ? number >> -shift : number << shift;
        return size > 0 ? size : null;
    }

    private static ManagementCommand Create(string name, string description, Func<DaemonClient, string, long, CancellationToken, Task> set)
    {
        Argument<string> domain = ManagementCommand.Domain();
        var amount = new Argument<long>("MemMB")
        {
            Description = "How much: in MiB, or with b, k, m, g or t behind it in bytes, KiB, MiB, GiB or TiB.",
            CustomParser = result => Parse(result, name),
        };
        var command = new ManagementCommand(name, description) { domain, amount };
        command.Does((parsed, daemon, cancellation) => set(daemon, parsed.GetRequiredValue(domain), parsed.GetValue(amount), cancellation));
        return command;
    }

    private static long Parse(ArgumentResult result, string name)
    {
        if (ParseSize(result.Tokens[0].Value) is { } size)
            return size;
        result.AddError($"{name} takes an amount such as 512 (MiB), 524288k or 1g; \"{result.Tokens[0].Value}\" is none.");
        return 0;
    }
}
