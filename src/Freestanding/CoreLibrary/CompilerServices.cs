// What the C# compiler emits calls to, and the accesses that have no syntax.
namespace System.Runtime.CompilerServices;

/// <summary>What the language may count on: the C# compiler looks for these names.</summary>
public static class RuntimeFeature
{
    public const string ByRefFields = nameof(ByRefFields);
    public const string InlineArrayTypes = nameof(InlineArrayTypes);
    public const string NumericIntPtr = nameof(NumericIntPtr);
    public const string UnmanagedSignatureCallingConvention = nameof(UnmanagedSignatureCallingConvention);
    public const string VirtualStaticsInInterfaces = nameof(VirtualStaticsInInterfaces);
}

public static class RuntimeHelpers
{
    /// <summary>Bytes before a string's first character.</summary>
    public static unsafe int OffsetToStringData => sizeof(nint) + sizeof(int);
}

/// <summary>Reinterpretation and arithmetic of references: the compiler puts the instructions in place of each call.</summary>
public static unsafe class Unsafe
{
    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern ref TTo As<TFrom, TTo>(ref TFrom source);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern void* AsPointer<T>(ref readonly T value);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern ref T AsRef<T>(scoped ref readonly T source);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern ref T Add<T>(ref T source, int elements);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern ref T Add<T>(ref T source, nint elements);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern ref T AddByteOffset<T>(ref T source, nuint bytes);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern int SizeOf<T>();

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern void SkipInit<T>(out T value);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern void CopyBlock(void* destination, void* source, uint bytes);

    [Intrinsic]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern void CopyBlockUnaligned(void* destination, void* source, uint bytes);
}
