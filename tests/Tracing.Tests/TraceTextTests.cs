// Records in words.
using CsCheck;
using XenSharp.Core;
using XenSharp.Core.Trace;
using static XenSharp.Tracing.Tests.Records;

namespace XenSharp.Tracing.Tests;

public sealed class TraceTextTests
{
    private const ulong Pointer = 0xffff_ffff_8123_4567;

    private readonly TraceText _text = new();

    private static IEnumerable<TestCaseData> Texts()
    {
        yield return Case(Hypercall(HypercallNumber.XenVersion, 0, 0).Result(0x40011), "xen_version/version", "xen_version(version, NULL) = 0x40011", "xen_version(version, NULL) = 0x40011");
        yield return Case(Hypercall(HypercallNumber.SchedOp, 1, 0), "sched_op/block", "sched_op(block, NULL) = 0", "sched_op(block, NULL) = 0");
        yield return Case(Hypercall(HypercallNumber.SchedOp, 99, Pointer).Result(-38), "sched_op/99", "sched_op(99, 0xffffffff81234567) = -ENOSYS", "sched_op(99, *) = -ENOSYS");
        yield return Case(
            Hypercall(HypercallNumber.MmuUpdate, Pointer, 2, 0, 0x7ff0).With(Words(0x1_2345_6000, 0x8000_0001_1fce_2063)),
            "mmu_update", "mmu_update([{normal_pt_update 0x123456000: 0x800000011fce2063}, ...], 2, NULL, self) = 0",
            "mmu_update([{normal_pt_update flags 0x8000000000000063}, ...], 2, NULL, self) = 0");
        yield return Case(
            Hypercall(HypercallNumber.MmuUpdate, Pointer, 1, 0, 0x7ff0).With(Words(0x1_2345_6001, 77)),
            "mmu_update", "mmu_update([{machphys_update 0x123456000: 0x4d}], 1, NULL, self) = 0", "mmu_update([{machphys_update}], 1, NULL, self) = 0");
        yield return Case(
            Hypercall(HypercallNumber.MmuUpdate, Pointer, 0x8000_0003, Pointer, 5).With(TraceFlags.Continued | TraceFlags.Resumed),
            "mmu_update", "(resumed) mmu_update(0xffffffff81234567, 3 more, 0xffffffff81234567, 5) = continued", "(resumed) mmu_update(*, 3 more, *, 5) = continued");
        yield return Case(
            Hypercall(HypercallNumber.MmuextOp, Pointer, 1, 0, 0x7ff0).With(Words(3, 0x1234, 0)),
            "mmuext_op", "mmuext_op([{pin_l4_table 0x1234 0}], 1, NULL, self) = 0", "mmuext_op([{pin_l4_table}], 1, NULL, self) = 0");
        yield return Case(
            Hypercall(HypercallNumber.EventChannelOp, 4, Pointer).With(BitConverter.GetBytes(7)),
            "event_channel_op/send", "event_channel_op(send, {port 7}) = 0", "event_channel_op(send, {port 7}) = 0");
        yield return Case(
            Hypercall(HypercallNumber.MemoryOp, (5UL << 6) | 6, Pointer).Result(9),
            "memory_op/populate_physmap", "memory_op(populate_physmap from 5, 0xffffffff81234567) = 9", "memory_op(populate_physmap from 5, *) = 9");
        yield return Case(
            Hypercall(HypercallNumber.UpdateVaMapping, Pointer, 0x1234_5067, 2).Result(-22),
            "update_va_mapping", "update_va_mapping(0xffffffff81234567, 0x12345067, 2) = -EINVAL", "update_va_mapping(*, flags 0x67, *) = -EINVAL");
        yield return Case(Hypercall(HypercallNumber.Iret).Result(-22), "iret", "iret() = 0xffffffffffffffea", "iret() = *");
        yield return Case(
            Hypercall((HypercallNumber)50, 1, 2, 3, 4, 5, 6).Result(-38),
            "hypercall_50", "hypercall_50(1, 2, 3, 4, 5, 6) = -ENOSYS", "hypercall_50(*, *, *, *, *, *) = -ENOSYS");
        yield return Case(
            Trap(TraceKind.Emulation, ExceptionVector.GeneralProtection, TraceOutcome.Emulated, "0f32").Before(1, 0xc000_0080).After(0, 0xd01).After(2, 0),
            "rdmsr", "rdmsr [rcx=0xc0000080] -> [rax=0xd01 rdx=0]", "rdmsr 0xc0000080");
        yield return Case(
            Trap(TraceKind.Emulation, ExceptionVector.InvalidOpcode, TraceOutcome.Emulated, "0f0b78656e0fa2").Before(0, 1).Before(1, 0).After(0, 2),
            "xen cpuid", "xen cpuid [rax=1 rcx=0] -> [rax=2]", "xen cpuid 1.0");
        yield return Case(
            Trap(TraceKind.Emulation, ExceptionVector.GeneralProtection, TraceOutcome.Emulated, "ec").Before(2, 0x61), "in", "in al, dx [rdx=0x61]", "in 0x61");
        yield return Case(
            Trap(TraceKind.Emulation, ExceptionVector.GeneralProtection, TraceOutcome.Emulated, "e643").Before(0, 0x61), "out", "out 0x43, al [rax=0x61]", "out 0x43");
        yield return Case(
            Trap(TraceKind.Emulation, ExceptionVector.GeneralProtection, TraceOutcome.Emulated, "0f22e0").Before(0, 0x61), "mov cr", "mov cr4, rax [rax=0x61]", "mov cr to cr4");
        yield return Case(
            Entry(Trap(TraceKind.Emulation, ExceptionVector.PageFault, TraceOutcome.Emulated, "488907").Before(0, 0).Before(7, Pointer), 0x1234_5067, 0),
            "page-table mov", "mov [rdi], rax [rax=0 rdi=0xffffffff81234567] at 0xffffffff81234567: 0x12345067 -> 0", "page-table mov flags 0x67 -> 0");
        yield return Case(
            At(Trap(TraceKind.Emulation, ExceptionVector.PageFault, TraceOutcome.Emulated, "488b07"), 0xffff_8000_0000_0008).Before(7, 0xffff_8000_0000_0008).After(0, 5),
            "M2P mov", "mov rax, [rdi] [rdi=0xffff800000000008] -> [rax=5] at 0xffff800000000008", "M2P mov");
        yield return Case(
            At(Trap(TraceKind.Exception, ExceptionVector.PageFault, TraceOutcome.Delivered), 0x1000, error: 6, delivered: 6),
            "#PF", "#PF(error 6: write, not present, address 0x1000) -> delivered", "#PF(error 6) -> delivered");
        yield return Case(
            At(Trap(TraceKind.Exception, ExceptionVector.PageFault, TraceOutcome.Delivered), 0x1000, error: 0x15, delivered: 0x11),
            "#PF", "#PF(error 0x15: fetch, protection, address 0x1000) -> delivered with error 0x11", "#PF(error 0x15) -> delivered");
        yield return Case(Trap(TraceKind.Exception, ExceptionVector.DivideError, TraceOutcome.Crashed), "#DE", "#DE -> crashed", "#DE(error 0) -> crashed");
        yield return Case(
            Vector(Trap(TraceKind.Exception, ExceptionVector.GeneralProtection, TraceOutcome.Delivered, "cd80"), 0x80),
            "#GP", "#GP(error 0) at \"int 0x80\" -> int 0x80 delivered", "#GP(error 0) int -> int 0x80 delivered");
        yield return Case(
            Trap(TraceKind.Exception, ExceptionVector.InvalidOpcode, TraceOutcome.Delivered, "0f0b"), "#UD", "#UD at \"ud2\" -> delivered", "#UD(error 0) ud2 -> delivered");
        yield return Case(
            new TraceRecord { Kind = TraceKind.Upcall, Outcome = TraceOutcome.Delivered, Address = Pointer }, "upcall", "upcall to 0xffffffff81234567", "upcall");
        yield return Case(
            new TraceRecord { Kind = TraceKind.SystemCall, Number = 59, ArgumentCount = 2, Arguments = new HypercallArguments { A0 = 10 } },
            "system call", "system call 59(0xa, 0)", "system call 59");
        yield return Case(new TraceRecord { Kind = TraceKind.Boot }, "boot", "the domain starts", "boot");
    }

    [TestCaseSource(nameof(Texts))]
    public void A_record_has_a_name_a_text_and_what_it_shares_with_other_runs(TraceRecord record, string name, string text, string normalised)
    {
        Assert.Multiple(() =>
        {
            Assert.That(_text.Name(record), Is.EqualTo(name));
            Assert.That(_text.Describe(record), Is.EqualTo(text));
            Assert.That(_text.Normalise(record), Is.EqualTo(normalised));
        });
    }

    [Test]
    public void Every_hypercall_of_the_table_has_a_name_of_its_own()
    {
        string[] names = [.. Enum.GetValues<HypercallNumber>().Select(number => TraceText.HypercallName((ulong)number))];
        Assert.That(names, Has.None.StartsWith("hypercall_"));
        Assert.That(names, Is.Unique);
    }

    [TestCase(-22L, "EINVAL")]
    [TestCase(-1L, "EPERM")]
    [TestCase(-4000L, "error 4000")]
    [TestCase(0L, null)]
    [TestCase(1L, null)]
    [TestCase(-5000L, null)]
    public void Errors_are_told_from_results(long result, string? error)
    {
        TraceRecord record = Hypercall(HypercallNumber.SetGdt, 0, 0).Result(result);
        Assert.That(TraceText.ErrorOf(record), Is.EqualTo(error));
        Assert.That(TraceText.IsError(record), Is.EqualTo(error != null));
        Assert.That(TraceText.IsError(record.With(TraceFlags.Continued)), Is.False);
    }

    [Test]
    public void Whatever_a_file_holds_can_be_shown() => Gen.Byte.Array[20, 500].Sample(bytes =>
    {
        bytes[0] = (byte)(1 + (bytes[0] % 6));
        var record = new TraceRecord();
        ReadOnlySpan<byte> rest = bytes;
        TraceState state = default;
        if (!TraceEncoding.TryRead(ref rest, ref state, record))
            return;
        var text = new TraceText();
        Assert.That(text.Name(record), Is.Not.Empty);
        Assert.That(text.Describe(record), Is.Not.Empty);
        Assert.That(text.Normalise(record), Is.Not.Empty);
        Assert.That(text.Describe(record), Does.Not.Contain("\n"));
    }, iter: 20_000);

    private static TestCaseData Case(TraceRecord record, string name, string text, string normalised)
        => new TestCaseData(record, name, text, normalised).SetArgDisplayNames(text);

    private static byte[] Words(params ulong[] words) => [.. words.SelectMany(BitConverter.GetBytes)];

    private static TraceRecord At(TraceRecord record, ulong address, uint error = 0, uint delivered = 0)
    {
        (record.Address, record.ErrorCode, record.DeliveredErrorCode) = (address, error, delivered);
        return record;
    }

    private static TraceRecord Entry(TraceRecord record, ulong before, ulong after)
    {
        (record.EntryBefore, record.EntryAfter, record.Address) = (before, after, Pointer);
        return record.With(TraceFlags.HasEntry);
    }

    private static TraceRecord Vector(TraceRecord record, byte delivered)
    {
        record.DeliveredVector = delivered;
        return record;
    }
}
