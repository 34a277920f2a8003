// The fuzz guest: a kernel that makes random calls about memory, and stores into its own page tables, until it has made enough.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Fuzz;

/// <summary>
/// A PV guest that draws hypercalls of the MMU from a random number generator of its own, most of them in multicalls, and makes random
/// loads and stores through tables that come of them. A seed makes the same calls every time. It powers off by itself, and says on its
/// console how often each operation came to what.
/// </summary>
public static class FuzzGuest
{
    /// <summary>Stands before each set of figures on the console: calls made in 64 bits, then 32 bits for every class of every operation.</summary>
    public const string Marker = "\nfigures:";

    /// <summary>Figures are printed each time that so many calls more were made.</summary>
    private const int PrintInterval = 1 << 17;

    private const int TemplateSlots = 1024;

    /// <summary>The image.</summary>
    /// <param name="seed">Of the random numbers; not 0.</param>
    /// <param name="calls">Calls to make, up to a batch more for each vCPU.</param>
    /// <param name="vcpus">vCPUs that make them, all on the same tables; with several a seed does not repeat itself.</param>
    /// <param name="hasPeer">Whether it also makes calls about another domain; the two are to have the numbers 1 and 2.</param>
    public static byte[] Build(ulong seed, ulong calls, int vcpus = 1, bool hasPeer = false)
    {
        ArgumentOutOfRangeException.ThrowIfZero(seed);
        ArgumentOutOfRangeException.ThrowIfLessThan(vcpus, 1);
        return new Builder(seed, calls, vcpus, hasPeer).Build();
    }

    /// <summary>vCPUs that the domain needs for some that make calls: there are others that those play with.</summary>
    public static int DomainVcpus(int vcpus) => vcpus + FuzzMemory.BystandersOf(vcpus);

    /// <summary>Reads the last whole set of figures that a run of so many vCPUs printed; null if there is none.</summary>
    public static FuzzFigures? Read(ReadOnlySpan<byte> console, int vcpus = 1, bool hasPeer = false)
    {
        var guest = new PvAssembler();
        var operations = new FuzzOperations(guest, new FuzzMemory(guest, vcpus, hasPeer));
        string[] names = [.. operations.Calls.Concat(operations.Stores).Select(static operation => operation.Name)];
        return FuzzFigures.Read(console, names);
    }

    private sealed class Builder
    {
        private const int MachphysMapping = 12;
        private const int MaximumRamPage = 2;
        private const int EnableAssist = 0;
        private const int WritablePagetables = 2;
        private const int FlatKernelCs = 0xe033;
        private const ulong FrameMask = 0x000f_ffff_ffff_f000;
        private const int Present = 0x61;
        private const int ImageSlot = 511;

        private const int FlatKernelSs = 0xe02b;
        private const int InKernel = 1 << 2;
        private const int VcpuInitialise = 0;
        private const int VcpuUp = 1;
        private const int VcpuDown = 2;

        // The hypervisor's slots whose entries name frames that the guest is then curious about.
        private static readonly int[] HypervisorSlots = [256, 258];

        private readonly ulong _seed;
        private readonly ulong _target;
        private readonly PvAssembler _guest = new();
        private readonly PvConsole _console;
        private readonly Assembler _code;
        private readonly FuzzMemory _memory;
        private readonly FuzzOperations _operations;
        private readonly ulong _machphys;
        private readonly ulong _nextPrint;
        private readonly ulong _rootAddress;
        private readonly ulong _callTemplates;
        private readonly ulong _storeTemplates;
        private readonly ulong _countsZero;
        private readonly Label[] _others;

        /// <summary>The vCPU whose code is emitted.</summary>
        private FuzzVcpu _own;
        private Label _bystander;
        private Label _random;
        private Label _generate;
        private Label _account;
        private Label _print;

        public Builder(ulong seed, ulong calls, int vcpus, bool hasPeer)
        {
            _seed = seed;
            _target = calls / (ulong)vcpus;
            _console = new PvConsole(_guest);
            _code = _guest.Code;
            _memory = new FuzzMemory(_guest, vcpus, hasPeer);
            _own = _memory.Vcpus[0];
            _operations = new FuzzOperations(_guest, _memory);
            _machphys = _guest.Reserve(24);
            _nextPrint = _guest.Reserve(8);
            _rootAddress = _guest.Reserve(8);
            _callTemplates = DefineTemplates(_operations.Calls, 0);
            _storeTemplates = DefineTemplates(_operations.Stores, _operations.Calls.Count);
            _countsZero = _guest.Define(
                [.. _operations.Calls.Concat(_operations.Stores).Select(static operation => operation.Counts ? (byte)1 : (byte)0)]);
            _random = _code.CreateLabel("random");
            _generate = _code.CreateLabel("generate");
            _print = _code.CreateLabel("print");
            _bystander = _code.CreateLabel("bystander");
            _others = [.. _memory.Vcpus.Select(_ => _code.CreateLabel())];
        }

        public byte[] Build()
        {
            EmitStart();
            EmitPools();
            EmitPages();
            EmitOthers();
            EmitBatches();
            EmitEnd();
            EmitAccount();
            for (int vcpu = 1; vcpu < _memory.Vcpus.Count; vcpu++)
                EmitOther(vcpu);
            EmitBystanders();
            EmitRandom();
            EmitGenerate();
            EmitPrint();
            _console.EmitRoutines();
            _guest.ReserveRange(FuzzMemory.ScratchBase, FuzzMemory.ScratchBase + ((FuzzMemory.ScratchPages + FuzzMemory.SparePages) * FuzzMemory.PageSize));
            return _guest.Build(new GuestIdentity("xensharp-fuzz"));
        }

        private void Place(Label label) => _code.Label(ref label);

        private Label Here()
        {
            Label label = _code.CreateLabel();
            Place(label);
            return label;
        }

        /// <summary>Pointers to the operations, each as often as its weight says: a number, then the recipe.</summary>
        private ulong DefineTemplates(IReadOnlyList<FuzzOperation> operations, int firstKind)
        {
            ulong[] slots = new ulong[TemplateSlots];
            int total = operations.Sum(static operation => operation.Weight);
            int weight = 0;
            int slot = 0;
            foreach ((int i, FuzzOperation operation) in operations.Index())
            {
                ulong[] words = [(ulong)(firstKind + i), .. operation.Code];
                ulong address = FuzzMemory.Pool(_guest, words).Address;
                weight += operation.Weight;
                for (int end = Math.Max(slot + 1, weight * TemplateSlots / total); slot < end && slot < TemplateSlots; slot++)
                    slots[slot] = address;
            }

            return FuzzMemory.Pool(_guest, slots).Address;
        }

        private void EmitStart()
        {
            _console.EmitInitialise();
            _code.mov(rsp, _own.StackTop);
            _code.mov(r12, _seed);
            EmitHandlers();
            _code.mov(edi, EnableAssist);
            _code.mov(esi, WritablePagetables);
            _guest.Hypercall(GuestHypercall.VmAssist);
        }

        /// <summary>#SS, #GP and #PF end what was tried, where one was expected; elsewhere they end the guest, with their frame on the stack.</summary>
        private void EmitHandlers()
        {
            Label handler = _code.CreateLabel();
            Label unexpected = _code.CreateLabel();
            Label over = _code.CreateLabel();
            int[] vectors = [12, 13, 14];
            ulong table = _guest.Reserve((vectors.Length + 1) * 16);
            foreach ((int i, int vector) in vectors.Index())
            {
                _code.mov(__dword_ptr[table + ((ulong)i * 16)], vector | (FlatKernelCs << 16));
                _code.lea(rax, __[handler]);
                _code.mov(__qword_ptr[table + ((ulong)i * 16) + 8], rax);
            }

            _code.mov(rdi, table);
            _guest.Hypercall(GuestHypercall.SetTrapTable);
            _code.test(rax, rax);
            _code.jz(over);
            _code.ud2();

            // RSP: RCX, R11, error code, RIP, CS, RFLAGS, RSP, SS; iret wants RAX, R11, RCX and flags below RIP.
            Place(handler);
            _code.cmp(__qword_ptr[_own.Resume], 0);
            _code.je(unexpected);
            _code.pop(rcx);
            _code.pop(r11);
            _code.pop(rcx);
            _code.mov(rcx, __qword_ptr[_own.Resume]);
            _code.mov(__qword_ptr[rsp], rcx);
            _code.mov(__qword_ptr[_own.Faulted], 1);
            _code.push(0);
            _code.push(rcx);
            _code.push(r11);
            _code.push(rax);
            _guest.Hypercall(GuestHypercall.Iret);
            Place(unexpected);
            _code.ud2();
            Place(over);
            _code.nop();
        }

        /// <summary>Fills in the frame numbers that are only known now.</summary>
        private void EmitPools()
        {
            _code.mov(edi, MachphysMapping);
            _code.mov(rsi, _machphys);
            _guest.Hypercall(GuestHypercall.MemoryOp);
            _code.mov(edi, MaximumRamPage);
            _code.xor(esi, esi);
            _guest.Hypercall(GuestHypercall.MemoryOp);
            Frame(FuzzMemory.EndFrame);
            _code.inc(rax);
            Frame(FuzzMemory.EndFrame + 1);
            FrameOfPage(FuzzMemory.ScratchBase, 0, FuzzMemory.ScratchPages);
            FrameOfPage(_memory.RootsStart, FuzzMemory.FirstRootFrame, FuzzMemory.RootPages);
            _code.mov(rbx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rax, __qword_ptr[rbx + StartInfoOffset.SharedInfo]);
            _code.shr(rax, 12);
            Frame(FuzzMemory.SharedInfoFrame);
            _code.mov(rax, __qword_ptr[rbx + StartInfoOffset.ConsoleMfn]);
            Frame(FuzzMemory.ConsoleFrame);
            _code.mov(rax, rbx);
            FrameOfAddress();
            Frame(FuzzMemory.OwnPages);
            _code.lea(rax, __[_generate]);
            FrameOfAddress();
            Frame(FuzzMemory.OwnPages + 1);
            FrameOfPage(_memory.InfoPage, FuzzMemory.InfoFrame, 1);
            _code.mov(rbx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rax, __qword_ptr[rbx + StartInfoOffset.PtBase]);
            _code.mov(__qword_ptr[_rootAddress], rax);
            foreach ((int i, int slot) in HypervisorSlots.Index())
            {
                _code.mov(rdx, __qword_ptr[_rootAddress]);
                _code.mov(rax, __qword_ptr[rdx + (slot * 8)]);
                MaskFrame();
                Frame(FuzzMemory.HypervisorFrames + i);
            }

            _code.mov(rax, __qword_ptr[_rootAddress]);
            FrameOfAddress();
            Frame(FuzzMemory.RootFrame);
            EmitOwnTables(PvAssembler.ImageBase, [FuzzMemory.L3Frame, FuzzMemory.L2Frame, FuzzMemory.FirstL1Frame]);
            EmitOwnTables(FuzzMemory.ScratchBase, [FuzzMemory.L3Frame, FuzzMemory.L2Frame, FuzzMemory.ScratchL1Frame]);
        }

        /// <summary>RAX becomes the frame number of an entry.</summary>
        private void MaskFrame()
        {
            _code.mov(rcx, FrameMask);
            _code.and(rax, rcx);
            _code.shr(rax, 12);
        }

        private void Frame(int index) => _code.mov(__qword_ptr[_memory.AllFrames.Address + ((ulong)index * 8)], rax);

        /// <summary>RAX, an address of the image, becomes the number of its machine frame.</summary>
        private void FrameOfAddress()
        {
            _code.mov(rdx, PvAssembler.VirtBase);
            _code.sub(rax, rdx);
            _code.shr(rax, 12);
            _code.mov(rdx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rdx, __qword_ptr[rdx + StartInfoOffset.MfnList]);
            _code.mov(rax, __qword_ptr[rdx + (rax * 8)]);
        }

        private void FrameOfPage(ulong address, int index, int count)
        {
            for (int i = 0; i < count; i++)
            {
                _code.mov(rax, address + ((ulong)i * FuzzMemory.PageSize));
                FrameOfAddress();
                Frame(index + i);
            }
        }

        /// <summary>The frames of the tables on the way from the root to an address.</summary>
        private void EmitOwnTables(ulong address, ReadOnlySpan<int> frames)
        {
            _code.mov(rsi, __qword_ptr[_rootAddress]);
            for (int level = 4; level > 1; level--)
            {
                int index = (int)((address >> (12 + (9 * (level - 1)))) & 511);
                _code.mov(rax, __qword_ptr[rsi + (index * 8)]);
                MaskFrame();
                Frame(frames[4 - level]);
                _code.mov(rdx, __qword_ptr[_machphys]);
                _code.mov(rsi, __qword_ptr[rdx + (rax * 8)]);
                _code.shl(rsi, 12);
                _code.mov(rdx, PvAssembler.VirtBase);
                _code.add(rsi, rdx);
            }
        }

        /// <summary>
        /// Scratch pages but those for data lose their mapping, roots get the image and become read-only, and two pages become what they are
        /// called.
        /// </summary>
        private void EmitPages()
        {
            for (int i = FuzzMemory.DataPages; i < FuzzMemory.ScratchPages; i++)
                UpdateVa(FuzzMemory.ScratchBase + ((ulong)i * FuzzMemory.PageSize), null);
            for (int i = 0; i < FuzzMemory.RootPages; i++)
            {
                ulong root = _memory.RootsStart + ((ulong)i * FuzzMemory.PageSize);
                _code.mov(rdx, __qword_ptr[_rootAddress]);
                _code.mov(rax, __qword_ptr[rdx + (ImageSlot * 8)]);
                _code.mov(__qword_ptr[root + (ImageSlot * 8)], rax);
                UpdateVa(root, Present);
            }

            foreach (FuzzVcpu vcpu in _memory.Vcpus)
                UpdateVa(vcpu.Guard, null);
            UpdateVa(_memory.ReadOnlyPage, Present);
            if (_memory.HasPeer)
                EmitGrantPage();
        }

        /// <summary>Maps the first frame of the grant table.</summary>
        private void EmitGrantPage()
        {
            const int setupTable = 2;
            const int invalidatePage = 2;
            const int writable = 0x63;
            ulong request = _guest.Reserve(24);
            ulong frame = _guest.Reserve(8);
            _code.mov(rax, (1UL << 32) | FuzzOperations.Self);
            _code.mov(__qword_ptr[request], rax);
            _code.mov(rax, frame);
            _code.mov(__qword_ptr[request + 16], rax);
            _code.mov(edi, setupTable);
            _code.mov(rsi, request);
            _code.mov(edx, 1);
            _guest.Hypercall(GuestHypercall.GrantTableOp);
            _code.mov(rsi, __qword_ptr[frame]);
            _code.shl(rsi, 12);
            _code.or(rsi, writable);
            _code.mov(rdi, _memory.GrantPage);
            _code.mov(edx, invalidatePage);
            _guest.Hypercall(GuestHypercall.UpdateVaMapping);
        }

        private void UpdateVa(ulong address, int? flags)
        {
            const int invalidatePage = 2;
            _code.xor(eax, eax);
            if (flags is { } present)
            {
                _code.mov(rax, address);
                FrameOfAddress();
                _code.shl(rax, 12);
                _code.or(rax, present);
            }

            _code.mov(rsi, rax);
            _code.mov(rdi, address);
            _code.mov(edx, invalidatePage);
            _guest.Hypercall(GuestHypercall.UpdateVaMapping);
        }

        /// <summary>Makes the bystanders' contexts, which the others can use from the first moment on, and starts those others.</summary>
        private void EmitOthers()
        {
            foreach (FuzzBystander bystander in _memory.Bystanders)
            {
                EmitContext(bystander.Context, bystander.StackTop, _bystander);
                _code.mov(__dword_ptr[bystander.Context + GuestContextOffset.Rbx], bystander.Id);

                // Whatever happens to it, it begins again.
                foreach (int callback in (int[])[GuestContextOffset.EventCallback, GuestContextOffset.FailsafeCallback, GuestContextOffset.SyscallCallback])
                    _code.mov(__qword_ptr[bystander.Context + (ulong)callback], rax);
                for (int vector = 0; vector < 32; vector++)
                {
                    ulong trap = bystander.Context + GuestContextOffset.Traps + ((ulong)vector * 16);
                    _code.mov(__dword_ptr[trap], vector | (FlatKernelCs << 16));
                    _code.mov(__qword_ptr[trap + 8], rax);
                }
            }

            for (int vcpu = 1; vcpu < _memory.Vcpus.Count; vcpu++)
            {
                FuzzVcpu other = _memory.Vcpus[vcpu];
                EmitContext(other.Context, other.StackTop, _others[vcpu]);
                _code.mov(rax, __qword_ptr[_memory.Root.Address]);
                _code.shl(rax, 12);
                _code.mov(__qword_ptr[other.Context + GuestContextOffset.KernelRoot], rax);
                EmitVcpuOp(VcpuInitialise, vcpu, other.Context);
                EmitVcpuOp(VcpuUp, vcpu, 0);
            }
        }

        /// <summary>The registers of a context; RAX is the vCPU's first instruction then.</summary>
        private void EmitContext(ulong context, ulong stackTop, Label entry)
        {
            void Word(int offset, int value) => _code.mov(__dword_ptr[context + (ulong)offset], value);
            Word(GuestContextOffset.Flags, InKernel);
            Word(GuestContextOffset.Cs, FlatKernelCs);
            Word(GuestContextOffset.Ss, FlatKernelSs);
            Word(GuestContextOffset.Rflags, 2);
            Word(GuestContextOffset.KernelSs, FlatKernelSs);
            _code.mov(rax, stackTop);
            _code.mov(__qword_ptr[context + GuestContextOffset.Rsp], rax);
            _code.mov(__qword_ptr[context + GuestContextOffset.KernelSp], rax);
            _code.lea(rax, __[entry]);
            _code.mov(__qword_ptr[context + GuestContextOffset.Rip], rax);
        }

        private void EmitVcpuOp(int command, int vcpu, ulong argument)
        {
            _code.mov(edi, command);
            _code.mov(esi, vcpu);
            _code.mov(rdx, argument);
            _guest.Hypercall(GuestHypercall.VcpuOp);
        }

        private void EmitYield()
        {
            _code.xor(edi, edi);
            _code.xor(esi, esi);
            _guest.Hypercall(GuestHypercall.SchedOp);
        }

        /// <summary>Waits until the other vCPUs are done too, adds up what they counted, and prints it.</summary>
        private void EmitEnd()
        {
            foreach ((int i, FuzzVcpu other) in _memory.Vcpus.Index().Skip(1))
            {
                Label wait = Here();
                EmitVcpuOp(VcpuUp, i, 0);
                EmitYield();
                _code.cmp(__qword_ptr[other.Done], 0);
                _code.je(wait);
                _code.mov(rax, __qword_ptr[other.Total]);
                _code.add(__qword_ptr[_own.Total], rax);
                _code.xor(ecx, ecx);
                Label sum = Here();
                _code.mov(eax, __dword_ptr[(rcx * 4) + (long)other.Histogram]);
                _code.add(__dword_ptr[(rcx * 4) + (long)_own.Histogram], eax);
                _code.inc(ecx);
                _code.cmp(ecx, FuzzMemory.HistogramSize / 4);
                _code.jb(sum);
            }

            _code.call(_print);
            _guest.Shutdown(GuestShutdownReason.PowerOff);
        }

        /// <summary>Another vCPU that makes calls: from its first instruction on.</summary>
        private void EmitOther(int vcpu)
        {
            const ulong distance = 0x9e37_79b9_7f4a_7c15;
            _own = _memory.Vcpus[vcpu];
            Place(_others[vcpu]);
            EmitHandlers();
            _code.mov(r12, (_seed + (distance * (ulong)vcpu)) | 1);
            EmitBatches();
            _code.mov(__qword_ptr[_own.Done], 1);
            Label wait = Here();
            EmitYield();
            _code.jmp(wait);
            EmitAccount();
            _own = _memory.Vcpus[0];
        }

        /// <summary>RBX: the vCPU's number.</summary>
        private void EmitBystanders()
        {
            Place(_bystander);
            _code.mov(edi, VcpuDown);
            _code.mov(esi, ebx);
            _code.xor(edx, edx);
            _guest.Hypercall(GuestHypercall.VcpuOp);
            _code.jmp(_bystander);
        }

        /// <summary>R12: the random state; RBP: entries of the batch; R13: an entry; R14: its buffer; R15: its number.</summary>
        private void EmitBatches()
        {
            _account = _code.CreateLabel("account");
            Label direct = _code.CreateLabel();
            Label account = _code.CreateLabel();
            Label noPrint = _code.CreateLabel();
            if (_own == _memory.Vcpus[0])
            {
                _code.mov(rax, (ulong)PrintInterval);
                _code.mov(__qword_ptr[_nextPrint], rax);
            }

            Label batch = Here();
            _code.call(_random);
            _code.and(eax, FuzzMemory.MaxBatch - 1);
            _code.lea(ebp, __[rax + 1]);
            ForEachEntry(() =>
            {
                for (int i = 0; i < FuzzMemory.EntrySize; i += 8)
                    _code.mov(__qword_ptr[r13 + i], 0);
                PickTemplate(_callTemplates);
                _code.call(_generate);
            });

            _code.call(_random);
            _code.test(al, 15);
            _code.jz(direct);
            _code.mov(rdi, _own.Calls);
            _code.mov(esi, ebp);
            _guest.Hypercall(GuestHypercall.Multicall);
            _code.test(rax, rax);
            _code.jz(account);

            // The list is the guest's own, and good.
            _code.ud2();
            Place(direct);
            _code.nop();
            ForEachEntry(EmitDirectCall);
            Place(account);
            _code.nop();
            ForEachEntry(() =>
            {
                _code.mov(rax, __qword_ptr[r13 + 8]);
                _code.call(_account);
            });
            EmitStores();
            _code.add(__qword_ptr[_own.Total], rbp);
            if (_own == _memory.Vcpus[0])
            {
                _code.mov(rax, __qword_ptr[_own.Total]);
                _code.cmp(rax, __qword_ptr[_nextPrint]);
                _code.jb(noPrint);
                _code.add(__qword_ptr[_nextPrint], PrintInterval);
                _code.call(_print);
                Place(noPrint);
            }

            _code.mov(rax, __qword_ptr[_own.Total]);
            _code.mov(rdx, _target);
            _code.cmp(rax, rdx);
            _code.jb(batch);
        }

        private void ForEachEntry(Action body)
        {
            _code.xor(r15d, r15d);
            Label loop = Here();
            EntryAddresses();
            body();
            _code.inc(r15d);
            _code.cmp(r15d, ebp);
            _code.jb(loop);
        }

        private void EntryAddresses()
        {
            _code.mov(r13, r15);
            _code.shl(r13, 6);
            _code.add(r13, (int)_own.Calls);
            _code.mov(r14, r15);
            _code.shl(r14, 9);
            _code.add(r14, (int)_own.Buffers);
        }

        /// <summary>RSI: the recipe of an operation by chance, whose number is kept for entry R15.</summary>
        private void PickTemplate(ulong templates)
        {
            _code.call(_random);
            _code.and(eax, TemplateSlots - 1);
            _code.mov(rsi, __qword_ptr[(rax * 8) + (long)templates]);
            _code.lodsq();
            _code.mov(__qword_ptr[(r15 * 8) + (long)_own.Kinds], rax);
        }

        private void EmitDirectCall()
        {
            _code.mov(rax, __qword_ptr[r13]);
            foreach ((int i, AssemblerRegister64 register) in ((AssemblerRegister64[])[rdi, rsi, rdx, r10, r8, r9]).Index())
                _code.mov(register, __qword_ptr[r13 + (16 + (8 * i))]);
            _code.syscall();
            _code.mov(__qword_ptr[r13 + 8], rax);
        }

        /// <summary>A load or a store, in one batch of two.</summary>
        private void EmitStores()
        {
            Label done = _code.CreateLabel();
            Label[] forms = [.. _operations.Stores.Select(_ => _code.CreateLabel())];
            Label performed = _code.CreateLabel();
            _code.call(_random);
            _code.test(al, 1);
            _code.jz(done);
            _code.xor(r15d, r15d);
            EntryAddresses();
            PickTemplate(_storeTemplates);
            _code.call(_generate);
            _code.mov(__qword_ptr[_own.Faulted], 0);
            _code.lea(rax, __[performed]);
            _code.mov(__qword_ptr[_own.Resume], rax);
            _code.mov(rdi, __qword_ptr[r13 + 16]);
            _code.mov(rdx, __qword_ptr[r13 + 24]);
            _code.mov(rcx, __qword_ptr[r13]);
            for (int i = 0; i < forms.Length; i++)
            {
                _code.cmp(ecx, i);
                _code.je(forms[i]);
            }

            Action[] bodies =
            [
                () => _code.mov(rax, __qword_ptr[rdi]),
                () => _code.mov(__qword_ptr[rdi], rdx),
                () => _code.mov(__dword_ptr[rdi], edx),
                () => _code.mov(__byte_ptr[rdi], dl),
                () => _code.xchg(__qword_ptr[rdi], rdx),
                () => _code.@lock.or(__qword_ptr[rdi], rdx),
                () =>
                {
                    _code.xor(eax, eax);
                    _code.@lock.cmpxchg(__qword_ptr[rdi], rdx);
                },
                () =>
                {
                    _code.mov(rax, rdx);
                    _code.mov(ecx, 3);
                    _code.rep.stosq();
                },
            ];
            foreach ((int i, Action body) in bodies.Index())
            {
                Place(forms[i]);
                body();
                _code.jmp(performed);
            }

            Place(performed);
            _code.mov(__qword_ptr[_own.Resume], 0);

            // What faulted counts as -EFAULT, 14.
            _code.imul(rax, __qword_ptr[_own.Faulted], -14);
            _code.call(_account);
            Place(done);
            _code.nop();
        }

        /// <summary>RAX: the next random number (xorshift64*). Loses RDX.</summary>
        private void EmitRandom()
        {
            Place(_random);
            foreach ((int distance, bool left) in ((int, bool)[])[(12, false), (25, true), (27, false)])
            {
                _code.mov(rdx, r12);
                if (left)
                    _code.shl(rdx, (sbyte)distance);
                else
                    _code.shr(rdx, (sbyte)distance);
                _code.xor(r12, rdx);
            }

            _code.mov(rax, 0x2545_f491_4f6c_dd1dUL);
            _code.imul(rax, r12);

            // The upper bits are the better ones.
            _code.bswap(rax);
            _code.ret();
        }

        /// <summary>Carries out the recipe at RSI for the entry at R13 with the buffer at R14. RBX is its value.</summary>
        private void EmitGenerate()
        {
            Label next = _code.CreateLabel();
            Label[] steps = [.. Enum.GetValues<FuzzStep>().Select(_ => _code.CreateLabel())];
            Place(_generate);
            _code.xor(ebx, ebx);
            Place(next);
            _code.mov(rcx, __qword_ptr[rsi]);
            _code.mov(r8, __qword_ptr[rsi + 8]);
            _code.mov(r9, __qword_ptr[rsi + 16]);
            _code.add(rsi, FuzzRecipe.StepWords * 8);
            for (int i = 0; i < steps.Length; i++)
            {
                _code.cmp(ecx, i);
                _code.je(steps[i]);
            }

            _code.ud2();
            void Step(FuzzStep step, Action body)
            {
                Place(steps[(int)step]);
                body();
                _code.jmp(next);
            }

            Place(steps[(int)FuzzStep.End]);
            _code.ret();
            Step(FuzzStep.Add, () => _code.add(rbx, r8));
            Step(FuzzStep.Pick, () =>
            {
                _code.call(_random);
                _code.mov(eax, eax);
                _code.imul(rax, r9);
                _code.shr(rax, 32);
                _code.add(rbx, __qword_ptr[r8 + (rax * 8)]);
            });
            Step(FuzzStep.Shift, () =>
            {
                _code.mov(ecx, r8d);
                _code.shl(rbx, cl);
            });
            Step(FuzzStep.Random, () =>
            {
                _code.call(_random);
                _code.and(rax, r8);
                _code.add(rbx, rax);
            });
            foreach ((FuzzStep step, AssemblerRegister64 place) in ((FuzzStep, AssemblerRegister64)[])[(FuzzStep.ToCall, r13), (FuzzStep.ToBuffer, r14)])
            {
                Step(step, () =>
                {
                    _code.mov(__qword_ptr[place + r8], rbx);
                    _code.xor(ebx, ebx);
                });
            }

            Step(FuzzStep.ToAddress, () =>
            {
                _code.mov(__qword_ptr[r8], rbx);
                _code.xor(ebx, ebx);
            });

            Step(FuzzStep.BufferAddress, () =>
            {
                _code.add(rbx, r14);
                _code.add(rbx, r8);
            });
            Step(FuzzStep.Chance, () =>
            {
                _code.call(_random);
                _code.movzx(eax, ax);
                _code.cmp(rax, r8);
                _code.jb(next);
                _code.add(rsi, r9);
            });
            Step(FuzzStep.Skip, () => _code.add(rsi, r8));
        }

        /// <summary>Counts the result in RAX of the operation of entry R15.</summary>
        private void EmitAccount()
        {
            Label failed = _code.CreateLabel();
            Label known = _code.CreateLabel();
            Place(_account);
            _code.mov(rcx, __qword_ptr[(r15 * 8) + (long)_own.Kinds]);
            _code.test(rax, rax);
            _code.js(failed);
            _code.mov(edx, 0);
            _code.jnz(known);
            _code.cmp(__byte_ptr[rcx + (long)_countsZero], 0);
            _code.je(known);
            _code.mov(edx, FuzzMemory.NothingDone);
            _code.jmp(known);
            Place(failed);
            _code.mov(rdx, rax);
            _code.neg(rdx);
            _code.cmp(rdx, FuzzMemory.NothingDone);
            _code.jb(known);
            _code.mov(edx, FuzzMemory.NothingDone - 1);
            Place(known);
            _code.shl(rcx, 7);
            _code.add(rcx, rdx);
            _code.inc(__dword_ptr[(rcx * 4) + (long)_own.Histogram]);
            _code.ret();
        }

        private void EmitPrint()
        {
            Place(_print);
            _console.EmitWrite(_guest.Define(System.Text.Encoding.ASCII.GetBytes(Marker)), Marker.Length);
            _console.EmitWrite(_own.Total, 8);
            _console.EmitWrite(_own.Histogram, FuzzMemory.HistogramSize);
            _code.ret();
        }
    }
}
