// From "create" to a guest's first instruction: by a daemon that runs, and by the command that asks it.
using System.Diagnostics;
using System.Globalization;
using System.Text;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Management;
using XenSharp.Guests;

namespace XenSharp.Cli.Bench;

/// <summary>How a domain is asked for.</summary>
internal enum CreateWay
{
    /// <summary>By a request to the daemon, from a process that has talked to it before.</summary>
    Request,

    /// <summary>By a <c>create</c> command, from before its process is started.</summary>
    Command,
}

/// <summary>
/// A daemon of this very program, with a state of its own in a folder for the occasion. When a guest's first instruction is executed, it
/// says itself (<see cref="DomainInfo.FirstEntryTime"/>).
/// </summary>
internal sealed class CreateBenchmark : IAsyncDisposable
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);
    private static readonly TimeSpan LookInterval = TimeSpan.FromMilliseconds(5);

    private readonly DirectoryInfo _folder = Directory.CreateTempSubdirectory("xensharp-create-");
    private Process? _process;
    private DaemonClient? _daemon;

    private string Socket => Path.Combine(_folder.FullName, "socket");

    /// <summary>Starts the daemon.</summary>
    internal async Task StartAsync(CancellationToken cancellation)
    {
        _process = Start("daemon", "--socket", Socket, "--state", Path.Combine(_folder.FullName, "state"), "--xenstore-socket", "none", "--exit-timeout", "0");
        _daemon = new DaemonClient(Socket);
        await UntilAsync(
            async () =>
            {
                try
                {
                    return (await _daemon.GetHostAsync(cancellation).ConfigureAwait(false)).Domains == 0;
                }
                catch (DaemonException) when (!_process.HasExited)
                {
                    return false;
                }
            },
            cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes a configuration.</summary>
    /// <param name="kernel">The kernel's file; null for the tiny guest.</param>
    /// <param name="ramdisk">The ramdisk; empty for none.</param>
    /// <param name="memoryMiB">The domain's memory.</param>
    /// <returns>The configuration's file.</returns>
    internal string Prepare(string? kernel, byte[] ramdisk, int memoryMiB)
    {
        string name = kernel is null ? "tiny" : "debian";
        if (kernel is null)
            File.WriteAllBytes(kernel = Path.Combine(_folder.FullName, name), TinyGuest.Build());
        var text = new StringBuilder().AppendLine(
            CultureInfo.InvariantCulture, $"name=\"{name}\"\nkernel=\"{kernel}\"\nmemory={memoryMiB}\nextra=\"console=hvc0 quiet\"\non_poweroff=\"preserve\"");
        if (ramdisk.Length > 0)
        {
            File.WriteAllBytes(Path.Combine(_folder.FullName, name + ".cpio"), ramdisk);
            text.AppendLine(CultureInfo.InvariantCulture, $"ramdisk=\"{Path.Combine(_folder.FullName, name + ".cpio")}\"");
        }

        string file = Path.Combine(_folder.FullName, name + ".cfg");
        File.WriteAllText(file, text.ToString());
        return file;
    }

    /// <summary>Makes a domain of a configuration, and destroys it.</summary>
    /// <returns>Nanoseconds from being asked for to its first instruction.</returns>
    internal async Task<double> MeasureAsync(string configuration, CreateWay way, CancellationToken cancellation)
    {
        DateTimeOffset asked = DateTimeOffset.UtcNow;
        if (way == CreateWay.Request)
        {
            _ = await _daemon!.CreateAsync(
                new CreateDomainRequest { Configuration = new DomainConfigurationDocument { Text = await File.ReadAllTextAsync(configuration, cancellation).ConfigureAwait(false) } },
                cancellation).ConfigureAwait(false);
        }
        else
        {
            using Process create = Start("create", "--daemon", Socket, configuration);
            await create.WaitForExitAsync(cancellation).ConfigureAwait(false);
            if (create.ExitCode != 0)
                throw new InvalidOperationException($"The benchmark's create command ended with {create.ExitCode}.");
        }

        DomainInfo? domain = null;
        await UntilAsync(
            async () => (domain = (await _daemon!.ListAsync(cancellation).ConfigureAwait(false)).Single()).FirstEntryTime is not null, cancellation).ConfigureAwait(false);
        await _daemon!.DestroyAsync(domain!.Id.ToString(CultureInfo.InvariantCulture), cancellation).ConfigureAwait(false);
        return (domain.FirstEntryTime!.Value - asked).TotalNanoseconds;
    }

    /// <summary>Waits until the daemon has kept the kernel that it unpacked.</summary>
    internal Task AwaitUnpackedAsync(CancellationToken cancellation)
    {
        string kernels = Path.Combine(_folder.FullName, "state", "kernels");
        return UntilAsync(() => Task.FromResult(Directory.Exists(kernels) && Directory.GetFiles(kernels, "*.elf").Length > 0), cancellation);
    }

    public async ValueTask DisposeAsync()
    {
        _daemon?.Dispose();
        if (_process is not null)
        {
            // By the signal that asks it to: what it made is to be gone when the folder goes.
            _ = Tmds.Linux.LibC.kill(_process.Id, Tmds.Linux.LibC.SIGTERM);
            using var patience = new CancellationTokenSource(Patience);
            try
            {
                await _process.WaitForExitAsync(patience.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException)
            {
                _process.Kill();
            }

            _process.Dispose();
        }

        _folder.Delete(recursive: true);
    }

    private static Process Start(params string[] arguments)
    {
        string[] self = DaemonStart.Self();
        var start = new ProcessStartInfo(self[0], [.. self[1..], .. arguments]) { RedirectStandardError = true, RedirectStandardOutput = true };
        Process process = Process.Start(start)!;
        process.OutputDataReceived += static (_, _) => { };
        process.ErrorDataReceived += static (_, _) => { };
        process.BeginOutputReadLine();
        process.BeginErrorReadLine();
        return process;
    }

    private static async Task UntilAsync(Func<Task<bool>> condition, CancellationToken cancellation)
    {
        long began = Stopwatch.GetTimestamp();
        while (!await condition().ConfigureAwait(false))
        {
            if (Stopwatch.GetElapsedTime(began) > Patience)
                throw new UsageException("The benchmark's daemon does not get on with making domains; \"xensharp info\" says what this host can do.");
            await Task.Delay(LookInterval, cancellation).ConfigureAwait(false);
        }
    }
}
