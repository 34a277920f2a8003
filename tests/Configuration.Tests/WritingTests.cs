// Configurations that are written and read again are the same.

using CsCheck;
using XenSharp.Configuration.Devices;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.All)]
public sealed class WritingTests
{
    private static readonly Gen<DomainConfiguration> s_configurations =
        from name in Gen.Char[' ', '~'].Where(static c => c != '/').Array[1, 12]
        from commandLine in Gen.Char['\x1', '\u0250'].Array[0, 30]
        from memory in Gen.Int[4, 4096]
        from growth in Gen.Int[0, 3]
        from vcpus in Gen.Int[1, 8]
        from action in Gen.Enum<ShutdownAction>()
        from disks in Gen.Int[0, 3]
        from vifs in Gen.Int[0, 3]
        from flags in Gen.Int[0, 63]
        select new DomainConfiguration
        {
            Name = new string(name),
            Uuid = (flags & 1) != 0 ? new Guid(memory, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11) : null,
            Kernel = (flags & 2) != 0 || disks == 0 ? "/boot/vm \"linuz\"" : null,
            Ramdisk = (flags & 4) != 0 ? "/boot/initrd" : null,
            CommandLine = new string(commandLine),
            Bootloader = (flags & 2) != 0 || disks == 0 ? null : new BootloaderConfiguration { Entry = "a > b", Arguments = "ro", Offset = 512 },
            MemoryMiB = memory,
            MaxMemoryMiB = growth * memory,
            Vcpus = vcpus,
            MaxVcpus = growth * vcpus,
            Processors = (flags & 4) != 0 ? ["0-3,^1", "all"] : [],
            OnCrash = action,
            OnReboot = action,
            Disks = [.. Enumerable.Range(0, disks).Select(at => new DiskConfiguration
            {
                Target = "/a,=" + at, Format = at == 1 ? DiskFormat.Qcow2 : DiskFormat.Raw, VirtualDevice = "xvd" + (char)('a' + at), ReadOnly = at == 2,
            })],
            Vifs = [.. Enumerable.Range(0, vifs).Select(static at => new VifConfiguration
            {
                Mac = "00:16:3e:00:00:0" + at, Rate = at == 1 ? new VifRate(123, 4567) : null, Trusted = at == 2 ? true : null,
            })],
            Channels = (flags & 8) != 0 ? [new ChannelConfiguration { Name = "x.y", Connection = ChannelConnection.Socket, Path = "/run/s" }] : [],
            LocalTime = (flags & 16) != 0,
            RtcTimeOffset = memory - 2048,
            Cpuid = (flags & 32) != 0 ? [new CpuidMask(7, 0, CpuidRegister.Ebx, 1, 2, 4), new CpuidMask(0x80000001, null, CpuidRegister.Ecx, 0, 8, 0)] : [],
            MaxGrantVersion = (flags & 16) != 0 ? 1 : null,
            NoMigrate = (flags & 8) != 0,
        };

    [Test]
    public void AsAFile() => s_configurations.Sample(
        static configuration =>
        {
            string text = DomainConfigurationText.Write(configuration);
            DomainConfigurationResult result = DomainConfigurationReader.Read(text, "test", []);
            Assert.That(DomainConfigurationJson.Write(result.Configuration), Is.EqualTo(DomainConfigurationJson.Write(configuration)), text);
        },
        iter: 300);

    [Test]
    public void AsJson() => s_configurations.Sample(
        static configuration =>
        {
            string json = DomainConfigurationJson.Write(configuration);
            DomainConfiguration again = DomainConfigurationJson.Read(json, "test");
            Assert.That(DomainConfigurationText.Write(again), Is.EqualTo(DomainConfigurationText.Write(configuration)));
            Assert.That(DomainConfigurationJson.Write(again), Is.EqualTo(json));
        },
        iter: 300);

    [Test]
    public void JsonThatLeavesSomethingOutGetsXlsDefaults()
    {
        DomainConfiguration found = DomainConfigurationJson.Read("{\"name\":\"g\",\"kernel\":\"/k\",\"disks\":[{\"virtualDevice\":\"xvda\",\"cdrom\":true,\"format\":\"empty\"}]}", "test");
        Assert.That(DomainConfigurationJson.Write(found), Is.EqualTo(DomainConfigurationJson.Write(new DomainConfiguration
        {
            Name = "g", Kernel = "/k", Disks = [new DiskConfiguration { VirtualDevice = "xvda", Cdrom = true, Format = DiskFormat.Empty }],
        })));
        Assert.That(found.OnReboot, Is.EqualTo(ShutdownAction.Restart));
    }

    [Test]
    public void JsonSpeaksXlsWords()
    {
        string json = DomainConfigurationJson.Write(new DomainConfiguration
        {
            Name = "g", Kernel = "/k", OnCrash = ShutdownAction.RenameRestart, Disks = [new DiskConfiguration { Target = "/d", VirtualDevice = "xvda" }],
        });
        Assert.That(json, Does.Contain("\"onCrash\": \"rename-restart\"").And.Contain("\"virtualDevice\": \"xvda\"").And.Contain("\"format\": \"raw\""));
    }

    [TestCase("{", "$")]
    [TestCase("null", "null")]
    [TestCase("{}", "name")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"frob\":1}", "frob")]
    [TestCase("{\"name\":null,\"kernel\":\"/k\"}", "name")]
    [TestCase("{\"name\":\"g\"}", "neither a kernel nor a bootloader")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"memoryMiB\":1}", "too little")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"onCrash\":\"explode\"}", "onCrash")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"onCrash\":1}", "onCrash")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"disks\":null}", "disks")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"disks\":[null]}", "disk: There is nothing")]
    [TestCase("{\"name\":\"g\",\"kernel\":\"/k\",\"disks\":[{\"virtualDevice\":\"nvme\",\"target\":\"x\"}]}", "no device of a guest")]
    public void BadJsonIsRefused(string json, string part)
        => Assert.That(Assert.Throws<ConfigurationException>(() => DomainConfigurationJson.Read(json, "test"))!.Message, Does.Contain(part));

    [Test]
    public void EveryKeyOfXlIsKnown()
    {
        string[] keys = ["vnuma", "usbctrl", "p9", "e820_host", "spiceagent_mouse", "device_model_args_hvm", "mca_caps", "tee", "vsnd", "max_maptrack_frames", "vncviewer", "hdtype"];
        Assert.That(keys.Where(static key => !KnownSettings.Used.Contains(key) && KnownSettings.FateOf(key) is null), Is.Empty);
        Assert.That(KnownSettings.Used.Where(static key => KnownSettings.FateOf(key) is not null), Is.Empty);
    }
}
