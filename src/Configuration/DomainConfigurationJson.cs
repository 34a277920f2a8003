// The JSON form of a domain's configuration.

using System.Text.Json;
using System.Text.Json.Serialization;

namespace XenSharp.Configuration;

/// <summary>Reads and writes <see cref="DomainConfiguration"/> as JSON, without reflection: for state files and the daemon's interface.</summary>
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.CamelCase,
    DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull,
    UnmappedMemberHandling = JsonUnmappedMemberHandling.Disallow,
    RespectNullableAnnotations = true,
    WriteIndented = true)]
[JsonSerializable(typeof(DomainConfiguration))]
public sealed partial class DomainConfigurationJson : JsonSerializerContext
{
    /// <summary>The configuration as JSON, indented.</summary>
    public static string Write(DomainConfiguration configuration) => JsonSerializer.Serialize(configuration, Default.DomainConfiguration);

    /// <summary>Reads what <see cref="Write"/> wrote, or a program, and checks it as a file is checked.</summary>
    /// <param name="json">The text.</param>
    /// <param name="source">What messages are to call it.</param>
    /// <exception cref="ConfigurationException">It is no JSON, not of this form, or says what cannot be.</exception>
    public static DomainConfiguration Read(string json, string source)
    {
        DomainConfiguration? configuration;
        try
        {
            configuration = JsonSerializer.Deserialize(json, Default.DomainConfiguration);
        }
        catch (JsonException failure)
        {
            throw new ConfigurationException(new ConfigurationMessage(
                source, (int)(failure.LineNumber + 1 ?? 0), (int)(failure.BytePositionInLine + 1 ?? 0), failure.Message));
        }

        if (configuration is null)
            throw new ConfigurationException(new ConfigurationMessage(source, 0, 0, "This is null, where a domain's configuration should be."));
        var errors = DomainConfigurationRules.Check(configuration)
            .Select(found => new ConfigurationMessage(source, 0, 0, $"{found.Key}: {found.Text}")).ToList();
        return errors.Count == 0 ? configuration : throw new ConfigurationException(errors);
    }
}
