// From an image to a domain that can be started: what libxc's xg_sr_restore does of a PV domain, with the hypervisor's own checks.
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Fills a fresh domain, whose vCPUs and event channels exist and have done nothing. An image is as hostile as a guest: pfns are looked up,
/// never used as indexes unchecked; page tables, descriptor tables and vCPUs go through the code that validates a guest's own.
/// </summary>
/// <param name="domain">The domain.</param>
/// <param name="image">The image.</param>
internal sealed unsafe class DomainRestorer(Domain domain, DomainImageReader image)
{
    /// <summary>What system time can be: 30 years, in nanoseconds.</summary>
    private const ulong MaxSystemTime = 30UL * 366 * 24 * 3600 * 1_000_000_000;

    private readonly DomainContext* _context = domain.Context;
    private readonly ImageRecords _records = new(domain, image);

    /// <summary>Restores all of it.</summary>
    /// <returns>Where things are.</returns>
    /// <exception cref="MigrationException">The image is damaged, hostile, or not for this host.</exception>
    public DomainLayout Restore()
    {
        _records.Read();
        VcpuInitialisation.GuestContext first = _records.Vcpus[0].ReadBasic();
        if ((first.VmAssists & ~(ulong)VmAssistOp.Valid) != 0)
            throw Damaged($"the guest has assists on that there are not ({first.VmAssists:x})");
        _context->State->VmAssists = first.VmAssists;
        WriteP2M();
        foreach (RestoredPages.Page page in _records.Pages.All)
        {
            if (MigrationFormat.LevelOf(page.Type) is not 0 and int level)
                LocalisePageTable(page, level);
        }

        DomainLayout layout = RestoreStartInfo(first.Registers.Rdx);
        RestoreSharedInfo();
        PinPageTables();
        foreach ((int number, VcpuRecords records) in _records.Vcpus)
            RestoreVcpu(domain.FindVcpu((uint)number)!, records);
        foreach (ulong frame in layout.WrittenByManager)
        {
            if (!DomainBuilder.TryHoldWritable(domain.Vcpus[0].Context, new Mfn(frame)))
                throw Damaged("a page that the guest shares with its console or xenstore is a page table, or a descriptor table");
        }

        if (_records.SystemTime > MaxSystemTime)
            throw Damaged("the guest's clock is where no clock can be");
        domain.Time.ContinueFrom((long)_records.SystemTime);
        return layout with { PageTableRoot = new Mfn(domain.Vcpus[0].Context->State->KernelRoot) };
    }

    private static MigrationException Damaged(string how) => new($"The image is damaged: {how}.");

    /// <summary>A page that is no table, and so may be written to.</summary>
    private RestoredPages.Page OrdinaryPage(ulong pfn, string what)
    {
        if (!_records.Pages.TryFind(pfn, out RestoredPages.Page page))
            throw Damaged($"{what} is in pfn {pfn:x}, which it has no page for");
        return page.Type == PageInfoType.Normal ? page : throw Damaged($"{what} is in pfn {pfn:x}, which is a page table");
    }

    private Mfn FrameOf(ulong pfn, string what)
        => _records.Pages.TryFind(pfn, out RestoredPages.Page page) ? page.Frame
            : throw Damaged($"{what} is in pfn {pfn:x}, which it has no page for");

    /// <summary>Writes the guest's p2m list anew, which names the frames that it had where it was saved.</summary>
    private void WriteP2M()
    {
        RestoredPages pages = _records.Pages;
        ulong pfn = 0;
        foreach (ulong listPfn in _records.P2MPfns)
        {
            var list = (ulong*)_context->Memory.Page(OrdinaryPage(listPfn, "a part of the guest's p2m list").Frame);
            for (int i = 0; i < MigrationFormat.P2MEntriesPerPage; i++, pfn++)
                list[i] = pages.TryFind(pfn, out RestoredPages.Page page) ? page.Frame.Value : MigrationFormat.InvalidMfn;
        }
    }

    /// <summary>Puts machine frames for pfns. What the entries may do is looked at when the table is validated.</summary>
    private void LocalisePageTable(in RestoredPages.Page page, int level)
    {
        PageTableEntry* table = _context->Memory.Table(page.Frame);
        for (int i = 0; i < Paging.EntriesPerTable; i++)
        {
            if (level == MigrationFormat.PageTableLevels && Paging.IsHypervisorSlot(i))
                table[i] = default;
            if (!table[i].IsPresent)
                continue;
            if (!_records.Pages.TryFind(table[i].Frame.Value, out RestoredPages.Page target))
                throw Damaged($"entry {i} of the page table in pfn {page.Pfn:x} maps pfn {table[i].Frame.Value:x}, which it has no page for");
            table[i] = new PageTableEntry(target.Frame, table[i].Flags);
        }
    }

    /// <summary>Tells the guest where it is now; its rings were named by their pfns when it suspended.</summary>
    private DomainLayout RestoreStartInfo(ulong pfn)
    {
        Mfn frame = OrdinaryPage(pfn, "start_info").Frame;
        var info = (StartInfo*)_context->Memory.Page(frame);
        Mfn console = OrdinaryPage(info->ConsoleMfn, "the console ring").Frame;
        Mfn store = OrdinaryPage(info->StoreMfn, "the xenstore ring").Frame;
        if (console == store || console == frame || store == frame)
            throw Damaged("start_info and the rings of console and xenstore are not three pages");
        info->PageCount = _records.Pages.LastPfn + 1;
        info->SharedInfo = _context->State->SharedInfoFrame << Paging.PageShift;
        info->Flags = 0;
        info->StoreMfn = store.Value;
        info->StoreEventChannel = domain.StorePort;
        info->ConsoleMfn = console.Value;
        info->ConsoleEventChannel = domain.ConsolePort;
        return new DomainLayout
        {
            SharedInfo = new Mfn(_context->State->SharedInfoFrame),
            StartInfo = frame,
            Console = console,
            Store = store,
            PageTableRoot = default,
        };
    }

    /// <summary>
    /// Takes over what of the saved shared_info holds true: vcpu_info and what the guest said of itself. Nothing is pending, every port is
    /// masked, and the p2m list's frames are the guest's to tell again.
    /// </summary>
    private void RestoreSharedInfo()
    {
        ReadOnlySpan<byte> saved = _records.SharedInfo;
        var shared = new Span<byte>(_context->SharedInfo, (int)Paging.PageSize);
        saved[..SharedInfoLayout.EvtchnPending].CopyTo(shared);
        shared[SharedInfoLayout.EvtchnPending..SharedInfoLayout.EvtchnMask].Clear();
        shared[SharedInfoLayout.EvtchnMask..SharedInfoLayout.WallClockVersion].Fill(0xff);
        saved[SharedInfoLayout.WallClockVersion..].CopyTo(shared[SharedInfoLayout.WallClockVersion..]);
        MemoryMarshal.Write(shared[SharedInfoLayout.FrameListList..], 0UL);
        MemoryMarshal.Write(shared[SharedInfoLayout.P2MCr3..], 0UL);
        for (int vcpu = 0; vcpu < SharedInfoLayout.LegacyVcpus; vcpu++)
            ((VcpuInfo*)_context->SharedInfo)[vcpu].EvtchnPendingSel = 0;
    }

    private void PinPageTables()
    {
        VcpuContext* vcpu = domain.Vcpus[0].Context;
        foreach (RestoredPages.Page page in _records.Pages.All)
        {
            if (MigrationFormat.LevelOf(page.Type) is not 0 and int level && (page.Type & PageInfoType.Pinned) != 0)
            {
                Errno error = Repeat(vcpu, () => MmuextOp.Pin(vcpu, page.Frame, PageTables.TypeOfLevel(level)));
                Check(error, $"the page table of level {level} in pfn {page.Pfn:x}");
            }
        }
    }

    private void RestoreVcpu(Vcpu vcpu, VcpuRecords records)
    {
        VcpuInitialisation.GuestContext guest = records.ReadBasic();
        if (guest.GdtEntries > DescriptorTables.MaxGdtEntries)
            throw Damaged($"vCPU {vcpu.Id} has a descriptor table of {guest.GdtEntries} entries");
        ulong gdtPages = (guest.GdtEntries + Paging.EntriesPerTable - 1) / Paging.EntriesPerTable;
        for (int i = 0; i < (int)gdtPages; i++)
            guest.GdtFrames[i] = FrameOf(guest.GdtFrames[i], $"the descriptor table of vCPU {vcpu.Id}").Value;
        ulong kernel = guest.ControlRegisters[3] >> Paging.PageShift;
        guest.ControlRegisters[3] = FrameOf(kernel, $"the page tables' root of vCPU {vcpu.Id}").Value << Paging.PageShift;
        ulong user = guest.ControlRegisters[1];
        guest.ControlRegisters[1] = (user & VcpuInitialisation.UserRootValid) == 0 ? 0
            : FrameOf(user >> Paging.PageShift, $"the user page tables' root of vCPU {vcpu.Id}").Value << Paging.PageShift;
        if (vcpu.Id == 0)
            guest.Registers.Rdx = FrameOf(guest.Registers.Rdx, "start_info").Value;
        Vcpu first = domain.Vcpus[0];
        Check(Repeat(first.Context, () => VcpuInitialisation.Load(first, vcpu, guest)), $"the state of vCPU {vcpu.Id}");
        records.Load(vcpu, guest);
        vcpu.MarkInitialised();
    }

    private static void Check(Errno error, string what)
    {
        if (error != Errno.None)
            throw Damaged($"{what} is not what a guest may have ({error})");
    }

    /// <summary>Does again what was interrupted: nobody runs whom that serves.</summary>
    private static Errno Repeat(VcpuContext* vcpu, Func<Errno> operation)
    {
        Errno error;
        while ((error = operation()) == Errno.ERESTART)
            vcpu->Budget.Renew();
        return error;
    }
}
