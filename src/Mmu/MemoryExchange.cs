// XENMEM_exchange of memory_op.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Frames of the domain's given for others, of another order or in another place; memory_exchange in Xen's memory.c.</summary>
internal static unsafe class MemoryExchange
{
    /// <summary>Largest extent that an unprivileged domain may give or ask for (CONFIG_DOMU_MAX_ORDER), and the largest chunk.</summary>
    private const int MaxOrder = 9;

    /// <summary>struct xen_memory_exchange.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Request
    {
        public MemoryOp.Reservation In;
        public MemoryOp.Reservation Out;

        /// <summary>Extents of In that are done: also how a call is continued.</summary>
        public ulong Exchanged;
    }

    /// <summary>memory_op(XENMEM_exchange, argument).</summary>
    public static long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        ulong pointer = arguments.A1;
        if (!GuestAccess.Read(vcpu, pointer, out Request request))
            return -(long)Errno.EFAULT;
        Errno error = Check(vcpu, request, out ulong limit);
        if (error == Errno.None && request.Exchanged == request.In.ExtentCount)
            return 0;
        if (error == Errno.None)
        {
            // As many extents of the smaller order as make one of the larger are exchanged together.
            int chunkShift = Math.Max((int)request.Out.ExtentOrder - (int)request.In.ExtentOrder, 0);
            ulong first = request.Exchanged >> chunkShift;
            ulong chunk = first;
            for (; chunk < request.In.ExtentCount >> chunkShift; chunk++)
            {
                request.Exchanged = chunk << chunkShift;
                if (chunk != first && vcpu->PreemptionDue)
                    return StoreExchanged(vcpu, pointer, request) ? Continuation.Create(vcpu, arguments) : -(long)Errno.EFAULT;
                error = ExchangeChunk(vcpu, request, chunk, limit);
                if (error != Errno.None)
                    break;
            }

            request.Exchanged = error == Errno.None ? request.In.ExtentCount : chunk << chunkShift;
        }

        return StoreExchanged(vcpu, pointer, request) ? -(long)error : -(long)Errno.EFAULT;
    }

    private static bool StoreExchanged(VcpuContext* vcpu, ulong pointer, in Request request)
        => GuestAccess.Write(vcpu, pointer + (2 * (ulong)sizeof(MemoryOp.Reservation)), request.Exchanged);

    private static Errno Check(VcpuContext* vcpu, in Request request, out ulong limit)
    {
        limit = ulong.MaxValue;
        if (Math.Max(request.In.ExtentOrder, request.Out.ExtentOrder) > MaxOrder)
            return Errno.EPERM;
        int inOrder = (int)request.In.ExtentOrder;
        int outOrder = (int)request.Out.ExtentOrder;
        if (request.Exchanged > request.In.ExtentCount || request.In.Domain != request.Out.Domain
            || ulong.MaxValue >> inOrder < request.In.ExtentCount || ulong.MaxValue >> outOrder < request.Out.ExtentCount
            || request.In.ExtentCount << inOrder != request.Out.ExtentCount << outOrder)
            return Errno.EINVAL;
        if (request.Exchanged == request.In.ExtentCount)
            return Errno.None;
        if (!new VirtualAddress(request.In.ExtentStart).IsGuest || !new VirtualAddress(request.Out.ExtentStart).IsGuest)
            return Errno.EFAULT;
        if (!MemoryOp.MayName(request.Out.Flags))
            return Errno.EINVAL;

        // Too few address bits are told by there being no such frame.
        if (!MemoryOp.TryLimit(vcpu, request.Out.Flags, out limit))
            limit = 0;
        return MemoryOp.IsOwn(vcpu, request.In.Domain, out Errno error) ? Errno.None : error;
    }

    /// <summary>Exchanges one chunk, or nothing of it: what was to be given keeps its contents then.</summary>
    private static Errno ExchangeChunk(VcpuContext* vcpu, in Request request, ulong chunk, ulong limit)
    {
        FrameTable.Of(vcpu->Domain)->Scrub.Hold();
        Errno error = ExchangeHeldChunk(vcpu, request, chunk, limit);
        FrameTable.Of(vcpu->Domain)->Scrub.Release();
        return error;
    }

    private static Errno ExchangeHeldChunk(VcpuContext* vcpu, in Request request, ulong chunk, ulong limit)
    {
        int inOrder = (int)request.In.ExtentOrder;
        int outOrder = (int)request.Out.ExtentOrder;
        ulong inExtents = 1UL << Math.Max(outOrder - inOrder, 0);
        ulong outExtents = 1UL << Math.Max(inOrder - outOrder, 0);
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        ulong* given = stackalloc ulong[1 << MaxOrder];
        ulong* pfns = stackalloc ulong[1 << MaxOrder];
        ulong readable = 0;
        for (; readable < inExtents; readable++)
        {
            if (!GuestAccess.Read(vcpu, request.In.ExtentStart + (((chunk * inExtents) + readable) * sizeof(ulong)), out ulong extent))
                break;
            for (ulong page = 0; page < 1UL << inOrder; page++)
                given[(readable << inOrder) + page] = extent + page;
        }

        // The frames that were given may come back as those that are taken: the domain's memory is all that there is. Other vCPUs must
        // not take them meanwhile.
        frames->Lock();
        ulong* machineToPhys = vcpu->Domain->MachineToPhys;
        Errno error = Errno.None;
        ulong stolen = 0;
        for (; error == Errno.None && stolen < readable << inOrder; stolen++)
        {
            var frame = new Mfn(given[stolen]);
            pfns[stolen] = vcpu->Domain->Memory.Contains(frame) ? machineToPhys[vcpu->Domain->Memory.IndexOf(frame)] : 0;
            if (!frames->TrySteal(frame))
            {
                error = Errno.EINVAL;
                break;
            }
        }

        if (error == Errno.None && readable < inExtents)
            error = Errno.EFAULT;
        ulong* taken = stackalloc ulong[1 << MaxOrder];
        ulong received = 0;
        while (error == Errno.None && received < outExtents)
        {
            if (frames->TryTake(FrameFlags.None, outOrder, limit, out Mfn frame))
                taken[received++] = frame.Value;
            else
                error = Errno.ENOMEM;
        }

        if (error != Errno.None)
        {
            while (received-- > 0)
                frames->Unreserve(outOrder, new Mfn(taken[received]));
            while (stolen-- > 0)
            {
                frames->Return(new Mfn(given[stolen]));
                machineToPhys[vcpu->Domain->Memory.IndexOf(new Mfn(given[stolen]))] = pfns[stolen];
            }
        }

        frames->Unlock();
        if (error != Errno.None)
            return error;

        for (ulong i = 0; i < outExtents; i++)
        {
            ulong extent = request.Out.ExtentStart + (((chunk * outExtents) + i) * sizeof(ulong));
            bool known = GuestAccess.Read(vcpu, extent, out ulong pfn);
            MemoryOp.Receive(vcpu, new Mfn(taken[i]), outOrder, known ? pfn : Mfn.Invalid.Value);
            if (!known || !GuestAccess.Write(vcpu, extent, taken[i]))
                error = Errno.EFAULT;
        }

        return error;
    }
}
