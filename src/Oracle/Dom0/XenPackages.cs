// Xen and what its dom0 needs, from Debian's packages in the guest cache.
using System.IO.Compression;
using System.Text;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Oracle.Dom0;

/// <summary>What a Debian dom0 boots from.</summary>
/// <param name="Kernel">Path of the kernel, an unpacked ELF image: Xen under QEMU takes four seconds to decompress it.</param>
/// <param name="Initramfs">Path of a cpio archive, not compressed, to which guests can be appended as another.</param>
sealed record Dom0Image(string Kernel, string Initramfs);

/// <summary>Gets them out of the cache, where they are fetched and made first if they are not there.</summary>
static class XenPackages
{
    const string Hypervisor = "xen-hypervisor-4.17-amd64";

    const string Tools = "xen-utils-4.17";

    const string OnDebian = "It is in Debian 12 (bookworm); elsewhere, add bookworm to the host's package sources.";

    static readonly PackageSet HypervisorSet = new(Hypervisor, "boot/xen-4.17-amd64.gz") { Alone = [Hypervisor], Advice = OnDebian };

    // xen-utils alone, because it depends on Python, which only tools that are not used here need.
    static readonly PackageSet ToolSet = new("xen-dom0-tools", ToolFolder + "/xl")
    {
        WithDependencies = ["libxenmisc4.17", "xenstore-utils", "libyajl2", "libgcc-s1"],
        Alone = [Tools],
        Advice = OnDebian,
    };

    const string ToolFolder = "usr/lib/xen-4.17/bin";

    static readonly string[] Programs =
    [
        ToolFolder + "/xl", ToolFolder + "/xenstored", ToolFolder + "/xenconsoled", ToolFolder + "/xen-init-dom0",
        ToolFolder + "/libxl-save-helper", "usr/bin/xenstore-watch",
    ];

    static readonly string[] Modules = ["xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs", "virtio_pci", "virtio_console"];

    const UnixFileMode Executable = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;

    /// <summary>Xen's version, 4.17.7, or only 4.17 while it is not in the cache.</summary>
    public static string Version(GuestCache cache)
    {
        // 4.17.7+13-g2445b30a44-0+deb12u1
        string? package = cache.FindVersion(Hypervisor);
        return package is null ? "4.17" : package.Split('+', '-')[0];
    }

    /// <summary>Path of Xen, unpacked: a multiboot image.</summary>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    public static async Task<string> GetXenAsync(GuestCache cache, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string root = await cache.GetPackagesAsync(HypervisorSet, progress, cancellation).ConfigureAwait(false);
        return await cache.GetFileAsync("xen.elf", GuestCache.VersionOf(root), "Unpacking Xen", async (path, token) =>
        {
            try
            {
                await using FileStream packed = File.OpenRead(Path.Combine(root, HypervisorSet.Content));
                await using GZipStream unpacked = new(packed, CompressionMode.Decompress);
                await using FileStream file = File.Create(path);
                await unpacked.CopyToAsync(file, token).ConfigureAwait(false);
            }
            catch (InvalidDataException e)
            {
                throw DebianPrograms.Damaged(root, e.Message, e);
            }
        }, progress, cancellation).ConfigureAwait(false);
    }

    /// <summary>The dom0 that runs guests as domUs.</summary>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    public static async Task<Dom0Image> GetDom0Async(
        GuestCache cache, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64, progress, cancellation).ConfigureAwait(false);
        string busybox = await cache.GetBusyboxAsync(progress, cancellation).ConfigureAwait(false);
        string tools = await cache.GetPackagesAsync(ToolSet, progress, cancellation).ConfigureAwait(false);

        string image = await cache.GetFileAsync("vmlinux", kernel.PackageVersion, "Unpacking dom0's kernel", async (path, token) =>
        {
            byte[] packed = await File.ReadAllBytesAsync(kernel.Image, token).ConfigureAwait(false);
            ReadOnlyMemory<byte> unpacked;
            try
            {
                unpacked = KernelImage.Unpack(packed);
            }
            catch (KernelImageException e)
            {
                throw DebianPrograms.Damaged(Path.Combine(cache.Root, "linux-image-amd64"), e.Message, e);
            }
            await File.WriteAllBytesAsync(path, unpacked, token).ConfigureAwait(false);
        }, progress, cancellation).ConfigureAwait(false);

        string init = await ReadInitAsync(cancellation).ConfigureAwait(false);
        string busyboxVersion = cache.FindVersion("busybox-static") ?? "";
        string key = string.Join('\n', kernel.PackageVersion, busyboxVersion, GuestCache.VersionOf(tools), init);
        string[] applets = await BusyboxInitramfs.ListAppletsAsync(busybox, cancellation).ConfigureAwait(false);
        string initramfs = await cache.GetFileAsync("dom0.cpio", key, "Building dom0's initramfs", (path, _) =>
        {
            using FileStream file = File.Create(path);
            using CpioWriter cpio = new(file);
            WriteInitramfs(cpio, init, kernel, busybox, applets, tools);
            return Task.CompletedTask;
        }, progress, cancellation).ConfigureAwait(false);
        return new Dom0Image(image, initramfs);
    }

    static void WriteInitramfs(
        CpioWriter cpio, string init, DebianKernel kernel, string busybox, IReadOnlyList<string> applets, string tools)
    {
        foreach (string folder in (ReadOnlySpan<string>)
            ["bin", "dev", "etc", "etc/xen", "lib", "lib/x86_64-linux-gnu", "lib64", "modules", "proc", "root", "run", "sys", "tmp", "usr", "usr/lib", "usr/lib/xen-4.17", "var"])
            cpio.AddDirectory(folder);
        cpio.AddSymlink(ToolFolder, "/bin");
        cpio.AddSymlink("var/run", "/run");
        cpio.AddCharacterDevice("dev/console", 5, 1);
        cpio.AddCharacterDevice("dev/null", 1, 3);
        cpio.AddFile("init", Encoding.UTF8.GetBytes(init), Executable);
        // dom0's memory is fixed on Xen's command line, so xl need not look for some to take from it.
        cpio.AddFile("etc/xen/xl.conf", "autoballoon=\"off\"\nclaim_mode=0\n"u8);

        cpio.AddFile("bin/busybox", File.ReadAllBytes(busybox), Executable);
        foreach (string applet in applets)
            cpio.AddSymlink("bin/" + applet, "busybox");
        foreach (InitramfsFile file in DebianPrograms.Collect(tools, Programs))
            cpio.AddFile(file.Path, file.Contents.Span, Executable);
        AddModules(cpio, kernel);
    }

    // The modules in an order that insmod can take them in.
    static void AddModules(CpioWriter cpio, DebianKernel kernel)
    {
        Dictionary<string, string> files = kernel.Modules is null ? [] : Directory
            .EnumerateFiles(kernel.Modules, "*.ko", SearchOption.AllDirectories)
            .ToDictionary(file => ModuleName(Path.GetFileNameWithoutExtension(file)));
        List<string> order = [];
        void Add(string module)
        {
            if (order.Contains(module + ".ko"))
                return;
            if (!files.TryGetValue(module, out string? file))
                throw new GuestFetchException(
                    $"The kernel {kernel.Release} has no module {module}.ko, which dom0 needs; Debian's linux-image-amd64 of bookworm has it.");
            byte[] contents = File.ReadAllBytes(file);
            foreach (string dependency in ModuleDependencies(contents))
                Add(dependency);
            cpio.AddFile($"modules/{module}.ko", contents);
            order.Add(module + ".ko");
        }

        foreach (string module in Modules)
            Add(ModuleName(module));
        cpio.AddFile("modules/order", Encoding.ASCII.GetBytes(string.Concat(order.Select(module => module + "\n"))));
    }

    // modinfo's "depends": a comma-separated list in a section of NUL-terminated strings.
    static IEnumerable<string> ModuleDependencies(ReadOnlySpan<byte> module)
    {
        ReadOnlySpan<byte> key = "\0depends="u8;
        int start = module.IndexOf(key);
        if (start < 0)
            return [];
        ReadOnlySpan<byte> list = module[(start + key.Length)..];
        int end = list.IndexOf((byte)0);
        return end <= 0 ? [] : Encoding.ASCII.GetString(list[..end]).Split(',').Select(ModuleName);
    }

    // The kernel takes '-' and '_' in a module's name for the same.
    static string ModuleName(string name) => name.Replace('-', '_');

    static async Task<string> ReadInitAsync(CancellationToken cancellation)
    {
        await using Stream stream = typeof(XenPackages).Assembly.GetManifestResourceStream("dom0-init.sh")
            ?? throw new InvalidOperationException("dom0's init script is not in the assembly.");
        using StreamReader reader = new(stream);
        return (await reader.ReadToEndAsync(cancellation).ConfigureAwait(false)).ReplaceLineEndings("\n");
    }
}
