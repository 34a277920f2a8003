// GNTTABOP_copy as the scripts of two domains write it: from a side to a side.
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;

namespace XenSharp.Guests.Scripts.Pairs;

/// <summary>Source or destination of a copy.</summary>
/// <param name="Where">A reference, or a frame.</param>
/// <param name="Domain">Whose.</param>
/// <param name="Offset">Bytes from the page's start.</param>
/// <param name="IsReference">Which of the two.</param>
internal sealed record Side(Value Where, Value Domain, int Offset, bool IsReference)
{
    /// <summary>By an entry of a grant table.</summary>
    public static Side Reference(Value domain, Value reference, int offset = 0) => new(reference, domain, offset, true);

    /// <summary>By a frame's number.</summary>
    public static Side Frame(Value frame, Value domain, int offset = 0) => new(frame, domain, offset, false);

    /// <summary>A page of one's own.</summary>
    public static Side Frame(ScratchPage page, int offset = 0) => new(page.Mfn, DomainIds.Self, offset, false);
}

internal static class CopySteps
{
    private const int SourceIsReference = 1;
    private const int DestinationIsReference = 2;

    /// <summary>One copy of a call.</summary>
    internal sealed record Request(Side From, Side To, int Length = 8);

    /// <summary>One copy; shows the status.</summary>
    public static void Copy(this AbiCase c, string text, Side from, Side to, int length = 8) => c.CopyAll(text, new Request(from, to, length));

    /// <summary>Copies in one call; shows the status of each.</summary>
    public static void CopyAll(this AbiCase c, string text, params Request[] requests)
    {
        List<(int, int, Value)> fields = [];
        foreach ((int index, Request request) in requests.Index())
        {
            int at = index * GrantCopyField.Size;
            int flags = (request.From.IsReference ? SourceIsReference : 0) | (request.To.IsReference ? DestinationIsReference : 0);
            fields.AddRange([
                (at + GrantCopyField.Source, request.From.IsReference ? 4 : 8, request.From.Where),
                (at + GrantCopyField.SourceDomain, 2, request.From.Domain), (at + GrantCopyField.SourceOffset, 2, request.From.Offset),
                (at + GrantCopyField.Destination, request.To.IsReference ? 4 : 8, request.To.Where),
                (at + GrantCopyField.DestinationDomain, 2, request.To.Domain), (at + GrantCopyField.DestinationOffset, 2, request.To.Offset),
                (at + GrantCopyField.Length, 2, request.Length), (at + GrantCopyField.Flags, 2, flags), (at + GrantCopyField.Status, 2, 77)]);
        }

        ScriptBuffer copies = c.Structure("copy", requests.Length * GrantCopyField.Size, [.. fields]);
        c.Op(GrantOperation.Copy, text, copies, requests.Length);
        for (int i = 0; i < requests.Length; i++)
            c.Load(copies[(i * GrantCopyField.Size) + GrantCopyField.Status], 2);
    }
}
