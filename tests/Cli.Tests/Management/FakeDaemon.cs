// What answers commands in place of the daemon: HTTP over a Unix socket, as little of it as the client needs.

using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using XenSharp.Api;

namespace XenSharp.Cli.Tests.Management;

/// <summary>One request as it came.</summary>
/// <param name="Line">Method and path with query, such as "GET /v1/domains".</param>
/// <param name="Body">The body; empty for none.</param>
internal sealed record FakeRequest(string Line, string Body);

/// <summary>Answers each request as a test says, and keeps them all.</summary>
internal sealed class FakeDaemon : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("xensharp-daemon-").FullName;
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly Dictionary<string, Func<FakeRequest, Stream, Task>> _answers = new(StringComparer.Ordinal);
    private readonly List<FakeRequest> _requests = [];

    internal FakeDaemon()
    {
        Path = System.IO.Path.Combine(_folder, "s");
        _listener.Bind(new UnixDomainSocketEndPoint(Path));
        _listener.Listen();
        _ = AcceptAsync();
    }

    /// <summary>The socket.</summary>
    internal string Path { get; }

    /// <summary>What came so far.</summary>
    internal IReadOnlyList<FakeRequest> Requests
    {
        get
        {
            lock (_requests)
                return [.. _requests];
        }
    }

    /// <summary>Answers with JSON.</summary>
    /// <param name="line">Method and path.</param>
    /// <param name="json">The answer; null for 204 without one.</param>
    internal FakeDaemon On(string line, string? json)
        => OnStream(line, async (_, stream) => await stream.WriteAsync(Answer(json is null ? "204 No Content" : "200 OK", "application/json", json ?? string.Empty)));

    /// <summary>Answers with a problem.</summary>
    internal FakeDaemon OnProblem(string line, int status, string kind, string detail)
    {
        string json = JsonSerializer.Serialize(
            new ApiProblem { Type = ApiProblem.TypePrefix + kind, Title = kind, Status = status, Detail = detail }, ApiJson.Default.ApiProblem);
        return OnStream(line, async (_, stream) => await stream.WriteAsync(Answer($"{status} No", ApiProblem.MediaType, json)));
    }

    /// <summary>Answers by writing to the connection, which is closed afterwards.</summary>
    internal FakeDaemon OnStream(string line, Func<FakeRequest, Stream, Task> answer)
    {
        _answers[line] = answer;
        return this;
    }

    /// <summary>An answer whose length is given by the end of the connection, if it has no body, and by its body if it has.</summary>
    internal static byte[] Answer(string status, string type, string? body)
    {
        string length = body is null ? string.Empty : $"Content-Length: {Encoding.UTF8.GetByteCount(body)}\r\n";
        return Encoding.UTF8.GetBytes($"HTTP/1.1 {status}\r\nContent-Type: {type}\r\n{length}Connection: close\r\n\r\n{body}");
    }

    public void Dispose()
    {
        _listener.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    private async Task AcceptAsync()
    {
        try
        {
            while (true)
                _ = ServeAsync(await _listener.AcceptAsync());
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // The test is over.
        }
    }

    private async Task ServeAsync(Socket socket)
    {
        await using var stream = new NetworkStream(socket, ownsSocket: true);
        try
        {
            FakeRequest request = await ReadAsync(stream);
            lock (_requests)
                _requests.Add(request);
            if (_answers.TryGetValue(request.Line, out Func<FakeRequest, Stream, Task>? answer))
                await answer(request, stream);
            else
                await stream.WriteAsync(Answer("404 Not Found", "text/plain", $"no answer for {request.Line}"));
        }
        catch (IOException)
        {
            // The client has gone.
        }
    }

    private static async Task<FakeRequest> ReadAsync(Stream stream)
    {
        var head = new StringBuilder();
        byte[] one = new byte[1];
        while (!head.ToString().EndsWith("\r\n\r\n", StringComparison.Ordinal))
        {
            if (await stream.ReadAsync(one) == 0)
                throw new IOException();
            head.Append((char)one[0]);
        }

        string[] lines = head.ToString().Split("\r\n");
        int length = lines.Where(static line => line.StartsWith("Content-Length:", StringComparison.OrdinalIgnoreCase))
            .Select(static line => int.Parse(line[15..], System.Globalization.CultureInfo.InvariantCulture)).FirstOrDefault();
        byte[] body = new byte[length];
        await stream.ReadExactlyAsync(body);
        return new FakeRequest(lines[0][..lines[0].LastIndexOf(' ')], Encoding.UTF8.GetString(body));
    }
}
