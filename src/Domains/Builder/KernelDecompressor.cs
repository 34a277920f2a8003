// Tells the compressions of kernel images apart by their first bytes, and undoes them within a limit.

using System.Buffers.Binary;
using System.IO.Compression;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using K4os.Compression.LZ4;
using SharpCompress.Compressors.BZip2;
using ZstdSharp;
using ZstdSharp.Unsafe;

namespace XenSharp.Domains.Builder;

/// <summary>How a kernel, or the payload of a bzImage, is compressed: the choices of Linux's "Kernel compression mode".</summary>
public enum KernelCompression
{
    None,
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

/// <summary>Unpacks kernels. Every failure inside a decompression library comes out as a <see cref="KernelImageException"/>.</summary>
internal static class KernelDecompressor
{
    private const int Lz4LegacyBlockSize = 8 * 1024 * 1024;

    private static ReadOnlySpan<byte> Lz4LegacyMagic => [0x02, 0x21, 0x4C, 0x18];

    /// <summary>The compression whose magic number starts the data, or null if none does.</summary>
    public static KernelCompression? Identify(ReadOnlySpan<byte> data)
    {
        if (data.StartsWith<byte>([0x1F, 0x8B]))
            return KernelCompression.Gzip;
        if (data.StartsWith("BZh"u8))
            return KernelCompression.Bzip2;
        if (data.StartsWith<byte>([0xFD, (byte)'7', (byte)'z', (byte)'X', (byte)'Z', 0]))
            return KernelCompression.Xz;
        if (data.StartsWith<byte>([0x28, 0xB5, 0x2F, 0xFD]))
            return KernelCompression.Zstd;
        if (data.StartsWith(LzopDecoder.Magic))
            return KernelCompression.Lzo;
        if (data.StartsWith(Lz4LegacyMagic))
            return KernelCompression.Lz4;
        // LZMA alone has no magic: the default properties (lc 3, lp 0, pb 2) and a dictionary of a multiple of 64 KiB serve as one.
        if (data.StartsWith<byte>([0x5D, 0x00, 0x00]))
            return KernelCompression.Lzma;
        return null;
    }

    /// <summary>Unpacks <paramref name="data"/>.</summary>
    /// <param name="kind">As <see cref="Identify"/> said.</param>
    /// <param name="data">The compressed bytes and nothing behind them.</param>
    /// <param name="limit">Most bytes that may come out.</param>
    /// <param name="likelySize">What the file says will come out; only a guess for sizing the buffer.</param>
    /// <exception cref="KernelImageException">The data is damaged, cut short, or unpacks to more than the limit.</exception>
    public static ReadOnlyMemory<byte> Decompress(KernelCompression kind, ReadOnlyMemory<byte> data, int limit, long likelySize)
    {
        DecompressionBuffer output = new(limit, likelySize, data.Length);
        try
        {
            switch (kind)
            {
                case KernelCompression.Gzip:
                    DecodeGzip(data, output);
                    break;
                case KernelCompression.Bzip2:
                    using (BZip2Stream stream = BZip2Stream.Create(
                        Open(data), SharpCompress.Compressors.CompressionMode.Decompress, decompressConcatenated: false))
                        output.ReadAll(stream);
                    break;
                case KernelCompression.Lzma:
                    OnPassingThread(() => Lzma.DecodeAlone(data, output));
                    break;
                case KernelCompression.Xz:
                    OnPassingThread(() => XzDecoder.Decode(data, output));
                    break;
                case KernelCompression.Lzo:
                    LzopDecoder.Decode(data.Span, output);
                    break;
                case KernelCompression.Lz4:
                    DecodeLz4(data.Span, output);
                    break;
                case KernelCompression.Zstd:
                    DecodeZstd(data.Span, output);
                    break;
                default:
                    return data;
            }
        }
        catch (OutOfMemoryException exception)
        {
            throw new KernelImageException(
                $"There is not enough free memory to unpack the kernel ({Printable.Size((ulong)output.Length)} so far); "
                + "free some and try again.", exception);
        }
        catch (Exception exception) when (exception is not KernelImageException)
        {
            // The libraries report damage by many types, array index errors among them; to a person they all mean one thing.
            throw new KernelImageException(Damaged(Name(kind), "it does not unpack").Message, exception);
        }

        return output.Written;
    }

    /// <summary>
    /// Runs a decoder whose library rents its dictionary, tens of MiB, from the shared array pool. The pool keeps what is
    /// returned for the returning thread, as long as that lives: on a thread of its own the dictionary goes with it.
    /// </summary>
    private static void OnPassingThread(Action decode)
    {
        ExceptionDispatchInfo? failure = null;
        var thread = new Thread(() =>
        {
            try
            {
                decode();
            }
            catch (Exception exception)
            {
                failure = ExceptionDispatchInfo.Capture(exception);
            }
        });
        thread.Start();
        thread.Join();
        failure?.Throw();
    }

    public static string Name(KernelCompression kind) => kind.ToString().ToLowerInvariant();

    /// <summary>A stream over memory, without a copy where the memory is an array.</summary>
    public static MemoryStream Open(ReadOnlyMemory<byte> data) => MemoryMarshal.TryGetArray(data, out ArraySegment<byte> segment)
        ? new MemoryStream(segment.Array!, segment.Offset, segment.Count, writable: false)
        : new MemoryStream(data.ToArray(), writable: false);

    public static KernelImageException CutShort(string format) => new(
        $"The kernel's {format} data ends too early: the file was cut short, so copy or download it again.");

    public static KernelImageException Damaged(string format, string detail) => new(
        $"The kernel's {format} data is damaged ({detail}); copy or download the file again.");

    private static void DecodeGzip(ReadOnlyMemory<byte> data, DecompressionBuffer output)
    {
        using (GZipStream stream = new(Open(data), CompressionMode.Decompress))
            output.ReadAll(stream);

        // GZipStream takes the end of its input for the end of the data. The last four bytes of a whole file are the size.
        if (data.Length < 18 || BinaryPrimitives.ReadUInt32LittleEndian(data.Span[^4..]) != (uint)output.Length)
            throw CutShort("gzip");
    }

    /// <summary>The legacy frame of the lz4 tool (-l): a magic number, then blocks of a size and that many bytes, to the end.</summary>
    private static void DecodeLz4(ReadOnlySpan<byte> data, DecompressionBuffer output)
    {
        while (!data.IsEmpty)
        {
            if (data.StartsWith(Lz4LegacyMagic))
            {
                data = data[4..];
                continue;
            }

            if (data.Length < 4)
                throw CutShort("lz4");
            uint size = BinaryPrimitives.ReadUInt32LittleEndian(data);
            data = data[4..];
            if (size == 0 || size > (uint)LZ4Codec.MaximumOutputSize(Lz4LegacyBlockSize))
                throw Damaged("lz4", "a block has an impossible size");
            if (size > (uint)data.Length)
                throw CutShort("lz4");

            // LZ4 cannot grow data by more than 255, so a small block gets a small room.
            int possible = (int)Math.Min(Lz4LegacyBlockSize, size * 255L);
            int room = Math.Min(possible, output.Remaining);
            int written = LZ4Codec.Decode(data[..(int)size], output.Reserve(room));
            if (written < 0)
                throw room < possible ? DecompressionBuffer.TooLarge(output.Limit) : Damaged("lz4", "a block does not unpack");
            output.Advance(written);
            data = data[(int)size..];
        }
    }

    /// <summary>
    /// One-shot decoding: the output is the window, so that the 128 MiB window of zstd -22 costs nothing. Sizes in frame headers
    /// are not believed; an output too small for the data is doubled instead, and the work done again.
    /// </summary>
    private static void DecodeZstd(ReadOnlySpan<byte> data, DecompressionBuffer output)
    {
        using Decompressor decompressor = new();
        int room = Math.Max(Math.Min(64 * 1024, output.Limit), output.Capacity);
        while (true)
        {
            try
            {
                output.Advance(decompressor.Unwrap(data, output.Reserve(room)));
                return;
            }
            catch (ZstdException exception) when (exception.Code == ZSTD_ErrorCode.ZSTD_error_dstSize_tooSmall)
            {
                if (room == output.Limit)
                    throw DecompressionBuffer.TooLarge(output.Limit);
                room = (int)Math.Min(room * 2L, output.Limit);
            }
        }
    }
}
