// The probe guest as one of two domains: how they find each other, and how they take turns.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Probe;

internal sealed partial class ProbeInterpreter
{
    // EVTCHNOP_* and GNTTABOP_* that the interpreter itself uses.
    private const uint ClosePort = 3;
    private const uint PortStatus = 5;
    private const uint AllocUnbound = 6;
    private const uint MapGrantRef = 0;
    private const uint SetupTable = 2;
    private const uint Copy = 5;

    private const int MapHost = 2;
    private const ulong SourceIsReference = 1;
    private const int PermitAccess = 1;

    /// <summary>
    /// Reference of the pair's page: the last of those that the toolstack may use and does not. A grant table may change its version while
    /// these are in use.
    /// </summary>
    private const int PairReference = 7;

    /// <summary>Pseudo-physical frame of the page, in either domain's own memory.</summary>
    private const int PairPageFrame = (int)((ProbeLayout.PairPage - PvAssembler.VirtBase) >> 12);

    /// <summary>
    /// Finds out the domains' numbers, and shares the page of turns: "a" grants it, "b" maps it as soon as it can. What that takes leaves
    /// ports as they were. Results go into R13.
    /// </summary>
    private void EmitMeetPeer(PairSide side)
    {
        EmitFindNumbers(side);
        if (side == PairSide.A)
            EmitGrantPairPage();
        else
            EmitMapPairPage();
    }

    /// <summary>start_info has no domain's number; the status of an unbound port that is its own tells it.</summary>
    private void EmitFindNumbers(PairSide side)
    {
        const int StatusDomain = 16;
        ulong request = _guest.Define(BitConverter.GetBytes((ulong)(DomidSelf | (DomidSelf << 16))));
        ulong status = _guest.Reserve(24);
        EmitOperation(GuestHypercall.EventChannelOp, AllocUnbound, request);
        _code.mov(eax, __dword_ptr[request + 4]);
        _code.mov(__dword_ptr[status + 4], eax);
        _code.mov(eax, DomidSelf);
        _code.mov(__dword_ptr[status], eax);
        EmitOperation(GuestHypercall.EventChannelOp, PortStatus, status);
        _code.movzx(eax, __word_ptr[status + StatusDomain]);
        _code.mov(__qword_ptr[_variables.OwnDomain], rax);
        _code.add(eax, side == PairSide.A ? 1 : -1);
        _code.mov(__qword_ptr[_variables.PeerDomain], rax);
        EmitOperation(GuestHypercall.EventChannelOp, ClosePort, request + 4);
    }

    private void EmitGrantPairPage()
    {
        const int Page = 0x63;
        const int Entry = PairReference * 8;
        ulong frame = _guest.Reserve(8);
        ulong setup = _guest.Define(BitConverter.GetBytes(DomidSelf | (1UL << 32)));
        _ = _guest.Reserve(8);
        _ = _guest.Define(BitConverter.GetBytes(frame));
        EmitGrantOperation(SetupTable, setup);
        _code.or(r13, rax);
        _code.mov(rdi, ProbeLayout.GrantTablePage);
        _code.mov(rsi, __qword_ptr[frame]);
        _code.shl(rsi, 12);
        _code.or(rsi, Page);
        _code.mov(edx, InvalidatePage);
        _guest.Hypercall(GuestHypercall.UpdateVaMapping);
        _code.or(r13, rax);

        // The frame and the domain before the flags, which make it valid.
        _code.mov(rdx, __qword_ptr[_variables.PhysToMachine]);
        _code.mov(rax, __qword_ptr[rdx + PairPageFrame * 8]);
        _code.mov(rdi, ProbeLayout.GrantTablePage);
        _code.mov(__dword_ptr[rdi + Entry + 4], eax);
        _code.mov(rax, __qword_ptr[_variables.PeerDomain]);
        _code.mov(__word_ptr[rdi + Entry + 2], ax);
        _code.mov(__word_ptr[rdi + Entry], PermitAccess);
    }

    private void EmitMapPairPage()
    {
        const int MapDomain = 16;
        const int MapStatus = 18;
        const int CopyDomain = 8;
        const int CopyFrame = 16;
        const int CopyStatus = 36;
        const ulong EightBytesFromReference = 8 | (SourceIsReference << 16);
        Label again = _code.CreateLabel();
        ulong copy = _guest.Define(BitConverter.GetBytes((ulong)PairReference));
        _ = _guest.Reserve(16);
        _ = _guest.Define(BitConverter.GetBytes((ulong)DomidSelf));
        _ = _guest.Define(BitConverter.GetBytes(EightBytesFromReference));
        ulong map = _guest.Define(BitConverter.GetBytes(ProbeLayout.PairPage));
        _ = _guest.Define(BitConverter.GetBytes(MapHost | ((ulong)PairReference << 32)));
        _ = _guest.Reserve(16);
        _code.mov(rax, __qword_ptr[_variables.PeerDomain]);
        _code.mov(__word_ptr[copy + CopyDomain], ax);
        _code.mov(__word_ptr[map + MapDomain], ax);
        _code.mov(rdx, __qword_ptr[_variables.PhysToMachine]);
        _code.mov(rax, __qword_ptr[rdx + PairPageFrame * 8]);
        _code.mov(__qword_ptr[copy + CopyFrame], rax);

        // "a" may not have come so far. Unlike mappings, copies that fail use up no handles.
        _code.Label(ref again);
        EmitYield();
        EmitGrantOperation(Copy, copy);
        _code.or(r13, rax);
        _code.cmp(__word_ptr[copy + CopyStatus], 0);
        _code.jne(again);
        EmitGrantOperation(MapGrantRef, map);
        _code.or(r13, rax);
        _code.movzx(eax, __word_ptr[map + MapStatus]);
        _code.or(r13, rax);
    }

    private void EmitOperation(GuestHypercall hypercall, uint operation, ulong argument)
    {
        _code.mov(edi, operation);
        _code.mov(rsi, argument);
        _guest.Hypercall(hypercall);
        _code.or(r13, rax);
    }

    private void EmitGrantOperation(uint operation, ulong argument)
    {
        _code.mov(edi, operation);
        _code.mov(rsi, argument);
        _code.mov(edx, 1);
        _guest.Hypercall(GuestHypercall.GrantTableOp);
    }

    private void EmitTurn()
    {
        Label passed = _code.CreateLabel();
        Label look = _code.CreateLabel();

        Place(_operations[StepOperation.Turn]);
        _code.call(_evaluate);
        _code.mov(r13, ProbeLayout.PairPage);
        _code.test(rax, rax);
        _code.jz(passed);
        _code.mov(__qword_ptr[r13], rax);
        _code.Label(ref passed);
        _code.call(_evaluate);
        _code.mov(r14, rax);
        _code.test(r14, r14);
        _code.jz(_stepDone);
        _code.Label(ref look);
        EmitYield();
        _code.cmp(__qword_ptr[r13], r14);
        _code.jb(look);

        // What the other domain sent in its turn is delivered at the latest when this hypercall returns.
        EmitYield();
        _code.jmp(_stepDone);
    }

    private void EmitYield()
    {
        _code.mov(edi, Yield);
        _code.xor(esi, esi);
        _guest.Hypercall(GuestHypercall.SchedOp);
    }
}
