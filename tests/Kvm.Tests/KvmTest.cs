// What every test that needs the host's KVM starts from.
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Kvm.Tests;

/// <summary>Opens the device and probes it once for all tests; without the device every test says so and is skipped.</summary>
[Category("Kvm")]
[NonParallelizable]
public abstract unsafe class KvmTest
{
    private const string Device = "/dev/kvm";
    private const long WatchdogNanoseconds = 60_000_000_000;

    private static readonly Lazy<KvmSystem> OpenedSystem = new(() => KvmSystem.Open(Device));
    private static readonly Lazy<HostCapabilities> ProbedCapabilities = new(() => HostProbe.Run(OpenedSystem.Value));

    internal static KvmSystem Host => OpenedSystem.Value;

    internal static HostCapabilities Capabilities => ProbedCapabilities.Value;

    [OneTimeSetUp]
    public void RequireKvm()
    {
        if (!File.Exists(Device))
            Assert.Ignore($"{Device} is missing: this machine offers no KVM, so nothing of a virtual machine can be tested here.");
    }

    internal static ScratchGuest NewGuest() => new(Host, Capabilities);

    /// <summary>Runs what is loaded; a guest that never comes back fails the test instead of hanging it.</summary>
    internal static VcpuExit RunWatched(ScratchGuest guest)
    {
        guest.Vcpu.SetWakeTimer(Libc.MonotonicNow() + WatchdogNanoseconds);
        VcpuExit exit = guest.Vcpu.Run();
        guest.Vcpu.SetWakeTimer(long.MaxValue);
        Assert.That(
            exit.Kind == VcpuExitKind.Kicked && *guest.Vcpu.KickPending == 0,
            Is.False,
            () => $"The guest was interrupted instead of coming back by itself; RIP {guest.Vcpu.Registers->Rip:x}.");
        return exit;
    }

    /// <summary>Loads code whose first instruction is the one of interest, changes the registers, and runs it.</summary>
    internal static VcpuExit RunCode(ScratchGuest guest, Action<Assembler> code, RegisterChange? change = null)
    {
        guest.Load(code);
        change?.Invoke(ref *guest.Vcpu.Registers);
        return RunWatched(guest);
    }

    internal static void AssertSyscall(VcpuExit exit)
        => Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Syscall), () => $"{exit.Vector}, error code {exit.ErrorCode:x}: {exit.Failure}");

    /// <summary>Host view of a guest address, by a walk of the tables as they are in memory.</summary>
    internal static byte* HostAddress(ScratchGuest guest, ulong address)
    {
        Mfn frame = guest.Vcpu.PageTableRoot;
        for (int level = 4; level > 0; level--)
            frame = guest.Machine.Memory.Table(frame)[new VirtualAddress(address).TableIndex(level)].Frame;
        return guest.Machine.Memory.Page(frame) + new VirtualAddress(address).Offset;
    }

    internal delegate void RegisterChange(ref CpuRegisters registers);
}
