// What a scripted guest asked for is in the trace: all of it, in its order, with arguments, results, and what became of it.
using XenSharp.Core;
using XenSharp.Core.Trace;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class TraceTests : ScriptedGuest
{
    private const ulong GsBase = 0xc000_0101;

    private MemoryStream _bytes = null!;
    private TraceRecorder _recorder = null!;

    private protected override DomainOptions Change(DomainOptions options)
    {
        _bytes = new MemoryStream();
        _recorder = new TraceRecorder(_bytes, new TraceHeader(1_000_000, 0, DateTimeOffset.UnixEpoch, "fake", "4.17", "test"));
        return options with { Trace = _recorder };
    }

    [TearDown]
    public void EndTrace() => _recorder.Dispose();

    [Test]
    public void Hypercalls_have_arguments_results_and_place()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            cpu.Rip = 0x4000;
            yield return cpu.Hypercall(HypercallNumber.XenVersion, 0, 2, 3);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 3, 99);
            yield return cpu.Hypercall((HypercallNumber)55, 1, 2, 3, 4, 5, 6);
            yield return cpu.Hypercall((HypercallNumber)0x7fff_ffff);
        }

        List<TraceRecord> records = Run(Guest);
        Assert.That(records.Select(Call), Is.EqualTo(new[]
        {
            $"17(0,2) = {(4 << 16) | 17}", $"24(3,99,0) = {-(long)Errno.ENOENT}", $"55(1,2,3,4,5,6) = {-(long)Errno.ENOSYS}", $"{0x7fff_ffff}(0,0,0,0,0,0) = {-(long)Errno.ENOSYS}",
            "6(2,0) = 0",
        }));
        Assert.That(records.Select(record => record.Rip), Is.EqualTo(new ulong[] { 0x4002, 0x4004, 0x4006, 0x4008, 0x400a }), "behind the SYSCALL");
        Assert.That(records.Select(record => record.Flags), Is.All.EqualTo(TraceFlags.KernelMode));
        Assert.That(records.Zip(records.Skip(1)), Has.All.Matches<(TraceRecord First, TraceRecord Second)>(
            pair => pair.First.Start + pair.First.Duration <= pair.Second.Start), "one after the other");
    }

    [Test]
    public void Of_lists_the_first_element_is_there_and_its_pages_are_not_touched_for_it()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fake.WriteAll(Data + 0x800, (FakeMachine.FirstFrame + 4) << 12 | 1, 0x500);
            yield return cpu.Hypercall(HypercallNumber.MmuUpdate, Data + 0x800, 1, 0, 0x7ff0);
            Fake.WriteAll(Data + 0x800, 6, 0, 0);
            yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data + 0x800, 1, 0, 0x7ff0);
            yield return cpu.Hypercall(HypercallNumber.MmuextOp, 0x7000_0000, 1, 0, 0x7ff0);
            yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data + 0x800, 0, 0, 0x7ff0);
            yield return Send(cpu, 77);
        }

        List<TraceRecord> records = Run(Guest);
        Assert.That(records[0].Has(TraceFlags.HasData), Is.True);
        Assert.That(BitConverter.ToUInt64(DataOf(records[0])), Is.EqualTo((FakeMachine.FirstFrame + 4) << 12 | 1));
        Assert.That(BitConverter.ToUInt64(DataOf(records[0]), 8), Is.EqualTo(0x500UL));
        Assert.That(BitConverter.ToUInt32(DataOf(records[1])), Is.EqualTo(6U));
        Assert.That(records[2].Has(TraceFlags.HasData), Is.False, "not mapped");
        Assert.That(records[2].Result, Is.EqualTo(-(long)Errno.EFAULT));
        Assert.That(records[3].Has(TraceFlags.HasData), Is.False, "an empty list");
        Assert.That(BitConverter.ToUInt32(DataOf(records[4])), Is.EqualTo(77U));
    }

    [Test]
    public void Calls_in_a_multicall_are_records_and_continuations_are_seen_at_both_ends()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            for (ulong i = 0; i < 3; i++)
                Fake.WriteAll(Data + 0x800 + (i * 16), ((FakeMachine.FirstFrame + 4 + i) << 12) | 1, 0x500 + i);
            WriteMulticall(0, HypercallNumber.MmuUpdate, Data + 0x800, 3, 0, 0x7ff0);
            WriteMulticall(1, HypercallNumber.XenVersion, 7);
            cpu.Kick();
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 2);
            yield return cpu.Again();
            Assert.That(cpu.Result, Is.Zero);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 0);
        }

        List<TraceRecord> records = Run(Guest);
        const TraceFlags kernel = TraceFlags.KernelMode;
        Assert.That(records.Select(record => (record.Number, record.Flags & ~TraceFlags.HasData)), Is.EqualTo(new[]
        {
            (13UL, kernel | TraceFlags.Continued), (1UL, kernel | TraceFlags.Nested | TraceFlags.Continued),
            (13UL, kernel | TraceFlags.Resumed), (1UL, kernel | TraceFlags.Nested | TraceFlags.Resumed), (17UL, kernel | TraceFlags.Nested),
            (13UL, kernel), (6UL, kernel),
        }));
        Assert.That(records[1].Start, Is.GreaterThanOrEqualTo(records[0].Start));
        Assert.That(records[1].Start + records[1].Duration, Is.LessThanOrEqualTo(records[0].Start + records[0].Duration));
        Assert.That(Call(records[4]), Is.EqualTo("17(7,0) = 4096"));
    }

    [Test]
    public void Exceptions_say_what_became_of_them()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            SetTrap(ExceptionVector.DivideError, Handler);
            SetTrap(ExceptionVector.GeneralProtection, Handler);
            SetTrap(ExceptionVector.InvalidOpcode, Handler);
            SetTrap((ExceptionVector)0x80, Handler);
            cpu.Rsp = Stack;
            yield return FakeVcpu.Exception(ExceptionVector.DivideError);

            // A stale translation: the tables allow the access.
            cpu.FaultAddress = new VirtualAddress(Data);
            cpu.Rip = 0x1000;
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);

            ToUser(cpu);
            cpu.FaultAddress = new VirtualAddress(0x1234_5000);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 6);

            // hlt, which nobody carries out.
            Fake.WriteAll(Data + 0x100, 0xf4);
            cpu.Rip = Data + 0x100;
            cpu.Rsp = Stack;
            yield return FakeVcpu.Exception(ExceptionVector.GeneralProtection);

            // int 0x80.
            Fake.WriteAll(Data + 0x200, 0x80cd);
            cpu.Rip = Data + 0x200;
            yield return FakeVcpu.Exception(ExceptionVector.GeneralProtection, (0x80 << 3) | 2);
        }

        List<TraceRecord> records = Run(Guest);
        Assert.That(records.Take(5).Select(record => record.Kind), Is.All.EqualTo(TraceKind.Exception));
        Assert.That(records.Take(5).Select(record => (record.Vector, record.ErrorCode, record.Outcome)), Is.EqualTo(new[]
        {
            ((byte)0, 0U, TraceOutcome.Delivered), ((byte)14, 7U, TraceOutcome.Retried), ((byte)14, 6U, TraceOutcome.Delivered),
            ((byte)13, 0U, TraceOutcome.Delivered), ((byte)13, 0x402U, TraceOutcome.Delivered),
        }));
        Assert.That((records[1].Address, records[2].Address), Is.EqualTo((Data, 0x1234_5000UL)));
        Assert.That((records[1].Has(TraceFlags.KernelMode), records[2].Has(TraceFlags.KernelMode)), Is.EqualTo((true, false)));
        Assert.That((records[3].DeliveredVector, records[3].InstructionLength, records[3].Instruction[0]), Is.EqualTo(((byte)13, 1, (byte)0xf4)));
        Assert.That(records[4].DeliveredVector, Is.EqualTo(0x80));
    }

    [Test]
    public void Instructions_that_are_carried_out_have_their_bytes_and_registers()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            // wrmsr, with a RIP at the end of a page: the next one is not mapped, or holds something else.
            Fake.WriteAll(Data + 0xff8, 0x300f_0000_0000_0000);
            cpu.Rip = Data + 0xffe;
            SetRegisters(cpu, rax: 0x1000, rdi: 0);
            SetCounter(cpu, GsBase);
            yield return FakeVcpu.Exception(ExceptionVector.GeneralProtection);
            Assert.That(cpu.Rip, Is.EqualTo(Data + 0x1000));

            // ud2; "xen"; cpuid
            Fake.WriteAll(Data + 0x200, 0x00a2_0f6e_6578_0b0f);
            cpu.Rip = Data + 0x200;
            SetRegisters(cpu, rax: 0x4000_0000, rdi: 0);
            SetCounter(cpu, 0);
            yield return FakeVcpu.Exception(ExceptionVector.InvalidOpcode);
            Assert.That(cpu.Rip, Is.EqualTo(Data + 0x207));
        }

        List<TraceRecord> records = Run(Guest);
        Assert.That(records.Take(2).Select(record => (record.Kind, record.Outcome)), Is.All.EqualTo((TraceKind.Emulation, TraceOutcome.Emulated)));
        Assert.That(InstructionOf(records[0]), Is.EqualTo("0f30"));
        Assert.That(records[0].RegistersRead, Is.EqualTo(0b111), "RAX, RCX, RDX");
        Assert.That((records[0].Before[0], records[0].Before[1]), Is.EqualTo((0x1000UL, GsBase)));
        Assert.That(records[0].RegistersWritten, Is.Zero);
        Assert.That(InstructionOf(records[1]), Is.EqualTo("0f0b78656e0fa2"));
        Assert.That(records[1].RegistersRead, Is.EqualTo(0b11), "RAX, RCX");
        Assert.That(records[1].Before[0], Is.EqualTo(0x4000_0000UL));
        Assert.That(records[1].After[3], Is.EqualTo(0x566e_6558UL), "\"XenV\" of \"XenVMMXenVMM\" in EBX");
    }

    [Test]
    public void Stores_to_page_tables_show_the_entry_before_and_after()
    {
        ulong before = 0;
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);
            ulong entry = EntryOf(Data + 0x1000);
            before = Fake.Read<ulong>(entry);
            Fake.WriteAll(Data + 0x100, 0x07_8948);
            cpu.Rip = Data + 0x100;
            SetRegisters(cpu, rax: 0, rdi: entry);
            cpu.FaultAddress = new VirtualAddress(entry);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            Assert.That(Fake.Read<ulong>(entry), Is.Zero);
        }

        TraceRecord store = Run(Guest)[1];
        Assert.That((store.Kind, store.Vector), Is.EqualTo((TraceKind.Emulation, (byte)14)));
        Assert.That(store.Has(TraceFlags.HasEntry), Is.True);
        Assert.That((store.EntryBefore, store.EntryAfter), Is.EqualTo((before, 0UL)));
        Assert.That(InstructionOf(store), Is.EqualTo("488907"));
        Assert.That(store.RegistersRead, Is.EqualTo((1 << 0) | (1 << 7)), "RAX, RDI");
    }

    [Test]
    public void Upcalls_system_calls_and_NMIs_are_there()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            cpu.Rsp = Stack;
            SetMask(1);
            Fake.WriteAll(Data, 2, Handler + 0x80);
            yield return cpu.Hypercall(HypercallNumber.CallbackOp, 0, Data);
            yield return BindIpi(cpu);
            uint port = Port();
            yield return Send(cpu, port);
            SetMask(0);
            cpu.Rip = 0x6000;
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            ToUser(cpu);
            SetKernelStack(Stack);
            cpu.Rip = 0x40_0000;
            yield return cpu.Hypercall((HypercallNumber)59, 1, 2, 3, 4, 5, 6);
            Fake.WriteAll(Data, Handler + 0x20);
            yield return cpu.Hypercall(HypercallNumber.NmiOp, 0, Data);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
        }

        List<TraceRecord> records = Run(Guest);
        Assert.That(records.Select(record => record.Kind), Is.EqualTo(new[]
        {
            TraceKind.Hypercall, TraceKind.Hypercall, TraceKind.Hypercall, TraceKind.Upcall, TraceKind.SystemCall, TraceKind.Hypercall, TraceKind.Hypercall,
            TraceKind.Exception, TraceKind.Hypercall,
        }));
        Assert.That((records[3].Address, records[3].Rip, records[3].Outcome), Is.EqualTo((Handler, 0x6000UL, TraceOutcome.Delivered)));
        Assert.That((records[4].Number, records[4].ArgumentCount, records[4].Arguments.A5), Is.EqualTo((59UL, 6, 6UL)));
        Assert.That((records[4].Rip, records[4].Has(TraceFlags.KernelMode)), Is.EqualTo((0x40_0002UL, false)));
        Assert.That((records[7].Vector, records[7].DeliveredVector), Is.EqualTo(((byte)2, (byte)2)));
    }

    [Test]
    public void What_ends_the_domain_is_the_last_record([Values] bool upcall)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            if (upcall)
            {
                SetMask(1);
                yield return BindIpi(cpu);
                yield return Send(cpu, Port());
                SetMask(0);
                cpu.Rsp = 0x7000_0000;
                yield return new VcpuExit(VcpuExitKind.Kicked);
            }
            else
            {
                yield return FakeVcpu.Exception(ExceptionVector.DivideError);
            }
        }

        List<TraceRecord> records = Run(Guest, ShutdownReason.Crash);
        Assert.That((records[^1].Kind, records[^1].Outcome), Is.EqualTo((upcall ? TraceKind.Upcall : TraceKind.Exception, TraceOutcome.Crashed)));
    }

    [Test]
    public void Nothing_is_allocated_for_it()
    {
        // Many, as what is allocated once, when code is first used, can be some kilobytes.
        const int rounds = 20_000;
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            for (int i = 0; i < rounds; i++)
            {
                Fake.WriteAll(Data + 0x800, 6, 0, 0);
                yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data + 0x800, 1, 0, 0x7ff0);
                Fake.WriteAll(Data + 0x200, 0x00a2_0f6e_6578_0b0f);
                cpu.Rip = Data + 0x200;
                yield return FakeVcpu.Exception(ExceptionVector.InvalidOpcode);
            }
        }

        Assert.That(Run(Guest), Has.Count.EqualTo((2 * rounds) + 1));

        // The script's own are among them: its iterator and its arrays, some 100 bytes a round.
        long traced = Fake.Domain.AllocatedBytes;
        using var untraced = new FakeDomain();
        _ = untraced.Run(cpu => Untraced(untraced, cpu));
        Assert.That(traced - untraced.Domain.AllocatedBytes, Is.LessThan(rounds), "less than a byte a round");

        static IEnumerable<VcpuExit> Untraced(FakeDomain fake, FakeVcpu cpu)
        {
            for (int i = 0; i < rounds; i++)
            {
                fake.WriteAll(Data + 0x800, 6, 0, 0);
                yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data + 0x800, 1, 0, 0x7ff0);
                fake.WriteAll(Data + 0x200, 0x00a2_0f6e_6578_0b0f);
                cpu.Rip = Data + 0x200;
                yield return FakeVcpu.Exception(ExceptionVector.InvalidOpcode);
            }
        }
    }

    /// <summary>Runs the guest and reads what was recorded, without the start.</summary>
    private List<TraceRecord> Run(Func<FakeVcpu, IEnumerable<VcpuExit>> guest, ShutdownReason reason = ShutdownReason.PowerOff)
    {
        Assert.That(Fake.Run(guest).Reason, Is.EqualTo(reason));
        Fake.Domain.Dispose();
        _recorder.Dispose();
        using TraceFile file = TraceFile.Open(new MemoryStream(_bytes.ToArray()));
        List<TraceRecord> records = [.. file.Records()];
        Assert.That(file.Damage, Is.Null);
        Assert.That(records[0].Kind, Is.EqualTo(TraceKind.Boot));
        return records[1..];
    }

    private static unsafe void SetCounter(FakeVcpu cpu, ulong rcx) => (cpu.Registers->Rcx, cpu.Registers->Rdx) = (rcx, 0);

    private static string Call(TraceRecord record)
    {
        HypercallArguments a = record.Arguments;
        return $"{record.Number}({string.Join(",", ((ulong[])[a.A0, a.A1, a.A2, a.A3, a.A4, a.A5])[..record.ArgumentCount])}) = {record.Result}";
    }

    private static byte[] DataOf(TraceRecord record) => ((ReadOnlySpan<byte>)record.Data)[..record.DataLength].ToArray();

    private static string InstructionOf(TraceRecord record) => Convert.ToHexStringLower(((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength]);
}
