// GNTTABOP_map_grant_ref, GNTTABOP_unmap_grant_ref and GNTTABOP_unmap_and_replace.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>Maps what is granted to a domain, and unmaps it.</summary>
/// <remarks>
/// Each mapping of a page of the caller's own holds a reference, and a use as writable unless it is read-only; that of a page-table entry
/// belongs to the entry. A page of another domain's is mapped behind a frame of the caller's window (<see cref="GrantWindow"/>), where a
/// mapping holds a count in the same way, and the window holds the page.
/// </remarks>
internal static unsafe class GrantMap
{
    /// <summary>Mappings that are taken away before translations are dropped for all of them (GNTTAB_UNMAP_BATCH_SIZE).</summary>
    private const uint UnmapBatch = 32;

    /// <summary>What is left to be done for a mapping when nobody can reach the page by it any more.</summary>
    private struct Unmapped
    {
        public Mfn Frame;
        public uint Reference;

        /// <summary>The handle, where it is gone with the last of the mapping; else <see cref="GrantHandles.Invalid"/>.</summary>
        public uint Handle;

        /// <summary>The ways that are gone, and whether they were read-only; none for a request that did nothing.</summary>
        public GrantMapFlags Done;
    }

    public static long Map(Vcpu vcpu, in HypercallArguments arguments)
    {
        for (uint i = 0; i < (uint)arguments.A2; i++)
        {
            if (i != 0 && vcpu.Context->PreemptionDue)
                return GrantTableOp.Continue(vcpu, arguments, i, sizeof(MapGrantRef));
            ulong pointer = arguments.A1 + (i * (ulong)sizeof(MapGrantRef));
            if (!GuestAccess.Read(vcpu.Context, pointer, out MapGrantRef op))
                return -(long)Errno.EFAULT;
            op.Status = Map(vcpu, ref op);
            if (op.Status == GrantStatus.Restart)
                return GrantTableOp.Continue(vcpu, arguments, i, sizeof(MapGrantRef));
            if (!GuestAccess.Write(vcpu.Context, pointer, op))
                return -(long)Errno.EFAULT;
        }

        return 0;
    }

    public static long Unmap(Vcpu vcpu, in HypercallArguments arguments, bool replace)
    {
        Unmapped* unmapped = stackalloc Unmapped[(int)UnmapBatch];
        uint count = (uint)arguments.A2;
        for (uint done = 0; done < count;)
        {
            if (done != 0 && vcpu.Context->PreemptionDue)
                return GrantTableOp.Continue(vcpu, arguments, done, sizeof(UnmapGrantRef));
            uint batch = Math.Min(count - done, UnmapBatch);
            uint begun = 0;
            bool fault = false;
            for (; begun < batch && !fault; begun++)
            {
                ulong pointer = arguments.A1 + ((done + begun) * (ulong)sizeof(UnmapGrantRef));
                unmapped[begun] = new Unmapped { Handle = GrantHandles.Invalid };
                fault = !GuestAccess.Read(vcpu.Context, pointer, out UnmapGrantRef op)
                    || !GuestAccess.Write(vcpu.Context, pointer + UnmapGrantRef.StatusOffset, Unmap(vcpu, op, replace, ref unmapped[begun]));
            }

            GrantMapping.Flush(vcpu.Context);
            for (uint i = 0; i < begun; i++)
                LetGo(vcpu, unmapped[i]);
            vcpu.Domain.Window.Collect(vcpu.Context);
            for (uint i = 0; i < begun; i++)
                Complete(vcpu.Domain, unmapped[i]);
            if (fault)
                return -(long)Errno.EFAULT;
            done += batch;
        }

        return 0;
    }

    /// <summary>Ends the mappings of a domain that is going away (gnttab_release_mappings), but for what page-table entries hold.</summary>
    public static void ReleaseAll(Domain domain)
    {
        GrantHandles handles = domain.Grants.Handles;
        for (uint handle = 0; handle < handles.Limit; handle++)
        {
            ref GrantMappingInfo mapping = ref handles[handle];
            if (mapping.Flags == GrantMapFlags.None || mapping.Window == 0)
                continue;
            var unmapped = new Unmapped { Frame = domain.Context->Window.FirstFrame + (mapping.Window - 1), Reference = mapping.Reference, Handle = GrantHandles.Invalid, Done = mapping.Flags };
            mapping.Flags = GrantMapFlags.None;
            Complete(domain, unmapped);
        }
    }

    private static GrantStatus Map(Vcpu vcpu, ref MapGrantRef op)
    {
        bool readOnly = (op.Flags & GrantMapFlags.ReadOnly) != 0;
        uint increment = PinOf(op.Flags, readOnly);
        if (increment == 0)
            return GrantStatus.BadReference;
        if (vcpu.Domain.EnterGrants(op.Domain) is not { } granter)
            return vcpu.Domain.WhyNotEntered(op.Domain);
        GrantStatus status = Map(vcpu, ref op, granter, increment, readOnly);
        vcpu.Domain.LeaveGrants(granter);
        return status;
    }

    private static GrantStatus Map(Vcpu vcpu, ref MapGrantRef op, GrantTable granter, uint increment, bool readOnly)
    {
        GrantHandles handles = vcpu.Domain.Grants.Handles;
        uint handle = handles.Take(vcpu.Id);
        if (handle == GrantHandles.Invalid)
            return GrantStatus.NoSpace;
        Mfn frame;
        FrameInfo* info;
        GrantStatus status;
        Mfn window = default;
        bool isOwn = granter == vcpu.Domain.Grants;
        lock (granter.Lock)
            status = granter.AcquireForMap(op.Reference, vcpu.Domain.Id.Value, increment, readOnly, out frame, out info);
        if (status == GrantStatus.Okay)
        {
            if (info == null)
                info = granter.GetPage(frame);
            status = info == null ? GrantStatus.GeneralError
                : isOwn ? MapPage(vcpu, op, frame, info)
                : MapForeignPage(vcpu, op, granter, frame, out window);
            if (status != GrantStatus.Okay)
                granter.Release(op.Reference, increment, readOnly);
        }

        if (status != GrantStatus.Okay)
        {
            handles.Return(handle);
            return status;
        }

        ref GrantMappingInfo mapping = ref handles[handle];
        mapping.Domain = op.Domain;
        mapping.Reference = op.Reference;
        mapping.Window = isOwn ? 0 : (uint)vcpu.Context->Domain->Window.IndexOf(window) + 1;
        Thread.MemoryBarrier();
        mapping.Flags = (GrantMapFlags)(ushort)op.Flags;
        op.DeviceBusAddress = (isOwn ? frame : window).Address.Value;
        op.Handle = handle;
        return GrantStatus.Okay;
    }

    /// <summary>Makes a mapping of another domain's page, of which one reference was taken for it; that is dropped or taken over.</summary>
    private static GrantStatus MapForeignPage(Vcpu vcpu, in MapGrantRef op, GrantTable granter, Mfn frame, out Mfn window)
    {
        bool writable = (op.Flags & GrantMapFlags.ReadOnly) == 0;
        int ways = WaysOf(op.Flags);
        GrantStatus status = vcpu.Domain.Window.TryAdd(granter.Owner!, frame, writable, ways, out window);
        if (status != GrantStatus.Okay || (op.Flags & GrantMapFlags.Host) == 0 || GrantMapping.TryCreate(vcpu.Context, op.HostAddress, window, op.Flags))
            return status;
        vcpu.Domain.Window.Release(window, writable, ways);
        vcpu.Domain.Window.Collect(vcpu.Context);
        vcpu.Domain.Window.EndHandle(window);
        return GrantStatus.GeneralError;
    }

    /// <summary>Makes a mapping of a page, of which one reference was taken for it; on failure that is dropped.</summary>
    private static GrantStatus MapPage(Vcpu vcpu, in MapGrantRef op, Mfn frame, FrameInfo* info)
    {
        VcpuContext* context = vcpu.Context;
        FrameTable* frames = FrameTable.Of(context->Domain);
        bool forDevice = (op.Flags & GrantMapFlags.Device) != 0;
        bool forHost = (op.Flags & GrantMapFlags.Host) != 0;
        bool writable = (op.Flags & GrantMapFlags.ReadOnly) == 0;

        // The first reference is the device's, or the entry's.
        int references = 1;
        int uses = 0;
        Errno error = Errno.None;
        if (forDevice && writable && (error = PageTables.GetType(context, frame, info, PageType.Writable)) == Errno.None)
            uses++;
        if (forHost && error == Errno.None)
        {
            if (forDevice)
            {
                if (frames->GetPage(frame, vcpu.Domain.Id.Value) != null)
                    references++;
                else
                    error = Errno.EINVAL;
            }

            if (writable && error == Errno.None && (error = PageTables.GetType(context, frame, info, PageType.Writable)) == Errno.None)
                uses++;
            if (error == Errno.None && !GrantMapping.TryCreate(context, op.HostAddress, frame, op.Flags))
                error = Errno.EINVAL;
        }

        if (error == Errno.None)
            return GrantStatus.Okay;
        while (uses-- > 0)
            _ = PageTables.PutType(context, frame, info);
        while (references-- > 0)
            frames->PutPage(info);
        return error == Errno.ERESTART ? GrantStatus.Restart : GrantStatus.GeneralError;
    }

    private static int WaysOf(GrantMapFlags flags)
        => ((flags & GrantMapFlags.Device) != 0 ? 1 : 0) + ((flags & GrantMapFlags.Host) != 0 ? 1 : 0);

    private static uint PinOf(GrantMapFlags flags, bool readOnly)
        => ((flags & GrantMapFlags.Device) != 0 ? readOnly ? GrantPin.DeviceRead : GrantPin.DeviceWrite : 0)
            + ((flags & GrantMapFlags.Host) != 0 ? readOnly ? GrantPin.HostRead : GrantPin.HostWrite : 0);

    /// <summary>Takes a mapping away, or one of its two ways (unmap_common); the page stays held until <see cref="LetGo"/>.</summary>
    private static GrantStatus Unmap(Vcpu vcpu, in UnmapGrantRef op, bool replace, ref Unmapped unmapped)
    {
        GrantTable own = vcpu.Domain.Grants;
        GrantHandles handles = own.Handles;
        if (op.Handle >= handles.Limit)
            return GrantStatus.BadHandle;
        ref GrantMappingInfo mapping = ref handles[op.Handle];
        if (mapping.Flags == GrantMapFlags.None)
            return GrantStatus.BadHandle;
        ulong busAddress = replace ? 0 : op.DeviceBusAddress;
        ulong newAddress = replace ? op.NewAddress : 0;

        // Of two that unmap the same, only one does.
        lock (vcpu.Domain.Window.UnmapLock)
        {
            GrantMapFlags flags = mapping.Flags;
            if (flags == GrantMapFlags.None)
                return GrantStatus.BadHandle;
            unmapped.Reference = mapping.Reference;
            unmapped.Frame = mapping.Window == 0
                ? new Mfn(own[mapping.Reference].Frame)
                : vcpu.Context->Domain->Window.FirstFrame + (mapping.Window - 1);
            if (mapping.Window != 0 && !vcpu.Domain.StillKnows(vcpu.Domain.Window.GranterOf(unmapped.Frame)))
            {
                // Its page went with the domain: the guest has overwritten the entry that it was mapped by.
                vcpu.Domain.Crash(vcpu, $"The guest unmapped a grant of domain {mapping.Domain}, which is gone.");
                return GrantStatus.BadDomain;
            }

            bool forDevice = busAddress != 0 && (flags & GrantMapFlags.Device) != 0;
            if (forDevice && busAddress != unmapped.Frame.Address.Value)
                return GrantStatus.BadDeviceAddress;
            if (op.HostAddress != 0 && (flags & GrantMapFlags.Host) != 0)
            {
                if (!GrantMapping.TryReplace(vcpu.Context, op.HostAddress, unmapped.Frame, newAddress, flags))
                    return GrantStatus.GeneralError;
                mapping.Flags &= ~GrantMapFlags.Host;
                unmapped.Done |= GrantMapFlags.Host | (flags & GrantMapFlags.ReadOnly);
            }

            if (forDevice)
            {
                mapping.Flags &= ~GrantMapFlags.Device;
                unmapped.Done |= GrantMapFlags.Device | (flags & GrantMapFlags.ReadOnly);
            }

            if (WaysOf(mapping.Flags) == 0)
            {
                mapping.Flags = GrantMapFlags.None;
                unmapped.Handle = op.Handle;
            }
        }

        return GrantStatus.Okay;
    }

    /// <summary>Lets go of the page.</summary>
    private static void LetGo(Vcpu vcpu, in Unmapped unmapped)
    {
        bool readOnly = (unmapped.Done & GrantMapFlags.ReadOnly) != 0;
        FrameTable* frames = FrameTable.Of(vcpu.Context->Domain);
        FrameInfo* info = frames->Find(unmapped.Frame);
        for (int ways = WaysOf(unmapped.Done); ways > 0; ways--)
        {
            if (info == null)
            {
                vcpu.Domain.Window.Release(unmapped.Frame, !readOnly, 1);
                continue;
            }

            if (!readOnly)
                _ = PageTables.PutType(vcpu.Context, unmapped.Frame, info);
            frames->PutPage(info);
        }
    }

    /// <summary>Ends the use of the entry, and of the handle (unmap_common_complete): nobody can reach the page any more.</summary>
    private static void Complete(Domain domain, in Unmapped unmapped)
    {
        bool readOnly = (unmapped.Done & GrantMapFlags.ReadOnly) != 0;
        uint pin = PinOf(unmapped.Done, readOnly);
        Domain granter = domain.Context->Window.Contains(unmapped.Frame) ? domain.Window.GranterOf(unmapped.Frame) : domain;
        if (pin != 0 && granter == domain)
        {
            domain.Grants.Release(unmapped.Reference, pin, readOnly);
        }
        else if (pin != 0 && granter.Outside.TryEnter())
        {
            granter.Grants.Release(unmapped.Reference, pin, readOnly);
            granter.Outside.Exit();
        }

        if (unmapped.Handle == GrantHandles.Invalid)
            return;
        if (granter != domain)
            domain.Window.EndHandle(unmapped.Frame);
        domain.Grants.Handles.Return(unmapped.Handle);
    }
}
