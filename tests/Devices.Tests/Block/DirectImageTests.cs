// Images past the page cache: by asynchronous I/O, and by threads where the host has none.
using System.Diagnostics;
using Tmds.Linux;
using XenSharp.Devices.Block.Images;
using static XenSharp.Devices.Tests.Block.FakeBlkfront;

namespace XenSharp.Devices.Tests.Block;

[TestFixture(true)]
[TestFixture(false)]
internal sealed class DirectImageTests(bool asynchronous) : ImageFixture
{
    private const int Okay = 0;

    [Test]
    public async Task A_raw_file_is_used_past_the_page_cache()
    {
        // A hole, whose blocks the kernel cannot make without waiting.
        await using RawImage image = Open(MakeFile(2 * MiB));
        Assert.That(image.SectorSize, Is.InRange(512u, 4096u));
        byte[] data = Data(16 * 4096, seed: 5);
        byte[] read = new byte[data.Length];
        for (int round = 0; round < 3; round++)
        {
            data[round]++;
            Assert.That(TestOperation.Write(image, 8192, data, pieces: 4), Is.Zero);
            Assert.That(TestOperation.Flush(image), Is.Zero);
            Assert.That(TestOperation.Read(image, 8192, read, pieces: 2), Is.Zero);
            Assert.That(read, Is.EqualTo(data));
        }

        Assert.That(TestOperation.Discard(image, 8192, 4096), Is.Zero);
        Assert.That(TestOperation.Read(image, 8192, read.AsSpan(0, 4096)), Is.Zero);
        Assert.That(read.AsSpan(0, 4096).ContainsAnyExcept((byte)0), Is.False);

        // Where it does not begin with a sector the host says no: so it is direct.
        Assert.That(TestOperation.Read(image, 8193, read), Is.EqualTo(LibC.EINVAL));
    }

    [Test]
    public async Task Many_transfers_are_under_way_at_the_same_time_and_the_end_waits_for_them()
    {
        const int Length = 8192;
        byte[] data = Data(6 * MiB, seed: 6);
        string path = Path.Combine(Folder, "disk");
        await File.WriteAllBytesAsync(path, new byte[data.Length]);
        RawImage image = Open(path);

        // More than are given to the kernel at once, and than fit into it.
        BlockOperation[] writes = [.. Enumerable.Range(0, data.Length / Length).Select(i => TestOperation.Writing((ulong)(i * Length), data.AsSpan(i * Length, Length), 2))];
        image.Submit(writes);
        await image.DisposeAsync();
        Assert.That(writes.Cast<TestOperation>().All(static write => write.End.IsCompleted && write.End.Result == 0), Is.True);
        Dispose(writes);
        Assert.That((await File.ReadAllBytesAsync(path)).AsSpan().SequenceEqual(data), Is.True);

        image = Open(path);
        BlockOperation[] reads = [.. Enumerable.Range(0, data.Length / Length).Reverse().Select(static i => TestOperation.Reading((ulong)(i * Length), Length, 2))];
        image.Submit(reads);
        await image.DisposeAsync();
        foreach (TestOperation read in reads.Cast<TestOperation>())
        {
            Assert.That(read.End.Result, Is.Zero);
            Assert.That(read.Memory.SequenceEqual(data.AsSpan((int)read.Offset, Length)), Is.True, $"byte {read.Offset}");
        }

        Dispose(reads);
    }

    [Test]
    public async Task A_file_that_is_cut_short_comes_to_errors_behind_its_end()
    {
        string path = MakeFile(2 * MiB);
        await using RawImage image = Open(path);
        using (Process truncate = Process.Start("truncate", [$"--size={MiB}", path]))
            await truncate.WaitForExitAsync();
        byte[] buffer = new byte[8192];
        Assert.That(TestOperation.Read(image, MiB - 8192, buffer), Is.Zero);
        Assert.That(TestOperation.Read(image, MiB - 4096, buffer), Is.EqualTo(LibC.EIO));
        Assert.That(TestOperation.Read(image, MiB, buffer), Is.EqualTo(LibC.EIO));
    }

    [Test]
    public async Task A_read_only_file_is_not_written()
    {
        await using RawImage image = Open(MakeFile(MiB), readOnly: true);
        AssertIsNotWritten(image, 4096);
    }

    [Test]
    public async Task A_front_end_gets_what_it_has_written()
    {
        string path = MakeFile(MiB);
        byte[] expected = new byte[MiB];
        await using (BlockFixture disk = BlockFixture.Connected(Open(path), new FrontEndOptions { RingPageOrder = 1 }))
        {
            FakeBlkfront front = disk.Front;
            var random = new Random(7);
            for (int round = 0; round < 8; round++)
            {
                int count = random.Next(1, 33);
                for (int i = 0; i < count; i++)
                {
                    random.NextBytes(front.Data(i));
                    int page = (random.Next(8) * 32) + i;
                    front.Data(i).CopyTo(expected.AsSpan(page * 4096));
                    front.Put(WriteOperation, (ulong)(page * 8), [Page(i)]);
                }

                front.Push();
                Assert.That(front.Await(count).Select(static r => (r.Operation, r.Status)), Is.All.EqualTo((WriteOperation, Okay)));
                Assert.That(front.Do(FlushOperation, 0), Is.EqualTo(Okay));
                int first = random.Next(200);
                Piece[] pieces = [.. Enumerable.Range(0, 11).Select(Page)];
                Assert.That(front.Do(ReadOperation, (ulong)(first * 8), pieces), Is.EqualTo(Okay));
                for (int i = 0; i < pieces.Length; i++)
                    Assert.That(front.Data(i).SequenceEqual(expected.AsSpan((first + i) * 4096, 4096)), Is.True, $"page {first + i}");
            }

            // A barrier's three steps.
            front.Data(0).Fill(9);
            expected.AsSpan(4096, 4096).Fill(9);
            Assert.That(front.Do(BarrierOperation, 8, Page(0)), Is.EqualTo(Okay));
            Assert.That(disk.Backend.Statistics.Errors, Is.Zero);
            Assert.That(disk.Reports, Is.Empty);
        }

        Assert.That((await File.ReadAllBytesAsync(path)).AsSpan().SequenceEqual(expected), Is.True);
    }

    [Test]
    public async Task A_domain_that_ends_in_mid_request_lets_go_of_everything()
    {
        await using BlockFixture disk = BlockFixture.Connected(Open(MakeFile(MiB)));
        for (int i = 0; i < 32; i++)
            disk.Front.Put(i % 2, (ulong)(i * 8), [Page(i)]);
        disk.Front.Push();
        disk.EndDomain();
        Assert.That(SpinWait.SpinUntil(() => disk.Manager.Domains.Count == 0, TimeSpan.FromSeconds(20)), Is.True);
    }

    private static void Dispose(BlockOperation[] operations)
    {
        foreach (BlockOperation operation in operations)
            ((TestOperation)operation).Dispose();
    }

    private RawImage Open(string path, bool readOnly = false)
    {
        try
        {
            return RawImage.Open(path, readOnly, direct: true, asynchronous);
        }
        catch (BlockImageException refusal)
        {
            Assert.That(refusal.Message, Does.Contain(path).And.Contain("direct-io-safe"));
            Assert.Ignore("The file system of the folder for temporary files has no direct I/O.");
            throw;
        }
    }
}
