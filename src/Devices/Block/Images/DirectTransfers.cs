// Reads and writes of an image past the page cache, all of them under way by one thread.
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// Gives transfers to the kernel's asynchronous I/O, those that come together in one call, and completes them as they end, those that end
/// together with one word to the front end. What the kernel would wait for, has no room for, or does only in part is left to whoever does
/// transfers by waiting.
/// </summary>
/// <remarks>Not by io_uring, which passes the end of a transfer through the thread that began it, and many hosts forbid.</remarks>
internal sealed unsafe class DirectTransfers
{
    /// <summary>As many as a ring of the largest size holds.</summary>
    private const int Capacity = 512;

    private const ulong StopData = Capacity;

    /// <summary>Given to the kernel in one call.</summary>
    private const int MaxTogether = 64;

    private const int StackSize = 256 << 10;

    /// <summary>
    /// How long the end of a transfer is kept back, in nanoseconds, while others are under way, whose ends may be told along with it: to be told
    /// costs a guest several exits, and a front end that has many transfers under way waits for none in particular.
    /// </summary>
    private const long GatherTime = 200_000;

    /// <summary>Fewer under way are not waited for.</summary>
    private const int LeastToGather = 4;

    private readonly KernelAio _aio;
    private readonly int _file;
    private readonly int _stop;
    private readonly Action<BlockOperation> _otherwise;
    private readonly Action _unsupported;
    private readonly AioControl* _controls;
    private readonly Thread _reaper;
    private readonly CompletionBatch _batch = new();

    /// <summary>Guards the slots.</summary>
    private readonly Lock _gate = new();
    private readonly BlockOperation?[] _operations = new BlockOperation?[Capacity];
    private readonly int[] _free = new int[Capacity];
    private int _freeCount;

    private DirectTransfers(KernelAio aio, int file, int stop, Action<BlockOperation> otherwise, Action unsupported)
    {
        (_aio, _file, _stop, _otherwise, _unsupported) = (aio, file, stop, otherwise, unsupported);
        _controls = (AioControl*)NativeMemory.AllocZeroed(Capacity + 1, (nuint)sizeof(AioControl));
        for (int i = 0; i < Capacity; i++)
            _free[_freeCount++] = i;
        _reaper = new Thread(Reap, StackSize) { IsBackground = true, Name = "block direct" };
    }

    private int UnderWay
    {
        get
        {
            lock (_gate)
                return Capacity - _freeCount;
        }
    }

    /// <summary>Starts it.</summary>
    /// <param name="file">The file's descriptor, opened with O_DIRECT.</param>
    /// <param name="otherwise">Takes operations to do by waiting. Any thread.</param>
    /// <param name="unsupported">Called when the file turns out not to be one for this. Any thread.</param>
    /// <returns>Null where it cannot be done on this host.</returns>
    internal static DirectTransfers? TryStart(int file, Action<BlockOperation> otherwise, Action unsupported)
    {
        int stop = LibC.eventfd(0, LibC.EFD_CLOEXEC);
        if (stop < 0)
            return null;
        KernelAio? aio = KernelAio.TryCreate(Capacity + 1);
        if (aio is null)
        {
            _ = LibC.close(stop);
            return null;
        }

        var transfers = new DirectTransfers(aio, file, stop, otherwise, unsupported);
        if (transfers.TryWatchStop() && transfers.TryStartReaper())
            return transfers;
        transfers.Free();
        return null;
    }

    /// <summary>Begins reads and writes.</summary>
    internal void Submit(ReadOnlySpan<BlockOperation> operations)
    {
        AioControl** together = stackalloc AioControl*[MaxTogether];
        while (!operations.IsEmpty)
        {
            ReadOnlySpan<BlockOperation> next = operations[..Math.Min(operations.Length, MaxTogether)];
            operations = operations[next.Length..];
            int count = 0;
            lock (_gate)
            {
                for (; count < next.Length && _freeCount > 0; count++)
                    together[count] = Describe(_free[--_freeCount], next[count]);
            }

            foreach (BlockOperation operation in next[count..])
                _otherwise(operation);
            Submit(together, count);
        }
    }

    /// <summary>Waits for what is under way, and ends the thread. Nothing may be submitted any more.</summary>
    internal void Stop()
    {
        ulong one = 1;
        while (LibC.write(_stop, &one, sizeof(ulong)) < 0 && LibC.errno == LibC.EINTR)
        {
        }

        _reaper.Join();
        Free();
    }

    private AioControl* Describe(int slot, BlockOperation operation)
    {
        _operations[slot] = operation;
        _controls[slot] = new AioControl
        {
            Data = (ulong)slot,
            Flags = HostIo.NoWait,
            Operation = operation.Kind == BlockOperationKind.Read ? AioOperation.ReadVectors : AioOperation.WriteVectors,
            File = _file,
            Buffer = (ulong)operation.Vectors,
            Count = (ulong)operation.VectorCount,
            Offset = operation.Offset,
        };
        return _controls + slot;
    }

    private void Submit(AioControl** controls, int count)
    {
        while (count > 0)
        {
            int taken = _aio.Submit(controls, count);
            if (taken > 0)
            {
                controls += taken;
                count -= taken;
                continue;
            }

            // The first is refused. Should the kernel have no room at the moment, the same is found of the others.
            _otherwise(Take((int)controls[0]->Data));
            controls++;
            count--;
        }
    }

    private BlockOperation Take(int slot)
    {
        lock (_gate)
        {
            BlockOperation operation = _operations[slot]!;
            _operations[slot] = null;
            _free[_freeCount++] = slot;
            return operation;
        }
    }

    /// <summary>Has the reaper woken when the counter is written to.</summary>
    private bool TryWatchStop()
    {
        AioControl* control = _controls + Capacity;
        *control = new AioControl { Data = StopData, Operation = AioOperation.Poll, File = _stop, Buffer = (ulong)LibC.POLLIN };
        return _aio.Submit(&control, 1) == 1;
    }

    private bool TryStartReaper()
    {
        try
        {
            _reaper.Start();
            return true;
        }
        catch (OutOfMemoryException)
        {
            // No thread is left on this host.
            return false;
        }
    }

    private void Reap()
    {
        Span<AioEvent> events = new AioEvent[Capacity + 1];
        bool stopping = false;
        while (!stopping || UnderWay > 0)
        {
            int ended = _aio.Wait(events, least: 1, patience: -1);
            if (ended < 0)
            {
                // There is no reason for which that could be; should there be one, this is better than to end what all other guests run in.
                Thread.Sleep(1);
                continue;
            }

            int others = UnderWay - ended;
            if (others >= LeastToGather && ended < others)
                ended += Math.Max(_aio.Wait(events[ended..], (others - ended + 1) / 2, GatherTime), 0);
            foreach (ref readonly AioEvent end in events[..ended])
            {
                if (end.Data == StopData)
                    stopping = true;
                else
                    Complete(Take((int)end.Data), end.Result);
            }

            _batch.End();
        }
    }

    private void Complete(BlockOperation operation, long result)
    {
        if (result == (long)operation.Length)
        {
            operation.Complete(0, _batch);
            return;
        }

        if (result == -LibC.EOPNOTSUPP)
            _unsupported();
        if (result >= 0 || result == -LibC.EAGAIN || result == -LibC.EOPNOTSUPP)
            _otherwise(operation);
        else
            operation.Complete((int)-result, _batch);
    }

    private void Free()
    {
        _aio.Dispose();
        NativeMemory.Free(_controls);
        _ = LibC.close(_stop);
    }
}
