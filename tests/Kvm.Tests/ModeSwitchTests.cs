// System calls and iret to user mode that the SYSCALL entry serves inside the VM, and what user mode, the kernel or a kick can make of them.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

/// <summary>A guest whose kernel and whose user mode have tables of their own, with the same code in both.</summary>
public sealed unsafe class ModeSwitchTests : EntryTest
{
    private const ushort UserCode = KvmVirtualCpu.HostUserCode;
    private const ushort UserData = KvmVirtualCpu.HostUserData;
    private const ulong UserAddress = ScratchGuest.CodeAddress + 0x1000;
    private const ulong Callback = ScratchGuest.CodeAddress + 0x2000;
    private const ulong Frame = ScratchGuest.StackTop - 0x200;
    private const ulong UserStack = ScratchGuest.StackTop - 0x408;
    private const ulong KernelStack = ScratchGuest.StackTop - 0x7f8;
    private const ulong KernelGs = 0xffff_8880_1234_5000;
    private const ulong UserGs = 0x7f12_3456_7000;
    private const ulong CallbackLength = 11;
    private const int BounceFrame = 7 * sizeof(ulong);

    private Mfn _kernelRoot;
    private Mfn _userRoot;

    private CpuRegisters* Registers => Guest.Vcpu.Registers;

    [SetUp]
    public void MakeModes()
    {
        (_kernelRoot, _userRoot) = (Vcpu.PageTableRoot, MakeUserRoot());
        InstallUserSegments();
        *Vcpu.EntryService = new EntryService
        {
            Iret = 1, ModeSwitch = 1, KernelRoot = _kernelRoot.Value, UserRoot = _userRoot.Value, SyscallCallback = Callback, NextLook = 1,
        };
        *Vcpu.EntryReport = new EntryReport { KernelSs = FlatSelectors.Ring3Data, KernelSp = KernelStack };
    }

    [Test]
    public void ASystemCallComesToItsCallback()
    {
        EnterUser(code => code.syscall());
        *Registers = new CpuRegisters
        {
            Rax = 1, Rbx = 2, Rcx = 3, Rdx = 4, Rsi = 5, Rdi = 6, Rbp = 7, R8 = 8, R9 = 9, R10 = 10, R11 = 11, R12 = 12, R13 = 13, R14 = 14, R15 = 15,
            Rsp = UserStack, Rip = UserAddress, Rflags = (ulong)(Always | Rflags.Direction | Rflags.Carry),
        };
        CpuRegisters before = *Registers;
        AssertSyscall(RunWatched(Guest));
        AssertInCallback(UserAddress + 2, UserStack, Rflags.Direction | Rflags.Carry);
        CpuRegisters after = *Registers;
        Assert.That(after.Rax, Is.EqualTo(1), "kept for the callback");
        (before.Rcx, before.R11, before.Rsp, before.Rip, before.Rflags) = (after.Rcx, after.R11, after.Rsp, after.Rip, after.Rflags);
        Assert.That(after, Is.EqualTo(before));
        Assert.That((Rflags)after.R11 & (Rflags.Direction | Rflags.Trap | Rflags.NestedTask | Rflags.AlignmentCheck), Is.EqualTo(default(Rflags)));
        AssertBases(KernelGs, UserGs);
    }

    [Test]
    public void IretComesToUserMode()
    {
        Mask = 1;
        EnterKernel(
            code =>
            {
                code.rdgsbase(r15);
                code.mov(r14d, cs);
                code.hlt();
            },
            Rflags.InterruptEnable | Rflags.Carry | Rflags.Direction);
        VcpuExit exit = RunWatched(Guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        Assert.That((Registers->Rip - UserAddress, Registers->Rsp), Is.EqualTo((8UL, UserStack)));
        Assert.That((Registers->Rax, Registers->Rcx, Registers->R11), Is.EqualTo((0x5a5aUL, 0xc1c1UL, 0x1b1bUL)));
        Assert.That((Rflags)Registers->Rflags & ~(Rflags.Resume | Rflags.InterruptEnable), Is.EqualTo(Rflags.Fixed | Rflags.Carry | Rflags.Direction));
        Assert.That((Registers->R14, Registers->R15), Is.EqualTo(((ulong)UserCode, UserGs)), "as user mode sees it");
        Assert.That((Vcpu.PageTableRoot, Mask), Is.EqualTo((_userRoot, (byte)0)));
        Assert.That((Vcpu.Segments->Cs, Vcpu.Segments->Ss), Is.EqualTo((UserCode, UserData)));
        AssertBases(UserGs, KernelGs);
    }

    /// <summary>Xen's own selectors need no table of the guest's; what SYSRET would go back with are they, whatever the frame says.</summary>
    [Test]
    public void IretComesToUserModeWithXensSelectors([Values] bool sysret)
    {
        SetDescriptor(UserCode, 0);
        EnterKernel(code => code.hlt(), Rflags.InterruptEnable | Rflags.Carry | Rflags.Iopl);
        ulong* frame = (ulong*)HostAddress(Guest, Frame);
        (frame[5], frame[8]) = (FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data);
        if (sysret)
        {
            InstallUserSegments();
            (frame[3], frame[5], frame[8]) = (0x100, UserCode, UserData);
        }

        VcpuExit exit = RunWatched(Guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        Assert.That((Registers->Rip, Registers->Rsp, Registers->Rax), Is.EqualTo((UserAddress, UserStack, 0x5a5aUL)));
        Assert.That(
            (Registers->Rcx, Registers->R11), Is.EqualTo(sysret ? (UserAddress, (ulong)(Always | Rflags.Carry)) : (0xc1c1UL, 0x1b1bUL)));
        Assert.That(
            (Vcpu.PageTableRoot, Vcpu.Segments->Cs, Vcpu.Segments->Ss), Is.EqualTo((_userRoot, FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data)));
    }

    /// <summary>To user mode and back, many times, without the manager.</summary>
    [Test]
    public void ThereAndBack()
    {
        const ulong rounds = 1000;
        LoadRoundTrip(rounds);
        AssertSyscall(RunWatched(Guest));
        Assert.That(Registers->R15, Is.EqualTo(rounds), "system calls");
        Assert.That((Vcpu.PageTableRoot, Registers->Rsp), Is.EqualTo((_kernelRoot, (KernelStack & ~0xfUL) - BounceFrame)));
        AssertBases(KernelGs, UserGs);
    }

    /// <summary>After an exit of any kind the vCPU is known to be in the mode that it is in, with that mode's selectors.</summary>
    [Test]
    public void AFaultInEitherModeIsThatModes([Values] bool inKernel)
    {
        LoadRoundTrip(3);
        Patch(inKernel ? Callback : UserAddress, 0xf4); // hlt
        VcpuExit exit = RunWatched(Guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        Assert.That(Registers->Rip, Is.EqualTo(inKernel ? Callback : UserAddress));
        Assert.That(Vcpu.PageTableRoot, Is.EqualTo(inKernel ? _kernelRoot : _userRoot));
        Assert.That(
            (Vcpu.Segments->Cs, Vcpu.Segments->Ss),
            Is.EqualTo(inKernel ? (FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data) : (UserCode, UserData)));
        AssertBases(inKernel ? KernelGs : UserGs, inKernel ? UserGs : KernelGs);
    }

    [Test]
    public void AUsersDivisionByZeroIsItsOwn()
    {
        EnterUser(code =>
        {
            code.xor(ecx, ecx);
            code.div(ecx);
        });
        VcpuExit exit = RunWatched(Guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.DivideError)), exit.Failure);
        Assert.That((Registers->Rip, Vcpu.PageTableRoot), Is.EqualTo((UserAddress + 2, _userRoot)));
    }

    /// <summary>A system call that the entry is not to take, or cannot, is user mode's, whole.</summary>
    [TestCase("not served")]
    [TestCase("events masked")]
    [TestCase("single step")]
    [TestCase("no kernel stack")]
    [TestCase("kernel stack of the monitor's")]
    [TestCase("kernel stack not canonical")]
    [TestCase("kernel GS not canonical")]
    public void ASystemCallThatIsLeft(string why)
    {
        EnterUser(code => code.syscall());
        Registers->Rax = 0x1234;
        Mask = 0;
        switch (why)
        {
            case "not served":
                Vcpu.EntryService->ModeSwitch = 0;
                break;
            case "events masked":
                Mask = 1;
                break;
            case "single step":
                Registers->Rflags |= (ulong)Rflags.Trap;
                break;
            case "no kernel stack":
                Vcpu.EntryReport->KernelSp = 0;
                break;
            case "kernel stack of the monitor's":
                Vcpu.EntryReport->KernelSp = MonitorLayout.VcpuWindowsStart + (2 * Paging.PageSize);
                break;
            case "kernel stack not canonical":
                Vcpu.EntryReport->KernelSp = 0x8000_0000_0000;
                break;
            default:
                Vcpu.EntryReport->InactiveGsBase = 0x8000_0000_0000;
                break;
        }

        byte mask = Mask;
        ulong inactive = Vcpu.EntryReport->InactiveGsBase;
        CpuRegisters before = *Registers;
        AssertSyscall(RunWatched(Guest));
        AssertUnchanged(before);
        Assert.That((Vcpu.PageTableRoot, Mask), Is.EqualTo((_userRoot, mask)));
        AssertBases(UserGs, inactive);
    }

    [TestCase("not served")]
    [TestCase("upcall pending")]
    [TestCase("events stay masked")]
    [TestCase("RIP not canonical")]
    [TestCase("SS of code")]
    [TestCase("SS of the other pair")]
    [TestCase("single step")]
    [TestCase("nested task")]
    [TestCase("Linux's selectors are others")]
    [TestCase("32-bit code")]
    [TestCase("user GS not canonical")]
    public void AnIretThatIsLeft(string why)
    {
        EnterKernel(code => code.nop(), Rflags.InterruptEnable);
        ulong* frame = (ulong*)HostAddress(Guest, Frame);
        switch (why)
        {
            case "not served":
                Vcpu.EntryService->ModeSwitch = 0;
                break;
            case "upcall pending":
                Pending = 1;
                break;
            case "events stay masked":
                frame[6] = (ulong)Rflags.Fixed;
                break;
            case "RIP not canonical":
                frame[4] = 0x8000_0000_0000;
                break;
            case "SS of code":
                frame[8] = UserCode;
                break;
            case "single step":
                frame[6] |= (ulong)Rflags.Trap;
                break;
            case "nested task":
                frame[6] |= (ulong)Rflags.NestedTask;
                break;
            case "SS of the other pair":
                frame[8] = FlatSelectors.Ring3Data;
                break;
            case "Linux's selectors are others":
                SetDescriptor(UserCode, 0);
                break;
            case "32-bit code":
                frame[5] = FlatSelectors.Ring3Cs32;
                break;
            default:
                Vcpu.EntryReport->InactiveGsBase = 0x8000_0000_0000;
                break;
        }

        ulong inactive = Vcpu.EntryReport->InactiveGsBase;
        CpuRegisters before = *Registers;
        AssertSyscall(RunWatched(Guest));
        AssertUnchanged(before);
        Assert.That(Vcpu.PageTableRoot, Is.EqualTo(_kernelRoot));
        AssertBases(KernelGs, inactive);
    }

    /// <summary>
    /// An interruption before any instruction on the way: the call has not begun, or its switch is made.
    /// </summary>
    [Test]
    public void AnInterruptionAnywhereIsBeforeOrAfter([Values] bool iret)
    {
        const byte undefinedInstruction = 0x06;
        SyscallEntry entry = Vcpu.Entry;
        int before = 0;
        int after = 0;
        foreach (ulong address in EntryCode.InstructionsOf(entry))
        {
            if (iret)
                EnterKernel(code => code.hlt(), Rflags.InterruptEnable);
            else
                EnterUser(code => code.syscall());
            Mask = iret ? (byte)1 : (byte)0;
            Registers->Rax = iret ? (ulong)HypercallNumber.Iret : 0x7777;
            Registers->Rbx = 0x1b;
            CpuRegisters start = *Registers;
            ref byte code = ref entry.Code[(int)(address - entry.Of32BitCode)];
            byte kept = code;
            code = undefinedInstruction;
            Vcpu.SetWakeTimer(Libc.MonotonicNow() + 10_000_000_000);
            VcpuExit exit = Vcpu.Run();
            Vcpu.SetWakeTimer(long.MaxValue);
            code = kept;
            Assert.That(Registers->Rbx, Is.EqualTo(0x1b), $"{address:x}");
            if (exit.Kind == VcpuExitKind.Syscall && (iret || Registers->Rip == start.Rip + 2))
            {
                before++;
                AssertUnchanged(start);
                Assert.That(Vcpu.PageTableRoot, Is.EqualTo(iret ? _kernelRoot : _userRoot));
                AssertBases(iret ? KernelGs : UserGs, iret ? UserGs : KernelGs);
                continue;
            }

            // Where it has come to, or behind that.
            bool isOnTheWay = exit.Kind == VcpuExitKind.Kicked;
            after += isOnTheWay ? 1 : 0;
            AssertBases(iret ? UserGs : KernelGs, iret ? KernelGs : UserGs);
            Assert.That(Vcpu.PageTableRoot, Is.EqualTo(iret ? _userRoot : _kernelRoot));
            if (iret)
                Assert.That((Registers->Rip, Registers->Rsp, Registers->Rax, Mask), Is.EqualTo((UserAddress, UserStack, 0x5a5aUL, (byte)0)));
            else if (isOnTheWay)
                Assert.That((Registers->Rip, Registers->Rax), Is.EqualTo((Callback, 0x7777UL)));
            else
                AssertInCallback(UserAddress + 2, UserStack, default);
        }

        Assert.That((before, after), iret ? Is.EqualTo((before, 1)) : Is.EqualTo((before, 2)));
        Assert.That(before, Is.GreaterThanOrEqualTo(30), "Those of the way were met.");
    }

    /// <summary>The way out of kernel mode, and into it, at the instructions of the other mode's page and of the gate.</summary>
    [Test]
    public void KicksAtAnyMoment()
    {
        LoadRoundTrip(ulong.MaxValue);
        using Background kicker = KickAtRandom(5);
        ulong calls = 0;
        int left = 0;
        while (!kicker.IsDone)
        {
            Vcpu.SetWakeTimer(Libc.MonotonicNow() + 100_000_000);
            VcpuExit exit = Vcpu.Run();
            bool inUserMode = Vcpu.PageTableRoot == _userRoot;
            Assert.That(Vcpu.PageTableRoot, Is.EqualTo(inUserMode ? _userRoot : _kernelRoot));
            AssertBases(inUserMode ? UserGs : KernelGs, inUserMode ? KernelGs : UserGs);
            Assert.That(Registers->R15, Is.GreaterThanOrEqualTo(calls));
            calls = Registers->R15;
            if (exit.Kind == VcpuExitKind.Kicked)
                continue;
            AssertSyscall(exit);
            left++;
            ServeAsManager(inUserMode);
        }

        Assert.That(calls, Is.GreaterThan(1000));
        TestContext.Out.WriteLine($"{calls} rounds, {left} system calls and irets left to the manager");
    }

    /// <summary>Wherever in the page user mode jumps to: it gets to the callback as a system call does, or nowhere.</summary>
    [Test]
    public void JumpsOfUserModeAnywhereIntoThePage()
    {
        for (ulong offset = 0; offset < Paging.PageSize; offset += offset < 0x420 ? 1UL : 0x3fUL)
        {
            foreach (ulong value in (ulong[])[0, UserStack, ulong.MaxValue])
            {
                Mask = 0;
                Vcpu.EntryReport->KernelSp = KernelStack;
                EnterUser(code => code.jmp(r8));
                CpuRegisters* registers = Registers;
                *registers = new CpuRegisters
                {
                    Rax = value, Rbx = value, Rcx = value, Rdx = value, Rsi = value, Rdi = value, R11 = value, Rsp = UserStack, Rip = registers->Rip,
                    Rflags = registers->Rflags, R8 = Vcpu.Entry.Of32BitCode + offset,
                };
                Vcpu.SetWakeTimer(Libc.MonotonicNow() + 20_000_000);
                VcpuExit exit = Vcpu.Run();
                Vcpu.SetWakeTimer(long.MaxValue);
                Assert.That(exit.Kind, Is.Not.EqualTo(VcpuExitKind.Failed), () => $"offset {offset:x}: {exit.Failure}");
                Assert.That(Vcpu.Registers->Rflags & (ulong)(Rflags.Iopl | Rflags.Virtual8086), Is.Zero);
                if (Vcpu.PageTableRoot == _userRoot)
                    continue;
                Assert.That(Registers->Rip, Is.EqualTo(Callback + CallbackLength), $"offset {offset:x}: kernel mode begins at the callback");
                AssertInCallback(value, UserStack, (Rflags)value & (Rflags)KvmVirtualCpu.UserFlags);
                AssertBases(KernelGs, UserGs);
            }
        }
    }

    /// <summary>User mode sees nothing of what the kernel shares with the entries, its own vCPU's or another's, and cannot change what it sees.</summary>
    [Test]
    public void UserModeReachesNothingOfTheKernels()
    {
        _ = Guest.Machine.CreateKvmVcpu(1);
        for (ulong page = 0; page < 2 * (ulong)VcpuWindowPage.Count; page++)
        {
            ulong address = MonitorLayout.VcpuWindowsStart + (page << Paging.PageShift);
            bool isReadable = page % (ulong)VcpuWindowPage.Count == (ulong)VcpuWindowPage.Entry;
            EnterUser(code =>
            {
                code.mov(rax, __qword_ptr[r8]);
                code.mov(__qword_ptr[r8], rax);
            });
            Registers->R8 = address;
            VcpuExit exit = RunWatched(Guest);
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), $"{page}: {exit.Failure}");
            Assert.That(Registers->Rip, Is.EqualTo(UserAddress + (isReadable ? 3UL : 0)), $"{page}");
        }
    }

    /// <summary>What the kernel may spoil for itself is no more than that.</summary>
    [Test]
    public void AKernelThatSpoilsItsReportIsOnItsOwn()
    {
        var random = new Random(7);
        ulong[] values = [0, 1, KernelStack, 0x7fff_ffff_ffff, 0x8000_0000_0000, 0xffff_7fff_ffff_ffff, MonitorLayout.MonitorStart, ulong.MaxValue];
        for (int i = 0; i < 300; i++)
        {
            bool iret = random.Next(2) != 0;
            if (iret)
                EnterKernel(code => code.hlt(), Rflags.InterruptEnable);
            else
                EnterUser(code => code.syscall());
            Mask = iret ? (byte)1 : (byte)0;
            ulong* report = (ulong*)Vcpu.EntryReport;
            for (int word = 0; word < 64; word++)
                report[word] = values[random.Next(values.Length)];
            Vcpu.SetWakeTimer(Libc.MonotonicNow() + 20_000_000);
            VcpuExit exit = Vcpu.Run();
            Vcpu.SetWakeTimer(long.MaxValue);
            Assert.That(exit.Kind, Is.Not.EqualTo(VcpuExitKind.Failed), () => $"{exit.Failure}");
            Assert.That(Vcpu.PageTableRoot, Is.EqualTo(_userRoot).Or.EqualTo(_kernelRoot));
        }
    }

    /// <summary>Another vCPU of the guest's may write while the entry runs: what is loaded for it is never what the host's processor refuses.</summary>
    [Test]
    public void ABaseThatIsNotCanonicalIsNotLoaded()
    {
        int taken = 0;
        for (ulong address = Vcpu.Entry.Of64BitCode; address < Vcpu.Entry.End; address++)
        {
            var registers = new CpuRegisters { Rip = address, Rax = 0x8000_0000_0000 };
            ulong gsBase = UserGs;
            Vcpu.EntryReport->InactiveGsBase = 0x8000_0000_0000;
            _ = Vcpu.Entry.TakeOver(&registers, ref gsBase, switchesModes: true, inUserMode: false);
            Assert.That(new VirtualAddress(gsBase).IsCanonical, $"{address:x}");
            taken += gsBase == 0 ? 1 : 0;
        }

        Assert.That(taken, Is.GreaterThan(1));
    }

    /// <summary>Linux's flat segments of user mode in the guest's table.</summary>
    private void InstallUserSegments()
    {
        Mfn table = _kernelRoot + 65;
        const PageFlags flags = PageFlags.Present | PageFlags.Accessed | PageFlags.NoExecute;
        *(PageTableEntry*)Vcpu.DescriptorWindow.Entries = new PageTableEntry(table, flags);
        SetDescriptor(UserCode, 0x00af_fb00_0000_ffff);
        SetDescriptor(UserData, 0x00cf_f300_0000_ffff);
    }

    private void SetDescriptor(ushort selector, ulong descriptor)
        => ((ulong*)Guest.Machine.Memory.Page(_kernelRoot + 65))[selector >> 3] = descriptor;

    /// <summary>Kernel code that makes an iret to user mode, user code, and a callback that shows that it was reached.</summary>
    private void EnterKernel(Action<Assembler> user, Rflags flags)
    {
        Load(code => code.syscall(), user, EmitCallback);
        Vcpu.PageTableRoot = _kernelRoot;
        ReadOnlySpan<ulong> frame = [0x5a5a, 0x1b1b, 0xc1c1, 0, UserAddress, UserCode, (ulong)flags, UserStack, UserData];
        frame.CopyTo(new Span<ulong>((ulong*)HostAddress(Guest, Frame), frame.Length));
        Registers->Rsp = Frame;
        Registers->Rax = (ulong)HypercallNumber.Iret;
        Vcpu.Segments->GsBase = KernelGs;
        Vcpu.EntryReport->InactiveGsBase = UserGs;
    }

    private void EnterUser(Action<Assembler> user)
    {
        Load(code => code.syscall(), user, EmitCallback);
        Registers->Rip = UserAddress;
        Registers->Rsp = UserStack;
        Vcpu.Segments->Cs = UserCode;
        Vcpu.Segments->Ss = UserData;
        Vcpu.Segments->GsBase = UserGs;
        Vcpu.EntryReport->InactiveGsBase = KernelGs;
        Vcpu.PageTableRoot = _userRoot;
    }

    /// <summary><see cref="CallbackLength"/> bytes: a hypercall that is not served, with the system call's number in R9.</summary>
    private static void EmitCallback(Assembler code)
    {
        code.mov(r9d, (int)HypercallNumber.XenVersion);
        code.xchg(rax, r9);
        code.syscall();
    }

    private void Load(Action<Assembler> kernel, Action<Assembler> user, Action<Assembler> callback)
    {
        Guest.Load(kernel);
        Place(UserAddress, user);
        Place(Callback, callback);
    }

    private void Place(ulong address, Action<Assembler> write)
    {
        var code = new Assembler(64);
        write(code);
        byte[] bytes = MonitorCode.Emit(code, address, out _);
        for (int i = 0; i < bytes.Length; i++)
            Patch(address + (ulong)i, bytes[i]);
    }

    private void Patch(ulong address, byte value) => HostAddress(Guest, address)[0] = value;

    /// <summary>Kernel mode goes to user mode, that makes a system call, and that goes back, until it was made often enough: in R15.</summary>
    private void LoadRoundTrip(ulong rounds)
    {
        EnterKernel(
            code =>
            {
                code.mov(eax, 39);
                code.syscall();
            },
            Rflags.InterruptEnable);
        Place(Callback, code =>
        {
            Label enough = code.CreateLabel();
            code.inc(r15);
            code.cmp(r15, r14);
            code.je(enough);
            code.mov(rsp, Frame);
            code.mov(eax, (int)HypercallNumber.Iret);
            code.syscall();
            code.Label(ref enough);
            code.mov(eax, (int)HypercallNumber.XenVersion);
            code.syscall();
        });
        Registers->R14 = rounds;
        Registers->R15 = 0;
        Mask = 1;
    }

    /// <summary>What the manager does with a system call or iret of the round trip that was left to it.</summary>
    private void ServeAsManager(bool inUserMode)
    {
        Vcpu.PageTableRoot = inUserMode ? _kernelRoot : _userRoot;
        (Vcpu.Segments->GsBase, Vcpu.EntryReport->InactiveGsBase) = (Vcpu.EntryReport->InactiveGsBase, Vcpu.Segments->GsBase);
        if (inUserMode)
        {
            Assert.That((Registers->Rax, Registers->Rsp, Registers->Rip), Is.EqualTo((39UL, UserStack, UserAddress + 7)));
            Registers->Rip = Callback;
            Registers->Rsp = (KernelStack & ~0xfUL) - BounceFrame;
            Mask = 1;
            return;
        }

        Assert.That((Registers->Rax, Registers->Rsp), Is.EqualTo(((ulong)HypercallNumber.Iret, Frame)));
        Registers->Rip = UserAddress;
        Registers->Rsp = UserStack;

        // R11, which SYSCALL had the flags in, may be the frame's already.
        Registers->Rflags = (ulong)Always;
        (Vcpu.Segments->Cs, Vcpu.Segments->Ss) = (UserCode, UserData);
        Mask = 0;
    }

    /// <summary>The hypercall of the callback was reached, and found the bounce frame of a system call.</summary>
    private void AssertInCallback(ulong rip, ulong stack, Rflags flags)
    {
        ulong frame = (KernelStack & ~0xfUL) - BounceFrame;
        Assert.That((Vcpu.PageTableRoot, Registers->Rsp, Mask), Is.EqualTo((_kernelRoot, frame, (byte)1)));
        (Registers->Rax, Registers->R9) = (Registers->R9, 9);
        ulong* found = (ulong*)HostAddress(Guest, frame);
        Assert.That((found[0], found[2]), Is.EqualTo((rip, rip)), "RCX and RIP");
        Assert.That((Rflags)found[4] & ~Rflags.Resume, Is.EqualTo((flags & ~Rflags.Resume) | Always));
        Assert.That((found[3], found[5], found[6]), Is.EqualTo(((ulong)FlatSelectors.Ring3Cs64, stack, (ulong)FlatSelectors.Ring3Data)));
        Assert.That((Vcpu.Segments->Cs, Vcpu.Segments->Ss), Is.EqualTo((FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data)));
    }

    private void AssertBases(ulong loaded, ulong inactive)
        => Assert.That((Vcpu.Segments->GsBase, Vcpu.EntryReport->InactiveGsBase), Is.EqualTo((loaded, inactive)));

    /// <summary>Behind the SYSCALL, with all that it does not take for itself.</summary>
    private void AssertUnchanged(CpuRegisters before)
    {
        CpuRegisters found = *Registers;
        before.Rip += 2;
        (before.Rcx, before.R11, before.Rflags, found.Rflags) = (found.Rcx, found.R11, 0, 0);
        if (before.Rax == (ulong)HypercallNumber.Iret)
            found.Rip = before.Rip;
        Assert.That(found, Is.EqualTo(before));
    }
}
