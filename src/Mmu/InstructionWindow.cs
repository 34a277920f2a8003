// The bytes of one instruction, read from the guest once.
using Iced.Intel;

namespace XenSharp.Mmu;

/// <summary>Feeds Iced from a copy of at most 15 bytes, so that the guest cannot change an instruction while it is decoded.</summary>
public sealed class InstructionWindow : CodeReader
{
    /// <summary>Longest instruction (Intel SDM volume 2, 2.3.11).</summary>
    public const int Capacity = 15;

    private Bytes _bytes;
    private int _position;

    [System.Runtime.CompilerServices.InlineArray(Capacity)]
    private struct Bytes
    {
        private byte _element;
    }

    /// <summary>Bytes that are valid.</summary>
    public int Length { get; private set; }

    /// <summary>The bytes still to be filled.</summary>
    public Span<byte> Free => ((Span<byte>)_bytes)[Length..];

    public void Clear()
    {
        Length = 0;
        _position = 0;
    }

    /// <summary>Takes <paramref name="count"/> bytes that were stored into <see cref="Free"/> and starts over at the first.</summary>
    public void Append(int count)
    {
        Length += count;
        _position = 0;
    }

    public override int ReadByte() => _position < Length ? _bytes[_position++] : -1;
}
