// What guests have in common that are connected to another domain by event channels.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Scripts.Events;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>Emits code that connects to a peer, sends to it and sleeps. Where nothing else is said RDI, RSI and RAX are lost.</summary>
/// <param name="guest">Where to.</param>
/// <param name="peer">Domain id of the peer.</param>
internal sealed class PeerChannelCode(PvAssembler guest, ushort peer)
{
    /// <summary>Port that a guest's builder leaves free first: behind xenstore's and the console's.</summary>
    public const int FirstPort = 3;

    /// <summary>DOMID_SELF.</summary>
    public const int DomidSelf = 0x7ff0;

    /// <summary>Size of struct evtchn_alloc_unbound.</summary>
    public const int OfferBytes = 8;

    /// <summary>Size of struct evtchn_bind_interdomain.</summary>
    public const int BindingBytes = 12;

    /// <summary>Sends.</summary>
    /// <param name="port">Address of the port, 4 bytes.</param>
    public void Send(ulong port) => Operate(EventOperation.Send, port);

    /// <summary>Allocates a port that the peer can connect to.</summary>
    /// <param name="offer">Address of <see cref="OfferBytes"/>, whose last four get the port.</param>
    public void Offer(ulong offer)
    {
        guest.Code.mov(__dword_ptr[offer], DomidSelf | (peer << 16));
        Operate(EventOperation.AllocUnbound, offer);
    }

    /// <summary>Connects to a port of the peer's, as soon as that is there. To be bound counts as an event.</summary>
    /// <param name="binding">Address of <see cref="BindingBytes"/>.</param>
    /// <param name="remotePort">The peer's port.</param>
    /// <param name="port">Address of 4 bytes that get the own port.</param>
    public void Connect(ulong binding, int remotePort, ulong port)
    {
        Assembler code = guest.Code;
        Label bind = code.CreateLabel();
        Label bound = code.CreateLabel();
        code.Label(ref bind);
        code.mov(__dword_ptr[binding], peer);
        code.mov(__dword_ptr[binding + 4], remotePort);
        Operate(EventOperation.BindInterdomain, binding);
        code.test(rax, rax);
        code.jz(bound);
        Schedule(SchedulerOperation.Yield);
        code.jmp(bind);
        code.Label(ref bound);
        code.mov(eax, __dword_ptr[binding + 8]);
        code.mov(__dword_ptr[port], eax);
    }

    /// <summary>Sleeps until an event comes, and unmasks events at once with going to sleep.</summary>
    public void Block() => Schedule(SchedulerOperation.Block);

    private void Operate(EventOperation operation, ulong arguments)
    {
        guest.Code.mov(edi, (int)operation);
        guest.Code.mov(rsi, arguments);
        guest.Hypercall(GuestHypercall.EventChannelOp);
    }

    private void Schedule(SchedulerOperation operation)
    {
        guest.Code.mov(edi, (int)operation);
        guest.Code.xor(esi, esi);
        guest.Hypercall(GuestHypercall.SchedOp);
    }
}
