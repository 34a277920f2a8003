// The archives that CpioWriter makes, read back by an independent reader.
using CsCheck;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Guests.Tests;

public class CpioWriterTests
{
    [Test]
    public void EveryKindOfEntryReadsBack()
    {
        List<CpioEntry> entries = CpioReader.Read(Archive(cpio =>
        {
            cpio.AddDirectory("dev");
            cpio.AddFile("init", "#!/bin/sh\n"u8, (UnixFileMode)0b111_101_101);
            cpio.AddFile("stream", new MemoryStream([9, 8, 7]));
            cpio.AddSymlink("bin", "usr/bin");
            cpio.AddCharacterDevice("dev/console", 5, 1);
            cpio.AddBlockDevice("dev/xvda", 202, 0);
            cpio.AddFifo("dev/fifo");
        }));

        Assert.That(entries.Select(e => (e.Name, e.Type)), Is.EqualTo(new (string, uint)[]
        {
            ("dev", 0x4000), ("init", 0x8000), ("stream", 0x8000), ("bin", 0xa000), ("dev/console", 0x2000), ("dev/xvda", 0x6000),
            ("dev/fifo", 0x1000),
        }));
        Assert.Multiple(() =>
        {
            Assert.That(entries[0].Links, Is.EqualTo(2));
            Assert.That(entries[0].Permissions, Is.EqualTo(Convert.ToUInt32("755", 8)));
            Assert.That(entries[1].Text, Is.EqualTo("#!/bin/sh\n"));
            Assert.That(entries[1].Permissions, Is.EqualTo(Convert.ToUInt32("755", 8)));
            Assert.That(entries[2].Contents, Is.EqualTo(new byte[] { 9, 8, 7 }));
            Assert.That(entries[3].Text, Is.EqualTo("usr/bin"));
            Assert.That((entries[4].Major, entries[4].Minor), Is.EqualTo((5u, 1u)));
            Assert.That((entries[5].Major, entries[5].Minor), Is.EqualTo((202u, 0u)));
            Assert.That(entries.Select(e => e.Inode).Distinct().Count(), Is.EqualTo(entries.Count), "no two share an inode");
        });
    }

    [Test]
    public void AnyNameAndContentsReadBack() =>
        Gen.Select(Gen.String[Gen.Char['a', 'z'], 1, 40], Gen.Byte.Array[0, 300]).Array[0, 12].Sample(
            files => CpioReader.Read(Archive(cpio =>
            {
                foreach ((string name, byte[] contents) in files)
                    cpio.AddFile(name, contents);
            })).Select(e => (e.Name, Convert.ToHexString(e.Contents)))
                .SequenceEqual(files.Select(f => (f.Item1, Convert.ToHexString(f.Item2)))),
            iter: 300);

    [TestCase("")]
    [TestCase("/init")]
    [TestCase("a\0b")]
    public void NamesThatLinuxWouldMisreadAreRefused(string name) =>
        Assert.That(() => Archive(cpio => cpio.AddFile(name, [])), Throws.InstanceOf<ArgumentException>());

    [Test]
    public void AStreamThatEndsEarlyIsAnError() =>
        Assert.That(() => Archive(cpio => cpio.AddFile("short", new ShortStream())),
            Throws.InstanceOf<IOException>().With.Message.Contains("short"));

    static byte[] Archive(Action<CpioWriter> fill)
    {
        MemoryStream output = new();
        using (CpioWriter cpio = new(output))
            fill(cpio);
        return output.ToArray();
    }

    sealed class ShortStream : MemoryStream
    {
        public override long Length => 10;
    }
}
