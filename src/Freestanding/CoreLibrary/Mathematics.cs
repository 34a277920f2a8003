// Minimum, maximum and the counting of bits.
using System.Runtime.CompilerServices;

namespace System
{
    public static class Math
    {
        public static int Min(int left, int right) => left < right ? left : right;

        public static uint Min(uint left, uint right) => left < right ? left : right;

        public static long Min(long left, long right) => left < right ? left : right;

        public static ulong Min(ulong left, ulong right) => left < right ? left : right;

        public static int Max(int left, int right) => left > right ? left : right;

        public static uint Max(uint left, uint right) => left > right ? left : right;

        public static long Max(long left, long right) => left > right ? left : right;

        public static ulong Max(ulong left, ulong right) => left > right ? left : right;
    }
}

namespace System.Numerics
{
    public static class BitOperations
    {
        /// <summary>Bits below the lowest that is set; 64 for 0.</summary>
        public static int TrailingZeroCount(ulong value) => value == 0 ? 64 : PopCount((value & (0 - value)) - 1);

        /// <summary>Bits below the lowest that is set; 32 for 0.</summary>
        public static int TrailingZeroCount(uint value) => TrailingZeroCount(value | (1UL << 32));

        /// <summary>Bits above the highest that is set; 64 for 0.</summary>
        public static int LeadingZeroCount(ulong value)
        {
            for (int shift = 1; shift < 64; shift <<= 1)
                value |= value >> shift;
            return 64 - PopCount(value);
        }

        /// <summary>Number of the highest bit that is set; 0 for 0.</summary>
        public static int Log2(ulong value) => 63 - LeadingZeroCount(value | 1);

        /// <summary>Bits that are set, summed up in ever wider groups.</summary>
        public static int PopCount(ulong value)
        {
            value -= (value >> 1) & 0x5555_5555_5555_5555;
            value = (value & 0x3333_3333_3333_3333) + ((value >> 2) & 0x3333_3333_3333_3333);
            value = (value + (value >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
            return (int)((value * 0x0101_0101_0101_0101) >> 56);
        }
    }
}
