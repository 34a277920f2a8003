// Two machines that are alike, and random steps that have to leave them alike.
using XenSharp.Core;
using XenSharp.Mmu;
using XenSharp.Mmu.Tests;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Freestanding.Tests;

/// <summary>The machines differ in where their memory lies in this process, and in whose code works on it.</summary>
internal sealed unsafe class MachinePair : IDisposable
{
    private const int FrameCount = 40;
    private const int OwnedAtFirst = 36;
    private const ulong Stack = DataAddress + 0x3000;
    private const ulong Handler = 0xffff_ffff_8100_0000;
    private const ulong GsOfKernel = 0xffff_8880_0000_0000;

    private readonly CodeInside _inside;
    private readonly Outcomes _outcomes;
    private readonly TestMachine _one;
    private readonly TestMachine _other;
    private ulong _random;

    public MachinePair(CodeInside inside, bool inGuest, Outcomes outcomes)
    {
        _inside = inside;
        _outcomes = outcomes;
        _one = Build(inGuest);
        _other = Build(inGuest);
        Compare("start");
    }

    public void Step(ulong random)
    {
        _random = random;
        switch (Next(24))
        {
            case < 6:
                UpdateEntries();
                break;
            case < 8:
                UpdateByAddress();
                break;
            case < 12:
                Extended();
                break;
            case 12:
                SetGdt();
                break;
            case 13:
                UpdateDescriptor();
                break;
            case 14:
                Call(HotOperation.StackSwitch, new HypercallArguments { A0 = (ulong)Next(0x10000), A1 = StackPointer() });
                break;
            case 15:
                SetSegmentBase();
                break;
            case < 20:
                Enter();
                break;
            case < 22:
                Return();
                break;
            default:
                Store();
                break;
        }

        foreach (TestMachine machine in Both)
        {
            machine.Queue->Count = 0;
            machine.Queue->Overflowed = 0;
            machine.Queue->FlushPending = 0;
        }
    }

    public void Dispose()
    {
        _one.Dispose();
        _other.Dispose();
    }

    private TestMachine[] Both => [_one, _other];

    /// <summary>
    /// The boot address space, for user mode too, and a second tree: a root in frame 8 down to two L1 tables that map a dozen pages.
    /// </summary>
    private static TestMachine Build(bool inGuest)
    {
        var machine = new TestMachine(FrameCount, OwnedAtFirst, inGuest);
        const int root = FirstPlayFrame;
        const int l2 = root + 2;
        *machine.Entry(root, 0) = new PageTableEntry(Frame(1), Branch);
        *machine.Entry(root, 1) = new PageTableEntry(Frame(root + 1), Branch);
        *machine.Entry(root + 1, 1) = new PageTableEntry(Frame(l2), Branch);
        for (int table = 0; table < 2; table++)
        {
            int l1 = l2 + 1 + table;
            *machine.Entry(l2, 1 + table) = new PageTableEntry(Frame(l1), Branch);
            for (int i = 1; i < 7; i++)
                *machine.Entry(l1, i) = new PageTableEntry(Frame(l2 + 2 + i + (6 * table)), i < 5 ? Leaf : ReadOnly);
        }

        machine.Link(0, 1, root + 1);
        Assert.That(machine.Extended(15, Frame(0).Value), Is.Zero, "a root of user mode");
        VcpuState* state = machine.Vcpu->State;
        state->EventCallback = Handler;
        state->SyscallCallback = Handler + 0x100;
        state->SysenterCallback = Handler + 0x200;
        state->KernelSp = Stack + 0xf00;
        state->KernelSs = FlatSelectors.Ring3Data;
        state->InactiveGsBase = GsOfKernel;
        for (int vector = 0; vector < 20; vector++)
        {
            state->Traps[vector] = new TrapInfo
            {
                Vector = (byte)vector,
                Flags = (byte)(vector & 4),
                Cs = FlatSelectors.Ring3Cs64,
                Address = Handler + ((ulong)vector << 4),
            };
        }

        machine.Vcpu->Segments->Cs = FlatSelectors.Ring3Cs64;
        machine.Vcpu->Segments->Ss = FlatSelectors.Ring3Data;
        return machine;
    }

    private int Next(int count)
    {
        // Each step has 64 random bits; mixing them again gives as many choices as it takes.
        _random = (_random ^ (_random >> 29)) * 0x9e37_79b9_7f4a_7c15;
        return (int)((_random >> 33) % (ulong)count);
    }

    private ulong Bits()
    {
        _ = Next(2);
        return _random;
    }

    private bool Rarely() => Next(16) == 0;

    private int PlayFrame() => FirstPlayFrame + Next(FrameCount - FirstPlayFrame);

    /// <summary>Seldom one of the boot address space, whose loss ends most of what a run can do.</summary>
    private Mfn AnyFrame() => Next(400) switch { 0 => Frame(Next(FirstPlayFrame)), < 20 => new Mfn(0x77), _ => Frame(PlayFrame()) };

    private int Index() => Next(12) switch { < 9 => 1 + Next(6), 9 => 256, 10 => 271, _ => 511 };

    private PageTableEntry AnyEntry()
    {
        PageFlags flags = Next(8) == 0 ? PageFlags.None : PageFlags.Present;
        foreach (PageFlags flag in (PageFlags[])[PageFlags.User, PageFlags.Accessed, PageFlags.Writable])
        {
            if (Next(2) == 0)
                flags |= flag;
        }

        if (Next(4) == 0)
            flags |= PageFlags.NoExecute;
        if (Next(12) == 0)
            flags |= (PageFlags)(1UL << (3 + Next(6)));
        return new PageTableEntry(AnyFrame(), flags);
    }

    private ulong StackPointer() => Rarely() ? 0x1234_5000 : Stack + 0x800 + (ulong)(Next(64) * 8);

    /// <summary>Puts words where both guests read their arguments, or their stack.</summary>
    private void Put(ulong address, params ReadOnlySpan<ulong> words)
    {
        foreach (TestMachine machine in Both)
            words.CopyTo(new Span<ulong>(machine.Data + (address - DataAddress), words.Length));
    }

    private void UpdateEntries()
    {
        int count = Rarely() ? 0 : 1 + Next(4);
        var words = new ulong[2 * count];
        for (int i = 0; i < count; i++)
        {
            ulong command = Next(8) switch { 0 => 1UL, 1 => (ulong)Next(8), 2 => 2UL, _ => 0UL };
            words[2 * i] = (AnyFrame().Address + ((ulong)Index() * 8)).Value | command;
            words[(2 * i) + 1] = command == 1 ? (ulong)Next(1000) : AnyEntry().Value;
        }

        Put(DataAddress, words);
        ulong domain = Rarely() ? (ulong)Next(8) << 16 | DomainId.Io.Value : DomainId.Self.Value;
        var arguments = new HypercallArguments { A0 = Arguments(), A1 = (ulong)count, A2 = DoneCount(), A3 = domain };
        Call(HotOperation.MmuUpdate, arguments, mayStop: true);
    }

    private ulong Arguments() => Rarely() ? 0x7777_0000 : DataAddress;

    private ulong DoneCount() => Next(4) switch { 0 => 0, 1 => 0x7777_0000, _ => DataAddress + 0x800 };

    private void UpdateByAddress()
    {
        ulong address = (1UL << 39) + (1UL << 30) + ((ulong)(1 + Next(2)) << 21) + ((ulong)Index() << 12);
        if (Rarely())
            address = Bits();
        ulong flags = Next(4) == 0 ? DataAddress + 0x810 + (ulong)Next(4) : (ulong)Next(8);
        Put(DataAddress + 0x810, Bits());
        var arguments = new HypercallArguments { A0 = address, A1 = AnyEntry().Value, A2 = flags, A3 = DomainId.Self.Value };
        if (Next(4) != 0)
        {
            Call(HotOperation.UpdateVaMapping, arguments);
            return;
        }

        if (Next(4) == 0)
            arguments.A3 = (ulong)Next(0x8000);
        Call(HotOperation.UpdateVaMappingOtherdomain, arguments);
    }

    private void Extended()
    {
        int count = Rarely() ? 0 : 1 + Next(3);
        var words = new ulong[3 * count];
        for (int i = 0; i < count; i++)
        {
            ulong command = Next(3) switch { 0 => (ulong)Next(4), 1 => 4, _ => (ulong)Next(22) };
            words[3 * i] = command;

            // Whole trees, and any frame as anything.
            words[(3 * i) + 1] = command switch
            {
                3 or 4 or 5 or 15 when Next(2) == 0 => Frame(Next(2) * FirstPlayFrame).Value,
                13 when Next(2) == 0 => DataAddress,
                _ => AnyFrame().Value,
            };
            words[(3 * i) + 2] = command is 8 or 9 ? DataAddress + 0x810 : command == 13 ? (ulong)Next(9000) : AnyFrame().Value;
        }

        Put(DataAddress + 0x810, Bits());
        Put(DataAddress, words);
        ulong domain = Rarely() ? (ulong)Next(0x8000) : DomainId.Self.Value;
        var arguments = new HypercallArguments { A0 = Arguments(), A1 = (ulong)count, A2 = DoneCount(), A3 = domain };
        Call(HotOperation.MmuextOp, arguments, mayStop: true);
    }

    private void SetGdt()
    {
        int frames = Next(3);
        Span<ulong> list = stackalloc ulong[14];
        for (int i = 0; i < list.Length; i++)
            list[i] = AnyFrame().Value;
        Put(DataAddress, list);
        int entries = Rarely() ? 14 * 512 + 1 : frames == 0 ? 0 : (frames * 512) - Next(512);
        Call(HotOperation.SetGdt, new HypercallArguments { A0 = Arguments(), A1 = (ulong)entries });
    }

    private void UpdateDescriptor()
    {
        ulong present = Next(2) == 0 ? 0x00cf_9a00_0000_ffff : Bits();
        ulong address = (AnyFrame().Address + ((ulong)Next(512) * 8)).Value + (Rarely() ? 4UL : 0);
        Call(HotOperation.UpdateDescriptor, new HypercallArguments { A0 = address, A1 = present });
    }

    private void SetSegmentBase()
    {
        ulong which = (ulong)Next(Rarely() ? 8 : 4);
        ulong value = which == 3
            ? Next(3) switch { 0 => FlatSelectors.Ring3Data, 1 => (ulong)Next(0x1000), _ => (ulong)Next(64) * 8 }
            : Next(4) == 0 ? Bits() : (ulong)Next(int.MaxValue);
        Call(HotOperation.SetSegmentBase, new HypercallArguments { A0 = which, A1 = value });
    }

    /// <summary>Something takes the guest into its kernel.</summary>
    private void Enter()
    {
        bool user = Next(2) == 0;
        ulong stack = StackPointer();
        ulong flags = Bits() & 0x3f_7fd5;
        ulong instruction = Bits();
        bool compatible = Rarely();
        foreach (TestMachine machine in Both)
        {
            machine.Vcpu->State->KernelMode = user ? 0 : 1;
            machine.Vcpu->Registers->Rsp = stack;
            machine.Vcpu->Registers->Rip = instruction;
            machine.Vcpu->Registers->Rflags = flags;
            machine.Vcpu->Segments->Cs = compatible ? FlatSelectors.Ring3Cs32 : FlatSelectors.Ring3Cs64;
            machine.Vcpu->State->CallbackFlags = (CallbackFlags)(instruction & 15);
            machine.Context->State->VmAssists = (flags & 4) != 0 ? (ulong)VmAssist.ArchitecturalIopl : 0;
        }

        switch (Next(5))
        {
            case 0:
                Call(HotOperation.Trap, new HypercallArguments { A0 = (ulong)Next(24), A1 = Bits() });
                break;
            case 1:
                Call(HotOperation.PageFault, new HypercallArguments { A0 = Bits(), A1 = (ulong)Next(32) });
                break;
            case 2:
                Call(HotOperation.Syscall, default);
                break;
            case 3:
                Call(HotOperation.Sysenter, default);
                break;
            default:
                Call(HotOperation.Upcall, default);
                break;
        }
    }

    /// <summary>The guest's kernel goes back to where it was entered from, or anywhere.</summary>
    private void Return()
    {
        ulong stack = StackPointer();
        bool toUser = Next(2) == 0;
        if (stack < Stack + 0x1000 && stack > DataAddress)
        {
            Put(
                stack, Bits(), Bits(), Bits(), (ulong)Next(2) << 8, Bits(), toUser ? 0xe033UL : 0xe030, Bits() & 0x3f_7fd7, StackPointer(),
                0xe02b);
        }

        foreach (TestMachine machine in Both)
        {
            machine.Vcpu->State->KernelMode = 1;
            machine.Vcpu->Registers->Rsp = stack;
        }

        Call(HotOperation.Iret, default);
    }

    /// <summary>What a guest may do by itself: a store into a page that is in use as nothing else.</summary>
    private void Store()
    {
        int frame = PlayFrame();
        if (_one.Info(frame).TypeCount != 0 && _one.Info(frame).Type != PageType.Writable)
            return;
        int index = Index();
        PageTableEntry value = Next(8) == 0 ? new PageTableEntry(Bits()) : AnyEntry();
        foreach (TestMachine machine in Both)
            *machine.Entry(frame, index) = value;
    }

    /// <summary>Does the operation on both machines, and whatever is left of it, and compares them.</summary>
    private void Call(HotOperation operation, HypercallArguments arguments, bool mayStop = false)
    {
        int kick = mayStop ? Next(2) : 0;
        while (true)
        {
            foreach (TestMachine machine in Both)
            {
                if (operation <= HotOperation.SetSegmentBase)
                    machine.Vcpu->State->KernelMode = 1;
                *machine.Vcpu->KickPending = kick;
                machine.Vcpu->Continuation.Pending = 0;
            }

            string what = $"{operation}({arguments.A0:x}, {arguments.A1:x}, {arguments.A2:x}, {arguments.A3:x})";
            long one = CodeOutside.Call(operation, _one.Vcpu, arguments, out long oneRestored);
            long other = _inside.Call(operation, _other.Vcpu, arguments, out long otherRestored);
            if (one != other || oneRestored != otherRestored)
                throw new DifferenceException($"{what}: outside {one} (RAX {oneRestored:x}), inside {other} (RAX {otherRestored:x})");
            Compare(what);
            if (_one.Vcpu->Continuation.Pending == 0)
            {
                _outcomes.Note(operation, operation <= HotOperation.SetSegmentBase ? one == 0 : one != 0);
                return;
            }

            _outcomes.Continued++;
            arguments = _one.Vcpu->Continuation.Arguments;
        }
    }

    private void Compare(string what)
    {
        VcpuContext* one = _one.Vcpu;
        VcpuContext* other = _other.Vcpu;
        Compare(what, "memory", _one.Context->Memory.Page(Frame(0)), _other.Context->Memory.Page(Frame(0)), FrameCount * 4096);
        Compare(what, "the frame table", _one.Frames->Find(Frame(0)), _other.Frames->Find(Frame(0)), FrameCount * sizeof(FrameInfo));
        Compare(what, "the M2P table", _one.Context->MachineToPhys, _other.Context->MachineToPhys, FrameCount * sizeof(ulong));
        Compare(what, "the domain's state", _one.Context->State, _other.Context->State, sizeof(DomainState));
        Compare(what, "shared_info", _one.Context->SharedInfo, _other.Context->SharedInfo, 4096);
        if (_one.Context->ShadowedFrames != null)
            Compare(what, "the shadowed frames", _one.Context->ShadowedFrames, _other.Context->ShadowedFrames, sizeof(ulong));
        Compare(what, "the vCPU's state", one->State, other->State, sizeof(VcpuState));
        Compare(what, "registers", one->Registers, other->Registers, sizeof(CpuRegisters));
        Compare(what, "segments", one->Segments, other->Segments, sizeof(SegmentRegisters));
        Compare(what, "stores to repeat", one->PageTableWrites, other->PageTableWrites, sizeof(PageTableWriteQueue));
        const int windowSize = (DescriptorWindow.GdtPages + DescriptorWindow.LdtPages) * sizeof(ulong);
        Compare(what, "the descriptor tables' entries", (void*)one->DescriptorWindow.Entries, (void*)other->DescriptorWindow.Entries, windowSize);
        Compare(what, "the continuation", &one->Continuation, &other->Continuation, sizeof(ContinuationState));
        if (_one.Frames->FreeCount != _other.Frames->FreeCount)
            throw new DifferenceException($"{what}: {_one.Frames->FreeCount} frames are free outside, {_other.Frames->FreeCount} inside");
    }

    private static void Compare(string what, string where, void* one, void* other, int length)
    {
        int same = new ReadOnlySpan<byte>(one, length).CommonPrefixLength(new ReadOnlySpan<byte>(other, length));
        if (same != length)
        {
            throw new DifferenceException(
                $"{what}: {where} differs at byte {same:x}: {((byte*)one)[same]:x2} outside, {((byte*)other)[same]:x2} inside");
        }
    }
}

/// <summary>What one code did and the other did not.</summary>
internal sealed class DifferenceException(string message) : Exception(message);
