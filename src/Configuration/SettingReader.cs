// Typed access to the settings of a configuration, with a sentence for each that has another type.

using System.Diagnostics.CodeAnalysis;
using XenSharp.Configuration.Language;
using XenSharp.Core;

namespace XenSharp.Configuration;

/// <summary>
/// Takes settings out of a document by key. What is wrong is noted, and the setting counts as not given, so that a reader can go on and
/// tell of everything at once.
/// </summary>
internal sealed class SettingReader(IReadOnlyList<ConfigurationSetting> settings)
{
    private readonly Dictionary<string, ConfigurationSetting> _settings = settings.ToDictionary(static setting => setting.Name, StringComparer.Ordinal);

    /// <summary>Every setting, in the order of the document.</summary>
    internal IReadOnlyList<ConfigurationSetting> All => settings;

    internal List<ConfigurationMessage> Errors { get; } = [];

    internal List<ConfigurationMessage> Warnings { get; } = [];

    internal bool TryGet(string key, [NotNullWhen(true)] out ConfigurationSetting? setting) => _settings.TryGetValue(key, out setting);

    /// <summary>A sentence about a key, at its place if it is in the document.</summary>
    internal ConfigurationMessage Message(string key, string source, string text)
        => _settings.TryGetValue(key, out ConfigurationSetting? setting) ? setting.Message(text) : new ConfigurationMessage(source, 0, 0, text);

    /// <summary>Text, or null if it is not given.</summary>
    internal string? Text(string key)
    {
        if (!_settings.TryGetValue(key, out ConfigurationSetting? setting))
            return null;
        if (setting.Value is TextValue text)
            return text.Text;
        Errors.Add(setting.Message(setting.Value, $"{key} is one value; here is a list."));
        return null;
    }

    /// <summary>A whole number, or null if it is not given.</summary>
    internal long? Number(string key, long least, long most)
    {
        if (Text(key) is not { } text)
            return null;
        ConfigurationSetting setting = _settings[key];
        if (setting.IsAddition)
            Errors.Add(setting.Message($"{key} is a number, and += puts text together; assign it with =."));
        else if (!CNumber.TryParse(text.Trim(' ', '\t'), out long number))
            Errors.Add(setting.Message(setting.Value, $"{key} is a number; \"{text}\" is none."));
        else if (number < least || number > most)
            Errors.Add(setting.Message(setting.Value, $"{key} is a number from {least} to {most}; {number} is out of that range."));
        else
            return number;
        return null;
    }

    /// <summary>0 for false, any other number for true; null if it is not given.</summary>
    internal bool? Boolean(string key)
    {
        if (Text(key) is not { } text)
            return null;
        ConfigurationSetting setting = _settings[key];
        if (setting.IsAddition)
            Errors.Add(setting.Message($"{key} is 0 or 1, and += puts text together; assign it with =."));
        else if (!CNumber.TryParse(text.Trim(' ', '\t'), out long number))
            Errors.Add(setting.Message(setting.Value, $"{key} is 0 or 1; \"{text}\" is no number."));
        else
            return number != 0;
        return null;
    }

    /// <summary>The items of a list of texts; none if it is not given.</summary>
    internal IEnumerable<TextValue> List(string key)
    {
        if (!_settings.TryGetValue(key, out ConfigurationSetting? setting))
            yield break;
        if (setting.Value is not ListValue list)
        {
            Errors.Add(setting.Message(setting.Value, $"{key} is a list; put it in brackets, {key} = [ \"…\" ]."));
            yield break;
        }

        foreach (ConfigurationValue item in list.Items)
        {
            if (item is TextValue text)
                yield return text;
            else
                Errors.Add(setting.Message(item, $"{key} is a list of texts; here is a list in it."));
        }
    }
}
