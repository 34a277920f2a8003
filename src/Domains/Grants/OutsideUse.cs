// What others than a domain's own vCPUs do with its memory: other domains that have mapped its grants, and back ends.
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>
/// Holds on frames of a domain from outside. A use that ends soon is between <see cref="TryEnter"/> and <see cref="Exit"/>, and keeps the
/// domain's memory in place; a hold may outlive the domain, whose books nobody keeps any more then.
/// </summary>
internal sealed unsafe class OutsideUse(DomainContext* domain, IVirtualMachine machine, Action abandoned)
{
    private readonly Lock _lock = new();

    /// <summary>Frames that are held, how often, and how often to write.</summary>
    private readonly Dictionary<ulong, (int Holds, int Writers)> _held = [];
    private Rundown _rundown;
    private bool _closed;

    /// <summary>The domain's VM.</summary>
    public IVirtualMachine Machine { get; } = machine;

    /// <summary>The domain's state, for as long as there is one.</summary>
    public DomainContext* Domain => domain;

    /// <summary>Starts a use of the domain's memory (rcu_lock_domain).</summary>
    /// <returns>False when the domain is going away; then no <see cref="Exit"/> is due.</returns>
    public bool TryEnter() => _rundown.TryEnter();

    /// <summary>Ends <see cref="TryEnter"/>.</summary>
    public void Exit() => _rundown.Exit();

    /// <summary>Makes a reference to a frame, which the caller took, a hold.</summary>
    public void Hold(Mfn frame)
    {
        lock (_lock)
        {
            (int holds, int writers) = _held.GetValueOrDefault(frame.Value);
            _held[frame.Value] = (holds + 1, writers);
        }
    }

    /// <summary>Makes a frame that is held writable, for whoever holds it.</summary>
    /// <returns>As <see cref="OutsideAccess.GetWritable"/>.</returns>
    public Errno MakeWritable(Mfn frame)
    {
        Errno error = OutsideAccess.GetWritable(domain, Machine, frame);
        if (error != Errno.None)
            return error;
        lock (_lock)
        {
            (int holds, int writers) = _held[frame.Value];
            _held[frame.Value] = (holds, writers + 1);
        }

        return Errno.None;
    }

    /// <summary>Ends <see cref="MakeWritable"/>; what was writable can be written to no more.</summary>
    public void EndWritable(Mfn frame) => Drop(frame, holds: 0, writers: 1);

    /// <summary>Ends <see cref="Hold"/>; nobody outside can reach the frame any more by it.</summary>
    public void LetGo(Mfn frame) => Drop(frame, holds: 1, writers: 0);

    /// <summary>Makes references to frames, which the caller took, holds, and the frames writable if that is wanted; all or none.</summary>
    /// <returns>False where one of them cannot be made writable; the references stay the caller's.</returns>
    public bool TryHold(ReadOnlySpan<Mfn> frames, bool writable)
    {
        for (int i = 0; writable && i < frames.Length; i++)
        {
            Errno error;
            while ((error = OutsideAccess.GetWritable(domain, Machine, frames[i])) == Errno.ERESTART)
                _ = Thread.Yield();
            if (error == Errno.None)
                continue;
            foreach (Mfn frame in frames[..i])
                OutsideAccess.PutWritable(domain, frame);
            return false;
        }

        lock (_lock)
        {
            foreach (Mfn frame in frames)
            {
                ref (int Holds, int Writers) held = ref CollectionsMarshal.GetValueRefOrAddDefault(_held, frame.Value, out _);
                held.Holds++;
                held.Writers += writable ? 1 : 0;
            }
        }

        return true;
    }

    /// <summary>Ends <see cref="TryHold"/>. Between <see cref="TryEnter"/> and <see cref="Exit"/>.</summary>
    public void LetGo(ReadOnlySpan<Mfn> frames, bool writable)
    {
        foreach (Mfn frame in writable ? frames : [])
            OutsideAccess.PutWritable(domain, frame);
        _ = Note(frames, writable);
        FrameTable* table = FrameTable.Of(domain);
        foreach (Mfn frame in frames)
            table->PutPage(table->Find(frame));
    }

    /// <summary>Ends <see cref="TryHold"/> after the domain has gone.</summary>
    public void Abandon(ReadOnlySpan<Mfn> frames, bool writable)
    {
        if (Note(frames, writable))
            abandoned();
    }

    /// <summary>Frames that are held to be written to, and the others, for the audit.</summary>
    public void AddHeld(List<ulong> writable, List<ulong> referenced)
    {
        lock (_lock)
        {
            foreach ((ulong frame, (int holds, int writers)) in _held)
            {
                for (int i = 0; i < holds; i++)
                    (i < writers ? writable : referenced).Add(frame);
            }
        }
    }

    /// <summary>
    /// Lets nobody in any more and waits for those who are in. What is held stays in memory, and nothing else of the domain's: all that is
    /// not goes back to the host, for as long as somebody keeps the file that it is in.
    /// </summary>
    /// <returns>Whether somebody still holds a frame; when that ends, <c>abandoned</c> is called.</returns>
    public bool Close()
    {
        _rundown.Close();
        lock (_lock)
        {
            _closed = true;
            if (_held.Count == 0)
                return false;
            MachineMemory memory = domain->Memory;
            ulong first = 0;
            foreach (ulong frame in _held.Keys.Order())
            {
                ulong index = memory.IndexOf(new Mfn(frame));
                if (index > first)
                    Machine.Discard(memory.FirstFrame + first, index - first);
                first = index + 1;
            }

            if (first < memory.FrameCount)
                Machine.Discard(memory.FirstFrame + first, memory.FrameCount - first);
            return true;
        }
    }

    private void Drop(Mfn frame, int holds, int writers)
    {
        if (TryEnter())
        {
            if (writers != 0)
                OutsideAccess.PutWritable(domain, frame);
            Note(frame, holds, writers);
            if (holds != 0)
                FrameTable.Of(domain)->PutPage(FrameTable.Of(domain)->Find(frame));
            Exit();
            return;
        }

        if (Note(frame, holds, writers))
            abandoned();
    }

    private bool Note(ReadOnlySpan<Mfn> frames, bool writable)
    {
        lock (_lock)
        {
            foreach (Mfn frame in frames)
                Subtract(frame, 1, writable ? 1 : 0);
            return _closed && _held.Count == 0;
        }
    }

    /// <returns>Whether it was the last hold on a domain that is gone.</returns>
    private bool Note(Mfn frame, int holds, int writers)
    {
        lock (_lock)
        {
            Subtract(frame, holds, writers);
            return _closed && _held.Count == 0;
        }
    }

    private void Subtract(Mfn frame, int holds, int writers)
    {
        ref (int Holds, int Writers) held = ref CollectionsMarshal.GetValueRefOrNullRef(_held, frame.Value);
        if (held.Holds == holds)
            _ = _held.Remove(frame.Value);
        else
            held = (held.Holds - holds, held.Writers - writers);
    }
}
