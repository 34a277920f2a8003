// Which kernel a disk says is to be booted: menus of all kinds, in file systems that mke2fs made.

using System.Buffers.Binary;
using System.Text;
using XenSharp.Configuration.Boot;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.Children)]
[CancelAfter(120_000)]
public sealed class BootMenuTests
{
    private const int Kibibytes = 1024;
    private const string RootUuid = "0b1c5f3e-7a10-4c8f-9a57-2f1d3f6c8a11";
    private const string BootUuid = "7e6d5c4b-3a29-4817-8655-443322110000";

    /// <summary>The shape of what grub-mkconfig writes: an environment block, a function, an entry, and a submenu with more of them.</summary>
    private const string Grub = """
        # made for a test
        if [ -s $prefix/grubenv ]; then
          set have_grubenv=true
          load_env
        fi
        wanted="${next_entry}"
        if [ "${wanted}" ] ; then
           set default="${wanted}"
        else
           set default="DEFAULT"
        fi
        if [ x"${feature_menuentry_id}" = xy ]; then
          menuentry_id_option="--id"
        else
          menuentry_id_option=""
        fi
        export menuentry_id_option
        function load_video {
          if [ x$grub_platform = xefi ]; then insmod efi_gop; else insmod all_video; fi
        }
        if loadfont unicode ; then
          set gfxmode=auto
        fi
        for x in a b; do echo $x; done
        set linux_gfx_mode=keep
        menuentry 'Linux' --class gnu --class os $menuentry_id_option 'simple' {
        	load_video
        	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
        	search --no-floppy --fs-uuid --set=root UUID
        	echo	'Loading …'
        	linux	BOOT/vmlinuz-6.1.0-18-amd64 root=UUID=0b1c5f3e ro  quiet "a b" $undefined
        	initrd	BOOT/initrd.img-6.1.0-18-amd64
        }
        submenu 'Advanced options' $menuentry_id_option 'advanced' {
        	menuentry 'Linux 6.1.0-18' $menuentry_id_option 'adv-18' {
        		linux	BOOT/vmlinuz-6.1.0-18-amd64 \
        			root=/dev/xvda1 ro
        		initrd	BOOT/initrd.img-6.1.0-18-amd64
        	}
        	menuentry 'Linux 6.1.0-9 (recovery mode)' $menuentry_id_option 'adv-9' {
        		linux	BOOT/vmlinuz-6.1.0-9-amd64 root=/dev/xvda1 ro single
        		initrd	BOOT/initrd.img-6.1.0-9-amd64 BOOT/more
        	}
        }
        menuentry 'Memory test' { linux16 BOOT/memtest }
        """;

    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-menu-test-").FullName;

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("0", null, "Linux", "-18", "root=UUID=0b1c5f3e ro quiet a b")]
    [TestCase("simple", null, "Linux", "-18", "root=UUID=0b1c5f3e ro quiet a b")]
    [TestCase("1", null, "Linux 6.1.0-18", "-18", "root=/dev/xvda1 ro")]
    [TestCase("1>1", null, "Linux 6.1.0-9 (recovery mode)", "-9", "root=/dev/xvda1 ro single")]
    [TestCase("advanced>adv-9", null, "Linux 6.1.0-9 (recovery mode)", "-9", "root=/dev/xvda1 ro single")]
    [TestCase("Advanced options>Linux 6.1.0-9 (recovery mode)", null, "Linux 6.1.0-9 (recovery mode)", "-9", "root=/dev/xvda1 ro single")]
    [TestCase("nothing of that name", null, "Linux", "-18", "root=UUID=0b1c5f3e ro quiet a b")]
    [TestCase("${saved_entry}", "saved_entry=advanced>adv-9", "Linux 6.1.0-9 (recovery mode)", "-9", "root=/dev/xvda1 ro single")]
    [TestCase("0", "next_entry=adv-9\nsaved_entry=x", "Linux", "-18", "root=UUID=0b1c5f3e ro quiet a b")]
    [TestCase("0", "next_entry=1>1", "Linux 6.1.0-9 (recovery mode)", "-9", "root=/dev/xvda1 ro single")]
    public void GrubBootsWhatItsDefaultNames(string preset, string? environment, string title, string version, string commandLine)
    {
        Dictionary<string, string> files = DebianFiles("/boot", Grub.Replace("DEFAULT", preset, StringComparison.Ordinal));
        if (environment is not null)
            files["/boot/grub/grubenv"] = $"# GRUB Environment Block\n{environment}\n{new string('#', 900)}";
        GuestBoot boot = Load(WholeDisk(files), new BootloaderConfiguration());
        Assert.Multiple(() =>
        {
            Assert.That(boot.Title, Is.EqualTo(title));
            Assert.That(boot.KernelPath, Is.EqualTo($"/boot/vmlinuz-6.1.0{version}-amd64"));
            Assert.That(Encoding.UTF8.GetString(boot.Kernel), Is.EqualTo($"kernel{version}"));
            Assert.That(Encoding.UTF8.GetString(boot.Ramdisk), Does.StartWith($"ramdisk{version}"));
            Assert.That(boot.CommandLine, Is.EqualTo(commandLine));
            Assert.That(boot.Notes, Is.Empty);
        });
    }

    [TestCase("0", "Linux")]
    [TestCase("2", "Linux 6.1.0-9 (recovery mode)")]
    [TestCase("adv-18", "Linux 6.1.0-18")]
    [TestCase("Linux 6.1.0-9 (recovery mode)", "Linux 6.1.0-9 (recovery mode)")]
    public void AnEntryIsChosenAsWithPygrub(string entry, string title)
    {
        string disk = WholeDisk(DebianFiles("/boot", Grub));
        Assert.That(Load(disk, new BootloaderConfiguration { Entry = entry }).Title, Is.EqualTo(title));
        Assert.That(Failure(disk, new BootloaderConfiguration { Entry = "9" }), Does.Contain("no entry \"9\"").And.Contain("1 \"Linux 6.1.0-18\""));
    }

    [Test]
    public void RamdisksAreJoinedAndCommandLinesToo()
    {
        GuestBoot boot = Load(WholeDisk(DebianFiles("/boot", Grub)), new BootloaderConfiguration { Entry = "2", Arguments = "verbose" }, "console=hvc0");
        Assert.That(boot.CommandLine, Is.EqualTo("root=/dev/xvda1 ro single verbose console=hvc0"));
        Assert.That(boot.RamdiskPaths, Is.EqualTo(new[] { "/boot/initrd.img-6.1.0-9-amd64", "/boot/more" }));
        Assert.That(boot.Ramdisk, Is.EqualTo("ramdisk-9\0\0\0more"u8.ToArray()));
    }

    [Test]
    public void AKernelCanBeNamed()
    {
        string disk = WholeDisk(DebianFiles("/boot", Grub));
        GuestBoot boot = Load(disk, new BootloaderConfiguration { Kernel = "/boot/vmlinuz-6.1.0-9-amd64", Ramdisk = "/boot/more" }, "root=/dev/xvda1");
        Assert.That((Encoding.UTF8.GetString(boot.Kernel), Encoding.UTF8.GetString(boot.Ramdisk), boot.CommandLine), Is.EqualTo(("kernel-9", "more", "root=/dev/xvda1")));
        Assert.That(Failure(disk, new BootloaderConfiguration { Kernel = "/boot/none" }), Does.Contain("There is no file /boot/none in the disk. It has: the disk: ext4."));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void ASeparateBootPartitionIsFound(bool gpt)
    {
        string boot = FileSystem(DebianFiles(string.Empty, Grub.Replace("UUID", BootUuid, StringComparison.Ordinal)), "-U", BootUuid);
        string root = FileSystem(new() { ["/etc/fstab"] = "x" }, "-U", RootUuid);
        GuestBoot found = Load(Disk(gpt, root, boot), new BootloaderConfiguration());
        Assert.That((found.KernelPath, Encoding.UTF8.GetString(found.Kernel)), Is.EqualTo(("/vmlinuz-6.1.0-18-amd64", "kernel-18")));
    }

    [Test]
    public void TheKernelCanBeOnAnotherPartitionThanTheMenu()
    {
        // The menu's own partition has a file of that path as well: search says which it is.
        string menu = FileSystem(
            new()
            {
                ["/boot/grub/grub.cfg"] = $"search --set=root --fs-uuid {RootUuid}\nmenuentry x {{ linux /vmlinuz a }}\nmenuentry y {{ linux (hd0,msdos3)/vmlinuz b }}\n"
                    + "menuentry z { search --label there --set here; linux ($here)/vmlinuz c }",
                ["/vmlinuz"] = "wrong",
            });
        string uuid = FileSystem(new() { ["/vmlinuz"] = "by uuid" }, "-U", RootUuid);
        string number = FileSystem(new() { ["/vmlinuz"] = "by number" }, "-L", "there");
        string disk = Disk(false, menu, uuid, number);
        Assert.That(Encoding.UTF8.GetString(Load(disk, new BootloaderConfiguration()).Kernel), Is.EqualTo("by uuid"));
        Assert.That(Encoding.UTF8.GetString(Load(disk, new BootloaderConfiguration { Entry = "y" }).Kernel), Is.EqualTo("by number"));
    }

    [Test]
    public void LogicalPartitionsAreFound()
    {
        string swap = Path.Combine(_folder, Guid.NewGuid().ToString());
        File.WriteAllBytes(swap, [.. new byte[4086], .. "SWAPSPACE2"u8, .. new byte[4096]]);
        string root = FileSystem(DebianFiles("/boot", Grub));
        Assert.That(Load(DiskWithLogical(swap, root), new BootloaderConfiguration()).Title, Is.EqualTo("Linux"));
    }

    [Test]
    public void AnOffsetIsTakenAtItsWord()
    {
        string disk = Disk(false, FileSystem(new() { ["/x"] = "x" }), FileSystem(DebianFiles("/boot", Grub)));
        Assert.That(Load(disk, new BootloaderConfiguration { Offset = (1 << 20) + (Kibibytes << 10) }).Title, Is.EqualTo("Linux"));
        Assert.That(Failure(disk, new BootloaderConfiguration { Offset = 1 << 20 }), Does.Contain("neither a boot menu"));
        Assert.That(Failure(disk, new BootloaderConfiguration { Offset = 12345 }), Does.Contain("no ext2, ext3 or ext4 file system"));
        Assert.That(Failure(disk, new BootloaderConfiguration { Offset = long.MaxValue - 5 }), Does.Contain("no ext2"));
    }

    [Test]
    public void OldMenusOfGrubAreRead()
    {
        // The shape of an EC2 image's for pv-grub, with a dom0's entry before it.
        GuestBoot boot = Load(
            WholeDisk(new()
            {
                ["/boot/grub/menu.lst"] = "default=1\ntimeout 0\n# title no entry\ntitle Xen\n root (hd0)\n kernel /boot/xen.gz\n module /boot/k\n\n"
                    + "title Amazon Linux (5.10)\nroot (hd0,0)\nkernel (hd0)/boot/k root=LABEL=/ console=hvc0\ninitrd /boot/i\n",
                ["/boot/k"] = "kernel",
                ["/boot/i"] = "ramdisk",
            }),
            new BootloaderConfiguration());
        Assert.That((boot.Title, boot.CommandLine, boot.KernelPath), Is.EqualTo(("Amazon Linux (5.10)", "root=LABEL=/ console=hvc0", "/boot/k")));
        Assert.That(Encoding.UTF8.GetString(boot.Ramdisk), Is.EqualTo("ramdisk"));
    }

    [Test]
    public void MenusOfExtlinuxAreRead()
    {
        string menu = "DEFAULT menu.c32\nTIMEOUT 10\nLABEL old\n  MENU LABEL Old\n  LINUX /boot/old\nLABEL grsec\n  MENU DEFAULT\n  MENU LABEL ^Linux grsec\n"
            + "  LINUX ../k\n  INITRD ../i\n  APPEND root=UUID=1 modules=ext4\nLABEL third\n  KERNEL /boot/k\n  APPEND initrd=/boot/i,/boot/old quiet\n";
        string disk = WholeDisk(new() { ["/boot/extlinux/extlinux.conf"] = menu, ["/boot/k"] = "kernel", ["/boot/i"] = "ramdisk", ["/boot/old"] = "old" });
        GuestBoot boot = Load(disk, new BootloaderConfiguration());
        Assert.That((boot.Title, boot.CommandLine, Encoding.UTF8.GetString(boot.Kernel)), Is.EqualTo(("Linux grsec", "root=UUID=1 modules=ext4", "kernel")));
        boot = Load(disk, new BootloaderConfiguration { Entry = "third" });
        Assert.That((boot.CommandLine, Encoding.UTF8.GetString(boot.Ramdisk)), Is.EqualTo(("quiet", "ramdisk\0old")));
    }

    [Test]
    public void EntriesOfTheBootLoaderSpecificationAreRead()
    {
        GuestBoot boot = Load(
            WholeDisk(new()
            {
                ["/grub2/grub.cfg"] = "set default=\"${saved_entry}\"\nload_env -f ${config_directory}/grubenv saved_entry kernelopts\ninsmod blscfg\nblscfg\n",
                ["/grub2/grubenv"] = "# GRUB Environment Block\nkernelopts=root=/dev/xvda2 ro\n",
                ["/loader/entries/m-5.14.0-9.el9.conf"] = "title Linux (5.14.0-9)\nversion 5.14.0-9\nlinux /old\n",
                ["/loader/entries/m-5.14.0-70.el9.conf"] = "title Linux (5.14.0-70)\nlinux /new\ninitrd /i $tuned_initrd\noptions $kernelopts crashkernel=1G\n",
                ["/new"] = "new", ["/old"] = "old", ["/i"] = "i",
            }),
            new BootloaderConfiguration());
        Assert.That((boot.Title, boot.CommandLine, Encoding.UTF8.GetString(boot.Kernel)), Is.EqualTo(("Linux (5.14.0-70)", "root=/dev/xvda2 ro crashkernel=1G", "new")));
    }

    [Test]
    public void WithoutAMenuTheNewestKernelIsBooted()
    {
        Dictionary<string, string> files = DebianFiles("/boot", "menuentry broken {");
        files["/boot/vmlinuz-6.1.0-100~rc1-amd64"] = "newest";
        GuestBoot boot = Load(WholeDisk(files), new BootloaderConfiguration(), "root=/dev/xvda ro");
        Assert.That((Encoding.UTF8.GetString(boot.Kernel), boot.Ramdisk.Length, boot.CommandLine), Is.EqualTo(("newest", 0, "root=/dev/xvda ro")));
        Assert.That(boot.Notes, Has.Some.Contains("cannot be used").And.Some.Contains("its newest kernel"));
        files.Remove("/boot/vmlinuz-6.1.0-100~rc1-amd64");
        Assert.That(Encoding.UTF8.GetString(Load(WholeDisk(files), new BootloaderConfiguration()).Ramdisk), Is.EqualTo("ramdisk-18"));
    }

    [Test]
    public void WhatCannotBeBootedIsSaid()
    {
        string xfs = Path.Combine(_folder, Guid.NewGuid().ToString());
        File.WriteAllBytes(xfs, [.. "XFSB"u8, .. new byte[1 << 17]]);
        string empty = Path.Combine(_folder, Guid.NewGuid().ToString());
        File.WriteAllBytes(empty, []);
        Assert.Multiple(() =>
        {
            Assert.That(Failure(xfs, new BootloaderConfiguration()), Does.Contain("the disk: XFS, which cannot be read here"));
            Assert.That(Failure(Disk(false, xfs, FileSystem([])), new BootloaderConfiguration()), Does.Contain("It has: partition 2: ext4; partition 1: XFS"));
            Assert.That(Failure(empty, new BootloaderConfiguration()), Does.Contain("The disk ends at byte 0"));
            Assert.That(Failure(WholeDisk(new() { ["/boot/grub/grub.cfg"] = "menuentry x { chainloader +1 }" }), new BootloaderConfiguration()), Does.Contain("has no entry with a Linux kernel"));
            Assert.That(Failure(WholeDisk(new() { ["/boot/grub/grub.cfg"] = "menuentry x { linux /none }" }), new BootloaderConfiguration()), Does.Contain("There is no file /none"));
            Assert.That(Failure(WholeDisk([]), new BootloaderConfiguration { Entry = "1" }), Does.Contain("no boot menu to take the entry \"1\" from"));
            Assert.That(Assert.Throws<BootException>(() => _ = new RawImageReader(_folder + "/none"))!.Message, Does.Contain("There is no file"));
            Assert.That(Assert.Throws<BootException>(() => _ = new RawImageReader(_folder))!.Message, Does.Contain("is a folder"));
        });
    }

    [TestCase("function f { f; }\nf")]
    [TestCase("function f { g; g; g; g; g; }\nfunction g { h; h; h; h; h; h; h; h; }\nfunction h { i; i; i; i; i; i; i; i; i; i; }\nfunction i { j; j; j; j; j; j; j; j; j; }\n"
        + "function j { k; k; k; k; k; k; k; k; k; k; k; k; k; }\nfunction k { true; true; true; true; true; true; true; true; }\nf; f; f; f; f; f; f; f; f; f; f; f; f; f; f")]
    [TestCase("set a=aaaaaaaaaa\nfunction f { set a=\"$a$a\"; }\nf; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f; f")]
    [TestCase("source /boot/grub/grub.cfg")]
    [TestCase("if true; then if true; then")]
    [TestCase("}}}{{{ ] fi done else 'x")]
    [TestCase("menuentry x { menuentry y { linux /k }")]
    [TestCase("\"\\")]
    [TestCase("${")]
    public void HostileMenusEndWithASentence(string menu)
    {
        string failure = Failure(WholeDisk(new() { ["/boot/grub/grub.cfg"] = menu }), new BootloaderConfiguration());
        Assert.That(failure, Does.Contain("cannot be used").Or.Contain("no entry with a Linux kernel"));
    }

    [Test]
    public void DeepNestingDoesNotOverflowTheStack()
    {
        string nested = string.Concat(Enumerable.Repeat("if true; then ", 50_000));
        Assert.That(Failure(WholeDisk(new() { ["/boot/grub/grub.cfg"] = nested }), new BootloaderConfiguration()), Does.Contain("nested too deeply"));
    }

    [TestCase("6.1.0-18", "6.1.0-9")]
    [TestCase("6.1.0", "6.1.0~rc1")]
    [TestCase("6.10", "6.9.9")]
    [TestCase("6.1.1", "6.1")]
    [TestCase("6.01.2", "6.1.1")]
    [TestCase("5.10-b", "5.10-a")]
    public void NewerVersionsAreTold(string newer, string older)
    {
        Assert.That(VersionOrder.Instance.Compare(newer, older), Is.Positive);
        Assert.That(VersionOrder.Instance.Compare(older, newer), Is.Negative);
        Assert.That(VersionOrder.Instance.Compare(newer, newer), Is.Zero);
    }

    private static Dictionary<string, string> DebianFiles(string boot, string menu) => new()
    {
        [$"{boot}/grub/grub.cfg"] = menu.Replace("BOOT", boot, StringComparison.Ordinal),
        [$"{boot}/vmlinuz-6.1.0-18-amd64"] = "kernel-18",
        [$"{boot}/vmlinuz-6.1.0-9-amd64"] = "kernel-9",
        [$"{boot}/initrd.img-6.1.0-18-amd64"] = "ramdisk-18",
        [$"{boot}/initrd.img-6.1.0-9-amd64"] = "ramdisk-9",
        [$"{boot}/more"] = "more",
    };

    private static GuestBoot Load(string disk, BootloaderConfiguration configuration, string commandLine = "")
    {
        using var image = new RawImageReader(disk);
        return GuestBootLoader.Load(image, configuration, commandLine);
    }

    private static string Failure(string disk, BootloaderConfiguration configuration) => Assert.Throws<BootException>(() => Load(disk, configuration))!.Message;

    private string WholeDisk(Dictionary<string, string> files) => FileSystem(files);

    private string FileSystem(Dictionary<string, string> files, params string[] options)
    {
        string tree = Path.Combine(_folder, Guid.NewGuid().ToString());
        Directory.CreateDirectory(tree);
        foreach ((string path, string content) in files)
        {
            string file = tree + path;
            Directory.CreateDirectory(Path.GetDirectoryName(file)!);
            File.WriteAllText(file, content);
        }

        string image = tree + ".img";
        ExtImage.Make(image, tree, Kibibytes, ["-t", "ext4", "-O", "^has_journal", .. options]);
        return image;
    }

    /// <summary>A disk with a partition for each image, from the first MiB on.</summary>
    private string Disk(bool gpt, params string[] images)
    {
        string path = Path.Combine(_folder, Guid.NewGuid().ToString());
        using FileStream disk = File.Create(path);
        byte[] table = new byte[1 << 20];
        table[510] = 0x55;
        table[511] = 0xaa;
        if (gpt)
        {
            MbrEntry(table, 0, 0xee, 1, uint.MaxValue);
            "EFI PART"u8.CopyTo(table.AsSpan(512));
            BinaryPrimitives.WriteUInt64LittleEndian(table.AsSpan(512 + 72), 2);
            BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(512 + 80), 128);
            BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(512 + 84), 128);
        }

        uint at = 2048;
        disk.Position = at * 512;
        for (int number = 0; number < images.Length; number++)
        {
            byte[] content = File.ReadAllBytes(images[number]);
            uint sectors = (uint)(content.Length + 511) / 512;
            if (gpt)
            {
                Span<byte> entry = table.AsSpan(1024 + (number * 128), 128);
                entry[0] = 1;
                BinaryPrimitives.WriteUInt64LittleEndian(entry[32..], at);
                BinaryPrimitives.WriteUInt64LittleEndian(entry[40..], at + sectors - 1);
            }
            else
            {
                MbrEntry(table, number, 0x83, at, sectors);
            }

            disk.Position = at * 512L;
            disk.Write(content);
            at += sectors;
        }

        disk.Position = 0;
        disk.Write(table);
        return path;
    }

    /// <summary>A disk with an extended partition that has a logical one for each image.</summary>
    private string DiskWithLogical(params string[] images)
    {
        string path = Path.Combine(_folder, Guid.NewGuid().ToString());
        using FileStream disk = File.Create(path);
        byte[] table = new byte[512];
        table[510] = 0x55;
        table[511] = 0xaa;
        const uint Extended = 2048;
        MbrEntry(table, 0, 0x05, Extended, 1 << 20);
        disk.Write(table);
        uint record = Extended;
        for (int number = 0; number < images.Length; number++)
        {
            byte[] content = File.ReadAllBytes(images[number]);
            uint sectors = (uint)(content.Length + 511) / 512;
            table.AsSpan(0, 510).Clear();
            MbrEntry(table, 0, 0x83, 63, sectors);

            // The last record points back to the first: a circle, as damage or malice makes one.
            uint next = number + 1 < images.Length ? record + 63 + sectors : Extended;
            MbrEntry(table, 1, 0x05, Math.Max(1, next - Extended), 63 + sectors);
            disk.Position = record * 512L;
            disk.Write(table);
            disk.Position = (record + 63) * 512L;
            disk.Write(content);
            record = next;
        }

        return path;
    }

    private static void MbrEntry(byte[] table, int number, byte type, uint start, uint sectors)
    {
        Span<byte> entry = table.AsSpan(446 + (number * 16), 16);
        entry[4] = type;
        BinaryPrimitives.WriteUInt32LittleEndian(entry[8..], start);
        BinaryPrimitives.WriteUInt32LittleEndian(entry[12..], sectors);
    }
}
