// Hypercalls of the domain itself, on a domain that is not running: what Xen answers, case by case.
using System.Text;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class HypercallTests
{
    private const ulong Unmapped = 0x7000_0000;
    private const ulong NotCanonical = 0x8000_0000_0000;
    private const ulong XensPart = 0xffff_8000_0000_0000;
    private FakeDomain _domain = null!;

    [SetUp]
    public void SetUp() => _domain = new FakeDomain();

    [TearDown]
    public void TearDown() => _domain.Dispose();

    private static IEnumerable<TestCaseData> Answers()
    {
        static TestCaseData Case(string name, HypercallNumber number, long result, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0)
            => new TestCaseData(number, result, a0, a1, a2).SetArgDisplayNames(name);
        const ulong d = FakeDomain.Data;
        const long efault = -(long)Errno.EFAULT, einval = -(long)Errno.EINVAL, eperm = -(long)Errno.EPERM;
        const long enosys = -(long)Errno.ENOSYS, enoent = -(long)Errno.ENOENT, enodev = -(long)Errno.ENODEV;

        foreach (int number in (int[])[11, 27, 38, 39, 50, 55, 63, 64, 1000, -1])
            yield return Case($"hypercall {number}", (HypercallNumber)number, enosys);
        foreach (HypercallNumber number in (HypercallNumber[])[HypercallNumber.KexecOp, HypercallNumber.Mca])
            yield return Case($"{number}", number, eperm);

        yield return Case("set_trap_table, none", HypercallNumber.SetTrapTable, 0);
        yield return Case("set_trap_table, empty", HypercallNumber.SetTrapTable, 0, d);
        yield return Case("set_trap_table, not readable", HypercallNumber.SetTrapTable, efault, Unmapped);
        yield return Case("stack_switch", HypercallNumber.StackSwitch, 0, 0xe02b, FakeDomain.Stack);
        yield return Case("set_callbacks, not canonical", HypercallNumber.SetCallbacks, 0, NotCanonical, NotCanonical, NotCanonical);
        yield return Case("callback_op, not readable", HypercallNumber.CallbackOp, efault, 0, Unmapped);
        yield return Case("callback_op, unregister, not readable", HypercallNumber.CallbackOp, efault, 1, Unmapped);
        yield return Case("callback_op 2", HypercallNumber.CallbackOp, enosys, 2, d);
        yield return Case("nmi_op, not readable", HypercallNumber.NmiOp, efault, 0, Unmapped);
        yield return Case("nmi_op, unregister", HypercallNumber.NmiOp, 0, 1);
        yield return Case("nmi_op 2", HypercallNumber.NmiOp, enosys, 2);
        yield return Case("fpu_taskswitch", HypercallNumber.FpuTaskswitch, 0, 1);
        yield return Case("get_debugreg 8", HypercallNumber.GetDebugreg, enodev, 8);
        yield return Case("set_debugreg 8", HypercallNumber.SetDebugreg, enodev, 8);
        yield return Case("set_debugreg 0 in Xen's part", HypercallNumber.SetDebugreg, eperm, 0, XensPart);
        yield return Case("set_segment_base, fs", HypercallNumber.SetSegmentBase, 0, 0, 0x1234);
        yield return Case("set_segment_base, not canonical", HypercallNumber.SetSegmentBase, einval, 1, NotCanonical);
        yield return Case("set_segment_base 4", HypercallNumber.SetSegmentBase, einval, 4, 0);

        foreach (int type in (int[])[0, 1, 2, 3, 4, 5, 32])
            yield return Case($"vm_assist {type}", HypercallNumber.VmAssist, 0, 0, (ulong)type);
        foreach (int type in (int[])[6, 31, 33, 63, 64, -1])
            yield return Case($"vm_assist {type}", HypercallNumber.VmAssist, einval, 0, (uint)type);
        yield return Case("vm_assist, command 2", HypercallNumber.VmAssist, enosys, 2, 0);
        yield return Case("vm_assist, command 2 of nothing", HypercallNumber.VmAssist, einval, 2, 9);

        yield return Case("sched_op yield", HypercallNumber.SchedOp, 0);
        yield return Case("sched_op shutdown, not readable", HypercallNumber.SchedOp, efault, 2, Unmapped);
        yield return Case("sched_op poll, not readable", HypercallNumber.SchedOp, efault, 3, Unmapped);
        yield return Case("sched_op remote_shutdown, not readable", HypercallNumber.SchedOp, efault, 4, Unmapped);
        yield return Case("sched_op remote_shutdown of domain 0", HypercallNumber.SchedOp, eperm, 4, d);
        yield return Case("sched_op shutdown_code, not readable", HypercallNumber.SchedOp, efault, 5, Unmapped);
        yield return Case("sched_op watchdog, not readable", HypercallNumber.SchedOp, efault, 6, Unmapped);
        yield return Case("sched_op pin_override", HypercallNumber.SchedOp, eperm, 7, Unmapped);
        yield return Case("sched_op 8", HypercallNumber.SchedOp, enosys, 8);
        yield return Case("sched_op_compat poll", HypercallNumber.SchedOpCompat, enosys, 3);
        yield return Case("set_timer_op", HypercallNumber.SetTimerOp, 0, 5);

        foreach (int command in (int[])[0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13])
            yield return Case($"vcpu_op {command} of a vCPU that is not there", HypercallNumber.VcpuOp, enoent, (ulong)command, 1, d);
        yield return Case("vcpu_op initialise", HypercallNumber.VcpuOp, -(long)Errno.EEXIST, 0, 0, d);
        yield return Case("vcpu_op initialise, not readable", HypercallNumber.VcpuOp, efault, 0, 0, Unmapped);
        yield return Case("vcpu_op up", HypercallNumber.VcpuOp, 0, 1, 0);
        yield return Case("vcpu_op is_up", HypercallNumber.VcpuOp, 1, 3, 0);
        yield return Case("vcpu_op get_runstate_info", HypercallNumber.VcpuOp, 0, 4, 0, d);
        yield return Case("vcpu_op get_runstate_info, not writable", HypercallNumber.VcpuOp, efault, 4, 0, Unmapped);
        yield return Case("vcpu_op register_runstate_memory_area, not readable", HypercallNumber.VcpuOp, efault, 5, 0, Unmapped);
        yield return Case("vcpu_op set_periodic_timer, too fast", HypercallNumber.VcpuOp, einval, 6, 0, d);
        yield return Case("vcpu_op set_periodic_timer, not readable", HypercallNumber.VcpuOp, efault, 6, 0, Unmapped);
        yield return Case("vcpu_op stop_periodic_timer", HypercallNumber.VcpuOp, 0, 7, 0);
        yield return Case("vcpu_op set_singleshot_timer", HypercallNumber.VcpuOp, 0, 8, 0, d);
        yield return Case("vcpu_op set_singleshot_timer, not readable", HypercallNumber.VcpuOp, efault, 8, 0, Unmapped);
        yield return Case("vcpu_op stop_singleshot_timer", HypercallNumber.VcpuOp, 0, 9, 0);
        yield return Case("vcpu_op register_vcpu_info, not readable", HypercallNumber.VcpuOp, efault, 10, 0, Unmapped);
        yield return Case("vcpu_op send_nmi", HypercallNumber.VcpuOp, 0, 11, 0);
        yield return Case("vcpu_op send_nmi with an argument", HypercallNumber.VcpuOp, einval, 11, 0, d);
        yield return Case("vcpu_op get_physid", HypercallNumber.VcpuOp, einval, 12, 0, d);
        yield return Case("vcpu_op register_vcpu_time_memory_area, not readable", HypercallNumber.VcpuOp, efault, 13, 0, Unmapped);
        yield return Case("vcpu_op 14", HypercallNumber.VcpuOp, enosys, 14, 0);

        yield return Case("xen_version", HypercallNumber.XenVersion, (4 << 16) | 17);
        foreach (int command in (int[])[1, 2, 3, 4, 5, 6, 8, 9])
            yield return Case($"xen_version {command}, not writable", HypercallNumber.XenVersion, efault, (ulong)command, Unmapped);
        yield return Case("xen_version pagesize", HypercallNumber.XenVersion, 4096, 7);
        yield return Case("xen_version pagesize with an argument", HypercallNumber.XenVersion, einval, 7, d);
        yield return Case("xen_version build_id", HypercallNumber.XenVersion, eperm, 10);
        yield return Case("xen_version 11", HypercallNumber.XenVersion, enosys, 11, d);

        yield return Case("console_io read", HypercallNumber.ConsoleIo, eperm, 1, 5, d);
        yield return Case("console_io 2", HypercallNumber.ConsoleIo, eperm, 2);
        yield return Case("console_io write, not readable", HypercallNumber.ConsoleIo, efault, 0, 5, Unmapped);
        yield return Case("console_io write of nothing", HypercallNumber.ConsoleIo, 0, 0, 0, Unmapped);

        yield return Case("physdev_op eoi", HypercallNumber.PhysdevOp, einval, 12, d);
        yield return Case("physdev_op eoi, not readable", HypercallNumber.PhysdevOp, efault, 12, Unmapped);
        yield return Case("physdev_op set_iopl, not readable", HypercallNumber.PhysdevOp, efault, 6, Unmapped);
        yield return Case("physdev_op set_iobitmap, none", HypercallNumber.PhysdevOp, 0, 7, d);
        foreach (int command in (int[])[8, 9, 10, 13, 14, 15, 16, 20, 21, 24, 25, 26, 29, 30, 31])
            yield return Case($"physdev_op {command}", HypercallNumber.PhysdevOp, eperm, (ulong)command, d);
        foreach (int command in (int[])[19, 27])
            yield return Case($"physdev_op {command} of a device that is not there", HypercallNumber.PhysdevOp, enodev, (ulong)command, d);
        foreach (int command in (int[])[8, 9, 10, 13, 14, 15, 16, 17, 19, 20, 21, 23, 25, 26, 27, 28, 30, 31])
            yield return Case($"physdev_op {command}, not readable", HypercallNumber.PhysdevOp, efault, (ulong)command, Unmapped);
        yield return Case("physdev_op 4", HypercallNumber.PhysdevOp, 0, 4, Unmapped);
        yield return Case("physdev_op 99", HypercallNumber.PhysdevOp, enosys, 99, d);
        yield return Case("physdev_op_compat, not readable", HypercallNumber.PhysdevOpCompat, efault, Unmapped);
        yield return Case("physdev_op_compat 0", HypercallNumber.PhysdevOpCompat, enosys, d);

        foreach (HypercallNumber number in (HypercallNumber[])[HypercallNumber.PlatformOp, HypercallNumber.Sysctl, HypercallNumber.Domctl])
        {
            yield return Case($"{number}, not readable", number, efault, Unmapped);
            yield return Case($"{number} of another version", number, -(long)Errno.EACCES, d);
        }

        yield return Case("hypfs_op", HypercallNumber.HypfsOp, eperm);
        yield return Case("xenpmu_op", HypercallNumber.XenpmuOp, -(long)Errno.EOPNOTSUPP);
        yield return Case("dm_op without buffers", HypercallNumber.DmOp, -(long)Errno.ENODATA, 0, 0, d);
        yield return Case("dm_op on the manager", HypercallNumber.DmOp, einval, 0, 1, d);
        yield return Case("hvm_op get_time, not writable", HypercallNumber.HvmOp, efault, 10, Unmapped);
        yield return Case("hvm_op 255", HypercallNumber.HvmOp, enosys, 255);

        yield return Case("multicall, empty", HypercallNumber.Multicall, 0, d);
        yield return Case("multicall, empty, in Xen's part", HypercallNumber.Multicall, efault, XensPart);
        yield return Case("multicall, not readable", HypercallNumber.Multicall, efault, Unmapped, 1);
    }

    [TestCaseSource(nameof(Answers))]
    public void Answers_as_Xen(HypercallNumber number, long result, ulong a0, ulong a1, ulong a2)
        => Assert.That(_domain.Call(number, a0, a1, a2), Is.EqualTo(result));

    [Test]
    public void Trap_table()
    {
        // vector, flags, cs, address: two entries, then the end, then one that must not be looked at.
        _domain.WriteAll(
            FakeDomain.Data,
            0x80 | (3 << 8) | (0xe030UL << 16), FakeDomain.Handler,
            14 | (4 << 8) | (0x10UL << 16), FakeDomain.Handler + 16,
            0, 0,
            13, FakeDomain.Handler);
        Assert.That(_domain.Call(HypercallNumber.SetTrapTable, FakeDomain.Data), Is.Zero);
        ref TrapInfo syscall = ref _domain.Context->State->Traps[0x80];
        Assert.That((syscall.Address, syscall.PrivilegeLevel, syscall.MasksEvents, syscall.Cs), Is.EqualTo((FakeDomain.Handler, 3, false, (ushort)0xe033)));
        ref TrapInfo pageFault = ref _domain.Context->State->Traps[14];
        Assert.That((pageFault.Address, pageFault.PrivilegeLevel, pageFault.MasksEvents), Is.EqualTo((FakeDomain.Handler + 16, 0, true)));
        Assert.That(_domain.Context->State->Traps[13].Address, Is.Zero);

        // A later table adds to it; one that ends badly has installed what came before.
        _domain.WriteAll(FakeDomain.Data, 3, FakeDomain.Handler, 4, NotCanonical);
        Assert.That(_domain.Call(HypercallNumber.SetTrapTable, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That((_domain.Context->State->Traps[3].Address, _domain.Context->State->Traps[14].Address), Is.EqualTo((FakeDomain.Handler, FakeDomain.Handler + 16)));

        Assert.That(_domain.Call(HypercallNumber.SetTrapTable), Is.Zero);
        for (int vector = 0; vector < 256; vector++)
            Assert.That(_domain.Context->State->Traps[vector].Address, Is.Zero);
    }

    [Test]
    public void A_trap_table_is_continued()
    {
        _domain.WriteAll(FakeDomain.Data, 3, FakeDomain.Handler, 4, FakeDomain.Handler, 0, 0);
        *_domain.Context->KickPending = 1;
        Assert.That(_domain.Call(HypercallNumber.SetTrapTable, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Context->Continuation.Pending, Is.EqualTo(1));
        Assert.That(_domain.Context->Continuation.Arguments.A0, Is.EqualTo(FakeDomain.Data + 16));
    }

    [TestCase((ushort)0, 0, nameof(VcpuState.EventCallback))]
    [TestCase((ushort)1, 0, nameof(VcpuState.FailsafeCallback))]
    [TestCase((ushort)2, 0, nameof(VcpuState.SyscallCallback))]
    [TestCase((ushort)5, 0, nameof(VcpuState.SysenterCallback))]
    [TestCase((ushort)7, 0, nameof(VcpuState.Syscall32Callback))]
    [TestCase((ushort)4, 0, "nmi")]
    [TestCase((ushort)3, Errno.ENOSYS, "")]
    [TestCase((ushort)6, Errno.ENOSYS, "")]
    [TestCase((ushort)8, Errno.ENOSYS, "")]
    public void Callbacks(ushort type, Errno error, string field)
    {
        _domain.WriteAll(FakeDomain.Data, type | (1UL << 16), FakeDomain.Handler);
        Assert.That(_domain.Call(HypercallNumber.CallbackOp, 0, FakeDomain.Data), Is.EqualTo(-(long)error));
        ulong Address() => field switch
        {
            nameof(VcpuState.EventCallback) => _domain.Context->State->EventCallback,
            nameof(VcpuState.FailsafeCallback) => _domain.Context->State->FailsafeCallback,
            nameof(VcpuState.SyscallCallback) => _domain.Context->State->SyscallCallback,
            nameof(VcpuState.SysenterCallback) => _domain.Context->State->SysenterCallback,
            nameof(VcpuState.Syscall32Callback) => _domain.Context->State->Syscall32Callback,
            _ => _domain.Context->State->Traps[2].Address,
        };
        if (error != Errno.None)
            return;
        Assert.That(Address(), Is.EqualTo(FakeDomain.Handler));
        CallbackFlags flags = _domain.Context->State->CallbackFlags;
        Assert.That(flags != CallbackFlags.None, Is.EqualTo(type is not 0 and not 4));
        _domain.WriteAll(FakeDomain.Data, type, FakeDomain.Handler + 8);
        Assert.That(_domain.Call(HypercallNumber.CallbackOp, 0, FakeDomain.Data), Is.Zero);
        Assert.That((Address(), _domain.Context->State->CallbackFlags), Is.EqualTo((FakeDomain.Handler + 8, CallbackFlags.None)));
        _domain.WriteAll(FakeDomain.Data, type, NotCanonical);
        Assert.That(_domain.Call(HypercallNumber.CallbackOp, 0, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(_domain.Call(HypercallNumber.CallbackOp, 1, FakeDomain.Data), Is.EqualTo(type == 4 ? 0 : -(long)Errno.EINVAL));
        Assert.That(Address(), Is.EqualTo(type == 4 ? 0 : FakeDomain.Handler + 8));
    }

    [Test]
    public void Stack_switch_and_segment_bases()
    {
        Assert.That(_domain.Call(HypercallNumber.StackSwitch, 0xe028, FakeDomain.Stack), Is.Zero);
        Assert.That((_domain.Context->State->KernelSs, _domain.Context->State->KernelSp), Is.EqualTo((0xe02bUL, FakeDomain.Stack)));
        Assert.That(_domain.Call(HypercallNumber.SetSegmentBase, 0, 0x11), Is.Zero);
        Assert.That(_domain.Call(HypercallNumber.SetSegmentBase, 1, 0x22), Is.Zero);
        Assert.That(_domain.Call(HypercallNumber.SetSegmentBase, 2, 0x33), Is.Zero);
        Assert.That(
            (_domain.Context->Segments->FsBase, _domain.Context->State->InactiveGsBase, _domain.Context->Segments->GsBase),
            Is.EqualTo((0x11UL, 0x22UL, 0x33UL)));

        // A selector of no descriptor becomes the null selector.
        Assert.That(_domain.Call(HypercallNumber.SetSegmentBase, 3, 0x123), Is.Zero);
        Assert.That((_domain.Context->Segments->Gs, _domain.Context->State->InactiveGsBase), Is.EqualTo(((ushort)0, 0UL)));
    }

    [TestCase(0UL, 0UL, false)]
    [TestCase(3UL, 0x3000UL, false)]
    [TestCase(3UL, 0x3000UL, true)]
    [TestCase(4UL, ulong.MaxValue, false)]
    [TestCase(4UL, ulong.MaxValue, true)]
    public void Iopl(ulong level, ulong iopl, bool compat)
    {
        _domain.WriteAll(FakeDomain.Data, 6, level);
        long result = compat
            ? _domain.Call(HypercallNumber.PhysdevOpCompat, FakeDomain.Data)
            : _domain.Call(HypercallNumber.PhysdevOp, 6, FakeDomain.Data + 8);
        Assert.That(result, Is.EqualTo(iopl == ulong.MaxValue ? -(long)Errno.EINVAL : 0));
        Assert.That(_domain.Context->State->Iopl, Is.EqualTo(iopl == ulong.MaxValue ? 0 : iopl));
    }

    [TestCase(FakeDomain.Data, 65536U, 0)]
    [TestCase(FakeDomain.Data, 65537U, Errno.EINVAL)]
    [TestCase(XensPart, 8U, Errno.EINVAL)]
    public void Io_bitmap(ulong bitmap, uint ports, Errno error)
    {
        _domain.WriteAll(FakeDomain.Data, bitmap, ports);
        Assert.That(_domain.Call(HypercallNumber.PhysdevOp, 7, FakeDomain.Data), Is.EqualTo(-(long)error));
        Assert.That(_domain.Context->State->IoBitmapPorts, Is.EqualTo(error == Errno.None ? ports : 0));
    }

    [Test]
    public void What_the_hypervisor_says_of_itself()
    {
        Assert.That(Text(1), Is.EqualTo(".xensharp"));
        Assert.That(Text(3), Does.StartWith("xen-3.0-x86_64"));
        Assert.That(Text(4), Is.EqualTo("unavailable"));
        Assert.That(Text(9), Is.EqualTo("<denied>"), "the command line is not for everyone");
        Assert.That(_domain.Call(HypercallNumber.XenVersion, 5, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Read<ulong>(FakeDomain.Data), Is.EqualTo(0xffff_8000_0000_0000));
        _domain.WriteAll(FakeDomain.Data, 1);
        Assert.That(_domain.Call(HypercallNumber.XenVersion, 6, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL), "feature map 1");
        _domain.WriteAll(FakeDomain.Data, 0);
        Assert.That(_domain.Call(HypercallNumber.XenVersion, 6, FakeDomain.Data), Is.Zero);
        uint features = _domain.Read<uint>(FakeDomain.Data + 4);
        Assert.That(features, Is.EqualTo((1U << 5) | (1U << 6) | (1U << 7) | (1U << 13) | (1U << 17)));
        Assert.That(_domain.Call(HypercallNumber.VmAssist, 0, 3), Is.Zero);
        _domain.WriteAll(FakeDomain.Data, 0);
        Assert.That(_domain.Call(HypercallNumber.XenVersion, 6, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Read<uint>(FakeDomain.Data + 4), Is.EqualTo(features | (1U << 4)));
    }

    [Test]
    public void Emergency_console()
    {
        var text = new StringBuilder();
        _domain.Domain.EmergencyOutput = bytes => text.Append(Encoding.ASCII.GetString(bytes));
        string written = new('x', 1000);
        Encoding.ASCII.GetBytes(written, new Span<byte>(_domain.Host(FakeDomain.Data), 1000));
        Assert.That(_domain.Call(HypercallNumber.ConsoleIo, 0, 1000, FakeDomain.Data), Is.Zero);
        Assert.That(text.ToString(), Is.EqualTo(written));

        // With a kick pending it still gets on, a piece at a time.
        _ = text.Clear();
        *_domain.Context->KickPending = 1;
        var arguments = new HypercallArguments { A0 = 0, A1 = 1000, A2 = FakeDomain.Data };
        for (int i = 0; i < 20 && arguments.A1 != 0; i++)
        {
            _ = HypercallDispatcher.Call(_domain.Vcpu, (ulong)HypercallNumber.ConsoleIo, arguments);
            if (_domain.Context->Continuation.Pending == 0)
                break;
            _domain.Context->Continuation.Pending = 0;
            arguments = _domain.Context->Continuation.Arguments;
        }

        Assert.That(text.ToString(), Is.EqualTo(written));
    }

    [TestCase(0x1000UL, 0, true)]
    [TestCase(0x1008UL, Errno.None, true)]
    [TestCase(0xfc0UL, Errno.None, true, Description = "the last that fits")]
    [TestCase(0xfc8UL, Errno.ENXIO, false, Description = "over the end")]
    [TestCase(0x1004UL, Errno.ENXIO, false, Description = "not aligned")]
    public void Register_vcpu_info(ulong offset, Errno error, bool moved)
    {
        offset &= 0xfff;
        _domain.Context->Info->Cr2 = 0x1234;
        var page = new Mfn(FakeMachine.FirstFrame + 8);
        _domain.WriteAll(FakeDomain.Data, page.Value, offset);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 10, 0, FakeDomain.Data), Is.EqualTo(-(long)error));
        Assert.That((nint)_domain.Context->Info == (nint)(_domain.Machine.Memory.Page(page) + offset), Is.EqualTo(moved));
        if (!moved)
            return;
        Assert.That(_domain.Context->Info->Cr2, Is.EqualTo(0x1234));
        Assert.That(_domain.Context->Info->EvtchnPendingSel, Is.EqualTo(ulong.MaxValue), "everything is looked at once more");
        Assert.That(_domain.Context->Info->EvtchnUpcallPending, Is.EqualTo(1));
        Assert.That(_domain.Context->Info->Time.Version & 1, Is.Zero);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 10, 0, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL), "only once");
    }

    [Test]
    public void Vcpu_info_cannot_lie_in_a_page_table()
    {
        _domain.WriteAll(FakeDomain.Data, _domain.Domain.Layout.PageTableRoot.Value, 0);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 10, 0, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL));
        _domain.WriteAll(FakeDomain.Data, 0x77, 0);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 10, 0, FakeDomain.Data), Is.EqualTo(-(long)Errno.EINVAL));
    }

    [Test]
    public void Areas_in_Xens_part_are_refused([Values(5UL, 13UL)] ulong command)
    {
        _domain.WriteAll(FakeDomain.Data, XensPart);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, command, 0, FakeDomain.Data), Is.EqualTo(-(long)Errno.EFAULT));
        _domain.WriteAll(FakeDomain.Data, FakeDomain.Data + 0x100);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, command, 0, FakeDomain.Data), Is.Zero);
        _domain.WriteAll(FakeDomain.Data, 0);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, command, 0, FakeDomain.Data), Is.Zero, "none any more");
    }

    [Test]
    public void Second_copy_of_the_clock()
    {
        _domain.WriteAll(FakeDomain.Data, FakeDomain.Data + 0x100);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 13, 0, FakeDomain.Data), Is.Zero);
        var copy = _domain.Read<VcpuTimeInfo>(FakeDomain.Data + 0x100);
        VcpuTimeInfo first = _domain.Context->Info->Time;
        Assert.That((copy.Version, copy.TscTimestamp, copy.SystemTime, copy.TscToSystemMul, copy.TscShift), Is.EqualTo(
            (first.Version, first.TscTimestamp, first.SystemTime, first.TscToSystemMul, first.TscShift)));

        // Also in user mode, whose tables do not map the kernel.
        _domain.Context->State->KernelMode = 0;
        _domain.Context->State->UserRoot = 0;
        _domain.Vcpu.UpdateClock(_domain.Vcpu, _domain.Domain.Time.SystemTime);
        Assert.That(_domain.Context->State->KernelMode, Is.Zero);
        Assert.That(_domain.Read<VcpuTimeInfo>(FakeDomain.Data + 0x100).Version, Is.EqualTo(_domain.Context->Info->Time.Version));
        Assert.That(_domain.Context->Info->Time.Version, Is.GreaterThan(first.Version));
    }

    [Test]
    public void Runstate_times_add_up()
    {
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 4, 0, FakeDomain.Data), Is.Zero);
        var info = _domain.Read<VcpuRunstateInfo>(FakeDomain.Data);
        Assert.That((info.State, info.StateEntryTime), Is.EqualTo((3, 0UL)), "offline since the beginning");
        _domain.Vcpu.Runstate.Change(RunstateKind.Running);
        _domain.Vcpu.Runstate.Change(RunstateKind.Blocked);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 4, 0, FakeDomain.Data), Is.Zero);
        info = _domain.Read<VcpuRunstateInfo>(FakeDomain.Data);
        ulong now = (ulong)_domain.Domain.Time.SystemTime;
        Assert.That(info.State, Is.EqualTo(2));
        ulong all = info.Time[0] + info.Time[1] + info.Time[2] + info.Time[3];
        Assert.That(all, Is.GreaterThanOrEqualTo(info.StateEntryTime));
        Assert.That(all, Is.LessThanOrEqualTo(now));
        Assert.That(info.Time[2], Is.EqualTo(all - info.StateEntryTime), "the entry time stays what it was");
    }

    [Test]
    public void Runstate_area_is_kept([Values] bool flag)
    {
        if (flag)
            Assert.That(_domain.Call(HypercallNumber.VmAssist, 0, 5), Is.Zero);
        _domain.WriteAll(FakeDomain.Data, FakeDomain.Data + 0x100);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 5, 0, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Read<VcpuRunstateInfo>(FakeDomain.Data + 0x100).State, Is.EqualTo(3));
        _domain.Vcpu.Runstate.Change(RunstateKind.Blocked);
        var info = _domain.Read<VcpuRunstateInfo>(FakeDomain.Data + 0x100);
        Assert.That(info.State, Is.EqualTo(2));
        Assert.That(info.StateEntryTime >> 63, Is.Zero, "not being updated any more");
        Assert.That(info.Time[0] + info.Time[3], Is.EqualTo(info.StateEntryTime));
    }

    [Test]
    public void Watchdogs()
    {
        long Watchdog(uint id, uint timeout)
        {
            _domain.WriteAll(FakeDomain.Data, id | ((ulong)timeout << 32));
            return _domain.Call(HypercallNumber.SchedOp, 6, FakeDomain.Data);
        }

        Assert.That(Watchdog(3, 10), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(Watchdog(1, 10), Is.EqualTo(-(long)Errno.EINVAL), "not taken yet");
        Assert.That(Watchdog(0, 1000), Is.EqualTo(1));
        Assert.That(Watchdog(0, uint.MaxValue), Is.EqualTo(2), "136 years");
        Assert.That(Watchdog(0, 10), Is.EqualTo(0xffff_ffe4L), "-ENOSPC in 32 bits, as Xen has it");
        Assert.That(Watchdog(2, 5_000_000), Is.Zero);
        Assert.That(Watchdog(2, 0), Is.Zero);
        Assert.That(Watchdog(2, 10), Is.EqualTo(-(long)Errno.EINVAL), "given back");
        Assert.That(Watchdog(0, 1000), Is.EqualTo(2));
    }

    [TestCase((ushort)7, Errno.EPERM)]
    [TestCase((ushort)0, Errno.EPERM)]
    [TestCase((ushort)9, Errno.ESRCH)]
    [TestCase((ushort)0x7ff0, Errno.ESRCH)]
    public void Remote_shutdown(ushort domain, Errno error)
    {
        _domain.WriteAll(FakeDomain.Data, domain);
        Assert.That(_domain.Call(HypercallNumber.SchedOp, 4, FakeDomain.Data), Is.EqualTo(-(long)error));
    }

    [Test]
    public void Periods_of_timers()
    {
        foreach ((ulong period, Errno error) in ((ulong, Errno)[])[
            (999_999, Errno.EINVAL), (1_000_000, 0), (ulong.MaxValue >> 2, 0), ((ulong.MaxValue >> 2) + 1, Errno.EINVAL)])
        {
            _domain.WriteAll(FakeDomain.Data, period);
            Assert.That(_domain.Call(HypercallNumber.VcpuOp, 6, 0, FakeDomain.Data), Is.EqualTo(-(long)error), $"{period}");
        }
    }

    [Test]
    public void Set_timer_op()
    {
        long now = _domain.Domain.Time.SystemTime;
        (ulong Deadline, long Low, long High)[] cases =
        [
            (0, long.MaxValue, long.MaxValue), (5, 5, 5), (unchecked((ulong)-5L), now + 100_000_000, now + 10_000_000_000),
            (1UL << 60, now + 100_000_000, now + 10_000_000_000), ((ulong)now + (1UL << 49), now + (1L << 49), now + (1L << 49)),
        ];
        foreach ((ulong deadline, long low, long high) in cases)
        {
            Assert.That(_domain.Call(HypercallNumber.SetTimerOp, deadline), Is.Zero);
            Assert.That(_domain.Vcpu.Timers.Singleshot, Is.InRange(low, high), $"{deadline:x}");
        }
    }

    [Test]
    public void Singleshot_timer_takes_any_time()
    {
        _domain.WriteAll(FakeDomain.Data, ulong.MaxValue, 1);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 8, 0, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Vcpu.Timers.Singleshot, Is.EqualTo(long.MaxValue));
        _domain.WriteAll(FakeDomain.Data, 3, 1);
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 8, 0, FakeDomain.Data), Is.Zero);
        Assert.That(_domain.Vcpu.Timers.Next, Is.EqualTo(3));
        Assert.That(_domain.Call(HypercallNumber.VcpuOp, 9), Is.Zero);
        Assert.That(_domain.Vcpu.Timers.Next, Is.EqualTo(long.MaxValue));
    }

    private string Text(ulong command)
    {
        new Span<byte>(_domain.Host(FakeDomain.Data), 2048).Fill(0xee);
        Assert.That(_domain.Call(HypercallNumber.XenVersion, command, FakeDomain.Data), Is.Zero);
        var bytes = new ReadOnlySpan<byte>(_domain.Host(FakeDomain.Data), 2048);
        int end = bytes.IndexOf((byte)0);
        return Encoding.ASCII.GetString(bytes[..end]);
    }
}
