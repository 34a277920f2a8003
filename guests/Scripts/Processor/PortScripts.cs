// I/O ports: who may use them, and what an unprivileged domain finds there.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class PortScripts
{
    // Ports that no domain is given: the interrupt controller's; the PCI address register.
    private const int Pic = 0x20;
    private const int PciAddress = 0xcf8;
    private const int PciData = 0xcfc;

    public static AbiScript CreatePrivilege() => new("io-privilege", "physdev_op", script =>
    {
        script.Case("set_iopl: each level, for the kernel and for user mode", c =>
        {
            foreach (int level in (int[])[0, 1, 2, 3])
            {
                c.SetIopl($"iopl{level}", level);
                c.Kernel("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
                c.User("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
                c.Kernel("cli; sti", static a =>
                {
                    a.cli();
                    a.sti();
                });
                c.User("cli", static a => a.cli());
                c.Kernel("pushf", static a =>
                {
                    a.pushfq();
                    a.pop(rax);
                }, [Register64.Rax]);
            }

            c.SetIopl("iopl0", 0);
        });
        script.Case("cli and sti do not touch the upcall mask", c =>
        {
            c.SetIopl("iopl1", 1);
            c.MaskUpcalls(false);
            c.Kernel("cli", static a => a.cli());
            c.Load(c.VcpuInfo() + 1, 1);
            c.MaskUpcalls(true);
            c.Kernel("sti", static a => a.sti());
            c.Load(c.VcpuInfo() + 1, 1);
            c.SetIopl("iopl0", 0);
        });
        script.Case("set_iopl: what is refused", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.SetIopl("iopl4", 4);
            c.SetIopl("iopl-1", -1);
            c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIopl, hole.At);
            c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIopl, 0);
            c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIopl, Value.Constant(Addresses.NonCanonical, "noncanonical"));
        });
        script.Case("architectural_iopl: the kernel is level 0, and frames carry the level", c =>
        {
            c.Hypercall(GuestHypercall.VmAssist, VmAssistOperation.Enable, VmAssistOperation.ArchitecturalIopl);
            c.Kernel("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
            c.Kernel("ud2", static a => a.ud2());
            c.User("in al, 0x20", static a => a.@in(al, Pic));
            c.SetIopl("iopl3", 3);
            c.Kernel("ud2", static a => a.ud2());
            c.User("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
            c.User("ud2, flags without IOPL", static a => a.ud2(), with: [(Register64.Rflags, Eflags.Fixed | Eflags.InterruptEnable)]);
            c.User("ud2, flags with IOPL 3", static a => a.ud2(),
                with: [(Register64.Rflags, Eflags.Fixed | Eflags.InterruptEnable | Eflags.Iopl)]);
            c.User("in al, 0x20, flags with IOPL 3", static a => a.@in(al, Pic),
                [Register64.Rax], [(Register64.Rflags, Eflags.Fixed | Eflags.InterruptEnable | Eflags.Iopl)]);
            c.Hypercall(GuestHypercall.VmAssist, VmAssistOperation.Disable, VmAssistOperation.ArchitecturalIopl);
            c.Kernel("ud2", static a => a.ud2());
            c.SetIopl("iopl0", 0);
            c.MaskUpcalls(true);
        });
        script.Case("set_iobitmap: ports that it opens", c =>
        {
            ScratchPage bitmap = c.Page("bitmap");
            c.Fill(bitmap.At, 512, 8, -1);

            // Open: 0x20 alone, and 0x28 to 0x2f.
            c.Put(bitmap[4], 1, 0xfe);
            c.Put(bitmap[5], 1, 0);
            SetBitmap(c, "all", bitmap.At, 0x8000);
            c.User("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
            c.Kernel("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
            c.User("in al, 0x21", static a => a.@in(al, Pic + 1), [Register64.Rax]);
            c.User("in ax, 0x20, half of it closed", static a => a.@in(ax, Pic), [Register64.Rax]);
            c.User("in al, 0xa0, closed", static a => a.@in(al, 0xa0), [Register64.Rax]);
            SetBitmap(c, "short", bitmap.At, 0x20);
            c.User("in al, 0x20, past the end", static a => a.@in(al, Pic), [Register64.Rax]);
            SetBitmap(c, "tight", bitmap.At, 0x21);
            c.User("in al, 0x20, the last port", static a => a.@in(al, Pic), [Register64.Rax]);
            SetBitmap(c, "none", 0, 0);
            c.User("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
        });
        script.Case("set_iobitmap: a bitmap that cannot be read opens nothing", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            SetBitmap(c, "unmapped", hole.At, 0x8000);
            c.User("in al, 0x20", static a => a.@in(al, Pic), [Register64.Rax]);
            SetBitmap(c, "none", 0, 0);
        });
        script.Case("set_iobitmap: what is refused", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            SetBitmap(c, "long", hole.At, 0x1_0001);
            SetBitmap(c, "longest", hole.At, 0x1_0000);
            SetBitmap(c, "hypervisor", Value.Constant(Addresses.Hypervisor, "hypervisor"), 8);
            SetBitmap(c, "noncanonical", Value.Constant(Addresses.NonCanonical, "noncanonical"), 8);
            c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIobitmap, hole.At);
            SetBitmap(c, "none", 0, 0);
        });
    });

    public static AbiScript CreatePorts() => new("io-ports", "I/O ports", script =>
    {
        script.Case("ports that nobody has: reads of every size, writes", c =>
        {
            c.SetIopl("iopl1", 1);
            In(c, Pic, 1);
            In(c, Pic, 2);
            In(c, 0xa0, 1);
            Out(c, Pic, 1, 0x20);
            c.Kernel("in al, 0x20: the upper bytes of RAX stay", static a => a.@in(al, Pic),
                [Register64.Rax], [(Register64.Rax, 0x1122_3344_5566_7788)]);
            c.Kernel("in ax, dx", static a => a.@in(ax, dx),
                [Register64.Rax], [(Register64.Rax, 0x1122_3344_5566_7788), (Register64.Rdx, Pic)]);
            c.Kernel("in eax, dx: the upper half of RAX is cleared", static a => a.@in(eax, dx),
                [Register64.Rax], [(Register64.Rax, 0x1122_3344_5566_7788), (Register64.Rdx, PciAddress)]);
            c.Kernel("in al, dx: the upper half of RDX is not looked at", static a => a.@in(al, dx),
                [Register64.Rax], [(Register64.Rdx, 0x1234_0020)]);
        });
        script.Case("the PCI address register", c =>
        {
            In(c, PciAddress, 4);
            Out(c, PciAddress, 4, 0x1234_5678);
            In(c, PciAddress, 4);
            Out(c, PciAddress, 1, 0xff);
            Out(c, PciAddress, 2, 0xffff);
            In(c, PciAddress, 4);
            In(c, PciAddress, 1);
            In(c, PciAddress, 2);
            In(c, PciAddress + 1, 1);
        });
        script.Case("the PCI data registers", c =>
        {
            Out(c, PciAddress, 4, 0);
            In(c, PciData, 1);
            In(c, PciData, 2);
            In(c, PciData, 4);
            In(c, PciData + 2, 2);
            Out(c, PciData, 4, 0);
        });
        script.Case("the index of the real-time clock", c =>
        {
            Out(c, 0x70, 1, 0x12);
            In(c, 0x70, 1);
            Out(c, 0x70, 1, 0x8a);
            In(c, 0x70, 1);
        });
        script.Case("the data of the real-time clock", c =>
        {
            Out(c, 0x70, 1, 0x0f);
            In(c, 0x71, 1);
            Out(c, 0x71, 1, 0);
        });
        script.Case("the speaker's gate and data bits", c =>
        {
            foreach (int value in (int[])[0, 1, 2, 3, 0xff])
            {
                Out(c, 0x61, 1, value);
                c.Kernel("in al, 0x61, bits 0 and 1", static a =>
                {
                    a.@in(al, 0x61);
                    a.and(eax, 3);
                }, [Register64.Rax]);
            }

            Out(c, 0x61, 1, 0);
        });
        script.Case("channel 2 of the timer: mode and status", c =>
        {
            // Gate off; mode 0, low and high byte, of the longest count; read back the status.
            Out(c, 0x61, 1, 0);
            Out(c, 0x43, 1, 0xb0);
            Out(c, 0x42, 1, 0xff);
            Out(c, 0x42, 1, 0xff);
            Out(c, 0x43, 1, 0xe8);
            c.Kernel("in al, 0x42, the status without OUT", static a =>
            {
                a.@in(al, 0x42);
                a.and(eax, 0x7f);
            }, [Register64.Rax]);
            In(c, 0x43, 1);
        });
        script.Case("channels 0 and 1 of the timer are nobody's", c =>
        {
            In(c, 0x40, 1);
            In(c, 0x41, 1);
            Out(c, 0x40, 1, 0);
        });
        script.Case("string input", c =>
        {
            ScriptBuffer area = c.Structure("area", 32, (0, 8, 0), (8, 8, 0x1111));
            c.Kernel("rep insb", static a => a.rep.insb(),
                [Register64.Rcx, Register64.Rdi], [(Register64.Rcx, 6), (Register64.Rdx, Pic), (Register64.Rdi, area)]);
            c.Load(area);
            c.Kernel("insw", static a => a.insw(),
                [Register64.Rcx, Register64.Rdi], [(Register64.Rcx, 6), (Register64.Rdx, Pic), (Register64.Rdi, area[8])]);
            c.Load(area[8]);
            c.Kernel("std; insd; cld", static a =>
            {
                a.std();
                a.insd();
                a.cld();
            }, [Register64.Rdi], [(Register64.Rdx, PciAddress), (Register64.Rdi, area[16])]);
            c.Kernel("rep insb of none", static a => a.rep.insb(),
                [Register64.Rcx, Register64.Rdi], [(Register64.Rdx, Pic), (Register64.Rdi, area)]);
        });
        script.Case("string output", c =>
        {
            ScriptBuffer area = c.Structure("area", 16, (0, 8, 0x11_2233_4455));
            c.Kernel("rep outsb", static a => a.rep.outsb(),
                [Register64.Rcx, Register64.Rsi], [(Register64.Rcx, 3), (Register64.Rdx, Pic), (Register64.Rsi, area)]);
            c.Kernel("outsd to the PCI address register", static a => a.outsd(),
                [Register64.Rsi], [(Register64.Rdx, PciAddress), (Register64.Rsi, area)]);
            In(c, PciAddress, 4);
        });
        script.Case("string input that faults in the midst", c =>
        {
            ScratchPage page = c.Page("first");
            ScratchPage hole = c.UnmappedPage("hole");
            ScratchPage readOnly = c.Page("readonly");
            c.Hypercall(GuestHypercall.UpdateVaMapping, readOnly.At, readOnly.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            c.Kernel("rep insb across the end of a page", static a => a.rep.insb(),
                [Register64.Rcx, Register64.Rdi], [(Register64.Rcx, 4), (Register64.Rdx, Pic), (Register64.Rdi, page[4094])]);
            c.Load(page[4092], 4);
            c.Kernel("insw across the end of a page", static a => a.insw(), with: [(Register64.Rdx, Pic), (Register64.Rdi, page[4095])]);
            c.Kernel("insb to a page that is not there", static a => a.insb(), with: [(Register64.Rdx, Pic), (Register64.Rdi, hole.At)]);
            c.Kernel("insb to a page that is read-only", static a => a.insb(),
                with: [(Register64.Rdx, Pic), (Register64.Rdi, readOnly.At)]);
            c.Kernel("insb to a non-canonical address", static a => a.insb(),
                with: [(Register64.Rdx, Pic), (Register64.Rdi, Addresses.NonCanonical)]);
            c.Kernel("insb to the hypervisor's range", static a => a.insb(),
                with: [(Register64.Rdx, Pic), (Register64.Rdi, Addresses.Hypervisor)]);
            c.Kernel("outsb from a page that is not there", static a => a.outsb(),
                with: [(Register64.Rdx, Pic), (Register64.Rsi, hole[8])]);
            c.Kernel("outsb from a non-canonical address", static a => a.outsb(),
                with: [(Register64.Rdx, Pic), (Register64.Rsi, Addresses.NonCanonical)]);
        });
        script.Case("under a single step", c => c.Kernel("popf with TF; in al, 0x20; nop", static a =>
        {
            a.pushfq();
            a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
            a.popfq();
            a.@in(al, Pic);
            a.nop();
        }));
    });

    private static void SetBitmap(AbiCase c, string name, Value bitmap, int ports)
        => c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIobitmap, c.Structure(name, 16, (0, 8, bitmap), (8, 4, ports)));

    private static void In(AbiCase c, int port, int bytes) => c.Kernel($"in {Accumulator(bytes)}, 0x{port:x}", a =>
    {
        a.mov(edx, port);
        if (bytes == 1)
            a.@in(al, dx);
        else if (bytes == 2)
            a.@in(ax, dx);
        else
            a.@in(eax, dx);
    }, [Register64.Rax]);

    private static void Out(AbiCase c, int port, int bytes, long value) => c.Kernel($"out 0x{port:x}, {Accumulator(bytes)}", a =>
    {
        a.mov(edx, port);
        if (bytes == 1)
            a.@out(dx, al);
        else if (bytes == 2)
            a.@out(dx, ax);
        else
            a.@out(dx, eax);
    }, with: [(Register64.Rax, value)]);

    private static string Accumulator(int bytes) => bytes switch { 1 => "al", 2 => "ax", _ => "eax" };
}
