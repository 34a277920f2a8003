// Domains whose kernel is in their own disk (bootloader="pygrub").

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Configuration.Devices;
using XenSharp.Configuration.Tests;
using XenSharp.Guests;
using XenSharp.Guests.Fetching;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class GuestDiskTests : ManagementFixture
{
    private readonly string? _path = Environment.GetEnvironmentVariable("PATH");

    [TearDown]
    public void RestorePath() => Environment.SetEnvironmentVariable("PATH", _path);

    [TestCase(DiskFormat.Raw)]
    [TestCase(DiskFormat.Qcow2)]
    public async Task A_domain_boots_what_the_menu_in_its_disk_says(DiskFormat format)
    {
        DomainConfiguration configuration = await OnDiskAsync(format) with { CommandLine = "behind" };
        ManagedDomain domain = await Toolstack.CreateAsync(configuration, paused: true);
        DomainInfo info = domain.Describe();
        Assert.That((info.Kernel, info.CommandLine), Is.EqualTo(($"{configuration.Disks[0].Target}:/boot/kernel", "root=/dev/xvda ro behind")));
        domain.Unpause();
        await EventuallyAsync(() => Toolstack.Domains.Count == 0, "the end");
        Assert.That(System.Text.Encoding.ASCII.GetString(domain.Console.ReadHistory()), Is.EqualTo(Hello));
    }

    [Test]
    public async Task A_packed_kernel_in_a_disk_is_unpacked_once()
    {
        DomainConfiguration configuration = await OnDiskAsync(DiskFormat.Raw, packed: true);
        for (int i = 0; i < 2; i++)
        {
            ManagedDomain domain = await Toolstack.CreateAsync(configuration);
            await domain.Gone;
            Assert.That(System.Text.Encoding.ASCII.GetString(domain.Console.ReadHistory()), Is.EqualTo(Hello));
            string kept = "";
            await EventuallyAsync(() => Directory.GetFiles(Path.Combine(StateFolder, "kernels"), "*.elf") is [var file] && (kept = file).Length > 0, "it is kept");
            Assert.That(Path.GetFileName(kept), Does.StartWith("content-"));

            // The next is made from what was kept, or would not know what to say.
            File.SetLastWriteTimeUtc(kept, DateTime.UnixEpoch);
            if (i == 1)
                continue;
            byte[] content = await File.ReadAllBytesAsync(kept);
            byte[] packed = Gzip(Kernel());
            Assert.That(content.AsSpan(0, content.Length - packed.Length).SequenceEqual(Kernel()), Is.True);
        }
    }

    [Test]
    public async Task A_disk_that_cannot_be_booted_leaves_no_domain()
    {
        DomainConfiguration configuration = await OnDiskAsync(DiskFormat.Raw) with { Bootloader = new BootloaderConfiguration { Entry = "none" } };
        ToolstackException failure = Assert.ThrowsAsync<ToolstackException>(() => Toolstack.CreateAsync(configuration))!;
        Assert.That(failure.Message, Does.Contain(configuration.Disks[0].Target).And.Contain("no entry \"none\""));
        Assert.That(failure.Kind, Is.EqualTo(ProblemKind.BadConfiguration));
        Assert.That(Toolstack.Domains, Is.Empty);
        failure = Assert.ThrowsAsync<ToolstackException>(() => Toolstack.CheckAsync(configuration with { Disks = [configuration.Disks[0] with { Target = FileOf("none") }] }))!;
        Assert.That(failure.Message, Does.Contain("There is no file"));
    }

    private static byte[] Kernel() => TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.PowerOff, Message = Hello });

    private static byte[] Gzip(byte[] content)
    {
        using var packed = new MemoryStream();
        using (var stream = new System.IO.Compression.GZipStream(packed, System.IO.Compression.CompressionLevel.Fastest))
            stream.Write(content);
        return packed.ToArray();
    }

    private async Task<DomainConfiguration> OnDiskAsync(DiskFormat format, bool packed = false)
    {
        string tree = FileOf("tree");
        Directory.CreateDirectory(Path.Combine(tree, "boot", "grub"));
        File.WriteAllBytes(Path.Combine(tree, "boot", "kernel"), packed ? Gzip(Kernel()) : Kernel());
        File.WriteAllText(Path.Combine(tree, "boot", "grub", "grub.cfg"), "set default=1\nmenuentry a { linux /boot/none }\nmenuentry b { linux /boot/kernel root=/dev/xvda ro }\n");
        string image = FileOf("image");
        ExtImage.Make(image, tree, 1024, "-t", "ext4", "-O", "^has_journal");
        if (format == DiskFormat.Qcow2)
            image = await ConvertAsync(image);
        return new DomainConfiguration
        {
            Name = "tiny", MemoryMiB = 16, Bootloader = new BootloaderConfiguration(),
            Disks = [new DiskConfiguration { Target = image, Format = format, VirtualDevice = "xvda" }],
        };
    }

    /// <summary>Makes a qcow2 image of a raw one, and has qemu-nbd where the toolstack looks for it.</summary>
    private async Task<string> ConvertAsync(string image)
    {
        QemuUtils qemu;
        try
        {
            qemu = await QemuUtils.GetAsync(new GuestCache(GuestCache.DefaultRoot()));
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }

        (string program, IReadOnlyList<string> first) = qemu.Command("qemu-img");
        CommandResult converted = await new CommandRunner().RunAsync(new Command(program, [.. first, "convert", "-O", "qcow2", image, image + ".qcow2"]));
        Assert.That(converted.ExitCode, Is.Zero, converted.Error);
        (program, first) = qemu.Command("qemu-nbd");
        string folder = Directory.CreateDirectory(FileOf("bin")).FullName;
        string script = Path.Combine(folder, "qemu-nbd");
        await File.WriteAllTextAsync(script, $"#!/bin/sh\nexec '{program}' {string.Join(' ', first.Select(static argument => $"'{argument}'"))} \"$@\"\n");
        if (!OperatingSystem.IsWindows())
            File.SetUnixFileMode(script, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        Environment.SetEnvironmentVariable("PATH", $"{folder}:{_path}");
        return image + ".qcow2";
    }
}
