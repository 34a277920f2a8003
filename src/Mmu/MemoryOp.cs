// memory_op (12).
using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>The domain's memory: its size, its map, and the frames that it gives back and takes.</summary>
public static unsafe class MemoryOp
{
    /// <summary>The command is in the low bits, the extents done by an earlier part of the call above them.</summary>
    private const int ExtentShift = 6;

    /// <summary>More extents than this cannot be encoded in a continuation.</summary>
    private const ulong MaxExtents = uint.MaxValue >> ExtentShift;

    /// <summary>XENMEMF_populate_on_demand: for domains with a translated physmap, and not on oneself.</summary>
    private const uint PopulateOnDemand = 1 << 16;

    /// <summary>Map spaces of XENMEM_add_to_physmap that need the other form of the call.</summary>
    private const uint RangeSpace = 3;
    private const uint ForeignSpace = 4;

    /// <summary>Largest extent that an unprivileged domain may ask for (CONFIG_DOMU_MAX_ORDER).</summary>
    private const uint MaxOrder = 9;

    /// <summary>Fields of a reservation's flags: address bits in the lowest byte (XENMEMF_address_bits), a NUMA node plus 1 in the next.</summary>
    private const uint AddressBitsMask = 0xff;
    private const uint NodeMask = 0xff00;

    /// <summary>XENMEMF_exact_node_request.</summary>
    private const uint ExactNodeRequest = 1 << 17;

    private enum Command : uint
    {
        IncreaseReservation = 0,
        DecreaseReservation = 1,
        MaximumRamPage = 2,
        CurrentReservation = 3,
        MaximumReservation = 4,
        MachphysMfnList = 5,
        PopulatePhysmap = 6,
        AddToPhysmap = 7,
        MemoryMap = 9,
        MachineMemoryMap = 10,
        Exchange = 11,
        MachphysMapping = 12,
        SetMemoryMap = 13,
        MaximumGpfn = 14,
        RemoveFromPhysmap = 15,
        SetPodTarget = 16,
        GetPodTarget = 17,
        GetSharingFreedPages = 18,
        GetSharingSharedPages = 19,
        AccessOp = 21,
        AddToPhysmapBatch = 23,
        ClaimPages = 24,
        MachphysCompatMfnList = 25,
        GetVnumainfo = 26,
        ReservedDeviceMemoryMap = 27,
        AcquireResource = 28,
    }

    /// <summary>struct xen_memory_reservation.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 32)]
    internal struct Reservation
    {
        [FieldOffset(0)] public ulong ExtentStart;
        [FieldOffset(8)] public ulong ExtentCount;
        [FieldOffset(16)] public uint ExtentOrder;
        [FieldOffset(20)] public uint Flags;
        [FieldOffset(24)] public ushort Domain;
    }

    /// <summary>struct xen_memory_map.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct MemoryMap
    {
        public uint EntryCount;
        private uint _padding;
        public ulong Buffer;
    }

    /// <summary>struct xen_foreign_memory_map.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct ForeignMemoryMap
    {
        public ushort Domain;
        public MemoryMap Map;
    }

    /// <summary>Entries that the M2P table has by its place, 256 GiB long (MACH2PHYS_NR_ENTRIES).</summary>
    private const ulong MachineToPhysEntries = (256UL << 30) / sizeof(ulong);

    /// <summary>struct xen_machphys_mapping.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct MachphysMapping
    {
        public ulong Start;
        public ulong End;
        public ulong MaxMfn;
    }

    /// <summary>struct xen_machphys_mfn_list.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 24)]
    private struct MachphysMfnList
    {
        [FieldOffset(0)] public uint MaxExtents;
        [FieldOffset(8)] public ulong ExtentStart;
        [FieldOffset(16)] public uint ExtentCount;
    }

    /// <summary>struct xen_add_to_physmap and xen_add_to_physmap_batch, as far as they are looked at.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct PhysmapChange
    {
        public ushort Domain;
        public ushort Size;

        /// <summary>Of the first; in the batch it is the 16 bits behind the domain.</summary>
        public uint Space;
    }

    /// <summary>struct xen_vnuma_topology_info.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 40)]
    private struct VirtualNumaTopology
    {
        [FieldOffset(0)] public ushort Domain;
        [FieldOffset(2)] public ushort Padding;
    }

    /// <summary>struct xen_reserved_device_memory_map.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 24)]
    private struct ReservedDeviceMemoryMap
    {
        /// <summary>XENMEM_RDM_ALL (1): those of every device.</summary>
        [FieldOffset(0)] public uint Flags;
        [FieldOffset(4)] public uint EntryCount;
        [FieldOffset(8)] public ulong Buffer;
    }

    /// <summary>struct xen_mem_access_op.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 32)]
    private struct MemoryAccess
    {
        [FieldOffset(2)] public ushort Domain;
    }

    /// <summary>struct xen_mem_acquire_resource.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 32)]
    private struct AcquiredResource
    {
        [FieldOffset(0)] public ushort Domain;
        [FieldOffset(8)] public uint FrameCount;
        [FieldOffset(12)] public uint Padding;
        [FieldOffset(16)] public ulong Frame;
    }

    /// <summary>Offset of the domain id in struct xen_pod_target.</summary>
    private const ulong PodTargetDomain = 32;

    /// <summary>memory_op(command, argument).</summary>
    public static long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        var command = (Command)(arguments.A0 & ((1u << ExtentShift) - 1));
        ulong done = arguments.A0 >> ExtentShift;
        ulong pointer = arguments.A1;
        DomainState* domain = vcpu->Domain->State;
        switch (command)
        {
            case Command.IncreaseReservation:
            case Command.DecreaseReservation:
            case Command.PopulatePhysmap:
                return ChangeReservation(vcpu, command, arguments);
            case Command.AccessOp:
                return -(long)RefuseAccessOp(vcpu, pointer);
            case Command.AcquireResource:
                return -(long)RefuseResource(vcpu, pointer);
            case Command.AddToPhysmap:
            case Command.AddToPhysmapBatch:
                return -(long)(done > ushort.MaxValue ? Errno.EDOM : RefusePhysmapChange(vcpu, command, pointer));
            case Command.Exchange:
            case Command.MaximumRamPage:
            case Command.CurrentReservation:
            case Command.MaximumReservation:
            case Command.MaximumGpfn:
            case Command.RemoveFromPhysmap:
            case Command.ClaimPages:
            case Command.GetVnumainfo:
            case Command.ReservedDeviceMemoryMap:
                // None of these is ever continued, nor is any of the rest.
                if (done != 0)
                    return -(long)Errno.EINVAL;
                break;
            default:
                if (done != 0)
                    return -(long)Errno.ENOSYS;
                break;
        }

        switch (command)
        {
            case Command.Exchange:
                return MemoryExchange.Execute(vcpu, arguments);
            case Command.MemoryMap:
                return GetMemoryMap(vcpu, pointer);
            case Command.SetMemoryMap:
                return -(long)SetMemoryMap(vcpu, pointer);
            case Command.MachphysMapping:
                return GetMachphysMapping(vcpu, pointer);
            case Command.MachphysMfnList:
                return -(long)GetMachphysMfnList(vcpu, pointer);
            case Command.MaximumRamPage:
                return (long)vcpu->Domain->Memory.EndFrame.Value;
            case Command.CurrentReservation:
                return OfDomain(vcpu, pointer, domain->OwnedPages);
            case Command.MaximumReservation:
                return OfDomain(vcpu, pointer, domain->MaxPages);
            case Command.MaximumGpfn:
                // A PV guest says how many pfns there are, not which is the last.
                return OfDomain(vcpu, pointer, Math.Max(*(ulong*)(vcpu->Domain->SharedInfo + SharedInfoLayout.MaxPfn), 1) - 1);
            case Command.RemoveFromPhysmap:
                return -(long)RefusePhysmapChange(vcpu, command, pointer);
            case Command.ClaimPages:
                return -(long)RefuseClaim(vcpu, pointer);
            case Command.GetVnumainfo:
                return -(long)GetVnumainfo(vcpu, pointer);
            case Command.ReservedDeviceMemoryMap:
                return -(long)GetReservedDeviceMemory(vcpu, pointer);
            case Command.SetPodTarget:
            case Command.GetPodTarget:
                if (!GuestAccess.Read(vcpu, pointer + PodTargetDomain, out ushort target))
                    return -(long)Errno.EFAULT;
                return -(long)(IsOwn(vcpu, target, out Errno error) ? Errno.EINVAL : error == Errno.EPERM ? Errno.EINVAL : error);

            // No page is shared between domains.
            case Command.GetSharingFreedPages:
            case Command.GetSharingSharedPages:
                return 0;

            // The M2P table of 32-bit guests, of which there are none.
            case Command.MachphysCompatMfnList:
                return -(long)Errno.EOPNOTSUPP;

            // For the privileged domain.
            case Command.MachineMemoryMap:
                return -(long)Errno.EPERM;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    /// <summary>
    /// Whether an id names the caller (rcu_lock_domain_by_any_id, and the right to look): by DOMID_SELF or by number.
    /// </summary>
    internal static bool IsOwn(VcpuContext* vcpu, ushort domain, out Errno error)
    {
        error = domain == DomainId.Self.Value || domain == vcpu->Domain->State->Id ? Errno.None
            : ForeignDomain.Exists(vcpu->Domain, domain) ? Errno.EPERM : Errno.ESRCH;
        return error == Errno.None;
    }

    private static long OfDomain(VcpuContext* vcpu, ulong pointer, ulong value)
    {
        if (!GuestAccess.Read(vcpu, pointer, out ushort domain))
            return -(long)Errno.EFAULT;
        return IsOwn(vcpu, domain, out Errno error) ? (long)value : -(long)error;
    }

    /// <summary>The physmap of a PV domain is its own: nothing is added to it or removed from it.</summary>
    private static Errno RefusePhysmapChange(VcpuContext* vcpu, Command command, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out PhysmapChange change))
            return Errno.EFAULT;
        if (command == Command.AddToPhysmap && change.Space == ForeignSpace)
            return Errno.ENOSYS;
        if (command == Command.AddToPhysmapBatch && change.Size == RangeSpace)
            return Errno.EOPNOTSUPP;
        return IsOwn(vcpu, change.Domain, out Errno error) || error == Errno.EPERM ? Errno.EACCES : error;
    }

    private static Errno RefuseClaim(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out Reservation claim))
            return Errno.EFAULT;

        // DOMID_SELF names nobody here.
        bool valid = claim.ExtentStart == 0 && claim.ExtentOrder == 0 && claim.Flags == 0
            && ForeignDomain.Exists(vcpu->Domain, claim.Domain);
        return valid ? Errno.EPERM : Errno.EINVAL;
    }

    private static Errno GetVnumainfo(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out VirtualNumaTopology topology))
            return Errno.EFAULT;
        if (topology.Padding != 0)
            return Errno.EINVAL;
        return IsOwn(vcpu, topology.Domain, out Errno error) ? Errno.EOPNOTSUPP : error;
    }

    /// <summary>There is no device, so no memory is reserved for one.</summary>
    private static Errno GetReservedDeviceMemory(VcpuContext* vcpu, ulong pointer)
    {
        const uint all = 1;
        if (!GuestAccess.Read(vcpu, pointer, out ReservedDeviceMemoryMap map) || !new VirtualAddress(map.Buffer).IsGuest)
            return Errno.EFAULT;
        if ((map.Flags & ~all) != 0)
            return Errno.EINVAL;
        map.EntryCount = 0;
        return GuestAccess.Write(vcpu, pointer, map) ? Errno.None : Errno.EFAULT;
    }

    /// <summary>As many entries as the guest has room for, of the one that there is.</summary>
    private static long GetMemoryMap(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out MemoryMap map))
            return -(long)Errno.EFAULT;
        if (vcpu->Domain->State->MemoryMapEntries == 0)
            return -(long)Errno.ENOSYS;
        map.EntryCount = Math.Min(map.EntryCount, vcpu->Domain->State->MemoryMapEntries);
        return GuestAccess.CopyTo(vcpu, map.Buffer, vcpu->Domain->MemoryMap, map.EntryCount * (ulong)sizeof(E820Entry))
            && GuestAccess.Write(vcpu, pointer, map) ? 0 : -(long)Errno.EFAULT;
    }

    private static Errno SetMemoryMap(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out ForeignMemoryMap map))
            return Errno.EFAULT;
        if (map.Map.EntryCount > E820Entry.MaxEntries)
            return Errno.EINVAL;
        if (!IsOwn(vcpu, map.Domain, out Errno error))
            return error;

        // A map of which only a part can be read leaves the old one.
        E820Entry* entries = stackalloc E820Entry[E820Entry.MaxEntries];
        ulong size = map.Map.EntryCount * (ulong)sizeof(E820Entry);
        if (!GuestAccess.CopyFrom(vcpu, map.Map.Buffer, entries, size))
            return Errno.EFAULT;
        Unsafe.CopyBlock(vcpu->Domain->MemoryMap, entries, (uint)size);
        vcpu->Domain->State->MemoryMapEntries = map.Map.EntryCount;
        return Errno.None;
    }

    /// <summary>Permissions of single pages are for domains with a translated physmap, and never one's own.</summary>
    private static Errno RefuseAccessOp(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out MemoryAccess access))
            return Errno.EFAULT;
        Errno error = RefuseRemote(vcpu, access.Domain);
        return error == Errno.None ? Errno.EINVAL : error;
    }

    /// <summary>Resources are mapped by whoever has rights over another domain.</summary>
    private static Errno RefuseResource(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out AcquiredResource resource))
            return Errno.EFAULT;
        if (resource.Padding != 0 || resource.Frame >> 32 != 0 || (resource.Frame + resource.FrameCount) >> 32 != 0)
            return Errno.EINVAL;
        Errno error = RefuseRemote(vcpu, resource.Domain);
        return error == Errno.None ? Errno.EPERM : error;
    }

    /// <summary>Another domain by number: the caller's own is refused (rcu_lock_remote_domain_by_id).</summary>
    private static Errno RefuseRemote(VcpuContext* vcpu, ushort domain)
        => domain == vcpu->Domain->State->Id ? Errno.EPERM : ForeignDomain.Exists(vcpu->Domain, domain) ? Errno.None : Errno.ESRCH;

    /// <summary>
    /// The frames that the M2P table lies in: of each 2 MiB of it the first. Where there is no table, below the first frame of
    /// memory, the next one that there is stands, as Xen repeats the last one in holes.
    /// </summary>
    /// <remarks>The numbers are real, and nobody but a privileged domain may map them.</remarks>
    private static Errno GetMachphysMfnList(VcpuContext* vcpu, ulong pointer)
    {
        const ulong extentSize = 1UL << 21;
        if (!GuestAccess.Read(vcpu, pointer, out MachphysMfnList list))
            return Errno.EFAULT;
        MachineMemory memory = vcpu->Domain->Memory;
        ulong hole = memory.FirstFrame.Value * sizeof(ulong);
        ulong size = memory.EndFrame.Value * sizeof(ulong);
        uint extent = 0;
        for (ulong offset = 0; extent != list.MaxExtents && offset < size; extent++, offset += extentSize)
        {
            Mfn frame = vcpu->Domain->MachineToPhysFrame + ((Math.Max(offset, hole) - hole) >> Paging.PageShift);
            if (!GuestAccess.Write(vcpu, list.ExtentStart + (extent * sizeof(ulong)), frame.Value))
                return Errno.EFAULT;
        }

        list.ExtentCount = extent;
        return GuestAccess.Write(vcpu, pointer, list) ? Errno.None : Errno.EFAULT;
    }

    private static long GetMachphysMapping(VcpuContext* vcpu, ulong pointer)
    {
        // The same for every domain, as Xen's: one that is saved goes on with what it was told, among other machine frames. There are holes.
        ulong start = vcpu->Domain->MachineToPhysStart.Value;
        var mapping = new MachphysMapping
        {
            Start = start,
            End = start + (MachineToPhysEntries * sizeof(ulong)),
            MaxMfn = MachineToPhysEntries - 1,
        };
        return GuestAccess.Write(vcpu, pointer, mapping) ? 0 : -(long)Errno.EFAULT;
    }

    /// <summary>Extents done so far, always: a caller learns of a failure by getting fewer than it asked for.</summary>
    private static long ChangeReservation(VcpuContext* vcpu, Command command, in HypercallArguments arguments)
    {
        ulong done = arguments.A0 >> ExtentShift;
        if (!GuestAccess.Read(vcpu, arguments.A1, out Reservation reservation))
            return (long)done;
        if (reservation.ExtentCount > MaxExtents || done >= reservation.ExtentCount || reservation.ExtentOrder > MaxOrder)
            return (long)done;
        if (!IsOwn(vcpu, reservation.Domain, out _) || !MayName(reservation.Flags)
            || !TryLimit(vcpu, reservation.Flags, out ulong limit))
            return (long)done;
        bool told = command != Command.IncreaseReservation || reservation.ExtentStart != 0;
        if (told && !new VirtualAddress(reservation.ExtentStart).IsGuest)
            return (long)done;
        if (command == Command.PopulatePhysmap && (reservation.Flags & PopulateOnDemand) != 0)
            return (long)done;
        for (ulong first = done; done < reservation.ExtentCount; done++)
        {
            if (done != first && vcpu->PreemptionDue)
            {
                HypercallArguments rest = arguments;
                rest.A0 = (ulong)command | (done << ExtentShift);
                return Continuation.Create(vcpu, rest);
            }

            ulong extent = reservation.ExtentStart + (done * sizeof(ulong));
            bool good = command == Command.DecreaseReservation
                ? GiveBack(vcpu, extent, (int)reservation.ExtentOrder)
                : Take(vcpu, told ? extent : 0, told, (int)reservation.ExtentOrder, limit, command == Command.PopulatePhysmap);
            if (!good)
                break;
        }

        return (long)done;
    }

    private static bool GiveBack(VcpuContext* vcpu, ulong extent, int order)
    {
        if (!GuestAccess.Read(vcpu, extent, out ulong first))
            return false;
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        for (ulong i = 0; i < 1UL << order; i++)
        {
            FrameInfo* info = frames->GetPage(new Mfn(first + i), vcpu->Domain->State->Id);
            if (info == null)
                return false;
            bool special = info->Has(FrameFlags.Special);

            // Still mapped somewhere, it stays until the last mapping goes; until then it can be given up again, to no effect.
            if (!special && info->TryDisown())
                frames->PutPage(info);
            frames->PutPage(info);
            if (special)
                return false;
        }

        return true;
    }

    /// <summary>
    /// Whether the flags of a reservation name a NUMA node as they may: which it is is not the domain's to say, so that a wish is
    /// ignored and a demand refused (propagate_node).
    /// </summary>
    internal static bool MayName(uint flags) => (flags & NodeMask) == 0 || (flags & ExactNodeRequest) == 0;

    /// <summary>What the address bits in the flags of a reservation ask of its frames. False where there can be no such frame.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="flags">XENMEMF_*.</param>
    /// <param name="limit">The frames' numbers are below this.</param>
    internal static bool TryLimit(VcpuContext* vcpu, uint flags, out ulong limit)
    {
        limit = ulong.MaxValue;
        int addressBits = (int)(flags & AddressBitsMask);
        int all = Paging.PageShift + BitOperations.Log2(BitOperations.RoundUpToPowerOf2(vcpu->Domain->Memory.EndFrame.Value));
        if (addressBits != 0 && addressBits < all)
        {
            if (addressBits <= Paging.PageShift)
                return false;
            limit = 1UL << (addressBits - Paging.PageShift);
        }

        return true;
    }

    private static bool Take(VcpuContext* vcpu, ulong extent, bool told, int order, ulong limit, bool populate)
    {
        ulong pfn = Mfn.Invalid.Value;
        if (populate && !GuestAccess.Read(vcpu, extent, out pfn))
            return false;
        if (!FrameTable.Of(vcpu->Domain)->TryReserve(FrameFlags.None, order, limit, out Mfn frame))
            return false;
        Receive(vcpu, frame, order, pfn);
        return !told || GuestAccess.Write(vcpu, extent, frame.Value);
    }

    /// <summary>Makes reserved frames the domain's: empty, and with their pfns unless those are not known (-1).</summary>
    internal static void Receive(VcpuContext* vcpu, Mfn frame, int order, ulong pfn)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);

        // A translation to the frame may be left from its earlier life, and the frame remembers no type to flush for.
        TlbFlush.OnThisVcpu(vcpu);
        for (ulong i = 0; i < 1UL << order; i++)
        {
            // Inside the VM an entry may have been stored again in what was a page table, after it became free and was scrubbed.
            if (frames->Find(frame + i)->Has(FrameFlags.NeedScrub) || vcpu->Domain->MayBeShadowed(frame + i))
                frames->Clear(frame + i);
            GuestAccess.Written(vcpu, frame + i, 0, Paging.PageSize);
            vcpu->Domain->MachineToPhys[vcpu->Domain->Memory.IndexOf(frame + i)] = pfn == Mfn.Invalid.Value ? pfn : pfn + i;
        }

        frames->Assign(FrameFlags.None, order, frame);
    }
}
