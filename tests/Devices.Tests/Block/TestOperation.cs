// An operation on an image, as a test submits it.
using System.Runtime.InteropServices;
using XenSharp.Devices.Block.Images;

namespace XenSharp.Devices.Tests.Block;

/// <summary>Memory in several pieces, and the end as a task.</summary>
internal sealed unsafe class TestOperation : BlockOperation, IDisposable
{
    private const int PageSize = 4096;

    private readonly TaskCompletionSource<int> _end = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly byte* _memory;
    private readonly int _length;
    private int _completions;

    private TestOperation(BlockOperationKind kind, ulong offset, int length, int pieces)
    {
        (Kind, Offset, Length, _length) = (kind, offset, (ulong)length, length);
        _memory = (byte*)NativeMemory.AlignedAlloc((nuint)Math.Max(length, 1), PageSize);
        Memory.Clear();
        Vectors = (IoVector*)NativeMemory.Alloc((nuint)(pieces * sizeof(IoVector)));
        VectorCount = pieces;
        _vectors = Vectors;
        for (int i = 0, at = 0; i < pieces; i++)
        {
            int end = (int)((long)length * (i + 1) / pieces);
            Vectors[i] = new IoVector { Base = _memory + at, Length = (nuint)(end - at) };
            at = end;
        }
    }

    private readonly IoVector* _vectors;

    /// <summary>What it came to: 0 or errno.</summary>
    public Task<int> End => _end.Task;

    public Span<byte> Memory => new(_memory, _length);

    public static int Read(IBlockImage image, ulong offset, Span<byte> destination, int pieces = 1)
    {
        using var operation = new TestOperation(BlockOperationKind.Read, offset, destination.Length, pieces);
        int error = operation.Run(image);
        operation.Memory.CopyTo(destination);
        return error;
    }

    public static int Write(IBlockImage image, ulong offset, ReadOnlySpan<byte> source, int pieces = 1)
    {
        using TestOperation operation = Writing(offset, source, pieces);
        return operation.Run(image);
    }

    public static TestOperation Writing(ulong offset, ReadOnlySpan<byte> source, int pieces = 1)
    {
        var operation = new TestOperation(BlockOperationKind.Write, offset, source.Length, pieces);
        source.CopyTo(operation.Memory);
        return operation;
    }

    public static TestOperation Reading(ulong offset, int length, int pieces = 1) => new(BlockOperationKind.Read, offset, length, pieces);

    public static int Flush(IBlockImage image)
    {
        using var operation = new TestOperation(BlockOperationKind.Flush, 0, 0, 0);
        return operation.Run(image);
    }

    public static int Discard(IBlockImage image, ulong offset, ulong length)
    {
        using var operation = new TestOperation(BlockOperationKind.Discard, offset, 0, 0) { Length = length };
        return operation.Run(image);
    }

    public int Run(IBlockImage image)
    {
        image.Submit(this);
        Assert.That(End.Wait(TimeSpan.FromSeconds(20)), Is.True, "the operation ends");
        return End.Result;
    }

    public override void Complete(int error)
    {
        Assert.That(Interlocked.Increment(ref _completions), Is.EqualTo(1));
        _end.SetResult(error);
    }

    public void Dispose()
    {
        NativeMemory.AlignedFree(_memory);
        NativeMemory.Free(_vectors);
    }
}
