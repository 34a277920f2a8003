// Thousands of guest pages that each show one of two frames, and a guest program that says which each of them shows.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

/// <summary>
/// Up to 16,384 translations to be changed by the host, looked at by the guest. Every page maps one of two frames, whose first
/// byte is 1 or 2.
/// </summary>
/// <remarks>
/// A few hundred pages share a pair of frames: KVM drops its shadow entries of a frame that more than 1000 map, and a test on
/// such frames would find every change seen, repeated or not.
/// </remarks>
internal sealed unsafe class PageField
{
    public const ulong Address = 0x1000_0000;
    public const PageFlags Writable = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;

    /// <summary>The last pages of the code area hold the answers and the dumped registers.</summary>
    private const ulong Answers = ScratchGuest.CodeAddress + 0x1000;
    private const ulong Dump = ScratchGuest.CodeAddress + 0xf000;
    private const ulong FirstSpareFrame = 24;
    private const int BranchTable = 2;
    private const int PagesOfAPair = 400;

    private readonly ScratchGuest _guest;
    private readonly Mfn _firstTable;
    private readonly Mfn _firstFrame;
    private readonly byte[] _shown;

    public PageField(ScratchGuest guest, int pages)
    {
        _guest = guest;
        Pages = pages;
        _shown = new byte[pages];
        _firstTable = guest.Machine.Memory.FirstFrame + FirstSpareFrame;
        int tables = (pages + Paging.EntriesPerTable - 1) / Paging.EntriesPerTable;
        _firstFrame = _firstTable + (ulong)tables;
        Assert.That(Frame(pages - 1, 2).Value, Is.LessThan(guest.Machine.Memory.EndFrame.Value), "too many pages asked for");
        Array.Fill(_shown, (byte)1);
        for (int page = 0; page < pages; page++)
        {
            *guest.Machine.Memory.Page(Frame(page, 1)) = 1;
            *guest.Machine.Memory.Page(Frame(page, 2)) = 2;
            *Entry(page) = new PageTableEntry(Frame(page, 1), Writable);
        }

        PageTableEntry* branch = guest.Machine.Memory.Table(guest.Machine.Memory.FirstFrame + BranchTable);
        for (int table = 0; table < tables; table++)
        {
            PageTableEntry* entry = &branch[new VirtualAddress(Address).TableIndex(2) + table];
            guest.Vcpu.PageTableWrites->Store(entry, BranchAddress(table), new PageTableEntry(_firstTable + (ulong)table, Writable));
        }
    }

    public int Pages { get; }

    /// <summary>What each page must show.</summary>
    public ReadOnlySpan<byte> Expected => _shown;

    /// <summary>Host view of a page's entry. The tables are neighbours, so the entries are one array.</summary>
    public PageTableEntry* Entry(int page) => _guest.Machine.Memory.Table(_firstTable) + page;

    public MachineAddress EntryAddress(int page) => _firstTable.Address + ((ulong)page * sizeof(ulong));

    public MachineAddress BranchAddress(int table)
        => (_guest.Machine.Memory.FirstFrame + BranchTable).Address
            + ((ulong)(new VirtualAddress(Address).TableIndex(2) + table) * sizeof(ulong));

    /// <summary>Makes a page show the other frame, from the host.</summary>
    public void Toggle(int page)
    {
        _shown[page] ^= 3;
        _guest.Vcpu.PageTableWrites->Store(Entry(page), EntryAddress(page), new PageTableEntry(Frame(page, _shown[page]), Writable));
    }

    /// <summary>Loads the program that dumps every register, then reads all pages.</summary>
    public void LoadScan()
    {
        _guest.Load(code =>
        {
            AssemblerRegister64[] registers = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
            for (int i = 0; i < registers.Length; i++)
                code.mov(__qword_ptr[Dump + ((ulong)i * sizeof(ulong))], registers[i]);
            code.mov(rsp, ScratchGuest.StackTop);
            code.pushfq();
            code.pop(__qword_ptr[Dump + (17 * sizeof(ulong))]);
            code.cld();
            code.mov(rsi, Address);
            code.mov(rdi, Answers);
            code.mov(ecx, Pages);
            Label next = code.CreateLabel();
            code.Label(ref next);
            code.mov(al, __byte_ptr[rsi]);
            code.stosb();
            code.add(rsi, (int)Paging.PageSize);
            code.dec(ecx);
            code.jne(next);
            code.syscall();
        });
    }

    /// <summary>Runs the scan to its SYSCALL, kicks and all, and compares what the guest saw.</summary>
    public void RunScan()
    {
        VcpuExit exit = KvmTest.RunWatched(_guest);
        KvmTest.AssertSyscall(exit);
        for (int page = 0; page < Pages; page += (int)Paging.PageSize)
        {
            int count = Math.Min((int)Paging.PageSize, Pages - page);
            var seen = new ReadOnlySpan<byte>(KvmTest.HostAddress(_guest, Answers + (ulong)page), count);
            int same = seen.CommonPrefixLength(_shown.AsSpan(page, count));
            Assert.That(same, Is.EqualTo(count), $"Page {page + same} shows the wrong frame.");
        }
    }

    /// <summary>The registers as the guest found them when the scan started; RIP is not among them.</summary>
    public CpuRegisters DumpedRegisters() => *(CpuRegisters*)KvmTest.HostAddress(_guest, Dump);

    /// <summary>The frame that a page maps to show a mark, 1 or 2.</summary>
    private Mfn Frame(int page, int mark) => _firstFrame + (ulong)((2 * (page / PagesOfAPair)) + mark - 1);

    public void Scan()
    {
        LoadScan();
        RunScan();
    }
}
