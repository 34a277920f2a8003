// The guest's end of its console: finding the ring page, writing with back-pressure, and blocking reads.
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Assembly;

/// <summary>
/// Emits console routines into a <see cref="PvAssembler"/>. The initial domain, which has no ring, writes through
/// HYPERVISOR_console_io instead, so that the same guest runs as dom0 of a real Xen.
/// </summary>
/// <remarks>
/// Order of use: <see cref="EmitInitialise"/> in line, early, while RSI still points at start_info; <see cref="EmitWrite(ulong, int)"/>
/// and the like wherever output is wanted; <see cref="EmitRoutines"/> once, where execution cannot fall into it.
/// </remarks>
public sealed class PvConsole
{
    /// <summary>Where the machine-to-physical table is, if the hypervisor does not say (MACH2PHYS_VIRT_START of xen-x86_64.h).</summary>
    internal const ulong Mach2PhysVirtStart = 0xffff800000000000;

    const int XenmemMachphysMapping = 12;
    const int EvtchnopSend = 4;
    const int SchedopYield = 0;
    const int SchedopPoll = 3;
    const int ConsoleioWrite = 0;
    const int UvmfInvlpg = 2;
    const int PageSize = 4096;

    readonly PvAssembler guest;
    readonly Assembler code;
    readonly ulong startInfo;
    readonly ulong ring;
    readonly ulong port;
    readonly ulong initialDomain;
    readonly ulong machphysMapping;
    readonly ulong sharedInfo;
    readonly ulong poll;
    Label write;
    Label read;
    Label notify;

    public PvConsole(PvAssembler guest)
    {
        ArgumentNullException.ThrowIfNull(guest);
        this.guest = guest;
        code = guest.Code;
        startInfo = guest.Reserve(8);
        ring = guest.Reserve(8);
        port = guest.Reserve(8);
        initialDomain = guest.Reserve(8);
        machphysMapping = guest.Reserve(24);
        poll = guest.Reserve(24);
        sharedInfo = guest.Reserve(PageSize, PageSize);
        write = code.CreateLabel("console_write");
        read = code.CreateLabel("console_read");
        notify = code.CreateLabel("console_notify");
    }

    /// <summary>Address of the 8-byte variable that holds the virtual address of start_info after the initialisation.</summary>
    public ulong StartInfoVariable => startInfo;

    /// <summary>Address where the shared info page is mapped, once <see cref="EmitMapSharedInfo()"/> has run.</summary>
    public ulong SharedInfoAddress => sharedInfo;

    /// <summary>Emits, in line: keeps start_info (RSI) and finds the ring by way of the machine-to-physical table.</summary>
    public void EmitInitialise()
    {
        Label done = code.CreateLabel();
        Label haveMapping = code.CreateLabel();

        code.mov(__qword_ptr[startInfo], rsi);
        code.mov(rbx, rsi);
        code.mov(eax, __dword_ptr[rbx + StartInfoOffset.Flags]);
        code.and(eax, StartInfoOffset.FlagInitDomain);
        code.mov(__dword_ptr[initialDomain], eax);
        code.jnz(done);

        code.mov(eax, __dword_ptr[rbx + StartInfoOffset.ConsoleEvtchn]);
        code.mov(__dword_ptr[port], eax);

        // The table is not at its classic address in every hypervisor; ask, and fall back on the constant of the header.
        code.mov(edi, XenmemMachphysMapping);
        code.mov(rsi, machphysMapping);
        guest.Hypercall(GuestHypercall.MemoryOp);
        code.mov(rdx, __qword_ptr[machphysMapping]);
        code.test(rax, rax);
        code.jz(haveMapping);
        code.mov(rdx, Mach2PhysVirtStart);
        code.Label(ref haveMapping);

        code.mov(rax, __qword_ptr[rbx + StartInfoOffset.ConsoleMfn]);
        code.mov(rax, __qword_ptr[rdx + rax * 8]);
        code.shl(rax, 12);
        code.mov(rdx, PvAssembler.VirtBase);
        code.add(rax, rdx);
        code.mov(__qword_ptr[ring], rax);
        code.Label(ref done);
        // A label names the instruction that follows it, and the caller's next one may carry a label of its own.
        code.nop();
    }

    /// <summary>Emits, in line: writes bytes of the image.</summary>
    public void EmitWrite(ulong address, int length)
    {
        code.mov(rdi, address);
        code.mov(esi, length);
        EmitWriteCall();
    }

    /// <summary>Emits, in line: writes RSI bytes from the address in RDI, waiting while the ring is full.</summary>
    public void EmitWriteCall() => code.call(write);

    /// <summary>Emits, in line: waits, yielding, until the other end has taken all that was written.</summary>
    internal void EmitDrain()
    {
        Label look = code.CreateLabel();
        Label drained = code.CreateLabel();

        code.cmp(__dword_ptr[initialDomain], 0);
        code.jne(drained);
        code.Label(ref look);
        code.mov(rdx, __qword_ptr[ring]);
        code.mov(eax, __dword_ptr[rdx + ConsoleRingOffset.OutProd]);
        code.cmp(eax, __dword_ptr[rdx + ConsoleRingOffset.OutCons]);
        code.je(drained);
        EmitYield();
        code.jmp(look);
        code.Label(ref drained);
        // A label names the instruction that follows it, and the caller's next one may carry a label of its own.
        code.nop();
    }

    /// <summary>
    /// Emits, in line: waits for input and moves what is there, up to RSI bytes, to the address in RDI; the count comes in RAX
    /// and is at least 1. Needs the shared info page and a console ring, so not for the initial domain.
    /// </summary>
    public void EmitReadCall() => code.call(read);

    /// <summary>Emits, in line: maps the shared info page; RAX is the result of HYPERVISOR_update_va_mapping.</summary>
    public void EmitMapSharedInfo() => EmitMapSharedInfo(sharedInfo);

    /// <summary>Emits, in line: maps the shared info page at a page of the image; RAX is the result of HYPERVISOR_update_va_mapping.</summary>
    internal void EmitMapSharedInfo(ulong address)
    {
        // Present, writable, accessed, dirty. The hypervisor adds the user bit that ring 3 needs, as for every kernel mapping.
        const int KernelPage = 0x63;
        code.mov(rax, __qword_ptr[startInfo]);
        code.mov(rsi, __qword_ptr[rax + StartInfoOffset.SharedInfo]);
        code.or(rsi, KernelPage);
        code.mov(rdi, address);
        code.mov(edx, UvmfInvlpg);
        guest.Hypercall(GuestHypercall.UpdateVaMapping);
    }

    /// <summary>Emits the routines that the calls lead to.</summary>
    public void EmitRoutines()
    {
        EmitWriteRoutine();
        EmitReadRoutine();
        EmitNotifyRoutine();
    }

    void EmitWriteRoutine()
    {
        Label next = code.CreateLabel();
        Label waitForSpace = code.CreateLabel();
        Label full = code.CreateLabel();
        Label hypervisorConsole = code.CreateLabel();
        Label written = code.CreateLabel();
        Label leave = code.CreateLabel();

        code.Label(ref write);
        code.push(rbx);
        code.push(rbp);
        code.push(r12);
        code.mov(rbx, rdi);
        code.mov(rbp, rsi);
        code.mov(r12, __qword_ptr[ring]);
        code.cmp(__dword_ptr[initialDomain], 0);
        code.jne(hypervisorConsole);

        code.Label(ref next);
        code.test(rbp, rbp);
        code.jz(written);
        code.mov(eax, __dword_ptr[r12 + ConsoleRingOffset.OutProd]);
        code.mov(edx, eax);
        code.sub(edx, __dword_ptr[r12 + ConsoleRingOffset.OutCons]);
        code.cmp(edx, ConsoleRingOffset.OutSize);
        code.jae(full);
        code.mov(edx, eax);
        code.and(edx, ConsoleRingOffset.OutSize - 1);
        code.mov(cl, __byte_ptr[rbx]);
        code.mov(__byte_ptr[r12 + rdx + ConsoleRingOffset.Out], cl);
        // x86 keeps stores in order, so the reader that sees the index sees the byte.
        code.inc(eax);
        code.mov(__dword_ptr[r12 + ConsoleRingOffset.OutProd], eax);
        code.inc(rbx);
        code.dec(rbp);
        code.jmp(next);

        // Told once that the ring is full, the other end owes us room; asking again and again would only slow it down.
        code.Label(ref full);
        code.call(notify);
        code.Label(ref waitForSpace);
        EmitYield();
        code.mov(eax, __dword_ptr[r12 + ConsoleRingOffset.OutProd]);
        code.sub(eax, __dword_ptr[r12 + ConsoleRingOffset.OutCons]);
        code.cmp(eax, ConsoleRingOffset.OutSize);
        code.jae(waitForSpace);
        code.jmp(next);

        code.Label(ref hypervisorConsole);
        code.mov(edi, ConsoleioWrite);
        code.mov(esi, ebp);
        code.mov(rdx, rbx);
        guest.Hypercall(GuestHypercall.ConsoleIo);
        code.jmp(leave);

        code.Label(ref written);
        code.call(notify);
        code.Label(ref leave);
        code.pop(r12);
        code.pop(rbp);
        code.pop(rbx);
        code.ret();
    }

    void EmitReadRoutine()
    {
        Label look = code.CreateLabel();
        Label move = code.CreateLabel();
        Label moved = code.CreateLabel();

        code.Label(ref read);
        code.push(rbx);
        code.push(rbp);
        code.push(r12);
        code.mov(rbx, rdi);
        code.mov(rbp, rsi);
        code.mov(r12, __qword_ptr[ring]);

        // Clear the pending bit before looking: an event that comes after the look then still ends the poll.
        code.Label(ref look);
        code.mov(ecx, __dword_ptr[port]);
        code.mov(rdx, sharedInfo);
        code.@lock.btr(__qword_ptr[rdx + SharedInfoOffset.EvtchnPending], rcx);
        code.mov(eax, __dword_ptr[r12 + ConsoleRingOffset.InCons]);
        code.cmp(eax, __dword_ptr[r12 + ConsoleRingOffset.InProd]);
        code.mov(ecx, 0);
        code.jne(move);
        // struct sched_poll: ports, nr_ports, timeout; timeout 0 waits for ever.
        code.mov(rsi, poll);
        code.mov(rax, port);
        code.mov(__qword_ptr[rsi], rax);
        code.mov(__dword_ptr[rsi + 8], 1);
        code.mov(__qword_ptr[rsi + 16], 0);
        code.mov(edi, SchedopPoll);
        guest.Hypercall(GuestHypercall.SchedOp);
        code.jmp(look);

        code.Label(ref move);
        code.cmp(rcx, rbp);
        code.jae(moved);
        code.cmp(eax, __dword_ptr[r12 + ConsoleRingOffset.InProd]);
        code.je(moved);
        code.mov(edx, eax);
        code.and(edx, ConsoleRingOffset.InSize - 1);
        code.mov(dl, __byte_ptr[r12 + rdx + ConsoleRingOffset.In]);
        code.mov(__byte_ptr[rbx + rcx], dl);
        code.inc(eax);
        code.inc(rcx);
        code.jmp(move);

        code.Label(ref moved);
        code.mov(__dword_ptr[r12 + ConsoleRingOffset.InCons], eax);
        code.mov(rbx, rcx);
        // The other end may be holding back input for which there was no room.
        code.call(notify);
        code.mov(rax, rbx);
        code.pop(r12);
        code.pop(rbp);
        code.pop(rbx);
        code.ret();
    }

    void EmitNotifyRoutine()
    {
        // struct evtchn_send is the port alone.
        code.Label(ref notify);
        code.mov(edi, EvtchnopSend);
        code.mov(rsi, port);
        guest.Hypercall(GuestHypercall.EventChannelOp);
        code.ret();
    }

    void EmitYield()
    {
        code.mov(edi, SchedopYield);
        code.xor(esi, esi);
        guest.Hypercall(GuestHypercall.SchedOp);
    }
}
