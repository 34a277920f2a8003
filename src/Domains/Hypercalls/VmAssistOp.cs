// vm_assist (21).
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>Turning the domain's assists on and off.</summary>
internal static unsafe class VmAssistOp
{
    /// <summary>What Xen 4.17 lets a 64-bit PV domain set.</summary>
    internal const VmAssist Valid = VmAssist.FourGigabyteSegments | VmAssist.FourGigabyteSegmentsNotify | VmAssist.WritablePageTables
        | VmAssist.PaeExtendedCr3 | VmAssist.ArchitecturalIopl | VmAssist.RunstateUpdateFlag | VmAssist.M2PStrict;

    private enum Command : uint
    {
        Enable = 0,
        Disable = 1,
    }

    /// <summary>vm_assist(command, type).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        uint type = (uint)arguments.A1;
        if (type >= 64 || (Valid & (VmAssist)(1UL << (int)type)) == 0)
            return -(long)Errno.EINVAL;
        ref ulong assists = ref vcpu.Context->Domain->State->VmAssists;
        ulong bit = 1UL << (int)type;
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Enable:
                _ = Interlocked.Or(ref assists, bit);
                return 0;
            case Command.Disable:
                _ = Interlocked.And(ref assists, ~bit);
                return 0;
            default:
                return -(long)Errno.ENOSYS;
        }
    }
}
