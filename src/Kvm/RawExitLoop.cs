using System.Diagnostics;
using Iced.Intel;
using Tmds.Linux;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>
/// The floor of everything that leaves the VM: a loop of nothing but <c>out</c> at CPL 3, and nothing but KVM_RUN in the host,
/// without register synchronisation. Benchmarks are ratios to this, taken in the same run.
/// </summary>
public sealed unsafe class RawExitLoop : IDisposable
{
    private readonly ScratchGuest _guest;

    public RawExitLoop(KvmSystem system, HostCapabilities capabilities)
    {
        // The one port that is open at CPL 3 is so only where the SYSCALL entry runs there.
        _guest = new ScratchGuest(system, capabilities with { SyscallEntryLevel = 3 });
        _guest.Load(static code =>
        {
            Label loop = code.CreateLabel();
            code.Label(ref loop);
            code.@out(MonitorLayout.SyscallPort, al);
            code.jmp(loop);
        });
        _ = _guest.Vcpu.Run();
        _guest.Vcpu.SharedPage->ValidRegs = KvmSyncRegs.None;
        _guest.Vcpu.SharedPage->DirtyRegs = KvmSyncRegs.None;
    }

    /// <summary>Nanoseconds of one exit and entry, the mean of a number of them.</summary>
    /// <exception cref="KvmException">KVM_RUN failed.</exception>
    public double Measure(int exits)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(exits);
        long start = Stopwatch.GetTimestamp();
        for (int i = 0; i < exits; i++)
            EnterOnce();
        return Stopwatch.GetElapsedTime(start).TotalNanoseconds / exits;
    }

    /// <summary>One entry and exit.</summary>
    internal void EnterOnce()
    {
        while (LibC.ioctl(_guest.Vcpu.File, KvmRequest.Run, (void*)null) != 0)
        {
            if (LibC.errno != LibC.EINTR)
                throw new KvmException("KVM_RUN failed in the benchmark's loop", LibC.errno);

            // The timer's signal of a sleep that something else had ended already.
            sigset_t set = Libc.KickSet();
            timespec none = default;
            _ = LibC.sigtimedwait(&set, null, &none);
        }
    }

    /// <summary>Sleeps as a vCPU does that waits for its timer; on the thread that made the loop.</summary>
    /// <param name="deadline">CLOCK_MONOTONIC nanoseconds.</param>
    internal void Sleep(long deadline) => _guest.Vcpu.WaitForKick(deadline);

    public void Dispose() => _guest.Dispose();
}
