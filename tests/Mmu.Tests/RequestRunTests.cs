// Batches of mmu_update against the same requests made one by one.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

/// <summary>A batch has ways of its own for requests that name neighbours; nothing may show of them.</summary>
public sealed unsafe class RequestRunTests
{
    private const int L1 = 10, OtherL1 = 11, L2 = 12, Gdt = 13, Plain = 14, FirstPage = 20, Pages = 12, Frames = 64, Owned = 60, FirstFree = 60;
    private const int MostRequests = 48;
    private const int DoneOffset = 2048;

    [Test]
    public void A_batch_does_what_its_requests_do_one_by_one([Range(0, 19)] int seed, [Values] bool inGuest)
    {
        const int batches = 300;
        var random = new Random(seed);
        using TestMachine together = NewMachine(inGuest);
        using TestMachine oneByOne = NewMachine(inGuest);
        int whole = 0;
        int refused = 0;
        for (int batch = 0; batch < batches; batch++)
        {
            (ulong Pointer, ulong Value)[] requests = Requests(random);

            // Not always at the start of a page, so that lists go on from one to the next, or have a request that lies in both.
            int offset = random.Next(3) switch { 0 => 0, 1 => 4096 - 40, _ => 4096 - 64 };
            (long result, uint done) = Execute(together, requests, offset);
            long expected = 0;
            uint expectedDone = 0;
            foreach ((ulong Pointer, ulong Value) request in requests)
            {
                (expected, uint one) = Execute(oneByOne, [request], offset);
                if (expected != 0)
                    break;
                expectedDone += one;
            }

            string what = $"batch {batch}: {string.Join(", ", requests.Select(static request => $"{request.Pointer:x}: {request.Value:x}"))}";
            Assert.That((result, done), Is.EqualTo((expected, expectedDone)), what);
            Compare(together, oneByOne, what);
            together.Queue->Clear();
            oneByOne.Queue->Clear();
            _ = result == 0 ? whole++ : refused++;
        }

        Assert.That(FrameTableAudit.Check(together.Context), Is.Null);
        Assert.That(whole, Is.GreaterThan(batches / 20));
        Assert.That(refused, Is.GreaterThan(batches / 20));
    }

    [Test]
    public void A_batch_that_unmaps_its_own_list_goes_on_reading_it()
    {
        // As on a processor that has the translation still: what was read from is remembered, until something is read elsewhere.
        using var machine = new TestMachine();
        int list = new VirtualAddress(DataAddress).TableIndex(1);
        long result = machine.Update(
            (EntryAddress(3, 100).Value, new PageTableEntry(Frame(FirstPage), Leaf).Value),
            (EntryAddress(3, list).Value, 0),
            (EntryAddress(3, 101).Value, new PageTableEntry(Frame(FirstPage), Leaf).Value),
            (EntryAddress(3, 102).Value, new PageTableEntry(Frame(FirstPage), ReadOnly).Value));
        Assert.That(result, Is.Zero);
        Assert.That((machine.Info(FirstPage).TypeCount, machine.Info(FirstPage).ReferenceCount), Is.EqualTo((2U, 4U)));
        Assert.That(machine.Info(4).TypeCount, Is.Zero);
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
    }

    [Test]
    public void An_event_stops_a_run_where_it_comes()
    {
        // Nothing else runs beside the batch, so one of its own requests has to mark the event: vcpu_info lies in the table.
        using var machine = new TestMachine();
        Assert.That(machine.Pin(1, L1), Is.Zero);
        machine.Vcpu->Info = (VcpuInfo*)machine.Entry(L1, 7);
        (ulong, ulong)[] requests = [.. Enumerable.Range(5, 6).Select(static i => (EntryAddress(L1, i).Value, 0x1234_5600UL))];

        // evtchn_upcall_pending, and a byte further evtchn_upcall_mask.
        requests[2].Item2 = 2;
        Assert.That(machine.Update(requests), Is.Zero);
        Assert.That(machine.Vcpu->Continuation.Pending, Is.EqualTo(1));
        Assert.That(machine.Vcpu->Continuation.Arguments.A1, Is.EqualTo(3UL | MmuUpdate.Preempted));
        Assert.That(machine.Entry(L1, 7)->Value, Is.EqualTo(2UL));
        Assert.That(machine.Entry(L1, 8)->Value, Is.Zero);
    }

    [Test]
    public void A_frame_that_is_taken_and_nobodys_yet_is_not_mapped([Values] bool writable)
    {
        using var machine = new TestMachine(Frames, Owned);
        Assert.That(machine.Pin(1, L1), Is.Zero);
        machine.Context->State->MaxPages = Frames;
        Assert.That(machine.Frames->TryReserve(FrameFlags.None, 0, ulong.MaxValue, out Mfn frame), Is.True);
        PageTableEntry entry = new(frame, writable ? Leaf : ReadOnly);
        (ulong, ulong) harmless = (EntryAddress(L1, 1).Value, 0);
        Assert.That(machine.Update(harmless, (EntryAddress(L1, 2).Value, entry.Value)), Is.EqualTo(-(long)Errno.EBUSY));
        Assert.That(machine.Frames->Find(frame)->ReferenceCount, Is.EqualTo(1U));
        machine.Frames->Assign(FrameFlags.None, 0, frame);
        Assert.That(machine.Update(harmless, (EntryAddress(L1, 2).Value, entry.Value)), Is.Zero);
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
    }

    private static TestMachine NewMachine(bool inGuest)
    {
        var machine = new TestMachine(Frames, Owned, inGuest);
        Assert.That(machine.Pin(1, L1), Is.Zero);
        Assert.That(machine.Pin(1, OtherL1), Is.Zero);
        Assert.That(machine.Pin(2, L2), Is.Zero);
        ((ulong*)machine.Data)[0] = Frame(Gdt).Value;
        Assert.That(DescriptorTables.SetGdt(machine.Vcpu, new HypercallArguments { A0 = DataAddress, A1 = 512 }), Is.Zero);

        // What follows on one page for the guest does not do so in the memory behind it.
        int list = new VirtualAddress(DataAddress).TableIndex(1);
        (*machine.Entry(3, list), *machine.Entry(3, list + 1)) = (*machine.Entry(3, list + 1), *machine.Entry(3, list));
        machine.Queue->Clear();
        return machine;
    }

    /// <summary>Mostly entries of one L1, one beside the other, that map pages; and now and then anything else.</summary>
    private static (ulong Pointer, ulong Value)[] Requests(Random random)
    {
        var requests = new (ulong Pointer, ulong Value)[1 + random.Next(MostRequests)];
        int table = random.Next(4) == 0 ? OtherL1 : L1;
        int index = random.Next(Paging.EntriesPerTable - MostRequests);

        // Some lists have nothing that is refused in them.
        bool isTame = random.Next(3) == 0;
        for (int i = 0; i < requests.Length; i++)
        {
            if (random.Next(20) == 0)
                table = random.Next(6) switch { 0 => Plain, 1 => L2, 2 => OtherL1, _ => L1 };
            ulong pointer = EntryAddress(table, random.Next(10) == 0 ? random.Next(16) : index + i).Value;
            int target = FirstPage + random.Next(Pages);
            PageFlags flags = random.Next(6) == 0 ? PageFlags.None : PageFlags.Present;
            flags |= (PageFlags)((ulong)random.Next(2) << 1) | (PageFlags)((ulong)random.Next(16) << 5 & (ulong)(PageFlags.Accessed | PageFlags.Dirty | PageFlags.Global));
            flags |= random.Next(3) == 0 ? PageFlags.User : PageFlags.None;
            flags |= random.Next(8) == 0 ? PageFlags.NoExecute : PageFlags.None;
            if (random.Next(8) == 0)
                pointer |= random.Next(2) == 0 ? 2UL : 3;
            if (!isTame && random.Next(40) == 0)
                (pointer, target, flags) = Nonsense(random, pointer, target, flags);
            requests[i] = (pointer, new PageTableEntry(Frame(target), flags).Value);
        }

        return requests;
    }

    private static (ulong Pointer, int Target, PageFlags Flags) Nonsense(Random random, ulong pointer, int target, PageFlags flags) => random.Next(9) switch
    {
        0 => (pointer | 4, target, flags),
        1 => (pointer & ~7UL | 1, target, flags),
        2 => (pointer, FirstFree, flags | PageFlags.Present),
        3 => (pointer, 1000, flags | PageFlags.Present),
        4 => (pointer, L1, flags | PageFlags.Present | PageFlags.Writable),
        5 => (pointer, L1, (flags | PageFlags.Present) & ~PageFlags.Writable),
        6 => (pointer, target, flags | PageFlags.Present | PageFlags.CacheDisable),
        7 => (EntryAddress(Gdt, 3).Value, target, flags),
        _ => (pointer, Gdt, flags | PageFlags.Present),
    };

    private static (long Result, uint Done) Execute(TestMachine machine, ReadOnlySpan<(ulong Pointer, ulong Value)> requests, int offset)
    {
        for (int i = 0; i < requests.Length; i++)
        {
            *Word(machine, offset + (16 * i)) = requests[i].Pointer;
            *Word(machine, offset + (16 * i) + 8) = requests[i].Value;
        }

        *(uint*)(machine.Data + (2 * 4096) + DoneOffset) = uint.MaxValue;
        long result = machine.Complete(
            &MmuUpdate.Execute,
            new HypercallArguments
            {
                A0 = DataAddress + (ulong)offset, A1 = (ulong)requests.Length, A2 = DataAddress + (2 * Paging.PageSize) + DoneOffset, A3 = DomainId.Self.Value,
            });
        return (result, *(uint*)(machine.Data + (2 * 4096) + DoneOffset));
    }

    /// <summary>Where the guest's word is at an offset from <see cref="DataAddress"/>: its first two data pages lie the other way round.</summary>
    private static ulong* Word(TestMachine machine, int offset) => (ulong*)(machine.Data + (offset < 2 * 4096 ? offset ^ 4096 : offset));

    private static void Compare(TestMachine one, TestMachine other, string what)
    {
        for (int frame = 0; frame < Frames; frame++)
        {
            (FrameInfo left, FrameInfo right) = (one.Info(frame), other.Info(frame));
            Assert.That((left.State, left.ReferenceCount, left.Flags), Is.EqualTo((right.State, right.ReferenceCount, right.Flags)), $"frame {frame}, {what}");

            // Not the lists themselves.
            if (frame is < 4 or > 7)
                Assert.That(Table(one, frame).SequenceEqual(Table(other, frame)), $"contents of frame {frame}, {what}");
        }

        Assert.That(Repeated(one), Is.EqualTo(Repeated(other)), what);
        Assert.That(one.Queue->FlushPending, Is.EqualTo(other.Queue->FlushPending), what);
        Assert.That(
            new ReadOnlySpan<ulong>(one.Context->MachineToPhys, Frames).SequenceEqual(new ReadOnlySpan<ulong>(other.Context->MachineToPhys, Frames)), what);
    }

    private static ReadOnlySpan<ulong> Table(TestMachine machine, int frame) => new(machine.Entry(frame, 0), Paging.EntriesPerTable);

    /// <summary>The stores that are to be repeated inside the VM, in their order.</summary>
    private static List<(ulong, ulong)> Repeated(TestMachine machine)
        => [.. Enumerable.Range(0, machine.Queue->Count).Select(i => ((*machine.Queue)[i].Address, (*machine.Queue)[i].Count))];
}
