using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>One KVM vCPU and its run loop: entering the guest in one KVM_RUN, and saying why it came back.</summary>
/// <remarks>
/// On the hot path there is no ioctl but KVM_RUN: registers travel in the shared kvm_run page. Entry is one of two: straight
/// to the guest's RIP where nothing has to be done at CPL 0 (setting the segment registers costs less than an IRETQ that KVM
/// interprets), or through a chain of the monitor's gadgets (<see cref="MonitorCode"/>). A kick is a signal that is blocked except inside KVM_RUN, so no handler ever runs.
/// </remarks>
internal sealed unsafe class KvmVirtualCpu : IVirtualCpu
{
    private const ulong Cr0Flags = 0x8005_0033; // PG AM WP NE ET MP PE
    private const ulong Cr0TaskSwitched = 1 << 3;
    private const ulong Cr4Tsd = 1 << 2;
    private const ulong Cr4Pae = 1 << 5;
    private const ulong Cr4Osfxsr = 1 << 9;
    private const ulong Cr4Osxmmexcpt = 1 << 10;
    private const ulong Cr4Fsgsbase = 1 << 16;
    private const ulong Cr4Osxsave = 1 << 18;
    private const ulong EferFlags = 0xd01; // NXE LMA LME SCE
    private const ulong DebugStatusDefault = 0xffff_0ff0;
    private const uint DefinedMxcsr = 0xffff;

    // What SYSCALL clears on the way in; the guest's own value is in R11.
    private const ulong SyscallMask = (ulong)(Rflags.Trap | Rflags.InterruptEnable | Rflags.Direction | Rflags.NestedTask | Rflags.AlignmentCheck);

    /// <summary>Flags that CPL 3 can set by itself.</summary>
    internal const ulong UserFlags = (ulong)(Rflags.Carry | Rflags.Parity | Rflags.Adjust | Rflags.Zero | Rflags.Sign | Rflags.Trap
        | Rflags.Direction | Rflags.Overflow | Rflags.NestedTask | Rflags.Resume | Rflags.AlignmentCheck | Rflags.Id);

    /// <summary>Linux's flat data selector of user mode: the host's own, and that of guests that are Linux.</summary>
    internal const ushort HostUserData = 0x2b;

    /// <summary>Linux's flat selector of 64-bit code in user mode, the host's.</summary>
    internal const ushort HostUserCode = 0x33;

    private const int RunsFrom = 6;

    /// <summary>Entries past which it takes longer to repeat them than to have KVM forget all that it made from the tables.</summary>
    private const ulong MaxEntries = 4096;

    /// <summary>
    /// Times in a row that KVM finds nothing where a page was: it may have looked the page up right before it was taken away, and then finds
    /// the guest's entry changed when it looks again.
    /// </summary>
    private const int MaxHiddenPages = 16;

    /// <summary>Kicks in the midst of a chain, which then starts anew, past which the same is done to get on at all.</summary>
    private const int MaxInterruptions = 3;

    /// <summary>Nanoseconds for which a thread that mostly sleeps less than that looks for a kick before it sleeps: a wake-up costs as much.</summary>
    private const long LongestPoll = 100_000;

    /// <summary>Nanoseconds with which it begins to.</summary>
    private const long ShortestPoll = 25_000;

    /// <summary>Nanoseconds that it may take to be woken.</summary>
    private const long WakeUp = 50_000;

    /// <summary>What has to stay in one place beside the kvm_run page.</summary>
    private struct LocalState
    {
        public SegmentRegisters Segments;
        public CpuRegisters Intended;
        public PageTableWriteQueue Writes;
        public int Kicked;
        public int Listening;
    }

    private readonly LocalState* _state;
    private readonly KvmVirtualMachine _machine;
    private readonly MonitorCode _code;
    private readonly VcpuPages _pages;
    private readonly GuestSegments _guestSegments;
    private readonly KvmRun* _run;
    private readonly KvmSregs* _sregs;
    private readonly SegmentRegisters* _segments;
    private readonly CpuRegisters* _intended;
    private readonly PageTableWriteQueue* _writes;
    private int _file;
    private int _thread;
    private int _timer = -1;
    private long _timerDeadline = long.MaxValue;
    private ulong _root;
    private readonly int* _kicked;

    /// <summary>Not 0 while a kick needs a signal: the thread is in KVM_RUN or asleep, or about to look for the last time before.</summary>
    private readonly int* _listening;
    private long _poll;
    private uint _ldtEntries;
    private KvmSyncRegs _forced;
    private bool _switchesModes;
    private ulong _enteredRoot;
    private int _interruptions;
    private int _entries;
    private int _hiddenPages;

    internal KvmVirtualCpu(KvmVirtualMachine machine, int number, VcpuPages pages)
    {
        _machine = machine;
        _code = machine.Code;
        _pages = pages;
        _file = LibC.ioctl(machine.File, KvmRequest.CreateVcpu, number);
        if (_file < 0)
            throw new KvmException($"KVM_CREATE_VCPU failed for vCPU {number}", LibC.errno);
        _state = (LocalState*)NativeMemory.AllocZeroed((nuint)sizeof(LocalState));
        _segments = &_state->Segments;
        _intended = &_state->Intended;
        _writes = &_state->Writes;
        _kicked = &_state->Kicked;
        _listening = &_state->Listening;
        _writes->InGuest = machine.Capabilities.ShadowPageTables ? 1 : 0;
        try
        {
            void* run = LibC.mmap(null, machine.System.RunSize, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_SHARED, _file, 0);
            if (run == LibC.MAP_FAILED)
                throw new KvmException("Cannot map kvm_run", LibC.errno);
            _run = (KvmRun*)run;
            _sregs = &_run->Sregs;
            _guestSegments = new GuestSegments(machine, pages.DescriptorWindow, _sregs);
            SetUp();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public CpuRegisters* Registers => &_run->Regs;

    public SegmentRegisters* Segments => _segments;

    public VirtualAddress FaultAddress => new(_sregs->Cr2);

    public Mfn PageTableRoot
    {
        get => new(_root >> Paging.PageShift);
        set => _root = value.Value << Paging.PageShift;
    }

    public PageTableWriteQueue* PageTableWrites => _writes;

    public DescriptorWindow DescriptorWindow => _pages.DescriptorWindow;

    public uint LdtEntries
    {
        get => _ldtEntries;
        set
        {
            if (_ldtEntries == value)
                return;
            _ldtEntries = value;
            _sregs->Ldt = LocalTable(value);
            _forced = KvmSyncRegs.Sregs;
        }
    }

    public EntryService* EntryService => _pages.Entry.Service;

    public EntryReport* EntryReport => _pages.EntryReport;

    public bool ReadsSelectorsAsNull => _machine.Capabilities.HostDescriptorTable;

    public int* KickPending => _kicked;

    public delegate* unmanaged[SuppressGCTransition]<ulong> ReadTimeStampCounter => HostClock.ReadTsc;

    internal int File => _file;

    internal KvmRun* SharedPage => _run;

    /// <summary>The page that SYSCALL comes to.</summary>
    internal SyscallEntry Entry => _pages.Entry;

    /// <summary>Where the monitor has the interrupt table.</summary>
    internal ulong InterruptTable => _pages.InterruptTable;

    public void Dispose()
    {
        // The domain disposes its vCPUs, and the VM all that it has left.
        int file = Interlocked.Exchange(ref _file, -1);
        if (file < 0)
            return;
        if (_timer >= 0)
            Libc.DeleteKickTimer(_timer);
        if (_run != null)
            _ = LibC.munmap(_run, _machine.System.RunSize);
        _ = LibC.close(file);
        NativeMemory.Free(_state);
    }

    public void Kick()
    {
        if (Interlocked.Exchange(ref *_kicked, 1) != 0 || Volatile.Read(ref *_listening) == 0)
            return;
        int thread = Volatile.Read(ref _thread);
        if (thread != 0)
            Libc.KickThread(thread);
    }

    public void ShowVcpuInfo(Mfn frame, int offset)
    {
        const PageFlags flags = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
        _pages.Entry.SetVcpuInfo(_pages.VcpuInfoStart + (ulong)offset);
        var value = new PageTableEntry(frame, flags);
        if (*_pages.VcpuInfoEntry == value)
            return;
        PageTableEntry old = _writes->Store(_pages.VcpuInfoEntry, _pages.VcpuInfoEntryAddress, value);
        if (old.IsPresent)
            _writes->Invalidate(new VirtualAddress(_pages.VcpuInfoStart));
    }

    public void SetTaskSwitched(bool value)
    {
        _sregs->Cr0 = value ? _sregs->Cr0 | Cr0TaskSwitched : _sregs->Cr0 & ~Cr0TaskSwitched;
        _forced = KvmSyncRegs.Sregs;
    }

    public void SetTimeStampDisable(bool value)
    {
        _sregs->Cr4 = value ? _sregs->Cr4 | Cr4Tsd : _sregs->Cr4 & ~Cr4Tsd;
        _forced = KvmSyncRegs.Sregs;
    }

    public void SetFsgsbase(bool value)
    {
        _sregs->Cr4 = value ? _sregs->Cr4 | Cr4Fsgsbase : _sregs->Cr4 & ~Cr4Fsgsbase;
        _forced = KvmSyncRegs.Sregs;
    }

    public void SetXcr0(ulong value)
    {
        // struct kvm_xcrs: count, flags, 16 × { number, reserved, value }, padding.
        const int size = 392;
        byte* registers = stackalloc byte[size];
        new Span<byte>(registers, size).Clear();
        *(uint*)registers = 1;
        *(ulong*)(registers + 16) = value;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetXcrs, registers), "KVM_SET_XCRS failed");
    }

    public void SetDebugRegisters(ReadOnlySpan<ulong> values)
    {
        var registers = new KvmDebugRegs { Db0 = values[0], Db1 = values[1], Db2 = values[2], Db3 = values[3], Dr6 = values[6], Dr7 = values[7] };
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetDebugRegs, &registers), "KVM_SET_DEBUGREGS failed");
    }

    public void SetFpu(ReadOnlySpan<byte> image)
    {
        const int control = 0, status = 2, tags = 4, opcode = 6, instruction = 8, operand = 16, mxcsr = 24, registers = 32, xmm = 160;
        var state = new KvmFpu
        {
            Control = MemoryMarshal.Read<ushort>(image[control..]),
            Status = MemoryMarshal.Read<ushort>(image[status..]),
            Tags = image[tags],
            LastOpcode = MemoryMarshal.Read<ushort>(image[opcode..]),
            LastInstruction = MemoryMarshal.Read<ulong>(image[instruction..]),
            LastOperand = MemoryMarshal.Read<ulong>(image[operand..]),

            // What the processor has no use for would be refused, or fault when it is loaded.
            Mxcsr = MemoryMarshal.Read<uint>(image[mxcsr..]) & DefinedMxcsr,
        };
        image.Slice(registers, 8 * 16).CopyTo(new Span<byte>(state.Registers, 8 * 16));
        image.Slice(xmm, 16 * 16).CopyTo(new Span<byte>(state.Xmm, 16 * 16));
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetFpu, &state), "KVM_SET_FPU failed");
    }

    public void GetExtendedState(Span<byte> area)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(area.Length, ExtendedState.Size);
        fixed (byte* bytes = area)
            KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.GetXsave, bytes), "KVM_GET_XSAVE failed");
    }

    public bool TrySetExtendedState(ReadOnlySpan<byte> area)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(area.Length, ExtendedState.Size);
        fixed (byte* bytes = area)
            return LibC.ioctl(_file, KvmRequest.SetXsave, bytes) == 0;
    }

    public ulong TakeDebugStatus()
    {
        KvmDebugRegs registers;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.GetDebugRegs, &registers), "KVM_GET_DEBUGREGS failed");
        ulong status = registers.Dr6;
        if (status != DebugStatusDefault)
        {
            registers.Dr6 = DebugStatusDefault;
            KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetDebugRegs, &registers), "KVM_SET_DEBUGREGS failed");
        }

        return status;
    }

    public void SetWakeTimer(long deadline)
    {
        if (deadline == _timerDeadline)
            return;
        BindThread();
        _timerDeadline = deadline;

        // Zero would disarm; a moment in the past fires at once.
        Libc.ArmKickTimer(_timer, deadline == long.MaxValue ? 0 : Math.Max(deadline, 1));
    }

    public void WaitForKick(long deadline)
    {
        BindThread();
        long start = Libc.MonotonicNow();
        bool isKicked = IsKickedSoon(start, deadline) || SleepUntilKicked(deadline);
        Volatile.Write(ref *_listening, 0);

        // The next sleep is looked at as long as would have been enough for this one, if that is not too long. A deadline needs no look.
        bool wasShort = isKicked && Libc.MonotonicNow() - start < LongestPoll + WakeUp;
        _poll = wasShort ? Math.Clamp(_poll * 2, ShortestPoll, LongestPoll) : _poll > ShortestPoll ? _poll / 2 : 0;
    }

    /// <summary>Looks for a kick for a while.</summary>
    /// <returns>Whether one came, of which note was taken.</returns>
    private bool IsKickedSoon(long start, long deadline)
    {
        const int looks = 16;
        for (long end = Math.Min(deadline, start + _poll); Libc.MonotonicNow() < end;)
        {
            for (int i = 0; i < looks; i++)
            {
                if (Volatile.Read(ref *_kicked) != 0)
                {
                    TakeKick();
                    return true;
                }

                Thread.SpinWait(1);
            }
        }

        return false;
    }

    /// <summary>Sleeps.</summary>
    /// <returns>Whether a kick came, of which note was taken.</returns>
    private bool SleepUntilKicked(long deadline)
    {
        sigset_t set = Libc.KickSet();
        _ = Interlocked.Exchange(ref *_listening, 1);
        while (Volatile.Read(ref *_kicked) == 0)
        {
            if (deadline <= Libc.MonotonicNow())
                return false;

            // The timer is there anyway, often armed for what is due earlier or later; a wait with a limit would set another.
            SetWakeTimer(deadline);
            _ = LibC.sigtimedwait(&set, null, null);
            NoteTimer();
            if (Volatile.Read(ref *_kicked) != 0)
            {
                // The kick's signal was taken; if it was the timer's, the kick's own makes one KVM_RUN return early.
                _ = Interlocked.Exchange(ref *_kicked, 0);
                return true;
            }
        }

        TakeKick();
        return true;
    }

    public VcpuExit Run()
    {
        BindThread();
        Volatile.Write(ref _entries, _entries + 1);
        Volatile.Write(ref *_listening, 1);
        _ = Interlocked.Exchange(ref _writes->Running, 1);
        VcpuExit exit = Enter();
        while (_pages.Instruction is { } instruction && exit.Vector == ExceptionVector.InvalidOpcode && ExecuteNatively(instruction, ref exit))
            exit = Enter();
        Volatile.Write(ref _writes->Running, 0);
        Volatile.Write(ref *_listening, 0);
        return exit;
    }

    /// <summary>Waits until the processor has come back from an entry that it is in. Any thread.</summary>
    internal void AwaitExit()
    {
        int entries = Volatile.Read(ref _entries);
        if (Volatile.Read(ref _writes->Running) == 0)
            return;
        Kick();
        SpinWait wait = default;
        while (Volatile.Read(ref _writes->Running) != 0 && Volatile.Read(ref _entries) == entries)
            wait.SpinOnce();
    }

    public void Settle()
    {
        if (_writes->Count == 0)
            return;
        _machine.DropShadowPages();
        _writes->Count = 0;
        _writes->Overflowed = 0;
        _writes->EntryFirst = 0;
    }

    private VcpuExit Enter()
    {
        if (Volatile.Read(ref *_kicked) != 0)
        {
            TakeKick();
            return new VcpuExit(VcpuExitKind.Kicked);
        }

        _writes->TakeRequests();
        _run->Regs.Rflags = GuestFlags(_run->Regs.Rflags);
        *_intended = _run->Regs;
        if (!PrepareEntry(out VcpuExit refusal))
            return refusal;
        while (true)
        {
            int result = LibC.ioctl(_file, KvmRequest.Run, (void*)null);
            if (result == 0)
                _hiddenPages = 0;
            if (result == 0 && _run->ExitReason == KvmExitReason.Io)
                return TakeIoExit();
            if (result == 0 && _run->ExitReason != KvmExitReason.Interrupted)
                return TakeOtherExit();
            if (result != 0 && LibC.errno is var error && error != LibC.EINTR && error != LibC.EAGAIN
                && (error != LibC.EFAULT || _machine.Window.FrameCount == 0 || ++_hiddenPages > MaxHiddenPages))
                return TakeFailure(error);
            TakeSignal();
            if (!IsLeaving())
                return TakeInterruption();

            // What this Run returns with is not "kicked", so the next one has to.
            _ = Interlocked.Exchange(ref *_kicked, 1);
        }
    }

    /// <summary>Makes this the thread that kicks go to, with the kick signal blocked outside KVM_RUN.</summary>
    private void BindThread()
    {
        if (_thread != 0)
            return;
        Libc.IgnoreStrayKicks();
        sigset_t set = Libc.KickSet();
        _ = LibC.pthread_sigmask(LibC.SIG_BLOCK, &set, null);
        int thread = Libc.CurrentThread;

        // KVM_RUN runs under this mask: all that the thread blocks anyway, except the kick.
        sigset_t during;
        _ = LibC.pthread_sigmask(LibC.SIG_BLOCK, null, &during);
        _ = LibC.sigdelset(&during, Libc.KickSignal);
        byte* mask = stackalloc byte[12];
        *(uint*)mask = 8;
        *(ulong*)(mask + 4) = *(ulong*)&during;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetSignalMask, mask), "KVM_SET_SIGNAL_MASK failed");
        _timer = Libc.CreateKickTimer(thread);
        Volatile.Write(ref _thread, thread);
    }

    /// <summary>
    /// Takes note of a kick. The exchange is a fence: what the kicking thread did before is looked at after it, never earlier.
    /// </summary>
    private void TakeKick()
    {
        _ = Interlocked.Exchange(ref *_kicked, 0);
        TakeSignal();
    }

    /// <summary>
    /// Takes one signal, if one is there: a kick sends no more until it is taken note of, and the timer has one. Of two, the other makes
    /// the next KVM_RUN return at once, which costs less in all than to look for it every time.
    /// </summary>
    private void TakeSignal()
    {
        sigset_t set = Libc.KickSet();
        timespec none = default;
        _ = LibC.sigtimedwait(&set, null, &none);
        NoteTimer();
    }

    /// <summary>A timer whose moment has passed is disarmed, and may be set to the same moment again.</summary>
    private void NoteTimer()
    {
        if (_timerDeadline <= Libc.MonotonicNow())
            _timerDeadline = long.MaxValue;
    }

    private void SetUp()
    {
        SetCpuid();
        var sregs = default(KvmSregs);
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.GetSregs, &sregs), "KVM_GET_SREGS failed");
        sregs.Cr0 = Cr0Flags;
        sregs.Cr4 = Cr4Pae | Cr4Osfxsr | Cr4Osxmmexcpt | (HostClock.HasXsave ? Cr4Osxsave : 0);
        sregs.Efer = EferFlags;
        SetCpl3(ref sregs);
        sregs.Fs = sregs.Gs = sregs.Ds = sregs.Es = DataSegment(0);
        sregs.Tr = new KvmSegment
        {
            Base = _pages.TaskState,
            Limit = _pages.TaskStateLimit,
            Selector = _pages.TaskStateSelector,
            Type = 11,
            Present = 1,
        };
        sregs.Ldt = LocalTable(0);
        sregs.Gdt.Base = _pages.DescriptorWindow.Start.Value;
        sregs.Gdt.Limit = (ushort)((MonitorLayout.GdtWindowPages << Paging.PageShift) - 1);
        sregs.Idt.Base = _pages.InterruptTable;
        sregs.Idt.Limit = (MonitorLayout.Vectors * 16) - 1;
        *_sregs = sregs;
        _segments->Cs = FlatSelectors.Ring3Cs64;
        _segments->Ss = FlatSelectors.Ring3Data;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetSregs, &sregs), "KVM_SET_SREGS failed");

        Span<ulong> values =
        [
            ((ulong)MonitorLayout.MonitorCs << 32) | ((ulong)FlatSelectors.Ring3Cs32 << 48), _pages.Entry.Of64BitCode,
            _pages.Entry.Of32BitCode, SyscallMask,
        ];
        Span<uint> indexes = [Msr.Star, Msr.Lstar, Msr.Cstar, Msr.SfMask];
        byte* buffer = stackalloc byte[8 + (sizeof(KvmMsrEntry) * 4)];
        *(ulong*)buffer = 4;
        for (int i = 0; i < 4; i++)
            ((KvmMsrEntry*)(buffer + 8))[i] = new KvmMsrEntry { Index = indexes[i], Data = values[i] };
        if (LibC.ioctl(_file, KvmRequest.SetMsrs, buffer) != 4)
            throw new KvmException("KVM_SET_MSRS refused the SYSCALL registers", LibC.errno);
        ShowHostTsc();
        _run->ValidRegs = KvmSyncRegs.Regs | KvmSyncRegs.Sregs | KvmSyncRegs.Events;
    }

    /// <summary>
    /// Makes the guest's time-stamp counter the host's. KVM starts it at 0 when the VM is made, so that its offset would be
    /// another one in every VM and the probe's answer true of the probe's own VM only.
    /// </summary>
    private void ShowHostTsc()
    {
        ulong offset = 0;
        var attribute = new KvmDeviceAttribute { Address = (ulong)&offset };
        if (LibC.ioctl(_file, KvmRequest.SetDeviceAttribute, &attribute) == 0)
            return;

        // Before Linux 5.16 only by value: less than a microsecond behind, and KVM gives all vCPUs of a VM the same offset. A
        // host whose guests read the hardware's counter anyway may refuse; the probe says what they then see.
        byte* buffer = stackalloc byte[8 + sizeof(KvmMsrEntry)];
        *(ulong*)buffer = 1;
        *(KvmMsrEntry*)(buffer + 8) = new KvmMsrEntry { Index = Msr.TimeStampCounter, Data = HostClock.TimeStampCounter };
        _ = LibC.ioctl(_file, KvmRequest.SetMsrs, buffer);
    }

    /// <summary>
    /// Lets KVM know the processor that it offers; what the guest is told of it is the CPUID policy's affair.
    /// </summary>
    private void SetCpuid()
    {
        const int entries = 256;
        byte* buffer = (byte*)NativeMemory.AllocZeroed(8 + (entries * 40));
        try
        {
            *(uint*)buffer = entries;
            KvmVirtualMachine.Check(LibC.ioctl(_machine.System.File, KvmRequest.GetSupportedCpuid, buffer), "KVM_GET_SUPPORTED_CPUID failed");
            for (uint i = 0; i < *(uint*)buffer; i++)
            {
                // struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx, padding.
                uint* entry = (uint*)(buffer + 8 + (i * 40));
                if (entry[0] == _machine.CpuidMark?.Leaf)
                    entry[3] = _machine.CpuidMark.Value.Eax;
                if (_machine.Capabilities.CompatibilitySyscallAstray && entry[0] is 0 or 0x8000_0000)
                    "GenuntelineI"u8.CopyTo(new Span<byte>(entry + 4, 12));
            }

            KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetCpuid2, buffer), "KVM_SET_CPUID2 failed");
        }
        finally
        {
            NativeMemory.Free(buffer);
        }
    }

    /// <summary>LDTR as LLDT would load it; with no entry, as it would load a null selector.</summary>
    private KvmSegment LocalTable(uint entries) => entries == 0
        ? new KvmSegment { Unusable = 1 }
        : new KvmSegment
        {
            Base = _pages.DescriptorWindow.Ldt.Value,
            Limit = (entries * sizeof(ulong)) - 1,
            Selector = MonitorLayout.LdtSelector,
            Type = 2,
            Present = 1,
        };

    private static void SetCpl3(ref KvmSregs sregs)
    {
        sregs.Cs = new KvmSegment { Limit = uint.MaxValue, Selector = FlatSelectors.Ring3Cs64, Type = 11, Present = 1, Dpl = 3, S = 1, L = 1, G = 1 };
        sregs.Ss = DataSegment(FlatSelectors.Ring3Data);
    }

    private static void SetCpl0(ref KvmSregs sregs)
    {
        sregs.Cs = new KvmSegment { Limit = uint.MaxValue, Selector = MonitorLayout.MonitorCs, Type = 11, Present = 1, Dpl = 0, S = 1, L = 1, G = 1 };
        sregs.Ss = new KvmSegment { Limit = uint.MaxValue, Selector = MonitorLayout.MonitorSs, Type = 3, Present = 1, Dpl = 0, Db = 1, S = 1, G = 1 };
    }

    /// <summary>Whether the way back into the guest is through CPL 0.</summary>
    private bool NeedsChain => _writes->Count != 0 || _writes->FlushPending != 0 || _writes->InvalidationCount != 0;

    /// <summary>Turns the intended guest state into what KVM_RUN starts from.</summary>
    /// <param name="refusal">The exception of a CS or SS that IRET would not load.</param>
    /// <returns>False for a refusal: the guest is not to be entered.</returns>
    private bool PrepareEntry(out VcpuExit refusal)
    {
        KvmSyncRegs dirty = KvmSyncRegs.Regs;
        bool atMonitor = _sregs->Ss.Dpl == 0;
        refusal = default;
        bool reload = atMonitor || _sregs->Cs.Selector != _segments->Cs || _sregs->Ss.Selector != _segments->Ss;
        KvmSegment code = default;
        KvmSegment stack = default;
        if (reload && (!_guestSegments.TryLoadCode(_segments->Cs, out code, out refusal)
            || !_guestSegments.TryLoadStack(_segments->Ss, out stack, out refusal)))
        {
            return false;
        }

        if (_machine.Capabilities.HostDescriptorTable && (reload ? code : _sregs->Cs).L == 0)
            ShowHiddenSegments();

        // A KVM that interprets IRETQ may not do so for segments of the local table: they are entered without a chain, in the rare case.
        if (NeedsChain && ((_segments->Cs | _segments->Ss) & GuestSegments.LocalTable) != 0)
        {
            _machine.DropShadowPages();
            _writes->Clear();
        }

        if (_writes->Count != 0 && (_writes->Overflowed != 0 || _interruptions > MaxInterruptions || QueuedEntries() > MaxEntries))
        {
            _machine.DropShadowPages();
            _writes->Count = 0;
        }

        if (SynchronizeSegments())
            dirty |= KvmSyncRegs.Sregs;
        if (_sregs->Cr3 != _root)
        {
            _sregs->Cr3 = _root;
            dirty |= KvmSyncRegs.Sregs;
        }

        PrepareGates();

        if (_writes->Count != 0 && _machine.Capabilities.StoresNeedFlush)
            _writes->Flush();
        if (NeedsChain)
        {
            // At CPL 0: stores, flush, then IRETQ.
            if (!atMonitor)
            {
                SetCpl0(ref *_sregs);
                dirty |= KvmSyncRegs.Sregs;
            }

            BuildChain();
        }
        else if (reload)
        {
            _sregs->Cs = code;
            _sregs->Ss = stack;
            dirty |= KvmSyncRegs.Sregs;
        }

        _run->DirtyRegs = dirty | _forced;
        _forced = KvmSyncRegs.None;
        return true;
    }

    /// <summary>Opens the gates that the guest is to have.</summary>
    private void PrepareGates()
    {
        if (_pages.Gate is not { } gate)
            return;
        _enteredRoot = _root;
        _switchesModes = EntryService->ModeSwitch != 0;
        if (_switchesModes)
            gate.Open(KernelRoot, UserRoot);
        else
            gate.Close();
        bool linuxSegments = _switchesModes && _guestSegments.TryLoadCode(HostUserCode, out KvmSegment code, out _) && code.L != 0
            && _guestSegments.TryLoadStack(HostUserData, out _, out _);
        _pages.Entry.ServeModeSwitch(_switchesModes, linuxSegments);
        _pages.Entry.Switch!.BeginEntry();
        _pages.GsBaseGate!.Serve(EntryService->GsBaseRead);
    }

    /// <summary>CR3 of kernel mode, where the entry switches modes.</summary>
    private ulong KernelRoot => EntryService->KernelRoot << Paging.PageShift;

    /// <summary>CR3 of user mode, where the entry switches modes.</summary>
    private ulong UserRoot => EntryService->UserRoot << Paging.PageShift;

    /// <summary>Whether the vCPU was last found in user mode, where the entry switches modes.</summary>
    private bool IsInUserMode => _root == UserRoot;

    /// <summary>Whether the vCPU was found in a 64-bit SYSCALL entry that runs as the guest does.</summary>
    private bool IsInEntry => _pages.Entry.Serves && _pages.Entry.Contains(_run->Regs.Rip);

    /// <summary>Takes over changed segment bases and selectors; says whether there were any.</summary>
    private bool SynchronizeSegments()
    {
        bool changed = false;
        Set(ref _sregs->Fs, _segments->Fs, _segments->FsBase, ref changed);
        Set(ref _sregs->Gs, _segments->Gs, _segments->GsBase, ref changed);
        SetData(ref _sregs->Ds, _segments->Ds, ref changed);
        SetData(ref _sregs->Es, _segments->Es, ref changed);
        return changed;
    }

    /// <summary>
    /// Gives 32-bit code the segments that the guest means it to have: the flat data segment, which it loaded without KVM's knowing, and
    /// that of a thread's own data, whose selector it read as null when it put the thread aside, while it has kept the base.
    /// </summary>
    private void ShowHiddenSegments()
    {
        const int nullSelectors = 3;
        if ((_segments->Ds <= nullSelectors || _segments->Es <= nullSelectors) && _guestSegments.LoadData(HostUserData).Unusable == 0)
        {
            _segments->Ds = _segments->Ds <= nullSelectors ? HostUserData : _segments->Ds;
            _segments->Es = _segments->Es <= nullSelectors ? HostUserData : _segments->Es;
        }

        if (_segments->Fs <= nullSelectors && _segments->FsBase != 0)
            _segments->Fs = _guestSegments.FindData(_segments->FsBase);
        if (_segments->Gs <= nullSelectors && _segments->GsBase != 0)
            _segments->Gs = _guestSegments.FindData(_segments->GsBase);
    }

    /// <summary>DS or ES: while the selector stays, so does what the guest's own load of it found.</summary>
    private void SetData(ref KvmSegment segment, ushort selector, ref bool changed)
    {
        if (segment.Selector == selector)
            return;
        segment = _guestSegments.LoadData(selector);
        changed = true;
    }

    private static void Set(ref KvmSegment segment, ushort selector, ulong address, ref bool changed)
    {
        if (segment.Base == address && segment.Selector == selector)
            return;
        segment = DataSegment(selector);
        segment.Base = address;
        changed = true;
    }

    /// <summary>A flat data segment, or an unusable one for a null selector.</summary>
    private static KvmSegment DataSegment(ushort selector) => new()
    {
        Limit = uint.MaxValue,
        Selector = selector,
        Type = 3,
        Present = 1,
        Dpl = 3,
        Db = 1,
        S = 1,
        G = 1,
        Unusable = (byte)((selector & ~3) == 0 ? 1 : 0),
    };

    private ulong Address(ulong* area) => _pages.ReturnAreaTop - (ulong)((byte*)_pages.ReturnArea - (byte*)area);

    private ulong* PushIretFrame()
    {
        ulong* top = _pages.ReturnArea;
        *--top = _segments->Ss;
        *--top = _intended->Rsp;
        *--top = _intended->Rflags;
        *--top = _segments->Cs;
        *--top = _intended->Rip;
        return top;
    }

    /// <summary>
    /// Writes the chain of gadgets, from its end: IRET frame, RCX, root or pages, stores of few neighbours, runs. The root is loaded
    /// after the stores, because that is what flushes what was derived from the entries before them.
    /// </summary>
    private void BuildChain()
    {
        ulong* top = PushIretFrame();
        *--top = _intended->Rcx;
        ulong gadget = _code.RestoreAndIret;
        if (_writes->FlushPending != 0)
        {
            *--top = gadget;
            *--top = _root;
            gadget = _code.LoadRoot;
        }

        for (int i = 0; _writes->FlushPending == 0 && i < _writes->InvalidationCount; i++)
        {
            *--top = gadget;
            *--top = _writes->Invalidated(i);
            gadget = _code.InvalidatePage;
        }

        gadget = PushStores(ref top, gadget);

        // To copy an entry over itself is two accesses, and what another thread stores between them would be lost.
        gadget = _machine.StoresMeet ? PushLockedRuns(ref top, gadget) : PushRuns(ref top, gadget);
        _run->Regs.Rip = gadget;
        _run->Regs.Rsp = Address(top);
        _run->Regs.Rflags = (ulong)Rflags.Fixed;
    }

    /// <summary>Gadgets that store entry by entry; the last needs no RET where nothing but the way back follows.</summary>
    /// <returns>The gadget to start with.</returns>
    private ulong PushStores(ref ulong* top, ulong gadget)
    {
        int inGadget = 0;
        bool final = gadget == _code.RestoreAndIret;
        for (int i = 0; i < _writes->Count; i++)
        {
            ref PageTableWriteQueue.Run run = ref (*_writes)[i];
            for (ulong entry = 0; run.Count < RunsFrom && entry < run.Count; entry++)
            {
                if (inGadget == MonitorCode.MaxStores || (inGadget == 0 && !final))
                {
                    *--top = gadget;
                    final = false;
                    inGadget = 0;
                }

                *--top = MonitorLayout.DirectMap(new MachineAddress(run.Address + (entry * sizeof(ulong))));
                inGadget++;
                gadget = final ? _code.FinalStores(inGadget) : _code.Stores(inGadget);
            }
        }

        return gadget;
    }

    private ulong QueuedEntries()
    {
        ulong entries = 0;
        for (int i = 0; i < _writes->Count; i++)
            entries += (*_writes)[i].Count;
        return entries;
    }

    /// <summary>Gadgets that store runs of neighbours entry by entry, each store locked.</summary>
    private ulong PushLockedRuns(ref ulong* top, ulong gadget)
    {
        for (int i = 0; i < _writes->Count; i++)
        {
            ref PageTableWriteQueue.Run run = ref (*_writes)[i];
            if (run.Count < RunsFrom)
                continue;
            for (ulong done = 0; done < run.Count; done += MonitorCode.MaxLockedRun)
            {
                *--top = gadget;
                *--top = _code.LockedRun((int)Math.Min(run.Count - done, MonitorCode.MaxLockedRun));
                *--top = MonitorLayout.DirectMap(new MachineAddress(run.Address + (done * sizeof(ulong))));
                gadget = _code.PopAddress;
            }
        }

        return gadget;
    }

    /// <summary>Gadgets that copy runs of neighbours over themselves; each gives RDI and RSI back.</summary>
    private ulong PushRuns(ref ulong* top, ulong gadget)
    {
        int inGadget = 0;
        for (int i = 0; i < _writes->Count; i++)
        {
            ref PageTableWriteQueue.Run run = ref (*_writes)[i];
            if (run.Count < RunsFrom)
                continue;
            if (inGadget is 0 or MonitorCode.MaxRuns)
            {
                *--top = gadget;
                *--top = _intended->Rsi;
                *--top = _intended->Rdi;
                inGadget = 0;
            }

            *--top = run.Count;
            *--top = MonitorLayout.DirectMap(new MachineAddress(run.Address));
            inGadget++;
            gadget = _code.Runs(inGadget);
        }

        return gadget;
    }

    /// <summary>What the entry did at CPL 0 has been done once the guest, or one of the monitor's entries, was reached.</summary>
    private void EntryDone()
    {
        _interruptions = 0;
        _writes->Clear();
    }

    private VcpuExit TakeIoExit()
    {
        EntryDone();
        TakeSegments();
        ulong rip = _run->Regs.Rip;
        if (_run->Io.Direction == 1 && _run->Io.Size == 1)
        {
            if (_run->Io.Port == MonitorLayout.SyscallPort && _pages.Entry.Contains(rip))
                return TakeOverEntry();
            if (_run->Io.Port == MonitorLayout.SyscallPort && _pages.Entry.IsExitOf32BitCode(rip))
                return TakeSyscall(FlatSelectors.Ring3Cs32);
            if (rip - _code.ExceptionStubs < MonitorLayout.Vectors * MonitorLayout.StubSize)
                return TakeException((ExceptionVector)((rip - _code.ExceptionStubs) / MonitorLayout.StubSize));
        }

        return TakeGuestIo();
    }

    /// <summary>
    /// A guest used the port that is open for the SYSCALL entry. KVM has done with an OUT by now, and would do with an IN at the
    /// next KVM_RUN, whatever registers that is given: so let it, and put back what was before.
    /// </summary>
    private VcpuExit TakeGuestIo()
    {
        bool isOutput = _run->Io.Direction == 1;
        CpuRegisters found = _run->Regs;
        _run->DirtyRegs = KvmSyncRegs.None;
        _run->ImmediateExit = 1;
        int result = LibC.ioctl(_file, KvmRequest.Run, (void*)null);
        int error = LibC.errno;
        _run->ImmediateExit = 0;
        if (result == 0 || (error != LibC.EINTR && error != LibC.EAGAIN))
            return new VcpuExit(VcpuExitKind.Failed, Failure: $"KVM could not complete the guest's I/O instruction at {found.Rip:x}.");

        // An OUT that KVM's emulator executed is behind us already, but for a repeated one before its last time.
        if (isOutput && _run->Regs.Rip == found.Rip)
            found.Rip -= LengthOfOutput(found.Rip);
        _run->Regs = found;
        return new VcpuExit(VcpuExitKind.GuestIo);
    }

    /// <summary>Bytes of the OUT or OUTS that ends at an address, its prefixes not counted; 0 if none does.</summary>
    private ulong LengthOfOutput(ulong end)
    {
        const byte outputFromRegister = 0xee;
        const byte outputString = 0x6e;
        const byte outputImmediate = 0xe6;
        byte last = Peek(end - 1);
        if (last is outputFromRegister or outputString)
            return 1;
        return last == MonitorLayout.SyscallPort && Peek(end - 2) == outputImmediate ? 2UL : 0UL;
    }

    /// <summary>A byte of the code that the guest has just executed.</summary>
    private byte Peek(ulong address)
    {
        byte code = 0;
        _ = Peek(address, new Span<byte>(ref code));
        return code;
    }

    /// <summary>Reads code of the guest's.</summary>
    /// <returns>How many bytes could be read.</returns>
    private int Peek(ulong address, Span<byte> code)
    {
        int read = 0;
        while (read < code.Length)
        {
            var translation = new KvmTranslation { LinearAddress = address + (ulong)read };
            KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.Translate, &translation), "KVM_TRANSLATE failed");
            var physical = new MachineAddress(translation.PhysicalAddress);
            if (translation.Valid == 0 || !_machine.Memory.Contains(physical.Frame))
                break;
            int inPage = Math.Min(code.Length - read, (int)(Paging.PageSize - (ulong)physical.Offset));
            new ReadOnlySpan<byte>(_machine.Memory.Page(physical.Frame) + physical.Offset, inPage).CopyTo(code[read..]);
            read += inPage;
        }

        return read;
    }

    /// <summary>Has the processor execute an instruction of 32-bit code that the interpreter raised #UD for.</summary>
    /// <param name="instruction">The vCPU's page for it.</param>
    /// <param name="exit">What came of it, where that is more than going on behind it.</param>
    /// <returns>True to go on with the guest.</returns>
    private bool ExecuteNatively(CompatibilityInstruction instruction, ref VcpuExit exit)
    {
        (ushort selector, ulong rip) = (_segments->Cs, _run->Regs.Rip);
        if (!_guestSegments.TryLoadCode(selector, out KvmSegment code, out _) || code.L != 0 || code.Db == 0 || rip > uint.MaxValue)
            return false;
        int length = Peek((uint)(code.Base + rip), instruction.Code);
        if (!instruction.TryEncode(length, rip) || !IsFlat(instruction.Segment, code))
            return false;
        _segments->Cs = FlatSelectors.Ring3Cs64;
        _run->Regs.Rip = instruction.Start;
        VcpuExit native = Enter();
        bool done = _run->Regs.Rip == instruction.End;
        if (done || _run->Regs.Rip == instruction.Start)
        {
            _segments->Cs = selector;
            _run->Regs.Rip = done ? (uint)(rip + instruction.Length) : rip;
        }

        if (done && native is { Kind: VcpuExitKind.Exception, Vector: ExceptionVector.InvalidOpcode })
            return true;
        exit = native;
        return false;
    }

    /// <summary>Whether an operand in the segment lies where 64-bit mode would look for it.</summary>
    private bool IsFlat(Iced.Intel.Register segment, in KvmSegment code) => segment switch
    {
        Iced.Intel.Register.CS => code.Base == 0,
        Iced.Intel.Register.DS => _sregs->Ds.Base == 0,
        Iced.Intel.Register.ES => _sregs->Es.Base == 0,
        Iced.Intel.Register.SS => _guestSegments.TryLoadStack(_segments->Ss, out KvmSegment stack, out _) && stack.Base == 0,
        _ => true,
    };

    /// <summary>Takes what the vCPU did in its 64-bit SYSCALL entry for done, or for not begun.</summary>
    private VcpuExit TakeOverEntry()
    {
        bool inUserMode = _switchesModes && IsInUserMode;
        switch (_pages.Entry.TakeOver(&_run->Regs, ref _segments->GsBase, _switchesModes, inUserMode))
        {
            case ModeSwitch.Outcome.SystemCall:
                _root = UserRoot;
                break;
            case ModeSwitch.Outcome.InKernelMode:
                return TakeSwitched(KernelRoot, FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data);
            case ModeSwitch.Outcome.InUserMode:
                (ushort code, ushort stack) = _pages.Entry.Switch!.UserSelectors;
                return TakeSwitched(UserRoot, code, stack);
        }

        return TakeSyscall(FlatSelectors.Ring3Cs64);
    }

    /// <summary>The vCPU has come to the other mode, if not to its end.</summary>
    private VcpuExit TakeSwitched(ulong root, ushort code, ushort stack)
    {
        _root = root;
        _segments->Cs = code;
        _segments->Ss = stack;
        _run->Regs.Rflags = GuestFlags(_run->Regs.Rflags);
        return new VcpuExit(VcpuExitKind.Kicked);
    }

    /// <param name="code">The selector that stands for the code's size: what it was is not kept by the processor.</param>
    private VcpuExit TakeSyscall(ushort code)
    {
        _run->Regs.Rip = _run->Regs.Rcx;

        // Where the entry is reachable at CPL 3 a guest can also jump there, with any R11.
        _run->Regs.Rflags = GuestFlags(_run->Regs.R11);
        _segments->Cs = code;
        _segments->Ss = FlatSelectors.Ring3Data;
        return new VcpuExit(VcpuExitKind.Syscall);
    }

    /// <summary>Flags as CPL 3 may have them: those it can set by itself, and interrupts on.</summary>
    private static ulong GuestFlags(ulong flags) => (flags & UserFlags) | (ulong)(Rflags.Fixed | Rflags.InterruptEnable);

    /// <summary>Replaces the monitor's RIP, RSP and RFLAGS by those that the processor pushed.</summary>
    private VcpuExit TakeException(ExceptionVector vector)
    {
        ulong* frame = ExceptionFrame;
        uint errorCode = vector.PushesErrorCode() ? (uint)frame[-1] : 0;
        ulong expected = _pages.ExceptionStackTop - (5 * sizeof(ulong)) - (vector.PushesErrorCode() ? 8UL : 0UL);
        if (_run->Regs.Rsp != expected || (frame[1] & 3) == 0)
        {
            if (IsFaultOfGsBaseGate(vector))
            {
                TakeExceptionFrame(frame);
                return new VcpuExit(VcpuExitKind.Kicked);
            }

            return new VcpuExit(
                VcpuExitKind.Failed,
                Failure: $"The monitor itself faulted: {vector} with error code {errorCode:x} at {frame[0]:x}, address {_sregs->Cr2:x}.");
        }

        if (vector is ExceptionVector.Breakpoint or ExceptionVector.Overflow)
            ForgetException();
        TakeExceptionFrame(frame);
        if (IsInEntry)
        {
            // It has met what the manager is to find, or a breakpoint that no hypercall comes upon.
            if (vector == ExceptionVector.Debug)
                _ = TakeDebugStatus();
            return TakeOverEntry();
        }

        return new VcpuExit(VcpuExitKind.Exception, vector, errorCode);
    }

    /// <summary>
    /// Whether the gate that reads user mode's GS base did not find the instruction any more, because another vCPU has taken its page away: the
    /// guest is to find that by itself.
    /// </summary>
    private bool IsFaultOfGsBaseGate(ExceptionVector vector)
    {
        const ulong frameSize = 6 * sizeof(ulong);
        ulong depth = _pages.ExceptionStackTop - _run->Regs.Rsp;
        return vector == ExceptionVector.PageFault && depth is > frameSize and < Paging.PageSize && depth % sizeof(ulong) == 0
            && _pages.GsBaseGate?.Contains((_pages.ExceptionStack - (depth / sizeof(ulong)))[1]) == true;
    }

    /// <summary>What the processor pushed for an exception: RIP, CS, RFLAGS, RSP and SS, and below that the error code.</summary>
    private ulong* ExceptionFrame => _pages.ExceptionStack - 5;

    private void TakeExceptionFrame(ulong* frame)
    {
        _run->Regs.Rip = frame[0];
        _segments->Cs = (ushort)frame[1];
        _run->Regs.Rflags = frame[2];
        _run->Regs.Rsp = frame[3];
        _segments->Ss = (ushort)frame[4];
        ShowSwitchedSelectors();
    }

    private void TakeSegments()
    {
        _segments->Ds = _sregs->Ds.Selector;
        _segments->Es = _sregs->Es.Selector;
        _segments->Fs = _sregs->Fs.Selector;
        _segments->Gs = _sregs->Gs.Selector;
        _segments->FsBase = _sregs->Fs.Base;
        _segments->GsBase = _sregs->Gs.Base;
        if (_switchesModes)
            _root = _sregs->Cr3 == UserRoot ? UserRoot : KernelRoot;
        if (_sregs->Ss.Dpl == 3)
        {
            _segments->Cs = _sregs->Cs.Selector;
            _segments->Ss = _sregs->Ss.Selector;
            ShowSwitchedSelectors();
        }
    }

    /// <summary>
    /// KVM does not see which selectors the entry goes to the other mode with, and has those that the vCPU was entered with.
    /// </summary>
    private void ShowSwitchedSelectors()
    {
        if (!_switchesModes
            || _segments->Cs is not (HostUserCode or FlatSelectors.Ring3Cs64) || _segments->Ss is not (HostUserData or FlatSelectors.Ring3Data))
        {
            return;
        }

        (ushort code, ushort stack) = _pages.Entry.Switch!.UserSelectors;
        if (!IsInUserMode && (code != 0 || _root != _enteredRoot))
            (_segments->Cs, _segments->Ss) = (FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data);
        else if (IsInUserMode && code != 0)
            (_segments->Cs, _segments->Ss) = (code, stack);
    }

    private static VcpuExit TakeFailure(int errno)
    {
        string why = errno == LibC.EFAULT
            ? "The guest used memory that the host could not provide (out of memory, or a page taken away)."
            : $"KVM_RUN failed: {Marshal.GetPInvokeErrorMessage(errno)}.";
        return new VcpuExit(VcpuExitKind.Failed, Failure: why);
    }

    /// <summary>
    /// Whether the interrupted vCPU is on its way out already: in one of the monitor's entries, or with an exception that KVM
    /// has yet to deliver. Run on as it is, it comes to the entry's <c>out</c> at once; to change its registers now would let
    /// the exception hit whatever they then say.
    /// </summary>
    /// <remarks>
    /// KVM does not say whether an exception of INT3 or INTO is still to come, only which vector was last; as that is cleared
    /// when one of the two arrives (<see cref="ForgetException"/>), finding one means that it is.
    /// </remarks>
    private bool IsLeaving()
    {
        if (_run->DirtyRegs != KvmSyncRegs.None || IsAtModeGate() || IsAtGsBaseGate())
            return false;
        ulong rip = _run->Regs.Rip;
        if (_pages.Entry.IsLeaving(rip)
            || (_sregs->Ss.Dpl == 0
                && (rip - _code.ExceptionStubs < MonitorLayout.Vectors * MonitorLayout.StubSize || _pages.Gate?.Contains(rip) == true)))
            return true;
        ref readonly KvmVcpuEvents events = ref _run->Events;
        return events.ExceptionInjected != 0 || events.ExceptionPending != 0
            || (ExceptionVector)events.ExceptionVector is ExceptionVector.Breakpoint or ExceptionVector.Overflow;
    }

    /// <summary>
    /// Whether the vCPU is on its way to the other mode: at the instruction that leads there, whether its fault is still to come or not, or
    /// behind that in the gate.
    /// </summary>
    private bool IsAtModeGate()
    {
        if (!_switchesModes || _pages.Gate is not { } gate)
            return false;
        return _sregs->Ss.Dpl == 3 ? gate.IsAtGate(_run->Regs.Rip) : gate.IsSwitch(_run->Regs.Rip, ExceptionFrame[0]);
    }

    /// <summary>
    /// Takes a vCPU that is on its way to the other mode back to where that begins, as what the gate does is not visible there; or where only
    /// the gate's return is left, to where that leads.
    /// </summary>
    private void LeaveModeGate()
    {
        ref readonly KvmVcpuEvents events = ref _run->Events;
        if (events.ExceptionInjected != 0 || events.ExceptionPending != 0)
            ForgetException();
        if (_sregs->Ss.Dpl == 3)
            return;
        ulong* frame = ExceptionFrame;
        ModeGate gate = _pages.Gate!;
        ulong rip = _run->Regs.Rip;
        _run->Regs.Rax = gate.OriginalRax(rip, _run->Regs.Rax);
        _root = gate.IsInUserMode(rip, frame[0]) ? UserRoot : KernelRoot;
        TakeExceptionFrame(frame);
    }

    /// <summary>Whether the vCPU is in the gate that reads user mode's GS base, or has the fault to come that leads there.</summary>
    private bool IsAtGsBaseGate()
    {
        if (_pages.GsBaseGate is not { Served: not 0 } gate)
            return false;
        if (_sregs->Ss.Dpl != 3)
            return gate.Contains(_run->Regs.Rip);
        ref readonly KvmVcpuEvents events = ref _run->Events;
        return _run->Regs.Rip == gate.Served && (ExceptionVector)events.ExceptionVector == ExceptionVector.GeneralProtection
            && (events.ExceptionInjected != 0 || events.ExceptionPending != 0);
    }

    /// <summary>Takes a vCPU that is there back to its RDMSR; or to behind it, if that has been made.</summary>
    private void LeaveGsBaseGate()
    {
        if (_sregs->Ss.Dpl == 3)
        {
            ForgetException();
            return;
        }

        if (_pages.GsBaseGate!.KeepsRax(_run->Regs.Rip))
            _run->Regs.Rax = ExceptionFrame[-2];
        TakeExceptionFrame(ExceptionFrame);
    }

    private void ForgetException()
    {
        KvmVcpuEvents events;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.GetVcpuEvents, &events), "KVM_GET_VCPU_EVENTS failed");
        events.ExceptionVector = 0;
        events.ExceptionInjected = 0;
        events.ExceptionPending = 0;
        events.Flags = 0;
        KvmVirtualMachine.Check(LibC.ioctl(_file, KvmRequest.SetVcpuEvents, &events), "KVM_SET_VCPU_EVENTS failed");
    }

    /// <summary>
    /// A kick found the vCPU in the guest, in the chain of an entry, or before anything was taken over.
    /// </summary>
    private VcpuExit TakeInterruption()
    {
        if (_run->DirtyRegs != KvmSyncRegs.None)
        {
            // Not taken over, and the shared page may hold either state: set everything anew.
            _forced = KvmSyncRegs.Sregs;
            RestoreIntended();
        }
        else if (_sregs->Ss.Dpl == 0 && !IsAtModeGate() && !IsAtGsBaseGate())
        {
            RestoreIntended();
        }
        else
        {
            EntryDone();
            TakeSegments();
            if (IsAtModeGate())
                LeaveModeGate();
            else if (IsAtGsBaseGate())
                LeaveGsBaseGate();
            if (IsInEntry && TakeOverEntry() is { Kind: VcpuExitKind.Syscall } exit)
            {
                // What this returns with is not "kicked", so the next Run has to; until then no note was taken.
                _ = Interlocked.Exchange(ref *_kicked, 1);
                return exit;
            }
        }

        _ = Interlocked.Exchange(ref *_kicked, 0);
        return new VcpuExit(VcpuExitKind.Kicked);
    }

    /// <summary>The entry has not been made, or not to its end: what was intended still is. Stores may safely be repeated.</summary>
    private void RestoreIntended()
    {
        _interruptions++;
        _run->Regs = *_intended;
    }

    private VcpuExit TakeOtherExit()
    {
        ulong rip = _run->Regs.Rip;
        string why = _run->ExitReason switch
        {
            KvmExitReason.Shutdown => "The processor shut down (triple fault).",
            KvmExitReason.Mmio => $"The guest used machine address {_run->Mmio.PhysicalAddress:x}, where it has no memory.",
            KvmExitReason.InternalError => DescribeInternalError(),
            KvmExitReason.FailEntry => $"The processor refused to enter the guest (reason {_run->HardwareReason:x}).",
            _ => $"KVM left the guest for an unexpected reason ({_run->ExitReason}).",
        };
        TakeSegments();
        return new VcpuExit(VcpuExitKind.Failed, Failure: $"{why} RIP was {rip:x}.");
    }

    private string DescribeInternalError()
    {
        ref KvmInternalErrorExit error = ref _run->InternalError;
        if (error.Suberror != 1)
            return $"KVM reported internal error {error.Suberror}.";
        ReadOnlySpan<byte> bytes = error.Instruction;
        string code = error.DataCount >= 3 ? Convert.ToHexString(bytes[..Math.Min(bytes.Length, (int)error.InstructionSize)]) : "not given";
        return $"KVM could not emulate an instruction (bytes: {code}).";
    }
}
