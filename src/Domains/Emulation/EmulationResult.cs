// What became of an instruction that the guest could not execute by itself.
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>How an emulation ended.</summary>
public enum EmulationOutcome
{
    /// <summary>The registers are as the instruction left them: enter the guest.</summary>
    Done,

    /// <summary>The guest is to get an exception or a software interrupt; the registers are as its frame must show them.</summary>
    Exception,

    /// <summary>A SYSCALL of 32-bit code; the registers are as the processor leaves them at its entry, CS stands for 32-bit code.</summary>
    SystemCall,

    /// <summary>A SYSENTER; the registers are as Xen shows them: nothing is known of where it came from.</summary>
    SystemEnter,

    /// <summary>Nothing was changed: what the processor raised goes to the guest as it is.</summary>
    NotHandled,
}

/// <summary>The answer of <see cref="PrivilegedEmulator"/>.</summary>
/// <param name="Outcome">How it ended.</param>
/// <param name="Vector">For <see cref="EmulationOutcome.Exception"/>, the vector; any of 0–255 for a software interrupt.</param>
/// <param name="ErrorCode">
/// What the processor would push at CPL 3, for a vector that has an error code. For a page fault that includes
/// <see cref="PageFaultError.User"/>: the bounce clears it in guest-kernel mode as it does for a fault of the processor's.
/// </param>
/// <param name="FaultAddress">For a page fault, what CR2 would hold.</param>
/// <param name="IsSoftwareInterrupt">
/// The instruction was <c>int n</c>, allowed by the trap table: no error code, RIP is past it, entry <c>Vector</c> decides.
/// </param>
public readonly record struct EmulationResult(
    EmulationOutcome Outcome,
    ExceptionVector Vector = 0,
    uint ErrorCode = 0,
    ulong FaultAddress = 0,
    bool IsSoftwareInterrupt = false)
{
    public static readonly EmulationResult Done = new(EmulationOutcome.Done);

    public static readonly EmulationResult NotHandled = new(EmulationOutcome.NotHandled);

    public static readonly EmulationResult SystemCall = new(EmulationOutcome.SystemCall);

    public static readonly EmulationResult SystemEnter = new(EmulationOutcome.SystemEnter);

    /// <summary>#GP(0).</summary>
    public static readonly EmulationResult GeneralProtection = Raise(ExceptionVector.GeneralProtection);

    /// <summary>#UD.</summary>
    public static readonly EmulationResult InvalidOpcode = Raise(ExceptionVector.InvalidOpcode);

    public static EmulationResult Raise(ExceptionVector vector, uint errorCode = 0)
        => new(EmulationOutcome.Exception, vector, errorCode);

    public static EmulationResult PageFault(ulong address, PageFaultError error)
        => new(EmulationOutcome.Exception, ExceptionVector.PageFault, (uint)error, address);

    public static EmulationResult SoftwareInterrupt(byte vector)
        => new(EmulationOutcome.Exception, (ExceptionVector)vector, IsSoftwareInterrupt: true);
}
