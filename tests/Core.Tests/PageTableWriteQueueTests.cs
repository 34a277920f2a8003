// Which page-table stores have to be repeated inside the VM, and how they are put together.
using System.Runtime.InteropServices;

namespace XenSharp.Core.Tests;

public sealed unsafe class PageTableWriteQueueTests
{
    private const PageFlags Used = PageFlags.Present | PageFlags.Accessed;
    private const ulong Base = 0x10_0000;

    private PageTableWriteQueue* _queue;
    private PageTableEntry* _entries;

    [SetUp]
    public void SetUp()
    {
        _queue = (PageTableWriteQueue*)NativeMemory.AllocZeroed((nuint)sizeof(PageTableWriteQueue));
        _entries = (PageTableEntry*)NativeMemory.AllocZeroed(4096);
        _queue->InGuest = 1;
    }

    [TearDown]
    public void TearDown()
    {
        NativeMemory.Free(_queue);
        NativeMemory.Free(_entries);
    }

    private static IEnumerable<TestCaseData> Stores()
    {
        static TestCaseData Case(string name, PageFlags old, PageFlags value, bool repeated, ulong oldFrame = 5, ulong newFrame = 5)
            => new TestCaseData(new PageTableEntry(new Mfn(oldFrame), old), new PageTableEntry(new Mfn(newFrame), value), repeated).SetArgDisplayNames(name);
        yield return Case("was not present", PageFlags.Writable | PageFlags.Accessed, Used, false);
        yield return Case("was never used", PageFlags.Present | PageFlags.Writable | PageFlags.User, PageFlags.None, false);
        yield return Case("was never used, another frame", PageFlags.Present | PageFlags.Writable, Used, false, newFrame: 6);
        yield return Case("unchanged", Used, Used, false);
        yield return Case("gains writing", Used, Used | PageFlags.Writable, false);
        yield return Case("gains user", Used, Used | PageFlags.User, false);
        yield return Case("software bits", Used, Used | PageFlags.Available1 | PageFlags.GuestKernel, false);
        yield return Case("global", Used, Used | PageFlags.Global, false);
        yield return Case("cleared", Used, PageFlags.None, true);
        yield return Case("loses present only", Used, PageFlags.Accessed, true);
        yield return Case("loses writing", Used | PageFlags.Writable, Used, true);
        yield return Case("loses user", Used | PageFlags.User, Used, true);
        yield return Case("loses accessed", Used, PageFlags.Present, true);
        yield return Case("loses dirty", Used | PageFlags.Dirty, Used, true);
        yield return Case("loses execution", Used, Used | PageFlags.NoExecute, true);
        yield return Case("gains execution", Used | PageFlags.NoExecute, Used, true);
        yield return Case("another memory type", Used, Used | PageFlags.CacheDisable, true);
        yield return Case("another frame", Used, Used, true, newFrame: 6);
        yield return Case("another frame, with more rights", Used, Used | PageFlags.Writable | PageFlags.User, true, newFrame: 6);
    }

    [TestCaseSource(nameof(Stores))]
    public void Repeated_where_something_may_be_cached_that_is_no_longer_allowed(PageTableEntry old, PageTableEntry value, bool repeated)
    {
        *_entries = old;
        _queue->Store(_entries, new MachineAddress(Base), value);
        Assert.That(*_entries, Is.EqualTo(value));
        Assert.That(_queue->Count, Is.EqualTo(repeated ? 1 : 0));

        *_entries = old;
        _queue->Count = 0;
        Assert.That(_queue->CompareExchange(_entries, new MachineAddress(Base), value, old), Is.EqualTo(old));
        Assert.That(*_entries, Is.EqualTo(value));
        Assert.That(_queue->Count, Is.EqualTo(repeated ? 1 : 0));

        // A processor that walks the tables itself needs no repetition.
        *_entries = old;
        _queue->Count = 0;
        _queue->InGuest = 0;
        _queue->Store(_entries, new MachineAddress(Base), value);
        Assert.That(_queue->Count, Is.Zero);
    }

    [Test]
    public void An_exchange_that_fails_repeats_nothing()
    {
        var old = new PageTableEntry(new Mfn(5), Used);
        *_entries = old.With(PageFlags.Dirty);
        Assert.That(_queue->CompareExchange(_entries, new MachineAddress(Base), default, old), Is.EqualTo(old.With(PageFlags.Dirty)));
        Assert.That(*_entries, Is.EqualTo(old.With(PageFlags.Dirty)));
        Assert.That(_queue->Count, Is.Zero);
    }

    [Test]
    public void Neighbours_are_one_run()
    {
        foreach (int index in (int[])[0, 1, 2, 3, 3, 1])
            _queue->Repeat(new MachineAddress(Base + ((ulong)index * 8)));
        Assert.That(Runs(), Is.EqualTo(new[] { (Base, 4UL) }));
        _queue->Repeat(new MachineAddress(Base + 40));
        _queue->Repeat(new MachineAddress(Base - 8));
        _queue->Repeat(new MachineAddress(Base));
        Assert.That(Runs(), Is.EqualTo(new[] { (Base, 4UL), (Base + 40, 1UL), (Base - 8, 2UL) }));
    }

    [Test]
    public void More_runs_than_there_is_room_for_are_said_to_be_too_many()
    {
        for (int i = 0; i < PageTableWriteQueue.Capacity; i++)
            _queue->Repeat(new MachineAddress(Base + ((ulong)i * 16)));
        Assert.That((_queue->Count, _queue->Overflowed), Is.EqualTo((PageTableWriteQueue.Capacity, 0)));
        _queue->Repeat(new MachineAddress(Base + ((PageTableWriteQueue.Capacity - 1) * 16UL) + 8));
        Assert.That(_queue->Overflowed, Is.Zero, "the last run can still grow");
        _queue->Repeat(new MachineAddress(Base));
        Assert.That((_queue->Count, _queue->Overflowed), Is.EqualTo((PageTableWriteQueue.Capacity, 1)));
    }

    [Test]
    public void A_flush_is_remembered()
    {
        _queue->Flush();
        Assert.That(_queue->FlushPending, Is.EqualTo(1));
    }

    private (ulong Address, ulong Count)[] Runs()
        => [.. Enumerable.Range(0, _queue->Count).Select(i => ((*_queue)[i].Address, (*_queue)[i].Count))];

    [Test]
    public void Pages_are_dropped_one_by_one_up_to_a_number()
    {
        for (ulong page = 0; page < PageTableWriteQueue.MaxInvalidations; page++)
        {
            _queue->Invalidate(new VirtualAddress((page << Paging.PageShift) + page));
            _queue->Invalidate(new VirtualAddress(page << Paging.PageShift));
            Assert.That((_queue->InvalidationCount, _queue->Invalidated((int)page)), Is.EqualTo(((int)page + 1, page << Paging.PageShift)));
        }

        Assert.That(_queue->FlushPending, Is.Zero);
        _queue->Invalidate(new VirtualAddress(1 << 30));
        Assert.That(_queue->FlushPending, Is.EqualTo(1));
    }

    /// <summary>Page 0 too can be asked for; two pages at once are all pages; what is taken over is asked for no more.</summary>
    [TestCase(new ulong[] { 0x123 }, new ulong[] { 0 }, 0)]
    [TestCase(new ulong[] { 0x7123, 0x7000 }, new ulong[] { 0x7000 }, 0)]
    [TestCase(new ulong[] { 0x7123, 0x8000 }, new ulong[] { 0x7000 }, 1)]
    public void Other_vcpus_ask_for_pages(ulong[] requests, ulong[] pages, int everything)
    {
        foreach (ulong request in requests)
            _queue->RequestInvalidation(new VirtualAddress(request));
        Assert.That(_queue->IsRequested, Is.True);
        _queue->TakeRequests();
        Assert.That(_queue->IsRequested, Is.False);
        Assert.That(_queue->FlushPending, Is.EqualTo(everything));
        Assert.That(Enumerable.Range(0, _queue->InvalidationCount).Select(i => _queue->Invalidated(i)), Is.EqualTo(pages));
        _queue->Clear();
        _queue->TakeRequests();
        Assert.That((_queue->FlushPending, _queue->InvalidationCount), Is.EqualTo((0, 0)));
    }
}
