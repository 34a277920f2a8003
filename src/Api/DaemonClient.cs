// The daemon's API as methods: one for each thing that it can be asked.

using System.Net;
using System.Net.Http.Headers;
using System.Net.Sockets;
using System.Runtime.CompilerServices;
using System.Text.Json;
using System.Text.Json.Serialization;
using System.Text.Json.Serialization.Metadata;

namespace XenSharp.Api;

/// <summary>
/// Talks to the daemon over its Unix socket. Members may be called by any thread. A <c>domain</c> is a domain's number, name or UUID
/// (<see cref="ApiRoutes"/>).
/// </summary>
/// <remarks>Each member throws <see cref="DaemonException"/>, with a sentence, where the daemon is not there or refuses; and
/// <see cref="OperationCanceledException"/> where it was cancelled.</remarks>
public sealed class DaemonClient : IDisposable
{
    // A newer daemon may say more than this client knows of.
    private static readonly ApiJson s_json = new(new JsonSerializerOptions(ApiJson.Default.Options) { UnmappedMemberHandling = JsonUnmappedMemberHandling.Skip });

    private readonly HttpClient _http;

    /// <param name="socket">Path of the socket; null for <see cref="DaemonSocket.DefaultPath"/>.</param>
    public DaemonClient(string? socket = null)
    {
        Socket = socket ?? DaemonSocket.DefaultPath;
        _http = new HttpClient(
            new SocketsHttpHandler
            {
                ConnectCallback = ConnectAsync,
                UseProxy = false,

                // A command asks once or twice: nothing that looks after connections, nor a thread for that.
                PooledConnectionIdleTimeout = TimeSpan.Zero,
                UseCookies = false,
                AllowAutoRedirect = false,
                AutomaticDecompression = DecompressionMethods.None,
            })
        {
            BaseAddress = new Uri("http://localhost"),
            Timeout = Timeout.InfiniteTimeSpan,
        };
    }

    /// <summary>Path of the socket.</summary>
    public string Socket { get; }

    /// <summary>The machine and the daemon.</summary>
    public Task<HostInfo> GetHostAsync(CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Host, s_json.HostInfo, cancellation);

    /// <summary>The manager's log, oldest line first.</summary>
    public async Task<string> GetLogAsync(CancellationToken cancellation = default)
    {
        using HttpResponseMessage response = await SendAsync(HttpMethod.Get, ApiRoutes.Log, null, cancellation).ConfigureAwait(false);
        return await response.Content.ReadAsStringAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Empties the manager's log.</summary>
    public Task ClearLogAsync(CancellationToken cancellation = default) => DoAsync(HttpMethod.Delete, ApiRoutes.Log, cancellation);

    /// <summary>All domains, by number.</summary>
    public Task<IReadOnlyList<DomainInfo>> ListAsync(CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Domains, s_json.IReadOnlyListDomainInfo, cancellation);

    /// <summary>One domain.</summary>
    public Task<DomainInfo> GetAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.Domain, domain), s_json.DomainInfo, cancellation);

    /// <summary>Makes a domain, and runs it unless it is to be paused.</summary>
    public Task<CreateDomainResult> CreateAsync(CreateDomainRequest request, CancellationToken cancellation = default)
        => AskAsync(HttpMethod.Post, ApiRoutes.Domains, request, s_json.CreateDomainRequest, s_json.CreateDomainResult, cancellation);

    /// <summary>Ends a domain at once.</summary>
    public Task DestroyAsync(string domain, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Delete, ApiRoutes.Of(ApiRoutes.Domain, domain), cancellation);

    /// <summary>Asks a guest to power off; to see it do so, follow <see cref="FollowEventsAsync"/>.</summary>
    public Task ShutdownAsync(string domain, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Shutdown, domain), cancellation);

    /// <summary>Asks a guest to reboot.</summary>
    public Task RebootAsync(string domain, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Reboot, domain), cancellation);

    /// <summary>Stops all vCPUs of a domain.</summary>
    public Task PauseAsync(string domain, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Pause, domain), cancellation);

    /// <summary>Takes a pause back.</summary>
    public Task UnpauseAsync(string domain, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Unpause, domain), cancellation);

    /// <summary>Gives a domain another name.</summary>
    public Task<DomainInfo> RenameAsync(string domain, string name, CancellationToken cancellation = default)
        => AskAsync(
            HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Rename, domain), new RenameRequest { Name = name }, s_json.RenameRequest, s_json.DomainInfo, cancellation);

    /// <summary>The vCPUs of a domain.</summary>
    public Task<IReadOnlyList<VcpuInfo>> ListVcpusAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.Vcpus, domain), s_json.IReadOnlyListVcpuInfo, cancellation);

    /// <summary>Tells a guest how many vCPUs it is to have up.</summary>
    public Task SetVcpusAsync(string domain, int online, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Put, ApiRoutes.Of(ApiRoutes.Vcpus, domain), new SetVcpusRequest { Online = online }, s_json.SetVcpusRequest, cancellation);

    /// <summary>Says which of the host's processors vCPUs may run on.</summary>
    public Task PinVcpusAsync(string domain, PinVcpusRequest request, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Put, ApiRoutes.Of(ApiRoutes.VcpuProcessors, domain), request, s_json.PinVcpusRequest, cancellation);

    /// <summary>Tells a guest how much memory its balloon is to leave it.</summary>
    public Task SetMemoryTargetAsync(string domain, long memoryKiB, CancellationToken cancellation = default)
        => DoAsync(
            HttpMethod.Put, ApiRoutes.Of(ApiRoutes.MemoryTarget, domain), new SetMemoryRequest { MemoryKiB = memoryKiB }, s_json.SetMemoryRequest, cancellation);

    /// <summary>Sets how much memory a domain may have at most.</summary>
    public Task SetMemoryMaximumAsync(string domain, long memoryKiB, CancellationToken cancellation = default)
        => DoAsync(
            HttpMethod.Put, ApiRoutes.Of(ApiRoutes.MemoryMaximum, domain), new SetMemoryRequest { MemoryKiB = memoryKiB }, s_json.SetMemoryRequest, cancellation);

    /// <summary>Sends a guest's kernel a magic system request.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="key">One letter or digit.</param>
    /// <param name="cancellation">Gives up.</param>
    public Task SysrqAsync(string domain, string key, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Sysrq, domain), new SysrqRequest { Key = key }, s_json.SysrqRequest, cancellation);

    /// <summary>Triggers what hardware would.</summary>
    public Task TriggerAsync(string domain, TriggerRequest request, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Post, ApiRoutes.Of(ApiRoutes.Trigger, domain), request, s_json.TriggerRequest, cancellation);

    /// <summary>What a domain, or its next incarnation, is made from.</summary>
    public Task<DomainConfigurationDocument> GetConfigurationAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.Configuration, domain), s_json.DomainConfigurationDocument, cancellation);

    /// <summary>Sets what a domain's next incarnation is made from.</summary>
    public Task SetConfigurationAsync(string domain, DomainConfigurationDocument configuration, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Put, ApiRoutes.Of(ApiRoutes.Configuration, domain), configuration, s_json.DomainConfigurationDocument, cancellation);

    /// <summary>The block devices of a domain.</summary>
    public Task<IReadOnlyList<BlockDeviceInfo>> ListBlockDevicesAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.BlockDevices, domain), s_json.IReadOnlyListBlockDeviceInfo, cancellation);

    /// <summary>Plugs a block device in.</summary>
    public Task<BlockDeviceInfo> AttachBlockDeviceAsync(string domain, AttachDeviceRequest request, CancellationToken cancellation = default)
        => AskAsync(
            HttpMethod.Post, ApiRoutes.Of(ApiRoutes.BlockDevices, domain), request, s_json.AttachDeviceRequest, s_json.BlockDeviceInfo, cancellation);

    /// <summary>Unplugs a block device.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="device">Its name in the guest, or its number.</param>
    /// <param name="force">Whether the guest lets go of it or not.</param>
    /// <param name="cancellation">Gives up waiting; it may be unplugged all the same.</param>
    public Task DetachBlockDeviceAsync(string domain, string device, bool force = false, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Delete, ApiRoutes.Of(ApiRoutes.BlockDevice, domain, device) + Force(force), cancellation);

    /// <summary>The network interfaces of a domain.</summary>
    public Task<IReadOnlyList<NetworkDeviceInfo>> ListNetworkDevicesAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.NetworkDevices, domain), s_json.IReadOnlyListNetworkDeviceInfo, cancellation);

    /// <summary>Plugs a network interface in.</summary>
    public Task<NetworkDeviceInfo> AttachNetworkDeviceAsync(string domain, AttachDeviceRequest request, CancellationToken cancellation = default)
        => AskAsync(
            HttpMethod.Post, ApiRoutes.Of(ApiRoutes.NetworkDevices, domain), request, s_json.AttachDeviceRequest, s_json.NetworkDeviceInfo, cancellation);

    /// <summary>Unplugs a network interface.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="device">Its index, or its MAC address.</param>
    /// <param name="force">Whether the guest lets go of it or not.</param>
    /// <param name="cancellation">Gives up waiting; it may be unplugged all the same.</param>
    public Task DetachNetworkDeviceAsync(string domain, string device, bool force = false, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Delete, ApiRoutes.Of(ApiRoutes.NetworkDevice, domain, device) + Force(force), cancellation);

    /// <summary>The channels of a domain.</summary>
    public Task<IReadOnlyList<ChannelInfo>> ListChannelsAsync(string domain, CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Of(ApiRoutes.Channels, domain), s_json.IReadOnlyListChannelInfo, cancellation);

    /// <summary>Saves a domain to a file of the host's.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="request">How, and where to.</param>
    /// <param name="progress">Told how far it is.</param>
    /// <param name="cancellation">Gives up: the domain runs on.</param>
    public Task SaveAsync(string domain, SaveDomainRequest request, Action<OperationUpdate>? progress = null, CancellationToken cancellation = default)
        => OperateAsync(ApiRoutes.Of(ApiRoutes.Save, domain), request, s_json.SaveDomainRequest, progress, cancellation);

    /// <summary>Makes a domain from a file that one was saved to.</summary>
    /// <param name="request">Where from.</param>
    /// <param name="progress">Told how far it is.</param>
    /// <param name="cancellation">Gives up: there will be no domain.</param>
    public async Task<DomainInfo> RestoreAsync(
        RestoreDomainRequest request, Action<OperationUpdate>? progress = null, CancellationToken cancellation = default)
    {
        OperationUpdate last = await OperateAsync(ApiRoutes.Restore, request, s_json.RestoreDomainRequest, progress, cancellation).ConfigureAwait(false);
        return last.Domain ?? throw new DaemonException("The daemon restored a domain and did not say which; see the list of domains.");
    }

    /// <summary>Writes a domain's memory and registers to a file of the host's.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="request">Where to.</param>
    /// <param name="progress">Told how far it is.</param>
    /// <param name="cancellation">Gives up; the file is removed.</param>
    public Task DumpCoreAsync(string domain, DumpCoreRequest request, Action<OperationUpdate>? progress = null, CancellationToken cancellation = default)
        => OperateAsync(ApiRoutes.Of(ApiRoutes.DumpCore, domain), request, s_json.DumpCoreRequest, progress, cancellation);

    /// <summary>What ran when an earlier daemon was ended without taking it down.</summary>
    public Task<IReadOnlyList<LostDomain>> ListLostAsync(CancellationToken cancellation = default)
        => GetAsync(ApiRoutes.Lost, s_json.IReadOnlyListLostDomain, cancellation);

    /// <summary>Forgets one of those.</summary>
    public Task ForgetLostAsync(Guid uuid, CancellationToken cancellation = default)
        => DoAsync(HttpMethod.Delete, ApiRoutes.Of(ApiRoutes.LostRecord, uuid.ToString()), cancellation);

    /// <summary>What happens to domains from now on; the first is <see cref="DomainEventKind.Ready"/>.</summary>
    /// <returns>Ends when the daemon does.</returns>
    public async IAsyncEnumerable<DomainEvent> FollowEventsAsync([EnumeratorCancellation] CancellationToken cancellation = default)
    {
        using HttpResponseMessage response = await SendAsync(HttpMethod.Get, ApiRoutes.Events, null, cancellation).ConfigureAwait(false);
        await foreach (DomainEvent happened in ReadLinesAsync(response, s_json.DomainEvent, cancellation).ConfigureAwait(false))
            yield return happened;
    }

    /// <summary>What a guest has printed, as far as the history has it.</summary>
    public async Task<byte[]> GetConsoleHistoryAsync(string domain, int channel = 0, CancellationToken cancellation = default)
    {
        using HttpResponseMessage response = await SendAsync(
            HttpMethod.Get, $"{ApiRoutes.Of(ApiRoutes.ConsoleHistory, domain)}?channel={channel}", null, cancellation).ConfigureAwait(false);
        return await response.Content.ReadAsByteArrayAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>
    /// Attaches to a console. What is read from the stream was printed by the guest, and it ends when the domain does; what is written to
    /// it is typed. Disposing it detaches.
    /// </summary>
    /// <param name="domain">The domain.</param>
    /// <param name="history">Begin with what the guest has printed before.</param>
    /// <param name="channel">Which console, 0 for the first.</param>
    /// <param name="cancellation">Gives up attaching.</param>
    public async Task<Stream> AttachConsoleAsync(string domain, bool history = true, int channel = 0, CancellationToken cancellation = default)
    {
        using var request = new HttpRequestMessage(
            HttpMethod.Get, $"{ApiRoutes.Of(ApiRoutes.Console, domain)}?history={(history ? "true" : "false")}&channel={channel}");
        request.Headers.Connection.Add("Upgrade");
        request.Headers.Upgrade.Add(new ProductHeaderValue(ApiRoutes.ConsoleProtocol));
        HttpResponseMessage response = await SendAsync(request, cancellation).ConfigureAwait(false);
        if (response.StatusCode == HttpStatusCode.SwitchingProtocols)
            return await response.Content.ReadAsStreamAsync(cancellation).ConfigureAwait(false);
        response.Dispose();
        throw new DaemonException($"What answers at {Socket} did not hand the console over; is it a {ApiRoutes.ConsoleProtocol} daemon?");
    }

    public void Dispose() => _http.Dispose();

    private static string Force(bool force) => force ? "?force=true" : string.Empty;

    private async Task<T> GetAsync<T>(string path, JsonTypeInfo<T> type, CancellationToken cancellation)
    {
        using HttpResponseMessage response = await SendAsync(HttpMethod.Get, path, null, cancellation).ConfigureAwait(false);
        return await ReadAsync(response, type, cancellation).ConfigureAwait(false);
    }

    private async Task DoAsync(HttpMethod method, string path, CancellationToken cancellation)
        => (await SendAsync(method, path, null, cancellation).ConfigureAwait(false)).Dispose();

    private async Task DoAsync<T>(HttpMethod method, string path, T body, JsonTypeInfo<T> type, CancellationToken cancellation)
        => (await SendAsync(method, path, Content(body, type), cancellation).ConfigureAwait(false)).Dispose();

    private async Task<TAnswer> AskAsync<TBody, TAnswer>(
        HttpMethod method, string path, TBody body, JsonTypeInfo<TBody> bodyType, JsonTypeInfo<TAnswer> answerType, CancellationToken cancellation)
    {
        using HttpResponseMessage response = await SendAsync(method, path, Content(body, bodyType), cancellation).ConfigureAwait(false);
        return await ReadAsync(response, answerType, cancellation).ConfigureAwait(false);
    }

    private async Task<OperationUpdate> OperateAsync<T>(
        string path, T body, JsonTypeInfo<T> type, Action<OperationUpdate>? progress, CancellationToken cancellation)
    {
        using HttpResponseMessage response = await SendAsync(HttpMethod.Post, path, Content(body, type), cancellation).ConfigureAwait(false);
        await foreach (OperationUpdate update in ReadLinesAsync(response, s_json.OperationUpdate, cancellation).ConfigureAwait(false))
        {
            if (update.Problem is { } problem)
                throw new DaemonException(problem);
            progress?.Invoke(update);
            if (update.Finished)
                return update;
        }

        throw new DaemonException("The daemon ended before it was done; see its log for why.");
    }

    private static ByteArrayContent Content<T>(T body, JsonTypeInfo<T> type)
    {
        var content = new ByteArrayContent(JsonSerializer.SerializeToUtf8Bytes(body, type));
        content.Headers.ContentType = new MediaTypeHeaderValue("application/json");
        return content;
    }

    private async Task<T> ReadAsync<T>(HttpResponseMessage response, JsonTypeInfo<T> type, CancellationToken cancellation)
    {
        try
        {
            await using Stream stream = await response.Content.ReadAsStreamAsync(cancellation).ConfigureAwait(false);
            return await JsonSerializer.DeserializeAsync(stream, type, cancellation).ConfigureAwait(false) ?? throw Unreadable(null);
        }
        catch (JsonException failure)
        {
            throw Unreadable(failure);
        }
        catch (Exception failure) when (failure is HttpRequestException or IOException)
        {
            throw Gone(failure);
        }
    }

    private async IAsyncEnumerable<T> ReadLinesAsync<T>(
        HttpResponseMessage response, JsonTypeInfo<T> type, [EnumeratorCancellation] CancellationToken cancellation)
    {
        using var reader = new StreamReader(await response.Content.ReadAsStreamAsync(cancellation).ConfigureAwait(false));
        while (true)
        {
            T? item;
            try
            {
                if (await reader.ReadLineAsync(cancellation).ConfigureAwait(false) is not { } line)
                    yield break;
                item = JsonSerializer.Deserialize(line, type);
            }
            catch (JsonException failure)
            {
                throw Unreadable(failure);
            }
            catch (Exception failure) when (failure is HttpRequestException or IOException)
            {
                throw Gone(failure);
            }

            yield return item ?? throw Unreadable(null);
        }
    }

    private async Task<HttpResponseMessage> SendAsync(HttpMethod method, string path, HttpContent? content, CancellationToken cancellation)
    {
        using var request = new HttpRequestMessage(method, path) { Content = content };
        return await SendAsync(request, cancellation).ConfigureAwait(false);
    }

    private async Task<HttpResponseMessage> SendAsync(HttpRequestMessage request, CancellationToken cancellation)
    {
        HttpResponseMessage response;
        try
        {
            response = await _http.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
        }
        catch (HttpRequestException failure)
        {
            throw failure.InnerException is DaemonException known ? known : Gone(failure);
        }

        if (response.IsSuccessStatusCode || response.StatusCode == HttpStatusCode.SwitchingProtocols)
            return response;
        using (response)
            throw new DaemonException(await ReadProblemAsync(response, cancellation).ConfigureAwait(false));
    }

    private async Task<ApiProblem> ReadProblemAsync(HttpResponseMessage response, CancellationToken cancellation)
    {
        if (response.Content.Headers.ContentType?.MediaType == ApiProblem.MediaType)
            return await ReadAsync(response, s_json.ApiProblem, cancellation).ConfigureAwait(false);
        return new ApiProblem
        {
            Status = (int)response.StatusCode,
            Title = response.ReasonPhrase ?? string.Empty,
            Detail = $"What answers at {Socket} says {(int)response.StatusCode} {response.ReasonPhrase}; is it the XenSharp daemon, of this version?",
        };
    }

    private async ValueTask<Stream> ConnectAsync(SocketsHttpConnectionContext context, CancellationToken cancellation)
    {
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            await socket.ConnectAsync(new UnixDomainSocketEndPoint(Socket), cancellation).ConfigureAwait(false);
            return new NetworkStream(socket, ownsSocket: true);
        }
        catch (SocketException failure)
        {
            socket.Dispose();
            throw new DaemonException(
                failure.SocketErrorCode switch
                {
                    SocketError.AccessDenied => $"There is no permission to use {Socket}: run as a user of the socket's group, or as root.",
                    _ => $"No daemon answers at {Socket}: start one with \"xensharp daemon\", or name another socket with {DaemonSocket.EnvironmentVariable}.",
                },
                failure);
        }
        catch (ArgumentOutOfRangeException failure)
        {
            socket.Dispose();
            throw new DaemonException($"{Socket} cannot be a socket's name: it is too long. Name another with {DaemonSocket.EnvironmentVariable}.", failure);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    private DaemonException Gone(Exception failure)
        => new($"The daemon at {Socket} ended in the middle of an answer ({failure.Message.TrimEnd('.')}); see its log.", failure);

    private DaemonException Unreadable(JsonException? failure)
        => new($"What answers at {Socket} did not say what was expected of it; is it the XenSharp daemon, of this version?", failure);
}
