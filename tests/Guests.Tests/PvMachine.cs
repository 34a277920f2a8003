// An interpreter for the handful of x86 instructions that assembled guests use, and just enough of Xen to serve them: it runs
// a guest's image without a VM, so that every line of its console protocol can be tested, back-pressure and all.
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using Decoder = Iced.Intel.Decoder;

namespace XenSharp.Guests.Tests;

/// <summary>Why the guest stopped.</summary>
enum PvStop
{
    Shutdown,
    UndefinedInstruction,
    PageFault,
    OutOfSteps,
}

/// <summary>One domain, one vCPU, with MFN = PFN + <see cref="MfnBase"/>; its console's other end is in here too.</summary>
sealed class PvMachine
{
    public const ulong MfnBase = 0x500;
    const ulong VirtBase = 0xffffffff80000000;
    const ulong M2pBase = 0xffff830000000000;
    const ulong ClassicM2pBase = 0xffff800000000000;
    const ulong SharedInfoMaddr = 0x777000;
    const int ConsolePort = 3;
    const int Pages = 0x180;
    const ulong RingPfn = 0x150;
    const ulong StartInfoPfn = 0x151;
    const ulong StackPfn = 0x152;

    readonly byte[] memory = new byte[Pages * 4096];
    readonly byte[] sharedInfo = new byte[4096];
    readonly ulong[] registers = new ulong[16];
    readonly Dictionary<ulong, Instruction> decoded = [];
    readonly HypercallPage hypercallPage;
    ulong sharedInfoAddress;
    ulong rip;
    ulong flagResult;
    bool carry;
    bool zeroFromResult = true;

    public PvMachine(byte[] image)
    {
        ElfReader elf = new(image);
        foreach (ElfLoad load in elf.Loads)
            load.Contents.CopyTo(memory.AsSpan((int)load.PhysicalAddress));
        rip = elf.XenNumber((uint)XenElfNote.Entry);
        hypercallPage = new HypercallPage(
            elf.Notes.ContainsKey(("Xen", (uint)XenElfNote.HypercallPage)) ? elf.XenNumber((uint)XenElfNote.HypercallPage) : 0);
        ulong startInfo = VirtBase + StartInfoPfn * 4096;
        WriteMemory(startInfo + 40, 8, SharedInfoMaddr);
        WriteMemory(startInfo + 72, 8, RingPfn + MfnBase);
        WriteMemory(startInfo + 80, 4, ConsolePort);
        this[Register.RSI] = startInfo;
        this[Register.RSP] = VirtBase + (StackPfn + 1) * 4096;
    }

    readonly record struct HypercallPage(ulong Address)
    {
        public bool Holds(ulong address) => Address != 0 && address >= Address && address < Address + 4096;
    }

    /// <summary>What has been taken out of the console ring.</summary>
    public StringBuilder Output { get; } = new();

    /// <summary>Input that is put into the ring as room is made, when the guest polls.</summary>
    public Queue<byte> Input { get; } = [];

    /// <summary>Bytes of input handed over at one poll; the ring's size bounds it.</summary>
    public int InputBurst { get; set; } = 1024;

    /// <summary>How many bytes the console's other end takes at every yield of a guest that waits for room.</summary>
    public int DrainPerYield { get; set; } = 700;

    /// <summary>Whether XENMEM_machphys_mapping is answered; otherwise it is -ENOSYS and the table is at its classic address.</summary>
    public bool AnswersMachphysMapping { get; set; } = true;

    /// <summary>Whether the domain is the initial one, without a console ring.</summary>
    public bool InitialDomain
    {
        set => WriteMemory(VirtBase + StartInfoPfn * 4096 + 48, 4, value ? 3u : 0u);
    }

    /// <summary>Starts both indexes of both rings here, to cross their 32-bit end.</summary>
    public uint RingIndexes
    {
        set
        {
            foreach (int offset in (int[])[3072, 3076, 3080, 3084])
                WriteRing(offset, value);
        }
    }

    public int Yields { get; private set; }

    public int Sends { get; private set; }

    public uint ShutdownReason { get; private set; } = uint.MaxValue;

    public ulong FaultAddress { get; private set; }

    public ulong this[Register register]
    {
        get => registers[register.GetFullRegister() - Register.RAX] & Mask(register.GetSize());
        set
        {
            ref ulong full = ref registers[register.GetFullRegister() - Register.RAX];
            // Writing 32 bits clears the upper half; narrower writes keep the rest.
            full = register.GetSize() >= 4
                ? value & Mask(register.GetSize())
                : (full & ~Mask(register.GetSize())) | (value & Mask(register.GetSize()));
        }
    }

    /// <summary>Runs until the guest stops or the steps are used up.</summary>
    public PvStop Run(int steps = 20_000_000)
    {
        try
        {
            for (int i = 0; i < steps; i++)
            {
                if (hypercallPage.Holds(rip))
                {
                    Hypercall((uint)((rip - hypercallPage.Address) / 32));
                    if (ShutdownReason != uint.MaxValue)
                        return PvStop.Shutdown;
                    rip = Pop();
                    continue;
                }
                Instruction instruction = Decode();
                if (instruction.Mnemonic == Mnemonic.Ud2)
                    return PvStop.UndefinedInstruction;
                rip = instruction.NextIP;
                Execute(instruction);
                if (ShutdownReason != uint.MaxValue)
                    return PvStop.Shutdown;
            }
        }
        catch (PageFaultException fault)
        {
            FaultAddress = fault.Address;
            return PvStop.PageFault;
        }
        return PvStop.OutOfSteps;
    }

    sealed class PageFaultException(ulong address) : Exception
    {
        public ulong Address { get; } = address;
    }

    static ulong Mask(int size) => size == 8 ? ulong.MaxValue : (1ul << (size * 8)) - 1;

    Instruction Decode()
    {
        if (!decoded.TryGetValue(rip, out Instruction instruction))
        {
            byte[] bytes = Locate(rip, 1, out int at)[at..Math.Min(at + 15, memory.Length)];
            instruction = Decoder.Create(64, bytes, rip).Decode();
            decoded.Add(rip, instruction);
        }
        return instruction;
    }

    byte[] Locate(ulong address, int size, out int at)
    {
        if (sharedInfoAddress != 0 && address >= sharedInfoAddress && address + (ulong)size <= sharedInfoAddress + 4096)
        {
            at = (int)(address - sharedInfoAddress);
            return sharedInfo;
        }
        if (address < VirtBase || address + (ulong)size > VirtBase + (ulong)memory.Length)
            throw new PageFaultException(address);
        at = (int)(address - VirtBase);
        return memory;
    }

    ulong ReadMemory(ulong address, int size)
    {
        ulong table = AnswersMachphysMapping ? M2pBase : ClassicM2pBase;
        if (size == 8 && address >= table + MfnBase * 8 && address < table + (MfnBase + Pages) * 8)
            return (address - table) / 8 - MfnBase;
        byte[] bytes = Locate(address, size, out int at);
        ulong value = 0;
        for (int i = size - 1; i >= 0; i--)
            value = value << 8 | bytes[at + i];
        return value;
    }

    void WriteMemory(ulong address, int size, ulong value)
    {
        byte[] bytes = Locate(address, size, out int at);
        for (int i = 0; i < size; i++)
            bytes[at + i] = (byte)(value >> (8 * i));
    }

    uint ReadRing(int offset) => (uint)ReadMemory(VirtBase + RingPfn * 4096 + (ulong)offset, 4);

    void WriteRing(int offset, uint value) => WriteMemory(VirtBase + RingPfn * 4096 + (ulong)offset, 4, value);

    ulong Address(in Instruction instruction)
    {
        int operand = instruction.Op0Kind == OpKind.Memory ? 0 : 1;
        return instruction.GetVirtualAddress(operand, 0, (register, _, _) => register.IsSegmentRegister() ? 0 : this[register]);
    }

    static int Size(in Instruction instruction, int operand) => instruction.GetOpKind(operand) switch
    {
        OpKind.Register => instruction.GetOpRegister(operand).GetSize(),
        OpKind.Memory => instruction.MemorySize.GetSize(),
        _ => 8,
    };

    ulong Read(in Instruction instruction, int operand)
    {
        switch (instruction.GetOpKind(operand))
        {
            case OpKind.Register:
                return this[instruction.GetOpRegister(operand)];
            case OpKind.Memory:
                return ReadMemory(Address(instruction), instruction.MemorySize.GetSize());
            default:
                return instruction.GetImmediate(operand) & Mask(Size(instruction, 0));
        }
    }

    void Write(in Instruction instruction, ulong value)
    {
        if (instruction.GetOpKind(0) == OpKind.Register)
            this[instruction.GetOpRegister(0)] = value;
        else
            WriteMemory(Address(instruction), instruction.MemorySize.GetSize(), value);
    }

    ulong Pop()
    {
        ulong value = ReadMemory(this[Register.RSP], 8);
        this[Register.RSP] += 8;
        return value;
    }

    void Push(ulong value)
    {
        this[Register.RSP] -= 8;
        WriteMemory(this[Register.RSP], 8, value);
    }

    void SetFlags(ulong result, int size, bool newCarry)
    {
        flagResult = result & Mask(size);
        zeroFromResult = flagResult == 0;
        carry = newCarry;
    }

    void Execute(in Instruction instruction)
    {
        int size = instruction.OpCount > 0 ? Size(instruction, 0) : 8;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Nop:
                break;
            case Mnemonic.Mov:
                Write(instruction, Read(instruction, 1));
                break;
            case Mnemonic.Lea:
                this[instruction.Op0Register] = Address(instruction);
                break;
            case Mnemonic.Add:
                ulong sum = Read(instruction, 0) + Read(instruction, 1);
                SetFlags(sum, size, (sum & Mask(size)) < Read(instruction, 0));
                Write(instruction, sum);
                break;
            case Mnemonic.Sub or Mnemonic.Cmp:
                ulong left = Read(instruction, 0);
                ulong right = Read(instruction, 1);
                SetFlags(left - right, size, left < right);
                if (instruction.Mnemonic == Mnemonic.Sub)
                    Write(instruction, left - right);
                break;
            case Mnemonic.And or Mnemonic.Test:
                ulong and = Read(instruction, 0) & Read(instruction, 1);
                SetFlags(and, size, false);
                if (instruction.Mnemonic == Mnemonic.And)
                    Write(instruction, and);
                break;
            case Mnemonic.Or:
                SetFlags(Read(instruction, 0) | Read(instruction, 1), size, false);
                Write(instruction, flagResult);
                break;
            case Mnemonic.Xor:
                SetFlags(Read(instruction, 0) ^ Read(instruction, 1), size, false);
                Write(instruction, flagResult);
                break;
            case Mnemonic.Inc or Mnemonic.Dec:
                // These two leave the carry alone.
                SetFlags(Read(instruction, 0) + (instruction.Mnemonic == Mnemonic.Inc ? 1ul : ulong.MaxValue), size, carry);
                Write(instruction, flagResult);
                break;
            case Mnemonic.Shl:
                SetFlags(Read(instruction, 0) << (int)Read(instruction, 1), size, false);
                Write(instruction, flagResult);
                break;
            case Mnemonic.Btr:
                // With a register for the bit and memory for the string, the bit may be far from the address.
                ulong bit = Read(instruction, 1);
                ulong word = Address(instruction) + bit / 64 * 8;
                carry = (ReadMemory(word, 8) >> (int)(bit % 64) & 1) != 0;
                WriteMemory(word, 8, ReadMemory(word, 8) & ~(1ul << (int)(bit % 64)));
                break;
            case Mnemonic.Push:
                Push(Read(instruction, 0));
                break;
            case Mnemonic.Pop:
                Write(instruction, Pop());
                break;
            case Mnemonic.Call:
                Push(rip);
                rip = instruction.NearBranchTarget;
                break;
            case Mnemonic.Ret:
                rip = Pop();
                break;
            case Mnemonic.Jmp:
                rip = instruction.Op0Kind == OpKind.Register ? Read(instruction, 0) : instruction.NearBranchTarget;
                break;
            case Mnemonic.Syscall:
                Hypercall((uint)this[Register.RAX]);
                break;
            default:
                if (instruction.FlowControl != FlowControl.ConditionalBranch)
                    throw new NotSupportedException($"the test's interpreter does not know {instruction}");
                if (Taken(instruction.ConditionCode))
                    rip = instruction.NearBranchTarget;
                break;
        }
    }

    bool Taken(ConditionCode condition) => condition switch
    {
        ConditionCode.e => zeroFromResult,
        ConditionCode.ne => !zeroFromResult,
        ConditionCode.b => carry,
        ConditionCode.ae => !carry,
        ConditionCode.a => !carry && !zeroFromResult,
        ConditionCode.be => carry || zeroFromResult,
        _ => throw new NotSupportedException($"the test's interpreter does not know the condition {condition}"),
    };

    void Hypercall(uint number)
    {
        ulong operation = this[Register.RDI];
        ulong argument = this[Register.RSI];
        // What real hardware and Xen lose, the guest must not rely on.
        this[Register.RCX] = 0xbadbadbadbad;
        this[Register.R11] = 0xbadbadbadbad;
        ulong result = 0;
        switch ((number, operation))
        {
            case (12, 12) when AnswersMachphysMapping:
                WriteMemory(argument, 8, M2pBase);
                WriteMemory(argument + 8, 8, M2pBase + 0x100000);
                WriteMemory(argument + 16, 8, MfnBase + Pages);
                break;
            case (12, 12):
                result = unchecked((ulong)-38);
                break;
            case (14, _):
                Assert.That(argument, Is.EqualTo(SharedInfoMaddr | 0x63));
                Assert.That(operation % 4096, Is.Zero);
                Assert.That(this[Register.RDX], Is.EqualTo(2), "UVMF_INVLPG");
                sharedInfoAddress = operation;
                break;
            case (18, 0):
                for (ulong i = 0; i < argument; i++)
                    Output.Append((char)ReadMemory(this[Register.RDX] + i, 1));
                break;
            case (29, 0):
                Yields++;
                Drain(DrainPerYield);
                break;
            case (29, 2):
                ShutdownReason = (uint)ReadMemory(argument, 4);
                Drain(int.MaxValue);
                break;
            case (29, 3):
                Assert.That(ReadMemory(ReadMemory(argument, 8), 4), Is.EqualTo(ConsolePort));
                Assert.That(ReadMemory(argument + 8, 4), Is.EqualTo(1));
                Assert.That(ReadMemory(argument + 16, 8), Is.Zero, "no timeout");
                Assert.That(sharedInfo[2048] >> ConsolePort & 1, Is.Zero, "polling with the bit pending returns at once and spins");
                GiveInput();
                break;
            case (32, 4):
                Assert.That(ReadMemory(argument, 4), Is.EqualTo(ConsolePort));
                Sends++;
                break;
            default:
                throw new NotSupportedException($"the test's Xen does not know hypercall {number}, operation {operation}");
        }
        this[Register.RAX] = result;
    }

    void Drain(int bytes)
    {
        uint producer = ReadRing(3084);
        uint consumer = ReadRing(3080);
        Assert.That(producer - consumer, Is.LessThanOrEqualTo(2048), "the guest has overrun the ring");
        for (; consumer != producer && bytes > 0; consumer++, bytes--)
            Output.Append((char)ReadMemory(VirtBase + RingPfn * 4096 + 1024 + consumer % 2048, 1));
        WriteRing(3080, consumer);
    }

    void GiveInput()
    {
        Drain(int.MaxValue);
        Assert.That(Input, Is.Not.Empty, "the guest waits for input that will never come");
        uint producer = ReadRing(3076);
        uint consumer = ReadRing(3072);
        Assert.That(consumer, Is.EqualTo(producer), "the guest polls although there is input");
        for (int left = InputBurst; left > 0 && producer - consumer < 1024 && Input.TryDequeue(out byte next); left--, producer++)
            WriteMemory(VirtBase + RingPfn * 4096 + producer % 1024, 1, next);
        WriteRing(3076, producer);
        sharedInfo[2048] |= 1 << ConsolePort;
    }
}
