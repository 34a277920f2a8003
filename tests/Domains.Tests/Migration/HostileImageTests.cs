using System.Buffers.Binary;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;
using XenSharp.Domains.Migration;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>Images that are damaged, or made to do harm: each is refused with a sentence, or gives a domain whose books agree.</summary>
internal sealed unsafe class HostileImageTests
{
    private const ulong Present = (ulong)PageFlags.Present;

    private byte[] _image = null!;
    private ImageParts _parts = null!;
    private ulong _startInfo, _table, _root, _list;

    [OneTimeSetUp]
    public void Save()
    {
        using SuspendingGuest guest = SuspendingGuest.Build();
        guest.Suspend();
        _image = guest.Save();
        _parts = ImageParts.Of(_image);
        _startInfo = guest.PfnOf(guest.Domain.Layout.StartInfo);
        _root = guest.PfnOf(new Mfn(guest.Context->State->KernelRoot));
        _table = _parts.Pages.First(static page => page.Value.Type == (PageInfoType)1).Key;
        _list = MemoryMarshal.Read<ulong>(_parts.Single(RecordType.PvP2MFrames).AsSpan(8));
    }

    [Test]
    public void The_image_itself_is_good()
    {
        using SuspendingGuest guest = SuspendingGuest.Restore(_image);
        Assert.That(guest.Domain.AuditFrames(), Is.Null);
    }

    [Test]
    public void Every_record_but_a_few_is_missed()
    {
        RecordType[] optional = [RecordType.CpuidPolicy, RecordType.StaticDataEnd, RecordType.TscInfo, RecordType.VcpuExtended, RecordType.VcpuXsave];
        foreach (RecordType type in _parts.Records.Select(static record => record.Type).Distinct())
        {
            byte[] without = ImageParts.Join(_parts.Records.Where(record => record.Type != type));
            if (!optional.Contains(type))
                Refuses(without, "not complete", "no page");
            else
                SuspendingGuest.Restore(without).Dispose();
        }
    }

    [TestCase(RecordType.HvmContext, "HVM")]
    [TestCase(RecordType.Checkpoint, "migration under way")]
    [TestCase((RecordType)0x77, "not known")]
    public void Records_that_do_not_belong_there_are_refused(RecordType type, string sentence)
        => Refuses(ImageParts.Join([_parts.Records[0], (type, new byte[8]), .. _parts.Records.Skip(1)]), sentence);

    [Test]
    public void Optional_records_are_passed_over()
        => SuspendingGuest.Restore(ImageParts.Join([_parts.Records[0], ((RecordType)0x8000_0077, new byte[13]), .. _parts.Records.Skip(1)])).Dispose();

    [Test]
    public void What_follows_the_image_is_left_alone()
    {
        byte[] longer = [.. _image, 1, 2, 3];
        using var stream = new MemoryStream(longer);
        using var machine = new Runtime.FakeMachine(2000, new TimeStampCounter(1_000_000, 0));
        using var domain = Domain.Restore(SuspendingGuest.Options(), stream, machine);
        Assert.That(stream.Position, Is.EqualTo(_image.Length));
    }

    [Test]
    public void Page_tables_that_a_guest_could_not_have_are_refused()
    {
        // A table that is writable, a table as a table of another level, the hypervisor's frames, no frame at all.
        ulong slot = (_root << Paging.PageShift) | Present | (ulong)PageFlags.Writable;
        Refuses(_parts.WithPage(_table, WithEntry(7, slot)), "is not what a guest may have");
        Refuses(_parts.WithPage(_root, WithEntry(3, (_table << Paging.PageShift) | Present)), "is not what a guest may have");
        Refuses(_parts.WithPage(_table, WithEntry(7, (0xfffff_ffffUL << Paging.PageShift) | Present)), "no page for");
        Refuses(_parts.WithPage(_table, WithEntry(7, (1UL << Paging.PageShift) | Present | (ulong)PageFlags.CacheDisable)), "is not what a guest may have");
        Refuses(_parts.WithPage(_table, static (_, data) => (PageInfoType.Pinned | (PageInfoType)2, data)), "is not what a guest may have");
    }

    [Test]
    public void The_hypervisors_slots_are_its_own()
    {
        using SuspendingGuest guest = SuspendingGuest.Restore(_parts.WithPage(_root, WithEntry(260, (1UL << Paging.PageShift) | Present | (ulong)PageFlags.Writable)));
        Assert.That(guest.Domain.AuditFrames(), Is.Null);
    }

    [Test]
    public void What_the_manager_writes_to_is_no_table()
    {
        Refuses(_parts.WithPage(_startInfo, WithStartInfo(static (ref StartInfo info, ulong table) => info.StoreMfn = table, _table)), "is a page table");
        Refuses(_parts.WithPage(_startInfo, WithStartInfo(static (ref StartInfo info, ulong pfn) => info.ConsoleMfn = pfn, 1UL << 40)), "no page for");
        Refuses(_parts.WithPage(_startInfo, WithStartInfo(static (ref StartInfo info, ulong pfn) => info.ConsoleMfn = info.StoreMfn, 0)), "three pages");
        Refuses(_parts.With(RecordType.PvP2MFrames, body => Put(body, 8, _table)), "is a page table");
        Refuses(_parts.With(RecordType.PvP2MFrames, static body => Put(body, 8, 1UL << 50)), "no page for");
        Refuses(WithContext((ref VcpuInitialisation.GuestContext guest) => guest.Registers.Rdx = _table), "is a page table");

        // The list, as a page that other tables are to be made of, is ordinary memory.
        Refuses(_parts.WithPage(_list, static (_, data) => ((PageInfoType)2, data)), "is a page table");
    }

    [Test]
    public void Lists_do_not_claim_more_than_they_are()
    {
        Refuses(_parts.With(RecordType.PvP2MFrames, static body => Put(body, 4, uint.MaxValue)), "do not go with");
        Refuses(_parts.With(RecordType.PvP2MFrames, static body => Put(body, 0, 1u)), "do not go with");
        Refuses(_parts.With(RecordType.PageData, static body => Put(body, 0, uint.MaxValue)), "do not go with");
        Refuses(_parts.With(RecordType.PageData, static body => Put(body, 0, 0u)), "do not go with");
        Refuses(_parts.With(RecordType.PageData, static body => Put(body, 8, 1UL << 45)), "past the end");
        Refuses(_parts.With(RecordType.PageData, static body => Put(body, 8, 6UL << 60)), "of type 6");
        Refuses(_parts.With(RecordType.SharedInfo, static body => body[..^8]), "should have 4096");
        Refuses(_parts.With(RecordType.TscInfo, static body => Put(body, 8, ulong.MaxValue)), "clock");
        Refuses(_parts.With(RecordType.PvInfo, static _ => [4, 3, 0, 0, 0, 0, 0, 0]), "only 64-bit");
    }

    [Test]
    public void A_domain_gets_no_more_than_it_may_have()
    {
        var pages = new List<(RecordType, byte[])>();
        byte[] p2m = new byte[8 + (8 * 8)];
        _parts.Single(RecordType.PvP2MFrames).CopyTo(p2m, 0);
        p2m = Put(p2m, 4, (8 * 512u) - 1);
        byte[] body = new byte[8 + (8 * 2000)];
        _ = Put(body, 0, 2000u);
        for (int i = 0; i < 2000; i++)
            _ = Put(body, 8 + (i * 8), (uint)(1500 + i) | ((ulong)PageInfoType.AllocateOnly << MigrationFormat.PageTypeShift));
        foreach ((RecordType type, byte[] record) in _parts.Records)
        {
            pages.Add((type, type == RecordType.PvP2MFrames ? p2m : record));
            if (type == RecordType.PageData)
                pages.Add((type, body));
        }

        Refuses(ImageParts.Join(pages), "give it as much memory");
    }

    [Test]
    public void Vcpus_have_states_that_they_may_have()
    {
        Refuses(_parts.With(RecordType.VcpuBasic, static body => Put(body, 0, 5u)), "made with 1");
        Refuses(_parts.With(RecordType.VcpuBasic, static body => body[..^16]), "bytes");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.Registers.Rip = 0x8000_0000_0000_0000), "state of vCPU 0");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.EventCallback = 0x8000_0000_0000_0000), "state of vCPU 0");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.ControlRegisters[3] = 1UL << 50), "no page for");
        Refuses(WithContext((ref VcpuInitialisation.GuestContext guest) => guest.ControlRegisters[3] = _table << 12), "state of vCPU 0");
        Refuses(WithContext((ref VcpuInitialisation.GuestContext guest) => guest.ControlRegisters[1] = (_table << 12) | 1), "state of vCPU 0");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.Flags &= ~4UL), "state of vCPU 0");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.GdtEntries = ulong.MaxValue), "descriptor table");
        Refuses(WithContext((ref VcpuInitialisation.GuestContext guest) => (guest.GdtEntries, guest.GdtFrames[0]) = (1, _root)), "state of vCPU 0");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => guest.VmAssists = 1UL << 63), "assists");
        Refuses(WithContext(static (ref VcpuInitialisation.GuestContext guest) => (guest.LdtEntries, guest.LdtBase) = (9000, 0)), "state of vCPU 0");
        Refuses(_parts.With(RecordType.VcpuExtended, static body => Put(body, 16, 0x8000_0000_0000_0000)), "callback");
        Refuses(ImageParts.Join([.. _parts.Records.SkipLast(1), (RecordType.VcpuMsrs, [0, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0xc0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]), (RecordType.End, [])]), "c0000103");
    }

    [Test]
    public void An_extended_state_that_the_processor_lacks_is_refused()
    {
        if (_parts.Records.All(static record => record.Type != RecordType.VcpuXsave))
            Assert.Ignore("this processor has no XSAVE.");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => Put(body, 8, 3UL | (1UL << 62))), "lack");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => Put(body, 8, 2UL)), "XCR0");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => Put(body, 24 + 512, 1UL << 61)), "lack");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => Put(body, 24 + 520, 1UL << 63)), "laid out");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => Put(body, 24 + 24, 0xffff_ffffU)), "laid out");
        Refuses(_parts.With(RecordType.VcpuXsave, static body => body[..40]), "extended state of");
    }

    [Test]
    public void A_guest_keeps_the_processor_that_it_knows()
    {
        byte[] policy = _parts.Single(RecordType.CpuidPolicy);
        int leaf1 = Enumerable.Range(0, policy.Length / MigrationFormat.CpuidLeafSize).Select(static i => i * MigrationFormat.CpuidLeafSize)
            .Single(at => BinaryPrimitives.ReadUInt32LittleEndian(policy.AsSpan(at)) == 1);

        // AES and what is built on it is hidden, and the processor is one of the same family but of another model and stepping.
        const uint aes = 1 << 25;
        uint signature = BinaryPrimitives.ReadUInt32LittleEndian(policy.AsSpan(leaf1 + 8)) ^ 0x11;
        uint ecx = BinaryPrimitives.ReadUInt32LittleEndian(policy.AsSpan(leaf1 + 16)) & ~aes;
        byte[] image = _parts.With(RecordType.CpuidPolicy, body => Put(Put(body, leaf1 + 8, signature), leaf1 + 16, ecx));
        using SuspendingGuest target = SuspendingGuest.Restore(image);
        CpuidLeaf shown = target.Domain.Cpuid.Query(1, 0, default);
        Assert.That(shown.Eax, Is.EqualTo(signature));
        Assert.That(shown.Ecx, Is.EqualTo(ecx));
        target.Suspend();
        Assert.That(ImageParts.Of(target.Save()).Single(RecordType.CpuidPolicy).AsSpan(leaf1, MigrationFormat.CpuidLeafSize).ToArray(),
            Is.EqualTo(ImageParts.Of(image).Single(RecordType.CpuidPolicy).AsSpan(leaf1, MigrationFormat.CpuidLeafSize).ToArray()));
    }

    [Test]
    public void A_processor_that_lacks_something_is_named_for_it()
    {
        byte[] policy = _parts.Single(RecordType.CpuidPolicy);
        for (int at = 0; at < policy.Length; at += MigrationFormat.CpuidLeafSize)
        {
            if (BinaryPrimitives.ReadUInt32LittleEndian(policy.AsSpan(at)) != 1)
                continue;

            // Leaf 1 ECX bit 5 is VMX, which no PV domain is shown; bit 16 is reserved.
            const uint vmx = 1 << 5, reserved = 1 << 16;
            uint ecx = BinaryPrimitives.ReadUInt32LittleEndian(policy.AsSpan(at + 16));
            Refuses(_parts.With(RecordType.CpuidPolicy, body => Put(body, at + 16, ecx | vmx | reserved)), "which this host's domains lack");

            Refuses(_parts.With(RecordType.CpuidPolicy, static body => Put(body, 12, 0x1234u)), "another vendor");
            return;
        }

        Assert.Fail("there is no leaf 1");
    }

    [Test]
    public void Damage_anywhere_gives_a_sentence_or_a_sound_domain([Range(0, 9)] int seed)
    {
        const int images = 40;
        var random = new Random(seed);
        var manager = new DomainManager();
        int restored = 0;
        for (int i = 0; i < images; i++)
        {
            byte[] image = (byte[])_image.Clone();
            int changes = random.Next(1, 6);
            for (int j = 0; j < changes; j++)
            {
                int at = random.Next(image.Length);
                image[at] = random.Next(4) switch
                {
                    0 => (byte)(image[at] ^ (1 << random.Next(8))),
                    1 => 0xff,
                    2 => 0,
                    _ => (byte)random.Next(256),
                };
            }

            if (random.Next(8) == 0)
                image = image[..random.Next(image.Length)];
            restored += TryRestore(image, manager) ? 1 : 0;
            Assert.That(manager.Domains, Is.Empty);
        }

        TestContext.Out.WriteLine($"{restored} of {images} were restored");
    }

    [Test]
    public void Damage_where_it_hurts_gives_a_sentence_or_a_sound_domain([Range(0, 9)] int seed)
    {
        // Entries of page tables, and words of the vCPU's context, that are wrong in one place.
        const int images = 40;
        var random = new Random(seed);
        var manager = new DomainManager();
        ulong[] tables = [.. _parts.Pages.Where(static page => MigrationFormat.LevelOf(page.Value.Type) != 0).Select(static page => page.Key)];
        ulong[] pfns = [.. _parts.Pages.Keys];
        int restored = 0;
        for (int i = 0; i < images; i++)
        {
            ulong flags = (uint)random.Next(512) | ((ulong)(uint)random.Next(2) << 63) | (random.Next(4) == 0 ? 0 : Present);
            ulong entry = (pfns[random.Next(pfns.Length)] << Paging.PageShift) | flags;
            byte[] image = random.Next(3) switch
            {
                0 => _parts.With(RecordType.VcpuBasic, body => Put(body, 8 + (8 * random.Next((body.Length - 8) / 8)), pfns[random.Next(pfns.Length)] << random.Next(13))),
                1 => _parts.WithPage(pfns[random.Next(pfns.Length)], (_, data) => ((PageInfoType)random.Next(16), data)),
                _ => _parts.WithPage(tables[random.Next(tables.Length)], WithEntry(random.Next(512), entry)),
            };
            restored += TryRestore(image, manager) ? 1 : 0;
            Assert.That(manager.Domains, Is.Empty);
        }

        TestContext.Out.WriteLine($"{restored} of {images} were restored");
    }

    private delegate void Change(ref VcpuInitialisation.GuestContext guest);

    private delegate void StartInfoChange(ref StartInfo info, ulong value);

    private static byte[] Put<T>(byte[] body, int at, T value)
        where T : unmanaged
    {
        MemoryMarshal.Write(body.AsSpan(at), value);
        return body;
    }

    private static Func<PageInfoType, byte[], (PageInfoType, byte[])> WithEntry(int index, ulong entry)
        => (type, data) => (type, Put(data, index * sizeof(ulong), entry));

    private static Func<PageInfoType, byte[], (PageInfoType, byte[])> WithStartInfo(StartInfoChange change, ulong value) => (type, data) =>
    {
        change(ref MemoryMarshal.AsRef<StartInfo>(data.AsSpan()), value);
        return (type, data);
    };

    private static bool TryRestore(byte[] image, DomainManager manager)
    {
        try
        {
            using SuspendingGuest guest = SuspendingGuest.Restore(image, manager);
            Assert.That(guest.Domain.AuditFrames(), Is.Null);
            return true;
        }
        catch (MigrationException refusal)
        {
            Assert.That(refusal.Message, Does.Match(@"^[A-Zv].*[^.]\.$"));
            return false;
        }
    }

    private static void Refuses(byte[] image, params string[] sentences)
    {
        var manager = new DomainManager();
        MigrationException refusal = Assert.Throws<MigrationException>(() => SuspendingGuest.Restore(image, manager).Dispose())!;
        Assert.That(sentences.Any(refusal.Message.Contains), $"\"{refusal.Message}\" says: {string.Join(" or ", sentences)}");
        Assert.That(manager.Domains, Is.Empty);
        Assert.That(manager.Reserve(1), Is.EqualTo(1), "its number is free");
    }

    private byte[] WithContext(Change change) => _parts.With(RecordType.VcpuBasic, body =>
    {
        change(ref MemoryMarshal.AsRef<VcpuInitialisation.GuestContext>(body.AsSpan(MigrationFormat.VcpuHeaderSize)));
        return body;
    });
}
