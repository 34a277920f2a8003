// Programs with their libraries, out of a folder of unpacked packages.
using XenSharp.Guests.Elf;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Guests.Tests;

public class DebianProgramsTests
{
    const string Libraries = "usr/lib/x86_64-linux-gnu";

    string root = null!;

    [SetUp]
    public void MakeRoot()
    {
        // This host stands for the packages: what it runs /bin/sh with.
        root = Directory.CreateTempSubdirectory("xensharp-programs-").FullName;
        Directory.CreateDirectory(Path.Combine(root, "usr/bin"));
        Directory.CreateDirectory(Path.Combine(root, Libraries));
        File.Copy("/bin/sh", Path.Combine(root, "usr/bin/sh"));
        foreach (string library in (ReadOnlySpan<string>)["libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"])
            File.Copy("/lib/x86_64-linux-gnu/" + library, Path.Combine(root, Libraries, library));
    }

    [TearDown]
    public void RemoveRoot() => Directory.Delete(root, recursive: true);

    [Test]
    public void TheLibrariesOfAnElfFileAreRead()
    {
        byte[] tool = File.ReadAllBytes("/bin/sh");
        Assert.That(ElfDependencies.Needed(tool), Does.Contain("libc.so.6"));
        // Cut anywhere, it is damaged or still whole as far as loading goes, and nothing worse.
        for (int length = 0; length < tool.Length; length += 997)
        {
            try
            {
                ElfDependencies.Needed(tool.AsSpan(0, length));
            }
            catch (InvalidDataException)
            {
            }
        }
        Assert.That(() => ElfDependencies.Needed(tool.AsSpan(0, 100)), Throws.InstanceOf<InvalidDataException>());
    }

    [Test]
    public void AProgramComesWithWhatItNeedsAndWhatThatNeeds()
    {
        IReadOnlyList<InitramfsFile> files = DebianPrograms.Collect(root, ["usr/bin/sh"]);
        Assert.That(
            files.Select(file => file.Path),
            Is.EquivalentTo(new[]
            {
                "bin/sh", "lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libgcc_s.so.1", "lib64/ld-linux-x86-64.so.2",
            }));
        Assert.That(files.All(file => file.Executable && file.Contents.Span.StartsWith("\u007fELF"u8)));
    }

    [TestCase("usr/bin/sh")]
    [TestCase(Libraries + "/libc.so.6")]
    public void WhatIsMissingIsNamed(string file)
    {
        File.Delete(Path.Combine(root, file));
        Assert.That(() => DebianPrograms.Collect(root, ["usr/bin/sh"]),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains(Path.GetFileName(file)).And.Message.Contains("delete that folder"));
    }

    [Test]
    public void WhatIsDamagedIsNamed()
    {
        File.WriteAllText(Path.Combine(root, Libraries, "libc.so.6"), "no library");
        Assert.That(() => DebianPrograms.Collect(root, ["usr/bin/sh"]),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains("libc.so.6").And.InnerException.InstanceOf<InvalidDataException>());
    }
}
