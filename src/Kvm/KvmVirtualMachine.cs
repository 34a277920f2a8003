using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>One KVM VM: RAM, the M2P table and the monitor, laid out as <see cref="MonitorLayout"/> says.</summary>
public sealed unsafe class KvmVirtualMachine : IVirtualMachine
{
    /// <summary>vCPUs that the reserved GDT page has TSS descriptors for.</summary>
    public const int MaxVcpus = 128;

    private const ulong LargePageSize = 1UL << 21;
    private const PageFlags SupervisorData = PageFlags.Present | PageFlags.Writable | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
    private const PageFlags SupervisorCode = PageFlags.Present | PageFlags.Accessed;
    private const PageFlags UserReadOnly = PageFlags.Present | PageFlags.User | PageFlags.Accessed | PageFlags.NoExecute;
    private const PageFlags KernelWindowData = SupervisorData | PageFlags.User;
    private const PageFlags UserCode = SupervisorCode | PageFlags.User;
    private const PageFlags Branch = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed;

    private readonly KvmSystem _system;
    private readonly HostMemory _ram;
    private readonly HostMemory _region;
    private readonly HostWindow _window;
    private readonly ulong[] _hypervisorSlots = new ulong[Paging.HypervisorSlots];
    private ulong _userSlot;
    private readonly List<KvmVirtualCpu> _vcpus = [];
    private readonly Lock _slotLock = new();
    private readonly bool[] _created = new bool[MaxVcpus];
    private ulong _nextRegionPage;
    private ulong _nextMonitorAddress = MonitorLayout.MonitorStart;
    private ulong _interruptTable;
    private ulong _dropSlotMoved;
    private bool _othersStore;
    private int _file;
    private int _disposed;

    /// <param name="system">The open device.</param>
    /// <param name="capabilities">What the probes found.</param>
    /// <param name="ramSize">RAM in bytes, a multiple of the page size.</param>
    /// <param name="windowFrames">Frames of <see cref="Window"/>: 0 for none, and whole pages of the M2P table, which 512 make.</param>
    /// <param name="ramAddress">Where RAM starts in the VM: a multiple of 2 MiB, from 4 GiB on.</param>
    /// <exception cref="KvmException">The host refuses; nothing is left behind.</exception>
    public KvmVirtualMachine(
        KvmSystem system, HostCapabilities capabilities, ulong ramSize, ulong windowFrames = 0, ulong ramAddress = MonitorLayout.RamAddress)
    {
        ArgumentOutOfRangeException.ThrowIfZero(ramSize);
        ArgumentOutOfRangeException.ThrowIfNotEqual(ramSize & Paging.PageOffsetMask, 0UL);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(windowFrames, MonitorLayout.MaxWindow >> Paging.PageShift);
        ArgumentOutOfRangeException.ThrowIfNotEqual(windowFrames % Paging.EntriesPerTable, 0UL);
        ArgumentOutOfRangeException.ThrowIfLessThan(ramAddress, MonitorLayout.RamAddress);
        ArgumentOutOfRangeException.ThrowIfNotEqual(ramAddress % LargePageSize, 0UL);
        if (ramAddress > MonitorLayout.EndOfRam || ramSize > MonitorLayout.EndOfRam - ramAddress)
        {
            throw new KvmException(
                $"Domains can have {(MonitorLayout.EndOfRam - MonitorLayout.RamAddress) >> 30} GiB of memory together at most; give this one less");
        }

        _system = system;
        Capabilities = capabilities;
        ulong frames = ramSize >> Paging.PageShift;
        ulong machineToPhysSize = RoundUp(frames * sizeof(ulong), Paging.PageSize);
        ulong tables = 72 + ((ramAddress + ramSize) >> 30) + (machineToPhysSize >> 21) + (MaxVcpus / 16);
        ulong regionPages = tables + 16 + (MaxVcpus * (8 + MonitorLayout.ReturnAreaPages)) + (machineToPhysSize >> Paging.PageShift)
            + (windowFrames / Paging.EntriesPerTable);
        _file = -1;
        try
        {
            _ram = HostMemory.Create("xensharp-ram\0"u8, ramSize);
            _region = HostMemory.Create("xensharp-monitor\0"u8, regionPages << Paging.PageShift);
            _window = HostWindow.Create(windowFrames << Paging.PageShift);
            Memory = new MachineMemory(_ram.Address, new MachineAddress(ramAddress).Frame, frames);
            Window = new MachineMemory(_window.Address, new MachineAddress(MonitorLayout.WindowAddress).Frame, windowFrames);
            _file = LibC.ioctl(system.File, KvmRequest.CreateVm, 0);
            if (_file < 0)
                throw new KvmException("KVM_CREATE_VM failed", LibC.errno);

            // Only VMX needs these two, and only it can refuse them.
            Check(LibC.ioctl(_file, KvmRequest.SetTssAddress, (void*)MonitorLayout.TssAddress), "KVM_SET_TSS_ADDR failed");
            ulong identityMap = MonitorLayout.IdentityMapAddress;
            Check(LibC.ioctl(_file, KvmRequest.SetIdentityMapAddress, &identityMap), "KVM_SET_IDENTITY_MAP_ADDR failed");
            SetSlot(0, MonitorLayout.RegionAddress, _region.Address, _region.Size);
            SetSlot(1, ramAddress, _ram.Address, _ram.Size);
            SetSlot(2, MonitorLayout.DropSlotAddress, _ram.Address, Paging.PageSize);
            if (windowFrames != 0)
                SetSlot(3, MonitorLayout.WindowAddress, _window.Address, _window.Size);

            // Shadow pages, where KVM has them: the default of 2 % of RAM makes fork-heavy guests thrash.
            _ = LibC.ioctl(_file, KvmRequest.SetNrMmuPages, (void*)Math.Max(16384, frames / 8));
            BuildMonitor(machineToPhysSize);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public MachineMemory Memory { get; }

    /// <inheritdoc/>
    public void Load(MachineAddress address, ReadOnlySpan<byte> bytes)
    {
        ulong offset = address.Value - Memory.FirstFrame.Address.Value;
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, _ram.Size);
        ArgumentOutOfRangeException.ThrowIfGreaterThan((ulong)bytes.Length, _ram.Size - offset);
        _ram.Write(offset, bytes);
    }

    public ulong* MachineToPhys { get; private set; }

    public Mfn MachineToPhysFrame { get; private set; }

    public VirtualAddress MachineToPhysStart { get; private set; }

    /// <inheritdoc/>
    public MachineMemory Window { get; }

    /// <inheritdoc/>
    public ulong* WindowToPhys { get; private set; }

    public ReadOnlySpan<ulong> HypervisorSlots => _hypervisorSlots;

    /// <inheritdoc/>
    public int KernelSlot => SyscallEntryKind.Of(Capabilities).Serves ? new VirtualAddress(MonitorLayout.VcpuWindowsStart).TableIndex(4) : 0;

    /// <inheritdoc/>
    public ulong UserSlot => _userSlot;

    public TimeStampCounter TimeStampCounter => Capabilities.TimeStampCounter;

    public HostCapabilities Capabilities { get; }

    internal KvmSystem System => _system;

    internal int File => _file;

    internal MonitorCode Code { get; private set; } = null!;

    /// <summary>A CPUID leaf to be changed recognisably, for the probe that asks whether the policy reaches the guest.</summary>
    internal (uint Leaf, uint Eax)? CpuidMark { get; init; }

    internal ulong InterruptTable { get; private set; }

    /// <summary>Host view of the descriptors behind the guest's, which every vCPU's table ends with.</summary>
    internal ulong* ReservedDescriptors => (ulong*)Host(ReservedGdtPage);

    /// <summary>
    /// Page-table entries, and what were some, may be stored into by one vCPU while another's are being repeated; or by somebody outside.
    /// </summary>
    internal bool StoresMeet => _vcpus.Count > 1 || Volatile.Read(ref _othersStore);

    private ulong MonitorTableAddress { get; set; }

    private ulong ReservedGdtPage { get; set; }

    /// <summary>A page of null descriptors, for the part of a table that <c>set_gdt</c> has no frame for.</summary>
    private ulong EmptyGdtPage { get; set; }

    private ulong IoBitmapPages { get; set; }

    private static ulong RoundUp(ulong value, ulong unit) => (value + unit - 1) & ~(unit - 1);

    /// <summary>Bytes of the host's memory that the domain's RAM takes: what was written to and not discarded.</summary>
    /// <exception cref="KvmException">The host does not say.</exception>
    public ulong ResidentRam => _ram.Resident;

    /// <inheritdoc/>
    public void Discard(Mfn first, ulong count) => _ram.Discard(Memory.IndexOf(first) << Paging.PageShift, count << Paging.PageShift);

    /// <inheritdoc/>
    public ulong CountEmpty(Mfn first)
    {
        ulong offset = Memory.IndexOf(first) << Paging.PageShift;
        return (_ram.NextUsed(offset) - offset) >> Paging.PageShift;
    }

    /// <inheritdoc/>
    public bool TryShow(Mfn window, IVirtualMachine owner, Mfn frame, bool writable)
        => owner is KvmVirtualMachine other
            && _window.TryShow(Window.IndexOf(window) << Paging.PageShift, other._ram, other.Memory.IndexOf(frame) << Paging.PageShift, writable);

    /// <inheritdoc/>
    public bool TryProtect(Mfn window) => _window.TryProtect(Window.IndexOf(window) << Paging.PageShift);

    /// <inheritdoc/>
    public void Hide(Mfn window) => _window.Hide(Window.IndexOf(window) << Paging.PageShift);

    /// <inheritdoc/>
    public void ForgetTables()
    {
        if (!Volatile.Read(ref _othersStore))
        {
            // An entry that was begun before may still copy entries over themselves.
            Volatile.Write(ref _othersStore, true);
            Interlocked.MemoryBarrier();
            foreach (KvmVirtualCpu vcpu in _vcpus)
                vcpu.AwaitExit();
        }

        DropShadowPages();
    }

    /// <inheritdoc/>
    public IDisposable HoldMemory()
    {
        _ram.Hold();
        return new MemoryHold(_ram);
    }

    /// <inheritdoc/>
    public IVirtualCpu CreateVcpu(int number) => CreateKvmVcpu(number);

    internal KvmVirtualCpu CreateKvmVcpu(int number)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(number);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(number, MaxVcpus);
        if (_created[number])
            throw new ArgumentException($"vCPU {number} exists already.", nameof(number));
        var vcpu = new KvmVirtualCpu(this, number, BuildVcpuPages(number));
        _created[number] = true;
        _vcpus.Add(vcpu);
        return vcpu;
    }

    /// <summary>
    /// Makes KVM forget everything it derived from the guest's page tables: the way out where more entries were stored than can
    /// be repeated one by one. KVM does so whenever any memory slot moves, so a slot that nobody uses is moved; to take RAM
    /// itself away, if only for a moment, would fail the other vCPUs.
    /// </summary>
    internal void DropShadowPages()
    {
        lock (_slotLock)
        {
            _dropSlotMoved ^= 1;
            SetSlot(2, MonitorLayout.DropSlotAddress + (_dropSlotMoved << Paging.PageShift), _ram.Address, Paging.PageSize);
        }
    }

    public void Dispose()
    {
        if (Interlocked.Exchange(ref _disposed, 1) != 0)
            return;
        foreach (KvmVirtualCpu vcpu in _vcpus)
            vcpu.Dispose();
        _vcpus.Clear();
        if (_file >= 0)
            _ = LibC.close(_file);
        _file = -1;
        _ram?.Dispose();
        _region?.Dispose();
        _window?.Dispose();
    }

    internal static void Check(int result, string sentence)
    {
        if (result < 0)
            throw new KvmException(sentence, LibC.errno);
    }

    private void SetSlot(uint slot, ulong address, byte* host, ulong size)
    {
        var region = new KvmUserMemoryRegion { Slot = slot, GuestPhysicalAddress = address, Size = size, UserspaceAddress = (ulong)host };
        Check(LibC.ioctl(_file, KvmRequest.SetUserMemoryRegion, &region), "KVM_SET_USER_MEMORY_REGION failed");
    }

    /// <summary>Takes the next pages of the monitor's region.</summary>
    /// <returns>Guest-physical address of the first.</returns>
    private ulong TakePages(ulong count)
    {
        ulong address = MonitorLayout.RegionAddress + (_nextRegionPage << Paging.PageShift);
        _nextRegionPage += count;
        if (_nextRegionPage << Paging.PageShift > _region.Size)
            throw new InvalidOperationException("The monitor's region was sized too small.");
        return address;
    }

    private byte* Host(ulong physical) => _region.Address + (physical - MonitorLayout.RegionAddress);

    /// <summary>Takes pages and maps them at the next free addresses of the monitor's slot.</summary>
    private ulong TakeMapped(ulong count, PageFlags flags, out ulong physical)
    {
        physical = TakePages(count);
        return MapNext(count, physical, flags);
    }

    /// <summary>Maps pages at the next free addresses of the monitor's slot.</summary>
    private ulong MapNext(ulong count, ulong physical, PageFlags flags)
    {
        ulong start = _nextMonitorAddress;
        for (ulong i = 0; i < count; i++)
            Map(start + (i << Paging.PageShift), physical + (i << Paging.PageShift), flags);

        // A hole after every piece: running off its end faults.
        _nextMonitorAddress += (count + 1) << Paging.PageShift;
        return start;
    }

    private void Map(ulong address, ulong physical, PageFlags flags)
        => Host<ulong>(TableEntry(address, 1)) = (physical & PageTableEntry.FrameMask) | (ulong)flags;

    private ref T Host<T>(ulong physical)
        where T : unmanaged => ref *(T*)Host(physical);

    /// <summary>Physical address of the entry that maps an address at a level, with the tables above it made as needed.</summary>
    private ulong TableEntry(ulong address, int level)
        => TableEntry(ref _hypervisorSlots[new VirtualAddress(address).TableIndex(4) - Paging.FirstHypervisorSlot], address, level);

    /// <summary>The same below a given entry of the L4.</summary>
    private ulong TableEntry(ref ulong slot, ulong address, int level)
    {
        var virtualAddress = new VirtualAddress(address);
        ulong table = TableOf(ref slot);
        for (int current = 3; current > level; current--)
            table = TableOf(ref Host<ulong>(table + ((ulong)virtualAddress.TableIndex(current) * sizeof(ulong))));
        return table + ((ulong)virtualAddress.TableIndex(level) * sizeof(ulong));
    }

    private ulong TableOf(ref ulong entry)
    {
        if (entry == 0)
            entry = TakePages(1) | (ulong)Branch;
        return entry & PageTableEntry.FrameMask;
    }

    private void BuildMonitor(ulong machineToPhysSize)
    {
        BuildCode();
        BuildDescriptorTables();
        BuildMachineToPhys(machineToPhysSize);
        for (ulong address = MonitorLayout.RegionAddress & ~(LargePageSize - 1); address < MonitorLayout.RegionAddress + _region.Size; address += LargePageSize)
            MapLarge(address);
        for (ulong address = Memory.FirstFrame.Address.Value; address < Memory.EndFrame.Address.Value; address += LargePageSize)
            MapLarge(address);

        // All windows' tables now, so that the L4 entries never change once guests hold copies of them.
        for (int vcpu = 0; vcpu < MaxVcpus; vcpu++)
        {
            _ = TableEntry(DescriptorWindowStart(vcpu), 1);
            if (KernelSlot == 0)
                continue;
            _ = TableEntry(WindowAddress(vcpu, VcpuWindowPage.Entry), 1);
            _ = TableEntry(ref _userSlot, WindowAddress(vcpu, VcpuWindowPage.Entry), 1);
        }
    }

    private void MapLarge(ulong physical)
        => Host<ulong>(TableEntry(MonitorLayout.DirectMapStart + physical, 2)) = physical | (ulong)(SupervisorData | PageFlags.LargePage);

    private void BuildCode()
    {
        ulong codeStart = _nextMonitorAddress;
        Code = MonitorCode.Assemble(codeStart);
        ulong codePages = RoundUp((ulong)Code.Bytes.Length, Paging.PageSize) >> Paging.PageShift;
        _ = TakeMapped(codePages, SupervisorCode, out ulong codePage);
        Code.Bytes.CopyTo(new Span<byte>(Host(codePage), Code.Bytes.Length));
    }

    /// <summary>An interrupt gate to an address at CPL 0 (Intel SDM volume 3, 6.14.1).</summary>
    /// <param name="address">The address.</param>
    /// <param name="level">The highest CPL that may come there by INT3 or INTO.</param>
    internal static (ulong Low, ulong High) InterruptGate(ulong address, ulong level)
        => ((address & 0xffff) | ((ulong)MonitorLayout.MonitorCs << 16) | (0x8eUL << 40) | (level << 45) | ((address & 0xffff_0000) << 32), address >> 32);

    private void BuildDescriptorTables()
    {
        InterruptTable = TakeMapped(1, SupervisorData, out ulong table);
        for (int vector = 0; vector < MonitorLayout.Vectors; vector++)
        {
            ulong stub = Code.ExceptionStubs + (ulong)(vector * MonitorLayout.StubSize);

            // Interrupt gate; INT3 and INTO are the two that CPL 3 may raise by itself.
            ulong level = vector is (int)ExceptionVector.Breakpoint or (int)ExceptionVector.Overflow ? 3UL : 0UL;
            (Host<ulong>(table + (ulong)(vector * 16)), Host<ulong>(table + (ulong)(vector * 16) + 8)) = InterruptGate(stub, level);
        }

        _interruptTable = table;

        EmptyGdtPage = TakePages(1);
        ReservedGdtPage = TakePages(1);
        SetDescriptor(MonitorLayout.MonitorCs, 0x00af_9b00_0000_ffff);
        SetDescriptor(MonitorLayout.MonitorSs, 0x00cf_9300_0000_ffff);
        SetDescriptor(FlatSelectors.Ring3Cs32, 0x00cf_fb00_0000_ffff);
        SetDescriptor(FlatSelectors.Ring3Data, 0x00cf_f300_0000_ffff);
        SetDescriptor(FlatSelectors.Ring3Cs64, 0x00af_fb00_0000_ffff);

        // Every port denied, for the part of the bitmap past a TSS's own page; one byte more, as the processor reads two.
        IoBitmapPages = TakePages(2);
        new Span<byte>(Host(IoBitmapPages), 2 * (int)Paging.PageSize).Fill(0xff);
    }

    private void SetDescriptor(ushort selector, ulong descriptor)
        => Host<ulong>(ReservedGdtPage + (selector & 0xff8UL)) = descriptor;

    /// <summary>
    /// The table has an entry for every frame below the end of RAM; those below its start read as invalid from one page.
    /// </summary>
    private void BuildMachineToPhys(ulong size)
    {
        ulong physical = TakePages(size >> Paging.PageShift);
        MachineToPhys = (ulong*)Host(physical);
        MachineToPhysFrame = new MachineAddress(physical).Frame;
        ulong invalid = TakePages(1);
        new Span<byte>(Host(invalid), (int)Paging.PageSize).Fill(0xff);
        ulong start = Capabilities.Slot256Usable ? MonitorLayout.ClassicMachineToPhys : MonitorLayout.AlternativeMachineToPhys;
        MachineToPhysStart = new VirtualAddress(start);
        ulong ramPart = Memory.FirstFrame.Value * sizeof(ulong);
        ulong windowPart = Window.FirstFrame.Value * sizeof(ulong);
        ulong windowSize = Window.FrameCount * sizeof(ulong);
        ulong window = TakePages(windowSize >> Paging.PageShift);
        WindowToPhys = (ulong*)Host(window);
        new Span<byte>(WindowToPhys, (int)windowSize).Fill(0xff);
        for (ulong offset = 0; offset < ramPart; offset += Paging.PageSize)
            Map(start + offset, offset - windowPart < windowSize ? window + (offset - windowPart) : invalid, UserReadOnly);
        for (ulong offset = 0; offset < size; offset += Paging.PageSize)
            Map(start + ramPart + offset, physical + offset, UserReadOnly);
    }

    private static ulong DescriptorWindowStart(int vcpu)
        => MonitorLayout.DescriptorTablesStart + ((ulong)(vcpu * MonitorLayout.DescriptorWindowPages) << Paging.PageShift);

    private static ulong WindowAddress(int vcpu, VcpuWindowPage page)
        => MonitorLayout.VcpuWindowsStart + ((ulong)vcpu * MonitorLayout.VcpuWindowSize) + ((ulong)page << Paging.PageShift);

    private VcpuPages BuildVcpuPages(int number)
    {
        const int taskStateSize = 104;
        ulong taskState = _nextMonitorAddress;
        _ = TakeMapped(1, SupervisorData, out ulong taskStatePage);
        _nextMonitorAddress = taskState + Paging.PageSize;
        for (ulong i = 0; i < 2; i++)
            Map(taskState + ((1 + i) << Paging.PageShift), IoBitmapPages + (i << Paging.PageShift), SupervisorData & ~PageFlags.Writable);
        _nextMonitorAddress += 3 << Paging.PageShift;

        ulong stack = TakeMapped(1, SupervisorData, out ulong stackPage);
        EntryPages entryPages = BuildEntryPages(number);
        var entry = new SyscallEntry(SyscallEntryKind.Of(Capabilities), entryPages, number);
        (ModeGate? gate, GsBaseGate? gsBaseGate) = entry.Switch is null ? default : BuildGates(entry, entryPages.ReportPage);
        ulong area = TakeMapped(MonitorLayout.ReturnAreaPages, SupervisorData, out ulong areaPages);

        CompatibilityInstruction? instruction = null;
        if (Capabilities.InterpretsCompatibilityMode)
        {
            ulong instructionStart = TakeMapped(1, SupervisorCode | PageFlags.User, out ulong instructionPage);
            instruction = new CompatibilityInstruction(instructionStart, Host(instructionPage));
        }

        byte* tss = Host(taskStatePage);
        new Span<byte>(tss, (int)Paging.PageSize).Fill(0xff);
        new Span<byte>(tss, taskStateSize).Clear();
        *(ulong*)(tss + 4) = stack + Paging.PageSize;
        *(ushort*)(tss + 102) = taskStateSize;

        // Where SYSCALL stays at CPL 3 its entry's one port is open there; GuestIo tells other uses of it apart.
        if (Capabilities.SyscallEntryLevel == 3)
            tss[taskStateSize + (MonitorLayout.SyscallPort / 8)] &= unchecked((byte)~(1 << (MonitorLayout.SyscallPort % 8)));

        const uint taskStateLimit = taskStateSize + 8192;
        ulong windowStart = DescriptorWindowStart(number);
        ulong window = TableEntry(windowStart, 1);
        ulong vcpuInfoEntry = entry.Serves ? TableEntry(WindowAddress(number, VcpuWindowPage.VcpuInfo), 1) : 0;
        const PageFlags tableFlags = SupervisorData & ~PageFlags.Writable;
        for (int page = 0; page < MonitorLayout.GdtWindowPages; page++)
        {
            ulong frame = page < MonitorLayout.ReservedGdtPage ? EmptyGdtPage : ReservedGdtPage;
            Host<ulong>(window + (ulong)(page * sizeof(ulong))) = frame | (ulong)tableFlags;
        }

        ushort selector = (ushort)(MonitorLayout.FirstTss + (number * 16));
        SetDescriptor(selector, (taskStateLimit & 0xffff) | ((taskState & 0xff_ffff) << 16) | (0x8bUL << 40) | ((taskState & 0xff00_0000) << 32));
        SetDescriptor((ushort)(selector + 8), taskState >> 32);
        return new VcpuPages
        {
            TaskState = taskState,
            TaskStateSelector = selector,
            TaskStateLimit = taskStateLimit,
            ExceptionStackTop = stack + Paging.PageSize,
            ExceptionStack = (ulong*)(Host(stackPage) + Paging.PageSize),
            ReturnAreaTop = area + ((ulong)MonitorLayout.ReturnAreaPages << Paging.PageShift),
            ReturnArea = (ulong*)(Host(areaPages) + (MonitorLayout.ReturnAreaPages << Paging.PageShift)),
            DescriptorWindow = new DescriptorWindow(
                new VirtualAddress(windowStart), (nint)Host(window), new MachineAddress(window), new PageTableEntry(EmptyGdtPage | (ulong)tableFlags)),
            Instruction = instruction,
            Entry = entry,
            Gate = gate,
            GsBaseGate = gsBaseGate,
            InterruptTable = gate?.InterruptTable ?? InterruptTable,
            EntryReport = (EntryReport*)entryPages.ReportPage,
            VcpuInfoStart = WindowAddress(number, VcpuWindowPage.VcpuInfo),
            VcpuInfoEntry = entry.Serves ? (PageTableEntry*)Host(vcpuInfoEntry) : null,
            VcpuInfoEntryAddress = new MachineAddress(vcpuInfoEntry),
        };
    }

    /// <summary>Where the SYSCALL entry serves nothing it is the same in both modes, shares nothing with the kernel, and needs no window.</summary>
    private EntryPages BuildEntryPages(int vcpu)
    {
        if (KernelSlot == 0)
        {
            ulong entry = TakeMapped(1, SupervisorCode | (Capabilities.SyscallEntryLevel == 3 ? PageFlags.User : PageFlags.None), out ulong page);
            return new EntryPages { Entry = entry, KernelEntry = Host(page) };
        }

        ulong userEntryPage = TakePages(1);
        MapInWindow(ref _userSlot, vcpu, VcpuWindowPage.Entry, userEntryPage, UserCode);
        return new EntryPages
        {
            Entry = WindowAddress(vcpu, VcpuWindowPage.Entry),
            KernelEntry = Host(MapInKernelWindow(vcpu, VcpuWindowPage.Entry, UserCode)),
            UserEntry = Host(userEntryPage),
            Report = WindowAddress(vcpu, VcpuWindowPage.Report),
            ReportPage = Host(MapInKernelWindow(vcpu, VcpuWindowPage.Report, KernelWindowData)),
        };
    }

    /// <summary>Takes a page for the window that a kernel root shows.</summary>
    /// <returns>Its guest-physical address.</returns>
    private ulong MapInKernelWindow(int vcpu, VcpuWindowPage page, PageFlags flags)
    {
        ulong physical = TakePages(1);
        MapInWindow(ref _hypervisorSlots[KernelSlot - Paging.FirstHypervisorSlot], vcpu, page, physical, flags);
        return physical;
    }

    private void MapInWindow(ref ulong slot, int vcpu, VcpuWindowPage page, ulong physical, PageFlags flags)
        => Host<ulong>(TableEntry(ref slot, WindowAddress(vcpu, page), 1)) = physical | (ulong)flags;

    private (ModeGate Modes, GsBaseGate GsBase) BuildGates(SyscallEntry entry, byte* reportPage)
    {
        const int codeSize = (int)Paging.PageSize / 2;
        ulong data = TakeMapped(1, SupervisorData, out ulong dataPage);
        ulong code = TakeMapped(1, SupervisorCode, out ulong codePage);
        ulong report = MapNext(1, MonitorLayout.RegionAddress + (ulong)(reportPage - _region.Address), SupervisorData & ~PageFlags.Writable);
        var codeBytes = new Span<byte>(Host(codePage), 2 * codeSize);
        ulong Stub(ExceptionVector vector) => Code.ExceptionStubs + (ulong)((int)vector * MonitorLayout.StubSize);
        var modes = new ModeGate(
            data, Host(dataPage), code, codeBytes[..codeSize], new ReadOnlySpan<ulong>(Host(_interruptTable), MonitorLayout.Vectors * 2),
            Stub(ExceptionVector.DivideError), entry.Switch!, report);
        var gsBase = new GsBaseGate(
            (ulong*)Host(dataPage), code + codeSize, codeBytes[codeSize..], Stub(ExceptionVector.GeneralProtection), entry.KernelMark,
            report + (ulong)((byte*)&((EntryReport*)reportPage)->InactiveGsBase - reportPage));
        return (modes, gsBase);
    }

}

/// <summary>What <see cref="KvmVirtualMachine.HoldMemory"/> returns.</summary>
internal sealed class MemoryHold(HostMemory memory) : IDisposable
{
    private HostMemory? _memory = memory;

    public void Dispose() => Interlocked.Exchange(ref _memory, null)?.Dispose();
}

/// <summary>A vCPU's own pages in the monitor. Host pointers point one past the end, as the stacks grow down.</summary>
internal readonly unsafe struct VcpuPages
{
    public ulong TaskState { get; init; }

    public ushort TaskStateSelector { get; init; }

    public uint TaskStateLimit { get; init; }

    public ulong ExceptionStackTop { get; init; }

    public ulong* ExceptionStack { get; init; }

    public ulong ReturnAreaTop { get; init; }

    public ulong* ReturnArea { get; init; }

    public DescriptorWindow DescriptorWindow { get; init; }

    /// <summary>The page that SYSCALL comes to.</summary>
    public SyscallEntry Entry { get; init; }

    /// <summary>What leads between the guest's modes; null where the entry serves nothing.</summary>
    public ModeGate? Gate { get; init; }

    /// <summary>What reads user mode's GS base for kernel mode; null where the entry serves nothing.</summary>
    public GsBaseGate? GsBaseGate { get; init; }

    /// <summary>Where the interrupt table is: the gate's, or the VM's.</summary>
    public ulong InterruptTable { get; init; }

    /// <summary>Host view of what the entry reports; null where it serves nothing.</summary>
    public EntryReport* EntryReport { get; init; }

    /// <summary>Where the page with vcpu_info is shown to the entry, and the page-table entry for it.</summary>
    public ulong VcpuInfoStart { get; init; }

    public PageTableEntry* VcpuInfoEntry { get; init; }

    public MachineAddress VcpuInfoEntryAddress { get; init; }

    /// <summary>For hosts that interpret 32-bit code; else null.</summary>
    public CompatibilityInstruction? Instruction { get; init; }
}
