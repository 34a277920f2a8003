// Names of virtual disks and their numbers, from xen-vbd-interface(7) and xl-disk-configuration(5).
namespace XenSharp.Core.Tests;

internal sealed class VirtualDeviceTests
{
    [TestCase("xvda", 51712u)]
    [TestCase("xvda1", 51713u)]
    [TestCase("xvdb", 51728u)]
    [TestCase("xvdp15", 51967u)]
    [TestCase("xvda16", (1u << 28) | 16)]
    [TestCase("xvdq", (1u << 28) | (16 << 8))]
    [TestCase("xvdz", (1u << 28) | (25 << 8))]
    [TestCase("xvdaa", (1u << 28) | (26 << 8))]
    [TestCase("xvdba3", (1u << 28) | (52 << 8) | 3)]
    [TestCase("d0", null)]
    [TestCase("d0p0", 51712u)]
    [TestCase("d536p37", (1u << 28) | (536 << 8) | 37)]
    [TestCase("hda", 768u)]
    [TestCase("hdb2", 834u)]
    [TestCase("hdc", 5632u)]
    [TestCase("hdd63", 5759u)]
    [TestCase("hde", null)]
    [TestCase("sda", 2048u)]
    [TestCase("sdp15", 2303u)]
    [TestCase("sdq", null)]
    [TestCase("sda16", null)]
    [TestCase("51712", 51712u)]
    [TestCase("0xca00", 51712u)]
    [TestCase("0145000", 51712u)]
    [TestCase("2147483648", null)]
    [TestCase("08", null)]
    [TestCase("0x", null)]
    [TestCase("", null)]
    [TestCase("xvd", null)]
    [TestCase("xvda01", null)]
    [TestCase("xvda256", null)]
    [TestCase("xvdA", null)]
    [TestCase("xvdzzzzzzzzzz", null)]
    [TestCase("xvda1x", null)]
    [TestCase("-1", null)]
    [TestCase("d1048576p0", null)]
    [TestCase("xvdtq37", (1u << 28) | (536 << 8) | 37)]
    [TestCase("hda64", null)]
    [TestCase("d", null)]
    [TestCase("dp1", null)]
    [TestCase("d1p", null)]
    [TestCase("1x", null)]
    [TestCase("nvme0n1", null)]
    public void Names_are_encoded(string name, uint? number)
    {
        Assert.That(VirtualDevice.TryParse(name, out VirtualDevice device), Is.EqualTo(number is not null));
        if (number is { } expected)
            Assert.That((device.Number, device.Name), Is.EqualTo((expected, name)));
        else
            Assert.That(() => VirtualDevice.Parse(name), Throws.TypeOf<FormatException>().With.Message.Contains("xvda"));
    }
}
