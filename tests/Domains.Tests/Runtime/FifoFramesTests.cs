// The frames that a guest gives its event channels: held while they are in use, counted, and given back.
using XenSharp.Core;
using XenSharp.EventChannels;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class FifoFramesTests : ScriptedGuest
{
    private const ulong BlockPfn = 0x500;
    private const ulong ArrayPfn = 0x501;
    private const ulong DecreaseReservation = 1;
    private const ulong EINVAL = unchecked((ulong)-22);

    private static ulong FrameOf(ulong pfn) => FakeMachine.FirstFrame + pfn;

    private VcpuExit Call(FakeVcpu cpu, EventChannelOperation operation, params ulong[] words)
    {
        Fake.WriteAll(Data, words);
        return cpu.Hypercall(HypercallNumber.EventChannelOp, (ulong)operation, Data);
    }

    /// <summary>MMUEXT_PIN_L1_TABLE.</summary>
    private VcpuExit Pin(FakeVcpu cpu, ulong pfn)
    {
        Fake.WriteAll(Data, 0, FrameOf(pfn), 0);
        return cpu.Hypercall(HypercallNumber.MmuextOp, Data, 1, 0, DomainId.Self.Value);
    }

    private uint Word(ulong pfn, ulong index) => Fake.Read<uint>(FakeDomain.Base + (pfn << 12) + (index * 4));

    [Test]
    public void Frames_are_held_from_the_control_block_to_the_reset()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            yield return Call(cpu, EventChannelOperation.InitControl, FakeMachine.FirstFrame - 1, 0);
            Assert.That((ulong)cpu.Result, Is.EqualTo(EINVAL));
            yield return Call(cpu, EventChannelOperation.InitControl, FrameOf(BlockPfn), 0);
            Assert.That(cpu.Result, Is.Zero);
            yield return Call(cpu, EventChannelOperation.ExpandArray, FrameOf(ArrayPfn));
            yield return Call(cpu, EventChannelOperation.ExpandArray, FrameOf(ArrayPfn));
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(Fake.Domain.Events.HeldFrames, Is.EqualTo(new[] { FrameOf(BlockPfn), FrameOf(ArrayPfn), FrameOf(ArrayPfn) }));
            Assert.That(Fake.Domain.AuditFrames(), Is.Null);

            // Without a mapping they are writable by nothing but events; and the guest gives one of them up.
            yield return cpu.Hypercall(HypercallNumber.UpdateVaMapping, FakeDomain.Base + (BlockPfn << 12), 0, 2);
            yield return Pin(cpu, BlockPfn);
            Assert.That((ulong)cpu.Result, Is.EqualTo(EINVAL));
            yield return Call(cpu, EventChannelOperation.BindIpi, 0);
            uint port = Fake.Read<uint>(Data + 4);
            yield return Send(cpu, port);
            Assert.That(Word(ArrayPfn, port), Is.EqualTo(FifoAbi.Pending | FifoAbi.Linked));
            Assert.That(Fake.Domain.AuditFrames(), Is.Null);

            yield return Call(cpu, EventChannelOperation.Reset, DomainId.Self.Value);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(Fake.Domain.Events.HeldFrames, Is.Empty);
            Assert.That(Fake.Domain.AuditFrames(), Is.Null);
            Fake.WriteAll(Data, Data + 64, 1, 0, DomainId.Self.Value);
            Fake.WriteAll(Data + 64, FrameOf(BlockPfn));
            yield return cpu.Hypercall(HypercallNumber.MemoryOp, DecreaseReservation, Data);
            Assert.That(cpu.Result, Is.EqualTo(1));
            Assert.That(Fake.Domain.AuditFrames(), Is.Null);
        }

        _ = Fake.Run(Guest);
    }
}
