// What is asked about domains' devices.

using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.HttpResults;
using Microsoft.AspNetCore.Routing;
using XenSharp.Api;
using XenSharp.Configuration.Devices;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon;

/// <summary>Serves <see cref="ApiRoutes.BlockDevices"/>, <see cref="ApiRoutes.NetworkDevices"/> and <see cref="ApiRoutes.Channels"/>.</summary>
/// <param name="toolstack">The domains.</param>
internal sealed class DeviceEndpoints(DomainToolstack toolstack)
{
    private const string Tag = "devices";

    internal void Map(IEndpointRouteBuilder routes)
    {
        _ = routes.MapGet(ApiRoutes.BlockDevices, (string domain) => TypedResults.Ok(toolstack.Find(domain).DescribeDisks())).WithTags(Tag)
            .WithSummary("A domain's block devices (xl block-list)");
        _ = routes.MapPost(ApiRoutes.BlockDevices, AttachDiskAsync).WithTags(Tag).WithSummary("Plugs a block device in (xl block-attach)");
        _ = routes.MapDelete(ApiRoutes.BlockDevice, DetachDiskAsync).WithTags(Tag).WithSummary("Unplugs a block device (xl block-detach)");
        _ = routes.MapGet(ApiRoutes.NetworkDevices, (string domain) => TypedResults.Ok(toolstack.Find(domain).DescribeInterfaces())).WithTags(Tag)
            .WithSummary("A domain's network interfaces (xl network-list)");
        _ = routes.MapPost(ApiRoutes.NetworkDevices, AttachInterfaceAsync).WithTags(Tag).WithSummary("Plugs a network interface in (xl network-attach)");
        _ = routes.MapDelete(ApiRoutes.NetworkDevice, DetachInterfaceAsync).WithTags(Tag).WithSummary("Unplugs a network interface (xl network-detach)");
        _ = routes.MapGet(ApiRoutes.Channels, (string domain) => TypedResults.Ok(toolstack.Find(domain).DescribeChannels())).WithTags(Tag)
            .WithSummary("A domain's channels (xl channel-list)");
    }

    private async Task<Created<BlockDeviceInfo>> AttachDiskAsync(string domain, AttachDeviceRequest request, CancellationToken cancellation)
    {
        ManagedDomain found = toolstack.Find(domain);
        DiskConfiguration disk = Parse(request.Specification, static (parts, warnings) => DiskSpecification.Parse(parts, warnings), out List<string> warnings);
        if (request.Folder is { } folder && warnings.Exists(warning => warning.Contains(disk.Target, StringComparison.Ordinal)))
            disk = Relative(disk, folder);
        BlockDeviceInfo attached = await found.AttachAsync(disk, cancellation).ConfigureAwait(false);
        return TypedResults.Created(ApiRoutes.Of(ApiRoutes.BlockDevice, found.Uuid.ToString("D"), attached.Name), attached);
    }

    private async Task<NoContent> DetachDiskAsync(string domain, string device, CancellationToken cancellation, bool force = false)
    {
        await toolstack.Find(domain).DetachDiskAsync(device, force, cancellation).ConfigureAwait(false);
        return TypedResults.NoContent();
    }

    private async Task<Created<NetworkDeviceInfo>> AttachInterfaceAsync(string domain, AttachDeviceRequest request, CancellationToken cancellation)
    {
        ManagedDomain found = toolstack.Find(domain);
        VifConfiguration vif = Parse(request.Specification, static (parts, warnings) => VifSpecification.Parse(parts, warnings), out _);
        NetworkDeviceInfo attached = await found.AttachAsync(vif, cancellation).ConfigureAwait(false);
        return TypedResults.Created(ApiRoutes.Of(ApiRoutes.NetworkDevice, found.Uuid.ToString("D"), attached.Mac), attached);
    }

    private async Task<NoContent> DetachInterfaceAsync(string domain, string device, CancellationToken cancellation, bool force = false)
    {
        await toolstack.Find(domain).DetachInterfaceAsync(device, force, cancellation).ConfigureAwait(false);
        return TypedResults.NoContent();
    }

    /// <summary>A name without a slash in front is a device's, as with xl; but where there is none, and such a file is in the folder, it is the file's.</summary>
    private static DiskConfiguration Relative(DiskConfiguration disk, string folder)
    {
        const string devices = "/dev/";
        if (!Path.IsPathRooted(folder))
            throw new ToolstackException(ProblemKind.BadRequest, $"The folder \"{folder}\" that paths start from has to be an absolute path itself.");
        if (!disk.Target.StartsWith(devices, StringComparison.Ordinal) || Path.Exists(disk.Target))
            return disk;
        string file = Path.GetFullPath(disk.Target[devices.Length..], folder);
        return File.Exists(file) ? disk with { Target = file } : disk;
    }

    private static T Parse<T>(IReadOnlyList<string> parts, Func<IReadOnlyList<string>, List<string>, T> parse, out List<string> warnings)
    {
        warnings = [];
        try
        {
            return parse(parts, warnings);
        }
        catch (FormatException failure)
        {
            throw new ToolstackException(ProblemKind.BadRequest, failure.Message, failure);
        }
    }
}
