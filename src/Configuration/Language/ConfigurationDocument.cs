// A whole configuration as written: assignments in order, of one or more sources.

namespace XenSharp.Configuration.Language;

/// <summary>The assignments of an xl.cfg(5) file, and of the settings that were given beside it.</summary>
public sealed class ConfigurationDocument
{
    /// <summary>The most characters that a configuration may have.</summary>
    public const int LargestText = 1 << 20;

    private readonly List<ConfigurationSetting> _settings = [];

    /// <summary>The assignments in the order in which they were made.</summary>
    public IReadOnlyList<ConfigurationSetting> Settings => _settings;

    /// <summary>Parses a text and puts its assignments behind those that are here already; a later one counts.</summary>
    /// <param name="text">Settings in the language of xl.cfg(5).</param>
    /// <param name="source">What messages are to call it.</param>
    /// <exception cref="ConfigurationException">The text is not in that language.</exception>
    public void Append(string text, string source)
    {
        ArgumentNullException.ThrowIfNull(text);
        if (text.Length > LargestText)
            throw new ConfigurationException(new ConfigurationMessage(source, 0, 0, $"This is larger than any configuration ({LargestText >> 10} KiB at most)."));
        _settings.AddRange(ConfigurationParser.Parse(text, source));
    }

    /// <summary>What each key has in the end: the last assignment of it, with everything that was added to it.</summary>
    /// <returns>A setting a key, in the order in which the keys are first named; the position is the last assignment's.</returns>
    /// <exception cref="ConfigurationException">A list was added to text, or text to a list.</exception>
    public IReadOnlyList<ConfigurationSetting> Evaluate()
    {
        var order = new List<string>();
        var latest = new Dictionary<string, ConfigurationSetting>(StringComparer.Ordinal);
        foreach (ConfigurationSetting setting in _settings)
        {
            if (!latest.TryGetValue(setting.Name, out ConfigurationSetting? earlier))
                order.Add(setting.Name);
            latest[setting.Name] = setting.IsAddition && earlier is not null ? Sum(earlier, setting) : setting;
        }

        return order.ConvertAll(name => latest[name]);
    }

    private static ConfigurationSetting Sum(ConfigurationSetting earlier, ConfigurationSetting added) => (earlier.Value, added.Value) switch
    {
        (TextValue first, TextValue second) => added with { Value = first with { Text = first.Text + second.Text } },
        (ListValue first, ListValue second) => added with { Value = first with { Items = [.. first.Items, .. second.Items] } },
        (ListValue, _) => throw new ConfigurationException(added.Message(
            $"{added.Name} is a list (line {earlier.Line}), and += cannot put text behind it: put it in brackets, {added.Name} += [ … ].")),
        _ => throw new ConfigurationException(added.Message(
            $"{added.Name} is text (line {earlier.Line}), and += cannot put a list behind it: assign the whole list with =.")),
    };
}
