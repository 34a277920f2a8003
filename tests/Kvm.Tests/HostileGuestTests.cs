// Guests that reach for the monitor, for memory that is not there, or break the machine: each has a defined end.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class HostileGuestTests : KvmTest
{
    private const ulong SlotSize = 1UL << 39;
    private const PageFlags Writable = PageField.Writable;

    private ScratchGuest _guest = null!;

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    /// <summary>The first pages of every reserved slot, and the places where the monitor's pieces really are.</summary>
    private IEnumerable<ulong> ReservedAddresses()
    {
        for (ulong slot = 0; slot < Paging.HypervisorSlots; slot++)
        {
            ulong start = Paging.HypervisorVirtualStart + (slot * SlotSize);
            for (ulong page = 0; page < 12; page++)
                yield return start + (page << Paging.PageShift);
            yield return start + SlotSize - 8;
        }

        yield return _guest.Machine.Code.ExceptionStubs;
        yield return _guest.Machine.Code.RestoreAndIret;
        yield return _guest.Machine.Code.LoadRoot;
        yield return _guest.Machine.InterruptTable;
        yield return _guest.Vcpu.InterruptTable;
        yield return MonitorLayout.DescriptorTablesStart + (MonitorLayout.ReservedGdtPage << Paging.PageShift);
        yield return MonitorLayout.DirectMap(new MachineAddress(MonitorLayout.RegionAddress));
        yield return MonitorLayout.DirectMap(_guest.FirstDataFrame.Address);
    }

    private bool IsMachineToPhys(ulong address)
        => address - _guest.Machine.MachineToPhysStart.Value < (_guest.Machine.Memory.EndFrame.Value * sizeof(ulong));

    private bool IsSyscallEntry(ulong address)
        => Capabilities.SyscallEntryLevel == 3 && (address & ~Paging.PageOffsetMask) == _guest.Vcpu.Entry.Of32BitCode;

    /// <summary>What kernel mode alone may reach, and it does.</summary>
    private bool IsKernelWindow(ulong address)
        => _guest.Machine.KernelSlot != 0 && !IsSyscallEntry(address) && address - MonitorLayout.VcpuWindowsStart < MonitorLayout.VcpuWindowSize;

    [Test]
    public void ReservedSlotsCannotBeRead()
    {
        foreach (ulong address in ReservedAddresses()
            .Where(address => !IsMachineToPhys(address) && !IsSyscallEntry(address) && !IsKernelWindow(address)))
            AssertRefused(code => code.mov(rax, __qword_ptr[rcx]), address, PageFaultError.None, ScratchGuest.CodeAddress);
    }

    [Test]
    public void ReservedSlotsCannotBeWritten()
    {
        foreach (ulong address in ReservedAddresses().Where(address => !IsKernelWindow(address)))
            AssertRefused(code => code.mov(__qword_ptr[rcx], rax), address, PageFaultError.Write, ScratchGuest.CodeAddress);
    }

    [Test]
    public void ReservedSlotsCannotBeRun()
    {
        foreach (ulong address in ReservedAddresses().Where(address => !IsSyscallEntry(address)))
            AssertRefused(code => code.jmp(rcx), address, PageFaultError.InstructionFetch, address);
    }

    [Test]
    public void MachineToPhysIsReadable()
    {
        ulong* table = _guest.Machine.MachineToPhys;
        table[5] = 0x1234;
        ulong first = _guest.Machine.Memory.FirstFrame.Value;
        AssertSyscall(RunCode(
            _guest,
            code =>
            {
                code.mov(rax, __qword_ptr[rcx]);
                code.mov(rbx, __qword_ptr[rdx]);
                code.syscall();
            },
            (ref CpuRegisters registers) =>
            {
                registers.Rcx = _guest.Machine.MachineToPhysStart.Value + ((first + 5) * sizeof(ulong));
                registers.Rdx = _guest.Machine.MachineToPhysStart.Value + ((first - 1) * sizeof(ulong));
            }));
        Assert.That(_guest.Vcpu.Registers->Rax, Is.EqualTo(0x1234));
        Assert.That(_guest.Vcpu.Registers->Rbx, Is.EqualTo(Mfn.Invalid.Value), "a frame below the domain's RAM");
    }

    private static IEnumerable<TestCaseData> Holes()
    {
        foreach (ulong address in (ulong[])[0, 0x8000_0000, MonitorLayout.RamAddress - 0x1000, MonitorLayout.RamAddress + (1024 << Paging.PageShift), 0xf_ffff_f000])
        {
            foreach (string use in (string[])["read", "write", "fetch"])
                yield return new TestCaseData(address, use).SetArgDisplayNames($"{address:x}", use);
        }
    }

    /// <summary>A frame that the machine does not have: no processor would know what to do, and the report says where it was.</summary>
    [TestCaseSource(nameof(Holes))]
    public void MemoryThatIsNotThere(ulong address, string use)
    {
        *_guest.DataEntry = new PageTableEntry(new MachineAddress(address).Frame, Writable);
        VcpuExit exit = RunCode(
            _guest,
            code =>
            {
                switch (use)
                {
                    case "read":
                        code.mov(rax, __qword_ptr[rcx]);
                        break;
                    case "write":
                        code.mov(__qword_ptr[rcx], rax);
                        break;
                    default:
                        code.jmp(rcx);
                        break;
                }

                code.syscall();
            },
            (ref CpuRegisters registers) => registers.Rcx = ScratchGuest.DataAddress);
        if (use == "fetch" && exit.Kind == VcpuExitKind.Exception)
        {
            // KVM may also say that nothing can be run there by an exception of the guest's.
            Assert.That(exit.Vector, Is.EqualTo(ExceptionVector.InvalidOpcode).Or.EqualTo(ExceptionVector.PageFault));
            return;
        }

        Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Failed), $"{exit.Vector}");
        Assert.That(exit.Failure, Does.EndWith("."));
        if (use != "fetch")
            Assert.That(exit.Failure, Does.Contain($"{address:x}"));
    }

    /// <summary>An exception with no usable interrupt table is a triple fault, and the end of this VM only.</summary>
    [Test]
    public void TripleFault()
    {
        new Span<byte>(MonitorPage(_guest.Vcpu.InterruptTable), (int)Paging.PageSize).Clear();
        VcpuExit exit = RunCode(_guest, code => code.ud2());
        Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Failed), $"{exit.Vector}");
        Assert.That(exit.Failure, Does.Contain("triple fault").Or.Contain("shut down").Or.Contain("emulate"));

        using ScratchGuest other = NewGuest();
        AssertSyscall(RunCode(other, code => code.syscall()));
    }

    /// <summary>A fault of the monitor's own is a failure with a sentence, never an exception of the guest's.</summary>
    [Test]
    public void FaultInsideTheMonitor()
    {
        // An entry to be repeated at an address that the direct map does not have.
        _guest.Vcpu.PageTableWrites->Repeat(new MachineAddress(0x70_0000_0000));
        VcpuExit exit = RunCode(_guest, code => code.syscall());
        Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Failed));
        Assert.That(exit.Failure, Does.StartWith("The monitor itself faulted: PageFault").And.EndWith("."));
    }

    [Test]
    public void NonCanonicalEntry([Values(0x8000_0000_0000_0000UL, 0x0000_8000_0000_0000UL, 0xffff_7fff_ffff_ffffUL)] ulong rip, [Values] bool throughTheMonitor)
    {
        if (throughTheMonitor)
            _guest.Vcpu.PageTableWrites->Flush();
        VcpuExit exit = RunCode(_guest, code => code.syscall(), (ref CpuRegisters registers) => registers.Rip = rip);
        Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Exception).Or.EqualTo(VcpuExitKind.Failed));
        if (exit.Kind == VcpuExitKind.Exception)
            Assert.That((exit.Vector, _guest.Vcpu.Registers->Rip), Is.EqualTo((ExceptionVector.GeneralProtection, rip)));
        else
            Assert.That(exit.Failure, Does.EndWith("."));
    }

    /// <summary>A root that is no page table at all, and one outside memory.</summary>
    [Test]
    public void BrokenRoot()
    {
        Mfn good = _guest.Vcpu.PageTableRoot;
        foreach (Mfn bad in (ReadOnlySpan<Mfn>)[_guest.FirstDataFrame, _guest.Machine.Memory.EndFrame, new(0x80000), new(0xf_ffff_ffff)])
        {
            using ScratchGuest guest = NewGuest();
            guest.Vcpu.PageTableRoot = bad;
            VcpuExit exit = RunCode(guest, code => code.syscall());
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Failed), $"{bad}: {exit.Vector}");
            Assert.That(exit.Failure, Does.EndWith("."));
        }

        _guest.Vcpu.PageTableRoot = good;
        AssertSyscall(RunCode(_guest, code => code.syscall()));
    }

    /// <summary>Host view of a page of the monitor, by a walk of the tables behind the reserved slots.</summary>
    private byte* MonitorPage(ulong address)
    {
        byte* region = (byte*)_guest.Vcpu.DescriptorWindow.Entries - (_guest.Vcpu.DescriptorWindow.Address.Value - MonitorLayout.RegionAddress);
        var virtualAddress = new VirtualAddress(address);
        ulong entry = _guest.Machine.HypervisorSlots[virtualAddress.TableIndex(4) - Paging.FirstHypervisorSlot];
        for (int level = 3; level > 0; level--)
            entry = *(ulong*)(Region(entry) + (virtualAddress.TableIndex(level) * sizeof(ulong)));
        return Region(entry);

        byte* Region(ulong of) => region + ((of & PageTableEntry.FrameMask) - MonitorLayout.RegionAddress);
    }

    private void AssertRefused(Action<Assembler> use, ulong address, PageFaultError kind, ulong rip)
    {
        VcpuExit exit = RunCode(
            _guest,
            code =>
            {
                use(code);
                code.syscall();
            },
            (ref CpuRegisters registers) => registers.Rcx = address);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), $"{address:x}: {exit.Failure}");
        Assert.That(_guest.Vcpu.FaultAddress.Value, Is.EqualTo(address));
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(rip));
        const PageFaultError asked = PageFaultError.Write | PageFaultError.InstructionFetch | PageFaultError.User;
        Assert.That((PageFaultError)exit.ErrorCode & asked, Is.EqualTo(kind | PageFaultError.User), $"{address:x}");
    }
}
