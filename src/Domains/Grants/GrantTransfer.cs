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
        GrantTable? receiver = vcpu.Domain.EnterGrants(op.Domain);
        GrantStatus status = receiver == null || receiver.Owner == null || receiver == vcpu.Domain.Grants
            ? TransferToSelf(vcpu, op, receiver)
            : TransferTo(vcpu, op, receiver);
        vcpu.Domain.LeaveGrants(receiver);
        return status;
    }

    /// <summary>To the domain itself; or to nobody, as the manager waits for no frame.</summary>
    private static GrantStatus TransferToSelf(Vcpu vcpu, in TransferFrame op, GrantTable? receiver)
    {
        DomainContext* domain = vcpu.Context->Domain;
        var frame = new Mfn(op.Frame);
        GrantTable own = vcpu.Domain.Grants;

        // Whoever looks at entries comes before whoever takes frames.
        lock (own.Lock)
        {
            if (!FrameTransfer.TryBegin(domain, frame))
                return GrantStatus.BadPage;
            bool accepted = receiver == own && FrameTransfer.HasRoom(domain) && own.TryCommitTransfer(op.Reference, vcpu.Domain.Id.Value);
            FrameTransfer.End(domain, frame, accepted);
            if (accepted)
                domain->MachineToPhys[domain->Memory.IndexOf(frame)] = own.CompleteTransfer(op.Reference, frame).Value;
            GrantMapping.Flush(vcpu.Context);
            return accepted ? GrantStatus.Okay : vcpu.Domain.Knows(op.Domain) ? GrantStatus.GeneralError : GrantStatus.BadDomain;
        }
    }

    /// <summary>
    /// To another domain. Each VM has memory of its own, so the receiver gets the contents in a frame of its VM's, as Xen does it where a
    /// frame's number is too large for the receiver; it learns which from its entry.
    /// </summary>
    private static GrantStatus TransferTo(Vcpu vcpu, in TransferFrame op, GrantTable receiver)
    {
        DomainContext* domain = vcpu.Context->Domain;
        DomainContext* to = receiver.Owner!.Context;
        var frame = new Mfn(op.Frame);
        byte* contents = stackalloc byte[(int)Paging.PageSize];
        if (!FrameTransfer.TryBegin(domain, frame))
            return GrantStatus.BadPage;
        Buffer.MemoryCopy(domain->Memory.Page(frame), contents, Paging.PageSize, Paging.PageSize);
        FrameTransfer.End(domain, frame, giveBack: false);
        GrantMapping.Flush(vcpu.Context);
        if (!FrameTransfer.TryReserve(to, out Mfn received))
            return GrantStatus.GeneralError;
        lock (receiver.Lock)
        {
            if (!receiver.TryCommitTransfer(op.Reference, vcpu.Domain.Id.Value))
            {
                FrameTransfer.Refuse(to, received);
                return GrantStatus.GeneralError;
            }
        }

        FrameTransfer.Deliver(to, receiver.Owner.Outside.Machine, received, contents);
        lock (receiver.Lock)
            to->MachineToPhys[to->Memory.IndexOf(received)] = receiver.CompleteTransfer(op.Reference, received).Value;
        return GrantStatus.Okay;
    }
}
