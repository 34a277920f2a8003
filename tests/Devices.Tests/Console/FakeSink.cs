// Sinks that wait, take little, or close, as a test wants it.

using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

/// <summary>Calls a function for each write.</summary>
internal sealed class FakeSink(FakeSink.WriteCall write) : IConsoleSink
{
    internal delegate int WriteCall(ReadOnlySpan<byte> bytes, CancellationToken cancellation);

    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation) => write(bytes, cancellation);
}

/// <summary>Takes as many bytes as it has been allowed to, and waits for the next allowance.</summary>
internal sealed class MeteredSink : IConsoleSink
{
    private readonly SemaphoreSlim _allowance = new(0);
    private readonly MemoryStream _taken = new();

    internal byte[] Taken
    {
        get
        {
            lock (_taken)
                return _taken.ToArray();
        }
    }

    internal void Allow(int bytes) => _allowance.Release(bytes);

    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        _allowance.Wait(cancellation);
        int count = 1;
        while (count < bytes.Length && _allowance.Wait(0, CancellationToken.None))
            count++;
        lock (_taken)
            _taken.Write(bytes[..count]);
        return count;
    }
}
