// What is asked about domains.

using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.Features;
using Microsoft.AspNetCore.Http.HttpResults;
using Microsoft.AspNetCore.Routing;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Devices.Console;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon;

/// <summary>Serves <see cref="ApiRoutes.Domains"/> and most of what is below.</summary>
/// <param name="toolstack">The domains.</param>
/// <param name="problems">Knows what exceptions stand for.</param>
internal sealed class DomainEndpoints(DomainToolstack toolstack, ProblemMiddleware problems)
{
    private const string Tag = "domains";

    internal void Map(IEndpointRouteBuilder routes)
    {
        _ = routes.MapGet(ApiRoutes.Domains, List).WithTags(Tag).WithSummary("All domains, by number (xl list)");
        _ = routes.MapPost(ApiRoutes.Domains, CreateAsync).WithTags(Tag).WithSummary("Makes a domain (xl create)");
        _ = routes.MapGet(ApiRoutes.Domain, (string domain) => TypedResults.Ok(toolstack.Find(domain).Describe())).WithTags(Tag).WithSummary("One domain");
        _ = routes.MapDelete(ApiRoutes.Domain, DestroyAsync).WithTags(Tag).WithSummary("Ends a domain at once (xl destroy)");
        _ = routes.MapPost(ApiRoutes.Shutdown, Shutdown).WithTags(Tag).WithSummary("Asks the guest to power off (xl shutdown)");
        _ = routes.MapPost(ApiRoutes.Reboot, Reboot).WithTags(Tag).WithSummary("Asks the guest to reboot (xl reboot)");
        _ = routes.MapPost(ApiRoutes.Pause, Pause).WithTags(Tag).WithSummary("Stops all its vCPUs (xl pause)");
        _ = routes.MapPost(ApiRoutes.Unpause, Unpause).WithTags(Tag).WithSummary("Takes a pause back (xl unpause)");
        _ = routes.MapPost(ApiRoutes.Rename, Rename).WithTags(Tag).WithSummary("Gives it another name (xl rename)");
        _ = routes.MapGet(ApiRoutes.Vcpus, (string domain) => TypedResults.Ok(toolstack.Find(domain).DescribeVcpus())).WithTags(Tag)
            .WithSummary("Its vCPUs (xl vcpu-list)");
        _ = routes.MapPut(ApiRoutes.Vcpus, SetVcpus).WithTags(Tag).WithSummary("Brings vCPUs up or down (xl vcpu-set)");
        _ = routes.MapPut(ApiRoutes.VcpuProcessors, PinVcpus).WithTags(Tag).WithSummary("Says which of the host's processors they may run on (xl vcpu-pin)");
        _ = routes.MapPut(ApiRoutes.MemoryTarget, SetMemoryTarget).WithTags(Tag).WithSummary("What its balloon is to leave it (xl mem-set)");
        _ = routes.MapPut(ApiRoutes.MemoryMaximum, SetMemoryMaximum).WithTags(Tag).WithSummary("What it may have at most (xl mem-max)");
        _ = routes.MapPost(ApiRoutes.Sysrq, SendSysrq).WithTags(Tag).WithSummary("A magic system request to its kernel (xl sysrq)");
        _ = routes.MapPost(ApiRoutes.Trigger, Trigger).WithTags(Tag).WithSummary("An NMI (xl trigger)");
        _ = routes.MapGet(ApiRoutes.Configuration, (string domain) => TypedResults.Ok(ConfigurationReading.Write(toolstack.Find(domain).Configuration)))
            .WithTags(Tag).WithSummary("What its next incarnation is made from");
        _ = routes.MapPut(ApiRoutes.Configuration, SetConfiguration).WithTags(Tag).WithSummary("Sets that (xl config-update)");
        _ = routes.MapGet(ApiRoutes.Console, AttachConsoleAsync).WithTags(Tag)
            .WithSummary("With Connection: Upgrade, and Upgrade: xensharp-console: the connection becomes the console (xl console)");
        _ = routes.MapGet(ApiRoutes.ConsoleHistory, ReadHistory).WithTags(Tag).WithSummary("What the guest has printed, as far as it is kept");
        _ = routes.MapPost(ApiRoutes.Save, SaveAsync).WithTags(Tag).WithSummary("Saves it to a file (xl save); progress, a JSON object a line");
        _ = routes.MapPost(ApiRoutes.DumpCore, DumpCoreAsync).WithTags(Tag).WithSummary("Writes its core to a file (xl dump-core); progress, a JSON object a line");
        _ = routes.MapPost(ApiRoutes.Restore, RestoreAsync).WithTags(Tag).WithSummary("Makes a domain from a file (xl restore); progress, a JSON object a line");
    }

    private Ok<IReadOnlyList<DomainInfo>> List()
    {
        var list = new List<DomainInfo>();
        foreach (ManagedDomain domain in toolstack.Domains)
        {
            try
            {
                list.Add(domain.Describe());
            }
            catch (ToolstackException gone) when (gone.Kind == ProblemKind.NoSuchDomain)
            {
                // It went while the others were asked.
            }
        }

        return TypedResults.Ok<IReadOnlyList<DomainInfo>>(list);
    }

    private async Task<Results<Created<CreateDomainResult>, Ok<CreateDomainResult>>> CreateAsync(CreateDomainRequest request, CancellationToken cancellation)
    {
        DomainConfigurationResult read = ConfigurationReading.Read(request.Configuration);
        IReadOnlyList<string> unused = request.DryRun
            ? await toolstack.CheckAsync(read.Configuration).ConfigureAwait(false) : DomainToolstack.Ineffective(read.Configuration);
        var result = new CreateDomainResult
        {
            Warnings = [.. read.Warnings.Select(static warning => warning.ToString()), .. unused],
            Configuration = ConfigurationReading.Write(read.Configuration),
        };
        if (request.DryRun)
            return TypedResults.Ok(result);
        ManagedDomain domain = await toolstack
            .CreateAsync(read.Configuration with { Uuid = read.Configuration.Uuid ?? request.Uuid }, request.Paused, cancellation).ConfigureAwait(false);
        await KeepForAsync(domain, cancellation).ConfigureAwait(false);
        return TypedResults.Created(
            ApiRoutes.Of(ApiRoutes.Domain, domain.Uuid.ToString("D")),
            result with { Domain = domain.Describe(), Configuration = ConfigurationReading.Write(domain.Configuration) });
    }

    private async Task<NoContent> DestroyAsync(string domain)
    {
        // Who gave up making one asks for its end by its UUID, and is to find the name free afterwards.
        await toolstack.WaitForMakingAsync(domain).ConfigureAwait(false);

        // Begun, it goes on whether somebody waits for it or not.
        await toolstack.DestroyAsync(toolstack.Find(domain)).ConfigureAwait(false);
        return TypedResults.NoContent();
    }

    private Accepted Shutdown(string domain) => RequestShutdown(domain, reboot: false);

    private Accepted Reboot(string domain) => RequestShutdown(domain, reboot: true);

    private Accepted RequestShutdown(string domain, bool reboot)
    {
        toolstack.Find(domain).RequestShutdown(reboot);
        return TypedResults.Accepted((string?)null);
    }

    private NoContent Pause(string domain)
    {
        toolstack.Find(domain).Pause();
        return TypedResults.NoContent();
    }

    private NoContent Unpause(string domain)
    {
        toolstack.Find(domain).Unpause();
        return TypedResults.NoContent();
    }

    private Ok<DomainInfo> Rename(string domain, RenameRequest request)
    {
        ManagedDomain found = toolstack.Find(domain);
        toolstack.Rename(found, request.Name);
        return TypedResults.Ok(found.Describe());
    }

    private Accepted SetVcpus(string domain, SetVcpusRequest request)
    {
        toolstack.Find(domain).SetVcpus(request.Online);
        return TypedResults.Accepted((string?)null);
    }

    private NoContent PinVcpus(string domain, PinVcpusRequest request)
    {
        toolstack.Find(domain).SetProcessors(request.Vcpu, request.Processors);
        return TypedResults.NoContent();
    }

    private Accepted SetMemoryTarget(string domain, SetMemoryRequest request)
    {
        toolstack.Find(domain).SetMemoryTarget(request.MemoryKiB);
        return TypedResults.Accepted((string?)null);
    }

    private NoContent SetMemoryMaximum(string domain, SetMemoryRequest request)
    {
        toolstack.Find(domain).SetMemoryMaximum(request.MemoryKiB);
        return TypedResults.NoContent();
    }

    private Accepted SendSysrq(string domain, SysrqRequest request)
    {
        toolstack.Find(domain).SendSysrq(request.Key);
        return TypedResults.Accepted((string?)null);
    }

    private NoContent Trigger(string domain, TriggerRequest request)
    {
        toolstack.Find(domain).Trigger(request.Trigger, request.Vcpu);
        return TypedResults.NoContent();
    }

    private NoContent SetConfiguration(string domain, DomainConfigurationDocument configuration)
    {
        ManagedDomain found = toolstack.Find(domain);
        found.SetConfiguration(ConfigurationReading.Read(configuration).Configuration);
        return TypedResults.NoContent();
    }

    private async Task AttachConsoleAsync(HttpContext context, string domain, bool history = true, int channel = 0)
    {
        ConsoleHub console = ConsoleOf(domain, channel);
        if (context.Features.Get<IHttpUpgradeFeature>() is not { IsUpgradableRequest: true } upgrade
            || !context.Request.Headers.Upgrade.ToString().Equals(ApiRoutes.ConsoleProtocol, StringComparison.OrdinalIgnoreCase))
        {
            throw new ToolstackException(
                ProblemKind.BadRequest, $"A console is a stream of bytes both ways: ask for it with \"Connection: Upgrade\" and \"Upgrade: {ApiRoutes.ConsoleProtocol}\".");
        }

        context.Response.Headers.Upgrade = ApiRoutes.ConsoleProtocol;
        await using Stream stream = await upgrade.UpgradeAsync().ConfigureAwait(false);
        await ConsoleStreamBridge.RunAsync(console, stream, history ? int.MaxValue : 0, context.RequestAborted).ConfigureAwait(false);
    }

    private FileContentHttpResult ReadHistory(string domain, int channel = 0)
        => TypedResults.Bytes(ConsoleOf(domain, channel).ReadHistory(), "application/octet-stream");

    private ConsoleHub ConsoleOf(string domain, int channel)
    {
        ManagedDomain found = toolstack.Find(domain);
        if (channel == 0)
            return found.Console;
        throw new ToolstackException(
            ProblemKind.NoSuchDevice,
            found.FindChannel(channel) is { } place
                ? $"Channel {channel} of {found.Name} is there for a program of the host's, at {place}: connect to that."
                : $"The domain {found.Name} has no channel {channel}.");
    }

    private Task SaveAsync(HttpContext context, string domain, SaveDomainRequest request)
    {
        ManagedDomain found = toolstack.Find(domain);
        DomainConfiguration? configuration = request.Configuration is { } document ? ConfigurationReading.Read(document).Configuration : null;
        return LineStream.OperateAsync(context, "Saving", problems.Describe, async (progress, cancellation) =>
        {
            await toolstack.SaveAsync(found, request.Path, request.Checkpoint, request.LeavePaused, configuration, progress, cancellation).ConfigureAwait(false);
            return null;
        });
    }

    private Task DumpCoreAsync(HttpContext context, string domain, DumpCoreRequest request)
    {
        ManagedDomain found = toolstack.Find(domain);
        return LineStream.OperateAsync(context, "Dumping", problems.Describe, async (progress, cancellation) =>
        {
            await found.DumpCoreAsync(request.Path, progress, cancellation).ConfigureAwait(false);
            return null;
        });
    }

    private Task RestoreAsync(HttpContext context, RestoreDomainRequest request)
    {
        DomainConfiguration? configuration = request.Configuration is { } document ? ConfigurationReading.Read(document).Configuration : null;
        return LineStream.OperateAsync(context, "Restoring", problems.Describe, async (progress, cancellation)
            =>
        {
            ManagedDomain domain = await toolstack.RestoreAsync(request.Path, configuration, request.Paused, progress, cancellation).ConfigureAwait(false);
            await KeepForAsync(domain, cancellation).ConfigureAwait(false);
            return domain.Describe();
        });
    }

    /// <summary>A domain that was made in the same moment in which who asked for it gave up goes again.</summary>
    private async Task KeepForAsync(ManagedDomain domain, CancellationToken cancellation)
    {
        if (!cancellation.IsCancellationRequested)
            return;
        await toolstack.DestroyAsync(domain).ConfigureAwait(false);
        throw new OperationCanceledException(cancellation);
    }
}
