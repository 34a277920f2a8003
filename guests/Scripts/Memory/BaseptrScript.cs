// mmuext_op: the roots of kernel and user mode.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class BaseptrScript
{
    private const int ImageSlot = 511;

    public static AbiScript Create() => new("baseptr", "mmuext_op", script =>
    {
        script.Case("a copy of the running L4, and back", c =>
        {
            ScratchPage copy = CopyOfRoot(c, "copy");
            ScratchPage data = c.Page("data");
            c.Put(data.At, 8, 0x2468);
            AddressWindow window = AddressWindow.Create(c, 2, data.Entry(Pte.ReadWrite));
            c.Load(window.At(0));
            c.One("new baseptr copy", Mmuext.NewBaseptr, copy.Mfn);
            c.Load(window.At(0));
            c.UpdateVa(copy, copy.Entry(Pte.ReadWrite));
            c.MmuUpdate(MmuRequest.Normal(copy, 2, window.L3.Entry(Pte.Table)));
            c.Load(window.At(0));
            c.One("new baseptr copy", Mmuext.NewBaseptr, copy.Mfn);
            c.One("new baseptr root", Mmuext.NewBaseptr, c.Root);
            c.UpdateVa(copy, copy.Entry(Pte.ReadWrite));
            c.UpdateVa(window.L3, window.L3.Entry(Pte.ReadWrite));
            window.Remove(c);
            c.UpdateVa(window.L3, window.L3.Entry(Pte.ReadWrite));
        });
        script.Case("a pinned copy stays an L4 when it is left", c =>
        {
            ScratchPage copy = CopyOfRoot(c, "copy");
            c.Pin(4, copy);
            c.One("new baseptr copy", Mmuext.NewBaseptr, copy.Mfn);
            c.Unpin(copy);
            c.UpdateVa(copy, copy.Entry(Pte.ReadWrite));
            c.Pin(4, copy);
            c.One("new baseptr root", Mmuext.NewBaseptr, c.Root);
            c.UpdateVa(copy, copy.Entry(Pte.ReadWrite));
            c.Unpin(copy);
            c.UpdateVa(copy, copy.Entry(Pte.ReadWrite));
        });
        script.Case("frames that are no root", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage table = c.PinnedTable(3, "l3");
            foreach (ulong command in (ulong[])[Mmuext.NewBaseptr, Mmuext.NewUserBaseptr])
            {
                string name = command == Mmuext.NewBaseptr ? "new baseptr" : "new user baseptr";
                c.MmuextOp($"{name}, writable page", new MmuextRequest(command, page.Mfn));
                c.MmuextOp($"{name}, L3", new MmuextRequest(command, table.Mfn));
                foreach (ulong frame in (ulong[])[Bad.Frame, Bad.HugeFrame, ~0UL])
                    c.MmuextOp($"{name}, frame 0x{frame:x}", new MmuextRequest(command, frame));
            }

            c.MmuextOp("new baseptr, frame 0", new MmuextRequest(Mmuext.NewBaseptr, 0));
        });
        script.Case("user mode without a root, and with it again", c =>
        {
            c.User("nop", static a => a.nop());
            c.One("new user baseptr 0", Mmuext.NewUserBaseptr, 0);
            c.One("new user baseptr 0", Mmuext.NewUserBaseptr, 0);
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.User("nop", static a => a.nop());
        });
        script.Case("another root for user mode, which shows other addresses", c =>
        {
            ScratchPage root = c.Page("user root 2");
            ScratchPage data = c.Page("data");
            c.Put(data.At, 8, 0x1357);
            AddressWindow window = AddressWindow.Create(c, 1, data.Entry(Pte.ReadWrite | Pte.User));
            ReadAsUser(c, window.At(0));
            c.Put(root[ImageSlot * 8], 8, Value.Load(c.RootAddress + (ImageSlot * 8)));
            c.Put(root[8], 8, window.L3.Entry(Pte.Table));
            c.ReadOnly(root);
            c.One("new user baseptr, user root 2", Mmuext.NewUserBaseptr, root.Mfn);
            ReadAsUser(c, window.At(0));
            c.MmuUpdate(MmuRequest.Normal(root, 1, 0));
            ReadAsUser(c, window.At(0));
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.UpdateVa(root, root.Entry(Pte.ReadWrite));
        });
        script.Case("kernel pages are as readable in user mode as the root makes them", c =>
        {
            ScratchPage data = c.Page("data");
            c.Put(data.At, 8, 0x9753);
            ReadAsUser(c, data.At);
            c.UpdateVa(data, data.Entry(Pte.ReadWrite | Pte.User));
            ReadAsUser(c, data.At);
        });
        script.Case("one frame as both roots", c =>
        {
            c.One("new user baseptr, the kernel's root", Mmuext.NewUserBaseptr, c.Root);
            c.User("nop", static a => a.nop());
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
        });
    });

    /// <summary>A page with the entries of the running L4 outside the hypervisor's slots, read-only.</summary>
    private static ScratchPage CopyOfRoot(AbiCase c, string name)
    {
        ScratchPage copy = c.Page(name);
        c.Put(copy[ImageSlot * 8], 8, Value.Load(c.RootAddress + (ImageSlot * 8)));
        c.ReadOnly(copy);
        return copy;
    }

    private static void ReadAsUser(AbiCase c, Value address)
        => c.User("mov rax, [rdi]", static a => a.mov(Iced.Intel.AssemblerRegisters.rax, Iced.Intel.AssemblerRegisters.__[Iced.Intel.AssemblerRegisters.rdi]),
            [Register64.Rax], [(Register64.Rdi, address)]);
}
