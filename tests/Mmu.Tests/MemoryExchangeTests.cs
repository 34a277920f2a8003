// XENMEM_exchange: frames for others.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class MemoryExchangeTests
{
    private const ulong Given = DataAddress + 256;
    private const ulong Taken = DataAddress + 512;

    private static ulong* Words(TestMachine machine, int offset) => (ulong*)(machine.Data + offset);

    /// <summary>Exchanges frames; those that are taken get pfns from 0x900 on.</summary>
    private static long Exchange(TestMachine machine, ReadOnlySpan<ulong> given, int givenOrder, int takenCount, int takenOrder, ulong done = 0)
    {
        new Span<ulong>(machine.Data, 9).Clear();
        given.CopyTo(new Span<ulong>(Words(machine, 256), given.Length));
        for (int i = 0; i < takenCount; i++)
            Words(machine, 512)[i] = 0x900 + ((ulong)i << takenOrder);
        ulong* request = Words(machine, 0);
        (request[0], request[1], request[2], request[3]) = (Given, (ulong)given.Length, (ulong)givenOrder, 0x7ff0);
        (request[4], request[5], request[6], request[7], request[8]) = (Taken, (ulong)takenCount, (ulong)takenOrder, 0x7ff0, done);
        return machine.Memory(11);
    }

    [Test]
    public void Single_frames_for_one_extent_and_back()
    {
        using var machine = new TestMachine(64, 40);
        ulong owned = machine.Context->State->OwnedPages;
        Assert.That(Exchange(machine, [Frame(30).Value, Frame(33).Value, Frame(35).Value, Frame(38).Value], 0, 1, 2), Is.Zero);
        Assert.That(Words(machine, 0)[8], Is.EqualTo(4));
        ulong taken = Words(machine, 512)[0];
        Assert.That(taken & 3, Is.Zero, "aligned to its size");
        for (ulong i = 0; i < 4; i++)
            Assert.That(machine.Context->MachineToPhys[taken + i - FirstFrame], Is.EqualTo(0x900 + i));
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(owned));

        Assert.That(Exchange(machine, [taken], 2, 4, 0), Is.Zero);
        Assert.That(Words(machine, 0)[8], Is.EqualTo(1));
        for (int i = 0; i < 4; i++)
            Assert.That(machine.Context->MachineToPhys[Words(machine, 512)[i] - FirstFrame], Is.EqualTo(0x900 + (ulong)i));
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(owned));
    }

    [Test]
    public void A_chunk_that_cannot_be_given_whole_is_kept_whole()
    {
        using var machine = new TestMachine(64, 40);
        ulong owned = machine.Context->State->OwnedPages;
        ulong free = machine.Frames->FreeCount;
        ulong[][] lists =
        [
            [Frame(30).Value, Frame(4).Value],  // mapped
            [Frame(30).Value, Frame(0).Value],  // a page table
            [Frame(30).Value, Frame(50).Value], // nobody's
            [Frame(30).Value, Frame(30).Value], // given before
            [Frame(30).Value, 5],
        ];
        foreach (ulong[] given in lists)
        {
            Assert.That(Exchange(machine, given, 0, 1, 1), Is.EqualTo(-(long)Errno.EINVAL));
            Assert.That(Words(machine, 0)[8], Is.Zero);
            Assert.That(Words(machine, 512)[0], Is.EqualTo(0x900));
            Assert.That(machine.Info(30).Owner, Is.EqualTo(Domain));
            Assert.That(machine.Context->MachineToPhys[30], Is.EqualTo(30));
            Assert.That((machine.Context->State->OwnedPages, machine.Frames->FreeCount), Is.EqualTo((owned, free)));
        }
    }

    [Test]
    public void Without_an_extent_of_the_size_the_frames_come_back()
    {
        // All 64 are owned, and no two of those that are given are neighbours.
        using var machine = new TestMachine(64, 64);
        *(ulong*)machine.Entry(33, 7) = 0x1234;
        Assert.That(Exchange(machine, [Frame(30).Value, Frame(33).Value], 0, 1, 1), Is.EqualTo(-(long)Errno.ENOMEM));
        Assert.That(*(ulong*)machine.Entry(33, 7), Is.EqualTo(0x1234), "with what was in them");
        Assert.That(machine.Frames->Scrub.Pending, Is.Zero, "and they are to keep it");
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(64));
        Assert.That((machine.Context->MachineToPhys[30], machine.Context->MachineToPhys[33]), Is.EqualTo((30UL, 33UL)));
        Assert.That(Exchange(machine, [Frame(30).Value, Frame(31).Value], 0, 1, 1), Is.Zero, "the same two");
    }

    [Test]
    public void What_is_given_leaves_its_contents_behind()
    {
        using var machine = new TestMachine(64, 40);
        *(ulong*)machine.Entry(30, 7) = 0x1234;
        Assert.That(Exchange(machine, [Frame(30).Value], 0, 1, 0), Is.Zero);
        Assert.That(Words(machine, 512)[0], Is.EqualTo(Frame(30).Value), "the lowest that is free");
        Assert.That(*(ulong*)machine.Entry(30, 7), Is.Zero);
        Assert.That(Exchange(machine, [Frame(31).Value, Frame(33).Value], 0, 1, 1), Is.Zero);
        Assert.That(machine.Frames->Scrub.Pending, Is.EqualTo(2), "free, and others were taken");
        Assert.That(machine.Frames->Scrub.TryBeginRun(8, out ulong first, out ulong count), Is.True, "no longer held");
        Assert.That((first, count), Is.EqualTo((31UL, 1UL)));
        machine.Frames->Scrub.EndRun(first, count);
    }

    [Test]
    public void A_kick_between_chunks()
    {
        using var machine = new TestMachine(64, 40);
        *machine.Vcpu->KickPending = 1;
        Assert.That(Exchange(machine, [Frame(30).Value, Frame(31).Value, Frame(32).Value], 0, 3, 0), Is.Zero);
        Assert.That(machine.Vcpu->Continuation.Pending, Is.EqualTo(1));
        Assert.That(Words(machine, 0)[8], Is.EqualTo(1));
        machine.Vcpu->Continuation.Pending = 0;
        *machine.Vcpu->KickPending = 0;
        Assert.That(MemoryOp.Execute(machine.Vcpu, machine.Vcpu->Continuation.Arguments), Is.Zero);
        Assert.That(Words(machine, 0)[8], Is.EqualTo(3));
        for (int i = 0; i < 3; i++)
            Assert.That(machine.Context->MachineToPhys[Words(machine, 512)[i] - FirstFrame], Is.EqualTo(0x900 + (ulong)i));
    }

    [TestCase(2, 0, 1, 0, 0UL, Errno.EINVAL)]
    [TestCase(1, 10, 1, 10, 0UL, Errno.EPERM)]
    [TestCase(1, 0, 1, 0, 2UL, Errno.EINVAL)]
    [TestCase(1, 0, 1, 0, 1UL, Errno.None)]
    public void Lists_have_to_match(int given, int givenOrder, int taken, int takenOrder, ulong done, Errno error)
    {
        using var machine = new TestMachine(64, 40);
        Assert.That(Exchange(machine, Enumerable.Repeat(5UL, given).ToArray(), givenOrder, taken, takenOrder, done), Is.EqualTo(-(long)error));
    }
}
