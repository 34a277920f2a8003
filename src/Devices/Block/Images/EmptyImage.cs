// A drive without a medium.
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// What is in an empty CD-ROM drive: no sector. A guest connects to such a drive as to any other and finds that it cannot read from it,
/// rather than waiting for minutes of its boot for a back end that never comes.
/// </summary>
public sealed class EmptyImage : IBlockImage
{
    private const uint Sector = 512;

    /// <inheritdoc/>
    public ulong Size => 0;

    /// <inheritdoc/>
    public uint SectorSize => Sector;

    /// <inheritdoc/>
    public uint PhysicalSectorSize => Sector;

    /// <inheritdoc/>
    public bool IsReadOnly => true;

    /// <inheritdoc/>
    public DiscardLimits? Discard => null;

    /// <summary>Nothing: libxl's node "params" has no name of a file for an empty drive, either.</summary>
    public string Description => string.Empty;

    /// <summary>Ends an operation with ENOMEDIUM; there is nothing that a flush would have to wait for.</summary>
    /// <param name="operation">The operation.</param>
    public void Submit(BlockOperation operation)
    {
        ArgumentNullException.ThrowIfNull(operation);
        operation.Complete(operation.Kind == BlockOperationKind.Flush ? 0 : LibC.ENOMEDIUM);
    }

    /// <inheritdoc/>
    public ValueTask DisposeAsync() => ValueTask.CompletedTask;
}
