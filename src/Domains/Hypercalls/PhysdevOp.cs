// physdev_op (33).
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.EventChannels;
using XenSharp.Mmu;

namespace XenSharp.Domains.Hypercalls;

/// <summary>I/O privilege, and the interrupt controller that an unprivileged domain does not have.</summary>
internal static unsafe class PhysdevOp
{
    private const uint MaxIopl = 3;
    private const uint PortCount = 65536;
    private const int IoplShift = 12;

    /// <summary>Bytes of the longest structure, physdev_map_pirq.</summary>
    private const int MaxSize = 40;

    private enum Command : uint
    {
        IrqUnmaskNotify = 4,
        IrqStatusQuery = 5,
        SetIopl = 6,
        SetIobitmap = 7,
        ApicRead = 8,
        ApicWrite = 9,
        AllocIrqVector = 10,
        Eoi = 12,
        MapPirq = 13,
        UnmapPirq = 14,
        ManagePciAdd = 15,
        ManagePciRemove = 16,
        PirqEoiGmfn1 = 17,
        RestoreMsi = 19,
        ManagePciAddExt = 20,
        SetupGsi = 21,
        GetFreePirq = 23,
        PciMmcfgReserved = 24,
        PciDeviceAdd = 25,
        PciDeviceRemove = 26,
        RestoreMsiExt = 27,
        PirqEoiGmfn2 = 28,
        DbgpOp = 29,
        PrepareMsix = 30,
        ReleaseMsix = 31,
    }

    /// <summary>struct physdev_set_iobitmap.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct IoBitmapRequest
    {
        public ulong Bitmap;
        public uint PortCount;
    }

    /// <summary>struct physdev_op.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 24)]
    private struct CompatRequest
    {
        public const ulong ArgumentOffset = 8;

        public uint Command;
    }

    /// <summary>struct physdev_irq_status_query, and physdev_get_free_pirq, whose type comes first and whose answer second.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Interrupt
    {
        public uint Number, Answer;
    }

    /// <summary>struct physdev_manage_pci_ext.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 16)]
    private struct PciFunction
    {
        [FieldOffset(4)] public uint IsExtended;
        [FieldOffset(8)] public uint IsVirtual;
    }

    /// <summary>struct physdev_map_pirq.</summary>
    [StructLayout(LayoutKind.Explicit, Size = MaxSize)]
    private struct PirqMapping
    {
        // MAP_PIRQ_TYPE_*.
        public const int Message = 0;
        public const int MessageOfSegment = 3;
        public const int MultiMessage = 4;

        [FieldOffset(0)] public ushort Domain;
        [FieldOffset(4)] public int Type;
        [FieldOffset(32)] public ulong TableBase;
    }

    /// <summary>physdev_op_compat(struct physdev_op): any command, with the argument 8 bytes behind it.</summary>
    public static long ExecuteCompat(Vcpu vcpu, in HypercallArguments arguments)
        => GuestAccess.Read(vcpu.Context, arguments.A0, out CompatRequest request)
            ? Execute(vcpu, new HypercallArguments { A0 = request.Command, A1 = arguments.A0 + CompatRequest.ArgumentOffset })
            : -(long)Errno.EFAULT;

    /// <summary>physdev_op(command, argument).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        ulong argument = arguments.A1;
        var command = (Command)(uint)arguments.A0;
        switch (command)
        {
            case Command.SetIopl:
                if (!GuestAccess.Read(context, argument, out uint level))
                    return -(long)Errno.EFAULT;
                if (level > MaxIopl)
                    return -(long)Errno.EINVAL;
                context->State->Iopl = (ulong)level << IoplShift;
                return 0;
            case Command.SetIobitmap:
                if (!GuestAccess.Read(context, argument, out IoBitmapRequest request))
                    return -(long)Errno.EFAULT;
                if (request.PortCount > PortCount || !new VirtualAddress(request.Bitmap).IsGuest)
                    return -(long)Errno.EINVAL;
                context->State->IoBitmap = request.Bitmap;
                context->State->IoBitmapPorts = request.PortCount;
                return 0;
            case Command.IrqUnmaskNotify:
                // Looks through the ports bound to interrupts, of which there are none.
                return 0;
            case Command.Eoi:
                if (!GuestAccess.Read(context, argument, out uint ended))
                    return -(long)Errno.EFAULT;
                return vcpu.Domain.PhysicalInterrupts.IsTaken(ended) ? 0 : -(long)Errno.EINVAL;
            case Command.IrqStatusQuery:
                return StatusOf(context, argument);
            case Command.GetFreePirq:
                return GetFreePirq(vcpu, argument);
            case Command.PirqEoiGmfn1:
            case Command.PirqEoiGmfn2:
                return GuestAccess.Read(context, argument, out ulong frame) ? -(long)SetEoiFrame(vcpu, new Mfn(frame)) : -(long)Errno.EFAULT;
            case Command.PciMmcfgReserved:
            case Command.DbgpOp:
                return -(long)Errno.EPERM;
            default:
                return Refuse(vcpu, command, argument);
        }
    }

    /// <summary>What needs hardware or a privilege: the argument is read before it is said so.</summary>
    private static long Refuse(Vcpu vcpu, Command command, ulong argument)
    {
        int size = SizeOf(command);
        if (size == 0)
            return -(long)Errno.ENOSYS;
        byte* bytes = stackalloc byte[MaxSize];
        if (!GuestAccess.CopyFrom(vcpu.Context, argument, bytes, (ulong)size))
            return -(long)Errno.EFAULT;
        switch (command)
        {
            case Command.SetupGsi when *(uint*)bytes >= EventChannelDomain.LineCount:
            case Command.ManagePciAddExt when ((PciFunction*)bytes)->IsExtended > 1 || ((PciFunction*)bytes)->IsVirtual > 1:
                return -(long)Errno.EINVAL;
            case Command.MapPirq:
                var map = (PirqMapping*)bytes;
                if (map->Type == PirqMapping.MultiMessage && map->TableBase != 0)
                    return -(long)Errno.EINVAL;
                if (map->Type == PirqMapping.MessageOfSegment)
                    map->Type = PirqMapping.Message;

                // The structure is written back whatever came of it.
                long result = RefuseFor(vcpu, map->Domain);
                return GuestAccess.CopyTo(vcpu.Context, argument, bytes, (ulong)size) ? result : -(long)Errno.EFAULT;
            case Command.UnmapPirq:
                return RefuseFor(vcpu, *(ushort*)bytes);
            case Command.RestoreMsi or Command.RestoreMsiExt:
                return -(long)Errno.ENODEV;
            default:
                return -(long)Errno.EPERM;
        }
    }

    private static long RefuseFor(Vcpu vcpu, ushort domain)
        => -(long)(domain == DomainId.Self.Value || vcpu.Domain.Knows(domain) ? Errno.EPERM : Errno.ESRCH);

    /// <summary>Bytes of the argument of a command that is refused; 0 where there is no such command.</summary>
    private static int SizeOf(Command command) => command switch
    {
        Command.ManagePciAdd or Command.ManagePciRemove or Command.RestoreMsi => 2,
        Command.PciDeviceRemove or Command.RestoreMsiExt or Command.PrepareMsix or Command.ReleaseMsix => 4,
        Command.AllocIrqVector or Command.UnmapPirq or Command.SetupGsi => 8,
        Command.PciDeviceAdd => 12,
        Command.ApicRead or Command.ApicWrite or Command.ManagePciAddExt => 16,
        Command.MapPirq => MaxSize,
        _ => 0,
    };

    private static long StatusOf(VcpuContext* context, ulong argument)
    {
        // XENIRQSTAT_needs_eoi: said of every number, for Xen would know only of those whose frame of bits it has.
        const uint needsEoi = 1;
        if (!GuestAccess.Read(context, argument, out Interrupt interrupt))
            return -(long)Errno.EFAULT;
        if (interrupt.Number >= EventChannelDomain.PirqCount)
            return -(long)Errno.EINVAL;
        interrupt.Answer = needsEoi;
        return GuestAccess.Write(context, argument, interrupt) ? 0 : -(long)Errno.EFAULT;
    }

    private static long GetFreePirq(Vcpu vcpu, ulong argument)
    {
        // MAP_PIRQ_TYPE_GSI.
        const uint line = 1;
        if (!GuestAccess.Read(vcpu.Context, argument, out Interrupt request))
            return -(long)Errno.EFAULT;
        if (vcpu.Domain.PhysicalInterrupts.Take(request.Number == line) is not { } number)
            return -(long)Errno.ENOSPC;
        request.Answer = number;
        return GuestAccess.Write(vcpu.Context, argument, request) ? 0 : -(long)Errno.EFAULT;
    }

    private static Errno SetEoiFrame(Vcpu vcpu, Mfn frame)
    {
        // The reference keeps the frame the guest's and writable; nothing is ever written, as no interrupt ever comes.
        if (PageTables.GetPageAndType(vcpu.Context, frame, PageType.Writable, out FrameInfo* info) != Errno.None)
            return Errno.EINVAL;
        PhysicalInterrupts interrupts = vcpu.Domain.PhysicalInterrupts;
        if (interrupts.EoiFrame is not null)
        {
            _ = PageTables.PutPageAndType(vcpu.Context, frame, info);
            return Errno.EBUSY;
        }

        interrupts.EoiFrame = frame.Value;
        return Errno.None;
    }
}
