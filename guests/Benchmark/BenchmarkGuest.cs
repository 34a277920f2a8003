// The guest that measures the ABI from inside: each figure is a TSC difference around a counted loop.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>What <see cref="BenchmarkGuest"/> measures, in the order of its results.</summary>
public enum BenchmarkFigure
{
    /// <summary>xen_version(XENVER_version).</summary>
    NullHypercall,

    /// <summary>SYSCALL in user mode, bounced to the kernel's callback, and HYPERVISOR_iret back.</summary>
    UserSystemCall,

    /// <summary>A read of an unmapped address in kernel mode, bounced to the handler, and HYPERVISOR_iret back.</summary>
    PageFault,

    /// <summary>mmu_update of one entry a call: writable and read-only in turn, marked as accessed.</summary>
    MmuUpdate1,

    /// <summary>The same with 32 neighbouring entries a call; the figure is for one entry.</summary>
    MmuUpdate32,

    /// <summary>The same with 512 entries a call; the figure is for one entry.</summary>
    MmuUpdate512,

    /// <summary>mmu_update of 32 entries a call that were never used: present and not present in turn; for one entry.</summary>
    MmuUpdateUnused32,

    /// <summary>XCHG with an entry of an L1 table, which is mapped read-only: writable and read-only in turn, marked as accessed.</summary>
    PageTableExchange,

    /// <summary>An event sent to the own vCPU: EVTCHNOP_send, the upcall, HYPERVISOR_iret back.</summary>
    EventToSelf,

    /// <summary>
    /// An mmu_update of a million entries under a periodic timer: how long a tick has to wait, the median. It is what the time from one
    /// tick to the next has beyond the period.
    /// </summary>
    TickDuringLongBatch,
}

/// <summary>
/// Builds the benchmark guest. It writes one line, <see cref="Marker"/>, then <see cref="ResultBytes"/> bytes, which
/// <see cref="Nanoseconds"/> reads, and powers off.
/// </summary>
public static class BenchmarkGuest
{
    /// <summary>What precedes the results on the console.</summary>
    public const string Marker = "xensharp-benchmark\n";

    /// <summary>Nanoseconds between the ticks of <see cref="BenchmarkFigure.TickDuringLongBatch"/>, the least that Xen allows.</summary>
    private const int TimerPeriod = 1_000_000;

    /// <summary>Ticks that are recorded.</summary>
    private const int Ticks = 256;

    private static readonly int s_figures = Enum.GetValues<BenchmarkFigure>().Length;

    /// <summary>Size of the results: eight bytes a figure, the TSC ticks of all its iterations, and those from one timer tick to the next.</summary>
    public static int ResultBytes => (s_figures + Ticks) * sizeof(ulong);

    /// <summary>Requests of the long batch: some more than a million.</summary>
    private const int LongBatch = 977 * 2 * VictimPages;

    /// <summary>Where they are: behind all else, so that the image has no room for them in its file.</summary>
    private const ulong LongBatchStart = PvAssembler.ImageBase + (8 << 20);

    /// <summary>Entries that the mmu_update figures work on.</summary>
    private const int VictimPages = 512;

    private const int PageSize = 4096;
    private const int RequestSize = 16;
    private const uint FlatKernelSs = 0xe02b;
    private const ulong FlatUserCs = 0xe033;
    // No event is bound by then that could become pending.
    private const ulong UserFlags = 0x202;
    private const int CallbackSyscall = 2;
    private const int CallbackMasksEvents = 1;
    private const int EntriesPerTable = 512;
    private const uint ReadOnlyPage = 0x21;
    private const ulong FrameMask = 0x000f_ffff_ffff_f000;
    private const uint DomidSelf = 0x7ff0;
    private const uint NewUserBaseptr = 15;
    private const uint FlushOnePage = 2;
    private const uint MachphysMapping = 12;
    private const uint BindIpi = 7;
    private const uint Send = 4;
    private const uint BindVirq = 1;
    private const uint SetPeriodicTimer = 6;
    private const uint StopPeriodicTimer = 7;
    private const uint WritablePageTables = 2;
    private const byte PageFaultVector = 14;
    private const ulong UnmappedAddress = 0x1000;

    // What the two versions of an entry that is rewritten have: present, writable, accessed, dirty; and without writable.
    private const uint WritableEntry = 0x63;
    private const uint ReadOnlyEntry = 0x61;
    private const uint UnusedEntry = 0x3;

    /// <summary>What the results say of a figure, in nanoseconds: of one operation, or of the wait that is measured.</summary>
    /// <param name="figure">Which.</param>
    /// <param name="results">As the guest printed them, <see cref="ResultBytes"/>.</param>
    /// <param name="kiloHertz">Of the guest's time-stamp counter.</param>
    /// <param name="iterations">As given to <see cref="Build"/>.</param>
    /// <exception cref="InvalidDataException">No timer tick came during the long batch.</exception>
    public static double Nanoseconds(BenchmarkFigure figure, ReadOnlySpan<byte> results, double kiloHertz, int iterations)
    {
        ReadOnlySpan<ulong> ticks = MemoryMarshal.Cast<byte, ulong>(results);
        if (figure != BenchmarkFigure.TickDuringLongBatch)
            return ticks[(int)figure] / kiloHertz * 1e6 / Operations(figure, iterations);
        ulong[] recorded = [.. ticks[s_figures..].ToArray().Where(static interval => interval != 0).Order()];
        return recorded.Length == 0
            ? throw new InvalidDataException("The benchmark guest saw no tick of its timer during a long mmu_update.")
            : (recorded[recorded.Length / 2] / kiloHertz * 1e6) - TimerPeriod;
    }

    private static long Operations(BenchmarkFigure figure, int iterations) => figure switch
    {
        BenchmarkFigure.MmuUpdate32 or BenchmarkFigure.MmuUpdateUnused32 => (long)Calls(figure, iterations) * 32,
        BenchmarkFigure.MmuUpdate512 => (long)Calls(figure, iterations) * 512,
        _ => iterations,
    };

    /// <summary>The image.</summary>
    /// <param name="iterations">Operations of each figure, at least 64; the batched ones make proportionally fewer calls.</param>
    public static byte[] Build(int iterations)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(iterations, 64);
        var builder = new Builder(iterations);
        return builder.Build();
    }

    /// <summary>A guest that makes a number of xen_version hypercalls and powers off: for counting what serving them takes.</summary>
    public static byte[] BuildHypercallLoop(int count)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(count);
        var guest = new PvAssembler();
        guest.Code.mov(r12d, count);
        Label loop = guest.Code.CreateLabel();
        guest.Code.Label(ref loop);
        guest.Code.xor(edi, edi);
        guest.Code.xor(esi, esi);
        guest.Hypercall(GuestHypercall.XenVersion);
        guest.Code.dec(r12d);
        guest.Code.jnz(loop);
        guest.Shutdown(GuestShutdownReason.PowerOff);
        return guest.Build(new GuestIdentity("xensharp-hypercalls"));
    }

    private static int Calls(BenchmarkFigure figure, int iterations) => figure switch
    {
        BenchmarkFigure.MmuUpdate32 or BenchmarkFigure.MmuUpdateUnused32 => Even(iterations / 8),
        BenchmarkFigure.MmuUpdate512 => Even(iterations / 64),
        _ => Even(iterations),
    };

    private static int Even(int count) => Math.Max(2, count & ~1);

    private sealed class Builder
    {
        private readonly int _iterations;
        private readonly PvAssembler _guest = new();
        private readonly PvConsole _console;
        private readonly UpcallCode _upcalls;
        private readonly Assembler _code;
        private readonly ulong _results;
        private readonly ulong _victims;
        private readonly ulong _machphys;
        private readonly ulong _writable;
        private readonly ulong _readOnly;
        private readonly ulong _stackTop;
        private readonly ulong _userStackTop;
        private readonly ulong _start;

        public Builder(int iterations)
        {
            _iterations = iterations;
            _console = new PvConsole(_guest);
            _upcalls = new UpcallCode(_guest, _console);
            _code = _guest.Code;
            _results = _guest.Reserve(ResultBytes);
            _start = _guest.Reserve(sizeof(ulong));
            _machphys = _guest.Reserve(24);
            _writable = _guest.Reserve(VictimPages * RequestSize);
            _readOnly = _guest.Reserve(VictimPages * RequestSize);
            _stackTop = _guest.Reserve(PageSize, PageSize) + PageSize;
            _userStackTop = _guest.Reserve(PageSize, PageSize) + PageSize;

            // Aligned to what one L1 maps, as far as the image allows: within one table in any case.
            _victims = _guest.Reserve(VictimPages * PageSize, PageSize);
        }

        public byte[] Build()
        {
            _console.EmitInitialise();
            _code.mov(rsp, _stackTop);
            MeasureNullHypercall();
            MeasureUserSystemCall();
            MeasurePageFault();
            MeasureMmuUpdates();
            MeasurePageTableExchange();
            MeasureEventToSelf();
            MeasureTickDuringLongBatch();
            _console.EmitWrite(_guest.Define(System.Text.Encoding.ASCII.GetBytes(Marker)), Marker.Length);
            _console.EmitWrite(_results, ResultBytes);
            _guest.Shutdown(GuestShutdownReason.PowerOff);
            _console.EmitRoutines();
            _guest.ReserveRange(LongBatchStart, LongBatchStart + (LongBatch * RequestSize));
            return _guest.Build(new GuestIdentity("xensharp-benchmark"));
        }

        private Label Here()
        {
            Label label = _code.CreateLabel();
            _code.Label(ref label);
            return label;
        }

        private void StartClock()
        {
            _upcalls.ReadTsc();
            _code.mov(__qword_ptr[_start], rax);
        }

        private void StopClock(BenchmarkFigure figure)
        {
            _upcalls.ReadTsc();
            _code.sub(rax, __qword_ptr[_start]);
            _code.mov(__qword_ptr[_results + ((ulong)figure * sizeof(ulong))], rax);
        }

        /// <summary>Runs the body R12 times.</summary>
        private void Measure(BenchmarkFigure figure, int count, Action body)
        {
            StartClock();
            _code.mov(r12d, count);
            Label loop = Here();
            body();
            _code.dec(r12d);
            _code.jnz(loop);
            StopClock(figure);
        }

        private void MeasureNullHypercall() => Measure(BenchmarkFigure.NullHypercall, Even(_iterations), () =>
        {
            _code.xor(edi, edi);
            _code.xor(esi, esi);
            _guest.Hypercall(GuestHypercall.XenVersion);
        });

        private void MeasureUserSystemCall()
        {
            // As Linux has it: an L4 for either mode, and a callback that masks events.
            EmitUserRoot();
            Label handler = _code.CreateLabel();
            Label user = _code.CreateLabel();
            Label done = _code.CreateLabel();
            _code.mov(edi, FlatKernelSs);
            _code.mov(rsi, _stackTop);
            _guest.Hypercall(GuestHypercall.StackSwitch);
            ulong callback = _guest.Reserve(16);
            _code.mov(__dword_ptr[callback], CallbackSyscall | (CallbackMasksEvents << 16));
            _code.lea(rax, __[handler]);
            _code.mov(__qword_ptr[callback + 8], rax);
            _code.xor(edi, edi);
            _code.mov(rsi, callback);
            _guest.Hypercall(GuestHypercall.CallbackOp);

            StartClock();
            _code.mov(r12d, Even(_iterations));
            _code.mov(rsp, _stackTop);
            _code.push((int)FlatKernelSs);
            _code.mov(rax, _userStackTop);
            _code.push(rax);
            _code.push((int)UserFlags);
            _code.mov(eax, (uint)FlatUserCs);
            _code.push(rax);
            _code.lea(rax, __[user]);
            _code.push(rax);
            PushIretHead(0);
            _guest.Hypercall(GuestHypercall.Iret);

            _code.Label(ref user);
            _code.syscall();
            _code.jmp(user);

            // RSP: RCX, R11, RIP, CS, RFLAGS, RSP, SS. The first two become RCX and flags; RAX and R11 go before them.
            _code.Label(ref handler);
            _code.dec(r12d);
            _code.jz(done);
            _code.mov(r11, __qword_ptr[rsp + 8]);
            _code.mov(__qword_ptr[rsp + 8], 0);
            _code.push(r11);
            _code.push(rax);
            _guest.Hypercall(GuestHypercall.Iret);
            _code.Label(ref done);
            StopClock(BenchmarkFigure.UserSystemCall);
            _code.mov(rsp, _stackTop);
        }

        /// <summary>Makes a copy of the L4 that the guest was started with the root of user mode.</summary>
        private void EmitUserRoot()
        {
            ulong root = _guest.Reserve(PageSize, PageSize);
            _code.mov(rbx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rsi, __qword_ptr[rbx + StartInfoOffset.PtBase]);
            _code.mov(rdi, root);
            _code.mov(ecx, EntriesPerTable);
            _code.rep.movsq();
            _code.mov(rdx, __qword_ptr[rbx + StartInfoOffset.MfnList]);
            _code.mov(rbx, __qword_ptr[rdx + (long)(((root - PvAssembler.VirtBase) >> 12) * sizeof(ulong))]);
            _code.mov(rdi, root);
            _code.mov(rsi, rbx);
            _code.shl(rsi, 12);
            _code.or(rsi, (int)ReadOnlyPage);
            _code.mov(edx, FlushOnePage);
            _guest.Hypercall(GuestHypercall.UpdateVaMapping);
            ulong operation = _guest.Reserve(24);
            _code.mov(__dword_ptr[operation], NewUserBaseptr);
            _code.mov(__qword_ptr[operation + 8], rbx);
            _code.mov(rdi, operation);
            _code.mov(esi, 1);
            _code.xor(edx, edx);
            _code.mov(r10d, DomidSelf);
            _guest.Hypercall(GuestHypercall.MmuextOp);
        }

        /// <summary>RAX, R11, RCX and flags of struct iret_context, below a frame that is already there.</summary>
        private void PushIretHead(int flags)
        {
            _code.push(flags);
            _code.push(rcx);
            _code.push(r11);
            _code.push(rax);
        }

        private void MeasurePageFault()
        {
            Label handler = _code.CreateLabel();
            Label resume = _code.CreateLabel();
            Label over = _code.CreateLabel();
            ulong table = _guest.Reserve(32);
            _code.mov(__dword_ptr[table], PageFaultVector | ((uint)FlatUserCs << 16));
            _code.lea(rax, __[handler]);
            _code.mov(__qword_ptr[table + 8], rax);
            _code.mov(rdi, table);
            _guest.Hypercall(GuestHypercall.SetTrapTable);
            _code.mov(r13d, (uint)UnmappedAddress);
            Measure(BenchmarkFigure.PageFault, Even(_iterations), () =>
            {
                _code.mov(rax, __qword_ptr[r13]);
                _code.Label(ref resume);
                _code.nop();
            });
            _code.jmp(over);

            // RSP: RCX, R11, error code, RIP, CS, RFLAGS, RSP, SS.
            _code.Label(ref handler);
            _code.pop(rcx);
            _code.pop(r11);
            _code.add(rsp, 8);
            _code.lea(rax, __[resume]);
            _code.mov(__qword_ptr[rsp], rax);
            PushIretHead(0);
            _guest.Hypercall(GuestHypercall.Iret);
            _code.Label(ref over);
            _code.nop();
        }

        private void MeasureMmuUpdates()
        {
            _code.mov(edi, MachphysMapping);
            _code.mov(rsi, _machphys);
            _guest.Hypercall(GuestHypercall.MemoryOp);
            ulong writable = _writable;
            ulong readOnly = _readOnly;
            ulong unused = _guest.Reserve(VictimPages * RequestSize);
            ulong absent = _guest.Reserve(VictimPages * RequestSize);
            FillRequests(writable, readOnly, unused, absent);
            MeasureMmuUpdate(BenchmarkFigure.MmuUpdate1, readOnly, writable, 1);
            MeasureMmuUpdate(BenchmarkFigure.MmuUpdate32, readOnly, writable, 32);
            MeasureMmuUpdate(BenchmarkFigure.MmuUpdate512, readOnly, writable, VictimPages);
            MeasureMmuUpdate(BenchmarkFigure.MmuUpdateUnused32, absent, unused, 32);
        }

        private void MeasurePageTableExchange()
        {
            _code.mov(r14, _victims);
            WalkToEntry();
            _code.lea(rbx, __[rbx + (rcx * 8)]);
            _code.xor(edi, edi);
            _code.mov(esi, WritablePageTables);
            _guest.Hypercall(GuestHypercall.VmAssist);
            Measure(BenchmarkFigure.PageTableExchange, Even(_iterations) / 2, () =>
            {
                foreach (ulong requests in new[] { _readOnly, _writable })
                {
                    _code.mov(rax, __qword_ptr[requests + sizeof(ulong)]);
                    _code.xchg(__qword_ptr[rbx], rax);
                }
            });
        }

        /// <summary>For every victim page: the machine address of its L1 entry, with four values to write there.</summary>
        private void FillRequests(ulong writable, ulong readOnly, ulong unused, ulong absent)
        {
            _code.mov(r14, _victims);
            _code.xor(r15d, r15d);
            Label loop = Here();
            WalkToEntry();
            _code.mov(__qword_ptr[r15 + (long)writable], rax);
            _code.mov(__qword_ptr[r15 + (long)readOnly], rax);
            _code.mov(__qword_ptr[r15 + (long)unused], rax);
            _code.mov(__qword_ptr[r15 + (long)absent], rax);
            foreach ((ulong array, uint flags) in new[] { (writable, WritableEntry), (readOnly, ReadOnlyEntry), (unused, UnusedEntry) })
            {
                _code.lea(rax, __[rbp + (int)flags]);
                _code.mov(__qword_ptr[r15 + (long)(array + 8)], rax);
            }

            _code.add(r14, PageSize);
            _code.add(r15, RequestSize);
            _code.cmp(r15, VictimPages * RequestSize);
            _code.jb(loop);
        }

        /// <summary>RAX: machine address of the L1 entry of the address in R14, RBX + 8 * RCX its virtual one; RBP: the frame address that it holds.</summary>
        private void WalkToEntry()
        {
            _code.mov(rbx, __qword_ptr[_console.StartInfoVariable]);
            _code.mov(rbx, __qword_ptr[rbx + StartInfoOffset.PtBase]);
            _code.mov(r8, __qword_ptr[_machphys]);
            _code.mov(r9, FrameMask);
            for (int level = 4; level >= 1; level--)
            {
                _code.mov(rcx, r14);
                _code.shr(rcx, (sbyte)(12 + (9 * (level - 1))));
                _code.and(ecx, 0x1ff);
                if (level == 1)
                    _code.lea(rax, __[rsi + (rcx * 8)]);
                _code.mov(rdx, __qword_ptr[rbx + (rcx * 8)]);
                _code.and(rdx, r9);
                if (level == 1)
                {
                    _code.mov(rbp, rdx);
                    break;
                }

                // The next table: its machine address, and by the M2P table its virtual one.
                _code.mov(rsi, rdx);
                _code.shr(rdx, 12);
                _code.mov(rbx, __qword_ptr[r8 + (rdx * 8)]);
                _code.shl(rbx, 12);
                _code.mov(rdx, PvAssembler.VirtBase);
                _code.add(rbx, rdx);
            }
        }

        private void MeasureMmuUpdate(BenchmarkFigure figure, ulong first, ulong second, int batch)
        {
            void Update(ulong requests)
            {
                _code.mov(rdi, requests);
                _code.mov(esi, batch);
                _code.xor(edx, edx);
                _code.mov(r10d, DomidSelf);
                _guest.Hypercall(GuestHypercall.MmuUpdate);
            }

            Measure(figure, Calls(figure, _iterations) / 2, () =>
            {
                Update(first);
                Update(second);
            });
        }

        private void MeasureEventToSelf()
        {
            Label handler = _code.CreateLabel();
            Label over = _code.CreateLabel();
            _console.EmitMapSharedInfo();
            ulong binding = _guest.Reserve(8);
            _code.mov(edi, BindIpi);
            _code.mov(rsi, binding);
            _guest.Hypercall(GuestHypercall.EventChannelOp);
            _code.mov(eax, __dword_ptr[binding + 4]);
            _code.mov(__dword_ptr[binding], eax);
            _upcalls.SetCallback(handler);
            _code.mov(__word_ptr[_console.SharedInfoAddress], 0);
            Measure(BenchmarkFigure.EventToSelf, Even(_iterations), () =>
            {
                _code.mov(edi, Send);
                _code.mov(rsi, binding);
                _guest.Hypercall(GuestHypercall.EventChannelOp);
            });
            _code.mov(__byte_ptr[_upcalls.Mask], 1);
            _code.jmp(over);

            _code.Label(ref handler);
            _upcalls.Return();
            _code.Label(ref over);
            _code.nop();
        }

        private void MeasureTickDuringLongBatch()
        {
            const ulong batch = LongBatchStart;
            ulong recorded = _results + ((ulong)BenchmarkFigure.TickDuringLongBatch * sizeof(ulong));
            ulong intervals = _results + ((ulong)s_figures * sizeof(ulong));
            ulong binding = _guest.Reserve(12);
            ulong period = _guest.Define(BitConverter.GetBytes((long)TimerPeriod));
            ulong saved = _guest.Reserve(2 * sizeof(ulong));
            Label handler = _code.CreateLabel();
            Label taken = _code.CreateLabel();
            Label over = _code.CreateLabel();
            Label stop = _code.CreateLabel();
            _code.mov(rdi, batch);
            _code.mov(r12d, LongBatch / (2 * VictimPages));
            Label copy = Here();
            foreach (ulong requests in new[] { _readOnly, _writable })
            {
                _code.mov(rsi, requests);
                _code.mov(ecx, VictimPages * RequestSize / sizeof(ulong));
                _code.rep.movsq();
            }

            _code.dec(r12d);
            _code.jnz(copy);
            _code.mov(edi, BindVirq);
            _code.mov(rsi, binding);
            _guest.Hypercall(GuestHypercall.EventChannelOp);
            _upcalls.SetCallback(handler);
            VcpuOp(SetPeriodicTimer, period);
            _code.mov(__qword_ptr[_start], 0);
            _upcalls.ForgetEvents();
            _code.mov(__byte_ptr[_upcalls.Mask], 0);
            _code.mov(rdi, batch);
            _code.mov(esi, LongBatch);
            _code.xor(edx, edx);
            _code.mov(r10d, DomidSelf);
            _guest.Hypercall(GuestHypercall.MmuUpdate);
            _code.mov(__byte_ptr[_upcalls.Mask], 1);

            // A batch that was refused would have been a short one.
            _code.test(rax, rax);
            _code.jz(stop);
            _code.ud2();
            _code.Label(ref stop);
            VcpuOp(StopPeriodicTimer, 0);
            _code.jmp(over);

            // The batch goes on from the registers that it was stopped with.
            _code.Label(ref handler);
            _code.mov(__qword_ptr[saved], rax);
            _code.mov(__qword_ptr[saved + 8], rdx);
            _upcalls.ReadTsc();
            _code.mov(rcx, rax);
            _code.xchg(__qword_ptr[_start], rax);
            _code.test(rax, rax);
            _code.jz(taken);
            _code.mov(rdx, __qword_ptr[recorded]);
            _code.cmp(rdx, Ticks);
            _code.jae(taken);
            _code.sub(rcx, rax);
            _code.mov(__qword_ptr[(rdx * 8) + (long)intervals], rcx);
            _code.inc(__qword_ptr[recorded]);
            _code.Label(ref taken);
            _code.mov(rdx, __qword_ptr[saved + 8]);
            _code.mov(rax, __qword_ptr[saved]);
            _upcalls.Return();
            _code.Label(ref over);
            _code.nop();
        }

        private void VcpuOp(uint command, ulong argument)
        {
            _code.mov(edi, command);
            _code.xor(esi, esi);
            _code.mov(rdx, argument);
            _guest.Hypercall(GuestHypercall.VcpuOp);
        }
    }
}
