// Devices that are plugged in: their specifications are checked here, before the daemon is asked.

using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Checks specifications where the user is.</summary>
internal static class DeviceSpecification
{
    /// <summary>Reads a specification for its errors, and says what has no effect.</summary>
    /// <param name="parse">Reads it; gets the list that warnings go into.</param>
    /// <exception cref="UsageException">It cannot be used.</exception>
    internal static T Read<T>(Func<ICollection<string>, T> parse)
    {
        var warnings = new List<string>();
        T device;
        try
        {
            device = parse(warnings);
        }
        catch (FormatException failure)
        {
            throw new UsageException(failure.Message);
        }

        foreach (string warning in warnings)
            ManagementCommand.Say(warning);
        return device;
    }
}
