// GNTTABOP_copy.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>Copies between pages, each one's own or granted. Neighbouring requests that name the same pages take them but once.</summary>
internal static unsafe class GrantCopy
{
    /// <summary>One end of a copy (struct gnttab_copy_buf).</summary>
    private struct End
    {
        /// <summary>Its domain's table, kept in place, or null; and the id that the guest gave for it.</summary>
        public GrantTable? Table;
        public ushort Domain;

        /// <summary>Whether <see cref="Page"/> is held: by a reference or as a frame, of that number; the destination writable.</summary>
        public bool IsTaken;
        public bool IsReference;
        public bool IsDestination;
        public ulong Name;
        public GrantedPage Page;
    }

    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        End source = default;
        End destination = default;
        destination.IsDestination = true;
        long result = 0;
        for (uint i = 0; i < (uint)arguments.A2; i++)
        {
            if (i != 0 && vcpu.Context->PreemptionDue)
            {
                result = GrantTableOp.Continue(vcpu, arguments, i, sizeof(CopyRequest));
                break;
            }

            ulong pointer = arguments.A1 + (i * (ulong)sizeof(CopyRequest));
            if (!GuestAccess.Read(vcpu.Context, pointer, out CopyRequest op))
            {
                result = -(long)Errno.EFAULT;
                break;
            }

            GrantStatus status = Copy(vcpu, op, ref source, ref destination);
            if (status != GrantStatus.Okay)
            {
                Release(vcpu, ref source);
                Release(vcpu, ref destination);
            }

            if (status == GrantStatus.Restart)
            {
                result = GrantTableOp.Continue(vcpu, arguments, i, sizeof(CopyRequest));
                break;
            }

            if (!GuestAccess.Write(vcpu.Context, pointer + CopyRequest.StatusOffset, status))
            {
                result = -(long)Errno.EFAULT;
                break;
            }
        }

        Leave(vcpu, ref source);
        Leave(vcpu, ref destination);
        return result;
    }

    private static GrantStatus Copy(Vcpu vcpu, in CopyRequest op, ref End source, ref End destination)
    {
        bool fromReference = (op.Flags & CopyFlags.SourceReference) != 0;
        bool toReference = (op.Flags & CopyFlags.DestinationReference) != 0;
        if (source.Table == null || op.Source.Domain != source.Domain || destination.Table == null || op.Destination.Domain != destination.Domain)
        {
            Leave(vcpu, ref source);
            Leave(vcpu, ref destination);
            GrantStatus found = EnterDomain(vcpu, op.Source.Domain, fromReference, ref source);
            if (found == GrantStatus.Okay)
                found = EnterDomain(vcpu, op.Destination.Domain, toReference, ref destination);
            if (found != GrantStatus.Okay)
            {
                Leave(vcpu, ref source);
                Leave(vcpu, ref destination);
                return found;
            }
        }

        GrantStatus status = Take(vcpu, op.Source, fromReference, ref source);
        if (status == GrantStatus.Okay)
            status = Take(vcpu, op.Destination, toReference, ref destination);
        if (status != GrantStatus.Okay)
            return status;
        if (op.Source.Offset + (ulong)op.Length > Paging.PageSize || op.Destination.Offset + (ulong)op.Length > Paging.PageSize)
            return GrantStatus.BadCopyArgument;
        if (!IsWithin(op.Source.Offset, op.Length, source.Page) || !IsWithin(op.Destination.Offset, op.Length, destination.Page))
            return GrantStatus.GeneralError;
        Buffer.MemoryCopy(source.Page.Host + op.Source.Offset, destination.Page.Host + op.Destination.Offset, op.Length, op.Length);
        if (op.Length != 0 && destination.Page.Table == vcpu.Domain.Grants)
            GuestAccess.Written(vcpu.Context, destination.Page.Frame, op.Destination.Offset, op.Length);
        return GrantStatus.Okay;
    }

    private static bool IsWithin(ushort offset, ushort length, in GrantedPage page)
        => offset >= page.Start && offset + length <= page.Start + page.Length;

    /// <summary>Only one's own pages can be named by frame, and only by DOMID_SELF.</summary>
    private static GrantStatus EnterDomain(Vcpu vcpu, ushort domain, bool isReference, ref End end)
    {
        end.Table = domain == DomainId.Self.Value ? vcpu.Domain.Grants : vcpu.Domain.EnterGrants(domain);
        end.Domain = domain;
        GrantStatus status = end.Table == null ? vcpu.Domain.WhyNotEntered(domain) : GrantStatus.Okay;
        return status != GrantStatus.BadDomain && domain != DomainId.Self.Value && !isReference ? GrantStatus.PermissionDenied : status;
    }

    private static void Leave(Vcpu vcpu, ref End end)
    {
        Release(vcpu, ref end);
        vcpu.Domain.LeaveGrants(end.Table);
        end.Table = null;
    }

    private static GrantStatus Take(Vcpu vcpu, in CopyPointer pointer, bool isReference, ref End end)
    {
        ulong name = isReference ? pointer.Reference : pointer.Frame;
        if (end.IsTaken && end.IsReference == isReference && end.Name == name)
            return GrantStatus.Okay;
        Release(vcpu, ref end);
        GrantTable table = end.Table!;
        if (isReference)
        {
            GrantStatus status = table.AcquireForCopy(pointer.Reference, vcpu.Domain.Id.Value, !end.IsDestination, vcpu.Domain, out end.Page);
            if (status != GrantStatus.Okay)
                return status;
        }
        else
        {
            end.Page = new GrantedPage { Table = table, Frame = new Mfn(name), Info = table.GetPage(new Mfn(name)), Length = (ushort)Paging.PageSize };
            if (end.Page.Info == null)
                return GrantStatus.BadPage;
        }

        end.IsReference = isReference;
        end.Name = name;
        if (end.IsDestination)
        {
            Errno error = end.Page.Table == vcpu.Domain.Grants
                ? PageTables.GetType(vcpu.Context, end.Page.Frame, end.Page.Info, PageType.Writable)
                : end.Page.Table.GetWritable(end.Page.Frame);
            if (error != Errno.None)
            {
                LetGo(vcpu, end);
                return error == Errno.ERESTART ? GrantStatus.Restart : GrantStatus.GeneralError;
            }
        }

        end.IsTaken = true;
        return GrantStatus.Okay;
    }

    private static void Release(Vcpu vcpu, ref End end)
    {
        if (!end.IsTaken)
            return;
        end.IsTaken = false;
        if (end.IsDestination)
            end.Page.Table.PutWritable(end.Page.Frame);
        LetGo(vcpu, end);
    }

    private static void LetGo(Vcpu vcpu, in End end)
    {
        if (end.IsReference)
            end.Table!.ReleaseCopy((uint)end.Name, !end.IsDestination, end.Page, vcpu.Domain);
        else
            end.Table!.PutPage(end.Page.Info);
    }
}
