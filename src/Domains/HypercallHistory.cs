using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>One hypercall as the crash report shows it.</summary>
/// <param name="Number">RAX.</param>
/// <param name="Arguments">Its arguments.</param>
/// <param name="Result">What was returned.</param>
/// <param name="Rip">The instruction after its <c>syscall</c>.</param>
public readonly record struct HypercallRecord(ulong Number, HypercallArguments Arguments, long Result, ulong Rip);

/// <summary>The last hypercalls of one vCPU, in a ring that is written without allocation.</summary>
public sealed class HypercallHistory
{
    /// <summary>How many are kept.</summary>
    public const int Capacity = 32;

    private readonly HypercallRecord[] _records = new HypercallRecord[Capacity];
    private ulong _count;

    /// <summary>How many were made in all.</summary>
    public ulong Count => _count;

    public void Add(in HypercallRecord record) => _records[_count++ % Capacity] = record;

    /// <summary>The kept ones, oldest first.</summary>
    public IEnumerable<HypercallRecord> Records
    {
        get
        {
            for (ulong i = _count > Capacity ? _count - Capacity : 0; i < _count; i++)
                yield return _records[i % Capacity];
        }
    }
}
