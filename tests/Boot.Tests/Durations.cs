// How long tests of category Long take, and how much they do.
using System.Globalization;

namespace XenSharp.Boot.Tests;

/// <summary>Times and numbers that the environment can change.</summary>
internal static class Durations
{
    /// <summary>Seconds by an environment variable.</summary>
    /// <param name="variable">Its name.</param>
    /// <param name="usual">What counts where it is not set.</param>
    public static int Seconds(string variable, int usual) => Number(variable, usual);

    /// <summary>A number by an environment variable.</summary>
    /// <param name="variable">Its name.</param>
    /// <param name="usual">What counts where it is not set.</param>
    public static int Number(string variable, int usual) => Environment.GetEnvironmentVariable(variable) is { Length: > 0 } text
        ? int.Parse(text, NumberStyles.None, CultureInfo.InvariantCulture)
        : usual;
}
