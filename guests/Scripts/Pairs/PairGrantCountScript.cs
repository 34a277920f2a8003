// grant_table_op between two domains in great numbers, and while other vCPUs use what is mapped.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairGrantCountScript
{
    private const int Many = 300;

    /// <summary>Fewer than the mappings of one kind that an entry counts.</summary>
    private const int Maps = 120;

    private const ulong Stored = 0x0123_4567_89ab_cdef;

    // struct gnttab_map_grant_ref and struct gnttab_unmap_grant_ref.
    private const int MapSize = 32;
    private const int MapStatus = 18;
    private const int MapHandle = 20;
    private const int UnmapSize = 24;
    private const int UnmapHandle = 16;
    private const int UnmapStatus = 20;

    /// <summary>Of struct multicall_entry.</summary>
    private const int MulticallEntrySize = 64;

    public static AbiScript Create() => AbiScript.OfPair("pair-grant-counts", "grant_table_op between domains", script =>
    {
        ScratchPage table = null!;
        script.LevelPortsOfBoth();
        script.Case("the table is set up", (a, _) => table = a.MapTable()[0]);
        script.Case("as many copies as take a while", (a, b) =>
        {
            const int first = 16;
            const int step = 8;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            a.Fill(page.Source.At, 512, 8, 0x5000, 1);
            ScriptBuffer copies = b.Buffer("copies", Many * GrantCopyField.Size);
            void Field(int offset, Value value, Value? increment = null) => b.Fill(copies[offset], Many, GrantCopyField.Size, value, increment);
            Field(GrantCopyField.Source, first);
            Field(GrantCopyField.SourceDomain, b.Peer, (ulong)step << 16);
            Field(GrantCopyField.Destination, own.Mfn);
            Field(GrantCopyField.DestinationDomain, DomainIds.Self, (ulong)step << 16);
            Field(GrantCopyField.Length, 8 | (1 << 16) | (77UL << 32));
            b.Op(GrantOperation.Copy, $"{Many}", copies, Many);
            b.ShowSum("statuses", copies[GrantCopyField.Status], GrantCopyField.Size);
            b.Load(own.At);
            b.Load(own[(Many - 1) * step]);
            b.Load(own[Many * step]);
            a.ShowFlags(table, first);
        });
        script.Case("as many mappings as take a while", (a, b) =>
        {
            const int first = 20;
            _ = Granted.Make(a, b, table, first);
            ScriptBuffer maps = b.Buffer("maps", Maps * MapSize);
            void Field(int offset, Value value, Value? increment = null) => b.Fill(maps[offset], Maps, MapSize, value, increment);
            Field(8, GrantMap.Device | ((ulong)first << 32));
            Field(16, b.Peer | (77 << 16));
            b.Op(GrantOperation.MapGrantRef, $"{Maps} for a device", maps, Maps);
            b.ShowSum("statuses", maps[MapStatus], MapSize, Maps);
            a.ShowFlags(table, first);
            ScriptBuffer unmaps = b.Buffer("unmaps", Maps * UnmapSize);
            b.Kernel("their handles and bus addresses, to be unmapped", code =>
            {
                Label next = code.CreateLabel();
                code.mov(rsi, maps.Address);
                code.mov(rdi, unmaps.Address);
                code.mov(ecx, Maps);
                code.Label(ref next);
                code.mov(rax, __qword_ptr[rsi + 24]);
                code.mov(__qword_ptr[rdi + 8], rax);
                code.mov(eax, __dword_ptr[rsi + MapHandle]);
                code.mov(__dword_ptr[rdi + UnmapHandle], eax);
                code.add(rsi, MapSize);
                code.add(rdi, UnmapSize);
                code.dec(ecx);
                code.jnz(next);
            });
            b.Op(GrantOperation.UnmapGrantRef, $"{Maps}", unmaps, Maps);
            b.ShowSum("statuses", unmaps[UnmapStatus], UnmapSize, Maps);
            a.ShowFlags(table, first);
        });
        script.Case("more mappings of an entry than its counts hold", (a, b) =>
        {
            const int first = 24;
            (string Text, int Flags)[] kinds =
            [
                ("device", GrantMap.Device), ("device, read-only", GrantMap.Device | GrantMap.ReadOnly), ("host", GrantMap.Host),
                ("host, read-only", GrantMap.Host | GrantMap.ReadOnly),
            ];
            foreach ((int index, (string text, int flags)) in kinds.Index())
            {
                Granted page = Granted.Make(a, b, table, first + index);
                ScriptBuffer map = b.Structure(
                    "map", MapSize, (0, 8, (flags & GrantMap.Host) != 0 ? page.Window.At : 0), (8, 4, flags), (12, 4, first + index), (16, 2, b.Peer));
                b.Kernel($"map_grant_ref until it fails, {text}", code =>
                {
                    Label next = code.CreateLabel();
                    Label done = code.CreateLabel();
                    code.Label(ref next);
                    code.cmp(ebx, 1 << 12);
                    code.je(done);
                    code.mov(edi, (int)GrantOperation.MapGrantRef);
                    code.mov(rsi, map.Address);
                    code.mov(edx, 1);
                    code.mov(eax, (int)GuestHypercall.GrantTableOp);
                    code.syscall();
                    code.inc(rbx);
                    code.mov(rdx, map.Address + MapStatus);
                    code.movzx(eax, __word_ptr[rdx]);
                    code.test(eax, eax);
                    code.jz(next);
                    code.Label(ref done);
                    code.nop();
                }, show: [Register64.Rax, Register64.Rbx]);
                a.ShowFlags(table, first + index);
                b.Copy("from it", Side.Reference(b.Peer, first + index), Side.Frame(b.Page()));
            }
        });
        script.Case("grants and events in one multicall", (a, b) =>
        {
            const int first = 32;
            Granted page = Granted.Make(a, b, table, first);
            (Value far, Value near) = PairSteps.Connect(a, b);
            a.QuietEvents();
            ScriptBuffer map = b.Structure(
                "map", MapSize, (0, 8, page.Window.At), (8, 4, GrantMap.Host), (12, 4, first), (16, 2, b.Peer), (MapStatus, 2, 77));
            ScriptBuffer port = b.Structure("port", 8, (0, 4, near));
            (GuestHypercall Number, Value[] Arguments)[] calls =
            [
                (GuestHypercall.GrantTableOp, [(int)GrantOperation.MapGrantRef, map, 1]),
                (GuestHypercall.EventChannelOp, [(int)EventOperation.Send, port]),
            ];
            ScriptBuffer list = b.Structure("list", calls.Length * MulticallEntrySize, [.. calls.SelectMany(static (call, i) =>
                call.Arguments.Select((argument, n) => ((i * MulticallEntrySize) + 16 + (n * 8), 8, argument))
                    .Prepend((i * MulticallEntrySize, 8, (int)call.Number)))]);
            b.Hypercall((ulong)GuestHypercall.Multicall, "multicall(map_grant_ref, send)", AnswerFormat.Result, list, calls.Length);
            for (int i = 0; i < calls.Length; i++)
                b.Load(list[(i * MulticallEntrySize) + 8]);
            b.Load(map[MapStatus], 2);
            a.ShowPending();
            a.ShowFlags(table, first);
            b.Unmap("as it was mapped", b.Handle(map), page.Window.At);
            a.ShowFlags(table, first);
            a.QuietEvents();
            a.ClosePort(far);
            b.ClosePort(near);
        });
        script.Case("another vCPU that writes the page when its mapping goes", (a, b) =>
        {
            const int first = 36;
            Granted page = Granted.Make(a, b, table, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.StartVcpu(1, c => c.StoreUntilItFaults(page.Window));
            b.WaitUntilItIsWritten(page.Window);
            b.Unmap("as it was mapped", handle, page.Window.At);
            b.Join(1, TimeSpan.FromSeconds(10));
            a.Store(page.Source.At, 8, 5);
            a.Pause(TimeSpan.FromMilliseconds(50));
            a.Load(page.Source.At);
            a.ShowFlags(table, first);
        });
        script.Case("another vCPU that writes the page when its mapping is replaced", (a, b) =>
        {
            const int first = 40;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.StartVcpu(2, c => c.StoreUntilItFaults(page.Window));
            b.WaitUntilItIsWritten(page.Window);
            b.Replace("with a page of one's own", handle, page.Window.At, own.At);
            b.WaitUntilItIsWritten(page.Window);
            a.Store(page.Source.At, 8, 5);
            a.Pause(TimeSpan.FromMilliseconds(50));
            a.Load(page.Source.At);
            a.ShowFlags(table, first);
            b.Clear(page.Window);
            b.Join(2, TimeSpan.FromSeconds(10));
        });
    });

    /// <summary>Stores to a page again and again; the fault at its end ends the step.</summary>
    private static void StoreUntilItFaults(this AbiCase c, ScratchPage page) => c.Kernel("mov [rbx], rax; jmp $-3", static code =>
    {
        Label again = code.CreateLabel();
        code.Label(ref again);
        code.mov(__qword_ptr[rbx], rax);
        code.jmp(again);
    }, with: [(Register64.Rax, Value.Constant(Stored, "a number")), (Register64.Rbx, page.At)]);

    /// <summary>Waits until the other vCPU has written a page, after it was cleared.</summary>
    private static void WaitUntilItIsWritten(this AbiCase c, ScratchPage page) => c.Kernel($"wait for stores to {page.Name}", static code =>
    {
        Label again = code.CreateLabel();
        code.mov(__qword_ptr[rbx], rax);
        code.Label(ref again);
        code.mov(edi, (int)SchedulerOperation.Yield);
        code.xor(esi, esi);
        code.mov(eax, (int)GuestHypercall.SchedOp);
        code.syscall();
        code.mov(rdx, Stored);
        code.cmp(__qword_ptr[rbx], rdx);
        code.jne(again);
    }, with: [(Register64.Rbx, page.At)]);

    /// <summary>Shows the sum of 16-bit fields of an array: 0 if all requests went well.</summary>
    private static void ShowSum(this AbiCase c, string text, Value field, int stride, int count = Many)
        => c.Kernel($"sum of {count} {text}", code =>
        {
            Label next = code.CreateLabel();
            code.xor(eax, eax);
            code.mov(ecx, count);
            code.Label(ref next);
            code.movzx(edx, __word_ptr[rsi]);
            code.add(rax, rdx);
            code.add(rsi, stride);
            code.dec(ecx);
            code.jnz(next);
        }, show: [Register64.Rax], with: [(Register64.Rsi, field)]);
}
