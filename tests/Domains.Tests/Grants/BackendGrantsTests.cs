// What back ends in this process do with a domain's grants to domain 0.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Runtime;
using XenSharp.EventChannels;
using static XenSharp.Domains.Tests.Grants.GrantDomain;

namespace XenSharp.Domains.Tests.Grants;

public sealed unsafe class BackendGrantsTests
{
    private const uint Reference = 100;
    private const GrantFlags InUse = GrantFlags.Reading | GrantFlags.Writing;

    private GrantDomain _guest = null!;

    private BackendGrants Granted => _guest.Fake.Domain.Granted;

    [SetUp]
    public void SetUp() => _guest = new GrantDomain();

    [TearDown]
    public void TearDown() => _guest.Dispose();

    [TestCase(1)]
    [TestCase(2)]
    public void A_page_is_the_back_ends_until_it_is_disposed(int version)
    {
        Assert.That(_guest.SetVersion((uint)version), Is.EqualTo(Errno.None));
        Grant(Reference, FrameOf(0));
        (uint, uint) before = (_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0)));
        _guest.Fake.Write(AddressOf(0) + 8, 0x1234UL);
        Assert.That(Granted.TryMap(Reference, writable: true, out MappedGrant? mapping), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Granted.TryMap(Reference, writable: false, out MappedGrant? reader), Is.EqualTo(GrantStatus.Okay));
        Assert.That((*(ulong*)(mapping!.Address + 8), mapping.Span.Length, mapping.IsWritable), Is.EqualTo((0x1234, 4096, true)));
        *(ulong*)mapping.Address = 0x5678;
        Assert.That(_guest.Fake.Read<ulong>(AddressOf(0)), Is.EqualTo(0x5678));
        if (version == 1)
            Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess | InUse));
        Assert.That(_guest.SetVersion(3 - (uint)version), Is.EqualTo(Errno.EBUSY));
        Assert.That((_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))), Is.EqualTo((before.Item1 + 1, before.Item2 + 2)));
        _guest.Audit();
        mapping.Dispose();
        mapping.Dispose();
        Assert.That(_guest.SetVersion(3 - (uint)version), Is.EqualTo(Errno.EBUSY), "it is read still");
        reader!.Dispose();
        Assert.That((_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))), Is.EqualTo(before));
        Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        Assert.That(_guest.SetVersion(3 - (uint)version), Is.EqualTo(Errno.None));
        _guest.Audit();
    }

    [Test]
    public void Only_what_is_granted_to_domain_0_is_mapped()
    {
        _guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), domain: 5);
        _guest.PutEntry(Reference + 1, GrantFlags.PermitAccess | GrantFlags.ReadOnly, FrameOf(0), domain: 0);
        _guest.PutEntry(Reference + 2, GrantFlags.PermitAccess, _guest.Context->State->KernelRoot, domain: 0);
        _guest.PutEntry(Reference + 3, GrantFlags.PermitAccess, 0x12345, domain: 0);
        foreach ((uint reference, GrantStatus expected) in new (uint, GrantStatus)[]
        {
            (Reference, GrantStatus.GeneralError), (Reference + 1, GrantStatus.GeneralError), (Reference + 2, GrantStatus.GeneralError),
            (Reference + 3, GrantStatus.BadPage), (uint.MaxValue, GrantStatus.BadReference), (7, GrantStatus.GeneralError),
        })
        {
            Assert.That(Granted.TryMap(reference, writable: true, out MappedGrant? none), Is.EqualTo(expected), $"{reference}");
            Assert.That(none, Is.Null);
            Assert.That(Granted.CopyTo(reference, 0, new byte[8]), Is.EqualTo(expected), $"{reference}");
        }

        Grant(Reference + 4, FrameOf(1));
        using MappedGrants mappings = Granted.Prepare();
        Assert.That(mappings.TryMap([Reference + 4, Reference + 4, Reference], writable: true), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(mappings.Count, Is.Zero);
        Assert.That(_guest.Table[Reference + 4].Pin, Is.Zero);
        Assert.That(mappings.TryMap([Reference + 4, Reference + 4, Reference + 1], writable: false), Is.EqualTo(GrantStatus.Okay));
        _guest.Audit();
        mappings.Unmap();
        _guest.Audit();
    }

    [Test]
    public void Contents_are_copied_by_reference()
    {
        Assert.That(_guest.SetVersion(2), Is.EqualTo(Errno.None));
        Grant(Reference, FrameOf(0));
        *_guest.Table.Entry2(Reference + 1) = new GrantEntry2
        {
            Header = new GrantHeader(GrantFlags.PermitAccess | GrantFlags.SubPage, 0), PageOffset = 64, Length = 16, Frame = FrameOf(0),
        };
        Assert.That(Granted.CopyTo(Reference, 4088, [1, 2, 3, 4, 5, 6, 7, 8]), Is.EqualTo(GrantStatus.Okay));
        Assert.That(_guest.Fake.Read<ulong>(AddressOf(0) + 4088), Is.EqualTo(0x0807060504030201));
        byte[] read = new byte[4];
        Assert.That(Granted.CopyFrom(Reference, 4090, read), Is.EqualTo(GrantStatus.Okay));
        Assert.That(read, Is.EqualTo(new byte[] { 3, 4, 5, 6 }));
        Assert.That(Granted.CopyFrom(Reference, 4093, read), Is.EqualTo(GrantStatus.BadCopyArgument));
        Assert.That(Granted.CopyFrom(Reference, -1, read), Is.EqualTo(GrantStatus.BadCopyArgument));
        Assert.That(Granted.CopyTo(Reference + 1, 64, new byte[16]), Is.EqualTo(GrantStatus.Okay));
        Assert.That(Granted.CopyTo(Reference + 1, 65, new byte[16]), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(Granted.CopyFrom(Reference + 1, 63, read), Is.EqualTo(GrantStatus.GeneralError));
        Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
        _guest.Audit();
    }

    [Test]
    public void A_domain_that_dies_leaves_the_memory_to_who_has_it()
    {
        var manager = new DomainManager();
        var guest = new GrantDomain(manager: manager);
        guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), domain: 0);
        BackendGrants granted = guest.Fake.Domain.Granted;
        guest.Fake.Write(AddressOf(0), 0x1234UL);
        Assert.That(granted.TryMap(Reference, writable: true, out MappedGrant? mapping), Is.EqualTo(GrantStatus.Okay));
        guest.Dispose();
        Assert.That(*(ulong*)mapping!.Address, Is.EqualTo(0x1234));
        *(ulong*)mapping.Address = 1;
        Assert.That(manager.Domains, Has.Count.EqualTo(1));
        Assert.That(granted.TryMap(Reference, writable: true, out _), Is.EqualTo(GrantStatus.BadDomain));
        Assert.That(granted.CopyTo(Reference, 0, new byte[1]), Is.EqualTo(GrantStatus.BadDomain));
        mapping.Dispose();
        Assert.That(manager.Domains, Is.Empty);
    }

    [Test]
    public void Back_ends_map_while_the_domain_goes() => UseWhileItGoes(Reference, static granted =>
    {
        byte[] buffer = new byte[64];
        return random =>
        {
            uint reference = Reference + (uint)random.Next(8);
            GrantStatus status = granted.TryMap(reference, random.Next(2) == 0, out MappedGrant? mapping);
            if (status != GrantStatus.Okay)
                return status;
            if (mapping!.IsWritable)
                *mapping.Address = 1;
            _ = granted.CopyFrom(reference, 0, buffer);
            Assert.That(mapping.Span[1], Is.Zero, "also when the domain is gone");
            mapping.Dispose();
            return status;
        };
    });

    [Test]
    public void A_page_that_was_a_page_table_is_forgotten_before_it_is_written_to()
    {
        using var guest = new GrantDomain(change: static options => options with { ShadowPageTables = true });
        guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), domain: 0);
        guest.Context->Domain->MarkShadowed(new Mfn(FrameOf(0)));
        Assert.That(guest.Fake.Domain.Granted.TryMap(Reference, writable: false, out MappedGrant? reader), Is.EqualTo(GrantStatus.Okay));
        Assert.That(guest.Fake.Machine.Forgotten, Is.Zero);
        Assert.That(guest.Fake.Domain.Granted.TryMap(Reference, writable: true, out MappedGrant? writer), Is.EqualTo(GrantStatus.Okay));
        Assert.That((guest.Fake.Machine.Forgotten, guest.Context->Domain->MayBeShadowed(new Mfn(FrameOf(0)))), Is.EqualTo((1, false)));
        reader!.Dispose();
        writer!.Dispose();
        guest.Audit();
    }

    [Test]
    public void A_back_end_is_connected_to_a_port_that_waits_for_it()
    {
        const ulong allocUnbound = 6;
        _guest.Fake.Write(Request, (uint)Self);
        Assert.That(_guest.Fake.Call(HypercallNumber.EventChannelOp, allocUnbound, Request), Is.Zero);
        uint port = _guest.Fake.Read<uint>(Request + 4);
        Assert.That(_guest.Fake.Domain.TryConnect(port, out EventChannelBackend? backend), Is.True);
        Assert.That(_guest.Fake.Domain.TryConnect(port, out _), Is.False);
        Assert.That(backend!.GuestPort.Value, Is.EqualTo(port));
        backend.Dispose();
    }

    private void Grant(uint reference, ulong frame) => _guest.PutEntry(reference, GrantFlags.PermitAccess, frame, domain: 0);
}
