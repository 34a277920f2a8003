// xl's notation for processors of the host, on a host that has eight in two nodes.

namespace XenSharp.Configuration.Tests;

[TestFixture]
public sealed class ProcessorSetTests
{
    private static readonly int[] s_online = [0, 1, 2, 3, 4, 5, 6, 7];

    [TestCase("all", "0-7")]
    [TestCase("3", "3")]
    [TestCase("0-3,6", "0-3,6")]
    [TestCase("0-3,^1", "0,2-3")]
    [TestCase("^1,0-3", "0-3")]
    [TestCase("all,^0-5", "6-7")]
    [TestCase("node:1", "4-7")]
    [TestCase("nodes:0-1,^node:0,2", "2,4-7")]
    [TestCase("all,node:^1", "0-3")]
    [TestCase("5, 4", "4-5")]
    public void ItComesToProcessors(string text, string processors)
        => Assert.That(ProcessorSet.Format(Resolve(text)), Is.EqualTo(processors));

    [TestCase("")]
    [TestCase("x")]
    [TestCase("3-1")]
    [TestCase("1-")]
    [TestCase("-1")]
    [TestCase("1-2-3")]
    [TestCase("0,,1")]
    [TestCase("node:")]
    [TestCase("99999999999")]
    public void WhatIsNoneIsRefused(string text)
        => Assert.That(() => ProcessorSet.Parse(text), Throws.InstanceOf<FormatException>().With.Message.EndsWith("is no such name."));

    [TestCase("8", "no processor 8; it has 0-7")]
    [TestCase("0-8", "no processor 8")]
    [TestCase("node:2", "no NUMA node 2")]
    [TestCase("^0", "leaves no processor")]
    [TestCase("0,^all", "leaves no processor")]
    public void WhatTheHostHasNotIsRefused(string text, string sentence)
        => Assert.That(() => Resolve(text), Throws.InstanceOf<FormatException>().With.Message.Contains(sentence));

    [Test]
    public void LinuxWritesListsToo()
    {
        Assert.That(ProcessorSet.ParseList("0-2,5\n"), Is.EqualTo(new[] { 0, 1, 2, 5 }));
        Assert.That(ProcessorSet.ParseList("\n"), Is.Empty);
    }

    [Test]
    public void AConfigurationHasThemForAllVcpusOrForEach()
    {
        Assert.That(Read("vcpus=2\nmaxvcpus=3\ncpus=\"0-1\"").Processors, Is.EqualTo(new[] { "0-1", "0-1", "0-1" }));
        Assert.That(Read("vcpus=2\ncpus=[\"1\", \"0\"]").Processors, Is.EqualTo(new[] { "1", "0" }));
        Assert.That(() => Read("cpus=\"some\""), Throws.InstanceOf<ConfigurationException>().With.Message.Contains("\"some\" is no such name"));
    }

    private static DomainConfiguration Read(string settings)
        => DomainConfigurationReader.Read($"name=\"web\"\nkernel=\"/k\"\n{settings}\n", "web.cfg", []).Configuration;

    private static IReadOnlyList<int> Resolve(string text)
        => ProcessorSet.Parse(text).Resolve(s_online, static node => node switch { 0 => [0, 1, 2, 3], 1 => [4, 5, 6, 7], _ => null });
}
