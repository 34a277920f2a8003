// Random operations on forests of page tables, compared after every step with counts derived from scratch.
using CsCheck;
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

/// <summary>
/// More than a million steps: 2000 forests of 512 each, half of them on a VM where stores have to be repeated inside, and half with
/// every operation stopped and continued wherever it can be.
/// </summary>
public sealed unsafe class PageTableModelTests
{
    private const int Forests = 1000;
    private const int Steps = 512;

    /// <summary>Any number: another one plants other forests.</summary>
    private const uint FirstStream = 1000;

    [Test]
    public void Counts_equal_references_whatever_the_guest_does([Values] bool interrupted)
    {
        // Random, but the same every time: a failure comes with the seed of its forest.
        int continuations = 0;
        Gen<(bool, ulong[])> forests = Gen.Select(Gen.Bool, Gen.ULong.Array[Steps]);
        for (uint i = 0; i < Forests; i++)
        {
            forests.Sample(
                forest =>
                {
                    using var run = new ForestRun(forest.Item1, interrupted);
                    foreach (ulong step in forest.Item2)
                        run.Step(step);
                    continuations += run.Continuations;
                },
                seed: new PCG(FirstStream + i, 0x5eed).ToString(),
                iter: 1,
                threads: 1,
                print: forest => $"forest {i}, in-guest stores {forest.Item1}");
        }

        Assert.That(continuations, interrupted ? Is.GreaterThan(20 * Forests) : Is.Zero);
    }

    /// <summary>One forest: the machine, the model, and what a processor may have cached of it.</summary>
    private sealed class ForestRun : IDisposable
    {
        private const int FrameCount = 40;
        private const int OwnedAtFirst = 34;
        private readonly TestMachine _machine;
        private readonly PageTableModel _model;
        private readonly ProcessorCache _cache;
        private ulong _random;

        public ForestRun(bool inGuest, bool interrupted)
        {
            _machine = new TestMachine(FrameCount, OwnedAtFirst, inGuest);
            BuildFirstTree();
            _model = new PageTableModel(_machine) { KernelRoot = 0 };
            _model.Pinned[0] = 4;
            _model.Allocated.AsSpan(0, OwnedAtFirst).Fill(true);
            _model.Verify("start");
            _cache = new ProcessorCache(_machine);
            _machine.Interrupt(interrupted);
            _machine.Between = Audit;
        }

        public void Step(ulong random)
        {
            _random = random;
            string what = Next(18) switch
            {
                0 or 1 or 2 => Pin(),
                3 => Unpin(),
                4 or 5 or 6 or 7 => UpdateEntry(),
                8 => UpdateByAddress(),
                9 => NewBaseptr(),
                10 => NewUserBaseptr(),
                11 => DecreaseReservation(),
                12 => PopulatePhysmap(),
                13 => WholePage(),
                14 => SetGdt(),
                15 => UpdateDescriptor(),
                _ => Store(),
            };
            _model.Verify(what);
            if (FrameTableAudit.Check(_machine.Context) is { } trouble)
                throw new ModelException($"after {what}: the audit says otherwise: {trouble}");
            _cache.Verify(what);
            _cache.Walk(random, Next(2) == 0);
        }

        public int Continuations => _machine.Continuations;

        public void Dispose() => _machine.Dispose();

        /// <summary>In the midst of an operation the model knows no answer, but what is counted must be what is held.</summary>
        private void Audit()
        {
            if (FrameTableAudit.Check(_machine.Context) is { } trouble)
                throw new ModelException($"between two parts: {trouble}");
        }

        /// <summary>A tree to begin with: two L1 tables behind slot 1 of the boot root that map a dozen pages.</summary>
        private void BuildFirstTree()
        {
            const int l3 = FirstPlayFrame;
            const int l2 = l3 + 1;
            *_machine.Entry(l3, 1) = new PageTableEntry(Frame(l2), Branch);
            for (int table = 0; table < 2; table++)
            {
                int l1 = l2 + 1 + table;
                *_machine.Entry(l2, 1 + table) = new PageTableEntry(Frame(l1), Branch);
                for (int i = 1; i < 7; i++)
                    *_machine.Entry(l1, i) = new PageTableEntry(Frame(l2 + 2 + i + (6 * table)), i < 5 ? Leaf : ReadOnly);
            }

            _machine.Link(0, 1, l3);
            *_machine.Queue = default;
            _machine.Queue->InGuest = _machine.Context->ShadowedFrames != null ? 1 : 0;
        }

        private static void Expect(bool allowed, long result, string what)
        {
            if (result == 0 != allowed)
                throw new ModelException($"{what}: answered {result}, expected {(allowed ? "success" : "a refusal")}");
        }

        private int Next(int count)
        {
            // Each step has 64 random bits; mixing them again gives as many choices as it takes.
            _random = (_random ^ (_random >> 29)) * 0x9e37_79b9_7f4a_7c15;
            return (int)((_random >> 33) % (ulong)count);
        }

        private int PlayFrame() => FirstPlayFrame + Next(FrameCount - FirstPlayFrame);

        /// <summary>Mostly low indices, so that tables meet; slot 0 of a root keeps the arguments reachable.</summary>
        private int Index() => Next(12) switch { < 9 => 1 + Next(6), 9 => 256, 10 => 271, _ => 511 };

        private PageTableEntry RandomEntry(int table, int level)
        {
            PageFlags flags = Next(8) == 0 ? PageFlags.None : PageFlags.Present;
            if (Next(2) == 0)
                flags |= PageFlags.User;
            if (Next(2) == 0)
                flags |= PageFlags.Accessed;
            if (Next(4) == 0)
                flags |= PageFlags.NoExecute;
            if (Next(4) == 0)
                flags |= PageFlags.Dirty | PageFlags.Available1;
            if (Next(12) == 0)
                flags |= (PageFlags)(1UL << (3 + Next(6)));
            int frame = Next(10) == 0 ? table : PlayFrame();
            if (Next(2) == 0)
                flags |= PageFlags.Writable;
            return new PageTableEntry(Next(20) == 0 ? new Mfn(0x77) : Frame(frame), flags);
        }

        private string Pin()
        {
            int frame = PlayFrame();
            int level = 1 + Next(4);
            bool allowed = _model.Pinned[frame] == 0 && _model.Allows(new PageTableModel.Root(frame, (PageType)level));
            Expect(allowed, _machine.Pin(level, frame), $"pin {frame} as L{level}");
            if (allowed)
            {
                _model.Pinned[frame] = level;
                _model.Commit();
            }

            return $"pin {frame} as L{level}";
        }

        private string Unpin()
        {
            int frame = PlayFrame();
            bool allowed = _model.Pinned[frame] != 0;
            Expect(allowed, _machine.Unpin(frame), $"unpin {frame}");
            _model.Pinned[frame] = 0;
            return $"unpin {frame}";
        }

        private string UpdateEntry()
        {
            int frame = PlayFrame();
            int index = Index();
            bool isTable = _model.Exists(frame) && _model.IsTable(frame);
            int level = isTable ? (int)_model.Types[frame] : 1 + Next(4);
            PageTableEntry value = RandomEntry(frame, level);
            bool isCheap = isTable && OnlyFlagsChange(frame, index, level, value);
            bool allowed = isTable
                ? !(level == 4 && index is >= 256 and < 272) && (isCheap || _model.AllowsEntry(frame, index, level, value))
                : _model.IsWritable(frame);
            ulong command = Next(3) switch { 0 => 2UL, 1 => 3UL, _ => 0UL };
            PageTableEntry old = *_machine.Entry(frame, index);
            string what = $"update of {frame}[{index}] (L{level}) to {value}";
            Expect(allowed, _machine.Update((EntryAddress(frame, index).Value | command, value.Value)), what);
            PageTableEntry now = *_machine.Entry(frame, index);
            PageTableEntry expected = allowed ? Stored(isTable ? level : 0, value, old, command == 2) : old;
            if (now != expected)
                throw new ModelException($"{what}: the entry is {now}, expected {expected}");
            if (allowed && isTable && !isCheap)
                _model.CommitEntry(frame, index);
            return what;
        }

        /// <summary>The same frame with the same rights: nothing is looked at again.</summary>
        private bool OnlyFlagsChange(int frame, int index, int level, PageTableEntry value)
        {
            PageTableEntry old = *_machine.Entry(frame, index);
            return old.IsPresent && value.IsPresent && old.Frame == value.Frame && old.IsWritable == value.IsWritable
                && (value.Value & (level == 1 ? 0x98UL : 0x198)) == 0;
        }

        /// <summary>What the guest finds in an entry that it wrote.</summary>
        private static PageTableEntry Stored(int level, PageTableEntry value, PageTableEntry old, bool preserve)
        {
            if (level == 0)
                return value;
            if (value.IsPresent)
            {
                if (level == 1)
                {
                    PageFlags mark = value.Has(PageFlags.User) ? PageFlags.None : PageFlags.GuestKernel;
                    value = value.With(mark | PageFlags.User);
                    if (!value.Has(PageFlags.GuestKernel))
                        value = value.With(PageFlags.Global);
                }
                else
                {
                    value = value.With(PageFlags.User | (level == 4 ? PageFlags.Accessed : PageFlags.None));
                }
            }

            return preserve ? value.With(old.Flags & (PageFlags.Accessed | PageFlags.Dirty)) : value;
        }

        private string UpdateByAddress()
        {
            ulong address = ((ulong)Next(4) << 39) | ((ulong)Next(4) << 30) | ((ulong)Next(4) << 21) | ((ulong)Next(4) << 12);
            int table = Resolve(new VirtualAddress(address));
            PageTableEntry value = RandomEntry(Math.Max(table, 0), 1);
            int index = new VirtualAddress(address).TableIndex(1);
            bool allowed = table >= FirstPlayFrame && _model.TypeCounts[table] > 0 && _model.Types[table] == PageType.L1PageTable
                && (_model.AllowsEntry(table, index, 1, value) || OnlyFlagsChange(table, index, 1, value));
            if (table is >= 0 and < FirstPlayFrame)
                return "nothing";
            Expect(allowed, _machine.UpdateVa(address, value, Next(3) switch { 0 => 0UL, 1 => 1UL, _ => 6UL }), $"update of {address:x} to {value}");
            return $"update of {address:x} to {value}";
        }

        /// <summary>The frame of the L1 that maps an address on the current root, or -1.</summary>
        private int Resolve(VirtualAddress address)
        {
            int table = _model.KernelRoot;
            for (int level = 4; level > 1; level--)
            {
                PageTableEntry entry = *_machine.Entry(table, address.TableIndex(level));
                if (!entry.IsPresent)
                    return -1;
                table = (int)(entry.Frame.Value - FirstFrame);
            }

            return table;
        }

        private string NewBaseptr()
        {
            int frame = Next(4) == 0 ? 0 : PlayFrame();

            // A root without the boot tables would be the guest's end: its arguments could not be read.
            if (frame != 0 && _model.Exists(frame) && _model.IsTable(frame) && _machine.Entry(frame, 0)->Frame != Frame(1))
                return "nothing";
            if (frame != 0 && _model.IsWritable(frame))
                *_machine.Entry(frame, 0) = new PageTableEntry(Frame(1), Branch);
            bool allowed = frame == _model.KernelRoot || _model.Allows(new PageTableModel.Root(frame, PageType.L4PageTable));
            Expect(allowed, _machine.Extended(5, Frame(frame).Value), $"new_baseptr {frame}");
            if (allowed)
            {
                if (_model.KernelRoot != frame)
                {
                    _cache.LoadRoot();
                    _model.Commit();
                }

                _model.KernelRoot = frame;
            }

            return $"new_baseptr {frame}";
        }

        private string NewUserBaseptr()
        {
            int frame = Next(3) == 0 ? -1 : PlayFrame();
            bool allowed = frame < 0 || frame == _model.UserRoot || _model.Allows(new PageTableModel.Root(frame, PageType.L4PageTable));
            Expect(allowed, _machine.Extended(15, frame < 0 ? 0 : Frame(frame).Value), $"new_user_baseptr {frame}");
            if (allowed && frame >= 0 && frame != _model.UserRoot)
                _model.Commit();
            if (allowed)
                _model.UserRoot = frame;
            return $"new_user_baseptr {frame}";
        }

        private string DecreaseReservation()
        {
            int frame = PlayFrame();
            int order = Next(4) == 0 ? 1 : 0;
            bool allowed = true;
            for (int i = frame; allowed && i < frame + (1 << order); i++)
            {
                // What was given up before but is still in use can be given up again.
                allowed = i < FrameCount && _model.Exists(i);
                if (allowed)
                    _model.Allocated[i] = false;
            }

            string what = $"decrease_reservation of {frame}, order {order}";
            Expect(allowed, 1 - _machine.Reservation(1, [Frame(frame).Value], (uint)order), what);
            return what;
        }

        private string PopulatePhysmap()
        {
            int frame = Enumerable.Range(0, FrameCount).FirstOrDefault(i => !_model.Exists(i), -1);
            long result = _machine.Reservation(6, [(ulong)0x123]);
            Expect(frame >= 0, 1 - result, "populate_physmap");
            if (frame >= 0)
            {
                if (*(ulong*)(_machine.Data + 256) != Frame(frame).Value || _machine.Context->MachineToPhys[frame] != 0x123
                    || new ReadOnlySpan<byte>(_machine.Entry(frame, 0), 4096).ContainsAnyExcept((byte)0))
                {
                    throw new ModelException($"populate_physmap gave {*(ulong*)(_machine.Data + 256):x}, expected frame {frame}, empty, with its pfn");
                }

                _model.Allocated[frame] = true;
            }

            return $"populate_physmap of {frame}";
        }

        private string WholePage()
        {
            int frame = PlayFrame();
            bool allowed = _model.IsWritable(frame);
            if (Next(2) == 0)
            {
                Expect(allowed, _machine.Extended(16, Frame(frame).Value), $"clear_page {frame}");
                return $"clear_page {frame}";
            }

            int source = PlayFrame();
            allowed = allowed && _model.Exists(source);
            Expect(allowed, _machine.Extended(17, Frame(frame).Value, Frame(source).Value), $"copy_page {source} to {frame}");
            return $"copy_page {source} to {frame}";
        }

        private string SetGdt()
        {
            int count = Next(3);
            var frames = new int[count];
            for (int i = 0; i < count; i++)
            {
                frames[i] = PlayFrame();
                ((ulong*)_machine.Data)[i] = Frame(frames[i]).Value;
            }

            PageTableModel.Root[] roots = Array.ConvertAll(frames, static frame => new PageTableModel.Root(frame, PageType.SegmentDescriptors));
            bool allowed = _model.Allows(roots);
            long result = DescriptorTables.SetGdt(_machine.Vcpu, new HypercallArguments { A0 = DataAddress, A1 = (ulong)count * 512 });
            Expect(allowed, result, $"set_gdt {string.Join(',', frames)}");
            if (allowed)
            {
                _model.Gdt.Clear();
                _model.Gdt.AddRange(frames);
            }

            return $"set_gdt {string.Join(',', frames)}";
        }

        private string UpdateDescriptor()
        {
            int frame = PlayFrame();
            bool allowed = _model.Exists(frame) && (_model.IsWritable(frame) || _model.Types[frame] == PageType.SegmentDescriptors);
            long result = DescriptorTables.UpdateDescriptor(
                _machine.Vcpu, new HypercallArguments { A0 = EntryAddress(frame, Index()).Value, A1 = 0x00cf_9300_0000_ffff });
            Expect(allowed, result, $"update_descriptor in {frame}");
            return $"update_descriptor in {frame}";
        }

        /// <summary>The guest's own store into a page that it may write.</summary>
        private string Store()
        {
            int frame = PlayFrame();
            if (!_model.IsWritable(frame))
                return "nothing";
            int index = Index();
            *_machine.Entry(frame, index) = RandomEntry(frame, 1 + Next(4));
            _cache.GuestStored(EntryAddress(frame, index));
            return $"store to {frame}[{index}]";
        }
    }

    /// <summary>
    /// What a processor, or KVM's shadow of the tables, may still use although memory says otherwise: it must never let the guest
    /// write to a table, or keep a right that was taken away, past the next entry into the guest.
    /// </summary>
    private sealed class ProcessorCache(TestMachine machine)
    {
        private readonly Dictionary<ulong, PageTableEntry> _shadow = [];
        private readonly HashSet<int> _writable = [];

        /// <summary>Uses some address that is mapped, as the guest's load or store would.</summary>
        public void Walk(ulong random, bool write)
        {
            var table = new Mfn(machine.Vcpu->State->KernelRoot);
            bool writable = true;
            for (int level = 4; level > 0; level--, random >>= 3)
            {
                // Slots 1–6 and 511 are what the steps play with.
                int index = (int)(random & 7) switch { 0 => 1, 7 => 511, var i => i };
                for (int tries = 0; tries < 7 && !machine.Context->Memory.Table(table)[index].IsPresent; tries++)
                    index = index == 6 ? 1 : index == 511 ? 1 : index + 1;
                PageTableEntry* entry = machine.Context->Memory.Table(table) + index;
                if (!entry->IsPresent || !entry->Has(PageFlags.User))
                    return;
                *entry = entry->With(PageFlags.Accessed);
                writable &= entry->IsWritable;
                if (level == 1 && write && writable)
                    *entry = entry->With(PageFlags.Dirty);
                _shadow[(table.Address + ((ulong)index * 8)).Value] = *entry;
                table = entry->Frame;
            }

            if (writable && write)
                _ = _writable.Add((int)(table.Value - FirstFrame));
        }

        /// <summary>KVM sees what the guest itself stores.</summary>
        public void GuestStored(MachineAddress address) => _shadow.Remove(address.Value);

        /// <summary>CR3 was loaded.</summary>
        public void LoadRoot() => _writable.Clear();

        public void Verify(string after)
        {
            PageTableWriteQueue* queue = machine.Queue;
            if (queue->InGuest != 0)
                VerifyShadow(queue, after);
            else if (queue->FlushPending == 0)
                VerifyWritable(after);
            else
                _writable.Clear();
            queue->Clear();
        }

        private void VerifyShadow(PageTableWriteQueue* queue, string after)
        {
            for (int i = 0; i < queue->Count; i++)
            {
                for (ulong word = 0; word < (*queue)[i].Count; word++)
                    _ = _shadow.Remove((*queue)[i].Address + (word * 8));
            }

            if (queue->Overflowed != 0)
                _shadow.Clear();
            foreach ((ulong address, PageTableEntry cached) in _shadow)
            {
                var frame = new MachineAddress(address);
                ref FrameInfo info = ref machine.Info((int)(frame.Frame.Value - FirstFrame));

                // Of a page that is no table any more the guest's own stores are seen, by write protection.
                if (!info.IsPageTable || info.TypeCount == 0)
                    continue;
                PageTableEntry now = machine.Context->Memory.Table(frame.Frame)[frame.Offset / 8];
                const PageFlags rights = PageFlags.Present | PageFlags.Writable | PageFlags.User;
                if (now.Frame != cached.Frame || (cached.Flags & ~now.Flags & rights) != 0 || (now.Flags & ~cached.Flags & PageFlags.NoExecute) != 0)
                    throw new ModelException($"after {after}: the shadow of {address:x} keeps {cached}, memory says {now}, and no store is repeated");
            }
        }

        private void VerifyWritable(string after)
        {
            foreach (int frame in _writable)
            {
                ref FrameInfo info = ref machine.Info(frame);
                if (info.TypeCount != 0 && info.Type != PageType.Writable)
                    throw new ModelException($"after {after}: a TLB may still map frame {frame} writable, and it is {info.Type} now");
            }
        }
    }
}
