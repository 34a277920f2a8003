// The only way from a hypercall to memory that the guest names by linear address.
using System.Runtime.CompilerServices;

namespace XenSharp.Core;

/// <summary>
/// Copies between the manager and guest linear addresses, with the rights of the vCPU's current mode: the guest's own tables
/// are walked, every level must be present and user-accessible, writes need every level writable, and every frame must be
/// the domain's RAM, or one that it has mapped of another domain's. Callers copy once and validate the copy.
/// </summary>
public static unsafe class GuestAccess
{
    /// <summary>The page of the domain's own memory that an operation read from last: a translation that it remembers, as a processor would.</summary>
    public struct ReadWindow
    {
        private ulong _page;
        private byte* _host;

        /// <summary>Remembers nothing, or no more.</summary>
        public void Clear() => _host = null;

        /// <summary>Host address of what is at a linear address, in the page that is remembered; null where that is another.</summary>
        public readonly byte* Find(ulong address, int size)
        {
            ulong offset = address - _page;
            return _host != null && offset <= Paging.PageSize - (ulong)size ? _host + offset : null;
        }

        /// <summary>Bytes from an address to the end of its page.</summary>
        public static uint Rest(ulong address) => (uint)(Paging.PageSize - (address & Paging.PageOffsetMask));

        internal void Remember(ulong page, byte* host)
        {
            _page = page;
            _host = host;
        }
    }

    /// <summary>Copies from the guest.</summary>
    /// <returns>False (the caller's -EFAULT) when any byte cannot be read; part may have been copied.</returns>
    public static bool CopyFrom(VcpuContext* vcpu, ulong address, void* destination, ulong length)
    {
        byte* to = (byte*)destination;
        while (length > 0)
        {
            ulong chunk = Math.Min(length, Paging.PageSize - (address & Paging.PageOffsetMask));
            Begin(vcpu);
            byte* from = Translate(vcpu, address, write: false);
            if (from != null)
                Unsafe.CopyBlockUnaligned(to, from, (uint)chunk);
            End(vcpu);
            if (from == null)
                return false;
            to += chunk;
            address += chunk;
            length -= chunk;
        }

        return true;
    }

    /// <summary>Copies to the guest.</summary>
    /// <returns>False (the caller's -EFAULT) when any byte cannot be written; part may have been copied.</returns>
    public static bool CopyTo(VcpuContext* vcpu, ulong address, void* source, ulong length)
    {
        byte* from = (byte*)source;
        while (length > 0)
        {
            ulong chunk = Math.Min(length, Paging.PageSize - (address & Paging.PageOffsetMask));
            Begin(vcpu);
            byte* to = Translate(vcpu, address, write: true, out Mfn frame);
            if (to != null)
            {
                Unsafe.CopyBlockUnaligned(to, from, (uint)chunk);
                Written(vcpu, frame, address & Paging.PageOffsetMask, chunk);
            }

            End(vcpu);
            if (to == null)
                return false;
            from += chunk;
            address += chunk;
            length -= chunk;
        }

        return true;
    }

    /// <summary>Copies one value from the guest.</summary>
    public static bool Read<T>(VcpuContext* vcpu, ulong address, out T value)
        where T : unmanaged
    {
        Unsafe.SkipInit(out value);
        fixed (T* to = &value)
            return CopyFrom(vcpu, address, to, (ulong)sizeof(T));
    }

    /// <summary>Copies one value from the guest, and remembers where it was.</summary>
    public static bool Read<T>(VcpuContext* vcpu, ref ReadWindow window, ulong address, out T value)
        where T : unmanaged
    {
        window.Clear();
        if (!Read(vcpu, address, out value))
            return false;

        // What is another domain's may be taken away while it is not being looked at.
        byte* found = Translate(vcpu, address, write: false, out Mfn frame);
        if (found != null && vcpu->Domain->Memory.Contains(frame))
            window.Remember(address & ~Paging.PageOffsetMask, vcpu->Domain->Memory.Page(frame));
        return true;
    }

    /// <summary>Copies one value to the guest.</summary>
    public static bool Write<T>(VcpuContext* vcpu, ulong address, T value)
        where T : unmanaged => CopyTo(vcpu, address, &value, (ulong)sizeof(T));

    /// <summary>Host address of a guest linear address, or null where the current mode may not access it so.</summary>
    /// <remarks>
    /// For what only wants to know. Who goes through the pointer does so between <see cref="Begin"/> and <see cref="End"/>, and says what
    /// was written with <see cref="Written"/>.
    /// </remarks>
    public static byte* Translate(VcpuContext* vcpu, ulong address, bool write) => Translate(vcpu, address, write, out _);

    /// <summary>Tells the VM that the manager wrote into a frame of the guest, which may have been a page table before.</summary>
    /// <param name="vcpu">The vCPU that runs on this thread.</param>
    /// <param name="frame">A frame that the guest has mapped.</param>
    /// <param name="offset">Offset of the first byte in the frame.</param>
    /// <param name="length">Bytes; the range stays within the frame.</param>
    public static void Written(VcpuContext* vcpu, Mfn frame, ulong offset, ulong length)
    {
        // Of another domain's, KVM has forgotten what it was before it could be mapped.
        if (!vcpu->Domain->Memory.Contains(frame) || !vcpu->Domain->MayBeShadowed(frame))
            return;
        for (ulong word = offset & ~7UL; word < offset + length; word += sizeof(ulong))
            vcpu->PageTableWrites->Repeat(frame.Address + word);
    }

    /// <summary>What is translated from here on stays what it is until <see cref="End"/>, whatever other vCPUs do.</summary>
    public static void Begin(VcpuContext* vcpu)
    {
        if (vcpu->Domain->State->StartedVcpus > 1)
            _ = Interlocked.Exchange(ref vcpu->Accessing, 1);
    }

    /// <summary>Ends <see cref="Begin"/>.</summary>
    public static void End(VcpuContext* vcpu) => Volatile.Write(ref vcpu->Accessing, 0);

    private static byte* Translate(VcpuContext* vcpu, ulong address, bool write, out Mfn frame)
    {
        frame = default;
        var linear = new VirtualAddress(address);
        if (!linear.IsGuest)
            return null;
        PageTableEntry* entry = FindEntry(vcpu->Domain, new Mfn(vcpu->CurrentRoot), linear, write ? AccessForWrite : AccessForRead);
        if (entry == null)
            return null;
        PageTableEntry leaf = Read(entry);
        ulong needed = write ? AccessForWrite : AccessForRead;
        byte* page = vcpu->Domain->PageOf(leaf.Frame);
        if ((leaf.Value & needed) != needed || page == null)
            return null;

        // As the processor would, so that a guest that watches these bits sees its page used. Another entry by now is not this one's.
        ulong used = (ulong)(PageFlags.Accessed | (write ? PageFlags.Dirty : PageFlags.None));
        if ((leaf.Value & used) != used)
            _ = Interlocked.CompareExchange(ref *(ulong*)entry, leaf.Value | used, leaf.Value);
        frame = leaf.Frame;
        return page + linear.Offset;
    }

    /// <summary>The L1 entry that maps an address on the current mode's tables, or null where a level above lacks.</summary>
    /// <param name="vcpu">The vCPU whose tables are walked.</param>
    /// <param name="address">Any address outside the reserved slots.</param>
    public static PageTableEntry* FindEntry(VcpuContext* vcpu, VirtualAddress address)
        => FindEntry(vcpu->Domain, new Mfn(vcpu->CurrentRoot), address, (ulong)PageFlags.Present);

    private const ulong AccessForRead = (ulong)(PageFlags.Present | PageFlags.User);
    private const ulong AccessForWrite = AccessForRead | (ulong)PageFlags.Writable;

    private static PageTableEntry* FindEntry(DomainContext* domain, Mfn root, VirtualAddress address, ulong needed)
    {
        Mfn table = root;
        for (int level = 4; ; level--)
        {
            if (!domain->Memory.Contains(table))
                return null;
            PageTableEntry* entry = domain->Memory.Table(table) + address.TableIndex(level);
            if (level == 1)
                return entry;
            PageTableEntry value = Read(entry);
            if ((value.Value & needed) != needed || value.Has(PageFlags.LargePage))
                return null;
            table = value.Frame;
        }
    }

    private static PageTableEntry Read(PageTableEntry* entry) => new(Volatile.Read(ref *(ulong*)entry));
}
