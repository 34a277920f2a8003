// One entry of an ABI trace, as the recording side fills it in and as the reading side gets it back.
using System.Runtime.CompilerServices;

namespace XenSharp.Core.Trace;

/// <summary>What a record is about.</summary>
public enum TraceKind : byte
{
    /// <summary>A domain is about to execute its first instruction; a trace of a guest that reboots has several.</summary>
    Boot = 1,

    /// <summary>A hypercall, of the guest kernel's or in a multicall of it.</summary>
    Hypercall = 2,

    /// <summary>An exception, and what became of it; software interrupts and NMIs come here too.</summary>
    Exception = 3,

    /// <summary>The event callback was entered.</summary>
    Upcall = 4,

    /// <summary>An instruction that was carried out for the guest: privileged, a store to a page table, a read of the M2P.</summary>
    Emulation = 5,

    /// <summary>A system call of a user process, bounced to the guest kernel.</summary>
    SystemCall = 6,
}

/// <summary>What holds of a record beside its kind.</summary>
[Flags]
public enum TraceFlags : byte
{
    None = 0,

    /// <summary>The vCPU was in guest-kernel mode when it began.</summary>
    KernelMode = 1 << 0,

    /// <summary>A hypercall within a multicall.</summary>
    Nested = 1 << 1,

    /// <summary>The hypercall stopped part-way, and is to be issued again for the rest.</summary>
    Continued = 1 << 2,

    /// <summary>The hypercall goes on with what one before it left.</summary>
    Resumed = 1 << 3,

    /// <summary><see cref="TraceRecord.Data"/> was read from the guest's memory.</summary>
    HasData = 1 << 4,

    /// <summary>The instruction stored to a page table: the entry before and after are there.</summary>
    HasEntry = 1 << 5,

    /// <summary>The instruction is 32-bit code.</summary>
    Code32 = 1 << 6,
}

/// <summary>How an exception, an upcall or an emulation ended.</summary>
public enum TraceOutcome : byte
{
    /// <summary>The guest was given <see cref="TraceRecord.DeliveredVector"/>, or the upcall.</summary>
    Delivered = 1,

    /// <summary>The instruction was carried out.</summary>
    Emulated = 2,

    /// <summary>Nothing was wrong any more: the guest tries again (a stale translation), or goes on.</summary>
    Retried = 3,

    /// <summary>The domain could not go on.</summary>
    Crashed = 4,
}

/// <summary>
/// One record. Which members count depends on <see cref="Kind"/>; the others keep what they had, so that a record can be used
/// again and again without being cleared.
/// </summary>
public sealed class TraceRecord
{
    /// <summary>Most arguments of a hypercall.</summary>
    public const int MaxArguments = 6;

    /// <summary>Most bytes of an instruction.</summary>
    public const int MaxInstructionBytes = 15;

    /// <summary>Most bytes of guest memory with a hypercall.</summary>
    public const int MaxDataBytes = 24;

    /// <summary>General-purpose registers, numbered as the processor encodes them: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.</summary>
    public const int RegisterCount = 16;

    public TraceKind Kind { get; set; }

    public TraceFlags Flags { get; set; }

    /// <summary>The vCPU's number.</summary>
    public ushort Vcpu { get; set; }

    /// <summary>Host TSC when serving it began.</summary>
    public ulong Start { get; set; }

    /// <summary>TSC ticks that serving it took, the way out of the VM and back into it not included.</summary>
    public ulong Duration { get; set; }

    /// <summary>The guest's RIP: after the SYSCALL, on the instruction that faulted, at what was interrupted.</summary>
    public ulong Rip { get; set; }

    /// <summary>Hypercall or system call: its number.</summary>
    public ulong Number { get; set; }

    /// <summary>Hypercall or system call: how many of <see cref="Arguments"/> count.</summary>
    public int ArgumentCount { get; set; }

    /// <summary>Hypercall or system call: the arguments.</summary>
    public HypercallArguments Arguments;

    /// <summary>Hypercall: what was returned. Without meaning for one that is <see cref="TraceFlags.Continued"/>.</summary>
    public long Result { get; set; }

    /// <summary>Hypercall with <see cref="TraceFlags.HasData"/>: how many bytes of <see cref="Data"/> count.</summary>
    public int DataLength { get; set; }

    /// <summary>Hypercall with <see cref="TraceFlags.HasData"/>: the first element of what an argument points to.</summary>
    public DataBytes Data;

    /// <summary>Exception or emulation: the vector that the processor raised.</summary>
    public byte Vector { get; set; }

    /// <summary>Exception or emulation: its error code, 0 for none.</summary>
    public uint ErrorCode { get; set; }

    /// <summary>Page fault: CR2. Upcall: the event callback.</summary>
    public ulong Address { get; set; }

    /// <summary>Exception, emulation or upcall: how it ended.</summary>
    public TraceOutcome Outcome { get; set; }

    /// <summary>Exception with <see cref="TraceOutcome.Delivered"/>: the vector that the guest was given.</summary>
    public byte DeliveredVector { get; set; }

    /// <summary>Exception with <see cref="TraceOutcome.Delivered"/>: the error code that the guest was given, 0 for none.</summary>
    public uint DeliveredErrorCode { get; set; }

    /// <summary>Exception or emulation: how many of <see cref="Instruction"/> count, 0 where the instruction is not known.</summary>
    public int InstructionLength { get; set; }

    /// <summary>Exception or emulation: the instruction's bytes.</summary>
    public InstructionBytes Instruction;

    /// <summary>Exception or emulation: the registers that the instruction works on, bit n for register n.</summary>
    public ushort RegistersRead { get; set; }

    /// <summary>Their values before.</summary>
    public RegisterValues Before;

    /// <summary>Exception or emulation: the registers that were changed (RIP and RSP left out).</summary>
    public ushort RegistersWritten { get; set; }

    /// <summary>Their values after.</summary>
    public RegisterValues After;

    /// <summary>With <see cref="TraceFlags.HasEntry"/>: the page-table entry before.</summary>
    public ulong EntryBefore { get; set; }

    /// <summary>With <see cref="TraceFlags.HasEntry"/>: the page-table entry after.</summary>
    public ulong EntryAfter { get; set; }

    /// <summary>Whether a flag is set.</summary>
    public bool Has(TraceFlags flag) => (Flags & flag) != 0;

    [InlineArray(MaxDataBytes)]
    public struct DataBytes
    {
        private byte _element;
    }

    [InlineArray(MaxInstructionBytes)]
    public struct InstructionBytes
    {
        private byte _element;
    }

    [InlineArray(RegisterCount)]
    public struct RegisterValues
    {
        private ulong _element;
    }
}
