// Stores into page tables that the guest sees read-only: emulated, and compared with the processor itself.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class WriteEmulationTests
{
    private const int Table = 20;
    private const int FirstPage = 24;
    private const int Pages = 8;
    private const ulong TableAddress = DataAddress + (100 * Paging.PageSize);
    private const ulong CodeAddress = DataAddress + Paging.PageSize;
    private const ulong SourceAddress = DataAddress + (2 * Paging.PageSize);
    private const int Slot = 40;
    private const ulong Arithmetic = (ulong)(Rflags.Carry | Rflags.Parity | Rflags.Adjust | Rflags.Zero | Rflags.Sign | Rflags.Overflow);
    private const ulong Logic = Arithmetic & ~(ulong)Rflags.Adjust;
    private const ulong BitTest = (ulong)(Rflags.Carry | Rflags.Zero);

    /// <summary>One form of an instruction whose memory operand is at R9.</summary>
    /// <param name="Name">For people.</param>
    /// <param name="Size">Bytes stored.</param>
    /// <param name="Flags">Status flags that the instruction defines; the undefined ones may differ.</param>
    /// <param name="Emit">Assembles it.</param>
    /// <param name="IsString">The operand is at RDI (and RSI) instead.</param>
    public sealed record Form(string Name, int Size, ulong Flags, Action<Assembler> Emit, bool IsString = false)
    {
        public override string ToString() => Name;
    }

    public static IEnumerable<Form> Forms()
    {
        foreach (int size in (int[])[1, 2, 4, 8])
        {
            foreach (Form form in FormsOf(size))
                yield return form;
        }

        yield return new Form("cmpxchg8b", 8, Arithmetic, static a => a.cmpxchg8b(__qword_ptr[r9]));
        yield return new Form("lock cmpxchg8b", 8, Arithmetic, static a => a.@lock.cmpxchg8b(__qword_ptr[r9]));
    }

    [TestCaseSource(nameof(Forms))]
    public void Does_what_the_processor_does(Form form)
    {
        using var native = new NativeExecutor();
        using var machine = NewMachine();
        var model = ModelOf(machine);
        var random = new Random(form.Name.Sum(static c => c));
        int performed = 0;
        for (int i = 0; i < 40; i++)
            performed += RunOnce(form, native, machine, model, random) ? 1 : 0;
        Assert.That(performed, Is.GreaterThan(5), "most of the values have to be ones that the guest may store");
    }

    private static IEnumerable<Form> Refused()
    {
        static Form F(string name, Action<Assembler> emit) => new(name, 8, Arithmetic, emit);
        yield return F("mov [r9], ds", static a => a.mov(__word_ptr[r9], ds));
        yield return F("movaps [r9], xmm0", static a => a.movaps(__xmmword_ptr[r9], xmm0));
        yield return F("movq [r9], xmm0", static a => a.movq(__qword_ptr[r9], xmm0));
        yield return F("vmovdqu [r9], ymm0", static a => a.vmovdqu(__ymmword_ptr[r9], ymm0));
        yield return F("cmpxchg16b", static a => a.@lock.cmpxchg16b(__xmmword_ptr[r9]));
        yield return F("cmp [r9], rax", static a => a.cmp(__qword_ptr[r9], rax));
        yield return F("test [r9], rax", static a => a.test(__qword_ptr[r9], rax));
        yield return F("bt [r9], rax", static a => a.bt(__qword_ptr[r9], rax));
        yield return F("mov rax, [r9]", static a => a.mov(rax, __qword_ptr[r9]));
        yield return F("push [r9]", static a => a.push(__qword_ptr[r9]));
        yield return F("fnstcw [r9]", static a => a.fnstcw(__word_ptr[r9]));
        yield return F("mov at an odd address", static a => a.mov(__qword_ptr[r9 + 1], rax));
        yield return F("mov across two entries", static a => a.mov(__dword_ptr[r9 + 6], eax));
        yield return F("mov to another page", static a => a.mov(__qword_ptr[r9 + 4096], rax));
        yield return F("stosq with 32-bit addresses", static a => { a.db(0x67); a.stosq(); });
        yield return F("ud2", static a => a.ud2());
        yield return F("no instruction", static a => a.db(0x06));
    }

    [TestCaseSource(nameof(Refused))]
    public void Refuses_and_changes_nothing(Form form)
    {
        using var machine = NewMachine();
        PageTableModel model = ModelOf(machine);
        PutCode(machine, form.Emit);
        machine.Vcpu->Registers->R9 = TableAddress + (Slot * 8);
        machine.Vcpu->Registers->Rdi = TableAddress + (Slot * 8);
        machine.Vcpu->Registers->Rax = 0;
        machine.Vcpu->Registers->Rcx = 3;
        ExpectRefusal(machine, model, TableAddress + (Slot * 8));
    }

    [TestCase(PageFlags.WriteThrough)]
    [TestCase(PageFlags.CacheDisable)]
    [TestCase(PageFlags.LargePage)]
    public void Refuses_entries_that_the_guest_may_not_have(PageFlags flag)
        => ExpectRefusalOf(new PageTableEntry(Frame(FirstPage), ReadOnly | flag).Value);

    [Test]
    public void Refuses_a_writable_mapping_of_a_table() => ExpectRefusalOf(new PageTableEntry(Frame(Table), Leaf).Value);

    [Test]
    public void Refuses_a_frame_outside_the_domain() => ExpectRefusalOf(new PageTableEntry(new Mfn(0x99999), ReadOnly).Value);

    [TestCase(Paging.PageSize * 3, Description = "writable page")]
    [TestCase(Paging.PageSize * 50, Description = "nothing mapped")]
    public void Leaves_other_faults_to_the_guest(ulong offset)
    {
        using var machine = NewMachine();
        PageTableModel model = ModelOf(machine);
        PutCode(machine, static a => a.mov(__qword_ptr[r9], rax));
        machine.Vcpu->Registers->R9 = DataAddress + offset;
        ExpectRefusal(machine, model, DataAddress + offset);
    }

    [TestCase(2)]
    [TestCase(3)]
    [TestCase(4)]
    public void Emulates_stores_to_L1_tables_only(int level)
    {
        using var machine = NewMachine();
        PageTableModel model = ModelOf(machine);
        Assert.That(machine.Unpin(Table), Is.Zero);
        Assert.That(machine.Pin(level, Table), Is.Zero);
        model.Pinned[Table] = level;
        PutCode(machine, static a => a.mov(__qword_ptr[r9], rax));
        machine.Vcpu->Registers->R9 = TableAddress;
        machine.Vcpu->Registers->Rax = 0;
        ExpectRefusal(machine, model, TableAddress);
    }

    [Test]
    public void Instruction_at_the_end_of_the_last_mapped_page()
    {
        using var machine = NewMachine();
        byte[] code = Assemble(static a => a.mov(__qword_ptr[r9], rax), 0);
        ulong end = DataAddress + (DataPages * Paging.PageSize);
        code.CopyTo(new Span<byte>(machine.Data + (DataPages * 4096) - code.Length, code.Length));
        machine.Vcpu->Registers->Rip = end - (ulong)code.Length;
        machine.Vcpu->Registers->R9 = TableAddress;
        machine.Vcpu->Registers->Rax = 0xabc0;
        Assert.That(new ReadOnlyPageFault(machine.Vcpu).TryEmulate(new VirtualAddress(TableAddress)), Is.True);
        Assert.That(machine.Vcpu->Registers->Rip, Is.EqualTo(end));
        Assert.That(machine.Entry(Table, 0)->Value, Is.EqualTo(0xabc0UL));
    }

    [Test]
    public void Movs_reads_its_source_without_the_base_of_its_segment()
    {
        using var machine = NewMachine();
        PutCode(machine, static a => { a.db(0x65); a.movsq(); });
        machine.Vcpu->Segments->GsBase = 0x1000;
        machine.Vcpu->Registers->Rsi = SourceAddress;
        machine.Vcpu->Registers->Rdi = TableAddress;
        *(ulong*)(machine.Data + (2 * 4096)) = 0x1122_3344_5566_7780;
        Assert.That(new ReadOnlyPageFault(machine.Vcpu).TryEmulate(new VirtualAddress(TableAddress)), Is.True);
        Assert.That(machine.Entry(Table, 0)->Value, Is.EqualTo(0x1122_3344_5566_7780UL));

        // Where nothing can be read it is that fault, and the store is not made.
        PutCode(machine, static a => { a.db(0x65); a.movsq(); });
        machine.Vcpu->Registers->Rsi = 0x7100_0000;
        machine.Vcpu->Registers->Rdi = TableAddress;
        var emulation = new ReadOnlyPageFault(machine.Vcpu);
        Assert.That(emulation.TryEmulate(new VirtualAddress(TableAddress)), Is.False);
        Assert.That(emulation.UnreadableAddress, Is.EqualTo(new VirtualAddress(0x7100_0000)));
    }

    [Test]
    public void A_destination_in_fs_or_gs_is_taken_without_the_base()
    {
        using var machine = NewMachine();
        machine.Vcpu->Segments->FsBase = TableAddress - SourceAddress;
        machine.Vcpu->Registers->Rax = 0;
        var emulation = new ReadOnlyPageFault(machine.Vcpu);
        foreach ((ulong at, bool reads, ulong? unreadable) in ((ulong, bool, ulong?)[])
            [(SourceAddress, true, null), (0x1238, false, null), (0x1238, true, 0x1238), (1UL << 63, true, 1UL << 63)])
        {
            PutCode(machine, a =>
            {
                a.db(0x64);
                if (reads)
                    a.@lock.or(__qword_ptr[r9], rax);
                else
                    a.mov(__qword_ptr[r9], rax);
            });
            machine.Vcpu->Registers->R9 = at;
            Assert.That(emulation.TryEmulate(new VirtualAddress(TableAddress)), Is.False, $"{at:x}");
            Assert.That(emulation.UnreadableAddress?.Value, Is.EqualTo(unreadable), $"{at:x}");
        }
    }

    [Test]
    public void A_store_repeated_no_times_is_not_performed()
    {
        using var machine = NewMachine();
        PageTableModel model = ModelOf(machine);
        PutCode(machine, static a => a.rep.stosq());
        machine.Vcpu->Registers->Rdi = TableAddress;
        machine.Vcpu->Registers->Rcx = 0;
        ExpectRefusal(machine, model, TableAddress);
    }

    private static IEnumerable<Form> FormsOf(int size)
    {
        AssemblerMemoryOperand m = size switch { 1 => __byte_ptr[r9], 2 => __word_ptr[r9], 4 => __dword_ptr[r9], _ => __qword_ptr[r9] };
        ulong all = Arithmetic;

        void WithRegister(Assembler a, Action<AssemblerRegister8> b, Action<AssemblerRegister16> w, Action<AssemblerRegister32> d, Action<AssemblerRegister64> q)
        {
            switch (size)
            {
                case 1: b(dl); break;
                case 2: w(dx); break;
                case 4: d(edx); break;
                default: q(rdx); break;
            }
        }

        yield return new Form($"mov m{size * 8}, r", size, all, a => WithRegister(a, r => a.mov(m, r), r => a.mov(m, r), r => a.mov(m, r), r => a.mov(m, r)));
        yield return new Form($"mov m{size * 8}, imm", size, all, a => a.mov(m, size == 1 ? 0x5e : 0x10e0));
        yield return new Form($"xchg m{size * 8}, r", size, all, a => WithRegister(a, r => a.xchg(m, r), r => a.xchg(m, r), r => a.xchg(m, r), r => a.xchg(m, r)));
        foreach (bool isLocked in (bool[])[false, true])
        {
            string prefix = isLocked ? "lock " : string.Empty;
            Assembler L(Assembler a) => isLocked ? a.@lock : a;
            yield return new Form($"{prefix}add m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).add(m, r), r => L(a).add(m, r), r => L(a).add(m, r), r => L(a).add(m, r)));
            yield return new Form($"{prefix}adc m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).adc(m, r), r => L(a).adc(m, r), r => L(a).adc(m, r), r => L(a).adc(m, r)));
            yield return new Form($"{prefix}sub m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).sub(m, r), r => L(a).sub(m, r), r => L(a).sub(m, r), r => L(a).sub(m, r)));
            yield return new Form($"{prefix}sbb m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).sbb(m, r), r => L(a).sbb(m, r), r => L(a).sbb(m, r), r => L(a).sbb(m, r)));
            yield return new Form($"{prefix}and m{size * 8}, r", size, Logic, a => WithRegister(a, r => L(a).and(m, r), r => L(a).and(m, r), r => L(a).and(m, r), r => L(a).and(m, r)));
            yield return new Form($"{prefix}or m{size * 8}, r", size, Logic, a => WithRegister(a, r => L(a).or(m, r), r => L(a).or(m, r), r => L(a).or(m, r), r => L(a).or(m, r)));
            yield return new Form($"{prefix}xor m{size * 8}, r", size, Logic, a => WithRegister(a, r => L(a).xor(m, r), r => L(a).xor(m, r), r => L(a).xor(m, r), r => L(a).xor(m, r)));
            yield return new Form($"{prefix}xadd m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).xadd(m, r), r => L(a).xadd(m, r), r => L(a).xadd(m, r), r => L(a).xadd(m, r)));
            yield return new Form($"{prefix}cmpxchg m{size * 8}, r", size, all, a => WithRegister(a, r => L(a).cmpxchg(m, r), r => L(a).cmpxchg(m, r), r => L(a).cmpxchg(m, r), r => L(a).cmpxchg(m, r)));
            yield return new Form($"{prefix}add m{size * 8}, imm8", size, all, a => L(a).add(m, 0x42));
            yield return new Form($"{prefix}and m{size * 8}, -2", size, Logic, a => L(a).and(m, -2));
            yield return new Form($"{prefix}or m{size * 8}, imm", size, Logic, a => L(a).or(m, 0x62));
            yield return new Form($"{prefix}xor m{size * 8}, imm", size, Logic, a => L(a).xor(m, 0x21));
            yield return new Form($"{prefix}inc m{size * 8}", size, all, a => L(a).inc(m));
            yield return new Form($"{prefix}dec m{size * 8}", size, all, a => L(a).dec(m));
            yield return new Form($"{prefix}neg m{size * 8}", size, all, a => L(a).neg(m));
            yield return new Form($"{prefix}not m{size * 8}", size, all, a => L(a).not(m));
            if (size == 1)
                continue;
            yield return new Form($"{prefix}bts m{size * 8}, r", size, BitTest, a => WithRegister(a, _ => { }, r => L(a).bts(m, r), r => L(a).bts(m, r), r => L(a).bts(m, r)));
            yield return new Form($"{prefix}btr m{size * 8}, r", size, BitTest, a => WithRegister(a, _ => { }, r => L(a).btr(m, r), r => L(a).btr(m, r), r => L(a).btr(m, r)));
            yield return new Form($"{prefix}btc m{size * 8}, r", size, BitTest, a => WithRegister(a, _ => { }, r => L(a).btc(m, r), r => L(a).btc(m, r), r => L(a).btc(m, r)));
            yield return new Form($"{prefix}bts m{size * 8}, imm", size, BitTest, a => L(a).bts(m, (byte)6));
            yield return new Form($"{prefix}btr m{size * 8}, imm", size, BitTest, a => L(a).btr(m, (byte)0));
            yield return new Form($"{prefix}btc m{size * 8}, imm", size, BitTest, a => L(a).btc(m, (byte)(size == 8 ? 61 : 9)));
        }

        foreach (string repeat in (string[])["", "rep ", "repne "])
        {
            Assembler R(Assembler a) => repeat switch { "rep " => a.rep, "repne " => a.repne, _ => a };
            yield return new Form($"{repeat}stos m{size * 8}", size, all, a => _ = Emit(R(a), size, moves: false), IsString: true);
            yield return new Form($"{repeat}movs m{size * 8}", size, all, a => _ = Emit(R(a), size, moves: true), IsString: true);
        }
    }

    private static bool Emit(Assembler a, int size, bool moves)
    {
        switch (size, moves)
        {
            case (1, false): a.stosb(); break;
            case (2, false): a.stosw(); break;
            case (4, false): a.stosd(); break;
            case (8, false): a.stosq(); break;
            case (1, true): a.movsb(); break;
            case (2, true): a.movsw(); break;
            case (4, true): a.movsd(); break;
            default: a.movsq(); break;
        }

        return true;
    }

    /// <summary>One set of random values, on the processor and emulated.</summary>
    /// <returns>True when the guest might do it, and it was done.</returns>
    private static bool RunOnce(Form form, NativeExecutor native, TestMachine machine, PageTableModel model, Random random)
    {
        // The processor works on a copy of the whole table and of the source page, at its own addresses.
        byte* nativeTable = stackalloc byte[2 * 4096];
        byte* nativeSource = nativeTable + 4096;
        int offset = random.Next(8 / form.Size) * form.Size;

        // Stored in parts, an entry that is present on the way is made fit for the guest on the way: without that, all is plain bytes.
        bool isRepeated = form.IsString && form.Name[0] == 'r';
        ulong mask = isRepeated && form.Size < 8 ? ~0x0101_0101_0101_0101UL : ulong.MaxValue;
        for (int i = Slot - 3; i <= Slot + 3; i++)
            Assert.That(machine.Update(Table, i, new PageTableEntry(RandomEntry(random) & mask)), Is.Zero);
        var source = new Span<byte>(machine.Data + (2 * 4096), 4096);
        for (int i = 0; i < 16; i++)
            BitConverter.TryWriteBytes(source[(i * 8)..], RandomEntry(random) & mask);
        for (int i = 496; i < 512; i++)
            BitConverter.TryWriteBytes(source[(i * 8)..], RandomEntry(random) & mask);
        new Span<byte>(machine.Entry(Table, 0), 4096).CopyTo(new Span<byte>(nativeTable, 4096));
        source.CopyTo(new Span<byte>(nativeSource, 4096));

        bool backwards = form.IsString && random.Next(2) == 0;
        CpuRegisters* registers = machine.Vcpu->Registers;
        *registers = new CpuRegisters
        {
            Rax = (random.Next(2) == 0 ? machine.Entry(Table, Slot)->Value >> (offset * 8) : RandomEntry(random)) & mask,
            Rbx = RandomEntry(random),
            Rcx = form.IsString ? (ulong)random.Next(1, 3) : RandomEntry(random),
            Rdx = form.Flags == BitTest ? (ulong)random.NextInt64(-128, 127) : random.Next(2) == 0 ? RandomEntry(random) : (ulong)random.Next(0, 64) << 1,
            R8 = (ulong)random.NextInt64(),
            R10 = (ulong)random.NextInt64(),
            Rsi = SourceAddress + (backwards ? 4096UL - (ulong)form.Size : 0),
            Rdi = TableAddress + (Slot * 8) + (ulong)offset,
            R9 = TableAddress + (Slot * 8) + (ulong)offset,
            Rflags = 0x202 | ((ulong)random.NextInt64() & Arithmetic) | (backwards ? (ulong)Rflags.Direction : 0),
        };
        if (form.Name.Contains("cmpxchg8b", StringComparison.Ordinal) && random.Next(2) == 0)
        {
            registers->Rax = (uint)machine.Entry(Table, Slot)->Value;
            registers->Rdx = machine.Entry(Table, Slot)->Value >> 32;
            ulong value = RandomEntry(random);
            (registers->Rbx, registers->Rcx) = (value & uint.MaxValue, value >> 32);
        }

        CpuRegisters expected = *registers;
        expected.Rsi += (ulong)nativeSource - SourceAddress;
        expected.Rdi += (ulong)nativeTable - TableAddress;
        expected.R9 += (ulong)nativeTable - TableAddress;
        native.Execute(form.Emit, &expected);
        expected.Rsi -= (ulong)nativeSource - SourceAddress;
        expected.Rdi -= (ulong)nativeTable - TableAddress;
        expected.R9 -= (ulong)nativeTable - TableAddress;

        ulong next = PutCode(machine, form.Emit);
        expected.Rip = next;
        bool allowed = true;
        var before = new PageTableEntry[512];
        new ReadOnlySpan<PageTableEntry>(machine.Entry(Table, 0), 512).CopyTo(before);
        for (int i = 0; i < 512; i++)
            allowed &= ((PageTableEntry*)nativeTable)[i] == before[i] || IsAllowed(((PageTableEntry*)nativeTable)[i]);

        // A repeated store may be refused in the middle, with its first elements done.
        if (isRepeated && !allowed)
            return false;
        CpuRegisters start = *registers;
        var emulation = new ReadOnlyPageFault(machine.Vcpu);
        ulong fault = TableAddress + ((ulong)(Slot + BitWord(form, start.Rdx, offset)) * 8);
        bool done = emulation.TryEmulate(new VirtualAddress(fault));
        while (done && registers->Rip == CodeAddress)
            done = emulation.TryEmulate(new VirtualAddress(fault));
        string what = $"{form.Name}: rax {start.Rax:x} rbx {start.Rbx:x} rcx {start.Rcx:x} rdx {start.Rdx:x} flags {start.Rflags:x} entry {before[Slot]} offset {offset}";
        Assert.That(done, Is.EqualTo(allowed), what);
        if (!done)
        {
            Assert.That(Differences(start, *registers, ulong.MaxValue), Is.Empty, what);
            Assert.That(new ReadOnlySpan<PageTableEntry>(machine.Entry(Table, 0), 512).SequenceEqual(before), Is.True, what);
        }
        else
        {
            Assert.That(Differences(expected, *registers, form.Flags | ~Arithmetic), Is.Empty, what);
            for (int i = 0; i < 512; i++)
            {
                PageTableEntry stored = ((PageTableEntry*)nativeTable)[i];
                Assert.That(*machine.Entry(Table, i), Is.EqualTo(stored == before[i] ? stored : Adjusted(stored)), what);
            }
        }

        model.Verify(what);
        return done;
    }

    /// <summary>Which entry, counted from the operand's, a bit offset in a register names.</summary>
    private static int BitWord(Form form, ulong offset, int operand)
    {
        if (form.Flags != BitTest || form.Name.EndsWith("imm", StringComparison.Ordinal))
            return 0;
        long bit = form.Size switch { 2 => (short)offset, 4 => (int)offset, _ => (long)offset };
        long operands = (long)Math.Floor(bit / (form.Size * 8.0));
        return (int)Math.Floor((operand + (operands * form.Size)) / 8.0);
    }

    private static ulong RandomEntry(Random random) => random.Next(4) switch
    {
        0 => 0,
        1 => (ulong)random.NextInt64() & ~0x99UL,
        _ => new PageTableEntry(
            Frame(FirstPage + random.Next(Pages)),
            PageFlags.Present | (PageFlags)((ulong)random.Next(4096) & 0xf66) | (random.Next(2) == 0 ? PageFlags.NoExecute : 0)).Value,
    };

    private static bool IsAllowed(PageTableEntry entry)
        => !entry.IsPresent || ((entry.Value & 0x98) == 0 && entry.Frame.Value >= FirstFrame && entry.Frame.Value < FirstFrame + 64
            && (!entry.IsWritable || entry.Frame.Value is not (< FirstFrame + 4 or FirstFrame + Table)));

    private static PageTableEntry Adjusted(PageTableEntry entry)
    {
        if (!entry.IsPresent)
            return entry;
        if (!entry.Has(PageFlags.User))
            entry = entry.With(PageFlags.User | PageFlags.GuestKernel);
        return entry.Has(PageFlags.GuestKernel) ? entry : entry.With(PageFlags.Global);
    }

    private static string Differences(in CpuRegisters expected, in CpuRegisters actual, ulong flags)
    {
        var text = new List<string>();
        ReadOnlySpan<ulong> want = MemoryMarshal.Cast<CpuRegisters, ulong>(new ReadOnlySpan<CpuRegisters>(in expected));
        ReadOnlySpan<ulong> have = MemoryMarshal.Cast<CpuRegisters, ulong>(new ReadOnlySpan<CpuRegisters>(in actual));
        string[] names = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"];
        for (int i = 0; i < names.Length; i++)
        {
            if (want[i] != have[i])
                text.Add($"{names[i]} is {have[i]:x}, should be {want[i]:x}");
        }

        if (((expected.Rflags ^ actual.Rflags) & flags) != 0)
            text.Add($"rflags are {actual.Rflags:x}, should be {expected.Rflags:x}");
        return string.Join("; ", text);
    }

    private static TestMachine NewMachine()
    {
        var machine = new TestMachine();
        Assert.That(machine.Pin(1, Table), Is.Zero);
        Assert.That(machine.Update(3, 100, new PageTableEntry(Frame(Table), ReadOnly)), Is.Zero);
        return machine;
    }

    private static PageTableModel ModelOf(TestMachine machine)
    {
        var model = new PageTableModel(machine) { KernelRoot = 0 };
        model.Pinned[0] = 4;
        model.Pinned[Table] = 1;
        model.Allocated.AsSpan().Fill(true);
        model.Verify("start");
        return model;
    }

    private static byte[] Assemble(Action<Assembler> emit, ulong address)
    {
        var assembler = new Assembler(64);
        emit(assembler);
        using var stream = new MemoryStream();
        _ = assembler.Assemble(new StreamCodeWriter(stream), address);
        return stream.ToArray();
    }

    /// <summary>Puts an instruction where RIP will be.</summary>
    /// <returns>The address behind it.</returns>
    private static ulong PutCode(TestMachine machine, Action<Assembler> emit)
    {
        byte[] code = Assemble(emit, CodeAddress);
        code.CopyTo(new Span<byte>(machine.Data + 4096, 4096));
        machine.Vcpu->Registers->Rip = CodeAddress;
        return CodeAddress + (ulong)code.Length;
    }

    private static void ExpectRefusalOf(ulong entry)
    {
        using var machine = NewMachine();
        PageTableModel model = ModelOf(machine);
        PutCode(machine, static a => a.xchg(__qword_ptr[r9], rax));
        machine.Vcpu->Registers->R9 = TableAddress + (Slot * 8);
        machine.Vcpu->Registers->Rax = entry;
        ExpectRefusal(machine, model, TableAddress + (Slot * 8));
    }

    private static void ExpectRefusal(TestMachine machine, PageTableModel model, ulong fault)
    {
        CpuRegisters before = *machine.Vcpu->Registers;
        byte[] table = new ReadOnlySpan<byte>(machine.Entry(Table, 0), 4096).ToArray();
        Assert.That(new ReadOnlyPageFault(machine.Vcpu).TryEmulate(new VirtualAddress(fault)), Is.False);
        Assert.That(Differences(before, *machine.Vcpu->Registers, ulong.MaxValue), Is.Empty);
        Assert.That(new ReadOnlySpan<byte>(machine.Entry(Table, 0), 4096).SequenceEqual(table), Is.True);
        model.Verify("refusal");
    }
}
