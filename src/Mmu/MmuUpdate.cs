// mmu_update (1), update_va_mapping (14) and update_va_mapping_otherdomain (22).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Changes of page-table entries and of the M2P table, in batches or by linear address.</summary>
public static unsafe class MmuUpdate
{
    /// <summary>MMU_UPDATE_PREEMPTED: a count with this bit continues an earlier call.</summary>
    public const uint Preempted = 1u << 31;

    private const ulong NormalPageTableUpdate = 0;
    private const ulong PreserveAccessedDirty = 2;
    private const ulong NoTranslate = 3;
    private const ulong CommandMask = 7;

    [StructLayout(LayoutKind.Sequential)]
    private struct Request
    {
        public ulong Pointer;
        public ulong Value;
    }

    /// <summary>mmu_update(requests, count, done count, foreign domid | page-table domid + 1 &lt;&lt; 16).</summary>
    public static long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        ulong requests = arguments.A0;
        uint count = (uint)arguments.A1;
        ulong donePointer = arguments.A2;
        uint done = 0;
        if (PageTables.FinishDeferred(vcpu) != Errno.None)
            return Continuation.Create(vcpu, arguments);
        if (IsEndOfContinuation(arguments))
            return (int)arguments.A3;
        if ((count & Preempted) != 0)
        {
            count &= ~Preempted;
            if (donePointer != 0)
                _ = GuestAccess.Read(vcpu, donePointer, out done);
        }

        if (!new VirtualAddress(requests).IsGuest)
            return -(long)Errno.EFAULT;
        uint tableDomain = (uint)arguments.A3 >> 16;
        bool tableIsOwn = tableDomain == 0 || tableDomain - 1 == vcpu->Domain->State->Id;
        if (!tableIsOwn && !ForeignDomain.Exists(vcpu->Domain, (ushort)(tableDomain - 1)))
            return -(long)Errno.ESRCH;
        Errno error = Errno.None;
        uint i = 0;
        if (!ForeignDomain.IsSelf(vcpu->Domain, (ushort)arguments.A3, out Errno refusal) && refusal == Errno.ESRCH)
        {
            StoreDone(vcpu, donePointer, done);
            return -(long)refusal;
        }

        // Anybody may name DOMID_IO, as the owner of what L1 entries map; whether it is theirs to map is another question.
        bool ioMemory = (ushort)arguments.A3 == DomainId.Io.Value;
        if (ioMemory)
            refusal = Errno.None;

        // A domain that is known but not the caller's to change is refused request by request.
        if (!tableIsOwn)
            refusal = Errno.EPERM;
        for (; i < count; i++)
        {
            if (PageTables.FinishDeferred(vcpu) != Errno.None || (i != 0 && vcpu->PreemptionDue))
            {
                error = Errno.ERESTART;
                break;
            }

            if (!GuestAccess.Read(vcpu, requests + (i * (ulong)sizeof(Request)), out Request request))
            {
                error = Errno.EFAULT;
                break;
            }

            ulong command = request.Pointer & CommandMask;
            error = command switch
            {
                > NoTranslate => Errno.ENOSYS,
                _ when refusal != Errno.None => refusal,
                NormalPageTableUpdate or PreserveAccessedDirty or NoTranslate => UpdateEntry(
                    vcpu, new MachineAddress(request.Pointer - command), new PageTableEntry(request.Value), command == PreserveAccessedDirty, ioMemory),
                _ when ioMemory => Errno.EINVAL,
                _ => UpdateMachineToPhys(vcpu, new MachineAddress(request.Pointer).Frame, request.Value),
            };
            if (error != Errno.None)
                break;
        }

        return EndBatch(vcpu, arguments, i, done, (ulong)sizeof(Request), error);
    }

    /// <summary>
    /// No requests, and the bit of a continuation: how a call comes back that had still to take a table apart when its result was
    /// known, which then is in the last argument.
    /// </summary>
    internal static bool IsEndOfContinuation(in HypercallArguments arguments) => (uint)arguments.A1 == Preempted && arguments.A0 == 0;

    /// <summary>
    /// Ends a batch of mmu_update or mmuext_op, or has it continued: from the first request that is not done, or only to take a
    /// table apart.
    /// </summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="arguments">The call's.</param>
    /// <param name="served">Requests that are done.</param>
    /// <param name="done">Requests that earlier parts of the call did.</param>
    /// <param name="size">Bytes a request.</param>
    /// <param name="error">What the next request came to; ERESTART where it has to be asked for again.</param>
    internal static long EndBatch(VcpuContext* vcpu, in HypercallArguments arguments, uint served, uint done, ulong size, Errno error)
    {
        TlbFlush.AfterBatch(vcpu);
        StoreDone(vcpu, arguments.A2, done + served);
        bool unfinished = error == Errno.ERESTART;
        if (!unfinished && PageTables.FinishDeferred(vcpu) == Errno.None)
            return -(long)error;
        long continued = Continuation.Create(vcpu, arguments);
        ref HypercallArguments rest = ref vcpu->Continuation.Arguments;
        if (unfinished)
        {
            rest.A0 += served * size;
            rest.A1 = (((uint)arguments.A1 & ~Preempted) - served) | Preempted;
            return continued;
        }

        rest.A0 = 0;
        rest.A1 = Preempted;
        rest.A2 = 0;
        rest.A3 = (uint)-(int)error;
        return continued;
    }

    /// <summary>update_va_mapping(address, entry, flags).</summary>
    public static long UpdateVaMapping(VcpuContext* vcpu, in HypercallArguments arguments)
        => UpdateOwn(vcpu, arguments);

    /// <summary>update_va_mapping_otherdomain(address, entry, flags, domid).</summary>
    public static long UpdateVaMappingOtherdomain(VcpuContext* vcpu, in HypercallArguments arguments)
        => ForeignDomain.IsSelf(vcpu->Domain, (ushort)arguments.A3, out Errno error)
            ? UpdateOwn(vcpu, arguments)
            : -(long)error;

    private static long UpdateOwn(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        var linear = new VirtualAddress(arguments.A0);
        PageTableEntry* entry = linear.IsGuest ? GuestAccess.FindEntry(vcpu, linear) : null;
        if (entry == null)
            return -(long)Errno.EINVAL;
        MachineAddress entryAddress = vcpu->Domain->Memory.AddressOf(entry);
        FrameInfo* table = PageTables.HoldL1(vcpu, entryAddress.Frame);
        if (table == null)
            return -(long)Errno.EINVAL;
        Errno error = PageTables.ModifyEntry(vcpu, 1, entry, entryAddress, new PageTableEntry(arguments.A1), preserveAccessedDirty: false);
        PageTables.LetGoL1(vcpu, entryAddress.Frame, table);
        return error switch
        {
            Errno.None => TlbFlush.AfterUpdateVaMapping(vcpu, arguments.A2),
            Errno.ERESTART => Continuation.Create(vcpu, arguments),
            _ => -(long)error,
        };
    }

    private static void StoreDone(VcpuContext* vcpu, ulong pointer, uint done)
    {
        if (pointer != 0)
            _ = GuestAccess.Write(vcpu, pointer, done);
    }

    private static Errno UpdateEntry(VcpuContext* vcpu, MachineAddress address, PageTableEntry value, bool preserveAccessedDirty, bool ioMemory)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->GetPage(address.Frame, vcpu->Domain->State->Id);
        if (info == null)
            return Errno.EINVAL;
        PageTableEntry* entry = (PageTableEntry*)(vcpu->Domain->Memory.Page(address.Frame) + address.Offset);
        Errno error;
        if (PageTables.TryHold(info, out int level))
        {
            error = ioMemory && level != 1
                ? Errno.EINVAL
                : PageTables.ModifyEntry(vcpu, level, entry, address, value, preserveAccessedDirty, ioMemory);
            PageTables.Release(vcpu, address.Frame, info);
        }
        else if ((error = PageTables.GetType(vcpu, address.Frame, info, PageType.Writable)) == Errno.None)
        {
            // Not in use as a table: an ordinary store into the guest's own page.
            Volatile.Write(ref *(ulong*)entry, value.Value);
            GuestAccess.Written(vcpu, address.Frame, (ulong)address.Offset, sizeof(ulong));
            _ = PageTables.PutType(vcpu, address.Frame, info);
        }

        frames->PutPage(info);
        return error;
    }

    private static Errno UpdateMachineToPhys(VcpuContext* vcpu, Mfn frame, ulong pfn)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->GetPage(frame, vcpu->Domain->State->Id);
        if (info == null)
            return Errno.EINVAL;
        vcpu->Domain->MachineToPhys[vcpu->Domain->Memory.IndexOf(frame)] = pfn;
        frames->PutPage(info);
        return Errno.None;
    }
}
