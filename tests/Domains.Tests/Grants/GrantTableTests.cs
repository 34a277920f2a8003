// A domain's own grants: what holds pages, what the guest sees of it, limits, and guests that change entries meanwhile.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Runtime;
using XenSharp.Mmu;
using static XenSharp.Domains.Tests.Grants.GrantDomain;

namespace XenSharp.Domains.Tests.Grants;

public sealed unsafe class GrantTableTests
{
    private const uint Reference = 100;
    private const GrantFlags InUse = GrantFlags.Reading | GrantFlags.Writing;

    private GrantDomain _guest = null!;

    [SetUp]
    public void SetUp() => _guest = new GrantDomain();

    [TearDown]
    public void TearDown() => _guest.Dispose();

    [Test]
    public void The_rings_are_granted_to_the_manager_from_the_start()
    {
        foreach ((uint reference, Mfn frame) in ((uint, Mfn)[])[(0, _guest.Fake.Domain.Layout.Console), (1, _guest.Fake.Domain.Layout.Store)])
        {
            GrantEntry1 entry = *_guest.Table.Entry1(reference);
            Assert.That((entry.Header, (ulong)entry.Frame), Is.EqualTo((new GrantHeader(GrantFlags.PermitAccess | InUse, 0), frame.Value)));

            // In use by another, so nobody else's.
            Assert.That(_guest.Map(reference, GrantMapFlags.Host, AddressOf(0), out _), Is.EqualTo(GrantStatus.GeneralError));
        }

        Assert.That(_guest.Map(5, GrantMapFlags.Host, AddressOf(0), out _, domain: 0), Is.EqualTo(GrantStatus.GeneralError), "domain 0 grants nothing");
        Assert.That(_guest.Map(512, GrantMapFlags.Host, AddressOf(0), out _, domain: 0), Is.EqualTo(GrantStatus.BadReference));
        _guest.Audit();
    }

    [Test]
    public void The_guest_is_told_of_limits_that_its_table_was_given_and_gets_no_further()
    {
        using var guest = new GrantDomain(change: static options => options with { GrantLimits = new GrantLimits { Frames = 2, HandlePages = 0, Version = 1 } });
        Assert.That(guest.Setup(3, out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(guest.Setup(2, out ulong[] frames), Is.EqualTo(GrantStatus.Okay));
        Assert.That(frames[1], Is.EqualTo(guest.Table.Frame(1).Value));
        guest.Fake.Write(Request, new QuerySize { Domain = Self });
        Assert.That(guest.Op(6), Is.Zero);
        QuerySize size = guest.Fake.Read<QuerySize>(Request);
        Assert.That((size.Status, size.FrameCount, size.MaxFrames), Is.EqualTo((GrantStatus.Okay, 2, 2)));

        // As before there was a version 2 (gnttab_set_version); the version that there is comes back.
        Assert.That(guest.SetVersion(2), Is.EqualTo(Errno.ENOSYS));
        Assert.That(guest.Fake.Read<uint>(Request), Is.EqualTo(1));
        guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));
        Assert.That(guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out _), Is.EqualTo(GrantStatus.NoSpace), "it may have no handle");
        guest.Audit();
    }

    [TestCase(1)]
    [TestCase(2)]
    public void A_mapping_holds_its_page_until_it_is_unmapped(int version)
    {
        Assert.That(_guest.SetVersion((uint)version), Is.EqualTo(Errno.None));
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));
        uint uses = _guest.Uses(FrameOf(0));
        uint references = _guest.References(FrameOf(0));
        ulong replaced = _guest.EntryOf(AddressOf(1)).Frame.Value;
        Assert.That(_guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out uint writable), Is.EqualTo(GrantStatus.Okay));
        const PageFlags kernel = PageFlags.Present | PageFlags.User | PageFlags.GuestKernel | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
        Assert.That(_guest.EntryOf(AddressOf(1)), Is.EqualTo(new PageTableEntry(new Mfn(FrameOf(0)), kernel | PageFlags.Writable)));
        Assert.That((_guest.Uses(FrameOf(0)) - uses, _guest.References(FrameOf(0)) - references), Is.EqualTo((1, 1)));
        Assert.That(_guest.References(replaced), Is.EqualTo(1), "only its owner's");
        _guest.Audit();

        const GrantMapFlags forUser = GrantMapFlags.Host | GrantMapFlags.ReadOnly | GrantMapFlags.Application | GrantMapFlags.ContainsPte;
        ulong entry = _guest.EntryAddressOf(AddressOf(2)).Value;
        Assert.That(_guest.Map(Reference, forUser | (GrantMapFlags)(5 << 16), entry, out uint readOnly), Is.EqualTo(GrantStatus.Okay));
        const PageFlags user = PageFlags.Present | PageFlags.User | PageFlags.Global | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
        Assert.That(
            _guest.EntryOf(AddressOf(2)), Is.EqualTo(new PageTableEntry(new Mfn(FrameOf(0)), user | PageFlags.Available0 | PageFlags.Available2)));
        Assert.That((_guest.Uses(FrameOf(0)) - uses, _guest.References(FrameOf(0)) - references), Is.EqualTo((1, 2)));
        Assert.That(_guest.SetVersion(3 - (uint)version), Is.EqualTo(Errno.EBUSY));
        _guest.Audit();

        Assert.That(_guest.Unmap(writable, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.EntryOf(AddressOf(1)), Is.EqualTo(default(PageTableEntry)));
        Assert.That(_guest.Unmap(readOnly, entry), Is.EqualTo(GrantStatus.Okay));
        Assert.That((_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))), Is.EqualTo((uses, references)));
        Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Assert.That(_guest.SetVersion(3 - (uint)version), Is.EqualTo(Errno.None));
        _guest.Audit();
    }

    [Test]
    public void An_unmap_that_cannot_be_read_does_nothing()
    {
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));
        Assert.That(_guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Op(1, requests: 0x1000), Is.EqualTo(-(long)Errno.EFAULT));
        _guest.Audit();
        Assert.That(_guest.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Op(1, requests: 0x1000), Is.EqualTo(-(long)Errno.EFAULT));
        Assert.That(_guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out _), Is.EqualTo(GrantStatus.Okay));
        _guest.Audit();
    }

    [Test]
    public void A_mapping_for_a_device_holds_its_page()
    {
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));
        uint references = _guest.References(FrameOf(0));
        Assert.That(_guest.Map(Reference, GrantMapFlags.Device | GrantMapFlags.Host, AddressOf(1), out uint both), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Map(Reference, GrantMapFlags.Device | GrantMapFlags.ReadOnly, 0, out uint reader), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.References(FrameOf(0)) - references, Is.EqualTo(3));
        _guest.Audit();
        ulong bus = FrameOf(0) << 12;
        Assert.That(_guest.Unmap(both, 0, bus + 0x1000), Is.EqualTo(GrantStatus.BadDeviceAddress));
        Assert.That(_guest.Unmap(both, 0, bus), Is.EqualTo(GrantStatus.Okay));
        _guest.Audit();
        Assert.That(_guest.Unmap(both, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Unmap(both, AddressOf(1)), Is.EqualTo(GrantStatus.BadHandle));
        Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess | GrantFlags.Reading));
        Assert.That(_guest.Unmap(reader, 0, bus), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.References(FrameOf(0)), Is.EqualTo(references));
        _guest.Audit();
    }

    [Test]
    public void A_page_table_is_granted_for_reading_only()
    {
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, _guest.Context->State->KernelRoot);
        Assert.That(_guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(_guest.Map(Reference, GrantMapFlags.Device, 0, out _), Is.EqualTo(GrantStatus.GeneralError));
        var table = new CopyPointer { Reference = Reference, Domain = Self };
        var page = new CopyPointer { Frame = FrameOf(0), Domain = Self };
        Assert.That(_guest.Copy(page, table, 8, CopyFlags.DestinationReference), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(_guest.Table[Reference].Pin, Is.Zero);
        Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        _guest.Audit();
        Assert.That(_guest.Copy(table, page, 8, CopyFlags.SourceReference), Is.EqualTo(GrantStatus.Okay));
        _guest.Audit();
    }

    [Test]
    public void A_copy_into_what_was_a_page_table_is_repeated_inside_the_VM()
    {
        using var guest = new GrantDomain(change: static options => options with { ShadowPageTables = true });
        guest.Context->Domain->MarkShadowed(new Mfn(FrameOf(1)));
        guest.Context->PageTableWrites->Count = 0;
        guest.Fake.Write(AddressOf(0) + 8, 0x1234UL);
        var source = new CopyPointer { Frame = FrameOf(0), Domain = Self, Offset = 8 };
        Assert.That(guest.Copy(source, new CopyPointer { Frame = FrameOf(1), Domain = Self, Offset = 16 }, 8, CopyFlags.None), Is.EqualTo(GrantStatus.Okay));
        Assert.That(guest.Fake.Read<ulong>(AddressOf(1) + 16), Is.EqualTo(0x1234));
        Assert.That(guest.Context->PageTableWrites->Count, Is.EqualTo(1));
        PageTableWriteQueue.Run run = (*guest.Context->PageTableWrites)[0];
        Assert.That((run.Address, run.Count), Is.EqualTo(((FrameOf(1) << 12) + 16, 1UL)));
    }

    [Test]
    public void A_table_grows_to_its_limit_and_no_further()
    {
        Assert.That(_guest.Setup(65, out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(_guest.SetVersion(2), Is.EqualTo(Errno.None));
        Assert.That(_guest.Setup(64, out ulong[] frames), Is.EqualTo(GrantStatus.Okay));
        Assert.That(frames, Is.Unique);
        Assert.That((_guest.Table.FrameCount, _guest.Table.StatusFrameCount, _guest.Table.EntryCount), Is.EqualTo((64, 8, 64 * 256)));
        _guest.PutEntry((64 * 256) - 1, GrantFlags.PermitAccess, FrameOf(0));
        Assert.That(_guest.Map((64 * 256) - 1, GrantMapFlags.Host, AddressOf(1), out uint handle), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        _guest.Audit();
        Assert.That(_guest.SetVersion(1), Is.EqualTo(Errno.None));
        Assert.That(_guest.Table.StatusFrameCount, Is.Zero);
        _guest.Audit();
    }

    [Test]
    public void A_table_without_room_stays_as_it_was()
    {
        using var guest = new GrantDomain(spareFrames: 4);
        Assert.That(guest.Setup(10, out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(guest.Table.FrameCount, Is.EqualTo(1));
        Assert.That(guest.Setup(2, out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(guest.SetVersion(2), Is.EqualTo(Errno.None));
        Assert.That(guest.Setup(3, out _), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That((guest.Table.FrameCount, guest.Table.StatusFrameCount), Is.EqualTo((2, 1)));
        guest.Audit();
    }

    [Test]
    public void Status_frames_that_are_mapped_stay()
    {
        Assert.That(_guest.Setup(9, out _), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.SetVersion(2), Is.EqualTo(Errno.None));
        Assert.That(_guest.Table.StatusFrameCount, Is.EqualTo(2));
        FrameTable* frames = FrameTable.Of(_guest.Context->Domain);
        FrameInfo* last = frames->GetPage(_guest.Table.StatusFrame(1), Id);
        Assert.That(_guest.SetVersion(1), Is.EqualTo(Errno.EBUSY));
        Assert.That((_guest.Table.Version, _guest.Table.StatusFrameCount), Is.EqualTo((2, 2)));
        frames->PutPage(last);
        _guest.Audit();
        ulong free = frames->FreeCount;
        Assert.That(_guest.SetVersion(1), Is.EqualTo(Errno.None));
        Assert.That(frames->FreeCount, Is.EqualTo(free + 2));
        _guest.Audit();
    }

    [Test]
    public void Operations_on_many_are_continued()
    {
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));
        for (uint i = 0; i < 3; i++)
            _guest.Fake.Write(Request + (i * 32), MapRequest(Reference, GrantMapFlags.Device, 0));
        AssertContinued(0, 3, done: 1, size: 32);
        for (uint i = 0; i < 3; i++)
        {
            _guest.Fake.Write(
                Request + (i * 40),
                new CopyRequest { Source = { Frame = FrameOf(0), Domain = Self }, Destination = { Frame = FrameOf(1), Domain = Self } });
        }

        AssertContinued(5, 3, done: 1, size: 40);
        AssertContinued(11, 3, done: 1, size: 12);
        new Span<byte>(_guest.Fake.Host(Request), 0x400).Clear();
        AssertContinued(1, 40, done: 32, size: 24);
        AssertContinued(12, 3, done: 1, size: 16);
    }

    [Test]
    public void Handles_of_each_vCPU_go_round()
    {
        using var handles = new GrantHandles(2, 1);
        for (uint i = 0; i < GrantHandles.PerPage - 1; i++)
            Assert.That(handles.Take(0), Is.EqualTo(i));
        Assert.That(handles.Take(0), Is.EqualTo(GrantHandles.Invalid), "the last stays");
        Assert.That(handles.Take(1), Is.EqualTo(GrantHandles.Invalid));
        handles.Return(7);
        handles.Return(3);
        Assert.That(handles.Take(0), Is.EqualTo(GrantHandles.PerPage - 1));

        // vCPU 1 gets one that it keeps, and finds no other.
        Assert.That(handles.Take(1), Is.EqualTo(GrantHandles.Invalid));
        handles.Return(9);
        handles.Return(11);
        Assert.That(handles.Take(1), Is.EqualTo(3));
        handles.Return(3);
        Assert.That(handles.Take(1), Is.EqualTo(7), "it went back to vCPU 1");
    }

    [TestCase(1)]
    [TestCase(2)]
    public void What_is_revoked_unseen_is_not_in_use(int version)
    {
        Assert.That(_guest.SetVersion((uint)version), Is.EqualTo(Errno.None));
        int revoked = 0;
        int refused = 0;
        bool stop = false;
        string? broken = null;
        var permit = new GrantHeader(GrantFlags.PermitAccess, Id);
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0));

        // As Linux ends a grant (gnttab_end_foreign_access_ref_v1 and _v2).
        var other = new Thread(() =>
        {
            uint* header = version == 1 ? (uint*)_guest.Table.Entry1(Reference) : (uint*)_guest.Table.Entry2(Reference);
            var status = (ushort*)(version == 1 ? null : _guest.Context->Domain->Memory.Page(_guest.Table.StatusFrame(0))) + Reference;
            while (!Volatile.Read(ref stop))
            {
                bool done;
                if (version == 1)
                {
                    done = Interlocked.CompareExchange(ref *header, 0, permit.Value) == permit.Value;
                }
                else
                {
                    _ = Interlocked.Exchange(ref *header, 0);
                    done = ((GrantFlags)Volatile.Read(ref *status) & InUse) == 0;
                }

                if (!done)
                {
                    refused++;
                }
                else
                {
                    revoked++;
                    lock (_guest.Table.Lock)
                    {
                        if (_guest.Table[Reference].Pin != 0)
                            broken = "revoked, and in use";
                    }
                }

                if (version == 2 || done)
                    _ = Interlocked.Exchange(ref *header, permit.Value);
                Thread.SpinWait(revoked % 50);
            }
        });
        other.Start();
        int mapped = 0;
        long end = Environment.TickCount64 + 1000;
        while (Environment.TickCount64 < end)
        {
            if (_guest.Map(Reference, GrantMapFlags.Host, AddressOf(1), out uint handle) != GrantStatus.Okay)
                continue;
            mapped++;
            Assert.That(_guest.Unmap(handle, AddressOf(1)), Is.EqualTo(GrantStatus.Okay));
        }

        Volatile.Write(ref stop, true);
        other.Join();
        Assert.That(broken, Is.Null);
        Assert.That((mapped > 0, revoked > 0, refused > 0), Is.EqualTo((true, true, true)), "all of it was seen");
        _guest.Audit();
    }

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    public void Whatever_a_guest_asks_the_books_agree(int seed)
    {
        var random = new Random(seed);
        var handles = new List<uint>();
        uint Pick() => 90u + (uint)random.Next(12);
        ulong Frame() => random.Next(8) switch
        {
            0 => _guest.Context->State->KernelRoot,
            1 => _guest.EntryAddressOf(AddressOf(0)).Frame.Value,
            2 => _guest.Table.Frame(0).Value,
            3 => (ulong)random.NextInt64(),
            _ => FrameOf((ulong)random.Next(6)),
        };
        ushort Domain() => (ushort)(random.Next(12) switch { 0 => 0, 1 => Self, 2 => 9, _ => Id });
        var flags = (GrantFlags[])[
            GrantFlags.PermitAccess, GrantFlags.PermitAccess, GrantFlags.PermitAccess | GrantFlags.ReadOnly, GrantFlags.AcceptTransfer, GrantFlags.Transitive,
            GrantFlags.PermitAccess | GrantFlags.SubPage, GrantFlags.Invalid, (GrantFlags)0xffff];
        for (int i = 0; i < 4000; i++)
        {
            ulong address = AddressOf((ulong)random.Next(8, 16));
            ulong where = random.Next(3) == 0 ? _guest.EntryAddressOf(address).Value : address;
            switch (random.Next(12))
            {
                case 0 or 1:
                    _guest.PutEntry(Pick(), flags[random.Next(flags.Length)], Frame(), Domain());
                    break;
                case 2 or 3 or 4:
                    if (_guest.Map(Pick(), (GrantMapFlags)random.Next(32), where, out uint handle, Domain()) == GrantStatus.Okay)
                        handles.Add(handle);
                    break;
                case 5 or 6:
                    if (handles.Count > 0)
                    {
                        uint victim = handles[random.Next(handles.Count)];
                        Mfn frame = new(_guest.Table[_guest.Table.Handles[victim].Reference % 512].Frame);
                        _ = _guest.Unmap(victim, where, random.Next(2) == 0 ? frame.Address.Value : 0);
                    }

                    break;
                case 7:
                    ulong from = AddressOf((ulong)random.Next(8, 16));
                    _guest.Fake.Write(Request, new UnmapGrantRef { Handle = (uint)random.Next(300), HostAddress = where, NewAddress = from });
                    Assert.That(_guest.Op(7), Is.Zero);
                    break;
                case 8:
                    ulong source = random.Next(2) == 0 ? Pick() : Frame();
                    ulong destination = random.Next(2) == 0 ? Pick() : FrameOf((ulong)random.Next(6));
                    _ = _guest.Copy(
                        new CopyPointer { Frame = source, Domain = Domain(), Offset = (ushort)random.Next(4096) },
                        new CopyPointer { Frame = destination, Domain = Domain(), Offset = (ushort)random.Next(4096) },
                        (ushort)random.Next(300), (CopyFlags)random.Next(4));
                    break;
                case 9:
                    ulong given = FrameOf((ulong)random.Next(6));
                    _guest.Fake.Write(Request, new TransferFrame { Frame = given, Domain = Domain() == Self ? (ushort)9 : Id, Reference = Pick() });
                    Assert.That(_guest.Op(4), Is.Zero);
                    break;
                case 10:
                    _ = _guest.SetVersion((uint)random.Next(1, 3));
                    break;
                default:
                    // Over a mapping, maybe.
                    ulong entry = random.Next(2) == 0 ? 0 : (FrameOf((ulong)random.Next(6)) << 12) | 0x63;
                    _ = _guest.Fake.Call(HypercallNumber.UpdateVaMapping, address, entry, 2);
                    break;
            }

            if (i % 8 == 0)
                _guest.Audit();
        }

        Assert.That(handles, Is.Not.Empty);
    }

    /// <summary>With a kick pending, an operation stops after its first part and says what is left.</summary>
    private void AssertContinued(uint operation, uint count, uint done, uint size)
    {
        *_guest.Context->KickPending = 1;
        Assert.That(_guest.Op(operation, count), Is.Zero);
        *_guest.Context->KickPending = 0;
        Assert.That(_guest.Context->Continuation.Pending, Is.EqualTo(1));
        _guest.Context->Continuation.Pending = 0;
        HypercallArguments rest = _guest.Context->Continuation.Arguments;
        Assert.That((rest.A0, rest.A1, rest.A2), Is.EqualTo(((ulong)operation, Request + (done * size), (ulong)(count - done))));
    }
}
