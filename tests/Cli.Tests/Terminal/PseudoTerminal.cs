// A pseudo-terminal: the test holds the end a terminal emulator holds, the code under test the end a shell gives it.

using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Cli.Tests.Terminal;

internal sealed unsafe partial class PseudoTerminal : IDisposable
{
    private int _master;

    internal PseudoTerminal()
    {
        _master = OpenMaster(LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_CLOEXEC);
        Assert.That(_master, Is.GreaterThanOrEqualTo(0), "no pseudo-terminals on this machine");
        Assert.That(Grant(_master), Is.Zero);
        Assert.That(Unlock(_master), Is.Zero);
        byte* name = stackalloc byte[64];
        Assert.That(GetName(_master, name, 64), Is.Zero);
        Name = Marshal.PtrToStringUTF8((nint)name)!;
        Slave = Open(Name);
    }

    /// <summary>The slave's path, for another process.</summary>
    internal string Name { get; }

    internal int Slave { get; }

    /// <summary>The terminal's settings as text, so that a difference can be read.</summary>
    internal string Mode
    {
        get
        {
            termios mode;
            Assert.That(LibC.tcgetattr(Slave, &mode), Is.Zero);
            return $"i{mode.c_iflag:x} o{mode.c_oflag:x} c{mode.c_cflag:x} l{mode.c_lflag:x} min{mode.c_cc[LibC.VMIN]} time{mode.c_cc[LibC.VTIME]}";
        }
    }

    internal bool IsRaw
    {
        get
        {
            termios mode;
            Assert.That(LibC.tcgetattr(Slave, &mode), Is.Zero);
            return (mode.c_lflag & (LibC.ICANON | LibC.ECHO | LibC.ISIG | LibC.IEXTEN)) == 0
                && (mode.c_iflag & (LibC.ICRNL | LibC.IXON | LibC.ISTRIP)) == 0
                && (mode.c_oflag & LibC.OPOST) == 0;
        }
    }

    /// <summary>Whether as much waits for the terminal emulator to read as the terminal keeps for it.</summary>
    internal bool IsFull
    {
        get
        {
            const int most = 4095;
            const int bytesToRead = 0x541b;
            int waiting = 0;
            Assert.That(LibC.ioctl(_master, bytesToRead, &waiting), Is.Zero);
            return waiting >= most;
        }
    }

    /// <summary>Gives the window a size.</summary>
    internal void Resize(int columns, int rows)
    {
        const int setWindowSize = 0x5414;
        ushort* size = stackalloc ushort[4];
        (size[0], size[1]) = ((ushort)rows, (ushort)columns);
        Assert.That(LibC.ioctl(_master, setWindowSize, size), Is.Zero);
    }

    internal static int Open(string path)
    {
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
        {
            int descriptor = LibC.open(name, LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_CLOEXEC, 0);
            Assert.That(descriptor, Is.GreaterThanOrEqualTo(0));
            return descriptor;
        }
    }

    internal void Type(ReadOnlySpan<byte> keys) => Descriptors.Write(_master, keys);

    /// <summary>What the terminal has been sent, at most 4096 bytes, waiting for the first.</summary>
    internal byte[] ReadScreen() => Descriptors.Read(_master);

    internal void CloseWindow()
    {
        LibC.close(_master);
        _master = -1;
    }

    public void Dispose()
    {
        LibC.close(Slave);
        if (_master >= 0)
            LibC.close(_master);
    }

    // None of these is in Tmds.LibC.
    [LibraryImport("libc", EntryPoint = "posix_openpt")]
    private static partial int OpenMaster(int flags);

    [LibraryImport("libc", EntryPoint = "grantpt")]
    private static partial int Grant(int master);

    [LibraryImport("libc", EntryPoint = "unlockpt")]
    private static partial int Unlock(int master);

    [LibraryImport("libc", EntryPoint = "ptsname_r")]
    private static partial int GetName(int master, byte* name, nuint size);
}
