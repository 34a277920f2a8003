// mmu_update (1), update_va_mapping (14) and update_va_mapping_otherdomain (22).
using System.Runtime.CompilerServices;
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

    /// <summary>Updates of L1 entries between two looks at the clock: together they take less than a microsecond.</summary>
    public const uint RequestsALook = 16;

    [StructLayout(LayoutKind.Sequential)]
    private struct Request
    {
        public ulong Pointer;
        public ulong Value;
    }

    /// <summary>A page table that is held from one request to the next: most name the neighbour of the one before.</summary>
    private struct HeldTable
    {
        private FrameInfo* _info;

        public Mfn Frame { get; private set; }

        /// <summary>1 to 4; 0 while none is held.</summary>
        public int Level { get; private set; }

        /// <summary>Holds nothing.</summary>
        public void Clear()
        {
            _info = null;
            Level = 0;
        }

        /// <summary>Holds the table in a frame that the caller has a reference to, which becomes this one's.</summary>
        /// <returns>False where there is no table: the reference stays the caller's.</returns>
        public bool TryTake(Mfn frame, FrameInfo* info)
        {
            if (!PageTables.TryHold(info, out int level))
                return false;
            Frame = frame;
            _info = info;
            Level = level;
            return true;
        }

        public readonly bool Is(Mfn frame) => _info != null && Frame == frame;

        public void LetGo(VcpuContext* vcpu)
        {
            if (_info == null)
                return;
            PageTables.LetGo(vcpu, Frame, _info);
            Clear();
        }
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
        Unsafe.SkipInit(out HeldTable table);
        Unsafe.SkipInit(out GuestAccess.ReadWindow window);
        table.Clear();
        window.Clear();
        uint nextLook = RequestsALook;
        for (; i < count; i++)
        {
            if (PageTables.FinishDeferred(vcpu) != Errno.None || (i != 0 && vcpu->IsInterrupted) || (i >= nextLook && vcpu->Budget.IsSpent()))
            {
                error = Errno.ERESTART;
                break;
            }

            if (i >= nextLook)
                nextLook = i + RequestsALook;
            ulong at = requests + (i * (ulong)sizeof(Request));
            var near = (Request*)window.Find(at, sizeof(Request));
            if (near != null && table.Level == 1 && refusal == Errno.None && !ioMemory)
            {
                uint inPage = GuestAccess.ReadWindow.Rest(at) / (uint)sizeof(Request);
                uint served = ServeRun(vcpu, near, Math.Min(inPage, Math.Min(count, nextLook) - i), table.Frame);
                if (served != 0)
                {
                    // The loop counts the last of them, and looks for what interrupts before the next.
                    i += served - 1;
                    continue;
                }
            }

            if (!TryRead(vcpu, ref window, at, out Request request))
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
                    vcpu, ref table, new MachineAddress(request.Pointer - command), new PageTableEntry(request.Value),
                    command == PreserveAccessedDirty, ioMemory),
                _ when ioMemory => Errno.EINVAL,
                _ => UpdateMachineToPhys(vcpu, new MachineAddress(request.Pointer).Frame, request.Value),
            };
            if (error != Errno.None)
                break;

            // Above L1 a single entry can take all the time that there is.
            if (table.Level > 1)
                nextLook = i + 1;
        }

        table.LetGo(vcpu);
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
        PageTables.LetGo(vcpu, entryAddress.Frame, table);
        return error switch
        {
            Errno.None => TlbFlush.AfterUpdateVaMapping(vcpu, linear, arguments.A2),
            Errno.ERESTART => Continuation.Create(vcpu, arguments),
            _ => -(long)error,
        };
    }

    /// <summary>
    /// Serves requests as long as each is an ordinary one for an entry of the L1 table that is held, and comes to no more than
    /// <see cref="OwnPages"/> does: of neighbouring entries nearly all.
    /// </summary>
    /// <param name="vcpu">The calling vCPU; that nothing interrupts it was looked at before the first request.</param>
    /// <param name="requests">The guest's own memory.</param>
    /// <param name="count">How many there are, at least 1.</param>
    /// <param name="table">The table's frame.</param>
    /// <returns>How many were served; the next is for the whole way.</returns>
    private static uint ServeRun(VcpuContext* vcpu, Request* requests, uint count, Mfn table)
    {
        byte* entries = vcpu->Domain->Memory.Page(table);
        ulong start = table.Address.Value;
        uint i = 0;
        do
        {
            // An aligned address within the table: its command is MMU_NORMAL_PT_UPDATE.
            ulong offset = Volatile.Read(ref requests[i].Pointer) - start;
            var value = new PageTableEntry(Volatile.Read(ref requests[i].Value));
            if (offset >= Paging.PageSize || offset % sizeof(ulong) != 0
                || !OwnPages.TryChange(vcpu, (PageTableEntry*)(entries + offset), new MachineAddress(start + offset), value))
            {
                break;
            }

            i++;
        }
        while (i < count && !vcpu->IsInterrupted);
        return i;
    }

    private static void StoreDone(VcpuContext* vcpu, ulong pointer, uint done)
    {
        if (pointer != 0)
            _ = GuestAccess.Write(vcpu, pointer, done);
    }

    private static bool TryRead(VcpuContext* vcpu, ref GuestAccess.ReadWindow window, ulong address, out Request request)
    {
        var near = (Request*)window.Find(address, sizeof(Request));
        if (near == null)
            return GuestAccess.Read(vcpu, ref window, address, out request);
        request.Pointer = near->Pointer;
        request.Value = near->Value;
        return true;
    }

    private static Errno UpdateEntry(
        VcpuContext* vcpu, ref HeldTable table, MachineAddress address, PageTableEntry value, bool preserveAccessedDirty, bool ioMemory)
    {
        if (!table.Is(address.Frame))
        {
            table.LetGo(vcpu);
            FrameInfo* info = FrameTable.Of(vcpu->Domain)->GetPage(address.Frame, vcpu->Domain->State->Id);
            if (info == null)
                return Errno.EINVAL;
            if (!table.TryTake(address.Frame, info))
                return StoreToPage(vcpu, address, info, value);
        }

        if (ioMemory && table.Level != 1)
            return Errno.EINVAL;
        PageTableEntry* entry = (PageTableEntry*)(vcpu->Domain->Memory.Page(address.Frame) + address.Offset);
        return PageTables.ModifyEntry(vcpu, table.Level, entry, address, value, preserveAccessedDirty, ioMemory);
    }

    /// <summary>An ordinary store into the guest's own page, which is not in use as a table.</summary>
    private static Errno StoreToPage(VcpuContext* vcpu, MachineAddress address, FrameInfo* info, PageTableEntry value)
    {
        Errno error = PageTables.GetType(vcpu, address.Frame, info, PageType.Writable);
        if (error == Errno.None)
        {
            Volatile.Write(ref *(ulong*)(vcpu->Domain->Memory.Page(address.Frame) + address.Offset), value.Value);
            GuestAccess.Written(vcpu, address.Frame, (ulong)address.Offset, sizeof(ulong));
            _ = PageTables.PutType(vcpu, address.Frame, info);
        }

        FrameTable.Of(vcpu->Domain)->PutPage(info);
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
