// A pseudo-terminal of the host's, as its master has it.

using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices.Console;

/// <summary>The master of a pseudo-terminal, raw. One thread uses it; any may <see cref="Wake"/> that.</summary>
internal sealed unsafe partial class PseudoTerminal : IDisposable
{
    private const int NameSize = 64;

    private readonly int _master;
    private readonly int _wake;

    /// <param name="whose">What it is for, for people.</param>
    /// <exception cref="IOException">The host has no more terminals, or descriptors, to give.</exception>
    internal PseudoTerminal(string whose)
    {
        _master = OpenMaster(LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_NONBLOCK | LibC.O_CLOEXEC);
        if (_master < 0)
            throw Failure($"A pseudo-terminal cannot be made for {whose}");
        try
        {
            byte* name = stackalloc byte[NameSize];
            if (Grant(_master) != 0 || Unlock(_master) != 0 || GetName(_master, name, NameSize) != 0)
                throw Failure($"A pseudo-terminal cannot be opened for {whose}");
            Path = Marshal.PtrToStringUTF8((nint)name)!;
            MakeRaw(whose);
            _wake = LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
            if (_wake < 0)
                throw Failure($"An eventfd cannot be made for {whose}; raise the limit on open files (ulimit -n)");
        }
        catch
        {
            _ = LibC.close(_master);
            throw;
        }
    }

    /// <summary>The slave's path.</summary>
    internal string Path { get; }

    /// <inheritdoc/>
    public void Dispose()
    {
        _ = LibC.close(_wake);
        _ = LibC.close(_master);
    }

    /// <summary>Waits until something can be done.</summary>
    /// <param name="events">POLLIN, POLLOUT.</param>
    /// <param name="timeout">Milliseconds; negative for as long as it takes.</param>
    /// <returns>What can be done, or POLLHUP where nobody has the slave open; also 0, when it was woken or the time is over.</returns>
    internal short Poll(int events, int timeout)
    {
        pollfd* descriptors = stackalloc pollfd[2];
        descriptors[0] = new pollfd { fd = _master, events = (short)events };
        descriptors[1] = new pollfd { fd = _wake, events = (short)LibC.POLLIN };
        _ = FileDescriptorSink.Poll(descriptors, 2, timeout);
        if (descriptors[1].revents != 0)
        {
            ulong count;
            _ = LibC.read(_wake, &count, sizeof(ulong));
        }
        return descriptors[0].revents;
    }

    /// <summary>Ends a <see cref="Poll"/>, or the next.</summary>
    internal void Wake()
    {
        ulong one = 1;
        _ = LibC.write(_wake, &one, sizeof(ulong));
    }

    /// <summary>Reads what was typed, without waiting.</summary>
    /// <returns>Bytes; 0 or less if there are none.</returns>
    internal int Read(Span<byte> destination)
    {
        fixed (byte* start = destination)
            return (int)(nint)LibC.read(_master, start, destination.Length);
    }

    /// <summary>Shows something, without waiting.</summary>
    /// <returns>Bytes, which may be fewer; or the negative of errno.</returns>
    internal int Write(ReadOnlySpan<byte> bytes)
    {
        fixed (byte* start = bytes)
        {
            int count = (int)(nint)LibC.write(_master, start, bytes.Length);
            return count < 0 ? -Marshal.GetLastPInvokeError() : count;
        }
    }

    /// <summary>Waits until what was shown has been read, which is lost otherwise when the master is closed.</summary>
    /// <param name="patience">Milliseconds to wait at most.</param>
    internal void AwaitReader(int patience)
    {
        const int interval = 10;
        int slave = OpenSlave();
        if (slave < 0)
            return;
        int unread = 0;
        for (int waited = 0; waited < patience && LibC.ioctl(slave, LibC.FIONREAD, &unread) == 0 && unread != 0; waited += interval)
            Thread.Sleep(interval);
        _ = LibC.close(slave);
    }

    private int OpenSlave()
    {
        fixed (byte* name = Encoding.UTF8.GetBytes(Path + '\0'))
            return LibC.open(name, LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_CLOEXEC, 0);
    }

    // The settings are the pair's: they stay when the slave is closed, as long as the master is open.
    private void MakeRaw(string whose)
    {
        int slave = OpenSlave();
        if (slave < 0)
            throw Failure($"The pseudo-terminal {Path} for {whose} cannot be opened");
        termios mode;
        if (LibC.tcgetattr(slave, &mode) == 0)
        {
            // What cfmakeraw(3) does.
            mode.c_iflag &= ~(LibC.IGNBRK | LibC.BRKINT | LibC.PARMRK | LibC.ISTRIP | LibC.INLCR | LibC.IGNCR | LibC.ICRNL | LibC.IXON);
            mode.c_oflag &= ~LibC.OPOST;
            mode.c_lflag &= ~(LibC.ECHO | LibC.ECHONL | LibC.ICANON | LibC.ISIG | LibC.IEXTEN);
            mode.c_cflag = (mode.c_cflag & ~(LibC.CSIZE | LibC.PARENB)) | LibC.CS8;
            _ = LibC.tcsetattr(slave, (int)LibC.TCSANOW, &mode);
        }
        _ = LibC.close(slave);
    }

    private static IOException Failure(string what)
    {
        int error = Marshal.GetLastPInvokeError();
        return new IOException($"{what}: {Marshal.GetPInvokeErrorMessage(error)}.", error);
    }

    [LibraryImport("libc", EntryPoint = "posix_openpt", SetLastError = true)]
    private static partial int OpenMaster(int flags);

    [LibraryImport("libc", EntryPoint = "grantpt", SetLastError = true)]
    private static partial int Grant(int master);

    [LibraryImport("libc", EntryPoint = "unlockpt", SetLastError = true)]
    private static partial int Unlock(int master);

    // Answers the error, and sets errno, too.
    [LibraryImport("libc", EntryPoint = "ptsname_r", SetLastError = true)]
    private static partial int GetName(int master, byte* name, nuint size);
}
