// A line that the probe guest printed for a step, taken apart.
using System.Globalization;

namespace XenSharp.Guests.Probe;

/// <summary>An entry into the guest's kernel as its frame shows it: an exception, or one of <see cref="ProbeEntry"/>.</summary>
/// <param name="Vector">The vector, or a <see cref="ProbeEntry"/>.</param>
/// <param name="ErrorCode">The error code; 0 for those without. Of the failsafe callback: DS, ES, FS, GS, 16 bits each from bit 0.</param>
/// <param name="FaultAddress">vcpu_info.arch.cr2.</param>
/// <param name="Rip">RIP in the frame.</param>
/// <param name="Cs">CS in the frame.</param>
/// <param name="SavedMask">saved_upcall_mask, beside CS.</param>
/// <param name="Rflags">RFLAGS in the frame.</param>
/// <param name="Rsp">RSP in the frame.</param>
/// <param name="Ss">SS in the frame.</param>
/// <param name="FrameEnd">Address of the first byte behind the frame.</param>
/// <param name="Mask">evtchn_upcall_mask in the handler.</param>
public sealed record ProbeException(
    int Vector, ulong ErrorCode, ulong FaultAddress, ulong Rip, ushort Cs, uint SavedMask, ulong Rflags, ulong Rsp, ulong Ss,
    ulong FrameEnd, byte Mask);

/// <summary>An upcall as the callback found things.</summary>
/// <param name="Mask">evtchn_upcall_mask in the handler.</param>
/// <param name="SavedMask">saved_upcall_mask in the frame.</param>
/// <param name="Pending">evtchn_upcall_pending.</param>
/// <param name="Selector">evtchn_pending_sel.</param>
/// <param name="Ports">Pending and unmasked ports of the lowest word that the selector names, a bit each.</param>
public sealed record ProbeUpcall(byte Mask, byte SavedMask, byte Pending, ulong Selector, ulong Ports);

/// <summary>What the probe printed for one step.</summary>
public sealed class ProbeLine
{
    private const int ExceptionWords = 10;
    private const int UpcallWords = 3;

    private ProbeLine(int step) => Step = step;

    /// <summary>The step's number.</summary>
    public int Step { get; }

    /// <summary>A hypercall's result; null if it did not return.</summary>
    public ulong? Result { get; private set; }

    /// <summary>The value of a load or an expression; null if there was an exception before.</summary>
    public ulong? Value { get; private set; }

    /// <summary>Registers by their number in the processor's order; 16 is RFLAGS.</summary>
    public SortedDictionary<int, ulong> Registers { get; } = [];

    public List<ProbeException> Exceptions { get; } = [];

    public List<ProbeUpcall> Upcalls { get; } = [];

    /// <summary>Exceptions and upcalls that the probe's log had no room for.</summary>
    public ulong Unlogged { get; private set; }

    /// <summary>Takes a line apart.</summary>
    /// <returns>Null if it is no whole line of the probe's.</returns>
    public static ProbeLine? TryParse(string line)
    {
        string[] fields = line.TrimEnd('\r').Split(' ');
        if (fields[0] is not ['@', .. string number] || !TryHex(number, out ulong step) || step > int.MaxValue)
            return null;
        var result = new ProbeLine((int)step);
        foreach (string field in fields.AsSpan(1))
        {
            if (!result.TryAdd(field))
                return null;
        }

        return result;
    }

    private static bool TryHex(string text, out ulong value)
        => ulong.TryParse(text, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out value);

    private static ulong[]? Words(string text, int count)
    {
        string[] parts = text.Split(',');
        if (parts.Length != count + 1 || parts[count].Length != 0)
            return null;
        var words = new ulong[count];
        for (int i = 0; i < count; i++)
        {
            if (!TryHex(parts[i], out words[i]))
                return null;
        }

        return words;
    }

    private bool TryAdd(string field)
    {
        if (field.Split('=') is not [{ Length: > 0 } key, string text])
            return false;
        switch (key)
        {
            case "x" or "u" when text is ['+', .. string more]:
                if (!TryHex(more, out ulong unlogged))
                    return false;
                Unlogged += unlogged;
                return true;
            case "x" when Words(text, ExceptionWords) is { } words:
                Exceptions.Add(new ProbeException(
                    (int)words[0], words[1], words[2], words[3], (ushort)words[4], (uint)(words[4] >> 32), words[5], words[6], words[7],
                    words[8], (byte)words[9]));
                return true;
            case "u" when Words(text, UpcallWords) is { } words:
                Upcalls.Add(new ProbeUpcall((byte)words[0], (byte)(words[0] >> 8), (byte)(words[0] >> 16), words[1], words[2]));
                return true;
        }

        if (!TryHex(text, out ulong value))
            return false;
        switch (key[0])
        {
            case 'r' when key.Length == 1:
                Result = value;
                return true;
            case 'v' when key.Length == 1:
                Value = value;
                return true;
            case 'g' when TryHex(key[1..], out ulong register) && register <= 16:
                Registers[(int)register] = value;
                return true;
            default:
                return false;
        }
    }
}
