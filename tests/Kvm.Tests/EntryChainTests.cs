// The way into the guest: whatever is queued, the guest finds its registers as intended and its translations as stored.
using XenSharp.Core;

namespace XenSharp.Kvm.Tests;

/// <summary>Chains of every mix of single stores and runs, executed.</summary>
public sealed unsafe class EntryChainTests : KvmTest
{
    /// <summary>Without NT, which means nothing at CPL 3 and which a page-table KVM does not hand to the guest.</summary>
    private const Rflags Settable = Rflags.Carry | Rflags.Parity | Rflags.Adjust | Rflags.Zero | Rflags.Sign | Rflags.Direction
        | Rflags.Overflow | Rflags.AlignmentCheck | Rflags.Id;

    /// <summary>Entries a run: 5 is the longest that is stored one by one, 6 the shortest that is copied.</summary>
    private static readonly int[] Lengths = [1, 2, 5, 6, 7, 12];

    private ScratchGuest _guest = null!;
    private PageField _field = null!;

    [SetUp]
    public void MakeGuest()
    {
        _guest = NewGuest();
        _field = new PageField(_guest, 8192);
        _field.Scan();
    }

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void RegistersTravelWithoutAnythingQueued() => ScanFromRandomRegisters(new Random(1));

    [Test]
    public void RegistersTravelWithAFlush()
    {
        _guest.Vcpu.PageTableWrites->Flush();
        ScanFromRandomRegisters(new Random(2));
    }

    /// <summary>Pages one by one as far as they are kept apart, whatever they are; then all at once.</summary>
    [Test]
    public void RegistersTravelWithInvalidations([Values(1, 2, 8, 9)] int pages, [Values] bool stores)
    {
        if (stores)
            ToggleRuns([1, 7]);
        ulong[] addresses = [0, ScratchGuest.CodeAddress, ScratchGuest.DataAddress, 0x8000_0000_0000, ulong.MaxValue, 0xffff_8000_0000_0000, 1 << 30, 7, 3 << 20];
        foreach (ulong address in addresses.Take(pages))
            _guest.Vcpu.PageTableWrites->Invalidate(new VirtualAddress(address));
        Assert.That(_guest.Vcpu.PageTableWrites->FlushPending, Is.Zero, "page 0 is there twice");
        ScanFromRandomRegisters(new Random(pages));
        Assert.That(_guest.Vcpu.PageTableWrites->InvalidationCount, Is.Zero);
    }

    [Test]
    public void RunsOfOneLength(
        [Values(1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257)] int runs,
        [ValueSource(nameof(Lengths))] int length)
    {
        ToggleRuns(Enumerable.Repeat(length, runs));
        AssertQueued(runs);
        ScanFromRandomRegisters(new Random((runs * 100) + length));
        Assert.That(_guest.Vcpu.PageTableWrites->Count, Is.Zero, "The queue is empty once the guest was reached.");
    }

    [Test]
    public void FullQueue([Values(1, 5, 6, 7)] int length, [Values] bool severalProcessors)
    {
        AddProcessor(severalProcessors);
        ToggleRuns(Enumerable.Repeat(length, PageTableWriteQueue.Capacity));
        AssertQueued(PageTableWriteQueue.Capacity);
        Assert.That(_guest.Vcpu.PageTableWrites->Overflowed, Is.Zero);
        ScanFromRandomRegisters(new Random(length));
    }

    /// <summary>Whole tables and more, up to where dropping all shadow pages is the quicker way.</summary>
    [Test]
    public void LongRuns([Values(511, 512, 513, 1024, 1025, 4095, 4096, 4097, 8000)] int length, [Values] bool severalProcessors)
    {
        AddProcessor(severalProcessors);
        ToggleRuns([length, 20, 1]);
        ScanFromRandomRegisters(new Random(length));
    }

    [Test]
    public void RandomMixes([Values] bool severalProcessors)
    {
        AddProcessor(severalProcessors);
        for (int seed = 0; seed < 12; seed++)
        {
            var random = new Random(seed);
            int runs = random.Next(1, seed % 2 == 0 ? 40 : 800);
            ToggleRuns(Enumerable.Range(0, runs).Select(_ => Lengths[random.Next(Lengths.Length)]).ToArray());
            if (random.Next(2) == 0)
                _guest.Vcpu.PageTableWrites->Flush();
            ScanFromRandomRegisters(random);
        }
    }

    [Test]
    public void MoreThanTheQueueHolds([Values(1025, 2000, 4096)] int runs)
    {
        ToggleRuns(Enumerable.Repeat(1, runs));
        Assert.That(_guest.Vcpu.PageTableWrites->Overflowed, Is.EqualTo(Capabilities.ShadowPageTables ? 1 : 0));
        ScanFromRandomRegisters(new Random(runs));
        Assert.That(_guest.Vcpu.PageTableWrites->Overflowed, Is.Zero);

        // And the queue is as good as before.
        ToggleRuns([1, 6, 3]);
        ScanFromRandomRegisters(new Random(runs + 1));
    }

    /// <summary>Kicks come faster than the stores can be repeated; the guest is reached all the same.</summary>
    [Test]
    public void ChainsComeToAnEndUnderAStormOfKicks()
    {
        const long shorterThanTheChain = 300_000;
        ToggleRuns(Enumerable.Repeat(1, 1000));
        _field.LoadScan();
        int entries = 0;
        do
        {
            _guest.Vcpu.SetWakeTimer(Libc.MonotonicNow() + shorterThanTheChain);
            VcpuExit exit = _guest.Vcpu.Run();
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Kicked).Or.EqualTo(VcpuExitKind.Syscall), exit.Failure);
            entries++;
        }
        while (_guest.Vcpu.PageTableWrites->Count != 0 && entries < 100);
        Assert.That(entries, Is.LessThan(100), "The guest was never reached.");
        _guest.Vcpu.SetWakeTimer(long.MaxValue);
        _field.Scan();
    }

    private void AddProcessor(bool several)
    {
        if (several)
            _ = _guest.Machine.CreateVcpu(1);
    }

    /// <summary>The number of entries in the queue, where stores have to be repeated at all.</summary>
    private void AssertQueued(int runs)
        => Assert.That(_guest.Vcpu.PageTableWrites->Count, Is.EqualTo(Capabilities.ShadowPageTables ? runs : 0));

    private void ToggleRuns(IEnumerable<int> lengths)
    {
        // Backwards, so that no two runs ever touch; a run's own entries ascend, as they must to be one run.
        int page = _field.Pages;
        foreach (int length in lengths)
        {
            page -= length + 1;
            if (page < 0)
                break;
            for (int i = 0; i < length; i++)
                _field.Toggle(page + i);
        }

        if (!Capabilities.ShadowPageTables)
            _guest.Vcpu.PageTableWrites->Flush();
    }

    private void ScanFromRandomRegisters(Random random)
    {
        _field.LoadScan();
        CpuRegisters* registers = _guest.Vcpu.Registers;
        ulong rip = registers->Rip;
        random.NextBytes(new Span<byte>(registers, sizeof(CpuRegisters)));
        registers->Rip = rip;
        registers->Rflags = (registers->Rflags & (ulong)Settable) | (ulong)(Rflags.Fixed | Rflags.InterruptEnable);
        CpuRegisters intended = *registers;
        _field.RunScan();
        CpuRegisters seen = _field.DumpedRegisters();
        intended.Rip = seen.Rip = 0;
        Assert.That(seen.Rflags & ~(ulong)Rflags.Resume, Is.EqualTo(intended.Rflags), "RFLAGS");
        seen.Rflags = intended.Rflags;
        for (int i = 0; i < sizeof(CpuRegisters) / sizeof(ulong); i++)
            Assert.That(((ulong*)&seen)[i], Is.EqualTo(((ulong*)&intended)[i]), $"register {i} of struct kvm_regs");
    }
}
