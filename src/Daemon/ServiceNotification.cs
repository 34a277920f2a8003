// Tells systemd how far the daemon is (sd_notify(3)), where systemd has started it.

using System.Net.Sockets;
using System.Text;

namespace XenSharp.Daemon;

/// <summary>Sends notifications to $NOTIFY_SOCKET; without it, or where nobody listens there, does nothing.</summary>
public static class ServiceNotification
{
    /// <summary>The daemon answers.</summary>
    public const string Ready = "READY=1";

    /// <summary>The daemon is about to end.</summary>
    public const string Stopping = "STOPPING=1";

    /// <summary>Sends one.</summary>
    public static void Send(string state)
    {
        if (Environment.GetEnvironmentVariable("NOTIFY_SOCKET") is not { Length: > 0 } path)
            return;
        try
        {
            using var socket = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);

            // '@' stands for the abstract namespace.
            var address = new UnixDomainSocketEndPoint(path[0] == '@' ? '\0' + path[1..] : path);
            _ = socket.SendTo(Encoding.UTF8.GetBytes(state), address);
        }
        catch (Exception failure) when (failure is SocketException or ArgumentException)
        {
            // Whoever named that socket does not want to know.
        }
    }
}
