using System.Numerics;
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>The status flags of the ALU operations that emulation performs (Intel SDM volume 1, 3.4.3.1).</summary>
public static class Arithmetic
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

    /// <summary>
    /// Shifts and rotations (Intel SDM volume 2, RCL/RCR/ROL/ROR and SAL/SAR/SHL/SHR). Flags that are undefined for counts above 1 are as
    /// for a last step by 1.
    /// </summary>
    public static ulong Shift(Mnemonic operation, ulong value, int count, int bits, ref ulong flags)
    {
        count &= bits == 64 ? 63 : 31;
        value &= Mask(bits);
        if (count == 0)
            return value;
        bool carry = (flags & (ulong)Rflags.Carry) != 0;
        bool rotates = operation is Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr;
        bool overflow = false;
        for (; count > 0; count--)
        {
            bool top = (value >> (bits - 1) & 1) != 0;
            bool left = operation is Mnemonic.Rol or Mnemonic.Rcl or Mnemonic.Shl or Mnemonic.Sal;
            bool leaves = left ? top : (value & 1) != 0;
            bool enters = operation switch
            {
                Mnemonic.Rol or Mnemonic.Ror => leaves,
                Mnemonic.Rcl or Mnemonic.Rcr => carry,
                Mnemonic.Sar => top,
                _ => false,
            };
            value = left
                ? ((value << 1) & Mask(bits)) | (enters ? 1UL : 0)
                : (value >> 1) | (enters ? 1UL << (bits - 1) : 0);
            carry = leaves;
            overflow = top != ((value >> (bits - 1) & 1) != 0);
        }

        if (!rotates)
            SetFlags(value, bits, ref flags);
        flags &= ~(ulong)(Rflags.Carry | Rflags.Overflow);
        Set(ref flags, Rflags.Carry, carry);
        Set(ref flags, Rflags.Overflow, overflow);
        return value;
    }

    /// <summary>SHLD and SHRD: what comes in are the bits of another operand.</summary>
    public static ulong DoubleShift(Mnemonic operation, ulong value, ulong from, int count, int bits, ref ulong flags)
    {
        count &= bits == 64 ? 63 : 31;
        value &= Mask(bits);
        from &= Mask(bits);
        if (count == 0)
            return value;
        bool left = operation == Mnemonic.Shld;
        UInt128 both = left ? ((UInt128)value << bits) | from : ((UInt128)from << bits) | value;
        bool carry = left ? (both >> ((2 * bits) - count) & 1) != 0 : (both >> (count - 1) & 1) != 0;
        ulong result = (ulong)(left ? both << count >> bits : both >> count) & Mask(bits);
        SetFlags(result, bits, ref flags);
        Set(ref flags, Rflags.Carry, carry);
        Set(ref flags, Rflags.Overflow, ((value ^ result) >> (bits - 1) & 1) != 0);
        return result;
    }

    /// <summary>Whether a condition holds (Intel SDM volume 1, appendix B).</summary>
    public static bool Holds(ConditionCode condition, ulong flags)
    {
        bool carry = (flags & (ulong)Rflags.Carry) != 0;
        bool zero = (flags & (ulong)Rflags.Zero) != 0;
        bool sign = (flags & (ulong)Rflags.Sign) != 0;
        bool overflow = (flags & (ulong)Rflags.Overflow) != 0;
        bool parity = (flags & (ulong)Rflags.Parity) != 0;
        return condition switch
        {
            ConditionCode.o => overflow,
            ConditionCode.no => !overflow,
            ConditionCode.b => carry,
            ConditionCode.ae => !carry,
            ConditionCode.e => zero,
            ConditionCode.ne => !zero,
            ConditionCode.be => carry || zero,
            ConditionCode.a => !carry && !zero,
            ConditionCode.s => sign,
            ConditionCode.ns => !sign,
            ConditionCode.p => parity,
            ConditionCode.np => !parity,
            ConditionCode.l => sign != overflow,
            ConditionCode.ge => sign == overflow,
            ConditionCode.le => zero || sign != overflow,
            ConditionCode.g => !zero && sign == overflow,
            _ => false,
        };
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
