// Atomic operations and ordered accesses. The compiler turns what is marked intrinsic into the instruction itself.
using System.Runtime.CompilerServices;

namespace System.Threading;

/// <summary>
/// Locked instructions, each a full barrier. The methods that seem to call themselves are where the compiler has to know the
/// instruction (<c>lock cmpxchg</c>, <c>xchg</c>, <c>lock xadd</c>); it refuses to compile them as calls.
/// </summary>
public static class Interlocked
{
    /// <summary>Stores a value where the comparand stands.</summary>
    /// <returns>What stood there.</returns>
    [Intrinsic]
    public static int CompareExchange(ref int location, int value, int comparand) => CompareExchange(ref location, value, comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [Intrinsic]
    public static long CompareExchange(ref long location, long value, long comparand) => CompareExchange(ref location, value, comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [Intrinsic]
    public static byte CompareExchange(ref byte location, byte value, byte comparand) => CompareExchange(ref location, value, comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [Intrinsic]
    public static ushort CompareExchange(ref ushort location, ushort value, ushort comparand)
        => CompareExchange(ref location, value, comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static short CompareExchange(ref short location, short value, short comparand)
        => (short)CompareExchange(ref Unsafe.As<short, ushort>(ref location), (ushort)value, (ushort)comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint CompareExchange(ref uint location, uint value, uint comparand)
        => (uint)CompareExchange(ref Unsafe.As<uint, int>(ref location), (int)value, (int)comparand);

    /// <inheritdoc cref="CompareExchange(ref int, int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong CompareExchange(ref ulong location, ulong value, ulong comparand)
        => (ulong)CompareExchange(ref Unsafe.As<ulong, long>(ref location), (long)value, (long)comparand);

    /// <summary>Stores a value.</summary>
    /// <returns>What stood there.</returns>
    [Intrinsic]
    public static int Exchange(ref int location, int value) => Exchange(ref location, value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [Intrinsic]
    public static long Exchange(ref long location, long value) => Exchange(ref location, value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [Intrinsic]
    public static byte Exchange(ref byte location, byte value) => Exchange(ref location, value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [Intrinsic]
    public static ushort Exchange(ref ushort location, ushort value) => Exchange(ref location, value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static short Exchange(ref short location, short value)
        => (short)Exchange(ref Unsafe.As<short, ushort>(ref location), (ushort)value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Exchange(ref uint location, uint value) => (uint)Exchange(ref Unsafe.As<uint, int>(ref location), (int)value);

    /// <inheritdoc cref="Exchange(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Exchange(ref ulong location, ulong value) => (ulong)Exchange(ref Unsafe.As<ulong, long>(ref location), (long)value);

    /// <summary>Adds.</summary>
    /// <returns>The sum.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static int Add(ref int location, int value) => ExchangeAdd(ref location, value) + value;

    /// <inheritdoc cref="Add(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static long Add(ref long location, long value) => ExchangeAdd(ref location, value) + value;

    /// <inheritdoc cref="Add(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Add(ref uint location, uint value) => (uint)Add(ref Unsafe.As<uint, int>(ref location), (int)value);

    /// <inheritdoc cref="Add(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Add(ref ulong location, ulong value) => (ulong)Add(ref Unsafe.As<ulong, long>(ref location), (long)value);

    /// <summary>Adds 1.</summary>
    /// <returns>The sum.</returns>
    public static int Increment(ref int location) => Add(ref location, 1);

    /// <inheritdoc cref="Increment(ref int)"/>
    public static long Increment(ref long location) => Add(ref location, 1);

    /// <inheritdoc cref="Increment(ref int)"/>
    public static uint Increment(ref uint location) => Add(ref location, 1);

    /// <inheritdoc cref="Increment(ref int)"/>
    public static ulong Increment(ref ulong location) => Add(ref location, 1);

    /// <summary>Subtracts 1.</summary>
    /// <returns>The difference.</returns>
    public static int Decrement(ref int location) => Add(ref location, -1);

    /// <inheritdoc cref="Decrement(ref int)"/>
    public static long Decrement(ref long location) => Add(ref location, -1);

    /// <inheritdoc cref="Decrement(ref int)"/>
    public static uint Decrement(ref uint location) => (uint)Add(ref Unsafe.As<uint, int>(ref location), -1);

    /// <inheritdoc cref="Decrement(ref int)"/>
    public static ulong Decrement(ref ulong location) => (ulong)Add(ref Unsafe.As<ulong, long>(ref location), -1);

    /// <summary>Sets the bits of a value: one <c>lock or</c> where the result is not looked at.</summary>
    /// <returns>What stood there.</returns>
    [Intrinsic]
    public static int Or(ref int location, int value)
    {
        int current = Volatile.Read(ref location);
        while (true)
        {
            int found = CompareExchange(ref location, current | value, current);
            if (found == current)
                return found;
            current = found;
        }
    }

    /// <inheritdoc cref="Or(ref int, int)"/>
    [Intrinsic]
    public static long Or(ref long location, long value)
    {
        long current = Volatile.Read(ref location);
        while (true)
        {
            long found = CompareExchange(ref location, current | value, current);
            if (found == current)
                return found;
            current = found;
        }
    }

    /// <inheritdoc cref="Or(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Or(ref uint location, uint value) => (uint)Or(ref Unsafe.As<uint, int>(ref location), (int)value);

    /// <inheritdoc cref="Or(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Or(ref ulong location, ulong value) => (ulong)Or(ref Unsafe.As<ulong, long>(ref location), (long)value);

    /// <summary>Keeps only the bits of a value: one <c>lock and</c> where the result is not looked at.</summary>
    /// <returns>What stood there.</returns>
    [Intrinsic]
    public static int And(ref int location, int value)
    {
        int current = Volatile.Read(ref location);
        while (true)
        {
            int found = CompareExchange(ref location, current & value, current);
            if (found == current)
                return found;
            current = found;
        }
    }

    /// <inheritdoc cref="And(ref int, int)"/>
    [Intrinsic]
    public static long And(ref long location, long value)
    {
        long current = Volatile.Read(ref location);
        while (true)
        {
            long found = CompareExchange(ref location, current & value, current);
            if (found == current)
                return found;
            current = found;
        }
    }

    /// <inheritdoc cref="And(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint And(ref uint location, uint value) => (uint)And(ref Unsafe.As<uint, int>(ref location), (int)value);

    /// <inheritdoc cref="And(ref int, int)"/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong And(ref ulong location, ulong value) => (ulong)And(ref Unsafe.As<ulong, long>(ref location), (long)value);

    /// <summary>No access moves across it.</summary>
    [Intrinsic]
    public static void MemoryBarrier() => MemoryBarrier();

    [Intrinsic]
    private static int ExchangeAdd(ref int location, int value) => ExchangeAdd(ref location, value);

    [Intrinsic]
    private static long ExchangeAdd(ref long location, long value) => ExchangeAdd(ref location, value);
}


/// <summary>What a thread does while it waits for another. There is one thread a processor, and none that could run in its place.</summary>
public static class Thread
{
    /// <summary>Lets the other hardware thread of the core go first, so many times.</summary>
    public static void SpinWait(int iterations)
    {
        for (int i = 0; i < iterations; i++)
            Runtime.Intrinsics.X86.X86Base.Pause();
    }

    /// <summary>Offers the processor to another thread.</summary>
    /// <returns>False: there is none.</returns>
    public static bool Yield() => false;
}
