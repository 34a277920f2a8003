// LZO1X decompression, after the description of the stream format in the kernel's documentation (staging/lzo.rst, version 0).

namespace XenSharp.Domains.Builder;

/// <summary>Decodes one LZO1X block, the method of lzop and of CONFIG_KERNEL_LZO. There is no kept .NET library for it.</summary>
internal ref struct Lzo1xDecoder
{
    // How many literals the last instruction copied decides what instructions 0 to 15 mean.
    private const int LongLiteralRun = 4;

    private readonly ReadOnlySpan<byte> _source;
    private readonly Span<byte> _target;
    private int _read;
    private int _written;

    private Lzo1xDecoder(ReadOnlySpan<byte> source, Span<byte> target)
    {
        _source = source;
        _target = target;
    }

    /// <summary>Decodes <paramref name="source"/> into <paramref name="target"/>.</summary>
    /// <returns>False if the block is damaged: it must use up all of the source and fill all of the target.</returns>
    public static bool TryDecode(ReadOnlySpan<byte> source, Span<byte> target)
    {
        Lzo1xDecoder decoder = new(source, target);
        return decoder.Run() && decoder._read == source.Length && decoder._written == target.Length;
    }

    private bool Run()
    {
        int state = 0;
        // The first byte has an encoding of its own for literals; small values are ordinary instructions.
        if (_source.Length > 0 && _source[0] > 17)
        {
            int count = _source[0] - 17;
            _read = 1;
            if (!CopyLiterals(count))
                return false;
            state = Math.Min(count, LongLiteralRun);
        }

        while (_read < _source.Length)
        {
            int instruction = _source[_read++];
            int distance;
            int length;
            int literals;
            if (instruction >= 64)
            {
                if (!TryReadByte(out int high))
                    return false;
                distance = (high << 3) + ((instruction >> 2) & 7) + 1;
                length = (instruction >> 5) + 1;
                literals = instruction & 3;
            }
            else if (instruction >= 32)
            {
                if (!TryReadLength(instruction, 5, out length) || !TryReadUInt16(out int operand))
                    return false;
                length += 2;
                distance = (operand >> 2) + 1;
                literals = operand & 3;
            }
            else if (instruction >= 16)
            {
                if (!TryReadLength(instruction, 3, out length) || !TryReadUInt16(out int operand))
                    return false;
                length += 2;
                distance = 16384 + ((instruction & 8) << 11) + (operand >> 2);
                literals = operand & 3;
                // Distance 16384 is the end marker, always written with length 3.
                if (distance == 16384)
                    return length == 3 && literals == 0;
            }
            else if (state == 0)
            {
                if (!TryReadLength(instruction, 4, out length) || !CopyLiterals(length + 3))
                    return false;
                state = LongLiteralRun;
                continue;
            }
            else
            {
                if (!TryReadByte(out int high))
                    return false;
                distance = (high << 2) + (instruction >> 2) + 1;
                length = 2;
                if (state == LongLiteralRun)
                {
                    distance += 2048;
                    length = 3;
                }

                literals = instruction & 3;
            }

            if (!CopyMatch(distance, length) || !CopyLiterals(literals))
                return false;
            state = literals;
        }

        return false;
    }

    private bool TryReadByte(out int value)
    {
        bool available = _read < _source.Length;
        value = available ? _source[_read++] : 0;
        return available;
    }

    private bool TryReadUInt16(out int value)
    {
        bool complete = TryReadByte(out int low) & TryReadByte(out int high);
        value = low | (high << 8);
        return complete;
    }

    /// <summary>A length in the low bits of the instruction; zero there means that more bytes follow, each zero byte worth 255.</summary>
    private bool TryReadLength(int instruction, int bits, out int length)
    {
        int mask = (1 << bits) - 1;
        length = instruction & mask;
        if (length != 0)
            return true;
        length = mask;
        while (TryReadByte(out int next))
        {
            if (next != 0)
            {
                length += next;
                return true;
            }

            // Longer than everything still to be written is an error anyway; ending here keeps the sum small.
            length += 255;
            if (length > _target.Length - _written)
                return false;
        }

        return false;
    }

    private bool CopyLiterals(int count)
    {
        if (count > _source.Length - _read || count > _target.Length - _written)
            return false;
        _source.Slice(_read, count).CopyTo(_target[_written..]);
        _read += count;
        _written += count;
        return true;
    }

    private bool CopyMatch(int distance, int length)
    {
        if (distance > _written || length > _target.Length - _written)
            return false;
        Span<byte> source = _target.Slice(_written - distance, length);
        Span<byte> destination = _target.Slice(_written, length);
        if (distance >= length)
            source.CopyTo(destination);
        else
            for (int index = 0; index < length; index++)
                destination[index] = source[index]; // overlapping: bytes just written are read again
        _written += length;
        return true;
    }
}
