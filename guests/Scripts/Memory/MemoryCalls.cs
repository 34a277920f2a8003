// The hypercalls of the memory area as scripts write them: a line that says what is asked, and what came of it.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

/// <summary>One request of an mmu_update.</summary>
/// <param name="Pointer">Machine address of the entry, with the command in its low bits.</param>
/// <param name="Entry">What is to be there.</param>
internal readonly record struct MmuRequest(Value Pointer, Value Entry)
{
    /// <summary>A NORMAL_PT_UPDATE of one entry of a table.</summary>
    public static MmuRequest Normal(ScratchPage table, int index, Value entry) => new(At(table, index), entry);

    /// <summary>The same with another command.</summary>
    public static MmuRequest With(ulong command, ScratchPage table, int index, Value entry) => new(At(table, index, command), entry);

    /// <summary>A MACHPHYS_UPDATE.</summary>
    public static MmuRequest Machphys(ScratchPage page, Value pfn)
        => new(((page.Mfn << 12) | MmuCommand.MachphysUpdate).Named($"m2p of {page.Name}"), pfn);

    private static Value At(ScratchPage table, int index, ulong command = MmuCommand.NormalPtUpdate)
        => ((table.Mfn << 12) + ((ulong)index * 8 + command)).Named($"{table.Name}[{index}]{(command == 0 ? "" : $"|{command}")}");
}

/// <summary>One operation of an mmuext_op.</summary>
internal readonly record struct MmuextRequest(ulong Command, Value Argument1, Value Argument2)
{
    public MmuextRequest(ulong command, Value argument1)
        : this(command, argument1, 0)
    {
    }

    public MmuextRequest(ulong command)
        : this(command, 0, 0)
    {
    }
}

internal static class MemoryCalls
{
    /// <summary>update_va_mapping.</summary>
    public static void UpdateVa(this AbiCase c, ScratchPage page, Value entry, ulong flags = Uvmf.Invlpg)
        => c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, entry, flags);

    /// <summary>A page becomes read-only, as a page table has to be.</summary>
    public static void ReadOnly(this AbiCase c, params ScratchPage[] pages)
    {
        foreach (ScratchPage page in pages)
            c.UpdateVa(page, page.Entry(Pte.ReadOnly));
    }

    /// <summary>mmu_update of the caller's own tables; then its done count.</summary>
    public static void MmuUpdate(this AbiCase c, params MmuRequest[] requests) => c.MmuUpdateOf(Domid.Self, requests);

    /// <summary>mmu_update with a domid word; then its done count.</summary>
    public static void MmuUpdateOf(this AbiCase c, ulong domains, params MmuRequest[] requests)
    {
        ScriptBuffer list = c.Requests("requests", requests);
        ScriptBuffer done = c.Done();
        string text = $"mmu_update({string.Join("; ", requests.Select(static r => $"{r.Pointer.Text} := {r.Entry.Text}"))}{(domains == Domid.Self ? "" : $", domains 0x{domains:x}")})";
        c.Hypercall((ulong)GuestHypercall.MmuUpdate, text, AnswerFormat.Result, list, requests.Length, done, domains);
        c.ShowDone(done);
    }

    /// <summary>An array of struct mmu_update.</summary>
    public static ScriptBuffer Requests(this AbiCase c, string name, params MmuRequest[] requests)
        => c.Structure(name, Math.Max(requests.Length, 1) * 16,
            [.. requests.SelectMany(static (r, i) => new (int, int, Value)[] { (i * 16, 8, r.Pointer), ((i * 16) + 8, 8, r.Entry) })]);

    /// <summary>A done count that no operation leaves at what it is.</summary>
    public static ScriptBuffer Done(this AbiCase c) => c.Structure("done", 8, (0, 8, 0xdeadUL));

    public static void ShowDone(this AbiCase c, ScriptBuffer done) => c.Show((Value.Load(done) & 0xffff_ffffUL).Named("done"));

    /// <summary>mmuext_op on the caller; then its done count.</summary>
    public static void MmuextOp(this AbiCase c, string text, params MmuextRequest[] requests) => c.MmuextOpOf(Domid.Self, text, requests);

    /// <summary>mmuext_op with a domid; then its done count.</summary>
    public static void MmuextOpOf(this AbiCase c, ulong domain, string text, params MmuextRequest[] requests)
    {
        ScriptBuffer list = c.Operations("operations", requests);
        ScriptBuffer done = c.Done();
        c.Hypercall((ulong)GuestHypercall.MmuextOp, $"mmuext_op({text})", AnswerFormat.Result, list, requests.Length, done, domain);
        c.ShowDone(done);
    }

    /// <summary>An array of struct mmuext_op.</summary>
    public static ScriptBuffer Operations(this AbiCase c, string name, params MmuextRequest[] requests)
        => c.Structure(name, Math.Max(requests.Length, 1) * 24, [.. requests.SelectMany(static (r, i) => new (int, int, Value)[]
        {
            (i * 24, 8, r.Command), ((i * 24) + 8, 8, r.Argument1), ((i * 24) + 16, 8, r.Argument2),
        })]);

    /// <summary>mmuext_op of one operation, without its done count: for steps on the way to what a case is about.</summary>
    public static void One(this AbiCase c, string text, ulong command, Value argument1, Value? argument2 = null)
    {
        ScriptBuffer list = c.Operations("operation", new MmuextRequest(command, argument1, argument2 ?? 0));
        c.Hypercall((ulong)GuestHypercall.MmuextOp, $"mmuext_op({text})", AnswerFormat.Result, list, 1, 0, Domid.Self);
    }

    public static void Pin(this AbiCase c, int level, ScratchPage page)
        => c.One($"pin L{level} {page.Name}", Mmuext.PinL1Table + (ulong)(level - 1), page.Mfn);

    public static void Unpin(this AbiCase c, ScratchPage page) => c.One($"unpin {page.Name}", Mmuext.UnpinTable, page.Mfn);

    /// <summary>memory_op.</summary>
    public static Value MemoryOp(this AbiCase c, string text, Value command, Value argument, AnswerFormat format = AnswerFormat.Result)
        => c.Hypercall((ulong)GuestHypercall.MemoryOp, $"memory_op({text})", format, command, argument);

    /// <summary>Shows a present entry of a table as the guest reads it: the pfn of its frame, then its flags.</summary>
    public static void ShowEntry(this AbiCase c, Value address, string name)
    {
        Value entry = c.Get(address);
        c.Show(Value.Pfn((entry & Pte.Frame) >> 12).Named($"frame of {name}"));
        c.ShowFlags(entry, name);
    }

    /// <summary>Shows an entry of a scratch page.</summary>
    public static void ShowEntry(this AbiCase c, ScratchPage table, int index) => c.ShowEntry(table[index * 8], $"{table.Name}[{index}]");

    /// <summary>Shows all of an entry but its frame and what the processor may set: Accessed and Dirty.</summary>
    public static void ShowFlags(this AbiCase c, Value entry, string name)
        => c.Show((entry & ~(Pte.Frame | Pte.Accessed | Pte.Dirty)).Named($"flags of {name}"));

    /// <summary>Shows all of an entry but its frame; for tables that no processor walks.</summary>
    public static void ShowAllFlags(this AbiCase c, ScratchPage table, int index)
        => c.Show((c.Get(table[index * 8]) & ~Pte.Frame).Named($"flags of {table.Name}[{index}], Accessed and Dirty too"));

    /// <summary>A page of an L1 table, read-only and pinned, with nothing in it.</summary>
    public static ScratchPage PinnedTable(this AbiCase c, int level, string name)
    {
        ScratchPage table = c.Page(name);
        c.ReadOnly(table);
        c.Pin(level, table);
        return table;
    }

    /// <summary>Virtual address, in the boot mapping, of the entry that translates an address.</summary>
    public static Value EntryInBootMapping(Value address, int level)
    {
        Value machine = Value.EntryAddress(address, level);
        return ((Value.Pfn(machine >> 12) << 12) + (machine & 0xfff) + PvAssembler.VirtBase).Named($"l{level}e({address.Text})");
    }
}
