// Addresses, frames and the layouts that guests rely on.
namespace XenSharp.Core.Tests;

public sealed unsafe class FramesTests
{
    [TestCase(0UL, true, false)]
    [TestCase(0x0000_7fff_ffff_ffffUL, true, false)]
    [TestCase(0x0000_8000_0000_0000UL, false, false)]
    [TestCase(0xffff_7fff_ffff_ffffUL, false, false)]
    [TestCase(0xffff_8000_0000_0000UL, true, true)]
    [TestCase(0xffff_87ff_ffff_ffffUL, true, true)]
    [TestCase(0xffff_8800_0000_0000UL, true, false)]
    [TestCase(ulong.MaxValue, true, false)]
    public void Virtual_addresses(ulong value, bool canonical, bool reserved)
    {
        var address = new VirtualAddress(value);
        Assert.That((address.IsCanonical, address.IsHypervisorReserved, address.IsGuest), Is.EqualTo((canonical, reserved, canonical && !reserved)));
    }

    [TestCase(1, 0x123)]
    [TestCase(2, 0x0d1)]
    [TestCase(3, 0x056)]
    [TestCase(4, 0x0af)]
    public void Table_indices(int level, int index)
    {
        ulong value = (0x0afUL << 39) | (0x056UL << 30) | (0x0d1UL << 21) | (0x123UL << 12) | 0x456;
        Assert.That(new VirtualAddress(value).TableIndex(level), Is.EqualTo(index));
        Assert.That(new VirtualAddress(value).Offset, Is.EqualTo(0x456));
    }

    [Test]
    public void Entries_keep_frame_and_flags_apart()
    {
        var frame = new Mfn(0xff_ffff_fffe);
        var entry = new PageTableEntry(frame, PageFlags.Present | PageFlags.NoExecute | PageFlags.GuestKernel);
        Assert.That(entry.Value, Is.EqualTo(0x801f_ffff_ffff_e001));
        Assert.That(entry.Frame, Is.EqualTo(frame));
        Assert.That(entry.Flags, Is.EqualTo(PageFlags.Present | PageFlags.NoExecute | PageFlags.GuestKernel));
    }

    [Test]
    public void Machine_memory_knows_its_bounds()
    {
        var memory = new MachineMemory((byte*)0x10000, new Mfn(0x500), 4);
        Assert.That(memory.Contains(new Mfn(0x4ff)), Is.False);
        Assert.That(memory.Contains(new Mfn(0x500)), Is.True);
        Assert.That(memory.Contains(new Mfn(0x503)), Is.True);
        Assert.That(memory.Contains(new Mfn(0x504)), Is.False);
        Assert.That(memory.Contains(Mfn.Invalid), Is.False);
        Assert.That((ulong)memory.Page(new Mfn(0x502)), Is.EqualTo(0x12000UL));
    }

    [Test]
    public void Public_structures_have_the_sizes_of_Xens_headers()
    {
        Assert.That(sizeof(VcpuTimeInfo), Is.EqualTo(32));
        Assert.That(sizeof(VcpuInfo), Is.EqualTo(64));
        Assert.That(sizeof(TrapInfo), Is.EqualTo(16));
        Assert.That(sizeof(StartInfo), Is.EqualTo(1168));
        Assert.That(sizeof(VcpuRunstateInfo), Is.EqualTo(48));
    }
}
