// Multicalls and continuations, as a guest sees them.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class MulticallTests : ScriptedGuest
{
    private const uint TimerVirq = 0;

    [Test]
    public void A_continuation_is_issued_again_from_the_guests_own_instruction()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            WriteMulticall(0, HypercallNumber.XenVersion);
            WriteMulticall(1, HypercallNumber.XenVersion);
            WriteMulticall(2, HypercallNumber.XenVersion);
            ulong rip = cpu.Rip;
            cpu.Kick();
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 3, 33, 44, 55, 66);
            Registers after = Registers.Of(cpu);
            Assert.That((after.Rip, after.Rax, after.Rdi, after.Rsi), Is.EqualTo((rip, (ulong)HypercallNumber.Multicall, Data + 64, 2UL)));
            Assert.That((after.Rdx, after.R10, after.R8, after.R9), Is.EqualTo((33UL, 44UL, 55UL, 66UL)), "registers that carry no argument stay");
            yield return cpu.Again();
            Assert.That((cpu.Rip, cpu.Result), Is.EqualTo((rip + 2, 0L)));
            for (int i = 0; i < 3; i++)
                Assert.That(Fake.Read<long>(Data + (64UL * (ulong)i) + 8), Is.EqualTo((4 << 16) | 17));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Multicall_serves_all_and_keeps_every_result()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            WriteMulticall(0, HypercallNumber.XenVersion);
            WriteMulticall(1, (HypercallNumber)63);
            WriteMulticall(2, HypercallNumber.Multicall, Data, 1);
            WriteMulticall(3, HypercallNumber.XenVersion, 7, 1);
            WriteMulticall(4, HypercallNumber.XenVersion, 7);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 5);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(MulticallResults(5), Is.EqualTo(new[] { (4 << 16) | 17, -(long)Errno.ENOSYS, -(long)Errno.EINVAL, -(long)Errno.EINVAL, 4096 }));

            // After a nested one was refused the next is none.
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 1);
            Assert.That(cpu.Result, Is.Zero);

            // Nothing is read of an empty list.
            yield return cpu.Hypercall(HypercallNumber.Multicall, 0x7000_0000, 0);
            Assert.That(cpu.Result, Is.Zero);
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void An_operation_that_is_continued_within_a_multicall()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            ulong machineFrame = FakeMachine.FirstFrame + 4;
            for (ulong i = 0; i < 3; i++)
                Fake.WriteAll(Data + 0x800 + (i * 16), ((machineFrame + i) << 12) | 1, 0x500 + i);
            WriteMulticall(0, HypercallNumber.MmuUpdate, Data + 0x800, 3, Data + 0xf00, 0x7ff0);
            WriteMulticall(1, HypercallNumber.XenVersion, 7);
            cpu.Kick();
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 2);

            // The entry says what is left of it.
            Assert.That((Fake.Read<ulong>(Data + 16), Fake.Read<ulong>(Data + 24)), Is.EqualTo((Data + 0x810, 0x8000_0002UL)));
            Assert.That(Fake.Read<uint>(Data + 0xf00), Is.EqualTo(1));
            cpu.Kick();
            yield return cpu.Again();
            yield return cpu.Again();
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(MulticallResults(2), Is.EqualTo(new[] { 0L, 4096 }));
            Assert.That(Fake.Read<uint>(Data + 0xf00), Is.EqualTo(3));
            for (ulong i = 0; i < 3; i++)
                Assert.That(MachineToPhys(4 + i), Is.EqualTo(0x500 + i));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Iret_ends_a_multicall()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetUserRoot();
            cpu.Rsp = Stack;
            Fake.WriteAll(Stack, 0xabcd, 11, 12, 0, 0x1234, 0xe033, 0x202, 0x5678, 0xe02b);
            WriteMulticall(0, HypercallNumber.StackSwitch, 0xe02b, Stack + 0x100);
            WriteMulticall(1, HypercallNumber.Iret);
            WriteMulticall(2, HypercallNumber.StackSwitch, 0xe02b, 0x666);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 3);
            Registers after = Registers.Of(cpu);
            Assert.That((after.Rax, after.Rip, after.Rsp, after.Rcx, after.R11), Is.EqualTo((0xabcdUL, 0x1234UL, 0x5678UL, 12UL, 11UL)));
            Assert.That(KernelMode, Is.Zero);
            Assert.That(KernelSp, Is.EqualTo(Stack + 0x100), "what comes behind is not looked at");
            Assert.That(MulticallResults(2)[1], Is.EqualTo(0xabcd));
            BackToKernel(cpu);
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_multicall_that_blocks_goes_on_after_the_event()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, TimerVirq);
            SetMask(1);
            Fake.WriteAll(Data + 0x800, (ulong)(Now + 2_000_000), 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data + 0x800);
            cpu.Rsp = Stack;
            ulong rip = cpu.Rip;
            WriteMulticall(0, HypercallNumber.SchedOp, 1);
            WriteMulticall(1, HypercallNumber.XenVersion, 7);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 2);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(rip), "the frame leads back to the SYSCALL");
            cpu.Rip = rip;
            yield return cpu.Again();
            Assert.That(MulticallResults(2), Is.EqualTo(new[] { 0L, 4096 }));
        }

        _ = Fake.Run(Guest);
    }
}
