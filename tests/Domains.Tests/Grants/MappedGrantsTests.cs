// Pages of a request that back ends map and unmap in one turn.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using static XenSharp.Domains.Tests.Grants.GrantDomain;

namespace XenSharp.Domains.Tests.Grants;

public sealed unsafe class MappedGrantsTests
{
    private const uint Reference = 100;
    private const int Pages = 24;

    private GrantDomain _guest = null!;

    private BackendGrants Granted => _guest.Fake.Domain.Granted;

    [SetUp]
    public void SetUp()
    {
        _guest = new GrantDomain();
        Grant();
    }

    [TearDown]
    public void TearDown() => _guest.Dispose();

    [TestCase(false, 1)]
    [TestCase(true, 1)]
    [TestCase(true, 2)]
    public void Pages_are_the_back_ends_until_they_are_unmapped(bool writable, int version)
    {
        // The change empties the table.
        Assert.That(_guest.SetVersion((uint)version), Is.EqualTo(Errno.None));
        Grant();
        (uint, uint) before = (_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0)));
        MappedGrants mapped = Granted.Prepare();

        // More than fit at first, the same reference and the same page more than once; and then fewer again.
        foreach (int count in new[] { Pages + 1, 3 })
        {
            uint[] references = [.. Enumerable.Range(0, count).Select(static i => Reference + (uint)(i % Pages))];
            Assert.That(mapped.TryMap(references, writable), Is.EqualTo(GrantStatus.Okay));
            Assert.That(mapped.Count, Is.EqualTo(count));
            for (int i = 0; i < count; i++)
            {
                _guest.Fake.Write(AddressOf((uint)(i % Pages % 4)) + 8, 0x1234UL + (ulong)i);
                Assert.That(*(ulong*)(mapped.AddressOf(i) + 8), Is.EqualTo(0x1234 + i));
            }

            Assert.That(() => mapped.AddressOf(count), Throws.TypeOf<ArgumentOutOfRangeException>());
            Assert.That(() => mapped.TryMap(references, writable), Throws.TypeOf<InvalidOperationException>());
            uint holds = (uint)references.Count(static reference => (reference - Reference) % 4 == 0);
            Assert.That(
                (_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))),
                Is.EqualTo((before.Item1 + (writable ? holds : 0), before.Item2 + holds)));
            _guest.Audit();
            mapped.Unmap();
            mapped.Dispose();
            Assert.That(mapped.Count, Is.Zero);
            Assert.That((_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))), Is.EqualTo(before));
            Assert.That(_guest.Table[Reference].Pin, Is.Zero);
            if (version == 1)
                Assert.That(_guest.FlagsOf(Reference), Is.EqualTo(GrantFlags.PermitAccess));
            _guest.Audit();
        }
    }

    [Test]
    public void All_are_mapped_or_none()
    {
        _guest.PutEntry(Reference + 4, GrantFlags.PermitAccess, FrameOf(0), domain: 5);
        _guest.PutEntry(Reference + 5, GrantFlags.PermitAccess | GrantFlags.ReadOnly, FrameOf(0), domain: 0);
        _guest.PutEntry(Reference + 6, GrantFlags.PermitAccess, _guest.Context->State->KernelRoot, domain: 0);
        _guest.PutEntry(Reference + 7, GrantFlags.PermitAccess, 0x12345, domain: 0);
        (uint, uint) before = (_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0)));
        using MappedGrants mapped = Granted.Prepare();
        foreach ((uint reference, GrantStatus expected) in new (uint, GrantStatus)[]
        {
            (Reference + 4, GrantStatus.GeneralError), (Reference + 5, GrantStatus.GeneralError), (Reference + 6, GrantStatus.GeneralError),
            (Reference + 7, GrantStatus.BadPage), (uint.MaxValue, GrantStatus.BadReference), (7, GrantStatus.GeneralError),
        })
        {
            foreach (uint[] references in new uint[][] { [reference], [Reference, Reference, reference, Reference + 1], [Reference + 1, Reference, reference] })
            {
                Assert.That(mapped.TryMap(references, writable: true), Is.EqualTo(expected), $"{reference}");
                Assert.That(mapped.Count, Is.Zero);
                Assert.That(_guest.Table[Reference].Pin + _guest.Table[Reference + 1].Pin, Is.Zero);
                Assert.That((_guest.Uses(FrameOf(0)), _guest.References(FrameOf(0))), Is.EqualTo(before));
            }
        }

        Assert.That(mapped.TryMap([], writable: true), Is.EqualTo(GrantStatus.Okay));
        Assert.That(mapped.TryMap([Reference + 5, Reference], writable: false), Is.EqualTo(GrantStatus.Okay));
        mapped.Unmap();
        _guest.Audit();
    }

    [Test]
    public void A_domain_that_dies_leaves_the_memory_to_who_has_it()
    {
        var manager = new DomainManager();
        var guest = new GrantDomain(manager: manager);
        guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), domain: 0);
        guest.PutEntry(Reference + 1, GrantFlags.PermitAccess, FrameOf(1), domain: 0);
        MappedGrants mapped = guest.Fake.Domain.Granted.Prepare();
        MappedGrants others = guest.Fake.Domain.Granted.Prepare();
        guest.Fake.Write(AddressOf(1), 0x1234UL);
        Assert.That(mapped.TryMap([Reference, Reference + 1], writable: true), Is.EqualTo(GrantStatus.Okay));
        Assert.That(others.TryMap([Reference + 1], writable: false), Is.EqualTo(GrantStatus.Okay));
        guest.Dispose();
        Assert.That(*(ulong*)mapped.AddressOf(1), Is.EqualTo(0x1234));
        *mapped.AddressOf(0) = 1;
        others.Unmap();
        Assert.That(others.TryMap([Reference], writable: true), Is.EqualTo(GrantStatus.BadDomain));
        Assert.That(manager.Domains, Has.Count.EqualTo(1));
        mapped.Unmap();
        Assert.That(manager.Domains, Is.Empty);
    }

    [Test]
    public void A_page_that_was_a_page_table_is_forgotten_before_it_is_written_to()
    {
        using var guest = new GrantDomain(change: static options => options with { ShadowPageTables = true });
        guest.PutEntry(Reference, GrantFlags.PermitAccess, FrameOf(0), domain: 0);
        guest.Context->Domain->MarkShadowed(new Mfn(FrameOf(0)));
        using MappedGrants mapped = guest.Fake.Domain.Granted.Prepare();
        Assert.That(mapped.TryMap([Reference], writable: false), Is.EqualTo(GrantStatus.Okay));
        Assert.That(guest.Fake.Machine.Forgotten, Is.Zero);
        mapped.Unmap();
        Assert.That(mapped.TryMap([Reference], writable: true), Is.EqualTo(GrantStatus.Okay));
        Assert.That((guest.Fake.Machine.Forgotten, guest.Context->Domain->MayBeShadowed(new Mfn(FrameOf(0)))), Is.EqualTo((1, false)));
        mapped.Unmap();
        guest.Audit();
    }

    [Test]
    public void Back_ends_map_while_the_domain_goes() => UseWhileItGoes(Reference, static granted =>
    {
        MappedGrants mapped = granted.Prepare();
        uint[] references = new uint[6];
        return random =>
        {
            bool writable = random.Next(2) == 0;
            foreach (ref uint reference in references.AsSpan())
                reference = Reference + (uint)random.Next(8);
            GrantStatus status = mapped.TryMap(references, writable);
            if (status != GrantStatus.Okay)
                return status;
            if (writable)
                *mapped.AddressOf(0) = 1;
            Assert.That(mapped.AddressOf(5)[1], Is.Zero, "also when the domain is gone");
            mapped.Unmap();
            return status;
        };
    });

    private void Grant()
    {
        for (uint i = 0; i < Pages; i++)
            _guest.PutEntry(Reference + i, GrantFlags.PermitAccess, FrameOf(i % 4), domain: 0);
    }
}
