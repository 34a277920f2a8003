using System.Buffers.Binary;
using System.Diagnostics;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;
using XenSharp.Domains.Migration;
using XenSharp.Domains.Tests.Runtime;
using XenSharp.Mmu;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>A domain is saved, made again in other machine frames, and saved once more.</summary>
internal sealed unsafe class RoundTripTests
{
    private const ulong ReadOnlyKernel = (ulong)(PageFlags.Present | PageFlags.Accessed | PageFlags.Dirty);
    private const ulong GdtPage = FakeDomain.Base + 0xa000;
    private const ulong SpareKernelPage = FakeDomain.Base + 0xb000;
    private const ulong Trap = FakeDomain.Base + 0x777;

    private SuspendingGuest _source = null!;

    [SetUp]
    public void BuildSource() => _source = SuspendingGuest.Build();

    [TearDown]
    public void DisposeSource() => _source.Dispose();

    [Test]
    public void The_clock_goes_on_where_the_counter_is_another()
    {
        _source.Suspend();
        byte[] image = _source.Save();
        ulong saved = BinaryPrimitives.ReadUInt64LittleEndian(ImageParts.Of(image).Single(RecordType.TscInfo).AsSpan(8));
        long begin = Stopwatch.GetTimestamp();

        // Another frequency than the 1 GHz of the source, and a counter that is behind.
        static ulong Tsc() => (ulong)Stopwatch.GetTimestamp() * 5 / 2;
        const long offset = -123_456_789;
        using SuspendingGuest target = SuspendingGuest.Restore(
            image, change: static options => options with { HostTsc = Tsc }, counter: new TimeStampCounter(2_500_000, offset));
        target.Suspend();
        VcpuTimeInfo info = ((VcpuInfo*)target.SharedInfo)->Time;
        double tick = Math.ScaleB(info.TscToSystemMul, info.TscShift - 32);
        Assert.That(tick, Is.EqualTo(0.4).Within(0.1).Percent, "nanoseconds");

        // What a guest makes of it.
        double now = info.SystemTime + (tick * (Tsc() + unchecked((ulong)offset) - info.TscTimestamp));
        Assert.That(now, Is.InRange((double)saved, saved + (Stopwatch.GetElapsedTime(begin).TotalNanoseconds * 1.01)));
    }

    [Test]
    public void All_that_there_is_is_there_again()
    {
        Furnish(_source);
        _source.Suspend();
        Assert.That(_source.Domain.IsSuspended);
        Assert.That(_source.Domain.AuditFrames(), Is.Null);
        byte[] image = _source.Save();
        using SuspendingGuest target = SuspendingGuest.Restore(image);
        Assert.That(target.Domain.AuditFrames(), Is.Null);
        Assert.That(target.Domain.OwnedPages, Is.EqualTo(_source.Domain.OwnedPages));
        CheckPlaces(target);
        CheckVcpu(target);
        CheckSharedInfo(target);

        // And it can be saved in its turn, to the same.
        target.Suspend();
        ImageParts first = ImageParts.Of(image);
        ImageParts second = ImageParts.Of(target.Save());
        RecordType[] same = [RecordType.PvInfo, RecordType.CpuidPolicy, RecordType.StaticDataEnd, RecordType.PvP2MFrames, RecordType.VcpuExtended];
        foreach (RecordType type in same)
            Assert.That(second.Single(type), Is.EqualTo(first.Single(type)), $"{type}");
        Assert.That(WithUserSelectors(second.Single(RecordType.VcpuBasic)), Is.EqualTo(WithUserSelectors(first.Single(RecordType.VcpuBasic))));
        Assert.That(second.Records.Select(static record => record.Type), Is.EqualTo(first.Records.Select(static record => record.Type)));
        Assert.That(second.Pages.Keys, Is.EqualTo(first.Pages.Keys));
        ulong[] itsOwn = [.. MemoryMarshal.Cast<byte, ulong>(first.Single(RecordType.PvP2MFrames))[1..], _source.PfnOf(_source.Domain.Layout.StartInfo)];
        foreach ((ulong pfn, (PageInfoType type, byte[] data)) in first.Pages)
        {
            Assert.That(second.Pages[pfn].Type, Is.EqualTo(type), $"pfn {pfn:x}");
            if (!itsOwn.Contains(pfn))
                Assert.That(second.Pages[pfn].Data.AsSpan().SequenceEqual(data), $"pfn {pfn:x}");
        }
    }

    [Test]
    public void The_clock_goes_on()
    {
        _source.Suspend();
        byte[] image = _source.Save();
        long saved = BinaryPrimitives.ReadInt64LittleEndian(ImageParts.Of(image).Single(RecordType.TscInfo).AsSpan(8));
        Assert.That(saved, Is.Positive);
        const long longAgo = 3600L * 1_000_000_000;
        using SuspendingGuest target = SuspendingGuest.Restore(ImageParts.Of(image).With(RecordType.TscInfo, static body =>
        {
            BinaryPrimitives.WriteInt64LittleEndian(body.AsSpan(8), longAgo);
            return body;
        }));
        Assert.That(target.Domain.Time.SystemTime, Is.GreaterThanOrEqualTo(longAgo).And.LessThan(longAgo + 60_000_000_000));

        // System time and wall clock together are what the time is.
        ulong wall = *(uint*)(target.SharedInfo + SharedInfoLayout.WallClockSeconds);
        Assert.That(wall + (longAgo / 1_000_000_000), Is.EqualTo((ulong)DateTimeOffset.UtcNow.ToUnixTimeSeconds()).Within(60));
    }

    [Test]
    public void Pages_that_were_given_back_are_not_in_the_image()
    {
        ulong pfn = (SpareKernelPage - FakeDomain.Base) >> Paging.PageShift;
        ulong frame = _source.Context->Domain->Memory.FirstFrame.Value + pfn;
        Assert.That(_source.Call(HypercallNumber.UpdateVaMapping, SpareKernelPage, 0), Is.Zero);
        _source.WriteAll(FakeDomain.Data, FakeDomain.Data + 64, 1, 0, DomainId.Self.Value);
        _source.WriteAll(FakeDomain.Data + 64, frame);
        Assert.That(_source.Call(HypercallNumber.MemoryOp, 1, FakeDomain.Data), Is.EqualTo(1));
        ulong owned = _source.Domain.OwnedPages;
        *(ulong*)_source.At(_source.StartInfo->MfnList + (pfn * sizeof(ulong))) = ulong.MaxValue;
        _source.Suspend();
        byte[] image = _source.Save();
        ImageParts parts = ImageParts.Of(image);
        Assert.That(parts.Pages.Keys, Does.Not.Contain(pfn));
        using SuspendingGuest target = SuspendingGuest.Restore(image);
        Assert.That(target.Domain.OwnedPages, Is.EqualTo(owned));
        Assert.That(*(ulong*)target.At(target.StartInfo->MfnList + (pfn * sizeof(ulong))), Is.EqualTo(ulong.MaxValue));
        Assert.That(target.Domain.AuditFrames(), Is.Null);
    }

    [Test]
    public void A_domain_whose_balloon_had_grown_keeps_what_it_had()
    {
        _source.Suspend();
        byte[] image = _source.Save();
        const int half = SuspendingGuest.MemoryMiB / 2;
        using SuspendingGuest target = SuspendingGuest.Restore(
            image, change: static options => options with { MemoryMiB = half, MaxMemoryMiB = SuspendingGuest.MemoryMiB });
        Assert.That(target.Domain.OwnedPages, Is.EqualTo(_source.Domain.OwnedPages));
        Assert.That(target.Domain.MaxPages, Is.EqualTo(_source.Domain.OwnedPages));
        Assert.That(
            () => SuspendingGuest.Restore(image, change: static options => options with { MemoryMiB = half }),
            Throws.TypeOf<MigrationException>().With.Message.Contains("give it as much memory"));
    }

    [Test]
    public void Pages_without_anything_in_them_take_no_room()
    {
        *(ulong*)_source.At(FakeDomain.Data) = 1;
        _source.Suspend();
        byte[] image = _source.Save();
        ulong data = (FakeDomain.Data - FakeDomain.Base) >> Paging.PageShift;
        ImageParts parts = ImageParts.Of(image);
        Assert.That(parts.Pages[data].Type, Is.EqualTo(PageInfoType.Normal));
        Assert.That(parts.Pages[data + 1].Type, Is.EqualTo(PageInfoType.AllocateOnly));
        Assert.That(image, Has.Length.LessThan(32 * 4096));
    }

    [Test]
    public void The_older_tree_of_the_p2m_list_is_followed_too()
    {
        // Two levels of frame lists in pages of the kernel's.
        ulong first = _source.Context->Domain->Memory.FirstFrame.Value;
        ulong list = _source.StartInfo->MfnList - FakeDomain.Base >> Paging.PageShift;
        ulong top = (SpareKernelPage - FakeDomain.Base) >> Paging.PageShift;
        _source.WriteAll(SpareKernelPage, first + top + 1);
        _source.WriteAll(SpareKernelPage + Paging.PageSize, first + list, first + list + 1);
        _source.Prepare();
        *(ulong*)(_source.SharedInfo + SharedInfoLayout.P2MCr3) = 0;
        *(ulong*)(_source.SharedInfo + SharedInfoLayout.FrameListList) = first + top;
        GuestP2M p2m = GuestP2M.Find(_source.Context->Domain);
        Assert.That(p2m.LastPfn, Is.EqualTo(_source.Domain.OwnedPages - 1));
        Assert.That(p2m.Pages.ToArray(), Is.EqualTo((ulong[])[first + list, first + list + 1]));
        Assert.That(p2m.TryFind(5, out Mfn frame), Is.True);
        Assert.That(frame.Value, Is.EqualTo(first + 5));
    }

    [TestCase(SharedInfoLayout.MaxPfn, 0UL, "has not said where its p2m list is")]
    [TestCase(SharedInfoLayout.MaxPfn, 1UL << 50, "more than can be saved")]
    [TestCase(SharedInfoLayout.P2MCr3, 0UL, "has not said where its p2m list is")]
    [TestCase(SharedInfoLayout.P2MCr3, 0x1234_5000UL, "no memory of its own")]
    [TestCase(SharedInfoLayout.P2MAddress, 0x1234UL, "no place for one")]
    [TestCase(SharedInfoLayout.P2MAddress, 0xffff_8000_0000_0000UL, "no place for one")]
    [TestCase(SharedInfoLayout.P2MAddress, 0xffff_ffff_ffff_f000UL, "no place for one")]
    [TestCase(SharedInfoLayout.P2MAddress, 0x1000UL, "nothing mapped")]
    public void A_guest_that_lies_about_its_p2m_list_is_not_saved(int at, ulong value, string sentence)
    {
        _source.Suspend();
        *(ulong*)(_source.SharedInfo + at) = value;
        Assert.That(_source.Save, Throws.TypeOf<MigrationException>().With.Message.Contains(sentence));
        Assert.That(_source.Domain.IsSuspended);
    }

    [Test]
    public void A_guest_that_has_the_hypervisors_memory_mapped_is_not_saved()
    {
        ulong shared = (_source.Context->Domain->State->SharedInfoFrame << Paging.PageShift) | ReadOnlyKernel;
        Assert.That(_source.Call(HypercallNumber.UpdateVaMapping, SpareKernelPage, shared), Is.Zero);
        _source.Suspend();
        Assert.That(_source.Save, Throws.TypeOf<MigrationException>().With.Message.Contains("shared with it"));
    }

    [Test]
    public void Start_info_must_be_named()
    {
        _source.Suspend();
        _source.Context->Registers->Rdx = 5;
        Assert.That(_source.Save, Throws.TypeOf<MigrationException>().With.Message.Contains("start_info"));
    }

    /// <summary>Gives the vCPU something of everything.</summary>
    private static void Furnish(SuspendingGuest guest)
    {
        var random = new Random(1);
        for (ulong page = 0; page < 4; page++)
            random.NextBytes(new Span<byte>(guest.At(FakeDomain.Base + 0xc000 + (page << Paging.PageShift)), (int)Paging.PageSize - 8));
        ulong gdtFrame = guest.Context->Domain->Memory.FirstFrame.Value + ((GdtPage - FakeDomain.Base) >> Paging.PageShift);
        Assert.That(guest.Call(HypercallNumber.UpdateVaMapping, GdtPage, (gdtFrame << Paging.PageShift) | ReadOnlyKernel), Is.Zero);
        guest.WriteAll(FakeDomain.Data, gdtFrame);
        Assert.That(guest.Call(HypercallNumber.SetGdt, FakeDomain.Data, 100), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.VmAssist, 0, 2), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.SetCallbacks, FakeDomain.Handler, FakeDomain.Handler + 16, FakeDomain.Handler + 32), Is.Zero);
        guest.WriteAll(FakeDomain.Data, 3UL | (7UL << 8) | ((ulong)FlatSelectors.Ring3Cs64 << 16), Trap, 0, 0);
        Assert.That(guest.Call(HypercallNumber.SetTrapTable, FakeDomain.Data), Is.Zero);
        const ulong syscall32 = 7, sysenter = 5, masksEvents = 1UL << 16;
        guest.WriteAll(FakeDomain.Data, syscall32, FakeDomain.Handler + 48);
        Assert.That(guest.Call(HypercallNumber.CallbackOp, 0, FakeDomain.Data), Is.Zero);
        guest.WriteAll(FakeDomain.Data, sysenter | masksEvents, FakeDomain.Handler + 64);
        Assert.That(guest.Call(HypercallNumber.CallbackOp, 0, FakeDomain.Data), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.StackSwitch, 0xe02b, FakeDomain.Stack), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.SetSegmentBase, 0, 0x1111_0000), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.SetSegmentBase, 1, 0x2222_0000), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.SetSegmentBase, 2, 0x3333_0000), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.SetDebugreg, 1, 0x4444_0000), Is.Zero);
        Assert.That(guest.Call(HypercallNumber.FpuTaskswitch, 1), Is.Zero);
        const ulong newUserBaseptr = 15, setLdt = 13;
        guest.WriteAll(FakeDomain.Data, newUserBaseptr, guest.Context->State->KernelRoot, 0, setLdt, GdtPage, 16);
        Assert.That(guest.Call(HypercallNumber.MmuextOp, FakeDomain.Data, 2, 0, DomainId.Self.Value), Is.Zero);
        guest.Context->State->Iopl = 1UL << 12;
        var extended = guest.Machine.Vcpu!.Extended.AsSpan();
        random.NextBytes(extended[32..416]);
        BinaryPrimitives.WriteUInt16LittleEndian(extended, 0x37f);
        BinaryPrimitives.WriteUInt32LittleEndian(extended[24..], 0x1f80);
        extended[512] = 3;
        CpuRegisters* registers = guest.Context->Registers;
        (registers->Rbx, registers->Rbp, registers->R15, registers->R12) = (0xb, 0xbb, 0xf15, 0x12);
        guest.WriteAll(FakeDomain.Data, 0, 0, 0, 0, 0, 0);
    }

    /// <summary>A context whose trap table has code selectors of CPL 3 throughout, as one that is loaded gets, unused entries too.</summary>
    private static byte[] WithUserSelectors(byte[] record)
    {
        ref VcpuInitialisation.GuestContext guest = ref MemoryMarshal.AsRef<VcpuInitialisation.GuestContext>(record.AsSpan(MigrationFormat.VcpuHeaderSize));
        for (int i = 0; i < 256; i++)
            guest.Traps[i].Cs |= 3;
        return record;
    }

    private void CheckPlaces(SuspendingGuest target)
    {
        MachineMemory memory = target.Machine.Memory;
        StartInfo* info = target.StartInfo;
        Assert.That(memory.Contains(target.Domain.Layout.StartInfo));
        Assert.That(target.PfnOf(target.Domain.Layout.StartInfo), Is.EqualTo(_source.PfnOf(_source.Domain.Layout.StartInfo)));
        Assert.That(info->SharedInfo, Is.EqualTo(target.Context->Domain->State->SharedInfoFrame << Paging.PageShift));
        Assert.That((info->StoreMfn, info->ConsoleMfn), Is.EqualTo((target.Domain.Layout.Store.Value, target.Domain.Layout.Console.Value)));
        Assert.That(target.PfnOf(target.Domain.Layout.Store), Is.EqualTo(_source.PfnOf(_source.Domain.Layout.Store)));
        Assert.That(target.PfnOf(target.Domain.Layout.Console), Is.EqualTo(_source.PfnOf(_source.Domain.Layout.Console)));
        Assert.That((info->StoreEventChannel, info->ConsoleEventChannel), Is.EqualTo((target.Domain.StorePort, target.Domain.ConsolePort)));
        Assert.That((info->Flags, info->PageCount), Is.EqualTo((0u, target.Domain.OwnedPages)));
        Assert.That(target.Context->Registers->Rdx, Is.EqualTo(target.Domain.Layout.StartInfo.Value));
        for (ulong pfn = 0; pfn < target.Domain.OwnedPages; pfn++)
            Assert.That(target.PfnOf(new Mfn(*(ulong*)target.At(info->MfnList + (pfn * sizeof(ulong))))), Is.EqualTo(pfn));
    }

    private void CheckVcpu(SuspendingGuest target)
    {
        VcpuState* was = _source.Context->State;
        VcpuState* state = target.Context->State;
        Assert.That(target.Domain.Context->State->VmAssists, Is.EqualTo((ulong)VmAssist.WritablePageTables));
        Assert.That((state->EventCallback, state->FailsafeCallback, state->SyscallCallback), Is.EqualTo((FakeDomain.Handler, FakeDomain.Handler + 16, FakeDomain.Handler + 32)));
        Assert.That((state->Syscall32Callback, state->SysenterCallback), Is.EqualTo((FakeDomain.Handler + 48, FakeDomain.Handler + 64)));
        Assert.That(state->CallbackFlags, Is.EqualTo(CallbackFlags.SysenterDisablesEvents));
        Assert.That(state->Traps[3], Is.EqualTo(was->Traps[3]));
        Assert.That(state->Traps[3].Address, Is.EqualTo(Trap));
        Assert.That((state->KernelSp, state->KernelSs), Is.EqualTo((FakeDomain.Stack, 0xe02bUL)));
        Assert.That((state->GdtEntries, state->LdtBase, state->LdtEntries), Is.EqualTo((100u, GdtPage, 16u)));
        Assert.That(target.PfnOf(new Mfn(state->GdtFrames[0])), Is.EqualTo(_source.PfnOf(new Mfn(was->GdtFrames[0]))));
        Assert.That((state->KernelMode, state->TaskSwitched, state->Iopl), Is.EqualTo((1, 1, 1UL << 12)));
        Assert.That(target.PfnOf(new Mfn(state->KernelRoot)), Is.EqualTo(_source.PfnOf(new Mfn(was->KernelRoot))));
        Assert.That(state->UserRoot, Is.EqualTo(state->KernelRoot));
        Assert.That((target.Context->Segments->FsBase, target.Context->Segments->GsBase, state->InactiveGsBase), Is.EqualTo((0x1111_0000UL, 0x3333_0000UL, 0x2222_0000UL)));
        Assert.That(target.Machine.Vcpu!.DebugRegisters[1], Is.EqualTo(0x4444_0000));
        Assert.That(target.Machine.Vcpu!.TaskSwitched);
        CpuRegisters* registers = target.Context->Registers;
        Assert.That((registers->Rbx, registers->Rbp, registers->R15, registers->R12, registers->Rip), Is.EqualTo((0xbUL, 0xbbUL, 0xf15UL, 0x12UL, SuspendingGuest.SuspendRip + 2)));
        Assert.That(registers->Rax, Is.Zero, "not cancelled");

        // Without XSAVE the x87 and SSE state goes with the context.
        byte[] before = _source.Machine.Vcpu!.Extended;
        byte[] after = target.Domain.Cpuid.MaxXcr0 != 0 ? target.Machine.Vcpu.Extended[..576] : target.Machine.Vcpu.Fpu;
        Assert.That(after, Is.EqualTo(before[..after.Length]));
    }

    private void CheckSharedInfo(SuspendingGuest target)
    {
        byte* shared = target.SharedInfo;
        Assert.That(*(ulong*)(shared + SharedInfoLayout.MaxPfn), Is.EqualTo(*(ulong*)(_source.SharedInfo + SharedInfoLayout.MaxPfn)));
        Assert.That((*(ulong*)(shared + SharedInfoLayout.P2MCr3), *(ulong*)(shared + SharedInfoLayout.FrameListList)), Is.EqualTo((0UL, 0UL)));
        Assert.That(new Span<byte>(shared + SharedInfoLayout.EvtchnPending, 512).ContainsAnyExcept((byte)0), Is.False);
        Assert.That(new Span<byte>(shared + SharedInfoLayout.EvtchnMask, 512).ContainsAnyExcept((byte)0xff), Is.False);
        Assert.That(((VcpuInfo*)shared)->EvtchnUpcallMask, Is.EqualTo(1));
    }
}
