// hvm_op (34).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>The hypercall of HVM domains, as Xen answers it to a PV domain, of which there are no others here.</summary>
internal static unsafe class HvmOp
{
    /// <summary>HVM_NR_PARAMS of 4.17.</summary>
    private const uint ParameterCount = 39;

    private const int TraceBytes = 28;

    /// <summary>Bits that a trace event can have (TRC_SUBCLS_SHIFT).</summary>
    private const uint TraceEvents = 0xfff;

    private enum Command : ulong
    {
        SetParam = 0,
        GetParam = 1,
        FlushTlbs = 5,
        PagetableDying = 9,
        GetTime = 10,
        Xentrace = 11,
        GetMemType = 15,
        SetEvtchnUpcallVector = 23,
        GuestRequestVmEvent = 24,
        Altp2m = 25,
    }

    /// <summary>struct xen_hvm_param, and with its size the others that begin with a domain.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Parameter
    {
        public ushort Domain;
        public uint Index;
        public ulong Value;
    }

    /// <summary>struct xen_hvm_xentrace.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Trace
    {
        public ushort Event, ExtraBytes;
        public fixed byte Extra[TraceBytes];
    }

    /// <summary>hvm_op(command, argument).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        ulong argument = arguments.A1;
        switch ((Command)arguments.A0)
        {
            case Command.SetParam:
            case Command.GetParam:
                if (!GuestAccess.Read(vcpu.Context, argument, out Parameter parameter))
                    return -(long)Errno.EFAULT;
                return -(long)(parameter.Index < ParameterCount && !IsKnown(vcpu, parameter.Domain) ? Errno.ESRCH : Errno.EINVAL);
            case Command.PagetableDying:
            case Command.GetMemType:
                if (!GuestAccess.Read(vcpu.Context, argument, out Parameter request))
                    return -(long)Errno.EFAULT;
                return Refuse(vcpu, (Command)arguments.A0, request.Domain);
            case Command.GetTime:
                return GuestAccess.Write(vcpu.Context, argument, vcpu.Domain.Time.SystemTime) ? 0 : -(long)Errno.EFAULT;
            case Command.Xentrace:
                if (!GuestAccess.Read(vcpu.Context, argument, out Trace trace))
                    return -(long)Errno.EFAULT;
                return trace.ExtraBytes > TraceBytes || (trace.Event & ~TraceEvents) != 0 ? -(long)Errno.EINVAL : 0;
            case Command.GuestRequestVmEvent:
                // Nobody ever listens.
                return argument == 0 ? 0 : -(long)Errno.EINVAL;
            case Command.FlushTlbs:
            case Command.SetEvtchnUpcallVector:
                return -(long)Errno.EINVAL;
            case Command.Altp2m:
                return -(long)Errno.EOPNOTSUPP;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    private static bool IsKnown(Vcpu vcpu, ushort domain) => domain == DomainId.Self.Value || vcpu.Domain.Knows(domain);

    /// <summary>Another domain is looked for and then refused, each operation in its own way.</summary>
    private static long Refuse(Vcpu vcpu, Command command, ushort domain)
    {
        if (!IsKnown(vcpu, domain))
            return -(long)Errno.ESRCH;
        bool own = domain == DomainId.Self.Value || domain == vcpu.Domain.Id.Value;
        return -(long)(own ? Errno.EINVAL : command == Command.GetMemType ? Errno.EPERM : Errno.EOPNOTSUPP);
    }
}
