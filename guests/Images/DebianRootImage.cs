// Makes a disk image with a whole Debian system, as debootstrap's users have them: what a domain that is more than a demo boots from.
using XenSharp.Guests.Fetching;

namespace XenSharp.Guests.Images;

/// <summary>
/// A disk without partitions whose ext4 holds Debian with systemd, its cloud kernel, an initramfs of its own, and a grub.cfg that names them;
/// it expects to be xvda, and has a login on every console that the kernel is told of. Made by mmdebstrap, once, in the cache.
/// </summary>
public static class DebianRootImage
{
    /// <summary>What root logs in with.</summary>
    public const string RootPassword = "xensharp";

    /// <summary>The host name of the system.</summary>
    public const string HostName = "debian";

    private const string Suite = "bookworm";
    private const string Size = "2G";

    // Counted up when the same packages are to make another image.
    private const int Revision = 1;

    private const string Advice =
        "Or make an image by hand: any ext4 with a Debian system in it will do.";

    private static readonly string[] Packages =
        ["systemd-sysv", "dbus", "udev", "linux-image-cloud-amd64", "initramfs-tools", "e2fsprogs", "iproute2", "iputils-ping", "kmod", "fio", "iperf3"];

    /// <summary>Run by mmdebstrap when all packages are configured, with the root's path as $1.</summary>
    private static readonly string[] Hooks =
    [
        $"echo root:{RootPassword} | chroot \"$1\" chpasswd",
        $"echo {HostName} > \"$1/etc/hostname\"",
        $"echo '127.0.0.1 localhost {HostName}' > \"$1/etc/hosts\"",
        "mkdir -p \"$1/boot/grub\"",
        "printf 'set default=0\\nmenuentry \"Debian\" {\\n\\tlinux /vmlinuz root=/dev/xvda ro console=hvc0\\n\\tinitrd /initrd.img\\n}\\n' > \"$1/boot/grub/grub.cfg\"",
        "echo '/dev/xvda / ext4 errors=remount-ro 0 1' > \"$1/etc/fstab\"",
        "ln -sf /dev/null \"$1/etc/systemd/system/apt-daily.timer\"",
        "ln -sf /dev/null \"$1/etc/systemd/system/apt-daily-upgrade.timer\"",
    ];

    /// <summary>Path of the image, made first if it is not there. It is shared: a domain that writes gets a copy (<see cref="CopyAsync"/>).</summary>
    /// <param name="cache">Holds it, and the packages of the tools.</param>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the making.</param>
    /// <exception cref="GuestFetchException">It cannot be made; the message says why and what to do.</exception>
    public static async Task<string> GetAsync(
        GuestCache cache, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(cache);

        // perl-base is on every Debian, and runs with the modules of the package beside it.
        string tools = await cache.GetPackagesAsync(
            new PackageSet("mmdebstrap", "usr/bin/mmdebstrap") { WithDependencies = ["perl"], Alone = ["mmdebstrap"], Advice = Advice },
            progress, cancellation).ConfigureAwait(false);
        string key = string.Join('\n', [GuestCache.VersionOf(tools), Suite, Size, $"{Revision}", .. Packages, .. Hooks]);
        return await cache.GetFileAsync(
            "debian-root.ext4", key, "Making a Debian system", (path, token) => MakeAsync(tools, path, token), progress, cancellation)
            .ConfigureAwait(false);
    }

    /// <summary>Copies the image, taking room only for what is in it.</summary>
    /// <param name="image">What <see cref="GetAsync"/> gave.</param>
    /// <param name="copy">Where the copy is to be.</param>
    /// <param name="cancellation">Ends the copying.</param>
    /// <exception cref="GuestFetchException">It cannot be copied; the message says why.</exception>
    public static Task CopyAsync(string image, string copy, CancellationToken cancellation = default)
        => RunAsync(new Command("cp", "--sparse=always", image, copy), "A disk image cannot be copied", cancellation);

    private static async Task MakeAsync(string tools, string image, CancellationToken cancellation)
    {
        if (Environment.UserName != "root")
            throw new GuestFetchException($"Making a Debian system takes root, for chroot and the owners of its files: run once as root, or as root in a user namespace. {Advice}");
        string root = image + ".root";
        string[] modules =
        [
            .. Directory.EnumerateDirectories(Path.Combine(tools, "usr/share/perl")),
            .. Directory.EnumerateDirectories(Path.Combine(tools, "usr/lib/x86_64-linux-gnu/perl")),
        ];
        try
        {
            await RunAsync(
                new Command(
                    "env",
                    [
                        $"PERL5LIB={string.Join(':', modules)}", "perl", Path.Combine(tools, "usr/bin/mmdebstrap"),
                        "--mode=root", "--variant=minbase", "--format=directory", $"--include={string.Join(',', Packages)}",
                        .. Hooks.Select(static hook => $"--customize-hook={hook}"), Suite, root,
                    ]),
                "A Debian system cannot be made", cancellation).ConfigureAwait(false);
            await RunAsync(
                new Command("mkfs.ext4", "-q", "-F", "-L", "xensharp", "-d", root, image, Size),
                "A Debian system cannot be put into an ext4", cancellation).ConfigureAwait(false);
        }
        finally
        {
            // Not by .NET, which follows no device nodes but stumbles over what root alone may list.
            if (Directory.Exists(root))
                await RunAsync(new Command("rm", "-rf", "--one-file-system", root), "A folder cannot be removed", CancellationToken.None).ConfigureAwait(false);
        }
    }

    private static async Task RunAsync(Command command, string complaint, CancellationToken cancellation)
    {
        CommandResult result;
        try
        {
            result = await new CommandRunner(CommandRunner.SystemSearchPath).RunAsync(command, cancellation).ConfigureAwait(false);
        }
        catch (CommandNotFoundException missing)
        {
            throw new GuestFetchException($"{complaint}: {missing.Message} {Advice}", missing);
        }

        if (result.ExitCode != 0)
        {
            string[] lines = result.Error.Split('\n', StringSplitOptions.RemoveEmptyEntries);
            string why = lines.LastOrDefault(static line => line.StartsWith("E:", StringComparison.Ordinal)) ?? lines.LastOrDefault() ?? "it did not say why";
            throw new GuestFetchException($"{complaint}: {why.TrimEnd('.')} ({command.Program} ended with status {result.ExitCode}). {Advice}");
        }
    }
}
