// Reads a newc archive back, written from the kernel's description of the format and sharing nothing with CpioWriter.
using System.Globalization;
using System.Text;

namespace XenSharp.Guests.Tests;

sealed record CpioEntry(string Name, uint Inode, uint Mode, uint Links, uint Major, uint Minor, byte[] Contents)
{
    public uint Type => Mode & 0xf000;

    public uint Permissions => Mode & 0xfff;

    public string Text => Encoding.UTF8.GetString(Contents);
}

static class CpioReader
{
    /// <summary>The entries before the trailer; fails the test on any breach of the format.</summary>
    public static List<CpioEntry> Read(byte[] archive)
    {
        Assert.That(archive.Length % 512, Is.Zero, "the archive is padded to 512 bytes");
        List<CpioEntry> entries = [];
        int at = 0;
        while (true)
        {
            Assert.That(at % 4, Is.Zero, "headers start at multiples of 4");
            string header = Encoding.ASCII.GetString(archive, at, 110);
            Assert.That(header[..6], Is.EqualTo("070701"));
            uint Field(int index) =>
                uint.Parse(header.AsSpan(6 + index * 8, 8), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture);
            int nameSize = (int)Field(11);
            int size = (int)Field(6);
            Assert.That(archive[at + 110 + nameSize - 1], Is.Zero, "names end with NUL");
            string name = Encoding.UTF8.GetString(archive, at + 110, nameSize - 1);
            int data = (at + 110 + nameSize + 3) / 4 * 4;
            at = (data + size + 3) / 4 * 4;
            if (name == "TRAILER!!!")
            {
                Assert.That(archive.AsSpan(at).IndexOfAnyExcept((byte)0), Is.EqualTo(-1), "only padding follows the trailer");
                return entries;
            }
            entries.Add(new CpioEntry(
                name, Field(0), Field(1), Field(4), Field(9), Field(10), archive.AsSpan(data, size).ToArray()));
        }
    }
}
