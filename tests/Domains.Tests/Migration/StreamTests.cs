using CsCheck;
using XenSharp.Domains.Migration;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>Headers and records, written and read, whole and damaged.</summary>
internal sealed class StreamTests
{
    private static readonly Gen<(RecordType Type, byte[] Body)[]> s_records
        = Gen.Select(Gen.UInt[1, 0x20].Select(static type => (RecordType)type), Gen.Byte.Array[0, 40]).Array[0, 8];

    [Test]
    public void What_is_written_is_read() => s_records.Sample(static records =>
    {
        byte[] image = ImageParts.Join([.. records, (RecordType.End, [])]);
        Assert.That(image.Length % 8, Is.Zero);
        ImageParts parts = Read(image);
        Assert.That(parts.Records.Select(static record => record.Type), Is.EqualTo([.. records.Select(static record => record.Type), RecordType.End]));
        for (int i = 0; i < records.Length; i++)
            Assert.That(parts.Records[i].Body, Is.EqualTo(records[i].Body));
    }, iter: 200);

    [Test]
    public void An_image_that_ends_early_says_so() => s_records.Sample(static records =>
    {
        byte[] image = ImageParts.Join([.. records, (RecordType.End, [])]);
        for (int length = 0; length < image.Length; length++)
        {
            MigrationException failure = Assert.Throws<MigrationException>(() => Read(image[..length]))!;
            Assert.That(failure.Message, Does.StartWith("The image is not complete: it ends in the middle of"));
        }
    }, iter: 10);

    [Test]
    public void A_record_is_passed_over_whatever_was_read_of_it()
    {
        byte[] image = ImageParts.Join([(RecordType.SharedInfo, new byte[21]), (RecordType.TscInfo, [1, 2, 3]), (RecordType.End, [])]);
        var reader = new MigrationReader(new MemoryStream(image));
        reader.ReadHeaders();
        Assert.That(reader.Next(), Is.EqualTo(new RecordHeader(RecordType.SharedInfo, 21)));
        reader.Read(new byte[7]);
        Assert.That(reader.Next(), Is.EqualTo(new RecordHeader(RecordType.TscInfo, 3)));
        Assert.That(() => reader.Read(new byte[4]), Throws.TypeOf<MigrationException>());
        Assert.That(reader.ReadBody(3, 3), Is.EqualTo((byte[])[1, 2, 3]));
    }

    [TestCase(0, 0, "is no image of a domain")]
    [TestCase(8, 'Y', "is no image of a domain")]
    [TestCase(15, 4, "version 4")]
    [TestCase(15, 1, "version 1")]
    [TestCase(17, 1, "big-endian")]
    [TestCase(24, 2, "HVM")]
    [TestCase(24, 7, "unknown type, 7")]
    [TestCase(28, 13, "2^13")]
    [TestCase(47, 9, "claims")]
    public void A_header_that_is_wrong_gets_a_sentence(int at, int value, string sentence)
    {
        byte[] image = ImageParts.Join([(RecordType.TscInfo, new byte[24]), (RecordType.End, [])]);
        image[at] = (byte)value;
        Assert.That(() => Read(image), Throws.TypeOf<MigrationException>().With.Message.Contains(sentence));
    }

    private static ImageParts Read(byte[] image) => ImageParts.Of(image);
}
