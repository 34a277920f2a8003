// A configuration that cannot be used.

namespace XenSharp.Configuration;

/// <summary>A configuration is not to be used; the message has a line for each reason.</summary>
public sealed class ConfigurationException : Exception
{
    /// <param name="errors">The reasons, one at least.</param>
    public ConfigurationException(IReadOnlyList<ConfigurationMessage> errors)
        : base(string.Join('\n', errors)) => Errors = errors;

    /// <param name="error">The reason.</param>
    public ConfigurationException(ConfigurationMessage error)
        : this([error])
    {
    }

    /// <summary>The reasons, in the order in which they were found.</summary>
    public IReadOnlyList<ConfigurationMessage> Errors { get; }
}
