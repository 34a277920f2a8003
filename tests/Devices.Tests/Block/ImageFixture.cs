// What tests of images start from: a folder, files in it, and something to write.
using Tmds.Linux;
using XenSharp.Devices.Block.Images;

namespace XenSharp.Devices.Tests.Block;

internal abstract class ImageFixture
{
    private protected const int MiB = 1 << 20;

    private protected string Folder { get; private set; } = null!;

    [SetUp]
    public void MakeFolder() => Folder = Directory.CreateTempSubdirectory("xensharp-image-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(Folder, recursive: true);

    private protected static byte[] Data(int length, int seed)
    {
        byte[] data = new byte[length];
        new Random(seed).NextBytes(data);
        return data;
    }

    /// <param name="image">One that was opened to be read.</param>
    /// <param name="length">Of the transfers.</param>
    private protected static void AssertIsNotWritten(RawImage image, int length)
    {
        Assert.That(TestOperation.Write(image, 0, new byte[length]), Is.EqualTo(LibC.EROFS));
        Assert.That(TestOperation.Discard(image, 0, 4096), Is.EqualTo(LibC.EROFS));
        Assert.That(TestOperation.Flush(image), Is.Zero);
        Assert.That(TestOperation.Read(image, 0, new byte[length]), Is.Zero);
    }

    /// <summary>Makes a file that is all hole.</summary>
    private protected string MakeFile(int length)
    {
        string path = Path.Combine(Folder, "disk");
        using FileStream file = File.Create(path);
        file.SetLength(length);
        return path;
    }
}
