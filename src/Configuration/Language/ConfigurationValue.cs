// The values of the xl.cfg(5) language: text and lists.

using System.Text;

namespace XenSharp.Configuration.Language;

/// <summary>A value, and where it is written. Numbers are text until a setting asks for a number, as in xl.</summary>
/// <param name="Line">The line of its first character, from 1; 0 for a value that was never written.</param>
/// <param name="Column">The column of it, from 1.</param>
public abstract record ConfigurationValue(int Line, int Column)
{
    /// <summary>The value as xl.cfg(5) has it, on one line.</summary>
    public abstract string ToText();
}

/// <summary>A string or a number.</summary>
/// <param name="Text">Its characters, without quotes and escapes.</param>
/// <param name="Line">See <see cref="ConfigurationValue"/>.</param>
/// <param name="Column">See <see cref="ConfigurationValue"/>.</param>
public sealed record TextValue(string Text, int Line = 0, int Column = 0) : ConfigurationValue(Line, Column)
{
    /// <summary>The text in double quotes, with escapes for what xl.cfg(5) has escapes for.</summary>
    public override string ToText()
    {
        var text = new StringBuilder("\"", Text.Length + 2);
        foreach (char character in Text)
        {
            text.Append(character switch
            {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\a' => "\\a",
                '\b' => "\\b",
                '\f' => "\\f",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\v' => "\\v",
                < ' ' or '\x7f' => $"\\x{(int)character:x2}",
                _ => character.ToString(),
            });
        }

        return text.Append('"').ToString();
    }
}

/// <summary>A list of values.</summary>
/// <param name="Items">What it has in it.</param>
/// <param name="Line">See <see cref="ConfigurationValue"/>.</param>
/// <param name="Column">See <see cref="ConfigurationValue"/>.</param>
public sealed record ListValue(IReadOnlyList<ConfigurationValue> Items, int Line = 0, int Column = 0) : ConfigurationValue(Line, Column)
{
    /// <summary>The items in brackets.</summary>
    public override string ToText() => $"[ {string.Join(", ", Items.Select(static item => item.ToText()))} ]";
}
