// Configurations as they come in requests, in either form.

using System.Text.Json;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Toolstack;

namespace XenSharp.Daemon;

/// <summary>From a request's configuration to the toolstack's, and back.</summary>
internal static class ConfigurationReading
{
    private const string Source = "request";

    /// <summary>Reads a configuration.</summary>
    /// <exception cref="ConfigurationException">It cannot be used.</exception>
    /// <exception cref="ToolstackException">There is none, or its folder is no absolute path.</exception>
    internal static DomainConfigurationResult Read(DomainConfigurationDocument document)
    {
        string source = document.FileName ?? Source;
        DomainConfigurationResult result;
        if (document.Json is { ValueKind: not JsonValueKind.Null } json)
        {
            DomainConfiguration configuration = DomainConfigurationJson.Read(json.GetRawText(), source);
            result = document.Settings.Count == 0
                ? new DomainConfigurationResult(configuration, [])
                : DomainConfigurationReader.Read(DomainConfigurationText.Write(configuration), source, document.Settings);
        }
        else if (document.Text is { } text)
        {
            result = DomainConfigurationReader.Read(text, source, document.Settings);
        }
        else
        {
            throw new ToolstackException(ProblemKind.BadRequest, "There is no configuration: give it as text (xl.cfg) or as json.");
        }

        if (document.Folder is not { } folder)
            return result;
        return Path.IsPathRooted(folder)
            ? result with { Configuration = result.Configuration.WithAbsolutePaths(folder) }
            : throw new ToolstackException(ProblemKind.BadRequest, $"The folder \"{folder}\" that paths start from has to be an absolute path itself.");
    }

    /// <summary>Both forms of a configuration.</summary>
    internal static DomainConfigurationDocument Write(DomainConfiguration configuration) => new()
    {
        Text = DomainConfigurationText.Write(configuration),
        Json = JsonSerializer.SerializeToElement(configuration, DomainConfigurationJson.Default.DomainConfiguration),
    };
}
