// A guest program that finds out by itself whether anything of its state is not what the host gave it.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

/// <summary>
/// The program compares RFLAGS, all registers and the translations of <see cref="CheckedPages"/> pages with a table in its
/// memory, works for a while, compares again, counts, and leaves by SYSCALL or INT3.
/// </summary>
internal sealed unsafe class CheckingGuest
{
    private const int CheckedPages = 8;
    private const int Spread = 40;
    private const ulong Good = 0x600d;
    private const ulong Bad = 0xbad;

    // The table: 16 registers in struct kvm_regs' order, RFLAGS, marks of the pages, then the program's own cells.
    private const ulong Table = ScratchGuest.CodeAddress + 0x8000;
    private const ulong FlagsCell = Table + (16 * 8);
    private const ulong MarkCells = FlagsCell + 8;
    private const ulong SavedRax = MarkCells + (CheckedPages * 8);
    private const ulong Work = SavedRax + 8;
    private const ulong Mode = Work + 8;
    private const ulong Count = Mode + 8;

    private static readonly AssemblerRegister64[] Order = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15];

    private readonly ScratchGuest _guest;
    private readonly PageField _field;
    private readonly ulong* _table;
    private readonly CpuRegisters _start;
    private ulong _expectedCount;

    public CheckingGuest(ScratchGuest guest)
    {
        _guest = guest;
        _field = new PageField(guest, CheckedPages * Spread);
        _field.Scan();
        guest.Load(Write);
        _start = *guest.Vcpu.Registers;
        _table = (ulong*)KvmTest.HostAddress(guest, Table);
    }

    public int Finished { get; private set; }

    /// <summary>The guest works for ever: only a kick ends it.</summary>
    public bool IsEndless { get; private set; }

    /// <summary>Gives the guest a new state: registers, flags, some translations, and how long to work.</summary>
    public void Prepare(Random random, bool mayBeEndless)
    {
        IsEndless = mayBeEndless;
        ChangeTranslations(random);
        CpuRegisters* registers = _guest.Vcpu.Registers;
        random.NextBytes(new Span<byte>(registers, sizeof(CpuRegisters)));
        registers->Rsp = ScratchGuest.StackTop - (ulong)(random.Next(64) * 8);
        registers->Rip = _start.Rip;
        const Rflags settable = Rflags.Carry | Rflags.Zero | Rflags.Sign | Rflags.Parity | Rflags.Overflow | Rflags.Direction | Rflags.Id;
        registers->Rflags = (registers->Rflags & (ulong)settable) | _start.Rflags;
        new ReadOnlySpan<ulong>(registers, 16).CopyTo(new Span<ulong>(_table, 16));
        *Cell(FlagsCell) = registers->Rflags;
        for (int page = 0; page < CheckedPages; page++)
            *Cell(MarkCells + ((ulong)page * 8)) = _field.Expected[page * Spread];
        *Cell(Work) = mayBeEndless ? ulong.MaxValue : (ulong)random.Next(1, 20_000);
        *Cell(Mode) = (ulong)random.Next(2);
        _expectedCount = *Cell(Count);
    }

    /// <summary>Looks at a guest that was interrupted and will not be continued.</summary>
    public void CheckInterrupted()
        => Assert.That(*Cell(Count) - _expectedCount, Is.LessThanOrEqualTo(1), "The guest ran its program more than once.");

    /// <summary>Looks at a guest that came to the end of its program.</summary>
    public void CheckFinished(VcpuExit exit)
    {
        CpuRegisters* registers = _guest.Vcpu.Registers;
        Assert.That(registers->Rax, Is.EqualTo(Good), () => $"{exit.Kind} {exit.Vector} {exit.ErrorCode:x} at {registers->Rip:x}, check {registers->Rbx:x}; {exit.Failure}");
        if (*Cell(Mode) == 0)
            KvmTest.AssertSyscall(exit);
        else
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Breakpoint)), () => $"at {registers->Rip:x}, stack {registers->Rsp:x}, flags {registers->Rflags:x}, rcx {registers->Rcx:x}, bytes {Convert.ToHexString(new ReadOnlySpan<byte>(KvmTest.HostAddress(_guest, registers->Rip - 4), 8))} {Finished}");
        Assert.That(*Cell(Count), Is.EqualTo(_expectedCount + 1), "The guest's count.");
        for (int i = 1; i < Order.Length; i++)
        {
            if (Order[i] != rcx && Order[i] != r11)
                Assert.That(((ulong*)registers)[i], Is.EqualTo(_table[i]), $"{Order[i]} after the exit");
        }

        Finished++;
    }

    private ulong* Cell(ulong address) => (ulong*)((byte*)_table + (address - Table));

    private void ChangeTranslations(Random random)
    {
        switch (random.Next(4))
        {
            case 0:
                break;
            case 1:
                _field.Toggle(random.Next(CheckedPages) * Spread);
                break;
            case 2:
                for (int page = 0; page < CheckedPages; page++)
                    _field.Toggle(page * Spread);
                break;
            default:
                int start = random.Next(_field.Pages - 60);
                for (int page = start; page < start + 50; page++)
                    _field.Toggle(page);
                break;
        }

        if (random.Next(4) == 0 || !KvmTest.Capabilities.ShadowPageTables)
            _guest.Vcpu.PageTableWrites->Flush();
    }

    private void Write(Assembler code)
    {
        Label bad = code.CreateLabel();
        code.mov(__qword_ptr[SavedRax], rax);
        code.pushfq();
        code.pop(rax);
        code.and(rax, ~(int)Rflags.Resume);
        code.cmp(rax, __qword_ptr[FlagsCell]);
        code.jne(bad);
        code.mov(rax, __qword_ptr[SavedRax]);
        CompareRegisters();
        for (int page = 0; page < CheckedPages; page++)
        {
            code.movzx(eax, __byte_ptr[PageField.Address + (ulong)(page * Spread * (int)Paging.PageSize)]);
            code.cmp(rax, __qword_ptr[MarkCells + ((ulong)page * 8)]);
            code.jne(bad);
        }

        Label working = code.CreateLabel();
        code.mov(rax, __qword_ptr[Work]);
        code.Label(ref working);
        code.dec(rax);
        code.jne(working);
        code.mov(rax, __qword_ptr[SavedRax]);
        CompareRegisters();
        code.inc(__qword_ptr[Count]);
        code.mov(eax, (uint)Good);
        Label trap = code.CreateLabel();
        code.cmp(__qword_ptr[Mode], 0);
        code.jne(trap);
        code.syscall();
        code.ud2();
        code.Label(ref trap);
        code.int3();
        code.ud2();
        code.Label(ref bad);
        code.mov(eax, (uint)Bad);
        code.syscall();

        void CompareRegisters()
        {
            for (int i = 0; i < Order.Length; i++)
            {
                code.cmp(Order[i], __qword_ptr[Table + ((ulong)i * 8)]);
                code.jne(bad);
            }
        }
    }
}
