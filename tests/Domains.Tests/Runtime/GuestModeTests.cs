// Bounce frames and iret: byte for byte what a guest finds on its stack, and how it gets back.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class GuestModeTests
{
    private const ulong UserStack = 0x7f00_0000_1238;
    private FakeDomain _domain = null!;
    private VcpuContext* _vcpu;

    [SetUp]
    public void SetUp()
    {
        _domain = new FakeDomain();
        _vcpu = _domain.Context;
        CpuRegisters* registers = _vcpu->Registers;
        *registers = new CpuRegisters { Rcx = 0xc1, R11 = 0xb1, Rip = 0x1111_2222, Rsp = FakeDomain.Stack + 0x128, Rflags = 0x5_7ad7, Rax = 0xa, Rbx = 0xb };
        _vcpu->Segments->Cs = FlatSelectors.Ring3Cs64;
        _vcpu->Segments->Ss = FlatSelectors.Ring3Data;
        _vcpu->State->KernelSp = FakeDomain.Stack + 0x808;
        _vcpu->State->UserRoot = _vcpu->State->KernelRoot;
        _vcpu->Info->EvtchnUpcallMask = 0;
    }

    [TearDown]
    public void TearDown() => _domain.Dispose();

    [Test]
    public void Frame_of_kernel_mode([Values] bool hasErrorCode, [Values] bool masks, [Values(0, 1)] int masked)
    {
        _vcpu->Info->EvtchnUpcallMask = (byte)masked;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, masks, hasErrorCode, 0xe)), Is.True);
        List<ulong> expected =
        [
            0xc1, 0xb1, 0x1111_2222, 0xe030 | ((ulong)masked << 32), (0x5_7ad7UL & ~0x3200UL) | (masked == 0 ? 0x200UL : 0),
            FakeDomain.Stack + 0x128, 0xe02b,
        ];
        if (hasErrorCode)
            expected.Insert(2, 0xe);
        Assert.That(Stack(expected.Count), Is.EqualTo(expected));

        // The slot that the frame ends at is aligned; with an error code the frame begins aligned as well.
        Assert.That(_vcpu->Registers->Rsp, Is.EqualTo(FakeDomain.Stack + 0x120 - ((ulong)expected.Count * 8)));
        Assert.That(_vcpu->Registers->Rip, Is.EqualTo(FakeDomain.Handler));
        Assert.That(_vcpu->Registers->Rflags, Is.EqualTo(0x5_7ad7UL & ~0x7_4100UL), "TF, NT, RF, VM and AC are cleared");
        Assert.That((_vcpu->Segments->Cs, _vcpu->Segments->Ss), Is.EqualTo((FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data)));
        Assert.That(_vcpu->Info->EvtchnUpcallMask, Is.EqualTo(masks ? 1 : masked));
        Assert.That(_vcpu->State->KernelMode, Is.EqualTo(1));
        Assert.That((_vcpu->Registers->Rax, _vcpu->Registers->Rbx), Is.EqualTo((0xaUL, 0xbUL)));
    }

    [Test]
    public void Frame_of_user_mode()
    {
        _vcpu->State->KernelMode = 0;
        _vcpu->Registers->Rsp = UserStack;
        _vcpu->Segments->Cs = 0x33;
        _vcpu->Segments->Ss = 0x2b;
        _vcpu->Segments->GsBase = 0x1000;
        _vcpu->State->InactiveGsBase = 0xffff_8880_0000_0000;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, MasksEvents: true, HasErrorCode: true, ErrorCode: 6)), Is.True);
        Assert.That(Stack(8), Is.EqualTo(new ulong[] { 0xc1, 0xb1, 6, 0x1111_2222, 0x33, 0x5_4ad7, UserStack, 0x2b }));
        Assert.That(_vcpu->Registers->Rsp, Is.EqualTo(FakeDomain.Stack + 0x800 - 64));
        Assert.That(_vcpu->State->KernelMode, Is.EqualTo(1));
        Assert.That((_vcpu->Segments->GsBase, _vcpu->State->InactiveGsBase), Is.EqualTo((0xffff_8880_0000_0000UL, 0x1000UL)));
    }

    [TestCase(0UL)]
    [TestCase(1UL)]
    [TestCase(3UL)]
    public void Iopl_is_shown_where_the_guest_asked_for_it(ulong level)
    {
        _vcpu->State->Iopl = level << 12;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, false)), Is.True);
        Assert.That(Stack(7)[4] & 0x3000, Is.Zero);
        _vcpu->Domain->State->VmAssists = (ulong)VmAssist.ArchitecturalIopl;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, false)), Is.True);
        Assert.That(Stack(7)[4] & 0x3000, Is.EqualTo(level << 12));
    }

    [TestCase(0x5000UL, Description = "not mapped")]
    [TestCase(0UL, Description = "wraps around")]
    [TestCase(0xffff_8000_0000_0010UL, Description = "Xen's part")]
    [TestCase(0xffff_8800_0000_0000UL, Description = "reaches into Xen's part")]
    [TestCase(0x8000_0000_0000UL, Description = "not canonical from below: its frame would lie where nothing is mapped")]
    [TestCase(0xffff_7fff_ffff_fff0UL, Description = "not canonical")]
    public void Stacks_that_cannot_take_a_frame(ulong stack)
    {
        _vcpu->Registers->Rsp = stack;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, false)), Is.False);
    }

    [Test]
    public void A_stack_on_page_tables_cannot_take_a_frame()
    {
        _vcpu->Registers->Rsp = _domain.StartInfo->PageTableBase + 0x1000;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, false)), Is.False);
    }

    [Test]
    public void Without_a_handler_nothing_is_pushed() => Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(0, false)), Is.False);

    [Test]
    public void Iret_undoes_a_bounce([Values] bool fromUser, [Values(0, 1)] int masked)
    {
        if (fromUser)
        {
            _vcpu->State->KernelMode = 0;
            _vcpu->Registers->Rsp = UserStack;
            _vcpu->Segments->GsBase = 0x1000;
            _vcpu->State->InactiveGsBase = 0x2000;
        }

        _vcpu->Registers->Rflags = 0x246;
        _vcpu->Info->EvtchnUpcallMask = (byte)masked;
        CpuRegisters before = *_vcpu->Registers;
        SegmentRegisters segments = *_vcpu->Segments;
        Assert.That(GuestMode.Bounce(_vcpu, new TrapBounce(FakeDomain.Handler, MasksEvents: true)), Is.True);

        // What the kernel's exit code does: pop the two, push them again in struct iret_context with RAX and the flags.
        CpuRegisters* registers = _vcpu->Registers;
        registers->Rsp += 16;
        (registers->Rcx, registers->R11, registers->Rax) = (77, 78, 79);
        registers->Rsp -= 32;
        _domain.WriteAll(registers->Rsp, before.Rax, before.R11, before.Rcx, 0);
        Assert.That(GuestMode.Iret(_vcpu, out long rax), Is.True);
        Assert.That(rax, Is.EqualTo((long)before.Rax));
        Assert.That((registers->Rip, registers->Rsp, registers->Rflags), Is.EqualTo((before.Rip, before.Rsp, before.Rflags)));
        Assert.That((registers->Rcx, registers->R11), Is.EqualTo((before.Rcx, before.R11)));
        Assert.That((_vcpu->Segments->Cs, _vcpu->Segments->Ss, _vcpu->Segments->GsBase), Is.EqualTo((segments.Cs, segments.Ss, segments.GsBase)));
        Assert.That(_vcpu->State->KernelMode, Is.EqualTo(fromUser ? 0 : 1));
        Assert.That(_vcpu->Info->EvtchnUpcallMask, Is.EqualTo(masked));
    }

    [TestCase(0xe033UL, 0xe033, 0)]
    [TestCase(0x33UL, 0x33, 0)]
    [TestCase(0xe030UL, 0xe033, 1, Description = "RPL 0 stays in the kernel, at privilege 3")]
    [TestCase(0xe031UL, 0xe033, 1)]
    [TestCase(0xe032UL, 0xe033, 1)]
    public void The_mode_is_in_the_privilege_of_CS(ulong cs, int loaded, int kernelMode)
    {
        Assert.That(Iret(0, 0x100, cs, 0x202, UserStack, 0x2b), Is.True);
        Assert.That(_vcpu->Segments->Cs, Is.EqualTo(loaded));
        Assert.That(_vcpu->State->KernelMode, Is.EqualTo(kernelMode));
    }

    [TestCase(0x0UL, 0x202UL, 1)]
    [TestCase(0x200UL, 0x202UL, 0)]
    [TestCase(0x2_3002UL, 0x202UL, 1, Description = "VM and IOPL are not the guest's")]
    [TestCase(0x4_4cd7UL, 0x4_4ed7UL, 1)]
    public void Flags_and_mask_come_from_the_frame(ulong saved, ulong loaded, int mask)
    {
        Assert.That(Iret(0, 0x100, 0xe030, saved, UserStack, 0x2b), Is.True);
        Assert.That(_vcpu->Registers->Rflags, Is.EqualTo(loaded));
        Assert.That(_vcpu->Info->EvtchnUpcallMask, Is.EqualTo(mask));
    }

    [TestCase(0xe033UL, 0xe033)]
    [TestCase(0xe023UL, 0xe023, Description = "32-bit code")]
    [TestCase(0x33UL, 0xe033, Description = "SYSRET has its own selectors")]
    public void A_return_from_a_system_call_is_a_SYSRET(ulong cs, int loaded)
    {
        (_vcpu->Registers->Rcx, _vcpu->Registers->R11) = (0xdead, 0xbeef);
        Assert.That(Iret(0x100, 0x40_1000, cs, 0x3246, UserStack, 0x2b), Is.True);
        Assert.That((_vcpu->Registers->Rcx, _vcpu->Registers->R11), Is.EqualTo((0x40_1000UL, 0x246UL)), "nothing of the kernel's is left in them");
        Assert.That((_vcpu->Segments->Cs, _vcpu->Segments->Ss), Is.EqualTo(((ushort)loaded, FlatSelectors.Ring3Data)));
    }

    [Test]
    public void Iret_takes_the_iopl_where_the_guest_asked_for_it()
    {
        Assert.That(Iret(0, 0x100, 0xe030, 0x3202, UserStack, 0x2b), Is.True);
        Assert.That(_vcpu->State->Iopl, Is.Zero);
        _vcpu->Domain->State->VmAssists = (ulong)VmAssist.ArchitecturalIopl;
        Assert.That(Iret(0, 0x100, 0xe030, 0x1202, UserStack, 0x2b), Is.True);
        Assert.That(_vcpu->State->Iopl, Is.EqualTo(0x1000));
    }

    [Test]
    public void Iret_ends_the_handling_of_an_NMI()
    {
        _vcpu->State->NmiMasked = 1;
        Assert.That(Iret(0, 0x100, 0xe030, 0x202, UserStack, 0x2b), Is.True);
        Assert.That(_vcpu->State->NmiMasked, Is.Zero);
    }

    [Test]
    public void Frames_that_lead_nowhere()
    {
        _vcpu->Registers->Rsp = 0x5000;
        Assert.That(GuestMode.Iret(_vcpu, out _), Is.False, "cannot be read");
        _vcpu->State->UserRoot = 0;
        Assert.That(Iret(0, 0x100, 0xe033, 0x202, UserStack, 0x2b), Is.False, "no user page tables");
        Assert.That(_vcpu->State->KernelMode, Is.EqualTo(1));
        Assert.That(Iret(0, 0x100, 0xe030, 0x202, UserStack, 0x2b), Is.True, "the kernel needs none");
    }

    private bool Iret(ulong flags, ulong rip, ulong cs, ulong rflags, ulong rsp, ulong ss)
    {
        _vcpu->State->KernelMode = 1;
        _vcpu->Registers->Rsp = FakeDomain.Stack;
        _domain.WriteAll(FakeDomain.Stack, 1, 11, 12, flags, rip, cs, rflags, rsp, ss);
        return GuestMode.Iret(_vcpu, out _);
    }

    private ulong[] Stack(int words) => new ReadOnlySpan<ulong>(_domain.Host(_vcpu->Registers->Rsp), words).ToArray();
}
