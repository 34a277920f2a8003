// What one vCPU puts into the ABI trace. All of it looks at the guest and changes nothing of it, not even an accessed bit.
using System.Runtime.CompilerServices;
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Core.Trace;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains.Trace;

/// <summary>A hypercall between its start and its end.</summary>
internal struct HypercallInProgress
{
    public ulong Start;
    public ulong Rip;
    public TraceFlags Flags;
    public int DataLength;
    public TraceRecord.DataBytes Data;
}

/// <summary>
/// The hooks of the run loop, on the vCPU's thread. What became of an exception is told from outside: by what was delivered to
/// the guest, and by the registers that changed.
/// </summary>
internal sealed unsafe class VcpuTrace
{
    private const int RaxIndex = 0, RcxIndex = 1, RdxIndex = 2, RbxIndex = 3, RspIndex = 4, RsiIndex = 6, RdiIndex = 7;
    private const int ForcedEmulationLength = 5;

    private readonly VcpuContext* _vcpu;
    private readonly TraceStream _stream;
    private readonly Func<ulong> _clock;
    private readonly TraceRecord _record = new();
    private readonly InstructionWindow _window = new();
    private readonly Decoder _decoder64;
    private readonly Decoder _decoder32;
    private CpuRegisters _before;
    private ulong* _entry;
    private bool _delivered;

    // What a continued hypercall left to do: one of the guest's own, and one within a multicall.
    private Remainder? _rest;
    private Remainder? _nestedRest;

    private readonly record struct Remainder(ulong Number, ulong Rip, HypercallArguments Arguments);

    /// <param name="vcpu">The vCPU's state; must stay where it is.</param>
    /// <param name="stream">Where its records go.</param>
    /// <param name="clock">Reads the TSC that the trace's times are in.</param>
    public VcpuTrace(VcpuContext* vcpu, TraceStream stream, Func<ulong> clock)
    {
        _vcpu = vcpu;
        _stream = stream;
        _clock = clock;
        _decoder64 = Decoder.Create(64, _window);
        _decoder32 = Decoder.Create(32, _window);
    }

    /// <summary>The guest is about to start.</summary>
    public void Boot()
    {
        Begin(TraceKind.Boot);
        End();
    }

    /// <summary>Before a hypercall is served.</summary>
    /// <param name="number">Its number.</param>
    /// <param name="arguments">Its arguments.</param>
    /// <param name="nested">Whether it is in a multicall.</param>
    public HypercallInProgress BeginHypercall(ulong number, in HypercallArguments arguments, bool nested)
    {
        var call = new HypercallInProgress { Rip = _vcpu->Registers->Rip, Flags = ModeFlag | (nested ? TraceFlags.Nested : TraceFlags.None) };
        ref Remainder? left = ref RemainderOf(nested);
        if (left is { } rest && rest.Number == number && rest.Rip == call.Rip && Same(rest.Arguments, arguments, ArgumentCount(number)))
        {
            call.Flags |= TraceFlags.Resumed;
            left = null;
        }

        call.DataLength = HypercallData.Find(number, arguments, out ulong address);
        if (call.DataLength > 0 && Peek(address, ((Span<byte>)call.Data)[..call.DataLength]))
            call.Flags |= TraceFlags.HasData;
        call.Start = _clock();
        return call;
    }

    /// <summary>After it was.</summary>
    public void EndHypercall(in HypercallInProgress call, ulong number, in HypercallArguments arguments, long result)
    {
        ulong end = _clock();
        _record.Kind = TraceKind.Hypercall;
        _record.Flags = call.Flags;
        _record.Start = call.Start;
        _record.Duration = end - call.Start;
        _record.Rip = call.Rip;
        _record.Number = number;
        _record.ArgumentCount = ArgumentCount(number);
        _record.Arguments = arguments;
        _record.Result = result;
        _record.DataLength = call.DataLength;
        _record.Data = call.Data;
        if (_vcpu->Continuation.Pending != 0)
        {
            _record.Flags |= TraceFlags.Continued;
            RemainderOf((call.Flags & TraceFlags.Nested) != 0) = new Remainder(number, call.Rip, _vcpu->Continuation.Arguments);
        }

        _stream.Append(_record);
    }

    /// <summary>A user process makes a system call; before it is bounced.</summary>
    public void BeginSystemCall()
    {
        Begin(TraceKind.SystemCall);
        CpuRegisters* registers = _vcpu->Registers;
        _record.Number = registers->Rax;
        _record.ArgumentCount = TraceRecord.MaxArguments;
        _record.Arguments = new HypercallArguments
        {
            A0 = registers->Rdi,
            A1 = registers->Rsi,
            A2 = registers->Rdx,
            A3 = registers->R10,
            A4 = registers->R8,
            A5 = registers->R9,
        };
    }

    /// <summary>Before the event callback is entered.</summary>
    public void BeginUpcall()
    {
        Begin(TraceKind.Upcall);
        _record.Address = _vcpu->State->EventCallback;
    }

    /// <summary>After it was, or could not be.</summary>
    public void EndUpcall(bool delivered)
    {
        _record.Outcome = delivered ? TraceOutcome.Delivered : TraceOutcome.Crashed;
        End();
    }

    /// <summary>Before an exception is looked at.</summary>
    /// <param name="vector">Its vector.</param>
    /// <param name="errorCode">Its error code, 0 for none.</param>
    /// <param name="faultAddress">For a page fault, CR2.</param>
    public void BeginTrap(ExceptionVector vector, uint errorCode, VirtualAddress faultAddress)
    {
        Begin(TraceKind.Exception);
        _record.Vector = (byte)vector;
        _record.ErrorCode = errorCode;
        _record.Address = faultAddress.Value;
        _record.InstructionLength = 0;
        _record.RegistersRead = 0;
        _entry = null;
        _delivered = false;
        _before = *_vcpu->Registers;
        if (vector is ExceptionVector.GeneralProtection or ExceptionVector.InvalidOpcode
            || (vector == ExceptionVector.PageFault && MayBeEmulated(faultAddress, (PageFaultError)errorCode)))
        {
            ReadInstruction();
        }

        // What the trace itself takes is not counted.
        _record.Start = _clock();
    }

    /// <summary>The guest was given an exception, as that which was begun or another, or a software interrupt.</summary>
    public void Delivered(ExceptionVector vector, uint errorCode)
    {
        _delivered = true;
        _record.DeliveredVector = (byte)vector;
        _record.DeliveredErrorCode = errorCode;
    }

    /// <summary>After the exception was served.</summary>
    /// <param name="crashed">The domain cannot go on.</param>
    public void EndTrap(bool crashed)
    {
        _record.Duration = _clock() - _record.Start;
        var vector = (ExceptionVector)_record.Vector;
        _record.RegistersWritten = Changed();
        if (_delivered)
            _record.Outcome = TraceOutcome.Delivered;
        else if (vector is ExceptionVector.GeneralProtection or ExceptionVector.InvalidOpcode ? !crashed : HasMoved)
            _record.Outcome = TraceOutcome.Emulated;
        else
            _record.Outcome = crashed ? TraceOutcome.Crashed : TraceOutcome.Retried;
        if (_record.Outcome == TraceOutcome.Emulated)
        {
            _record.Kind = TraceKind.Emulation;
            if (_entry != null)
            {
                _record.Flags |= TraceFlags.HasEntry;
                _record.EntryAfter = Volatile.Read(ref *_entry);
            }
        }

        _stream.Append(_record);
    }

    /// <summary>Ends what was begun last.</summary>
    public void End()
    {
        _record.Duration = _clock() - _record.Start;
        _stream.Append(_record);
    }

    private ref Remainder? RemainderOf(bool nested) => ref nested ? ref _nestedRest : ref _rest;

    private TraceFlags ModeFlag => _vcpu->State->KernelMode != 0 ? TraceFlags.KernelMode : TraceFlags.None;

    /// <summary>Whether the instruction was carried out, or an element of a repeated one.</summary>
    private bool HasMoved => _vcpu->Registers->Rip != _before.Rip || _vcpu->Registers->Rcx != _before.Rcx;

    private void Begin(TraceKind kind)
    {
        _record.Kind = kind;
        _record.Flags = ModeFlag;
        _record.Rip = _vcpu->Registers->Rip;
        _record.Start = _clock();
    }

    private static int ArgumentCount(ulong number)
    {
        HypercallEntry entry = HypercallTable.Find(number);
        return entry.Function == null ? TraceRecord.MaxArguments : entry.ArgumentCount;
    }

    private static bool Same(in HypercallArguments one, in HypercallArguments other, int count)
        => (count < 1 || one.A0 == other.A0) && (count < 2 || one.A1 == other.A1) && (count < 3 || one.A2 == other.A2)
            && (count < 4 || one.A3 == other.A3) && (count < 5 || one.A4 == other.A4) && (count < 6 || one.A5 == other.A5);

    private bool MayBeEmulated(VirtualAddress address, PageFaultError error)
    {
        if (address.IsHypervisorReserved)
            return true;
        if (_vcpu->State->KernelMode == 0 || (error & (PageFaultError.Present | PageFaultError.Write)) != (PageFaultError.Present | PageFaultError.Write)
            || !address.IsGuest)
        {
            return false;
        }

        _entry = (ulong*)Find(address.Value & ~7UL);
        _record.EntryBefore = _entry != null ? Volatile.Read(ref *_entry) : 0;
        return true;
    }

    private void ReadInstruction()
    {
        ushort cs = _vcpu->Segments->Cs;
        bool code32 = cs == FlatSelectors.Ring3Cs32;
        if (!code32 && (cs | 3) != FlatSelectors.Ring3Cs64)
            return;
        if (code32)
            _record.Flags |= TraceFlags.Code32;
        ulong rip = _before.Rip;
        Span<byte> bytes = _record.Instruction;
        int length = bytes.Length;
        if (!Peek(rip, bytes))
        {
            // It may end before a page that cannot be read.
            length = (int)Math.Min((ulong)length, Paging.PageSize - (rip & Paging.PageOffsetMask));
            if (!Peek(rip, bytes[..length]))
                return;
        }

        // The forced-emulation prefix belongs to what it stands before.
        int prefix = bytes[..length].StartsWith("\u000f\u000bxen"u8) ? ForcedEmulationLength : 0;
        _window.Clear();
        bytes[prefix..length].CopyTo(_window.Free);
        _window.Append(length - prefix);
        Decoder decoder = code32 ? _decoder32 : _decoder64;
        decoder.IP = rip + (ulong)prefix;
        decoder.Decode(out Instruction instruction);
        if (instruction.IsInvalid)
        {
            _record.InstructionLength = length;
            return;
        }

        _record.InstructionLength = prefix + instruction.Length;
        _record.RegistersRead = Operands(instruction);
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
        {
            if ((_record.RegistersRead & (1 << i)) != 0)
                _record.Before[i] = Value(_before, i);
        }
    }

    /// <summary>The registers that an instruction of those that are emulated takes its operands from.</summary>
    private static ushort Operands(in Instruction instruction)
    {
        int mask = Bit(instruction.MemoryBase) | Bit(instruction.MemoryIndex);
        for (int i = 0; i < instruction.OpCount; i++)
        {
            mask |= instruction.GetOpKind(i) switch
            {
                // The first is where these put what they read.
                OpKind.Register when i > 0 || instruction.Mnemonic is not (Mnemonic.Mov or Mnemonic.In) => Bit(instruction.GetOpRegister(i)),
                OpKind.MemoryESRDI or OpKind.MemoryESEDI => 1 << RdiIndex,
                OpKind.MemorySegRSI or OpKind.MemorySegESI => 1 << RsiIndex,
                _ => 0,
            };
        }

        if (instruction.HasRepPrefix || instruction.HasRepnePrefix)
            mask |= 1 << RcxIndex;
        mask |= instruction.Mnemonic switch
        {
            Mnemonic.Cpuid => (1 << RaxIndex) | (1 << RcxIndex),
            Mnemonic.Rdmsr => 1 << RcxIndex,
            Mnemonic.Wrmsr or Mnemonic.Xsetbv => (1 << RaxIndex) | (1 << RcxIndex) | (1 << RdxIndex),
            Mnemonic.Cmpxchg => 1 << RaxIndex,
            Mnemonic.Cmpxchg8b => (1 << RaxIndex) | (1 << RbxIndex) | (1 << RcxIndex) | (1 << RdxIndex),
            _ => 0,
        };
        return (ushort)mask;

        static int Bit(Register register) => register.IsGPR() ? 1 << (register.GetFullRegister() - Register.RAX) : 0;
    }

    /// <summary>The registers that have changed. The stack pointer is the bounce frame's affair.</summary>
    private ushort Changed()
    {
        int mask = 0;
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
        {
            ulong after = Value(*_vcpu->Registers, i);
            if (i == RspIndex || after == Value(_before, i))
                continue;
            mask |= 1 << i;
            _record.After[i] = after;
        }

        return (ushort)mask;
    }

    /// <summary>A register by the processor's number.</summary>
    private static ulong Value(in CpuRegisters registers, int number) => number switch
    {
        0 => registers.Rax,
        1 => registers.Rcx,
        2 => registers.Rdx,
        3 => registers.Rbx,
        4 => registers.Rsp,
        5 => registers.Rbp,
        6 => registers.Rsi,
        7 => registers.Rdi,
        8 => registers.R8,
        9 => registers.R9,
        10 => registers.R10,
        11 => registers.R11,
        12 => registers.R12,
        13 => registers.R13,
        14 => registers.R14,
        _ => registers.R15,
    };

    /// <summary>Copies guest memory that the current mode's tables map.</summary>
    /// <returns>False when some of it is not mapped.</returns>
    private bool Peek(ulong address, Span<byte> destination)
    {
        while (!destination.IsEmpty)
        {
            byte* from = Find(address);
            if (from == null)
                return false;
            int chunk = (int)Math.Min((ulong)destination.Length, Paging.PageSize - (address & Paging.PageOffsetMask));
            new ReadOnlySpan<byte>(from, chunk).CopyTo(destination);
            destination = destination[chunk..];
            address += (ulong)chunk;
        }

        return true;
    }

    /// <summary>Host address of guest memory, or null where it is not mapped.</summary>
    private byte* Find(ulong address)
    {
        var linear = new VirtualAddress(address);
        if (!linear.IsGuest)
            return null;
        PageTableEntry* entry = GuestAccess.FindEntry(_vcpu, linear);
        if (entry == null)
            return null;
        var leaf = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
        return leaf.IsPresent && _vcpu->Domain->Memory.Contains(leaf.Frame) ? _vcpu->Domain->Memory.Page(leaf.Frame) + linear.Offset : null;
    }
}
