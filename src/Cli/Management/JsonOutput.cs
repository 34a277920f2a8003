// The API's objects as JSON on standard output.

using System.Text.Json;
using System.Text.Json.Serialization.Metadata;
using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>Prints what the daemon said, for programs.</summary>
internal static class JsonOutput
{
    /// <summary>The API's types, indented.</summary>
    internal static ApiJson Types { get; } = new(new JsonSerializerOptions(ApiJson.Default.Options) { WriteIndented = true });

    /// <summary>Prints an object.</summary>
    internal static void Print<T>(T value, JsonTypeInfo<T> type) => Console.Out.WriteLine(JsonSerializer.Serialize(value, type));
}
