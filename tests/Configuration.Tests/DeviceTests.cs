// Disks, interfaces, channels and CPUID masks in all the forms that xl takes.

using XenSharp.Configuration.Devices;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.All)]
public sealed class DeviceTests
{
    // The first eight are the two groups of xl-disk-configuration(5) that mean the same.
    [TestCase("/dev/vg/guest-volume,,hda", "/dev/vg/guest-volume raw hda rw")]
    [TestCase("/dev/vg/guest-volume,raw,hda,rw", "/dev/vg/guest-volume raw hda rw")]
    [TestCase("format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume", "/dev/vg/guest-volume raw hda rw")]
    [TestCase("raw:/dev/vg/guest-volume,hda,w", "/dev/vg/guest-volume raw hda rw")]
    [TestCase("/root/image.iso,,hdc,cdrom", "/root/image.iso raw hdc ro cdrom")]
    [TestCase("/root/image.iso,,hdc,,cdrom", "/root/image.iso raw hdc ro cdrom")]
    [TestCase("/root/image.iso,raw,hdc,devtype=cdrom", "/root/image.iso raw hdc ro cdrom")]
    [TestCase("format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso", "/root/image.iso raw hdc ro cdrom")]
    [TestCase("raw:/root/image.iso,hdc:cdrom,ro", "/root/image.iso raw hdc ro cdrom")]
    [TestCase(",hdc:cdrom,r", " empty hdc ro cdrom")]
    [TestCase("cdrom,vdev=hdc", " empty hdc ro cdrom")]
    [TestCase("file:/a,xvda,w", "/a raw xvda rw")]
    [TestCase("phy:/dev/sdb,xvdb1,r", "/dev/sdb raw xvdb1 ro")]
    [TestCase("tap:aio:/a,xvda,w", "/a raw xvda rw")]
    [TestCase("tap2:tapdisk:qcow2:/a,xvda,w", "/a qcow2 xvda rw")]
    [TestCase("tap:qcow2:/a,xvda,w", "/a qcow2 xvda rw")]
    [TestCase("vdev=xvda,format=qcow2,target=/a,b=c:d,raw ", "/a,b=c:d,raw  qcow2 xvda rw")]
    [TestCase("/a,xvda=", null)]
    [TestCase("/a:b,raw,xvda", "/a:b raw xvda rw")]
    [TestCase("/a,raw,xvda,rw,discard", "/a raw xvda rw discard")]
    [TestCase("/a,raw,xvda,no-discard,r,direct-io-safe,untrusted,backendtype=qdisk", "/a raw xvda ro no-discard untrusted direct-io-safe qdisk")]
    [TestCase("/a,raw,xvda,backend=0,specification=xen,script=", "/a raw xvda rw")]
    public void DiskSpecificationsAreRead(string text, string? expected)
    {
        if (expected is null)
        {
            Assert.Throws<FormatException>(() => DiskSpecification.Parse([text], []));
            return;
        }

        DiskConfiguration disk = DiskSpecification.Parse([text], []);
        Assert.That(Describe(disk), Is.EqualTo(expected));
        Assert.That(DiskSpecification.Parse([disk.ToSpecification()], []), Is.EqualTo(disk), disk.ToSpecification());
    }

    [Test]
    public void TheWordsOfACommandAreOneSpecification()
        => Assert.That(Describe(DiskSpecification.Parse(["phy:/dev/vg/x", "xvdb", "r"], [])), Is.EqualTo("/dev/vg/x raw xvdb ro"));

    [TestCase("", "names no device")]
    [TestCase("/a,raw", "names no device")]
    [TestCase("vdev=xvda", "names no file")]
    [TestCase(",raw,xvda", "names no file")]
    [TestCase("/a,raw,xvda,w,more", "one parameter too many")]
    [TestCase("/a,raw,xvda,x", "\"x\" is neither")]
    [TestCase("/a,zip,xvda", "\"zip\" is none")]
    [TestCase("/a,vhd,xvda", "qemu-img convert")]
    [TestCase("/a,raw,xvda,format=qcow2", "the format twice")]
    [TestCase("/a,raw,xvda,vdev=xvdb", "the vdev twice")]
    [TestCase("/a,raw,xvda,target=/b", "the target twice")]
    [TestCase("/a,raw,xvda,backendtype=phy,format=raw,specification=virtio", "virtio")]
    [TestCase("/a,qcow2,xvda,backendtype=phy", "raw block devices")]
    [TestCase("/a,raw,xvda,script=block-iscsi", "not run here")]
    [TestCase("iscsi:iqn,xvda,w", "not run here")]
    [TestCase("nfs:/a,xvda,w", "none that xl knows")]
    [TestCase("/a,raw,xvda,backend=driver", "in another domain")]
    [TestCase("/a,raw,xvda,colo", "COLO")]
    [TestCase("/a,raw,xvda,speed=fast", "speed= is no parameter")]
    [TestCase("/a=b,raw,xvda", "target=PATH")]
    [TestCase("/a,raw,xvda:tape", "\"tape\" is neither")]
    [TestCase("/a,raw,sdq", "no device of a guest")]
    public void DisksThatCannotBeAreRefused(string text, string part)
        => Assert.That(Assert.Throws<FormatException>(() => DiskSpecification.Parse([text], []))!.Message, Does.Contain(part));

    [TestCase("10Mb/s", 62_500, 50_000)]
    [TestCase("250KB/s", 12_500, 50_000)]
    [TestCase("1MB/s@20ms", 20_000, 20_000)]
    [TestCase("1GB/s@1s", 1_000_000_000, 1_000_000)]
    [TestCase("8000b/s@1", 1_000, 1_000_000)]
    [TestCase("1000B/s@5000us", 5, 5_000)]
    public void RatesAreRead(string text, long bytes, int interval)
    {
        Assert.That(VifRate.TryParse(text, out VifRate? rate), Is.True);
        Assert.That(rate, Is.EqualTo(new VifRate(bytes, interval)));
        Assert.That(VifRate.TryParse(rate!.ToString(), out VifRate? again) ? again : null, Is.EqualTo(rate), rate.ToString());
    }

    [TestCase("")]
    [TestCase("10")]
    [TestCase("10Mb")]
    [TestCase("Mb/s")]
    [TestCase("10Tb/s")]
    [TestCase("0B/s")]
    [TestCase("-1B/s")]
    [TestCase("1B/s")]
    [TestCase("10Mb/s@")]
    [TestCase("10Mb/s@0")]
    [TestCase("10Mb/s@5h")]
    [TestCase("10Mb/s@99999s")]
    [TestCase("99999999999B/s")]
    public void OtherRatesAreRefused(string text) => Assert.That(VifRate.TryParse(text, out _), Is.False);

    [TestCase("bridge=averylongbridgename", "1 to 15 characters")]
    [TestCase("vifname=a/b", "1 to 15 characters")]
    [TestCase("mtu=10", "68 to 65535")]
    [TestCase("rate=fast", "no rate")]
    [TestCase("type=e1000", "takes vif")]
    [TestCase("backend=net-vm", "in another domain")]
    [TestCase("forwarddev=eth0", "COLO")]
    [TestCase("colour=red", "no parameter")]
    [TestCase("fast", "no flag")]
    public void InterfacesThatCannotBeAreRefused(string text, string part)
        => Assert.That(Assert.Throws<FormatException>(() => VifSpecification.Parse([text], []))!.Message, Does.Contain(part));

    [Test]
    public void EveryParameterOfAnInterfaceIsKept()
    {
        VifConfiguration vif = VifSpecification.Parse(["mac=00:16:3E:1:2:03, bridge=br0", "vifname=v0,ip=10.0.0.2,rate=1MB/s,devid=3,mtu=9000,untrusted,type=vif"], []);
        Assert.That(vif, Is.EqualTo(new VifConfiguration
        {
            Mac = "00:16:3e:01:02:03", Bridge = "br0", Name = "v0", Ip = "10.0.0.2", Rate = new VifRate(50_000, 50_000), DeviceId = 3, Mtu = 9000, Trusted = false,
        }));
        Assert.That(VifSpecification.Parse([vif.ToSpecification()], []), Is.EqualTo(vif));
    }

    [Test]
    public void CpuidNotationsMeanTheSame()
    {
        // The example of xl.cfg(5), which it gives in both notations.
        IReadOnlyList<CpuidMask> libxl = Cpuid("cpuid=\"host,tm=0,sse3=0\"");
        IReadOnlyList<CpuidMask> xend = Cpuid("cpuid=[\"1:ecx=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx0,edx=xx0xxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"]");
        Assert.That(libxl, Is.EqualTo(xend));
        Assert.That(libxl, Is.EqualTo(new[]
        {
            new CpuidMask(1, null, CpuidRegister.Ecx, 0, 1, 0), new CpuidMask(1, null, CpuidRegister.Edx, 0, 1 << 29, 0),
        }));
    }

    [TestCase("avx2=1", 7u, 0u, CpuidRegister.Ebx, 1u << 5, 0u, 0u)]
    [TestCase("avx512-bf16=k", 7u, 1u, CpuidRegister.Eax, 0u, 0u, 1u << 5)]
    [TestCase("sse4.1=0", 1u, null, CpuidRegister.Ecx, 0u, 1u << 19, 0u)]
    [TestCase("family=6", 1u, null, CpuidRegister.Eax, 0x600u, 0x0ff00900u, 0u)]
    [TestCase("family=25", 1u, null, CpuidRegister.Eax, 0x00a00f00u, 0x0550_0000u, 0u)]
    [TestCase("model=0x55", 1u, null, CpuidRegister.Eax, 0x0005_0050u, 0x000a_00a0u, 0u)]
    [TestCase("clflush=8", 1u, null, CpuidRegister.Ebx, 0x800u, 0xf700u, 0u)]
    [TestCase("maxleaf=0xffffffff", 0u, null, CpuidRegister.Eax, 0xffff_ffffu, 0u, 0u)]
    public void CpuidFeaturesAreWhereXenHasThem(string setting, uint leaf, uint? subleaf, CpuidRegister register, uint set, uint clear, uint host)
    {
        CpuidMask mask = Cpuid($"cpuid='host,{setting}'").Single();
        uint expectedClear = setting switch { "family=25" => 0x0ff0_0f00 & ~set, "model=0x55" => 0x000f_00f0 & ~set, _ => clear };
        Assert.That(mask, Is.EqualTo(new CpuidMask(leaf, subleaf, register, set, expectedClear, host)));
    }

    [Test]
    public void CpuidMasksAreApplied()
    {
        var mask = new CpuidMask(1, null, CpuidRegister.Ecx, Set: 0x1, Clear: 0x2, Host: 0x4);
        Assert.That(mask.Apply(policy: 0xf2, host: 0xc), Is.EqualTo(0xf5));
        Assert.That(mask.Apply(policy: 0xf6, host: 0x0), Is.EqualTo(0xf1));
        Assert.That(mask.ToBits(), Is.EqualTo("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxk01"));
    }

    private static IReadOnlyList<CpuidMask> Cpuid(string text)
        => DomainConfigurationReader.Read($"name='g'; memory=64; kernel='/k'\n{text}", "test", []).Configuration.Cpuid;

    private static string Describe(DiskConfiguration disk) => string.Join(' ', new[]
    {
        disk.Target, disk.Format.ToString().ToLowerInvariant(), disk.VirtualDevice, disk.ReadOnly ? "ro" : "rw", disk.Cdrom ? "cdrom" : null,
        disk.Discard switch { true => "discard", false => "no-discard", null => null }, disk.Trusted == false ? "untrusted" : null,
        disk.DirectIoSafe ? "direct-io-safe" : null, disk.BackendType,
    }.OfType<string>());
}
