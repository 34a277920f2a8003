// Every way in which a domain stops, and what a person reads of it.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class StoppingTests : ScriptedGuest
{
    [TestCase(0U, ShutdownReason.PowerOff)]
    [TestCase(1U, ShutdownReason.Reboot)]
    [TestCase(2U, ShutdownReason.Suspend)]
    [TestCase(3U, ShutdownReason.Crash)]
    [TestCase(4U, ShutdownReason.Watchdog)]
    [TestCase(5U, ShutdownReason.SoftReset)]
    [TestCase(0x105U, ShutdownReason.SoftReset, Description = "eight bits count")]
    public void Every_reason_to_shut_down(uint code, ShutdownReason reason)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fake.WriteAll(Data, code);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 2, Data);
            Assert.Fail("the guest does not run on");
        }

        DomainExit exit = Fake.Run(Guest);
        Assert.That(exit.Reason, Is.EqualTo(reason));
        Assert.That(exit.Report, reason == ShutdownReason.Crash ? Does.Contain("reported that it has crashed") : Is.Null);
    }

    [Test]
    public void The_first_shutdown_code_counts()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            foreach (ulong code in (ulong[])[1, 4])
            {
                Fake.WriteAll(Data, code);
                yield return cpu.Hypercall(HypercallNumber.SchedOp, 5, Data);
                Assert.That(cpu.Result, Is.Zero);
            }

            Fake.WriteAll(Data, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 2, Data);
        }

        Assert.That(Fake.Run(Guest).Reason, Is.EqualTo(ShutdownReason.Reboot));
    }

    [Test]
    public void The_last_vCPU_that_goes_down_powers_off()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 2);
            Assert.Fail("the guest does not run on");
        }

        Assert.That(Fake.Run(Guest).Reason, Is.EqualTo(ShutdownReason.PowerOff));
    }

    [Test]
    public void A_watchdog_that_runs_out_ends_a_sleepingFake()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fake.WriteAll(Data, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 6, Data);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
        }

        Assert.That(Fake.Run(Guest).Reason, Is.EqualTo(ShutdownReason.Watchdog));
    }

    private static IEnumerable<TestCaseData> Crashes()
    {
        static TestCaseData Case(string name, Action<StoppingTests, FakeVcpu> prepare, VcpuExit exit, string sentence)
            => new TestCaseData(prepare, exit, sentence).SetArgDisplayNames(name);
        yield return Case("no handler", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.DivideError), "has no handler");
        yield return Case("bad stack", static (t, c) => { t.SetTrap(ExceptionVector.DivideError, Handler); c.Rsp = 0x5000; }, FakeVcpu.Exception(ExceptionVector.DivideError), "stack cannot be written");
        yield return Case("double fault", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.DoubleFault), "DoubleFault");
        yield return Case("machine check", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.MachineCheck), "MachineCheck");
        yield return Case("the VM", static (_, _) => { }, new VcpuExit(VcpuExitKind.Failed, Failure: "KVM has had enough."), "KVM has had enough.");
        yield return Case("no event callback", static (t, _) => t.EventWithoutCallback(), new VcpuExit(VcpuExitKind.Kicked), "no event callback");
        yield return Case("iret without a frame", static (_, c) => { c.Rsp = 0x5000; c.Hypercall(HypercallNumber.Iret); }, new VcpuExit(VcpuExitKind.Syscall), "no valid frame");
        yield return Case("iret to user without tables", static (t, c) =>
        {
            c.Rsp = Stack;
            t.Fake.WriteAll(Stack, 0, 0, 0, 0, 1, 0xe033, 2, 3, 0xe02b);
            c.Hypercall(HypercallNumber.Iret);
        }, new VcpuExit(VcpuExitKind.Syscall), "no user page tables");
    }

    [TestCaseSource(nameof(Crashes))]
    public void What_cannot_go_on_ends_in_a_report(Delegate prepare, VcpuExit exit, string sentence)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);
            ((Action<StoppingTests, FakeVcpu>)prepare)(this, cpu);
            yield return exit;
            Assert.Fail("the guest does not run on");
        }

        DomainExit stopped = Fake.Run(Guest);
        Assert.That(stopped.Reason, Is.EqualTo(ShutdownReason.Crash));
        Assert.That(stopped.Report, Does.Contain(sentence).And.Contain("rip ").And.Contain("VmAssist").And.Contain("Domain 7 (fake) crashed on vCPU 0"));
    }
}
