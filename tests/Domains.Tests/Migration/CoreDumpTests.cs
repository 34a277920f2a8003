using System.Text;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;
using XenSharp.Domains.Migration;
using XenSharp.Domains.Tests.Runtime;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>Core dumps, read back section by section.</summary>
internal sealed unsafe class CoreDumpTests
{
    private SuspendingGuest _guest = null!;

    [SetUp]
    public void Build() => _guest = SuspendingGuest.Build();

    [TearDown]
    public void TakeApart() => _guest.Dispose();

    [Test]
    public void All_sections_are_there()
    {
        *(ulong*)_guest.At(FakeDomain.Data) = 0x1234_5678_9abc_def0;
        _guest.Context->Registers->Rbx = 0xb0b;
        byte[] core = Dump();
        Assert.That(core[..7], Is.EqualTo((byte[])[0x7f, (byte)'E', (byte)'L', (byte)'F', 2, 1, 1]));
        Assert.That((BitConverter.ToUInt16(core, 16), BitConverter.ToUInt16(core, 18), BitConverter.ToUInt16(core, 56)), Is.EqualTo(((ushort)4, (ushort)62, (ushort)0)));
        Dictionary<string, byte[]> sections = Sections(core);
        Assert.That(sections.Keys, Is.EquivalentTo((string[])["", ".note.Xen", ".xen_prstatus", ".xen_shared_info", ".xen_pages", ".xen_p2m", ".shstrtab"]));
        int pages = (int)_guest.Domain.OwnedPages;
        CheckNotes(sections[".note.Xen"], pages);

        var contexts = System.Runtime.InteropServices.MemoryMarshal.Cast<byte, VcpuInitialisation.GuestContext>(sections[".xen_prstatus"]);
        Assert.That(contexts.Length, Is.EqualTo(1));
        Assert.That((contexts[0].Registers.Rbx, contexts[0].ControlRegisters[3]), Is.EqualTo((0xb0bUL, _guest.Context->State->KernelRoot << 12)));
        Assert.That(sections[".xen_shared_info"], Is.EqualTo(new Span<byte>(_guest.SharedInfo, 4096).ToArray()));

        ReadOnlySpan<ulong> p2m = System.Runtime.InteropServices.MemoryMarshal.Cast<byte, ulong>(sections[".xen_p2m"]);
        Assert.That(p2m.Length, Is.EqualTo(2 * pages));
        Assert.That(sections[".xen_pages"], Has.Length.EqualTo(pages * 4096));
        ulong data = (FakeDomain.Data - FakeDomain.Base) >> Paging.PageShift;
        for (int i = 0; i < pages; i++)
        {
            Assert.That(p2m[2 * i], Is.EqualTo((ulong)i), "in their order");
            var frame = new Mfn(p2m[(2 * i) + 1]);
            Assert.That(_guest.PfnOf(frame), Is.EqualTo((ulong)i));
            Assert.That(sections[".xen_pages"].AsSpan(i * 4096, 4096).SequenceEqual(new Span<byte>(_guest.Machine.Memory.Page(frame), 4096)));
        }

        Assert.That(BitConverter.ToUInt64(sections[".xen_pages"], (int)data * 4096), Is.EqualTo(0x1234_5678_9abc_def0));
    }

    [Test]
    public void A_domain_is_paused_while_it_is_dumped_and_goes_on()
    {
        using var started = new ManualResetEventSlim();
        bool goesOn = true;
        int entries = 0;
        _guest.Machine.Script = vcpu => Spin(vcpu);
        _guest.Domain.Start();
        Assert.That(started.Wait(TimeSpan.FromSeconds(20)), Is.True);
        int before = -1;
        int after = -1;
        var progress = new Watch(() =>
        {
            Assert.That(_guest.Domain.PauseCount, Is.EqualTo(1));
            if (before < 0)
                before = Volatile.Read(ref entries);
            after = Volatile.Read(ref entries);
        });
        _guest.Domain.DumpCore(Stream.Null, progress);
        Assert.That(after, Is.EqualTo(before), "nothing ran");
        Assert.That(_guest.Domain.PauseCount, Is.Zero);
        Assert.That(SpinWait.SpinUntil(() => Volatile.Read(ref entries) > after, TimeSpan.FromSeconds(20)), "it runs again");
        Volatile.Write(ref goesOn, false);
        Assert.That(_guest.Domain.Completion.Wait(TimeSpan.FromSeconds(20)), Is.True);

        IEnumerable<VcpuExit> Spin(FakeVcpu vcpu)
        {
            while (Volatile.Read(ref goesOn))
            {
                Interlocked.Increment(ref entries);
                started.Set();
                yield return vcpu.Hypercall(HypercallNumber.XenVersion, 0);
            }
        }
    }

    [Test]
    public void One_that_has_crashed_is_dumped()
    {
        _guest.Machine.Script = static vcpu => [vcpu.Hypercall(HypercallNumber.SchedOpCompat, 2, (ulong)ShutdownReason.Crash)];
        _guest.Domain.Start();
        Assert.That(_guest.Domain.Completion.Wait(TimeSpan.FromSeconds(20)), Is.True);
        Assert.That(Sections(Dump())[".xen_pages"], Has.Length.EqualTo((int)_guest.Domain.OwnedPages * 4096));
    }

    [Test]
    public void Pages_without_a_pfn_are_left_out_and_the_others_stay_in_order()
    {
        // What the guest says of its frames may be anything.
        MachineMemory memory = _guest.Machine.Memory;
        _guest.Machine.MachineToPhys[5] = ulong.MaxValue;
        _guest.Machine.MachineToPhys[6] = 900;
        Dictionary<string, byte[]> sections = Sections(Dump());
        ulong[] pfns = [.. sections[".xen_p2m"].Chunk(16).Select(static entry => BitConverter.ToUInt64(entry))];
        Assert.That(pfns, Has.Length.EqualTo((int)_guest.Domain.OwnedPages - 1));
        Assert.That(pfns, Is.Ordered);
        Assert.That(pfns.Count(static pfn => pfn == 900), Is.EqualTo(2));
        Assert.That(memory.Contains(memory.FirstFrame), Is.True);
    }

    [Test]
    public void A_full_disk_gets_a_sentence()
        => Assert.That(
            () => _guest.Domain.DumpCore(new Full()), Throws.TypeOf<MigrationException>().With.Message.EqualTo("The core cannot be written: No space left on device."));

    private static void CheckNotes(byte[] notes, int pages)
    {
        var found = new List<(uint Type, byte[] Description)>();
        for (int at = 0; at < notes.Length;)
        {
            int size = BitConverter.ToInt32(notes, at + 4);
            Assert.That(Encoding.ASCII.GetString(notes, at + 12, 4), Is.EqualTo("Xen\0"));
            found.Add((BitConverter.ToUInt32(notes, at + 8), notes[(at + 16)..(at + 16 + size)]));
            at += 16 + size;
        }

        Assert.That(found.Select(static note => note.Type), Is.EqualTo((uint[])[0x200_0000, 0x200_0001, 0x200_0002, 0x200_0003]));
        Assert.That(found[0].Description, Is.Empty);
        Assert.That(found[1].Description.Chunk(8).Select(static word => BitConverter.ToUInt64(word)), Is.EqualTo((ulong[])[0xf00febed, 1, (ulong)pages, 4096]));
        byte[] version = found[2].Description;
        Assert.That(version, Has.Length.EqualTo(1280));
        Assert.That((BitConverter.ToUInt64(version), BitConverter.ToUInt64(version, 8)), Is.EqualTo((4UL, 17UL)));
        Assert.That(Encoding.ASCII.GetString(version, 176, 14), Is.EqualTo("xen-3.0-x86_64"));
        Assert.That(BitConverter.ToUInt64(version, 1264), Is.EqualTo(Paging.HypervisorVirtualStart));
        Assert.That(BitConverter.ToUInt64(found[3].Description), Is.EqualTo(1));
    }

    private static Dictionary<string, byte[]> Sections(byte[] core)
    {
        int at = (int)BitConverter.ToUInt64(core, 40);
        int count = BitConverter.ToUInt16(core, 60);
        int names = (int)BitConverter.ToUInt64(core, at + (BitConverter.ToUInt16(core, 62) * 64) + 24);
        var sections = new Dictionary<string, byte[]>();
        for (int i = 0; i < count; i++, at += 64)
        {
            int name = names + BitConverter.ToInt32(core, at);
            string text = Encoding.ASCII.GetString(core, name, Array.IndexOf(core, (byte)0, name) - name);
            int offset = (int)BitConverter.ToUInt64(core, at + 24);
            int size = (int)BitConverter.ToUInt64(core, at + 32);
            if (text == ".xen_pages")
                Assert.That(offset % 4096, Is.Zero);
            sections.Add(text, core[offset..(offset + size)]);
        }

        return sections;
    }

    private byte[] Dump()
    {
        using var stream = new MemoryStream();
        _guest.Domain.DumpCore(stream);
        return stream.ToArray();
    }

    private sealed class Watch(Action action) : IProgress<PageProgress>
    {
        public void Report(PageProgress value) => action();
    }

    private sealed class Full : MemoryStream
    {
        public override void Write(ReadOnlySpan<byte> buffer) => throw new IOException("No space left on device");
    }
}
