// The thread that waits for frames of all the process's TAP devices.
using Tmds.Linux;

namespace XenSharp.Devices.Network;

/// <summary>One thread and one epoll instance, there as long as there are TAP devices.</summary>
internal sealed unsafe class TapPoller
{
    private const int EventsAtOnce = 16;

    private static readonly Lock Gate = new();
    private static TapPoller? current;
    private static int users;

    private readonly Lock _lock = new();
    private readonly Dictionary<int, TapDevice> _devices = [];
    private readonly int _epoll;
    private readonly int _wake;
    private readonly Thread _thread;
    private volatile bool _stopped;

    private TapPoller()
    {
        _epoll = LibC.epoll_create1(LibC.EPOLL_CLOEXEC);
        _wake = _epoll < 0 ? -1 : LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
        if (_wake < 0 || !Control(LibC.EPOLL_CTL_ADD, _wake))
        {
            int error = LibC.errno;
            Close();
            throw new HostNetworkException($"TAP devices cannot be waited for ({HostInterface.Text(error)}): raise the limit on open files (ulimit -n).", error);
        }

        _thread = new Thread(Run) { IsBackground = true, Name = "TAP devices" };
        _thread.Start();
    }

    /// <summary>The poller, for one device more.</summary>
    /// <exception cref="HostNetworkException">The process has no more descriptors.</exception>
    public static TapPoller Enter()
    {
        lock (Gate)
        {
            current ??= new TapPoller();
            users++;
            return current;
        }
    }

    /// <summary>Ends <see cref="Enter"/>; the last one ends the thread.</summary>
    public void Leave()
    {
        lock (Gate)
        {
            if (--users != 0)
                return;
            current = null;
        }

        _stopped = true;
        ulong one = 1;
        _ = LibC.write(_wake, &one, sizeof(ulong));
        if (Thread.CurrentThread != _thread)
            _thread.Join();
    }

    /// <summary>Waits for a device's frames from now on.</summary>
    public void Add(TapDevice device)
    {
        lock (_lock)
            _devices[device.File] = device;
        _ = Control(LibC.EPOLL_CTL_ADD, device.File);
    }

    /// <summary>Ends that. The device's descriptor is still open.</summary>
    public void Remove(TapDevice device)
    {
        lock (_lock)
        {
            if (_devices.Remove(device.File))
                _ = Control(LibC.EPOLL_CTL_DEL, device.File);
        }
    }

    private bool Control(int operation, int file)
    {
        epoll_event wanted = default;
        wanted.events = LibC.EPOLLIN;
        wanted.data.fd = file;
        return LibC.epoll_ctl(_epoll, operation, file, &wanted) == 0;
    }

    private void Run()
    {
        epoll_event* events = stackalloc epoll_event[EventsAtOnce];
        while (!_stopped)
        {
            int count = LibC.epoll_wait(_epoll, events, EventsAtOnce, -1);
            for (int i = 0; i < count; i++)
            {
                TapDevice? device;
                lock (_lock)
                {
                    if (!_devices.TryGetValue(events[i].data.fd, out device))
                        continue;
                }

                if (!device.Read())
                    Remove(device);
            }
        }

        Close();
    }

    private void Close()
    {
        if (_wake >= 0)
            _ = LibC.close(_wake);
        if (_epoll >= 0)
            _ = LibC.close(_epoll);
    }
}
