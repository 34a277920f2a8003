// The initramfs around busybox: what is in the archive, and that its init is a script a shell accepts.
using System.IO.Compression;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Guests.Tests;

public sealed class BusyboxInitramfsTests
{
    string folder = null!;

    [SetUp]
    public void MakeFolder() => folder = Directory.CreateTempSubdirectory("xensharp-initramfs-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(folder, recursive: true);

    [Test]
    public async Task TheArchiveHasBusyboxItsAppletsAndWhatTheKernelNeeds()
    {
        string busybox = FakeBusybox("[\nsh\nls\nbusybox\n../evil\nls\n");
        List<CpioEntry> entries = await BuildAsync(busybox);
        Dictionary<string, CpioEntry> byName = entries.ToDictionary(e => e.Name);

        Assert.Multiple(() =>
        {
            Assert.That(byName["bin/busybox"].Contents, Is.EqualTo(File.ReadAllBytes(busybox)));
            Assert.That(byName["bin/busybox"].Permissions, Is.EqualTo(Convert.ToUInt32("755", 8)));
            Assert.That(entries.Where(e => e.Type == 0xa000).Select(e => e.Name), Is.EquivalentTo(new[] { "bin/[", "bin/ls", "bin/sh" }));
            Assert.That(byName["bin/sh"].Text, Is.EqualTo("busybox"));
            Assert.That((byName["dev/console"].Type, byName["dev/console"].Major, byName["dev/console"].Minor), Is.EqualTo((0x2000u, 5u, 1u)));
            Assert.That(byName["init"].Permissions, Is.EqualTo(Convert.ToUInt32("755", 8)));
            Assert.That(byName["init"].Text, Does.StartWith("#!/bin/sh\n").And.Not.Contain("\r"));
        });
    }

    [Test]
    public async Task FoldersComeBeforeWhatIsInThem()
    {
        List<CpioEntry> entries = await BuildAsync(FakeBusybox("sh\n"), new BusyboxInitramfsOptions
        {
            Files = [new InitramfsFile("opt/a/b/c", "x"u8.ToArray()), new InitramfsFile("opt/a/d", "y"u8.ToArray(), Executable: true)],
        });
        HashSet<string> seen = [""];
        foreach (CpioEntry entry in entries)
        {
            Assert.That(seen, Does.Contain(Path.GetDirectoryName(entry.Name)), entry.Name);
            Assert.That(seen.Add(entry.Name), Is.True, $"{entry.Name} is there twice");
        }
        Assert.That(entries.Single(e => e.Name == "opt/a/d").Permissions, Is.EqualTo(Convert.ToUInt32("755", 8)));
    }

    [Test]
    public async Task OwnFilesReplaceTheStandardOnes()
    {
        List<CpioEntry> entries = await BuildAsync(FakeBusybox("sh\nls\n"), new BusyboxInitramfsOptions
        {
            Files = [new InitramfsFile("init", "mine"u8.ToArray(), Executable: true), new InitramfsFile("bin/ls", "own ls"u8.ToArray())],
        });
        Assert.That(entries.Single(e => e.Name == "init").Text, Is.EqualTo("mine"));
        Assert.That(entries.Single(e => e.Name == "bin/ls").Text, Is.EqualTo("own ls"));
    }

    [Test]
    public async Task AScriptRunsInPlaceOfTheShell()
    {
        List<CpioEntry> entries = await BuildAsync(
            FakeBusybox("sh\n"), new BusyboxInitramfsOptions { InitScript = "echo one\r\necho two\n" });
        string init = entries.Single(e => e.Name == "init").Text;
        Assert.Multiple(() =>
        {
            Assert.That(entries.Single(e => e.Name == "etc/init-script").Text, Is.EqualTo("echo one\necho two\n"));
            Assert.That(init, Does.Contain("run sh /etc/init-script"));
            Assert.That(init, Does.Not.Contain("sh -l"));
        });
    }

    [Test]
    public async Task EveryInitIsAScriptTheShellAccepts(
        [Values(null, "", "It's $(up) `now`\"")] string? banner, [Values(null, "true\n")] string? script)
    {
        List<CpioEntry> entries = await BuildAsync(
            FakeBusybox("sh\n"), new BusyboxInitramfsOptions { Banner = banner, InitScript = script, Hostname = "a'b" });
        string init = entries.Single(e => e.Name == "init").Text;
        string file = Path.Combine(folder, "init");
        await File.WriteAllTextAsync(file, init);
        CommandResult parsed = await new CommandRunner().RunAsync(new Command("sh", "-n", file));
        Assert.That((parsed.ExitCode, parsed.Error), Is.EqualTo((0, "")));

        // The line that prints the banner, run for real: quoting must survive whatever is in it.
        string said = (await new CommandRunner().RunAsync(
            new Command("sh", "-c", init.Split('\n').SkipWhile(line => line != "cd /root").ElementAt(1)))).Output;
        Assert.That(said, banner switch
        {
            null => Does.StartWith("Linux ").And.EndsWith("ends the domain.\n"),
            "" => Is.Empty,
            _ => Is.EqualTo(banner + "\n"),
        });
    }

    [Test]
    public void ABusyboxThatCannotServeIsRefused()
    {
        Assert.Multiple(() =>
        {
            Assert.That(() => BusyboxInitramfs.BuildAsync(Path.Combine(folder, "absent")),
                Throws.InstanceOf<GuestFetchException>().With.Message.Contains("cannot be run"));
            Assert.That(() => BusyboxInitramfs.BuildAsync(FakeBusybox("ls\ncat\n")),
                Throws.InstanceOf<GuestFetchException>().With.Message.Contains("names no shell"));
        });
    }

    string FakeBusybox(string applets)
    {
        string file = Path.Combine(folder, "busybox");
        File.WriteAllText(file, $"#!/bin/sh\n[ \"$*\" = --list ] || exit 1\ncat <<'END'\n{applets}END\n");
        File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return file;
    }

    static async Task<List<CpioEntry>> BuildAsync(string busybox, BusyboxInitramfsOptions? options = null)
    {
        byte[] packed = await BusyboxInitramfs.BuildAsync(busybox, options);
        using MemoryStream archive = new();
        using (GZipStream gzip = new(new MemoryStream(packed), CompressionMode.Decompress))
            await gzip.CopyToAsync(archive);
        return CpioReader.Read(archive.ToArray());
    }
}
