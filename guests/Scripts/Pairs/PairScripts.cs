// The scripts of two domains: what they do with each other's ports, grants and frames.
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Pairs;

/// <summary>The area's scripts.</summary>
internal static class PairScripts
{
    public static IEnumerable<AbiScript> Create() =>
    [
        PairEventScript.CreateChannels(),
        PairEventScript.CreateFifo(),
        PairEventScript.CreateReset(),
        PairGrantMapScript.Create(),
        PairGrantCopyScript.CreateCopy(),
        PairGrantCopyScript.CreateTransfer(),
        PairGrantVersionScript.Create(),
        PairGrantCountScript.Create(),
        PairFrameScript.Create(),
        PairPageTableScript.Create(),
        PairEndScript.CreateMapper(),
        PairEndScript.CreateGranter(),
    ];
}
