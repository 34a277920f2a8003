// set_gdt and update_descriptor: frames of descriptors, and what a descriptor may be.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class DescriptorTablesScript
{
    // A flat data segment and a 64-bit code segment, of privilege 0.
    private const ulong FlatData = 0x00cf_9200_0000_ffff;
    private const ulong LongCode = 0x00af_9a00_0000_ffff;
    private const int EntriesPerFrame = 512;

    /// <summary>FIRST_RESERVED_GDT_ENTRY: descriptors from here on are the hypervisor's.</summary>
    private const ulong FirstReserved = 14 * EntriesPerFrame;

    public static AbiScript SetGdt() => new("set-gdt", "set_gdt", script =>
    {
        script.Case("a table of descriptors, which are made safe", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.Put(page[8], 8, FlatData);
            c.Put(page[16], 8, LongCode);
            c.ReadOnly(page);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page), EntriesPerFrame);
            c.Load(page[8]);
            c.Load(page[16]);
            LoadSegment(c, 0xb);
            LoadSegment(c, 8);
            LoadSegment(c, 0x1b);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            LoadSegment(c, 0xb);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
        });
        script.Case("a limit of fewer entries", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.Fill(page.At, EntriesPerFrame, 8, FlatData);
            c.ReadOnly(page);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page), 2);
            LoadSegment(c, 0xb);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
        script.Case("all 14 frames, and one more entry", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.Put(page[8], 8, FlatData);
            c.ReadOnly(page);
            ScriptBuffer frames = Frames(c, [.. Enumerable.Repeat(page, 15)]);
            c.Hypercall(GuestHypercall.SetGdt, frames, FirstReserved);
            LoadSegment(c, (13 * 4096) + 0xb);
            c.Hypercall(GuestHypercall.SetGdt, frames, FirstReserved + 1);
            c.Hypercall(GuestHypercall.SetGdt, frames, 0xffff_ffff);
            LoadSegment(c, (13 * 4096) + 0xb);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
        script.Case("frames that cannot be descriptor tables: the old table stays", c =>
        {
            ScratchPage[] pages = c.Pages(3);
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Put(pages[0][8], 8, FlatData);
            c.ReadOnly(pages[0], pages[2]);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, pages[0]), EntriesPerFrame);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, pages[2], pages[1]), 2 * EntriesPerFrame);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, table), EntriesPerFrame);
            foreach (ulong frame in (ulong[])[0, Bad.Frame, Bad.HugeFrame, ~0UL])
            {
                ScriptBuffer frames = c.Structure("frames", 8, (0, 8, frame));
                c.Hypercall((ulong)GuestHypercall.SetGdt, $"set_gdt(frame 0x{frame:x}, 512)", AnswerFormat.Result, frames, EntriesPerFrame);
            }

            LoadSegment(c, 0xb);
            c.UpdateVa(pages[2], pages[2].Entry(Pte.ReadWrite));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
        script.Case("a frame list that cannot be read", c =>
        {
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical])
            {
                c.Hypercall(GuestHypercall.SetGdt, address, 1);
                c.Hypercall(GuestHypercall.SetGdt, address, 0);
            }
        });
        script.Case("pages with a descriptor that may not be", c =>
        {
            foreach (ulong descriptor in (ulong[])
                [
                    0x0000_8900_0000_0067, // an available TSS
                    0x0000_8200_0000_0067, // an LDT
                    0x0000_8e00_e033_0000, // an interrupt gate
                    0x0000_8f00_e033_0000, // a trap gate
                    0x0000_8c00_e030_0000, // a call gate to Xen's own code selector of ring 0
                ])
            {
                ScratchPage page = c.Page();
                c.Put(page[511 * 8], 8, descriptor);
                c.Put(page[8], 8, FlatData);
                c.ReadOnly(page);
                c.Hypercall((ulong)GuestHypercall.SetGdt, $"set_gdt(page with 0x{descriptor:x}, 512)", AnswerFormat.Result, Frames(c, page), EntriesPerFrame);
                c.Load(page[8]);
                c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            }
        });
        script.Case("one frame twice is released once for each", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.ReadOnly(page);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page, page), 2 * EntriesPerFrame);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page), EntriesPerFrame);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
        });
    });

    public static AbiScript UpdateDescriptor() => new("update-descriptor", "update_descriptor", script =>
    {
        script.Case("an ordinary page: descriptors as they are stored", c =>
        {
            ScratchPage page = c.Page("page");
            foreach ((string text, ulong descriptor) in (ReadOnlySpan<(string, ulong)>)
                [
                    ("data, privilege 0", FlatData), ("code, privilege 0", LongCode), ("data, privilege 3", FlatData | (3UL << 45)), ("data, privilege 1", FlatData | (1UL << 45)),
                    ("code, conforming", LongCode | (1UL << 42)), ("not present", 0x0000_0200_1234_5678), ("a TSS that is not present", 0x0000_0900_0000_0067),
                    ("type 0", 0x0000_8000_0000_0000), ("nothing", 0),
                    ("a call gate to the kernel", 0x0000_8c00_e033_0000), ("a call gate of privilege 3", 0x0000_ec00_e033_1234), ("a call gate to the GDT", 0x0000_8c00_0010_0000),
                    ("a call gate to the LDT", 0x0000_8c00_000f_0000),
                ])
            {
                Update(c, text, page[8], page, 8, descriptor);
                c.Load(page[8]);
            }
        });
        script.Case("descriptors that may not be", c =>
        {
            ScratchPage page = c.Page("page");
            c.Put(page.At, 8, 0x1111);
            foreach ((string text, ulong descriptor) in (ReadOnlySpan<(string, ulong)>)
                [
                    ("a 16-bit TSS", 0x0000_8100_0000_0067), ("an LDT", 0x0000_8200_0000_0067), ("a 16-bit call gate", 0x0000_8400_e033_0000), ("a task gate", 0x0000_8500_0000_0000),
                    ("a TSS", 0x0000_8900_0000_0067), ("a busy TSS", 0x0000_8b00_0000_0067), ("an interrupt gate", 0x0000_8e00_e033_0000), ("a trap gate", 0x0000_8f00_e033_0000),
                    ("a call gate to Xen's code", 0x0000_8c00_e008_0000), ("a call gate with parameters", 0x0000_8c01_e033_0000), ("a call gate to the flat data", 0x0000_8c00_e02b_0000),
                    ("a call gate to 32-bit code", 0x0000_8c00_e023_0000),
                ])
            {
                Update(c, text, page.At, page, 0, descriptor);
            }

            c.Load(page.At);
        });
        script.Case("addresses that have no descriptor", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage table = c.PinnedTable(1, "l1");
            Update(c, "at 4", page.At, page, 4, FlatData);
            Update(c, "at 1", page.At, page, 1, 0);
            Update(c, "in a page table", table.At, table, 0, 0);
            c.Hypercall(GuestHypercall.UpdateDescriptor, 0, 0);
            c.Hypercall(GuestHypercall.UpdateDescriptor, Bad.Frame << 12, 0);
            c.Hypercall(GuestHypercall.UpdateDescriptor, ~7UL, 0);
            c.Load(page.At);
            c.Load(table.At);
        });
        script.Case("the running GDT", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.ReadOnly(page);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page), EntriesPerFrame);
            LoadSegment(c, 0xb);
            Update(c, "data", page[8], page, 8, FlatData);
            LoadSegment(c, 0xb);
            Update(c, "a TSS", page[8], page, 8, 0x0000_8900_0000_0067);
            c.Load(page[8]);
            Update(c, "nothing", page[8], page, 8, 0);
            LoadSegment(c, 0xb);
            c.Store(page[8], 8, FlatData);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
        script.Case("a page that was a GDT", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.ReadOnly(page);
            c.Hypercall(GuestHypercall.SetGdt, Frames(c, page), EntriesPerFrame);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            Update(c, "data", page.At, page, 0, FlatData);
            c.Load(page.At);
        });
    });

    private static ScriptBuffer Frames(AbiCase c, params ScratchPage[] pages)
        => c.Structure("frames", pages.Length * 8, [.. pages.Select(static (page, i) => (i * 8, 8, page.Mfn))]);

    private static void Update(AbiCase c, string text, Value shown, ScratchPage page, int offset, ulong descriptor)
        => c.Hypercall((ulong)GuestHypercall.UpdateDescriptor, $"update_descriptor({shown.Text}, {text})", AnswerFormat.Result, (page.Mfn << 12) + offset, descriptor);

    private static void LoadSegment(AbiCase c, ulong selector)
    {
        // Whether it can be loaded, not what is read back: 64-bit mode has no use for the selector.
        c.Kernel("mov ds, ax", static a =>
        {
            a.mov(ds, ax);
            a.xor(eax, eax);
            a.mov(ds, ax);
        }, null, [(Register64.Rax, selector)]);
    }
}
