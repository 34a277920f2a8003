// Lays a PV kernel out in the memory of a fresh domain, as Xen's toolstack does for 64-bit PV (tools/libs/guest).
using System.Runtime.InteropServices;
using System.Text;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Builder;

/// <summary>
/// Pseudo-physical memory from the bottom, mapped at VIRT_BASE: kernel, ramdisk, p2m list, start_info, xenstore page, console
/// page, page tables, boot stack; the mapping goes on to a 4 MiB boundary at least 512 KiB later. A p2m list with an address of
/// its own (INIT_P2M) and an unmapped ramdisk (MOD_START_PFN) come behind that.
/// </summary>
internal sealed unsafe class DomainBuilder
{
    private const ulong BootMappingAlignment = 4UL << 20;
    private const ulong BootMappingSlack = 512UL << 10;
    private const int TableLevels = 4;

    // SIF_* flags of start_info.
    private const uint ModStartPfn = 1 << 3;

    private const PageFlags BranchFlags = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;
    private const PageFlags LeafFlags = PageFlags.Present | PageFlags.Writable | PageFlags.Accessed;

    private readonly DomainContext* _domain;
    private readonly DomainOptions _options;
    private readonly KernelImage _kernel;
    private readonly ulong _pages;
    private Mfn _firstFrame;

    /// <param name="domain">The empty domain; its frames are all free.</param>
    /// <param name="options">What to build.</param>
    public DomainBuilder(DomainContext* domain, DomainOptions options)
    {
        _domain = domain;
        _options = options;
        _kernel = options.Kernel ?? throw new DomainBuildException("A domain that is built needs a kernel: give it one.");
        _pages = DomainOptions.Pages(options.MemoryMiB);
    }

    /// <summary>A range of pseudo-physical pages.</summary>
    private readonly record struct Range(ulong First, ulong Count)
    {
        public ulong End => First + Count;

        public bool Contains(ulong pfn) => pfn - First < Count;
    }

    /// <summary>What a boot image takes, in pages.</summary>
    private struct Plan
    {
        public Range Ramdisk;
        public Range P2M;
        public ulong StartInfo;
        public ulong Store;
        public ulong Console;
        public Range PageTables;
        public ulong BootStack;

        /// <summary>Pages mapped from VIRT_BASE on.</summary>
        public ulong MappedPages;

        /// <summary>Pages used in all.</summary>
        public ulong End;
    }

    /// <summary>Gives the domain its own pages: one run, before any other frame is taken.</summary>
    public void AllocateMemory()
    {
        FrameTable* frames = FrameTable.Of(_domain);
        _firstFrame = _domain->Memory.FirstFrame;
        for (ulong i = 0; i < _pages; i++)
        {
            if (!frames->TryAllocate(FrameFlags.None, 0, out _))
                throw new DomainBuildException("The virtual machine has less memory than the domain was given.");
            _domain->MachineToPhys[i] = i;
        }
    }

    /// <summary>Gives a domain its shared_info, which is the hypervisor's, before anything can send it an event.</summary>
    public static void AllocateSharedInfo(DomainContext* domain)
    {
        if (!FrameTable.Of(domain)->TryAllocate(FrameFlags.Special, 0, out Mfn shared))
            throw new DomainBuildException("The virtual machine has no room for the domain's shared_info page.");
        domain->State->SharedInfoFrame = shared.Value;
        domain->SharedInfo = domain->Memory.Page(shared);

        // As Xen has it: the guest starts with upcalls masked on every vCPU.
        for (int vcpu = 0; vcpu < SharedInfoLayout.LegacyVcpus; vcpu++)
            ((VcpuInfo*)domain->SharedInfo)[vcpu].EvtchnUpcallMask = 1;
    }

    /// <summary>Places everything and points the vCPU at the kernel's entry.</summary>
    /// <exception cref="DomainBuildException">It does not fit, or the options are out of range.</exception>
    public DomainLayout Build(VcpuContext* vcpu, uint consolePort, uint storePort)
    {
        byte[] commandLine = Encoding.UTF8.GetBytes(_options.CommandLine);
        if (commandLine.Length >= StartInfo.CommandLineSize)
        {
            throw new DomainBuildException(
                $"The kernel command line has {commandLine.Length} bytes; a guest can be given {StartInfo.CommandLineSize - 1}. Shorten it.");
        }

        Plan plan = MakePlan();
        LoadKernel();
        if (plan.Ramdisk.Count != 0)
            CopyIn(plan.Ramdisk.First << Paging.PageShift, _options.Ramdisk.Span);
        for (ulong pfn = 0; pfn < _pages; pfn++)
            *(ulong*)HostOf((plan.P2M.First << Paging.PageShift) + (pfn * sizeof(ulong))) = (_firstFrame + pfn).Value;
        BuildPageTables(plan);
        FillStartInfo(plan, commandLine, consolePort, storePort);
        if (_kernel.HypercallPage is { } hypercallPage)
            HypercallPage.Fill(new Span<byte>(HostOf(hypercallPage - _kernel.VirtualBase), (int)Paging.PageSize));

        Mfn root = FrameOf(plan.PageTables.First);
        Errno error;
        while ((error = MmuextOp.Pin(vcpu, root, PageType.L4PageTable)) == Errno.ERESTART)
            vcpu->Budget.Renew();
        if (error == Errno.None)
            error = MmuextOp.NewBaseptr(vcpu, root);
        if (error != Errno.None)
            throw new InvalidOperationException($"The boot page tables that were built are refused by validation ({error}).");
        SetEntryState(vcpu, plan);
        var layout = new DomainLayout
        {
            SharedInfo = new Mfn(_domain->State->SharedInfoFrame),
            StartInfo = FrameOf(plan.StartInfo),
            Console = FrameOf(plan.Console),
            Store = FrameOf(plan.Store),
            PageTableRoot = root,
        };
        foreach (ulong frame in layout.WrittenByManager)
        {
            if (!TryHoldWritable(vcpu, new Mfn(frame)))
                throw new InvalidOperationException($"The boot page tables let {new Mfn(frame)} not be written.");
        }

        return layout;
    }

    /// <summary>
    /// Takes the reference that dom0's own mapping would hold of a page on Xen, for as long as the domain lives: the guest may give up
    /// its mapping, but never make a page table of what is written behind its validation.
    /// </summary>
    /// <returns>False where the page is in use as something that must not be written to.</returns>
    public static bool TryHoldWritable(VcpuContext* vcpu, Mfn frame)
        => PageTables.GetPageAndType(vcpu, frame, PageType.Writable, out _) == Errno.None;

    private static ulong PagesOf(ulong bytes) => (bytes + Paging.PageSize - 1) >> Paging.PageShift;

    private static ulong RoundUp(ulong value, ulong unit) => (value + unit - 1) & ~(unit - 1);

    private Mfn FrameOf(ulong pfn) => _firstFrame + pfn;

    private byte* HostOf(ulong address) => _domain->Memory.Page(FrameOf(address >> Paging.PageShift)) + (address & Paging.PageOffsetMask);

    private ulong VirtualOf(ulong pfn) => _kernel.VirtualBase + (pfn << Paging.PageShift);

    private Plan MakePlan()
    {
        var plan = default(Plan);
        ulong next = PagesOf(_kernel.GuestPhysicalEnd);
        if (next >= _pages)
            throw TooSmall(next, "the kernel");
        Range Take(ulong count)
        {
            var range = new Range(next, count);
            next += count;
            return range;
        }

        ulong ramdiskPages = PagesOf((ulong)_options.Ramdisk.Length);
        ulong p2mPages = PagesOf(_pages * sizeof(ulong));
        bool separateP2M = _kernel.InitP2M != null;
        if (!_kernel.ModStartPfn)
            plan.Ramdisk = Take(ramdiskPages);
        if (!separateP2M)
            plan.P2M = Take(p2mPages);
        plan.StartInfo = Take(1).First;
        plan.Store = Take(1).First;
        plan.Console = Take(1).First;

        // More tables may need more mapping, which may need more tables.
        ulong tables = 0;
        while (true)
        {
            ulong end = VirtualOf(next + tables + 1) + BootMappingSlack;
            plan.MappedPages = (RoundUp(end, BootMappingAlignment) - _kernel.VirtualBase) >> Paging.PageShift;
            ulong needed = CountTables(plan.MappedPages, separateP2M ? p2mPages : 0);
            if (needed <= tables)
                break;
            tables = needed;
        }

        plan.PageTables = Take(tables);
        plan.BootStack = Take(1).First;
        next = Math.Max(next, Math.Min(plan.MappedPages, _pages));
        if (separateP2M)
            plan.P2M = Take(p2mPages);
        if (_kernel.ModStartPfn)
            plan.Ramdisk = Take(ramdiskPages);
        plan.End = next;
        if (next > _pages || plan.BootStack >= _pages)
            throw TooSmall(Math.Max(next, plan.BootStack + 1), _options.Ramdisk.Length == 0 ? "the kernel" : "the kernel and its ramdisk");
        return plan;
    }

    private DomainBuildException TooSmall(ulong pages, string what)
    {
        // Room to unpack and run as well, not only to be loaded.
        ulong advised = RoundUp((pages >> 8) + 1, 64);
        return new DomainBuildException(
            $"{_options.MemoryMiB} MiB of memory are too few: loading {what} takes {(pages >> 8) + 1} MiB. Give the domain more (--memory {advised}).");
    }

    /// <summary>Tables that a contiguous range of addresses takes at each level below L4, plus the L4.</summary>
    private ulong CountTables(ulong mappedPages, ulong p2mPages)
    {
        ulong count = 1;
        for (int level = 1; level < TableLevels; level++)
        {
            int shift = Paging.PageShift + (9 * level);
            count += CountSpans(_kernel.VirtualBase, mappedPages, shift);
            if (p2mPages != 0)
                count += CountSpans(_kernel.InitP2M!.Value, p2mPages, shift);
        }

        return count;
    }

    private static ulong CountSpans(ulong start, ulong pages, int shift)
        => ((start + (pages << Paging.PageShift) - 1) >> shift) - (start >> shift) + 1;

    private void LoadKernel()
    {
        // Above this nothing was stored yet, so that it reads as zeroes and takes none of the host's memory. Kernels have a third of theirs
        // zeroed, and some of that written out in their files.
        ulong stored = 0;
        foreach (KernelSegment segment in _kernel.Segments)
        {
            if (PagesOf(segment.GuestPhysicalEnd) > _pages)
                throw TooSmall(PagesOf(segment.GuestPhysicalEnd), "the kernel");
            ReadOnlySpan<byte> data = segment.Data.Span;
            data = data[..(data.LastIndexOfAnyExcept((byte)0) + 1)];
            CopyIn(segment.GuestPhysicalAddress, data);
            ulong zeroFrom = segment.GuestPhysicalAddress + (ulong)data.Length;
            ulong zeroEnd = Math.Min(segment.GuestPhysicalEnd, stored);
            if (zeroFrom < zeroEnd)
                NativeMemory.Clear(HostOf(zeroFrom), (nuint)(zeroEnd - zeroFrom));
            stored = Math.Max(stored, zeroFrom);
        }
    }

    /// <summary>Copies to a guest-physical address. The domain's frames are one run, so its memory is contiguous here too.</summary>
    private void CopyIn(ulong address, ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty)
            return;
        var room = new Span<byte>(HostOf(address), bytes.Length);
        HostPages.Populate(room);
        bytes.CopyTo(room);
    }

    private void BuildPageTables(in Plan plan)
    {
        ulong nextTable = plan.PageTables.First + 1;
        Map(_kernel.VirtualBase, 0, Math.Min(plan.MappedPages, _pages), plan, ref nextTable);
        if (_kernel.InitP2M is { } p2mAddress)
            Map(p2mAddress, plan.P2M.First, plan.P2M.Count, plan, ref nextTable);
    }

    private void Map(ulong address, ulong firstPfn, ulong count, in Plan plan, ref ulong nextTable)
    {
        for (ulong i = 0; i < count; i++)
        {
            var virtualAddress = new VirtualAddress(address + (i << Paging.PageShift));
            ulong table = plan.PageTables.First;
            for (int level = TableLevels; level > 1; level--)
            {
                PageTableEntry* entry = _domain->Memory.Table(FrameOf(table)) + virtualAddress.TableIndex(level);
                if (!entry->IsPresent)
                    *entry = new PageTableEntry(FrameOf(nextTable++), BranchFlags);
                table = entry->Frame.Value - _firstFrame.Value;
            }

            // Page tables are never writable by the guest.
            ulong pfn = firstPfn + i;
            PageFlags flags = plan.PageTables.Contains(pfn) ? LeafFlags & ~PageFlags.Writable : LeafFlags;
            _domain->Memory.Table(FrameOf(table))[virtualAddress.TableIndex(1)] = new PageTableEntry(FrameOf(pfn), flags);
        }
    }

    private void FillStartInfo(in Plan plan, byte[] commandLine, uint consolePort, uint storePort)
    {
        var info = (StartInfo*)HostOf(plan.StartInfo << Paging.PageShift);
        *info = default;
        "xen-3.0-x86_64"u8.CopyTo(new Span<byte>(info->Magic, 32));
        info->PageCount = _pages;
        info->SharedInfo = _domain->State->SharedInfoFrame << Paging.PageShift;
        info->StoreMfn = FrameOf(plan.Store).Value;
        info->StoreEventChannel = storePort;
        info->ConsoleMfn = FrameOf(plan.Console).Value;
        info->ConsoleEventChannel = consolePort;
        info->PageTableBase = VirtualOf(plan.PageTables.First);
        info->PageTableFrames = plan.PageTables.Count;
        info->MfnList = _kernel.InitP2M ?? VirtualOf(plan.P2M.First);
        if (_kernel.InitP2M != null)
        {
            info->FirstP2MPfn = plan.P2M.First;
            info->P2MFrames = plan.P2M.Count;
        }

        if (plan.Ramdisk.Count != 0)
        {
            info->Flags |= _kernel.ModStartPfn ? ModStartPfn : 0;
            info->ModuleStart = _kernel.ModStartPfn ? plan.Ramdisk.First : VirtualOf(plan.Ramdisk.First);
            info->ModuleLength = (ulong)_options.Ramdisk.Length;
        }

        commandLine.CopyTo(new Span<byte>(info->CommandLine, StartInfo.CommandLineSize));
    }

    private void SetEntryState(VcpuContext* vcpu, in Plan plan)
    {
        *vcpu->Registers = new CpuRegisters
        {
            Rip = _kernel.VirtualEntry,
            Rsp = VirtualOf(plan.BootStack + 1),
            Rsi = VirtualOf(plan.StartInfo),
            Rflags = (ulong)(Rflags.Fixed | Rflags.InterruptEnable),
        };
        *vcpu->Segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs64, Ss = FlatSelectors.Ring3Data };
        vcpu->State->KernelMode = 1;
    }
}
