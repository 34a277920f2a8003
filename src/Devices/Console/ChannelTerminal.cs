// A channel that leads to a pseudo-terminal: connection=pty in xl.cfg(5).

using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices.Console;

/// <summary>Holds the master of a pseudo-terminal, raw; whoever opens the slave is connected to the guest.</summary>
/// <remarks>A thread waits for what is typed, as nothing else can wait for a terminal. While nobody has the slave open the system
/// says no more than that, so it is looked for twice a second, as QEMU does once.</remarks>
internal sealed unsafe partial class ChannelTerminal : ChannelEndpoint
{
    private const int Batch = 1024;
    private const int LookInterval = 500;
    private const int NameSize = 64;

    private readonly CancellationTokenSource _stop = new();
    private readonly int _master;
    private readonly int _wake;
    private Thread? _thread;

    /// <exception cref="IOException">The host has no more terminals, or descriptors, to give.</exception>
    internal ChannelTerminal()
    {
        _master = OpenMaster(LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_NONBLOCK | LibC.O_CLOEXEC);
        if (_master < 0)
            throw Failure("A pseudo-terminal cannot be made for the channel");
        try
        {
            byte* name = stackalloc byte[NameSize];
            if (Grant(_master) != 0 || Unlock(_master) != 0 || GetName(_master, name, NameSize) != 0)
                throw Failure("A pseudo-terminal cannot be opened for the channel");
            Terminal = Marshal.PtrToStringUTF8((nint)name)!;
            MakeRaw(Terminal);
            _wake = LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
            if (_wake < 0)
                throw Failure("An eventfd cannot be made for the channel; raise the limit on open files (ulimit -n)");
        }
        catch
        {
            _ = LibC.close(_master);
            throw;
        }
    }

    /// <summary>The slave's path.</summary>
    internal override string Terminal { get; }

    internal override void Start()
    {
        _thread = new Thread(Listen) { IsBackground = true, Name = "channel terminal" };
        _thread.Start();
    }

    /// <inheritdoc/>
    public override int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        using CancellationTokenRegistration registration =
            cancellation.UnsafeRegister(static terminal => ((ChannelTerminal)terminal!).Wake(), this);
        bool wait = false;
        while (true)
        {
            cancellation.ThrowIfCancellationRequested();
            short events = Poll(LibC.POLLOUT, wait ? LookInterval : 0);
            if ((events & LibC.POLLHUP) != 0)
                return bytes.Length;
            nint count;
            fixed (byte* start = bytes)
                count = (nint)LibC.write(_master, start, bytes.Length);
            if (count > 0)
                return (int)count;
            int error = count < 0 ? Marshal.GetLastPInvokeError() : LibC.EAGAIN;
            if (error != LibC.EAGAIN && error != LibC.EINTR)
                return bytes.Length;
            wait = true;
        }
    }

    /// <inheritdoc/>
    public override ValueTask DisposeAsync()
    {
        _stop.Cancel();
        Wake();
        _thread?.Join();
        _ = LibC.close(_wake);
        _ = LibC.close(_master);
        _stop.Dispose();
        return ValueTask.CompletedTask;
    }

    private void Listen()
    {
        byte* batch = stackalloc byte[Batch];
        while (!_stop.IsCancellationRequested)
        {
            short events = Poll(LibC.POLLIN, -1);
            if ((events & LibC.POLLIN) != 0)
            {
                int count = (int)(nint)LibC.read(_master, batch, Batch);
                if (count > 0)
                    Type(new ReadOnlySpan<byte>(batch, count).ToArray());
            }
            else if ((events & (LibC.POLLHUP | LibC.POLLERR)) != 0)
            {
                // Nobody is there.
                _ = _stop.Token.WaitHandle.WaitOne(LookInterval);
            }
        }
    }

    private void Type(byte[] input)
    {
        try
        {
            TypeAsync(input, _stop.Token).AsTask().GetAwaiter().GetResult();
        }
        catch (OperationCanceledException)
        {
            // The channel is going away.
        }
    }

    // What can be done with the master; also 0, when it was woken or the time is over.
    private short Poll(int events, int timeout)
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

    private void Wake()
    {
        ulong one = 1;
        _ = LibC.write(_wake, &one, sizeof(ulong));
    }

    // The settings are the pair's: they stay when the slave is closed, as long as the master is open.
    private static void MakeRaw(string path)
    {
        int slave;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            slave = LibC.open(name, LibC.O_RDWR | LibC.O_NOCTTY | LibC.O_CLOEXEC, 0);
        if (slave < 0)
            throw Failure($"The channel's pseudo-terminal {path} cannot be opened");
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
