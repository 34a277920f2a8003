// memory_op (12).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>The domain's memory: its size, its map, and the frames that it gives back and takes.</summary>
public static unsafe class MemoryOp
{
    /// <summary>The command is in the low bits, the extents done by an earlier part of the call above them.</summary>
    private const int ExtentShift = 6;

    /// <summary>Largest extent that an unprivileged domain may ask for (CONFIG_DOMU_MAX_ORDER).</summary>
    private const uint MaxOrder = 9;

    private const ulong RamType = 1;

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
        AddToPhysmapBatch = 23,
        ClaimPages = 24,
        GetVnumainfo = 26,
        ReservedDeviceMemoryMap = 27,
    }

    /// <summary>struct xen_memory_reservation.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 32)]
    private struct Reservation
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

    /// <summary>struct e820entry, packed.</summary>
    [StructLayout(LayoutKind.Sequential, Pack = 1)]
    private struct E820Entry
    {
        public ulong Address;
        public ulong Size;
        public uint Type;
    }

    /// <summary>struct xen_machphys_mapping.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct MachphysMapping
    {
        public ulong Start;
        public ulong End;
        public ulong MaxMfn;
    }

    /// <summary>memory_op(command, argument).</summary>
    public static long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        var command = (Command)((uint)arguments.A0 & ((1u << ExtentShift) - 1));
        DomainState* domain = vcpu->Domain->State;
        switch (command)
        {
            case Command.IncreaseReservation:
            case Command.DecreaseReservation:
            case Command.PopulatePhysmap:
                return ChangeReservation(vcpu, command, arguments);
            case Command.MaximumRamPage:
                return (long)vcpu->Domain->Memory.EndFrame.Value - 1;
            case Command.CurrentReservation:
                return OfDomain(vcpu, arguments.A1, domain->OwnedPages);
            case Command.MaximumReservation:
                return OfDomain(vcpu, arguments.A1, domain->MaxPages);
            case Command.MaximumGpfn:
                return OfDomain(vcpu, arguments.A1, *(ulong*)(vcpu->Domain->SharedInfo + SharedInfoLayout.MaxPfn));
            case Command.MemoryMap:
                return GetMemoryMap(vcpu, arguments.A1);
            case Command.MachphysMapping:
                return GetMachphysMapping(vcpu, arguments.A1);

            // For domains whose physmap the hypervisor translates; a PV domain's is its own.
            case Command.AddToPhysmap:
            case Command.AddToPhysmapBatch:
            case Command.RemoveFromPhysmap:
            case Command.MachineMemoryMap:
            case Command.SetMemoryMap:
            case Command.SetPodTarget:
            case Command.GetPodTarget:
            case Command.ClaimPages:
                return -(long)Errno.EPERM;
            case Command.GetVnumainfo:
                return -(long)Errno.EOPNOTSUPP;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    private static long OfDomain(VcpuContext* vcpu, ulong pointer, ulong value)
    {
        if (!GuestAccess.Read(vcpu, pointer, out ushort domain))
            return -(long)Errno.EFAULT;
        return domain == DomainId.Self.Value || domain == vcpu->Domain->State->Id ? (long)value : -(long)Errno.ESRCH;
    }

    private static long GetMemoryMap(VcpuContext* vcpu, ulong pointer)
    {
        if (!GuestAccess.Read(vcpu, pointer, out MemoryMap map))
            return -(long)Errno.EFAULT;
        if (map.EntryCount < 1)
            return -(long)Errno.EINVAL;
        var entry = new E820Entry { Size = vcpu->Domain->State->MaxPages << Paging.PageShift, Type = (uint)RamType };
        map.EntryCount = 1;
        return GuestAccess.Write(vcpu, map.Buffer, entry) && GuestAccess.Write(vcpu, pointer, map) ? 0 : -(long)Errno.EFAULT;
    }

    private static long GetMachphysMapping(VcpuContext* vcpu, ulong pointer)
    {
        ulong end = vcpu->Domain->Memory.EndFrame.Value;
        ulong start = vcpu->Domain->MachineToPhysStart.Value;
        var mapping = new MachphysMapping { Start = start, End = start + (end * sizeof(ulong)), MaxMfn = end - 1 };
        return GuestAccess.Write(vcpu, pointer, mapping) ? 0 : -(long)Errno.EFAULT;
    }

    /// <summary>Extents done so far, always: a caller learns of a failure by getting fewer than it asked for.</summary>
    private static long ChangeReservation(VcpuContext* vcpu, Command command, in HypercallArguments arguments)
    {
        ulong done = (uint)arguments.A0 >> ExtentShift;
        if (!GuestAccess.Read(vcpu, arguments.A1, out Reservation reservation))
            return (long)done;
        if (reservation.ExtentCount > ulong.MaxValue >> ExtentShift || done >= reservation.ExtentCount || reservation.ExtentOrder > MaxOrder)
            return (long)done;
        if (reservation.Domain != DomainId.Self.Value && reservation.Domain != vcpu->Domain->State->Id)
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
                : Take(vcpu, reservation.ExtentStart == 0 ? 0 : extent, (int)reservation.ExtentOrder, command == Command.PopulatePhysmap);
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
            FrameInfo* info = frames->Find(new Mfn(first + i));
            if (info == null || info->Owner != vcpu->Domain->State->Id || !info->Has(FrameFlags.Allocated) || info->Has(FrameFlags.Special))
                return false;

            // Still mapped somewhere, it stays until the last mapping goes; the domain has given it up all the same.
            info->Flags &= ~FrameFlags.Allocated;
            vcpu->Domain->MachineToPhys[vcpu->Domain->Memory.IndexOf(new Mfn(first + i))] = Mfn.Invalid.Value;
            frames->PutPage(info);
        }

        return true;
    }

    private static bool Take(VcpuContext* vcpu, ulong extent, int order, bool populate)
    {
        DomainState* domain = vcpu->Domain->State;
        ulong pfn = Mfn.Invalid.Value;
        if (populate && !GuestAccess.Read(vcpu, extent, out pfn))
            return false;
        if (domain->OwnedPages + (1UL << order) > domain->MaxPages)
            return false;
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        if (!frames->TryAllocate(FrameFlags.None, order, out Mfn frame))
            return false;
        for (ulong i = 0; i < 1UL << order; i++)
        {
            frames->Clear(frame + i);
            GuestAccess.Written(vcpu, frame + i, 0, Paging.PageSize);
            vcpu->Domain->MachineToPhys[vcpu->Domain->Memory.IndexOf(frame + i)] = populate ? pfn + i : Mfn.Invalid.Value;
        }

        return extent == 0 || GuestAccess.Write(vcpu, extent, frame.Value);
    }
}
