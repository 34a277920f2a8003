// GNTTABOP_map_grant_ref, GNTTABOP_unmap_grant_ref and GNTTABOP_unmap_and_replace.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>Maps what is granted to a domain, and unmaps it.</summary>
/// <remarks>
/// A page comes from the caller's own memory: the other tables that there are grant nothing. Each mapping holds a reference, and a use as
/// writable unless it is read-only; that of a page-table entry belongs to the entry.
/// </remarks>
internal static unsafe class GrantMap
{
    /// <summary>Mappings that are taken away before translations are dropped for all of them (GNTTAB_UNMAP_BATCH_SIZE).</summary>
    private const uint UnmapBatch = 32;

    /// <summary>What is left to be done for a mapping when nobody can reach the page by it any more.</summary>
    private struct Unmapped
    {
        public Mfn Frame;
        public ushort Domain;
        public uint Reference;

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
                unmapped[begun] = default;
                fault = !GuestAccess.Read(vcpu.Context, pointer, out UnmapGrantRef op)
                    || !GuestAccess.Write(vcpu.Context, pointer + UnmapGrantRef.StatusOffset, Unmap(vcpu, op, replace, ref unmapped[begun]));
            }

            GrantMapping.Flush(vcpu.Context);
            for (uint i = 0; i < begun; i++)
                Complete(vcpu, unmapped[i]);
            if (fault)
                return -(long)Errno.EFAULT;
            done += batch;
        }

        return 0;
    }

    private static GrantStatus Map(Vcpu vcpu, ref MapGrantRef op)
    {
        bool readOnly = (op.Flags & GrantMapFlags.ReadOnly) != 0;
        uint increment = PinOf(op.Flags, readOnly);
        if (increment == 0)
            return GrantStatus.BadReference;
        if (vcpu.Domain.FindGrants(op.Domain) is not { } granter)
            return GrantStatus.BadDomain;
        GrantHandles handles = vcpu.Domain.Grants.Handles;
        uint handle = handles.Take(vcpu.Id);
        if (handle == GrantHandles.Invalid)
            return GrantStatus.NoSpace;
        Mfn frame;
        FrameInfo* info;
        GrantStatus status;
        lock (granter.Lock)
            status = granter.AcquireForMap(op.Reference, vcpu.Domain.Id.Value, increment, readOnly, out frame, out info);
        if (status == GrantStatus.Okay)
        {
            if (info == null)
                info = granter.GetPage(frame);
            status = info == null ? GrantStatus.GeneralError : MapPage(vcpu, op, frame, info);
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
        Thread.MemoryBarrier();
        mapping.Flags = (GrantMapFlags)(ushort)op.Flags;
        op.DeviceBusAddress = frame.Address.Value;
        op.Handle = handle;
        return GrantStatus.Okay;
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

    private static uint PinOf(GrantMapFlags flags, bool readOnly)
        => ((flags & GrantMapFlags.Device) != 0 ? readOnly ? GrantPin.DeviceRead : GrantPin.DeviceWrite : 0)
            + ((flags & GrantMapFlags.Host) != 0 ? readOnly ? GrantPin.HostRead : GrantPin.HostWrite : 0);

    /// <summary>Takes a mapping away, or one of its two ways (unmap_common); the page stays held until <see cref="Complete"/>.</summary>
    private static GrantStatus Unmap(Vcpu vcpu, in UnmapGrantRef op, bool replace, ref Unmapped unmapped)
    {
        GrantHandles handles = vcpu.Domain.Grants.Handles;
        if (op.Handle >= handles.Limit)
            return GrantStatus.BadHandle;
        ref GrantMappingInfo mapping = ref handles[op.Handle];
        if (mapping.Flags == GrantMapFlags.None || vcpu.Domain.FindGrants(mapping.Domain) is not { } granter)
            return GrantStatus.BadHandle;
        ulong busAddress = replace ? 0 : op.DeviceBusAddress;
        ulong newAddress = replace ? op.NewAddress : 0;
        bool last;

        // Of two that unmap the same, only one does.
        lock (granter.Lock)
        {
            GrantMapFlags flags = mapping.Flags;
            if (flags == GrantMapFlags.None || mapping.Reference >= granter.EntryCount || mapping.Domain != granter.Id)
                return GrantStatus.BadHandle;
            unmapped.Domain = mapping.Domain;
            unmapped.Reference = mapping.Reference;
            unmapped.Frame = new Mfn(granter[mapping.Reference].Frame);
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

            last = (mapping.Flags & (GrantMapFlags.Device | GrantMapFlags.Host)) == 0;
            if (last)
                mapping.Flags = GrantMapFlags.None;
        }

        if (last)
            handles.Return(op.Handle);
        return GrantStatus.Okay;
    }

    /// <summary>Lets go of the page, and of the entry (unmap_common_complete).</summary>
    private static void Complete(Vcpu vcpu, in Unmapped unmapped)
    {
        if (unmapped.Done == GrantMapFlags.None)
            return;
        bool readOnly = (unmapped.Done & GrantMapFlags.ReadOnly) != 0;
        FrameTable* frames = FrameTable.Of(vcpu.Context->Domain);
        FrameInfo* info = frames->Find(unmapped.Frame);
        for (GrantMapFlags way = GrantMapFlags.Device; way <= GrantMapFlags.Host; way = (GrantMapFlags)((uint)way << 1))
        {
            if ((unmapped.Done & way) == 0)
                continue;
            if (!readOnly)
                _ = PageTables.PutType(vcpu.Context, unmapped.Frame, info);
            frames->PutPage(info);
        }

        vcpu.Domain.FindGrants(unmapped.Domain)!.Release(unmapped.Reference, PinOf(unmapped.Done, readOnly), readOnly);
    }
}
