// One ring of a block device: takes requests, checks them, has the image do them, and answers.
using System.Diagnostics;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Devices.Block.Images;
using XenSharp.Devices.Xenbus;
using XenSharp.Domains.Grants;
using XenSharp.EventChannels;

namespace XenSharp.Devices.Block;

/// <summary>What the queues of one device have in common.</summary>
internal sealed record BlockQueueSettings(IBlockImage Image, bool IsReadOnly, bool CanDiscard, int MaxIndirectSegments, BlockCounters Counters, Action<string> Report)
{
    /// <summary>Sectors of 512 bytes.</summary>
    internal ulong Sectors { get; } = Image.Size >> BlkifAbi.SectorShift;

    /// <summary>Requests begin and end at multiples of this, in sectors of 512 bytes.</summary>
    internal ulong SectorMask { get; } = (Image.SectorSize >> BlkifAbi.SectorShift) - 1;

    private int _failureReported;

    /// <summary>Says once, and not for every request of a guest that tries again and again, that the image is gone for good.</summary>
    internal void ReportFailure(string failure)
    {
        if (Interlocked.Exchange(ref _failureReported, 1) == 0)
            Report($"{Image.Description} is lost: {failure}");
    }
}

/// <summary>
/// Serves a ring. One loop takes requests, in order, each copied once and checked in the copy; the image gets those that were taken
/// together at once, and does them at the same time and in any order; whoever completes one puts its response into the ring. As many are
/// under way at most as the ring has entries.
/// </summary>
/// <remarks>A front end that says it has made more requests than its ring has entries ends the connection; whatever else it says wrongly
/// comes to an error of that request.</remarks>
internal sealed class BlockQueue : IAsyncDisposable, ICompletionListener
{
    /// <summary>After so many requests responses are shown and the thread is offered to others.</summary>
    private const int BatchSize = 64;

    /// <summary>After half of what was in the ring too, if that is as many bytes, so that the guest works on it while the rest is copied.</summary>
    private const ulong HalfBatchBytes = 1 << 20;

    /// <summary>After so many bytes in any case.</summary>
    private const ulong BatchBytes = 8 << 20;

    /// <summary>How long the ring is looked at for more before the front end is asked to notify of it, which costs it an exit.</summary>
    private static readonly long LookTime = Stopwatch.Frequency / 50_000;

    /// <summary>How long answers are kept back for the next request, where that has been of use.</summary>
    private static readonly long HoldTime = Stopwatch.Frequency / 20_000;

    /// <summary>How long answers, or requests, are kept back at most, however many requests follow.</summary>
    private static readonly long LongestHold = Stopwatch.Frequency / 4_000;

    /// <summary>
    /// How long requests are kept back for more, where that has been of use: a front end that has just notified goes on only when it is back in
    /// the guest, which takes long where an exit is dear.
    /// </summary>
    private static readonly long GatherTime = Stopwatch.Frequency / 6_000;

    /// <summary>How long they are kept back for yet more, once some have come.</summary>
    private static readonly long PauseTime = Stopwatch.Frequency / 60_000;

    private static readonly TimeSpan CareInterval = TimeSpan.FromSeconds(10);

    private readonly BlockQueueSettings _settings;
    private readonly BackendGrants _grants;
    private readonly EventChannelBackend _channel;
    private readonly BlkifRing _ring;
    private readonly BlkifAbi _abi;
    private readonly CancellationTokenSource _stop = new();
    private readonly TaskCompletionSource _failure = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly byte[] _request = new byte[BlkifAbi.LongestRequest];
    private readonly byte[] _indirect;
    private readonly BlkifSegment[] _segments;
    private readonly uint[] _references;

    /// <summary>Whether the front end uses its pages again.</summary>
    private readonly bool _isPersistent;

    /// <summary>Requests that were taken and not given to the image yet.</summary>
    private readonly BlockOperation[] _taken = new BlockOperation[BatchSize];
    private int _takenCount;
    private readonly Anticipation _gathering = new();
    private readonly Anticipation _holding = new();

    /// <summary>Guards all below, and the ring's responses.</summary>
    private readonly Lock _gate = new();
    private readonly GrantCache _cache;
    private readonly Stack<BlockRequest> _unused = [];
    private readonly Timer? _care;
    private TaskCompletionSource? _idle;
    private int _inFlight;
    private bool _batching;

    private Task _run = Task.CompletedTask;

    private enum Taken
    {
        /// <summary>There are no more requests; the front end notifies of the next.</summary>
        All,

        /// <summary>There may be more.</summary>
        Some,

        /// <summary>The request at hand has to wait until those before it are done, and those behind it for that one.</summary>
        Barrier,
    }

    /// <param name="settings">The device.</param>
    /// <param name="grants">The guest's grants.</param>
    /// <param name="ring">The ring; the queue's from here on.</param>
    /// <param name="channel">Its event channel; the queue's too.</param>
    /// <param name="abi">The layout of its entries.</param>
    /// <param name="persistentGrants">The most pages that stay mapped; 0 for a front end that does not use pages again.</param>
    internal BlockQueue(
        BlockQueueSettings settings, BackendGrants grants, BlkifRing ring, EventChannelBackend channel, BlkifAbi abi, int persistentGrants)
    {
        (_settings, _grants, _ring, _channel, _abi) = (settings, grants, ring, channel, abi);
        _isPersistent = persistentGrants > 0;
        _cache = new GrantCache(grants, persistentGrants);
        int segments = Math.Max(settings.MaxIndirectSegments, BlkifAbi.MaxDirectSegments);
        _segments = new BlkifSegment[segments];
        _references = new uint[segments];
        _indirect = new byte[Math.Min(segments, BlkifAbi.SegmentsPerIndirectPage) * BlkifSegment.Size];
        if (_isPersistent)
            _care = new Timer(static queue => ((BlockQueue)queue!).DropUnused(GrantCache.IdleTime), this, CareInterval, CareInterval);
    }

    /// <summary>Whether the front end can make no request before it is shown an answer.</summary>
    private bool IsFull
    {
        get
        {
            lock (_gate)
                return _ring.IsFull;
        }
    }

    /// <summary>Completes only when the front end has broken the protocol.</summary>
    internal Task Failure => _failure.Task;

    /// <summary>Pages of the guest's that are mapped between requests.</summary>
    internal int PersistentGrants
    {
        get
        {
            lock (_gate)
                return _cache.Count;
        }
    }

    /// <summary>Begins to serve, with what is in the ring already.</summary>
    internal void Start() => _run = Task.Run(RunAsync);

    /// <summary>Takes no more requests, waits for those under way, and lets go of the guest's memory and event channel.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        await _run.ConfigureAwait(false);
        await WhenIdle().ConfigureAwait(false);
        if (_care is not null)
            await _care.DisposeAsync().ConfigureAwait(false);
        lock (_gate)
        {
            _cache.DropUnused(long.MaxValue);
            while (_unused.TryPop(out BlockRequest? request))
                request.Dispose();
        }

        _ring.Dispose();
        _channel.Dispose();
    }

    /// <summary>Gives back pages that were not used for a while.</summary>
    internal void DropUnused(TimeSpan idle)
    {
        lock (_gate)
            _cache.DropUnused(Environment.TickCount64 - (long)idle.TotalMilliseconds);
    }

    /// <summary>Shows the front end what was answered meanwhile.</summary>
    public void CompletionsEnd()
    {
        lock (_gate)
        {
            if (!_batching && _ring.Push())
                Notify();
            EndOne();
        }
    }

    /// <summary>An operation on the image has ended. Any thread.</summary>
    /// <param name="request">The operation.</param>
    /// <param name="error">0 or errno.</param>
    /// <param name="batch">The operations that are completed along with it, if there are any.</param>
    internal void Completed(BlockRequest request, int error, CompletionBatch? batch)
    {
        if (error == 0 && request.Proceed())
        {
            _settings.Image.Submit(request);
            return;
        }

        if (error != 0)
            Report(request, error);
        else
            _settings.Counters.Count(request.Operation, request.Bytes);
        Finish(request, error == 0 ? BlkifStatus.Okay : error == LibC.EOPNOTSUPP ? BlkifStatus.OperationNotSupported : BlkifStatus.Error, batch);
    }

    private async Task RunAsync()
    {
        try
        {
            while (true)
            {
                _stop.Token.ThrowIfCancellationRequested();
                switch (TakeBatch())
                {
                    case Taken.All:
                        if (!await _channel.WaitAsync(_stop.Token).ConfigureAwait(false))
                            return;
                        _settings.Counters.CountWakeup();
                        break;

                    case Taken.Barrier:
                        await WhenIdle().ConfigureAwait(false);
                        _ = Handle();
                        SubmitTaken();
                        await WhenIdle().ConfigureAwait(false);
                        break;

                    default:
                        await Task.Yield();
                        break;
                }
            }
        }
        catch (OperationCanceledException) when (_stop.IsCancellationRequested)
        {
            // Disposed.
        }
        catch (Exception failure)
        {
            _failure.TrySetException(failure);
        }
    }

    private Taken TakeBatch()
    {
        lock (_gate)
            _batching = true;
        Taken taken;
        int count;
        try
        {
            taken = TakeRequests(out count);
            long start = Stopwatch.GetTimestamp();
            if (taken == Taken.All && _settings.Image.PrefersTogether)
                taken = Gather(start, ref count);
            while (taken == Taken.All && count > 0 && count < BatchSize && Stopwatch.GetTimestamp() - start < LongestHold && HoldForMore())
            {
                taken = TakeRequests(out int more);
                count += more;
            }
        }
        finally
        {
            SubmitTaken();
            bool notify;
            lock (_gate)
            {
                _batching = false;
                notify = _ring.Push();
            }

            if (notify)
                Notify();
        }

        return taken == Taken.All && ((count > 0 && LookForMore(LookTime)) || _ring.AwaitRequests()) ? Taken.Some : taken;
    }

    /// <summary>
    /// Keeps requests back while the front end makes more, if it is one that does: drivers show each by itself, and notify of the first, which
    /// would be begun, done and answered before the others.
    /// </summary>
    private Taken Gather(long start, ref int count)
    {
        if (_takenCount == 0 || IsFull || !_gathering.Begin())
            return Taken.All;
        var taken = Taken.All;
        bool asked = false;
        while (taken == Taken.All && !IsFull && Stopwatch.GetTimestamp() - start < LongestHold && LookForMore(asked ? PauseTime : GatherTime))
        {
            asked = true;
            taken = TakeRequests(out int more);
            count += more;
        }

        _gathering.End(asked);
        return taken;
    }

    /// <summary>
    /// Keeps answers back while the front end goes on to ask, if it is one that does: to be interrupted for each costs it more than a request.
    /// </summary>
    /// <returns>Whether there are further requests.</returns>
    private bool HoldForMore()
    {
        SubmitTaken();
        lock (_gate)
        {
            if (!_ring.HasUnseen || _ring.IsFull)
                return false;
        }

        if (!_holding.Begin())
            return false;
        bool asked = LookForMore(HoldTime);
        _holding.End(asked);
        return asked;
    }

    /// <summary>Looks at the ring for a short while: a front end that has just been answered is mostly about to ask for more.</summary>
    private bool LookForMore(long time)
    {
        long start = Stopwatch.GetTimestamp();
        do
        {
            if (_ring.Untaken != 0)
                return true;
            Thread.SpinWait(20);
        }
        while (Stopwatch.GetTimestamp() - start < time && !_stop.IsCancellationRequested);
        return false;
    }

    private Taken TakeRequests(out int count)
    {
        ulong bytes = 0;
        uint half = _ring.Untaken / 2;
        for (count = 0; _takenCount < BatchSize && count < BatchSize && bytes < (count >= half ? HalfBatchBytes : BatchBytes); count++)
        {
            if (!_ring.TryTake(_request, out bool overflow))
            {
                return overflow
                    ? throw new XenbusException(Errno.EACCES, $"the front end says that it has made more requests than its ring of {_ring.Size} holds")
                    : Taken.All;
            }

            if (BlkifAbi.Operation(_request) == BlkifOperation.WriteBarrier)
                return Taken.Barrier;
            bytes += Handle();
        }

        return Taken.Some;
    }

    /// <summary>Checks the request at hand, and gives it to the image or answers it.</summary>
    /// <returns>Bytes that it moves.</returns>
    private ulong Handle()
    {
        BlockRequest request;
        lock (_gate)
        {
            _inFlight++;
            if (!_unused.TryPop(out request!))
                request = new BlockRequest(this, _grants.Prepare());
        }

        BlkifStatus status = Prepare(request);
        if (status == BlkifStatus.Okay)
        {
            _taken[_takenCount++] = request;
            return request.Bytes;
        }

        _settings.Counters.CountError();
        Finish(request, status, batch: null);
        return 0;
    }

    private void SubmitTaken()
    {
        int count = _takenCount;
        _takenCount = 0;
        _settings.Image.Submit(_taken.AsSpan(0, count));
    }

    private BlkifStatus Prepare(BlockRequest request)
    {
        BlkifOperation operation = BlkifAbi.Operation(_request);
        ulong sector = _abi.Sector(_request);
        int count = 0;
        bool readable = true;
        switch (operation)
        {
            case BlkifOperation.Read:
            case BlkifOperation.Write:
            case BlkifOperation.WriteBarrier:
            case BlkifOperation.FlushDiskCache:
                count = BlkifAbi.Segments(_request);
                readable = count <= BlkifAbi.MaxDirectSegments;
                for (int i = 0; readable && i < count; i++)
                    _segments[i] = _abi.Segment(_request, i);
                break;

            case BlkifOperation.Indirect:
                operation = BlkifAbi.IndirectOperation(_request);
                count = BlkifAbi.IndirectSegments(_request);
                readable = operation is BlkifOperation.Read or BlkifOperation.Write && count <= _settings.MaxIndirectSegments
                    && ReadIndirectSegments(count);
                break;
        }

        request.Begin(_abi.Id(_request), operation, readable ? count : 0);
        if (!readable)
            return BlkifStatus.Error;
        switch (operation)
        {
            case BlkifOperation.Read:
            case BlkifOperation.Write:
                if (count == 0 || !TryAddSegments(request, count, sector, operation == BlkifOperation.Write))
                    return BlkifStatus.Error;
                request.Transfer(operation == BlkifOperation.Read ? BlockOperationKind.Read : BlockOperationKind.Write, sector);
                return BlkifStatus.Okay;

            case BlkifOperation.WriteBarrier:
            case BlkifOperation.FlushDiskCache:
                if (count != 0 && !TryAddSegments(request, count, sector, write: true))
                    return BlkifStatus.Error;
                request.Flush(sector);
                return BlkifStatus.Okay;

            case BlkifOperation.Discard:
                return PrepareDiscard(request, sector);

            default:
                return BlkifStatus.OperationNotSupported;
        }
    }

    private BlkifStatus PrepareDiscard(BlockRequest request, ulong sector)
    {
        // What a secure discard promises cannot be kept here.
        if (!_settings.CanDiscard || (BlkifAbi.DiscardFlags(_request) & BlkifAbi.DiscardSecure) != 0)
            return BlkifStatus.OperationNotSupported;
        ulong sectors = _abi.DiscardSectors(_request);
        if (_settings.IsReadOnly || sectors == 0 || !IsOnDisk(sector, sectors))
            return BlkifStatus.Error;
        request.Discard(sector, sectors);
        return BlkifStatus.Okay;
    }

    /// <summary>Copies the segments of an indirect request out of the guest's pages.</summary>
    private bool ReadIndirectSegments(int count)
    {
        for (int page = 0; page * BlkifAbi.SegmentsPerIndirectPage < count; page++)
        {
            int first = page * BlkifAbi.SegmentsPerIndirectPage;
            int here = Math.Min(count - first, BlkifAbi.SegmentsPerIndirectPage);
            Span<byte> bytes = _indirect.AsSpan(0, here * BlkifSegment.Size);
            if (_grants.CopyFrom(_abi.IndirectReference(_request, page), 0, bytes) != GrantStatus.Okay)
                return false;
            for (int i = 0; i < here; i++)
                _segments[first + i] = BlkifSegment.Read(bytes[(i * BlkifSegment.Size)..]);
        }

        return true;
    }

    /// <summary>Checks the segments at hand against the disk, and maps their pages.</summary>
    private bool TryAddSegments(BlockRequest request, int count, ulong sector, bool write)
    {
        ReadOnlySpan<BlkifSegment> segments = _segments.AsSpan(0, count);
        ulong sectors = 0;
        foreach (BlkifSegment segment in segments)
        {
            if (!segment.IsValid || ((ulong)segment.Sectors & _settings.SectorMask) != 0)
                return false;
            sectors += (ulong)segment.Sectors;
        }

        if (!IsOnDisk(sector, sectors) || (write && _settings.IsReadOnly))
            return false;
        return _isPersistent ? TryAddKept(request, segments) : TryMap(request, segments, writable: !write);
    }

    /// <summary>Maps pages for one request.</summary>
    private unsafe bool TryMap(BlockRequest request, ReadOnlySpan<BlkifSegment> segments, bool writable)
    {
        Span<uint> references = _references.AsSpan(0, segments.Length);
        for (int i = 0; i < references.Length; i++)
            references[i] = segments[i].Reference;
        if (request.Mapped.TryMap(references, writable) != GrantStatus.Okay)
            return false;
        for (int i = 0; i < segments.Length; i++)
            request.Add(request.Mapped.AddressOf(i), segments[i]);
        return true;
    }

    /// <summary>Takes pages that stay mapped.</summary>
    private bool TryAddKept(BlockRequest request, ReadOnlySpan<BlkifSegment> segments)
    {
        lock (_gate)
        {
            foreach (BlkifSegment segment in segments)
            {
                if (_cache.Acquire(segment.Reference) is not { } page)
                    return false;
                request.Add(page, segment);
            }
        }

        return true;
    }

    private bool IsOnDisk(ulong sector, ulong sectors)
        => sector <= _settings.Sectors && sectors <= _settings.Sectors - sector && ((sector | sectors) & _settings.SectorMask) == 0;

    /// <summary>Answers a request, and is done with it.</summary>
    private void Finish(BlockRequest request, BlkifStatus status, CompletionBatch? batch)
    {
        request.Mapped.Unmap();
        lock (_gate)
        {
            foreach (GrantedBlockPage page in request.Pages)
                _cache.Release(page);
            request.Pages.Clear();
            _ring.Put(request.Id, request.Operation, status);
            _unused.Push(request);

            // The ring and the channel may go once nothing is under way: so the end of the batch is, and this is before the count.
            if (batch is not null)
                _inFlight += batch.Add(this) ? 1 : 0;
            else if (!_batching && _ring.Push())
                Notify();
            EndOne();
        }
    }

    /// <summary>Counts one thing less under way.</summary>
    private void EndOne()
    {
        if (--_inFlight == 0 && _idle is not null)
        {
            _idle.SetResult();
            _idle = null;
        }
    }

    private void Notify()
    {
        _settings.Counters.CountNotification();
        _channel.Notify();
    }

    /// <summary>Completes when no request is under way.</summary>
    private Task WhenIdle()
    {
        lock (_gate)
        {
            if (_inFlight == 0)
                return Task.CompletedTask;
            _idle ??= new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            return _idle.Task;
        }
    }

    private void Report(BlockRequest request, int error)
    {
        _settings.Counters.CountError();
        if (error == LibC.EOPNOTSUPP)
            return;
        if (_settings.Image.Failure is { } failure)
        {
            _settings.ReportFailure(failure);
            return;
        }

        string what = request.Kind switch
        {
            BlockOperationKind.Read => "be read from",
            BlockOperationKind.Write => "be written to",
            BlockOperationKind.Flush => "be flushed to",
            _ => "be discarded in",
        };
        string why = error == LibC.ENOSPC || error == LibC.EDQUOT ? "there is no room left where it is; make some, the guest gets errors meanwhile"
            : error == LibC.EIO
            ? "Input/output error; see whether it is still as long as it was, and whether the disk that it is on, or who serves it, has failed"
            : System.Runtime.InteropServices.Marshal.GetPInvokeErrorMessage(error);
        _settings.Report($"data could not {what} {_settings.Image.Description} (byte {request.Offset}, {request.Length} bytes): {why}");
    }
}
