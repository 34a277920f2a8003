// Writes of the guest kernel to page tables that it sees read-only: decoded, checked and performed (Xen's ro-page-fault.c).
using System.Buffers.Binary;
using System.Numerics;
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Performs a store into an L1 table that faulted because page tables are read-only.</summary>
public sealed unsafe class ReadOnlyPageFault(VcpuContext* vcpu)
{
    private readonly VcpuContext* _vcpu = vcpu;
    private readonly InstructionDecoder _decoder = new(vcpu);

    /// <summary>
    /// After a store that was not performed: where an operand that it reads could not be read, which is the fault that the guest gets;
    /// null where the fault is the one that there was.
    /// </summary>
    public VirtualAddress? UnreadableAddress { get; private set; }

    /// <summary>The store would do, but not yet: nothing was changed, and the guest is to execute the instruction again.</summary>
    public bool MustRetry { get; private set; }

    /// <summary>Tries to perform the store that raised a write-protection fault in kernel mode.</summary>
    /// <param name="fault">CR2.</param>
    /// <returns>
    /// True when it was performed and RIP is past it, or has to be tried again and nothing was changed; false when the fault is the
    /// guest's own.
    /// </returns>
    public bool TryEmulate(VirtualAddress fault)
    {
        UnreadableAddress = null;
        if (!fault.IsGuest || !TryHoldTable(fault, out Mfn table, out FrameInfo* info))
            return false;
        MustRetry = false;
        bool performed = TryPerform(fault, table);
        PageTables.LetGo(_vcpu, table, info);
        return performed || MustRetry;
    }

    private bool TryPerform(VirtualAddress fault, Mfn table)
    {
        if (!_decoder.TryDecode(out Instruction instruction) || !IsStore(instruction, out int size))
            return false;
        ulong address = DestinationAddress(instruction);
        if (((address ^ fault.Value) & ~Paging.PageOffsetMask) != 0)
        {
            // In FS or GS, whose base does not count here: what is there is read, and the store is refused.
            byte* operand = stackalloc byte[16];
            if (ReadsDestination(instruction))
                _ = TryReadOperand(address, operand, (ulong)size);
            return false;
        }

        if ((address & ((ulong)size - 1)) != 0)
            return false;
        var store = new Store { Table = table, Offset = (int)(address & Paging.PageOffsetMask), Size = size };
        ulong next = instruction.NextIP;
        if (!Perform(instruction, store, ref next))
            return false;
        if (!IsRepeated(instruction) || _vcpu->Registers->Rcx == 0)
            _vcpu->Registers->Rip = next;
        _vcpu->Registers->Rflags &= ~(ulong)Rflags.Resume;
        return true;
    }

    private readonly struct Store
    {
        public Mfn Table { get; init; }

        /// <summary>Byte offset in the table.</summary>
        public int Offset { get; init; }

        /// <summary>1, 2, 4 or 8 bytes, naturally aligned.</summary>
        public int Size { get; init; }

        public int Shift => (Offset & 7) * 8;

        public ulong Mask => Size == 8 ? ulong.MaxValue : (1UL << (Size * 8)) - 1;

        /// <summary>This part of an entry.</summary>
        public ulong Extract(PageTableEntry entry) => (entry.Value >> Shift) & Mask;

        /// <summary>The entry with this part replaced.</summary>
        public PageTableEntry Insert(PageTableEntry entry, ulong value)
            => new((entry.Value & ~(Mask << Shift)) | ((value & Mask) << Shift));
    }

    /// <summary>Holds the L1 table that the address is a read-only mapping of.</summary>
    private bool TryHoldTable(VirtualAddress fault, out Mfn table, out FrameInfo* info)
    {
        table = default;
        info = null;
        PageTableEntry* entry = GuestAccess.FindEntry(_vcpu, fault);
        if (entry == null || !entry->IsPresent || entry->IsWritable)
            return false;
        table = entry->Frame;
        info = PageTables.HoldL1(_vcpu, table);
        return info != null;
    }

    private static bool IsStore(in Instruction instruction, out int size)
    {
        size = instruction.Mnemonic switch
        {
            Mnemonic.Stosb or Mnemonic.Movsb => 1,
            Mnemonic.Stosw or Mnemonic.Movsw => 2,
            Mnemonic.Stosd => 4,
            Mnemonic.Stosq or Mnemonic.Movsq => 8,
            Mnemonic.Movsd when instruction.IsStringInstruction => 4,
            Mnemonic.Push or Mnemonic.Pushfq or Mnemonic.Call => -instruction.StackPointerIncrement,
            _ => instruction.Op0Kind == OpKind.Memory ? instruction.MemorySize.GetSize()
                : instruction.Mnemonic == Mnemonic.Xchg && instruction.Op1Kind == OpKind.Memory ? instruction.MemorySize.GetSize() : 0,
        };
        return (size is 1 or 2 or 4 or 8 || instruction.Mnemonic == Mnemonic.Cmpxchg16b)
            && (!instruction.IsStringInstruction || instruction.Op0Kind == OpKind.MemoryESRDI);
    }

    /// <summary>Whether what is stored depends on what was there.</summary>
    private static bool ReadsDestination(in Instruction instruction) => instruction.Mnemonic
        is not (Mnemonic.Mov or Mnemonic.Movnti or Mnemonic.Movbe or Mnemonic.Push or Mnemonic.Pushfq or Mnemonic.Call or Mnemonic.Pop)
        && !instruction.IsStringInstruction && instruction.ConditionCode == ConditionCode.None;

    private bool TryReadOperand(ulong address, void* to, ulong size)
    {
        if (GuestAccess.CopyFrom(_vcpu, address, to, size))
            return true;
        bool startReads = GuestAccess.Translate(_vcpu, address, write: false) != null;
        UnreadableAddress = new VirtualAddress(startReads ? (address | Paging.PageOffsetMask) + 1 : address);
        return false;
    }

    /// <summary>Both repeat prefixes mean the same for stores.</summary>
    private static bool IsRepeated(in Instruction instruction)
        => instruction.IsStringInstruction && (instruction.HasRepPrefix || instruction.HasRepnePrefix);

    /// <summary>The address without a segment's base: Xen's emulation knows of none.</summary>
    private ulong DestinationAddress(in Instruction instruction)
    {
        if (instruction.IsStringInstruction)
            return _vcpu->Registers->Rdi;
        if (instruction.Mnemonic is Mnemonic.Push or Mnemonic.Pushfq or Mnemonic.Call)
            return _vcpu->Registers->Rsp + (ulong)instruction.StackPointerIncrement;
        ulong address = _decoder.MemoryOffset(instruction);

        // POP's own operand is addressed with the stack pointer after it.
        if (instruction.Mnemonic == Mnemonic.Pop && instruction.MemoryBase == Register.RSP)
            address += (ulong)instruction.StackPointerIncrement;

        // A bit offset in a register reaches beyond the operand.
        if (instruction.Mnemonic is Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc && instruction.Op1Kind == OpKind.Register)
        {
            int size = instruction.MemorySize.GetSize();
            long bit = size switch
            {
                2 => (short)_decoder.ReadRegister(instruction.Op1Register),
                4 => (int)_decoder.ReadRegister(instruction.Op1Register),
                _ => (long)_decoder.ReadRegister(instruction.Op1Register),
            };
            address += (ulong)((bit >> (BitOperations.Log2((uint)size) + 3)) * size);
        }

        return address;
    }

    private ulong Source(in Instruction instruction, int operand) => instruction.GetOpKind(operand) switch
    {
        OpKind.Register when InstructionDecoder.IsGeneralPurpose(instruction.GetOpRegister(operand)) => _decoder.ReadRegister(instruction.GetOpRegister(operand)),
        OpKind.Register => 0,
        _ => instruction.GetImmediate(operand),
    };

    private bool Perform(in Instruction instruction, in Store store, ref ulong next)
    {
        PageTableEntry* entry = _vcpu->Domain->Memory.Table(store.Table) + (store.Offset / sizeof(ulong));
        ulong flags = _vcpu->Registers->Rflags;

        // Repeated no times it stores nothing, and cannot have faulted: the code was changed under the processor's feet.
        if (IsRepeated(instruction) && _vcpu->Registers->Rcx == 0)
            return false;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov or Mnemonic.Movnti:
                return HasPlainSource(instruction) && Write(entry, store, Source(instruction, 1));
            case Mnemonic.Stosb or Mnemonic.Stosw or Mnemonic.Stosd or Mnemonic.Stosq:
                return Write(entry, store, _vcpu->Registers->Rax) && AdvanceString(instruction, store.Size, moves: false);
            case Mnemonic.Movsb or Mnemonic.Movsw or Mnemonic.Movsd or Mnemonic.Movsq:
                return WriteFromMemory(instruction, entry, store);
            case Mnemonic.Cmpxchg:
                return CompareExchange(instruction, entry, store);
            case Mnemonic.Cmpxchg8b:
                return CompareExchange8Bytes(entry, store);
            case Mnemonic.Cmpxchg16b:
                return CompareExchange16Bytes(entry);
            case Mnemonic.Movbe:
                return Write(entry, store, BinaryPrimitives.ReverseEndianness(Source(instruction, 1)) >> (64 - (store.Size * 8)));
            case Mnemonic.Push or Mnemonic.Pushfq or Mnemonic.Call:
                return Push(instruction, entry, store, ref next);
            case Mnemonic.Pop:
                return Pop(instruction, entry, store);
            case var _ when instruction.ConditionCode != ConditionCode.None && instruction.OpCount == 1:
                return Write(entry, store, Arithmetic.Holds(instruction.ConditionCode, flags) ? 1UL : 0);
        }

        // All others read, compute and store: atomically, locked or not.
        while (true)
        {
            var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
            ulong before = store.Extract(old);
            if (!TryCompute(instruction, store.Size, before, ref flags, out ulong after))
                return false;
            StoreResult result = Replace(entry, store, old, store.Insert(old, after));
            if (result == StoreResult.Changed)
            {
                flags = _vcpu->Registers->Rflags;
                continue;
            }

            if (result == StoreResult.Refused)
                return false;
            if (instruction.Mnemonic is Mnemonic.Xchg or Mnemonic.Xadd)
                _decoder.WriteRegister(instruction.Op0Kind == OpKind.Register ? instruction.Op0Register : instruction.Op1Register, before);
            _vcpu->Registers->Rflags = flags;
            return true;
        }
    }

    private static bool HasPlainSource(in Instruction instruction)
        => instruction.Op1Kind != OpKind.Register || InstructionDecoder.IsGeneralPurpose(instruction.Op1Register);

    private bool TryCompute(in Instruction instruction, int size, ulong value, ref ulong flags, out ulong result)
    {
        result = 0;
        ulong source = instruction.OpCount > 1
            ? Source(instruction, instruction.Op0Kind == OpKind.Register ? 0 : 1)
            : 0;
        int bits = size * 8;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Xchg:
                result = source;
                return true;
            case Mnemonic.Add or Mnemonic.Xadd:
                result = Arithmetic.Add(value, source, bits, ref flags);
                return true;
            case Mnemonic.Sub:
                result = Arithmetic.Subtract(value, source, bits, ref flags);
                return true;
            case Mnemonic.Adc:
                result = Arithmetic.Add(value, source, bits, ref flags, (flags & (ulong)Rflags.Carry) != 0);
                return true;
            case Mnemonic.Sbb:
                result = Arithmetic.Subtract(value, source, bits, ref flags, (flags & (ulong)Rflags.Carry) != 0);
                return true;
            case Mnemonic.And:
                result = Arithmetic.Logic(value & source, bits, ref flags);
                return true;
            case Mnemonic.Or:
                result = Arithmetic.Logic(value | source, bits, ref flags);
                return true;
            case Mnemonic.Xor:
                result = Arithmetic.Logic(value ^ source, bits, ref flags);
                return true;
            case Mnemonic.Not:
                result = ~value;
                return true;
            case Mnemonic.Neg:
                result = Arithmetic.Subtract(0, value, bits, ref flags);
                return true;
            case Mnemonic.Inc or Mnemonic.Dec:
                ulong carry = flags & (ulong)Rflags.Carry;
                result = instruction.Mnemonic == Mnemonic.Inc
                    ? Arithmetic.Add(value, 1, bits, ref flags)
                    : Arithmetic.Subtract(value, 1, bits, ref flags);
                flags = (flags & ~(ulong)Rflags.Carry) | carry;
                return true;
            case Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc:
                ulong bit = 1UL << (int)(source & (ulong)(bits - 1));
                flags = (flags & ~(ulong)Rflags.Carry) | ((value & bit) != 0 ? (ulong)Rflags.Carry : 0);
                result = instruction.Mnemonic switch
                {
                    Mnemonic.Bts => value | bit,
                    Mnemonic.Btr => value & ~bit,
                    _ => value ^ bit,
                };
                return true;
            case Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar:
                result = Arithmetic.Shift(instruction.Mnemonic, value, (int)(byte)source, bits, ref flags);
                return true;
            case Mnemonic.Shld or Mnemonic.Shrd:
                result = Arithmetic.DoubleShift(instruction.Mnemonic, value, source, (int)(byte)Source(instruction, 2), bits, ref flags);
                return true;
            default:
                return false;
        }
    }

    private bool WriteFromMemory(in Instruction instruction, PageTableEntry* entry, in Store store)
    {
        ulong value = 0;
        return TryReadOperand(_vcpu->Registers->Rsi, &value, (ulong)store.Size)
            && Write(entry, store, value)
            && AdvanceString(instruction, store.Size, moves: true);
    }

    /// <summary>One element of a string store; with REP the instruction is entered again for the next.</summary>
    private bool AdvanceString(in Instruction instruction, int size, bool moves)
    {
        CpuRegisters* registers = _vcpu->Registers;
        ulong step = (registers->Rflags & (ulong)Rflags.Direction) != 0 ? (ulong)-size : (ulong)size;
        registers->Rdi += step;
        if (moves)
            registers->Rsi += step;
        if (IsRepeated(instruction))
            registers->Rcx--;
        return true;
    }

    /// <summary>A push, also of the address that a call comes back to.</summary>
    private bool Push(in Instruction instruction, PageTableEntry* entry, in Store store, ref ulong next)
    {
        CpuRegisters* registers = _vcpu->Registers;
        ulong operand = 0;
        switch (instruction.OpCount == 0 ? OpKind.Register : instruction.Op0Kind)
        {
            case OpKind.Register when instruction.OpCount == 0:
                break;
            case OpKind.Register when !InstructionDecoder.IsGeneralPurpose(instruction.Op0Register):
                return false;
            case OpKind.Register:
                operand = _decoder.ReadRegister(instruction.Op0Register);
                break;
            case OpKind.Memory:
                if (!TryReadOperand(_decoder.MemoryOffset(instruction), &operand, (ulong)store.Size))
                    return false;
                break;
            case OpKind.NearBranch64:
                operand = instruction.NearBranchTarget;
                break;
            case OpKind.FarBranch16 or OpKind.FarBranch32:
                return false;
            default:
                operand = instruction.GetImmediate(0);
                break;
        }

        ulong value = instruction.Mnemonic switch
        {
            Mnemonic.Call => instruction.NextIP,
            Mnemonic.Pushfq => registers->Rflags & ~(ulong)(Rflags.Resume | Rflags.Virtual8086),
            _ => operand,
        };
        if (instruction.IsCallFarIndirect || !Write(entry, store, value))
            return false;
        registers->Rsp -= (ulong)store.Size;
        if (instruction.Mnemonic == Mnemonic.Call)
            next = operand;
        return true;
    }

    private bool Pop(in Instruction instruction, PageTableEntry* entry, in Store store)
    {
        ulong value = 0;
        if (!GuestAccess.CopyFrom(_vcpu, _vcpu->Registers->Rsp, &value, (ulong)store.Size) || !Write(entry, store, value))
            return false;
        _vcpu->Registers->Rsp += (ulong)instruction.StackPointerIncrement;
        return true;
    }

    private bool CompareExchange(in Instruction instruction, PageTableEntry* entry, in Store store)
    {
        Register accumulator = store.Size switch
        {
            1 => Register.AL,
            2 => Register.AX,
            4 => Register.EAX,
            _ => Register.RAX,
        };
        ulong expected = _decoder.ReadRegister(accumulator);
        while (true)
        {
            var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
            ulong found = store.Extract(old);
            ulong flags = _vcpu->Registers->Rflags;
            _ = Arithmetic.Subtract(expected, found, store.Size * 8, ref flags);
            if (found != expected)
            {
                _decoder.WriteRegister(accumulator, found);
                _vcpu->Registers->Rflags = flags;
                return true;
            }

            StoreResult result = Replace(entry, store, old, store.Insert(old, _decoder.ReadRegister(instruction.Op1Register)));
            if (result == StoreResult.Changed)
                continue;
            if (result == StoreResult.Done)
                _vcpu->Registers->Rflags = flags;
            return result == StoreResult.Done;
        }
    }

    private bool CompareExchange8Bytes(PageTableEntry* entry, in Store store)
    {
        CpuRegisters* registers = _vcpu->Registers;
        ulong expected = (registers->Rdx << 32) | (uint)registers->Rax;
        while (true)
        {
            var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
            if (old.Value != expected)
            {
                registers->Rax = (uint)old.Value;
                registers->Rdx = old.Value >> 32;
                registers->Rflags &= ~(ulong)Rflags.Zero;
                return true;
            }

            StoreResult result = Replace(entry, store, old, new PageTableEntry((registers->Rcx << 32) | (uint)registers->Rbx));
            if (result == StoreResult.Changed)
                continue;
            if (result == StoreResult.Done)
                registers->Rflags |= (ulong)Rflags.Zero;
            return result == StoreResult.Done;
        }
    }

    /// <summary>Two entries are never exchanged in one, but may be compared.</summary>
    private bool CompareExchange16Bytes(PageTableEntry* entry)
    {
        CpuRegisters* registers = _vcpu->Registers;
        ulong low = Volatile.Read(ref *(ulong*)entry);
        ulong high = Volatile.Read(ref *(ulong*)(entry + 1));
        if (low == registers->Rax && high == registers->Rdx)
            return false;
        (registers->Rax, registers->Rdx) = (low, high);
        registers->Rflags &= ~(ulong)Rflags.Zero;
        return true;
    }

    private bool Write(PageTableEntry* entry, in Store store, ulong value)
    {
        while (true)
        {
            var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
            StoreResult result = Replace(entry, store, old, store.Insert(old, value));
            if (result != StoreResult.Changed)
                return result == StoreResult.Done;
        }
    }

    private enum StoreResult
    {
        Done,

        /// <summary>The entry is not what it was: compute again.</summary>
        Changed,

        /// <summary>The new entry is not one that the guest may have.</summary>
        Refused,
    }

    /// <summary>Checks the new entry, takes its references, stores it if the old one is still there, drops the old one's.</summary>
    private StoreResult Replace(PageTableEntry* entry, in Store store, PageTableEntry old, PageTableEntry value)
    {
        Errno error = PageTables.ReferenceL1(_vcpu, ref value);
        if (error != Errno.None)
        {
            MustRetry = error == Errno.ERESTART;
            return StoreResult.Refused;
        }

        MachineAddress address = store.Table.Address + ((ulong)store.Offset & ~7UL);
        if (_vcpu->PageTableWrites->CompareExchange(entry, address, value, old) != old)
        {
            PageTables.ReleaseL1(_vcpu, value);
            return StoreResult.Changed;
        }

        PageTables.ReleaseL1(_vcpu, old);
        return StoreResult.Done;
    }
}
