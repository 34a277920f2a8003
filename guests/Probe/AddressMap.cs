// Names of the addresses that a script uses, for its transcripts.
namespace XenSharp.Guests.Probe;

/// <summary>Bytes from <paramref name="Start"/> up to, not including, <paramref name="End"/>.</summary>
public readonly record struct AddressRange(ulong Start, ulong End)
{
    public bool Contains(ulong address) => address >= Start && address < End;
}

/// <summary>Names of ranges of addresses: buffers, scratch pages, the probe's own memory.</summary>
public sealed class AddressMap
{
    private readonly List<(AddressRange Range, string Name)> _names = [];

    internal void Add(ulong start, ulong length, string name) => _names.Add((new AddressRange(start, start + length), name));

    /// <summary>A number; an address that has a name as "name+offset", in the code that the step runs as "code+offset".</summary>
    public string Format(ulong number, AddressRange? code = null)
    {
        if (code is { } own && own.Contains(number))
            return Offset("code", number - own.Start);
        foreach ((AddressRange range, string name) in _names)
        {
            if (range.Contains(number))
                return Offset(name, number - range.Start);
        }

        return Value.Format(number);
    }

    /// <summary>An instruction's address: in the step's code as an offset, in the probe's own code as "probe".</summary>
    public string FormatCode(ulong address, AddressRange? code)
    {
        if (code is { } own && own.Contains(address))
            return Offset("code", address - own.Start);
        return new AddressRange(ProbeLayout.End, ProbeLayout.End + 0x10000).Contains(address) ? "probe" : Format(address, code);
    }

    private static string Offset(string name, ulong offset) => offset == 0 ? name : $"{name}+0x{offset:x}";
}
