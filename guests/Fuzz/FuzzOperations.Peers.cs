// What a fuzz guest with a peer does to it, and to itself by the same means: grants and event channels.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

internal sealed partial class FuzzOperations
{
    // Entries that the guest writes; the toolstack's are before them.
    private const int FirstEntry = 8;
    private const int EntryGroups = 4;
    private const int EntriesPerGroup = 8;

    private void AddPeerOps(PvAssembler guest)
    {
        FuzzPool Pool(params ReadOnlySpan<ulong> words) => FuzzMemory.Pool(guest, words);

        // The two domains have the first two numbers; which is whose is up to chance.
        FuzzPool domains = Pool(1, 2, 1, 2, 1, 2, 1, 2, 0, 9, Self, 0x7ff1);
        FuzzPool references = Pool(
            [.. Enumerable.Range(FirstEntry, EntryGroups * EntriesPerGroup).Select(static i => (ulong)i), 0, 1, 7, 255, 256, 511, 512, uint.MaxValue]);
        FuzzPool addresses = _memory.ScratchAddresses.Part(0, 6);
        FuzzPool ports = Pool([.. Enumerable.Range(3, 12).Select(static i => (ulong)i), 0, 63, 64, 4095, uint.MaxValue]);

        // Flags, and who may use the entry.
        FuzzPool headers = Pool(0x1_0001, 0x2_0001, 0x1_0001, 0x2_0001, 0x1_0005, 0x2_0005, 0x1_0002, 0x2_0002, 0x1_0003, 0x2_0003, 0x1_0101, 0x2_0101, 0, 0x9_0001);
        AddEntryWrites(headers, references, domains);
        AddGrantMaps(references, domains, addresses, Pool(2, 2, 2, 2, 6, 6, 3, 7, 1, 5, 10, 0, 0x7_0002), Pool(18, 22, 19, 18));
        AddGrantCopies(references, domains, Pool(0, 1 << 16, 2 << 16, 3 << 16, 1 << 16, 2 << 16, 4 << 16));
        AddGrantTables(references, domains);
        AddEvents(domains, ports);
    }

    /// <summary>
    /// Writes entries of both versions, of which half make sense at a time, while they may be in use; and asks for the table's size. The
    /// console's ring is not granted: with what the peer puts there the guest would wait for room in it for ever.
    /// </summary>
    private void AddEntryWrites(FuzzPool headers, FuzzPool references, FuzzPool domains)
    {
        for (int group = 0; group < EntryGroups; group++)
        {
            int first = FirstEntry + (group * EntriesPerGroup);
            Grant($"query_size, entries from {first}", 20, 6, r =>
            {
                for (int i = 0; i < EntriesPerGroup; i++)
                {
                    ulong entry = _memory.GrantPage + ((ulong)(first + i) * 8);
                    r.OneOf((8, r => r.Pick(_memory.Data)), (1, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.Unshared))).Shift(32).Pick(headers).ToAddress(entry);
                }

                r.Pick(domains).ToBuffer(Structure);
                Pointer(r, Structure);
            });
            Grant($"get_version, entries from {first}", 20, 10, r =>
            {
                for (int i = 0; i < EntriesPerGroup; i++)
                {
                    ulong entry = _memory.GrantPage + ((ulong)(first + i) * 16);
                    r.OneOf((2, static r => r.Constant(0)), (1, static r => r.Random(0xfff_0fff)), (1, r => r.Pick(domains))).Shift(32).Pick(headers).ToAddress(entry);
                    r.OneOf((8, r => r.Pick(_memory.Data)), (2, r => r.Pick(references)), (1, r => r.Pick(_memory.Unshared))).ToAddress(entry + 8);
                }

                r.Pick(domains).ToBuffer(Structure);
                Pointer(r, Structure);
            });
        }
    }

    private void AddGrantMaps(FuzzPool references, FuzzPool domains, FuzzPool addresses, FuzzPool flags, FuzzPool entryFlags)
    {
        void Map(string name, int weight, Action<FuzzRecipe> address, FuzzPool flags) => Grant(name, weight, 0, r =>
        {
            for (int i = 0; i < 4; i++)
            {
                address(r);
                r.ToBuffer(List + (32 * i));
                r.Pick(references).Shift(32).Pick(flags).ToBuffer(List + (32 * i) + 8);
                r.Pick(domains).ToBuffer(List + (32 * i) + 16);
            }

            Pointer(r, List);
        }, 4);
        Map("map_grant_ref", 150, r => r.OneOf((20, r => r.Pick(addresses)), (1, AnyAddress)), flags);
        Map(
            "map_grant_ref by entry", 40,
            r => r.OneOf((4, r => r.Pick(_memory.ScratchL1).Shift(12).Pick(_scratchIndexes)), (4, r => r.Pick(_memory.Tables(1)).Shift(12).Pick(_indexes)), (1, static r => r.Random(~0UL))),
            entryFlags);
        foreach ((string name, int weight, uint command) in ((string, int, uint)[])[("unmap_grant_ref", 200, 1), ("unmap_and_replace", 40, 7)])
        {
            Grant(name, weight, command, r =>
            {
                for (int i = 0; i < 8; i++)
                {
                    r.OneOf((12, r => r.Pick(addresses)), (2, r => r.Pick(_memory.ScratchL1).Shift(12).Pick(_scratchIndexes)), (1, static r => r.Constant(0))).ToBuffer(List + (24 * i));
                    r.OneOf((6, static r => r.Constant(0)), (2, r => r.Pick(addresses)), (2, r => r.Pick(_memory.Data).Shift(12)), (2, static r => r.Random(0xff).Constant(0x8_0000).Shift(12)))
                        .ToBuffer(List + (24 * i) + 8);
                    r.OneOf((20, static r => r.Random(0xff)), (1, static r => r.Random(0xffff_ffff))).ToBuffer(List + (24 * i) + 16);
                }

                Pointer(r, List);
            }, 8);
        }
    }

    private void AddGrantCopies(FuzzPool references, FuzzPool domains, FuzzPool flags)
    {
        void End(FuzzRecipe r, int offset)
        {
            r.OneOf((3, r => r.Pick(references)), (2, r => r.Pick(_memory.Data)), (1, r => r.Pick(_memory.BadOrOwnTables))).ToBuffer(offset);
            r.OneOf((2, static r => r.Random(0xfff)), (1, static r => r.Constant(0))).Shift(16).OneOf((2, r => r.Pick(domains)), (1, static r => r.Constant(Self))).ToBuffer(offset + 8);
        }

        Grant("copy", 80, 5, r =>
        {
            for (int i = 0; i < 3; i++)
            {
                End(r, List + (40 * i));
                End(r, List + (40 * i) + 16);
                r.OneOf((2, static r => r.Random(0xff)), (1, static r => r.Constant(4096)), (1, static r => r.Random(0xffff))).Pick(flags).ToBuffer(List + (40 * i) + 32);
            }

            Pointer(r, List);
        }, 3);
        Grant("transfer", 8, 4, r =>
        {
            r.OneOf((4, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.Bad))).ToBuffer(List);
            r.Pick(references).Shift(32).Pick(domains).ToBuffer(List + 8);
            Pointer(r, List);
        });
    }

    private void AddGrantTables(FuzzPool references, FuzzPool domains)
    {
        void OwnOrAny(FuzzRecipe r) => r.OneOf((3, static r => r.Constant(Self)), (1, r => r.Pick(domains)));
        Grant("setup_table", 8, 2, r =>
        {
            r.Random(3).Shift(32);
            OwnOrAny(r);
            r.ToBuffer(Structure);
            Pointer(r, Frames);
            r.ToBuffer(Structure + 16);
            Pointer(r, Structure);
        });
        Grant("set_version", 10, 8, r =>
        {
            r.OneOf((4, static r => r.Constant(1)), (4, static r => r.Constant(2)), (1, static r => r.Random(0xff))).ToBuffer(Structure);
            Pointer(r, Structure);
        });
        Grant("get_status_frames", 6, 9, r =>
        {
            OwnOrAny(r);
            r.Shift(32).Random(3).ToBuffer(Structure);
            Pointer(r, Frames);
            r.ToBuffer(Structure + 8);
            Pointer(r, Structure);
        });
        Grant("swap_grant_ref", 15, 11, r =>
        {
            r.Pick(references).Shift(32).Pick(references).ToBuffer(List);
            Pointer(r, List);
        });
        Grant("cache_flush", 6, 12, r =>
        {
            r.OneOf((2, r => r.Pick(_memory.AllFrames)), (1, static r => r.Random(0xf).Constant(0x8_0000))).Shift(12).ToBuffer(List);
            r.Random(7).Shift(32).Random(0xfff_0fff).ToBuffer(List + 8);
            Pointer(r, List);
        });
        Grant("garbage", 6, 0, r =>
        {
            for (int i = 0; i < 5; i++)
                r.Random(~0UL).ToBuffer(List + (8 * i));
            r.Random(0xf).ToCall(Argument);
            Pointer(r, List);
        });
    }

    private void AddEvents(FuzzPool domains, FuzzPool ports)
    {
        Event("alloc_unbound", 40, 6, r => r.Pick(domains).Shift(16).OneOf((8, static r => r.Constant(Self)), (1, r => r.Pick(domains))));
        Event("bind_interdomain", 60, 0, r => r.Pick(ports).Shift(32).Pick(domains));
        Event("send", 60, 4, r => r.Pick(ports));
        Event("close", 40, 3, r => r.Pick(ports));
        Event("status", 15, 5, r => r.Pick(ports).Shift(32).OneOf((1, static r => r.Constant(Self)), (1, r => r.Pick(domains))));
        Event("unmask", 15, 9, r => r.Pick(ports));
        Event("bind_ipi", 8, 7, static r => r.Random(1));
        Event("bind_vcpu", 8, 8, r => r.Random(1).Shift(32).Pick(ports));
    }

    private void Grant(string name, int weight, uint command, Action<FuzzRecipe> argument, int count = 1)
        => Call(GuestHypercall.GrantTableOp, $"grant_table_op {name}", weight, r =>
        {
            r.Constant(command);
            To(r, 0);
            argument(r);
            To(r, 1);

            // What lies behind the requests may look like some that would take the guest's own pages from it.
            r.OneOf((60, r => r.Constant((ulong)count)), (1, static r => r.Constant(0)), (1, static r => r.Random(~0x8000_0000UL).Constant(0x8000_0000)));
            To(r, 2);
        });

    private void Event(string name, int weight, uint command, Action<FuzzRecipe> argument)
        => Call(GuestHypercall.EventChannelOp, $"event_channel_op {name}", weight, r =>
        {
            argument(r);
            r.ToBuffer(Structure);
            r.Constant(command);
            To(r, 0);

            // Nothing that the guest has elsewhere, and so not address 0, which is a window: it may name the port of its console.
            r.OneOf((60, static r => r.BufferAddress(Structure)), (2, r => r.Pick(_memory.BadAddresses.Part(1, 12))));
            To(r, 1);
        });
}
