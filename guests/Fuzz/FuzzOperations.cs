// What the fuzz guest calls, how often, and with what: good enough to get deep, bad enough to hurt.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

/// <summary>One of the calls, or stores, that the guest makes over and over.</summary>
/// <param name="Name">As reports call it.</param>
/// <param name="Weight">How often, relative to others of its kind.</param>
/// <param name="Counts">Whether it answers with a count, of which 0 is no success.</param>
/// <param name="Code">The recipe of its arguments.</param>
internal sealed record FuzzOperation(string Name, int Weight, bool Counts, ulong[] Code);

internal sealed partial class FuzzOperations
{
    // Offsets in a multicall entry.
    private const int Number = 0;
    private const int Argument = 16;

    // Places in a call's buffer: a list of requests, a structure, a list of frames or a mask, the done count.
    private const int List = 0;
    private const int Structure = 256;
    private const int Frames = 384;
    private const int Done = 504;

    /// <summary>DOMID_SELF.</summary>
    public const ulong Self = 0x7ff0;
    private const ulong Preempted = 1UL << 31;

    private readonly FuzzMemory _memory;
    private readonly List<FuzzOperation> _calls = [];
    private readonly List<FuzzOperation> _stores = [];
    private readonly FuzzPool _readOnlyFlags;
    private readonly FuzzPool _writableFlags;
    private readonly FuzzPool _tableFlags;
    private readonly FuzzPool _linearFlags;
    private readonly FuzzPool _badFlags;
    private readonly FuzzPool _badUpperFlags;
    private readonly FuzzPool _indexes;
    private readonly FuzzPool _rootIndexes;
    private readonly FuzzPool _scratchIndexes;
    private readonly FuzzPool _sharedInfoIndexes;
    private readonly FuzzPool _domains;
    private readonly FuzzPool _badDomains;
    private readonly FuzzPool _hugeCounts;
    private readonly FuzzPool _descriptors;

    public FuzzOperations(PvAssembler guest, FuzzMemory memory)
    {
        _memory = memory;
        FuzzPool Pool(params ReadOnlySpan<ulong> words) => FuzzMemory.Pool(guest, words);
        _readOnlyFlags = Pool(0x61, 0x61, 0x61, 0x1, 0x5, 0x25, 0x161, 0xe61, 0x8000_0000_0000_0061, 0x7ff0_0000_0000_0061);
        _writableFlags = Pool(0x63, 0x63, 0x63, 0x3, 0x7, 0x43, 0xf63, 0x8000_0000_0000_0063);
        _tableFlags = Pool(0x67, 0x67, 0x67, 0x63, 0x7, 0x61, 0x1, 0x27, 0xe67, 0x8000_0000_0000_0067);
        _linearFlags = Pool(0x61, 0x1, 0x5, 0x65, 0xe61);
        _badFlags = Pool(0x6b, 0x73, 0xe3, 0x69, 0x79, 0xf9);
        _badUpperFlags = Pool(0xe7, 0x167, 0xe3, 0x6f, 0x77, 0xe5, 0x1e7, 0xff);
        _indexes = Pool(0, 0, 0, 8, 8, 8, 16, 16, 16, 511 * 8, 256 * 8, 271 * 8);
        _rootIndexes = Pool(0, 0, 0, 8, 8, 8, 16, 16, 16, 255 * 8, 256 * 8, 257 * 8, 258 * 8, 260 * 8, 271 * 8, 272 * 8);
        _scratchIndexes = Pool([.. Enumerable.Range(0, FuzzMemory.ScratchPages).Select(static i => (ulong)i * 8)]);
        _sharedInfoIndexes = Pool(300 * 8, 350 * 8, 384 * 8, 511 * 8);
        _domains = Pool(Self, Self, Self, Self, Self, Self, 0x7ff1, 0, 1);
        _badDomains = Pool(0, 1, 2, 0x7ff1, 0x7ff2, 0x7ff3, 0x7ff4, 0x7fff, 0xffff, 0x1_7ff0, 0x2_7ff0, 0xffff_7ff0, 0x8000_7ff0);
        _hugeCounts = Pool(0x7fff_ffff, 0xffff_ffff, 0x1_0000_0001, ulong.MaxValue, 0x3ff_ffff, 0x400_0000, 0x8000_0000, 0x8000_0002, 40);
        _descriptors = Pool(
            0, 0x00cf_9200_0000_ffff, 0x00af_9a00_0000_ffff, 0x00cf_f200_0000_ffff, 0x0000_8900_0000_0067, 0x0000_8200_0000_0067, 0x0000_8c00_e033_0000,
            0x0000_8c00_e008_0000, 0x0000_8e00_e033_0000, 0x0000_0900_0000_0067, 0x0000_8000_0000_0000, ulong.MaxValue);
        AddMmuUpdates();
        AddVaMappings();
        AddMmuextOps();
        AddDescriptorTables();
        AddMemoryOps();
        AddAssists();
        if (memory.VcpuCount > 1)
            AddVcpuOps(guest);
        if (memory.HasPeer)
            AddPeerOps(guest);
        AddStores();
    }

    /// <summary>Hypercalls.</summary>
    public IReadOnlyList<FuzzOperation> Calls => _calls;

    /// <summary>Loads and stores; their address and value stand where a call's first two arguments do.</summary>
    public IReadOnlyList<FuzzOperation> Stores => _stores;

    private void Call(GuestHypercall number, string name, int weight, Action<FuzzRecipe> write, bool counts = false)
    {
        var recipe = new FuzzRecipe();
        recipe.Constant((ulong)number).ToCall(Number);
        write(recipe);
        _calls.Add(new FuzzOperation(name, weight, counts, recipe.Code));
    }

    private static FuzzRecipe To(FuzzRecipe r, int argument) => r.ToCall(Argument + (8 * argument));

    // Entries, for tables of a level.

    private void Entry(FuzzRecipe r, int level)
    {
        if (level == 1)
            EntryL1(r);
        else
            EntryUpper(r, level);
    }

    private void EntryL1(FuzzRecipe r) => r.OneOf(
        (34, r => Named(r, _memory.Data, _writableFlags)),
        (24, r => Named(r, _memory.Mappable, _readOnlyFlags)),
        (6, r => Named(r, _memory.Scratch, _writableFlags)),
        (4, r => Named(r, _memory.BadOrOwnTables, _writableFlags)),
        (4, r => Named(r, _memory.Data, _badFlags)),
        (3, r => r.Random(~1UL)),
        (1, r => r.Random(0x7fff_ffff_ffff_ffff & ~2UL)),
        (24, static r => r.Constant(0)));

    private void EntryUpper(FuzzRecipe r, int level) => r.OneOf(
        (50, r => Named(r, _memory.Tables(level - 1), _tableFlags)),
        (9, r => Named(r, level == 4 ? _memory.Roots : _memory.Tables(level), _linearFlags)),
        (3, r => Named(r, level == 4 ? _memory.Roots : _memory.Tables(level), _tableFlags)),
        (5, r => Named(r, _memory.Scratch, _tableFlags)),
        (5, r => Named(r, _memory.Linkable, _tableFlags)),
        (4, r => Named(r, _memory.Tables(level - 1), _badUpperFlags)),
        (3, r => r.Random(~1UL)),
        (21, static r => r.Constant(0)));

    /// <summary>What no running table of the guest's may have.</summary>
    private void EntryRefused(FuzzRecipe r, int level)
    {
        if (level == 1)
            r.OneOf((3, r => Named(r, _memory.BadOrOwnTables, _writableFlags)), (2, r => Named(r, _memory.AllFrames, _badFlags)));
        else
            r.OneOf((1, r => Named(r, _memory.AllFrames, _badUpperFlags)), (1, r => Named(r, _memory.Bad, _tableFlags)));
    }

    private static void Named(FuzzRecipe r, FuzzPool frames, FuzzPool flags) => r.Pick(frames).Shift(12).Pick(flags);

    // Arguments that many calls have.

    private void Pointer(FuzzRecipe r, int offset) => r.OneOf(
        (60, r => r.BufferAddress(offset)), (1, r => r.Pick(_memory.BadPointers)), (1, r => r.Pick(_memory.ScratchAddresses)),
        (1, r => r.Pick(_memory.Windows)));

    private void DonePointer(FuzzRecipe r)
        => r.OneOf((5, static r => r.Constant(0)), (4, static r => r.BufferAddress(Done)), (1, r => r.Pick(_memory.BadPointers)));

    private void Count(FuzzRecipe r, int count) => r.OneOf(
        (60, r => r.Constant((ulong)count)), (1, static r => r.Constant(0)), (2, r => r.Constant((ulong)count | Preempted)), (1, r => r.Pick(_hugeCounts)));

    private void Domain(FuzzRecipe r) => r.OneOf((60, static r => r.Constant(Self)), (2, r => r.Pick(_badDomains)));

    private void AnyAddress(FuzzRecipe r) => r.OneOf(
        (6, r => r.Pick(_memory.ScratchAddresses)), (6, r => r.Pick(_memory.Windows)), (1, r => r.Pick(_memory.BadAddresses)));

    // The calls.

    private void AddMmuUpdates()
    {
        for (int level = 1; level <= 4; level++)
        {
            int own = level;
            int weight = own == 1 ? 160 : 70;
            MmuUpdate($"mmu_update L{own}", weight, 2, r => r.Pick(_memory.Tables(own)).Shift(12).Pick(_indexes), r => Entry(r, own));
            MmuUpdate($"mmu_update L{own}, preserve A/D", 20, 1, r => r.Pick(_memory.Tables(own)).Shift(12).Pick(_indexes).Constant(2), r => Entry(r, own));
            MmuUpdate($"mmu_update L{own}, no translate", 20, 1, r => r.Pick(_memory.Tables(own)).Shift(12).Pick(_indexes).Constant(3), r => Entry(r, own));
        }

        MmuUpdate(
            "mmu_update roots", 80, 1, r => r.OneOf((2, r => r.Pick(_memory.Root)), (3, r => r.Pick(_memory.Roots))).Shift(12).Pick(_rootIndexes), r => Entry(r, 4));
        MmuUpdate("mmu_update scratch L1", 40, 2, r => r.Pick(_memory.ScratchL1).Shift(12).Pick(_scratchIndexes), EntryL1);
        MmuUpdate(
            "mmu_update any", 40, 1, r => r.OneOf((5, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.Bad))).Shift(12).Pick(_indexes).Random(3),
            r => r.OneOf((1, r => Entry(r, 1)), (1, r => Entry(r, 2)), (1, r => Entry(r, 3)), (1, r => Entry(r, 4))));
        MmuUpdate("mmu_update shared_info", 5, 1, r => r.Pick(_memory.SharedInfo).Shift(12).Pick(_sharedInfoIndexes), EntryL1);
        MmuUpdate(
            "mmu_update L1, shared pages", 10, 1, r => r.Pick(_memory.Tables(1)).Shift(12).Constant(511 * 8),
            r => r.Pick(_memory.Shared).Shift(12).OneOf((1, r => r.Pick(_readOnlyFlags)), (1, r => r.Pick(_writableFlags))));
        MmuUpdate("mmu_update own L1, refused", 10, 1, r => r.Pick(_memory.ScratchL1).Shift(12).Pick(_indexes), r => EntryRefused(r, 1));
        MmuUpdate(
            "mmu_update own upper tables, refused", 10, 1,
            r => r.OneOf((1, r => r.Pick(_memory.AllFrames.Part(FuzzMemory.L3Frame, 1))), (1, r => r.Pick(_memory.AllFrames.Part(FuzzMemory.L2Frame, 1)))).Shift(12)
                .OneOf((1, r => r.Constant(510 * 8)), (1, r => r.Constant(0))),
            r => EntryRefused(r, 2));
        MmuUpdate(
            "mmu_update machphys", 30, 1,
            r => r.OneOf((5, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.Bad))).Shift(12).Constant(1), static r => r.Random(0xffff));
        MmuUpdate("mmu_update garbage", 10, 2, static r => r.Random(~0UL), static r => r.Random(~0UL));
    }

    private void MmuUpdate(string name, int weight, int count, Action<FuzzRecipe> pointer, Action<FuzzRecipe> value)
        => Call(GuestHypercall.MmuUpdate, name, weight, r =>
        {
            for (int i = 0; i < count; i++)
            {
                pointer(r);
                r.ToBuffer(List + (i * 16));
                value(r);
                r.ToBuffer(List + (i * 16) + 8);
            }

            Pointer(r, List);
            To(r, 0);
            Count(r, count);
            To(r, 1);
            DonePointer(r);
            To(r, 2);
            Domain(r);
            To(r, 3);
        });

    private void AddVaMappings()
    {
        void Write(FuzzRecipe r)
        {
            AnyAddress(r);
            To(r, 0);
            EntryL1(r);
            To(r, 1);
            r.OneOf((8, r => r.Random(7)), (1, static r => r.Random(3).BufferAddress(Frames)), (1, r => r.Pick(_memory.BadPointers)));
            To(r, 2);
        }

        Call(GuestHypercall.UpdateVaMapping, "update_va_mapping", 110, Write);
        Call(GuestHypercall.UpdateVaMappingOtherdomain, "update_va_mapping_otherdomain", 25, r =>
        {
            Write(r);
            Domain(r);
            To(r, 3);
        });
    }

    private void AddMmuextOps()
    {
        for (int level = 1; level <= 4; level++)
        {
            int own = level;
            Mmuext($"pin L{own}", 45, (ulong)(own - 1), r => r.OneOf(
                (8, r => r.Pick(own == 4 ? _memory.Roots : _memory.Tables(own))), (4, r => r.Pick(_memory.Tables(own))),
                (2, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.AllFrames))));
        }

        Mmuext("unpin", 90, 4, r => r.OneOf(
            (6, r => r.Pick(_memory.Scratch)), (2, r => r.Pick(_memory.Roots)), (1, r => r.Pick(_memory.OwnTablesButRoot)), (1, r => r.Pick(_memory.Bad))));
        Mmuext("new_baseptr", 25, 5, r => r.OneOf(
            (5, r => r.Pick(_memory.Roots)), (3, r => r.Pick(_memory.Root)), (1, r => r.Pick(_memory.OwnTablesButRoot)),
            (1, r => r.Pick(_memory.Bad)), (1, r => r.Pick(_memory.Own))));
        Mmuext("new_user_baseptr", 25, 15, r => r.OneOf(
            (4, r => r.Pick(_memory.Tables(4))), (3, r => r.Pick(_memory.Roots)), (1, r => r.Pick(_memory.AllFrames)), (2, static r => r.Constant(0))));
        Mmuext("tlb_flush_local", 8, 6, static r => r.Constant(0));
        Mmuext("invlpg_local", 8, 7, AnyAddress);
        Mmuext("tlb_flush_multi", 8, 8, static r => r.Constant(0), r => Pointer(r, Frames));
        Mmuext("invlpg_multi", 8, 9, AnyAddress, r => Pointer(r, Frames));
        Mmuext("tlb_flush_all", 8, 10, static r => r.Constant(0));
        Mmuext("invlpg_all", 8, 11, AnyAddress);
        Mmuext("flush_cache", 4, 12, static r => r.Constant(0));
        Mmuext("set_ldt", 12, 13, AnyAddress, r => r.OneOf((3, static r => r.Random(0x1fff)), (1, r => r.Pick(_hugeCounts)), (1, static r => r.Constant(0))));
        Mmuext("clear_page", 30, 16, DestinationFrame);
        Mmuext("copy_page", 30, 17, DestinationFrame, r => r.Pick(_memory.Unshared));
        Mmuext("flush_cache_global", 4, 18, static r => r.Constant(0));
        Mmuext("mark_super", 4, 19, r => r.Pick(_memory.AllFrames));
        Mmuext("unmark_super", 4, 20, r => r.Pick(_memory.AllFrames));
        Call(GuestHypercall.MmuextOp, "mmuext_op pin, unpin, pin", 25, r =>
        {
            for (int i = 0; i < 3; i++)
            {
                MmuextRequest(
                    r, i, r => r.OneOf((1, static r => r.Constant(0)), (1, static r => r.Constant(1)), (2, static r => r.Constant(4))),
                    r => r.Pick(_memory.Tables(1)), null);
            }

            MmuextArguments(r, 3);
        });
        Call(GuestHypercall.MmuextOp, "mmuext_op garbage", 8, r =>
        {
            // Not unpin, new_baseptr, clear_page and copy_page: they might do what they are told to.
            MmuextRequest(r, 0, static r => r.Random(~0x1dUL), static r => r.Random(~0UL), static r => r.Random(~0UL));
            MmuextArguments(r, 1);
        });
    }

    /// <summary>A frame that the guest can do without the contents of.</summary>
    private void DestinationFrame(FuzzRecipe r)
        => r.OneOf((8, r => r.Pick(_memory.Data)), (3, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.BadOrOwnTables)));

    private void Mmuext(string name, int weight, ulong command, Action<FuzzRecipe> argument1, Action<FuzzRecipe>? argument2 = null)
        => Call(GuestHypercall.MmuextOp, $"mmuext_op {name}", weight, r =>
        {
            r.Random(1).ToBuffer(Frames);
            MmuextRequest(r, 0, r => r.Constant(command), argument1, argument2);
            MmuextArguments(r, 1);
        });

    private static void MmuextRequest(FuzzRecipe r, int index, Action<FuzzRecipe> command, Action<FuzzRecipe> argument1, Action<FuzzRecipe>? argument2)
    {
        command(r);
        r.ToBuffer(List + (index * 24));
        argument1(r);
        r.ToBuffer(List + (index * 24) + 8);
        argument2?.Invoke(r);
        r.ToBuffer(List + (index * 24) + 16);
    }

    private void MmuextArguments(FuzzRecipe r, int count)
    {
        Pointer(r, List);
        To(r, 0);
        r.OneOf((60, r => r.Constant((ulong)count)), (1, static r => r.Constant(0)), (2, r => r.Constant((ulong)count | Preempted)));
        To(r, 1);
        DonePointer(r);
        To(r, 2);
        Domain(r);
        To(r, 3);
    }

    private void AddDescriptorTables()
    {
        Call(GuestHypercall.SetGdt, "set_gdt", 40, r =>
        {
            for (int i = 0; i < 3; i++)
                r.OneOf((6, r => r.Pick(_memory.Data)), (1, r => r.Pick(_memory.AllFrames))).ToBuffer(List + (i * 8));
            Pointer(r, List);
            To(r, 0);
            r.OneOf((6, static r => r.Random(0x1ff)), (3, static r => r.Random(0x5ff)), (1, r => r.Pick(_hugeCounts)), (2, static r => r.Constant(0)));
            To(r, 1);
        });
        Call(GuestHypercall.UpdateDescriptor, "update_descriptor", 40, r =>
        {
            r.OneOf((9, r => r.Pick(_memory.Data).Shift(12)), (2, r => r.Pick(_memory.BadOrOwnTables).Shift(12)), (1, r => r.Pick(_memory.BadPointers)))
                .OneOf((1, static r => r.Random(0x18)), (1, static r => r.Random(0xff8)), (1, static r => r.Random(0x7)));
            To(r, 0);
            r.OneOf((4, r => r.Pick(_descriptors)), (1, static r => r.Random(~0UL)));
            To(r, 1);
        });
    }

    private void AddAssists() => Call(GuestHypercall.VmAssist, "vm_assist", 15, r =>
    {
        r.OneOf((8, static r => r.Constant(0)), (2, static r => r.Constant(1)), (1, static r => r.Random(0xff)));
        To(r, 0);
        r.OneOf((6, static r => r.Constant(2)), (3, static r => r.Constant(32)), (2, static r => r.Random(0x7)), (1, static r => r.Random(~0UL)));
        To(r, 1);
    });

    private void AddStores()
    {
        (string Name, int Weight)[] forms =
            [("load", 20), ("mov qword", 40), ("mov dword", 10), ("mov byte", 10), ("xchg", 20), ("lock or", 10), ("lock cmpxchg", 10), ("rep stosq", 10)];
        foreach ((int form, (string name, int weight)) in forms.Index())
        {
            var recipe = new FuzzRecipe();
            recipe.Constant((ulong)form).ToCall(Number);
            recipe.OneOf(
                (10, r => r.Pick(_memory.ScratchAddresses).Pick(_indexes)), (10, r => r.Pick(_memory.Windows).Pick(_indexes)),
                (3, r => r.Pick(_memory.Windows).Random(0xfff)), (2, r => r.Pick(_memory.BadPointers)));
            To(recipe, 0);
            EntryL1(recipe);
            To(recipe, 1);
            _stores.Add(new FuzzOperation(name, weight, false, recipe.Code));
        }
    }
}
