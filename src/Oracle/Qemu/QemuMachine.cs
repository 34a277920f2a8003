// One emulated machine: QEMU's software CPU with a kernel, an initial ramdisk and a serial console.
using System.Diagnostics;
using System.Text;
using XenSharp.Guests.Fetching;

namespace XenSharp.Oracle.Qemu;

/// <summary>What to start QEMU with.</summary>
/// <param name="Kernel">Path of what -kernel loads: a bzImage, or a multiboot image such as Xen's.</param>
public sealed record QemuOptions(string Kernel)
{
    /// <summary>
    /// SMAP and SMEP are off because QEMU 7.2 with them reads the stack of an <c>iretq</c> at CPL 3 as the supervisor; five-level
    /// paging is off because Xen 4.17 knows none.
    /// </summary>
    public const string DefaultCpu = "max,-smap,-smep,-la57";

    /// <summary>The value of -append.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>The value of -initrd: a path, or for multiboot images "FILE ARGUMENTS,FILE…"; null for none.</summary>
    public string? InitialRamdisk { get; init; }

    /// <summary>The value of -cpu.</summary>
    public string Cpu { get; init; } = DefaultCpu;

    /// <summary>The value of -serial for a second serial port, such as unix:FILE for a socket that somebody listens on; null for none.</summary>
    public string? SecondSerialPort { get; init; }

    /// <summary>Memory in MiB.</summary>
    public int MemoryMiB { get; init; } = 1024;

    /// <summary>Processors.</summary>
    public int Processors { get; init; } = 1;

    /// <summary>How long the machine may run before it is switched off.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromMinutes(2);

    /// <summary>Called with each line of the serial console, without its end, as it comes, on a thread of the pool.</summary>
    public Action<string>? OnLine { get; init; }
}

/// <summary>How a machine's run ended.</summary>
/// <param name="SerialOutput">All that the serial console said, with newlines alone as line ends; a lone carriage return ends a line too.</param>
/// <param name="TimedOut">Whether it was switched off because its time was up.</param>
/// <param name="ExitCode">QEMU's exit status; 0 when the guest switched the machine off or reset it.</param>
/// <param name="Error">What QEMU itself complained of.</param>
public sealed record QemuResult(string SerialOutput, bool TimedOut, int ExitCode, string Error);

/// <summary>Runs QEMU to the end of the machine, never beyond its time, and leaves no process behind.</summary>
public static class QemuMachine
{
    private const string Program = "qemu-system-x86_64";

    /// <summary>QEMU's path, or null when it is not on this host.</summary>
    public static string? Find() => new CommandRunner().Find(Program);

    /// <summary>Boots a machine and waits until it is off.</summary>
    /// <exception cref="OracleException">QEMU is not here or does not start.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; QEMU is gone.</exception>
    public static async Task<QemuResult> RunAsync(QemuOptions options, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(options);
        string program = Find() ?? throw new OracleException(
            $"{Program} is not on this host; install it (on Debian: apt-get install qemu-system-x86 seabios).");
        ProcessStartInfo start = new(program, Arguments(options))
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        // Xen and kernels print bytes that are no UTF-8; Latin-1 takes every byte.
        start.StandardOutputEncoding = start.StandardErrorEncoding = Encoding.Latin1;
        using Process process = new() { StartInfo = start };
        try
        {
            process.Start();
        }
        catch (System.ComponentModel.Win32Exception e)
        {
            throw new OracleException($"{program} cannot be run: {e.Message}; install it anew.", e);
        }
        process.StandardInput.Close();
        Task<string> output = ReadAsync(process.StandardOutput, options.OnLine);
        Task<string> error = process.StandardError.ReadToEndAsync(CancellationToken.None);
        using CancellationTokenSource timeout = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        timeout.CancelAfter(options.Timeout);
        bool switchedOff = false;
        try
        {
            await process.WaitForExitAsync(timeout.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            switchedOff = true;
            process.Kill();
            await process.WaitForExitAsync(CancellationToken.None).ConfigureAwait(false);
        }
        cancellation.ThrowIfCancellationRequested();
        return new QemuResult(
            await output.ConfigureAwait(false), switchedOff, process.ExitCode, (await error.ConfigureAwait(false)).Trim());
    }

    private static List<string> Arguments(QemuOptions options)
    {
        List<string> arguments =
        [
            "-accel", "tcg", "-cpu", options.Cpu, "-m", $"{options.MemoryMiB}", "-smp", $"{options.Processors}",
            "-nodefaults", "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
            "-kernel", options.Kernel, "-append", options.CommandLine,
        ];
        if (options.SecondSerialPort is { } port)
            arguments.AddRange(["-serial", port]);
        if (options.InitialRamdisk is { } ramdisk)
            arguments.AddRange(["-initrd", ramdisk]);
        return arguments;
    }

    private static async Task<string> ReadAsync(StreamReader reader, Action<string>? onLine)
    {
        StringBuilder all = new();
        while (await reader.ReadLineAsync().ConfigureAwait(false) is { } line)
        {
            all.Append(line).Append('\n');
            onLine?.Invoke(line);
        }
        return all.ToString();
    }
}
