// xensharp compare as a person types it, good input and bad.

using XenSharp.Boot.Tests;
using XenSharp.Cli.Tests;

namespace XenSharp.Conformance.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class CompareCommandTests : KvmFixture
{
    private const int Trouble = 2;

    [Test]
    public async Task Scripts_that_agree_end_with_0_and_a_table()
    {
        CommandEnd end = await CommandProcess.RunAsync("compare", "unknown-hypercalls", "vm_assist");
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Does.Match(@"unknown hypercalls +5").And.Match(@"vm_assist +4").And.Match(@"all +9"));
    }

    [Test]
    public async Task All_steps_are_shown_where_that_is_asked_for()
    {
        CommandEnd end = await CommandProcess.RunAsync("compare", "unknown-hypercalls", "--all");
        Assert.That(end.Output, Does.Match(@"-ENOSYS +-ENOSYS"));
    }

    [Test]
    public async Task Scripts_are_listed_with_what_they_are_about()
    {
        CommandEnd end = await CommandProcess.RunAsync("compare", "--list");
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Does.Match(@"update-va-mapping +update_va_mapping +\d+"));
    }

    [Test]
    public async Task Programs_get_an_object_a_line()
    {
        CommandEnd end = await CommandProcess.RunAsync("compare", "vm-assist", "unknown-hypercalls", "--json", "--timeout", "60");
        Assert.That(end.Status, Is.Zero, end.Error);
        string[] lines = end.Output.TrimEnd('\n').Split('\n');
        Assert.That(lines, Has.Length.EqualTo(2));
        Assert.That(lines, Has.Some.StartsWith("{\"script\":\"vm-assist\",\"subject\":\"vm_assist\",\"good\":true,\"agree\":4,").And.All.EndsWith("\"complaints\":[]}"));
    }

    [Test]
    public async Task The_page_is_written()
    {
        string page = Path.GetTempFileName();
        CommandEnd end = await CommandProcess.RunAsync("compare", "vm-assist", "--html", page);
        string text = await File.ReadAllTextAsync(page);
        File.Delete(page);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(text, Does.Contain("vm-assist").And.EndWith("</html>\n"));
    }

    [TestCase("There is no script \"nonsense\"", "compare", "nonsense")]
    [TestCase("from 1 to", "compare", "vm-assist", "--timeout", "0")]
    [TestCase("folder", "compare", "vm-assist", "--html", "/")]
    [TestCase("/nowhere/", "compare", "vm-assist", "--html", "/nowhere/page.html")]
    public async Task Bad_input_gets_a_sentence(string part, params string[] arguments)
    {
        CommandEnd end = await CommandProcess.RunAsync(arguments);
        Assert.That((end.Status, end.Output), Is.EqualTo((Trouble, "")));
        Assert.That(end.Error, Does.Contain(part).And.Match("^xensharp: .*\\.\n$"));
    }

    [Test]
    public async Task Something_else_to_compare_with_is_refused_with_what_there_is()
    {
        CommandEnd end = await CommandProcess.RunAsync("compare", "--against", "hvm");
        Assert.That((end.Status, end.Output), Is.EqualTo((Trouble, "")));
        Assert.That(end.Error, Does.Contain("hvm").And.Contain("xen-dom0"));
    }

    [Test]
    public async Task A_host_without_QEMU_and_apt_is_told_so()
    {
        using CommandProcess process = CommandProcess.StartInShell(
            "cache=$(mktemp -d); PATH=/nowhere XENSHARP_CACHE=$cache \"$0\" \"$@\"; status=$?; rm -r $cache; exit $status",
            "compare", "vm-assist", "--against", "xen");
        CommandEnd end = await process.FinishAsync();
        Assert.That((end.Status, end.Output), Is.EqualTo((Trouble, "")), end.Error);
        Assert.That(end.Error, Does.Contain("apt").Or.Contain("install"));
    }
}
