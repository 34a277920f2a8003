// A domain that is suspended, saved and made again from its image, with what it prints as lines that a test waits for.

using System.Text;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>A running domain as a toolstack has it, and its console.</summary>
internal sealed class SavableDomain : IAsyncDisposable
{
    private readonly RunningDomain _running;

    private SavableDomain(Func<ConsoleLines, RunningDomain> make) => _running = make(Lines);

    internal Domain Domain => _running.Domain;

    internal ConsoleLines Lines { get; } = new();

    /// <summary>Bytes of the host's memory that its own takes.</summary>
    internal ulong ResidentMemory => _running.ResidentMemory;

    /// <summary>Builds a domain.</summary>
    internal static SavableDomain Build(ToolstackContext context, DomainSpecification specification)
        => new(lines => RunningDomain.Create(context, specification with { KeepSuspended = true }, lines));

    /// <summary>Makes one from an image.</summary>
    internal static SavableDomain Restore(ToolstackContext context, DomainSpecification specification, Stream image)
        => new(lines => RunningDomain.Restore(context, specification with { KeepSuspended = true, Image = DomainImage.None }, image, lines));

    internal void Start() => _running.Start();

    /// <summary>Has the guest suspend itself, and waits until it has.</summary>
    internal async Task<DomainExit> SuspendAsync(CancellationToken cancellation)
    {
        _running.Store.Domain0.Write($"{XenstorePath.OfDomain(Domain.Id.Value)}/control/shutdown", "suspend");
        return await Domain.Completion.WaitAsync(cancellation);
    }

    /// <summary>Lets the guest go on after <see cref="SuspendAsync"/>.</summary>
    internal void Resume() => _running.Resume();

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

    /// <summary>Types a line.</summary>
    internal async Task TypeAsync(string line, CancellationToken cancellation)
        => Assert.That(await _running.WriteInputAsync(Encoding.ASCII.GetBytes(line + "\n"), cancellation), Is.True, Lines.Text);

    public ValueTask DisposeAsync() => _running.DisposeAsync();

    /// <summary>Shows how the domain ends where the guest's lines are, for a test that waits for another one.</summary>
    private async Task ShowEndAsync(Task<DomainExit> end)
    {
        DomainExit exit = await end;
        _ = Lines.Write(Encoding.UTF8.GetBytes($"\r\n{exit}\r\n"), CancellationToken.None);
    }
}
