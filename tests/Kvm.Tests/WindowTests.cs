// Frames of one VM that another sees through its window, and what a VM knows of frames that others store to.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class WindowTests : KvmTest
{
    private const ulong WindowFrames = 512;
    private const PageFlags UserPage = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;

    private ScratchGuest _owner = null!;
    private ScratchGuest _guest = null!;

    private Mfn Window => _guest.Machine.Window.FirstFrame + 7;

    private ulong* OwnersPage => (ulong*)_owner.Machine.Memory.Page(_owner.FirstDataFrame);

    [SetUp]
    public void MakeGuests()
    {
        _owner = NewGuest();
        _guest = new ScratchGuest(Host, Capabilities, windowFrames: WindowFrames);
        *_guest.DataEntry = new PageTableEntry(Window, UserPage);
    }

    [TearDown]
    public void DropGuests()
    {
        _guest?.Dispose();
        _owner?.Dispose();
    }

    [Test]
    public void AFrameOfAnotherMachineIsSharedThroughTheWindow()
    {
        Assert.That(_guest.Machine.TryShow(Window, _owner.Machine, _owner.FirstDataFrame, writable: true), Is.True);
        *OwnersPage = 0x1234;
        AssertSyscall(RunCode(_guest, static code =>
        {
            code.mov(rax, __qword_ptr[ScratchGuest.DataAddress]);
            code.mov(__qword_ptr[ScratchGuest.DataAddress + 8], rax);
            code.syscall();
        }));
        AssertSyscall(RunCode(_owner, static code =>
        {
            code.mov(rbx, __qword_ptr[ScratchGuest.DataAddress + 8]);
            code.mov(rax, 0x5678);
            code.mov(__qword_ptr[ScratchGuest.DataAddress], rax);
            code.syscall();
        }));
        Assert.That(_owner.Vcpu.Registers->Rbx, Is.EqualTo(0x1234));
        Assert.That(*(ulong*)_guest.Machine.Window.Page(Window), Is.EqualTo(0x5678));

        // The page stays when the VM that it came from goes.
        _owner.Dispose();
        AssertSyscall(RunCode(_guest, static code =>
        {
            code.mov(rbx, __qword_ptr[ScratchGuest.DataAddress]);
            code.syscall();
        }));
        Assert.That(_guest.Vcpu.Registers->Rbx, Is.EqualTo(0x5678));
    }

    [Test]
    public void MemoryThatIsHeldStaysInPlace()
    {
        *OwnersPage = 0x1234;
        ulong* page = OwnersPage;
        IDisposable hold = _owner.Machine.HoldMemory();
        _owner.Dispose();
        Assert.That(*page, Is.EqualTo(0x1234));
        hold.Dispose();
        hold.Dispose();
    }

    [Test]
    public void WhatIsHiddenOrProtectedIsOutOfReachWhateverTheProcessorRemembers()
    {
        Assert.That(_guest.Machine.TryShow(Window, _owner.Machine, _owner.FirstDataFrame, writable: true), Is.True);
        AssertSyscall(RunCode(_guest, Store));

        // The entry is changed behind KVM's back: only what the host does to the page can make the processor look at it.
        *_guest.DataEntry = new PageTableEntry(Window, UserPage & ~PageFlags.Writable);
        Assert.That(_guest.Machine.TryProtect(Window), Is.True);
        AssertFault(RunCode(_guest, Store), isPresent: true);
        *_guest.DataEntry = default;
        _guest.Machine.Hide(Window);
        AssertFault(RunCode(_guest, Store), isPresent: false);
        Assert.That(*OwnersPage, Is.EqualTo(1));

        // With an entry that still names it, the VM cannot go on: nobody lets that happen.
        *_guest.DataEntry = new PageTableEntry(Window, UserPage);
        VcpuExit exit = default;
        _guest.Load(Store);
        for (int i = 0; i < 100 && exit.Kind != VcpuExitKind.Failed; i++)
            exit = _guest.Vcpu.Run();
        Assert.That(exit.Failure, Does.Contain("could not provide"));
    }

    /// <summary>A page is taken away while the other processor reads it without end: that one gets a page fault each time, and nothing else.</summary>
    [Test]
    public void APageIsTakenFromAProcessorThatUsesIt()
    {
        using KvmVirtualCpu second = _guest.Machine.CreateKvmVcpu(1);
        second.PageTableRoot = _guest.Vcpu.PageTableRoot;
        _guest.Load(static code =>
        {
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.inc(__qword_ptr[ScratchGuest.DataAddress]);
            code.jmp(again);
        });
        *second.Registers = *_guest.Vcpu.Registers;
        *second.Segments = *_guest.Vcpu.Segments;
        string? unexpected = null;
        int faults = 0;
        *_guest.DataEntry = default;
        using (new Background(stop =>
        {
            while (!stop.IsCancellationRequested && unexpected == null)
            {
                VcpuExit exit = second.Run();
                if (exit.Kind == VcpuExitKind.Exception && exit.Vector == ExceptionVector.PageFault)
                    _ = Interlocked.Increment(ref faults);
                else if (exit.Kind != VcpuExitKind.Kicked)
                    unexpected = $"{exit.Kind} {exit.Vector}: {exit.Failure}";
            }
        }))
        {
            for (int i = 0; i < 300 && unexpected == null; i++)
            {
                Assert.That(_guest.Machine.TryShow(Window, _owner.Machine, _owner.FirstDataFrame, writable: true), Is.True);
                ulong before = Volatile.Read(ref *OwnersPage);
                Volatile.Write(ref *(ulong*)_guest.DataEntry, new PageTableEntry(Window, UserPage).Value);
                Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref *OwnersPage) != before || unexpected != null, 60_000), Is.True);
                int seen = Volatile.Read(ref faults);
                Volatile.Write(ref *(ulong*)_guest.DataEntry, 0);
                _guest.Machine.Hide(Window);
                Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref faults) != seen || unexpected != null, 60_000), Is.True);
            }

            second.Kick();
        }

        Assert.That(unexpected, Is.Null);
    }

    [Test]
    public void WhatTheHostStoresIntoATableIsSeenOnceTheTablesAreForgotten()
    {
        *_owner.DataEntry = new PageTableEntry(_owner.FirstDataFrame, UserPage);
        *OwnersPage = 1;
        *(ulong*)_owner.Machine.Memory.Page(_owner.SecondDataFrame) = 2;
        AssertSyscall(RunCode(_owner, Load));
        Assert.That(_owner.Vcpu.Registers->Rbx, Is.EqualTo(1));
        *_owner.DataEntry = new PageTableEntry(_owner.SecondDataFrame, UserPage);
        _owner.Machine.ForgetTables();
        AssertSyscall(RunCode(_owner, Load));
        Assert.That(_owner.Vcpu.Registers->Rbx, Is.EqualTo(2));
    }

    [Test]
    public void TheMachineToPhysTableHasRoomForTheWindow()
    {
        _guest.Machine.WindowToPhys[7] = 0x77;
        ulong start = _guest.Machine.MachineToPhysStart.Value;
        AssertSyscall(RunCode(_guest, code =>
        {
            code.mov(rax, start + (Window.Value * sizeof(ulong)));
            code.mov(rbx, __qword_ptr[rax]);
            code.mov(rcx, __qword_ptr[rax + 8]);
            code.mov(rdx, rcx);
            code.syscall();
        }));
        Assert.That((_guest.Vcpu.Registers->Rbx, _guest.Vcpu.Registers->Rdx), Is.EqualTo((0x77, ulong.MaxValue)));
    }

    private static void Store(Assembler code)
    {
        code.inc(__qword_ptr[ScratchGuest.DataAddress]);
        code.syscall();
    }

    private static void Load(Assembler code)
    {
        code.mov(rbx, __qword_ptr[ScratchGuest.DataAddress]);
        code.syscall();
    }

    private static void AssertFault(VcpuExit exit, bool isPresent)
        => Assert.That((exit.Kind, exit.Vector, exit.ErrorCode & 1), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault, isPresent ? 1u : 0u)), exit.Failure);
}
