// The debug registers of a PV guest: the rules of set_debugreg and get_debugreg, shared with mov to and from DRn.
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>
/// Rules for a vCPU's debug registers (Intel SDM volume 3, 17.2; Xen's set_debugreg). <see cref="VcpuState.DebugRegisters"/>
/// holds what the guest reads; the processor gets <see cref="HardwareControl"/> as its DR7, because I/O breakpoints belong to
/// ports that are emulated.
/// </summary>
public static unsafe class DebugRegisters
{
    /// <summary>DR6.BS: a single step.</summary>
    public const ulong SingleStep = 1 << 14;

    /// <summary>Bits of DR6 that read as one.</summary>
    public const ulong StatusOnes = 0xffff_0ff0;

    /// <summary>DR7 of a fresh vCPU: nothing armed.</summary>
    public const ulong ControlOnes = 0x400;

    /// <summary>Bits of DR7 of which one is set for each breakpoint that is armed.</summary>
    public const ulong ActiveMask = 0xff;

    private const ulong StatusZeroes = 1 << 12;
    private const ulong ControlZeroes = 0xd800;
    private const ulong GeneralDetect = 1 << 13;
    private const ulong Cr4DebugExtensions = 1 << 3;
    private const int BreakOnIo = 2;

    /// <summary>Sets a debug register.</summary>
    /// <param name="state">The vCPU.</param>
    /// <param name="register">0–7; 4 and 5 name 6 and 7 while CR4.DE is clear.</param>
    /// <param name="value">The guest's value.</param>
    /// <param name="hardware">On success, the number of the register to load into the processor (0–3, 6, 7).</param>
    /// <returns>
    /// <see cref="Errno.None"/>; <see cref="Errno.ENODEV"/> (#UD) for a register that does not exist; <see cref="Errno.EINVAL"/> for
    /// reserved bits and <see cref="Errno.EPERM"/> for what a guest may not use (both #GP). Nothing is changed on an error.
    /// </returns>
    public static Errno Set(VcpuState* state, int register, ulong value, out int hardware)
    {
        hardware = register;
        switch (register)
        {
            case >= 0 and <= 3:
                if (!new VirtualAddress(value).IsGuest)
                    return Errno.EPERM;
                break;

            case 4 or 6:
                if (register == 4 && (state->Cr4 & Cr4DebugExtensions) != 0)
                    return Errno.ENODEV;
                if (value > uint.MaxValue)
                    return Errno.EINVAL;
                value = (value & ~StatusZeroes) | StatusOnes;
                hardware = 6;
                break;

            case 5 or 7:
                if (register == 5 && (state->Cr4 & Cr4DebugExtensions) != 0)
                    return Errno.ENODEV;
                if (value > uint.MaxValue)
                    return Errno.EINVAL;
                value = (value & ~ControlZeroes) | ControlOnes;
                if ((value & GeneralDetect) != 0)
                    return Errno.EPERM;
                if ((value & ActiveMask) != 0 && (state->Cr4 & Cr4DebugExtensions) == 0 && HasIoType(value))
                    return Errno.EPERM;
                hardware = 7;
                break;

            default:
                return Errno.ENODEV;
        }

        state->DebugRegisters[hardware] = value;
        return Errno.None;
    }

    /// <summary>Takes what the processor says of a debug exception into the guest's DR6, as Xen's do_debug does.</summary>
    /// <param name="state">The vCPU.</param>
    /// <param name="status">The processor's DR6.</param>
    public static void Note(VcpuState* state, ulong status)
    {
        ref ulong seen = ref state->DebugRegisters[6];

        // Bits that say something when set stay until the guest clears them; so do those that say something when clear.
        seen |= status & ~StatusOnes;
        seen &= status | ~StatusOnes;
    }

    /// <summary>Reads a debug register.</summary>
    /// <returns>False (#UD, -ENODEV) for one that does not exist.</returns>
    public static bool TryGet(VcpuState* state, int register, out ulong value)
    {
        value = 0;
        if (register is 4 or 5)
        {
            if ((state->Cr4 & Cr4DebugExtensions) != 0)
                return false;
            register += 2;
        }

        if (register is < 0 or > 7)
            return false;
        value = state->DebugRegisters[register];
        return true;
    }

    /// <summary>DR7 as the processor may have it: without the enable bits of I/O breakpoints.</summary>
    public static ulong HardwareControl(VcpuState* state)
    {
        ulong control = state->DebugRegisters[7];
        return control & ~IoEnables(control);
    }

    /// <summary>The breakpoints (DR6 bits 0–3) that an access to <paramref name="bytes"/> ports from <paramref name="port"/> hits.</summary>
    public static uint MatchIo(VcpuState* state, uint port, uint bytes)
    {
        ulong control = state->DebugRegisters[7];
        ulong enables = IoEnables(control);
        if (enables == 0 || (state->Cr4 & Cr4DebugExtensions) == 0)
            return 0;
        uint match = 0;
        for (int i = 0; i < 4; i++)
        {
            if ((enables & (3UL << (i * 2))) == 0)
                continue;

            // LEN encodes 1, 2, 8 and 4 bytes, in this order.
            ulong width = ((control >> (18 + (i * 4))) & 3) switch { 0 => 1, 1 => 2, 2 => 8, _ => 4 };
            ulong start = state->DebugRegisters[i] & ~(width - 1);
            if (start < port + bytes && start + width > port)
                match |= 1u << i;
        }

        return match;
    }

    private static bool HasIoType(ulong control)
    {
        for (int i = 0; i < 4; i++)
        {
            if (TypeOf(control, i) == BreakOnIo)
                return true;
        }

        return false;
    }

    private static ulong IoEnables(ulong control)
    {
        ulong enables = 0;
        for (int i = 0; i < 4; i++)
        {
            if (TypeOf(control, i) == BreakOnIo)
                enables |= control & (3UL << (i * 2));
        }

        return enables;
    }

    private static int TypeOf(ulong control, int breakpoint) => (int)(control >> (16 + (breakpoint * 4))) & 3;
}
