// How enumerations are written in JSON: in the words of xl.

using System.Text.Json;
using System.Text.Json.Serialization;

namespace XenSharp.Configuration;

/// <summary>Small letters with hyphens: <c>rename-restart</c>. Numbers are refused.</summary>
public sealed class KebabCaseEnumConverter<T>() : JsonStringEnumConverter<T>(JsonNamingPolicy.KebabCaseLower, allowIntegerValues: false)
    where T : struct, Enum;
