// The options of pygrub, as bootloader_args has them.

using System.Globalization;

namespace XenSharp.Configuration;

/// <summary>Parses pygrub's options.</summary>
internal static class BootloaderArguments
{
    /// <param name="arguments">The options.</param>
    /// <param name="warnings">Gets sentences about what has no effect.</param>
    /// <exception cref="FormatException">They cannot be used; the message is a sentence.</exception>
    internal static BootloaderConfiguration Parse(IReadOnlyList<string> arguments, ICollection<string> warnings)
    {
        var configuration = new BootloaderConfiguration();
        for (int at = 0; at < arguments.Count; at++)
        {
            string argument = arguments[at];
            int equals = argument.IndexOf('=');
            string option = equals < 0 ? argument : argument[..equals];
            switch (option)
            {
                case "-q" or "--quiet":
                    break;
                case "--entry":
                    configuration = configuration with { Entry = Value() };
                    break;
                case "--args":
                    configuration = configuration with { Arguments = Value() };
                    break;
                case "--kernel":
                    configuration = configuration with { Kernel = Value() };
                    break;
                case "--ramdisk":
                    configuration = configuration with { Ramdisk = Value() };
                    break;
                case "--offset":
                    string text = Value();
                    configuration = configuration with
                    {
                        Offset = long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out long offset)
                            ? offset
                            : throw new FormatException($"--offset takes a number of bytes; \"{text}\" is none."),
                    };
                    break;
                case "-i" or "--interactive":
                    warnings.Add($"{option} has no effect: no menu is shown, the entry that it would start with is booted; --entry= names another.");
                    break;
                case "--debug" or "-n" or "--not-really" or "-l" or "--list-entries" or "--isconfig":
                    warnings.Add($"{option} has no effect.");
                    break;
                case "--output" or "--output-format" or "--output-directory" or "--runas":
                    _ = Value();
                    warnings.Add($"{option} has no effect: no program is run, and nothing is written, to read a disk.");
                    break;
                default:
                    throw new FormatException($"pygrub has no option {option}.");
            }

            string Value() => equals >= 0 ? argument[(equals + 1)..] : ++at < arguments.Count
                ? arguments[at]
                : throw new FormatException($"{option} takes a value: write {option}=VALUE.");
        }

        return configuration;
    }
}
