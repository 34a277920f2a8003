// The frame table recounted from scratch: what the tables in memory and the registers say against what was kept.
using System.Globalization;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Derives every reference, type count and linear count of a domain from what holds them: owners, pins, roots, descriptor tables and
/// the entries of all page tables, and compares. A domain's vCPUs must be at rest. For tests and debug builds.
/// </summary>
public static unsafe class FrameTableAudit
{
    /// <summary>Disagreements that are named one by one.</summary>
    private const int MaxNamed = 8;

    /// <summary>Recounts.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="writable">Frames that the manager holds writable beside those that a vCPU's state names.</param>
    /// <returns>Null when all agree; else sentences that name the frames which do not.</returns>
    public static string? Check(DomainContext* domain, params ReadOnlySpan<ulong> writable) => Check(domain, writable, []);

    /// <summary>Recounts.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="writable">Frames that the manager holds writable beside those that a vCPU's state names.</param>
    /// <param name="referenced">Frames that the manager holds a reference to and no more, each as often as it is named.</param>
    /// <returns>Null when all agree; else sentences that name the frames which do not.</returns>
    public static string? Check(DomainContext* domain, ReadOnlySpan<ulong> writable, ReadOnlySpan<ulong> referenced)
    {
        var count = new Count(domain);
        foreach (ulong frame in writable)
            count.Hold(new Mfn(frame), PageType.Writable, "held by the manager");
        foreach (ulong frame in referenced)
            count.Reference(new Mfn(frame));
        for (int i = 0; i < domain->State->VcpuCount; i++)
            count.AddVcpu(domain->Vcpus + i);
        count.AddFrames();
        return count.Compare();
    }

    private sealed class Count(DomainContext* domain)
    {
        private readonly DomainContext* _domain = domain;
        private readonly FrameTable* _frames = FrameTable.Of(domain);
        private readonly uint[] _references = new uint[domain->Memory.FrameCount];
        private readonly uint[] _uses = new uint[domain->Memory.FrameCount];
        private readonly int[] _linear = new int[domain->Memory.FrameCount];
        private readonly (uint Mappings, uint Writers)[] _window = new (uint, uint)[domain->Window.FrameCount];
        private readonly List<string> _troubles = [];

        public void AddVcpu(VcpuContext* vcpu)
        {
            VcpuState* state = vcpu->State;
            Hold(new Mfn(state->KernelRoot), PageType.L4PageTable, "kernel root");
            Hold(new Mfn(state->UserRoot), PageType.L4PageTable, "user root");
            if (state->VcpuInfoFrame != _domain->State->SharedInfoFrame)
                Hold(new Mfn(state->VcpuInfoFrame), PageType.Writable, "vcpu_info");
            foreach (ulong frame in state->GdtFrames)
                Hold(new Mfn(frame), PageType.SegmentDescriptors, "GDT");
            for (int page = 0; page < DescriptorWindow.LdtPages; page++)
            {
                PageTableEntry entry = ((PageTableEntry*)vcpu->DescriptorWindow.Entries)[DescriptorWindow.GdtPages + page];
                if (entry.IsPresent)
                    Hold(entry.Frame, PageType.SegmentDescriptors, "LDT");
            }
        }

        /// <summary>A reference and a use, by something that names frame 0 when it has none.</summary>
        public void Hold(Mfn frame, PageType type, string holder)
        {
            if (frame.Value != 0)
                Add(frame, type, holder);
        }

        /// <summary>A reference to a frame of the domain, or a mapping of another's.</summary>
        public void Reference(Mfn frame)
        {
            if (_domain->Window.Contains(frame))
                AddForeign(frame, writable: false);
            else
                _references[_domain->Memory.IndexOf(frame)]++;
        }

        public void AddFrames()
        {
            for (ulong i = 0; i < _domain->Memory.FrameCount; i++)
            {
                Mfn frame = _domain->Memory.FirstFrame + i;
                FrameInfo* info = _frames->Find(frame);
                if (info->Has(FrameFlags.Allocated))
                    _references[i]++;
                if (info->Has(FrameFlags.Pinned))
                    Add(frame, info->Type, "pinned");
                if (info->Has(FrameFlags.Partial))
                    Add(frame, info->Type, "partial");
                if (info->TypeCount == 0)
                    continue;
                if (!info->Has(FrameFlags.Validated) && !info->Has(FrameFlags.Partial))
                    _troubles.Add($"{frame} is in the middle of a check");
                if (info->IsPageTable)
                    AddTable(frame, info);
                else if (info->Type == PageType.SegmentDescriptors)
                    AddDescriptors(frame);
            }
        }

        public string? Compare()
        {
            ulong owned = 0;
            ulong free = 0;
            for (ulong i = 0; i < _domain->Memory.FrameCount; i++)
            {
                Mfn frame = _domain->Memory.FirstFrame + i;
                FrameInfo* info = _frames->Find(frame);
                free += info->ReferenceCount == 0 ? 1UL : 0;
                owned += info->ReferenceCount != 0 && !info->Has(FrameFlags.Special) ? 1UL : 0;
                int linear = info->IsPageTable && info->TypeCount != 0 ? info->LinearCount : 0;
                if (info->ReferenceCount != _references[i] || info->TypeCount != _uses[i] || linear != _linear[i])
                {
                    _troubles.Add(
                        $"{frame} ({info->Type}, {info->Flags}) has {info->ReferenceCount} references, {info->TypeCount} uses, linear {linear}; "
                        + $"counted {_references[i]}, {_uses[i]}, {_linear[i]}");
                }
            }

            for (ulong i = 0; i < _domain->Window.FrameCount; i++)
            {
                Mfn frame = _domain->Window.FirstFrame + i;
                (uint Mappings, uint Writers) kept = (ForeignFrames.Mappings(_domain, frame), ForeignFrames.Writers(_domain, frame));
                if (kept != _window[i])
                    _troubles.Add($"{frame} of the window has {kept.Mappings} mappings, {kept.Writers} to write; counted {_window[i].Mappings}, {_window[i].Writers}");
            }

            if (owned != _domain->State->OwnedPages)
                _troubles.Add($"the domain is said to own {_domain->State->OwnedPages} frames and owns {owned}");
            if (free != _frames->FreeCount)
                _troubles.Add($"{_frames->FreeCount} frames are said to be free, and {free} are");
            if (_troubles.Count == 0)
                return null;
            string named = string.Join("; ", _troubles.Take(MaxNamed));
            return _troubles.Count > MaxNamed ? string.Create(CultureInfo.InvariantCulture, $"{named}; and {_troubles.Count - MaxNamed} more") : named;
        }

        private void AddTable(Mfn frame, FrameInfo* info)
        {
            int level = (int)info->Type;
            int entries = info->Has(FrameFlags.Partial) ? info->Progress : Paging.EntriesPerTable;
            PageTableEntry* table = _domain->Memory.Table(frame);
            for (int i = 0; i < entries; i++)
            {
                if (level == 4 && Paging.IsHypervisorSlot(i))
                {
                    // They are filled when all else is checked.
                    if (info->Has(FrameFlags.Validated))
                        CheckHypervisorSlot(frame, i, table[i]);
                }
                else if (table[i].IsPresent)
                {
                    AddEntry(frame, i, level, table[i]);
                }
            }
        }

        private void CheckHypervisorSlot(Mfn frame, int slot, PageTableEntry value)
        {
            const ulong maySet = (ulong)(PageFlags.Accessed | PageFlags.Dirty);
            ulong expected = _domain->HypervisorSlots[slot - Paging.FirstHypervisorSlot];
            bool isHidden = (slot == _domain->MachineToPhysStart.TableIndex(4) && value.Value == 0)
                || (slot == _domain->KernelSlot && ((value.Value ^ _domain->UserSlot) & ~maySet) == 0);
            if (((value.Value ^ expected) & ~maySet) != 0 && !isHidden)
                _troubles.Add($"{frame}[{slot}] of the hypervisor's is {value}");
        }

        private void AddEntry(Mfn table, int index, int level, PageTableEntry value)
        {
            string holder = $"entry {index} of {table}";
            if (!PageTables.MayHave(level, value))
                _troubles.Add($"{holder} is {value}, which no entry of level {level} may be");
            if (level > 1 && value.Frame == table)
            {
                if (value.IsWritable)
                    _troubles.Add($"{holder} maps its own table writable");
                return;
            }

            if (level == 1 && _domain->Window.Contains(value.Frame))
            {
                AddForeign(value.Frame, value.IsWritable);
                return;
            }

            if (!_domain->Memory.Contains(value.Frame))
            {
                _troubles.Add($"{holder} names {value.Frame}, which is not the domain's");
                return;
            }

            if (level == 1 && !value.IsWritable)
            {
                _references[_domain->Memory.IndexOf(value.Frame)]++;
                return;
            }

            if (level > 1 && _frames->Find(value.Frame)->Type == PageTables.TypeOfLevel(level))
            {
                if (value.IsWritable)
                    _troubles.Add($"{holder} maps a table of its own level writable");
                _linear[_domain->Memory.IndexOf(table)]++;
                _linear[_domain->Memory.IndexOf(value.Frame)]--;
                Add(value.Frame, PageTables.TypeOfLevel(level), holder);
                return;
            }

            Add(value.Frame, level == 1 ? PageType.Writable : PageTables.TypeOfLevel(level - 1), holder);
        }

        private void AddDescriptors(Mfn frame)
        {
            var descriptors = (ulong*)_domain->Memory.Page(frame);
            for (int i = 0; i < Paging.EntriesPerTable; i++)
            {
                ulong sanitised = descriptors[i];
                if (!DescriptorTables.Sanitise(ref sanitised) || sanitised != descriptors[i])
                    _troubles.Add($"descriptor {i} of {frame} is {descriptors[i]:x16}");
            }
        }

        private void AddForeign(Mfn frame, bool writable)
        {
            ref (uint Mappings, uint Writers) counts = ref _window[_domain->Window.IndexOf(frame)];
            counts = (counts.Mappings + 1, counts.Writers + (writable ? 1u : 0));
        }

        private void Add(Mfn frame, PageType type, string holder)
        {
            if (type == PageType.Writable && _domain->Window.Contains(frame))
            {
                AddForeign(frame, writable: true);
                return;
            }

            if (!_domain->Memory.Contains(frame))
            {
                _troubles.Add($"{frame}, {holder}, is not the domain's");
                return;
            }

            ulong index = _domain->Memory.IndexOf(frame);
            FrameInfo* info = _frames->Find(frame);
            if (info->Type != type || info->Owner != _domain->State->Id)
                _troubles.Add($"{frame}, {holder}, is {info->Type} of domain {info->Owner} and should be {type}");
            _references[index]++;
            _uses[index]++;
        }
    }
}
