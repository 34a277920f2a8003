// The numbers and structures of public grant_table.h that the scripts about grants use, and steps made of them.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

/// <summary>GNTTABOP_* of public grant_table.h.</summary>
internal enum GrantOperation
{
    MapGrantRef = 0,
    UnmapGrantRef = 1,
    SetupTable = 2,
    DumpTable = 3,
    Transfer = 4,
    Copy = 5,
    QuerySize = 6,
    UnmapAndReplace = 7,
    SetVersion = 8,
    GetStatusFrames = 9,
    GetVersion = 10,
    SwapGrantRef = 11,
    CacheFlush = 12,
}

/// <summary>GNTMAP_* of public grant_table.h.</summary>
internal static class GrantMap
{
    public const int Device = 1 << 0;
    public const int Host = 1 << 1;
    public const int ReadOnly = 1 << 2;
    public const int Application = 1 << 3;
    public const int ContainsPte = 1 << 4;

    /// <summary>The first of the three bits that become those that the processor leaves to software.</summary>
    public const int Available0 = 1 << 16;
}

/// <summary>GTF_* of public grant_table.h.</summary>
internal static class GrantFlag
{
    public const int PermitAccess = 1;
    public const int AcceptTransfer = 2;
    public const int Transitive = 3;
    public const int ReadOnly = 1 << 2;
    public const int SubPage = 1 << 8;
}

/// <summary>Fields of struct gnttab_copy: source and destination, each a reference or a frame, a domain, an offset; then length, flags, status.</summary>
internal static class GrantCopyField
{
    public const int Source = 0;
    public const int SourceDomain = 8;
    public const int SourceOffset = 10;
    public const int Destination = 16;
    public const int DestinationDomain = 24;
    public const int DestinationOffset = 26;
    public const int Length = 32;
    public const int Flags = 34;
    public const int Status = 36;
    public const int Size = 40;
}

/// <summary>Steps that the scripts about grants share.</summary>
internal static class GrantSteps
{
    /// <summary>Present, writable, accessed, dirty.</summary>
    public const ulong WritablePage = 0x63;

    private const ulong InvalidatePage = 2;

    public static Value Op(this AbiCase c, GrantOperation operation, string text, Value requests, Value count)
        => c.Hypercall(
            GuestCalls.GrantTableOp, $"grant_table_op({EventSteps.Name(operation)}, {text})", AnswerFormat.Result, (int)operation, requests, count);

    /// <summary>The domain's own number, which an unbound port of its own tells: grants name no DOMID_SELF.</summary>
    public static Value OwnNumber(this AbiCase c)
    {
        Value port = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "port");
        ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
        Value own = c.Keep(Value.Load(status[StatusField.Detail]) & 0xffff, "own number");
        c.ClosePort(port);
        return own;
    }

    /// <summary>The table's first frames, mapped.</summary>
    public static ScratchPage[] MapTable(this AbiCase c, int frames = 1)
    {
        ScriptBuffer list = c.Buffer("frames", frames * 8);
        ScriptBuffer setup = c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, frames), (8, 2, 77), (16, 8, list));
        c.Op(GrantOperation.SetupTable, $"{frames}", setup, 1);
        c.Load(setup[8], 2);
        ScratchPage[] pages = c.Pages(frames);
        for (int i = 0; i < frames; i++)
        {
            c.Hypercall(
                GuestHypercall.UpdateVaMapping, pages[i].At, ((Value.Load(list[i * 8]) << 12) | WritablePage).Named($"table frame {i}"), InvalidatePage);
        }

        return pages;
    }

    /// <summary>Puts a version 1 entry into the table.</summary>
    public static void PutEntry(this AbiCase c, ScratchPage table, int reference, Value flags, Value domain, Value frame)
    {
        c.Put(table[reference * 8], 2, 0);
        c.Put(table[(reference * 8) + 4], 4, frame);
        c.Put(table[(reference * 8) + 2], 2, domain);
        c.Put(table[reference * 8], 2, flags);
    }

    /// <summary>Puts a version 2 entry into the table.</summary>
    /// <param name="c">The case.</param>
    /// <param name="table">The table's first frame.</param>
    /// <param name="reference">Its number.</param>
    /// <param name="flags">GTF_*.</param>
    /// <param name="domain">Who may use it.</param>
    /// <param name="middle">The 32 bits that say which part of the page, or which domain's entry is meant.</param>
    /// <param name="frame">The frame; of a transitive entry, the reference.</param>
    public static void PutEntry2(this AbiCase c, ScratchPage table, int reference, Value flags, Value domain, Value middle, Value frame)
    {
        c.Put(table[reference * 16], 2, 0);
        c.Put(table[(reference * 16) + 4], 4, middle);
        c.Put(table[(reference * 16) + 8], 8, frame);
        c.Put(table[(reference * 16) + 2], 2, domain);
        c.Put(table[reference * 16], 2, flags);
    }

    /// <summary>GNTTABOP_map_grant_ref; shows the status.</summary>
    /// <returns>The structure.</returns>
    public static ScriptBuffer Map(this AbiCase c, string text, Value domain, Value reference, Value flags, Value address)
    {
        ScriptBuffer map = c.Structure(
            "map", 32, (0, 8, address), (8, 4, flags), (12, 4, reference), (16, 2, domain), (18, 2, 77), (20, 4, 7777), (24, 8, 7777));
        c.Op(GrantOperation.MapGrantRef, text, map, 1);
        c.Load(map[18], 2);
        return map;
    }

    /// <summary>The handle in the structure of a mapping.</summary>
    public static Value Handle(this AbiCase c, ScriptBuffer map, string name = "handle")
    {
        c.Load(map[20], 4);
        return c.Keep(EventSteps.Field32(map[20], name), name);
    }

    /// <summary>GNTTABOP_unmap_grant_ref; shows the status.</summary>
    public static void Unmap(this AbiCase c, string text, Value handle, Value address, Value? device = null)
    {
        ScriptBuffer unmap = c.Structure("unmap", 24, (0, 8, address), (8, 8, device ?? 0), (16, 4, handle), (20, 2, 77));
        c.Op(GrantOperation.UnmapGrantRef, text, unmap, 1);
        c.Load(unmap[20], 2);
    }

    /// <summary>GNTTABOP_unmap_and_replace; shows the status.</summary>
    public static void Replace(this AbiCase c, string text, Value handle, Value address, Value from)
    {
        ScriptBuffer unmap = c.Structure("unmap", 24, (0, 8, address), (8, 8, from), (16, 4, handle), (20, 2, 77));
        c.Op(GrantOperation.UnmapAndReplace, text, unmap, 1);
        c.Load(unmap[20], 2);
    }

    /// <summary>GNTTABOP_copy; shows the status.</summary>
    public static void Copy(this AbiCase c, string text, params (int Offset, int Size, Value Value)[] fields)
    {
        ScriptBuffer copy = c.Structure("copy", GrantCopyField.Size, [
            (GrantCopyField.SourceDomain, 2, DomainIds.Self), (GrantCopyField.DestinationDomain, 2, DomainIds.Self),
            (GrantCopyField.Length, 2, 8), (GrantCopyField.Status, 2, 77), .. fields]);
        c.Op(GrantOperation.Copy, text, copy, 1);
        c.Load(copy[GrantCopyField.Status], 2);
    }

    /// <summary>GNTTABOP_transfer; shows the status.</summary>
    public static void Transfer(this AbiCase c, string text, Value frame, Value domain, Value reference)
    {
        ScriptBuffer transfer = c.Structure("transfer", 24, (0, 8, frame), (8, 2, domain), (12, 4, reference), (16, 2, 77));
        c.Op(GrantOperation.Transfer, text, transfer, 1);
        c.Load(transfer[16], 2);
    }

    /// <summary>GNTTABOP_set_version; shows the version that there is then.</summary>
    public static void SetVersion(this AbiCase c, int version, string text = "")
    {
        ScriptBuffer wanted = c.Structure("version", 4, (0, 4, version));
        c.Op(GrantOperation.SetVersion, $"{version}{text}", wanted, 1);
        c.Load(wanted, 4);
    }

    /// <summary>Takes a page's mapping away.</summary>
    public static void Clear(this AbiCase c, ScratchPage page) => c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, 0, InvalidatePage);

    /// <summary>The table's first status frame, mapped.</summary>
    public static ScratchPage MapStatusFrame(this AbiCase c)
    {
        ScriptBuffer list = c.Buffer("frames", 8);
        ScriptBuffer frames = c.Structure("status", 16, (0, 4, 1), (4, 2, DomainIds.Self), (6, 2, 77), (8, 8, list));
        c.Op(GrantOperation.GetStatusFrames, "one", frames, 1);
        c.Load(frames[6], 2);
        ScratchPage page = c.Page();
        c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((Value.Load(list) << 12) | WritablePage).Named("status frame"), InvalidatePage);
        return page;
    }
}
