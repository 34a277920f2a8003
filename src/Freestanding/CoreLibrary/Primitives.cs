// The types that every C# program is made of, as the compilers ask for them.
using System.Runtime;
using System.Runtime.CompilerServices;

#pragma warning disable CS0169 // Fields that give a type its size and are read by no one: a primitive is its field.

namespace System;

/// <summary>The root of all types. No object is ever made here; the field is what the compiler knows an object by.</summary>
public class Object
{
    private nint _methodTable;

    public virtual bool Equals(object? other) => ReferenceEquals(this, other);

    public virtual int GetHashCode() => 0;

    public virtual string? ToString() => null;

    public static bool ReferenceEquals(object? left, object? right) => left == right;
}

public abstract class ValueType
{
}

public abstract class Enum : ValueType
{
}

public struct Void
{
}

public struct Boolean
{
    private bool _value;
}

public struct Char
{
    private char _value;
}

public struct SByte
{
    public const sbyte MinValue = -0x80;
    public const sbyte MaxValue = 0x7f;

    private sbyte _value;
}

public struct Byte
{
    public const byte MinValue = 0;
    public const byte MaxValue = 0xff;

    private byte _value;
}

public struct Int16
{
    public const short MinValue = -0x8000;
    public const short MaxValue = 0x7fff;

    private short _value;
}

public struct UInt16
{
    public const ushort MinValue = 0;
    public const ushort MaxValue = 0xffff;

    private ushort _value;
}

public struct Int32
{
    public const int MinValue = -0x7fff_ffff - 1;
    public const int MaxValue = 0x7fff_ffff;

    private int _value;
}

public struct UInt32
{
    public const uint MinValue = 0;
    public const uint MaxValue = 0xffff_ffff;

    private uint _value;
}

public struct Int64
{
    public const long MinValue = -0x7fff_ffff_ffff_ffff - 1;
    public const long MaxValue = 0x7fff_ffff_ffff_ffff;

    private long _value;
}

public struct UInt64
{
    public const ulong MinValue = 0;
    public const ulong MaxValue = 0xffff_ffff_ffff_ffff;

    private ulong _value;
}

public struct IntPtr
{
    private nint _value;
}

public struct UIntPtr
{
    private nuint _value;
}

public struct Single
{
    private float _value;
}

public struct Double
{
    private double _value;
}

/// <summary>A value or none.</summary>
public readonly struct Nullable<T>
    where T : struct
{
    private readonly bool _hasValue;
    private readonly T _value;

    public Nullable(T value)
    {
        _hasValue = true;
        _value = value;
    }

    public bool HasValue => _hasValue;

    public T GetValueOrDefault() => _value;

    public static implicit operator T?(T value) => new T?(value);
}

/// <summary>Known to the compiler; there are none.</summary>
public abstract class Array
{
}

/// <summary>Known to the compiler; there are none.</summary>
public abstract class Delegate
{
}

/// <summary>Known to the compiler; there are none.</summary>
public abstract class MulticastDelegate : Delegate
{
}

/// <summary>Known to the compiler; none is thrown.</summary>
public class Exception
{
}

/// <summary>Known to the compiler; there is no reflection.</summary>
public abstract class Type
{
}

/// <summary>What two values at once are, as when they are exchanged.</summary>
public struct ValueTuple<T1, T2>(T1 item1, T2 item2)
{
    public T1 Item1 = item1;
    public T2 Item2 = item2;
}

public struct RuntimeTypeHandle
{
    private nint _value;
}

public struct RuntimeMethodHandle
{
    private nint _value;
}

public struct RuntimeFieldHandle
{
    private nint _value;
}

/// <summary>Text is for people: it is compiled outside only.</summary>
public sealed class String
{
    private int _stringLength;
    private char _firstChar;

    /// <summary>What an interpolated string becomes.</summary>
    [RuntimeImport(Declared.NeedsHeap)]
    [MethodImpl(MethodImplOptions.InternalCall)]
    public static extern string Format(string format, object? argument);
}

/// <summary>
/// What the language asks for and cannot exist without a heap is declared and has no body: code that reached it would leave this
/// symbol unresolved, and nothing with an unresolved symbol is linked.
/// </summary>
internal static class Declared
{
    public const string NeedsHeap = "needs_a_heap";
}

/// <summary>Equality of a type's own values, which a record struct implements.</summary>
public interface IEquatable<T>
{
    bool Equals(T? other);
}
