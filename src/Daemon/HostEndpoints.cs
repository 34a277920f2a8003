// What is asked about the machine and the daemon.

using System.Runtime.InteropServices;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.HttpResults;
using Microsoft.AspNetCore.Routing;
using XenSharp.Api;
using XenSharp.Kvm;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon;

/// <summary>Serves <see cref="ApiRoutes.Host"/>, the log, events, and lost domains.</summary>
/// <param name="toolstack">The domains.</param>
/// <param name="options">What the daemon was started with.</param>
internal sealed class HostEndpoints(DomainToolstack toolstack, DaemonOptions options)
{
    private const string Tag = "host";
    private static readonly DateTimeOffset s_startTime = DateTimeOffset.UtcNow;

    internal void Map(IEndpointRouteBuilder routes)
    {
        _ = routes.MapGet(ApiRoutes.Host, Describe).WithTags(Tag).WithSummary("The machine and the daemon");
        _ = routes.MapGet(ApiRoutes.Log, () => TypedResults.Text(toolstack.Log.Text)).WithTags(Tag).WithSummary("The manager's log (xl dmesg)");
        _ = routes.MapDelete(ApiRoutes.Log, ClearLog).WithTags(Tag).WithSummary("Empties the manager's log");
        _ = routes.MapGet(ApiRoutes.Events, FollowEvents).WithTags(Tag).WithSummary("What happens to domains from now on, a JSON object a line");
        _ = routes.MapGet(ApiRoutes.Lost, () => TypedResults.Ok(toolstack.ListLost())).WithTags(Tag)
            .WithSummary("Domains that ran when an earlier daemon ended without taking them down");
        _ = routes.MapDelete(ApiRoutes.LostRecord, Forget).WithTags(Tag).WithSummary("Forgets one of those");
    }

    private Ok<HostInfo> Describe()
    {
        KvmHost host = toolstack.Context.Host;
        string? problem = null;
        try
        {
            _ = host.Capabilities;
        }
        catch (KvmException failure)
        {
            problem = failure.Message;
        }

        return TypedResults.Ok(new HostInfo
        {
            Host = Environment.MachineName,
            Release = HostMachine.KernelRelease,
            Machine = RuntimeInformation.ProcessArchitecture == Architecture.X64 ? "x86_64" : RuntimeInformation.ProcessArchitecture.ToString(),
            Processors = Environment.ProcessorCount,
            TotalMemoryMiB = HostMachine.MemoryMiB,
            FreeMemoryMiB = HostMachine.AvailableMemoryMiB,
            Version = options.Version,
            XenVersion = "4.17",
            KvmDevice = host.Device,
            KvmProblem = problem,
            Domains = toolstack.Domains.Count,
            StartTime = s_startTime,
            ProcessId = Environment.ProcessId,
            StateFolder = toolstack.StateFolder,
            XenstoreSocket = options.XenstoreSocket,
        });
    }

    private NoContent ClearLog()
    {
        toolstack.Log.Clear();
        return TypedResults.NoContent();
    }

    // The second parameter makes it a handler that is described; with the context alone it would not be.
    private Task FollowEvents(HttpContext context, CancellationToken cancellation)
        => LineStream.WriteAsync(context, toolstack.Events.FollowAsync(cancellation), ApiJson.Default.DomainEvent);

    private NoContent Forget(Guid uuid)
    {
        toolstack.ForgetLost(uuid);
        return TypedResults.NoContent();
    }
}
