// The grammar of xl.cfg(5), and sentences for what is not in it.

using System.Globalization;
using Pidgin;
using Pidgin.Configuration;
using static Pidgin.Parser;
using static Pidgin.Parser<char>;

namespace XenSharp.Configuration.Language;

/// <summary>
/// Parses the language of xl's configuration files. The rules are those of libxlu's lexer and grammar (4.17): keys of small letters,
/// digits, dots and underscores; strings in either kind of quotes, on one line, with C's escapes; bare numbers; lists, which nest, may
/// span lines and may end in a comma; assignments that end with a line or a semicolon; comments from # on.
/// </summary>
internal static class ConfigurationParser
{
    /// <summary>Lists deeper than this are refused: nothing has use for them, and the stack has an end.</summary>
    private const int DeepestList = 16;

    /// <summary>Columns count characters: a tab is one.</summary>
    private static readonly IConfiguration<char> s_positions = Pidgin.Configuration.Configuration.Default<char>()
        .WithPosCalculator(static c => c == '\n' ? SourcePosDelta.NewLine : SourcePosDelta.OneCol);

    private const string TextLabel = "text in quotes";
    private const string NumberLabel = "a number";
    private const string ListEndLabel = "a comma or the closing bracket";
    private const string ListLabel = "a list in brackets";

    private static readonly Parser<char, Unit> s_blanks = OneOf(' ', '\t', '\r').SkipMany();

    private static readonly Parser<char, Unit> s_comment = Char('#').Then(Token(static c => c != '\n').SkipMany());

    /// <summary>Blanks, comments and ends of lines, where these mean nothing: in lists.</summary>
    private static readonly Parser<char, Unit> s_gap =
        OneOf(OneOf(' ', '\t', '\r', '\n').IgnoreResult(), s_comment).Labelled("the end of the line").SkipMany();

    /// <summary>What is between two assignments.</summary>
    private static readonly Parser<char, Unit> s_separators =
        OneOf(OneOf(' ', '\t', '\r', '\n', ';').IgnoreResult(), s_comment).Labelled("the end of the line").SkipMany();

    private static readonly Parser<char, string> s_name =
        Token(static c => char.IsAsciiLetter(c) || c == '_')
            .Then(Token(static c => char.IsAsciiLetterOrDigit(c) || c is '_' or '.').ManyString(), static (first, rest) => first + rest)
            .Labelled("the name of a setting");

    private static readonly Parser<char, string> s_number =
        Token(char.IsAsciiDigit)
            .Then(Token(static c => char.IsAsciiDigit(c) || c is (>= 'a' and <= 'f') or 'x').ManyString(), static (first, rest) => first + rest)
            .Labelled(NumberLabel);

    /// <summary>What may follow a backslash.</summary>
    private static readonly Parser<char, char> s_escape = OneOf(
        OneOf('"', '\'', '\\'),
        OneOf("abfnrtv").Map(static c => "\a\b\f\n\r\t\v"["abfnrtv".IndexOf(c)]),
        Char('x').Then(Token(char.IsAsciiHexDigit).Labelled("a hexadecimal digit").RepeatString(2))
            .Map(static digits => (char)int.Parse(digits, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture)),
        Octal()).Labelled("one of \" ' \\ a b f n r t v, x and two hexadecimal digits, or an octal number");

    private static readonly Parser<char, ConfigurationValue> s_atom =
        Map(
            static (position, text) => (ConfigurationValue)new TextValue(text, position.Line, position.Col),
            CurrentPos, OneOf(Quoted('"'), Quoted('\''), s_number));

    private static readonly Parser<char, bool> s_operator =
        OneOf(Char('=').ThenReturn(false), String("+=").ThenReturn(true)).Labelled("= or +=");

    private static readonly Parser<char, Assignment> s_assignment =
        Map(
            static (position, name, isAddition, value) => new Assignment(name, isAddition, value, position.Line, position.Col),
            CurrentPos,
            s_name.Before(s_blanks),
            s_operator.Before(s_blanks),
            Value(DeepestList).Before(s_blanks));

    private static readonly Parser<char, Unit> s_statementEnd =
        OneOf(End, Lookahead(OneOf('\n', ';', '#')).IgnoreResult()).Labelled("the end of the line or a semicolon");

    private static readonly Parser<char, IEnumerable<Assignment>> s_file =
        s_separators.Then(s_assignment.Before(s_statementEnd).Before(s_separators).Until(End));

    /// <summary>The assignments in a text.</summary>
    /// <exception cref="ConfigurationException">It is not in the language.</exception>
    internal static IEnumerable<ConfigurationSetting> Parse(string text, string source)
    {
        Result<char, IEnumerable<Assignment>> result = s_file.Parse(text, s_positions);
        if (!result.Success)
            throw new ConfigurationException(Explain(result.Error!, source));
        var settings = new List<ConfigurationSetting>();
        foreach (Assignment found in result.Value)
        {
            var setting = new ConfigurationSetting(source, found.Name, found.IsAddition, found.Value, found.Line, found.Column);
            if (found.Name.AsSpan().ContainsAnyInRange('A', 'Z') || found.Name[0] == '_')
                throw new ConfigurationException(setting.Message($"The names of settings are written in small letters and begin with one; {found.Name} is none."));
            settings.Add(setting);
        }

        return settings;
    }

    /// <summary>A value with so many levels of lists in it at most.</summary>
    private static Parser<char, ConfigurationValue> Value(int depth)
    {
        Parser<char, Unit> open = Char('[').IgnoreResult().Labelled(ListLabel);
        if (depth == 0)
            return OneOf(s_atom, open.Then(Parser<char>.Fail<ConfigurationValue>($"Lists are not nested deeper than {DeepestList} levels.")));
        Parser<char, ConfigurationValue> list = Map(
            static (position, items) => (ConfigurationValue)new ListValue(items.ToArray(), position.Line, position.Col),
            CurrentPos,
            Value(depth - 1).Before(s_gap).SeparatedAndOptionallyTerminated(Char(',').Before(s_gap))
                .Between(open.Before(s_gap), Char(']').Labelled(ListEndLabel)));
        return OneOf(s_atom, list);
    }

    private static Parser<char, string> Quoted(char quote)
    {
        Parser<char, char> plain = Token(c => c != quote && c is not ('\\' or '\n')).Labelled("a character");
        Parser<char, string> closing = Char(quote).ThenReturn(string.Empty).Labelled(quote == '"' ? "the closing \"" : "the closing '");
        return Char(quote).Labelled(TextLabel).Then(OneOf(plain, Char('\\').Then(s_escape)).ManyString().Before(closing));
    }

    /// <summary>One to three octal digits, of a character below 256.</summary>
    private static Parser<char, char> Octal()
    {
        Parser<char, char> digit = Token(static c => c is >= '0' and <= '7');
        return Map(static (first, second, third) => Place(Place(first - '0', second), third), digit, digit.Optional(), digit.Optional())
            .Assert(static code => code <= 0xff, "A character that is written as an octal number is at most \\377.")
            .Map(static code => (char)code);

        static int Place(int number, Maybe<char> digit) => digit.HasValue ? (number << 3) + (digit.Value - '0') : number;
    }

    private static ConfigurationMessage Explain(ParseError<char> error, string source)
    {
        string text;
        if (error.Message is not null)
        {
            text = error.Message;
        }
        else
        {
            var expected = error.Expected.Select(static one => one.Label ?? string.Empty).Distinct(StringComparer.Ordinal)
                .Where(static one => one is not ("" or "end of input" or "a character" or "the end of the line")).ToList();
            string found = error.EOF || !error.Unexpected.HasValue ? "the end of the text" : error.Unexpected.Value switch
            {
                '\n' => "the end of the line",
                < ' ' or '\x7f' => $"a control character (0x{(int)error.Unexpected.Value:x2})",
                char character => $"\"{character}\"",
            };
            text = expected.Count == 0
                ? $"{found} does not belong here."
                : $"Here is {found}, where {(expected.Count == 1 ? expected[0] : $"{string.Join(", ", expected.SkipLast(1))} or {expected[^1]}")} should be.";
            if (expected.Contains(ListEndLabel) && error.Unexpected is { HasValue: true, Value: ',' })
                text = "Here is a comma with nothing before it.";
            else if (expected.Contains(TextLabel) && error.Unexpected is { HasValue: true, Value: var first } && (char.IsLetter(first) || first is '/' or '-'))
                text += " Text and negative numbers are put in quotes.";
            else if (error.Unexpected is { HasValue: true, Value: '(' or ')' or ':' or '.' or '+' or '-' })
                text += " Configurations have no expressions; those of xm, which were programs, are to be rewritten.";
        }

        return new ConfigurationMessage(source, error.ErrorPos.Line, error.ErrorPos.Col, text);
    }

    private sealed record Assignment(string Name, bool IsAddition, ConfigurationValue Value, int Line, int Column);
}
