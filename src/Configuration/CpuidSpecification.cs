// The two notations of xl.cfg(5) for what CPUID is to answer.

using System.Globalization;
using XenSharp.Configuration.Language;
using XenSharp.Core;

namespace XenSharp.Configuration;

/// <summary>Turns the notations into <see cref="CpuidMask"/>s, one a register.</summary>
internal sealed class CpuidSpecification
{
    private const int RegisterBits = 32;

    private readonly Dictionary<(uint Leaf, uint? Subleaf, CpuidRegister Register), CpuidMask> _masks = [];

    /// <summary>Sentences about what is understood and has no effect.</summary>
    internal List<string> Warnings { get; } = [];

    /// <summary>What was asked for, in the order of leaves.</summary>
    internal IReadOnlyList<CpuidMask> Masks
        => [.. _masks.Values.OrderBy(static mask => mask.Leaf).ThenBy(static mask => mask.Subleaf ?? 0).ThenBy(static mask => mask.Register)];

    /// <summary>libxl's notation: host,key=value,….</summary>
    /// <returns>A sentence about what is wrong; null if nothing is.</returns>
    internal string? AddLibxl(string text)
    {
        string[] items = text.Split(',');
        if (items[0].Trim() != "host")
            return $"A string of CPUID settings begins with host, as in cpuid=\"host,tm=0\"; \"{items[0].Trim()}\" does not.";
        foreach (string item in items.Skip(1))
        {
            string setting = item.Trim();
            int equals = setting.IndexOf('=');
            if (equals <= 0)
                return $"CPUID settings are NAME=VALUE; \"{setting}\" is not.";
            string name = setting[..equals];
            string value = setting[(equals + 1)..];
            if (CpuidFeatures.IsInMsr(name))
                Warnings.Add($"{name} is shown by an MSR that domains here do not have; it has no effect.");
            else if (!CpuidFeatures.TryFind(name, out CpuidField field))
                return $"\"{name}\" is no CPUID feature that Xen 4.17 knows.";
            else if (AddField(name, field, value) is { } wrong)
                return wrong;
        }

        return null;
    }

    /// <summary>xend's notation: LEAF[,SUBLEAF]:REGISTER=BITS,….</summary>
    /// <returns>A sentence about what is wrong; null if nothing is.</returns>
    internal string? AddXend(string text)
    {
        int colon = text.IndexOf(':');
        if (colon < 0)
            return $"\"{text}\" has no colon: CPUID leaves are written \"LEAF:eax=BITS,…\".";
        string[] numbers = text[..colon].Split(',');
        if (numbers.Length > 2 || !TryParseWord(numbers[0], out uint leaf))
            return $"\"{text[..colon]}\" is no CPUID leaf: write its number, and behind a comma the subleaf's if there is one.";
        uint? subleaf = null;
        if (numbers.Length == 2)
        {
            if (!TryParseWord(numbers[1], out uint number))
                return $"\"{numbers[1]}\" is no CPUID subleaf: write its number.";
            subleaf = number;
        }

        foreach (string item in text[(colon + 1)..].Split(',', StringSplitOptions.TrimEntries))
        {
            CpuidRegister? register = item.Split('=')[0] switch
            {
                "eax" => CpuidRegister.Eax,
                "ebx" => CpuidRegister.Ebx,
                "ecx" => CpuidRegister.Ecx,
                "edx" => CpuidRegister.Edx,
                _ => null,
            };
            int equals = item.IndexOf('=');
            if (register is null || equals < 0)
                return $"\"{item}\" is none of eax=, ebx=, ecx= and edx= with {RegisterBits} bits.";
            string bits = item[(equals + 1)..];
            if (bits.Length != RegisterBits)
                return $"A register has {RegisterBits} bits, the highest first; \"{bits}\" has {bits.Length}.";
            var mask = new CpuidMask(leaf, subleaf, register.Value, 0, 0, 0);
            for (int at = 0; at < bits.Length; at++)
            {
                if (WithBits(mask, 0x8000_0000 >> at, bits[at]) is not { } next)
                    return $"The bits of a register are 0, 1, x, k and s; \"{bits[at]}\" is none of them.";
                mask = next;
            }

            _masks[(leaf, subleaf, register.Value)] = mask;
        }

        return null;
    }

    private static bool TryParseWord(string text, out uint word)
    {
        bool good = CNumber.TryParse(text.Trim(' ', '\t'), out long number) && number is >= 0 and <= uint.MaxValue;
        word = good ? (uint)number : 0;
        return good;
    }

    private static CpuidMask? WithBits(CpuidMask mask, uint bits, char how)
    {
        mask = mask with { Set = mask.Set & ~bits, Clear = mask.Clear & ~bits, Host = mask.Host & ~bits };
        return how switch
        {
            '1' => mask with { Set = mask.Set | bits },
            '0' => mask with { Clear = mask.Clear | bits },
            'k' or 's' => mask with { Host = mask.Host | bits },
            'x' => mask,
            _ => null,
        };
    }

    private string? AddField(string name, CpuidField field, string value)
    {
        CpuidMask mask = _masks.GetValueOrDefault((field.Leaf, field.Subleaf, field.Register)) ?? new CpuidMask(field.Leaf, field.Subleaf, field.Register, 0, 0, 0);
        uint bits = name switch { "family" => 0x0ff0_0f00, "model" => 0x000f_00f0, _ => field.Mask };
        if (value is ['x' or 'k' or 's'])
        {
            mask = WithBits(mask, bits, value[0])!;
        }
        else if (!CNumber.TryParse(value.Trim(' ', '\t'), out long number) || number < 0 || number > Largest(name, field))
        {
            return field.Bits == 1
                ? $"{name} takes 0, 1, x, k or s; \"{value}\" is none of them."
                : string.Create(CultureInfo.InvariantCulture, $"{name} takes a number up to {Largest(name, field)}, x, k or s; \"{value}\" is none.");
        }
        else
        {
            uint set = name switch
            {
                // The family is the base family, and what is above 15 goes into the extended one.
                "family" => number < 16 ? (uint)number << 8 : 0xf00 | ((uint)(number - 15) << 20),
                "model" => ((uint)number >> 4 << 16) | (((uint)number & 0xf) << 4),
                _ => (uint)number << field.FirstBit,
            };
            mask = mask with { Set = (mask.Set & ~bits) | set, Clear = (mask.Clear & ~bits) | (bits & ~set), Host = mask.Host & ~bits };
        }

        _masks[(field.Leaf, field.Subleaf, field.Register)] = mask;
        return null;
    }

    private static long Largest(string name, CpuidField field) => name == "family" ? 15 + 255 : (1L << field.Bits) - 1;
}
