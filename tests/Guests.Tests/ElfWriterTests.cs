// The ELF files that ElfWriter makes, read back by an independent reader.
using XenSharp.Guests.Elf;

namespace XenSharp.Guests.Tests;

public class ElfWriterTests
{
    [Test]
    public void SegmentsAndNotesReadBack()
    {
        ElfWriter writer = new() { EntryPoint = 0x401010 };
        writer.AddSegment(new ElfSegment(0x400123, 0x123, ElfSegmentFlags.Read, new byte[] { 1, 2, 3 }, 3));
        writer.AddSegment(new ElfSegment(0x401000, 0x1000, ElfSegmentFlags.Read | ElfSegmentFlags.Execute, new byte[5000], 9000));
        writer.AddNote("Xen", 5, "xen-3.0");
        writer.AddNote("Odd", 77, [1, 2, 3, 4, 5]);
        writer.AddNote("Xen", 1, 0x401010);

        ElfReader elf = new(writer.ToArray());
        Assert.Multiple(() =>
        {
            Assert.That(elf.Entry, Is.EqualTo(0x401010));
            Assert.That(elf.Loads, Has.Count.EqualTo(2));
            Assert.That(elf.Loads[0].Contents, Is.EqualTo(new byte[] { 1, 2, 3 }));
            Assert.That(elf.Loads[0].PhysicalAddress, Is.EqualTo(0x123));
            Assert.That(elf.Loads[1].Flags, Is.EqualTo(5));
            Assert.That(elf.Loads[1].MemorySize, Is.EqualTo(9000));
            Assert.That(elf.Loads.Select(s => s.Offset % s.Alignment), Is.EqualTo(elf.Loads.Select(s => s.VirtualAddress % s.Alignment)));
            Assert.That(elf.XenText(5), Is.EqualTo("xen-3.0"));
            Assert.That(elf.Notes[("Odd", 77)], Is.EqualTo(new byte[] { 1, 2, 3, 4, 5 }));
            Assert.That(elf.XenNumber(1), Is.EqualTo(0x401010));
        });
    }

    [Test]
    public void AFileWithoutNotesHasNoNoteSegment()
    {
        ElfWriter writer = new();
        writer.AddSegment(new ElfSegment(0x1000, 0x1000, ElfSegmentFlags.Read, new byte[] { 1 }, 1));
        Assert.That(BitConverter.ToUInt16(writer.ToArray(), 56), Is.EqualTo(1));
    }

    [Test]
    public void SegmentsThatCannotBeLoadedAreRefused()
    {
        ElfWriter writer = new();
        Assert.Multiple(() =>
        {
            Assert.That(() => writer.AddSegment(new ElfSegment(0, 0, ElfSegmentFlags.Read, new byte[2], 1)),
                Throws.ArgumentException.With.Message.Contains("memory size"));
            Assert.That(() => writer.AddSegment(new ElfSegment(ulong.MaxValue, 0, ElfSegmentFlags.Read, default, 2)),
                Throws.ArgumentException.With.Message.Contains("past the end"));
        });
    }
}
