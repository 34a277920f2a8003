// A domain's grant table: what it lets others do with its pages, and who does it.
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>How often an entry is in use, in four counts of 8 bits (GNTPIN_*).</summary>
internal static class GrantPin
{
    public const uint HostWrite = 1;
    public const uint HostRead = 1 << 8;
    public const uint DeviceWrite = 1 << 16;
    public const uint DeviceRead = 1 << 24;

    /// <summary>The counts of those who write.</summary>
    public const uint Writers = 0xff00ff;

    private const int OverflowShift = 7;

    /// <summary>Whether counting once more could overflow.</summary>
    public static bool IsFull(uint pin, uint increment) => (pin & (increment << OverflowShift)) != 0;
}

/// <summary>An entry that is in use (struct active_grant_entry): what it said when it was taken into use counts as long as it is.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct ActiveGrant
{
    /// <summary><see cref="GrantPin"/>; nothing else means anything while it is 0.</summary>
    public uint Pin;

    /// <summary>Who uses it.</summary>
    public ushort Domain;

    /// <summary>The part of the page that may be copied: its first byte and its length.</summary>
    public ushort Start;
    public ushort Length;
    public bool IsSubPage;

    /// <summary>Of a transitive entry: the one that it stands for.</summary>
    public ushort TransitiveDomain;
    public uint TransitiveReference;
    public ulong Frame;

    public readonly bool IsWritten => (Pin & GrantPin.Writers) != 0;
}

/// <summary>What a copy got by <see cref="GrantTable.AcquireForCopy"/>.</summary>
internal unsafe struct GrantedPage
{
    public Mfn Frame;

    /// <summary>Referenced for the copy.</summary>
    public FrameInfo* Info;

    /// <summary>First byte that may be copied, and how many.</summary>
    public ushort Start;
    public ushort Length;

    /// <summary>The table of the page's domain, which is another than the one that was asked where the entry was transitive.</summary>
    public GrantTable Table;

    /// <summary>The entry of <see cref="Table"/>.</summary>
    public uint Reference;

    /// <summary>Host address of the page.</summary>
    public readonly byte* Host => Table.Owner!.Context->Memory.Page(Frame);
}

/// <summary>
/// The table that is shared with its domain, of version 1 or 2, and what is in use of it. The guest changes entries as it likes: each is
/// looked at once, and taken into use by one atomic operation (version 1) or by a mark that the guest sees before the last look
/// (version 2).
/// </summary>
internal sealed unsafe class GrantTable : IDisposable
{
    /// <summary>Entries that are the toolstack's and survive a change of version (GNTTAB_NR_RESERVED_ENTRIES).</summary>
    public const uint ReservedEntries = 8;

    /// <summary>GNTTAB_RESERVED_CONSOLE.</summary>
    public const uint ConsoleReference = 0;

    /// <summary>GNTTAB_RESERVED_XENSTORE.</summary>
    public const uint XenstoreReference = 1;

    private const int Entries1PerFrame = 512;
    private const int Entries2PerFrame = 256;
    private const int StatusesPerFrame = 2048;

    /// <summary>Times that a guest may change an entry while it is being taken into use.</summary>
    private const int MaxRetries = 5;

    private readonly DomainContext* _domain;
    private readonly ulong* _frames;
    private readonly ulong* _statusFrames;
    private readonly byte** _shared;
    private readonly ushort** _statuses;
    private readonly ActiveGrant* _active;
    private readonly nuint _activeSize;
    private readonly byte* _ownPage;

    /// <summary>A table without frames, for a domain.</summary>
    public GrantTable(Domain owner, int vcpus, GrantLimits limits)
    {
        Owner = owner;
        _domain = owner.Context;
        Id = owner.Id.Value;
        (MaxFrames, MaxVersion) = (limits.Frames, limits.Version);
        Handles = new GrantHandles(vcpus, limits.HandlePages);
        nuint frames = (nuint)MaxFrames;
        nuint statusFrames = (nuint)StatusFramesFor(MaxFrames);
        _activeSize = frames * Entries1PerFrame * (nuint)sizeof(ActiveGrant);
        _active = (ActiveGrant*)HostPages.Allocate(_activeSize);
        _frames = (ulong*)NativeMemory.AllocZeroed(frames, sizeof(ulong));
        _statusFrames = (ulong*)NativeMemory.AllocZeroed(statusFrames, sizeof(ulong));
        _shared = (byte**)NativeMemory.AllocZeroed(frames, (nuint)sizeof(byte*));
        _statuses = (ushort**)NativeMemory.AllocZeroed(statusFrames, (nuint)sizeof(ushort*));
    }

    /// <summary>The table of the manager, which is domain 0 to its guests: it has one frame, and grants nothing.</summary>
    public GrantTable()
    {
        Handles = new GrantHandles(1, 0);
        _activeSize = Entries1PerFrame * (nuint)sizeof(ActiveGrant);
        _active = (ActiveGrant*)HostPages.Allocate(_activeSize);
        _ownPage = (byte*)NativeMemory.AllocZeroed((nuint)Paging.PageSize);
        _shared = (byte**)NativeMemory.AllocZeroed(1, (nuint)sizeof(byte*));
        _shared[0] = _ownPage;
        FrameCount = 1;
    }

    /// <summary>The domain's id.</summary>
    public ushort Id { get; }

    /// <summary>The domain; null for the manager.</summary>
    public Domain? Owner { get; }

    /// <summary>Held while the table changes, and while an entry is taken into use or let go.</summary>
    public Lock Lock { get; } = new();

    /// <summary>Frames that it may have.</summary>
    public int MaxFrames { get; } = 1;

    /// <summary>The latest version that the guest may choose.</summary>
    public int MaxVersion { get; } = 1;

    /// <summary>1 or 2.</summary>
    public int Version { get; private set; } = 1;

    /// <summary>Frames that it has.</summary>
    public int FrameCount { get; private set; }

    /// <summary>Frames with the states of entries of version 2.</summary>
    public int StatusFrameCount { get; private set; }

    /// <summary>The most that <see cref="StatusFrameCount"/> can be.</summary>
    public int StatusFrameLimit => StatusFramesFor(MaxFrames);

    /// <summary>What the domain has mapped.</summary>
    public GrantHandles Handles { get; }

    /// <summary>Entries that the guest can use: those below this.</summary>
    public uint EntryCount => (uint)(FrameCount * (Version == 1 ? Entries1PerFrame : Entries2PerFrame));

    public ref ActiveGrant this[uint reference] => ref _active[reference];

    public Mfn Frame(int index) => new(_frames[index]);

    public Mfn StatusFrame(int index) => new(_statusFrames[index]);

    public GrantEntry1* Entry1(uint reference) => (GrantEntry1*)_shared[reference / Entries1PerFrame] + (reference % Entries1PerFrame);

    public GrantEntry2* Entry2(uint reference) => (GrantEntry2*)_shared[reference / Entries2PerFrame] + (reference % Entries2PerFrame);

    /// <summary>The domain's own frame of this number, referenced (get_paged_frame).</summary>
    /// <returns>Null where it has none.</returns>
    public FrameInfo* GetPage(Mfn frame) => _domain == null ? null : FrameTable.Of(_domain)->GetPage(frame, Id);

    /// <summary>Drops what <see cref="GetPage"/> took.</summary>
    public void PutPage(FrameInfo* info) => FrameTable.Of(_domain)->PutPage(info);

    /// <inheritdoc cref="PutPage(FrameInfo*)"/>
    public void PutPage(Mfn frame) => PutPage(FrameTable.Of(_domain)->Find(frame));

    /// <summary>Makes a page of <see cref="GetPage"/>'s writable to one that is not its domain (<see cref="OutsideAccess.GetWritable"/>).</summary>
    public Errno GetWritable(Mfn frame) => OutsideAccess.GetWritable(_domain, Owner!.Outside.Machine, frame);

    /// <summary>Ends <see cref="GetWritable"/>, or a use as writable of the domain's own.</summary>
    public void PutWritable(Mfn frame) => OutsideAccess.PutWritable(_domain, frame);

    /// <summary>Adds frames until there are as many (gnttab_grow_table), and the frames of states that go with them.</summary>
    /// <param name="vcpu">A vCPU of the domain, on whose thread this is.</param>
    /// <param name="count">1 to <see cref="MaxFrames"/>.</param>
    /// <returns>ENOMEM, and there is none more; or ERESTART, when what was added stays.</returns>
    public Errno Grow(VcpuContext* vcpu, int count)
    {
        int before = FrameCount;
        int statusBefore = StatusFrameCount;
        Errno error = Version == 1 ? Errno.None : GrowStatus(vcpu, Math.Max(count, FrameCount));
        for (int i = FrameCount; i < count && error == Errno.None; i++)
        {
            error = SharedFrames.Share(vcpu, out Mfn frame);
            if (error != Errno.None)
                break;
            _frames[i] = frame.Value;
            _shared[i] = _domain->Memory.Page(frame);
            FrameCount = i + 1;
        }

        if (error == Errno.ENOMEM)
        {
            if (SharedFrames.TryUnshare(_domain, _frames + before, FrameCount - before))
                FrameCount = before;
            if (SharedFrames.TryUnshare(_domain, _statusFrames + statusBefore, StatusFrameCount - statusBefore))
                StatusFrameCount = statusBefore;
        }

        return error;
    }

    /// <summary>Writes one of the toolstack's entries, by which the manager has a page of the domain's mapped from the start.</summary>
    /// <param name="reference">Below <see cref="ReservedEntries"/>.</param>
    /// <param name="frame">The page, which is held writable for it.</param>
    public void Seed(uint reference, Mfn frame)
    {
        *Entry1(reference) = new GrantEntry1
        {
            Header = new GrantHeader(GrantFlags.PermitAccess | GrantFlags.Reading | GrantFlags.Writing, 0),
            Frame = (uint)frame.Value,
        };
        _active[reference] = new ActiveGrant { Pin = GrantPin.HostWrite, Length = (ushort)Paging.PageSize, Frame = frame.Value };
    }

    /// <summary>GNTTABOP_set_version, with a version that there is.</summary>
    public Errno SetVersion(VcpuContext* vcpu, int version)
    {
        if (version == Version)
            return Errno.None;
        for (uint i = 0; i < EntryCount; i++)
        {
            // The toolstack's stay mapped; but a part of a page is nothing that version 1 could tell of.
            if (Volatile.Read(in _active[i].Pin) != 0 && (i >= ReservedEntries || _active[i].IsSubPage))
                return Errno.EBUSY;
        }

        GrantEntry2* kept = stackalloc GrantEntry2[(int)ReservedEntries];
        Errno error = version == 2 ? GrowStatus(vcpu, FrameCount) : CheckRepresentable();
        if (error != Errno.None)
            return error;
        for (uint i = 0; i < ReservedEntries; i++)
            kept[i] = Version == 1 ? FromEntry1(i) : FromEntry2(i);
        if (version == 1)
        {
            if (!SharedFrames.TryUnshare(_domain, _statusFrames, StatusFrameCount))
                return Errno.EBUSY;
            StatusFrameCount = 0;
        }

        for (int i = 0; i < FrameCount; i++)
            NativeMemory.Clear(_shared[i], (nuint)Paging.PageSize);
        Version = version;
        for (uint i = 0; i < ReservedEntries; i++)
            Restore(i, kept[i]);
        return Errno.None;
    }

    /// <summary>
    /// Takes an entry into use for a mapping, or once more (the first half of map_grant_ref). Under <see cref="Lock"/>.
    /// </summary>
    /// <param name="reference">The entry.</param>
    /// <param name="domain">Who maps it.</param>
    /// <param name="increment">What the mapping counts as.</param>
    /// <param name="readOnly">Whether it is read-only.</param>
    /// <param name="frame">The frame.</param>
    /// <param name="info">The frame, referenced; null where that is still to be done.</param>
    public GrantStatus AcquireForMap(uint reference, ushort domain, uint increment, bool readOnly, out Mfn frame, out FrameInfo* info)
    {
        frame = default;
        info = null;
        if (reference >= EntryCount)
            return GrantStatus.BadReference;
        ref ActiveGrant active = ref _active[reference];
        if (active.Pin != 0 && (active.Domain != domain || GrantPin.IsFull(active.Pin, increment) || active.IsSubPage))
            return GrantStatus.GeneralError;
        if (active.Pin == 0 || (!readOnly && !active.IsWritten))
        {
            GrantStatus status = SetStatus(reference, readOnly, mapping: true, domain);
            if (status != GrantStatus.Okay)
                return status;
        }

        if (active.Pin == 0)
        {
            var granted = new Mfn(Version == 1 ? Volatile.Read(ref Entry1(reference)->Frame) : Volatile.Read(ref Entry2(reference)->Frame));
            info = GetPage(granted);
            if (info == null)
            {
                ReduceStatus(reference, readOnly);
                return GrantStatus.BadPage;
            }

            active = new ActiveGrant { Domain = domain, Length = (ushort)Paging.PageSize, Frame = granted.Value };
        }

        active.Pin += increment;
        frame = new Mfn(active.Frame);
        return GrantStatus.Okay;
    }

    /// <summary>Takes an entry into use for a copy (acquire_grant_for_copy).</summary>
    /// <param name="reference">The entry.</param>
    /// <param name="domain">Who copies.</param>
    /// <param name="readOnly">From it, not to it.</param>
    /// <param name="directory">Knows the tables of others, for an entry that refers to one; null where that is not allowed any more.</param>
    /// <param name="page">What may be copied, to be given back by <see cref="ReleaseCopy"/>.</param>
    public GrantStatus AcquireForCopy(uint reference, ushort domain, bool readOnly, Domain? directory, out GrantedPage page)
    {
        page = new GrantedPage { Table = this, Reference = reference };
        uint increment = readOnly ? GrantPin.HostRead : GrantPin.HostWrite;
        uint pin;
        ushort transitiveDomain;
        uint transitiveReference;
        lock (Lock)
        {
            if (reference >= EntryCount)
                return GrantStatus.BadReference;
            ref ActiveGrant active = ref _active[reference];
            pin = active.Pin;
            if (pin != 0 && (active.Domain != domain || GrantPin.IsFull(pin, increment)))
                return GrantStatus.GeneralError;
            bool transitive = Version == 2 && ReadHeader(reference).Type == GrantFlags.Transitive;
            bool isNew = pin == 0 || (!readOnly && !active.IsWritten);
            if (isNew && SetStatus(reference, readOnly, mapping: false, domain) is var refusal && refusal != GrantStatus.Okay)
                return refusal;
            if (!transitive)
            {
                GrantStatus status = isNew ? Open(reference, domain, ref active, ref page) : OpenAgain(active, ref page);
                if (status != GrantStatus.Okay)
                {
                    ReduceStatus(reference, readOnly);
                    return status;
                }

                active.Pin += increment;
                page.Frame = new Mfn(active.Frame);
                page.Start = active.Start;
                page.Length = active.Length;
                return GrantStatus.Okay;
            }

            GrantEntry2* entry = Entry2(reference);
            transitiveDomain = Volatile.Read(ref entry->TransitiveDomain);
            transitiveReference = Volatile.Read(ref entry->TransitiveReference);
        }

        // The other table has a lock of its own, of which no two are held.
        GrantTable? other = transitiveDomain == Id ? null : directory?.EnterGrants(transitiveDomain);
        bool acquiredInVain;
        GrantStatus found = other != null ? other.AcquireForCopy(transitiveReference, Id, readOnly, null, out page)
            : transitiveDomain != Id && directory?.WhyNotEntered(transitiveDomain) == GrantStatus.BadPage ? GrantStatus.BadPage
            : GrantStatus.GeneralError;
        lock (Lock)
        {
            ref ActiveGrant active = ref _active[reference];
            bool acquired = found == GrantStatus.Okay;
            bool changed = Version != 2 || active.Pin != pin;

            // Xen would have the caller try again in the second case too, and again, for as long as the entry is in use as something else.
            if (acquired && changed)
                found = GrantStatus.Restart;
            else if (acquired && pin != 0 && !IsSame(active, domain, transitiveDomain, page))
                found = GrantStatus.GeneralError;
            if (found == GrantStatus.Okay)
            {
                // Whatever the other entry allows, this one cannot be mapped, as those of parts of pages.
                if (pin == 0)
                {
                    active = new ActiveGrant
                    {
                        Domain = domain,
                        Start = page.Start,
                        Length = page.Length,
                        IsSubPage = true,
                        TransitiveDomain = transitiveDomain,
                        TransitiveReference = page.Reference,
                        Frame = page.Frame.Value,
                    };
                }

                active.Pin += increment;
                return GrantStatus.Okay;
            }

            acquiredInVain = acquired;
            ReduceStatus(reference, readOnly);
        }

        if (acquiredInVain)
            other!.ReleaseCopy(transitiveReference, readOnly, page, null);
        directory?.LeaveGrants(other);
        return found;
    }

    /// <summary>Ends what <see cref="AcquireForCopy"/> began, with the same arguments.</summary>
    public void ReleaseCopy(uint reference, bool readOnly, in GrantedPage page, Domain? directory)
    {
        uint decrement = readOnly ? GrantPin.HostRead : GrantPin.HostWrite;
        Release(reference, decrement, readOnly);
        GrantTable table = page.Table;
        if (table != this)
            table.Release(page.Reference, decrement, readOnly);
        table.PutPage(page.Info);
        if (table != this)
            directory!.LeaveGrants(table);
    }

    /// <summary>Ends a use of an entry.</summary>
    public void Release(uint reference, uint decrement, bool readOnly) => Release(new ReadOnlySpan<uint>(in reference), decrement, readOnly);

    /// <summary>Ends uses of entries, all of the same kind.</summary>
    public void Release(ReadOnlySpan<uint> references, uint decrement, bool readOnly)
    {
        lock (Lock)
        {
            foreach (uint reference in references)
            {
                _active[reference].Pin -= decrement;
                ReduceStatus(reference, readOnly);
            }
        }
    }

    /// <summary>Commits an entry to the transfer that it waits for (gnttab_prepare_for_transfer). Under <see cref="Lock"/>.</summary>
    /// <returns>False where it waits for none from that domain.</returns>
    public bool TryCommitTransfer(uint reference, ushort domain)
    {
        if (reference >= EntryCount)
            return false;
        uint* header = HeaderOf(reference);
        GrantHeader seen = ReadHeader(reference);
        for (int i = 0; i < MaxRetries; i++)
        {
            if (seen.Flags != GrantFlags.AcceptTransfer || seen.Domain != domain)
                return false;
            uint found = Interlocked.CompareExchange(ref *header, seen.With(GrantFlags.TransferCommitted).Value, seen.Value);
            if (found == seen.Value)
                return true;
            seen = new GrantHeader(found);
        }

        return false;
    }

    /// <summary>Tells the domain of the frame that came to it. Under <see cref="Lock"/>.</summary>
    /// <returns>The pfn that it gave for it.</returns>
    public Pfn CompleteTransfer(uint reference, Mfn frame)
    {
        ulong pfn;
        if (Version == 1)
        {
            pfn = Entry1(reference)->Frame;
            Volatile.Write(ref Entry1(reference)->Frame, (uint)frame.Value);
        }
        else
        {
            pfn = Entry2(reference)->Frame;
            Volatile.Write(ref Entry2(reference)->Frame, frame.Value);
        }

        _ = Interlocked.Or(ref *HeaderOf(reference), (uint)GrantFlags.TransferCompleted);
        return new Pfn(pfn);
    }

    /// <summary>Lets two entries that are not in use change places (swap_grant_ref).</summary>
    public GrantStatus Swap(uint first, uint second)
    {
        lock (Lock)
        {
            if (first >= EntryCount || second >= EntryCount)
                return GrantStatus.BadReference;
            if (first == second)
                return GrantStatus.Okay;
            if (_active[first].Pin != 0 || _active[second].Pin != 0)
                return GrantStatus.Again;
            if (Version == 1)
            {
                (*Entry1(first), *Entry1(second)) = (*Entry1(second), *Entry1(first));
            }
            else
            {
                (*Entry2(first), *Entry2(second)) = (*Entry2(second), *Entry2(first));
                (*StatusOf(first), *StatusOf(second)) = (*StatusOf(second), *StatusOf(first));
            }

            return GrantStatus.Okay;
        }
    }

    /// <summary>
    /// Frames that the table holds writable, and those that it only refers to, for the audit of frames: its own, and what is mapped for
    /// devices; what is mapped by page-table entries is held by those.
    /// </summary>
    public void AddHeld(List<ulong> writable, List<ulong> referenced)
    {
        for (int i = 0; i < FrameCount; i++)
            writable.Add(_frames[i]);
        for (int i = 0; i < StatusFrameCount; i++)
            writable.Add(_statusFrames[i]);
        for (uint handle = 0; handle < Handles.Limit; handle++)
        {
            ref GrantMappingInfo mapping = ref Handles[handle];
            if ((mapping.Flags & GrantMapFlags.Device) == 0)
                continue;
            ulong frame = mapping.Window != 0 ? _domain->Window.FirstFrame.Value + mapping.Window - 1 : _active[mapping.Reference].Frame;
            ((mapping.Flags & GrantMapFlags.ReadOnly) != 0 ? referenced : writable).Add(frame);
        }
    }

    public void Dispose()
    {
        Handles.Dispose();
        HostPages.Free(_active, _activeSize);
        NativeMemory.Free(_frames);
        NativeMemory.Free(_statusFrames);
        NativeMemory.Free(_shared);
        NativeMemory.Free(_statuses);
        NativeMemory.Free(_ownPage);
    }

    private static int StatusFramesFor(int frames) => ((frames * Entries2PerFrame) + StatusesPerFrame - 1) / StatusesPerFrame;

    /// <summary>Whether more frames, of either kind, are needed for a table of so many (as gnttab_setup_table asks).</summary>
    public bool MustGrow(int frames) => frames > FrameCount || (Version > 1 && StatusFramesFor(frames) > StatusFrameCount);

    private Errno GrowStatus(VcpuContext* vcpu, int frames)
    {
        for (int i = StatusFrameCount; i < StatusFramesFor(frames); i++)
        {
            Errno error = SharedFrames.Share(vcpu, out Mfn frame);
            if (error != Errno.None)
                return error;
            _statusFrames[i] = frame.Value;
            _statuses[i] = (ushort*)_domain->Memory.Page(frame);
            StatusFrameCount = i + 1;
        }

        return Errno.None;
    }

    private Errno CheckRepresentable()
    {
        for (uint i = 0; i < ReservedEntries; i++)
        {
            GrantFlags type = ReadHeader(i).Type;
            if (type == GrantFlags.Transitive || (type == GrantFlags.PermitAccess && Entry2(i)->Frame >> 32 != 0))
                return Errno.ERANGE;
        }

        return Errno.None;
    }

    /// <summary>An entry with its state among its flags.</summary>
    private GrantEntry2 FromEntry1(uint reference)
        => new() { Header = ReadHeader(reference), Frame = Entry1(reference)->Frame };

    private GrantEntry2 FromEntry2(uint reference)
    {
        GrantHeader header = ReadHeader(reference);
        return header.Type == GrantFlags.PermitAccess
            ? new GrantEntry2 { Header = header.With((GrantFlags)(*StatusOf(reference))), Frame = Entry2(reference)->Frame }
            : default;
    }

    private void Restore(uint reference, in GrantEntry2 entry)
    {
        const GrantFlags state = GrantFlags.Reading | GrantFlags.Writing;
        if (Version == 1)
        {
            *Entry1(reference) = new GrantEntry1 { Header = entry.Header, Frame = (uint)entry.Frame };
            return;
        }

        *StatusOf(reference) = (ushort)(entry.Header.Flags & state);
        *Entry2(reference) = new GrantEntry2 { Header = new GrantHeader(entry.Header.Flags & ~state, entry.Header.Domain), Frame = entry.Frame };
    }

    private uint* HeaderOf(uint reference) => Version == 1 ? (uint*)Entry1(reference) : (uint*)Entry2(reference);

    private GrantHeader ReadHeader(uint reference) => new(Volatile.Read(ref *HeaderOf(reference)));

    /// <summary>The state of an entry of version 2.</summary>
    private ushort* StatusOf(uint reference) => _statuses[reference / StatusesPerFrame] + (reference % StatusesPerFrame);

    private GrantStatus SetStatus(uint reference, bool readOnly, bool mapping, ushort domain)
        => Version == 1 ? SetStatus1(reference, readOnly, mapping, domain) : SetStatus2(reference, readOnly, mapping, domain);

    /// <summary>Marks an entry as being read or written, if it permits that: both in one.</summary>
    private GrantStatus SetStatus1(uint reference, bool readOnly, bool mapping, ushort domain)
    {
        uint* header = HeaderOf(reference);
        GrantHeader seen = ReadHeader(reference);
        for (int i = 0; i < MaxRetries; i++)
        {
            if (_active[reference].Pin == 0 && !Permits(seen, mapping, transitive: false, domain))
                return GrantStatus.GeneralError;
            if (!readOnly && (seen.Flags & GrantFlags.ReadOnly) != 0)
                return GrantStatus.GeneralError;
            GrantHeader marked = seen.With(readOnly ? GrantFlags.Reading : GrantFlags.Reading | GrantFlags.Writing);
            uint found = Interlocked.CompareExchange(ref *header, marked.Value, seen.Value);
            if (found == seen.Value)
                return GrantStatus.Okay;
            seen = new GrantHeader(found);
        }

        return GrantStatus.GeneralError;
    }

    /// <summary>Marks the state of an entry, and looks whether it still permits what it did before the mark could be seen.</summary>
    private GrantStatus SetStatus2(uint reference, bool readOnly, bool mapping, ushort domain)
    {
        bool unused = _active[reference].Pin == 0;
        GrantHeader seen = ReadHeader(reference);
        if (unused && !Permits(seen, mapping, transitive: !mapping, domain))
            return GrantStatus.GeneralError;
        if (!readOnly && (seen.Flags & GrantFlags.ReadOnly) != 0)
            return GrantStatus.GeneralError;
        MarkStatus(reference, readOnly ? GrantFlags.Reading : GrantFlags.Reading | GrantFlags.Writing);
        seen = ReadHeader(reference);
        bool isReadOnly = (seen.Flags & GrantFlags.ReadOnly) != 0;
        if (unused ? Permits(seen, mapping, transitive: !mapping, domain) && (readOnly || !isReadOnly) : !isReadOnly)
            return GrantStatus.Okay;
        ClearStatus(reference, unused ? GrantFlags.Reading | GrantFlags.Writing : GrantFlags.Writing);
        return GrantStatus.GeneralError;
    }

    private static bool Permits(GrantHeader header, bool mapping, bool transitive, ushort domain)
    {
        // A part of a page cannot be mapped.
        GrantFlags type = header.Flags & (mapping ? GrantFlags.TypeMask | GrantFlags.SubPage : GrantFlags.TypeMask);
        return (type == GrantFlags.PermitAccess || (transitive && type == GrantFlags.Transitive)) && header.Domain == domain;
    }

    /// <summary>The state goes back to what is still in use of the entry (reduce_status_for_pin).</summary>
    private void ReduceStatus(uint reference, bool readOnly)
    {
        // Of the toolstack's, one may be left behind by a change of version; the rest cannot be in use then.
        if (reference >= EntryCount)
            return;
        ref ActiveGrant active = ref _active[reference];
        GrantFlags clear = active.Pin == 0 ? GrantFlags.Reading : GrantFlags.Invalid;
        if (!readOnly && !active.IsWritten)
            clear |= GrantFlags.Writing;
        ClearStatus(reference, clear);
    }

    private void MarkStatus(uint reference, GrantFlags flags) => Interlocked.Or(ref *StatusWord(reference, out int shift), (uint)flags << shift);

    private void ClearStatus(uint reference, GrantFlags flags)
        => Interlocked.And(ref *StatusWord(reference, out int shift), ~((uint)flags << shift));

    /// <summary>The aligned 32 bits in which the state of an entry is, and where in them.</summary>
    private uint* StatusWord(uint reference, out int shift)
    {
        if (Version == 1)
        {
            shift = 0;
            return HeaderOf(reference);
        }

        ushort* status = StatusOf(reference);
        shift = ((nint)status & 2) != 0 ? 16 : 0;
        return (uint*)((nint)status & ~(nint)3);
    }

    /// <summary>Takes up what an entry that is not in use says, or not in use for writing.</summary>
    private GrantStatus Open(uint reference, ushort domain, ref ActiveGrant active, ref GrantedPage page)
    {
        var opened = new ActiveGrant { Domain = domain, Length = (ushort)Paging.PageSize };
        if (Version == 1)
        {
            opened.Frame = Volatile.Read(ref Entry1(reference)->Frame);
        }
        else
        {
            GrantEntry2* entry = Entry2(reference);
            opened.Frame = Volatile.Read(ref entry->Frame);
            if ((ReadHeader(reference).Flags & GrantFlags.SubPage) != 0)
            {
                opened.IsSubPage = true;
                opened.Start = Volatile.Read(ref entry->PageOffset);
                opened.Length = Volatile.Read(ref entry->Length);
            }
        }

        // What was said when it was first used counts.
        if (active.Pin != 0)
            opened.Frame = active.Frame;
        page.Info = GetPage(new Mfn(opened.Frame));
        if (page.Info == null)
            return GrantStatus.BadPage;
        if (active.Pin == 0)
            active = opened;
        return GrantStatus.Okay;
    }

    /// <summary>An entry that is in use already, and is to be so once more.</summary>
    private GrantStatus OpenAgain(in ActiveGrant active, ref GrantedPage page)
    {
        page.Info = GetPage(new Mfn(active.Frame));
        return page.Info == null ? GrantStatus.BadDomain : GrantStatus.Okay;
    }

    private static bool IsSame(in ActiveGrant active, ushort domain, ushort transitiveDomain, in GrantedPage page)
        => active.IsSubPage && active.Domain == domain && active.Frame == page.Frame.Value && active.Start == page.Start
            && active.Length == page.Length && active.TransitiveDomain == transitiveDomain && active.TransitiveReference == page.Reference;
}
