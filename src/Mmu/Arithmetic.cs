using System.Numerics;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>The status flags of the ALU operations that emulation performs (Intel SDM volume 1, 3.4.3.1).</summary>
internal static class Arithmetic
{
    private const ulong Status = (ulong)(Rflags.Carry | Rflags.Parity | Rflags.Adjust | Rflags.Zero | Rflags.Sign | Rflags.Overflow);

    /// <summary>ADD of operands of the given width in bits; ADC with a carry.</summary>
    public static ulong Add(ulong left, ulong right, int bits, ref ulong flags, bool carry = false)
    {
        ulong mask = Mask(bits);
        left &= mask;
        right &= mask;
        ulong result = (left + right + (carry ? 1UL : 0)) & mask;
        SetFlags(result, bits, ref flags);
        Set(ref flags, Rflags.Carry, result < left || (carry && result == left));
        Set(ref flags, Rflags.Adjust, ((left ^ right ^ result) & 0x10) != 0);
        Set(ref flags, Rflags.Overflow, ((~(left ^ right) & (left ^ result)) >> (bits - 1) & 1) != 0);
        return result;
    }

    /// <summary>SUB, and the comparison of CMPXCHG; SBB with a borrow.</summary>
    public static ulong Subtract(ulong left, ulong right, int bits, ref ulong flags, bool borrow = false)
    {
        ulong mask = Mask(bits);
        left &= mask;
        right &= mask;
        ulong result = (left - right - (borrow ? 1UL : 0)) & mask;
        SetFlags(result, bits, ref flags);
        Set(ref flags, Rflags.Carry, left < right || (borrow && left == right));
        Set(ref flags, Rflags.Adjust, ((left ^ right ^ result) & 0x10) != 0);
        Set(ref flags, Rflags.Overflow, (((left ^ right) & (left ^ result)) >> (bits - 1) & 1) != 0);
        return result;
    }

    /// <summary>Flags of AND, OR and XOR.</summary>
    public static ulong Logic(ulong result, int bits, ref ulong flags)
    {
        result &= Mask(bits);
        SetFlags(result, bits, ref flags);
        return result;
    }

    private static ulong Mask(int bits) => bits == 64 ? ulong.MaxValue : (1UL << bits) - 1;

    /// <summary>Zero, Sign and Parity from the result; the rest cleared.</summary>
    private static void SetFlags(ulong result, int bits, ref ulong flags)
    {
        flags &= ~Status;
        Set(ref flags, Rflags.Zero, result == 0);
        Set(ref flags, Rflags.Sign, (result >> (bits - 1) & 1) != 0);
        Set(ref flags, Rflags.Parity, (BitOperations.PopCount((byte)result) & 1) == 0);
    }

    private static void Set(ref ulong flags, Rflags flag, bool value)
    {
        if (value)
            flags |= (ulong)flag;
    }
}
