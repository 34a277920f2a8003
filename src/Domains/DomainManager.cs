using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Builder;

namespace XenSharp.Domains;

/// <summary>The domains of this process that know of each other: their numbers, and who there is (Xen's domain list).</summary>
/// <remarks>
/// Any thread may look a domain up. Locks that guard what two domains share are taken in this order: <see cref="_lock"/> by itself, with
/// none other held; of event channels as <see cref="EventChannels.PortLock"/> says, the domain that was made first before the other; of
/// grants, one domain's table at a time, and no other lock under it but those of frames.
/// </remarks>
public sealed unsafe class DomainManager
{
    private const int BitsPerWord = 64;

    /// <summary>
    /// Frames that the domains together may have mapped of each other: half of the mappings that Linux lets a process have by default
    /// (vm.max_map_count, 65,530), as each takes two where its neighbours show nothing.
    /// </summary>
    private const int MaxWindowFrames = 16384;

    /// <summary>RAM starts at 4 GiB, past all that a VM has of its own; a domain's is mapped by large pages.</summary>
    private const ulong FirstFrame = 1UL << (32 - Paging.PageShift);
    private const ulong FrameAlignment = Paging.EntriesPerTable;

    private readonly Lock _lock = new();
    private readonly ConcurrentDictionary<ushort, Domain> _domains = new();

    /// <summary>Numbers that are taken, by domains that are being built as well.</summary>
    private readonly HashSet<ushort> _taken = [];

    /// <summary>One bit a number that a guest may learn to be a domain's, where code without a runtime looks; pinned, so that it stays.</summary>
    private readonly ulong[] _known = GC.AllocateArray<ulong>((DomainId.FirstReserved + BitsPerWord - 1) / BitsPerWord, pinned: true);
    private readonly MachineFrames[] _machineFrames = GC.AllocateArray<MachineFrames>(1, pinned: true);
    private readonly SortedList<ulong, ulong> _frames = [];
    private ushort _last;
    private int _windowFrames;

    /// <summary>The domains that there are, those included that have been destroyed and have memory which others still use.</summary>
    public IReadOnlyCollection<Domain> Domains => [.. _domains.Values];

    /// <summary>The machine's RAM, in place as long as this is.</summary>
    internal MachineFrames* MachineFrames => (MachineFrames*)Marshal.UnsafeAddrOfPinnedArrayElement(_machineFrames, 0);

    /// <summary>A bit for each number below <see cref="DomainId.FirstReserved"/>, set where there is a domain; in place as long as this is.</summary>
    internal ulong* Known => (ulong*)Marshal.UnsafeAddrOfPinnedArrayElement(_known, 0);

    /// <summary>
    /// Takes machine frames that no other domain has, for the VM of one that is about to be built: as on one machine, a frame's number then
    /// says whose it is.
    /// </summary>
    /// <param name="count">How many.</param>
    /// <returns>The first; its number is a multiple of 512.</returns>
    public Mfn TakeFrames(ulong count)
    {
        lock (_lock)
        {
            ulong first = FirstFrame;
            foreach ((ulong start, ulong frames) in _frames)
            {
                if (first + count <= start)
                    break;
                first = (start + frames + FrameAlignment - 1) & ~(FrameAlignment - 1);
            }

            _frames.Add(first, count);
            _machineFrames[0].First = FirstFrame;
            Volatile.Write(ref _machineFrames[0].End, Math.Max(_machineFrames[0].End, first + count));
            return new Mfn(first);
        }
    }

    /// <summary>Ends <see cref="TakeFrames"/>: their VM is gone.</summary>
    public void ReturnFrames(Mfn first)
    {
        lock (_lock)
            _ = _frames.Remove(first.Value);
    }

    /// <summary>Counts a frame that a domain shows of another's.</summary>
    /// <returns>False where there are as many as there may be.</returns>
    internal bool TryTakeWindowFrame()
    {
        if (Interlocked.Increment(ref _windowFrames) <= MaxWindowFrames)
            return true;
        ReturnWindowFrame();
        return false;
    }

    /// <summary>Ends <see cref="TryTakeWindowFrame"/>.</summary>
    internal void ReturnWindowFrame() => Interlocked.Decrement(ref _windowFrames);

    /// <summary>The domain of a number, one that is dying included (get_domain_by_id).</summary>
    internal Domain? Find(ushort id) => _domains.GetValueOrDefault(id);

    /// <summary>Takes a number for a domain that is about to be built.</summary>
    /// <param name="wanted">The number, 1..0x7fef; or 0 for the next free one above the last that was handed out.</param>
    /// <exception cref="DomainBuildException">It is taken, or none is free; or it is no domain's number.</exception>
    internal ushort Reserve(ushort wanted)
    {
        lock (_lock)
        {
            if (wanted >= DomainId.FirstReserved)
                throw new DomainBuildException($"{wanted} is no domain's number: use one from 1 to {DomainId.FirstReserved - 1}, or 0 for the next that is free.");
            if (wanted != 0)
                return _taken.Add(wanted) ? wanted : throw new DomainBuildException($"There is a domain {wanted} already.");
            for (int i = 0; i < DomainId.FirstReserved - 1; i++)
            {
                _last = _last + 1 == DomainId.FirstReserved ? (ushort)1 : (ushort)(_last + 1);
                if (_taken.Add(_last))
                    return _last;
            }

            throw new DomainBuildException("Every number that a domain can have is taken: destroy some.");
        }
    }

    /// <summary>Others can find the domain from here on.</summary>
    internal void Publish(Domain domain)
    {
        lock (_lock)
        {
            _domains[domain.Id.Value] = domain;
            _ = Interlocked.Or(ref _known[domain.Id.Value / BitsPerWord], 1UL << (domain.Id.Value % BitsPerWord));
        }
    }

    /// <summary>The domain is gone, or was never built; its number is free.</summary>
    internal void Remove(ushort id)
    {
        lock (_lock)
        {
            _ = Interlocked.And(ref _known[id / BitsPerWord], ~(1UL << (id % BitsPerWord)));
            _ = _domains.TryRemove(id, out _);
            _ = _taken.Remove(id);
        }
    }
}
