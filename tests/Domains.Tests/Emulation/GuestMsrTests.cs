using Iced.Intel;
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>RDMSR and WRMSR by number.</summary>
public sealed unsafe class GuestMsrTests
{
    private FakeGuest _intel = null!;
    private FakeGuest _amd = null!;

    [SetUp]
    public void CreateGuests()
    {
        _intel = new FakeGuest();
        _amd = new FakeGuest(new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options));
    }

    [TearDown]
    public void DisposeGuests()
    {
        _intel.Dispose();
        _amd.Dispose();
    }

    private static ulong? Read(FakeGuest guest, uint number) => guest.Emulator.Msrs.TryRead(number, out ulong value) ? value : null;

    // The value on Intel and on AMD; null for #GP.
    [TestCase(Msr.TimeStampCounter, 0x1234_5678_9abc_def0UL, 0x1234_5678_9abc_def0UL)]
    [TestCase(Msr.ApicBase, 0xfee0_0900UL, 0xfee0_0900UL)]
    [TestCase(Msr.Efer, 0xd01UL, 0xd01UL)]
    [TestCase(Msr.PageAttributeTable, 0x0501_0007_0406UL, 0x0501_0007_0406UL)]
    [TestCase(Msr.PlatformInfo, 0UL, 0UL)]
    [TestCase(Msr.MiscFeaturesEnables, 0UL, 0UL)]
    [TestCase(Msr.FeatureControl, 1UL, null)]
    [TestCase(Msr.PlatformId, 0UL, null)]
    [TestCase(Msr.MicrocodeRevision, 0xa20_1025_0000_0000UL, 0xa20_1025UL)]
    [TestCase(Msr.MiscEnable, 0x80_1801UL, null)]
    [TestCase(Msr.PerformanceStatus, 0UL, null)]
    [TestCase(Msr.ThermalStatus, 0UL, null)]
    [TestCase(Msr.PerformanceCounter0, 0UL, null)]
    [TestCase(Msr.EventSelect0, 0UL, null)]
    [TestCase(Msr.AmdEventSelect0, null, 0UL)]
    [TestCase(Msr.AmdCoreEventSelect0 + 11, null, 0UL)]
    [TestCase(Msr.AmdCoreEventSelect0 + 12, null, null)]
    [TestCase(Msr.AmdHardwareConfiguration, null, 0UL)]
    [TestCase(Msr.AmdDecodeConfiguration, null, 2UL)]
    [TestCase(Msr.AmdFidVidStatus, null, 0UL)]
    [TestCase(Msr.AmdPstate7, null, 0UL)]
    [TestCase(Msr.AmdNorthbridgeConfiguration, 0UL, 0UL)]
    [TestCase(Msr.MachineCheckCapability, 0x100_0c02UL, 2UL)]
    [TestCase(Msr.MachineCheckBank0, ulong.MaxValue, ulong.MaxValue)]
    [TestCase(Msr.MachineCheckBank0 + 1, 0UL, 0UL)]
    [TestCase(Msr.MachineCheckBank0 + 8, 0UL, 0UL)]
    [TestCase(Msr.Hypervisor, 0UL, 0UL)]
    [TestCase(Msr.Hypervisor + 1, null, null)]
    [TestCase(0xfeu, null, null, TestName = "MTRRcap")]
    [TestCase(0x48u, null, null, TestName = "SPEC_CTRL")]
    [TestCase(0x49u, null, null, TestName = "PRED_CMD")]
    [TestCase(0x10au, null, null, TestName = "ARCH_CAPABILITIES")]
    [TestCase(0x174u, null, null, TestName = "SYSENTER_CS")]
    [TestCase(0x802u, null, null, TestName = "x2APIC id")]
    [TestCase(0xda0u, null, null, TestName = "XSS")]
    [TestCase(0xc0000081u, null, null, TestName = "STAR")]
    [TestCase(0xc0000082u, null, null, TestName = "LSTAR")]
    [TestCase(0xc0000084u, null, null, TestName = "SFMASK")]
    [TestCase(0xc0010010u, null, null, TestName = "SYSCFG")]
    [TestCase(uint.MaxValue, null, null)]
    public void ReadsAnswerAsXen(uint number, ulong? intel, ulong? amd)
    {
        Assert.That(Read(_intel, number), Is.EqualTo(intel));
        Assert.That(Read(_amd, number), Is.EqualTo(amd));
    }

    [TestCase(Msr.Efer, 0xd01UL, true)]
    [TestCase(Msr.Efer, 0xd00UL, false)]
    [TestCase(Msr.Efer, 0x1d01UL, false)]
    [TestCase(Msr.ApicBase, 0xfee0_0900UL, false)]
    [TestCase(Msr.TimeStampCounter, 0UL, false)]
    [TestCase(Msr.PageAttributeTable, 0x0501_0007_0406UL, false)]
    [TestCase(Msr.PlatformInfo, 0UL, false)]
    [TestCase(Msr.MicrocodeRevision, 0UL, true)]
    [TestCase(Msr.MicrocodeRevision, 1UL, false)]
    [TestCase(Msr.MiscFeaturesEnables, 0UL, true)]
    [TestCase(Msr.MiscFeaturesEnables, 1UL, false)]
    [TestCase(Msr.TscAux, 1UL << 32, false)]
    [TestCase(Msr.FsBase, 0x8000_0000_0000UL, false)]
    [TestCase(Msr.GsBase, 0xffff_7fff_ffff_ffffUL, false)]
    [TestCase(Msr.KernelGsBase, 1UL << 63, false)]
    [TestCase(Msr.MachineCheckBank0, 0UL, true)]
    [TestCase(Msr.MachineCheckBank0 + 1, 0UL, true)]
    [TestCase(Msr.MachineCheckBank0 + 1, 1UL, false)]
    [TestCase(Msr.MachineCheckBank0 + 9, 1UL, true)]
    [TestCase(Msr.Hypervisor, 0x1003_001UL, false)]
    [TestCase(Msr.Hypervisor, 0x5000_0000UL, false)]
    [TestCase(0xc0000082u, 0xffff_ffff_8100_0000UL, false)]
    [TestCase(0x48u, 0UL, false)]
    [TestCase(0x49u, 1UL, false)]
    public void WritesAreAcceptedOrRefused(uint number, ulong value, bool accepted)
        => Assert.That(_intel.Emulator.Msrs.TryWrite(number, value), Is.EqualTo(accepted));

    [Test]
    public void BasesReachTheirPlaces()
    {
        GuestMsrs msrs = _amd.Emulator.Msrs;
        Assert.That(msrs.TryWrite(Msr.FsBase, 0x7fff_ffff_ffff), Is.True);
        Assert.That(msrs.TryWrite(Msr.GsBase, 0xffff_8880_0000_0000), Is.True);
        Assert.That(msrs.TryWrite(Msr.KernelGsBase, 0x1000), Is.True);
        Assert.That(_amd.Segments->FsBase, Is.EqualTo(0x7fff_ffff_ffff));
        Assert.That(_amd.Segments->GsBase, Is.EqualTo(0xffff_8880_0000_0000));
        Assert.That(_amd.State->InactiveGsBase, Is.EqualTo(0x1000));
        Assert.That(Read(_amd, Msr.FsBase), Is.EqualTo(0x7fff_ffff_ffff));
        Assert.That(Read(_amd, Msr.GsBase), Is.EqualTo(0xffff_8880_0000_0000));
        Assert.That(Read(_amd, Msr.KernelGsBase), Is.EqualTo(0x1000));
    }

    /// <summary>Where a kernel reads user mode's GS base is told, for hosts that can do without the manager there.</summary>
    [Test]
    public void ReadsOfUserModesGsBaseAreNoted()
    {
        _amd.Reset();
        _amd.Registers->Rcx = Msr.KernelGsBase;
        Assert.That(_amd.Execute(code => code.rdmsr()).Outcome, Is.EqualTo(EmulationOutcome.Done));
        _amd.Registers->Rcx = Msr.GsBase;
        Assert.That(_amd.Execute(code => code.rdmsr()).Outcome, Is.EqualTo(EmulationOutcome.Done));
        Assert.That(_amd.Calls, Is.EqualTo(new[] { $"gs base read at {FakeGuest.CodeStart:x}, 2 bytes" }));
    }

    [Test]
    public void TscAuxNeedsItsFeature()
    {
        Assert.That(_amd.Emulator.Msrs.TryWrite(Msr.TscAux, 5), Is.True);
        Assert.That(Read(_amd, Msr.TscAux), Is.EqualTo(5));
        Assert.That(_amd.Calls, Is.EqualTo(new[] { "AUX 5" }));
        using var without = new FakeGuest(
            new CpuidPolicy(HostProcessor.Everything(HostProcessor.Amd), HostProcessor.Options with { TscAuxUsable = false }));
        Assert.That(without.Emulator.Msrs.TryWrite(Msr.TscAux, 5), Is.False);
        Assert.That(Read(without, Msr.TscAux), Is.Null);
        Assert.That(without.Calls, Is.Empty);
    }

    [Test]
    public void HypercallPageIsInstalled()
    {
        Assert.That(_intel.Emulator.Msrs.TryWrite(Msr.Hypervisor, 0x100_3000), Is.True);
        Assert.That(_intel.Calls, Is.EqualTo(new[] { "PAGE 1003" }));
    }

    [Test]
    public void OnlyTheFirstVcpuIsTheBootProcessor()
    {
        _intel.State->Id = 3;
        Assert.That(Read(_intel, Msr.ApicBase), Is.EqualTo(0xfee0_0800));
    }

    [Test]
    public void BeforeItsHandlerAKernelReadsZero()
    {
        _intel.State->Traps[(int)ExceptionVector.GeneralProtection].Address = 0;
        Assert.That(Read(_intel, 0xc0000082), Is.Zero);
        Assert.That(Read(_intel, Msr.Hypervisor + 1), Is.Null);
    }

    [Test]
    public void InstructionsUseEdxAndEax()
    {
        _intel.Registers->Rcx = 0xffff_ffff_0000_0000 | Msr.GsBase;
        _intel.Registers->Rax = 0xffff_ffff_1234_5678;
        _intel.Registers->Rdx = 0xffff_ffff_0000_7abc;
        Assert.That(_intel.Execute(c => c.wrmsr()), Is.EqualTo(EmulationResult.Done));
        Assert.That(_intel.Segments->GsBase, Is.EqualTo(0x7abc_1234_5678));
        Assert.That(_intel.Execute(c => c.rdmsr()), Is.EqualTo(EmulationResult.Done));
        Assert.That((_intel.Registers->Rax, _intel.Registers->Rdx), Is.EqualTo((0x1234_5678UL, 0x7abcUL)));
        _intel.Registers->Rcx = Msr.PlatformInfo - 1;
        ulong rip = _intel.Rip;
        Assert.That(_intel.Execute(c => c.rdmsr()), Is.EqualTo(EmulationResult.GeneralProtection));
        Assert.That(_intel.Execute(c => c.wrmsr()), Is.EqualTo(EmulationResult.GeneralProtection));
        Assert.That(_intel.Rip, Is.EqualTo(rip));
    }
}
