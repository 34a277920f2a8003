// From files to configurations: defaults, combinations, warnings and errors.

using XenSharp.Configuration.Devices;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.All)]
public sealed class ReaderTests
{
    private const string Least = "name='g'\nkernel='/k'\nmemory=64\n";

    [Test]
    public void TheLeastFileGetsXlsDefaults()
    {
        DomainConfigurationResult result = Read(Least);
        Assert.That(result.Warnings, Is.Empty);
        DomainConfiguration configuration = result.Configuration;
        Assert.Multiple(() =>
        {
            Assert.That(configuration.Name, Is.EqualTo("g"));
            Assert.That(configuration.Kernel, Is.EqualTo("/k"));
            Assert.That(configuration.Uuid, Is.Null);
            Assert.That((configuration.MemoryMiB, configuration.GreatestMemoryMiB), Is.EqualTo((64, 64)));
            Assert.That((configuration.Vcpus, configuration.VcpuCount), Is.EqualTo((1, 1)));
            Assert.That(configuration.OnPoweroff, Is.EqualTo(ShutdownAction.Destroy));
            Assert.That(configuration.OnReboot, Is.EqualTo(ShutdownAction.Restart));
            Assert.That(configuration.OnCrash, Is.EqualTo(ShutdownAction.Destroy));
            Assert.That(configuration.OnWatchdog, Is.EqualTo(ShutdownAction.Destroy));
            Assert.That(configuration.MaxEventChannels, Is.EqualTo(1023));
            Assert.That(configuration.CommandLine, Is.Empty);
        });
    }

    [Test]
    public void ARealFileIsRead()
    {
        DomainConfigurationResult result = Read("""
            # A Debian domU as xen-create-image writes one.
            bootloader = 'pygrub'
            vcpus       = '2'
            maxvcpus = 4
            memory      = '0x200'
            maxmem = 1024
            root        = '/dev/xvda2 ro'
            extra = 'elevator=noop'
            disk        = [
                              'phy:/dev/vg0/lenny-disk,xvda2,w',
                              'phy:/dev/vg0/lenny-swap,xvda1,w',
                          ]
            name        = 'lenny'
            uuid = "550e8400-e29b-41d4-a716-446655440000"
            vif         = [ 'ip=10.0.0.5,mac=00:16:3E:12:16:19,bridge=br1', '' ]
            channel = [ "connection=pty, name = org.x.agent " ]
            on_poweroff = 'destroy'
            on_reboot   = 'rename-restart'
            on_crash    = 'coredump-destroy'
            localtime = 1
            rtc_timeoffset = "-3600"
            """);
        DomainConfiguration found = result.Configuration;
        Assert.Multiple(() =>
        {
            Assert.That(result.Warnings, Is.Empty);
            Assert.That(found.Bootloader, Is.EqualTo(new BootloaderConfiguration()));
            Assert.That((found.Vcpus, found.MaxVcpus, found.MemoryMiB, found.MaxMemoryMiB), Is.EqualTo((2, 4, 512, 1024)));
            Assert.That(found.CommandLine, Is.EqualTo("root=/dev/xvda2 ro elevator=noop"));
            Assert.That(found.Uuid, Is.EqualTo(Guid.Parse("550e8400-e29b-41d4-a716-446655440000")));
            Assert.That(found.Disks.Select(static disk => (disk.Target, disk.VirtualDevice, disk.ReadOnly)),
                Is.EqualTo(new[] { ("/dev/vg0/lenny-disk", "xvda2", false), ("/dev/vg0/lenny-swap", "xvda1", false) }));
            Assert.That(found.Vifs, Is.EqualTo(new[]
            {
                new VifConfiguration { Ip = "10.0.0.5", Mac = "00:16:3e:12:16:19", Bridge = "br1" }, new VifConfiguration(),
            }));
            Assert.That(found.Channels, Is.EqualTo(new[] { new ChannelConfiguration { Name = "org.x.agent", Connection = ChannelConnection.Pty } }));
            Assert.That((found.OnReboot, found.OnCrash), Is.EqualTo((ShutdownAction.RenameRestart, ShutdownAction.CoredumpDestroy)));
            Assert.That((found.LocalTime, found.RtcTimeOffset), Is.EqualTo((true, -3600)));
        });
    }

    [TestCase("", "")]
    [TestCase("cmdline='a b'", "a b")]
    [TestCase("root='/dev/xvda1'", "root=/dev/xvda1")]
    [TestCase("extra='quiet'", "quiet")]
    [TestCase("root='/dev/xvda1'; extra='quiet'", "root=/dev/xvda1 quiet")]
    [TestCase("extra='quiet'; extra+=' ro'", "quiet ro")]
    [TestCase("cmdline='a'; root='/dev/xvda1'", "a")]
    public void CommandLinesAreCombinedAsXlDoes(string text, string expected) => Assert.That(Read(Least + text).Configuration.CommandLine, Is.EqualTo(expected));

    [Test]
    public void SettingsBesideTheFileOverrideIt()
    {
        DomainConfiguration found = DomainConfigurationReader.Read(Least, "file", ["memory=128", "name=\"x\"; vcpus=2", "extra+='debug'"]).Configuration;
        Assert.That((found.Name, found.MemoryMiB, found.Vcpus, found.CommandLine), Is.EqualTo(("x", 128, 2, "debug")));
        ConfigurationMessage error = Assert.Throws<ConfigurationException>(() => DomainConfigurationReader.Read(Least, "file", ["memory=lots"]))!.Errors.Single();
        Assert.That((error.Source, error.Line, error.Column), Is.EqualTo(("command line", 1, 8)));
    }

    [TestCase("memory=512; maxmem=256", "maxmem", "maxmem=256 is less than the 512 MiB")]
    [TestCase("memory=3", "memory", "too little")]
    [TestCase("memory=0", "memory", "from 1 to")]
    [TestCase("memory='much'", "memory", "\"much\" is none")]
    [TestCase("memory=[ 1 ]", "memory", "is one value; here is a list")]
    [TestCase("memory=1; memory+=2", "memory", "assign it with =")]
    [TestCase("memory=99999999999999999999", "memory", "is none")]
    [TestCase("memory=09", "memory", "is none")]
    [TestCase("vcpus=4; maxvcpus=2", "maxvcpus", "less than vcpus=4")]
    [TestCase("vcpus=129", "vcpus", "from 1 to 128")]
    [TestCase("localtime='yes'", "localtime", "is 0 or 1")]
    [TestCase("type='hvm'", "type", "XenSharp runs PV guests")]
    [TestCase("type='pvh'", "type", "XenSharp runs PV guests")]
    [TestCase("type='x'", "type", "no type")]
    [TestCase("builder='hvm'", "builder", "HVM guest")]
    [TestCase("type='pv'; builder='hvm'", "builder", "contradict")]
    [TestCase("builder='linux'", "builder", "no builder")]
    [TestCase("uuid='123'", "uuid", "no UUID")]
    [TestCase("firmware='pvgrub64'", "firmware", "Both kernel and firmware")]
    [TestCase("bootloader='/usr/bin/eliloader'", "bootloader", "cannot be run here")]
    [TestCase("bootloader='pygrub'", "bootloader", "in the first disk, and there is none")]
    [TestCase("bootloader='pygrub'; bootloader_args=['--frob']", "bootloader_args", "no option --frob")]
    [TestCase("bootloader='pygrub'; bootloader_args='--entry'", "bootloader_args", "takes a value")]
    [TestCase("on_crash='explode'", "on_crash", "\"explode\" is none of them")]
    [TestCase("name=''", "name", "printable ASCII characters")]
    [TestCase("name='a/b'", "name", "printable ASCII characters")]
    [TestCase("disk='/x,raw,xvda'", "disk", "is a list")]
    [TestCase("disk=[['/x,raw,xvda']]", "disk", "is a list of texts")]
    [TestCase("disk=['/x,raw,xvda','/y,raw,d0p0']", "disk", "Two disks are d0p0, which is xvda")]
    [TestCase("disk=['/x,raw,nvme0']", "disk", "no device of a guest")]
    [TestCase("vif=['mac=00:16:3e:00:00:01','mac=00:16:3E:0:0:1']", "vif", "Two network interfaces have the address")]
    [TestCase("vif=['devid=1','devid=1']", "vif", "have the devid 1")]
    [TestCase("vif=['mac=01:16:3e:00:00:01']", "vif", "of which the first is even")]
    [TestCase("channel=['connection=pty']", "channel", "add name=NAME")]
    [TestCase("channel=['name=a,connection=pipe']", "channel", "\"pipe\" is neither")]
    [TestCase("channel=['name=a,connection=socket,path=rel']", "channel", "absolute path")]
    [TestCase("channel=['name=a,connection=pty','name=a,connection=pty']", "channel", "Two channels")]
    [TestCase("pci=['01:00.0']", "pci", "not passed through")]
    [TestCase("p9=['tag=a,path=/x,security_model=none']", "p9", "no back end")]
    [TestCase("cpuid='tm=0'", "cpuid", "begins with host")]
    [TestCase("cpuid='host,frob=0'", "cpuid", "no CPUID feature")]
    [TestCase("cpuid=['1:ecx=01']", "cpuid", "has 2")]
    [TestCase("max_event_channels=131072", "max_event_channels", "from 1 to 131071")]
    [TestCase("max_grant_version=3", "max_grant_version", "from 1 to 2")]
    public void SaysWhatIsWrongAtItsPlace(string text, string key, string part)
    {
        string file = Least + "\n" + text;
        ConfigurationMessage error = Assert.Throws<ConfigurationException>(() => Read(file))!.Errors.Single();
        Assert.That(error.Text, Does.Contain(part));
        Assert.That((error.Source, error.Line), Is.EqualTo(("test", 5)));
        Assert.That(error.Column, Is.GreaterThan(text.LastIndexOf(key, StringComparison.Ordinal)));
    }

    [Test]
    public void EverythingThatIsWrongIsSaidAtOnce()
    {
        ConfigurationException failure = Assert.Throws<ConfigurationException>(() => Read("memory='x'\ntype='hvm'\non_crash='y'\npci=['z']\nuuid='1'"))!;
        Assert.That(failure.Errors.Select(static error => error.Line), Is.EqualTo(new[] { 0, 1, 2, 3, 4, 5 }));
        Assert.That(failure.Errors[0].Text, Does.Contain("no name"));
        Assert.That(failure.Message.Split('\n'), Has.Length.EqualTo(6));
    }

    [Test]
    public void AKernelOrABootloaderIsNeeded()
        => Assert.That(Assert.Throws<ConfigurationException>(() => Read("name='g'; memory=64"))!.Message, Does.Contain("neither a kernel nor a bootloader"));

    [TestCase("hap=1", "hap has no effect: it is for HVM guests")]
    [TestCase("vfb=['type=vnc,vncunused=1']", "vfb has no effect: there is no paravirtual framebuffer")]
    [TestCase("cpus_soft='0-3,^1'", "cpus_soft has no effect: vCPUs are threads")]
    [TestCase("frobnicate=1", "xl.cfg(5) has no setting frobnicate; it is ignored")]
    [TestCase("on_soft_reset='soft-reset'", "cannot be done to a PV guest")]
    [TestCase("cmdline='a'; extra='b'", "no effect beside cmdline")]
    [TestCase("disk=['sda.img,raw,xvda']", "is taken as /dev/sda.img")]
    [TestCase("vif=['model=e1000']", "model=e1000 is about emulated devices")]
    [TestCase("vif=['script=vif-nat']", "Scripts (vif-nat) are not run")]
    [TestCase("cpuid='host,rdcl-no=1'", "shown by an MSR")]
    [TestCase("bootloader_args=['-q']", "no effect without bootloader")]
    [TestCase("name='7'", "is a number")]
    public void SaysWhatHasNoEffect(string text, string part)
    {
        ConfigurationMessage warning = Read(Least + text).Warnings.Single();
        Assert.That(warning.Text, Does.Contain(part));
        Assert.That(warning.Line, Is.EqualTo(4));
    }

    [TestCase("vfb=[]")]
    [TestCase("pci=[]")]
    [TestCase("disk=[]; vif=[]")]
    public void AnEmptyListAsksForNothing(string text) => Assert.That(Read(Least + text).Warnings, Is.Empty);

    [Test]
    public void ADomainWithoutMemoryGetsTheDefaultAndAWord()
    {
        DomainConfigurationResult result = Read("name='g'; kernel='/k'");
        Assert.That(result.Configuration.MemoryMiB, Is.EqualTo(DomainConfiguration.DefaultMemoryMiB));
        Assert.That(result.Warnings.Single().Text, Does.Contain("memory is not given"));
        Assert.That(Read("name='g'; kernel='/k'; maxmem=256").Configuration.MemoryMiB, Is.EqualTo(256));
    }

    [Test]
    public void BootloaderArgumentsAreUnderstood()
    {
        DomainConfigurationResult result = Read(
            "name='g'; memory=64; disk=['/x,raw,xvda']; bootloader='/usr/lib/xen/bin/pygrub'; bootloader_args=['-q','--entry=2','--args','single','--offset=1048576','-i']");
        Assert.That(result.Configuration.Bootloader, Is.EqualTo(new BootloaderConfiguration { Entry = "2", Arguments = "single", Offset = 1 << 20 }));
        Assert.That(result.Warnings.Single().Text, Does.Contain("no menu is shown"));
    }

    [Test]
    public void RelativePathsBecomeAbsolute()
    {
        DomainConfiguration found = Read("name='g'; memory=64; kernel='boot/k'; ramdisk='/r'").Configuration.WithAbsolutePaths("/home/x");
        Assert.That((found.Kernel, found.Ramdisk), Is.EqualTo(("/home/x/boot/k", "/r")));
    }

    [Test]
    public void FilesThatCannotBeReadAreNamed()
    {
        string folder = Path.GetTempPath();
        Assert.Multiple(() =>
        {
            Assert.That(Failure(Path.Combine(folder, Guid.NewGuid().ToString())), Does.Contain("There is no such file"));
            Assert.That(Failure(folder), Does.Contain("This is a folder"));
            Assert.That(Failure(string.Empty), Does.Contain("no name of a file"));
        });
        string binary = Path.GetTempFileName();
        try
        {
            File.WriteAllBytes(binary, [0x7f, 0x45, 0xff, 0xfe]);
            Assert.That(Failure(binary), Does.Contain("no UTF-8 text"));
            File.WriteAllBytes(binary, new byte[(1 << 20) + 1]);
            Assert.That(Failure(binary), Does.Contain("larger than any configuration"));
        }
        finally
        {
            File.Delete(binary);
        }

        static string Failure(string path) => Assert.Throws<ConfigurationException>(() => DomainConfigurationReader.ReadFile(path, []))!.Message;
    }

    private static DomainConfigurationResult Read(string text) => DomainConfigurationReader.Read(text, "test", []);
}
