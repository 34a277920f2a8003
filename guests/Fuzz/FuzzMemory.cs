// Where the fuzz guest keeps what: its buffers and pools, and the pages that it does everything with.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

/// <summary>
/// The guest's memory. Scratch pages are data or tables of a level by preference only: any call may take them for anything. Roots are
/// pages of the image, and always show the image, so that the guest survives loading them.
/// </summary>
internal sealed class FuzzMemory
{
    public const int PageSize = 4096;

    /// <summary>The first page that the second L1 of the image maps, as in the image's other guests.</summary>
    public const ulong ScratchBase = PvAssembler.VirtBase + 0x200000;

    public const int DataPages = 20;
    public const int RootPages = 3;

    /// <summary>Pages meant as tables, by level from 1.</summary>
    public static readonly int[] TablePages = [12, 8, 6, 4];

    public const int ScratchPages = DataPages + 12 + 8 + 6 + 4;

    /// <summary>
    /// Pages of nothing behind the scratch pages: the longest that a call writes from where it is told to, a memory map, ends there.
    /// </summary>
    public const int SparePages = 8;

    /// <summary>Multicall entries, each with a buffer.</summary>
    public const int MaxBatch = 32;
    public const int EntrySize = 64;
    public const int BufferSize = 512;

    /// <summary>Classes of results: 0 for success, 1 to 126 for an errno, <see cref="NothingDone"/> for a count of 0.</summary>
    public const int ResultClasses = 128;
    public const int NothingDone = 127;
    private const int MaxOperations = 160;

    // Indexes into the frame pool behind the scratch pages.
    public const int FirstRootFrame = ScratchPages;

    /// <summary>Pages that the guest needs: its start_info, its code, and one where vcpu_info of running vCPUs may go.</summary>
    public const int OwnPages = FirstRootFrame + RootPages;
    public const int InfoFrame = OwnPages + 2;
    private const int OwnPageCount = 3;
    private const int FirstBadFrame = OwnPages + OwnPageCount;

    /// <summary>Of those: the end of memory and the frame behind it; the frames behind two of the hypervisor's slots.</summary>
    public const int EndFrame = FirstBadFrame;
    public const int HypervisorFrames = FirstBadFrame + 2;
    private const int BadFrameCount = 11;

    /// <summary>The tables that the guest runs on: root, L3, L2, and the L1s of the image's start and of the scratch pages.</summary>
    public const int RootFrame = FirstBadFrame + BadFrameCount;
    public const int L3Frame = RootFrame + 1;
    public const int L2Frame = RootFrame + 2;
    public const int FirstL1Frame = RootFrame + 3;
    public const int ScratchL1Frame = RootFrame + 4;
    private const int OwnTables = 5;

    /// <summary>The console ring and shared_info. What others write there is not read, so that a seed makes the same calls every time.</summary>
    public const int ConsoleFrame = RootFrame + OwnTables;
    public const int SharedInfoFrame = ConsoleFrame + 1;
    private const int SharedPages = 2;
    private const int FrameCount = ConsoleFrame + SharedPages;

    private static readonly ulong[] BadFrames =
        [0, 0, 0, 0, 0, 0x100, 0xf_ffff, 0x100_0000_0000, 0xff_ffff_ffff, 0xf_ffff_ffff_ffff, ulong.MaxValue];

    /// <param name="guest">To reserve it from.</param>
    /// <param name="vcpus">vCPUs that make calls.</param>
    /// <param name="hasPeer">Whether there is another domain to play with.</param>
    public FuzzMemory(PvAssembler guest, int vcpus, bool hasPeer)
    {
        HasPeer = hasPeer;
        GrantPage = hasPeer ? guest.Reserve(PageSize, PageSize) : 0;
        Vcpus = [.. Enumerable.Range(0, vcpus).Select(_ => new FuzzVcpu(guest))];
        ReadOnlyPage = guest.Reserve(PageSize, PageSize);
        RootsStart = guest.Reserve(RootPages * PageSize, PageSize);
        InfoPage = guest.Reserve(PageSize, PageSize);
        Bystanders = [.. Enumerable.Range(vcpus, BystandersOf(vcpus)).Select(id => new FuzzBystander(guest, id))];
        ulong[] frames = new ulong[FrameCount];
        BadFrames.CopyTo(frames, FirstBadFrame);
        AllFrames = Pool(guest, frames);
        Windows = Pool(guest, [.. WindowAddresses()]);
        ScratchAddresses = Pool(guest, [.. Enumerable.Range(0, ScratchPages).Select(static i => ScratchBase + ((ulong)i * PageSize))]);
        BadPointers = Pool(guest,
            [
                // Addresses that are not in the image come first.
                0, 0x0000_1234_5678_9000, 0x0000_7fff_ffff_fff8, 0x0000_8000_0000_0000, 0x8000_0000_0000_0000, 0xffff_7fff_ffff_fff8, 0xffff_8000_0000_0000,
                0xffff_8080_0000_0000, 0xffff_8100_0000_0000, 0xffff_8600_0000_0000, 0xffff_87ff_ffff_fff8, 0xffff_ffff_ffff_fff8, ulong.MaxValue,
                UnmappedPage, UnmappedPage - 8, UnmappedPage - 4, ReadOnlyPage, ReadOnlyPage + 8,
            ]);
    }

    public static int HistogramSize => MaxOperations * ResultClasses * 4;

    /// <summary>What each vCPU that makes calls has to itself.</summary>
    public IReadOnlyList<FuzzVcpu> Vcpus { get; }

    /// <summary>vCPUs that make no calls but to go down again: the others initialise them, with what they please.</summary>
    public IReadOnlyList<FuzzBystander> Bystanders { get; }

    /// <summary>vCPUs of the domain.</summary>
    public int VcpuCount => Vcpus.Count + Bystanders.Count;

    /// <summary>Whether there is another domain, with the number 1 or 2 as this one has.</summary>
    public bool HasPeer { get; }

    /// <summary>Where the first frame of the grant table is mapped, if there is a peer.</summary>
    public ulong GrantPage { get; }

    /// <summary>Behind a buffer.</summary>
    public ulong UnmappedPage => Vcpus[0].Guard;

    public ulong ReadOnlyPage { get; }

    /// <summary>The roots' pages.</summary>
    public ulong RootsStart { get; }

    /// <summary>Nothing but the manager writes here.</summary>
    public ulong InfoPage { get; }

    public FuzzPool AllFrames { get; }

    public FuzzPool Data => AllFrames.Part(0, DataPages);

    /// <summary>All but what others write to, and the L1s that the guest runs on: stores through mappings of these would do what they say.</summary>
    public FuzzPool Mappable => AllFrames.Part(0, FirstL1Frame);

    /// <summary>Those of them that a scratch table may link to: a linear view of the guest's own L2 would map its L1s.</summary>
    public FuzzPool Linkable => AllFrames.Part(0, L2Frame);

    public FuzzPool Scratch => AllFrames.Part(0, ScratchPages);

    public FuzzPool Roots => AllFrames.Part(FirstRootFrame, RootPages);

    public FuzzPool Shared => AllFrames.Part(ConsoleFrame, SharedPages);

    /// <summary>All but what others write to.</summary>
    public FuzzPool Unshared => AllFrames.Part(0, ConsoleFrame);

    public FuzzPool SharedInfo => AllFrames.Part(SharedInfoFrame, 1);

    /// <summary>Frames that there are not, or that are not the guest's.</summary>
    public FuzzPool Bad => AllFrames.Part(FirstBadFrame, BadFrameCount);

    /// <summary>The bad ones, and the tables that the guest runs on: none of them can be mapped writable.</summary>
    public FuzzPool BadOrOwnTables => AllFrames.Part(FirstBadFrame, BadFrameCount + OwnTables);

    public FuzzPool OwnTablesButRoot => AllFrames.Part(L3Frame, OwnTables - 1);

    public FuzzPool Root => AllFrames.Part(RootFrame, 1);

    public FuzzPool ScratchL1 => AllFrames.Part(ScratchL1Frame, 1);

    public FuzzPool Own => AllFrames.Part(OwnPages, InfoFrame - OwnPages);

    public FuzzPool Info => AllFrames.Part(InfoFrame, 1);

    /// <summary>Addresses that the scratch tables can translate where they are linked so.</summary>
    public FuzzPool Windows { get; }

    public FuzzPool ScratchAddresses { get; }

    /// <summary>Addresses that a hypercall cannot use, or not wholly.</summary>
    public FuzzPool BadPointers { get; }

    /// <summary>Those of them that the guest could not miss.</summary>
    public FuzzPool BadAddresses => BadPointers.Part(0, 13);

    /// <summary>Scratch frames meant as tables of a level.</summary>
    public FuzzPool Tables(int level) => AllFrames.Part(DataPages + TablePages.Take(level - 1).Sum(), TablePages[level - 1]);

    /// <summary>How many bystanders a guest has: none where there is nobody to race with.</summary>
    public static int BystandersOf(int vcpus) => vcpus == 1 ? 0 : 2;

    /// <summary>Puts words into the image.</summary>
    public static FuzzPool Pool(PvAssembler guest, params ReadOnlySpan<ulong> words)
        => new(guest.Define(System.Runtime.InteropServices.MemoryMarshal.AsBytes(words)), words.Length);

    private static IEnumerable<ulong> WindowAddresses()
    {
        for (ulong i = 0; i < 81; i++)
            yield return (i / 27 << 39) | (i / 9 % 3 << 30) | (i / 3 % 3 << 21) | (i % 3 << 12);
    }
}
