// A page of one domain for the other, as the scripts about grants start with one.
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;

namespace XenSharp.Guests.Scripts.Pairs;

/// <summary>A page that one domain grants the other.</summary>
/// <param name="Source">The page, the granter's.</param>
/// <param name="Frame">Its frame, for either domain.</param>
/// <param name="Window">A page of the other's, in whose place it can be mapped.</param>
internal sealed record Granted(ScratchPage Source, Value Frame, ScratchPage Window)
{
    /// <summary>What the page begins with.</summary>
    public const ulong Pattern = 0x1122_3344_5566_7788;

    /// <summary>Takes the pages and makes an entry of version 1.</summary>
    public static Granted Make(AbiCase from, AbiCase to, ScratchPage table, int reference, int flags = GrantFlag.PermitAccess)
    {
        ScratchPage source = from.Page();
        from.Put(source.At, 8, Pattern);
        from.PutEntry(table, reference, flags, from.Peer, source.Mfn);
        return new Granted(source, from.Tell(source.Mfn, "frame"), to.Page());
    }
}
