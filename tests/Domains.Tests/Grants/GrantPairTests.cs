// Grants between two domains: what holds pages, what each side sees, and what is left when one of them dies.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Runtime;
using XenSharp.Mmu;
using static XenSharp.Domains.Tests.Grants.GrantDomain;

namespace XenSharp.Domains.Tests.Grants;

public sealed unsafe class GrantPairTests
{
    private const uint Reference = 100;
    private const ushort GranterId = 11;
    private const ushort MapperId = 12;
    private const ushort ThirdId = 13;

    private DomainManager _manager = null!;
    private GrantDomain _granter = null!;
    private GrantDomain _mapper = null!;

    [SetUp]
    public void SetUp()
    {
        _manager = new DomainManager();
        _granter = Create(GranterId);
        _mapper = Create(MapperId);
    }

    [TearDown]
    public void TearDown()
    {
        _granter.Dispose();
        _mapper.Dispose();
        Assert.That(_manager.Domains, Is.Empty);
    }

    [TestCase(1)]
    [TestCase(2)]
    public void A_page_is_mapped_behind_a_frame_of_the_window(int version)
    {
        Assert.That(_granter.SetVersion((uint)version), Is.EqualTo(Errno.None));
        Grant(Reference, FrameOf(0));
        uint uses = _granter.Uses(FrameOf(0));
        uint references = _granter.References(FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Fake.Read<MapGrantRef>(Request).DeviceBusAddress, Is.EqualTo(FakeMachine.FirstWindowFrame << 12));
        const PageFlags flags = PageFlags.Present | PageFlags.User | PageFlags.GuestKernel | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute | PageFlags.Writable;
        Assert.That(_mapper.EntryOf(AddressOf(1)), Is.EqualTo(new PageTableEntry(new Mfn(FakeMachine.FirstWindowFrame), flags)));
        Assert.That((_granter.Uses(FrameOf(0)) - uses, _granter.References(FrameOf(0)) - references), Is.EqualTo((1, 1)));
        Assert.That(_granter.FlagsOf(Reference) & (GrantFlags.Reading | GrantFlags.Writing), Is.EqualTo(version == 1 ? GrantFlags.Reading | GrantFlags.Writing : 0));
        Assert.That(_mapper.Fake.Machine.WindowToPhys[0], Is.EqualTo(FirstPfn), "the granter's number for it");
        _granter.Fake.Write(AddressOf(0), 0x1122UL);
        Assert.That(ReadBy(_mapper, AddressOf(1)), Is.EqualTo(0x1122));
        Assert.That(GuestAccess.Write(_mapper.Context, AddressOf(1) + 8, 0x3344UL), Is.True, "hypercalls reach it as well");
        Assert.That(_granter.Fake.Read<ulong>(AddressOf(0) + 8), Is.EqualTo(0x3344));
        Audit();

        Assert.That(_granter.SetVersion(3 - (uint)version), Is.EqualTo(Errno.EBUSY), "in use");
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.EntryOf(AddressOf(1)), Is.EqualTo(default(PageTableEntry)));
        Assert.That((_granter.Uses(FrameOf(0)), _granter.References(FrameOf(0))), Is.EqualTo((uses, references)));
        Assert.That(_granter.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Assert.That(_mapper.Fake.Machine.Shown, Is.Empty);
        Assert.That(_mapper.Fake.Machine.WindowToPhys[0], Is.EqualTo(Mfn.Invalid.Value));
        Assert.That(_granter.SetVersion(3 - (uint)version), Is.EqualTo(Errno.None));
        Audit();
    }

    [Test]
    public void One_frame_of_the_window_serves_all_mappings_and_allows_what_they_do()
    {
        Grant(Reference, FrameOf(0));
        Grant(Reference + 1, FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.ReadOnly, AddressOf(1), out uint reader), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Shown(0), Is.False);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(2), out uint writer, Reference + 1), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Shown(0), Is.True);
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.Device, AddressOf(3), out uint both), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Fake.Machine.Shown, Has.Count.EqualTo(1));
        Audit();
        ulong bus = FakeMachine.FirstWindowFrame << 12;
        Assert.That(_mapper.Unmap(both, 0, bus + 0x1000), Is.EqualTo(GrantStatus.BadDeviceAddress));
        Assert.That(_mapper.Unmap(writer, AddressOf(2)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Unmap(both, AddressOf(3)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Shown(0), Is.True, "the device writes still");
        Audit();
        Assert.That(_mapper.Unmap(both, 0, bus), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Shown(0), Is.False);
        Audit();
        Assert.That(_granter.Uses(FrameOf(0)), Is.EqualTo(1), "its own mapping");
        Assert.That(_mapper.Unmap(reader, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Fake.Machine.Shown, Is.Empty);
        Audit();
    }

    [Test]
    public void Entries_of_other_domains_pages_are_the_grant_tables_to_make()
    {
        Grant(Reference, FrameOf(0));
        uint references = _granter.References(FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        ulong entry = _mapper.EntryOf(AddressOf(1)).Value;
        Assert.That(UpdateEntry(AddressOf(2), entry), Is.EqualTo(Errno.EBUSY));
        Assert.That(UpdateEntry(AddressOf(2), entry & ~2UL), Is.EqualTo(Errno.EBUSY));
        Assert.That(UpdateEntry(AddressOf(1), entry & ~2UL), Is.EqualTo(Errno.EBUSY), "another use of the frame");
        Assert.That(UpdateEntry(AddressOf(1), entry | (ulong)PageFlags.Available0), Is.EqualTo(Errno.None), "the same use");
        Assert.That(UpdateEntry(AddressOf(1), 0), Is.EqualTo(Errno.None));
        _mapper.Fake.Domain.Window.Collect(_mapper.Context);
        Assert.That(_granter.References(FrameOf(0)), Is.EqualTo(references), "the page went with the entry");
        Assert.That(_granter.FlagsOf(Reference) & GrantFlags.Writing, Is.EqualTo(GrantFlags.Writing), "the grant did not");
        Assert.That(_mapper.Fake.Machine.Shown, Is.Empty);
        Audit();
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.GeneralError));

        // Its frame of the window stays its own, so that another's mapping cannot be unmapped by it.
        Grant(Reference + 1, FrameOf(5));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(3), out uint other, Reference + 1), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Unmap(handle, AddressOf(3)), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint again), Is.EqualTo(GrantStatus.Okay));
        Audit();
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay), "either handle means it");
        Assert.That(_mapper.Unmap(again, AddressOf(1)), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(_mapper.Unmap(other, AddressOf(3)), Is.EqualTo(GrantStatus.Okay));
        Audit();
    }

    [Test]
    public void Of_another_domains_page_nothing_but_a_mapping_can_be_made()
    {
        Grant(Reference, FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        const ulong window = FakeMachine.FirstWindowFrame;
        for (uint command = 0; command <= 3; command++)
            Assert.That(Mmuext(command, window), Is.EqualTo(-(long)Errno.EINVAL), $"a page table of level {command + 1}");
        foreach (uint command in (uint[])[5, 16, 17])
            Assert.That(Mmuext(command, window), Is.Negative, $"mmuext_op {command}");
        _mapper.Fake.WriteAll(Request, (window << 12) | 1, 1);
        Assert.That(_mapper.Fake.Call(HypercallNumber.MmuUpdate, Request, 1, 0, Self), Is.EqualTo(-(long)Errno.EINVAL), "its M2P entry");
        _mapper.Fake.WriteAll(Request, Request + 0x100, 1, Self);
        _mapper.Fake.Write(Request + 0x100, window);
        Assert.That(_mapper.Fake.Call(HypercallNumber.MemoryOp, 1, Request), Is.Zero, "not the domain's to give back");
        Assert.That(_mapper.Transfer(window, MapperId, 5), Is.EqualTo(GrantStatus.BadPage));
        var frame = new CopyPointer { Frame = window, Domain = Self };
        Assert.That(_mapper.Copy(frame, new CopyPointer { Frame = FrameOf(3), Domain = Self }, 8, CopyFlags.None), Is.EqualTo(GrantStatus.BadPage));
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Audit();
    }

    [Test]
    public void A_mapping_changes_places_with_a_page_of_ones_own()
    {
        Grant(Reference, FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        ulong moved = _mapper.EntryOf(AddressOf(2)).Frame.Value;
        _mapper.Fake.Write(Request, new UnmapGrantRef { HostAddress = AddressOf(1), NewAddress = AddressOf(2), Handle = handle });
        Assert.That(_mapper.Op(7), Is.Zero);
        Assert.That(_mapper.Fake.Read<GrantStatus>(Request + UnmapGrantRef.StatusOffset), Is.EqualTo(GrantStatus.Okay));
        Assert.That((_mapper.EntryOf(AddressOf(1)).Frame.Value, _mapper.EntryOf(AddressOf(2)).IsPresent), Is.EqualTo((moved, false)));
        Assert.That(_mapper.Fake.Machine.Shown, Is.Empty);
        Audit();
    }

    [Test]
    public void Only_those_named_may_use_an_entry()
    {
        using GrantDomain third = Create(ThirdId);
        Grant(Reference, FrameOf(0));
        Assert.That(third.Map(Reference, GrantMapFlags.Host, AddressOf(1), out _, GranterId), Is.EqualTo(GrantStatus.GeneralError));
        _granter.PutEntry(Reference + 1, GrantFlags.PermitAccess | GrantFlags.ReadOnly, FrameOf(0), MapperId);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out _, Reference + 1), Is.EqualTo(GrantStatus.GeneralError));
        _granter.PutEntry(Reference + 2, GrantFlags.PermitAccess, _granter.Context->State->KernelRoot, MapperId);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out _, Reference + 2), Is.EqualTo(GrantStatus.GeneralError), "a page table cannot be written");
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.ReadOnly, AddressOf(1), out uint table, Reference + 2), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host, 0x1000, out _, Reference), Is.EqualTo(GrantStatus.GeneralError), "nowhere to map it");
        Assert.That(_mapper.Map(Reference, GrantMapFlags.Host, AddressOf(1), out _, 99), Is.EqualTo(GrantStatus.BadDomain));
        Assert.That(_mapper.Fake.Machine.Shown, Has.Count.EqualTo(1));
        Assert.That(_mapper.Unmap(table, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        foreach (uint reference in (uint[])[Reference, Reference + 1, Reference + 2])
            Assert.That(_granter.Table[reference].Pin, Is.Zero);
        Audit();
    }

    [Test]
    public void What_may_have_been_a_page_table_is_forgotten_before_others_write_to_it()
    {
        using GrantDomain granter = Create(ThirdId, shadow: true);
        granter.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), MapperId);
        granter.Context->Domain->MarkShadowed(new Mfn(FrameOf(0)));
        GrantStatus MapOf(GrantMapFlags flags, out uint handle) => _mapper.Map(Reference, flags, AddressOf(1), out handle, ThirdId);
        Assert.That(MapOf(GrantMapFlags.Host | GrantMapFlags.ReadOnly, out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(granter.Fake.Machine.Forgotten, Is.Zero);
        Assert.That(MapOf(GrantMapFlags.Host, out uint writer), Is.EqualTo(GrantStatus.Okay));
        Assert.That(granter.Fake.Machine.Forgotten, Is.EqualTo(1));
        Assert.That(_mapper.Unmap(writer, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(MapOf(GrantMapFlags.Host, out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(granter.Fake.Machine.Forgotten, Is.EqualTo(1), "once is enough");

        granter.Context->Domain->MarkShadowed(new Mfn(FrameOf(2)));
        granter.PutEntry(Reference + 1, GrantFlags.PermitAccess, FrameOf(2), MapperId);
        var to = new CopyPointer { Reference = Reference + 1, Domain = ThirdId };
        Assert.That(_mapper.Copy(new CopyPointer { Frame = FrameOf(3), Domain = Self }, to, 8, CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(granter.Fake.Machine.Forgotten, Is.EqualTo(2));
    }

    [Test]
    public void There_is_room_for_so_many_pages_and_no_more()
    {
        _mapper.Fake.Machine.MaxShown = 20;
        uint[] handles = new uint[FakeMachine.WindowFrames];
        for (uint i = 0; i < 20; i++)
        {
            Grant(Reference + i, FrameOf(i));
            Assert.That(Map(GrantMapFlags.Host, AddressOf(i), out handles[i], Reference + i), Is.EqualTo(GrantStatus.Okay));
        }

        Grant(Reference + 20, FrameOf(20));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(20), out _, Reference + 20), Is.EqualTo(GrantStatus.NoSpace), "the host refuses");
        Audit();
        _mapper.Fake.Machine.MaxShown = int.MaxValue;
        for (uint i = 20; i < FakeMachine.WindowFrames; i++)
        {
            Grant(Reference + i, FrameOf(i));
            Assert.That(Map(GrantMapFlags.Host, AddressOf(i), out handles[i], Reference + i), Is.EqualTo(GrantStatus.Okay));
        }

        const uint last = (uint)FakeMachine.WindowFrames;
        Grant(Reference + last, FrameOf(last));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(last), out _, Reference + last), Is.EqualTo(GrantStatus.NoSpace), "the window is full");
        Audit();
        for (uint i = 0; i < handles.Length; i++)
            Assert.That(_mapper.Unmap(handles[i], AddressOf(i)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(last), out _, Reference + last), Is.EqualTo(GrantStatus.Okay));
        Audit();
    }

    [TestCase(1)]
    [TestCase(2)]
    public void Contents_are_copied_between_domains(int version)
    {
        Assert.That(_granter.SetVersion((uint)version), Is.EqualTo(Errno.None));
        using GrantDomain third = Create(ThirdId);
        Grant(Reference, FrameOf(0));
        third.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), MapperId);
        _granter.Fake.Write(AddressOf(0) + 16, 0x5566UL);
        var theirs = new CopyPointer { Reference = Reference, Domain = GranterId, Offset = 16 };
        var mine = new CopyPointer { Frame = FrameOf(1), Domain = Self, Offset = 24 };
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Fake.Read<ulong>(AddressOf(1) + 24), Is.EqualTo(0x5566));
        var thirds = new CopyPointer { Reference = Reference, Domain = ThirdId, Offset = 8 };
        Assert.That(_mapper.Copy(theirs, thirds, 8, CopyFlags.SourceReference | CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(third.Fake.Read<ulong>(AddressOf(0) + 8), Is.EqualTo(0x5566));
        _mapper.Fake.Write(AddressOf(1) + 24, 0x7788UL);
        Assert.That(_mapper.Copy(mine, theirs, 8, CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_granter.Fake.Read<ulong>(AddressOf(0) + 16), Is.EqualTo(0x7788));
        Assert.That(_mapper.Copy(new CopyPointer { Frame = FrameOf(0), Domain = GranterId }, mine, 8, CopyFlags.None), Is.EqualTo(GrantStatus.PermissionDenied));
        Assert.That(_granter.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Audit();
        third.Audit();
    }

    [Test]
    public void A_transitive_entry_stands_for_anothers()
    {
        Assert.That(_granter.SetVersion(2), Is.EqualTo(Errno.None));
        using GrantDomain third = Create(ThirdId);
        third.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), GranterId);
        *_granter.Table.Entry2(Reference) = new GrantEntry2
        {
            Header = new GrantHeader(GrantFlags.Transitive, MapperId),
            TransitiveDomain = ThirdId,
            TransitiveReference = Reference,
        };
        third.Fake.Write(AddressOf(0), 0x99UL);
        var theirs = new CopyPointer { Reference = Reference, Domain = GranterId };
        var mine = new CopyPointer { Frame = FrameOf(1), Domain = Self };
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Fake.Read<ulong>(AddressOf(1)), Is.EqualTo(0x99));
        Assert.That(_mapper.Copy(mine, theirs, 8, CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(2), out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That((_granter.Table[Reference].Pin, third.Table[Reference].Pin), Is.EqualTo((0, 0)));
        Assert.That(third.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));

        // One that stands for one that stands for another is not followed, nor one that the domain in between may not use.
        third.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), MapperId);
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.GeneralError));
        _granter.Table.Entry2(Reference)->TransitiveDomain = GranterId;
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.GeneralError));
        _granter.Table.Entry2(Reference)->TransitiveDomain = MapperId;
        _mapper.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(4), GranterId);
        _mapper.Fake.Write(AddressOf(4), 0xaaUL);
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay), "back to where it is asked from");
        Assert.That(_mapper.Fake.Read<ulong>(AddressOf(1)), Is.EqualTo(0xaa));
        Audit();
        third.Audit();
    }

    [Test]
    public void An_entry_that_is_mapped_stands_for_no_other()
    {
        Assert.That(_granter.SetVersion(2), Is.EqualTo(Errno.None));
        using GrantDomain third = Create(ThirdId);
        third.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), GranterId);
        Grant(Reference, FrameOf(0));
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.ReadOnly, AddressOf(2), out uint handle), Is.EqualTo(GrantStatus.Okay));
        _granter.Table.Entry2(Reference)->Header = new GrantHeader(GrantFlags.Transitive, MapperId);
        _granter.Table.Entry2(Reference)->TransitiveDomain = ThirdId;
        _granter.Table.Entry2(Reference)->TransitiveReference = Reference;
        var theirs = new CopyPointer { Reference = Reference, Domain = GranterId };
        var mine = new CopyPointer { Frame = FrameOf(1), Domain = Self };
        Assert.That(_mapper.Copy(theirs, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(third.Table[Reference].Pin, Is.Zero);
        Assert.That(_mapper.Unmap(handle, AddressOf(2)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_granter.Table[Reference].Pin, Is.Zero);
        Audit();
        third.Audit();
    }

    [Test]
    public void A_frame_given_away_comes_to_the_other_with_its_contents()
    {
        uint Own(GrantDomain domain) => (uint)domain.Context->Domain->State->OwnedPages;
        (uint given, uint taken) = (Own(_mapper), Own(_granter));
        _mapper.Fake.Write(AddressOf(9), 0xbbUL);
        Assert.That(UpdateEntry(AddressOf(9), 0), Is.EqualTo(Errno.None));
        Assert.That(_mapper.Transfer(FrameOf(9), GranterId, Reference), Is.EqualTo(GrantStatus.GeneralError), "nobody waits for it");
        Assert.That((Own(_mapper), Own(_granter)), Is.EqualTo((given - 1, taken)));
        _mapper.Fake.Write(AddressOf(8), 0xccUL);
        Assert.That(UpdateEntry(AddressOf(8), 0), Is.EqualTo(Errno.None));
        _granter.PutEntry(Reference, GrantFlags.AcceptTransfer, 0x345, MapperId);
        Assert.That(_mapper.Transfer(FrameOf(8), GranterId, Reference), Is.EqualTo(GrantStatus.Okay));
        Assert.That((Own(_mapper), Own(_granter)), Is.EqualTo((given - 2, taken + 1)));
        Assert.That(_granter.FlagsOf(Reference), Is.EqualTo(GrantFlags.AcceptTransfer | GrantFlags.TransferCommitted | GrantFlags.TransferCompleted));
        var received = new Mfn(_granter.Table.Entry1(Reference)->Frame);
        MachineMemory memory = _granter.Context->Domain->Memory;
        Assert.That(*(ulong*)memory.Page(received), Is.EqualTo(0xcc));
        Assert.That(_granter.Context->Domain->MachineToPhys[memory.IndexOf(received)], Is.EqualTo(0x345));
        Assert.That(_mapper.Transfer(FrameOf(1), GranterId, Reference), Is.EqualTo(GrantStatus.BadPage), "in use");
        Audit();
    }

    [Test]
    public void A_domain_that_dies_leaves_what_others_have_mapped()
    {
        Grant(Reference, FrameOf(0));
        Grant(Reference + 1, FrameOf(1));
        _granter.Fake.Write(AddressOf(0), 0xddUL);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint writer), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.ReadOnly, AddressOf(2), out uint reader), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(3), out uint overwritten, Reference + 1), Is.EqualTo(GrantStatus.Okay));
        Assert.That(UpdateEntry(AddressOf(3), 0), Is.EqualTo(Errno.None));
        _granter.Dispose();
        Assert.That(_manager.Domains.Select(static domain => domain.Id.Value), Is.EquivalentTo(new[] { GranterId, MapperId }), "not gone yet");
        Assert.That(ReadBy(_mapper, AddressOf(1)), Is.EqualTo(0xdd));
        Assert.That(GuestAccess.Write(_mapper.Context, AddressOf(1), 0xeeUL), Is.True);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(4), out _), Is.EqualTo(GrantStatus.BadPage));
        _mapper.Audit();
        Assert.That(_mapper.Unmap(writer, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(ReadBy(_mapper, AddressOf(2)), Is.EqualTo(0xee));
        Assert.That(_mapper.Unmap(reader, AddressOf(2)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_manager.Domains.Select(static domain => domain.Id.Value), Is.EquivalentTo(new[] { MapperId }));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(4), out _), Is.EqualTo(GrantStatus.BadDomain));
        _mapper.Audit();

        // The guest overwrote an entry, and wants to unmap what is not there.
        _mapper.Fake.Write(Request, new UnmapGrantRef { Handle = overwritten, HostAddress = AddressOf(3) });
        Assert.That(_mapper.Op(1), Is.Zero);
        Assert.That(_mapper.Fake.Domain.IsStopping, Is.True);
    }

    /// <summary>What a domain granted stays with each that has it, in whatever way, and goes with the last; what nobody has is gone at once.</summary>
    [TestCase(1)]
    [TestCase(2)]
    public void A_dead_domains_pages_go_with_the_last_that_has_them(int version)
    {
        using GrantDomain third = Create(ThirdId);
        Assert.That(_granter.SetVersion((uint)version), Is.EqualTo(Errno.None));
        Grant(Reference, FrameOf(0));
        Grant(Reference + 1, FrameOf(1));
        Grant(Reference + 2, FrameOf(2));
        _granter.PutEntry(Reference + 3, GrantFlags.PermitAccess, FrameOf(1), ThirdId);
        Assert.That(Map(GrantMapFlags.Device, 0, out uint device), Is.EqualTo(GrantStatus.Okay));
        ulong bus = _mapper.Fake.Read<MapGrantRef>(Request).DeviceBusAddress;
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint replaced, Reference + 1), Is.EqualTo(GrantStatus.Okay));
        Assert.That(third.Map(Reference + 3, GrantMapFlags.Host, AddressOf(1), out _, GranterId), Is.EqualTo(GrantStatus.Okay));
        _granter.Dispose();

        // The number is still taken, and what nobody has is not to be had.
        var mine = new CopyPointer { Frame = FrameOf(5), Domain = Self };
        var its = new CopyPointer { Reference = Reference + 2, Domain = GranterId };
        Assert.That(_mapper.Copy(its, mine, 64, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.BadPage));
        Assert.That(_mapper.Copy(mine, its, 64, CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.BadPage));
        Assert.That(Map(GrantMapFlags.Device, 0, out _, Reference + 2), Is.EqualTo(GrantStatus.BadPage));

        Assert.That(_mapper.Unmap(device, 0, bus + Paging.PageSize), Is.EqualTo(GrantStatus.BadDeviceAddress));
        Assert.That(_mapper.Unmap(device, 0, bus), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Unmap(device, 0, bus), Is.EqualTo(GrantStatus.BadHandle));
        ulong moved = _mapper.EntryOf(AddressOf(2)).Frame.Value;
        _mapper.Fake.Write(Request, new UnmapGrantRef { HostAddress = AddressOf(1), NewAddress = AddressOf(2), Handle = replaced });
        Assert.That(_mapper.Op(7), Is.Zero);
        Assert.That(_mapper.Fake.Read<GrantStatus>(Request + UnmapGrantRef.StatusOffset), Is.EqualTo(GrantStatus.Okay));
        Assert.That((_mapper.EntryOf(AddressOf(1)).Frame.Value, _mapper.EntryOf(AddressOf(2)).IsPresent), Is.EqualTo((moved, false)));
        Assert.That(_mapper.Fake.Machine.Shown, Is.Empty);
        _mapper.Audit();
        third.Audit();
        Assert.That(_manager.Domains.Select(static domain => domain.Id.Value), Is.EquivalentTo(new[] { GranterId, MapperId, ThirdId }), "the third has a page");
        third.Dispose();
        Assert.That(_manager.Domains.Select(static domain => domain.Id.Value), Is.EquivalentTo(new[] { MapperId }));
        Assert.That(Map(GrantMapFlags.Device, 0, out _), Is.EqualTo(GrantStatus.BadDomain));
        _mapper.Audit();
    }

    /// <summary>A domain that has shut down is all there until it is destroyed.</summary>
    [Test]
    public void What_a_domain_granted_can_be_used_when_it_has_shut_down()
    {
        const ulong shutdown = 2;
        Grant(Reference, FrameOf(0));
        _granter.Fake.Write(AddressOf(0), 0xddUL);
        _granter.Fake.Write(Request, (uint)ShutdownReason.PowerOff);
        _ = _granter.Fake.Call(HypercallNumber.SchedOp, shutdown, Request);
        Assert.That(_granter.Fake.Domain.IsStopping, Is.True);
        Assert.That(Map(GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        Assert.That(ReadBy(_mapper, AddressOf(1)), Is.EqualTo(0xdd));
        var its = new CopyPointer { Reference = Reference, Domain = GranterId };
        var mine = new CopyPointer { Frame = FrameOf(5), Domain = Self };
        Assert.That(_mapper.Copy(its, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay));
        Assert.That(ReadBy(_mapper, AddressOf(5)), Is.EqualTo(0xdd));
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_granter.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Audit();
    }

    /// <summary>The domain that is asked is there, the one behind its transitive entry is not.</summary>
    [Test]
    public void Behind_a_transitive_entry_a_dead_domain_is_no_page()
    {
        using GrantDomain third = Create(ThirdId);
        Assert.That(_granter.SetVersion(2), Is.EqualTo(Errno.None));
        third.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), GranterId);
        third.PutEntry(Reference + 1, GrantFlags.PermitAccess, FrameOf(1), MapperId);
        *_granter.Table.Entry2(Reference) = new GrantEntry2
        {
            Header = new GrantHeader(GrantFlags.Transitive, MapperId), TransitiveDomain = ThirdId, TransitiveReference = Reference,
        };
        Assert.That(_mapper.Map(Reference + 1, GrantMapFlags.Host, AddressOf(1), out uint handle, ThirdId), Is.EqualTo(GrantStatus.Okay));
        var through = new CopyPointer { Reference = Reference, Domain = GranterId };
        var mine = new CopyPointer { Frame = FrameOf(5), Domain = Self };
        Assert.That(_mapper.Copy(through, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay));
        third.Dispose();
        Assert.That(_mapper.Copy(through, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.BadPage), "its number is taken, its pages are gone");
        Assert.That(_mapper.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_mapper.Copy(through, mine, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.GeneralError), "nobody has its number");
        Assert.That(_granter.Table[Reference].Pin, Is.Zero);
        Audit();
    }

    [Test]
    public void A_domain_that_dies_lets_go_of_what_it_has_mapped()
    {
        Grant(Reference, FrameOf(0));
        Grant(Reference + 1, FrameOf(1));
        (uint, uint)[] before = [(_granter.Uses(FrameOf(0)), _granter.References(FrameOf(0))), (_granter.Uses(FrameOf(1)), _granter.References(FrameOf(1)))];
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.Device, AddressOf(1), out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host | GrantMapFlags.ReadOnly, AddressOf(2), out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Map(GrantMapFlags.Host, AddressOf(3), out _, Reference + 1), Is.EqualTo(GrantStatus.Okay));
        Assert.That(UpdateEntry(AddressOf(3), 0), Is.EqualTo(Errno.None));
        _mapper.Dispose();
        Assert.That(_granter.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Assert.That(_granter.FlagsOf(Reference + 1), Is.EqualTo(GrantFlags.PermitAccess));
        Assert.That((_granter.Table[Reference].Pin, _granter.Table[Reference + 1].Pin), Is.EqualTo((0, 0)));
        (uint, uint)[] after = [(_granter.Uses(FrameOf(0)), _granter.References(FrameOf(0))), (_granter.Uses(FrameOf(1)), _granter.References(FrameOf(1)))];
        Assert.That(after, Is.EqualTo(before));
        _granter.Audit();
    }

    [Test]
    public void Two_domains_that_use_each_others_grants_at_once_do_not_wait_for_each_other()
    {
        Assert.That(_granter.SetVersion(2), Is.EqualTo(Errno.None));
        Assert.That(_mapper.SetVersion(2), Is.EqualTo(Errno.None));
        (GrantDomain From, GrantDomain To, ushort FromId, ushort ToId)[] ways = [(_granter, _mapper, GranterId, MapperId), (_mapper, _granter, MapperId, GranterId)];
        foreach ((GrantDomain from, _, _, ushort to) in ways)
        {
            from.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), to);
            *from.Table.Entry2(Reference + 1) = new GrantEntry2
            {
                Header = new GrantHeader(GrantFlags.Transitive, to),
                TransitiveDomain = to,
                TransitiveReference = Reference,
            };
        }

        Task[] tasks = [.. ways.Select(way => Task.Run(() =>
        {
            for (int i = 0; i < 3000; i++)
            {
                GrantStatus mapped = way.To.Map(Reference, GrantMapFlags.Host, AddressOf(1), out uint handle, way.FromId);
                var through = new CopyPointer { Reference = Reference + 1, Domain = way.FromId };
                var mine = new CopyPointer { Frame = FrameOf(3), Domain = Self };
                _ = way.To.Copy(through, mine, 64, CopyFlags.SourceReference);
                if (mapped == GrantStatus.Okay)
                    Assert.That(way.To.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
            }
        }))];
        Assert.That(Task.WaitAll(tasks, TimeSpan.FromSeconds(60)), Is.True, "nobody hangs");
        Assert.That((_granter.Table[Reference].Pin, _mapper.Table[Reference].Pin), Is.EqualTo((0, 0)));
        Audit();
    }

    private GrantStatus Map(GrantMapFlags flags, ulong address, out uint handle, uint reference = Reference)
        => _mapper.Map(reference, flags, address, out handle, GranterId);

    private void Grant(uint reference, ulong frame) => _granter.PutEntry(reference, GrantFlags.PermitAccess, frame, MapperId);

    private bool Shown(ulong index) => _mapper.Fake.Machine.Shown[new Mfn(FakeMachine.FirstWindowFrame + index)];

    private static ulong ReadBy(GrantDomain domain, ulong address)
    {
        Assert.That(GuestAccess.Read(domain.Context, address, out ulong value), Is.True);
        return value;
    }

    private Errno UpdateEntry(ulong address, ulong value)
        => (Errno)(-_mapper.Fake.Call(HypercallNumber.UpdateVaMapping, address, value));

    private long Mmuext(uint command, ulong frame)
    {
        _mapper.Fake.WriteAll(Request, command, frame, 0);
        return _mapper.Fake.Call(HypercallNumber.MmuextOp, Request, 1, 0, Self);
    }

    private void Audit()
    {
        _granter.Audit();
        _mapper.Audit();
    }

    private GrantDomain Create(ushort id, bool shadow = false)
        => new(change: options => options with { Id = id, ShadowPageTables = shadow }, manager: _manager);
}
