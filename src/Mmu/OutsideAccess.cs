// Uses of a domain's frames on threads that are none of its vCPUs': other domains', and those of back ends.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Makes frames writable to somebody outside, who is not to be taken for a vCPU that has seen what the domain did last.</summary>
public static unsafe class OutsideAccess
{
    /// <summary>Looks at a frame, or at a vCPU, before the operation is put off.</summary>
    private const int MaxWaits = 1000;

    /// <summary>
    /// Adds a use as writable to a frame that the caller has a reference to, for stores from outside: the VM knows nothing more of a page
    /// table that the frame may have been. <see cref="FrameInfo.TryChange"/> by any thread takes it back (<see cref="PutWritable"/>).
    /// </summary>
    /// <param name="domain">The frame's domain, whose vCPUs and VM stay in place meanwhile.</param>
    /// <param name="machine">Its VM.</param>
    /// <param name="frame">The frame.</param>
    /// <returns>EINVAL where it is in use as something else; ERESTART where one of the domain's vCPUs has to get on first.</returns>
    public static Errno GetWritable(DomainContext* domain, IVirtualMachine machine, Mfn frame)
    {
        FrameInfo* info = FrameTable.Of(domain)->Find(frame);
        for (int waits = 0; waits < MaxWaits; waits++)
        {
            FrameType state = info->State;
            if (state.Count != 0 && (state.Type != PageType.Writable || state.Count == uint.MaxValue))
                return Errno.EINVAL;

            // Somebody is making it writable, and will not take long.
            if (state.Count != 0 && !state.Has(FrameFlags.Validated))
                continue;
            bool wasTable = state.Count == 0 && state.IsPageTable;
            FrameType next = state.Count != 0 ? state.Plus() : state.First(PageType.Writable);
            if (!info->TryChange(state, wasTable || state.Count != 0 ? next : next.With(FrameFlags.Validated)))
                continue;
            bool forgotten = (!wasTable && !domain->MayBeShadowed(frame)) || TryForget(domain, machine, frame);
            if (wasTable)
                info->Settle(forgotten ? next.With(FrameFlags.Validated) : state);
            else if (!forgotten)
                PutWritable(domain, frame);
            return forgotten ? Errno.None : Errno.ERESTART;
        }

        return Errno.ERESTART;
    }

    /// <summary>Ends <see cref="GetWritable"/>.</summary>
    public static void PutWritable(DomainContext* domain, Mfn frame)
    {
        FrameInfo* info = FrameTable.Of(domain)->Find(frame);
        FrameType state = info->State;
        while (!info->TryChange(state, state.Minus()))
            state = info->State;
    }

    /// <summary>Ends all use of a frame as a page table, by processors, by the VM, and by vCPUs that copy along what they found in it.</summary>
    private static bool TryForget(DomainContext* domain, IVirtualMachine machine, Mfn frame)
    {
        for (int i = 0; i < domain->State->VcpuCount; i++)
        {
            VcpuContext* vcpu = domain->Vcpus + i;
            for (int waits = 0; Volatile.Read(ref vcpu->Accessing) != 0; waits++)
            {
                if (waits == MaxWaits)
                    return false;
            }
        }

        if (domain->ShadowedFrames == null)
        {
            TlbFlush.FromOutside(domain);
            return true;
        }

        machine.ForgetTables();
        domain->ClearShadowed(frame);
        return true;
    }
}
