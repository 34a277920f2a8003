// Every file of file systems that mke2fs made is read as it was put in, and damaged ones do no harm.

using XenSharp.Configuration.Boot;
using XenSharp.Configuration.Boot.Ext;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.Children)]
[CancelAfter(120_000)]
public sealed class ExtFileSystemTests
{
    private const int Kibibytes = 12 << 10;

    private string _folder = null!;
    private string _tree = null!;

    [OneTimeSetUp]
    public void MakeTree()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-ext-test-").FullName;
        _tree = Path.Combine(_folder, "tree");
        Directory.CreateDirectory(Path.Combine(_tree, "a", "b", "c"));
        var random = new Random(1);
        foreach ((string name, int size) in new[] { ("empty", 0), ("tiny", 10), ("inline", 100), ("block", 1024), ("some", 50_001), ("many", 3 << 20) })
        {
            byte[] content = new byte[size];
            random.NextBytes(content);
            File.WriteAllBytes(Path.Combine(_tree, name), content);
        }

        // Holes at the beginning and between; mke2fs with inline data cuts one off at the end.
        using (FileStream sparse = File.Create(Path.Combine(_tree, "sparse")))
        {
            for (int at = 0; at < 40; at++)
            {
                sparse.Position = (at * 50_000) + 10_000;
                sparse.WriteByte((byte)(at + 1));
            }

            sparse.Position = 3_000_000;
            sparse.WriteByte(1);
        }

        // More entries than a block has, so that the folder has an index.
        Directory.CreateDirectory(Path.Combine(_tree, "full"));
        for (int at = 0; at < 600; at++)
            File.WriteAllText(Path.Combine(_tree, "full", $"a file with a longer name, the {at}th of them"), at.ToString(System.Globalization.CultureInfo.InvariantCulture));
        File.WriteAllText(Path.Combine(_tree, "a", "b", "c", "deep ü"), "deep");
        File.CreateSymbolicLink(Path.Combine(_tree, "short"), "a/b/c/deep ü");
        File.CreateSymbolicLink(Path.Combine(_tree, "absolute"), "/a/../a/./b/c/deep ü");
        File.CreateSymbolicLink(Path.Combine(_tree, "a", "up"), "../../../../tiny");
        File.CreateSymbolicLink(Path.Combine(_tree, "long"), string.Concat(Enumerable.Repeat("a/../", 30)) + "tiny");
        File.CreateSymbolicLink(Path.Combine(_tree, "folder"), "a/b");
        File.CreateSymbolicLink(Path.Combine(_tree, "dangling"), "nowhere");
        File.CreateSymbolicLink(Path.Combine(_tree, "circle"), "circle");
    }

    [OneTimeTearDown]
    public void RemoveTree() => Directory.Delete(_folder, recursive: true);

    [TestCase("ext4", "-t ext4 -b 4096")]
    [TestCase("ext4", "-t ext4 -b 1024 -O 64bit,metadata_csum")]
    [TestCase("ext4", "-t ext4 -b 2048 -O meta_bg,^resize_inode,64bit")]
    [TestCase("ext4", "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^64bit")]
    [TestCase("ext4", "-t ext4 -b 1024 -I 256 -O inline_data")]
    [TestCase("ext4", "-t ext4 -b 4096 -O sparse_super2,^resize_inode")]
    [TestCase("ext3", "-t ext3 -b 1024")]
    [TestCase("ext2", "-t ext2 -b 1024 -I 128")]
    [TestCase("ext2", "-t ext2 -b 4096 -O ^filetype,^sparse_super,^resize_inode")]
    [TestCase("ext2", "-t ext2 -r 0 -b 1024")]
    public void EverythingIsReadAsItWasPutIn(string kind, string options)
    {
        string image = Path.Combine(_folder, Guid.NewGuid().ToString());
        ExtImage.Make(image, _tree, Kibibytes, options.Split(' '));
        using var disk = new RawImageReader(image);
        ExtFileSystem files = ExtFileSystem.Open(disk)!;
        Assert.That(files.Superblock.Kind, Is.EqualTo(kind));
        foreach (string path in Directory.EnumerateFiles(_tree, "*", SearchOption.AllDirectories).Where(static path => new FileInfo(path).LinkTarget is null))
        {
            string inside = path[_tree.Length..];
            Assert.That(files.ReadFile(inside, 1 << 30).AsSpan().SequenceEqual(File.ReadAllBytes(path)), Is.True, inside);
            Assert.That(files.FileSize(inside), Is.EqualTo(new FileInfo(path).Length));
        }

        byte[] tiny = File.ReadAllBytes(Path.Combine(_tree, "tiny"));
        Assert.Multiple(() =>
        {
            Assert.That(files.ReadFile("/short", 100), Is.EqualTo("deep"u8.ToArray()));
            Assert.That(files.ReadFile("absolute", 100), Is.EqualTo("deep"u8.ToArray()));
            Assert.That(files.ReadFile("/a/up", 100), Is.EqualTo(tiny));
            Assert.That(files.ReadFile("//long", 100), Is.EqualTo(tiny));
            Assert.That(files.ReadFile("/folder/c/../../b/c/deep ü", 100), Is.EqualTo("deep"u8.ToArray()));
            Assert.That(files.List("/full"), Is.EquivalentTo(Directory.EnumerateFiles(Path.Combine(_tree, "full")).Select(Path.GetFileName)));
            Assert.That(files.List("/"), Is.SupersetOf(new[] { "a", "full", "tiny", "short", "lost+found" }));
            Assert.That(files.List("/tiny"), Is.Empty);
            Assert.That(files.Exists("/a"), Is.True);
            Assert.That(files.FileExists("/a"), Is.False);
            Assert.That(files.Exists("/dangling"), Is.False);
            Assert.That(files.Exists("/tiny/x"), Is.False);
            Assert.That(files.Exists("/tin"), Is.False);
        });
        Assert.That(Failure(() => files.ReadFile("/circle", 100)), Does.Contain("in a circle"));
        Assert.That(Failure(() => files.ReadFile("/nothing", 100)), Does.Contain("There is no file /nothing"));
        Assert.That(Failure(() => files.ReadFile("/a", 100)), Does.Contain("is no file"));
        Assert.That(Failure(() => files.ReadFile("/many", 1 << 20)), Does.Contain("larger than the 1 MiB"));
    }

    [Test]
    public void AFileInManyPiecesIsReadThroughATreeOfExtents()
    {
        string image = Path.Combine(_folder, Guid.NewGuid().ToString());
        string tree = Path.Combine(_folder, "holes");
        Directory.CreateDirectory(tree);
        byte[] content = new byte[1024 * 1024];
        new Random(2).NextBytes(content);
        using (FileStream file = File.Create(Path.Combine(tree, "pieces")))
        {
            // Every other block is a hole: each block is an extent of its own, 512 of them, and four fit into an inode.
            for (int at = 0; at < content.Length; at += 2048)
            {
                file.Position = at;
                file.Write(content, at, 1024);
                content.AsSpan(at + 1024, 1024).Clear();
            }

            file.SetLength(content.Length);
        }

        ExtImage.Make(image, tree, 4096, "-t", "ext4", "-b", "1024");
        using var disk = new RawImageReader(image);
        ExtFileSystem files = ExtFileSystem.Open(disk)!;
        Assert.That(files.ReadFile("/pieces", 1 << 30).AsSpan().SequenceEqual(content), Is.True);
    }

    [Test]
    public void AFileSystemThatWasNotUnmountedSaysSo()
    {
        string image = Path.Combine(_folder, Guid.NewGuid().ToString());
        string tree = Path.Combine(_folder, "small");
        Directory.CreateDirectory(tree);
        ExtImage.Make(image, tree, 8192, "-t", "ext4");
        using (var clean = new RawImageReader(image))
            Assert.That(ExtFileSystem.Open(clean)!.Superblock.NeedsRecovery, Is.False);
        ExtImage.Debug(image, "feature needs_recovery");
        using var disk = new RawImageReader(image);
        Assert.That(ExtFileSystem.Open(disk)!.Superblock.NeedsRecovery, Is.True);
    }

    [Test]
    public void DamagedFileSystemsDoNoHarm()
    {
        string image = Path.Combine(_folder, Guid.NewGuid().ToString());
        string tree = Path.Combine(_folder, "damaged");
        Directory.CreateDirectory(Path.Combine(tree, "boot"));
        File.WriteAllText(Path.Combine(tree, "boot", "kernel"), new string('k', 5000));
        File.CreateSymbolicLink(Path.Combine(tree, "link"), "boot/kernel");
        int found = 0;
        foreach (string options in new[] { "-t ext4 -b 1024 -O inline_data -I 256", "-t ext2 -b 1024" })
        {
            ExtImage.Make(image, tree, 1024, options.Split(' '));
            byte[] good = File.ReadAllBytes(image);
            var random = new Random(3);

            // The superblock, descriptors, tables of inodes and folders lie in the first 200 KiB; most of the bytes there are zero.
            int[] used = [.. Enumerable.Range(1024, 200 << 10).Where(at => good[at] != 0)];
            for (int round = 0; round < 400; round++)
            {
                byte[] bad = (byte[])good.Clone();
                for (int change = random.Next(1, 8); change > 0; change--)
                    bad[used[random.Next(used.Length)]] = (byte)random.Next(256);
                using var disk = new MemoryImage(bad);
                try
                {
                    if (ExtFileSystem.Open(disk) is not { } files)
                        continue;
                    foreach (string path in new[] { "/boot/kernel", "/link" })
                    {
                        if (files.FileExists(path) && files.ReadFile(path, 16 << 20).Length > 0)
                            found++;
                    }

                    _ = files.List("/");
                }
                catch (BootException failure)
                {
                    Assert.That(failure.Message, Is.Not.Empty);
                }
            }
        }

        Assert.That(found, Is.GreaterThan(400), "most changes do not concern these files");
    }

    private static string Failure(Action action) => Assert.Throws<BootException>(() => action())!.Message;

    private sealed class MemoryImage(byte[] content) : ImageReader
    {
        protected override int ReadSome(long offset, Span<byte> buffer)
        {
            if (offset >= content.Length)
                return 0;
            int count = (int)Math.Min(buffer.Length, content.Length - offset);
            content.AsSpan((int)offset, count).CopyTo(buffer);
            return count;
        }
    }
}
