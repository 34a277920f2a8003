// physdev_op (33).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>I/O privilege, and the interrupt controller that an unprivileged domain does not have.</summary>
internal static unsafe class PhysdevOp
{
    private const uint MaxIopl = 3;
    private const uint PortCount = 65536;
    private const int IoplShift = 12;

    private enum Command : uint
    {
        IrqEoiObsolete = 1,
        Eoi = 12,
        IrqStatusQuery = 5,
        SetIopl = 6,
        SetIobitmap = 7,
        ApicRead = 8,
        ApicWrite = 9,
        AllocIrqVector = 10,
        MapPirq = 13,
        UnmapPirq = 14,
        ManagePciAdd = 15,
        ManagePciRemove = 16,
        RestoreMsi = 19,
        ManagePciAddExt = 20,
        SetupGsi = 21,
        GetFreePirq = 23,
        PciMmcfgReserved = 24,
        PciDeviceAdd = 25,
        PciDeviceRemove = 26,
        RestoreMsiExt = 27,
        PirqEoiGmfn1 = 17,
        PirqEoiGmfn2 = 28,
        PrepareMsix = 30,
        ReleaseMsix = 31,
        DbgpOp = 29,
    }

    /// <summary>struct physdev_set_iobitmap.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct IoBitmapRequest
    {
        public ulong Bitmap;
        public uint PortCount;
    }

    /// <summary>physdev_op_compat(struct physdev_op): the older commands, with the argument 8 bytes behind the command.</summary>
    public static long ExecuteCompat(Vcpu vcpu, in HypercallArguments arguments)
    {
        const ulong argumentOffset = 8;
        if (!GuestAccess.Read(vcpu.Context, arguments.A0, out uint command))
            return -(long)Errno.EFAULT;
        return (Command)command is Command.IrqStatusQuery or Command.SetIopl or Command.SetIobitmap
            or Command.ApicRead or Command.ApicWrite or Command.AllocIrqVector
            ? Execute(vcpu, new HypercallArguments { A0 = command, A1 = arguments.A0 + argumentOffset })
            : -(long)Errno.EINVAL;
    }

    /// <summary>physdev_op(command, argument).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        switch ((Command)(uint)arguments.A0)
        {
            case Command.SetIopl:
                if (!GuestAccess.Read(context, arguments.A1, out uint level))
                    return -(long)Errno.EFAULT;
                if (level > MaxIopl)
                    return -(long)Errno.EINVAL;
                context->State->Iopl = (ulong)level << IoplShift;
                return 0;
            case Command.SetIobitmap:
                if (!GuestAccess.Read(context, arguments.A1, out IoBitmapRequest request))
                    return -(long)Errno.EFAULT;
                if (request.PortCount > PortCount || (request.PortCount != 0 && !new VirtualAddress(request.Bitmap).IsGuest))
                    return -(long)Errno.EINVAL;
                context->State->IoBitmap = request.Bitmap;
                context->State->IoBitmapPorts = request.PortCount;
                return 0;

            // No physical interrupt was ever given to the domain.
            case Command.Eoi:
            case Command.IrqStatusQuery:
            case Command.GetFreePirq:
                return -(long)(GuestAccess.Read(context, arguments.A1, out uint _) ? Errno.EINVAL : Errno.EFAULT);
            case Command.AllocIrqVector:
            case Command.ApicRead:
            case Command.ApicWrite:
            case Command.MapPirq:
            case Command.UnmapPirq:
            case Command.ManagePciAdd:
            case Command.ManagePciRemove:
            case Command.ManagePciAddExt:
            case Command.RestoreMsi:
            case Command.RestoreMsiExt:
            case Command.SetupGsi:
            case Command.PciMmcfgReserved:
            case Command.PciDeviceAdd:
            case Command.PciDeviceRemove:
            case Command.PrepareMsix:
            case Command.ReleaseMsix:
            case Command.DbgpOp:
                return -(long)Errno.EPERM;
            default:
                return -(long)Errno.ENOSYS;
        }
    }
}
