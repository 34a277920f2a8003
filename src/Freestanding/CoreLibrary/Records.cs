// What the compiler builds the members of a record struct from.
using System.Runtime;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace System.Collections.Generic
{
    /// <summary>Equality of values, virtual because the compiler looks for it so.</summary>
    public abstract class ValueEquality<T>
    {
        public abstract bool Equals(T left, T right);

        public abstract int GetHashCode(T value);
    }

    /// <summary>
    /// Equality of a record's fields: that of their bytes, which is right for integers, enumerations and what is made of them without
    /// padding. Sealed, so that no call is virtual, and without state, so that nothing is left of the one object there is.
    /// </summary>
    public sealed class EqualityComparer<T> : ValueEquality<T>
    {
        private static readonly EqualityComparer<T> s_default = new();

        public static EqualityComparer<T> Default => s_default;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public override bool Equals(T left, T right)
        {
            if (Unsafe.SizeOf<T>() == sizeof(ulong))
                return Unsafe.As<T, ulong>(ref left) == Unsafe.As<T, ulong>(ref right);
            if (Unsafe.SizeOf<T>() == sizeof(uint))
                return Unsafe.As<T, uint>(ref left) == Unsafe.As<T, uint>(ref right);
            if (Unsafe.SizeOf<T>() == sizeof(ushort))
                return Unsafe.As<T, ushort>(ref left) == Unsafe.As<T, ushort>(ref right);
            for (int i = 0; i < Unsafe.SizeOf<T>(); i++)
            {
                if (ByteOf(ref left, i) != ByteOf(ref right, i))
                    return false;
            }

            return true;
        }

        public override int GetHashCode(T value)
        {
            int hash = 0;
            for (int i = 0; i < Unsafe.SizeOf<T>(); i++)
                hash = (hash * 31) + ByteOf(ref value, i);
            return hash;
        }

        private static byte ByteOf(ref T value, int index) => Unsafe.AddByteOffset(ref Unsafe.As<T, byte>(ref value), (nuint)index);
    }
}

namespace System.Text
{
    /// <summary>What a record's ToString writes into.</summary>
    public sealed class StringBuilder
    {
        [RuntimeImport(Declared.NeedsHeap)]
        [MethodImpl(MethodImplOptions.InternalCall)]
        public extern StringBuilder Append(string? text);

        [RuntimeImport(Declared.NeedsHeap)]
        [MethodImpl(MethodImplOptions.InternalCall)]
        public extern StringBuilder Append(char character);

        [RuntimeImport(Declared.NeedsHeap)]
        [MethodImpl(MethodImplOptions.InternalCall)]
        public extern StringBuilder Append(object? value);
    }
}
