// Addresses as xl takes and makes them.
using XenSharp.Devices.Network;

namespace XenSharp.Devices.Tests.Network;

public sealed class MacAddressTests
{
    [Test]
    public void Random_addresses_have_Xens_prefix_and_differ()
    {
        MacAddress[] made = [.. Enumerable.Range(0, 1000).Select(static _ => MacAddress.Random())];
        Assert.That(made, Is.All.Matches<MacAddress>(static mac => mac.ToString().StartsWith("00:16:3e:", StringComparison.Ordinal)));
        Assert.That(made, Is.All.Matches<MacAddress>(static mac => mac.IsStation && ((mac.Value >> 16) & 0x80) == 0), "libxl clears that bit");
        Assert.That(made.Distinct().Count(), Is.GreaterThan(990));
        Assert.That(made.Aggregate(0UL, static (all, mac) => all | mac.Value) & 0xffffff, Is.EqualTo(0x7fffff));
    }

    [TestCase("00:16:3e:01:02:0f", 0x00163e01020fUL)]
    [TestCase("FF:ff:Ff:fF:FF:FF", 0xffffffffffffUL)]
    public void Text_becomes_an_address(string text, ulong value)
    {
        Assert.That(MacAddress.TryParse(text, out MacAddress mac), Is.True);
        Assert.That((mac.Value, mac.ToString()), Is.EqualTo((value, text.ToLowerInvariant())));
    }

    [TestCase(null)]
    [TestCase("")]
    [TestCase("00:16:3e:01:02")]
    [TestCase("00:16:3e:01:02:0f:10")]
    [TestCase("00:16:3e:01:02:0g")]
    [TestCase("00-16-3e-01-02-0f")]
    [TestCase(" 0:16:3e:01:02:0f")]
    [TestCase("+0:16:3e:01:02:0f")]
    [TestCase("00:16:3e:01:02:f")]
    public void Other_text_does_not(string? text) => Assert.That(MacAddress.TryParse(text, out _), Is.False);

    [Test]
    public void An_address_goes_over_the_wire_first_byte_first()
    {
        byte[] bytes = new byte[6];
        new MacAddress(0x010203040506).Write(bytes);
        Assert.That(bytes, Is.EqualTo(new byte[] { 1, 2, 3, 4, 5, 6 }));
        Assert.That(MacAddress.Read(bytes), Is.EqualTo(new MacAddress(0x010203040506)));
    }

    [Test]
    public void Groups_are_no_stations()
    {
        Assert.That(MacAddress.Broadcast.IsMulticast && !MacAddress.Broadcast.IsStation);
        Assert.That(new MacAddress(0x01005e000001).IsMulticast);
        Assert.That(new MacAddress(0).IsStation, Is.False);
        Assert.That(new MacAddress(0x0180c200000e).IsLinkLocal && !new MacAddress(0x0180c2000010).IsLinkLocal);
    }
}
