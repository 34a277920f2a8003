// Which page-table stores have to be repeated inside the VM, each shown by a guest that reads, writes or runs the page.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class PageTableWriteTests : KvmTest
{
    private const PageFlags Present = PageFlags.Present | PageFlags.User;
    private const PageFlags Touched = PageFlags.Accessed | PageFlags.Dirty;
    private const PageFlags All = Present | PageFlags.Writable | Touched;
    private const ulong Ok = 1UL << 32;

    private ScratchGuest _guest = null!;

    /// <summary>What the guest does with the page.</summary>
    public enum Access
    {
        Read,
        Write,
        Fetch,
    }

    private PageTableWriteQueue* Writes => _guest.Vcpu.PageTableWrites;

    [SetUp]
    public void MakeGuest()
    {
        _guest = NewGuest();
        foreach ((Mfn frame, byte mark) in (ReadOnlySpan<(Mfn, byte)>)[(_guest.FirstDataFrame, 1), (_guest.SecondDataFrame, 2)])
        {
            // Data to be read, and code to be run: mov eax, mark; syscall.
            byte* page = _guest.Machine.Memory.Page(frame);
            *page = mark;
            ((ReadOnlySpan<byte>)[0xb8, mark, 0, 0, 0, 0x0f, 0x05]).CopyTo(new Span<byte>(page + 16, 7));
        }
    }

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    private static IEnumerable<TestCaseData> NeedNoRepeat()
    {
        yield return Case("not present to present", PageFlags.None, Access.Read, All, Access.Write);
        yield return Case("not present to present, fetched", PageFlags.None, Access.Fetch, All, Access.Fetch);
        yield return Case("read-only to writable", Present | Touched, Access.Read, All, Access.Write);
        yield return Case("read-only, faulted on, to writable", Present | Touched, Access.Write, All, Access.Write);
        yield return Case("supervisor to user", All & ~PageFlags.User, Access.Read, All, Access.Read);
        yield return Case("clean to dirty", All & ~PageFlags.Dirty, Access.Read, All, Access.Write);

        static TestCaseData Case(string name, PageFlags before, Access first, PageFlags after, Access then)
            => new TestCaseData(before, first, after, then).SetArgDisplayNames(name);
    }

    /// <summary>Nothing is queued, nothing flushed, and the guest has the new right at once.</summary>
    [TestCaseSource(nameof(NeedNoRepeat))]
    public void UpgradeIsSeenWithoutRepeating(PageFlags before, Access first, PageFlags after, Access then)
    {
        *_guest.DataEntry = new PageTableEntry(_guest.FirstDataFrame, before);
        _ = Try(first);
        Store(_guest.FirstDataFrame, after);
        Assert.That(Writes->Count, Is.Zero);
        Assert.That(Try(then), Is.EqualTo(Ok | 1), "The guest's access works.");
    }

    /// <summary>An entry that no access ever used may name another frame without a repeat.</summary>
    [Test]
    public void UnusedEntryMayBeReplaced()
    {
        *_guest.DataEntry = new PageTableEntry(_guest.FirstDataFrame, Present | PageFlags.Writable);

        // Its neighbours are used, so that KVM looks at the table and may look ahead.
        AssertSyscall(RunCode(_guest, code =>
        {
            code.mov(al, __byte_ptr[ScratchGuest.DataAddress + 0x1000]);
            code.mov(al, __byte_ptr[ScratchGuest.DataAddress - 0x1000]);
            code.syscall();
        }));
        Store(_guest.SecondDataFrame, Present | PageFlags.Writable);
        Assert.That(Writes->Count, Is.Zero);
        Assert.That(Try(Access.Read), Is.EqualTo(Ok | 2));
    }

    /// <summary>The processor's Accessed bit appears in the guest's own table, which the rule above rests on.</summary>
    [Test]
    public void AccessedAndDirtyAppear()
    {
        *_guest.DataEntry = new PageTableEntry(_guest.FirstDataFrame, Present | PageFlags.Writable);
        _ = Try(Access.Read);
        Assert.That(_guest.DataEntry->Flags, Is.EqualTo(Present | PageFlags.Writable | PageFlags.Accessed));
        _ = Try(Access.Write);
        Assert.That(_guest.DataEntry->Flags, Is.EqualTo(All));
    }

    /// <summary>Taking Accessed or Dirty away is seen too: the next access sets it again.</summary>
    [Test]
    public void ClearedAccessedAndDirtyAppearAgain()
    {
        _ = Try(Access.Write);
        Store(_guest.FirstDataFrame, Present | PageFlags.Writable | PageFlags.Accessed);
        _ = Try(Access.Write);
        Assert.That(_guest.DataEntry->Flags, Is.EqualTo(All));
        Store(_guest.FirstDataFrame, Present | PageFlags.Writable);
        _ = Try(Access.Read);
        Assert.That(_guest.DataEntry->Flags, Is.EqualTo(Present | PageFlags.Writable | PageFlags.Accessed));
    }

    private static IEnumerable<TestCaseData> Downgrades()
    {
        yield return Case("to not present", All, PageFlags.None, Access.Read, PageFaultError.User);
        yield return Case("to read-only", All, Present | Touched, Access.Write, PageFaultError.User | PageFaultError.Write | PageFaultError.Present);
        yield return Case("to supervisor", All, All & ~PageFlags.User, Access.Read, PageFaultError.User | PageFaultError.Present);
        yield return Case(
            "to no-execute", All, All | PageFlags.NoExecute, Access.Fetch, PageFaultError.User | PageFaultError.InstructionFetch | PageFaultError.Present);

        static TestCaseData Case(string name, PageFlags before, PageFlags after, Access access, PageFaultError error)
            => new TestCaseData(before, after, access, error).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(Downgrades))]
    public void DowngradeIsSeen(PageFlags before, PageFlags after, Access access, PageFaultError error)
    {
        *_guest.DataEntry = new PageTableEntry(_guest.FirstDataFrame, before);
        Assert.That(Try(access), Is.EqualTo(Ok | 1));
        Store(_guest.FirstDataFrame, after);
        Assert.That(Writes->Count, Is.EqualTo(Writes->InGuest));
        Flush();
        Assert.That(Try(access), Is.EqualTo((ulong)error));

        // And back: of the four only NX queues again.
        Store(_guest.FirstDataFrame, before);
        Flush();
        Assert.That(Try(access), Is.EqualTo(Ok | 1));
    }

    [Test]
    public void FrameChangeIsSeen()
    {
        for (int i = 0; i < 20; i++)
        {
            Store(i % 2 == 0 ? _guest.FirstDataFrame : _guest.SecondDataFrame, All);
            Flush();
            Assert.That(Try(i % 3 == 0 ? Access.Fetch : Access.Read), Is.EqualTo(Ok | (i % 2 == 0 ? 1UL : 2UL)));
        }
    }

    [Test]
    public void CompareExchangeIsSeen()
    {
        _ = Try(Access.Write);
        PageTableEntry found = *_guest.DataEntry;
        var next = new PageTableEntry(_guest.SecondDataFrame, All);
        Assert.That(Writes->CompareExchange(_guest.DataEntry, _guest.DataEntryAddress, next, default), Is.EqualTo(found), "refused");
        Assert.That(Writes->Count, Is.Zero);
        Assert.That(Writes->CompareExchange(_guest.DataEntry, _guest.DataEntryAddress, next, found), Is.EqualTo(found), "done");
        Flush();
        Assert.That(Try(Access.Read), Is.EqualTo(Ok | 2));
    }

    /// <summary>The same rules one level up, where one entry stands for 2 MiB.</summary>
    [Test]
    public void BranchEntries()
    {
        var field = new PageField(_guest, 512);
        field.Scan();
        PageTableEntry* branch = _guest.Machine.Memory.Table(field.BranchAddress(0).Frame) + (field.BranchAddress(0).Offset / sizeof(ulong));
        PageTableEntry whole = *branch;
        Writes->Store(branch, field.BranchAddress(0), whole.Without(PageFlags.Writable));
        Flush();
        Assert.That(TryAt(PageField.Address, Access.Write) & (ulong)PageFaultError.Write, Is.Not.Zero, "read-only by its branch");
        Writes->Store(branch, field.BranchAddress(0), whole);
        Assert.That(Writes->Count, Is.Zero, "An upgrade needs no repeat.");
        Assert.That(TryAt(PageField.Address, Access.Write), Is.EqualTo(Ok | 1));

        Writes->Store(branch, field.BranchAddress(0), whole.Without(PageFlags.User));
        Flush();
        Assert.That(TryAt(PageField.Address, Access.Read), Is.EqualTo((ulong)(PageFaultError.User | PageFaultError.Present)));
        Writes->Store(branch, field.BranchAddress(0), whole);
        Assert.That(TryAt(PageField.Address, Access.Read), Is.EqualTo(Ok | 1));

        Writes->Store(branch, field.BranchAddress(0), default);
        Flush();
        Assert.That(TryAt(PageField.Address, Access.Read), Is.EqualTo((ulong)PageFaultError.User));
        Writes->Store(branch, field.BranchAddress(0), whole);
        Assert.That(Writes->Count, Is.Zero);
        field.Scan();
    }

    [Test]
    public void NeighboursShareARun()
    {
        var address = new MachineAddress(0x1_0000_0ff8);
        Writes->Repeat(address);
        Writes->Repeat(address);
        Writes->Repeat(address + 8);
        Writes->Repeat(address);
        Assert.That((Writes->Count, (*Writes)[0].Address, (*Writes)[0].Count), Is.EqualTo((1, address.Value, 2UL)));
        Writes->Repeat(address + 24);
        Assert.That((Writes->Count, (*Writes)[1].Address, (*Writes)[1].Count), Is.EqualTo((2, address.Value + 24, 1UL)));
    }

    private void Store(Mfn frame, PageFlags flags)
        => Writes->Store(_guest.DataEntry, _guest.DataEntryAddress, new PageTableEntry(flags == PageFlags.None ? 0 : new PageTableEntry(frame, flags).Value));

    /// <summary>Where the processor walks the tables itself, a change needs a flush instead of a repeat.</summary>
    private void Flush()
    {
        if (Writes->InGuest == 0)
            Writes->Flush();
    }

    private ulong Try(Access access) => TryAt(ScratchGuest.DataAddress, access);

    /// <summary>Lets the guest use a page: the mark it found with bit 32 set, or the error code of the fault.</summary>
    private ulong TryAt(ulong address, Access access)
    {
        VcpuExit exit = RunCode(
            _guest,
            code =>
            {
                switch (access)
                {
                    case Access.Read:
                        code.movzx(eax, __byte_ptr[rcx]);
                        break;
                    case Access.Write:
                        code.movzx(eax, __byte_ptr[rcx]);
                        code.mov(__byte_ptr[rcx + 8], al);
                        break;
                    default:
                        code.add(rcx, 16);
                        code.jmp(rcx);
                        break;
                }

                code.syscall();
            },
            (ref CpuRegisters registers) => registers.Rcx = address);
        if (exit.Kind == VcpuExitKind.Syscall)
            return Ok | _guest.Vcpu.Registers->Rax;
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), exit.Failure);
        return exit.ErrorCode;
    }
}
