// Frames that are to be given back to the host: which they are, and who may use one meanwhile.
using System.Runtime.InteropServices;
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class ScrubMapTests
{
    private const uint Decrease = 1;
    private const uint Populate = 6;

    /// <summary>All runs that are to be scrubbed, which then are.</summary>
    private static List<(ulong First, ulong Count)> ScrubAll(TestMachine machine, ulong longest = 64)
    {
        List<(ulong, ulong)> runs = [];
        while (machine.Frames->Scrub.TryBeginRun(longest, out ulong first, out ulong count))
        {
            machine.Frames->Scrub.EndRun(first, count);
            runs.Add((first, count));
        }

        Assert.That(machine.Frames->Scrub.Pending, Is.Zero);
        return runs;
    }

    [Test]
    public void Neighbours_are_one_run_and_the_lowest_comes_first()
    {
        using var machine = new TestMachine(200, 200);
        ulong[] frames = [150, 63, 64, 65, 30, 31, 199, 10];
        Assert.That(machine.Reservation(Decrease, [.. frames.Select(static frame => FirstFrame + frame)]), Is.EqualTo(8));
        Assert.That(machine.Frames->Scrub.Pending, Is.EqualTo(8));
        Assert.That(ScrubAll(machine), Is.EqualTo(new[] { (10UL, 1UL), (30UL, 2UL), (63UL, 3UL), (150UL, 1UL), (199UL, 1UL) }));
        Assert.That(machine.Reservation(Decrease, [FirstFrame + 20, FirstFrame + 21, FirstFrame + 22]), Is.EqualTo(3));
        Assert.That(ScrubAll(machine, 2), Is.EqualTo(new[] { (20UL, 2UL), (22UL, 1UL) }), "no longer than asked for");
    }

    [Test]
    public void A_frame_that_is_mapped_is_not_among_them_until_its_last_mapping_goes()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Update(3, 50, new PageTableEntry(Frame(20), Leaf)), Is.Zero);
        Assert.That(machine.Update(3, 51, new PageTableEntry(Frame(20), ReadOnly)), Is.Zero);
        Assert.That(machine.Reservation(Decrease, [Frame(20).Value]), Is.EqualTo(1));
        Assert.That(machine.Frames->Scrub.Pending, Is.Zero);
        Assert.That(machine.Update(3, 50, default), Is.Zero);
        Assert.That(machine.Frames->Scrub.Pending, Is.Zero);
        Assert.That(machine.Update(3, 51, default), Is.Zero);
        Assert.That(ScrubAll(machine), Is.EqualTo(new[] { (20UL, 1UL) }));
    }

    [Test]
    public void A_pinned_table_is_not_among_them_until_it_is_unpinned()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Pin(1, 20), Is.Zero);
        Assert.That(machine.Reservation(Decrease, [Frame(20).Value]), Is.EqualTo(1));
        Assert.That(machine.Frames->Scrub.Pending, Is.Zero);
        Assert.That(machine.Unpin(20), Is.Zero);
        Assert.That(ScrubAll(machine), Is.EqualTo(new[] { (20UL, 1UL) }));
    }

    [Test]
    public void A_frame_that_is_taken_again_is_not_scrubbed_and_one_that_was_is_not_touched()
    {
        using var machine = new TestMachine();
        *(ulong*)machine.Entry(20, 3) = *(ulong*)machine.Entry(21, 3) = 0x77;
        Assert.That(machine.Reservation(Decrease, [Frame(20).Value]), Is.EqualTo(1));
        Assert.That(machine.Reservation(Populate, [0x100]), Is.EqualTo(1));
        Assert.That(*(ulong*)(machine.Data + 256), Is.EqualTo(Frame(20).Value));
        Assert.That(*(ulong*)machine.Entry(20, 3), Is.Zero, "cleared");
        Assert.That(ScrubAll(machine), Is.Empty);

        // To be cleared, a page would take the host's memory again at once; this machine leaves what was there for the test to see.
        Assert.That(machine.Reservation(Decrease, [Frame(21).Value]), Is.EqualTo(1));
        Assert.That(ScrubAll(machine), Has.Count.EqualTo(1));
        Assert.That(machine.Reservation(Populate, [0x100]), Is.EqualTo(1));
        Assert.That(*(ulong*)(machine.Data + 256), Is.EqualTo(Frame(21).Value));
        Assert.That(*(ulong*)machine.Entry(21, 3), Is.EqualTo(0x77));
    }

    [Test]
    public void What_was_a_page_table_of_shadows_is_always_cleared()
    {
        // The VM may store an entry again after the frame was scrubbed: it was queued before.
        using var machine = new TestMachine(inGuest: true);
        Assert.That(machine.Pin(1, 20), Is.Zero);
        Assert.That(machine.Unpin(20), Is.Zero);
        Assert.That(machine.Reservation(Decrease, [Frame(20).Value]), Is.EqualTo(1));
        Assert.That(ScrubAll(machine), Has.Count.EqualTo(1));
        *(ulong*)machine.Entry(20, 3) = 0x77;
        Assert.That(machine.Reservation(Populate, [0x100]), Is.EqualTo(1));
        Assert.That(*(ulong*)machine.Entry(20, 3), Is.Zero);
    }

    [Test]
    public void While_contents_are_held_nothing_is_scrubbed()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Reservation(Decrease, [Frame(20).Value]), Is.EqualTo(1));
        machine.Frames->Scrub.Hold();
        Assert.That(machine.Frames->Scrub.TryBeginRun(8, out _, out _), Is.False);
        machine.Frames->Scrub.Release();
        Assert.That(ScrubAll(machine), Has.Count.EqualTo(1));
    }

    [Test]
    [CancelAfter(60_000)]
    public void Nobody_loses_a_page_that_is_in_use_to_the_scrubbing_of_others(CancellationToken cancellation)
    {
        // Three threads take, fill, check and free words that stand for pages, while two scrub whatever is free.
        const int PerThread = 300;
        const int Rounds = 2000;
        const int Scrubbings = 1000;
        const int Users = 3;
        nuint size = ScrubMap.SizeOf(Users * PerThread);
        var words = (ulong*)NativeMemory.AllocZeroed(size);
        var pages = (int*)NativeMemory.AllocZeroed(Users * PerThread, sizeof(int));
        var map = (ScrubMap*)NativeMemory.AllocZeroed((nuint)sizeof(ScrubMap));
        map->Initialize(words, Users * PerThread);
        try
        {
            int running = Users;
            int lost = 0;
            int scrubbed = 0;
            List<Thread> threads = [];
            for (int user = 0; user < Users; user++)
            {
                int mine = user;
                threads.Add(new Thread(() =>
                {
                    var random = new Random(mine);
                    for (int round = 0; (round < Rounds || Volatile.Read(ref scrubbed) < Scrubbings) && !cancellation.IsCancellationRequested; round++)
                    {
                        // Interleaved, so that the words of the map are shared.
                        int first = random.Next(PerThread - 20);
                        for (int i = first; i < first + 20; i++)
                        {
                            int page = (i * Users) + mine;
                            bool marked = map->Take((ulong)page);
                            int found = Volatile.Read(ref pages[page]);
                            if (!marked && found != 0)
                                Interlocked.Increment(ref lost);
                            Volatile.Write(ref pages[page], round + 1);
                        }

                        for (int i = first; i < first + 20; i++)
                        {
                            int page = (i * Users) + mine;
                            if (Volatile.Read(ref pages[page]) != round + 1)
                                Interlocked.Increment(ref lost);
                            map->Mark((ulong)page);
                        }
                    }

                    Interlocked.Decrement(ref running);
                }));
            }

            for (int scrubber = 0; scrubber < 2; scrubber++)
            {
                threads.Add(new Thread(() =>
                {
                    while (Volatile.Read(ref running) != 0)
                    {
                        if (!map->TryBeginRun(8, out ulong first, out ulong count))
                            continue;
                        for (ulong page = first; page < first + count; page++)
                            Volatile.Write(ref pages[page], 0);
                        map->EndRun(first, count);
                        Interlocked.Increment(ref scrubbed);
                    }
                }));
            }

            threads.ForEach(static thread => thread.Start());
            threads.ForEach(static thread => thread.Join());
            Assert.That(lost, Is.Zero);
            Assert.That(scrubbed, Is.GreaterThanOrEqualTo(Scrubbings));
            while (map->TryBeginRun(8, out ulong first, out ulong count))
                map->EndRun(first, count);
            Assert.That(map->Pending, Is.Zero);
        }
        finally
        {
            NativeMemory.Free(words);
            NativeMemory.Free(pages);
            NativeMemory.Free(map);
        }
    }
}
