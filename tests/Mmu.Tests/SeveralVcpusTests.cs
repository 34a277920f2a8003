// Several vCPUs of one domain at the same tables: interleaved part by part, and on threads of their own.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

/// <summary>No model says what such operations answer; but whenever all vCPUs are at rest, counts must be what is held.</summary>
public sealed unsafe class SeveralVcpusTests
{
    private const int FrameCount = 32;
    private const int OwnedAtFirst = 28;

    /// <summary>
    /// Every operation stops wherever it can, and any vCPU may be the next to go on: with its own, or by taking up what another left.
    /// </summary>
    [Test]
    public void Operations_in_parts_mixed_at_will([Range(0, 39)] int seed)
    {
        const int vcpus = 3;
        const int parts = 6000;
        using var machine = new TestMachine(FrameCount, OwnedAtFirst, inGuest: seed % 2 == 0, vcpus);
        var guests = new RandomVcpu[vcpus];
        for (int i = 0; i < vcpus; i++)
        {
            guests[i] = new RandomVcpu(machine, i, (seed * vcpus) + i);
            *machine.Context->Vcpus[i].KickPending = 1;
        }

        var order = new Random(seed);
        for (int part = 0; part < parts; part++)
        {
            RandomVcpu next = guests[order.Next(vcpus)];
            next.Step();
            if (FrameTableAudit.Check(machine.Context) is { } trouble)
                Assert.Fail($"part {part}, {next.Last}: {trouble}");
        }

        Assert.That(guests.Sum(static guest => guest.Continued), Is.GreaterThan(parts / 8));
        Assert.That(guests.Sum(static guest => guest.Succeeded), Is.GreaterThan(parts / 20));
        TakeApart(machine, guests);
    }

    [Test]
    public void Operations_at_the_same_time([Range(0, 3)] int seed)
    {
        const int vcpus = 4;
        const int rounds = 40;
        const int steps = 1000;
        using var machine = new TestMachine(FrameCount, OwnedAtFirst, inGuest: seed % 2 == 0, vcpus);
        RandomVcpu[] guests = [.. Enumerable.Range(0, vcpus).Select(i => new RandomVcpu(machine, i, 1000 + (seed * vcpus) + i))];
        using var barrier = new Barrier(vcpus, _ =>
        {
            // All are at rest here, in the middle of whatever they were asked to do.
            if (FrameTableAudit.Check(machine.Context) is { } trouble)
                throw new InvalidOperationException(trouble);
        });
        Thread[] threads = [.. guests.Select(guest => new Thread(() => guest.Run(barrier, rounds, steps)))];
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            thread.Join();
        foreach (RandomVcpu guest in guests)
            Assert.That(guest.Failure, Is.Null);
        Assert.That(guests.Sum(static guest => guest.Succeeded), Is.GreaterThan(rounds * steps / 20));
        TakeApart(machine, guests);
    }

    /// <summary>What is left when all is let go: the boot tables, and frames that are used for nothing.</summary>
    private static void TakeApart(TestMachine machine, RandomVcpu[] guests)
    {
        foreach (RandomVcpu guest in guests)
            guest.LetGo();
        for (int frame = FirstPlayFrame; frame < FrameCount; frame++)
        {
            if (machine.Info(frame).Has(FrameFlags.Pinned))
                Assert.That(MmuextOpOf(machine, 4, frame), Is.Zero);
        }

        // A table that was left in parts and that nobody wanted since stays so (as on Xen); asked for again it comes to an end.
        for (int level = 4; level > 0; level--)
        {
            for (int frame = FirstPlayFrame; frame < FrameCount; frame++)
            {
                if (machine.Info(frame).Has(FrameFlags.Partial) && machine.Info(frame).Type == (PageType)level && MmuextOpOf(machine, (uint)level - 1, frame) == 0)
                    Assert.That(MmuextOpOf(machine, 4, frame), Is.Zero);
            }
        }

        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
        for (int frame = FirstPlayFrame; frame < FrameCount; frame++)
        {
            FrameInfo info = machine.Info(frame);
            bool stillMapped = info.Type == PageType.Writable || info.TypeCount == 0;
            Assert.That(stillMapped || !info.IsPageTable, Is.True, $"frame {frame}: {info.TypeCount} as {info.Type}, {info.Flags}");
        }
    }

    private static long MmuextOpOf(TestMachine machine, uint command, int frame)
    {
        *machine.Vcpu->KickPending = 0;
        return machine.Extended(command, Frame(frame).Value);
    }

    /// <summary>A vCPU that does what comes to its mind, and mostly goes on with it when it was stopped.</summary>
    private sealed class RandomVcpu(TestMachine machine, int id, int seed)
    {
        private readonly Random _random = new(seed);
        private readonly VcpuContext* _vcpu = machine.Context->Vcpus + id;
        private readonly ulong* _data = (ulong*)(machine.Data + ((ulong)id << Paging.PageShift));
        private readonly ulong _dataAddress = DataAddress + ((ulong)id << Paging.PageShift);
        private delegate*<VcpuContext*, in HypercallArguments, long> _call;
        private HypercallArguments _arguments;

        /// <summary>What it did last.</summary>
        public string Last { get; private set; } = "nothing";

        public Exception? Failure { get; private set; }

        public int Continued { get; private set; }

        public int Succeeded { get; private set; }

        public void Run(Barrier barrier, int rounds, int steps)
        {
            try
            {
                for (int round = 0; round < rounds; round++)
                {
                    for (int step = 0; step < steps; step++)
                    {
                        *_vcpu->KickPending = _random.Next(3) == 0 ? 1 : 0;
                        int before = Continued;
                        Step();
                        if (Continued != before)
                            _ = Thread.Yield();
                    }

                    barrier.SignalAndWait();
                }
            }
            catch (Exception exception)
            {
                Failure = exception;
                barrier.RemoveParticipant();
            }
        }

        /// <summary>One part of an operation: the next of what is under way, or the first of a new one.</summary>
        public void Step()
        {
            // Now and then a guest does not come back to what it began.
            if (_call == null || _random.Next(50) == 0)
                Begin();
            long result = _call(_vcpu, _arguments);
            _vcpu->PageTableWrites->Clear();
            if (_vcpu->Continuation.Pending != 0)
            {
                _vcpu->Continuation.Pending = 0;
                _arguments = _vcpu->Continuation.Arguments;
                Continued++;
                return;
            }

            Succeeded += result >= 0 ? 1 : 0;
            _call = null;

            // On a root without the boot tables its arguments could not be read.
            while (_vcpu->State->KernelRoot != Frame(0).Value && MmuextOp.NewBaseptr(_vcpu, Frame(0)) == Errno.ERESTART)
            {
            }
        }

        /// <summary>Ends all that it holds.</summary>
        public void LetGo()
        {
            *_vcpu->KickPending = 0;
            Assert.That(PageTables.FinishDeferred(_vcpu), Is.EqualTo(Errno.None));
            Extend(15, 0, 0);
            Assert.That(_call(_vcpu, _arguments), Is.Zero);
        }

        private int PlayFrame() => FirstPlayFrame + _random.Next(FrameCount - FirstPlayFrame);

        private void Begin()
        {
            int frame = PlayFrame();
            switch (_random.Next(14))
            {
                case 0 or 1 or 2:
                    Extend((uint)_random.Next(4), Frame(frame).Value, 0);
                    break;
                case 3 or 4:
                    Extend(4, Frame(frame).Value, 0);
                    break;
                case 5:
                    Extend(5, Frame(frame).Value, 0);
                    break;
                case 6:
                    Extend(15, _random.Next(3) == 0 ? 0 : Frame(frame).Value, 0);
                    break;
                case 7:
                    Extend(16, Frame(frame).Value, 0);
                    break;
                case 8:
                    Reserve(frame);
                    break;
                default:
                    Update();
                    break;
            }
        }

        private void Update()
        {
            // Half of the requests are for the table of the one before, as they mostly are in life.
            int count = 1 + _random.Next(8);
            int table = PlayFrame();
            for (int i = 0; i < count; i++)
            {
                if (_random.Next(2) == 0)
                    table = PlayFrame();
                int index = _random.Next(8) == 0 ? 511 : 1 + _random.Next(4);
                PageFlags flags = _random.Next(8) == 0 ? PageFlags.None : PageFlags.Present | PageFlags.User | PageFlags.Accessed;
                if (_random.Next(2) == 0)
                    flags |= PageFlags.Writable;
                int target = _random.Next(8) == 0 ? table : PlayFrame();
                _data[2 * i] = EntryAddress(table, index).Value | (_random.Next(3) == 0 ? 2UL : 0);
                _data[(2 * i) + 1] = new PageTableEntry(Frame(target), flags).Value;
            }

            _call = &MmuUpdate.Execute;
            _arguments = new HypercallArguments { A0 = _dataAddress, A1 = (ulong)count, A3 = DomainId.Self.Value };
            Last = $"vCPU {id}: update of {count}";
        }

        private void Extend(uint command, ulong first, ulong second)
        {
            (_data[0], _data[1], _data[2]) = (command, first, second);
            _call = &MmuextOp.Execute;
            _arguments = new HypercallArguments { A0 = _dataAddress, A1 = 1, A3 = DomainId.Self.Value };
            Last = $"vCPU {id}: mmuext_op {command} of {first:x}";
        }

        private void Reserve(int frame)
        {
            (_data[0], _data[1], _data[2], _data[3]) = (_dataAddress + 256, 1, 0, DomainId.Self.Value);
            _data[32] = Frame(frame).Value;
            _call = &MemoryOp.Execute;
            _arguments = new HypercallArguments { A0 = _random.Next(3) == 0 ? 1UL : 6, A1 = _dataAddress };
            Last = $"vCPU {id}: memory_op {_arguments.A0} of {frame}";
        }
    }
}
