// The syntax of GRUB's configuration files.

using System.Text;

namespace XenSharp.Configuration.Boot;

/// <summary>A word, in pieces: text as it stands, and variables.</summary>
/// <param name="Pieces">The pieces in their order.</param>
internal sealed record GrubWord(IReadOnlyList<GrubPiece> Pieces)
{
    /// <summary>The text of a word that is nothing but unquoted text; null for another.</summary>
    internal string? Plain => Pieces is [{ IsVariable: false, Quoted: false } only] ? only.Text : null;
}

/// <summary>A piece of a word.</summary>
/// <param name="Text">The text, or the name of the variable.</param>
/// <param name="IsVariable">It is a variable.</param>
/// <param name="Quoted">It is in quotes, so that blanks in it do not end the word.</param>
internal readonly record struct GrubPiece(string Text, bool IsVariable, bool Quoted);

/// <summary>A command of a script.</summary>
internal abstract record GrubCommand;

/// <summary>A command with arguments, and perhaps with a block in braces, as menuentry has one.</summary>
internal sealed record GrubSimple(IReadOnlyList<GrubWord> Words, IReadOnlyList<GrubCommand>? Block) : GrubCommand;

/// <summary>if, elif and else.</summary>
internal sealed record GrubIf(IReadOnlyList<(IReadOnlyList<GrubCommand> Condition, IReadOnlyList<GrubCommand> Then)> Branches, IReadOnlyList<GrubCommand> Else)
    : GrubCommand;

/// <summary>for, while and until, which are not run: menus are not made with them.</summary>
internal sealed record GrubLoop : GrubCommand;

/// <summary>
/// Parses scripts of GRUB 2: the part of the shell's language that it has. This is shell-like text from somebody else's disk, in which one
/// odd line must not hide the menu; so what is not understood is passed over where it can be.
/// </summary>
internal sealed class GrubParser
{
    private const int DeepestNesting = 32;

    private readonly string _text;
    private int _at;
    private int _depth;

    private GrubParser(string text) => _text = text;

    /// <exception cref="BootException">The script is not to be understood.</exception>
    internal static IReadOnlyList<GrubCommand> Parse(string text)
    {
        var parser = new GrubParser(text);
        var commands = new List<GrubCommand>();
        while (parser._at < text.Length)
        {
            commands.AddRange(parser.ParseUntil());

            // A word that ends nothing, such as a brace too many.
            if (parser._at < text.Length)
                parser.ReadWord();
        }

        return commands;
    }

    /// <summary>Commands up to one of the words, which is left; or up to the end.</summary>
    private List<GrubCommand> ParseUntil(params ReadOnlySpan<string> ends)
    {
        if (++_depth > DeepestNesting)
            throw new BootException("Its commands are nested too deeply.");
        var commands = new List<GrubCommand>();
        while (true)
        {
            SkipSeparators();
            if (_at >= _text.Length)
                break;
            string? word = PeekWord();
            if (word is "}" or "fi" or "elif" or "else" or "then" or "do" or "done" || (word is not null && ends.Contains(word)))
                break;
            commands.Add(word switch
            {
                "if" => ParseIf(),
                "for" or "while" or "until" => ParseLoop(),
                _ => ParseSimple(),
            });
        }

        _depth--;
        return commands;
    }

    private GrubIf ParseIf()
    {
        var branches = new List<(IReadOnlyList<GrubCommand>, IReadOnlyList<GrubCommand>)>();
        IReadOnlyList<GrubCommand> otherwise = [];
        do
        {
            ReadWord();
            List<GrubCommand> condition = ParseUntil("then");
            Expect("then");
            branches.Add((condition, ParseUntil("elif", "else", "fi")));
        }
        while (PeekWord() == "elif");
        if (PeekWord() == "else")
        {
            ReadWord();
            otherwise = ParseUntil("fi");
        }

        Expect("fi");
        return new GrubIf(branches, otherwise);
    }

    private GrubLoop ParseLoop()
    {
        ReadWord();
        ParseUntil("do");
        Expect("do");
        ParseUntil("done");
        Expect("done");
        return new GrubLoop();
    }

    private GrubSimple ParseSimple()
    {
        var words = new List<GrubWord>();
        while (true)
        {
            SkipBlanks();
            if (_at >= _text.Length || _text[_at] is '\n' or ';')
                break;
            if (PeekWord() is "{" && words.Count > 0)
            {
                ReadWord();
                List<GrubCommand> block = ParseUntil("}");
                Expect("}");
                return new GrubSimple(words, block);
            }

            if (PeekWord() is "}")
                break;
            words.Add(ReadWord());
        }

        return new GrubSimple(words, null);
    }

    private void Expect(string word)
    {
        SkipSeparators();
        if (PeekWord() != word)
            throw new BootException($"There is no \"{word}\" where one should be (line {1 + _text.AsSpan(0, Math.Min(_at, _text.Length)).Count('\n')}).");
        ReadWord();
    }

    /// <summary>The next word if it is nothing but unquoted text; it is not taken.</summary>
    private string? PeekWord()
    {
        int at = _at;
        SkipBlanks();
        string? word = _at < _text.Length && _text[_at] is not ('\n' or ';') ? ReadWord().Plain : null;
        _at = at;
        return word;
    }

    private void SkipSeparators()
    {
        while (true)
        {
            SkipBlanks();
            if (_at >= _text.Length || _text[_at] is not ('\n' or ';'))
                return;
            _at++;
        }
    }

    /// <summary>Blanks, lines that go on, and comments.</summary>
    private void SkipBlanks()
    {
        while (_at < _text.Length)
        {
            if (_text[_at] is ' ' or '\t' or '\r')
            {
                _at++;
            }
            else if (_text[_at] == '\\' && _at + 1 < _text.Length && _text[_at + 1] == '\n')
            {
                _at += 2;
            }
            else if (_text[_at] == '#')
            {
                int end = _text.IndexOf('\n', _at);
                _at = end < 0 ? _text.Length : end;
            }
            else
            {
                return;
            }
        }
    }

    private GrubWord ReadWord()
    {
        SkipBlanks();
        var pieces = new List<GrubPiece>();
        var text = new StringBuilder();
        bool quoted = false;
        int start = _at;
        while (_at < _text.Length && _text[_at] is not (' ' or '\t' or '\r' or '\n' or ';'))
        {
            char character = _text[_at];
            if (character is '{' or '}' && _at == start)
            {
                // A brace is a word of its own, also where the next follows at once.
                text.Append(character);
                _at++;
                break;
            }

            switch (character)
            {
                case '\'':
                    Flush();
                    int end = _text.IndexOf('\'', _at + 1);
                    end = end < 0 ? _text.Length : end;
                    pieces.Add(new GrubPiece(_text[(_at + 1)..end], false, true));
                    _at = Math.Min(end + 1, _text.Length);
                    break;
                case '"':
                    Flush();
                    ReadDoubleQuoted(pieces);
                    break;
                case '\\':
                    if (_at + 1 < _text.Length && _text[_at + 1] != '\n')
                    {
                        Flush();
                        pieces.Add(new GrubPiece(_text[_at + 1].ToString(), false, true));
                    }

                    _at = Math.Min(_at + 2, _text.Length);
                    break;
                case '$' when TryReadVariable(out string name):
                    Flush();
                    pieces.Add(new GrubPiece(name, true, false));
                    break;
                default:
                    text.Append(character);
                    _at++;
                    break;
            }
        }

        Flush();
        return new GrubWord(pieces);

        void Flush()
        {
            if (text.Length > 0)
                pieces.Add(new GrubPiece(text.ToString(), false, quoted));
            text.Clear();
        }
    }

    private void ReadDoubleQuoted(List<GrubPiece> pieces)
    {
        var text = new StringBuilder();
        _at++;
        while (_at < _text.Length && _text[_at] != '"')
        {
            if (_text[_at] == '\\' && _at + 1 < _text.Length && _text[_at + 1] is '$' or '"' or '\\' or '\n')
            {
                if (_text[_at + 1] != '\n')
                    text.Append(_text[_at + 1]);
                _at += 2;
            }
            else if (_text[_at] == '$' && TryReadVariable(out string name))
            {
                pieces.Add(new GrubPiece(text.ToString(), false, true));
                pieces.Add(new GrubPiece(name, true, true));
                text.Clear();
            }
            else
            {
                text.Append(_text[_at++]);
            }
        }

        _at = Math.Min(_at + 1, _text.Length);
        pieces.Add(new GrubPiece(text.ToString(), false, true));
    }

    /// <summary>$NAME, ${NAME} or $1; the place is moved only where there is one.</summary>
    private bool TryReadVariable(out string name)
    {
        int at = _at + 1;
        bool braces = at < _text.Length && _text[at] == '{';
        if (braces)
            at++;
        int start = at;
        if (at < _text.Length && (char.IsAsciiDigit(_text[at]) || _text[at] is '?' or '@' or '*' or '#'))
        {
            at++;
        }
        else
        {
            while (at < _text.Length && (char.IsAsciiLetterOrDigit(_text[at]) || _text[at] == '_'))
                at++;
        }

        name = _text[start..at];
        if (name.Length == 0 || (braces && (at >= _text.Length || _text[at] != '}')))
            return false;
        _at = braces ? at + 1 : at;
        return true;
    }
}
