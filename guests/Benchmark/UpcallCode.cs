// What the measuring guests have in common: reading the clock, and the ways into and out of an upcall.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>Emits code for the time-stamp counter and for event upcalls on vCPU 0, of whose ports only the first 64 are looked at.</summary>
/// <param name="guest">Where to.</param>
/// <param name="console">Knows where the shared info page is.</param>
internal sealed class UpcallCode(PvAssembler guest, PvConsole console)
{
    /// <summary>Address of evtchn_upcall_pending.</summary>
    public ulong Pending => console.SharedInfoAddress;

    /// <summary>Address of evtchn_upcall_mask.</summary>
    public ulong Mask => console.SharedInfoAddress + 1;

    /// <summary>The time-stamp counter in RAX; RDX is lost.</summary>
    public void ReadTsc()
    {
        guest.Code.rdtsc();
        guest.Code.shl(rdx, 32);
        guest.Code.or(rax, rdx);
    }

    /// <summary>Has events come at a label from here on, once they are unmasked.</summary>
    public void SetCallback(Label handler)
    {
        guest.Code.lea(rdi, __[handler]);
        guest.Code.xor(esi, esi);
        guest.Code.xor(edx, edx);
        guest.Hypercall(GuestHypercall.SetCallbacks);
    }

    /// <summary>Takes all events as seen. One that comes meanwhile makes an upcall, if not a bit.</summary>
    public void ForgetEvents()
    {
        guest.Code.mov(__byte_ptr[Pending], 0);
        guest.Code.mov(__qword_ptr[console.SharedInfoAddress + 8], 0);
        guest.Code.mov(__qword_ptr[console.SharedInfoAddress + SharedInfoOffset.EvtchnPending], 0);
    }

    /// <summary>Takes what is pending of the first 64 ports, as bits in RAX. What comes later makes an upcall of its own.</summary>
    public void TakeEvents()
    {
        // In the order that senders set them in, backwards; an exchange with memory is locked.
        guest.Code.mov(__byte_ptr[Pending], 0);
        guest.Code.xor(eax, eax);
        guest.Code.xchg(__qword_ptr[console.SharedInfoAddress + 8], rax);
        guest.Code.xor(eax, eax);
        guest.Code.xchg(__qword_ptr[console.SharedInfoAddress + SharedInfoOffset.EvtchnPending], rax);
    }

    /// <summary>Takes all events as seen and returns, as <see cref="Resume"/>.</summary>
    public void Return()
    {
        ForgetEvents();
        Resume();
    }

    /// <summary>
    /// Returns from an upcall. RSP: RCX, R11, RIP, CS, RFLAGS, RSP, SS, as pushed by it; RAX is the interrupted code's.
    /// </summary>
    public void Resume()
    {
        guest.Code.mov(r11, __qword_ptr[rsp + 8]);
        guest.Code.mov(__qword_ptr[rsp + 8], 0);
        guest.Code.push(r11);
        guest.Code.push(rax);
        guest.Hypercall(GuestHypercall.Iret);
    }
}
