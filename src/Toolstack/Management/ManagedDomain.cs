// One incarnation of a domain under the toolstack's care: its state, and what can be asked of it.

using System.Globalization;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Devices.Console;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;

namespace XenSharp.Toolstack.Management;

/// <summary>
/// A domain that was made by a <see cref="DomainToolstack"/>. Members may be called by any thread, and throw
/// <see cref="ToolstackException"/> with a sentence where what was asked cannot be done, also when the domain is gone meanwhile.
/// </summary>
public sealed partial class ManagedDomain
{
    /// <summary>Xen counts pauses from outside up to here.</summary>
    private const int MostPauses = 255;

    private readonly DomainToolstack _toolstack;

    /// <summary>Held for short looks at the domain, which is there as long as <see cref="_gone"/> is false.</summary>
    private readonly Lock _gate = new();

    /// <summary>Held by whoever does something long with the domain, one at a time.</summary>
    private readonly SemaphoreSlim _turn = new(1, 1);

    /// <summary>Signalled when the domain is to go, so that long work on it ends.</summary>
    private readonly CancellationTokenSource _ending = new();

    private DomainConfiguration _configuration;
    private TaskCompletionSource _resumed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private int _pauses;
    private int _onlineVcpus;
    private long _targetKiB;
    private long _maximumKiB;
    private long _firstEntry;
    private readonly IReadOnlyList<int>?[] _processors;
    private bool _started;
    private bool _dying;
    private bool _gone;

    internal ManagedDomain(DomainToolstack toolstack, RunningDomain running, DomainConfiguration configuration, ConsoleHub console, DateTimeOffset requestTime)
    {
        (_toolstack, Running, _configuration, Console) = (toolstack, running, configuration, console);
        (Name, Uuid, RequestTime) = (configuration.Name, running.Specification.Uuid, requestTime);
        _onlineVcpus = configuration.Vcpus;
        _targetKiB = (long)configuration.MemoryMiB << 10;
        _maximumKiB = (long)configuration.GreatestMemoryMiB << 10;
        Id = running.Domain.Id.Value;
        _processors = new IReadOnlyList<int>?[running.Specification.Vcpus];
        running.Domain.BeforeFirstEntry = () => Volatile.Write(ref _firstEntry, DateTimeOffset.UtcNow.UtcTicks);
    }

    /// <summary>Its number.</summary>
    public int Id { get; }

    /// <summary>Its name. Changes under the toolstack's lock.</summary>
    public string Name { get; internal set; }

    /// <summary>Its UUID; a crashed one that was renamed to make room for the next has another than it began with.</summary>
    public Guid Uuid { get; internal set; }

    /// <summary>When it was asked for.</summary>
    public DateTimeOffset RequestTime { get; }

    /// <summary>When it was made.</summary>
    public DateTimeOffset StartTime { get; } = DateTimeOffset.UtcNow;

    /// <summary>Its console, which goes over to the next incarnation.</summary>
    public ConsoleHub Console { get; }

    /// <summary>Signalled when it is being taken apart.</summary>
    public CancellationToken Ending => _ending.Token;

    /// <summary>What the next incarnation is made from.</summary>
    public DomainConfiguration Configuration => Volatile.Read(ref _configuration);

    internal RunningDomain Running { get; }

    private XenstoreClient Store => Running.Store.Domain0;

    private string Folder => string.Create(CultureInfo.InvariantCulture, $"/local/domain/{Id}");

    /// <summary>Says in the store where the console's pseudo-terminal is, as Xen's console daemon does.</summary>
    internal void PublishConsole()
    {
        if (Console.Terminal is { } terminal)
            Store.Write($"{Folder}/console/tty", terminal);
    }

    /// <summary>What xl list and others show of it.</summary>
    public DomainInfo Describe()
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            Domain domain = Running.Domain;
            IReadOnlyList<VcpuActivity> vcpus = domain.Activity;
            DomainExit? exit = Exit;
            bool ended = exit is not null;
            bool running = !ended && _pauses == 0 && vcpus.Any(IsRunning);
            return new DomainInfo
            {
                Id = Id,
                Name = Name,
                Uuid = Uuid,
                State = new DomainStateInfo
                {
                    Running = running,
                    Blocked = !ended && !running && vcpus.All(static vcpu => !vcpu.IsUp || vcpu.Waiting != WaitState.None),
                    Paused = _pauses != 0,
                    Shutdown = ended,
                    Crashed = exit?.Reason == ShutdownReason.Crash,
                    Dying = _dying,
                    Reason = (DomainShutdownReason?)exit?.Reason,
                },
                MemoryKiB = (long)domain.OwnedPages << 2,
                TargetMemoryKiB = _targetKiB,
                MaximumMemoryKiB = _maximumKiB,
                ResidentMemoryKiB = (long)(Running.ResidentMemory >> 10),
                OnlineVcpus = vcpus.Count(static vcpu => vcpu.IsUp),
                MaximumVcpus = vcpus.Count,
                ProcessorSeconds = vcpus.Sum(static vcpu => vcpu.ProcessorTime.TotalSeconds),
                RequestTime = RequestTime,
                StartTime = StartTime,
                FirstEntryTime = Volatile.Read(ref _firstEntry) is not 0 and long ticks ? new DateTimeOffset(ticks, TimeSpan.Zero) : null,
                UptimeSeconds = (DateTimeOffset.UtcNow - StartTime).TotalSeconds,
                Kernel = Running.Specification.KernelFile,
                Ramdisk = Running.Specification.RamdiskFile,
                CommandLine = Running.Specification.CommandLine,
                CrashReport = exit?.Report,
                Io = DescribeIo(),
            };
        }
    }

    /// <summary>Its vCPUs.</summary>
    public IReadOnlyList<VcpuInfo> DescribeVcpus()
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            bool ended = Exit is not null;
            IReadOnlyList<int> online = HostMachine.OnlineProcessors;
            return
            [
                .. Running.Domain.Activity.Select(vcpu => new VcpuInfo
                {
                    Id = vcpu.Id,
                    Online = vcpu.IsUp,
                    Running = !ended && _pauses == 0 && IsRunning(vcpu),
                    Blocked = !ended && vcpu.IsUp && vcpu.Waiting != WaitState.None,
                    Paused = _pauses != 0,
                    Processor = HostMachine.ProcessorOf(vcpu.ThreadId),
                    ProcessorSeconds = vcpu.ProcessorTime.TotalSeconds,
                    Processors = (HostMachine.ProcessorsFor(vcpu.ThreadId) ?? _processors[vcpu.Id]) is { } allowed && online.Except(allowed).Any()
                        ? ProcessorSet.Format(allowed) : null,
                }),
            ];
        }
    }

    /// <summary>Stops all its vCPUs until <see cref="Unpause"/> was called as often.</summary>
    public void Pause()
    {
        lock (_gate)
        {
            CheckAlive("paused");
            if (_pauses == MostPauses)
                throw Wrong($"The domain {Name} was paused {MostPauses} times already: unpause it first.");
            if (_pauses++ == 0)
                Running.Domain.Pause();
        }

        _toolstack.Tell(DomainEventKind.Paused, this);
    }

    /// <summary>Takes one <see cref="Pause"/> back.</summary>
    public void Unpause()
    {
        lock (_gate)
        {
            CheckAlive("unpaused");
            if (_pauses == 0)
                throw Wrong($"The domain {Name} is not paused.");
            if (--_pauses == 0)
                _ = Running.Domain.Unpause();
        }

        _toolstack.Tell(DomainEventKind.Unpaused, this);
    }

    /// <summary>Asks the guest to power off, or to reboot: its driver watches control/shutdown. The guest may not listen.</summary>
    public void RequestShutdown(bool reboot) => RequestControl("shutdown", reboot ? "reboot" : "poweroff", reboot ? "asked to reboot" : "asked to shut down");

    /// <summary>Sends the guest's kernel a magic system request.</summary>
    /// <param name="key">One letter or digit.</param>
    public void SendSysrq(string key)
    {
        if (key is not { Length: 1 } || !char.IsAsciiLetterOrDigit(key[0]))
            throw new ToolstackException(ProblemKind.BadRequest, "A system request is one letter or digit, such as s or b.");
        RequestControl("sysrq", key, "sent a system request");
    }

    /// <summary>Triggers what hardware would.</summary>
    public void Trigger(DomainTrigger trigger, int vcpu)
    {
        if (trigger != DomainTrigger.Nmi)
        {
            throw new ToolstackException(
                ProblemKind.NotSupported, $"PV domains have no firmware or buttons for \"{trigger.ToString().ToLowerInvariant()}\"; only nmi can be triggered.");
        }

        lock (_gate)
        {
            CheckAlive("sent an NMI");
            if (!Running.Domain.SendNmi(vcpu))
                throw new ToolstackException(ProblemKind.BadRequest, $"The domain {Name} has no vCPU {vcpu}; its vCPUs are 0 to {Running.Specification.Vcpus - 1}.");
        }
    }

    /// <summary>Tells the guest how many vCPUs it is to have up; it comes there in its own time.</summary>
    public void SetVcpus(int online)
    {
        lock (_gate)
        {
            CheckAlive("given vCPUs");
            if (online < 1 || online > Running.Specification.Vcpus)
            {
                throw new ToolstackException(
                    ProblemKind.BadRequest,
                    $"The domain {Name} can have 1 to {Running.Specification.Vcpus} vCPUs, and not {online}: with maxvcpus= in its configuration it is made with more.");
            }

            Store.Transact(store =>
            {
                for (int vcpu = 0; vcpu < Running.Specification.Vcpus; vcpu++)
                {
                    store.Write(
                        string.Create(CultureInfo.InvariantCulture, $"{Folder}/cpu/{vcpu}/availability"), vcpu < online ? "online" : "offline");
                }
            });
            _onlineVcpus = online;
        }

        Reconfigure(configuration => configuration with { Vcpus = online });
    }

    /// <summary>Says which of the host's processors vCPUs may run on, until the domain ends.</summary>
    /// <param name="vcpu">Which vCPU; null for all.</param>
    /// <param name="processors">In xl's notation (<see cref="ProcessorSet"/>).</param>
    public void SetProcessors(int? vcpu, string processors)
    {
        IReadOnlyList<int> chosen = Resolve(processors, "Name others.");
        lock (_gate)
        {
            CheckAlive("given processors");
            int last = Running.Specification.Vcpus - 1;
            if (vcpu < 0 || vcpu > last)
                throw new ToolstackException(ProblemKind.BadRequest, $"The domain {Name} has no vCPU {vcpu}; its vCPUs are 0 to {last}.");
            for (int i = vcpu ?? 0; i <= (vcpu ?? last); i++)
                Place(i, chosen);
        }
    }

    /// <summary>Puts its vCPUs where its configuration says. Before it runs.</summary>
    internal void PlaceConfigured()
    {
        foreach ((int vcpu, string processors) in Configuration.Processors.Index().Take(Running.Specification.Vcpus))
            Place(vcpu, Resolve(processors, "Change cpus= in its configuration."));
    }

    /// <summary>Tells the guest's balloon how much memory it is to leave the domain, and sees to it that it gets no more.</summary>
    /// <param name="memoryKiB">In KiB.</param>
    public void SetMemoryTarget(long memoryKiB)
    {
        lock (_gate)
        {
            CheckAlive("given memory");
            long least = (long)DomainOptions.MinMemoryMiB << 10;
            if (memoryKiB < least || memoryKiB > _maximumKiB)
            {
                throw new ToolstackException(
                    ProblemKind.BadRequest, $"The domain {Name} can have {least} to {_maximumKiB} KiB of memory, and not {memoryKiB}.");
            }

            Running.Domain.MaxPages = PagesOf(memoryKiB);
            XenstoreDomainTree.SetMemoryTarget(Store, (ushort)Id, (ulong)memoryKiB);
            _targetKiB = memoryKiB;
        }

        Reconfigure(configuration => configuration with { MemoryMiB = (int)(memoryKiB >> 10), MaxMemoryMiB = configuration.GreatestMemoryMiB });
    }

    /// <summary>Sets what the domain may have at most.</summary>
    /// <param name="memoryKiB">In KiB; not less than its target, nor more than it was made for.</param>
    public void SetMemoryMaximum(long memoryKiB)
    {
        lock (_gate)
        {
            CheckAlive("given memory");
            long most = (long)Running.Specification.MaxMemoryMiB << 10;
            if (memoryKiB < _targetKiB || memoryKiB > most)
            {
                throw new ToolstackException(
                    ProblemKind.BadRequest,
                    $"The domain {Name} can be limited to {_targetKiB} KiB, its target, to {most} KiB, which it was made for (maxmem), and not to {memoryKiB}.");
            }

            Running.Domain.MaxPages = PagesOf(memoryKiB);
            _maximumKiB = memoryKiB;
        }

        Reconfigure(configuration => configuration with { MaxMemoryMiB = Math.Max(configuration.MemoryMiB, (int)(memoryKiB >> 10)) });
    }

    /// <summary>Sets what the next incarnation is made from.</summary>
    public void SetConfiguration(DomainConfiguration configuration)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        if (configuration.Name != Name)
        {
            throw new ToolstackException(
                ProblemKind.BadConfiguration, $"The configuration is of a domain {configuration.Name}, and this one is {Name}: rename the domain, or change the configuration.");
        }

        if (configuration.Uuid is { } uuid && uuid != Uuid)
            throw new ToolstackException(ProblemKind.BadConfiguration, $"The configuration has another UUID than the domain {Name}, which cannot change: leave it out.");
        _ = DomainLoader.Check(configuration);
        Reconfigure(_ => configuration with { Uuid = Uuid });
    }

    /// <summary>How it ended; null while it runs, or is paused.</summary>
    internal DomainExit? Exit => Running.Stopped is { IsCompletedSuccessfully: true } stopped ? stopped.Result : null;

    internal DomainRecord Record => new()
    {
        Name = Name,
        Uuid = Uuid,
        Id = Id,
        StartTime = StartTime,
        Configuration = JsonSerializer.SerializeToElement(Configuration, DomainConfigurationJson.Default.DomainConfiguration),
    };

    /// <summary>Completes when it goes on after it has suspended.</summary>
    internal Task NextResumption => Volatile.Read(ref _resumed).Task;

    /// <summary>What is done when the guest has ended for a reason.</summary>
    internal ShutdownAction ActionFor(ShutdownReason reason)
    {
        DomainConfiguration configuration = Configuration;
        return reason switch
        {
            ShutdownReason.PowerOff => configuration.OnPoweroff,
            ShutdownReason.Reboot => configuration.OnReboot,
            ShutdownReason.Crash => configuration.OnCrash,
            ShutdownReason.Watchdog => configuration.OnWatchdog,
            ShutdownReason.SoftReset => configuration.OnSoftReset,

            // Nobody asked it to; whoever wants to can save it or destroy it.
            ShutdownReason.Suspend => ShutdownAction.Preserve,
            _ => ShutdownAction.Preserve,
        };
    }

    /// <summary>Runs the guest, or has it wait with its first instruction.</summary>
    internal void Start(bool paused)
    {
        lock (_gate)
        {
            if (_dying)
                throw IsGone();
            if (paused)
            {
                _pauses = 1;
                Running.Domain.Pause();
            }

            Running.Start();
            _started = true;
        }
    }

    /// <summary>The domain begins to go: its vCPUs stop, long work on it ends.</summary>
    /// <returns>False where that was so before.</returns>
    internal bool BeginEnd()
    {
        lock (_gate)
        {
            if (_dying)
                return false;
            _dying = true;
        }

        Running.Destroy();
        _ending.Cancel();
        return true;
    }

    /// <summary>Frees all that it held. After <see cref="BeginEnd"/>.</summary>
    internal async Task EndAsync()
    {
        await _turn.WaitAsync().ConfigureAwait(false);
        try
        {
            await RemoveDevicesAsync().ConfigureAwait(false);

            // What it printed last goes to the console, which takes everything; one that never ran has printed nothing.
            if (_started)
                _ = await Task.WhenAny(Running.Completion).ConfigureAwait(false);
            lock (_gate)
                _gone = true;
            await Running.DisposeAsync().ConfigureAwait(false);
        }
        finally
        {
            _ = _turn.Release();
        }
    }

    /// <summary>Renames it in the store. Under the toolstack's lock.</summary>
    internal void WriteName(string name)
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            Store.Transact(store =>
            {
                store.Write(Folder + "/name", name);
                if (store.Read(Folder + "/vm") is { } vm && vm.StartsWith("/vm/", StringComparison.Ordinal))
                    store.Write(vm + "/name", name);
            });
        }
    }

    /// <summary>Changes the configuration, and its record.</summary>
    internal void Reconfigure(Func<DomainConfiguration, DomainConfiguration> change)
    {
        _toolstack.Record(this, () => Volatile.Write(ref _configuration, change(_configuration)));
        _toolstack.Tell(DomainEventKind.Changed, this);
    }

    private static IReadOnlyList<int> Resolve(string processors, string advice)
    {
        try
        {
            return ProcessorSet.Parse(processors).Resolve(HostMachine.OnlineProcessors, HostMachine.ProcessorsOfNode);
        }
        catch (FormatException failure)
        {
            throw new ToolstackException(ProblemKind.BadRequest, $"{failure.Message} {advice}", failure);
        }
    }

    private void Place(int vcpu, IReadOnlyList<int> processors)
    {
        if (!Running.Domain.SetProcessors(vcpu, processors))
        {
            throw new ToolstackException(
                ProblemKind.HostCannot, $"The host does not let vCPU {vcpu} of {Name} run on {ProcessorSet.Format(processors)}: a cpuset of its cgroup may keep the daemon from there.");
        }

        _processors[vcpu] = processors;
    }

    private static bool IsRunning(VcpuActivity vcpu) => vcpu.IsUp && vcpu.Waiting == WaitState.None;

    private static ulong PagesOf(long memoryKiB) => ((ulong)memoryKiB >> 2) + DomainOptions.MaxPages(0);

    private void RequestControl(string node, string value, string what)
    {
        lock (_gate)
        {
            CheckAlive(what);
            Store.Write($"{Folder}/control/{node}", value);
        }
    }

    private void CheckAlive(string what)
    {
        if (_gone || _dying)
            throw IsGone();
        if (Exit is { } exit)
            throw Wrong($"The domain {Name} cannot be {what}: it has shut down ({exit.Reason.ToString().ToLowerInvariant()}).");
    }

    private static ToolstackException Wrong(string message) => new(ProblemKind.WrongState, message);

    private ToolstackException IsGone() => new(ProblemKind.NoSuchDomain, $"There is no domain {Name} (number {Id}) any more.");
}
