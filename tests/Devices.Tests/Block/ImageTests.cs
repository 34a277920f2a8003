// Images as the back end uses them: raw files, and what a real qemu-nbd serves.
using System.Diagnostics;
using Tmds.Linux;
using XenSharp.Devices.Block.Images;
using XenSharp.Guests.Fetching;

namespace XenSharp.Devices.Tests.Block;

internal sealed class ImageTests : ImageFixture
{
    [Test]
    public async Task A_raw_file_is_read_and_written_in_pieces()
    {
        string path = MakeFile(8 * MiB);
        byte[] data = Data(300_032, seed: 1);
        await using (RawImage image = RawImage.Open(path, readOnly: false))
        {
            Assert.That((image.Size, image.SectorSize, image.IsReadOnly, image.Description), Is.EqualTo((8UL * MiB, 512u, false, path)));
            Assert.That(TestOperation.Write(image, 4608, data, pieces: 97), Is.Zero);
            Assert.That(TestOperation.Flush(image), Is.Zero);
            byte[] read = new byte[data.Length];
            Assert.That(TestOperation.Read(image, 4608, read, pieces: 13), Is.Zero);
            Assert.That(read, Is.EqualTo(data));
            Assert.That(image.Discard, Is.Not.Null);
            Assert.That(TestOperation.Discard(image, 8192, 65536), Is.Zero);
            Assert.That(TestOperation.Read(image, 8192, read.AsSpan(0, 65536)), Is.Zero);
            Assert.That(read.AsSpan(0, 65536).ContainsAnyExcept((byte)0), Is.False);
        }

        data.AsSpan(8192 - 4608, 65536).Clear();
        byte[] contents = await File.ReadAllBytesAsync(path);
        Assert.That(contents, Has.Length.EqualTo(8 * MiB));
        Assert.That(contents.AsSpan(4608, data.Length).SequenceEqual(data), Is.True);
    }

    [Test]
    public void What_has_no_direct_access_is_refused_with_a_sentence()
    {
        // The kernel's, on no disk.
        Assert.That(
            () => RawImage.Open("/proc/version", readOnly: true, direct: true),
            Throws.TypeOf<BlockImageException>().With.Message.Contains("/proc/version").And.Message.Contains("direct-io-safe"));
    }

    [Test]
    public async Task A_raw_file_does_many_operations_at_the_same_time()
    {
        string path = MakeFile(4 * MiB);
        byte[] data = Data(4 * MiB, seed: 2);
        TestOperation[] writes = [.. Enumerable.Range(0, 256).Select(i => TestOperation.Writing((ulong)i * 16384, data.AsSpan(i * 16384, 16384), 4))];
        RawImage image = RawImage.Open(path, readOnly: false);
        foreach (TestOperation write in writes)
            image.Submit(write);

        // The end waits for what is under way.
        await image.DisposeAsync();
        Assert.That(writes.All(static write => write.End.IsCompleted && write.End.Result == 0), Is.True);
        foreach (TestOperation write in writes)
            write.Dispose();
        Assert.That(await File.ReadAllBytesAsync(path), Is.EqualTo(data));
    }

    [Test]
    public async Task A_raw_file_that_is_cut_short_comes_to_errors_behind_its_end()
    {
        string path = MakeFile(2 * MiB);
        await using RawImage image = RawImage.Open(path, readOnly: false);

        // Not by File, which respects the lock.
        using (Process truncate = Process.Start("truncate", [$"--size={MiB + 512}", path]))
            await truncate.WaitForExitAsync();
        byte[] buffer = new byte[4096];
        Assert.That(TestOperation.Read(image, MiB - 4096, buffer), Is.Zero);
        Assert.That(TestOperation.Read(image, MiB, buffer), Is.EqualTo(LibC.EIO));
        Assert.That(TestOperation.Read(image, MiB + 4096, buffer), Is.EqualTo(LibC.EIO));
        File.Delete(path);
        Assert.That(TestOperation.Read(image, 0, buffer), Is.Zero, "the file is there as long as it is open");
    }

    [Test]
    public async Task A_read_only_file_is_not_written()
    {
        string path = MakeFile(MiB);
        await using RawImage image = RawImage.Open(path, readOnly: true);
        AssertIsNotWritten(image, 512);
    }

    [Test]
    public async Task An_image_is_written_by_one_disk_only()
    {
        string path = MakeFile(MiB);
        RawImage writer = RawImage.Open(path, readOnly: false);
        foreach (bool readOnly in new[] { true, false })
        {
            Assert.That(
                () => RawImage.Open(path, readOnly), Throws.TypeOf<BlockImageException>().With.Message.Contains(path).And.Message.Contains("detach"));
        }

        await writer.DisposeAsync();
        await using RawImage one = RawImage.Open(path, readOnly: true);
        await using RawImage two = RawImage.Open(path, readOnly: true);
        Assert.That(() => RawImage.Open(path, readOnly: false), Throws.TypeOf<BlockImageException>());
    }

    [TestCase("missing", "no such file")]
    [TestCase("folder", "folder")]
    [TestCase("pipe", "neither a file nor a block device")]
    [TestCase("empty", "truncate")]
    public void What_is_no_image_is_refused_with_a_sentence(string what, string expected)
    {
        string path = Path.Combine(Folder, "x");
        switch (what)
        {
            case "folder":
                _ = Directory.CreateDirectory(path);
                break;
            case "pipe":
                using (var mkfifo = Process.Start("mkfifo", path))
                    mkfifo.WaitForExit();
                break;
            case "empty":
                File.WriteAllBytes(path, new byte[511]);
                break;
        }

        Assert.That(
            () => RawImage.Open(path, readOnly: what is "folder" or "pipe"),
            Throws.TypeOf<BlockImageException>().With.Message.Contains(path).And.Message.Contains(expected));
    }

    [Test]
    public async Task A_block_device_is_an_image()
    {
        string path = MakeFile(4 * MiB);
        (int status, string device) = Losetup("--find", "--show", "--sector-size", "4096", path);
        if (status != 0)
            Assert.Ignore("Loop devices cannot be made here (losetup needs root and /dev/loop-control).");
        try
        {
            byte[] data = Data(65536, seed: 4);
            await using (RawImage image = RawImage.Open(device, readOnly: false))
            {
                Assert.That((image.Size, image.SectorSize, image.PhysicalSectorSize), Is.EqualTo((4UL * MiB, 4096u, 4096u)));
                Assert.That(() => RawImage.Open(device, readOnly: true), Throws.TypeOf<BlockImageException>().With.Message.Contains("in use"));
                Assert.That(TestOperation.Write(image, MiB, data, pieces: 4), Is.Zero);
                Assert.That(TestOperation.Flush(image), Is.Zero);
                Assert.That(image.Discard, Is.Not.Null);
                Assert.That(TestOperation.Discard(image, MiB, 32768), Is.Zero);
                byte[] read = new byte[data.Length];
                Assert.That(TestOperation.Read(image, MiB, read), Is.Zero);
                data.AsSpan(0, 32768).Clear();
                Assert.That(read, Is.EqualTo(data));
            }

            await using RawImage reader = RawImage.Open(device, readOnly: true);
            Assert.That(TestOperation.Write(reader, 0, new byte[4096]), Is.EqualTo(LibC.EROFS));
        }
        finally
        {
            _ = Losetup("--detach", device);
        }
    }

    [TestCase("raw", BlockImageFormat.Raw)]
    [TestCase("qcow2", BlockImageFormat.Qcow2)]
    [TestCase("vhd", BlockImageFormat.Vhd)]
    [TestCase("vpc", BlockImageFormat.Vhd)]
    [TestCase("RAW", null)]
    [TestCase("zip", null)]
    public void Formats_have_the_names_of_xl(string name, BlockImageFormat? format)
    {
        Assert.That(BlockImage.TryParseFormat(name, out BlockImageFormat parsed), Is.EqualTo(format is not null));
        if (format is { } expected)
            Assert.That(parsed, Is.EqualTo(expected));
    }

    [TestCase("qcow2", BlockImageFormat.Qcow2)]
    [TestCase("vpc", BlockImageFormat.Vhd)]
    public async Task What_qemu_serves_is_read_and_written(string format, BlockImageFormat parsed)
    {
        (QemuUtils qemu, QemuNbdProgram program) = await GetQemuAsync();
        string path = Path.Combine(Folder, "image");
        await qemu.CreateAsync(path, format, "16M");
        byte[] data = Data(MiB, seed: 3);
        await using (QemuImage image = await QemuImage.OpenAsync(path, parsed, readOnly: false, program))
        {
            Assert.That(image.Size, Is.GreaterThanOrEqualTo(16UL * MiB));
            Assert.That(
                async () => await QemuImage.OpenAsync(path, parsed, readOnly: true, program),
                Throws.TypeOf<BlockImageException>().With.Message.Contains("in use"));
            Assert.That(TestOperation.Write(image, MiB, data, pieces: 256), Is.Zero);
            TestOperation[] reads = [.. Enumerable.Range(0, 64).Select(i => TestOperation.Reading(MiB + ((ulong)i * 16384), 16384, pieces: 4))];
            foreach (TestOperation read in reads)
                image.Submit(read);
            for (int i = 0; i < reads.Length; i++)
            {
                Assert.That(await reads[i].End.WaitAsync(TimeSpan.FromSeconds(20)), Is.Zero);
                Assert.That(reads[i].Memory.SequenceEqual(data.AsSpan(i * 16384, 16384)), Is.True, $"{i}");
                reads[i].Dispose();
            }

            Assert.That(TestOperation.Flush(image), Is.Zero);
            Assert.That(TestOperation.Discard(image, 0, image.Size), image.Discard is null ? Is.EqualTo(LibC.EOPNOTSUPP) : Is.Zero);
            Assert.That(TestOperation.Write(image, 0, data.AsSpan(0, 512)), Is.Zero);
        }

        await using (QemuImage image = await QemuImage.OpenAsync(path, parsed, readOnly: true, program))
        {
            byte[] read = new byte[512];
            Assert.That(TestOperation.Read(image, 0, read), Is.Zero);
            Assert.That(read.AsSpan().SequenceEqual(data.AsSpan(0, 512)), Is.True);
            Assert.That(TestOperation.Write(image, 0, read), Is.Not.Zero);
        }
    }

    [Test]
    public async Task A_qemu_that_dies_comes_to_errors()
    {
        (QemuUtils qemu, QemuNbdProgram program) = await GetQemuAsync();
        string path = Path.Combine(Folder, "image");
        await qemu.CreateAsync(path, "qcow2", "16M");
        QemuImage image = await QemuImage.OpenAsync(path, BlockImageFormat.Qcow2, readOnly: false, program);
        TestOperation[] operations = [.. Enumerable.Range(0, 200).Select(i => TestOperation.Writing((ulong)i * 65536, new byte[65536], 16))];
        for (int i = 0; i < operations.Length; i++)
        {
            image.Submit(operations[i]);
            if (i == 100)
                Process.GetProcessById(image.ProcessId).Kill();
        }

        foreach (TestOperation operation in operations)
            Assert.That(await operation.End.WaitAsync(TimeSpan.FromSeconds(20)), Is.EqualTo(0).Or.EqualTo(LibC.EIO));
        Assert.That(await operations[^1].End, Is.EqualTo(LibC.EIO));
        Assert.That(TestOperation.Flush(image), Is.EqualTo(LibC.EIO));
        await image.DisposeAsync();
        foreach (TestOperation operation in operations)
            operation.Dispose();
    }

    [Test]
    public async Task What_qemu_cannot_open_is_refused_in_its_words()
    {
        (_, QemuNbdProgram program) = await GetQemuAsync();
        string path = MakeFile(MiB);
        Assert.That(
            async () => await QemuImage.OpenAsync(path, BlockImageFormat.Qcow2, readOnly: false, program),
            Throws.TypeOf<BlockImageException>().With.Message.Contains(path).And.Message.Contains("qcow2"));

        // Nothing is left: neither the lock, nor the folder of the socket.
        await RawImage.Open(path, readOnly: false).DisposeAsync();
    }

    [Test]
    public void Without_qemu_people_are_told_what_to_install()
    {
        string path = MakeFile(MiB);
        Assert.That(
            async () => await QemuImage.OpenAsync(path, BlockImageFormat.Qcow2, readOnly: false, new QemuNbdProgram("/nowhere/qemu-nbd")),
            Throws.TypeOf<BlockImageException>().With.Message.Contains("/nowhere/qemu-nbd"));
        string? before = Environment.GetEnvironmentVariable("PATH");
        Environment.SetEnvironmentVariable("PATH", Folder);
        try
        {
            Assert.That(
                async () => await BlockImage.OpenAsync(path, BlockImageFormat.Qcow2, readOnly: false),
                Throws.TypeOf<BlockImageException>().With.Message.Contains("qemu-utils"));
        }
        finally
        {
            Environment.SetEnvironmentVariable("PATH", before);
        }
    }

    private static (int Status, string Output) Losetup(params string[] arguments)
    {
        try
        {
            using var process = Process.Start(
                new ProcessStartInfo("losetup", arguments) { RedirectStandardOutput = true, RedirectStandardError = true })!;
            string output = process.StandardOutput.ReadToEnd().Trim();
            process.WaitForExit();
            return (process.ExitCode, output);
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return (-1, "");
        }
    }

    private static async Task<(QemuUtils Utils, QemuNbdProgram Program)> GetQemuAsync()
    {
        try
        {
            QemuUtils qemu = await QemuUtils.GetAsync(new GuestCache(GuestCache.DefaultRoot()));
            (string path, IReadOnlyList<string> arguments) = qemu.Command("qemu-nbd");
            return (qemu, new QemuNbdProgram(path) { Arguments = arguments });
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
    }
}
