// Which of a program's mappings can be given back without losing anything.

using XenSharp.Cli.Hosting;

namespace XenSharp.Cli.Tests;

[TestFixture]
public sealed class ProgramPagesTests
{
    private const string Smaps = """
        55d828af8000-55d828b24000 r--p 00000000 fe:00 393288                     /usr/bin/xensharp
        Size:                176 kB
        Rss:                 176 kB
        Anonymous:             0 kB
        VmFlags: rd mr mw me sd
        55d828b24000-55d829836000 r-xp 0002c000 fe:00 393288                     /usr/bin/xensharp
        Anonymous:             0 kB
        55d82a104000-55d82a5d2000 r--p 0160b000 fe:00 393288                     /usr/bin/xensharp
        Rss:                1004 kB
        Anonymous:          1000 kB
        55d82a5d4000-55d82a634000 rw-p 01adb000 fe:00 393288                     /usr/bin/xensharp
        Anonymous:             0 kB
        55d82a634000-55d82aeb4000 rw-p 00000000 00:00 0 
        Anonymous:          8512 kB
        7f3a4b703000-7f3a4b859000 r-xp 00026000 fe:00 1051                       /usr/lib/x86_64-linux-gnu/libc.so.6
        Anonymous:             0 kB
        7f3a4b859000-7f3a4b85a000 r--s 00000000 fe:00 393288                     /usr/bin/xensharp
        Anonymous:             0 kB
        7f3a4b85a000-7f3a4b85b000 r--p 00000000 fe:00 393289                     /usr/bin/xensharp (deleted)
        Anonymous:             0 kB
        ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
        Anonymous:             0 kB
        """;

    [Test]
    public void Only_what_is_as_the_file_is_can_be_given_back() => Assert.That(
        ProgramPages.Find(Smaps.Split('\n'), "/usr/bin/xensharp"),
        Is.EqualTo(new[] { (0x55d828af8000UL, 0x55d828b24000UL), (0x55d828b24000UL, 0x55d829836000UL) }));

    [Test]
    public void A_name_with_spaces_is_found_and_another_is_not()
    {
        string[] smaps = ["1000-3000 r-xp 00000000 fe:00 1    /a b/xensharp", "Anonymous: 0 kB"];
        Assert.That(ProgramPages.Find(smaps, "/a b/xensharp"), Is.EqualTo(new[] { (0x1000UL, 0x3000UL) }));
        Assert.That(ProgramPages.Find(smaps, "/xensharp"), Is.Empty);
    }

    /// <summary>This program goes on as before.</summary>
    [Test]
    public void What_was_given_back_comes_back_when_it_is_used()
    {
        ProgramPages.GiveBack();
        Assert.That(ProgramPages.Find(File.ReadAllLines("/proc/self/smaps"), Environment.ProcessPath!), Is.Not.Empty);
    }
}
