// What the tiny guest can be asked to do.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests;

/// <summary>What the tiny guest does after its message.</summary>
public enum TinyGuestBehaviour
{
    /// <summary>SCHEDOP_shutdown with SHUTDOWN_poweroff.</summary>
    PowerOff,

    /// <summary>SCHEDOP_shutdown with SHUTDOWN_reboot.</summary>
    Reboot,

    /// <summary>SCHEDOP_shutdown with SHUTDOWN_crash.</summary>
    Crash,

    /// <summary>Raises #UD without a trap table: the domain cannot take the exception and is crashed.</summary>
    UndefinedInstruction,

    /// <summary>Spins in a one-instruction loop, no hypercall ever again.</summary>
    SpinForever,

    /// <summary>Jumps to <see cref="TinyGuestOptions.Address"/>, by default into the hypervisor's own slots.</summary>
    JumpTo,

    /// <summary>Reads 8 bytes at <see cref="TinyGuestOptions.Address"/>; says "Survived\n" and powers off if that works.</summary>
    ReadFrom,

    /// <summary>Writes 8 bytes at <see cref="TinyGuestOptions.Address"/>; says "Survived\n" and powers off if that works.</summary>
    WriteTo,

    /// <summary>Writes <see cref="TinyGuestOptions.FloodBytes"/> bytes of <see cref="TinyGuest.FloodByte"/>, then powers off.</summary>
    ConsoleFlood,

    /// <summary>Echoes console input with a–z as A–Z until it reads ^D (byte 4), then powers off; crashes as initial domain.</summary>
    EchoInput,

    /// <summary>SCHEDOP_shutdown with SHUTDOWN_suspend, without the preparations that a resume would need.</summary>
    Suspend,

    /// <summary>SCHEDOP_shutdown with SHUTDOWN_watchdog.</summary>
    Watchdog,

    /// <summary>SCHEDOP_shutdown with SHUTDOWN_soft_reset.</summary>
    SoftReset,
}

/// <summary>The tiny guest's parameters.</summary>
public sealed record TinyGuestOptions
{
    /// <summary>What is printed first; ASCII; may be empty.</summary>
    public string Message { get; init; } = "Hello from a Xen PV guest on XenSharp\n";

    public TinyGuestBehaviour Behaviour { get; init; } = TinyGuestBehaviour.PowerOff;

    /// <summary>Virtual address for JumpTo, ReadFrom and WriteTo; the default is in L4 slot 258, reserved for the hypervisor.</summary>
    public ulong Address { get; init; } = 0xffff810000000000;

    /// <summary>Length of the console flood in bytes, not counting the message.</summary>
    public long FloodBytes { get; init; } = 1 << 20;

    /// <summary>How the guest makes its hypercalls.</summary>
    public HypercallStyle HypercallStyle { get; init; } = HypercallStyle.Syscall;
}
