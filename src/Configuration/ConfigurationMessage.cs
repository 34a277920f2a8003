// What is to be said about a configuration, and where in it.

namespace XenSharp.Configuration;

/// <summary>A sentence about a place in a configuration.</summary>
/// <param name="Source">The file's name, or what else the text came from, such as "command line".</param>
/// <param name="Line">The line, counted from 1; 0 where the sentence is about the whole.</param>
/// <param name="Column">The character in the line, counted from 1; 0 where the sentence is about the whole line.</param>
/// <param name="Text">The sentence.</param>
public sealed record ConfigurationMessage(string Source, int Line, int Column, string Text)
{
    /// <summary>As compilers print it: source:line:column: sentence.</summary>
    public override string ToString()
        => Line == 0 ? $"{Source}: {Text}" : Column == 0 ? $"{Source}:{Line}: {Text}" : $"{Source}:{Line}:{Column}: {Text}";
}
