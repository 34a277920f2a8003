// A domain with all that it needs around it: VM, console, xenstore. Put together, run, and taken apart in the right order.

using System.Runtime.CompilerServices;
using XenSharp.Core;
using XenSharp.Devices.Console;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Migration;
using XenSharp.Kvm;

namespace XenSharp.Toolstack;

/// <summary>
/// One domain in this process, from before its first instruction to after its last trace. Members may be called by any thread.
/// </summary>
/// <remarks>
/// The order of the end is that of who may still touch what: first the vCPUs stop, then the console has nobody left to print
/// for it, then the store lets go of its ring page, then the domain's memory goes, then the VM that mapped it.
/// </remarks>
public sealed class RunningDomain : IAsyncDisposable
{
    private readonly ToolstackContext _toolstack;
    private readonly bool _ownsToolstack;
    private readonly Mfn _frames;
    private readonly KvmVirtualMachine _machine;
    private readonly IConsoleSink? _sink;
    private readonly IConsoleSink? _emergencySink;

    /// <summary>Signalled when nobody waits for the console's output any more.</summary>
    private readonly CancellationTokenSource _abandon = new();

    /// <summary>Signalled when the vCPUs are to stop, whatever they wait for.</summary>
    private readonly CancellationTokenSource _stop = new();

    /// <summary>Released when the domain goes on after it has suspended.</summary>
    private readonly SemaphoreSlim _resumed = new(0);

    private readonly SemaphoreSlim _inputTurn = new(1, 1);
    private readonly TaskCompletionSource<DomainExit> _completion = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Lock _lock = new();
    private Task? _disposal;
    private bool _started;
    private bool _inputClosed;

    private RunningDomain(
        ToolstackContext toolstack, bool ownsToolstack, DomainSpecification specification, IConsoleSink? sink, IConsoleSink? emergencySink,
        Func<DomainOptions, KvmVirtualMachine, Domain> build)
    {
        _toolstack = toolstack;
        _ownsToolstack = ownsToolstack;
        _sink = sink;
        _emergencySink = emergencySink;
        Specification = specification;
        KvmHost host = toolstack.Host;
        ulong frames = DomainOptions.MachineFrames(specification.MaxMemoryMiB, specification.GrantLimits);
        _frames = toolstack.Domains.TakeFrames(frames);
        try
        {
            _machine = new KvmVirtualMachine(
                host.Kvm, host.Capabilities, frames << Paging.PageShift, DomainOptions.WindowFrames, _frames.Address.Value);
            Domain = build(OptionsOf(toolstack, specification), _machine);
            Domain.EmergencyOutput = WriteEmergencyOutput;
            Console = ConsoleOf(Domain);
        }
        catch
        {
            Domain?.Dispose();
            _machine?.Dispose();
            toolstack.Domains.ReturnFrames(_frames);
            throw;
        }
    }

    /// <summary>What the domain was made from.</summary>
    public DomainSpecification Specification { get; }

    /// <summary>The domain itself.</summary>
    public Domain Domain { get; }

    /// <summary>The back end of its console. Where the domain was made without a sink it has no reader, and can be given one;
    /// a run must have ended before the domain is disposed, or end by itself when the domain does.</summary>
    public ConsoleBackend Console { get; }

    /// <summary>The xenstore it is connected to.</summary>
    public XenstoreServer Store => _toolstack.Store;

    /// <summary>Completes when the domain's vCPUs have stopped; for good, unless it is resumed.</summary>
    public Task<DomainExit> Stopped => Domain.Completion;

    /// <summary>Completes when the domain has stopped and the sink has been given all that it printed.</summary>
    public Task<DomainExit> Completion => _completion.Task;

    /// <summary>Whether <see cref="Destroy"/> was called, so that <see cref="Stopped"/> may be no doing of the guest's.</summary>
    public bool Destroyed { get; private set; }

    /// <summary>Makes a domain that is ready to start, in a context that it shares with others.</summary>
    /// <param name="toolstack">The KVM, the domains that it can find and that can find it, and their store; stays the caller's, until the
    /// domain is disposed.</param>
    /// <param name="specification">What to make.</param>
    /// <param name="sink">Takes what the guest prints; stays the caller's. <see langword="null"/> if <see cref="Console"/> is
    /// to get its reader otherwise.</param>
    /// <param name="emergencySink">Takes what the guest prints by the console_io hypercall, on the vCPU's own thread, which
    /// waits for it; stays the caller's. <see langword="null"/> to drop it.</param>
    /// <exception cref="KvmException">The host cannot run it; a sentence says why.</exception>
    /// <exception cref="Domains.Builder.DomainBuildException">What was asked for cannot be built; a sentence says why.</exception>
    public static RunningDomain Create(
        ToolstackContext toolstack, DomainSpecification specification, IConsoleSink? sink = null, IConsoleSink? emergencySink = null)
    {
        ArgumentNullException.ThrowIfNull(toolstack);
        ArgumentNullException.ThrowIfNull(specification);
        return Create(toolstack, ownsToolstack: false, specification, sink, emergencySink);
    }

    /// <summary>Makes a domain that is ready to start and has a context, and so a store, of its own.</summary>
    /// <inheritdoc cref="Create(ToolstackContext, DomainSpecification, IConsoleSink?, IConsoleSink?)"/>
    public static RunningDomain Create(
        KvmHost host, DomainSpecification specification, IConsoleSink? sink = null, IConsoleSink? emergencySink = null)
    {
        ArgumentNullException.ThrowIfNull(specification);
        return Create(new ToolstackContext(host), ownsToolstack: true, specification, sink, emergencySink);
    }

    /// <summary>Makes a domain of an image that one was saved to; started, it goes on where that one suspended.</summary>
    /// <param name="toolstack">What it is made in; stays the caller's, until the domain is disposed.</param>
    /// <param name="specification">What is not in the image: kernel, ramdisk and command line are not looked at.</param>
    /// <param name="image">The image; nothing behind it is read.</param>
    /// <param name="sink">Takes what the guest prints; stays the caller's.</param>
    /// <param name="emergencySink">Takes what the guest prints by the console_io hypercall; stays the caller's.</param>
    /// <param name="progress">Is told how many pages have been read; on the calling thread.</param>
    /// <param name="cancellation">Ends the work.</param>
    /// <exception cref="KvmException">The host cannot run it; a sentence says why.</exception>
    /// <exception cref="MigrationException">It is no image, or one that cannot be used here; a sentence says why.</exception>
    /// <exception cref="Domains.Builder.DomainBuildException">The domain cannot be made as asked.</exception>
    public static RunningDomain Restore(
        ToolstackContext toolstack, DomainSpecification specification, Stream image, IConsoleSink? sink = null, IConsoleSink? emergencySink = null,
        IProgress<PageProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(toolstack);
        ArgumentNullException.ThrowIfNull(specification);
        return Connect(new RunningDomain(
            toolstack, ownsToolstack: false, specification, sink, emergencySink,
            (options, machine) => Domain.Restore(options, image, machine, toolstack.Domains, progress, cancellation)));
    }

    private static RunningDomain Create(
        ToolstackContext toolstack, bool ownsToolstack, DomainSpecification specification, IConsoleSink? sink, IConsoleSink? emergencySink)
    {
        bool collect;
        RunningDomain domain;
        try
        {
            domain = Connect(new RunningDomain(
                toolstack, ownsToolstack, specification, sink, emergencySink, (options, machine) => Build(options, specification.Image, machine, toolstack.Domains)));
        }
        finally
        {
            collect = specification.Image.Release();
        }

        // The image is in the guest's memory now; while the guest runs there may be no collection for hours.
        if (collect)
            GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
        return domain;
    }

    private static RunningDomain Connect(RunningDomain domain)
    {
        try
        {
            domain.ConnectStore();
            return domain;
        }
        catch
        {
            domain.DisposeAsync().AsTask().GetAwaiter().GetResult();
            throw;
        }
    }

    /// <summary>Runs the guest.</summary>
    /// <exception cref="InvalidOperationException">It was started before.</exception>
    public void Start()
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposal is not null, this);
            if (_started)
                throw new InvalidOperationException("The domain was started before; make another from the same specification.");
            _started = true;
            Task showing = _sink is null ? Task.CompletedTask : Console.RunAsync(_sink, _abandon.Token);
            Domain.Start();
            _ = FollowAsync(showing);
        }
    }

    /// <summary>Types to the guest, waiting for room in the ring as often as it takes.</summary>
    /// <returns><see langword="false"/> if the guest will read no more.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled; a part of the input may be
    /// in the ring.</exception>
    public async ValueTask<bool> WriteInputAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation = default)
    {
        await _inputTurn.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            return !_inputClosed && !Stopped.IsCompleted && await Console.WriteAsync(input, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _inputTurn.Release();
        }
    }

    /// <summary>Bytes of the host's memory that the domain's own takes at the moment.</summary>
    /// <exception cref="KvmException">The host does not say.</exception>
    /// <exception cref="ObjectDisposedException">The domain is disposed.</exception>
    public ulong ResidentMemory
    {
        get
        {
            lock (_lock)
            {
                ObjectDisposedException.ThrowIf(_disposal is not null, this);
                return _machine.ResidentRam;
            }
        }
    }

    /// <summary>
    /// Tells the guest's balloon driver how much memory the domain is to have, as <c>xl mem-set</c> does, and sees to it that it
    /// gets no more. The driver comes there in its own time; <see cref="ResidentMemory"/> shows it.
    /// </summary>
    /// <param name="memoryMiB">In MiB, from <see cref="DomainOptions.MinMemoryMiB"/> to the specification's
    /// <see cref="DomainSpecification.MaxMemoryMiB"/>.</param>
    /// <exception cref="ArgumentOutOfRangeException">It is not in that range.</exception>
    /// <exception cref="ObjectDisposedException">The domain is disposed.</exception>
    public void SetMemoryTarget(int memoryMiB)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(memoryMiB, DomainOptions.MinMemoryMiB);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(memoryMiB, Specification.MaxMemoryMiB);
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposal is not null, this);
            Domain.MaxPages = DomainOptions.MaxPages(memoryMiB);
            XenstoreDomainTree.SetMemoryTarget(Store.Domain0, Domain.Id.Value, KiB(memoryMiB));
        }
    }

    /// <summary>
    /// Lets a domain go on that has suspended itself and was kept (<see cref="DomainSpecification.KeepSuspended"/>), as if it had not:
    /// <see cref="Stopped"/> is another task afterwards.
    /// </summary>
    /// <exception cref="InvalidOperationException">It is not suspended, was not to be kept, or was destroyed.</exception>
    public void Resume()
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposal is not null, this);
            if (!Specification.KeepSuspended)
                throw new InvalidOperationException("The domain was not to be kept when it suspends, so it has ended.");
            Store.ResumeDomain(Domain.Id.Value);
            Domain.Resume();
            _ = _resumed.Release();
        }
    }

    /// <summary>Ends the domain at once, as <c>xl destroy</c> does. <see cref="Stopped"/> says when.</summary>
    public void Destroy()
    {
        Destroyed = true;
        Stop();
    }

    /// <summary>
    /// Ends the domain if it still runs, and frees all that it held. What the sink has not taken by then is dropped: await
    /// <see cref="Completion"/> first to have it all.
    /// </summary>
    public ValueTask DisposeAsync()
    {
        lock (_lock)
            _disposal ??= DisposeCoreAsync();
        return new ValueTask(_disposal);
    }

    private async Task DisposeCoreAsync()
    {
        await Task.Yield();
        await _abandon.CancelAsync().ConfigureAwait(false);
        Stop();
        await Domain.Completion.ConfigureAwait(false);
        if (_started)
            await Task.WhenAny(_completion.Task).ConfigureAwait(false);

        // From here on a call of WriteInputAsync ends without looking at the ring, and the one that has the turn soon.
        await Console.CompleteAsync().ConfigureAwait(false);
        await _inputTurn.WaitAsync().ConfigureAwait(false);
        _inputClosed = true;
        _inputTurn.Release();

        // The nodes go before the domain does: its number may be another's at once.
        _ = await Store.ReleaseDomainAsync(Domain.Id.Value).ConfigureAwait(false);
        XenstoreDomainTree.Remove(Store.Domain0, Domain.Id.Value);
        Domain.Dispose();
        _machine.Dispose();
        _toolstack.Domains.ReturnFrames(_frames);
        if (_ownsToolstack)
            await _toolstack.DisposeAsync().ConfigureAwait(false);
        _abandon.Dispose();
        _stop.Dispose();
    }

    private void Stop()
    {
        _stop.Cancel();
        Domain.Destroy();
    }

    /// <summary>A method of its own, so that nothing refers to the image any more when the collector is asked to look.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static Domain Build(DomainOptions options, DomainImage image, KvmVirtualMachine machine, DomainManager manager)
    {
        (KernelImage kernel, ReadOnlyMemory<byte> ramdisk) = image.Take();
        return new Domain(options with { Kernel = kernel, Ramdisk = ramdisk }, machine, manager);
    }

    private static DomainOptions OptionsOf(ToolstackContext toolstack, DomainSpecification specification) => new()
    {
        Name = specification.Name,
        MemoryMiB = specification.MemoryMiB,
        MaxMemoryMiB = specification.MaxMemoryMiB,
        Vcpus = specification.Vcpus,
        MaxEventChannels = specification.MaxEventChannels,
        GrantLimits = specification.GrantLimits,
        CommandLine = specification.CommandLine,
        Uuid = specification.Uuid,
        TimeOffsetSeconds = specification.TimeOffsetSeconds,
        Cpuid = new CpuidOptions { Overrides = specification.Cpuid },
        HostTsc = static () => HostClock.TimeStampCounter,
        ShadowPageTables = toolstack.Host.Capabilities.ShadowPageTables,
        Trace = specification.Trace,
        AuditInterval = specification.AuditInterval,
    };

    private static unsafe ConsoleBackend ConsoleOf(Domain domain) => new(domain.ConsolePage, domain.ConsoleChannel);

    private static unsafe XenstoreRing StoreRingOf(Domain domain) => new(domain.StorePage, domain.StoreChannel);

    private static ulong KiB(int memoryMiB) => (ulong)memoryMiB << 10;

    private void ConnectStore()
    {
        XenstoreDomainTree.Create(
            Store.Domain0,
            new XenstoreDomainDescription
            {
                DomainId = Domain.Id.Value,
                Name = Specification.Name,
                Uuid = Specification.Uuid,
                MaximumMemoryKiB = KiB(Specification.MaxMemoryMiB),
                TargetMemoryKiB = KiB(Specification.MemoryMiB),
                MaximumVcpus = Specification.Vcpus,
                OnlineVcpus = Specification.OnlineVcpus,
                ConsolePort = Domain.ConsolePort,
                ConsoleFrame = Domain.Layout.Console.Value,
                StorePort = Domain.StorePort,
                StoreFrame = Domain.Layout.Store.Value,
                Kernel = Specification.KernelFile,
                Ramdisk = Specification.RamdiskFile,
                CommandLine = Specification.CommandLine,
                StartTime = DateTimeOffset.UtcNow,
            });
        _ = Store.IntroduceDomain(Domain.Id.Value, StoreRingOf(Domain));
    }

    private async Task FollowAsync(Task showing)
    {
        DomainExit exit;
        do
        {
            exit = await Domain.Completion.ConfigureAwait(false);
            Store.AnnounceShutdown(Domain.Id.Value);
        }
        while (exit.Reason == ShutdownReason.Suspend && Specification.KeepSuspended && await IsResumedAsync().ConfigureAwait(false));

        try
        {
            if (_sink is not null)
                await Console.CompleteAsync().ConfigureAwait(false);
            await showing.ConfigureAwait(false);
            _completion.SetResult(exit);
        }
        catch (OperationCanceledException) when (_abandon.IsCancellationRequested)
        {
            _completion.SetResult(exit);
        }
        catch (Exception failure)
        {
            // A sink that throws, against its contract: the one who awaits the domain gets to know.
            _completion.SetException(failure);
        }
    }

    /// <summary>Waits for what becomes of a suspended domain.</summary>
    /// <returns>False when it is destroyed.</returns>
    private async Task<bool> IsResumedAsync()
    {
        try
        {
            await _resumed.WaitAsync(_stop.Token).ConfigureAwait(false);
            return true;
        }
        catch (OperationCanceledException)
        {
            return false;
        }
    }

    private void WriteEmergencyOutput(ReadOnlySpan<byte> text)
    {
        try
        {
            while (_emergencySink is not null && !text.IsEmpty)
            {
                int taken = _emergencySink.Write(text, _stop.Token);
                if (taken == 0)
                    return;
                text = text[taken..];
            }
        }
        catch (OperationCanceledException)
        {
            // The domain is on its way out, and so is what it says.
        }
    }
}
