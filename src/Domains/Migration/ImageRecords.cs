// Everything that an image holds, read record by record: pages go to the domain's memory at once, the rest is kept.
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Reads an image up to its END record. What it leaves behind is complete and of the right sizes; what the contents mean is not looked at
/// yet, and page tables are as they came.
/// </summary>
/// <param name="domain">A domain without pages.</param>
/// <param name="image">The image.</param>
internal sealed unsafe class ImageRecords(Domain domain, DomainImageReader image)
{
    /// <summary>Pages that are read from the stream at once.</summary>
    private const int PagesAtOnce = 64;

    private readonly DomainContext* _context = domain.Context;
    private readonly MigrationReader _reader = image.Reader;
    private readonly SortedDictionary<int, VcpuRecords> _vcpus = [];
    private readonly byte[] _data = new byte[PagesAtOnce << Paging.PageShift];
    private readonly Mfn[] _targets = new Mfn[PagesAtOnce];
    private RestoredPages? _pages;
    private ulong[] _p2mPfns = [];
    private byte[] _sharedInfo = [];
    private byte[] _tscInfo = [];
    private bool _isPv;
    private ulong _done;

    /// <summary>The pages.</summary>
    public RestoredPages Pages => _pages!;

    /// <summary>Pfns of the pages of the p2m list, in its order, as the image gives them.</summary>
    public ReadOnlySpan<ulong> P2MPfns => _p2mPfns;

    /// <summary>The saved shared_info, a page.</summary>
    public ReadOnlySpan<byte> SharedInfo => _sharedInfo;

    /// <summary>System time at which it was saved, in nanoseconds; 0 where the image does not say.</summary>
    public ulong SystemTime => _tscInfo.Length == 0 ? 0 : BinaryPrimitives.ReadUInt64LittleEndian(_tscInfo.AsSpan(8));

    /// <summary>The vCPUs by their numbers, 0 among them. Each has a context.</summary>
    public IReadOnlyDictionary<int, VcpuRecords> Vcpus => _vcpus;

    /// <summary>Reads all of it.</summary>
    /// <exception cref="MigrationException">It is damaged, or not for a domain here.</exception>
    public void Read()
    {
        _reader.ReadHeaders();
        image.Progress?.Report(default);
        while (true)
        {
            image.Cancellation.ThrowIfCancellationRequested();
            RecordHeader record = _reader.Next();
            if (record.Type == RecordType.End)
                break;
            ReadRecord(record);
        }

        // The stream is left right behind the record, whatever its body is.
        _reader.Skip();
        CheckComplete();
    }

    private static MigrationException Incomplete(string what) => new($"The image is not complete: it has no {what}.");

    private void ReadRecord(RecordHeader record)
    {
        switch (record.Type)
        {
            case RecordType.PvInfo:
                ReadPvInfo();
                return;
            case RecordType.CpuidPolicy:
                byte[] policy = ReadArray(record, MigrationFormat.CpuidLeafSize, 4096);
                CpuidRecord.Check(policy, domain.Cpuid);
                domain.RestrictCpuid(CpuidRecord.Overrides(policy));
                return;
            case RecordType.MsrPolicy:
                // Tells which registers exist, and that not in a domain's favour: what it uses of them is in its vCPUs' records.
                _ = ReadArray(record, MigrationFormat.MsrSize, 4096);
                return;
            case RecordType.StaticDataEnd:
                return;
            case RecordType.PvP2MFrames:
                ReadP2MFrames(record);
                return;
            case RecordType.PageData:
                ReadPageData(record);
                return;
            case RecordType.SharedInfo:
                _sharedInfo = _reader.ReadBody((uint)Paging.PageSize, (uint)Paging.PageSize);
                return;
            case RecordType.TscInfo:
                const uint tscInfoSize = 24;
                _tscInfo = _reader.ReadBody(tscInfoSize, tscInfoSize);
                return;
            case RecordType.VcpuBasic or RecordType.VcpuExtended or RecordType.VcpuXsave or RecordType.VcpuMsrs:
                ReadVcpu(record);
                return;
            case RecordType.HvmContext or RecordType.HvmParams:
                throw _reader.Malformed("only those of HVM domains have one");
            case RecordType.Checkpoint or RecordType.CheckpointDirtyPfnList or RecordType.Verify:
                throw new MigrationException(
                    $"The image is a migration under way, with a record {record.Type}; only domains that were saved can be restored.");
            default:
                // The head is enough: what is left of the body is passed over.
                if (!record.IsOptional)
                {
                    throw new MigrationException(
                        $"The image has a record of a type that is not known here, {(uint)record.Type:x}; it was saved by something newer.");
                }

                return;
        }
    }

    private void ReadPvInfo()
    {
        byte[] body = _reader.ReadBody(2, 64);
        if (body[0] != MigrationFormat.GuestWidth || body[1] != MigrationFormat.PageTableLevels)
        {
            throw new MigrationException(
                $"The image is of a guest with {body[0] * 8} bits and {body[1]} levels of page tables; only 64-bit guests run here.");
        }

        _isPv = true;
    }

    private byte[] ReadArray(RecordHeader record, uint elementSize, uint maxElements)
    {
        if (record.Length % elementSize != 0)
            throw _reader.Malformed($"its {record.Length} bytes are no whole number of elements");
        return _reader.ReadBody(0, elementSize * maxElements);
    }

    private void ReadP2MFrames(RecordHeader record)
    {
        if (!_isPv)
            throw Incomplete("record PvInfo in front of what needs it");
        if (_pages != null)
            throw _reader.Malformed("there are two");
        Span<byte> head = stackalloc byte[8];
        _reader.Read(head);
        uint first = BinaryPrimitives.ReadUInt32LittleEndian(head);
        uint last = BinaryPrimitives.ReadUInt32LittleEndian(head[4..]);
        ulong count = (last / MigrationFormat.P2MEntriesPerPage) + 1UL;
        if (first != 0 || count > MigrationFormat.MaxP2MPages || record.Length != (ulong)head.Length + (count * sizeof(ulong)))
            throw _reader.Malformed($"pfns {first:x} to {last:x} do not go with its {record.Length} bytes");
        _p2mPfns = new ulong[count];
        _reader.Read(MemoryMarshal.AsBytes(_p2mPfns.AsSpan()));
        _pages = new RestoredPages(_context->Memory, last);
    }

    private void ReadPageData(RecordHeader record)
    {
        if (_pages == null)
            throw Incomplete("record PvP2MFrames in front of its pages");
        Span<byte> head = stackalloc byte[8];
        _reader.Read(head);
        uint count = BinaryPrimitives.ReadUInt32LittleEndian(head);
        if (count is 0 or > MigrationFormat.MaxBatchPages || (ulong)head.Length + ((ulong)count * sizeof(ulong)) > record.Length)
            throw _reader.Malformed($"{count} pages do not go with its {record.Length} bytes");
        ulong[] entries = new ulong[count];
        _reader.Read(MemoryMarshal.AsBytes(entries.AsSpan()));
        ulong withData = 0;
        foreach (ulong entry in entries)
        {
            PageInfoType type = TypeOf(entry);
            if (!MigrationFormat.IsKnown(type))
                throw _reader.Malformed($"a page is of type {(int)type:x}, which there is not");
            if ((entry & MigrationFormat.PfnMask) > _pages.LastPfn)
                throw _reader.Malformed($"a page is at pfn {entry & MigrationFormat.PfnMask:x}, past the end of the guest's p2m list");
            withData += MigrationFormat.HasData(type) ? 1UL : 0;
        }

        if (record.Length != (ulong)head.Length + ((ulong)count * sizeof(ulong)) + (withData << Paging.PageShift))
            throw _reader.Malformed($"{withData} pages with contents do not go with its {record.Length} bytes");
        FillPages(entries);
        _done += count;
        image.Progress?.Report(new PageProgress(_done, 0));
    }

    private static PageInfoType TypeOf(ulong entry) => (PageInfoType)(entry >> MigrationFormat.PageTypeShift);

    private void FillPages(ReadOnlySpan<ulong> entries)
    {
        int waiting = 0;
        foreach (ulong entry in entries)
        {
            PageInfoType type = TypeOf(entry);
            ulong pfn = entry & MigrationFormat.PfnMask;
            bool known = _pages!.TryFind(pfn, out RestoredPages.Page page);
            if (type is PageInfoType.None or PageInfoType.Broken)
            {
                // One that was sent before and has gone since is a page that nobody uses.
                if (known)
                    _pages.Set(page with { Type = PageInfoType.Normal });
                continue;
            }

            Mfn frame = known ? page.Frame : Allocate(pfn);
            _pages.Set(new RestoredPages.Page(pfn, frame, type == PageInfoType.AllocateOnly ? PageInfoType.Normal : type));
            if (MigrationFormat.HasData(type))
            {
                _targets[waiting++] = frame;
                if (waiting == PagesAtOnce)
                    Fill(ref waiting);
            }
            else if (known)
            {
                NativeMemory.Clear(_context->Memory.Page(frame), (nuint)Paging.PageSize);
            }
        }

        Fill(ref waiting);
    }

    private void Fill(ref int count)
    {
        Span<byte> data = _data.AsSpan(0, count << Paging.PageShift);
        _reader.Read(data);
        for (int i = 0; i < count; i++)
            data.Slice(i << Paging.PageShift, (int)Paging.PageSize).CopyTo(new Span<byte>(_context->Memory.Page(_targets[i]), (int)Paging.PageSize));
        count = 0;
    }

    /// <summary>A new frame of the domain's, which in a new VM is empty.</summary>
    private Mfn Allocate(ulong pfn)
    {
        if (!FrameTable.Of(_context)->TryAllocate(FrameFlags.None, 0, out Mfn frame))
        {
            throw new MigrationException(
                $"The image holds more pages than the {_context->State->MaxPages} that the domain may own: "
                + "give it as much memory as it had when it was saved.");
        }

        _context->MachineToPhys[_context->Memory.IndexOf(frame)] = pfn;
        return frame;
    }

    private void ReadVcpu(RecordHeader record)
    {
        Span<byte> head = stackalloc byte[MigrationFormat.VcpuHeaderSize];
        _reader.Read(head);
        uint number = BinaryPrimitives.ReadUInt32LittleEndian(head);
        if (number >= (uint)domain.Vcpus.Count)
        {
            throw new MigrationException(
                $"The image has a vCPU {number}; the domain is made with {domain.Vcpus.Count}. Give it as many as it had when it was saved.");
        }

        (uint least, uint most) = record.Type switch
        {
            RecordType.VcpuBasic => ((uint)sizeof(VcpuInitialisation.GuestContext), (uint)sizeof(VcpuInitialisation.GuestContext)),
            RecordType.VcpuExtended => (0u, (uint)VcpuRecords.MaxExtendedSize),
            RecordType.VcpuXsave => (0u, (uint)(VcpuRecords.XsaveHeaderSize + ExtendedState.Size)),
            _ => (0u, (uint)(VcpuRecords.MaxMsrs * MigrationFormat.MsrSize)),
        };
        uint length = record.Length - MigrationFormat.VcpuHeaderSize;
        if (length < least || length > most || (record.Type == RecordType.VcpuMsrs && length % MigrationFormat.MsrSize != 0))
            throw _reader.Malformed($"it has {record.Length} bytes");
        byte[] body = new byte[length];
        _reader.Read(body);
        if (!_vcpus.TryGetValue((int)number, out VcpuRecords? vcpu))
            _vcpus.Add((int)number, vcpu = new VcpuRecords());
        switch (record.Type)
        {
            case RecordType.VcpuBasic:
                vcpu.Basic = body;
                return;
            case RecordType.VcpuExtended:
                vcpu.Extended = body;
                return;
            case RecordType.VcpuXsave:
                vcpu.Xsave = body;
                return;
            default:
                vcpu.Msrs = body;
                return;
        }
    }

    private void CheckComplete()
    {
        if (_pages == null)
            throw Incomplete("record PvP2MFrames");
        if (_sharedInfo.Length == 0)
            throw Incomplete("record SharedInfo");
        if (!_vcpus.ContainsKey(0))
            throw Incomplete("first vCPU");
        foreach ((int number, VcpuRecords vcpu) in _vcpus)
        {
            if (vcpu.Basic == null)
                throw Incomplete($"registers of vCPU {number}");
        }
    }
}
