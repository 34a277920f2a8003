// Listening Unix sockets: made with the right mode from the first moment, in the place of those that the dead have left.

using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices;

/// <summary>What there is where a socket is to be.</summary>
public enum LocalSocketState
{
    /// <summary>Nothing.</summary>
    Absent,

    /// <summary>A socket that nobody listens on: whoever made it is dead.</summary>
    Abandoned,

    /// <summary>A socket that somebody listens on.</summary>
    Served,

    /// <summary>Something else, or something that this user may not connect to.</summary>
    Other,
}

/// <summary>Makes sockets that local processes connect to.</summary>
public static class LocalSocket
{
    /// <summary>Bytes that the path of a socket can have: sun_path of unix(7), without its closing NUL.</summary>
    public const int LongestPath = 107;

    /// <summary>The path as a socket address.</summary>
    /// <exception cref="IOException">It is too long for one.</exception>
    internal static UnixDomainSocketEndPoint EndPoint(string path)
    {
        if (Encoding.UTF8.GetByteCount(path) > LongestPath)
            throw new IOException($"The path {path} is too long for a socket: Linux takes {LongestPath} bytes; use a shorter one.");
        return new UnixDomainSocketEndPoint(path);
    }

    /// <summary>Looks at a path, and connects to what is there.</summary>
    /// <param name="path">The path.</param>
    /// <param name="failure">Why it could not be connected to, where there is something that is not served.</param>
    /// <exception cref="IOException">The path is too long for a socket.</exception>
    public static LocalSocketState Look(string path, out SocketException? failure)
    {
        UnixDomainSocketEndPoint endPoint = EndPoint(path);
        failure = null;
        if (!Path.Exists(path))
            return LocalSocketState.Absent;
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(endPoint);
            return LocalSocketState.Served;
        }
        catch (SocketException exception)
        {
            // Connecting to a file of any other kind is refused, too.
            failure = exception;
            return exception.SocketErrorCode == SocketError.ConnectionRefused && IsSocket(path) ? LocalSocketState.Abandoned : LocalSocketState.Other;
        }
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
        RemoveAbandoned(path, what);
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

    private static void RemoveAbandoned(string path, string what)
    {
        switch (Look(path, out _))
        {
            case LocalSocketState.Abandoned:
                File.Delete(path);
                break;
            case LocalSocketState.Served:
                throw new IOException($"Somebody serves {path} already; end it, or name another path for {what}.");
            case LocalSocketState.Other:
                throw new IOException($"{path} exists and is no socket that can be replaced; remove it, or name another path for {what}.");
        }
    }

    private static unsafe bool IsSocket(string path)
    {
        stat status;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            return LibC.lstat(name, &status) == 0 && ((uint)status.st_mode & (uint)LibC.S_IFMT) == (uint)LibC.S_IFSOCK;
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
