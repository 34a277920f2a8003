// Real Xen as a test bed: each guest is the dom0 kernel of a boot of its own, under QEMU's software CPU.
using System.Runtime.CompilerServices;
using System.Text;
using XenSharp.Guests.Fetching;
using XenSharp.Oracle.Dom0;
using XenSharp.Oracle.Qemu;

namespace XenSharp.Oracle.Beds;

/// <summary>
/// Xen 4.17 with the guest as its dom0: privileged, without a console ring, and writing through HYPERVISOR_console_io. The console
/// is what is on Xen's serial line but for Xen's own lines, with newlines alone as line ends; the report is those of Xen's lines
/// that came after the guest's start. Two boots run at a time where there are two processors.
/// </summary>
/// <param name="cache">Where QEMU and Xen are kept; what is missing there is fetched.</param>
/// <param name="progress">Told of fetches.</param>
/// <param name="host">Looks for QEMU on the host; null for PATH.</param>
public sealed class XenDom0Bed(GuestCache cache, IProgress<FetchProgress>? progress = null, CommandRunner? host = null) : IGuestBed
{
    // Xen itself, its console ring and frame table.
    const int HypervisorMiB = 128;

    static readonly TimeSpan BootTimeout = TimeSpan.FromMinutes(2);

    /// <inheritdoc/>
    public string Name => $"Xen {XenPackages.Version(cache)} (dom0)";

    /// <summary>Fetches what is missing, so that <see cref="Name"/> has the whole version and the next run starts at once.</summary>
    /// <exception cref="OracleException">Something cannot be had; the message says what to do.</exception>
    public Task PrepareAsync(CancellationToken cancellation = default) => GetPartsAsync(cancellation);

    /// <inheritdoc/>
    public async IAsyncEnumerable<GuestRun> RunAsync(
        IReadOnlyList<BedGuest> guests, [EnumeratorCancellation] CancellationToken cancellation = default)
    {
        BedGuests.Check(guests);
        BedGuests.CheckAlone(guests, Name);
        if (guests.Count == 0)
            yield break;
        (QemuProgram qemu, string xen) = await GetPartsAsync(cancellation).ConfigureAwait(false);

        using TemporaryFolder folder = new();
        using CancellationTokenSource abandoned = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        int atOnce = Math.Clamp(Environment.ProcessorCount, 1, 2);
        Queue<Task<GuestRun>> running = new();
        try
        {
            for (int next = 0; next < guests.Count || running.Count != 0;)
            {
                if (next < guests.Count && running.Count < atOnce)
                    running.Enqueue(BootAsync(qemu, xen, guests[next], Path.Combine(folder.Path, $"{next++}"), abandoned.Token));
                else
                    yield return await running.Dequeue().ConfigureAwait(false);
            }
        }
        finally
        {
            // The caller may have stopped asking; the machines must be gone before their files are.
            await abandoned.CancelAsync().ConfigureAwait(false);
            await Task.WhenAll(running).ContinueWith(
                _ => { }, CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default).ConfigureAwait(false);
        }
    }

    async Task<(QemuProgram Qemu, string Xen)> GetPartsAsync(CancellationToken cancellation)
    {
        try
        {
            return (
                await QemuProgram.GetAsync(cache, host, progress, cancellation).ConfigureAwait(false),
                await XenPackages.GetXenAsync(cache, progress, cancellation).ConfigureAwait(false));
        }
        catch (GuestFetchException e)
        {
            throw new OracleException(e.Message, e);
        }
    }

    static async Task<GuestRun> BootAsync(QemuProgram qemu, string xen, BedGuest guest, string file, CancellationToken cancellation)
    {
        await File.WriteAllBytesAsync(file, guest.Kernel, cancellation).ConfigureAwait(false);
        string modules = Multiboot.Module(file, guest.CommandLine);
        if (!guest.Ramdisk.IsEmpty)
        {
            await File.WriteAllBytesAsync(file + ".ramdisk", guest.Ramdisk, cancellation).ConfigureAwait(false);
            modules += "," + Multiboot.Module(file + ".ramdisk");
        }
        using CancellationTokenSource switchOff = new();
        Dom0Log log = new(() => switchOff.CancelAfter(guest.Timeout), switchOff.Cancel);
        QemuResult end = await QemuMachine.RunAsync(
            qemu,
            new QemuOptions(xen)
            {
                CommandLine = $"console=com1 loglvl=info guest_loglvl=all dom0_mem={guest.MemoryMiB}M,max:{guest.MemoryMiB}M "
                    + $"dom0_max_vcpus={guest.Vcpus}",
                InitialRamdisk = modules,
                MemoryMiB = HypervisorMiB + guest.MemoryMiB,
                Timeout = BootTimeout + guest.Timeout,
                OnLine = log.Add,
                SwitchOff = switchOff.Token,
            },
            cancellation).ConfigureAwait(false);
        if (log.Ending is not { } ending)
        {
            // Only a guest that was started can have run too long, and only on a Xen that still ran.
            if (!log.HasStarted || log.HasPanicked || !switchOff.IsCancellationRequested)
                throw new OracleException(Multiboot.BrokeDown($"Real Xen with guest {guest.Name} as its dom0", end));
            ending = GuestEnding.TimedOut;
        }
        return new GuestRun(guest.Name, log.Console, ending, log.Report);
    }

    /// <summary>Takes Xen's serial line apart.</summary>
    /// <param name="onStart">Called once, when the guest is about to run.</param>
    /// <param name="onEnd">Called once, when Xen has said how the guest ended, or all that it has to say of its own panic.</param>
    internal sealed class Dom0Log(Action onStart, Action onEnd)
    {
        const string Prefix = "(XEN) ";

        // What Xen prints last before it enters dom0 (init_done in its setup).
        const string Started = "Freed ";

        // The first line and the last of Xen's panic (drivers/char/console.c).
        const string Panic = "Panic on CPU ";
        const string PanicIsOver = "Reboot in five seconds";

        readonly StringBuilder console = new();
        readonly StringBuilder report = new();

        /// <summary>Whether Xen was about to run the guest.</summary>
        public bool HasStarted { get; private set; }

        /// <summary>Whether Xen itself came to grief.</summary>
        public bool HasPanicked { get; private set; }

        /// <summary>How Xen said that the guest ended, or null.</summary>
        public GuestEnding? Ending { get; private set; }

        public string Console => console.ToString();

        public string Report => report.ToString();

        /// <summary>The next line, without its end.</summary>
        public void Add(string line)
        {
            // Xen's lines can begin where the guest has not ended its own.
            int own = line.IndexOf(Prefix, StringComparison.Ordinal);
            if (own >= 0 && line[own..].Contains(Panic, StringComparison.Ordinal))
                HasPanicked = true;
            if (HasPanicked && line.Contains(PanicIsOver, StringComparison.Ordinal))
                onEnd();
            if (!HasStarted)
            {
                if (own >= 0 && line[own..].Contains(Started, StringComparison.Ordinal) && line.EndsWith("init memory", StringComparison.Ordinal))
                {
                    HasStarted = true;
                    onStart();
                }
                return;
            }
            if (Ending is not null)
                return;
            if (own < 0)
            {
                console.Append(line).Append('\n');
                return;
            }
            console.Append(line.AsSpan(0, own));
            string said = line[(own + Prefix.Length)..];
            report.Append(said).Append('\n');
            if (ReadEnding(said) is { } ending)
            {
                Ending = ending;
                onEnd();
            }
        }

        // hwdom_shutdown in Xen's common/shutdown.c.
        static GuestEnding? ReadEnding(string said) =>
            !said.StartsWith("Hardware ", StringComparison.Ordinal) ? null
            : said.Contains(" halted: ", StringComparison.Ordinal) ? GuestEnding.PowerOff
            : said.Contains(" crashed: ", StringComparison.Ordinal) ? GuestEnding.Crash
            : said.Contains(" shutdown: rebooting ", StringComparison.Ordinal) ? GuestEnding.Reboot
            : said.Contains(" shutdown: watchdog ", StringComparison.Ordinal) ? GuestEnding.Watchdog
            : said.Contains(" unsupported soft reset", StringComparison.Ordinal) ? GuestEnding.SoftReset
            : said.Contains("(unknown reason 2)", StringComparison.Ordinal) ? GuestEnding.Suspend
            : said.Contains("(unknown reason ", StringComparison.Ordinal) ? GuestEnding.Crash
            : null;
    }
}
