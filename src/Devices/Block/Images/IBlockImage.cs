// What stands behind a virtual disk: something with sectors that can be read and written.
namespace XenSharp.Devices.Block.Images;

/// <summary>An image that a block back end serves. Any thread may submit; operations run at the same time and end in any order.</summary>
/// <remarks>Disposing it waits for what is under way; nothing may be submitted any more then.</remarks>
public interface IBlockImage : IAsyncDisposable
{
    /// <summary>Bytes, a multiple of <see cref="SectorSize"/>.</summary>
    ulong Size { get; }

    /// <summary>The smallest unit that can be read and written, in bytes: a power of two from 512 to 4096.</summary>
    uint SectorSize { get; }

    /// <summary>The unit that is written without reading around it, in bytes; a multiple of <see cref="SectorSize"/>.</summary>
    uint PhysicalSectorSize { get; }

    /// <summary>Whether writes and discards come to EROFS.</summary>
    bool IsReadOnly { get; }

    /// <summary>Whether discards give room back, and in which units; null where they cannot be made.</summary>
    DiscardLimits? Discard { get; }

    /// <summary>What it is, for people: a file's name.</summary>
    string Description { get; }

    /// <summary>Why every operation fails from here on, and what to do, for people; null while that is not so.</summary>
    string? Failure => null;

    /// <summary>Whether operations that are started together are done with less than one after the other: a few more are worth a short wait.</summary>
    bool PrefersTogether => false;

    /// <summary>
    /// Starts an operation. <see cref="BlockOperation.Complete(int)"/> is called for it exactly once, by any thread, possibly before this
    /// returns. Errors come by that way, nothing is thrown.
    /// </summary>
    /// <param name="operation">The operation, with an offset and length within <see cref="Size"/>; it and the memory it names belong to
    /// the image until it is complete.</param>
    void Submit(BlockOperation operation);

    /// <summary>Starts operations that have come together, each as <see cref="Submit(BlockOperation)"/> does.</summary>
    /// <param name="operations">The operations, in the order in which they came.</param>
    void Submit(ReadOnlySpan<BlockOperation> operations)
    {
        foreach (BlockOperation operation in operations)
            Submit(operation);
    }
}

/// <summary>Where discards can give room back.</summary>
/// <param name="Granularity">Bytes of a unit that can be given back by itself.</param>
/// <param name="Alignment">Byte where the first such unit begins.</param>
public readonly record struct DiscardLimits(uint Granularity, uint Alignment);

/// <summary>What an operation does.</summary>
public enum BlockOperationKind
{
    Read,
    Write,

    /// <summary>All writes that have completed before it was submitted are on the disk once it completes.</summary>
    Flush,

    /// <summary>The contents are no longer needed; they may read as anything, mostly zeroes.</summary>
    Discard,
}

/// <summary>A piece of memory, as readv and writev take it (struct iovec).</summary>
public unsafe struct IoVector
{
    public byte* Base;
    public nuint Length;
}

/// <summary>One operation on an image; whoever derives from it gets to know the end.</summary>
public abstract unsafe class BlockOperation
{
    /// <summary>What is done.</summary>
    public BlockOperationKind Kind { get; set; }

    /// <summary>First byte.</summary>
    public ulong Offset { get; set; }

    /// <summary>Bytes: for reads and writes the sum of the vectors' lengths, for discards how much; 0 for a flush.</summary>
    public ulong Length { get; set; }

    /// <summary>The memory of reads and writes. An image may change the vectors while it works.</summary>
    public IoVector* Vectors { get; protected set; }

    /// <summary>How many vectors, at most <see cref="MaxVectors"/>.</summary>
    public int VectorCount { get; protected set; }

    /// <summary>UIO_MAXIOV of Linux.</summary>
    public const int MaxVectors = 1024;

    /// <summary>The next one in a queue of the image's.</summary>
    internal BlockOperation? Next { get; set; }

    /// <summary>Bytes that are done, where an image does an operation piece by piece.</summary>
    internal ulong Done { get; set; }

    /// <summary>The operation has ended.</summary>
    /// <param name="error">0, or Linux's errno: how it failed.</param>
    public abstract void Complete(int error);

    /// <summary>The operation has ended as one of several that are completed one after the other.</summary>
    /// <param name="error">As in <see cref="Complete(int)"/>.</param>
    /// <param name="batch">All of these, which end soon.</param>
    internal virtual void Complete(int error, CompletionBatch batch) => Complete(error);
}
