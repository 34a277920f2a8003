// Network interfaces of the host: making TAP devices, putting them into bridges, bringing them up; by ioctl, as ip(8) once did.
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices.Network;

/// <summary>Something on the host's network could not be done; the message says what to do.</summary>
public sealed class HostNetworkException(string message, int error = 0) : Exception(message)
{
    /// <summary>The host's errno; 0 if there was none.</summary>
    public int Error { get; } = error;
}

/// <summary>What is asked of the host's kernel about its interfaces. In the network namespace of the calling thread.</summary>
internal static unsafe class HostInterface
{
    /// <summary>Bytes of a name with its zero (IFNAMSIZ).</summary>
    public const int NameSize = 16;

    private const string TunDevice = "/dev/net/tun";

    // linux/if_tun.h
    private const int TunSetInterface = 0x400454ca;
    private const int TunSetPersistence = 0x400454cb;
    private const int TunSetOffload = 0x400454d0;
    private const int TunSetHeaderSize = 0x400454d8;
    private const short Tap = 0x0002;
    private const short NoPacketInformation = 0x1000;
    private const short VirtioHeader = 0x4000;

    /// <summary>TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and TUN_F_TSO_ECN.</summary>
    private const uint AllOffloads = 0x01 | 0x02 | 0x04 | 0x08;

    // linux/sockios.h and net/if.h
    private const int BridgeAddInterface = 0x89a2;
    private const short Up = 0x1;
    private const short NoArp = 0x80;
    private const short Multicast = 0x1000;
    private const ushort EthernetFamily = 1;

    /// <summary>struct ifreq.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 40)]
    private struct InterfaceRequest
    {
        [FieldOffset(0)]
        public fixed byte Name[NameSize];

        [FieldOffset(NameSize)]
        public short Flags;

        [FieldOffset(NameSize)]
        public int Number;

        /// <summary>struct sockaddr: the family, and then the address.</summary>
        [FieldOffset(NameSize)]
        public ushort Family;

        [FieldOffset(NameSize + 2)]
        public fixed byte Address[14];
    }

    /// <summary>Whether an interface can have a name: 1 to 15 bytes, no space, slash or colon, not "." nor "..".</summary>
    public static bool IsName(string name)
        => name.Length is > 0 and < NameSize && name is not ("." or "..") && name.All(static c => c is > ' ' and < '\x7f' and not ('/' or ':' or '%'));

    /// <summary>Makes a TAP device, or opens a persistent one, whose frames have a struct virtio_net_hdr of 10 bytes before them.</summary>
    /// <param name="name">Its name, which <see cref="IsName"/> allows.</param>
    /// <param name="persistent">Whether it stays when it is closed; one that was persistent before stays in any case.</param>
    /// <returns>A descriptor whose calls do not wait.</returns>
    /// <exception cref="HostNetworkException">That cannot be done here.</exception>
    public static int OpenTap(string name, bool persistent)
    {
        int file;
        fixed (byte* path = Encoding.ASCII.GetBytes(TunDevice + '\0'))
            file = LibC.open(path, LibC.O_RDWR | LibC.O_NONBLOCK | LibC.O_CLOEXEC, 0);
        if (file < 0)
        {
            int error = LibC.errno;
            throw new HostNetworkException(
                error == LibC.EACCES || error == LibC.EPERM
                    ? $"There is no right to open {TunDevice} for the TAP device {name}: run as root, or give its group access."
                    : $"{TunDevice} cannot be opened for the TAP device {name} ({Text(error)}): load the kernel's module tun (modprobe tun).",
                error);
        }

        try
        {
            InterfaceRequest request = Named(name);
            request.Flags = Tap | NoPacketInformation | VirtioHeader;
            if (LibC.ioctl(file, TunSetInterface, &request) < 0)
                throw TapFailure(name, LibC.errno);
            int headerSize = TapDevice.VirtioHeaderSize;
            Check(LibC.ioctl(file, TunSetHeaderSize, &headerSize), $"The TAP device {name} does not take a header before its frames");
            Check(LibC.ioctl(file, TunSetOffload, (void*)AllOffloads), $"The TAP device {name} cannot leave checksums and segments to others");
            if (persistent)
                Check(LibC.ioctl(file, TunSetPersistence, (void*)1), $"The TAP device {name} cannot be made persistent");
            return file;
        }
        catch
        {
            _ = LibC.close(file);
            throw;
        }
    }

    /// <summary>Makes an interface a port of a bridge as the hotplug script vif-bridge does, and brings it up.</summary>
    /// <param name="name">The interface.</param>
    /// <param name="bridge">The bridge.</param>
    /// <exception cref="HostNetworkException">That cannot be done here.</exception>
    public static void JoinBridge(string name, string bridge)
    {
        int socket = Socket();
        try
        {
            // The highest address there is: a bridge takes the lowest one of its ports for its own.
            InterfaceRequest request = Named(name);
            request.Family = EthernetFamily;
            new MacAddress(0xfeff_ffff_ffff).Write(new Span<byte>(request.Address, MacAddress.Size));
            Check(LibC.ioctl(socket, LibC.SIOCSIFHWADDR, &request), $"The address of {name} cannot be set");

            InterfaceRequest port = Named(bridge);
            port.Number = Index(socket, name);
            if (LibC.ioctl(socket, BridgeAddInterface, &port) < 0)
            {
                int error = LibC.errno;
                throw new HostNetworkException(
                    error == LibC.ENODEV ? $"There is no bridge {bridge}: make it (ip link add {bridge} type bridge)."
                    : error == LibC.EOPNOTSUPP ? $"{bridge} is a network interface of the host's, but no bridge: name another one in bridge=."
                    : error == LibC.EPERM ? $"There is no right to put {name} into the bridge {bridge}: run as root, or with CAP_NET_ADMIN."
                    : $"{name} cannot be put into the bridge {bridge} ({Text(error)}).",
                    error);
            }

            ChangeFlags(socket, name, set: Up | NoArp, clear: Multicast);
        }
        finally
        {
            _ = LibC.close(socket);
        }
    }

    /// <summary>Brings an interface up.</summary>
    /// <exception cref="HostNetworkException">That cannot be done here.</exception>
    public static void BringUp(string name)
    {
        int socket = Socket();
        try
        {
            ChangeFlags(socket, name, set: Up, clear: 0);
        }
        finally
        {
            _ = LibC.close(socket);
        }
    }

    /// <summary>Whether the host has an interface of a name.</summary>
    public static bool Exists(string name)
    {
        int socket = Socket();
        try
        {
            InterfaceRequest request = Named(name);
            return LibC.ioctl(socket, LibC.SIOCGIFINDEX, &request) == 0;
        }
        finally
        {
            _ = LibC.close(socket);
        }
    }

    /// <summary>The system's text for an error number.</summary>
    public static string Text(int error) => Marshal.GetPInvokeErrorMessage(error);

    private static HostNetworkException TapFailure(string name, int error) => new(
        error == LibC.EBUSY ? $"The name {name} is taken by a TAP device that another program uses: choose another one (vifname=)."
        : error == LibC.EINVAL && Exists(name) ? $"The name {name} is taken by an interface of the host's that is no TAP device of this kind: choose another one (vifname=)."
        : error == LibC.EPERM ? $"There is no right to make the TAP device {name}: run as root, or with CAP_NET_ADMIN."
        : $"The TAP device {name} cannot be made ({Text(error)}).",
        error);

    private static int Socket()
    {
        int socket = LibC.socket(LibC.AF_INET, LibC.SOCK_DGRAM | LibC.SOCK_CLOEXEC, 0);
        if (socket < 0)
            socket = LibC.socket(LibC.AF_UNIX, LibC.SOCK_DGRAM | LibC.SOCK_CLOEXEC, 0);
        Check(socket, "The host's network interfaces cannot be asked for");
        return socket;
    }

    private static int Index(int socket, string name)
    {
        InterfaceRequest request = Named(name);
        Check(LibC.ioctl(socket, LibC.SIOCGIFINDEX, &request), $"The interface {name} is gone");
        return request.Number;
    }

    private static void ChangeFlags(int socket, string name, int set, int clear)
    {
        InterfaceRequest request = Named(name);
        Check(LibC.ioctl(socket, LibC.SIOCGIFFLAGS, &request), $"The interface {name} is gone");
        short wanted = (short)(((ushort)request.Flags | set) & ~clear);

        // A device that was made ready beforehand can be used without any right to change it.
        if (request.Flags == wanted)
            return;
        request.Flags = wanted;
        Check(LibC.ioctl(socket, LibC.SIOCSIFFLAGS, &request), $"The interface {name} cannot be brought up");
    }

    private static InterfaceRequest Named(string name)
    {
        InterfaceRequest request = default;
        _ = Encoding.ASCII.GetBytes(name, new Span<byte>(request.Name, NameSize - 1));
        return request;
    }

    private static void Check(int result, string what)
    {
        if (result >= 0)
            return;
        int error = LibC.errno;
        throw new HostNetworkException($"{what} ({Text(error)}).", error);
    }
}
