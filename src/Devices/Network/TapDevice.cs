// A TAP device of the host's: what the guest sends comes out of an interface of the host, and the other way round.
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Devices.Network;

/// <summary>
/// A port that is an interface of the host. Frames keep their blank checksums and are cut by the host's kernel, or by the guest's.
/// Made in the network namespace of the thread that makes it.
/// </summary>
public sealed unsafe partial class TapDevice : INetworkPort
{
    /// <summary>Bytes of struct virtio_net_hdr.</summary>
    internal const int VirtioHeaderSize = 10;

    /// <summary>Frames that are read at once, before other devices have their turn.</summary>
    private const int Budget = 64;

    /// <summary>A frame up to this is copied out of the large buffer that it was read into.</summary>
    private const int SmallFrame = 2048;

    // virtio_net.h
    private const byte NeedsChecksum = 1;
    private const byte DataValid = 2;
    private const byte SegmentedTcpV4 = 1;
    private const byte SegmentedTcpV6 = 4;
    private const byte SegmentedWithEcn = 0x80;

    private readonly PortCounters _counters = new();
    private readonly Lock _lock = new();
    private readonly Action<string> _report;
    private readonly TapPoller _poller;
    private readonly int _file;
    private volatile IFrameReceiver? _peer;
    private NetworkFrame? _next;
    private int _users;
    private bool _closed;

    private TapDevice(string name, int file, Action<string>? report)
    {
        (Name, _file) = (name, file);
        _report = report ?? (static _ => { });
        _poller = TapPoller.Enter();
    }

    public string Name { get; }

    public PortStatistics Statistics => _counters.Read();

    public FrameCapabilities Capabilities => new(AcceptedOffloads.All, NetworkFrame.MaximumLength);

    internal int File => _file;

    /// <summary>
    /// Makes a TAP device, or takes a persistent one that nobody uses (<c>ip tuntap add NAME mode tap</c>), and brings it up.
    /// </summary>
    /// <param name="name">The interface's name on the host, 1 to 15 characters.</param>
    /// <param name="bridge">The host's bridge that it becomes a port of; null for none.</param>
    /// <param name="persistent">Whether it stays when it is disposed; one that was persistent before stays in any case.</param>
    /// <param name="report">Takes a sentence for people if the device is lost.</param>
    /// <exception cref="HostNetworkException">That cannot be done here; the message says why and what to do.</exception>
    public static TapDevice Open(string name, string? bridge = null, bool persistent = false, Action<string>? report = null)
    {
        ArgumentNullException.ThrowIfNull(name);
        if (!HostInterface.IsName(name))
            throw new HostNetworkException($"\"{name}\" cannot be an interface's name: use 1 to 15 letters, digits, dots and dashes.");
        int file = HostInterface.OpenTap(name, persistent);
        try
        {
            if (bridge == null)
                HostInterface.BringUp(name);
            else
                HostInterface.JoinBridge(name, bridge);
            var device = new TapDevice(name, file, report);
            device._poller.Add(device);
            return device;
        }
        catch
        {
            _ = LibC.close(file);
            throw;
        }
    }

    public void Connect(IFrameReceiver? peer) => _peer = peer;

    /// <inheritdoc/>
    public void Receive(NetworkFrame frame)
    {
        ArgumentNullException.ThrowIfNull(frame);
        _counters.In(frame.Length);
        if (!TryUse())
        {
            _counters.DropIn();
            return;
        }

        byte* header = stackalloc byte[VirtioHeaderSize];
        WriteHeader(frame, new Span<byte>(header, VirtioHeaderSize));
        nint written;
        fixed (byte* data = frame.Data)
        {
            iovec* parts = stackalloc iovec[2];
            parts[0] = new iovec { iov_base = header, iov_len = VirtioHeaderSize };
            parts[1] = new iovec { iov_base = data, iov_len = (size_t)(nuint)(uint)frame.Length };
            do
                written = WriteParts(_file, parts, 2);
            while (written < 0 && Marshal.GetLastPInvokeError() == LibC.EINTR);
        }

        EndUse();

        // An interface that is down, or that has no room: as with any cable, the frame is lost.
        if (written < 0)
            _counters.DropIn();
    }

    /// <summary>Takes the device away; a persistent one stays on the host without a user.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            if (_closed)
                return;
            _closed = true;
            _peer = null;
        }

        _poller.Remove(this);
        EndUse(last: true);
        _poller.Leave();
    }

    /// <summary>Reads what there is. On the poller's thread.</summary>
    /// <returns>False if the device is lost.</returns>
    internal bool Read()
    {
        if (!TryUse())
            return true;
        try
        {
            for (int i = 0; i < Budget; i++)
            {
                int error = ReadFrame();
                if (error == LibC.EAGAIN)
                    return true;
                if (error is not 0 && error != LibC.EINTR)
                {
                    _report($"The TAP device {Name} is lost ({HostInterface.Text(error)}): the interface that used it has no network any more.");
                    return false;
                }
            }

            return true;
        }
        finally
        {
            EndUse();
        }
    }

    /// <summary>Reads a frame and gives it to the peer.</summary>
    /// <returns>0, or an errno.</returns>
    private int ReadFrame()
    {
        NetworkFrame frame = _next ??= FramePool.Shared.Take(NetworkFrame.MaximumLength);
        byte* header = stackalloc byte[VirtioHeaderSize];
        nint count;
        fixed (byte* data = frame.Room)
        {
            iovec* parts = stackalloc iovec[2];
            parts[0] = new iovec { iov_base = header, iov_len = VirtioHeaderSize };
            parts[1] = new iovec { iov_base = data, iov_len = (size_t)(nuint)(uint)frame.Capacity };
            count = ReadParts(_file, parts, 2);
        }

        if (count < 0)
            return Marshal.GetLastPInvokeError();
        int length = (int)count - VirtioHeaderSize;
        if (length < NetworkFrame.HeaderSize || length > NetworkFrame.MaximumLength)
            return 0;
        frame.SetLength(length);
        if (!TryReadHeader(new ReadOnlySpan<byte>(header, VirtioHeaderSize), frame.Data, out FrameOffload offload))
        {
            _counters.Out(new FrameDelivery.Result(0, 0, Dropped: true));
            return 0;
        }

        if (length <= SmallFrame)
        {
            NetworkFrame small = FramePool.Shared.Take(length);
            frame.Data.CopyTo(small.Writable);
            frame = small;
        }
        else
        {
            _next = null;
        }

        frame.Offload = offload;
        _counters.Out(FrameDelivery.Deliver(frame, _peer));
        frame.Release();
        return 0;
    }

    /// <summary>Says in struct virtio_net_hdr what is left to do on a frame.</summary>
    internal static void WriteHeader(NetworkFrame frame, Span<byte> header)
    {
        FrameOffload offload = frame.Offload;
        header.Clear();
        if (offload.Checksum == ChecksumState.Validated)
            header[0] = DataValid;
        if (offload.IsBlank)
        {
            header[0] = NeedsChecksum;
            BinaryPrimitives.WriteUInt16LittleEndian(header[6..], offload.ChecksumStart);
            BinaryPrimitives.WriteUInt16LittleEndian(header[8..], offload.ChecksumOffset);
        }

        if (offload.Segmentation == SegmentationKind.None)
            return;
        bool reduced = (frame.Data[offload.ChecksumStart + 13] & 0x80) != 0;
        header[1] = (byte)((offload.Segmentation == SegmentationKind.TcpV4 ? SegmentedTcpV4 : SegmentedTcpV6) | (reduced ? SegmentedWithEcn : 0));
        BinaryPrimitives.WriteUInt16LittleEndian(header[2..], offload.HeaderLength);
        BinaryPrimitives.WriteUInt16LittleEndian(header[4..], offload.SegmentSize);
    }

    /// <summary>Reads struct virtio_net_hdr, with a look at the frame for what it does not say.</summary>
    /// <returns>False if it asks for something that was not offered.</returns>
    internal static bool TryReadHeader(ReadOnlySpan<byte> header, ReadOnlySpan<byte> frame, out FrameOffload offload)
    {
        offload = default;
        var kind = (header[1] & ~SegmentedWithEcn) switch
        {
            SegmentedTcpV4 => SegmentationKind.TcpV4,
            SegmentedTcpV6 => SegmentationKind.TcpV6,
            _ => SegmentationKind.None,
        };
        if (kind == SegmentationKind.None && header[1] != 0)
            return false;
        if ((header[0] & NeedsChecksum) == 0)
        {
            if ((header[0] & DataValid) != 0)
                offload = new FrameOffload { Checksum = ChecksumState.Validated };
            return kind == SegmentationKind.None;
        }

        ushort start = BinaryPrimitives.ReadUInt16LittleEndian(header[6..]);
        ushort offset = BinaryPrimitives.ReadUInt16LittleEndian(header[8..]);
        ushort segmentSize = BinaryPrimitives.ReadUInt16LittleEndian(header[4..]);
        if (start + offset + sizeof(ushort) > frame.Length)
            return false;

        // netif.h has no place for where the checksum is: a front end finds out for itself, if it is TCP's or UDP's.
        FrameHeaders headers = FrameHeaders.Parse(frame);
        bool known = headers.Transport != 0 && headers.TransportOffset == start && headers.ChecksumOffset == offset && !headers.IsTruncated;
        if (kind != SegmentationKind.None && (!known || !TcpSegmenter.CanCut(headers, frame.Length, kind, segmentSize)))
            return false;
        offload = new FrameOffload
        {
            Checksum = !known ? ChecksumState.BlankOther : headers.IpVersion == 4 ? ChecksumState.BlankIpv4 : ChecksumState.BlankIpv6,
            ChecksumStart = start,
            ChecksumOffset = offset,
            Segmentation = kind,
            SegmentSize = kind == SegmentationKind.None ? (ushort)0 : segmentSize,
            HeaderLength = kind == SegmentationKind.None ? (ushort)0 : (ushort)headers.PayloadOffset,
        };
        return true;
    }

    /// <summary>Keeps the descriptor open until <see cref="EndUse"/>.</summary>
    private bool TryUse()
    {
        lock (_lock)
        {
            if (_closed)
                return false;
            _users++;
            return true;
        }
    }

    /// <summary>The last user of a device that is taken away closes it: nobody else's descriptor can have its number before that.</summary>
    private void EndUse(bool last = false)
    {
        lock (_lock)
        {
            if (!last)
                _users--;
            if (!_closed || _users != 0)
                return;
            _users = -1;
        }

        _ = LibC.close(_file);
        _next?.Release();
    }

    /// <summary>writev(2).</summary>
    [LibraryImport("libc", EntryPoint = "writev", SetLastError = true)]
    private static partial nint WriteParts(int file, iovec* parts, int count);

    /// <summary>readv(2).</summary>
    [LibraryImport("libc", EntryPoint = "readv", SetLastError = true)]
    private static partial nint ReadParts(int file, iovec* parts, int count);
}
