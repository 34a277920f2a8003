// The self-test at start: one question to the host's KVM a method, each asked by running a few instructions in a VM.
using System.Runtime.InteropServices;
using Iced.Intel;
using Tmds.Linux;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>Finds out what kind of KVM this is.</summary>
public static unsafe class HostProbe
{
    private const uint MarkedLeaf = 0x8000_0004;
    private const uint Mark = 0x5853_7068;

    /// <summary>Runs all probes.</summary>
    /// <exception cref="KvmException">A VM cannot even be made or entered.</exception>
    public static HostCapabilities Run(KvmSystem system)
    {
        // The level comes first: everything else is asked in a VM whose SYSCALL entry is right.
        HostCapabilities assumed = HostCapabilities.Assumed with { SyscallEntryLevel = SyscallLevel(system) };
        if (!KeepsCompatibilitySyscall(system, assumed))
        {
            assumed = assumed with { CompatibilitySyscallAstray = true };
            if (!KeepsCompatibilitySyscall(system, assumed))
                throw new KvmException("On this host's KVM the SYSCALL of 32-bit code leaves the monitor's control; XenSharp cannot use it");
        }

        assumed = assumed with { InterpretsCompatibilityMode = InterpretsCompatibilityMode(system, assumed) };
        using var guest = new ScratchGuest(system, assumed, (MarkedLeaf, Mark));
        bool shadowed = !SeesHostStores(guest);
        bool atOnce = shadowed && SeesStores(system, assumed with { StoresNeedFlush = false });
        if (shadowed && !atOnce && !SeesStores(system, assumed))
            throw new KvmException("This host's KVM does not notice page-table entries that the monitor stores and flushes; XenSharp cannot use it");
        return assumed with
        {
            ShadowPageTables = shadowed,
            StoresNeedFlush = shadowed && !atOnce,
            Slot256Usable = ReachesSyscall(guest, code => code.mov(rax, __qword_ptr[MonitorLayout.ClassicMachineToPhys]), out _),
            SoftwareInterruptVector = ReachesSyscall(guest, code => code.@int(unchecked((sbyte)0x80)), out VcpuExit interrupt)
                ? throw new KvmException("int 0x80 at CPL 3 raised nothing in a VM that has no gate for it")
                : interrupt.Vector,
            CpuidPolicyApplies = CpuidShowsMark(guest),
            FlatSegmentLoads = LoadsData(guest, FlatSelectors.Ring3Data),
            HostDescriptorTable = LoadsData(guest, KvmVirtualCpu.HostUserData),
            TaskSwitchedTraps = TaskSwitchedTraps(guest),
            TimeStampDisableTraps = TimeStampDisableTraps(guest),
            DebugRegistersWork = DebugRegistersWork(guest),
            TimeStampCounter = MeasureTsc(guest),
            MaxVcpus = Math.Min(KvmVirtualMachine.MaxVcpus, system.CheckExtension(KvmCapability.MaxVcpus)),
        };
    }

    private static int SyscallLevel(KvmSystem system)
    {
        using var guest = new ScratchGuest(system, HostCapabilities.Assumed);
        VcpuExit exit = guest.Run(code => code.syscall());
        if (exit.Kind != VcpuExitKind.Syscall)
            throw new KvmException($"SYSCALL did not reach the monitor on this host ({exit.Kind}, {exit.Vector}; {exit.Failure})");
        return guest.Vcpu.SharedPage->Sregs.Ss.Dpl;
    }

    /// <summary>Whether SYSCALL in 32-bit code comes to its entry, or raises #UD as on Intel's processors.</summary>
    private static bool KeepsCompatibilitySyscall(KvmSystem system, HostCapabilities capabilities)
    {
        using var guest = new ScratchGuest(system, capabilities);
        VcpuExit exit = RunCompatible(guest, code => code.syscall());
        return exit.Kind switch
        {
            VcpuExitKind.Syscall => guest.Vcpu.Segments->Cs == FlatSelectors.Ring3Cs32,
            VcpuExitKind.Exception => exit.Vector == ExceptionVector.InvalidOpcode,
            _ => false,
        };
    }

    /// <summary>Whether 32-bit code lacks instructions that every processor with a 64-bit mode has.</summary>
    private static bool InterpretsCompatibilityMode(KvmSystem system, HostCapabilities capabilities)
    {
        using var guest = new ScratchGuest(system, capabilities);
        _ = RunCompatible(guest, code =>
        {
            code.paddd(xmm0, xmm0);
            code.ud2();
        });
        return guest.Vcpu.Registers->Rip == ScratchGuest.CodeAddress;
    }

    /// <summary>Runs instructions that have the same bytes in 32-bit code.</summary>
    private static VcpuExit RunCompatible(ScratchGuest guest, Action<Assembler> write)
    {
        guest.Load(write);
        guest.Vcpu.Segments->Cs = FlatSelectors.Ring3Cs32;
        return guest.Vcpu.Run();
    }

    /// <summary>Whether a data selector can be loaded that no table of the guest's has.</summary>
    private static bool LoadsData(ScratchGuest guest, ushort selector) => ReachesSyscall(
        guest,
        code =>
        {
            code.mov(eax, selector);
            code.mov(ds, eax);
        },
        out _);

    /// <summary>Runs code that is followed by SYSCALL.</summary>
    private static bool ReachesSyscall(ScratchGuest guest, Action<Assembler> write, out VcpuExit exit)
    {
        exit = guest.Run(code =>
        {
            write(code);
            code.syscall();
        });
        if (exit.Kind == VcpuExitKind.Failed)
            throw new KvmException($"A probe of this host's KVM failed: {exit.Failure}");
        return exit.Kind == VcpuExitKind.Syscall;
    }

    /// <summary>Changes a translation in memory, drops the cached one in the guest, and looks which page is read.</summary>
    private static bool SeesHostStores(ScratchGuest guest)
    {
        *(ulong*)guest.Machine.Memory.Page(guest.FirstDataFrame) = 1;
        *(ulong*)guest.Machine.Memory.Page(guest.SecondDataFrame) = 2;
        ulong before = ReadData(guest);
        PageTableEntry entry = *guest.DataEntry;
        *guest.DataEntry = new PageTableEntry(guest.SecondDataFrame, entry.Flags);
        guest.Vcpu.PageTableWrites->Flush();
        ulong after = ReadData(guest);
        return before == 1 && after == 2;
    }

    /// <summary>Has a translation changed from inside a VM with these capabilities, and looks which page is read.</summary>
    private static bool SeesStores(KvmSystem system, HostCapabilities capabilities)
    {
        using var guest = new ScratchGuest(system, capabilities);
        *(ulong*)guest.Machine.Memory.Page(guest.FirstDataFrame) = 1;
        *(ulong*)guest.Machine.Memory.Page(guest.SecondDataFrame) = 2;
        Mfn first = guest.FirstDataFrame;
        Mfn second = guest.SecondDataFrame;

        // Twice: it is from the first store on that a KVM may stop looking.
        ulong before = ReadData(guest);
        guest.Vcpu.PageTableWrites->Store(guest.DataEntry, guest.DataEntryAddress, new PageTableEntry(second, guest.DataEntry->Flags));
        ulong after = ReadData(guest);
        guest.Vcpu.PageTableWrites->Store(guest.DataEntry, guest.DataEntryAddress, new PageTableEntry(first, guest.DataEntry->Flags));
        return before == 1 && after == 2 && ReadData(guest) == 1;
    }

    private static ulong ReadData(ScratchGuest guest)
    {
        if (!ReachesSyscall(guest, code => code.mov(rax, __qword_ptr[ScratchGuest.DataAddress]), out VcpuExit exit))
            throw new KvmException($"A probe could not read its own data page ({exit.Vector}, error code {exit.ErrorCode:x})");
        return guest.Vcpu.Registers->Rax;
    }

    private static bool CpuidShowsMark(ScratchGuest guest)
    {
        bool reached = ReachesSyscall(
            guest,
            code =>
            {
                code.mov(eax, MarkedLeaf);
                code.cpuid();
            },
            out _);
        return reached && (uint)guest.Vcpu.Registers->Rax == Mark;
    }

    private static bool TaskSwitchedTraps(ScratchGuest guest)
    {
        guest.Vcpu.SetTaskSwitched(true);
        bool reached = ReachesSyscall(guest, code => code.movaps(xmm0, xmm0), out _);
        guest.Vcpu.SetTaskSwitched(false);
        return !reached;
    }

    private static bool TimeStampDisableTraps(ScratchGuest guest)
    {
        guest.Vcpu.SetTimeStampDisable(true);
        bool reached = ReachesSyscall(guest, code => code.rdtsc(), out _);
        guest.Vcpu.SetTimeStampDisable(false);
        return !reached;
    }

    private static bool DebugRegistersWork(ScratchGuest guest)
    {
        // DR6 and DR7 as after reset, and DR7 with breakpoint 0 on execution.
        const ulong status = 0xffff_0ff0;
        const ulong off = 0x400;
        const ulong on = off | 1;
        guest.Vcpu.SetDebugRegisters([ScratchGuest.CodeAddress + 1, 0, 0, 0, 0, 0, status, on]);
        bool reached = ReachesSyscall(
            guest,
            code =>
            {
                code.nop();
                code.nop();
            },
            out _);
        guest.Vcpu.SetDebugRegisters([0, 0, 0, 0, 0, 0, status, off]);
        return !reached;
    }

    private static TimeStampCounter MeasureTsc(ScratchGuest guest)
    {
        int kiloHertz = LibC.ioctl(guest.Vcpu.File, KvmRequest.GetTscKhz);
        if (kiloHertz <= 0)
            throw new KvmException("KVM_GET_TSC_KHZ failed: the frequency of the guest's time-stamp counter is unknown", LibC.errno);

        // The tightest of several brackets; a guest value inside the host's needs no offset.
        ulong best = ulong.MaxValue;
        long offset = 0;
        for (int i = 0; i < 16; i++)
        {
            ulong before = HostClock.TimeStampCounter;
            bool read = ReachesSyscall(guest, code => code.rdtsc(), out _);
            ulong after = HostClock.TimeStampCounter;
            if (!read)
                throw new KvmException("RDTSC at CPL 3 faults in a VM on this host; XenSharp needs it");
            ulong value = (guest.Vcpu.Registers->Rdx << 32) | (uint)guest.Vcpu.Registers->Rax;
            if (value >= before && value <= after)
                return new TimeStampCounter((uint)kiloHertz, 0);
            if (after - before < best)
            {
                best = after - before;
                offset = OffsetOfMsr(guest, (long)(value - before - (best / 2)));
            }
        }

        return new TimeStampCounter((uint)kiloHertz, offset);
    }

    /// <summary>The offset by KVM_GET_MSRS, which is read much closer to the host's own RDTSC than a guest can.</summary>
    private static long OffsetOfMsr(ScratchGuest guest, long fallback)
    {
        byte* buffer = stackalloc byte[8 + sizeof(KvmMsrEntry)];
        *(ulong*)buffer = 1;
        KvmMsrEntry* entry = (KvmMsrEntry*)(buffer + 8);
        *entry = new KvmMsrEntry { Index = Msr.TimeStampCounter };
        ulong before = HostClock.TimeStampCounter;
        int read = LibC.ioctl(guest.Vcpu.File, KvmRequest.GetMsrs, buffer);
        ulong after = HostClock.TimeStampCounter;
        return read == 1 ? (long)(entry->Data - before - ((after - before) / 2)) : fallback;
    }
}
