// physdev_op: I/O privilege, which every domain has, and interrupts and buses, which an unprivileged one does not.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class PhysdevScript
{
    /// <summary>PHYSDEVOP_* of public physdev.h.</summary>
    private enum Operation
    {
        IrqUnmaskNotify = 4,
        IrqStatusQuery = 5,
        SetIopl = 6,
        SetIobitmap = 7,
        ApicRead = 8,
        ApicWrite = 9,
        AllocIrqVector = 10,
        IrqUnboundNotify = 11,
        Eoi = 12,
        MapPirq = 13,
        UnmapPirq = 14,
        ManagePciAdd = 15,
        ManagePciRemove = 16,
        PirqEoiGmfnV1 = 17,
        RestoreMsi = 19,
        ManagePciAddExt = 20,
        SetupGsi = 21,
        GetFreePirq = 23,
        PciMmcfgReserved = 24,
        PciDeviceAdd = 25,
        PciDeviceRemove = 26,
        RestoreMsiExt = 27,
        PirqEoiGmfnV2 = 28,
        DbgpOp = 29,
        PrepareMsix = 30,
        ReleaseMsix = 31,
    }

    private const int NoSuchIrq = 0x7fff_ffff;

    public static AbiScript CreateBoth() => new("physdev-op", "physdev_op", script =>
    {
        script.Case("I/O privilege levels", c =>
        {
            foreach (uint level in (uint[])[0, 1, 2, 3, 4, 0xffff_ffff])
                Op(c, Operation.SetIopl, $"{level}", c.Structure("level", 8, (0, 4, level)));
            Op(c, Operation.SetIopl, "0", c.Structure("level", 8));
            Pointers(c, Operation.SetIopl, 2);
        });
        script.Case("I/O bitmaps", c =>
        {
            ScratchPage bitmap = c.Page();
            void Bitmap(Value address, Value ports)
                => Op(c, Operation.SetIobitmap, $"{address.Text}, {ports.Text} ports", c.Structure("request", 16, (0, 8, address), (8, 4, ports)));
            Bitmap(bitmap.At, 65536);
            Bitmap(bitmap.At, 65537);
            Bitmap(bitmap.At, 0xffff_ffffU);
            Bitmap(bitmap.At, 0);
            Bitmap(BadAddress.Null, 8);
            Bitmap(c.UnmappedPage().At, 8);
            Bitmap(BadAddress.NonCanonical, 8);
            Bitmap(BadAddress.Hypervisor, 8);
            Bitmap(BadAddress.NonCanonical, 0);
            Bitmap(BadAddress.Null, 0);
            Pointers(c, Operation.SetIobitmap, 8);
        });
        script.Case("interrupts that nobody has", c =>
        {
            Op(c, Operation.Eoi, "no such", c.Structure("irq", 8, (0, 4, NoSuchIrq)));
            Op(c, Operation.Eoi, "-1", c.Structure("irq", 8, (0, 4, 0xffff_ffffU)));
            Op(c, Operation.IrqStatusQuery, "no such", c.Structure("irq", 8, (0, 4, NoSuchIrq)));
            Op(c, Operation.IrqStatusQuery, "-1", c.Structure("irq", 8, (0, 4, 0xffff_ffffU)));
            Pointers(c, Operation.Eoi, 2);
            Pointers(c, Operation.IrqStatusQuery, 4);
        });
        script.Case("an interrupt's status", c =>
        {
            ScriptBuffer irq = c.Structure("irq", 8, (4, 4, 77));
            Op(c, Operation.IrqStatusQuery, "0", irq);
            c.Load(irq[4], 4);
            Op(c, Operation.IrqStatusQuery, "0 in a read-only page", c.ReadOnlyPageOf().At);
        });
        script.Case("unmasking in the older way", c =>
        {
            Op(c, Operation.IrqUnmaskNotify, "null", 0);
            Op(c, Operation.IrqUnmaskNotify, "non-canonical", BadAddress.NonCanonical);
            Op(c, Operation.IrqUnboundNotify, "null", 0);
        });
        script.Case("frames for end-of-interrupt bits", c =>
        {
            Pointers(c, Operation.PirqEoiGmfnV2, 4);
            Op(c, Operation.PirqEoiGmfnV2, "a frame of nobody", c.Structure("frame", 8, (0, 8, 0xff_ffff_ffffUL)));
            Op(c, Operation.PirqEoiGmfnV1, "the root table", c.Structure("frame", 8, (0, 8, c.Root)));
            ScratchPage page = c.Page();
            ScriptBuffer frame = c.Structure("frame", 8, (0, 8, page.Mfn));
            Op(c, Operation.PirqEoiGmfnV2, "a page", frame);
            Op(c, Operation.PirqEoiGmfnV2, "a page again", frame);
            Op(c, Operation.PirqEoiGmfnV1, "a page again", frame);
        });
        script.Case("unknown operations", c =>
        {
            foreach (long operation in (long[])[0, 1, 2, 3, 11, 18, 22, 32, 33, 255, -1])
                c.Hypercall(GuestCalls.PhysdevOp, $"physdev_op({operation})", AnswerFormat.Result, operation, c.Buffer("request", 64));
        });
        script.Case("the operation is the low half of its argument", c =>
            c.Hypercall(GuestCalls.PhysdevOp, "physdev_op(set_iopl with high bits)", AnswerFormat.Result, 0x1_0000_0000UL | (ulong)Operation.SetIopl, c.Structure("level", 8, (0, 4, 1))));
        script.Case("the older form", c =>
        {
            Compat(c, Operation.SetIopl, "1", (8, 4, 1));
            Compat(c, Operation.SetIopl, "4", (8, 4, 4));
            Compat(c, Operation.SetIobitmap, "null, 0 ports");
            Compat(c, Operation.SetIobitmap, "null, 65537 ports", (16, 4, 65537));
            Compat(c, Operation.IrqUnmaskNotify, "nothing");
            Compat(c, Operation.IrqStatusQuery, "no such", (8, 4, NoSuchIrq));
            Compat(c, Operation.Eoi, "no such", (8, 4, NoSuchIrq));
            Compat(c, Operation.IrqUnboundNotify, "nothing");
            Compat(c, (Operation)255, "nothing");
            foreach (Value bad in (Value[])[BadAddress.Null, BadAddress.NonCanonical, BadAddress.Hypervisor, c.PageEnd(16)])
                c.Hypercall(GuestCalls.PhysdevOpCompat, $"physdev_op_compat({bad.Text})", AnswerFormat.Result, bad);
        });
    });

    public static AbiScript CreateUnprivileged() => new("physdev-op-unprivileged", "physdev_op", script =>
    {
        script.Case("requests that cannot be read", c =>
        {
            foreach (Operation operation in (Operation[])[
                Operation.ApicRead, Operation.ApicWrite, Operation.AllocIrqVector, Operation.MapPirq, Operation.UnmapPirq, Operation.ManagePciAdd,
                Operation.ManagePciRemove, Operation.RestoreMsi, Operation.ManagePciAddExt, Operation.SetupGsi, Operation.GetFreePirq,
                Operation.PciDeviceAdd, Operation.PciDeviceRemove, Operation.RestoreMsiExt, Operation.PrepareMsix, Operation.ReleaseMsix])
            {
                Op(c, operation, "null", BadAddress.Null);
            }
        });
        script.Case("the interrupt controller", c =>
        {
            ScriptBuffer request = c.Buffer("request", 64);
            Op(c, Operation.ApicRead, "zeros", request);
            Op(c, Operation.ApicWrite, "zeros", request);
            Op(c, Operation.AllocIrqVector, "zeros", request);
            Op(c, Operation.SetupGsi, "interrupt 1", c.Structure("request", 8, (0, 4, 1)));
            Op(c, Operation.SetupGsi, "-1", c.Structure("request", 8, (0, 4, 0xffff_ffffU)));
            Op(c, Operation.SetupGsi, "no such", c.Structure("request", 8, (0, 4, NoSuchIrq)));
        });
        script.Case("physical interrupts for oneself", c =>
        {
            Op(c, Operation.MapPirq, "self", c.Structure("request", 64, (0, 2, DomainIds.Self), (8, 4, 0xffff_ffffU), (12, 4, 0xffff_ffffU)));
            Op(c, Operation.MapPirq, "absent domain", c.Structure("request", 64, (0, 2, DomainIds.Absent)));
            Op(c, Operation.UnmapPirq, "self", c.Structure("request", 8, (0, 2, DomainIds.Self)));
            Op(c, Operation.UnmapPirq, "absent domain", c.Structure("request", 8, (0, 2, DomainIds.Absent)));
            c.BindPirq(0, 0);
            c.BindPirq(20, 1);
        });
        script.Case("a free physical interrupt", c =>
        {
            ScriptBuffer request = c.Structure("request", 8, (0, 4, 1), (4, 4, 0xffff_ffffU));
            Op(c, Operation.GetFreePirq, "of a line", request);
            c.Show((EventSteps.Field32(request[4], "interrupt") >> 31).Named("none given"));
            ScriptBuffer message = c.Structure("request", 8, (0, 4, 0), (4, 4, 0xffff_ffffU));
            Op(c, Operation.GetFreePirq, "of a message", message);
            c.Show((EventSteps.Field32(message[4], "interrupt") >> 31).Named("none given"));
        });
        script.Case("buses", c =>
        {
            ScriptBuffer request = c.Buffer("request", 64);
            Op(c, Operation.ManagePciAdd, "zeros", request);
            Op(c, Operation.ManagePciRemove, "zeros", request);
            Op(c, Operation.ManagePciAddExt, "zeros", request);
            Op(c, Operation.ManagePciAddExt, "more than a flag", c.Structure("request", 16, (4, 4, 2)));
            Op(c, Operation.PciDeviceAdd, "zeros", request);
            Op(c, Operation.PciDeviceRemove, "zeros", request);
            Op(c, Operation.PrepareMsix, "zeros", request);
            Op(c, Operation.ReleaseMsix, "zeros", request);
            Op(c, Operation.PciMmcfgReserved, "null", BadAddress.Null);
            Op(c, Operation.PciMmcfgReserved, "zeros", request);
            Op(c, Operation.DbgpOp, "null", BadAddress.Null);
            Op(c, Operation.RestoreMsi, "no such device", c.Structure("request", 8, (0, 2, 0xffff)));
            Op(c, Operation.RestoreMsiExt, "no such device", c.Structure("request", 8, (0, 4, 0xff_ffffU)));
        });
    });

    private static void Op(AbiCase c, Operation operation, string text, Value argument)
        => c.Hypercall(GuestCalls.PhysdevOp, $"physdev_op({EventSteps.Name(operation)}, {text})", AnswerFormat.Result, (int)operation, argument);

    private static void Pointers(AbiCase c, Operation operation, int bytes)
    {
        Op(c, operation, "null", BadAddress.Null);
        Op(c, operation, "non-canonical", BadAddress.NonCanonical);
        Op(c, operation, "hypervisor's", BadAddress.Hypervisor);
        Op(c, operation, "cut off", c.PageEnd(bytes));
    }

    private static void Compat(AbiCase c, Operation operation, string text, params (int Offset, int Size, Value Value)[] fields)
        => c.Hypercall(GuestCalls.PhysdevOpCompat, $"physdev_op_compat({EventSteps.Name(operation)}, {text})", AnswerFormat.Result,
            c.Structure("operation", 64, [(0, 4, (int)operation), .. fields]));
}
