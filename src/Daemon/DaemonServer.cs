// The daemon: domains, and the HTTP API by which they are made and managed.

using System.Net.Sockets;
using System.Text.Json;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Http.Json;
using Microsoft.AspNetCore.Routing;
using Microsoft.AspNetCore.Server.Kestrel.Transport.Sockets;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Hosting;
using XenSharp.Api;
using XenSharp.Devices.Xenstore;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon;

/// <summary>A daemon in this process. Started, it serves until it is closed and disposed.</summary>
public sealed class DaemonServer : IAsyncDisposable
{
    /// <summary>A configuration, written out with all its escapes, is far below this.</summary>
    private const int LargestBody = 4 << 20;

    private static readonly TimeSpan EndOfRequests = TimeSpan.FromSeconds(5);

    private readonly ToolstackContext _context;
    private readonly WebApplication _application;
    private readonly XenstoreListener? _xenstore;

    private DaemonServer(
        ToolstackContext context, DomainToolstack toolstack, WebApplication application, XenstoreListener? xenstore, DaemonOptions options)
        => (_context, Toolstack, _application, _xenstore, Options) = (context, toolstack, application, xenstore, options);

    /// <summary>What it was started with.</summary>
    public DaemonOptions Options { get; }

    /// <summary>Its domains.</summary>
    public DomainToolstack Toolstack { get; }

    /// <summary>Takes the state folder and the socket, and serves.</summary>
    /// <param name="host">The KVM to run domains with; stays the caller's. It need not be there: then only making domains fails.</param>
    /// <param name="options">Where it listens and keeps things.</param>
    /// <param name="log">Is told what it does.</param>
    /// <exception cref="ToolstackException">Another daemon has the state folder or the socket, or they cannot be used.</exception>
    public static async Task<DaemonServer> StartAsync(KvmHost host, DaemonOptions options, ManagerLog log)
    {
        ArgumentNullException.ThrowIfNull(host);
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(log);
        var context = new ToolstackContext(host);
        DomainToolstack? toolstack = null;
        WebApplication? application = null;
        XenstoreListener? xenstore = null;
        try
        {
            toolstack = new DomainToolstack(
                context, new ToolstackOptions { StateFolder = options.StateFolder, ConsoleLogFolder = options.ConsoleLogFolder }, log);
            SocketFile.Prepare(options.Socket);
            if (options.XenstoreSocket is { } path)
                xenstore = ListenForXenstore(context, path);
            application = Build(options, toolstack, log);
            await application.StartAsync().ConfigureAwait(false);
            return new DaemonServer(context, toolstack, application, xenstore, options);
        }
        catch (Exception failure)
        {
            if (application is not null)
                await application.DisposeAsync().ConfigureAwait(false);
            if (xenstore is not null)
                await xenstore.DisposeAsync().ConfigureAwait(false);
            if (toolstack is not null)
                await toolstack.DisposeAsync().ConfigureAwait(false);
            await context.DisposeAsync().ConfigureAwait(false);
            if (failure is SocketException or IOException { InnerException: SocketException or Microsoft.AspNetCore.Connections.AddressInUseException })
                throw new ToolstackException(ProblemKind.HostCannot, $"The socket {options.Socket} cannot be made ({failure.Message.TrimEnd('.')}): name another with --socket.", failure);
            throw;
        }
    }

    /// <summary>Asks all guests to shut down, while the API still answers, and destroys those that did not in time.</summary>
    /// <param name="patience">How long to wait for them; zero to destroy them at once.</param>
    /// <param name="cancellation">Ends the waiting.</param>
    public Task CloseAsync(TimeSpan patience, CancellationToken cancellation = default) => Toolstack.CloseAsync(patience, cancellation);

    /// <summary>Destroys what domains there are, ends all requests, removes the socket and gives the state folder back.</summary>
    public async ValueTask DisposeAsync()
    {
        await Toolstack.CloseAsync(TimeSpan.Zero).ConfigureAwait(false);
        await _application.StopAsync().ConfigureAwait(false);
        await _application.DisposeAsync().ConfigureAwait(false);
        File.Delete(Options.Socket);
        if (_xenstore is not null)
            await _xenstore.DisposeAsync().ConfigureAwait(false);
        await Toolstack.DisposeAsync().ConfigureAwait(false);
        await _context.DisposeAsync().ConfigureAwait(false);
    }

    private static XenstoreListener ListenForXenstore(ToolstackContext context, string path)
    {
        try
        {
            if (Path.GetDirectoryName(path) is { Length: > 0 } folder)
                _ = Directory.CreateDirectory(folder);
            return XenstoreListener.Start(context.Store, path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(ProblemKind.HostCannot, failure.Message, failure);
        }
    }

    private static WebApplication Build(DaemonOptions options, DomainToolstack toolstack, ManagerLog log)
    {
        // Nothing from files or the environment: whoever starts the daemon says all that there is to say.
        WebApplicationBuilder builder = WebApplication.CreateEmptyBuilder(new WebApplicationOptions { ContentRootPath = "/" });
        _ = builder.WebHost.UseKestrelCore();
        _ = builder.WebHost.ConfigureKestrel(kestrel =>
        {
            kestrel.AddServerHeader = false;
            kestrel.Limits.MaxRequestBodySize = LargestBody;
            kestrel.ListenUnixSocket(options.Socket);
        });
        _ = builder.Services.Configure<SocketTransportOptions>(sockets => sockets.CreateBoundListenSocket = endpoint =>
        {
            Socket socket = SocketTransportOptions.CreateDefaultBoundListenSocket(endpoint);
            try
            {
                SocketFile.SetAccess(options.Socket, options.SocketMode, options.SocketGroup);
                return socket;
            }
            catch
            {
                socket.Dispose();
                throw;
            }
        });
        _ = builder.Services.AddRoutingCore();
        _ = builder.Services.AddSingleton<IHostLifetime, NoLifetime>();
        _ = builder.Services.Configure<HostOptions>(static host => host.ShutdownTimeout = EndOfRequests);
        _ = builder.Services.Configure<RouteHandlerOptions>(static handlers => handlers.ThrowOnBadRequest = true);
        _ = builder.Services.Configure<JsonOptions>(static json =>
        {
            JsonSerializerOptions api = ApiJson.Default.Options;
            json.SerializerOptions.TypeInfoResolverChain.Clear();
            json.SerializerOptions.TypeInfoResolverChain.Add(ApiJson.Default);
            json.SerializerOptions.NumberHandling = api.NumberHandling;
            json.SerializerOptions.DefaultIgnoreCondition = api.DefaultIgnoreCondition;
            json.SerializerOptions.UnmappedMemberHandling = api.UnmappedMemberHandling;
            json.SerializerOptions.RespectNullableAnnotations = api.RespectNullableAnnotations;
        });
        _ = builder.Services.AddOpenApi("v1", openApi => openApi.AddDocumentTransformer((document, _, _) =>
        {
            document.Info.Title = "XenSharp";
            document.Info.Version = options.Version;
            document.Info.Description = "Xen PV guests on KVM: the domain manager. Errors are problem details (RFC 9457).";
            document.Servers = [];
            return Task.CompletedTask;
        }));

        WebApplication application = builder.Build();
        var problems = new ProblemMiddleware(log);
        _ = application.Use(next => context => problems.InvokeAsync(context, next));
        _ = application.MapOpenApi(ApiRoutes.OpenApi);
        new HostEndpoints(toolstack, options).Map(application);
        new DomainEndpoints(toolstack, problems).Map(application);
        new DeviceEndpoints(toolstack).Map(application);
        return application;
    }

    /// <summary>Signals are the affair of the command that runs the daemon.</summary>
    private sealed class NoLifetime : IHostLifetime
    {
        public Task WaitForStartAsync(CancellationToken cancellationToken) => Task.CompletedTask;

        public Task StopAsync(CancellationToken cancellationToken) => Task.CompletedTask;
    }
}
