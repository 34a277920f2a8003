// multicall (13).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>A list of hypercalls served in one.</summary>
internal static unsafe class Multicall
{
    /// <summary>struct multicall_entry.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Entry
    {
        public ulong Number;
        public long Result;
        public HypercallArguments Arguments;
    }

    private const ulong ResultOffset = 8;

    /// <summary>multicall(entries, count).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (vcpu.InMulticall)
            return -(long)Errno.EINVAL;
        if (!new VirtualAddress(arguments.A0).IsGuest)
            return -(long)Errno.EFAULT;
        vcpu.InMulticall = true;
        long result = Serve(vcpu, arguments);
        vcpu.InMulticall = false;
        return result;
    }

    private static long Serve(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        ulong count = (uint)arguments.A1;
        for (ulong i = 0; i < count; i++)
        {
            ulong address = arguments.A0 + (i * (ulong)sizeof(Entry));
            if (i != 0 && context->PreemptionDue)
                return ContinueFrom(context, address, count - i);
            if (!GuestAccess.Read(context, address, out Entry entry))
                return -(long)Errno.EFAULT;
            entry.Result = HypercallDispatcher.Call(vcpu, entry.Number, entry.Arguments);
            if (entry.Number == (ulong)HypercallNumber.Iret)
            {
                // The guest is elsewhere now: its RAX is the result, and the rest of the list is not looked at. The entry may be
                // out of reach from there.
                _ = GuestAccess.Write(context, address + ResultOffset, entry.Result);
                return entry.Result;
            }

            if (context->Continuation.Pending != 0)
            {
                context->Continuation.Pending = 0;
                entry.Arguments = context->Continuation.Arguments;
                return GuestAccess.Write(context, address, entry) ? ContinueFrom(context, address, count - i) : -(long)Errno.EFAULT;
            }

            if (!GuestAccess.Write(context, address + ResultOffset, entry.Result))
                return -(long)Errno.EFAULT;

            // The vCPU waits now, or the domain stops: the rest comes after.
            if ((vcpu.Waiting != WaitState.None || vcpu.Domain.IsStopping) && i + 1 < count)
                return ContinueFrom(context, address + (ulong)sizeof(Entry), count - i - 1);
        }

        return 0;
    }

    private static long ContinueFrom(VcpuContext* context, ulong address, ulong count)
        => Continuation.Create(context, new HypercallArguments { A0 = address, A1 = count });
}
