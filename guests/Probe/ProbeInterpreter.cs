// The probe guest's code: the start, the loop over the script's steps, and what each step does.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Probe;

/// <summary>
/// Emits the interpreter of <see cref="StepOperation"/>s into a guest. It prints a line for each step, <c>@NUMBER</c> and what came of it
/// as <c>KEY=VALUE</c> in hexadecimal: r a result, v a value, g0–g10 registers, x an exception, u an upcall; a line <c>.</c> at the end.
/// </summary>
/// <remarks>
/// RBX holds the vCPU's region (<see cref="ProbeLayout"/>), R12 the place in the script. Whatever a step does, its exceptions are logged and
/// the next step follows, at the stack pointer that the step began with.
/// </remarks>
internal sealed partial class ProbeInterpreter
{
    private const ulong FrameMask = 0x000f_ffff_ffff_f000;
    private const int FlatKernelSs = 0xe02b;
    private const uint FlatUserCs = 0xe033;
    private const int RegisterCount = 16;
    private const int StackPointer = 4;
    private const int FlagsIndex = 16;
    private const int CleanFlags = 2;

    // Operations of hypercalls that the interpreter itself makes.
    private const uint MachphysMapping = 12;
    private const int PinL4Table = 3;
    private const int NewUserBaseptr = 15;
    private const uint CallbackRegister = 0;
    private const uint Yield = 0;
    private const uint VcpuDown = 2;
    private const uint DomidSelf = 0x7ff0;
    private const uint InvalidatePage = 2;

    // Offsets into struct vcpu_info, and into its struct vcpu_time_info.
    private const int UpcallPending = 0;
    private const int UpcallMask = 1;
    private const int PendingSelector = 8;
    private const int FaultAddress = 16;
    private const int TimeVersion = 32;
    private const int TimeTsc = 40;
    private const int TimeSystem = 48;
    private const int TimeMultiplier = 56;
    private const int TimeShift = 60;

    private const int EventWords = 64;

    /// <summary>How often a pause yields at least: a few scheduling periods of a processor that is shared with what is waited for.</summary>
    private const int LeastYields = 200;

    private readonly PvAssembler _guest;
    private readonly PvConsole _console;
    private readonly Assembler _code;
    private readonly ProbeVariables _variables;
    private readonly PairSide? _side;
    private readonly Dictionary<StepOperation, Label> _operations = [];
    private Label _step;
    private Label _stepDone;
    private Label _recover;
    private Label _evaluate;
    private Label _clock;
    private Label _putCharacter;
    private Label _putHex;
    private Label _secondary;

    public ProbeInterpreter(PvAssembler guest, PvConsole console, ProbeVariables variables, PairSide? side)
    {
        _side = side;
        _guest = guest;
        _console = console;
        _variables = variables;
        _code = guest.Code;
        foreach (StepOperation operation in Enum.GetValues<StepOperation>())
            _operations[operation] = _code.CreateLabel();
        _step = _code.CreateLabel();
        _stepDone = _code.CreateLabel();
        _recover = _code.CreateLabel();
        _evaluate = _code.CreateLabel();
        _clock = _code.CreateLabel();
        _putCharacter = _code.CreateLabel();
        _putHex = _code.CreateLabel();
        _secondary = _code.CreateLabel();
        CreateStubs();
    }

    /// <summary>Emits everything; the first instruction is the guest's entry.</summary>
    /// <param name="script">Address of vCPU 0's script.</param>
    public void Emit(ulong script)
    {
        EmitStart(script);
        EmitSecondary();
        EmitLoop();
        EmitEnd();
        EmitHypercall();
        EmitMemoryAccess();
        EmitShow();
        EmitFill();
        EmitRun();
        EmitWaitUpcalls();
        EmitPause();
        EmitJoin();
        EmitTurn();
        EmitEvaluate();
        EmitClock();
        EmitPrinting();
        EmitEntries();
        _console.EmitRoutines();
    }

    private void EmitStart(ulong script)
    {
        Label failed = _code.CreateLabel();
        _code.cld();
        _console.EmitInitialise();
        _code.mov(rbx, ProbeLayout.Region(0));
        _code.lea(rsp, __[rbx + ProbeLayout.InterpreterStackTop]);
        _code.lea(rax, __[rbx + ProbeLayout.OutputBuffer]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rax);

        // R13 collects the results: anything but 0 and the probe says so and stops.
        _console.EmitMapSharedInfo(ProbeLayout.SharedInfoPage);
        _code.mov(r13, rax);
        for (int vcpu = 0; vcpu < ProbeLayout.MaxVcpus; vcpu++)
        {
            _code.mov(rax, ProbeLayout.SharedInfoPage + (ulong)(vcpu * SharedInfoOffset.VcpuInfoSize));
            _code.mov(rcx, ProbeLayout.VcpuInfoPointer(vcpu));
            _code.mov(__qword_ptr[rcx], rax);
        }

        // Nothing comes but what a script asks for, and nothing has come: back ends may have notified the domain already.
        _code.mov(rdi, ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnMask);
        _code.mov(ecx, EventWords);
        _code.mov(rax, -1);
        _code.rep.stosq();
        _code.mov(rdi, ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending);
        _code.mov(ecx, EventWords);
        _code.xor(eax, eax);
        _code.rep.stosq();
        _code.mov(rdi, ProbeLayout.SharedInfoPage);
        _code.mov(__qword_ptr[rdi + PendingSelector], rax);
        _code.mov(__byte_ptr[rdi + UpcallPending], al);

        // A back end may have been faster: what it left would be the first upcall, of no port.
        _code.mov(rsi, __qword_ptr[rbx + ProbeLayout.VcpuInfo]);
        _code.mov(__qword_ptr[rsi + PendingSelector], 0);
        _code.mov(__byte_ptr[rsi + UpcallPending], 0);

        EmitFindTables();
        EmitInstallHandlers();
        EmitMakeUserRoot();
        if (_side is { } side)
            EmitMeetPeer(side);
        _code.test(r13, r13);
        _code.jnz(failed);
        _code.mov(r12, script);
        _code.jmp(_step);

        _code.Label(ref failed);
        Put("!start ");
        _code.mov(rax, r13);
        _code.call(_putHex);
        EmitFinalLine();
        _guest.Shutdown(GuestShutdownReason.Crash);
    }

    private void EmitFindTables()
    {
        Label haveMapping = _code.CreateLabel();

        // The table is not at its classic address in every hypervisor; ask, and fall back on the constant of the header.
        _code.mov(edi, MachphysMapping);
        _code.mov(rsi, _variables.MachphysMapping);
        _guest.Hypercall(GuestHypercall.MemoryOp);
        _code.mov(rdx, __qword_ptr[_variables.MachphysMapping]);
        _code.test(rax, rax);
        _code.jz(haveMapping);
        _code.mov(rdx, PvConsole.Mach2PhysVirtStart);
        _code.Label(ref haveMapping);
        _code.mov(__qword_ptr[_variables.MachineToPhys], rdx);

        _code.mov(rax, __qword_ptr[_console.StartInfoVariable]);
        _code.mov(rdx, __qword_ptr[rax + StartInfoOffset.MfnList]);
        _code.mov(__qword_ptr[_variables.PhysToMachine], rdx);
        _code.mov(rcx, __qword_ptr[rax + StartInfoOffset.PtBase]);
        _code.mov(__qword_ptr[_variables.RootAddress], rcx);
        _code.mov(rax, PvAssembler.VirtBase);
        _code.sub(rcx, rax);
        _code.shr(rcx, 12);
        _code.mov(rax, __qword_ptr[rdx + rcx * 8]);
        _code.mov(__qword_ptr[_variables.Root], rax);
    }

    private void EmitInstallHandlers()
    {
        foreach ((int vector, Label stub) in _stubs)
        {
            _code.lea(rax, __[stub]);
            _code.mov(__qword_ptr[_variables.Handler(vector)], rax);
            if (_variables.TrapEntry(vector) is { } entry)
                _code.mov(__qword_ptr[entry + 8], rax);
        }

        _code.lea(rax, __[_upcallStub]);
        _code.mov(__qword_ptr[_variables.UpcallHandler], rax);
        _code.lea(rax, __[_secondary]);
        _code.mov(__qword_ptr[_variables.SecondaryEntry], rax);
        _code.mov(rdi, _variables.TrapTable);
        _guest.Hypercall(GuestHypercall.SetTrapTable);
        _code.or(r13, rax);

        // struct callback_register: type, flags, address. The failsafe handler starts with events masked.
        void Register(ushort type, ushort flags, ulong handler)
        {
            ulong argument = _guest.Define(BitConverter.GetBytes(type | ((ulong)flags << 16)));
            _ = _guest.Reserve(8);
            _code.mov(rax, __qword_ptr[handler]);
            _code.mov(__qword_ptr[argument + 8], rax);
            _code.mov(edi, CallbackRegister);
            _code.mov(rsi, argument);
            _guest.Hypercall(GuestHypercall.CallbackOp);
            _code.or(r13, rax);
        }

        const ushort MaskEvents = 1;
        Register(0, 0, _variables.UpcallHandler);
        Register(1, MaskEvents, _variables.Handler((int)ProbeEntry.Failsafe));
        Register(2, 0, _variables.Handler((int)ProbeEntry.Syscall));

        _code.mov(edi, FlatKernelSs);
        _code.lea(rsi, __[rbx + ProbeLayout.EntryStackTop]);
        _guest.Hypercall(GuestHypercall.StackSwitch);
        _code.or(r13, rax);
    }

    /// <summary>The L4 of user mode holds the image and nothing else: kernel and user run at one privilege on x86-64.</summary>
    private void EmitMakeUserRoot()
    {
        const int LastSlot = 511 * 8;
        const int Page = 0x61;
        _code.mov(rax, __qword_ptr[_variables.RootAddress]);
        _code.mov(rax, __qword_ptr[rax + LastSlot]);
        _code.mov(rcx, ProbeLayout.UserRootPage);
        _code.mov(__qword_ptr[rcx + LastSlot], rax);

        _code.mov(rdx, __qword_ptr[_variables.PhysToMachine]);
        _code.mov(r14, __qword_ptr[rdx + (int)((ProbeLayout.UserRootPage - PvAssembler.VirtBase) >> 12) * 8]);
        _code.mov(__qword_ptr[_variables.UserRoot], r14);
        _code.mov(rdi, rcx);
        _code.mov(rsi, r14);
        _code.shl(rsi, 12);
        _code.or(rsi, Page);
        _code.mov(edx, InvalidatePage);
        _guest.Hypercall(GuestHypercall.UpdateVaMapping);
        _code.or(r13, rax);

        // struct mmuext_op: the command, then the frame at 8.
        ulong operations = _guest.Reserve(48);
        _code.mov(__qword_ptr[operations], PinL4Table);
        _code.mov(__qword_ptr[operations + 8], r14);
        _code.mov(__qword_ptr[operations + 24], NewUserBaseptr);
        _code.mov(__qword_ptr[operations + 32], r14);
        _code.mov(rdi, operations);
        _code.mov(esi, 2);
        _code.xor(edx, edx);
        _code.mov(r10d, DomidSelf);
        _guest.Hypercall(GuestHypercall.MmuextOp);
        _code.or(r13, rax);
    }

    /// <summary>Where another vCPU starts: its script in RDI, its stack in its own region.</summary>
    private void EmitSecondary()
    {
        _code.Label(ref _secondary);
        _code.cld();
        _code.lea(rbx, __[rsp - 8]);
        _code.and(rbx, -ProbeLayout.RegionSize);
        _code.lea(rax, __[rbx + ProbeLayout.OutputBuffer]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rax);
        _code.mov(r12, rdi);
        _code.mov(rdi, _variables.TrapTable);
        _guest.Hypercall(GuestHypercall.SetTrapTable);
        _code.jmp(_step);
    }

    private void EmitLoop()
    {
        Label print = _code.CreateLabel();
        Label written = _code.CreateLabel();

        _code.Label(ref _step);
        _code.mov(rax, __qword_ptr[r12]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Header], rax);
        _code.shr(rax, 32);
        _code.lea(rax, __[r12 + rax * 8]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Next], rax);
        _code.mov(__qword_ptr[rbx + ProbeLayout.GuardStack], rsp);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Guarded], 1);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.Output]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Line], rax);
        Put("@");
        _code.movzx(eax, __word_ptr[rbx + ProbeLayout.Header + 2]);
        _code.call(_putHex);
        _code.add(r12, 8);
        _code.movzx(eax, __byte_ptr[rbx + ProbeLayout.Header]);
        foreach ((StepOperation operation, Label label) in _operations)
        {
            _code.cmp(eax, (int)operation);
            _code.je(label);
        }

        _code.ud2();

        // After an exception: only the region is known.
        _code.Label(ref _recover);
        _code.mov(rsp, __qword_ptr[rbx + ProbeLayout.GuardStack]);
        _code.push(CleanFlags);
        _code.popfq();

        _code.Label(ref _stepDone);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Guarded], 0);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.ExceptionCount]);
        _code.or(rax, __qword_ptr[rbx + ProbeLayout.UpcallCount]);
        _code.jnz(print);
        _code.test(__byte_ptr[rbx + ProbeLayout.Header + 1], (int)StepFlags.Quiet);
        _code.jz(print);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.Line]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rax);
        _code.jmp(written);

        _code.Label(ref print);
        EmitPrintLog(" x=", ProbeLayout.ExceptionCount, ProbeLayout.Exceptions, ProbeLayout.ExceptionRecordSize);
        EmitPrintLog(" u=", ProbeLayout.UpcallCount, ProbeLayout.Upcalls, ProbeLayout.UpcallRecordSize);
        Put("\n");
        // Only vCPU 0 has the console; the others' lines are printed when they are joined.
        _code.mov(rax, ProbeLayout.Region(0));
        _code.cmp(rax, rbx);
        _code.jne(written);
        EmitFlush();

        _code.Label(ref written);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Resumes], 0);
        _code.mov(r12, __qword_ptr[rbx + ProbeLayout.Next]);
        _code.jmp(_step);
    }

    private void EmitEnd()
    {
        Label secondary = _code.CreateLabel();
        Label down = _code.CreateLabel();

        Place(_operations[StepOperation.End]);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.Line]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rax);
        _code.mov(rax, ProbeLayout.Region(0));
        _code.cmp(rax, rbx);
        _code.jne(secondary);
        Put(".");
        EmitFinalLine();
        _guest.Shutdown(GuestShutdownReason.PowerOff);

        _code.Label(ref secondary);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Finished], 1);
        _code.mov(rsi, rbx);
        _code.mov(rax, ProbeLayout.Regions);
        _code.sub(rsi, rax);
        _code.shr(rsi, ProbeLayout.RegionShift);
        _code.mov(r13, rsi);
        _code.Label(ref down);
        _code.mov(edi, VcpuDown);
        _code.mov(rsi, r13);
        _code.xor(edx, edx);
        _guest.Hypercall(GuestHypercall.VcpuOp);
        _code.jmp(down);
    }

    private void EmitHypercall()
    {
        const int Arguments = 7;
        Label noResult = _code.CreateLabel();

        Place(_operations[StepOperation.Hypercall]);
        _code.mov(r14, __qword_ptr[r12]);
        _code.add(r12, 8);
        for (int i = 0; i < Arguments; i++)
        {
            _code.call(_evaluate);
            _code.push(rax);
        }

        _code.pop(r9);
        _code.pop(r8);
        _code.pop(r10);
        _code.pop(rdx);
        _code.pop(rsi);
        _code.pop(rdi);
        _code.pop(rax);
        _code.syscall();
        _code.test(r14, r14);
        _code.jz(noResult);
        _code.mov(__qword_ptr[r14], rax);
        _code.Label(ref noResult);
        PutTagged(" r=");
        _code.jmp(_stepDone);
    }

    private void EmitMemoryAccess()
    {
        Label word = _code.CreateLabel();
        Label doubleword = _code.CreateLabel();
        Label quadword = _code.CreateLabel();

        Place(_operations[StepOperation.Store]);
        _code.mov(r13, __qword_ptr[r12]);
        _code.add(r12, 8);
        _code.call(_evaluate);
        _code.push(rax);
        _code.call(_evaluate);
        _code.pop(rdx);
        _code.cmp(r13, 2);
        _code.je(word);
        _code.cmp(r13, 4);
        _code.je(doubleword);
        _code.cmp(r13, 8);
        _code.je(quadword);
        _code.mov(__byte_ptr[rdx], al);
        _code.jmp(_stepDone);
        _code.Label(ref word);
        _code.mov(__word_ptr[rdx], ax);
        _code.jmp(_stepDone);
        _code.Label(ref doubleword);
        _code.mov(__dword_ptr[rdx], eax);
        _code.jmp(_stepDone);
        _code.Label(ref quadword);
        _code.mov(__qword_ptr[rdx], rax);
        _code.jmp(_stepDone);

        Label loadWord = _code.CreateLabel();
        Label loadDoubleword = _code.CreateLabel();
        Label loadQuadword = _code.CreateLabel();
        Label loaded = _code.CreateLabel();
        Place(_operations[StepOperation.Load]);
        _code.mov(r13, __qword_ptr[r12]);
        _code.mov(r14, __qword_ptr[r12 + 8]);
        _code.add(r12, 16);
        _code.call(_evaluate);
        _code.cmp(r13, 2);
        _code.je(loadWord);
        _code.cmp(r13, 4);
        _code.je(loadDoubleword);
        _code.cmp(r13, 8);
        _code.je(loadQuadword);
        _code.movzx(eax, __byte_ptr[rax]);
        _code.jmp(loaded);
        _code.Label(ref loadWord);
        _code.movzx(eax, __word_ptr[rax]);
        _code.jmp(loaded);
        _code.Label(ref loadDoubleword);
        _code.mov(eax, __dword_ptr[rax]);
        _code.jmp(loaded);
        _code.Label(ref loadQuadword);
        _code.mov(rax, __qword_ptr[rax]);
        _code.Label(ref loaded);
        _code.mov(__qword_ptr[r14], rax);
        PutTagged(" v=");
        _code.jmp(_stepDone);
    }

    private void EmitShow()
    {
        Place(_operations[StepOperation.Show]);
        _code.call(_evaluate);
        PutTagged(" v=");
        _code.jmp(_stepDone);
    }

    private void EmitFill()
    {
        Label next = _code.CreateLabel();
        Label done = _code.CreateLabel();

        Place(_operations[StepOperation.Fill]);
        for (int i = 0; i < 5; i++)
        {
            _code.call(_evaluate);
            _code.push(rax);
        }

        _code.pop(r8);
        _code.pop(rax);
        _code.pop(rdx);
        _code.pop(rcx);
        _code.pop(rdi);
        _code.Label(ref next);
        _code.test(rcx, rcx);
        _code.jz(done);
        _code.mov(__qword_ptr[rdi], rax);
        _code.add(rdi, rdx);
        _code.add(rax, r8);
        _code.dec(rcx);
        _code.jmp(next);
        _code.Label(ref done);
        _code.jmp(_stepDone);
    }

    private void EmitRun()
    {
        Label setUp = _code.CreateLabel();
        Label user = _code.CreateLabel();
        Label register = _code.CreateLabel();
        Label absent = _code.CreateLabel();
        Label afterKernel = _code.CreateLabel();
        Label haveFlags = _code.CreateLabel();
        Label haveStack = _code.CreateLabel();

        Place(_operations[StepOperation.RunUser]);
        _code.mov(rax, __qword_ptr[r12 + 32]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.UserEnd], rax);
        _code.jmp(setUp);
        Place(_operations[StepOperation.RunKernel]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.UserEnd], 0);

        _code.Label(ref setUp);
        _code.mov(r13, __qword_ptr[r12]);
        _code.mov(r14, __qword_ptr[r12 + 8]);
        _code.mov(rax, __qword_ptr[r12 + 16]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Shown], rax);
        _code.mov(rax, __qword_ptr[r12 + 24]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Resumes], rax);
        _code.add(r12, 40);
        _code.xor(ebp, ebp);
        _code.Label(ref register);
        _code.xor(eax, eax);
        _code.bt(r14, rbp);
        _code.jnc(absent);
        _code.call(_evaluate);
        _code.Label(ref absent);
        _code.mov(__qword_ptr[rbx + rbp * 8 + ProbeLayout.RegistersIn], rax);
        _code.inc(ebp);
        _code.cmp(ebp, FlagsIndex + 1);
        _code.jne(register);

        _code.bt(r14, FlagsIndex);
        _code.jc(haveFlags);
        _code.mov(__qword_ptr[rbx + ProbeLayout.RegistersIn + FlagsIndex * 8], CleanFlags);
        _code.Label(ref haveFlags);
        _code.cmp(__qword_ptr[rbx + ProbeLayout.UserEnd], 0);
        _code.jne(user);

        _code.lea(rax, __[afterKernel]);
        _code.push(rax);
        _code.push(r13);
        _code.push(__qword_ptr[rbx + ProbeLayout.RegistersIn + FlagsIndex * 8]);
        _code.popfq();
        EmitLoadRegisters();
        _code.ret();

        _code.Label(ref afterKernel);
        _code.pushfq();
        _code.push(rax);
        _code.mov(rax, rsp);
        _code.and(rax, -ProbeLayout.RegionSize);
        for (int i = 1; i < RegisterCount; i++)
            _code.mov(__qword_ptr[rax + ProbeLayout.RegistersOut + i * 8], Registers[i]);
        _code.mov(rbx, rax);
        _code.pop(__qword_ptr[rbx + ProbeLayout.RegistersOut]);
        _code.pop(__qword_ptr[rbx + ProbeLayout.RegistersOut + FlagsIndex * 8]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.RegistersOut + StackPointer * 8], rsp);
        _code.push(CleanFlags);
        _code.popfq();
        _code.cld();
        _code.jmp(_afterRun);

        // HYPERVISOR_iret to user mode; it takes RAX, R11 and RCX from the frame.
        _code.Label(ref user);
        _code.mov(rax, ProbeLayout.UserStackTop);
        _code.bt(r14, StackPointer);
        _code.jnc(haveStack);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.RegistersIn + StackPointer * 8]);
        _code.Label(ref haveStack);
        _code.push(FlatKernelSs);
        _code.push(rax);
        _code.push(__qword_ptr[rbx + ProbeLayout.RegistersIn + FlagsIndex * 8]);
        _code.mov(eax, FlatUserCs);
        _code.push(rax);
        _code.push(r13);
        _code.push(0);
        _code.push(__qword_ptr[rbx + ProbeLayout.RegistersIn + 8]);
        _code.push(__qword_ptr[rbx + ProbeLayout.RegistersIn + 11 * 8]);
        _code.push(__qword_ptr[rbx + ProbeLayout.RegistersIn]);
        EmitLoadRegisters();
        _guest.Hypercall(GuestHypercall.Iret);

        // Registers in the order of the set, then the flags.
        Label print = _code.CreateLabel();
        Label hidden = _code.CreateLabel();
        _code.Label(ref _afterRun);
        _code.xor(ebp, ebp);
        _code.Label(ref print);
        _code.bt(__qword_ptr[rbx + ProbeLayout.Shown], rbp);
        _code.jnc(hidden);
        Put(" g");
        _code.mov(eax, ebp);
        _code.call(_putHex);
        Put("=");
        _code.mov(rax, __qword_ptr[rbx + rbp * 8 + ProbeLayout.RegistersOut]);
        _code.call(_putHex);
        _code.Label(ref hidden);
        _code.inc(ebp);
        _code.cmp(ebp, FlagsIndex + 1);
        _code.jne(print);
        _code.jmp(_stepDone);
    }

    private void EmitLoadRegisters()
    {
        for (int i = 0; i < RegisterCount; i++)
        {
            if (i != StackPointer && i != 3)
                _code.mov(Registers[i], __qword_ptr[rbx + ProbeLayout.RegistersIn + i * 8]);
        }

        _code.mov(rbx, __qword_ptr[rbx + ProbeLayout.RegistersIn + 3 * 8]);
    }

    private void EmitWaitUpcalls()
    {
        Label look = _code.CreateLabel();

        Place(_operations[StepOperation.WaitUpcalls]);
        _code.call(_evaluate);
        _code.mov(r13, rax);
        _code.call(_evaluate);
        _code.mov(r14, rax);
        _code.call(_clock);
        _code.add(r14, rax);
        _code.Label(ref look);
        _code.cmp(__qword_ptr[rbx + ProbeLayout.UpcallCount], r13);
        _code.jae(_stepDone);
        EmitYieldUntilDeadline(look);
    }

    private void EmitPause()
    {
        Label yield = _code.CreateLabel();
        Label look = _code.CreateLabel();

        Place(_operations[StepOperation.Pause]);
        _code.call(_evaluate);
        _code.mov(r14, rax);
        _console.EmitDrain();
        _code.call(_clock);
        _code.add(r14, rax);
        _code.mov(r13d, LeastYields);
        _code.Label(ref yield);
        EmitYield();
        _code.dec(r13d);
        _code.jnz(yield);
        _code.Label(ref look);
        EmitYieldUntilDeadline(look);
    }

    private void EmitJoin()
    {
        Label look = _code.CreateLabel();
        Label finished = _code.CreateLabel();

        Place(_operations[StepOperation.Join]);
        _code.call(_evaluate);
        _code.mov(r13, rax);
        _code.shl(r13, ProbeLayout.RegionShift);
        _code.mov(rax, ProbeLayout.Regions);
        _code.add(r13, rax);
        _code.call(_evaluate);
        _code.mov(r14, rax);
        _code.call(_clock);
        _code.add(r14, rax);
        _code.Label(ref look);
        _code.cmp(__qword_ptr[r13 + ProbeLayout.Finished], 0);
        _code.jne(finished);
        EmitYieldUntilDeadline(look);

        _code.Label(ref finished);
        _code.lea(rdi, __[r13 + ProbeLayout.OutputBuffer]);
        _code.mov(rsi, __qword_ptr[r13 + ProbeLayout.Output]);
        _code.sub(rsi, rdi);
        _console.EmitWriteCall();
        _code.mov(__qword_ptr[r13 + ProbeLayout.Finished], 0);
        _code.mov(eax, 1);
        PutTagged(" v=");
        _code.jmp(_stepDone);
    }

    /// <summary>To the label again after a yield, or to the end of the step when R14, a system time, has come.</summary>
    private void EmitYieldUntilDeadline(Label again)
    {
        _code.call(_clock);
        _code.cmp(rax, r14);
        _code.jae(_stepDone);
        EmitYield();
        _code.jmp(again);
    }

    /// <summary>The vCPU's system time, in RAX, by the protocol of struct vcpu_time_info; keeps RBX, RBP and R12–R15.</summary>
    private void EmitClock()
    {
        Label again = _code.CreateLabel();
        Label right = _code.CreateLabel();
        Label scaled = _code.CreateLabel();

        _code.Label(ref _clock);
        _code.mov(rsi, __qword_ptr[rbx + ProbeLayout.VcpuInfo]);
        _code.Label(ref again);
        _code.mov(r8d, __dword_ptr[rsi + TimeVersion]);
        _code.lfence();
        _code.rdtsc();
        _code.shl(rdx, 32);
        _code.or(rax, rdx);
        _code.sub(rax, __qword_ptr[rsi + TimeTsc]);
        _code.movsx(ecx, __byte_ptr[rsi + TimeShift]);
        _code.test(ecx, ecx);
        _code.js(right);
        _code.shl(rax, cl);
        _code.jmp(scaled);
        _code.Label(ref right);
        _code.neg(ecx);
        _code.shr(rax, cl);
        _code.Label(ref scaled);
        _code.mov(edx, __dword_ptr[rsi + TimeMultiplier]);
        _code.mul(rdx);
        _code.shrd(rax, rdx, 32);
        _code.add(rax, __qword_ptr[rsi + TimeSystem]);
        _code.test(r8d, 1);
        _code.jnz(again);
        _code.cmp(r8d, __dword_ptr[rsi + TimeVersion]);
        _code.jne(again);
        _code.ret();
    }

    /// <summary>Evaluates the expression at R12, in RAX; keeps RBX, RBP and R13–R15.</summary>
    private void EmitEvaluate()
    {
        Dictionary<Token, Label> tokens = Enum.GetValues<Token>().ToDictionary(static token => token, _ => _code.CreateLabel());
        _code.Label(ref _evaluate);
        _code.mov(rax, __qword_ptr[r12]);
        _code.add(r12, 8);
        foreach ((Token token, Label label) in tokens)
        {
            _code.cmp(eax, (int)token);
            _code.je(label);
        }

        _code.ud2();
        void Case(Token token, Action emit)
        {
            Place(tokens[token]);
            emit();
            _code.jmp(_evaluate);
        }

        void Combine(Token token, Action<AssemblerMemoryOperand, AssemblerRegister64> emit) => Case(token, () =>
        {
            _code.pop(rax);
            emit(__qword_ptr[rsp], rax);
        });

        Place(tokens[Token.End]);
        _code.pop(rax);
        _code.ret();
        Case(Token.Constant, () =>
        {
            _code.push(__qword_ptr[r12]);
            _code.add(r12, 8);
        });
        Case(Token.Load, () =>
        {
            _code.pop(rax);
            _code.push(__qword_ptr[rax]);
        });
        Combine(Token.Add, _code.add);
        Combine(Token.Subtract, _code.sub);
        Combine(Token.And, _code.and);
        Combine(Token.Or, _code.or);
        Combine(Token.Xor, _code.xor);
        Case(Token.ShiftLeft, () =>
        {
            _code.mov(rcx, __qword_ptr[r12]);
            _code.add(r12, 8);
            _code.shl(__qword_ptr[rsp], cl);
        });
        Case(Token.ShiftRight, () =>
        {
            _code.mov(rcx, __qword_ptr[r12]);
            _code.add(r12, 8);
            _code.shr(__qword_ptr[rsp], cl);
        });
        Case(Token.Mfn, () =>
        {
            _code.pop(rax);
            _code.mov(rdx, __qword_ptr[_variables.PhysToMachine]);
            _code.push(__qword_ptr[rdx + rax * 8]);
        });
        Case(Token.Pfn, () =>
        {
            _code.pop(rax);
            _code.mov(rdx, __qword_ptr[_variables.MachineToPhys]);
            _code.push(__qword_ptr[rdx + rax * 8]);
        });
        Case(Token.SystemTime, () =>
        {
            _code.call(_clock);
            _code.push(rax);
        });
        Case(Token.EntryAddress, EmitWalk);
    }

    private void EmitWalk()
    {
        const int TopShift = 39;
        const int Levels = 4;
        const int IndexMask = 511;
        Label level = _code.CreateLabel();
        Label found = _code.CreateLabel();
        Label absent = _code.CreateLabel();

        _code.pop(r8);
        _code.mov(r9, __qword_ptr[r12]);
        _code.add(r12, 8);
        _code.mov(rdi, __qword_ptr[_variables.Root]);
        _code.mov(ecx, TopShift);
        _code.mov(r10d, Levels);
        _code.Label(ref level);
        _code.mov(rdx, r8);
        _code.shr(rdx, cl);
        _code.and(edx, IndexMask);
        _code.shl(edx, 3);
        _code.mov(rsi, rdi);
        _code.shl(rsi, 12);
        _code.add(rsi, rdx);
        _code.cmp(r10, r9);
        _code.je(found);

        // The tables that the walk can pass through are in the boot mapping.
        _code.mov(rax, __qword_ptr[_variables.MachineToPhys]);
        _code.mov(rax, __qword_ptr[rax + rdi * 8]);
        _code.shl(rax, 12);
        _code.add(rax, rdx);
        _code.mov(rdx, PvAssembler.VirtBase);
        _code.mov(rdi, __qword_ptr[rax + rdx]);
        _code.test(edi, 1);
        _code.jz(absent);
        _code.mov(rax, FrameMask);
        _code.and(rdi, rax);
        _code.shr(rdi, 12);
        _code.sub(ecx, 9);
        _code.dec(r10d);
        _code.jmp(level);
        _code.Label(ref absent);
        _code.xor(esi, esi);
        _code.Label(ref found);
        _code.push(rsi);
    }

    private void EmitPrinting()
    {
        Label full = _code.CreateLabel();
        Label digit = _code.CreateLabel();
        Label decimalDigit = _code.CreateLabel();

        // AL into the line; a line that is full loses the rest.
        _code.Label(ref _putCharacter);
        _code.mov(rdx, __qword_ptr[rbx + ProbeLayout.Output]);
        _code.lea(r9, __[rbx + ProbeLayout.OutputBuffer + ProbeLayout.OutputBufferSize]);
        _code.cmp(rdx, r9);
        _code.jae(full);
        _code.mov(__byte_ptr[rdx], al);
        _code.inc(rdx);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rdx);
        _code.Label(ref full);
        _code.ret();

        // RAX in hexadecimal, without leading zeros.
        _code.Label(ref _putHex);
        _code.mov(r8, rax);
        _code.or(rax, 1);
        _code.bsr(rcx, rax);
        _code.and(ecx, ~3);
        _code.Label(ref digit);
        _code.mov(rax, r8);
        _code.shr(rax, cl);
        _code.and(eax, 15);
        _code.add(eax, '0');
        _code.cmp(eax, '9');
        _code.jbe(decimalDigit);
        _code.add(eax, 'a' - '9' - 1);
        _code.Label(ref decimalDigit);
        _code.call(_putCharacter);
        _code.sub(ecx, 4);
        _code.jns(digit);
        _code.ret();
    }

    /// <summary>Places a label that others hold copies of.</summary>
    private void Place(Label label) => _code.Label(ref label);

    private void Put(string text)
    {
        foreach (char character in text)
        {
            _code.mov(eax, character);
            _code.call(_putCharacter);
        }
    }

    /// <summary>RAX after a tag.</summary>
    private void PutTagged(string tag)
    {
        _code.push(rax);
        Put(tag);
        _code.pop(rax);
        _code.call(_putHex);
    }

    /// <summary>Prints the records of a log, their words separated by commas, and empties it.</summary>
    private void EmitPrintLog(string tag, int count, int records, int recordSize)
    {
        Label record = _code.CreateLabel();
        Label word = _code.CreateLabel();
        Label done = _code.CreateLabel();

        _code.xor(r13d, r13d);
        _code.lea(r14, __[rbx + records]);
        _code.Label(ref record);
        _code.cmp(r13, __qword_ptr[rbx + count]);
        _code.jae(done);
        _code.cmp(r13, ProbeLayout.MaxLogged);
        _code.jae(done);
        Put(tag);
        _code.xor(ebp, ebp);
        _code.Label(ref word);
        _code.mov(rax, __qword_ptr[r14 + rbp]);
        _code.call(_putHex);
        Put(",");
        _code.add(ebp, 8);
        _code.cmp(ebp, recordSize);
        _code.jne(word);
        _code.add(r14, recordSize);
        _code.inc(r13);
        _code.jmp(record);
        _code.Label(ref done);
        // What the log had no room for is told by the number.
        _code.mov(rax, __qword_ptr[rbx + count]);
        _code.sub(rax, r13);
        _code.mov(__qword_ptr[rbx + count], 0);
        Label complete = _code.CreateLabel();
        _code.jz(complete);
        PutTagged($"{tag}+");
        _code.Label(ref complete);
        _code.nop();
    }

    private void EmitFlush()
    {
        _code.lea(rdi, __[rbx + ProbeLayout.OutputBuffer]);
        _code.mov(rsi, __qword_ptr[rbx + ProbeLayout.Output]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rdi);
        _code.sub(rsi, rdi);
        _console.EmitWriteCall();
    }

    private void EmitFinalLine()
    {
        Put("\n");
        EmitFlush();
    }
}
