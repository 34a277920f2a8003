// Reads ELF64 files back by the specification's offsets, sharing nothing with ElfWriter.
using System.Text;

namespace XenSharp.Guests.Tests;

sealed record ElfLoad(uint Flags, ulong Offset, ulong VirtualAddress, ulong PhysicalAddress, byte[] Contents, ulong MemorySize, ulong Alignment);

sealed class ElfReader
{
    public ElfReader(byte[] file)
    {
        Assert.That(file.AsSpan(0, 7).ToArray(), Is.EqualTo(new byte[] { 0x7f, 0x45, 0x4c, 0x46, 2, 1, 1 }));
        Assert.That(BitConverter.ToUInt16(file, 16), Is.EqualTo(2), "ET_EXEC");
        Assert.That(BitConverter.ToUInt16(file, 18), Is.EqualTo(62), "EM_X86_64");
        Entry = BitConverter.ToUInt64(file, 24);
        int table = (int)BitConverter.ToUInt64(file, 32);
        Assert.That(BitConverter.ToUInt16(file, 54), Is.EqualTo(56));
        int count = BitConverter.ToUInt16(file, 56);
        for (int i = 0; i < count; i++)
        {
            int header = table + i * 56;
            ulong offset = BitConverter.ToUInt64(file, header + 8);
            byte[] contents = file.AsSpan((int)offset, (int)BitConverter.ToUInt64(file, header + 32)).ToArray();
            switch (BitConverter.ToUInt32(file, header))
            {
                case 1:
                    Loads.Add(new ElfLoad(BitConverter.ToUInt32(file, header + 4), offset, BitConverter.ToUInt64(file, header + 16),
                        BitConverter.ToUInt64(file, header + 24), contents, BitConverter.ToUInt64(file, header + 40),
                        BitConverter.ToUInt64(file, header + 48)));
                    break;
                case 4:
                    ReadNotes(contents);
                    break;
                default:
                    Assert.Fail("a program header of unknown type");
                    break;
            }
        }
    }

    public ulong Entry { get; }

    public List<ElfLoad> Loads { get; } = [];

    public Dictionary<(string Owner, uint Type), byte[]> Notes { get; } = [];

    public string XenText(uint type) => Encoding.ASCII.GetString(Notes[("Xen", type)]).TrimEnd('\0');

    public ulong XenNumber(uint type) => BitConverter.ToUInt64(Notes[("Xen", type)]);

    void ReadNotes(byte[] notes)
    {
        int at = 0;
        while (at < notes.Length)
        {
            int nameSize = BitConverter.ToInt32(notes, at);
            int descriptorSize = BitConverter.ToInt32(notes, at + 4);
            uint type = BitConverter.ToUInt32(notes, at + 8);
            string owner = Encoding.ASCII.GetString(notes, at + 12, nameSize - 1);
            int descriptor = at + 12 + (nameSize + 3) / 4 * 4;
            Notes.Add((owner, type), notes.AsSpan(descriptor, descriptorSize).ToArray());
            at = descriptor + (descriptorSize + 3) / 4 * 4;
        }
        Assert.That(at, Is.EqualTo(notes.Length), "the notes end where the segment ends");
    }
}
