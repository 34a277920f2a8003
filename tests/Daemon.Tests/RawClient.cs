// HTTP over a Unix socket without anything of the daemon's own, as curl has it.

using System.Net.Sockets;

namespace XenSharp.Daemon.Tests;

internal static class RawClient
{
    public static HttpClient Create(string socket) => new(new SocketsHttpHandler
    {
        ConnectCallback = async (_, cancellation) =>
        {
            var connection = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            await connection.ConnectAsync(new UnixDomainSocketEndPoint(socket), cancellation);
            return new NetworkStream(connection, ownsSocket: true);
        },
    })
    { BaseAddress = new Uri("http://localhost") };
}
