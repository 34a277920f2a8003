// grant_table_op on a domain's own table.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class GrantScript
{
    public static AbiScript Create() => new("grant-table", "grant_table_op", script =>
    {
        script.Case("the version of the table", c =>
        {
            ScriptBuffer version = c.Structure("version", 8, (0, 2, DomainIds.Self));
            c.Op(GrantOperation.GetVersion, "self", version, 1);
            c.Load(version[4], 4);
            ScriptBuffer absent = c.Structure("version", 8, (0, 2, DomainIds.Absent));
            c.Op(GrantOperation.GetVersion, "absent domain", absent, 1);
            foreach (uint number in (uint[])[0, 3, 2, 1])
            {
                ScriptBuffer wanted = c.Structure("version", 4, (0, 4, number));
                c.Op(GrantOperation.SetVersion, $"{number}", wanted, 1);
                c.Load(wanted, 4);
            }

            c.Op(GrantOperation.GetVersion, "null", BadAddress.Null, 1);
            c.Op(GrantOperation.SetVersion, "null", BadAddress.Null, 1);
        });
        script.Case("the size of the table", c =>
        {
            ScriptBuffer size = c.Structure("size", 24, (0, 2, DomainIds.Self), (12, 2, 77));
            c.Op(GrantOperation.QuerySize, "self", size, 1);
            c.Load(size[12], 2);
            ScriptBuffer absent = c.Structure("size", 24, (0, 2, DomainIds.Absent), (12, 2, 77));
            c.Op(GrantOperation.QuerySize, "absent domain", absent, 1);
            c.Load(absent[12], 2);
            c.Op(GrantOperation.QuerySize, "null", BadAddress.Null, 1);
            c.Op(GrantOperation.QuerySize, "two at once", size, 2);
        });
        script.Case("setting the table up", c =>
        {
            ScriptBuffer frames = c.Buffer("frames", 64);
            ScriptBuffer setup = c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 1), (8, 2, 77), (16, 8, frames));
            c.Op(GrantOperation.SetupTable, "self, a frame", setup, 1);
            c.Load(setup[8], 2);
            c.Show(((Value.Load(frames) - 1) >> 63).Named("no frame given"));
            ScratchPage page = c.Page();
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((Value.Load(frames) << 12) | 0x63).Named("the table's frame"), 2);

            // Flags and domain of an entry that the toolstack made; its frame, which follows, is any.
            c.Load(page.At, 4);
            c.Store(page.At, 8, 0);
            ScriptBuffer many = c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 0xffff_ffffU), (8, 2, 77), (16, 8, frames));
            c.Op(GrantOperation.SetupTable, "self, too many frames", many, 1);
            c.Load(many[8], 2);
            ScriptBuffer absent = c.Structure("setup", 24, (0, 2, DomainIds.Absent), (4, 4, 1), (8, 2, 77), (16, 8, frames));
            c.Op(GrantOperation.SetupTable, "absent domain", absent, 1);
            c.Load(absent[8], 2);
            c.Op(GrantOperation.SetupTable, "two at once", setup, 2);
            c.Op(GrantOperation.SetupTable, "null", BadAddress.Null, 1);
        });
        script.Case("references that cannot be mapped", c =>
        {
            ScratchPage page = c.Page();
            void Map(string text, Value domain, Value reference, Value flags, Value address)
            {
                ScriptBuffer map = c.Structure("map", 40, (0, 8, address), (8, 4, flags), (12, 4, reference), (16, 2, domain), (18, 2, 77));
                c.Op(GrantOperation.MapGrantRef, text, map, 1);
                c.Load(map[18], 2);
            }

            Map("absent domain", DomainIds.Absent, 0, GrantMap.Host, page.At);
            Map("no flags", DomainIds.Self, 0, 0, page.At);
            Map("a reference that is not used", DomainIds.Self, 1000, GrantMap.Host, page.At);
            Map("a reference beyond the table", DomainIds.Self, 0xffff_ffffU, GrantMap.Host, page.At);
            Map("for a device", DomainIds.Self, 0xffff_ffffU, GrantMap.Device, page.At);
            c.Op(GrantOperation.MapGrantRef, "null", BadAddress.Null, 1);
            c.Op(GrantOperation.MapGrantRef, "none", BadAddress.Null, 0);
        });
        script.Case("handles that nobody has", c =>
        {
            foreach (GrantOperation operation in (GrantOperation[])[GrantOperation.UnmapGrantRef, GrantOperation.UnmapAndReplace])
            {
                ScriptBuffer unmap = c.Structure("unmap", 24, (16, 4, 0xffff_ffffU), (20, 2, 77));
                c.Op(operation, "no such handle", unmap, 1);
                c.Load(unmap[20], 2);
                c.Op(operation, "null", BadAddress.Null, 1);
            }
        });
        script.Case("copies between frames of one's own", c =>
        {
            ScratchPage source = c.Page();
            ScratchPage destination = c.Page();
            c.Put(source.At, 8, 0x1122_3344_5566_7788UL);
            void Copy(string text, params (int Offset, int Size, Value Value)[] fields)
            {
                ScriptBuffer copy = c.Structure("copy", GrantCopyField.Size, [
                    (0, 8, source.Mfn), (GrantCopyField.SourceDomain, 2, DomainIds.Self), (GrantCopyField.Destination, 8, destination.Mfn),
                    (GrantCopyField.DestinationDomain, 2, DomainIds.Self), (GrantCopyField.Status, 2, 77), .. fields]);
                c.Op(GrantOperation.Copy, text, copy, 1);
                c.Load(copy[GrantCopyField.Status], 2);
            }

            Copy("8 bytes", (GrantCopyField.Length, 2, 8));
            c.Load(destination.At);
            Copy("8 bytes elsewhere", (GrantCopyField.Length, 2, 8), (GrantCopyField.DestinationOffset, 2, 16));
            c.Load(destination[16]);
            Copy("across the source's end", (GrantCopyField.Length, 2, 8), (GrantCopyField.SourceOffset, 2, 4092));
            Copy("across the destination's end", (GrantCopyField.Length, 2, 8), (GrantCopyField.DestinationOffset, 2, 4092));
            Copy("nothing", (GrantCopyField.Length, 2, 0));
            Copy("from a frame of nobody", (GrantCopyField.Length, 2, 8), (0, 8, 0xff_ffff_ffffUL));
            Copy("to the root table", (GrantCopyField.Length, 2, 8), (GrantCopyField.Destination, 8, c.Root));
            Copy("from a frame of another", (GrantCopyField.Length, 2, 8), (GrantCopyField.SourceDomain, 2, DomainIds.Absent));
            Copy("from a reference that is not used", (GrantCopyField.Length, 2, 8), (GrantCopyField.Flags, 2, 1), (0, 8, 1000));
            c.Op(GrantOperation.Copy, "null", BadAddress.Null, 1);
        });
        script.Case("status frames, which version 1 does not have", c =>
        {
            ScriptBuffer status = c.Structure("status", 24, (0, 4, 1), (4, 2, DomainIds.Self), (6, 2, 77));
            c.Op(GrantOperation.GetStatusFrames, "self", status, 1);
            c.Load(status[6], 2);
        });
        script.Case("swapping and flushing", c =>
        {
            ScriptBuffer swap = c.Structure("swap", 12, (0, 4, 8), (4, 4, 9), (8, 2, 77));
            c.Op(GrantOperation.SwapGrantRef, "two references that are not used", swap, 1);
            c.Load(swap[8], 2);
            ScriptBuffer far = c.Structure("swap", 12, (0, 4, 8), (4, 4, 0xffff_ffffU), (8, 2, 77));
            c.Op(GrantOperation.SwapGrantRef, "a reference beyond the table", far, 1);
            c.Load(far[8], 2);
            c.Op(GrantOperation.CacheFlush, "nothing", c.Buffer("flush", 16), 1);
            c.Op(GrantOperation.CacheFlush, "unknown flags", c.Structure("flush", 16, (12, 4, 0x80)), 1);
        });
        script.Case("transfers", c =>
        {
            ScriptBuffer transfer = c.Structure("transfer", 24, (0, 8, 0xff_ffff_ffffUL), (8, 2, DomainIds.Absent), (16, 2, 77));
            c.Op(GrantOperation.Transfer, "a frame of nobody to an absent domain", transfer, 1);
            c.Load(transfer[16], 2);
            c.Op(GrantOperation.Transfer, "null", BadAddress.Null, 1);
        });
        script.Case("unknown operations and counts", c =>
        {
            ScriptBuffer request = c.Buffer("request", 64);
            c.Hypercall(GuestCalls.GrantTableOp, "grant_table_op(13)", AnswerFormat.Result, 13, request, 1);
            c.Hypercall(GuestCalls.GrantTableOp, "grant_table_op(255)", AnswerFormat.Result, 255, request, 1);
            c.Hypercall(GuestCalls.GrantTableOp, "grant_table_op(-1)", AnswerFormat.Result, -1L, request, 1);
            c.Op(GrantOperation.MapGrantRef, "-1 requests", request, 0xffff_ffffU);
            c.Op(GrantOperation.Copy, "0x80000000 requests", request, 0x8000_0000U);
        });
    });
}
