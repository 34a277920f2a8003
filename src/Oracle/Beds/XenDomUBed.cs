// Real Xen as a test bed: guests run as unprivileged domains, made with xl by a Debian dom0, under QEMU's software CPU.
using System.Runtime.CompilerServices;
using System.Text;
using System.Threading.Channels;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle.Dom0;
using XenSharp.Oracle.Qemu;

namespace XenSharp.Oracle.Beds;

/// <summary>
/// Xen 4.17 with a dom0 of Debian's kernel and tools. All guests of a run share one boot; each is a domain of its own. The console
/// is what the guest put into its ring, byte for byte (a character is a byte); the report is what Xen logged meanwhile.
/// </summary>
/// <remarks>A domain that shuts down with a reason that sched.h does not know counts as crashed; xl destroys it at once, so the last
/// that it printed can be missing.</remarks>
/// <param name="cache">Where QEMU, Xen and dom0 are kept; what is missing there is fetched.</param>
/// <param name="progress">Told of fetches.</param>
/// <param name="host">Looks for QEMU on the host; null for PATH.</param>
public sealed class XenDomUBed(GuestCache cache, IProgress<FetchProgress>? progress = null, CommandRunner? host = null) : IGuestBed
{
    // Xen itself, and what it keeps for its console and dom0.
    const int HypervisorMiB = 128;
    const int Dom0MiB = 384;

    // Page tables, grant tables and the like of one domain.
    const int DomainOverheadMiB = 16;

    const int Mebibyte = 1 << 20;

    static readonly TimeSpan BootTimeout = TimeSpan.FromMinutes(2);

    // Making, destroying and reporting one domain; seconds at most, but the host may be busy.
    static readonly TimeSpan DomainTimeout = TimeSpan.FromSeconds(30);

    /// <summary>Emulated processors. More than one makes it slower: those that wait for each other burn what the host has.</summary>
    public int Processors { get; init; } = 1;

    /// <inheritdoc/>
    public string Name => $"Xen {XenPackages.Version(cache)} (domU)";

    /// <summary>Fetches what is missing, so that <see cref="Name"/> has the whole version and the next run starts at once.</summary>
    /// <exception cref="OracleException">Something cannot be had; the message says what to do.</exception>
    public Task PrepareAsync(CancellationToken cancellation = default) => GetPartsAsync(cancellation);

    /// <inheritdoc/>
    public async IAsyncEnumerable<GuestRun> RunAsync(
        IReadOnlyList<BedGuest> guests, [EnumeratorCancellation] CancellationToken cancellation = default)
    {
        BedGuests.Check(guests);
        if (guests.Count == 0)
            yield break;
        (QemuProgram qemu, string xen, Dom0Image dom0) = await GetPartsAsync(cancellation).ConfigureAwait(false);

        using TemporaryFolder folder = new();
        string initramfs = Path.Combine(folder.Path, "initramfs");
        long guestBytes = await BuildInitramfsAsync(dom0.Initramfs, initramfs, guests, cancellation).ConfigureAwait(false);
        using CancellationTokenSource switchOff = new();
        Channel<GuestRun> results = Channel.CreateUnbounded<GuestRun>();
        ResultReader? reader = null;
        async Task ReadAsync(Stream stream)
        {
            OracleException? error = null;
            reader = new ResultReader(stream, guests);
            try
            {
                while (await reader.ReadAsync().ConfigureAwait(false) is { } result)
                    results.Writer.TryWrite(result);
            }
            catch (OracleException e)
            {
                error = e;
            }
            catch (IOException e)
            {
                error = new OracleException($"The results cannot be read from QEMU: {e.Message} Try again.", e);
            }
            results.Writer.Complete(error);
            // Nothing more comes that anybody would wait for. Otherwise the channel has ended because the machine has.
            if (reader.IsDone || error is not null)
                await switchOff.CancelAsync().ConfigureAwait(false);
        }

        // dom0 holds each guest's files twice while it unpacks its initramfs; a domain can still be on its way out when the next is made.
        int dom0MiB = Dom0MiB + (int)(2 * guestBytes / Mebibyte);
        int domainMiB = (guests.Max(guest => guest.MemoryMiB) + DomainOverheadMiB) * (guests.Any(static guest => guest.WithNext) ? 2 : 1);
        QemuOptions options = new(xen)
        {
            CommandLine = $"console=com1 loglvl=info guest_loglvl=all conring_size=1M bootscrub=0 dom0_mem={dom0MiB}M,max:{dom0MiB}M",
            InitialRamdisk = $"{Multiboot.Module(dom0.Kernel, "console=hvc0 quiet panic=1 cryptomgr.notests")},{Multiboot.Module(initramfs)}",
            MemoryMiB = HypervisorMiB + dom0MiB + 2 * domainMiB,
            Processors = Processors,
            Timeout = BootTimeout + guests.Aggregate(TimeSpan.Zero, (sum, guest) => sum + guest.Timeout + DomainTimeout),
            ReadChannel = ReadAsync,
            SwitchOff = switchOff.Token,
        };
        using CancellationTokenSource abandoned = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task<QemuResult> machine = QemuMachine.RunAsync(qemu, options, abandoned.Token);
        try
        {
            await foreach (GuestRun run in ReadAllAsync(results.Reader, machine, abandoned.Token).ConfigureAwait(false))
                yield return run;
            QemuResult end = await machine.ConfigureAwait(false);
            if (reader is not { IsDone: true })
                throw new OracleException(Multiboot.BrokeDown("Real Xen with its dom0", end));
        }
        finally
        {
            // The caller may have stopped asking; the machine must be gone before its files are.
            await abandoned.CancelAsync().ConfigureAwait(false);
            await machine.ContinueWith(_ => { }, CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default)
                .ConfigureAwait(false);
        }
    }

    // Ends with the machine too, which may never have come so far as to open the channel.
    static async IAsyncEnumerable<GuestRun> ReadAllAsync(
        ChannelReader<GuestRun> results, Task<QemuResult> machine, [EnumeratorCancellation] CancellationToken cancellation)
    {
        while (true)
        {
            Task<bool> more = results.WaitToReadAsync(cancellation).AsTask();
            if (await Task.WhenAny(more, machine).ConfigureAwait(false) == machine)
            {
                // Its failure to start is the caller's business; the reader has ended before the machine's task does.
                await machine.ConfigureAwait(false);
            }
            if (!await more.ConfigureAwait(false))
                yield break;
            while (results.TryRead(out GuestRun? run))
                yield return run;
        }
    }

    async Task<(QemuProgram Qemu, string Xen, Dom0Image Dom0)> GetPartsAsync(CancellationToken cancellation)
    {
        try
        {
            return (
                await QemuProgram.GetAsync(cache, host, progress, cancellation).ConfigureAwait(false),
                await XenPackages.GetXenAsync(cache, progress, cancellation).ConfigureAwait(false),
                await XenPackages.GetDom0Async(cache, progress, cancellation).ConfigureAwait(false));
        }
        catch (GuestFetchException e)
        {
            throw new OracleException(e.Message, e);
        }
    }

    // The initramfs of dom0 and, as a second archive in the same file, the guests.
    static async Task<long> BuildInitramfsAsync(
        string dom0, string path, IReadOnlyList<BedGuest> guests, CancellationToken cancellation)
    {
        await using FileStream file = File.Create(path);
        await using (FileStream start = File.OpenRead(dom0))
            await start.CopyToAsync(file, cancellation).ConfigureAwait(false);
        long before = file.Length;
        using (CpioWriter cpio = new(file))
        {
            cpio.AddDirectory("guests");
            StringBuilder list = new();
            for (int i = 0; i < guests.Count; i++)
            {
                BedGuest guest = guests[i];
                cpio.AddFile($"guests/{i}.kernel", guest.Kernel.Span);
                if (!guest.Ramdisk.IsEmpty)
                    cpio.AddFile($"guests/{i}.ramdisk", guest.Ramdisk.Span);
                cpio.AddFile($"guests/{i}.cfg", Encoding.UTF8.GetBytes(Configuration(guest, i)));
                list.Append(null, $"{i} {guest.Name} {Math.Ceiling(guest.Timeout.TotalMilliseconds / 10):0} {(guest.WithNext ? "pair" : "alone")}\n");
            }
            cpio.AddFile("guests/list", Encoding.ASCII.GetBytes(list.ToString()));
        }
        return file.Length - before;
    }

    // xl.cfg(5). The domain is left as it is at its end, so that xenconsoled can take the last that it printed.
    static string Configuration(BedGuest guest, int index)
    {
        string ramdisk = guest.Ramdisk.IsEmpty ? "" : $"ramdisk=\"/guests/{index}.ramdisk\"\n";
        string commandLine = guest.CommandLine.Replace("\\", "\\\\", StringComparison.Ordinal).Replace("\"", "\\\"", StringComparison.Ordinal);
        return $"""
            type="pv"
            name="{guest.Name}"
            kernel="/guests/{index}.kernel"
            {ramdisk}cmdline="{commandLine}"
            memory={guest.MemoryMiB}
            maxmem={guest.MemoryMiB}
            vcpus={guest.Vcpus}
            on_poweroff="preserve"
            on_reboot="preserve"
            on_crash="preserve"
            on_watchdog="preserve"
            on_soft_reset="preserve"

            """.ReplaceLineEndings("\n");
    }
}
