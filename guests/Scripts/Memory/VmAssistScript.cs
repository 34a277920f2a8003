// vm_assist: which assists there are.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class VmAssistScript
{
    public static AbiScript Create() => new("vm-assist", "vm_assist", script =>
    {
        (string Name, ulong Type)[] known =
        [
            ("4gb_segments", VmAssist.FourGigabyteSegments), ("4gb_segments_notify", VmAssist.FourGigabyteSegmentsNotify),
            ("writable_pagetables", VmAssist.WritablePagetables), ("pae_extended_cr3", VmAssist.PaeExtendedCr3),
            ("architectural_iopl", VmAssist.ArchitecturalIopl), ("runstate_update_flag", VmAssist.RunstateUpdateFlag), ("m2p_strict", VmAssist.M2PStrict),
        ];
        script.Case("every assist on, on again, off, off again", c =>
        {
            foreach ((string name, ulong type) in known)
            {
                foreach (ulong command in (ulong[])[VmAssist.Enable, VmAssist.Enable, VmAssist.Disable, VmAssist.Disable])
                    c.Hypercall((ulong)GuestHypercall.VmAssist, $"vm_assist({(command == VmAssist.Enable ? "enable" : "disable")}, {name})", AnswerFormat.Result, command, type);
            }
        });
        script.Case("types that there are none of", c =>
        {
            foreach (ulong type in (ulong[])[6, 7, 8, 31, 33, 63, 64, 128, 0xffff_ffff])
            {
                c.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, type);
                c.Hypercall(GuestHypercall.VmAssist, VmAssist.Disable, type);
            }
        });
        script.Case("commands that there are none of", c =>
        {
            c.Hypercall(GuestHypercall.VmAssist, 2, VmAssist.WritablePagetables);
            c.Hypercall(GuestHypercall.VmAssist, 0xffff_ffff, VmAssist.WritablePagetables);
            c.Hypercall(GuestHypercall.VmAssist, 2, 63);
        });
        script.Case("the upper halves of the arguments are nothing", c =>
        {
            c.Hypercall(GuestHypercall.VmAssist, 0x1_0000_0000, VmAssist.WritablePagetables);
            c.Hypercall(GuestHypercall.VmAssist, VmAssist.Disable, 0x1_0000_0002);
        });
    });
}
