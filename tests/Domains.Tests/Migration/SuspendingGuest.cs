// A guest that suspends itself as Linux does, played on plain memory; and what it is restored to.
using System.Diagnostics;
using XenSharp.Core;
using XenSharp.Domains.Migration;
using XenSharp.Domains.Tests.Runtime;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>A domain on a machine of its own, built or restored, whose guest does nothing but suspend.</summary>
internal sealed unsafe class SuspendingGuest : IDisposable
{
    public const int MemoryMiB = 4;

    /// <summary>Where the machine frames of a domain begin that is restored.</summary>
    public const ulong OtherFirstFrame = 0x9_0000;

    /// <summary>What RIP is when it suspends.</summary>
    public const ulong SuspendRip = FakeDomain.Base + 0x2345;

    private static readonly TimeStampCounter s_counter = new(1_000_000, 0);

    private SuspendingGuest(FakeMachine machine, Domain domain)
    {
        Machine = machine;
        Domain = domain;
    }

    public FakeMachine Machine { get; }

    public Domain Domain { get; }

    public Vcpu Vcpu => Domain.FindVcpu(0)!;

    public VcpuContext* Context => Vcpu.Context;

    public StartInfo* StartInfo => (StartInfo*)Machine.Memory.Page(Domain.Layout.StartInfo);

    public byte* SharedInfo => Domain.Context->SharedInfo;

    /// <summary>Builds one.</summary>
    public static SuspendingGuest Build()
    {
        var machine = new FakeMachine(((ulong)MemoryMiB << 8) + 8, s_counter);
        return new SuspendingGuest(machine, new Domain(Options() with { Kernel = FakeDomain.Kernel() }, machine));
    }

    /// <summary>Makes one from an image.</summary>
    public static SuspendingGuest Restore(
        byte[] image, DomainManager? manager = null, Func<DomainOptions, DomainOptions>? change = null, TimeStampCounter? counter = null)
    {
        var machine = new FakeMachine(((ulong)MemoryMiB << 8) + 8, counter ?? s_counter, OtherFirstFrame);
        try
        {
            using var stream = new MemoryStream(image);
            DomainOptions options = Options();
            return new SuspendingGuest(machine, Domain.Restore(change?.Invoke(options) ?? options, stream, machine, manager));
        }
        catch
        {
            machine.Dispose();
            throw;
        }
    }

    public static DomainOptions Options() => new() { Name = "guest", MemoryMiB = MemoryMiB, HostTsc = static () => (ulong)Stopwatch.GetTimestamp() };

    /// <summary>Calls a hypercall on the test's own thread, the domain not running.</summary>
    public long Call(HypercallNumber number, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0, ulong a3 = 0)
        => Hypercalls.HypercallDispatcher.Call(Vcpu, (ulong)number, new HypercallArguments { A0 = a0, A1 = a1, A2 = a2, A3 = a3 });

    /// <summary>Host view of what the kernel's tables map at an address.</summary>
    public byte* At(ulong address)
    {
        byte* found = GuestAccess.Translate(Context, address, write: false);
        Assert.That((nint)found, Is.Not.Zero, "mapped");
        return found;
    }

    public void WriteAll(ulong address, params ReadOnlySpan<ulong> values) => values.CopyTo(new Span<ulong>(At(address), values.Length));

    /// <summary>Says where the p2m list is, and names the rings by their pfns, as a guest does before it suspends.</summary>
    public void Prepare()
    {
        *(ulong*)(SharedInfo + SharedInfoLayout.MaxPfn) = StartInfo->PageCount;
        *(ulong*)(SharedInfo + SharedInfoLayout.P2MCr3) = Context->State->KernelRoot << Paging.PageShift;
        *(ulong*)(SharedInfo + SharedInfoLayout.P2MAddress) = StartInfo->MfnList;
        StartInfo->StoreMfn = PfnOf(new Mfn(StartInfo->StoreMfn));
        StartInfo->ConsoleMfn = PfnOf(new Mfn(StartInfo->ConsoleMfn));
    }

    public ulong PfnOf(Mfn frame) => Machine.MachineToPhys[Machine.Memory.IndexOf(frame)];

    /// <summary>Runs the guest until it has suspended itself.</summary>
    /// <param name="afterwards">What it does when it goes on; null to power off.</param>
    public void Suspend(Func<FakeVcpu, IEnumerable<VcpuExit>>? afterwards = null)
    {
        Prepare();
        Machine.Script = vcpu => Script(vcpu, afterwards);
        Domain.Start();
        Assert.That(Domain.Completion.Wait(TimeSpan.FromSeconds(20)), Is.True);
        Assert.That(Domain.Completion.Result, Is.EqualTo(new DomainExit(ShutdownReason.Suspend)));
    }

    /// <summary>The domain's image.</summary>
    public byte[] Save()
    {
        using var stream = new MemoryStream();
        Domain.Save(stream);
        return stream.ToArray();
    }

    public void Dispose()
    {
        Domain.Dispose();
        Machine.Dispose();
    }

    private IEnumerable<VcpuExit> Script(FakeVcpu vcpu, Func<FakeVcpu, IEnumerable<VcpuExit>>? afterwards)
    {
        yield return MakeSuspend(vcpu);
        foreach (VcpuExit exit in afterwards?.Invoke(vcpu) ?? [])
            yield return exit;
    }

    private VcpuExit MakeSuspend(FakeVcpu vcpu)
    {
        const ulong shutdown = 2;
        vcpu.Rip = SuspendRip;
        return vcpu.Hypercall(HypercallNumber.SchedOpCompat, shutdown, (ulong)ShutdownReason.Suspend, Domain.Layout.StartInfo.Value);
    }
}

/// <summary>An image taken apart.</summary>
internal sealed record ImageParts(IReadOnlyList<(RecordType Type, byte[] Body)> Records)
{
    /// <summary>Contents and types of the pages by their pfns; no contents for those without.</summary>
    public SortedDictionary<ulong, (PageInfoType Type, byte[] Data)> Pages { get; } = [];

    public static ImageParts Of(byte[] image)
    {
        using var stream = new MemoryStream(image);
        var reader = new MigrationReader(stream);
        reader.ReadHeaders();
        var records = new List<(RecordType, byte[])>();
        while (true)
        {
            RecordHeader header = reader.Next();
            records.Add((header.Type, reader.ReadBody(0, uint.MaxValue)));
            if (header.Type == RecordType.End)
                break;
        }

        reader.Skip();
        Assert.That(stream.Position, Is.EqualTo(stream.Length), "END is the end");
        var parts = new ImageParts(records);
        foreach ((RecordType type, byte[] body) in records)
        {
            if (type == RecordType.PageData)
                parts.AddPages(body);
        }

        return parts;
    }

    /// <summary>The body of the one record of a type.</summary>
    public byte[] Single(RecordType type) => Records.Single(record => record.Type == type).Body;

    /// <summary>Puts an image together.</summary>
    public static byte[] Join(IEnumerable<(RecordType Type, byte[] Body)> records)
    {
        using var stream = new MemoryStream();
        var writer = new MigrationWriter(stream);
        writer.WriteHeaders();
        foreach ((RecordType type, byte[] body) in records)
            writer.WriteRecord(type, body);
        return stream.ToArray();
    }

    /// <summary>The image with another body in a record.</summary>
    public byte[] With(RecordType type, Func<byte[], byte[]> change)
        => Join(Records.Select(record => record.Type == type ? (type, change((byte[])record.Body.Clone())) : record));

    /// <summary>The image with something else in a page.</summary>
    public byte[] WithPage(ulong pfn, Func<PageInfoType, byte[], (PageInfoType, byte[])> change)
    {
        (PageInfoType Type, byte[] Data) page = Pages.TryGetValue(pfn, out (PageInfoType Type, byte[] Data) found) ? found : (PageInfoType.Normal, new byte[4096]);
        (PageInfoType type, byte[] data) = change(page.Type, page.Data.Length == 0 ? new byte[4096] : (byte[])page.Data.Clone());

        // A page that comes again is what it is the last time.
        byte[] body = new byte[16 + data.Length];
        body[0] = 1;
        BitConverter.TryWriteBytes(body.AsSpan(8), pfn | ((ulong)type << MigrationFormat.PageTypeShift));
        data.CopyTo(body, 16);
        int last = Records.ToList().FindLastIndex(static record => record.Type == RecordType.PageData);
        return Join([.. Records.Take(last + 1), (RecordType.PageData, body), .. Records.Skip(last + 1)]);
    }

    private void AddPages(byte[] body)
    {
        int count = BitConverter.ToInt32(body);
        int at = 8 + (count * 8);
        for (int i = 0; i < count; i++)
        {
            ulong entry = BitConverter.ToUInt64(body, 8 + (i * 8));
            var type = (PageInfoType)(entry >> MigrationFormat.PageTypeShift);
            int size = MigrationFormat.HasData(type) ? 4096 : 0;
            Pages[entry & MigrationFormat.PfnMask] = (type, body[at..(at + size)]);
            at += size;
        }

        Assert.That(at, Is.EqualTo(body.Length));
    }
}
