// The manager of domains: makes them, knows them, and sees to what becomes of them, as xl and libxl do together.

using System.Diagnostics.CodeAnalysis;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Migration;
using XenSharp.Kvm;

namespace XenSharp.Toolstack.Management;

/// <summary>
/// All domains of one manager. Members may be called by any thread, and throw <see cref="ToolstackException"/> with a sentence where what
/// was asked cannot be done.
/// </summary>
/// <remarks>A domain is there for others when it is whole, and whatever fails while it is being made, nothing of it stays.</remarks>
public sealed partial class DomainToolstack : IAsyncDisposable
{
    private static readonly TimeSpan LogPatience = TimeSpan.FromSeconds(5);

    private readonly ToolstackOptions _options;
    private readonly StateFolder _state;
    private readonly UnpackedKernels _kernels;

    /// <summary>Guards who there is, names, and records.</summary>
    private readonly Lock _lock = new();
    private readonly SortedList<int, ManagedDomain> _domains = [];

    /// <summary>Names and UUIDs of domains that are being made.</summary>
    private readonly HashSet<string> _reservedNames = new(StringComparer.Ordinal);
    private readonly Dictionary<Guid, TaskCompletionSource> _reservedUuids = [];

    /// <summary>What sees to the ends of domains.</summary>
    private readonly HashSet<Task> _followers = [];
    private bool _closing;

    /// <summary>Takes the state folder, and finds what was lost.</summary>
    /// <param name="context">What domains are made in; stays the caller's, until this is disposed.</param>
    /// <param name="options">Where things are kept.</param>
    /// <param name="log">Is told what is done.</param>
    /// <exception cref="ToolstackException">The folder cannot be used, or another manager has it.</exception>
    public DomainToolstack(ToolstackContext context, ToolstackOptions options, ManagerLog log)
    {
        Context = context ?? throw new ArgumentNullException(nameof(context));
        _options = options ?? throw new ArgumentNullException(nameof(options));
        Log = log ?? throw new ArgumentNullException(nameof(log));
        _state = Management.StateFolder.Open(options.StateFolder, log);
        _kernels = new UnpackedKernels(Path.Combine(_state.Path, "kernels"), log);
    }

    /// <summary>What domains are made in.</summary>
    public ToolstackContext Context { get; }

    /// <summary>What was done.</summary>
    public ManagerLog Log { get; }

    /// <summary>What happens.</summary>
    public DomainEvents Events { get; } = new();

    /// <summary>Where records are kept.</summary>
    public string StateFolder => _state.Path;

    /// <summary>The domains, by number.</summary>
    public IReadOnlyList<ManagedDomain> Domains
    {
        get
        {
            lock (_lock)
                return [.. _domains.Values];
        }
    }

    /// <summary>Whether there is no domain, and none is being made.</summary>
    public bool IsIdle
    {
        get
        {
            lock (_lock)
                return _domains.Count == 0 && _reservedNames.Count == 0;
        }
    }

    /// <summary>Domains that ran when an earlier manager ended, and were not taken down by it.</summary>
    public IReadOnlyList<LostDomain> ListLost()
    {
        lock (_lock)
            return _state.ListLost();
    }

    /// <summary>Forgets one of those.</summary>
    public void ForgetLost(Guid uuid)
    {
        lock (_lock)
        {
            if (!_state.ForgetLost(uuid))
                throw new ToolstackException(ProblemKind.NoSuchResource, $"There is no lost domain with the UUID {uuid}.");
        }
    }

    /// <summary>Finds a domain.</summary>
    /// <param name="name">Its number, name or UUID; digits are a number, as with xl.</param>
    public ManagedDomain Find(string name)
    {
        ArgumentNullException.ThrowIfNull(name);
        lock (_lock)
        {
            if (int.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out int id))
            {
                if (_domains.TryGetValue(id, out ManagedDomain? numbered))
                    return numbered;
                throw new ToolstackException(
                    ProblemKind.NoSuchDomain, id == 0 ? "Domain 0 is the host itself: name a guest." : $"There is no domain of the number {id}; \"list\" shows those that there are.");
            }

            if (FindByName(name) is { } domain)
                return domain;
            if (Guid.TryParseExact(name, "D", out Guid uuid) && _domains.Values.FirstOrDefault(domain => domain.Uuid == uuid) is { } found)
                return found;
            throw new ToolstackException(ProblemKind.NoSuchDomain, $"There is no domain {name}; \"list\" shows those that there are.");
        }
    }

    /// <summary>Sentences about settings of a configuration that have no effect here.</summary>
    /// <exception cref="ToolstackException">Such a domain cannot be had here.</exception>
    public static IReadOnlyList<string> Ineffective(DomainConfiguration configuration)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        return DomainLoader.Check(configuration);
    }

    /// <summary>Checks whether a domain could be made, and reads its files; makes nothing.</summary>
    /// <returns>Sentences about settings that have no effect.</returns>
    public async Task<IReadOnlyList<string>> CheckAsync(DomainConfiguration configuration)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        IReadOnlyList<string> warnings = DomainLoader.Check(configuration);
        lock (_lock)
            CheckFree(configuration.Name, configuration.Uuid);
        await Task.Run(() => DomainLoader.Load(configuration with { Uuid = configuration.Uuid ?? Guid.NewGuid() }, _kernels).Image.Release()).ConfigureAwait(false);
        return warnings;
    }

    /// <summary>Waits until a domain that is being made is there, or will not be.</summary>
    /// <param name="name">Its UUID; there is nothing to wait for under any other name.</param>
    public Task WaitForMakingAsync(string name)
    {
        if (!Guid.TryParseExact(name, "D", out Guid uuid))
            return Task.CompletedTask;
        lock (_lock)
            return _reservedUuids.TryGetValue(uuid, out TaskCompletionSource? made) ? made.Task : Task.CompletedTask;
    }

    /// <summary>Makes a domain, and runs it.</summary>
    /// <param name="configuration">What it is to be.</param>
    /// <param name="paused">It waits with its first instruction until it is unpaused.</param>
    /// <param name="cancellation">Gives up: there will be no domain.</param>
    public async Task<ManagedDomain> CreateAsync(DomainConfiguration configuration, bool paused = false, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        configuration = ManagedDomain.Complete(configuration) with { Uuid = configuration.Uuid ?? Guid.NewGuid() };
        foreach (string warning in DomainLoader.Check(configuration))
            Log.Write($"{configuration.Name}: {warning}");
        _options.BeforeStep?.Invoke(CreateStep.Reserve);
        Reserve(configuration.Name, configuration.Uuid.Value);
        return await MakeAsync(configuration, new Making(BuildFromImageAsync) { Paused = paused }, cancellation).ConfigureAwait(false);
    }

    /// <summary>Ends a domain at once, and frees all that it held.</summary>
    /// <returns>Completes when it is gone, also where somebody else had begun with that.</returns>
    public async Task DestroyAsync(ManagedDomain domain)
    {
        ArgumentNullException.ThrowIfNull(domain);
        if (await TakeDownAsync(domain, keepReserved: false).ConfigureAwait(false))
        {
            await EndConsoleAsync(domain.Console).ConfigureAwait(false);
            Tell(DomainEventKind.Destroyed, domain);
            Log.Write($"The domain {domain.Name} (number {domain.Id}) was destroyed.");
        }

        await domain.Gone.ConfigureAwait(false);
    }

    /// <summary>Gives a domain another name.</summary>
    public void Rename(ManagedDomain domain, string name)
    {
        ArgumentNullException.ThrowIfNull(domain);
        if (name is null || !DomainConfigurationRules.IsName(name))
        {
            throw new ToolstackException(
                ProblemKind.BadRequest, $"A domain's name has 1 to {DomainConfigurationRules.LongestName} printable ASCII characters without a slash.");
        }

        lock (_lock)
        {
            if (name == domain.Name)
                return;
            CheckFree(name, null);
            domain.WriteName(name);
            domain.Name = name;
        }

        domain.Reconfigure(configuration => configuration with { Name = name });
        Tell(DomainEventKind.Renamed, domain);
    }

    /// <summary>
    /// Asks all guests to shut down, waits for them, and destroys those that did not. No domain is made from here on, and none restarted.
    /// </summary>
    /// <param name="patience">How long to wait; zero to destroy them at once.</param>
    /// <param name="cancellation">Ends the waiting.</param>
    public async Task CloseAsync(TimeSpan patience, CancellationToken cancellation = default)
    {
        ManagedDomain[] domains;
        lock (_lock)
        {
            _closing = true;
            domains = [.. _domains.Values];
        }

        if (patience > TimeSpan.Zero && domains.Length > 0)
        {
            foreach (ManagedDomain domain in domains)
            {
                try
                {
                    domain.RequestShutdown(reboot: false);
                }
                catch (ToolstackException)
                {
                    // It has ended already, and is only kept.
                    await DestroyAsync(domain).ConfigureAwait(false);
                }
            }

            try
            {
                await Task.WhenAll(domains.Select(static domain => domain.Gone)).WaitAsync(patience, cancellation).ConfigureAwait(false);
            }
            catch (Exception failure) when (failure is TimeoutException or OperationCanceledException)
            {
                Log.Write("Some guests did not shut down in time; their domains are destroyed.");
            }
        }

        // One may have been about to be made, or made again, when the door was closed.
        while (true)
        {
            ManagedDomain[] left;
            Task[] followers;
            lock (_lock)
                (left, followers) = ([.. _domains.Values], [.. _followers]);
            if (left.Length == 0 && followers.Length == 0)
                break;
            await Task.WhenAll([.. left.Select(DestroyAsync), .. followers]).ConfigureAwait(false);
        }

        Events.End();
    }

    /// <summary>Destroys all domains, and gives the state folder back.</summary>
    public async ValueTask DisposeAsync()
    {
        await CloseAsync(TimeSpan.Zero).ConfigureAwait(false);
        await _kernels.DisposeAsync().ConfigureAwait(false);
        _state.Dispose();
    }

    /// <summary>Tells listeners of something.</summary>
    internal void Tell(DomainEventKind kind, ManagedDomain domain, ShutdownReason? reason = null, int successor = 0) => Events.Publish(new DomainEvent
    {
        Kind = kind,
        Time = DateTimeOffset.UtcNow,
        Id = domain.Id,
        Name = domain.Name,
        Uuid = domain.Uuid,
        Reason = (DomainShutdownReason?)reason,
        SuccessorId = successor,
    });

    /// <summary>Changes something about a domain that its record tells of.</summary>
    internal void Record(ManagedDomain domain, Action change)
    {
        lock (_lock)
        {
            change();
            if (_domains.TryGetValue(domain.Id, out ManagedDomain? known) && known == domain)
                _state.Save(domain.Record);
        }
    }

    /// <summary>Says that nothing will be printed any more; who looks reads it to its end.</summary>
    private static async Task EndConsoleAsync(ConsoleHub console)
    {
        try
        {
            await console.CompleteAsync().WaitAsync(LogPatience).ConfigureAwait(false);
        }
        catch (TimeoutException)
        {
            // A file system that hangs: the log goes without its last bytes.
        }
    }

    private ManagedDomain? FindByName(string name) => _domains.Values.FirstOrDefault(domain => domain.Name == name);

    private void CheckFree(string name, Guid? uuid)
    {
        if (_reservedNames.Contains(name) || FindByName(name) is not null)
            throw new ToolstackException(ProblemKind.NameTaken, $"There is a domain {name} already: give this one another name, or destroy that one.");
        if (uuid is { } wanted && (_reservedUuids.ContainsKey(wanted) || _domains.Values.Any(domain => domain.Uuid == wanted)))
            throw new ToolstackException(ProblemKind.NameTaken, $"There is a domain with the UUID {wanted} already: give this one another, or none.");
    }

    private void Reserve(string name, Guid uuid)
    {
        lock (_lock)
        {
            if (_closing)
                throw new ToolstackException(ProblemKind.WrongState, "The daemon is about to end, and makes no more domains.");
            CheckFree(name, uuid);
            _ = _reservedNames.Add(name);
            ReserveUuid(uuid);
        }
    }

    /// <summary>With the lock. Whoever waits for the domain of that UUID waits until <see cref="Unreserve"/>.</summary>
    private void ReserveUuid(Guid uuid) => _reservedUuids.Add(uuid, new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously));

    private void Unreserve(string name, Guid uuid)
    {
        lock (_lock)
        {
            _ = _reservedNames.Remove(name);
            if (_reservedUuids.Remove(uuid, out TaskCompletionSource? made))
                made.SetResult();
        }
    }

    /// <summary>Makes a domain whose name and UUID are reserved, which they are no longer afterwards, whatever comes of it.</summary>
    private async Task<ManagedDomain> MakeAsync(DomainConfiguration configuration, Making making, CancellationToken cancellation)
    {
        Guid uuid = configuration.Uuid!.Value;
        ConsoleHub? console = making.Console;
        RunningDomain? running = null;
        ManagedDomain? domain = null;
        bool recorded = false;
        try
        {
            _options.BeforeStep?.Invoke(CreateStep.Console);
            console ??= MakeConsole(configuration.Name);
            int id = 0;
            running = await making.BuildAsync(configuration, console, new GuestLogSink(Log, () => Volatile.Read(ref id)), cancellation).ConfigureAwait(false);
            Volatile.Write(ref id, running.Domain.Id.Value);

            // Nobody but the toolstack says how much memory it may have.
            running.Domain.MaxPages = DomainOptions.MaxPages(configuration.MemoryMiB);
            domain = new ManagedDomain(this, running, configuration, console, making.RequestTime);
            domain.PublishConsole();
            domain.PlaceConfigured();
            _options.BeforeStep?.Invoke(CreateStep.Devices);
            await domain.AttachConfiguredAsync(cancellation).ConfigureAwait(false);
            cancellation.ThrowIfCancellationRequested();
            lock (_lock)
            {
                if (_closing)
                    throw new ToolstackException(ProblemKind.WrongState, "The daemon is about to end, and makes no more domains.");
                _options.BeforeStep?.Invoke(CreateStep.Record);
                recorded = true;
                _state.Save(domain.Record);
                _options.BeforeStep?.Invoke(CreateStep.Publish);
                _domains.Add(domain.Id, domain);
                Unreserve(configuration.Name, uuid);
            }

            _options.BeforeStep?.Invoke(CreateStep.Start);
            console.Connect(running.WriteInputAsync);
            domain.Start(making.Paused);
            Tell(DomainEventKind.Created, domain);
            Follow(domain);
            Log.Write($"The domain {domain.Name} (number {domain.Id}) was made.");
            return domain;
        }
        catch (Exception failure)
        {
            await UnmakeAsync(configuration, making, console, running, domain, recorded).ConfigureAwait(false);
            if (Sentence(failure) is { } sentence)
                throw sentence;
            throw;
        }
    }

    private async Task UnmakeAsync(
        DomainConfiguration configuration, Making making, ConsoleHub? console, RunningDomain? running, ManagedDomain? domain, bool recorded)
    {
        if (domain is not null)
        {
            _ = domain.BeginEnd();
            await domain.EndAsync().ConfigureAwait(false);
        }
        else if (running is not null)
        {
            await running.DisposeAsync().ConfigureAwait(false);
        }

        lock (_lock)
        {
            if (domain is not null && _domains.TryGetValue(domain.Id, out ManagedDomain? known) && known == domain)
                _ = _domains.Remove(domain.Id);
            if (recorded)
                _state.Remove(configuration.Uuid!.Value);
        }

        domain?.SetGone();
        Unreserve(configuration.Name, configuration.Uuid!.Value);
        if (console is not null && making.Console is null)
            await EndConsoleAsync(console).ConfigureAwait(false);
    }

    /// <summary>What lies at the person who asked, or at the host, as a sentence; null for a defect.</summary>
    private static ToolstackException? Sentence(Exception failure) => failure switch
    {
        ToolstackException => null,
        DomainBuildException or KernelImageException => new ToolstackException(ProblemKind.BadConfiguration, failure.Message, failure),
        MigrationException => new ToolstackException(ProblemKind.BadRequest, failure.Message, failure),
        KvmException => new ToolstackException(ProblemKind.HostCannot, failure.Message, failure),
        OutOfMemoryException => new ToolstackException(
            ProblemKind.HostCannot, "There is not enough memory on this host for the domain: give it less, or end other programs.", failure),
        _ => null,
    };

    private async Task<RunningDomain> BuildFromImageAsync(
        DomainConfiguration configuration, ConsoleHub console, IConsoleSink log, CancellationToken cancellation)
    {
        // Reading and unpacking a kernel is work for a thread, not for a request.
        return await Task.Run(
            () =>
            {
                _options.BeforeStep?.Invoke(CreateStep.Load);
                cancellation.ThrowIfCancellationRequested();
                DomainSpecification specification = DomainLoader.Load(configuration, _kernels, note => Log.Write($"{configuration.Name}: {note}"));
                try
                {
                    _options.BeforeStep?.Invoke(CreateStep.Build);
                }
                catch
                {
                    _ = specification.Image.Release();
                    throw;
                }

                return RunningDomain.Create(Context, specification, console, log);
            },
            cancellation).ConfigureAwait(false);
    }

    [SuppressMessage("Reliability", "CA2000", Justification = "Whoever asked for the hub disposes it.")]
    private ConsoleHub MakeConsole(string name)
    {
        ConsoleHub console = MakeLoggedConsole(name);
        try
        {
            console.OfferTerminal();
        }
        catch (IOException failure)
        {
            // It can be looked at in other ways.
            Log.Write($"The console of {name} has no terminal: {failure.Message}");
        }

        return console;
    }

    [SuppressMessage("Reliability", "CA2000", Justification = "Whoever asked for the hub disposes it.")]
    private ConsoleHub MakeLoggedConsole(string name)
    {
        if (_options.ConsoleLogFolder is { } folder)
        {
            try
            {
                _ = Directory.CreateDirectory(folder);
                return new ConsoleHub(new ConsoleHubOptions { Log = new ConsoleLogOptions(Path.Combine(folder, $"guest-{name}.log")) });
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
            {
                // As with Xen's console daemon, a domain runs without its log rather than not at all.
                Log.Write($"The console of {name} is not logged: {failure.Message}");
            }
        }

        return new ConsoleHub();
    }

    /// <summary>How a domain is made.</summary>
    /// <param name="BuildAsync">Makes it, ready to start.</param>
    private sealed record Making(Func<DomainConfiguration, ConsoleHub, IConsoleSink, CancellationToken, Task<RunningDomain>> BuildAsync)
    {
        /// <summary>When it was asked for, or began to be made anew.</summary>
        public DateTimeOffset RequestTime { get; } = DateTimeOffset.UtcNow;

        /// <summary>It waits until it is unpaused.</summary>
        public bool Paused { get; init; }

        /// <summary>The console of the incarnation before, which it takes over; null for a new one.</summary>
        public ConsoleHub? Console { get; init; }
    }
}
