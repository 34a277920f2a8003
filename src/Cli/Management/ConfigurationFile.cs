// Configurations on their way from a file to the daemon.

using XenSharp.Api;
using XenSharp.Configuration;

namespace XenSharp.Cli.Management;

/// <summary>Reads configuration files and checks them here, where the user is, before the daemon sees them.</summary>
internal static class ConfigurationFile
{
    /// <summary>Reads a configuration as the daemon is given it.</summary>
    /// <param name="path">The file; null for a configuration of nothing but settings.</param>
    /// <param name="settings">Settings that go behind it.</param>
    /// <exception cref="ConfigurationException">It cannot be read or used.</exception>
    internal static DomainConfigurationDocument Read(string? path, IReadOnlyList<string> settings)
    {
        (DomainConfigurationDocument document, _) = Understand(path, settings);
        return document;
    }

    /// <summary>Reads a configuration, and says what it comes to.</summary>
    internal static (DomainConfigurationDocument Document, DomainConfigurationResult Result) Understand(string? path, IReadOnlyList<string> settings)
    {
        string text = path is null ? string.Empty : DomainConfigurationReader.ReadText(path);
        DomainConfigurationResult result = DomainConfigurationReader.Read(text, path ?? "command line", settings);
        return (new DomainConfigurationDocument { Text = text, FileName = path, Settings = settings, Folder = Directory.GetCurrentDirectory() }, result);
    }
}
