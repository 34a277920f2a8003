// Domains whose kernel is in their own disk (bootloader="pygrub").

using System.Diagnostics;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Configuration.Devices;
using XenSharp.Configuration.Tests;
using XenSharp.Guests;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class GuestDiskTests : ManagementFixture
{
    [TestCase(DiskFormat.Raw)]
    [TestCase(DiskFormat.Qcow2)]
    public async Task A_domain_boots_what_the_menu_in_its_disk_says(DiskFormat format)
    {
        DomainConfiguration configuration = OnDisk(format) with { CommandLine = "behind" };
        ManagedDomain domain = await Toolstack.CreateAsync(configuration, paused: true);
        DomainInfo info = domain.Describe();
        Assert.That((info.Kernel, info.CommandLine), Is.EqualTo(($"{configuration.Disks[0].Target}:/boot/kernel", "root=/dev/xvda ro behind")));
        domain.Unpause();
        await EventuallyAsync(() => Toolstack.Domains.Count == 0, "the end");
        Assert.That(System.Text.Encoding.ASCII.GetString(domain.Console.ReadHistory()), Is.EqualTo(Hello));
    }

    [Test]
    public void A_disk_that_cannot_be_booted_leaves_no_domain()
    {
        DomainConfiguration configuration = OnDisk(DiskFormat.Raw) with { Bootloader = new BootloaderConfiguration { Entry = "none" } };
        ToolstackException failure = Assert.ThrowsAsync<ToolstackException>(() => Toolstack.CreateAsync(configuration))!;
        Assert.That(failure.Message, Does.Contain(configuration.Disks[0].Target).And.Contain("no entry \"none\""));
        Assert.That(failure.Kind, Is.EqualTo(ProblemKind.BadConfiguration));
        Assert.That(Toolstack.Domains, Is.Empty);
        failure = Assert.ThrowsAsync<ToolstackException>(() => Toolstack.CheckAsync(configuration with { Disks = [configuration.Disks[0] with { Target = FileOf("none") }] }))!;
        Assert.That(failure.Message, Does.Contain("There is no file"));
    }

    private DomainConfiguration OnDisk(DiskFormat format)
    {
        string tree = FileOf("tree");
        Directory.CreateDirectory(Path.Combine(tree, "boot", "grub"));
        File.WriteAllBytes(Path.Combine(tree, "boot", "kernel"), TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.PowerOff, Message = Hello }));
        File.WriteAllText(Path.Combine(tree, "boot", "grub", "grub.cfg"), "set default=1\nmenuentry a { linux /boot/none }\nmenuentry b { linux /boot/kernel root=/dev/xvda ro }\n");
        string image = FileOf("image");
        ExtImage.Make(image, tree, 1024, "-t", "ext4", "-O", "^has_journal");
        if (format == DiskFormat.Qcow2)
            image = Convert(image);
        return new DomainConfiguration
        {
            Name = "tiny", MemoryMiB = 16, Bootloader = new BootloaderConfiguration(),
            Disks = [new DiskConfiguration { Target = image, Format = format, VirtualDevice = "xvda" }],
        };
    }

    private static string Convert(string image)
    {
        if (!(Environment.GetEnvironmentVariable("PATH") ?? string.Empty).Split(':').Any(static folder => File.Exists(Path.Combine(folder, "qemu-img"))))
            Assert.Ignore("There is no qemu-img here: install qemu-utils.");
        using Process program = Process.Start("qemu-img", ["convert", "-O", "qcow2", image, image + ".qcow2"]);
        Assert.That(program.WaitForExit(60_000) && program.ExitCode == 0, Is.True, "qemu-img");
        return image + ".qcow2";
    }
}
