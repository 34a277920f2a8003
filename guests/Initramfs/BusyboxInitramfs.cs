// Builds the initramfs of the demonstration guest: busybox, its applets, and an init that ends in a shell or a script.
using System.IO.Compression;
using System.Text;
using XenSharp.Guests.Fetching;

namespace XenSharp.Guests.Initramfs;

/// <summary>A file to put into the initramfs beside busybox; missing folders above it are made.</summary>
/// <param name="Path">Relative to the root, without a leading slash.</param>
/// <param name="Contents">What is in it.</param>
/// <param name="Executable">Whether it gets mode 0755 rather than 0644.</param>
public sealed record InitramfsFile(string Path, ReadOnlyMemory<byte> Contents, bool Executable = false);

/// <summary>What the initramfs is to hold and to do.</summary>
public sealed record BusyboxInitramfsOptions
{
    /// <summary>The guest's host name.</summary>
    public string Hostname { get; init; } = "xensharp";

    /// <summary>The line printed before the shell or script; null for the standard one, empty for none.</summary>
    public string? Banner { get; init; }

    /// <summary>
    /// A shell script to run instead of the shell; the domain powers off when it ends, and a status other than 0 is printed as
    /// <c>init script: exit status N</c>. It has the console as its terminal.
    /// </summary>
    public string? InitScript { get; init; }

    /// <summary>Further files; a path that is already there replaces what this class would have put there.</summary>
    public IReadOnlyList<InitramfsFile> Files { get; init; } = [];
}

/// <summary>Makes gzip-compressed newc archives with busybox in them.</summary>
public static class BusyboxInitramfs
{
    /// <summary>
    /// The word on the guest kernel's command line that says the console's input is a file or pipe and not a person: the shell
    /// then reads whole lines without echo, prompt or line editing, and a ^D ends it wherever it stands.
    /// </summary>
    /// <remarks>Without it the shell switches the terminal between line and raw mode, and a ^D that arrives in line mode just
    /// before a switch is lost, as it is for anyone who types ahead.</remarks>
    public const string PipedInputParameter = "xensharp.input=pipe";

    const string ScriptPath = "etc/init-script";

    const UnixFileMode OrdinaryMode =
        UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.OtherRead;

    const UnixFileMode ExecutableMode =
        OrdinaryMode | UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;

    /// <summary>Builds the initramfs.</summary>
    /// <param name="busyboxPath">A statically linked busybox that runs on this host; it is asked for its applets.</param>
    /// <param name="options">What the initramfs is to hold; null for the interactive shell.</param>
    /// <param name="cancellation">Ends the wait for busybox.</param>
    /// <returns>The compressed archive, ready to be a domain's ramdisk.</returns>
    /// <exception cref="GuestFetchException">busybox cannot be run or names no shell among its applets.</exception>
    public static async Task<byte[]> BuildAsync(
        string busyboxPath, BusyboxInitramfsOptions? options = null, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(busyboxPath);
        options ??= new BusyboxInitramfsOptions();
        IReadOnlyList<string> applets = await ListAppletsAsync(busyboxPath, cancellation).ConfigureAwait(false);

        using MemoryStream result = new();
        using (GZipStream gzip = new(result, CompressionLevel.Optimal, leaveOpen: true))
        using (CpioWriter cpio = new(gzip))
        {
            Write(cpio, await File.ReadAllBytesAsync(busyboxPath, cancellation).ConfigureAwait(false), applets, options);
        }
        return result.ToArray();
    }

    /// <summary>The names that a busybox answers to, in ordinal order; without its own and those with a slash.</summary>
    /// <exception cref="GuestFetchException">It cannot be run or names no shell.</exception>
    public static async Task<string[]> ListAppletsAsync(string busyboxPath, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(busyboxPath);
        CommandResult listed;
        try
        {
            listed = await new CommandRunner().RunAsync(new Command(Path.GetFullPath(busyboxPath), "--list"), cancellation)
                .ConfigureAwait(false);
        }
        catch (CommandNotFoundException e)
        {
            throw new GuestFetchException($"{busyboxPath} cannot be run to list its applets: {e.Message}", e);
        }
        // A name with a slash would be a path, not an applet; busybox itself is the file the links lead to.
        string[] applets = [.. listed.Output.Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries)
            .Where(name => name != "busybox" && !name.Contains('/', StringComparison.Ordinal)).Distinct().Order(StringComparer.Ordinal)];
        if (listed.ExitCode != 0 || !applets.Contains("sh"))
            throw new GuestFetchException(
                $"\"{busyboxPath} --list\" names no shell (exit status {listed.ExitCode}); give a complete, static busybox.");
        return applets;
    }

    static void Write(CpioWriter cpio, ReadOnlySpan<byte> busybox, IReadOnlyList<string> applets, BusyboxInitramfsOptions options)
    {
        HashSet<string> directories = [];
        HashSet<string> replaced = [.. options.Files.Select(file => file.Path)];

        foreach (string directory in (ReadOnlySpan<string>)["bin", "sbin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"])
            AddDirectories(cpio, directories, directory + "/");

        // The kernel opens /dev/console for init before anything is mounted.
        cpio.AddCharacterDevice("dev/console", 5, 1, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        cpio.AddCharacterDevice("dev/null", 1, 3, OrdinaryMode | UnixFileMode.GroupWrite | UnixFileMode.OtherWrite);

        if (!replaced.Contains("bin/busybox"))
            cpio.AddFile("bin/busybox", busybox, ExecutableMode);
        foreach (string applet in applets)
        {
            if (!replaced.Contains("bin/" + applet))
                cpio.AddSymlink("bin/" + applet, "busybox");
        }

        List<InitramfsFile> files =
        [
            new("init", Encoding.UTF8.GetBytes(InitScript(options)), Executable: true),
            new("etc/passwd", "root::0:0:root:/root:/bin/sh\n"u8.ToArray()),
            new("etc/group", "root:x:0:\n"u8.ToArray()),
        ];
        if (options.InitScript is { } script)
            files.Add(new InitramfsFile(ScriptPath, Encoding.UTF8.GetBytes(script.ReplaceLineEndings("\n")), Executable: true));
        foreach (InitramfsFile file in files.Where(file => !replaced.Contains(file.Path)).Concat(options.Files))
        {
            AddDirectories(cpio, directories, file.Path);
            cpio.AddFile(file.Path, file.Contents.Span, file.Executable ? ExecutableMode : OrdinaryMode);
        }
    }

    // Adds every folder above the path that is not there yet.
    static void AddDirectories(CpioWriter cpio, HashSet<string> known, string path)
    {
        for (int slash = path.IndexOf('/'); slash > 0; slash = path.IndexOf('/', slash + 1))
        {
            if (known.Add(path[..slash]))
                cpio.AddDirectory(path[..slash], ExecutableMode);
        }
    }

    // Process 1. It stays in `wait` while the shell runs, so that the signals by which busybox's poweroff, reboot and halt
    // speak to init are acted on at once.
    static string InitScript(BusyboxInitramfsOptions options)
    {
        string banner = options.Banner switch
        {
            null => """echo "Linux $(uname -r) under XenSharp; poweroff or ^D ends the domain." """.TrimEnd(),
            "" => ":",
            string text => "echo " + Quote(text),
        };
        string work = options.InitScript is null
            ? $$"""
              case " $(cat /proc/cmdline) " in
              *" {{PipedInputParameter}} "*)
                  stty -echo </dev/console
                  run sh /dev/tty ;;
              *)
                  # What a shell script starts in the background ignores SIGINT for good, but for login, which sets it back.
                  run login -f root ;;
              esac
              """
            : $$"""
              run sh /{{ScriptPath}} || echo "init script: exit status $?"
              """;
        return $$"""
            #!/bin/sh
            export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root
            mount -t proc proc /proc
            mount -t sysfs sysfs /sys
            mount -t devtmpfs devtmpfs /dev 2>/dev/null
            mkdir -p /dev/pts /dev/shm
            mount -t devpts devpts /dev/pts
            mount -t tmpfs tmpfs /run
            hostname {{Quote(options.Hostname)}}
            trap 'sync; poweroff -f' USR2
            trap 'sync; reboot -f' TERM
            trap 'sync; halt -f' USR1
            run() {
                setsid cttyhack "$@" &
                wait $!
            }
            cd /root
            {{banner}}
            {{work}}
            sync
            poweroff -f

            """.ReplaceLineEndings("\n");
    }

    static string Quote(string text) => "'" + text.Replace("'", "'\\''", StringComparison.Ordinal) + "'";
}
