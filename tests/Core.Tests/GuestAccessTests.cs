// Copies to and from guest linear addresses: whose rights count, where they stop, what they leave behind.
using System.Runtime.InteropServices;

namespace XenSharp.Core.Tests;

public sealed unsafe class GuestAccessTests
{
    private const ulong FirstFrame = 0x300;
    private const int FrameCount = 16;
    private const PageFlags Branch = PageFlags.Present | PageFlags.Writable | PageFlags.User;
    private const ulong Address = 0x40_0000;
    private readonly List<nint> _blocks = [];
    private VcpuContext* _vcpu;
    private DomainContext* _domain;

    [SetUp]
    public void SetUp()
    {
        _domain = (DomainContext*)Allocate(sizeof(DomainContext));
        _domain->State = (DomainState*)Allocate(sizeof(DomainState));
        _domain->Memory = new MachineMemory((byte*)Allocate(FrameCount * 4096), new Mfn(FirstFrame), FrameCount);
        _domain->ShadowedFrames = (ulong*)Allocate(8);
        _vcpu = (VcpuContext*)Allocate(sizeof(VcpuContext));
        _vcpu->Domain = _domain;
        _vcpu->State = (VcpuState*)Allocate(sizeof(VcpuState));
        _vcpu->PageTableWrites = (PageTableWriteQueue*)Allocate(sizeof(PageTableWriteQueue));
        _vcpu->State->KernelMode = 1;
        _vcpu->State->KernelRoot = FirstFrame;
        Table(0)[0] = new PageTableEntry(new Mfn(FirstFrame + 1), Branch);
        Table(1)[0] = new PageTableEntry(new Mfn(FirstFrame + 2), Branch);
        Table(2)[2] = new PageTableEntry(new Mfn(FirstFrame + 3), Branch);

        // Two pages that are not neighbours in machine memory, then a read-only one, then nothing.
        Table(3)[0] = new PageTableEntry(new Mfn(FirstFrame + 8), Branch);
        Table(3)[1] = new PageTableEntry(new Mfn(FirstFrame + 6), Branch);
        Table(3)[2] = new PageTableEntry(new Mfn(FirstFrame + 9), PageFlags.Present | PageFlags.User);
    }

    [TearDown]
    public void TearDown()
    {
        foreach (nint block in _blocks)
            NativeMemory.Free((void*)block);
        _blocks.Clear();
    }

    [Test]
    public void Copies_across_pages()
    {
        byte[] bytes = [.. Enumerable.Range(0, 200).Select(i => (byte)i)];
        fixed (byte* source = bytes)
            Assert.That(GuestAccess.CopyTo(_vcpu, Address + 4000, source, 200), Is.True);
        Assert.That(Page(8)[4095], Is.EqualTo(95));
        Assert.That(Page(6)[0], Is.EqualTo(96));
        byte* back = stackalloc byte[200];
        Assert.That(GuestAccess.CopyFrom(_vcpu, Address + 4000, back, 200), Is.True);
        Assert.That(new ReadOnlySpan<byte>(back, 200).SequenceEqual(bytes), Is.True);
    }

    [TestCase(0x1000UL, false, true)]
    [TestCase(0x1000UL, true, true)]
    [TestCase(0x2000UL, false, true)]
    [TestCase(0x2000UL, true, false, Description = "read-only")]
    [TestCase(0x1ffcUL, false, true)]
    [TestCase(0x1ffcUL, true, false, Description = "into a read-only page")]
    [TestCase(0x3000UL, false, false, Description = "not mapped")]
    [TestCase(0x2ffcUL, false, false, Description = "across the end")]
    [TestCase(0x20_0000UL, false, false, Description = "no L1")]
    [TestCase(0x4000_0000UL, false, false, Description = "no L2")]
    [TestCase(0xff_ffff_f000UL, false, false, Description = "no L3")]
    public void Rights_are_those_of_the_tables(ulong offset, bool write, bool allowed)
    {
        bool done = write ? GuestAccess.Write(_vcpu, Address + offset, 5UL) : GuestAccess.Read(_vcpu, Address + offset, out ulong _);
        Assert.That(done, Is.EqualTo(allowed));
    }

    [TestCase(0xffff_8000_0000_0000UL)]
    [TestCase(0xffff_87ff_ffff_fff8UL)]
    [TestCase(0x0000_8000_0000_0000UL)]
    [TestCase(0xffff_7fff_ffff_f000UL)]
    public void Xens_part_and_what_is_not_canonical(ulong address)
    {
        // Even where the tables say something of it.
        for (int i = 0; i < 512; i++)
            Table(0)[i] = Table(0)[0];
        Assert.That(GuestAccess.Read(_vcpu, address, out ulong _), Is.False);
        Assert.That(GuestAccess.Write(_vcpu, address, 1UL), Is.False);
    }

    [Test]
    public void Every_level_has_to_agree([Range(0, 3)] int table, [Values] bool write)
    {
        int index = table == 2 ? 2 : 0;
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.True);
        Table(table)[index] = Table(table)[index].Without(write ? PageFlags.Writable : PageFlags.User);
        Assert.That(GuestAccess.Write(_vcpu, Address, (byte)1), Is.False);
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.EqualTo(write));
    }

    [Test]
    public void Large_pages_and_frames_outside_memory_are_not_followed()
    {
        Table(2)[2] = Table(2)[2].With(PageFlags.LargePage);
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.False);
        Table(2)[2] = new PageTableEntry(new Mfn(FirstFrame + FrameCount), Branch);
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.False);
        Table(2)[2] = new PageTableEntry(new Mfn(FirstFrame + 3), Branch);
        Table(3)[0] = new PageTableEntry(new Mfn(FirstFrame - 1), Branch);
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.False);
        _vcpu->State->KernelRoot = 0;
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.False);
    }

    [Test]
    public void User_mode_has_its_own_tables()
    {
        _vcpu->State->KernelMode = 0;
        _vcpu->State->UserRoot = FirstFrame + 5;
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.False);
        Table(5)[0] = Table(0)[0];
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.True);
    }

    [Test]
    public void Uses_leave_their_marks_as_the_processors_would()
    {
        Assert.That(GuestAccess.Read(_vcpu, Address, out byte _), Is.True);
        Assert.That(Table(3)[0].Flags, Is.EqualTo(Branch | PageFlags.Accessed));
        Assert.That(GuestAccess.Write(_vcpu, Address, (byte)1), Is.True);
        Assert.That(Table(3)[0].Flags, Is.EqualTo(Branch | PageFlags.Accessed | PageFlags.Dirty));
    }

    [Test]
    public void Writes_to_a_page_that_was_a_table_are_repeated_inside()
    {
        _domain->MarkShadowed(new Mfn(FirstFrame + 6));
        byte[] bytes = new byte[100];
        fixed (byte* source = bytes)
            Assert.That(GuestAccess.CopyTo(_vcpu, Address + 4090, source, 100), Is.True);
        Assert.That(_vcpu->PageTableWrites->Count, Is.EqualTo(1));
        Assert.That((*_vcpu->PageTableWrites)[0].Address, Is.EqualTo((FirstFrame + 6) << 12));
        Assert.That((*_vcpu->PageTableWrites)[0].Count, Is.EqualTo(12), "94 bytes touch 12 words");
    }

    private PageTableEntry* Table(int frame) => _domain->Memory.Table(new Mfn(FirstFrame + (ulong)frame));

    private byte* Page(int frame) => _domain->Memory.Page(new Mfn(FirstFrame + (ulong)frame));

    private void* Allocate(int size)
    {
        void* block = NativeMemory.AllocZeroed((nuint)size);
        _blocks.Add((nint)block);
        return block;
    }
}
