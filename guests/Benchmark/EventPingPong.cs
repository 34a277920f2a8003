// Two guests that send each other events in turn, and measure how long one takes.
using System.Runtime.InteropServices;
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>How those wait that an event is sent to.</summary>
public enum PingPongWait
{
    /// <summary>In a loop of their own, with events unmasked.</summary>
    Running,

    /// <summary>In SCHEDOP_block.</summary>
    Sleeping,

    /// <summary>As <see cref="Running"/>, while their event handlers answer before they return, as those of drivers do.</summary>
    Answering,
}

/// <summary>
/// Builds the two guests. The first allocates a port that the second binds to; from then on each answers an event of the other's by one of
/// its own: first from the handler, then from what the handler has returned to, running and sleeping. The first writes <see cref="Marker"/> and <see cref="ResultBytes"/> bytes for
/// <see cref="Nanoseconds"/>, and both power off.
/// </summary>
/// <remarks>Without rounds they are a storm: see <see cref="BuildFlood"/>.</remarks>
public static class EventPingPong
{
    /// <summary>What precedes the results on the first guest's console.</summary>
    public const string Marker = "xensharp-ping-pong\n";

    private const int PageSize = 4096;

    /// <summary>Those who answer an event once its handler has returned.</summary>
    private static readonly PingPongWait[] s_outsideHandler = [PingPongWait.Running, PingPongWait.Sleeping];

    private static readonly int s_waits = Enum.GetValues<PingPongWait>().Length;

    /// <summary>Size of the results: the TSC ticks of all events of one way of waiting, and how many events came.</summary>
    public static int ResultBytes => (s_waits + 1) * sizeof(ulong);

    /// <summary>Time from one guest's EVTCHNOP_send to the next of the other, in nanoseconds.</summary>
    /// <param name="wait">How they waited.</param>
    /// <param name="results">As the first guest printed them.</param>
    /// <param name="kiloHertz">Of the time-stamp counter.</param>
    /// <param name="rounds">As given to <see cref="Build"/>.</param>
    public static double Nanoseconds(PingPongWait wait, ReadOnlySpan<byte> results, double kiloHertz, int rounds)
        => MemoryMarshal.Cast<byte, ulong>(results)[(int)wait] / kiloHertz * 1e6 / (2 * rounds);

    /// <summary>Events that the first guest had, the one by which the second says that it is there included.</summary>
    /// <param name="results">As it printed them.</param>
    public static long Received(ReadOnlySpan<byte> results) => MemoryMarshal.Cast<byte, long>(results)[s_waits];

    /// <summary>The image of one of them.</summary>
    /// <param name="peer">Domain id of the other.</param>
    /// <param name="isFirst">Whether it is the one that begins.</param>
    /// <param name="rounds">Events that each sends for each way of waiting.</param>
    public static byte[] Build(ushort peer, bool isFirst, int rounds)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(rounds);
        return new Builder(peer, rounds).Build(isFirst);
    }

    /// <summary>The image of one of two that, once connected as the others, send to each other without a pause and without end.</summary>
    /// <param name="peer">Domain id of the other.</param>
    /// <param name="isFirst">Whether it is the one that the other connects to.</param>
    public static byte[] BuildFlood(ushort peer, bool isFirst) => new Builder(peer, rounds: 0).Build(isFirst);

    private sealed class Builder
    {
        private readonly int _rounds;
        private readonly PvAssembler _guest = new();
        private readonly PvConsole _console;
        private readonly UpcallCode _upcalls;
        private readonly PeerChannelCode _channel;
        private readonly Assembler _code;
        private readonly ulong _stackTop;
        private readonly ulong _results;
        private readonly ulong _start;
        private readonly ulong _binding;

        /// <summary>The port to send to, as EVTCHNOP_send takes it.</summary>
        private readonly ulong _port;

        /// <summary>Events that have come; the last of the results.</summary>
        private readonly ulong _received;

        /// <summary>Events that the handler still answers.</summary>
        private readonly ulong _answers;

        public Builder(ushort peer, int rounds)
        {
            _rounds = rounds;
            _console = new PvConsole(_guest);
            _upcalls = new UpcallCode(_guest, _console);
            _channel = new PeerChannelCode(_guest, peer);
            _code = _guest.Code;
            _results = _guest.Reserve(ResultBytes);
            _received = _results + ((ulong)s_waits * sizeof(ulong));
            _start = _guest.Reserve(sizeof(ulong));
            _binding = _guest.Reserve(PeerChannelCode.BindingBytes);
            _port = _guest.Reserve(4);
            _answers = _guest.Reserve(4);
            _stackTop = _guest.Reserve(PageSize, PageSize) + PageSize;
        }

        public byte[] Build(bool isFirst)
        {
            Label handler = _code.CreateLabel();
            _console.EmitInitialise();
            _code.mov(rsp, _stackTop);
            _console.EmitMapSharedInfo();
            _upcalls.SetCallback(handler);
            if (isFirst)
            {
                BeFirst();
                _console.EmitWrite(_guest.Define(Encoding.ASCII.GetBytes(Marker)), Marker.Length);
                _console.EmitWrite(_results, ResultBytes);
            }
            else
            {
                BeSecond();
            }

            _guest.Shutdown(GuestShutdownReason.PowerOff);
            _code.Label(ref handler);
            Handle();
            _console.EmitRoutines();
            return _guest.Build(new GuestIdentity("xensharp-ping-pong"));
        }

        private void BeFirst()
        {
            _channel.Offer(_binding);
            _code.mov(__dword_ptr[_port], PeerChannelCode.FirstPort);
            Unmask();

            // The second says that it is there.
            _code.xor(ebx, ebx);
            WaitForMore(PingPongWait.Running);
            FloodIfWithoutRounds();
            Measure(PingPongWait.Answering, () =>
            {
                _code.mov(__dword_ptr[_answers], _rounds - 1);
                _channel.Send(_port);
                WaitForTotal(1 + _rounds);
            });
            foreach (PingPongWait wait in s_outsideHandler)
            {
                Measure(wait, () => Repeat(() =>
                {
                    _channel.Send(_port);
                    WaitForMore(wait);
                }));
            }
        }

        private void Measure(PingPongWait wait, Action body)
        {
            _upcalls.ReadTsc();
            _code.mov(__qword_ptr[_start], rax);
            body();
            _upcalls.ReadTsc();
            _code.sub(rax, __qword_ptr[_start]);
            _code.mov(__qword_ptr[_results + ((ulong)wait * sizeof(ulong))], rax);
        }

        private void BeSecond()
        {
            _channel.Connect(_binding, PeerChannelCode.FirstPort, _port);
            _upcalls.ForgetEvents();
            _code.xor(ebx, ebx);
            _code.mov(__dword_ptr[_answers], _rounds);
            Unmask();
            _channel.Send(_port);
            FloodIfWithoutRounds();
            WaitForTotal(_rounds);
            foreach (PingPongWait wait in s_outsideHandler)
            {
                Repeat(() =>
                {
                    WaitForMore(wait);
                    _channel.Send(_port);
                });
            }
        }

        private void Handle()
        {
            Label answered = _code.CreateLabel();
            _upcalls.ForgetEvents();
            _code.inc(__dword_ptr[_received]);
            _code.cmp(__dword_ptr[_answers], 0);
            _code.je(answered);
            _code.dec(__dword_ptr[_answers]);
            _code.push(rax);
            _code.push(rdi);
            _code.push(rsi);
            _channel.Send(_port);
            _code.pop(rsi);
            _code.pop(rdi);
            _code.pop(rax);
            _code.Label(ref answered);
            _upcalls.Resume();
        }

        private void FloodIfWithoutRounds()
        {
            if (_rounds != 0)
                return;
            Label loop = _code.CreateLabel();
            _code.Label(ref loop);
            _channel.Send(_port);
            _code.jmp(loop);
        }

        /// <summary>Runs the body once for each round; R12 counts.</summary>
        private void Repeat(Action body)
        {
            _code.mov(r12d, _rounds);
            Label loop = _code.CreateLabel();
            _code.Label(ref loop);
            body();
            _code.dec(r12d);
            _code.jnz(loop);
        }

        private void Unmask()
        {
            // A hypercall delivers what has become pending before.
            _code.mov(__byte_ptr[_upcalls.Mask], 0);
            _code.xor(edi, edi);
            _code.xor(esi, esi);
            _guest.Hypercall(GuestHypercall.XenVersion);
        }

        /// <summary>Waits, running, until a number of events have come, and has EBX be that number, which more may exceed by now.</summary>
        private void WaitForTotal(int events)
        {
            Label loop = _code.CreateLabel();

            // A label may be right before this, and an instruction has but one.
            _code.nop();
            _code.Label(ref loop);
            _code.pause();
            _code.cmp(__dword_ptr[_received], events);
            _code.jb(loop);
            _code.mov(ebx, events);
        }

        /// <summary>Waits until more events have come than EBX says, and counts EBX up to there.</summary>
        private void WaitForMore(PingPongWait wait)
        {
            Label loop = _code.CreateLabel();
            Label sleep = _code.CreateLabel();
            Label done = _code.CreateLabel();

            // A label may be right before this, and an instruction has but one.
            _code.nop();
            if (wait == PingPongWait.Running)
            {
                _code.Label(ref loop);
                _code.pause();
                _code.cmp(__dword_ptr[_received], ebx);
                _code.je(loop);
            }
            else
            {
                _code.Label(ref sleep);
                _code.mov(__byte_ptr[_upcalls.Mask], 1);
                _code.cmp(__dword_ptr[_received], ebx);
                _code.jne(done);
                _channel.Block();
                _code.jmp(sleep);
                _code.Label(ref done);
                _code.mov(__byte_ptr[_upcalls.Mask], 0);
            }

            _code.mov(ebx, __dword_ptr[_received]);
        }
    }
}
