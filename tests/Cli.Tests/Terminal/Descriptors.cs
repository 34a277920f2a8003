// Plain descriptors for tests: pipes, reads and writes.

using System.Text;
using Tmds.Linux;

namespace XenSharp.Cli.Tests.Terminal;

internal static unsafe class Descriptors
{
    internal static (int ReadEnd, int WriteEnd) Pipe()
    {
        int* ends = stackalloc int[2];
        Assert.That(LibC.pipe2(ends, LibC.O_CLOEXEC), Is.Zero);
        return (ends[0], ends[1]);
    }

    internal static void Write(int descriptor, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            fixed (byte* start = bytes)
            {
                nint count = (nint)LibC.write(descriptor, start, bytes.Length);
                Assert.That(count, Is.GreaterThan((nint)0));
                bytes = bytes[(int)count..];
            }
        }
    }

    /// <summary>At most 4096 bytes; none at the end of the file.</summary>
    internal static byte[] Read(int descriptor)
    {
        byte[] bytes = new byte[4096];
        fixed (byte* start = bytes)
            return bytes[..Math.Max(0, (int)(nint)LibC.read(descriptor, start, bytes.Length))];
    }

    /// <summary>chmod(2).</summary>
    internal static int ChangeMode(string path, int mode)
    {
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            return LibC.chmod(name, (mode_t)(ushort)mode);
    }

    internal static void Close(int descriptor) => _ = LibC.close(descriptor);
}
