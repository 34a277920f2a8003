// The pseudo-physical memory of a domain, as its own p2m list says.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Migration;

/// <summary>
/// The p2m list of a domain whose vCPUs are at rest, found through shared_info: as a linear list in the kernel's address space (p2m_cr3 and
/// p2m_vaddr), or as the older tree of frame lists (pfn_to_mfn_frame_list_list). All of it is the guest's own word: nothing is followed that
/// is not a frame of the domain's, and an entry counts only where the M2P table says the same.
/// </summary>
internal sealed unsafe class GuestP2M
{
    private readonly DomainContext* _domain;
    private readonly FrameTable* _frames;
    private readonly ulong[] _pages;

    private GuestP2M(DomainContext* domain, ulong lastPfn, ulong[] pages)
    {
        _domain = domain;
        _frames = FrameTable.Of(domain);
        LastPfn = lastPfn;
        _pages = pages;
    }

    /// <summary>The last pfn that the list has an entry for.</summary>
    public ulong LastPfn { get; }

    /// <summary>Machine frames that hold the list, in its order; some may come more than once.</summary>
    public ReadOnlySpan<ulong> Pages => _pages;

    /// <summary>Finds a domain's list.</summary>
    /// <exception cref="MigrationException">The guest has none, or what it says of it leads nowhere.</exception>
    public static GuestP2M Find(DomainContext* domain)
    {
        byte* shared = domain->SharedInfo;
        ulong count = *(ulong*)(shared + SharedInfoLayout.MaxPfn);
        ulong cr3 = *(ulong*)(shared + SharedInfoLayout.P2MCr3);
        ulong list = *(ulong*)(shared + SharedInfoLayout.FrameListList);
        if (count == 0 || (cr3 == 0 && list is 0 or ulong.MaxValue))
        {
            throw new MigrationException(
                "The guest's kernel has not said where its p2m list is: it is not far enough in its boot, or cannot be saved at all.");
        }

        ulong pages = ((count - 1) / MigrationFormat.P2MEntriesPerPage) + 1;
        if (pages > MigrationFormat.MaxP2MPages)
            throw Astray($"says that its p2m list has {count} entries, which is more than can be saved");
        ulong[] frames = new ulong[pages];
        if (cr3 != 0)
            FollowTables(domain, new Mfn(cr3 >> Paging.PageShift), *(ulong*)(shared + SharedInfoLayout.P2MAddress), frames);
        else
            FollowTree(domain, new Mfn(list), frames);
        return new GuestP2M(domain, count - 1, frames);
    }

    /// <summary>The frame behind a pfn.</summary>
    /// <returns>False where there is none that is the domain's own.</returns>
    public bool TryFind(ulong pfn, out Mfn frame)
    {
        frame = default;
        if (pfn > LastPfn)
            return false;
        var page = (ulong*)_domain->Memory.Page(new Mfn(_pages[pfn / MigrationFormat.P2MEntriesPerPage]));
        frame = new Mfn(Volatile.Read(ref page[pfn % MigrationFormat.P2MEntriesPerPage]));
        return IsOwn(_domain, frame) && _domain->MachineToPhys[_domain->Memory.IndexOf(frame)] == pfn;
    }

    /// <summary>The pfn of a frame that both tables agree on.</summary>
    public bool TryFindPfn(Mfn frame, out ulong pfn)
    {
        pfn = 0;
        if (!_domain->Memory.Contains(frame))
            return false;
        pfn = _domain->MachineToPhys[_domain->Memory.IndexOf(frame)];
        return TryFind(pfn, out Mfn found) && found == frame;
    }

    /// <summary>What a frame is, as an image tells it.</summary>
    public PageInfoType TypeOf(Mfn frame)
    {
        FrameType state = _frames->Find(frame)->State;

        // One that was left in the middle of being checked has machine frames in it like any other.
        if (state.Count == 0 || !state.IsPageTable)
            return PageInfoType.Normal;
        return (PageInfoType)(byte)state.Type | (state.Has(FrameFlags.Pinned) ? PageInfoType.Pinned : 0);
    }

    /// <summary>Whether a frame is memory of the domain's own, not something that is only shared with it.</summary>
    internal static bool IsOwn(DomainContext* domain, Mfn frame)
    {
        FrameInfo* info = FrameTable.Of(domain)->Find(frame);
        return info != null && info->Owner == domain->State->Id && info->Has(FrameFlags.Allocated) && !info->Has(FrameFlags.Special);
    }

    private static MigrationException Astray(string how) => new($"The guest cannot be saved: its kernel {how}.");

    private static void FollowTables(DomainContext* domain, Mfn root, ulong start, ulong[] frames)
    {
        ulong bytes = (ulong)frames.Length << Paging.PageShift;
        if ((start & Paging.PageOffsetMask) != 0 || start + bytes < start || !new VirtualAddress(start).IsGuest
            || !new VirtualAddress(start + bytes - 1).IsGuest)
            throw Astray($"says that its p2m list is at {new VirtualAddress(start)}, which is no place for one");
        for (int i = 0; i < frames.Length; i++)
        {
            var address = new VirtualAddress(start + ((ulong)i << Paging.PageShift));
            Mfn table = root;
            for (int level = MigrationFormat.PageTableLevels; level > 0; level--)
            {
                if (!IsOwn(domain, table))
                    throw Astray($"has no memory of its own at {address}, where it says that its p2m list is");
                var entry = new PageTableEntry(Volatile.Read(ref *(ulong*)(domain->Memory.Table(table) + address.TableIndex(level))));
                if (!entry.IsPresent || entry.Has(PageFlags.LargePage))
                    throw Astray($"has nothing mapped at {address}, where it says that its p2m list is");
                table = entry.Frame;
            }

            frames[i] = Checked(domain, table).Value;
        }
    }

    private static void FollowTree(DomainContext* domain, Mfn top, ulong[] frames)
    {
        const int perPage = MigrationFormat.P2MEntriesPerPage;
        if (frames.Length > perPage * perPage)
            throw Astray("says that its p2m list is longer than the tree of it can be");
        for (int i = 0; i < frames.Length; i++)
        {
            Mfn middle = Entry(domain, top, i / perPage);
            frames[i] = Checked(domain, Entry(domain, middle, i % perPage)).Value;
        }
    }

    private static Mfn Entry(DomainContext* domain, Mfn list, int index)
        => new(Volatile.Read(ref ((ulong*)domain->Memory.Page(Checked(domain, list)))[index]));

    private static Mfn Checked(DomainContext* domain, Mfn frame)
        => IsOwn(domain, frame) ? frame : throw Astray($"says that its p2m list is in {frame}, which is no memory of its own");
}
