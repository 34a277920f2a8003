// mmuext_op (26).
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Pinning, page-table roots, flushes, the LDT and page contents.</summary>
public static unsafe class MmuextOp
{
    /// <summary>MMUEXT_* commands.</summary>
    private enum Command : uint
    {
        PinL1Table = 0,
        PinL2Table = 1,
        PinL3Table = 2,
        PinL4Table = 3,
        UnpinTable = 4,
        NewBaseptr = 5,
        TlbFlushLocal = 6,
        InvlpgLocal = 7,
        TlbFlushMulti = 8,
        InvlpgMulti = 9,
        TlbFlushAll = 10,
        InvlpgAll = 11,
        FlushCache = 12,
        SetLdt = 13,
        NewUserBaseptr = 15,
        ClearPage = 16,
        CopyPage = 17,
        FlushCacheGlobal = 18,
        MarkSuper = 19,
        UnmarkSuper = 20,
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct Request
    {
        public Command Command;
        private uint _padding;

        /// <summary>A frame number or a linear address.</summary>
        public ulong Argument1;

        /// <summary>A count of entries, a pointer to a vCPU bitmap, or a frame number.</summary>
        public ulong Argument2;
    }

    /// <summary>mmuext_op(requests, count, done count, foreign domid).</summary>
    public static long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        ulong requests = arguments.A0;
        uint count = (uint)arguments.A1;
        ulong donePointer = arguments.A2;
        uint done = 0;
        if (PageTables.FinishDeferred(vcpu) != Errno.None)
            return Continuation.Create(vcpu, arguments);
        if (MmuUpdate.IsEndOfContinuation(arguments))
            return (int)arguments.A3;
        if ((count & MmuUpdate.Preempted) != 0)
        {
            count &= ~MmuUpdate.Preempted;
            if (donePointer != 0)
                _ = GuestAccess.Read(vcpu, donePointer, out done);
        }

        if (!new VirtualAddress(requests).IsGuest)
            return -(long)Errno.EFAULT;
        if (!ForeignDomain.IsSelf(vcpu->Domain, (ushort)arguments.A3, out Errno error))
            return -(long)error;
        uint i = 0;
        for (; i < count; i++)
        {
            if (PageTables.FinishDeferred(vcpu) != Errno.None || (i != 0 && vcpu->PreemptionDue))
            {
                error = Errno.ERESTART;
                break;
            }

            error = GuestAccess.Read(vcpu, requests + (i * (ulong)sizeof(Request)), out Request request)
                ? Perform(vcpu, request)
                : Errno.EFAULT;
            if (error != Errno.None)
                break;
        }

        return MmuUpdate.EndBatch(vcpu, arguments, i, done, (ulong)sizeof(Request), error);
    }

    /// <summary>Loads a frame as the root of kernel mode (new_guest_cr3), also for an emulated write to CR3.</summary>
    /// <returns>ERESTART when it has to be asked for again, also where the new root is in use by then.</returns>
    public static Errno NewBaseptr(VcpuContext* vcpu, Mfn frame)
    {
        if (PageTables.FinishDeferred(vcpu) != Errno.None)
            return Errno.ERESTART;
        var old = new Mfn(vcpu->State->KernelRoot);
        if (old == frame)
        {
            TlbFlush.OnThisVcpu(vcpu);
            return Errno.None;
        }

        Errno error = PageTables.GetPageAndType(vcpu, frame, PageType.L4PageTable, out _);
        if (error != Errno.None)
            return error;
        DescriptorTables.DropLdt(vcpu);
        PageTables.ShowToKernel(vcpu, frame);
        vcpu->State->KernelRoot = frame.Value;
        return PutRoot(vcpu, old);
    }

    /// <summary>Pins a table, as MMUEXT_PIN_LN_TABLE does.</summary>
    /// <returns>ERESTART when it has to be asked for again.</returns>
    public static Errno Pin(VcpuContext* vcpu, Mfn frame, PageType type)
    {
        Errno error = PageTables.GetPageAndType(vcpu, frame, type, out FrameInfo* info);
        if (error != Errno.None)
            return error;
        if (info->TryPin())
            return Errno.None;
        if (PageTables.PutPageAndType(vcpu, frame, info) == Errno.ERESTART)
            PageTables.Defer(vcpu, frame);
        return Errno.EINVAL;
    }

    private static Errno Perform(VcpuContext* vcpu, in Request request)
    {
        var frame = new Mfn(request.Argument1);
        switch (request.Command)
        {
            case Command.PinL1Table:
            case Command.PinL2Table:
            case Command.PinL3Table:
            case Command.PinL4Table:
                return Pin(vcpu, frame, PageTables.TypeOfLevel((int)request.Command + 1));
            case Command.UnpinTable:
                return Unpin(vcpu, frame);
            case Command.NewBaseptr:
                return NewBaseptr(vcpu, frame);
            case Command.NewUserBaseptr:
                return NewUserBaseptr(vcpu, frame);
            case Command.TlbFlushLocal:
                TlbFlush.OnThisVcpu(vcpu);
                return Errno.None;
            case Command.InvlpgLocal:
                TlbFlush.OnThisVcpu(vcpu, new VirtualAddress(request.Argument1));
                return Errno.None;
            case Command.TlbFlushAll:
                TlbFlush.OnAllVcpus(vcpu);
                return Errno.None;
            case Command.InvlpgAll:
                TlbFlush.OnAllVcpus(vcpu, new VirtualAddress(request.Argument1));
                return Errno.None;
            case Command.TlbFlushMulti:
                return TlbFlush.OnVcpus(vcpu, request.Argument2) == Errno.None ? Errno.None : Errno.EINVAL;
            case Command.InvlpgMulti:
                return TlbFlush.OnVcpus(vcpu, request.Argument2, new VirtualAddress(request.Argument1)) == Errno.None
                    ? Errno.None
                    : Errno.EINVAL;
            case Command.FlushCache:
                return Errno.EACCES;
            case Command.FlushCacheGlobal:
                return Errno.EINVAL;
            case Command.SetLdt:
                return DescriptorTables.SetLdt(vcpu, request.Argument1, (uint)request.Argument2);
            case Command.ClearPage:
                return WriteWholePage(vcpu, frame, source: null);
            case Command.CopyPage:
                return CopyPage(vcpu, frame, new Mfn(request.Argument2));
            case Command.MarkSuper:
            case Command.UnmarkSuper:
                return Errno.EOPNOTSUPP;
            default:
                return Errno.ENOSYS;
        }
    }

    private static Errno Unpin(VcpuContext* vcpu, Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->GetPage(frame, vcpu->Domain->State->Id);
        if (info == null)
            return Errno.EINVAL;
        bool pinned = info->TryUnpin();
        if (pinned && PageTables.PutPageAndType(vcpu, frame, info) == Errno.ERESTART)
            PageTables.Defer(vcpu, frame);
        frames->PutPage(info);
        return pinned ? Errno.None : Errno.EINVAL;
    }

    private static Errno NewUserBaseptr(VcpuContext* vcpu, Mfn frame)
    {
        var old = new Mfn(vcpu->State->UserRoot);
        if (old == frame)
            return Errno.None;
        if (frame.Value != 0)
        {
            Errno error = PageTables.GetPageAndType(vcpu, frame, PageType.L4PageTable, out _);
            if (error != Errno.None)
                return error;
            PageTables.HideFromUser(vcpu, frame, new Mfn(vcpu->State->KernelRoot));
        }

        vcpu->State->UserRoot = frame.Value;
        return PutRoot(vcpu, old);
    }

    /// <summary>Drops a root that is not in use any more.</summary>
    private static Errno PutRoot(VcpuContext* vcpu, Mfn old)
    {
        if (old.Value == 0)
            return Errno.None;
        Errno error = PageTables.PutPageAndType(vcpu, old, FrameTable.Of(vcpu->Domain)->Find(old));
        if (error == Errno.ERESTART)
            PageTables.Defer(vcpu, old);
        return error;
    }

    private static Errno CopyPage(VcpuContext* vcpu, Mfn to, Mfn from)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* source = frames->GetPage(from, vcpu->Domain->State->Id);
        if (source == null)
            return Errno.EINVAL;
        Errno error = WriteWholePage(vcpu, to, vcpu->Domain->Memory.Page(from));
        frames->PutPage(source);
        return error;
    }

    private static Errno WriteWholePage(VcpuContext* vcpu, Mfn frame, byte* source)
    {
        Errno error = PageTables.GetPageAndType(vcpu, frame, PageType.Writable, out FrameInfo* info);
        if (error != Errno.None)
            return error;
        byte* page = vcpu->Domain->Memory.Page(frame);
        if (source == null)
            NativeMemory.Clear(page, (nuint)Paging.PageSize);
        else
            Unsafe.CopyBlock(page, source, (uint)Paging.PageSize);
        GuestAccess.Written(vcpu, frame, 0, Paging.PageSize);
        _ = PageTables.PutPageAndType(vcpu, frame, info);
        return Errno.None;
    }
}
