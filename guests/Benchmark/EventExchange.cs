// Guests that exchange numbered events on several ports at once, and notice what is lost, doubled or out of order.
using System.Runtime.InteropServices;
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>What an end of the exchange has seen.</summary>
/// <param name="Received">Events that came with the number that was due.</param>
/// <param name="Doubled">Events that came with the number of the one before.</param>
/// <param name="Lost">Numbers that were left out, the first of their port behind them included.</param>
[StructLayout(LayoutKind.Sequential)]
public readonly record struct EventExchangeFigures(long Received, long Doubled, long Lost);

/// <summary>
/// Builds the two guests of an exchange. The one that offers grants a page and allocates ports; the one that takes the offer, another
/// guest or a back end of the manager, connects to all of them, maps the page and begins on each port: it writes 1 where its numbers are,
/// and sends. The other answers with the same number, upon which the next follows, up to the number of rounds. The ports go on
/// independently of each other; ends sleep where nothing has come. Both guests write <see cref="Marker"/> and an
/// <see cref="EventExchangeFigures"/> in the end, and power off.
/// </summary>
/// <remarks>A number is written before its event is sent, and no event is sent before the one before it was answered: so each that comes
/// has to find the number that is due, or the sender's event was lost, or came twice.</remarks>
public static class EventExchange
{
    /// <summary>What precedes the figures on a guest's console.</summary>
    public const string Marker = "xensharp-event-exchange\n";

    /// <summary>The reference of the page: the first behind the reserved ones.</summary>
    public const int Reference = 8;

    /// <summary>The first of the ports that are offered, which follow each other.</summary>
    public const int FirstPort = PeerChannelCode.FirstPort;

    /// <summary>Bytes of the page that each port has.</summary>
    public const int Stride = 64;

    /// <summary>In a port's part of the page: the last number, 8 bytes, of the end that offers.</summary>
    public const int OfferedNumber = 0;

    /// <summary>In a port's part of the page: the last number of the end that takes the offer.</summary>
    public const int TakenNumber = 8;

    private const int PageSize = 4096;
    private const int MaxPorts = 32;
    private const int MapGrantReference = 0;
    private const int SetupTable = 2;

    /// <summary>The guest that offers.</summary>
    /// <param name="peer">Domain id of who takes the offer; 0 for a back end.</param>
    /// <param name="ports">1..32.</param>
    /// <param name="rounds">Events of each end on each port.</param>
    public static byte[] BuildOffering(ushort peer, int ports, int rounds) => new Builder(peer, ports, rounds, OfferedNumber, TakenNumber).Build();

    /// <summary>The guest that takes the offer of another.</summary>
    /// <param name="peer">Its domain id.</param>
    /// <param name="ports">As given to <see cref="BuildOffering"/>.</param>
    /// <param name="rounds">As given to <see cref="BuildOffering"/>.</param>
    public static byte[] BuildTaking(ushort peer, int ports, int rounds) => new Builder(peer, ports, rounds, TakenNumber, OfferedNumber).Build();

    /// <summary>Finds what a guest saw in what it printed.</summary>
    /// <exception cref="InvalidDataException">It did not print its figures.</exception>
    public static EventExchangeFigures Find(ReadOnlySpan<byte> console)
        => MemoryMarshal.Read<EventExchangeFigures>(GuestResults.Find(console, Marker, Marshal.SizeOf<EventExchangeFigures>()));

    private sealed class Builder
    {
        private readonly ushort _peer;
        private readonly int _ports;
        private readonly int _rounds;
        private readonly int _own;
        private readonly int _others;
        private readonly PvAssembler _guest = new();
        private readonly PvConsole _console;
        private readonly UpcallCode _upcalls;
        private readonly PeerChannelCode _channels;
        private readonly Assembler _code;
        private readonly ulong _page;
        private readonly ulong _grantTable;
        private readonly ulong _stackTop;
        private readonly ulong _figures;

        /// <summary>The numbers of the last events, 8 bytes for each port.</summary>
        private readonly ulong _last;

        /// <summary>The ports, as EVTCHNOP_send takes them.</summary>
        private readonly ulong _portNumbers;

        public Builder(ushort peer, int ports, int rounds, int own, int others)
        {
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(ports);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(ports, MaxPorts);
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(rounds);
            _peer = peer;
            _ports = ports;
            _rounds = rounds;
            _own = own;
            _others = others;
            _console = new PvConsole(_guest);
            _upcalls = new UpcallCode(_guest, _console);
            _channels = new PeerChannelCode(_guest, peer);
            _code = _guest.Code;
            _page = _guest.Reserve(PageSize, PageSize);
            _grantTable = _guest.Reserve(PageSize, PageSize);
            _stackTop = _guest.Reserve(PageSize, PageSize) + PageSize;
            _figures = _guest.Reserve(Marshal.SizeOf<EventExchangeFigures>());
            _last = _guest.Reserve(ports * sizeof(ulong));
            _portNumbers = _guest.Reserve(ports * sizeof(uint));
        }

        private bool Begins => _own == TakenNumber;

        public byte[] Build()
        {
            Label handler = _code.CreateLabel();
            _console.EmitInitialise();
            _code.mov(rsp, _stackTop);
            _console.EmitMapSharedInfo();
            _upcalls.SetCallback(handler);
            if (Begins)
            {
                Take();
                for (int i = 0; i < _ports; i++)
                {
                    _code.mov(eax, 1);
                    SendNumber(i);
                }
            }
            else
            {
                Offer();
            }

            WaitForAll();
            _console.EmitWrite(_guest.Define(Encoding.ASCII.GetBytes(Marker)), Marker.Length);
            _console.EmitWrite(_figures, Marshal.SizeOf<EventExchangeFigures>());
            _guest.Shutdown(GuestShutdownReason.PowerOff);
            Handle(handler);
            _console.EmitRoutines();
            return _guest.Build(new GuestIdentity("xensharp-event-exchange"));
        }

        private ulong Received => _figures;

        private ulong Doubled => _figures + 8;

        private ulong Lost => _figures + 16;

        private ulong PortOf(int port) => _portNumbers + (ulong)(port * sizeof(uint));

        /// <summary>Grants the page before any port can be connected to.</summary>
        private void Offer()
        {
            const int kernelPage = 0x63;
            const int invalidatePage = 2;
            const int permitAccess = 1;
            const ulong entry = Reference * 8;
            ulong frame = _guest.Reserve(8);
            ulong setup = _guest.Define(BitConverter.GetBytes(PeerChannelCode.DomidSelf | (1UL << 32)));
            _ = _guest.Reserve(8);
            _ = _guest.Define(BitConverter.GetBytes(frame));
            GrantOperation(SetupTable, setup);
            _code.mov(rdi, _grantTable);
            _code.mov(rsi, __qword_ptr[frame]);
            _code.shl(rsi, 12);
            _code.or(rsi, kernelPage);
            _code.mov(edx, invalidatePage);
            _guest.Hypercall(GuestHypercall.UpdateVaMapping);

            // The frame and the domain before the flags, which make it valid.
            _code.mov(rdx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rdx, __qword_ptr[rdx + StartInfoOffset.MfnList]);
            _code.mov(rax, __qword_ptr[rdx + (int)((_page - PvAssembler.VirtBase) / PageSize * sizeof(ulong))]);
            _code.mov(__dword_ptr[_grantTable + entry + 4], eax);
            _code.mov(__word_ptr[_grantTable + entry + 2], _peer);
            _code.mov(__word_ptr[_grantTable + entry], permitAccess);

            ulong offer = _guest.Reserve(PeerChannelCode.OfferBytes);
            for (int i = 0; i < _ports; i++)
            {
                _channels.Offer(offer);
                _code.mov(eax, __dword_ptr[offer + 4]);
                _code.mov(__dword_ptr[PortOf(i)], eax);
            }
        }

        private void Take()
        {
            const ulong mapHost = 2;
            ulong binding = _guest.Reserve(PeerChannelCode.BindingBytes);
            ulong map = _guest.Define(BitConverter.GetBytes(_page));
            _ = _guest.Define(BitConverter.GetBytes(mapHost | ((ulong)Reference << 32)));
            _ = _guest.Define(BitConverter.GetBytes((ulong)_peer));
            _ = _guest.Reserve(8);
            for (int i = 0; i < _ports; i++)
                _channels.Connect(binding, FirstPort + i, PortOf(i));
            _upcalls.ForgetEvents();
            GrantOperation(MapGrantReference, map);
        }

        /// <summary>Sleeps until all events have come.</summary>
        private void WaitForAll()
        {
            Label loop = _code.CreateLabel();
            Label done = _code.CreateLabel();

            // A label may be right before this, and an instruction has but one.
            _code.nop();
            _code.Label(ref loop);
            _code.mov(__byte_ptr[_upcalls.Mask], 1);
            _code.cmp(__qword_ptr[Received], _ports * _rounds);
            _code.jae(done);
            _channels.Block();
            _code.jmp(loop);
            _code.Label(ref done);
            _code.nop();
        }

        private void Handle(Label handler)
        {
            AssemblerRegister64[] kept = [rax, rbx, rdx, rsi, rdi];
            _code.Label(ref handler);
            foreach (AssemblerRegister64 register in kept)
                _code.push(register);
            _upcalls.TakeEvents();
            _code.mov(rbx, rax);
            for (int i = 0; i < _ports; i++)
                HandlePort(i);
            foreach (AssemblerRegister64 register in kept.Reverse())
                _code.pop(register);
            _upcalls.Resume();
        }

        /// <summary>RBX has the ports that are pending.</summary>
        private void HandlePort(int port)
        {
            Label next = _code.CreateLabel();
            Label right = _code.CreateLabel();
            Label doubled = _code.CreateLabel();
            ulong last = _last + ((ulong)port * sizeof(ulong));
            _code.mov(ecx, __dword_ptr[PortOf(port)]);
            _code.bt(rbx, rcx);
            _code.jnc(next);

            // How far the number is ahead of the one that is due.
            _code.mov(rax, __qword_ptr[_page + (ulong)((port * Stride) + _others)]);
            _code.mov(rdx, rax);
            _code.sub(rdx, __qword_ptr[last]);
            _code.dec(rdx);
            _code.js(doubled);
            _code.jz(right);
            _code.add(__qword_ptr[Lost], rdx);
            _code.Label(ref right);
            _code.mov(__qword_ptr[last], rax);
            _code.inc(__qword_ptr[Received]);
            if (Begins)
            {
                _code.cmp(rax, _rounds);
                _code.jae(next);
                _code.inc(rax);
            }

            SendNumber(port);
            _code.jmp(next);
            _code.Label(ref doubled);
            _code.inc(__qword_ptr[Doubled]);
            _code.Label(ref next);

            // An instruction has but one label, and the next port's may begin with one.
            _code.nop();
        }

        /// <summary>Sends with the number in RAX.</summary>
        private void SendNumber(int port)
        {
            _code.mov(__qword_ptr[_page + (ulong)((port * Stride) + _own)], rax);
            _channels.Send(PortOf(port));
        }

        private void GrantOperation(int operation, ulong argument)
        {
            _code.mov(edi, operation);
            _code.mov(rsi, argument);
            _code.mov(edx, 1);
            _guest.Hypercall(GuestHypercall.GrantTableOp);
        }
    }
}
