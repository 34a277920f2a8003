// GNTTABOP_transfer.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>Gives frames away for good. One that nobody takes is lost to its domain, as on Xen.</summary>
internal static unsafe class GrantTransfer
{
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        for (uint i = 0; i < (uint)arguments.A2; i++)
        {
            if (i != 0 && vcpu.Context->PreemptionDue)
                return GrantTableOp.Continue(vcpu, arguments, i, sizeof(TransferFrame));
            ulong pointer = arguments.A1 + (i * (ulong)sizeof(TransferFrame));
            if (!GuestAccess.Read(vcpu.Context, pointer, out TransferFrame op)
                || !GuestAccess.Write(vcpu.Context, pointer + TransferFrame.StatusOffset, Transfer(vcpu, op)))
                return -(long)Errno.EFAULT;
        }

        return 0;
    }

    private static GrantStatus Transfer(Vcpu vcpu, in TransferFrame op)
    {
        DomainContext* domain = vcpu.Context->Domain;
        var frame = new Mfn(op.Frame);
        GrantTable own = vcpu.Domain.Grants;
        GrantTable? receiver = vcpu.Domain.FindGrants(op.Domain);

        // Whoever looks at entries comes before whoever takes frames.
        lock (own.Lock)
        {
            if (!FrameTransfer.TryBegin(domain, frame))
                return GrantStatus.BadPage;

            // The manager waits for no frame.
            bool accepted = receiver == own && FrameTransfer.HasRoom(domain) && own.TryCommitTransfer(op.Reference, vcpu.Domain.Id.Value);
            FrameTransfer.End(domain, frame, accepted);
            if (accepted)
                domain->MachineToPhys[domain->Memory.IndexOf(frame)] = own.CompleteTransfer(op.Reference, frame).Value;
            GrantMapping.Flush(vcpu.Context);
            return accepted ? GrantStatus.Okay : receiver == null ? GrantStatus.BadDomain : GrantStatus.GeneralError;
        }
    }
}
