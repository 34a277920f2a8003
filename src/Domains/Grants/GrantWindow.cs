// Frames of other domains that a domain has mapped, each behind a frame of the window of its VM.
using System.Numerics;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>
/// Shows other domains' frames to a domain. A frame is shown once however often it is mapped, and held for as long as it can be reached:
/// <see cref="ForeignFrames"/> counts the mappings, and what a count has lost is seen to by <see cref="Collect"/>. The frame's number
/// stays what it is for as long as the domain has a handle for it.
/// </summary>
internal sealed unsafe class GrantWindow(DomainContext* domain, IVirtualMachine machine, DomainManager manager) : IDisposable
{
    /// <summary>A frame of the window.</summary>
    private struct Slot
    {
        public Domain? Granter;
        public Mfn Frame;

        /// <summary>Handles that mean it.</summary>
        public int Handles;
        public bool IsShown;
        public bool IsWritable;
    }

    private readonly Lock _lock = new();
    private readonly Dictionary<(Domain Granter, ulong Frame), int> _slotOf = [];
    private readonly Stack<int> _free = [];
    private Slot[] _slots = [];

    /// <summary>Held where a mapping of the window's is taken away: of two that do so, only one does.</summary>
    public Lock UnmapLock { get; } = new();

    /// <summary>Frames that are shown.</summary>
    public int ShownCount { get; private set; }

    /// <summary>Whose frame is behind one of the window's that a handle means.</summary>
    public Domain GranterOf(Mfn window)
    {
        lock (_lock)
            return _slots[domain->Window.IndexOf(window)].Granter!;
    }

    /// <summary>Shows a frame for a mapping and counts it, once for each way; and a handle for it.</summary>
    /// <param name="granter">The frame's domain, entered.</param>
    /// <param name="frame">The frame, with a reference that is taken over, whatever comes of it.</param>
    /// <param name="writable">Whether it is mapped to write.</param>
    /// <param name="ways">Mappings to count.</param>
    /// <param name="window">Where it is shown.</param>
    public GrantStatus TryAdd(Domain granter, Mfn frame, bool writable, int ways, out Mfn window)
    {
        window = default;
        lock (_lock)
        {
            bool found = _slotOf.TryGetValue((granter, frame.Value), out int index);
            if (!found && !TryTakeSlot(out index))
            {
                PutPage(granter, frame);
                return GrantStatus.NoSpace;
            }

            ref Slot slot = ref _slots[index];
            window = domain->Window.FirstFrame + (ulong)index;
            if (!found)
            {
                slot = new Slot { Granter = granter, Frame = frame };
                _slotOf.Add((granter, frame.Value), index);
            }

            GrantStatus status = Show(ref slot, window, writable);
            if (status == GrantStatus.Okay)
            {
                slot.Handles++;
                for (int i = 0; i < ways; i++)
                    ForeignFrames.Add(domain, window, writable);
            }

            DropUnused(index, ref slot);
            return status;
        }
    }

    /// <summary>Drops the mapping of a handle in some of its ways; the frame stays within reach until <see cref="Collect"/>.</summary>
    public void Release(Mfn window, bool writable, int ways)
    {
        for (int i = 0; i < ways; i++)
            ForeignFrames.Release(domain, window, writable);
    }

    /// <summary>A handle means the frame no more.</summary>
    public void EndHandle(Mfn window)
    {
        lock (_lock)
        {
            int index = (int)domain->Window.IndexOf(window);
            _slots[index].Handles--;
            DropUnused(index, ref _slots[index]);
        }
    }

    /// <summary>Takes frames out of reach that are not mapped any more, or not to write, and lets go of them.</summary>
    /// <param name="vcpu">The vCPU that runs on this thread; null where none runs.</param>
    public void Collect(VcpuContext* vcpu)
    {
        if (Interlocked.Exchange(ref domain->WindowReleased, 0) == 0)
            return;
        lock (_lock)
        {
            bool waited = false;
            for (ulong word = 0; word < (domain->Window.FrameCount + 63) / 64; word++)
            {
                ulong released = Volatile.Read(ref domain->WindowReleases[word]) == 0 ? 0 : Interlocked.Exchange(ref domain->WindowReleases[word], 0);
                for (; released != 0; released &= released - 1)
                {
                    // The entries are gone; but who found one before may still be copying.
                    if (!waited)
                        AwaitAccesses(vcpu);
                    waited = true;
                    int index = (int)(word * 64) + BitOperations.TrailingZeroCount(released);
                    Reduce(ref _slots[index], domain->Window.FirstFrame + (ulong)index);
                    DropUnused(index, ref _slots[index]);
                }
            }
        }
    }

    /// <summary>Lets go of everything. The domain's vCPUs have ended.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            for (int i = 0; i < _slots.Length; i++)
            {
                if (_slots[i].IsShown)
                    Hide(ref _slots[i], domain->Window.FirstFrame + (ulong)i);
            }

            _slotOf.Clear();
        }
    }

    private static void PutPage(Domain granter, Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(granter.Outside.Domain);
        frames->PutPage(frames->Find(frame));
    }

    private bool TryTakeSlot(out int index)
    {
        if (_free.TryPop(out index))
            return true;
        int count = _slots.Length;
        int most = (int)domain->Window.FrameCount;
        if (count == most)
            return false;
        Array.Resize(ref _slots, Math.Min(most, Math.Max(16, count * 2)));
        for (int i = _slots.Length - 1; i >= count; i--)
            _free.Push(i);
        return _free.TryPop(out index);
    }

    /// <summary>Shows a frame as it is wanted, if it is not; the reference becomes the hold on it, or is dropped.</summary>
    private GrantStatus Show(ref Slot slot, Mfn window, bool writable)
    {
        OutsideUse granter = slot.Granter!.Outside;
        bool wasShown = slot.IsShown;
        if (wasShown)
            PutPage(slot.Granter, slot.Frame);
        else if (!manager.TryTakeWindowFrame())
            return Refuse(slot);
        else
            granter.Hold(slot.Frame);
        if (wasShown && (slot.IsWritable || !writable))
            return GrantStatus.Okay;
        Errno error = writable ? granter.MakeWritable(slot.Frame) : Errno.None;
        if (error == Errno.None && !machine.TryShow(window, granter.Machine, slot.Frame, writable))
        {
            if (writable)
                granter.EndWritable(slot.Frame);
            error = Errno.ENOMEM;
        }

        if (error == Errno.None)
        {
            slot.IsWritable = writable;
            slot.IsShown = true;
            ShownCount += wasShown ? 0 : 1;
            domain->WindowToPhys[domain->Window.IndexOf(window)] = granter.Domain->MachineToPhys[granter.Domain->Memory.IndexOf(slot.Frame)];
            return GrantStatus.Okay;
        }

        if (!wasShown)
        {
            granter.LetGo(slot.Frame);
            manager.ReturnWindowFrame();
        }

        return error switch
        {
            Errno.ERESTART => GrantStatus.Restart,
            Errno.ENOMEM => GrantStatus.NoSpace,
            _ => GrantStatus.GeneralError,
        };
    }

    private static GrantStatus Refuse(in Slot slot)
    {
        PutPage(slot.Granter!, slot.Frame);
        return GrantStatus.NoSpace;
    }

    /// <summary>What is shown is no more than what is mapped.</summary>
    private void Reduce(ref Slot slot, Mfn window)
    {
        if (!slot.IsShown)
            return;
        if (ForeignFrames.Mappings(domain, window) == 0)
        {
            Hide(ref slot, window);
        }
        else if (slot.IsWritable && ForeignFrames.Writers(domain, window) == 0)
        {
            // Where the host will not, nobody is let down but the granter, who has to wait for the last reader.
            if (!machine.TryProtect(window))
                return;
            slot.IsWritable = false;
            slot.Granter!.Outside.EndWritable(slot.Frame);
        }
    }

    private void Hide(ref Slot slot, Mfn window)
    {
        machine.Hide(window);
        domain->WindowToPhys[domain->Window.IndexOf(window)] = Mfn.Invalid.Value;
        if (slot.IsWritable)
            slot.Granter!.Outside.EndWritable(slot.Frame);
        slot.Granter!.Outside.LetGo(slot.Frame);
        slot.IsShown = slot.IsWritable = false;
        ShownCount--;
        manager.ReturnWindowFrame();
    }

    private void DropUnused(int index, ref Slot slot)
    {
        if (slot.IsShown || slot.Handles != 0 || slot.Granter == null)
            return;
        _ = _slotOf.Remove((slot.Granter, slot.Frame.Value));
        slot = default;
        _free.Push(index);
    }

    private void AwaitAccesses(VcpuContext* vcpu)
    {
        for (int i = 0; domain->State->StartedVcpus > 1 && i < domain->State->VcpuCount; i++)
        {
            VcpuContext* other = domain->Vcpus + i;
            while (other != vcpu && Volatile.Read(ref other->Accessing) != 0)
                _ = Thread.Yield();
        }
    }
}
