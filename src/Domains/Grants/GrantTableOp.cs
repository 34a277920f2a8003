// grant_table_op (20).
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>The hypercall, and those of its operations that are about the table as a whole.</summary>
internal static unsafe class GrantTableOp
{
    /// <summary>The command is in the low bits; what is above them is for continuations of cache_flush (GNTTABOP_CMD_MASK).</summary>
    private const uint CommandMask = 0xfff;

    private enum Command : uint
    {
        MapGrantRef = 0,
        UnmapGrantRef = 1,
        SetupTable = 2,
        Transfer = 4,
        Copy = 5,
        QuerySize = 6,
        UnmapAndReplace = 7,
        SetVersion = 8,
        GetStatusFrames = 9,
        GetVersion = 10,
        SwapGrantRef = 11,
        CacheFlush = 12,
    }

    /// <summary>grant_table_op(command, requests, count).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        var command = (Command)((uint)arguments.A0 & CommandMask);
        uint count = (uint)arguments.A2;
        if ((int)count < 0 || (((uint)arguments.A0 & ~CommandMask) != 0 && command != Command.CacheFlush))
            return -(long)Errno.EINVAL;
        ulong pointer = arguments.A1;
        switch (command)
        {
            case Command.SetupTable:
                return count != 1 ? -(long)Errno.EINVAL : Setup(vcpu, arguments);
            case Command.QuerySize:
                return -(long)(count != 1 ? Errno.EINVAL : Query(vcpu, pointer));
            case Command.SetVersion:
                return SetTableVersion(vcpu, arguments);
            case Command.GetStatusFrames:
                return -(long)(count != 1 ? Errno.EINVAL : TellStatusFrames(vcpu, pointer));
            case Command.GetVersion:
                return -(long)TellVersion(vcpu, pointer);
            case Command.MapGrantRef:
            case Command.UnmapGrantRef:
            case Command.UnmapAndReplace:
            case Command.Transfer:
            case Command.Copy:
            case Command.SwapGrantRef:
            case Command.CacheFlush:
                if (!new VirtualAddress(pointer).IsGuest)
                    return -(long)Errno.EFAULT;
                break;
            default:
                return -(long)Errno.ENOSYS;
        }

        return command switch
        {
            Command.MapGrantRef => GrantMap.Map(vcpu, arguments),
            Command.UnmapGrantRef => GrantMap.Unmap(vcpu, arguments, replace: false),
            Command.UnmapAndReplace => GrantMap.Unmap(vcpu, arguments, replace: true),
            Command.Transfer => GrantTransfer.Execute(vcpu, arguments),
            Command.Copy => GrantCopy.Execute(vcpu, arguments),
            Command.SwapGrantRef => Swap(vcpu, arguments),
            _ => Flush(vcpu, arguments),
        };
    }

    /// <summary>Has an operation go on later with the requests that are left.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="arguments">The call's.</param>
    /// <param name="done">Requests that are done.</param>
    /// <param name="size">Bytes of one.</param>
    internal static long Continue(Vcpu vcpu, in HypercallArguments arguments, uint done, int size)
    {
        HypercallArguments rest = arguments;
        rest.A0 = (uint)arguments.A0 & CommandMask;
        rest.A1 += done * (ulong)size;
        rest.A2 = (uint)arguments.A2 - done;
        return Continuation.Create(vcpu.Context, rest);
    }

    /// <summary>
    /// The table of a domain that an operation may look at or set up: one's own, by DOMID_SELF or by number
    /// (rcu_lock_domain_by_any_id).
    /// </summary>
    private static GrantTable? FindOwn(Vcpu vcpu, ushort domain, out GrantStatus status)
    {
        bool isOwn = domain == DomainId.Self.Value || domain == vcpu.Domain.Id.Value;
        status = isOwn ? GrantStatus.Okay : vcpu.Domain.Knows(domain) ? GrantStatus.PermissionDenied : GrantStatus.BadDomain;
        return isOwn ? vcpu.Domain.Grants : null;
    }

    private static long Setup(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu.Context, arguments.A1, out SetupTable op) || !new VirtualAddress(op.FrameList).IsGuest)
            return -(long)Errno.EFAULT;
        if (FindOwn(vcpu, op.Domain, out GrantStatus status) is { } table)
        {
            if (op.FrameCount > (uint)table.MaxFrames)
            {
                status = GrantStatus.GeneralError;
            }
            else
            {
                Errno error = Errno.None;
                lock (table.Lock)
                {
                    if (table.MustGrow((int)op.FrameCount))
                        error = table.Grow(vcpu.Context, (int)op.FrameCount);
                }

                if (error == Errno.ERESTART)
                    return Continuation.Create(vcpu.Context, arguments);
                status = error == Errno.None ? GrantStatus.Okay : GrantStatus.GeneralError;
            }

            for (uint i = 0; status == GrantStatus.Okay && i < op.FrameCount; i++)
            {
                if (!GuestAccess.Write(vcpu.Context, op.FrameList + (i * sizeof(ulong)), table.Frame((int)i).Value))
                    status = GrantStatus.BadVirtualAddress;
            }
        }

        return GuestAccess.Write(vcpu.Context, arguments.A1 + SetupTable.StatusOffset, status) ? 0 : -(long)Errno.EFAULT;
    }

    private static Errno Query(Vcpu vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu.Context, pointer, out QuerySize op))
            return Errno.EFAULT;
        if (FindOwn(vcpu, op.Domain, out op.Status) is { } table)
        {
            op.FrameCount = (uint)table.FrameCount;
            op.MaxFrames = (uint)table.MaxFrames;
        }

        return GuestAccess.Write(vcpu.Context, pointer, op) ? Errno.None : Errno.EFAULT;
    }

    private static long SetTableVersion(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu.Context, arguments.A1, out uint version))
            return -(long)Errno.EFAULT;
        GrantTable table = vcpu.Domain.Grants;
        Errno error = Errno.EINVAL;
        if (version == 2 && table.MaxVersion == 1)
        {
            error = Errno.ENOSYS;
        }
        else if (version is 1 or 2)
        {
            lock (table.Lock)
                error = table.SetVersion(vcpu.Context, (int)version);
        }

        if (error == Errno.ERESTART)
            return Continuation.Create(vcpu.Context, arguments);
        return -(long)(GuestAccess.Write(vcpu.Context, arguments.A1, (uint)table.Version) ? error : Errno.EFAULT);
    }

    private static Errno TellStatusFrames(Vcpu vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu.Context, pointer, out GetStatusFrames op) || !new VirtualAddress(op.FrameList).IsGuest)
            return Errno.EFAULT;
        if (FindOwn(vcpu, op.Domain, out GrantStatus status) is { } table)
        {
            ulong* frames = stackalloc ulong[table.StatusFrameLimit];
            lock (table.Lock)
            {
                if (op.FrameCount > (uint)table.StatusFrameCount)
                    status = GrantStatus.GeneralError;
                for (int i = 0; i < table.StatusFrameCount; i++)
                    frames[i] = table.StatusFrame(i).Value;
            }

            for (uint i = 0; status == GrantStatus.Okay && i < op.FrameCount; i++)
            {
                if (!GuestAccess.Write(vcpu.Context, op.FrameList + (i * sizeof(ulong)), frames[i]))
                    status = GrantStatus.BadVirtualAddress;
            }
        }

        return GuestAccess.Write(vcpu.Context, pointer + GetStatusFrames.StatusOffset, status) ? Errno.None : Errno.EFAULT;
    }

    private static Errno TellVersion(Vcpu vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu.Context, pointer, out GetVersion op))
            return Errno.EFAULT;
        if (FindOwn(vcpu, op.Domain, out GrantStatus status) is not { } table)
            return status == GrantStatus.BadDomain ? Errno.ESRCH : Errno.EPERM;
        return GuestAccess.Write(vcpu.Context, pointer + GetVersion.VersionOffset, (uint)table.Version) ? Errno.None : Errno.EFAULT;
    }

    private static long Swap(Vcpu vcpu, in HypercallArguments arguments)
    {
        for (uint i = 0; i < (uint)arguments.A2; i++)
        {
            if (i != 0 && vcpu.Context->PreemptionDue)
                return Continue(vcpu, arguments, i, sizeof(SwapGrantRef));
            ulong pointer = arguments.A1 + (i * (ulong)sizeof(SwapGrantRef));
            if (!GuestAccess.Read(vcpu.Context, pointer, out SwapGrantRef op))
                return -(long)Errno.EFAULT;
            if (!GuestAccess.Write(vcpu.Context, pointer + SwapGrantRef.StatusOffset, vcpu.Domain.Grants.Swap(op.First, op.Second)))
                return -(long)Errno.EFAULT;
        }

        return 0;
    }

    /// <summary>Memory is coherent on x86, so there is nothing to be done; to forget what is cached is not to be had.</summary>
    private static long Flush(Vcpu vcpu, in HypercallArguments arguments)
    {
        for (uint i = 0; i < (uint)arguments.A2; i++)
        {
            if (i != 0 && vcpu.Context->PreemptionDue)
                return Continue(vcpu, arguments, i, sizeof(CacheFlush));
            if (!GuestAccess.Read(vcpu.Context, arguments.A1 + (i * (ulong)sizeof(CacheFlush)), out CacheFlush op))
                return -(long)Errno.EFAULT;
            Errno error = Flush(vcpu, op, isContinued: i == 0 && ((uint)arguments.A0 & ~CommandMask) != 0);
            if (error != Errno.None)
                return -(long)error;
        }

        return 0;
    }

    private static Errno Flush(Vcpu vcpu, in CacheFlush op, bool isContinued)
    {
        if (op.Offset + (ulong)op.Length > Paging.PageSize || op.Offset >= Paging.PageSize || (op.Operation & ~(CacheFlush.Clean | CacheFlush.Invalidate)) != 0)
            return Errno.EINVAL;
        if (op.Length == 0 || op.Operation == 0)
            return isContinued ? Errno.EILSEQ : Errno.None;
        var frame = new Mfn(op.DeviceBusAddress >> Paging.PageShift);
        DomainContext* domain = vcpu.Context->Domain;
        if (domain->PageOf(frame) == null)
            return Errno.EINVAL;
        if (!domain->Window.Contains(frame))
        {
            FrameTable* frames = FrameTable.Of(domain);
            FrameInfo* info = frames->GetPage(frame, vcpu.Domain.Id.Value);
            if (info == null)
                return Errno.EPERM;
            frames->PutPage(info);
        }
        else if (ForeignFrames.Mappings(domain, frame) == 0)
        {
            return Errno.EPERM;
        }

        return op.Operation == CacheFlush.Invalidate ? Errno.EOPNOTSUPP : Errno.None;
    }
}
