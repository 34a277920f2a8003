// One emulated machine: QEMU's software CPU with a kernel, an initial ramdisk and a serial console.
using System.Diagnostics;
using System.Text;

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

    /// <summary>Memory in MiB.</summary>
    public int MemoryMiB { get; init; } = 1024;

    /// <summary>Processors.</summary>
    public int Processors { get; init; } = 1;

    /// <summary>How long the machine may run before it is switched off.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromMinutes(2);

    /// <summary>Called with each line of the serial console, without its end, as it comes, on a thread of the pool.</summary>
    public Action<string>? OnLine { get; init; }

    /// <summary>
    /// Reads all that the guest writes to the virtio serial port named <see cref="QemuMachine.ChannelName"/>, a stream of bytes that
    /// nothing else gets into, until it ends with the machine; null for a machine without that port.
    /// </summary>
    public Func<Stream, Task>? ReadChannel { get; init; }

    /// <summary>
    /// Path of a file that gets all that the guest writes to the virtio serial port named <see cref="QemuMachine.FileName"/>, at once and
    /// byte for byte; null for a machine without that port. Only with <see cref="ReadChannel"/>.
    /// </summary>
    public string? WriteFile { get; init; }

    /// <summary>Switches the machine off when it is cancelled; the run then ends as if the guest had done it.</summary>
    public CancellationToken SwitchOff { get; init; }
}

/// <summary>How a machine's run ended.</summary>
/// <param name="SerialOutput">All that the serial console said, with newlines alone as line ends; a lone carriage return ends a line too.</param>
/// <param name="TimedOut">Whether it was switched off because its time was up.</param>
/// <param name="ExitCode">QEMU's exit status; 0 when the guest switched the machine off or reset it, or the caller did.</param>
/// <param name="Error">What QEMU itself complained of.</param>
public sealed record QemuResult(string SerialOutput, bool TimedOut, int ExitCode, string Error);

/// <summary>Runs QEMU to the end of the machine, never beyond its time, and leaves no process behind.</summary>
public static class QemuMachine
{
    /// <summary>The name that the guest finds the port of <see cref="QemuOptions.ReadChannel"/> by, in /sys/class/virtio-ports.</summary>
    public const string ChannelName = "xensharp";

    /// <summary>The name that the guest finds the port of <see cref="QemuOptions.WriteFile"/> by.</summary>
    public const string FileName = "xensharp-file";

    /// <summary>Boots a machine and waits until it is off.</summary>
    /// <exception cref="OracleException">QEMU does not start.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; QEMU is gone.</exception>
    public static async Task<QemuResult> RunAsync(QemuProgram program, QemuOptions options, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(program);
        ArgumentNullException.ThrowIfNull(options);
        cancellation.ThrowIfCancellationRequested();
        ProcessStartInfo start = new(program.Path, [.. program.Arguments, .. Arguments(options)])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            // Xen and kernels print bytes that are no UTF-8; Latin-1 takes every byte.
            StandardOutputEncoding = Encoding.Latin1,
            StandardErrorEncoding = Encoding.Latin1,
        };
        foreach ((string name, string value) in program.Environment)
            start.Environment[name] = value;
        using Process process = new() { StartInfo = start };
        try
        {
            process.Start();
        }
        catch (System.ComponentModel.Win32Exception e)
        {
            throw new OracleException($"{program.Path} cannot be run: {e.Message}; install QEMU anew.", e);
        }
        process.StandardInput.Close();

        bool hasChannel = options.ReadChannel is not null;
        Task<string> serial = ReadLinesAsync(hasChannel ? process.StandardError : process.StandardOutput, options.OnLine);
        Task<string> error = hasChannel ? Task.FromResult("") : process.StandardError.ReadToEndAsync(CancellationToken.None);
        Task channel = options.ReadChannel is { } read ? ReadChannelAsync(read, process.StandardOutput.BaseStream) : Task.CompletedTask;
        bool killed = false;
        bool timedOut = false;
        using (CancellationTokenSource stop =
            CancellationTokenSource.CreateLinkedTokenSource(cancellation, options.SwitchOff))
        {
            stop.CancelAfter(options.Timeout);
            try
            {
                await process.WaitForExitAsync(stop.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException)
            {
                killed = true;
                timedOut = !options.SwitchOff.IsCancellationRequested && !cancellation.IsCancellationRequested;
                process.Kill();
                await process.WaitForExitAsync(CancellationToken.None).ConfigureAwait(false);
            }
        }
        string output = await serial.ConfigureAwait(false);
        string complaint = await error.ConfigureAwait(false);
        await channel.ConfigureAwait(false);
        cancellation.ThrowIfCancellationRequested();
        return new QemuResult(output, timedOut, killed && !timedOut ? 0 : process.ExitCode, complaint.Trim());
    }

    private static List<string> Arguments(QemuOptions options)
    {
        // With a channel, standard output is the channel's and the serial console goes to standard error, after what QEMU itself
        // has to say. The paths are opened anew, so that QEMU never takes the end of its standard input for the end of a device.
        string serial = options.ReadChannel is null ? "1" : "2";
        List<string> arguments =
        [
            "-accel", "tcg", "-cpu", options.Cpu, "-m", $"{options.MemoryMiB}", "-smp", $"{options.Processors}",
            "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot",
            "-chardev", $"file,id=console,path=/dev/fd/{serial}", "-serial", "chardev:console",
            "-kernel", options.Kernel, "-append", options.CommandLine,
        ];
        if (options.InitialRamdisk is { } ramdisk)
            arguments.AddRange(["-initrd", ramdisk]);
        if (options.ReadChannel is not null)
        {
            arguments.AddRange(
            [
                "-device", "virtio-serial-pci", "-chardev", "file,id=channel,path=/dev/fd/1",
                "-device", $"virtserialport,chardev=channel,name={ChannelName}",
            ]);
            if (options.WriteFile is { } path)
            {
                // A comma would end the path.
                arguments.AddRange(
                [
                    "-chardev", $"file,id=file,path={path.Replace(",", ",,", StringComparison.Ordinal)}",
                    "-device", $"virtserialport,chardev=file,name={FileName}",
                ]);
            }
        }
        return arguments;
    }

    private static async Task<string> ReadLinesAsync(StreamReader reader, Action<string>? onLine)
    {
        StringBuilder all = new();
        while (await reader.ReadLineAsync().ConfigureAwait(false) is { } line)
        {
            all.Append(line).Append('\n');
            onLine?.Invoke(line);
        }
        return all.ToString();
    }

    // Takes what the reader leaves, so that the machine never waits for somebody to read.
    private static async Task ReadChannelAsync(Func<Stream, Task> read, Stream stream)
    {
        try
        {
            await read(stream).ConfigureAwait(false);
        }
        finally
        {
            await stream.CopyToAsync(Stream.Null).ConfigureAwait(false);
        }
    }
}
