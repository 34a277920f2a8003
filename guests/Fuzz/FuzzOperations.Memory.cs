// memory_op, as the fuzz guest calls it.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

internal sealed partial class FuzzOperations
{
    private void AddMemoryOps()
    {
        // The frames that come are likely those that went: the lowest free ones, and few others are free.
        Reservation("increase_reservation", 25, 0, static r => r.Constant(0));
        Reservation("decrease_reservation", 25, 1, r => r.OneOf(
            (12, r => r.Pick(_memory.Data)), (4, r => r.Pick(_memory.Scratch)), (2, r => r.Pick(_memory.Bad)), (1, r => r.Pick(_memory.SharedInfo)),
            (1, static r => r.Random(~0UL))));
        Reservation("populate_physmap", 45, 6, static r => r.OneOf((8, static r => r.Random(0xfff)), (1, static r => r.Random(~0UL))));
        WithDomain("current_reservation", 4, 3);
        WithDomain("maximum_reservation", 4, 4);
        WithDomain("maximum_gpfn", 4, 14);
        Memory("maximum_ram_page", 4, 2, static r => r.Constant(0));
        Memory("exchange", 40, 11, WriteExchange);
        Memory("memory_map", 6, 9, r =>
        {
            r.OneOf((3, static r => r.Random(0x3)), (1, static r => r.Random(0xffff_ffff))).ToBuffer(Structure);
            Pointer(r, List);
            r.ToBuffer(Structure + 8);
            Pointer(r, Structure);
        });
        Memory("machphys_mapping", 6, 12, r => Pointer(r, Structure));
        Memory("set_memory_map", 6, 13, r =>
        {
            r.Random(0xffff_ffff).ToBuffer(List);
            r.Constant(0x100_0000).ToBuffer(List + 8);
            r.Constant(1).ToBuffer(List + 16);
            Domain(r);
            r.ToBuffer(Structure);
            r.OneOf((3, static r => r.Constant(1)), (1, static r => r.Random(0xff)), (1, r => r.Pick(_hugeCounts))).ToBuffer(Structure + 8);
            Pointer(r, List);
            r.ToBuffer(Structure + 16);
            Pointer(r, Structure);
        });
        foreach ((string name, ulong command) in (ReadOnlySpan<(string, ulong)>)
            [
                ("machphys_mfn_list", 5), ("add_to_physmap", 7), ("machine_memory_map", 10), ("remove_from_physmap", 15), ("set_pod_target", 16),
                ("get_pod_target", 17), ("paging_op", 20), ("access_op", 21), ("sharing_op", 22), ("add_to_physmap_batch", 23), ("claim_pages", 24), ("get_vnumainfo", 26),
                ("reserved_device_memory_map", 27), ("acquire_resource", 28),
            ])
        {
            Memory(name, 3, command, r =>
            {
                Domain(r);
                r.ToBuffer(Structure);
                for (int i = 1; i < 6; i++)
                {
                    r.OneOf((2, static r => r.Random(3)), (1, r => r.Pick(_memory.AllFrames)), (1, r => Pointer(r, List)), (1, static r => r.Random(~0UL)))
                        .ToBuffer(Structure + (8 * i));
                }

                Pointer(r, Structure);
            });
        }

        Call(GuestHypercall.MemoryOp, "memory_op garbage", 6, r =>
        {
            r.OneOf((1, static r => r.Random(0xffff_ffff)), (1, static r => r.Random(~0x3fUL).Constant(29))).ToCall(Argument);
            Pointer(r, Structure);
            To(r, 1);
        });
    }

    private void Memory(string name, int weight, ulong command, Action<FuzzRecipe> argument, bool counts = false)
        => Call(GuestHypercall.MemoryOp, $"memory_op {name}", weight, r =>
        {
            argument(r);
            To(r, 1);

            // Extents done by an earlier part of the call stand above the command.
            r.Constant(command).OneOf((30, static r => r.Constant(0)), (1, static r => r.Random(0x3c0)));
            To(r, 0);
        }, counts);

    private void WithDomain(string name, int weight, ulong command) => Memory(name, weight, command, r =>
    {
        r.Pick(_domains).ToBuffer(Structure);
        Pointer(r, Structure);
    });

    /// <summary>struct xen_memory_reservation.</summary>
    private void Reservation(string name, int weight, ulong command, Action<FuzzRecipe> extent) => Memory(name, weight, command, r =>
    {
        for (int i = 0; i < 3; i++)
        {
            extent(r);
            r.ToBuffer(List + (8 * i));
        }

        WriteReservation(r, Structure, r => Pointer(r, List));
        Pointer(r, Structure);
    }, counts: true);

    private void WriteReservation(FuzzRecipe r, int offset, Action<FuzzRecipe> extents)
    {
        extents(r);
        r.ToBuffer(offset);
        r.OneOf((10, static r => r.Constant(1)), (6, static r => r.Random(3)), (1, r => r.Pick(_hugeCounts))).ToBuffer(offset + 8);

        // Order, and above it flags: address bits, a node.
        r.OneOf((12, static r => r.Constant(0)), (2, static r => r.Random(1)), (1, static r => r.Random(0xffff_0000_00ff)), (1, static r => r.Random(~0UL)))
            .ToBuffer(offset + 16);
        r.OneOf((20, static r => r.Constant(Self)), (1, r => r.Pick(_badDomains))).ToBuffer(offset + 24);
    }

    /// <summary>struct xen_memory_exchange: what is given, what is taken, and how much was done before.</summary>
    private void WriteExchange(FuzzRecipe r)
    {
        for (int i = 0; i < 4; i++)
            r.OneOf((12, r => r.Pick(_memory.Data)), (3, r => r.Pick(_memory.Scratch)), (1, r => r.Pick(_memory.AllFrames))).ToBuffer(List + (8 * i));
        for (int i = 4; i < 8; i++)
            r.Random(0xfff).ToBuffer(List + (8 * i));
        r.OneOf(
            (12, r =>
            {
                // One for one.
                foreach ((int offset, int list) in (ReadOnlySpan<(int, int)>)[(0, 0), (32, 32)])
                {
                    r.BufferAddress(List + list).ToBuffer(Structure + offset);
                    r.Constant(1).ToBuffer(Structure + offset + 8);
                    r.Constant(0).ToBuffer(Structure + offset + 16);
                    r.Constant(Self).ToBuffer(Structure + offset + 24);
                }
            }),
            (6, r =>
            {
                WriteReservation(r, Structure, r => Pointer(r, List));
                WriteReservation(r, Structure + 32, r => Pointer(r, List + 32));
            }));
        r.OneOf((12, static r => r.Constant(0)), (1, static r => r.Random(3)), (1, static r => r.Random(~0UL))).ToBuffer(Structure + 64);
        Pointer(r, Structure);
    }
}
