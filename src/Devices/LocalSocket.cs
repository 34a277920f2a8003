// Listening Unix sockets: made with the right mode from the first moment, in the place of those that the dead have left.

using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices;

/// <summary>Makes sockets that local processes connect to.</summary>
internal static class LocalSocket
{
    // Size of sun_path, its closing NUL included.
    private const int AddressSize = 108;

    /// <summary>The path as a socket address.</summary>
    /// <exception cref="IOException">It is too long for one.</exception>
    internal static UnixDomainSocketEndPoint EndPoint(string path)
    {
        if (Encoding.UTF8.GetByteCount(path) >= AddressSize)
            throw new IOException($"The path {path} is too long for a socket: Linux takes {AddressSize - 1} bytes; use a shorter one.");
        return new UnixDomainSocketEndPoint(path);
    }

    /// <summary>Makes a stream socket that listens. Closing it removes the file.</summary>
    /// <param name="path">Where; its folder must exist. A socket that nobody listens on is replaced, anything else is not.</param>
    /// <param name="mode">Who may connect.</param>
    /// <param name="backlog">Connections that may wait to be accepted.</param>
    /// <param name="what">What it is, for sentences: "the xenstore socket".</param>
    /// <exception cref="IOException">It cannot be made; a sentence says why, and what to do.</exception>
    internal static Socket Listen(string path, UnixFileMode mode, int backlog, string what)
    {
        UnixDomainSocketEndPoint endPoint = EndPoint(path);
        RemoveStale(path, endPoint, what);
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            // Between bind and listen nobody can connect, so nobody gets in before the mode is set.
            socket.Bind(endPoint);
            SetMode(path, mode);
            socket.Listen(backlog);
            return socket;
        }
        catch (Exception failure) when (failure is SocketException or IOException or UnauthorizedAccessException)
        {
            socket.Dispose();
            throw new IOException(
                $"{Capital(what)} {path} cannot be made: {failure.Message.TrimEnd('.')}. Its folder must exist, and this user must be allowed " +
                "to write there.", failure);
        }
    }

    private static void RemoveStale(string path, UnixDomainSocketEndPoint endPoint, string what)
    {
        if (!File.Exists(path))
            return;
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(endPoint);
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionRefused && IsSocket(path))
        {
            // Bound, but nobody listens: whoever made it is dead.
            File.Delete(path);
            return;
        }
        catch (SocketException)
        {
            throw new IOException($"{path} exists and is no socket that can be replaced; remove it, or name another path for {what}.");
        }
        throw new IOException($"Somebody serves {path} already; end it, or name another path for {what}.");
    }

    // Connecting to a file of any other kind is refused, too.
    private static unsafe bool IsSocket(string path)
    {
        stat status;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            return LibC.stat(name, &status) == 0 && ((uint)status.st_mode & (uint)LibC.S_IFMT) == (uint)LibC.S_IFSOCK;
    }

    private static unsafe void SetMode(string path, UnixFileMode mode)
    {
        // The members of UnixFileMode are the bits of the system's mode.
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
        {
            if (LibC.chmod(name, (mode_t)(uint)mode) != 0)
                throw new IOException($"its mode cannot be set ({Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())})");
        }
    }

    private static string Capital(string text) => char.ToUpperInvariant(text[0]) + text[1..];
}
