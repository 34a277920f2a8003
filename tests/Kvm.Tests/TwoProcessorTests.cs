// Two vCPUs of one VM on two threads.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class TwoProcessorTests : KvmTest
{
    private ScratchGuest _guest = null!;
    private KvmVirtualCpu _second = null!;

    [SetUp]
    public void MakeGuest()
    {
        _guest = NewGuest();
        _second = _guest.Machine.CreateKvmVcpu(1);
        _second.PageTableRoot = _guest.Vcpu.PageTableRoot;
    }

    [TearDown]
    public void DropGuest()
    {
        _second?.Dispose();
        _guest?.Dispose();
    }

    /// <summary>Each waits in user code for the other's store: only possible when both run at once.</summary>
    [Test]
    public void BothRunAtOnce()
    {
        _guest.Load(code =>
        {
            // rsi is the own cell, rdi the other's; rcx rounds.
            Label round = code.CreateLabel();
            Label wait = code.CreateLabel();
            code.Label(ref round);
            code.inc(__qword_ptr[rsi]);
            code.mov(rax, __qword_ptr[rsi]);
            code.Label(ref wait);
            code.pause();
            code.cmp(__qword_ptr[rdi], rax);
            code.jb(wait);
            code.dec(rcx);
            code.jne(round);
            code.syscall();
        });
        const ulong rounds = 200;
        CpuRegisters registers = *_guest.Vcpu.Registers;
        registers.Rcx = rounds;
        Start(_guest.Vcpu, registers with { Rsi = ScratchGuest.DataAddress, Rdi = ScratchGuest.DataAddress + 64 });
        Start(_second, registers with { Rsi = ScratchGuest.DataAddress + 64, Rdi = ScratchGuest.DataAddress });
        VcpuExit other = default;
        using (new Background(() => other = _second.Run()))
        {
            AssertSyscall(RunWatched(_guest));
        }

        AssertSyscall(other);
        Assert.That(*(ulong*)HostAddress(_guest, ScratchGuest.DataAddress), Is.EqualTo(rounds));
        Assert.That(*(ulong*)HostAddress(_guest, ScratchGuest.DataAddress + 64), Is.EqualTo(rounds));
    }

    /// <summary>A translation changed by one is seen by the other, which never leaves its loop.</summary>
    [Test]
    public void TranslationChangedByOneIsSeenByTheOther()
    {
        if (!Capabilities.ShadowPageTables)
            Assert.Pass("Where the processor walks the guest's tables, the other vCPU needs a flush of its own.");
        const ulong cell = ScratchGuest.CodeAddress + 0x8000;
        *(ulong*)_guest.Machine.Memory.Page(_guest.FirstDataFrame) = 1;
        *(ulong*)_guest.Machine.Memory.Page(_guest.SecondDataFrame) = 2;
        _guest.Load(code =>
        {
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.mov(rax, __qword_ptr[ScratchGuest.DataAddress]);
            code.mov(__qword_ptr[cell], rax);
            code.jmp(again);
        });
        Start(_second, *_guest.Vcpu.Registers);
        VcpuExit other = default;
        ulong* seen = (ulong*)HostAddress(_guest, cell);
        using (new Background(() => other = _second.Run()))
        {
            try
            {
                SpinWait.SpinUntil(() => Volatile.Read(ref *seen) == 1, 60_000);
                Assert.That(Volatile.Read(ref *seen), Is.EqualTo(1));
                for (int i = 0; i < 200; i++)
                {
                    PageTableEntry entry = *_guest.DataEntry;
                    Mfn frame = i % 2 == 0 ? _guest.SecondDataFrame : _guest.FirstDataFrame;
                    _guest.Vcpu.PageTableWrites->Store(_guest.DataEntry, _guest.DataEntryAddress, new PageTableEntry(frame, entry.Flags));
                    Step();
                    SpinWait.SpinUntil(() => Volatile.Read(ref *seen) == (ulong)((i % 2 == 0) ? 2 : 1), 60_000);
                    Assert.That(Volatile.Read(ref *seen), Is.EqualTo((ulong)((i % 2 == 0) ? 2 : 1)), $"change {i}");
                }
            }
            finally
            {
                _second.Kick();
            }
        }

        Assert.That(other.Kind, Is.EqualTo(VcpuExitKind.Kicked), other.Failure);
    }

    /// <summary>Dropping all shadow pages must not take memory away from a vCPU that is using it.</summary>
    [Test]
    public void DroppingShadowPagesDoesNotDisturbTheOther()
    {
        _guest.Load(code =>
        {
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.inc(__qword_ptr[ScratchGuest.DataAddress]);
            code.push(rax);
            code.pop(rax);
            code.jmp(again);
        });
        Start(_second, *_guest.Vcpu.Registers);
        VcpuExit other = default;
        using (var run = new Background(() => other = _second.Run()))
        {
            for (int i = 0; i < 40 && !run.IsDone; i++)
                _guest.Machine.DropShadowPages();
            _second.Kick();
        }

        Assert.That(other.Kind, Is.EqualTo(VcpuExitKind.Kicked), $"{other.Vector}: {other.Failure}");
    }

    /// <summary>
    /// One repeats a long run of entries while the host, serving the other, changes one of them: the newer value must stay.
    /// </summary>
    [Test]
    public void RepeatingARunNeverUndoesAnotherStore()
    {
        const int entries = 400;
        var field = new PageField(_guest, entries);
        field.Scan();
        long changes = 0;
        using (var other = new Background(stop =>
        {
            // A counter in bits that no processor looks at; read back, it must be what was stored.
            var random = new Random(5);
            while (!stop.IsCancellationRequested)
            {
                int page = random.Next(entries);
                ulong* entry = (ulong*)field.Entry(page);
                ulong value = (Volatile.Read(ref *entry) & ~(0x7UL << 9)) | ((ulong)(++changes & 7) << 9);
                Interlocked.Exchange(ref *entry, value);
                for (int i = 0; i < 200; i++)
                {
                    ulong found = Volatile.Read(ref *entry);
                    if (((found ^ value) & (0x7UL << 9)) != 0)
                        throw new InvalidOperationException($"Entry {page} was {value:x} and became {found:x}.");
                }
            }
        }))
        {
            for (int i = 0; i < 300 && !other.IsDone; i++)
            {
                for (int page = 0; page < entries; page++)
                    _guest.Vcpu.PageTableWrites->Repeat(field.EntryAddress(page));
                Step();
            }
        }

        Assert.That(changes, Is.GreaterThan(100));
    }

    [Test]
    public void EachHasItsOwnDescriptorWindowAndStack()
    {
        Assert.That(_second.DescriptorWindow, Is.Not.EqualTo(_guest.Vcpu.DescriptorWindow));
        _guest.Load(code =>
        {
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.inc(rax);
            code.ud2();
        });
        CpuRegisters registers = *_guest.Vcpu.Registers;
        Start(_guest.Vcpu, registers);
        Start(_second, registers);
        const int rounds = 2000;
        int bad = 0;
        using (new Background(() => Count(_second)))
            Count(_guest.Vcpu);
        Assert.That(bad, Is.Zero);

        void Count(KvmVirtualCpu vcpu)
        {
            for (ulong i = 1; i <= rounds; i++)
            {
                VcpuExit exit = vcpu.Run();
                if (exit.Vector != ExceptionVector.InvalidOpcode || vcpu.Registers->Rax != i || vcpu.Registers->Rip != ScratchGuest.CodeAddress + 3)
                    bad++;
                vcpu.Registers->Rip = ScratchGuest.CodeAddress;
            }
        }
    }

    private static void Start(KvmVirtualCpu vcpu, CpuRegisters registers)
    {
        *vcpu.Registers = registers;
        *vcpu.Segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs64, Ss = FlatSelectors.Ring3Data };
    }

    /// <summary>Takes the first vCPU into the guest and out again, at an instruction that raises an exception.</summary>
    private void Step()
    {
        const ulong address = ScratchGuest.CodeAddress + 0x3000;
        ((ReadOnlySpan<byte>)[0x0f, 0x0b]).CopyTo(new Span<byte>(HostAddress(_guest, address), 2)); // UD2
        _guest.Vcpu.Registers->Rip = address;
        VcpuExit exit = _guest.Vcpu.Run();
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
    }
}
