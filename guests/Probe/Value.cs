// What a script can say of a number that is only known in the running guest: an expression, and its name for people.
using System.Globalization;

namespace XenSharp.Guests.Probe;

/// <summary>
/// A 64-bit expression that the probe evaluates when it comes to it, with the text that stands for it in transcripts. Numbers convert to
/// values of themselves; + - &amp; | ^ &lt;&lt; &gt;&gt; combine them.
/// </summary>
public sealed class Value
{
    private readonly ulong[] _code;
    private readonly bool _compound;

    private Value(ulong[] code, string text, bool compound = false)
    {
        _code = code;
        Text = text;
        _compound = compound;
    }

    /// <summary>How transcripts call it.</summary>
    public string Text { get; }

    /// <summary>The expression in the probe's language, without its end.</summary>
    internal ReadOnlySpan<ulong> Code => _code;

    /// <summary>The number it is, if that is known before the guest runs.</summary>
    internal ulong? Known => _code is [(ulong)Token.Constant, ulong number] ? number : null;

    public static implicit operator Value(ulong number) => Constant(number, Format(number));

    public static implicit operator Value(long number) => Constant((ulong)number, Format((ulong)number));

    public static implicit operator Value(int number) => (long)number;

    public static implicit operator Value(uint number) => (ulong)number;

    public static Value operator +(Value left, Value right) => Combine(left, right, Token.Add, "+");

    public static Value operator -(Value left, Value right) => Combine(left, right, Token.Subtract, "-");

    public static Value operator &(Value left, Value right) => Combine(left, right, Token.And, "&");

    public static Value operator |(Value left, Value right) => Combine(left, right, Token.Or, "|");

    public static Value operator ^(Value left, Value right) => Combine(left, right, Token.Xor, "^");

    public static Value operator <<(Value value, int distance) => Shift(value, distance, Token.ShiftLeft, "<<");

    public static Value operator >>(Value value, int distance) => Shift(value, distance, Token.ShiftRight, ">>");

    /// <summary>The same value by another name.</summary>
    public Value Named(string text) => new(_code, text);

    /// <summary>The 64-bit word at an address, when the step comes.</summary>
    public static Value Load(Value address, string? text = null) => new([.. address._code, (ulong)Token.Load], text ?? $"[{address.Text}]");

    /// <summary>A constant with a name.</summary>
    public static Value Constant(ulong number, string text) => new([(ulong)Token.Constant, number], text);

    /// <summary>Machine frame of a pseudo-physical one, by the p2m list that the domain was started with.</summary>
    public static Value Mfn(Value pfn) => new([.. pfn._code, (ulong)Token.Mfn], $"mfn({pfn.Text})");

    /// <summary>Pseudo-physical frame of a machine frame, by the machine-to-physical table.</summary>
    public static Value Pfn(Value mfn) => new([.. mfn._code, (ulong)Token.Pfn], $"pfn({mfn.Text})");

    /// <summary>
    /// Machine address of the page-table entry that translates an address; 0 where a higher table has none. Walks the kernel's tables as
    /// far as the boot mapping shows them.
    /// </summary>
    /// <param name="address">A virtual address.</param>
    /// <param name="level">1 to 4.</param>
    public static Value EntryAddress(Value address, int level = 1)
        => new([.. address._code, (ulong)Token.EntryAddress, (ulong)level], level == 1 ? $"&pte({address.Text})" : $"&l{level}e({address.Text})");

    /// <summary>The vCPU's system time in ns.</summary>
    public static Value SystemTime { get; } = new([(ulong)Token.SystemTime], "now");

    public override string ToString() => Text;

    /// <summary>A number as transcripts write it: small ones in decimal, negative ones that hypercalls use, else hexadecimal.</summary>
    internal static string Format(ulong number) => number switch
    {
        < 4096 => number.ToString(CultureInfo.InvariantCulture),
        >= unchecked((ulong)-4095) => ((long)number).ToString(CultureInfo.InvariantCulture),
        _ => $"0x{number:x}",
    };

    private static Value Combine(Value left, Value right, Token token, string sign)
    {
        string text = $"{Operand(left)}{sign}{Operand(right)}";
        if (right.Known is 0 && token is Token.Add or Token.Subtract or Token.Or)
            return left;
        return new Value([.. left._code, .. right._code, (ulong)token], text, compound: true);
    }

    private static Value Shift(Value value, int distance, Token token, string sign)
        => new([.. value._code, (ulong)token, (ulong)distance], $"{Operand(value)}{sign}{distance}", compound: true);

    private static string Operand(Value value) => value._compound ? $"({value.Text})" : value.Text;
}
