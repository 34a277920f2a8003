// Changes of L1 entries that map pages of the domain's own memory: nearly all that happens to page tables, without a call on the way.
using System.Runtime.CompilerServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// What <see cref="PageTables.ModifyEntry"/> comes to where neither the frames nor their types ask for more than a count up or down. All
/// else is left to it, refusals too, and so is an entry or a count that another vCPU changed meanwhile.
/// </summary>
/// <remarks>
/// All of this is put into its caller: a dozen small calls were more than half of what an entry cost, and on an emulated processor, where
/// each call and each return looks up where to go on, three quarters of it.
/// </remarks>
internal static unsafe class OwnPages
{
    /// <summary>Changes an entry of an L1 table that the caller holds a use of.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="entry">Host address of the entry.</param>
    /// <param name="address">Its machine address.</param>
    /// <param name="value">What the guest wants there.</param>
    /// <returns>False where nothing was changed, and the whole way has to be gone.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool TryChange(VcpuContext* vcpu, PageTableEntry* entry, MachineAddress address, PageTableEntry value)
    {
        PageTableWriteQueue* writes = vcpu->PageTableWrites;
        if (!value.IsPresent)
        {
            Release(vcpu, writes->Store(entry, address, value));
            return true;
        }

        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->Find(value.Frame);
        if (info == null || !PageTables.MayHave(1, value))
            return false;
        value = PageTables.Adjust(1, value);
        var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
        if (old.IsPresent && old.Frame == value.Frame && (!value.IsWritable || old.IsWritable))
        {
            // The reference stays, and only a use as writable may go. What is replaced must be exactly what was seen.
            bool narrows = old.IsWritable && !value.IsWritable;
            if ((narrows && info->Owner != vcpu->Domain->State->Id) || writes->CompareExchange(entry, address, value, old) != old)
                return false;
            if (narrows && !info->TryDropWritable())
                _ = PageTables.PutType(vcpu, value.Frame, info);
            return true;
        }

        if (!info->TryReference())
            return false;
        if (info->Owner != vcpu->Domain->State->Id || (value.IsWritable && !info->TryUseAsWritable()))
        {
            Put(frames, info);
            return false;
        }

        Release(vcpu, writes->Store(entry, address, value));
        return true;
    }

    /// <summary>Drops what an entry held that is no longer stored.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Release(VcpuContext* vcpu, PageTableEntry old)
    {
        if (!old.IsPresent)
            return;
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->Find(old.Frame);
        if (info == null)
        {
            PageTables.ReleaseL1(vcpu, old);
            return;
        }

        if (old.IsWritable && !info->TryDropWritable())
            _ = PageTables.PutType(vcpu, old.Frame, info);
        Put(frames, info);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Put(FrameTable* frames, FrameInfo* info)
    {
        if (!info->TryDereference())
            frames->PutPage(info);
    }
}
