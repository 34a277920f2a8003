// One assignment of the xl.cfg(5) language.

namespace XenSharp.Configuration.Language;

/// <summary>NAME=VALUE, or NAME+=VALUE.</summary>
/// <param name="Source">The file or other text that it is in.</param>
/// <param name="Name">The key.</param>
/// <param name="IsAddition">It is +=: the value goes behind the one that the key has already.</param>
/// <param name="Value">What is assigned or added.</param>
/// <param name="Line">The line of the key, from 1.</param>
/// <param name="Column">The column of the key, from 1.</param>
public sealed record ConfigurationSetting(string Source, string Name, bool IsAddition, ConfigurationValue Value, int Line, int Column)
{
    /// <summary>A sentence about the key.</summary>
    public ConfigurationMessage Message(string text) => new(Source, Line, Column, text);

    /// <summary>A sentence about a value of this setting.</summary>
    public ConfigurationMessage Message(ConfigurationValue value, string text)
        => value.Line == 0 ? Message(text) : new ConfigurationMessage(Source, value.Line, value.Column, text);
}
