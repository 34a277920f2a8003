// What the frame table must say, worked out from scratch: a second, naive statement of the page-type rules.
using XenSharp.Core;

namespace XenSharp.Mmu.Tests;

/// <summary>
/// Keeps only what the guest asked for (who owns what, pins, roots, GDT) and derives every count by walking the tables in
/// memory. Only one thing cannot be derived: which entries were taken as linear ones, so that is remembered.
/// </summary>
internal sealed unsafe class PageTableModel(TestMachine machine)
{
    private const ulong DisallowedL1 = 0x98;
    private const ulong DisallowedUpper = 0x198;
    private readonly TestMachine _machine = machine;
    private readonly int _frames = machine.FrameCount;

    /// <summary>References that exist whatever the entries say.</summary>
    public readonly record struct Root(int Frame, PageType Type);

    public bool[] Allocated { get; } = new bool[machine.FrameCount];

    /// <summary>0, or the level that the frame is pinned at.</summary>
    public int[] Pinned { get; } = new int[machine.FrameCount];

    public int KernelRoot { get; set; } = -1;

    public int UserRoot { get; set; } = -1;

    public List<int> Gdt { get; } = [];

    /// <summary>Entries (table, index) that name another table of their own level.</summary>
    private readonly HashSet<(int Table, int Index)> _linear = [];

    /// <summary>Tables that were validated, so that <see cref="_linear"/> says all of their linear entries.</summary>
    private readonly HashSet<int> _known = [];

    /// <summary>What <see cref="Allows"/> or <see cref="AllowsEntry"/> found last.</summary>
    private Walk? _last;

    public int[] References { get; private set; } = new int[machine.FrameCount];

    public int[] TypeCounts { get; private set; } = new int[machine.FrameCount];

    public PageType[] Types { get; private set; } = new PageType[machine.FrameCount];

    /// <summary>Owned, or given up but still used somewhere.</summary>
    public bool Exists(int frame) => (uint)frame < (uint)_frames && (Allocated[frame] || References[frame] > 0);

    /// <summary>Whether the frame may be written by the guest itself.</summary>
    public bool IsWritable(int frame) => Exists(frame) && (TypeCounts[frame] == 0 || Types[frame] == PageType.Writable);

    public bool IsTable(int frame) => TypeCounts[frame] > 0 && Types[frame] is >= PageType.L1PageTable and <= PageType.L4PageTable;

    /// <summary>Whether further references could be taken while all of today's are held.</summary>
    public bool Allows(params ReadOnlySpan<Root> more)
    {
        _last = new Walk(this);
        return _last.AddAll() && _last.AddAll(more);
    }

    /// <summary>Whether an entry of a table of the level could be stored while all of today's references are held.</summary>
    public bool AllowsEntry(int table, int index, int level, PageTableEntry value)
    {
        _last = new Walk(this);
        return _last.AddAll() && _last.AddEntry(table, index, level, value, isNew: true);
    }

    /// <summary>What was asked for last has been done.</summary>
    public void Commit()
    {
        _known.UnionWith(_last!.NewTables);
        _linear.UnionWith(_last.NewLinear);
    }

    /// <summary>An entry was replaced, by one that was asked for last.</summary>
    public void CommitEntry(int table, int index)
    {
        _ = _linear.Remove((table, index));
        Commit();
    }

    /// <summary>Derives the counts again and compares everything with the frame table.</summary>
    public void Verify(string after)
    {
        var walk = new Walk(this);
        if (!walk.AddAll())
            throw new ModelException($"after {after}: what is in memory breaks the rules");
        References = walk.References;
        TypeCounts = walk.TypeCounts;
        Types = walk.Types;
        _ = _known.RemoveWhere(table => !IsTable(table));
        _ = _linear.RemoveWhere(entry => !_known.Contains(entry.Table));
        ulong owned = 0;
        for (int i = 0; i < _frames; i++)
        {
            ref FrameInfo info = ref _machine.Info(i);
            int references = References[i] + (Allocated[i] ? 1 : 0);
            owned += references > 0 ? 1UL : 0;
            if (info.ReferenceCount == references && info.TypeCount == TypeCounts[i] && info.Has(FrameFlags.Pinned) == (Pinned[i] != 0)
                && info.Has(FrameFlags.Allocated) == Allocated[i] && (TypeCounts[i] == 0 || info.Type == Types[i])
                && (!IsTable(i) || info.Has(FrameFlags.Validated)) && info.LinearCount == walk.Linear[i] && info.Owner == (references > 0 ? TestMachine.Domain : 0))
            {
                continue;
            }

            throw new ModelException(
                $"after {after}: frame {i} has {info.ReferenceCount} references, {info.TypeCount} as {info.Type} ({info.Flags}), owner {info.Owner}; "
                + $"linear {info.LinearCount}; expected {references}, {TypeCounts[i]} as {Types[i]}, pinned {Pinned[i]}, allocated {Allocated[i]}, linear {walk.Linear[i]}");
        }

        if (_machine.Context->State->OwnedPages != owned || _machine.Frames->FreeCount != (ulong)_frames - owned)
            throw new ModelException($"after {after}: {_machine.Context->State->OwnedPages} pages owned, {_machine.Frames->FreeCount} free; expected {owned} owned of {_frames}");
    }

    /// <summary>One derivation.</summary>
    private sealed class Walk(PageTableModel model)
    {
        public int[] References { get; } = new int[model._frames];

        public int[] TypeCounts { get; } = new int[model._frames];

        public PageType[] Types { get; } = new PageType[model._frames];

        public int[] Linear { get; } = new int[model._frames];

        public HashSet<int> NewTables { get; } = [];

        public HashSet<(int Table, int Index)> NewLinear { get; } = [];

        private readonly bool[] _done = new bool[model._frames];

        public bool AddAll()
        {
            for (int i = 0; i < model._frames; i++)
            {
                if (model.Pinned[i] != 0 && !Add(i, (PageType)model.Pinned[i]))
                    return false;
            }

            if (model.KernelRoot >= 0 && !Add(model.KernelRoot, PageType.L4PageTable))
                return false;
            if (model.UserRoot >= 0 && !Add(model.UserRoot, PageType.L4PageTable))
                return false;
            foreach (int frame in model.Gdt)
            {
                if (!Add(frame, PageType.SegmentDescriptors))
                    return false;
            }

            return true;
        }

        public bool AddAll(ReadOnlySpan<Root> roots)
        {
            foreach (Root root in roots)
            {
                if (!Add(root.Frame, root.Type))
                    return false;
            }

            return true;
        }

        public bool AddEntry(int table, int index, int level, PageTableEntry value, bool isNew)
        {
            if (!value.IsPresent)
                return true;
            if ((value.Value & (level == 1 ? DisallowedL1 : DisallowedUpper)) != 0)
                return false;
            ulong relative = value.Frame.Value - TestMachine.FirstFrame;
            int frame = relative < (ulong)model._frames ? (int)relative : -1;
            if (frame < 0 || !model.Exists(frame))
                return false;
            if (level == 1)
            {
                if (value.IsWritable)
                    return Add(frame, PageType.Writable);
                References[frame]++;
                return true;
            }

            if (frame == table && !value.IsWritable)
                return true;
            bool linear = isNew
                ? !value.IsWritable && TypeCounts[frame] > 0 && (int)Types[frame] == level && _done[frame] && Linear[table] >= 0 && Linear[frame] <= 0
                : model._linear.Contains((table, index));
            if (!linear)
                return Add(frame, (PageType)(level - 1));
            Linear[table]++;
            Linear[frame]--;
            if (isNew)
                _ = NewLinear.Add((table, index));
            return Add(frame, (PageType)level);
        }

        private bool Add(int frame, PageType type)
        {
            if (!model.Exists(frame))
                return false;
            if (TypeCounts[frame] > 0 && Types[frame] != type)
                return false;
            References[frame]++;
            Types[frame] = type;
            if (TypeCounts[frame]++ > 0)
                return true;
            return type switch
            {
                PageType.SegmentDescriptors => Descriptors(frame),
                PageType.Writable => true,
                _ => Table(frame, (int)type),
            };
        }

        private bool Table(int frame, int level)
        {
            bool isNew = !model._known.Contains(frame);
            if (isNew)
                _ = NewTables.Add(frame);
            PageTableEntry* entries = model._machine.Entry(frame, 0);
            for (int i = 0; i < Paging.EntriesPerTable; i++)
            {
                if (level == 4 && i is >= 256 and < 272)
                    continue;
                if (entries[i].IsPresent && !AddEntry(frame, i, level, entries[i], isNew))
                    return false;
            }

            _done[frame] = true;
            return true;
        }

        private bool Descriptors(int frame)
        {
            var descriptors = (ulong*)model._machine.Entry(frame, 0);
            for (int i = 0; i < Paging.EntriesPerTable; i++)
            {
                if (!IsHarmless(descriptors[i]))
                    return false;
            }

            return true;
        }

        /// <summary>Not present, code or data, type 0, or a call gate into the guest's own selectors.</summary>
        private static bool IsHarmless(ulong descriptor)
        {
            bool present = (descriptor >> 47 & 1) != 0;
            bool segment = (descriptor >> 44 & 1) != 0;
            ulong type = descriptor >> 40 & 0xf;
            ulong selector = descriptor >> 16 & 0xffff;
            return !present || segment || type == 0
                || (type == 0xc && (descriptor >> 32 & 0xff) == 0
                    && ((selector & 4) != 0 || selector >> 3 < 14 * 512 || selector == 0xe033));
        }
    }
}

/// <summary>The implementation and the model disagree.</summary>
internal sealed class ModelException(string message) : Exception(message);
