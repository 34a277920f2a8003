// The machine of the nested beds: QEMU's software CPU with SVM, Debian's kernel with kvm_amd, and the xensharp command in it.
using System.Runtime.CompilerServices;
using System.Text;
using System.Threading.Channels;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle.Beds;
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
/// writes to file descriptor 3, the channel of <see cref="QemuOptions.ReadChannel"/>.
/// </summary>
/// <param name="cache">Where QEMU, the kernel and busybox come from.</param>
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

    /// <summary>What the channel needs, in the order of loading, as Debian's kernel 6.1 has it.</summary>
    private static readonly string[] ChannelModules =
        ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console"];

    /// <summary>What kvm_amd needs, in the order of loading.</summary>
    private static readonly string[] KvmModules = ["irqbypass", "ccp", "kvm"];

    private const string KvmAmdModule = "kvm-amd";

    /// <summary>The value of -cpu.</summary>
    public string Cpu { get; init; } = DefaultCpu;

    /// <summary>Emulated processors.</summary>
    public int Processors { get; set; } = 1;

    /// <summary>More words for the command line of the machine's kernel.</summary>
    public string KernelArguments { get; init; } = string.Empty;

    /// <summary>
    /// Path of a file that gets what the script writes to file descriptor 5, which is for bytes that are too many for lines; null for
    /// a script that has none.
    /// </summary>
    public string? WriteFile { get; init; }

    /// <summary>Runs the script and yields its lines; ends when it has ended and the machine is off.</summary>
    /// <param name="script">Commands for busybox's shell; /tmp is theirs, standard input is empty, what they print is lost in the
    /// kernel's messages. <c>fail SENTENCE</c> ends all with an <see cref="OracleException"/>, and <c>use_npt 0</c> or <c>1</c> makes the
    /// machine one without or with nested paging, while nobody has /dev/kvm open.</param>
    /// <param name="files">What the script needs.</param>
    /// <param name="guestMemoryMiB">Memory of the largest guest that the script runs.</param>
    /// <param name="timeout">How long all of it may take.</param>
    /// <param name="cancellation">Switches the machine off.</param>
    /// <exception cref="OracleException">The machine cannot be made or has not come to the script's end; the message has its last lines.</exception>
    public async IAsyncEnumerable<string> RunAsync(
        string script, IReadOnlyList<NestedFile> files, int guestMemoryMiB, TimeSpan timeout,
        [EnumeratorCancellation] CancellationToken cancellation)
    {
        using TemporaryFolder folder = new();
        string ramdisk = Path.Combine(folder.Path, "initramfs");
        (QemuProgram qemu, string kernel) = await MakeAsync(ramdisk, script, files, cancellation).ConfigureAwait(false);
        using CancellationTokenSource switchOff = new();
        Channel<string> lines = Channel.CreateUnbounded<string>();
        QemuOptions options = new(kernel)
        {
            // The time-stamp counter is the host's, so it is reliable, and reading the emulated HPET instead is slow. On a busy host
            // the emulated timer comes too late for the kernel's check of it.
            CommandLine = $"console=ttyS0 quiet panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check cryptomgr.notests {KernelArguments}".TrimEnd(),
            InitialRamdisk = ramdisk,
            Cpu = Cpu,
            Processors = Processors,
            // The ramdisk is there twice while it is unpacked.
            MemoryMiB = KernelAndToolsMiB + guestMemoryMiB + (int)(2 * new FileInfo(ramdisk).Length >> 20),
            Timeout = timeout,
            ReadChannel = stream => ReadAsync(stream, lines.Writer),
            WriteFile = WriteFile,
            SwitchOff = switchOff.Token,
        };
        using CancellationTokenSource abandoned = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task<QemuResult> machine = RunAsync(qemu, options, lines.Writer, abandoned.Token);
        bool done = false;
        try
        {
            await foreach (string line in lines.Reader.ReadAllAsync(cancellation).ConfigureAwait(false))
            {
                if (line.StartsWith(ErrorWord + " ", StringComparison.Ordinal))
                    throw new OracleException(NestedText.Decode(line[(ErrorWord.Length + 1)..]));
                if (line == DoneWord)
                {
                    done = true;
                    await switchOff.CancelAsync().ConfigureAwait(false);
                }
                else
                {
                    yield return line;
                }
            }
            QemuResult result = await machine.ConfigureAwait(false);
            if (!done)
                throw Broken(result, options);
        }
        finally
        {
            // The caller may have stopped asking; the machine must be gone before its files are.
            await abandoned.CancelAsync().ConfigureAwait(false);
            await ((Task)machine).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        }
    }

    /// <summary>Runs the machine; the lines end with it, even if it did not come so far as to write any.</summary>
    private static async Task<QemuResult> RunAsync(
        QemuProgram qemu, QemuOptions options, ChannelWriter<string> lines, CancellationToken cancellation)
    {
        try
        {
            return await QemuMachine.RunAsync(qemu, options, cancellation).ConfigureAwait(false);
        }
        finally
        {
            lines.Complete();
        }
    }

    private static async Task ReadAsync(Stream stream, ChannelWriter<string> lines)
    {
        using StreamReader reader = new(stream, Encoding.ASCII, leaveOpen: true);
        while (await reader.ReadLineAsync().ConfigureAwait(false) is { } line)
            lines.TryWrite(line);
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
        return new OracleException(what + "\n" + string.Join('\n', result.SerialOutput.TrimEnd().Split('\n').TakeLast(LastLines)));
    }

    /// <summary>Writes the initramfs, uncompressed: unpacking is slow on an emulated processor, and reading the file is not.</summary>
    /// <returns>What runs the machine, and the kernel's path.</returns>
    private async Task<(QemuProgram Qemu, string Kernel)> MakeAsync(
        string path, string script, IReadOnlyList<NestedFile> files, CancellationToken cancellation)
    {
        QemuProgram qemu;
        DebianKernel kernel;
        string busybox;
        try
        {
            qemu = await QemuProgram.GetAsync(cache, null, progress, cancellation).ConfigureAwait(false);
            kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64, progress, cancellation).ConfigureAwait(false);
            busybox = await cache.GetBusyboxAsync(progress, cancellation).ConfigureAwait(false);
        }
        catch (GuestFetchException e)
        {
            throw new OracleException(e.Message, e);
        }
        List<NestedFile> all =
        [
            new("bin/busybox", busybox) { Executable = true },
            new("bin/xensharp", command) { Executable = true },
            new("init") { Contents = Encoding.UTF8.GetBytes(Init(script)), Executable = true },
        ];
        foreach (string library in await SharedLibraries.OfAsync(command, cancellation).ConfigureAwait(false))
            all.Add(new(library.TrimStart('/'), library) { Executable = true });
        foreach (string module in (ReadOnlySpan<string>)[.. ChannelModules, .. KvmModules, KvmAmdModule])
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
        return (qemu, kernel.Image);
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
        return $$"""
            #!/bin/sh
            export PATH=/bin HOME=/
            /bin/busybox --install -s /bin
            mount -t proc proc /proc
            mount -t sysfs sysfs /sys
            mount -t devtmpfs devtmpfs /dev
            mount -t tmpfs tmpfs /tmp
            for module in {{string.Join(' ', ChannelModules)}}; do
                insmod /modules/$module.ko
            done
            for port in /sys/class/virtio-ports/*; do
                case $(cat $port/name) in
                    {{QemuMachine.ChannelName}}) exec 3>/dev/${port##*/};;
                    {{QemuMachine.FileName}}) exec 5>/dev/${port##*/};;
                esac
            done
            exec </dev/null

            fail() {
                echo "{{ErrorWord}} $(echo "$1" | base64 -w 0)" >&3
                poweroff -f
            }
            load() {
                said=$(insmod /modules/$1.ko $2 2>&1) ||
                    fail "The module $1 does not load in the emulated machine: $said; has QEMU an AMD processor with SVM (-cpu {{Cpu}})?"
            }
            use_npt() {
                if [ -d /sys/module/kvm_amd ]; then
                    said=$(rmmod {{KvmAmdModule}} 2>&1) || fail "The module {{KvmAmdModule}} does not unload in the emulated machine: $said; who has /dev/kvm open?"
                fi
                load {{KvmAmdModule}} npt=$1
                case $1$(cat /sys/module/kvm_amd/parameters/npt) in
                    0N | 1Y) ;;
                    *) fail "kvm_amd took no npt=$1 in the emulated machine; has QEMU nested paging (-cpu {{Cpu}})?";;
                esac
                [ -c /dev/kvm ] || fail "There is no /dev/kvm in the emulated machine although kvm_amd is loaded; look at its kernel's messages."
            }
            for module in {{string.Join(' ', KvmModules)}}; do
                load $module
            done
            use_npt {{(nestedPaging ? 1 : 0)}}

            {{script.ReplaceLineEndings("\n").Trim()}}

            echo {{DoneWord}} >&3
            poweroff -f

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
