// The machine of the nested beds: QEMU's software CPU with SVM, Debian's kernel with kvm_amd, and the xensharp command in it.
using System.Net.Sockets;
using System.Runtime.CompilerServices;
using System.Text;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle.Qemu;

namespace XenSharp.Oracle.Nested;

/// <summary>A file of the machine that is a file of this host, or bytes.</summary>
/// <param name="Path">Relative to the machine's root, without a leading slash; the folders above it are made.</param>
/// <param name="Source">Path on this host, read when the machine is made; null for <see cref="Contents"/>.</param>
internal sealed record NestedFile(string Path, string? Source = null)
{
    public ReadOnlyMemory<byte> Contents { get; init; }

    public bool Executable { get; init; }
}

/// <summary>
/// Boots a Linux whose /dev/kvm is kvm_amd on emulated SVM, runs a shell script in it, and hands on the lines that the script
/// writes to file descriptor 3, which is a serial port of its own: what the kernel prints never comes between.
/// </summary>
/// <param name="cache">Where the kernel and busybox come from.</param>
/// <param name="command">Path of the native xensharp command.</param>
/// <param name="nestedPaging">Whether kvm_amd uses nested paging, or shadows the guests' page tables (its parameter npt).</param>
/// <param name="progress">Told what is fetched.</param>
internal sealed class NestedMachine(GuestCache cache, string command, bool nestedPaging, IProgress<FetchProgress>? progress)
{
    /// <summary>As <see cref="QemuOptions.DefaultCpu"/>, with the virtualization that QEMU emulates.</summary>
    public const string DefaultCpu = QemuOptions.DefaultCpu + ",+svm,+npt";

    /// <summary>The first word of the line by which the script's surroundings say, in base64, that they cannot start it.</summary>
    private const string ErrorWord = "error";

    /// <summary>The last line.</summary>
    private const string DoneWord = "done";

    private const int KernelAndToolsMiB = 384;
    private const int LastLines = 20;

    /// <summary>kvm_amd and what it needs, in the order of loading, as Debian's kernel 6.1 has them.</summary>
    private static readonly string[] Modules = ["irqbypass", "ccp", "kvm", "kvm-amd"];

    /// <summary>The value of -cpu.</summary>
    public string Cpu { get; init; } = DefaultCpu;

    /// <summary>More words for the command line of the machine's kernel.</summary>
    public string KernelArguments { get; init; } = string.Empty;

    /// <summary>Runs the script and yields its lines; ends when it has ended and the machine is off.</summary>
    /// <param name="script">Commands for busybox's shell; /tmp is theirs, standard input is empty, what they print is lost in the
    /// kernel's messages.</param>
    /// <param name="files">What the script needs.</param>
    /// <param name="guestMemoryMiB">Memory of the largest guest that the script runs.</param>
    /// <param name="timeout">How long all of it may take.</param>
    /// <param name="onConsoleLine">Called with each line of the machine's console.</param>
    /// <param name="cancellation">Switches the machine off.</param>
    /// <exception cref="OracleException">The machine cannot be made or has not come to the script's end; the message has its last lines.</exception>
    public async IAsyncEnumerable<string> RunAsync(
        string script, IReadOnlyList<NestedFile> files, int guestMemoryMiB, TimeSpan timeout, Action<string>? onConsoleLine,
        [EnumeratorCancellation] CancellationToken cancellation)
    {
        string folder = Directory.CreateTempSubdirectory($"xensharp-nested-{Environment.ProcessId}-").FullName;
        try
        {
            DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64, progress, cancellation).ConfigureAwait(false);
            string ramdisk = Path.Combine(folder, "initramfs");
            await WriteInitramfsAsync(ramdisk, kernel, script, files, cancellation).ConfigureAwait(false);
            using Socket listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            string socket = Path.Combine(folder, "results");
            listener.Bind(new UnixDomainSocketEndPoint(socket));
            listener.Listen(1);

            QemuOptions options = new(kernel.Image)
            {
                // TCG's time-stamp counter is the host's, so it is reliable, and reading the emulated HPET instead is slow.
                CommandLine = $"console=ttyS0 quiet panic=-1 oops=panic mitigations=off tsc=reliable {KernelArguments}".TrimEnd(),
                InitialRamdisk = ramdisk,
                Cpu = Cpu,
                // The ramdisk is there twice while it is unpacked.
                MemoryMiB = KernelAndToolsMiB + guestMemoryMiB + (int)(2 * new FileInfo(ramdisk).Length >> 20),
                SecondSerialPort = $"unix:{socket}",
                Timeout = timeout,
                OnLine = onConsoleLine,
            };
            using CancellationTokenSource stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
            Task<QemuResult> machine = QemuMachine.RunAsync(options, stop.Token);
            bool done = false;
            try
            {
                await foreach (string line in ReadLinesAsync(listener, machine, stop.Token).ConfigureAwait(false))
                {
                    if (line.StartsWith(ErrorWord + " ", StringComparison.Ordinal))
                        throw new OracleException(NestedText.Decode(line[(ErrorWord.Length + 1)..]));
                    done = line == DoneWord;
                    if (!done)
                        yield return line;
                }
                QemuResult result = await machine.ConfigureAwait(false);
                if (!done)
                    throw Broken(result, options);
            }
            finally
            {
                await stop.CancelAsync().ConfigureAwait(false);
                await ((Task)machine).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            }
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    /// <summary>The lines of the second serial port, to the end of the machine.</summary>
    private static async IAsyncEnumerable<string> ReadLinesAsync(
        Socket listener, Task machine, [EnumeratorCancellation] CancellationToken cancellation)
    {
        Task<Socket> connecting = listener.AcceptAsync(cancellation).AsTask();
        if (await Task.WhenAny(connecting, machine).ConfigureAwait(false) == machine)
            yield break;
        using Socket connected = await connecting.ConfigureAwait(false);
        using NetworkStream stream = new(connected);
        using StreamReader reader = new(stream, Encoding.ASCII);
        while (await reader.ReadLineAsync(cancellation).ConfigureAwait(false) is { } line)
            yield return line;
    }

    private static OracleException Broken(QemuResult result, QemuOptions options)
    {
        string what = result switch
        {
            { TimedOut: true } => string.Create(null, $"The emulated machine was not done after {options.Timeout.TotalSeconds:0} s and was switched off; is this host overloaded?"),
            { SerialOutput: var output } when output.Contains("Kernel panic", StringComparison.Ordinal) =>
                "The kernel of the emulated machine panicked; its last lines say why.",
            { ExitCode: not 0 } => $"QEMU ended with status {result.ExitCode}; start again, and look at what it said.",
            _ => "The emulated machine went off before its script was done; its last lines say why.",
        };
        IEnumerable<string> lines = result.SerialOutput.TrimEnd().Split('\n').TakeLast(LastLines);
        if (result.Error.Length != 0)
            lines = lines.Append("QEMU: " + result.Error);
        return new OracleException(what + "\n" + string.Join('\n', lines));
    }

    /// <summary>Uncompressed: unpacking is slow on an emulated processor, and reading the file is not.</summary>
    private async Task WriteInitramfsAsync(
        string path, DebianKernel kernel, string script, IReadOnlyList<NestedFile> files, CancellationToken cancellation)
    {
        string busybox = await cache.GetBusyboxAsync(progress, cancellation).ConfigureAwait(false);
        List<NestedFile> all =
        [
            new("bin/busybox", busybox) { Executable = true },
            new("bin/xensharp", command) { Executable = true },
            new("init") { Contents = Encoding.UTF8.GetBytes(Init(script)), Executable = true },
        ];
        foreach (string library in await SharedLibraries.OfAsync(command, cancellation).ConfigureAwait(false))
            all.Add(new(library.TrimStart('/'), library) { Executable = true });
        foreach (string module in Modules)
            all.Add(new($"modules/{module}.ko", FindModule(kernel, module)));
        all.AddRange(files);

        await using FileStream file = File.Create(path);
        using CpioWriter cpio = new(file);
        HashSet<string> folders = [];
        foreach (string folder in (ReadOnlySpan<string>)["bin", "dev", "proc", "sys", "tmp"])
            AddFolders(cpio, folders, folder + "/");
        cpio.AddSymlink("bin/sh", "busybox");
        foreach (NestedFile entry in all)
        {
            AddFolders(cpio, folders, entry.Path);
            UnixFileMode mode = UnixFileMode.UserRead | (entry.Executable ? UnixFileMode.UserExecute : UnixFileMode.None);
            if (entry.Source is { } source)
            {
                await using FileStream contents = File.OpenRead(source);
                cpio.AddFile(entry.Path, contents, mode);
            }
            else
            {
                cpio.AddFile(entry.Path, entry.Contents.Span, mode);
            }
        }
    }

    private static void AddFolders(CpioWriter cpio, HashSet<string> known, string path)
    {
        for (int slash = path.IndexOf('/', StringComparison.Ordinal); slash > 0; slash = path.IndexOf('/', slash + 1))
        {
            if (known.Add(path[..slash]))
                cpio.AddDirectory(path[..slash]);
        }
    }

    private static string FindModule(DebianKernel kernel, string module) =>
        (kernel.Modules is { } folder ? Directory.EnumerateFiles(folder, module + ".ko", SearchOption.AllDirectories).FirstOrDefault() : null)
        ?? throw new OracleException(
            $"Debian's kernel {kernel.Release} has no module {module}.ko, of which the nested bed is made; "
            + "use the package sources of Debian bookworm, whose kernel has it.");

    private string Init(string script)
    {
        char parameter = nestedPaging ? 'Y' : 'N';
        return $$"""
            #!/bin/sh
            export PATH=/bin HOME=/
            /bin/busybox --install -s /bin
            mount -t proc proc /proc
            mount -t sysfs sysfs /sys
            mount -t devtmpfs devtmpfs /dev
            mount -t tmpfs tmpfs /tmp
            stty -F /dev/ttyS1 raw
            exec 3>/dev/ttyS1 </dev/null

            # Closing the port waits until all is sent.
            leave() {
                exec 3>&-
                poweroff -f
            }
            fail() {
                echo "{{ErrorWord}} $(echo "$1" | base64 -w 0)" >&3
                leave
            }
            for module in {{string.Join(' ', Modules)}}; do
                parameters=
                [ $module = kvm-amd ] && parameters=npt={{(nestedPaging ? 1 : 0)}}
                said=$(insmod /modules/$module.ko $parameters 2>&1) ||
                    fail "The module $module does not load in the emulated machine: $said; has QEMU an AMD processor with SVM (-cpu {{Cpu}})?"
            done
            [ "$(cat /sys/module/kvm_amd/parameters/npt)" = {{parameter}} ] ||
                fail "kvm_amd took no npt={{(nestedPaging ? 1 : 0)}} in the emulated machine; has QEMU nested paging (-cpu {{Cpu}})?"
            [ -c /dev/kvm ] || fail "There is no /dev/kvm in the emulated machine although kvm_amd is loaded; look at its kernel's messages."

            {{script.ReplaceLineEndings("\n").Trim()}}

            echo {{DoneWord}} >&3
            leave

            """.ReplaceLineEndings("\n");
    }
}

/// <summary>How the scripts of a nested machine put bytes into a line.</summary>
internal static class NestedText
{
    /// <summary>The text behind a word of base64; every byte is one character.</summary>
    /// <exception cref="OracleException">It is no base64: the line was damaged.</exception>
    public static string Decode(string word)
    {
        try
        {
            return Encoding.Latin1.GetString(Convert.FromBase64String(word));
        }
        catch (FormatException e)
        {
            throw new OracleException("What came out of the emulated machine is damaged; run it again.", e);
        }
    }
}
