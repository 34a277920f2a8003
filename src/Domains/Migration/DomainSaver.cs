// From a suspended domain to an image: what libxc's xg_sr_save does of a PV domain that does not run.
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Writes a domain once. Everything that could be refused is looked at before the first page is written, but for the page tables: one that
/// names what is not in the guest's p2m ends the work in the middle. The domain is only read.
/// </summary>
/// <param name="domain">A suspended domain.</param>
/// <param name="writer">Where to.</param>
/// <param name="progress">Is told of the pages.</param>
/// <param name="cancellation">Ends the work.</param>
internal sealed unsafe class DomainSaver(Domain domain, MigrationWriter writer, IProgress<PageProgress>? progress, CancellationToken cancellation)
{
    private readonly DomainContext* _context = domain.Context;
    private readonly ulong[] _pfns = new ulong[MigrationFormat.BatchPages];
    private readonly byte[] _data = new byte[MigrationFormat.BatchPages << Paging.PageShift];
    private readonly EmptyFrames _empty = new(domain.Outside.Machine);
    private GuestP2M _p2m = null!;
    private int _count;
    private int _dataLength;

    /// <summary>Writes the whole image.</summary>
    public void Save()
    {
        foreach (Vcpu vcpu in domain.Vcpus)
        {
            while (PageTables.FinishDeferred(vcpu.Context) == Errno.ERESTART)
                vcpu.Context->Budget.Renew();
        }

        _p2m = GuestP2M.Find(_context);
        List<(Vcpu Vcpu, byte[] Basic, byte[]? Xsave)> vcpus = [.. domain.Vcpus.Where(static vcpu => vcpu.IsUp).Select(Capture)];
        if (vcpus.Count == 0 || vcpus[0].Vcpu.Id != 0)
            throw new MigrationException("The guest cannot be saved: it has taken its first vCPU down, which the format needs.");
        byte[] p2mFrames = P2MFrames();

        writer.WriteHeaders();
        writer.WriteRecord(RecordType.PvInfo, [MigrationFormat.GuestWidth, MigrationFormat.PageTableLevels, 0, 0, 0, 0, 0, 0]);
        writer.WriteRecord(RecordType.CpuidPolicy, CpuidRecord.Write(domain.Cpuid));
        writer.WriteRecord(RecordType.StaticDataEnd);
        writer.WriteRecord(RecordType.PvP2MFrames, p2mFrames);
        WritePages();
        writer.WriteRecord(RecordType.TscInfo, TscInfo());
        writer.WriteRecord(RecordType.SharedInfo, new ReadOnlySpan<byte>(_context->SharedInfo, (int)Paging.PageSize));
        Span<byte> head = stackalloc byte[MigrationFormat.VcpuHeaderSize];
        head.Clear();
        foreach ((Vcpu vcpu, byte[] basic, byte[]? xsave) in vcpus)
        {
            BinaryPrimitives.WriteInt32LittleEndian(head, vcpu.Id);
            writer.WriteRecord(RecordType.VcpuBasic, head, basic);
            writer.WriteRecord(RecordType.VcpuExtended, head, VcpuRecords.CaptureExtended(vcpu));
            if (xsave != null)
                writer.WriteRecord(RecordType.VcpuXsave, head, xsave);
        }

        writer.WriteRecord(RecordType.End);
        writer.Flush();
    }

    private static MigrationException Refused(string how) => new($"The guest cannot be saved: {how}.");

    /// <summary>A vCPU's context with pfns for machine frames.</summary>
    private (Vcpu Vcpu, byte[] Basic, byte[]? Xsave) Capture(Vcpu vcpu)
    {
        byte[] area = new byte[ExtendedState.Size];
        vcpu.Cpu.GetExtendedState(area);
        VcpuInitialisation.Capture(vcpu, area, out VcpuInitialisation.GuestContext guest);
        if (vcpu.Id == 0)
            guest.Registers.Rdx = PfnOf(new Mfn(guest.Registers.Rdx), "start_info, as the suspend hypercall names it,");
        ulong gdtPages = (guest.GdtEntries + Paging.EntriesPerTable - 1) / Paging.EntriesPerTable;
        for (int i = 0; i < (int)gdtPages; i++)
            guest.GdtFrames[i] = PfnOf(new Mfn(guest.GdtFrames[i]), "a descriptor table");
        var kernel = new Mfn(guest.ControlRegisters[3] >> Paging.PageShift);
        guest.ControlRegisters[3] = PfnOf(kernel, "the root of a vCPU's page tables") << Paging.PageShift;
        if (guest.ControlRegisters[1] != 0)
        {
            ulong user = PfnOf(new Mfn(guest.ControlRegisters[1] >> Paging.PageShift), "the root of a vCPU's user page tables");
            guest.ControlRegisters[1] = (user << Paging.PageShift) | VcpuInitialisation.UserRootValid;
        }

        byte[] basic = MemoryMarshal.AsBytes(new ReadOnlySpan<VcpuInitialisation.GuestContext>(ref guest)).ToArray();
        return (vcpu, basic, VcpuRecords.CaptureXsave(vcpu, area));
    }

    private ulong PfnOf(Mfn frame, string what)
        => _p2m.TryFindPfn(frame, out ulong pfn) ? pfn : throw Refused($"{what} is in {frame}, which is not in its p2m list");

    private byte[] P2MFrames()
    {
        byte[] body = new byte[8 + (_p2m.Pages.Length * sizeof(ulong))];
        if (_p2m.LastPfn > uint.MaxValue)
            throw Refused($"its p2m list goes up to pfn {_p2m.LastPfn:x}");
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(4), (uint)_p2m.LastPfn);
        for (int i = 0; i < _p2m.Pages.Length; i++)
            BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(8 + (i * sizeof(ulong))), PfnOf(new Mfn(_p2m.Pages[i]), "a part of its p2m list"));
        return body;
    }

    private byte[] TscInfo()
    {
        // TSC_MODE_DEFAULT, kHz, system time, incarnation, padding.
        byte[] body = new byte[24];
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(4), domain.Time.TscKiloHertz);
        BinaryPrimitives.WriteInt64LittleEndian(body.AsSpan(8), domain.Time.SystemTime);
        return body;
    }

    private void WritePages()
    {
        ulong total = _p2m.LastPfn + 1;
        progress?.Report(new PageProgress(0, total));
        for (ulong pfn = 0; pfn < total; pfn++)
        {
            if (pfn % MigrationFormat.BatchPages == 0)
                cancellation.ThrowIfCancellationRequested();
            if (!_p2m.TryFind(pfn, out Mfn frame))
                continue;
            AddPage(pfn, frame);
            if (_count < MigrationFormat.BatchPages)
                continue;
            WriteBatch();
            progress?.Report(new PageProgress(pfn + 1, total));
        }

        if (_count != 0)
            WriteBatch();
        progress?.Report(new PageProgress(total, total));
    }

    private void AddPage(ulong pfn, Mfn frame)
    {
        PageInfoType type = _p2m.TypeOf(frame);
        Span<byte> to = _data.AsSpan(_dataLength, (int)Paging.PageSize);
        int level = MigrationFormat.LevelOf(type);
        if (level != 0)
        {
            CanonicalisePageTable(pfn, frame, level, MemoryMarshal.Cast<byte, PageTableEntry>(to));
        }
        else if (_empty.Contains(frame))
        {
            type = PageInfoType.AllocateOnly;
        }
        else
        {
            // Copied first: a back end, or another domain, may be writing to it.
            new ReadOnlySpan<byte>(_context->Memory.Page(frame), to.Length).CopyTo(to);
            if (!to.ContainsAnyExcept((byte)0))
                type = PageInfoType.AllocateOnly;
        }

        _pfns[_count++] = pfn | ((ulong)type << MigrationFormat.PageTypeShift);
        if (MigrationFormat.HasData(type))
            _dataLength += to.Length;
    }

    /// <summary>Copies a table with pfns for machine frames, and without the hypervisor's entries.</summary>
    private void CanonicalisePageTable(ulong pfn, Mfn frame, int level, Span<PageTableEntry> to)
    {
        PageTableEntry* from = _context->Memory.Table(frame);
        for (int i = 0; i < Paging.EntriesPerTable; i++)
        {
            PageTableEntry entry = from[i];
            if (level == MigrationFormat.PageTableLevels && Paging.IsHypervisorSlot(i))
                entry = default;
            if (entry.IsPresent)
            {
                if (!_p2m.TryFindPfn(entry.Frame, out ulong target))
                {
                    throw Refused(
                        $"entry {i} of the page table in pfn {pfn:x} maps {entry.Frame}, which is another domain's, shared with it, or not in its p2m list");
                }

                entry = new PageTableEntry(new Mfn(target), entry.Flags);
            }

            to[i] = entry;
        }
    }

    private void WriteBatch()
    {
        Span<byte> head = stackalloc byte[8];
        head.Clear();
        BinaryPrimitives.WriteInt32LittleEndian(head, _count);
        ReadOnlySpan<byte> pfns = MemoryMarshal.AsBytes(_pfns.AsSpan(0, _count));
        writer.Begin(RecordType.PageData, (uint)(head.Length + pfns.Length + _dataLength));
        writer.Write(head);
        writer.Write(pfns);
        writer.Write(_data.AsSpan(0, _dataLength));
        writer.End();
        (_count, _dataLength) = (0, 0);
    }
}
