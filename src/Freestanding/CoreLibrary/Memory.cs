// Spans, and what copies and clears memory.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace System
{
    /// <summary>Consecutive values.</summary>
    public readonly ref struct Span<T>
    {
        private readonly ref T _reference;
        private readonly int _length;

        /// <summary>Values at an address.</summary>
        /// <param name="pointer">The first.</param>
        /// <param name="length">Their number, not negative: else it traps.</param>
        public unsafe Span(void* pointer, int length)
        {
            if (length < 0)
                Trap.Take();
            _reference = ref Unsafe.As<byte, T>(ref *(byte*)pointer);
            _length = length;
        }

        internal Span(ref T reference, int length)
        {
            _reference = ref reference;
            _length = length;
        }

        public int Length => _length;

        /// <summary>A value; an index outside traps.</summary>
        public ref T this[int index]
        {
            get
            {
                if ((uint)index >= (uint)_length)
                    Trap.Take();
                return ref Unsafe.Add(ref _reference, index);
            }
        }

        public static implicit operator ReadOnlySpan<T>(Span<T> span) => new(ref span._reference, span._length);
    }

    /// <summary>Consecutive values that are not changed.</summary>
    public readonly ref struct ReadOnlySpan<T>
    {
        private readonly ref T _reference;
        private readonly int _length;

        /// <inheritdoc cref="Span{T}(void*, int)"/>
        public unsafe ReadOnlySpan(void* pointer, int length)
        {
            if (length < 0)
                Trap.Take();
            _reference = ref Unsafe.As<byte, T>(ref *(byte*)pointer);
            _length = length;
        }

        internal ReadOnlySpan(ref T reference, int length)
        {
            _reference = ref reference;
            _length = length;
        }

        public int Length => _length;

        /// <inheritdoc cref="Span{T}.this[int]"/>
        public ref readonly T this[int index]
        {
            get
            {
                if ((uint)index >= (uint)_length)
                    Trap.Take();
                return ref Unsafe.Add(ref _reference, index);
            }
        }
    }

    /// <summary>What the compiler calls for block copies and fills that it does not unroll.</summary>
    internal static unsafe class SpanHelpers
    {
        /// <summary>Copies; the ranges may overlap.</summary>
        internal static void Memmove(ref byte destination, ref byte source, nuint length)
        {
            fixed (byte* to = &destination, from = &source)
            {
                nuint words = length / (nuint)sizeof(ulong);
                nuint inWords = words * (nuint)sizeof(ulong);
                if ((nuint)(to - from) >= length)
                {
                    for (nuint i = 0; i < words; i++)
                        ((ulong*)to)[i] = ((ulong*)from)[i];
                    for (nuint i = inWords; i < length; i++)
                        to[i] = from[i];
                }
                else
                {
                    for (nuint i = length; i > inWords; i--)
                        to[i - 1] = from[i - 1];
                    for (nuint i = words; i > 0; i--)
                        ((ulong*)to)[i - 1] = ((ulong*)from)[i - 1];
                }
            }
        }

        internal static void ClearWithoutReferences(ref byte destination, nuint length) => Fill(ref destination, 0, length);

        internal static void Fill(ref byte destination, byte value, nuint length)
        {
            fixed (byte* to = &destination)
            {
                ulong word = value * 0x0101_0101_0101_0101UL;
                nuint words = length / (nuint)sizeof(ulong);
                for (nuint i = 0; i < words; i++)
                    ((ulong*)to)[i] = word;
                for (nuint i = words * (nuint)sizeof(ulong); i < length; i++)
                    to[i] = value;
            }
        }
    }
}

namespace System.Runtime.InteropServices
{
    public static unsafe class NativeMemory
    {
        /// <summary>Zeroes memory.</summary>
        public static void Clear(void* pointer, nuint bytes) => SpanHelpers.ClearWithoutReferences(ref *(byte*)pointer, bytes);
    }

    public static class MemoryMarshal
    {
        /// <summary>Values from a reference on; how an inline array is indexed.</summary>
        public static Span<T> CreateSpan<T>(scoped ref T reference, int length) => new(ref Unsafe.AsRef(in reference), length);

        /// <inheritdoc cref="CreateSpan{T}(ref T, int)"/>
        public static ReadOnlySpan<T> CreateReadOnlySpan<T>(scoped ref readonly T reference, int length)
            => new(ref Unsafe.AsRef(in reference), length);
    }
}
