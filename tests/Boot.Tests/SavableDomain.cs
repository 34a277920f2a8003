// A domain with console and xenstore around it, built or restored, whose parts a test has in its hands.

using XenSharp.Core;
using XenSharp.Devices.Console;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>
/// A domain that can be suspended as a toolstack does it, saved, and made again from its image. Disposing it takes all apart in the order of
/// who may still touch what.
/// </summary>
internal sealed class SavableDomain : IAsyncDisposable
{
    private readonly DomainManager _manager;
    private readonly Mfn _frames;
    private readonly KvmVirtualMachine _machine;
    private readonly Task _showing;
    private readonly CancellationTokenSource _end = new();
    private bool _disposed;

    private SavableDomain(KvmHost host, DomainManager manager, DomainOptions options, Func<KvmVirtualMachine, DomainOptions, Domain> make)
    {
        _manager = manager;
        ulong frames = DomainOptions.MachineFrames(Math.Max(options.MemoryMiB, options.MaxMemoryMiB));
        _frames = manager.TakeFrames(frames);
        try
        {
            _machine = new KvmVirtualMachine(
                host.Kvm, host.Capabilities, frames << Paging.PageShift, DomainOptions.WindowFrames, _frames.Address.Value);
            Domain = make(_machine, options);
        }
        catch
        {
            _machine?.Dispose();
            manager.ReturnFrames(_frames);
            throw;
        }

        Console = ConsoleOf(Domain);
        _showing = Console.RunAsync(Lines, _end.Token);
        XenstoreDomainTree.WriteDomain0(Store.Domain0);
        XenstoreDomainTree.Create(
            Store.Domain0,
            new XenstoreDomainDescription
            {
                DomainId = Domain.Id.Value,
                Name = options.Name,
                Uuid = options.Uuid,
                MaximumMemoryKiB = (ulong)options.MemoryMiB << 10,
                TargetMemoryKiB = (ulong)options.MemoryMiB << 10,
                MaximumVcpus = options.Vcpus,
                OnlineVcpus = options.Vcpus,
                ConsolePort = Domain.ConsolePort,
                ConsoleFrame = Domain.Layout.Console.Value,
                StorePort = Domain.StorePort,
                StoreFrame = Domain.Layout.Store.Value,
                Kernel = string.Empty,
                StartTime = DateTimeOffset.UtcNow,
            });
        _ = Store.IntroduceDomain(Domain.Id.Value, StoreRingOf(Domain));
    }

    internal Domain Domain { get; }

    internal ConsoleBackend Console { get; }

    internal ConsoleLines Lines { get; } = new();

    internal XenstoreServer Store { get; } = new();

    /// <summary>The first of its machine frames.</summary>
    internal Mfn FirstFrame => _frames;

    /// <summary>Bytes of the host's memory that its own takes.</summary>
    internal ulong ResidentMemory => _machine.ResidentRam;

    /// <summary>Builds a domain.</summary>
    internal static SavableDomain Build(KvmHost host, DomainManager manager, DomainOptions options)
        => new(host, manager, options, (machine, made) => new Domain(made, machine, manager));

    /// <summary>Makes one from an image.</summary>
    internal static SavableDomain Restore(KvmHost host, DomainManager manager, DomainOptions options, Stream image)
        => new(host, manager, options, (machine, made) => Domain.Restore(made, image, machine, manager));

    /// <summary>Options for a domain on a host.</summary>
    internal static DomainOptions Options(KvmHost host, string name) => new()
    {
        Name = name,
        HostTsc = static () => HostClock.TimeStampCounter,
        ShadowPageTables = host.Capabilities.ShadowPageTables,
    };

    /// <summary>Has the guest suspend itself, and waits until it has.</summary>
    internal async Task<DomainExit> SuspendAsync(CancellationToken cancellation)
    {
        Store.Domain0.Write($"{XenstorePath.OfDomain(Domain.Id.Value)}/control/shutdown", "suspend");
        DomainExit exit = await Domain.Completion.WaitAsync(cancellation);
        Store.AnnounceShutdown(Domain.Id.Value);
        return exit;
    }

    /// <summary>Waits for a line of the guest's; the test fails with where the guest is when it does not come.</summary>
    /// <param name="marker">What it begins with.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <returns>The rest of the line.</returns>
    internal async Task<string> WaitForAsync(string marker, CancellationToken cancellation)
    {
        try
        {
            return await Lines.WaitForAsync(marker, ShowEndAsync(Domain.Completion), cancellation);
        }
        catch (OperationCanceledException)
        {
            Assert.Fail($"The guest does not come to \"{marker}\": {string.Join(", ", Domain.Activity)}\n{Lines.Text}");
            throw;
        }
    }

    /// <summary>Shows how the domain ends where the guest's lines are, for a test that waits for another one.</summary>
    private async Task ShowEndAsync(Task<DomainExit> end)
    {
        DomainExit exit = await end;
        _ = Lines.Write(System.Text.Encoding.UTF8.GetBytes($"\r\n{exit}\r\n"), CancellationToken.None);
    }

    /// <summary>Lets the guest go on after <see cref="SuspendAsync"/>.</summary>
    internal void Resume()
    {
        Store.ResumeDomain(Domain.Id.Value);
        Domain.Resume();
    }

    /// <summary>Types a line.</summary>
    internal async Task TypeAsync(string line, CancellationToken cancellation)
        => Assert.That(await Console.WriteAsync(System.Text.Encoding.ASCII.GetBytes(line + "\n"), cancellation), Is.True, Lines.Text);

    public async ValueTask DisposeAsync()
    {
        if (_disposed)
            return;
        _disposed = true;
        Domain.Destroy();
        _ = await Domain.Completion;
        await Console.CompleteAsync();
        await _showing;
        _ = await Store.ReleaseDomainAsync(Domain.Id.Value);
        await Store.DisposeAsync();
        Domain.Dispose();
        _machine.Dispose();
        _manager.ReturnFrames(_frames);
        _end.Dispose();
    }

    private static unsafe ConsoleBackend ConsoleOf(Domain domain) => new(domain.ConsolePage, domain.ConsoleChannel);

    private static unsafe XenstoreRing StoreRingOf(Domain domain) => new(domain.StorePage, domain.StoreChannel);
}
