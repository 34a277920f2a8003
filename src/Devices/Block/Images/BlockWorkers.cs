// Threads that wait for the disk, so that no thread of the pool has to.
using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// Runs the operations of one image that may block, several at a time, in the order in which they came. Threads are started when there
/// is work for them, and end when there was none for a while.
/// </summary>
/// <param name="name">The threads'.</param>
/// <param name="perform">Does an operation, and completes it as one of a batch.</param>
/// <param name="maximum">The most threads.</param>
/// <param name="isQuick">Whether operations mostly do not have to wait: then what a thread does one after the other is one batch, unless that
/// takes long. Otherwise each is by itself.</param>
internal sealed class BlockWorkers(string name, Action<BlockOperation, CompletionBatch> perform, int maximum, bool isQuick = false)
{
    private const int StackSize = 256 << 10;

    /// <summary>How long the end of an operation is kept back while others are done.</summary>
    private static readonly long GatherTime = Stopwatch.Frequency / 2000;

    private static readonly TimeSpan IdleTime = TimeSpan.FromSeconds(5);

    private readonly object _gate = new();
    private readonly List<Thread> _threads = [];
    private BlockOperation? _first;
    private BlockOperation? _last;
    private int _idle;
    private int _woken;
    private bool _stopping;

    /// <summary>Queues an operation for a worker. On a host that has no thread left for the first one, it is done here.</summary>
    internal void Queue(BlockOperation operation)
    {
        bool isAlone = false;
        lock (_gate)
        {
            operation.Next = null;
            if (_last is null)
                _first = operation;
            else
                _last.Next = operation;
            _last = operation;
            if (_idle > _woken)
            {
                _woken++;
                Monitor.Pulse(_gate);
            }
            else if (_threads.Count < maximum && !TryStart())
            {
                isAlone = _threads.Count == 0;
            }
        }

        if (isAlone)
            PerformAll();
    }

    /// <summary>Ends the threads once all that was queued is done, and waits for that.</summary>
    internal void Stop()
    {
        Thread[] threads;
        lock (_gate)
        {
            _stopping = true;
            threads = [.. _threads];
            Monitor.PulseAll(_gate);
        }

        foreach (Thread thread in threads)
            thread.Join();
    }

    private void Run()
    {
        while (TryAwait())
            PerformAll();
    }

    /// <summary>Does what is queued.</summary>
    private void PerformAll()
    {
        var batch = new CompletionBatch();
        long start = Stopwatch.GetTimestamp();
        while (TryTake(out BlockOperation? operation))
        {
            perform(operation, batch);
            long now = Stopwatch.GetTimestamp();
            if (isQuick && now - start < GatherTime)
                continue;
            batch.End();
            start = now;
        }

        batch.End();
    }

    private bool TryStart()
    {
        var thread = new Thread(Run, StackSize) { IsBackground = true, Name = name };
        try
        {
            thread.Start();
        }
        catch (OutOfMemoryException)
        {
            return false;
        }

        _threads.Add(thread);
        return true;
    }

    /// <summary>Waits until something is queued.</summary>
    /// <returns>False when the thread is to end.</returns>
    private bool TryAwait()
    {
        lock (_gate)
        {
            while (_first is null)
            {
                if (_stopping)
                    return false;
                _idle++;
                bool pulsed = Monitor.Wait(_gate, IdleTime);
                _idle--;
                if (_woken > 0 && (pulsed || _first is not null))
                    _woken--;
                if (!pulsed && _first is null)
                {
                    _ = _threads.Remove(Thread.CurrentThread);
                    return false;
                }
            }

            return true;
        }
    }

    private bool TryTake([NotNullWhen(true)] out BlockOperation? operation)
    {
        lock (_gate)
        {
            operation = _first;
            if (operation is null)
                return false;
            _first = operation.Next;
            if (_first is null)
                _last = null;
            return true;
        }
    }
}
