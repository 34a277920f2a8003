// XenSharp itself as a test bed: each guest in a domain of this process.
using System.Runtime.CompilerServices;
using System.Text;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Oracle.Beds;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Compare;

/// <summary>Runs guests on this host's KVM.</summary>
/// <param name="host">The KVM.</param>
public sealed class XenSharpBed(KvmHost host) : IGuestBed
{
    public string Name => "XenSharp";

    public bool TakesOneByOne => true;

    public async IAsyncEnumerable<GuestRun> RunAsync(
        IReadOnlyList<BedGuest> guests, [EnumeratorCancellation] CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(guests);
        for (int i = 0; i < guests.Count; i++)
        {
            if (guests[i].WithNext)
            {
                foreach (GuestRun run in await RunPairAsync(guests[i], guests[++i], cancellation).ConfigureAwait(false))
                    yield return run;
                continue;
            }

            var sink = new MemorySink();
            yield return await RunAsync(guests[i], Create(guests[i], sink), sink, cancellation).ConfigureAwait(false);
        }
    }

    private async Task<GuestRun[]> RunPairAsync(BedGuest first, BedGuest second, CancellationToken cancellation)
    {
        await using var toolstack = new ToolstackContext(host);
        (MemorySink sinkOfFirst, MemorySink sinkOfSecond) = (new MemorySink(), new MemorySink());
        RunningDomain domain = Create(first, sinkOfFirst, toolstack);
        RunningDomain next;
        try
        {
            next = Create(second, sinkOfSecond, toolstack);
        }
        catch
        {
            await domain.DisposeAsync().ConfigureAwait(false);
            throw;
        }

        second = second with { Timeout = first.Timeout };
        return await Task.WhenAll(RunAsync(first, domain, sinkOfFirst, cancellation), RunAsync(second, next, sinkOfSecond, cancellation))
            .ConfigureAwait(false);
    }

    private RunningDomain Create(BedGuest guest, MemorySink sink, ToolstackContext? toolstack = null)
    {
        var specification = new DomainSpecification
        {
            Name = guest.Name,
            Image = new DomainImage(KernelImage.Parse(guest.Kernel), guest.Ramdisk),
            MemoryMiB = guest.MemoryMiB,
            Vcpus = guest.Vcpus,
            CommandLine = guest.CommandLine,
        };
        return toolstack is null ? RunningDomain.Create(host, specification, sink) : RunningDomain.Create(toolstack, specification, sink);
    }

    /// <summary>Runs a domain and disposes of it.</summary>
    private static async Task<GuestRun> RunAsync(BedGuest guest, RunningDomain running, MemorySink sink, CancellationToken cancellation)
    {
        await using RunningDomain domain = running;
        domain.Start();
        try
        {
            DomainExit exit = await domain.Completion.WaitAsync(guest.Timeout, cancellation).ConfigureAwait(false);
            return new GuestRun(guest.Name, sink.Text, EndingOf(exit.Reason), exit.Report ?? string.Empty);
        }
        catch (TimeoutException)
        {
            domain.Destroy();
            _ = await domain.Completion.WaitAsync(cancellation).ConfigureAwait(false);
            return new GuestRun(guest.Name, sink.Text, GuestEnding.TimedOut, $"It was destroyed after {guest.Timeout.TotalSeconds:0} s.");
        }
    }

    private static GuestEnding EndingOf(ShutdownReason reason) => reason switch
    {
        ShutdownReason.PowerOff => GuestEnding.PowerOff,
        ShutdownReason.Reboot => GuestEnding.Reboot,
        ShutdownReason.Suspend => GuestEnding.Suspend,
        ShutdownReason.Watchdog => GuestEnding.Watchdog,
        ShutdownReason.SoftReset => GuestEnding.SoftReset,
        _ => GuestEnding.Crash,
    };

    /// <summary>Keeps all bytes; Latin-1, which takes every one.</summary>
    private sealed class MemorySink : IConsoleSink
    {
        private readonly Lock _lock = new();
        private readonly StringBuilder _text = new();

        public string Text
        {
            get
            {
                lock (_lock)
                    return _text.ToString();
            }
        }

        public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
        {
            lock (_lock)
                _ = _text.Append(Encoding.Latin1.GetString(bytes));
            return bytes.Length;
        }
    }
}
