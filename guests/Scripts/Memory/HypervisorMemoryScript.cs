// The hypervisor's range of addresses: the machine-to-physical table, and all that the guest may not touch.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class HypervisorMemoryScript
{
    private const ulong SlotSize = 1UL << 39;

    public static AbiScript Create() => new("hypervisor-memory", "hypervisor memory", script =>
    {
        // The table is at its classic address on Xen, and may be in the next slot elsewhere.
        script.Symbols.Add(Bad.HypervisorStart, SlotSize, "m2p");
        script.Symbols.Add(Bad.HypervisorStart + SlotSize, SlotSize, "m2p");
        script.Case("the machine-to-physical table, read in every size", c =>
        {
            ScratchPage page = c.Page("page");
            Value entry = (c.MachineToPhys + (page.Mfn << 3)).Named("m2p[page]");
            c.Load(entry);
            c.Load(entry, 4);
            c.Load(entry, 2);
            c.Load(entry + 4, 4);
            c.Load(entry + 7, 1);
            c.Kernel("cmp rax, [rdi]", static a => a.cmp(rax, __[rdi]), [Register64.Rflags], [(Register64.Rdi, entry), (Register64.Rax, page.Pfn)]);
            c.Kernel("mov rax, [rdi + rcx * 8]", static a => a.mov(rax, __[rdi + rcx * 8]), [Register64.Rax], [(Register64.Rdi, c.MachineToPhys), (Register64.Rcx, page.Mfn)]);
        });
        script.Case("the machine-to-physical table at its classic address", c =>
        {
            ScratchPage page = c.Page("page");
            Value entry = (Bad.HypervisorStart + (page.Mfn << 3)).Named("classic m2p[page]");
            c.Load(entry);
            c.Load(entry, 4);
            c.Kernel("add rax, [rdi]", static a => a.add(rax, __[rdi]), [Register64.Rax, Register64.Rflags], [(Register64.Rdi, entry), (Register64.Rax, 1)]);
            c.Kernel("cmp eax, [rdi]", static a => a.cmp(eax, __[rdi]), [Register64.Rflags], [(Register64.Rdi, entry), (Register64.Rax, page.Pfn)]);
            c.Kernel("movzx rax, byte [rdi]", static a => a.movzx(rax, __byte_ptr[rdi]), [Register64.Rax], [(Register64.Rdi, entry)]);
            c.Kernel("movsxd rax, dword [rdi + 4]", static a => a.movsxd(rax, __dword_ptr[rdi + 4]), [Register64.Rax], [(Register64.Rdi, entry)]);
        });
        script.Case("the pfns of the domain's own tables and of shared memory", c =>
        {
            c.Show((Value.Pfn(c.Root) - ((c.RootAddress - PvAssembler.VirtBase) >> 12)).Named("pfn of the root, from its place"));
            c.Show((Value.Pfn(c.UserRoot) - ((ProbeLayout.UserRootPage - PvAssembler.VirtBase) >> 12)).Named("pfn of the user root, from its place"));
        });
        script.Case("the machine-to-physical table cannot be written", c =>
        {
            // Of frame 0, as the address is in the transcript.
            Fault(c, "mov [rdi], rax", static a => a.mov(__[rdi], rax), c.MachineToPhys);
            Fault(c, "mov byte [rdi + 1], 0", static a => a.mov(__byte_ptr[rdi + 1], 0), c.MachineToPhys);
            Fault(c, "lock or [rdi], rax", static a => a.@lock.or(__[rdi], rax), c.MachineToPhys);
            Fault(c, "rep stosb", static a => a.rep.stosb(), c.MachineToPhys);
        });
        script.Case("user mode cannot read the table", c =>
        {
            ReadAsUser(c, c.MachineToPhys);
            ReadAsUser(c, Value.Constant(Bad.HypervisorStart, "classic m2p"));
        });
        script.Case("user mode reads the table through the kernel's root", c =>
        {
            ScratchPage page = c.Page("page");
            c.One("new user baseptr, the kernel's root", Mmuext.NewUserBaseptr, c.Root);
            ReadAsUser(c, (c.MachineToPhys + (page.Mfn << 3)).Named("m2p[page]"));
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            ReadAsUser(c, c.MachineToPhys);
        });
        script.Case("a root that was the kernel's keeps the table for user mode, unless m2p_strict is on", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage root = c.Page("root 2");
            Value entry = c.Keep(c.MachineToPhys + (page.Mfn << 3), "address of m2p[page]").Named("m2p[page]");
            c.Put(root[511 * 8], 8, Value.Load(c.RootAddress + (511 * 8)));
            c.ReadOnly(root);
            c.Pin(4, root);
            c.One("new baseptr, root 2", Mmuext.NewBaseptr, root.Mfn);
            c.Load(entry);
            c.One("new baseptr, root", Mmuext.NewBaseptr, c.Root);
            c.One("new user baseptr, root 2", Mmuext.NewUserBaseptr, root.Mfn);
            ReadAsUser(c, entry);
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, VmAssist.M2PStrict);
            c.One("new user baseptr, root 2", Mmuext.NewUserBaseptr, root.Mfn);
            ReadAsUser(c, c.MachineToPhys);
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.Unpin(root);
            c.Pin(4, root);
            c.One("new baseptr, root 2", Mmuext.NewBaseptr, root.Mfn);
            c.Load(entry);
            c.One("new baseptr, root", Mmuext.NewBaseptr, c.Root);
            c.Unpin(root);
            c.Hypercall(GuestHypercall.VmAssist, VmAssist.Disable, VmAssist.M2PStrict);
            ReadAsUser(c, c.MachineToPhys);
        });
        script.Case("addresses at the range's ends", c =>
        {
            c.Load(0xffff_87ff_ffff_fff8);
            c.Store(0xffff_87ff_ffff_fff8, 8, 0);
            c.Load(0xffff_8800_0000_0000);
            c.Load(0x0000_7fff_ffff_fff8);
            c.Store(0x0000_7fff_ffff_fff8, 8, 0);
            c.Load(0);
        });
        script.Case("addresses that are not canonical", c =>
        {
            c.Load(Bad.NonCanonical);
            c.Store(Bad.NonCanonical, 8, 0);
            c.Load(0x0000_8000_0000_0000);
            c.Load(0x0000_7fff_ffff_fffc);
            c.Kernel("mov rax, [rsp]", static a => a.mov(rax, __[rdi]), null, [(Register64.Rdi, 0xffff_7fff_ffff_ffff)]);
        });
        script.Case("execution in the hypervisor's range", c =>
        {
            c.Kernel("call rax", static a => a.call(rax), null, [(Register64.Rax, 0xffff_87ff_ffff_f000)]);
        });
    });

    private static void Fault(AbiCase c, string text, Action<Iced.Intel.Assembler> emit, Value address) => c.Kernel(text, emit, null, [(Register64.Rdi, address)]);

    private static void ReadAsUser(AbiCase c, Value address)
        => c.User("mov rax, [rdi]", static a => a.mov(rax, __[rdi]), [Register64.Rax], [(Register64.Rdi, address)]);
}
