// The probe guest's entries: exceptions, SYSCALL from user mode, failsafe, upcalls; each is logged as it was delivered.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Probe;

internal sealed partial class ProbeInterpreter
{
    private static readonly AssemblerRegister64[] Registers =
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

    // On the stack of every entry, in words from RSP: sixteen registers, the vector, the error code, and the processor's frame.
    private const int Vector = RegisterCount * 8;
    private const int ErrorCode = Vector + 8;
    private const int FrameRip = Vector + 16;
    private const int FrameCs = Vector + 24;
    private const int FrameFlags = Vector + 32;
    private const int FrameRsp = Vector + 40;
    private const int FrameSs = Vector + 48;
    private const int FrameEnd = Vector + 56;

    private readonly Dictionary<int, Label> _stubs = [];
    private Label _upcallStub;
    private Label _afterRun;

    /// <summary>Makes the labels of the stubs, which the start refers to.</summary>
    private void CreateStubs()
    {
        foreach (int vector in ProbeVariables.Vectors)
            _stubs[vector] = _code.CreateLabel();
        foreach (ProbeEntry entry in Enum.GetValues<ProbeEntry>())
            _stubs[(int)entry] = _code.CreateLabel();
        _upcallStub = _code.CreateLabel();
        _afterRun = _code.CreateLabel();
    }

    private void EmitEntries()
    {
        Label common = _code.CreateLabel();
        Label resume = _code.CreateLabel();

        // Xen pushes RCX and R11 below the processor's frame.
        foreach ((int vector, Label stub) in _stubs)
        {
            Place(stub);
            _code.pop(rcx);
            _code.pop(r11);
            if (vector == (int)ProbeEntry.Failsafe)
                EmitPackSelectors();
            else if (!ProbeVariables.WithErrorCode.Contains(vector))
                _code.push(0);
            _code.push(vector);
            _code.jmp(common);
        }

        EmitExceptionEntry(common, resume);
        EmitUpcallEntry(resume);
        EmitResume(resume);
    }

    /// <summary>DS, ES, FS and GS, which the failsafe frame has above R11, become one word in the error code's place.</summary>
    private void EmitPackSelectors()
    {
        _code.movzx(eax, __word_ptr[rsp + 24]);
        for (int offset = 16; offset >= 0; offset -= 8)
        {
            _code.shl(rax, 16);
            _code.mov(ax, __word_ptr[rsp + offset]);
        }

        _code.add(rsp, 32);
        _code.push(rax);
    }

    private void EmitSaveRegisters()
    {
        for (int i = RegisterCount - 1; i >= 0; i--)
            _code.push(Registers[i]);
        Label known = _code.CreateLabel();
        Label foreign = _code.CreateLabel();

        // The vCPU's region by the stack pointer; a script that put the stack elsewhere is vCPU 0's.
        _code.mov(rbx, rsp);
        _code.and(rbx, -ProbeLayout.RegionSize);
        _code.mov(rax, ProbeLayout.Regions);
        _code.cmp(rbx, rax);
        _code.jb(foreign);
        _code.mov(rax, ProbeLayout.End);
        _code.cmp(rbx, rax);
        _code.jb(known);
        _code.Label(ref foreign);
        _code.mov(rbx, ProbeLayout.Region(0));
        _code.Label(ref known);
        _code.mov(rsi, __qword_ptr[rbx + ProbeLayout.VcpuInfo]);
    }

    private void EmitExceptionEntry(Label common, Label resume)
    {
        Label noRoom = _code.CreateLabel();
        Label noResume = _code.CreateLabel();
        Label userEnd = _code.CreateLabel();
        Label exception = _code.CreateLabel();

        Place(common);
        EmitSaveRegisters();
        _code.cmp(__qword_ptr[rsp + Vector], (int)ProbeEntry.Syscall);
        _code.jne(exception);
        _code.mov(rax, __qword_ptr[rbx + ProbeLayout.UserEnd]);
        _code.cmp(__qword_ptr[rsp + FrameRip], rax);
        _code.je(userEnd);

        _code.Label(ref exception);
        _code.mov(rcx, __qword_ptr[rbx + ProbeLayout.ExceptionCount]);
        _code.cmp(rcx, ProbeLayout.MaxLogged);
        _code.jae(noRoom);
        _code.imul(rdi, rcx, ProbeLayout.ExceptionRecordSize);
        _code.lea(rdi, __[rbx + rdi + ProbeLayout.Exceptions]);
        int field = 0;
        void Log(AssemblerRegister64 value)
        {
            _code.mov(__qword_ptr[rdi + field], value);
            field += 8;
        }

        void LogFrame(int offset)
        {
            _code.mov(rax, __qword_ptr[rsp + offset]);
            Log(rax);
        }

        LogFrame(Vector);
        LogFrame(ErrorCode);
        _code.mov(rax, __qword_ptr[rsi + FaultAddress]);
        Log(rax);
        LogFrame(FrameRip);
        LogFrame(FrameCs);
        LogFrame(FrameFlags);
        LogFrame(FrameRsp);
        LogFrame(FrameSs);
        _code.lea(rax, __[rsp + FrameEnd]);
        Log(rax);
        _code.movzx(eax, __byte_ptr[rsi + UpcallMask]);
        Log(rax);
        _code.Label(ref noRoom);
        _code.inc(__qword_ptr[rbx + ProbeLayout.ExceptionCount]);

        _code.cmp(__qword_ptr[rbx + ProbeLayout.Resumes], 0);
        _code.je(noResume);
        _code.dec(__qword_ptr[rbx + ProbeLayout.Resumes]);
        _code.jmp(resume);
        _code.Label(ref noResume);
        // The script's own setting of the mask is that of before the exception, which the frame has beside CS.
        _code.mov(eax, __dword_ptr[rsp + FrameCs + 4]);
        _code.mov(__byte_ptr[rsi + UpcallMask], al);
        _code.cmp(__qword_ptr[rbx + ProbeLayout.Guarded], 0);
        _code.jne(_recover);

        // Outside a step the probe itself is at fault, or what a script did to it: no going on.
        _code.mov(rsp, __qword_ptr[rbx + ProbeLayout.GuardStack]);
        _code.lea(rax, __[rbx + ProbeLayout.OutputBuffer]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.Output], rax);
        Put("!exception");
        EmitPrintLog(" x=", ProbeLayout.ExceptionCount, ProbeLayout.Exceptions, ProbeLayout.ExceptionRecordSize);
        EmitFinalLine();
        _guest.Shutdown(GuestShutdownReason.Crash);

        _code.Label(ref userEnd);
        _code.mov(rax, __qword_ptr[rsp + FrameRsp]);
        _code.mov(__qword_ptr[rsp + StackPointer * 8], rax);
        _code.mov(rax, __qword_ptr[rsp + FrameFlags]);
        _code.mov(__qword_ptr[rbx + ProbeLayout.RegistersOut + FlagsIndex * 8], rax);
        _code.mov(rsi, rsp);
        _code.lea(rdi, __[rbx + ProbeLayout.RegistersOut]);
        _code.mov(ecx, RegisterCount);
        _code.cld();
        _code.rep.movsq();
        _code.mov(rsp, __qword_ptr[rbx + ProbeLayout.GuardStack]);
        _code.push(CleanFlags);
        _code.popfq();
        _code.jmp(_afterRun);
    }

    private void EmitUpcallEntry(Label resume)
    {
        Label noRoom = _code.CreateLabel();
        Label nextWord = _code.CreateLabel();
        Label done = _code.CreateLabel();

        _code.Label(ref _upcallStub);
        _code.pop(rcx);
        _code.pop(r11);
        _code.push(0);
        _code.push(0);
        EmitSaveRegisters();
        _code.mov(rcx, __qword_ptr[rbx + ProbeLayout.UpcallCount]);
        _code.cmp(rcx, ProbeLayout.MaxLogged);
        _code.jae(noRoom);
        _code.imul(rdi, rcx, ProbeLayout.UpcallRecordSize);
        _code.lea(rdi, __[rbx + rdi + ProbeLayout.Upcalls]);

        // The mask as it is in the handler, as it was saved, and the pending flag: a byte each.
        _code.movzx(eax, __byte_ptr[rsi + UpcallPending]);
        _code.shl(eax, 8);
        _code.mov(al, __byte_ptr[rsp + FrameCs + 4]);
        _code.shl(eax, 8);
        _code.mov(al, __byte_ptr[rsi + UpcallMask]);
        _code.mov(__qword_ptr[rdi], rax);
        _code.mov(rax, __qword_ptr[rsi + PendingSelector]);
        _code.mov(__qword_ptr[rdi + 8], rax);
        _code.bsf(rcx, rax);
        _code.cmovz(ecx, eax);
        _code.mov(rdx, ProbeLayout.SharedInfoPage);
        _code.mov(rax, __qword_ptr[rdx + rcx * 8 + SharedInfoOffset.EvtchnMask]);
        _code.not(rax);
        _code.and(rax, __qword_ptr[rdx + rcx * 8 + SharedInfoOffset.EvtchnPending]);
        _code.mov(__qword_ptr[rdi + 16], rax);
        _code.Label(ref noRoom);
        _code.inc(__qword_ptr[rbx + ProbeLayout.UpcallCount]);

        // Taken as the protocol wants it: flag first, then the selector, then the bits.
        _code.mov(__byte_ptr[rsi + UpcallPending], 0);
        _code.xor(r8d, r8d);
        _code.xchg(__qword_ptr[rsi + PendingSelector], r8);
        _code.Label(ref nextWord);
        _code.bsf(rcx, r8);
        _code.jz(done);
        _code.btr(r8, rcx);
        _code.mov(rdx, ProbeLayout.SharedInfoPage);
        _code.mov(rax, __qword_ptr[rdx + rcx * 8 + SharedInfoOffset.EvtchnMask]);
        _code.@lock.and(__qword_ptr[rdx + rcx * 8 + SharedInfoOffset.EvtchnPending], rax);
        _code.jmp(nextWord);
        _code.Label(ref done);
        _code.jmp(resume);
    }

    /// <summary>Back to where the entry came from, by HYPERVISOR_iret.</summary>
    private void EmitResume(Label resume)
    {
        Place(resume);
        for (int i = 0; i < RegisterCount; i++)
        {
            if (i == StackPointer)
                _code.add(rsp, 8);
            else
                _code.pop(Registers[i]);
        }

        // struct iret_context below RIP: RAX, R11, RCX, flags; the vector's and the error code's places take the last two.
        _code.mov(__qword_ptr[rsp], rcx);
        _code.mov(__qword_ptr[rsp + 8], 0);
        _code.push(r11);
        _code.push(rax);
        _guest.Hypercall(GuestHypercall.Iret);
    }
}
