// A domain that has suspended itself: what is left of it can be saved, dumped, or go on in place.
using XenSharp.Core;
using XenSharp.Domains.Migration;

namespace XenSharp.Domains;

/// <content>
/// A guest suspends by SCHEDOP_shutdown with the reason "suspend", the machine frame of its start_info in RDX. <see cref="Completion"/>
/// says so as it does of other ends, but all stays in place until <see cref="Dispose"/>: the vCPUs' threads wait.
/// </content>
public sealed unsafe partial class Domain
{
    /// <summary>The vCPU that made the hypercall which suspended the domain.</summary>
    private Vcpu? _suspender;

    /// <summary>Runs of the domain that have ended by <see cref="Resume"/>.</summary>
    private int _run;

    /// <summary>The domain was destroyed: it is not resumed.</summary>
    private bool _ends;

    /// <summary>Raised by <see cref="Resume"/>, once <see cref="Completion"/> is that of the new run; on its thread.</summary>
    public event Action? Resumed;

    /// <summary>Whether the guest has suspended itself, and no vCPU runs any more.</summary>
    public bool IsSuspended
    {
        get
        {
            lock (_threads)
                return _exit is { Reason: ShutdownReason.Suspend } && _completion.Task.IsCompleted;
        }
    }

    /// <summary>
    /// Lets a suspended domain go on as if nothing had happened (libxl_domain_resume with suspend_cancel): the guest's hypercall returns 1,
    /// "cancelled", and it keeps its event channels, grants and rings. For guests whose kernels know of that (XEN_ELFNOTE_SUSPEND_CANCEL).
    /// </summary>
    /// <exception cref="InvalidOperationException">The domain is not suspended, or was destroyed.</exception>
    public void Resume()
    {
        lock (_threads)
        {
            if (!IsSuspended || _ends)
                throw new InvalidOperationException($"Domain {Name} cannot be resumed: it is not suspended, or it was destroyed.");
            const ulong cancelled = 1;
            if (_suspender != null)
                _suspender.Context->Registers->Rax = cancelled;
            _suspender = null;
            _exit = null;
            _shutdownCode = null;
            _crashRequest = null;
            _completion = new TaskCompletionSource<DomainExit>(TaskCreationOptions.RunContinuationsAsynchronously);
            Volatile.Write(ref _stopping, 0);
            Rest.BeginAnew();
            _running = _threads.Count;
            _run++;
            Monitor.PulseAll(_threads);
        }

        Resumed?.Invoke();
    }

    /// <summary>
    /// Writes a suspended domain to a stream, in the format of Xen's own images (docs/save-format.md). The domain stays suspended, also when
    /// this fails: it can be saved again, resumed or disposed. Nobody may do so meanwhile.
    /// </summary>
    /// <param name="stream">Where to; it need not be seekable, and is left open right behind the image.</param>
    /// <param name="progress">Is told how many pages have been looked at, of how many; on the calling thread.</param>
    /// <param name="cancellation">Ends the work.</param>
    /// <exception cref="InvalidOperationException">The domain is not suspended.</exception>
    /// <exception cref="MigrationException">The guest cannot be saved as it is, or the stream takes no more; a sentence says which.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public void Save(Stream stream, IProgress<PageProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(stream);
        if (!IsSuspended)
            throw new InvalidOperationException($"Domain {Name} cannot be saved: it is not suspended.");
        new DomainSaver(this, new MigrationWriter(stream), progress, cancellation).Save();
    }

    /// <summary>
    /// Makes a domain of an image that <see cref="Save"/> wrote, or Xen's toolstack, in a fresh VM; <see cref="Start"/> lets it go on. The VM
    /// stays the caller's to dispose, after this. An image may say anything: all that a guest could not do by itself is refused.
    /// </summary>
    /// <param name="options">
    /// What is not in the image: name, number, memory that it may have, vCPUs. Kernel, ramdisk and command line are not looked at.
    /// </param>
    /// <param name="image">The image; nothing behind it is read.</param>
    /// <param name="machine">The VM.</param>
    /// <param name="manager">The domains that it is to know, and be known to; null for none.</param>
    /// <param name="progress">Is told how many pages have been read, their number in all being unknown (0); on the calling thread.</param>
    /// <param name="cancellation">Ends the work.</param>
    /// <exception cref="MigrationException">It is no image, a damaged one, or none for this domain or host; a sentence says which.</exception>
    /// <exception cref="Builder.DomainBuildException">The domain cannot be made as asked.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public static Domain Restore(
        DomainOptions options, Stream image, IVirtualMachine machine, DomainManager? manager = null, IProgress<PageProgress>? progress = null,
        CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(image);
        return new Domain(options, machine, manager, new DomainImageReader(new MigrationReader(image), progress, cancellation));
    }

    /// <summary>
    /// Writes the domain's memory and registers as Xen's toolstack dumps them (docs/misc/dump-core-format.txt of Xen's sources): an ELF file
    /// that crash opens. A domain that runs is paused meanwhile; one that has crashed is dumped before it is disposed.
    /// </summary>
    /// <param name="stream">Where to; it need not be seekable.</param>
    /// <param name="progress">Is told how many pages have been written, of how many; on the calling thread.</param>
    /// <param name="cancellation">Ends the work.</param>
    /// <exception cref="MigrationException">The stream takes no more; a sentence says why.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public void DumpCore(Stream stream, IProgress<PageProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(stream);
        Pause();
        try
        {
            new CoreDump(this, progress, cancellation).Write(stream);
        }
        finally
        {
            _ = Unpause();
        }
    }

    /// <summary>The vCPUs, in the order of their numbers.</summary>
    internal IReadOnlyList<Vcpu> Vcpus => _vcpus;

    /// <summary>Keeps the thread of a vCPU that has ended its run, as long as the domain may be resumed.</summary>
    /// <param name="run">The run that it has ended; the next one, when this returns true.</param>
    /// <returns>False when there will be none.</returns>
    private bool AwaitResumption(ref int run)
    {
        lock (_threads)
        {
            while (_run == run && !_ends && _exit is { Reason: ShutdownReason.Suspend })
                _ = Monitor.Wait(_threads);
            if (_run == run)
                return false;
            run = _run;
            return true;
        }
    }

    private void EndResumability()
    {
        lock (_threads)
        {
            _ends = true;
            Monitor.PulseAll(_threads);
        }
    }
}
