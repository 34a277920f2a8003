// What a front end gets from the block back end: data, errors, and an end.
using System.Diagnostics;
using System.Globalization;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using static XenSharp.Devices.Tests.Block.FakeBlkfront;

namespace XenSharp.Devices.Tests.Block;

internal sealed class BlockBackendTests
{
    private const int Okay = 0;
    private const int Error = -1;
    private const int NotSupported = -2;

    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(20);

    private static IEnumerable<FrontEndOptions> FrontEnds()
    {
        yield return new FrontEndOptions();
        yield return new FrontEndOptions { Is32Bit = true };
        yield return new FrontEndOptions { RingPageOrder = 0, IsPersistent = true };
        yield return new FrontEndOptions { RingPageOrder = 2, Is32Bit = true, IsPersistent = true };
        yield return new FrontEndOptions { RingPageOrder = 3, Queues = 2 };
    }

    [TestCaseSource(nameof(FrontEnds))]
    public async Task What_is_written_is_on_the_disk_and_is_read_back(FrontEndOptions options)
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image, options);
        FakeBlkfront front = disk.Front;
        var random = new Random(1);
        byte[] expected = new byte[image.Contents.Length];

        // Far more requests than a ring has entries, several at once, over the ends of pages and of the ring.
        for (int round = 0; round < 24; round++)
        {
            for (int queue = 0; queue < options.Queues; queue++)
            {
                int count = random.Next(1, Math.Min(front.RingSize, 24) + 1);
                for (int i = 0; i < count; i++)
                {
                    (int first, int last) = (random.Next(4), random.Next(4, 8));
                    int page = i;
                    random.NextBytes(front.Data(page));
                    int sector = (i * 16) + (random.Next(2) * 8);
                    front.Data(page)[(first * 512)..((last + 1) * 512)].CopyTo(expected.AsSpan(sector * 512));
                    front.Put(WriteOperation, (ulong)sector, [new Piece(FirstData + (uint)page, first, last)], queue);
                }

                front.Push(queue);
                Assert.That(front.Await(count, queue).Select(static r => (r.Operation, r.Status)), Is.All.EqualTo((WriteOperation, Okay)));
            }
        }

        Assert.That(image.Contents.AsSpan().SequenceEqual(expected), Is.True);
        for (int i = 0; i < 11; i++)
            front.Data(i).Clear();
        Assert.That(front.Do(ReadOperation, 8, [.. Enumerable.Range(0, 11).Select(Page)]), Is.EqualTo(Okay));
        for (int i = 0; i < 11; i++)
            Assert.That(front.Data(i).SequenceEqual(expected.AsSpan(4096 + (i * 4096), 4096)), Is.True, $"page {i}");
        Assert.That(disk.Backend.Statistics.ReadBytes, Is.EqualTo(11 * 4096));
        Assert.That(disk.Backend.Statistics.Errors, Is.Zero);
        Assert.That(disk.Reports, Is.Empty);
    }

    [Test]
    public async Task Nodes_say_what_the_disk_is_and_can_do()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage());
        foreach ((string name, string value) in new[]
        {
            ("frontend", disk.Front.Folder), ("frontend-id", "7"), ("online", "1"), ("state", "4"), ("dev", "xvda"), ("mode", "w"), ("type", "phy"),
            ("params", "fake image"), ("device-type", "disk"), ("sectors", "2048"), ("sector-size", "512"), ("physical-sector-size", "4096"), ("info", "0"),
            ("feature-flush-cache", "1"), ("feature-barrier", "1"), ("feature-discard", "1"), ("discard-granularity", "4096"), ("discard-alignment", "0"),
            ("discard-secure", "0"), ("feature-persistent", "1"), ("feature-max-indirect-segments", "256"), ("max-ring-page-order", "4"),
            ("multi-queue-max-queues", "2"),
        })
        {
            Assert.That(disk.Node(name), Is.EqualTo(value), name);
        }

        Assert.That(disk.Store.GetPermissions(disk.Front.BackEnd + "/sectors")!.ToString(), Is.EqualTo("n0 r7"));
        Assert.That(disk.Store.GetPermissions(disk.Front.Folder + "/state")!.ToString(), Is.EqualTo("n7 r0"));
        Assert.That(disk.Store.GetPermissions("/libxl/7/device/vbd/51712/state")!.ToString(), Is.EqualTo("n0"));
        Assert.That(disk.Store.Read(disk.Front.Folder + "/backend"), Is.EqualTo(disk.Front.BackEnd));
        Assert.That(disk.Store.Read(disk.Front.Folder + "/virtual-device"), Is.EqualTo("51712"));
        Assert.That(
            () => BlockBackend.Create(
                disk.Guest.Fake.Domain, disk.Store, new BlockDeviceOptions { Device = VirtualDevice.Parse("xvda"), Image = new FakeImage() }),
            Throws.InvalidOperationException.With.Message.Contains("vbd 51712 of domain 7"));
    }

    [TestCase(false, false)]
    [TestCase(true, false)]
    [TestCase(true, true)]
    public async Task Indirect_requests_move_many_pages(bool persistent, bool is32Bit)
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { IsPersistent = persistent, Is32Bit = is32Bit });
        FakeBlkfront front = disk.Front;
        new Random(2).NextBytes(image.Contents);
        Piece[] pieces = [.. Enumerable.Range(0, 60).Select(Page)];
        Assert.That(front.AwaitOne(front.PutIndirect(ReadOperation, 16, pieces, segmentPage: 63), ReadOperation), Is.EqualTo(Okay));
        for (int i = 0; i < pieces.Length; i++)
            Assert.That(front.Data(i).SequenceEqual(image.Contents.AsSpan(8192 + (i * 4096), 4096)), Is.True, $"page {i}");

        // Granted to be read only: not to a back end that keeps its pages mapped, which has to be able to write to them later.
        front.Data(0).Fill(7);
        Assert.That(
            front.AwaitOne(front.PutIndirect(WriteOperation, 0, [ReadOnlyPage(0)], segmentPage: 63), WriteOperation),
            Is.EqualTo(persistent ? Error : Okay));
        Assert.That(image.Contents[4095], persistent ? Is.Not.EqualTo(7) : Is.EqualTo(7));
    }

    [Test]
    public async Task Flush_and_barrier_bracket_their_data()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image);
        FakeBlkfront front = disk.Front;
        Assert.That(front.Do(FlushOperation, 0), Is.EqualTo(Okay));
        Assert.That(image.Submitted, Is.EqualTo(new[] { BlockOperationKind.Flush }));
        image.Submitted.Clear();
        front.Data(0).Fill(1);
        Assert.That(front.Do(FlushOperation, 8, Page(0)), Is.EqualTo(Okay));
        Assert.That(front.Do(BarrierOperation, 16, Page(0)), Is.EqualTo(Okay));
        BlockOperationKind[] bracketed = [BlockOperationKind.Flush, BlockOperationKind.Write, BlockOperationKind.Flush];
        Assert.That(image.Submitted, Is.EqualTo(bracketed.Concat(bracketed)));
        Assert.That((image.Contents[4096], image.Contents[8192]), Is.EqualTo((1, 1)));

        // What came before a barrier is done before it begins, and what comes after waits for it.
        image.Submitted.Clear();
        image.Hold();
        front.Put(WriteOperation, 0, [Page(0)]);
        front.Put(BarrierOperation, 8, [Page(1)]);
        front.Put(WriteOperation, 16, [Page(2)]);
        front.Push();
        int[] submitted = [1, 2, 3, 4, 5];
        foreach (int count in submitted)
        {
            Assert.That(SpinWait.SpinUntil(() => image.Held == 1, Patience), Is.True);
            Assert.That(image.Submitted, Has.Count.EqualTo(count));
            image.LetGo(forGood: false);
        }

        Assert.That(front.Await(3).Select(static r => r.Operation), Is.EqualTo(new[] { WriteOperation, BarrierOperation, WriteOperation }));
        Assert.That(
            image.Submitted,
            Is.EqualTo((BlockOperationKind[])[BlockOperationKind.Write, .. bracketed, BlockOperationKind.Write]));
        image.LetGo();
    }

    [Test]
    public async Task Requests_run_at_the_same_time_and_end_in_any_order()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image);
        FakeBlkfront front = disk.Front;
        image.Hold();
        ulong[] ids = [.. Enumerable.Range(0, front.RingSize).Select(i => front.Put(ReadOperation, (ulong)(i * 8), [Page(i)]))];
        front.Push();
        Assert.That(SpinWait.SpinUntil(() => image.Held == front.RingSize, Patience), Is.True);
        image.LetGo();
        Assert.That(front.Await(front.RingSize).Select(static r => r.Id), Is.EqualTo(ids.Reverse()));
        BlockStatistics statistics = disk.Backend.Statistics;
        Assert.That(statistics.ReadRequests, Is.EqualTo(front.RingSize));
    }

    /// <summary>
    /// As drivers do it: each request is shown by itself, and the first is notified of, after which the guest is away for a moment, in which
    /// the back end comes to look. Other threads of the machine can spoil any single round.
    /// </summary>
    [Test]
    public async Task Requests_that_are_shown_one_after_the_other_are_given_together_to_an_image_that_prefers_it()
    {
        const int depth = 32;
        const int window = 50;
        var image = new FakeImage { PrefersTogether = true };
        await using BlockFixture disk = BlockFixture.Connected(image);
        FakeBlkfront front = disk.Front;
        int rounds = 0;
        bool together = SpinWait.SpinUntil(
            () =>
            {
                int before = image.Batches.Count(static batch => batch == depth);
                for (int round = 0; round < window; round++)
                    OneRound();
                return image.Batches.Count(static batch => batch == depth) - before > window / 10;
            },
            Patience);
        Assert.That(together, Is.True, $"in {rounds} rounds: {string.Join(' ', image.Batches.TakeLast(window))}");
        Assert.That(image.Submitted, Has.Count.EqualTo(rounds * depth));

        void OneRound()
        {
            rounds++;
            ulong[] ids = new ulong[depth];
            for (int i = 0; i < depth; i++)
            {
                long wakeups = disk.Backend.Statistics.Wakeups;
                ids[i] = front.Put(ReadOperation, (ulong)(i * 8), [Page(i)]);
                if (front.Push())
                    _ = SpinWait.SpinUntil(() => disk.Backend.Statistics.Wakeups != wakeups, Patience);
                long start = Stopwatch.GetTimestamp();
                while (i == 0 && Stopwatch.GetElapsedTime(start) < TimeSpan.FromMicroseconds(40))
                    Thread.SpinWait(20);
            }

            Assert.That(front.Await(depth).Select(static r => r.Id).Order(), Is.EqualTo(ids));
        }
    }

    /// <summary>More at once than it is given in one turn.</summary>
    [Test]
    public async Task Requests_that_go_on_and_on_are_given_by_turns()
    {
        var image = new FakeImage { PrefersTogether = true };
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { RingPageOrder = 3 });
        FakeBlkfront front = disk.Front;
        for (int round = 0; round < 100; round++)
        {
            ulong[] ids = new ulong[front.RingSize];
            for (int i = 0; i < ids.Length; i++)
            {
                ids[i] = front.Put(ReadOperation, (ulong)(i % DataPages * 8), [Page(i % DataPages)]);
                front.Push();
            }

            Assert.That(front.Await(ids.Length).Select(static r => r.Id).Order(), Is.EqualTo(ids));
        }

        Assert.That(image.Batches.Max(), Is.LessThanOrEqualTo(64));
        Assert.That(image.Submitted, Has.Count.EqualTo(100 * front.RingSize));
    }

    [Test]
    public async Task A_batch_is_answered_with_one_notification()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage());
        for (int i = 0; i < 20; i++)
            disk.Front.Put(ReadOperation, 0, [Page(i)]);
        disk.Front.Push();
        _ = disk.Front.Await(20);

        // It follows the answers.
        Assert.That(SpinWait.SpinUntil(() => disk.Backend.Statistics.Notifications != 0, Patience), Is.True);
        Assert.That(disk.Backend.Statistics.Notifications, Is.EqualTo(1));
    }

    [Test]
    public async Task What_the_image_completes_together_is_answered_with_one_notification()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { RingPageOrder = 1, Queues = 2 });
        image.Hold();
        for (int queue = 0; queue < 2; queue++)
        {
            for (int i = 0; i < 20; i++)
                disk.Front.Put(i == 7 ? FlushOperation : ReadOperation, 0, [Page((queue * 20) + i)], queue);
            disk.Front.Push(queue);
        }

        // A flush with data is three operations; the others are not held up by it.
        Assert.That(SpinWait.SpinUntil(() => image.Held == 40, Patience), Is.True);
        image.LetGo(together: new CompletionBatch());
        for (int queue = 0; queue < 2; queue++)
            Assert.That(disk.Front.Await(20, queue).Select(static r => r.Status), Is.All.EqualTo(Okay));
        Assert.That(SpinWait.SpinUntil(() => disk.Backend.Statistics.Notifications >= 2, Patience), Is.True);
        Assert.That(disk.Backend.Statistics.Notifications, Is.LessThanOrEqualTo(4));
    }

    private static IEnumerable<TestCaseData> BadRequests()
    {
        yield return new TestCaseData(ReadOperation, 0UL, Array.Empty<Piece>(), Error).SetArgDisplayNames("nothing to read");
        yield return new TestCaseData(ReadOperation, 2048UL, new[] { Page(0) }, Error).SetArgDisplayNames("behind the end");
        yield return new TestCaseData(WriteOperation, 2041UL, new[] { Page(0) }, Error).SetArgDisplayNames("over the end");
        yield return new TestCaseData(ReadOperation, ulong.MaxValue, new[] { Page(0) }, Error).SetArgDisplayNames("a sector that wraps");
        yield return new TestCaseData(ReadOperation, ulong.MaxValue - 7, new[] { Page(0) }, Error).SetArgDisplayNames("an end that wraps");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { new Piece(FirstData, 3, 2) }, Error).SetArgDisplayNames("last before first");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { Page(1), new Piece(FirstData, 0, 8) }, Error).SetArgDisplayNames("over the page");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { new Piece(FirstData, 255, 255) }, Error).SetArgDisplayNames("outside of the page");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { Page(0), new Piece(99, 0, 7) }, Error).SetArgDisplayNames("not granted");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { new Piece(uint.MaxValue, 0, 7) }, Error).SetArgDisplayNames("no grant");
        yield return new TestCaseData(ReadOperation, 0UL, new[] { ReadOnlyPage(0) }, Error).SetArgDisplayNames("not granted to be written");
        yield return new TestCaseData(FlushOperation, 2048UL, new[] { Page(0) }, Error).SetArgDisplayNames("flush behind the end");
        yield return new TestCaseData(BarrierOperation, 0UL, new[] { new Piece(99, 0, 7) }, Error).SetArgDisplayNames("barrier, not granted");
        yield return new TestCaseData(4, 0UL, new[] { Page(0) }, NotSupported).SetArgDisplayNames("reserved operation");
        yield return new TestCaseData(255, 0UL, new[] { Page(0) }, NotSupported).SetArgDisplayNames("no operation");
    }

    [TestCaseSource(nameof(BadRequests))]
    public async Task Requests_that_make_no_sense_are_refused_and_nothing_else_happens(int operation, ulong sector, Piece[] pieces, int expected)
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image);
        Assert.That(disk.Front.Do(operation, sector, pieces), Is.EqualTo(expected));
        Assert.That(disk.Front.MappedData(), Is.Zero);
        Assert.That(image.Submitted, Is.Empty);
        Assert.That(disk.Backend.Statistics.Errors, Is.EqualTo(1));
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
    }

    [Test]
    public async Task Indirect_requests_that_make_no_sense_are_refused()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), change: static o => o with { MaxIndirectSegments = 16 });
        FakeBlkfront front = disk.Front;
        Piece[] pieces = [.. Enumerable.Range(0, 17).Select(Page)];
        Assert.That(front.AwaitOne(front.PutIndirect(ReadOperation, 0, pieces, 63), ReadOperation), Is.EqualTo(Error), "too many");
        Assert.That(front.AwaitOne(front.PutIndirect(ReadOperation, 0, pieces[..16], 63), ReadOperation), Is.EqualTo(Okay));
        Assert.That(front.AwaitOne(front.PutIndirect(ReadOperation, 0, [], 63), ReadOperation), Is.EqualTo(Error), "none");
        Assert.That(front.AwaitOne(front.PutIndirect(FlushOperation, 0, pieces[..1], 63), FlushOperation), Is.EqualTo(Error), "no read or write");
        Assert.That(front.AwaitOne(front.PutIndirect(IndirectOperation, 0, pieces[..1], 63), IndirectOperation), Is.EqualTo(Error), "indirect twice");
        Assert.That(front.AwaitOne(front.PutIndirect(ReadOperation, 0, [Page(0), new Piece(9999, 0, 7)], 63), ReadOperation), Is.EqualTo(Error));
        Assert.That(front.MappedData(), Is.Zero);
    }

    [Test]
    public async Task A_disk_with_large_sectors_is_read_in_those()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage { SectorSize = 4096 });
        Assert.That(disk.Node("sector-size"), Is.EqualTo("4096"));
        Assert.That(disk.Front.Do(ReadOperation, 8, Page(0)), Is.EqualTo(Okay));
        Assert.That(disk.Front.Do(ReadOperation, 1, Page(0)), Is.EqualTo(Error));
        Assert.That(disk.Front.Do(ReadOperation, 0, new Piece(FirstData, 0, 3)), Is.EqualTo(Error));
    }

    [TestCase(true, false)]
    [TestCase(false, true)]
    public async Task A_read_only_disk_is_only_read(bool byOption, bool cdRom)
    {
        var image = new FakeImage { IsReadOnly = !byOption && !cdRom };
        await using BlockFixture disk = BlockFixture.Connected(image, change: o => o with { IsReadOnly = byOption, IsCdRom = cdRom });
        Assert.That((disk.Node("mode"), disk.Node("info")), Is.EqualTo(("r", cdRom ? "7" : "4")));
        Assert.That(disk.Node("feature-discard"), Is.Null);
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        Assert.That(disk.Front.Do(WriteOperation, 0, Page(0)), Is.EqualTo(Error));
        Assert.That(disk.Front.Do(BarrierOperation, 0, Page(0)), Is.EqualTo(Error));
        Assert.That(disk.Front.Do(FlushOperation, 0), Is.EqualTo(Okay));
        Assert.That(disk.Front.AwaitOne(disk.Front.PutDiscard(0, 8), DiscardOperation), Is.EqualTo(NotSupported));
    }

    [Test]
    public async Task Discards_are_checked()
    {
        var image = new FakeImage();
        Array.Fill(image.Contents, (byte)9);
        await using BlockFixture disk = BlockFixture.Connected(image);
        FakeBlkfront front = disk.Front;
        Assert.That(front.AwaitOne(front.PutDiscard(8, 16), DiscardOperation), Is.EqualTo(Okay));
        Assert.That((image.Contents[4095], image.Contents[4096], image.Contents[12287], image.Contents[12288]), Is.EqualTo((9, 0, 0, 9)));
        Assert.That(front.AwaitOne(front.PutDiscard(8, 16, flag: 1), DiscardOperation), Is.EqualTo(NotSupported), "secure");
        Assert.That(front.AwaitOne(front.PutDiscard(8, 0), DiscardOperation), Is.EqualTo(Error));
        Assert.That(front.AwaitOne(front.PutDiscard(2040, 9), DiscardOperation), Is.EqualTo(Error));
        Assert.That(front.AwaitOne(front.PutDiscard(8, ulong.MaxValue), DiscardOperation), Is.EqualTo(Error));
        Assert.That(front.AwaitOne(front.PutDiscard(0, 2048), DiscardOperation), Is.EqualTo(Okay));
        Assert.That(disk.Backend.Statistics.DiscardRequests, Is.EqualTo(2));
    }

    [Test]
    public async Task Persistent_grants_stay_mapped_within_a_bound()
    {
        await using BlockFixture disk = BlockFixture.Connected(
            new FakeImage(), new FrontEndOptions { IsPersistent = true }, static o => o with { MaxPersistentGrants = 6 });
        FakeBlkfront front = disk.Front;
        Assert.That(front.Do(ReadOperation, 0, Page(0), Page(1), Page(0)), Is.EqualTo(Okay));
        Assert.That((front.MappedData(), disk.Backend.PersistentGrants), Is.EqualTo((2, 2)));
        for (int i = 0; i < 20; i++)
            Assert.That(front.Do(WriteOperation, 0, Page(0), Page(i)), Is.EqualTo(Okay));
        Assert.That((front.MappedData(), disk.Backend.PersistentGrants), Is.EqualTo((6, 6)));

        // Those used last stay, and page 0 was used by all; more in one request than there may be works as well.
        Assert.That(disk.Guest.Table[FirstData].Pin, Is.Not.Zero);
        Assert.That(disk.Guest.Table[FirstData + 19].Pin, Is.Not.Zero);
        Assert.That(front.Do(ReadOperation, 0, [.. Enumerable.Range(20, 11).Select(Page)]), Is.EqualTo(Okay));
        Assert.That(front.MappedData(), Is.EqualTo(6));
    }

    [TestCase(true)]
    [TestCase(false)]
    public async Task Errors_of_the_image_reach_the_guest_and_people(bool full)
    {
        var image = new FakeImage { Error = full ? LibC.ENOSPC : LibC.EIO };
        await using BlockFixture disk = BlockFixture.Connected(image);
        Assert.That(disk.Front.Do(WriteOperation, 0, Page(0)), Is.EqualTo(Error));
        Assert.That(disk.Front.Do(FlushOperation, 0), Is.EqualTo(Error));
        Assert.That(disk.Front.Do(FlushOperation, 0, Page(0)), Is.EqualTo(Error));
        Assert.That(disk.Reports.First(), Does.Contain("vbd 51712 of domain 7").And.Contain("fake image").And.Contain(full ? "no room left" : "Input/output error"));
        image.Error = LibC.EOPNOTSUPP;
        Assert.That(disk.Front.AwaitOne(disk.Front.PutDiscard(0, 8), DiscardOperation), Is.EqualTo(NotSupported));
        image.Error = LibC.EIO;
        for (int i = 0; i < 50; i++)
            _ = disk.Front.Do(ReadOperation, 0, Page(0));
        Assert.That(disk.Reports, Has.Count.LessThan(10), "a guest cannot fill the log");
        image.Error = 0;
        Assert.That(disk.Front.Do(WriteOperation, 0, Page(0)), Is.EqualTo(Okay), "it goes on");
    }

    [Test]
    public async Task More_requests_than_the_ring_holds_end_the_connection_and_a_new_one_can_be_made()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), new FrontEndOptions { IsPersistent = true });
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        disk.Front.Ring().RequestProducer += (uint)disk.Front.RingSize + 1;
        disk.Front.Notify();
        disk.Front.AwaitState(XenbusState.Closing);
        Assert.That(
            disk.Store.Read("/local/domain/0/error/backend/vbd/7/51712/error"), Is.EqualTo("13 the front end says that it has made more requests than its ring of 32 holds"));
        Assert.That(disk.Reports.Single(), Does.Contain("more requests than its ring"));
        Assert.That(disk.Front.MappedData(), Is.Zero);
        disk.Front.SetState(XenbusState.Closed);
        disk.Front.AwaitState(XenbusState.Closed);
        disk.Front.SetState(XenbusState.Initialising);
        disk.Front.Connect();
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
    }

    [Test]
    public async Task A_front_end_that_starts_anew_is_connected_again()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage());
        for (int i = 0; i < 3; i++)
        {
            Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
            disk.Front.Disconnect();
            disk.Front.SetState(XenbusState.Initialising);
            disk.Front.Connect();
        }

        // One that never said good-bye: a kernel that was started by kexec after a crash, or has come back from suspend.
        disk.Front.SetState(XenbusState.Initialising);
        disk.Front.Connect();
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));

        // Nor one that knows nothing of the rings before, which the back end may look at until it finds that there are others.
        var anew = new FakeBlkfront(disk.Guest, disk.Store, BlockFixture.Device, new FrontEndOptions { RingOffset = 8 });
        anew.Publish();
        anew.SetState(XenbusState.Initialised);
        Assert.That(anew.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
    }

    private static IEnumerable<TestCaseData> BadNodes()
    {
        foreach ((string name, string value) in new[]
        {
            ("ring-ref", "x"), ("ring-ref", "-1"), ("ring-ref", "99"), ("ring-ref", "4294967296"), ("ring-ref", ""), ("ring-ref", "300"),
            ("event-channel", "0"), ("event-channel", "4095"), ("event-channel", "1"), ("event-channel", "port"), ("protocol", "x86_128-abi"),
            ("ring-page-order", "5"), ("ring-page-order", "1"), ("ring-page-order", "-1"), ("num-ring-pages", "3"), ("num-ring-pages", "99"),
            ("multi-queue-num-queues", "0"), ("multi-queue-num-queues", "3"), ("multi-queue-num-queues", "2"), ("feature-persistent", "yes"),
            ("protocol", new string('\n', 300)),
        })
        {
            yield return new TestCaseData(name, value);
        }
    }

    [TestCaseSource(nameof(BadNodes))]
    public async Task Nodes_that_make_no_sense_close_the_device_with_an_error(string name, string value)
    {
        await using BlockFixture disk = BlockFixture.Create(new FakeImage());
        disk.Front.AwaitState(XenbusState.InitWait);
        disk.Front.Publish();
        disk.Front.Write(name, value);
        disk.Front.SetState(XenbusState.Initialised);
        disk.Front.AwaitState(XenbusState.Closing);
        string error = disk.Store.Read("/local/domain/0/error/backend/vbd/7/51712/error")!;
        Assert.That(error, Does.Match("^[0-9]+ .+"));
        Assert.That(error.Any(char.IsControl), Is.False);
        Assert.That(disk.Reports, Has.Count.EqualTo(1));

        // Told once, and the next driver finds a device.
        disk.Front.SetState(XenbusState.Connected);
        disk.Front.SetState(XenbusState.Closed);
        disk.Front.AwaitState(XenbusState.Closed);
        if (name is "ring-ref" or "event-channel" or "protocol" or "feature-persistent")
        {
            disk.Front.SetState(XenbusState.Initialising);
            disk.Front.Connect();
            Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        }
    }

    [TestCase("banana")]
    [TestCase("9")]
    [TestCase("0")]
    [TestCase("99999999999999999999")]
    public async Task A_state_that_is_none_is_an_error(string state)
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), new FrontEndOptions { IsPersistent = true });
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        disk.Front.Write("state", state);
        disk.Front.AwaitState(XenbusState.Closing);
        Assert.That(disk.Store.Read("/local/domain/0/error/backend/vbd/7/51712/error"), Does.Contain("saw state"));
        Assert.That(disk.Front.MappedData(), Is.Zero);
    }

    [Test]
    public async Task A_front_end_that_is_removed_is_closed()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), new FrontEndOptions { IsPersistent = true });
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        disk.Store.Remove(disk.Front.Folder);
        disk.Front.AwaitState(XenbusState.Closed);
        Assert.That(disk.Front.MappedData(), Is.Zero);
    }

    [Test]
    public async Task Unplugging_waits_for_the_guest()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image);
        Assert.That(await disk.Backend.RemoveAsync(TimeSpan.FromMilliseconds(50)), Is.False, "the guest still has it");
        disk.Front.AwaitState(XenbusState.Closing);
        Assert.That((disk.Node("online"), disk.Front.BackState), Is.EqualTo(("0", XenbusState.Closing)));
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay), "and can use it");
        Task<bool> removal = disk.Backend.RemoveAsync(Patience);
        disk.Front.SetState(XenbusState.Closed);
        Assert.That(await removal, Is.True);
        Assert.That(image.IsDisposed, Is.True);
        foreach (string path in new[] { "/libxl/7/device/vbd", "/local/domain/7/device/vbd", "/local/domain/0/backend/vbd" })
            Assert.That(disk.Store.Exists(path), Is.False, path);
    }

    [Test]
    public async Task Unplugging_by_force_does_not_wait_for_the_guest()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { IsPersistent = true });
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        Assert.That(await disk.Backend.RemoveAsync(TimeSpan.FromMilliseconds(20), force: true), Is.True);
        Assert.That(image.IsDisposed, Is.True);
        Assert.That(disk.Front.MappedData(), Is.Zero);
        disk.Front.Put(ReadOperation, 0, [Page(0)]);
        _ = disk.Front.Ring().Push();
    }

    [Test]
    public async Task What_is_not_connected_is_unplugged_at_once()
    {
        await using BlockFixture disk = BlockFixture.Create(new FakeImage());
        disk.Front.AwaitState(XenbusState.InitWait);
        Assert.That(await disk.Backend.RemoveAsync(Patience), Is.True);
    }

    [Test]
    public async Task A_domain_that_ends_in_mid_request_lets_go_of_everything()
    {
        var image = new FakeImage();
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { IsPersistent = true });
        image.Hold();
        for (int i = 0; i < 8; i++)
            disk.Front.Put(i % 2, 0, [Page(i)]);
        disk.Front.Push();
        Assert.That(SpinWait.SpinUntil(() => image.Held == 8, Patience), Is.True);
        disk.EndDomain();
        Assert.That(disk.Manager.Domains, Has.Count.EqualTo(1), "its memory stays as long as the disk may write to it");
        Assert.That(disk.Backend.State, Is.Not.EqualTo(XenbusState.Closed));
        image.LetGo();
        Assert.That(SpinWait.SpinUntil(() => disk.Manager.Domains.Count == 0, Patience), Is.True);
        disk.Front.AwaitState(XenbusState.Closed);
    }

    [Test]
    public async Task A_domain_that_suspends_itself_keeps_its_disk_and_may_go_on_with_it()
    {
        const ulong Shutdown = 2;
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), new FrontEndOptions { IsPersistent = true });
        Domain domain = disk.Guest.Fake.Domain;
        disk.Guest.Fake.Machine.Script = cpu => [cpu.Hypercall(HypercallNumber.SchedOpCompat, Shutdown, (ulong)ShutdownReason.Suspend, domain.Layout.StartInfo.Value)];
        domain.Start();
        Assert.That((await domain.Completion.WaitAsync(Patience)).Reason, Is.EqualTo(ShutdownReason.Suspend));
        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        Assert.That(disk.Backend.State, Is.EqualTo(XenbusState.Connected));

        // The script has no more to do, so the guest powers off.
        domain.Resume();
        Assert.That((await domain.Completion.WaitAsync(Patience)).Reason, Is.EqualTo(ShutdownReason.PowerOff));
        disk.Front.AwaitState(XenbusState.Closed);
        Assert.That(disk.Front.MappedData(), Is.Zero);
    }

    [Test]
    public async Task Idle_pages_are_given_back_at_the_end_of_a_connection()
    {
        await using BlockFixture disk = BlockFixture.Connected(new FakeImage(), new FrontEndOptions { IsPersistent = true });
        Assert.That(disk.Front.Do(WriteOperation, 0, Page(0), Page(1)), Is.EqualTo(Okay));
        Assert.That(disk.Front.MappedData(), Is.EqualTo(2));
        disk.Front.Disconnect();
        Assert.That(disk.Front.MappedData(), Is.Zero);
    }

    [Test]
    public async Task Random_rings_hurt_nobody()
    {
        var image = new FakeImage();
        var bystanderImage = new FakeImage();
        await using BlockFixture bystander = BlockFixture.Connected(bystanderImage);
        await using BlockFixture disk = BlockFixture.Connected(image, new FrontEndOptions { IsPersistent = true, RingPageOrder = 1 });
        for (int seed = 0; seed < 60; seed++)
        {
            var random = new Random(seed);
            FakeRing ring = disk.Front.Ring();
            uint answered = ring.ResponseProducer;
            ring.Fill(random);

            // A jump that is not too far has its requests looked at, all of them nonsense.
            ring.RequestProducer = answered + (uint)random.Next(0, disk.Front.RingSize + (seed % 4 == 0 ? 100 : 1));
            if (seed % 3 == 0)
            {
                for (int i = 0; i < 4; i++)
                    disk.Front.Write(random.Next(3) switch { 0 => "ring-ref0", 1 => "event-channel", _ => "feature-persistent" }, random.Next(0, 500));
            }

            disk.Front.Notify();
            _ = SpinWait.SpinUntil(() => ring.ResponseProducer == ring.RequestProducer || disk.Front.BackState != XenbusState.Connected, 200);
            if (seed % 5 == 0)
                disk.Front.Write("state", random.Next(0, 12));
            disk.Front.SetState(XenbusState.Closed);
            disk.Front.AwaitState(XenbusState.Closed);
            Assert.That(disk.Front.MappedData(), Is.Zero);
            disk.Front.SetState(XenbusState.Initialising);
            disk.Front.Connect();
        }

        Assert.That(disk.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        Assert.That(bystander.Front.Do(ReadOperation, 0, Page(0)), Is.EqualTo(Okay));
        Assert.That(disk.Reports, Has.Count.LessThan(20));
    }
}
