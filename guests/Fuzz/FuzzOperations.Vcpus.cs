// What a fuzz guest of several vCPUs calls about them.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

internal sealed partial class FuzzOperations
{
    private void AddVcpuOps(PvAssembler guest)
    {
        FuzzPool ids = FuzzMemory.Pool(guest, [.. Enumerable.Range(0, _memory.VcpuCount + 1).Select(static id => (ulong)id)]);

        // The first one stays up, and brings all others up in the end.
        FuzzPool mayGoDown = ids.Part(1, _memory.VcpuCount);
        FuzzPool bystanders = ids.Part(_memory.Vcpus.Count, _memory.Bystanders.Count);
        FuzzPool running = ids.Part(0, _memory.Vcpus.Count);
        FuzzPool flags = FuzzMemory.Pool(guest, 4, 4, 4, 5, 0, 0x24, 0x20);
        foreach (FuzzBystander bystander in _memory.Bystanders)
        {
            Vcpu($"initialise, vCPU {bystander.Id}", 12, 0, r => r.Constant((ulong)bystander.Id), r =>
            {
                r.Pick(flags).ToAddress(bystander.Context + GuestContextOffset.Flags);
                r.OneOf((6, r => r.Pick(_memory.Roots).Shift(12)), (2, r => r.Pick(_memory.Root).Shift(12)), (6, r => r.Pick(_memory.Bad).Shift(12)))
                    .ToAddress(bystander.Context + GuestContextOffset.KernelRoot);
                r.OneOf(
                        (4, r => r.Pick(_memory.Tables(4)).Shift(12)), (4, r => r.Pick(_memory.Roots).Shift(12)), (4, r => r.Pick(_memory.AllFrames).Shift(12)),
                        (2, static r => r.Constant(0)))
                    .ToAddress(bystander.Context + GuestContextOffset.UserRoot);
                for (int i = 0; i < 2; i++)
                    r.OneOf((6, r => r.Pick(_memory.Data)), (1, r => r.Pick(_memory.BadOrOwnTables))).ToAddress(bystander.Context + GuestContextOffset.GdtFrames + ((ulong)i * 8));
                r.OneOf((4, static r => r.Random(0x3ff)), (3, static r => r.Constant(0)), (1, static r => r.Random(0x3fff)))
                    .ToAddress(bystander.Context + GuestContextOffset.GdtEntries);
                r.OneOf((3, r => r.Pick(_memory.ScratchAddresses)), (1, AnyAddress)).ToAddress(bystander.Context + GuestContextOffset.LdtBase);
                r.OneOf((1, static r => r.Constant(0)), (1, static r => r.Random(0x3fff))).ToAddress(bystander.Context + GuestContextOffset.LdtEntries);
                r.OneOf((12, r => r.Constant(bystander.Context)), (1, r => r.Pick(_memory.BadPointers)));
            });
        }

        Vcpu("up", 30, 1, r => r.Pick(ids), static r => r.Constant(0));
        Vcpu("down", 8, 2, r => r.Pick(mayGoDown), static r => r.Constant(0));
        Vcpu("is_up", 4, 3, r => r.Pick(ids), static r => r.Constant(0));
        Vcpu("get_runstate_info", 6, 4, r => r.Pick(ids), r => r.OneOf((5, r => Pointer(r, List)), (1, AnyAddress)));
        foreach ((string name, ulong command) in ((string, ulong)[])[("register_runstate_memory_area", 5), ("register_vcpu_time_memory_area", 13)])
        {
            Vcpu(name, 6, command, r => r.Pick(ids), r =>
            {
                r.OneOf((4, AnyAddress), (1, static r => r.Constant(0))).OneOf((4, static r => r.Random(0xf80)), (1, static r => r.Random(0xfff))).ToBuffer(List);
                Pointer(r, List);
            });
        }

        // A vCPU that goes on making calls needs its own vcpu_info, and no event that it did not ask for.
        VcpuInfo("register_vcpu_info", running, r => r.OneOf((4, r => r.Pick(_memory.Info)), (1, r => r.Pick(_memory.Bad))));
        VcpuInfo("register_vcpu_info, bystanders", bystanders, r => r.OneOf((4, r => r.Pick(_memory.Data)), (1, r => r.Pick(_memory.BadOrOwnTables))));
        Vcpu("send_nmi", 4, 11, r => r.Pick(ids), static r => r.OneOf((5, static r => r.Constant(0)), (1, static r => r.Random(1))));
    }

    private void VcpuInfo(string name, FuzzPool targets, Action<FuzzRecipe> frame) => Vcpu(name, 8, 10, r => r.Pick(targets), r =>
    {
        frame(r);
        r.ToBuffer(List);
        r.OneOf((8, static r => r.Random(0xfc0)), (1, static r => r.Random(0x1fff))).ToBuffer(List + 8);
        Pointer(r, List);
    });

    private void Vcpu(string name, int weight, ulong command, Action<FuzzRecipe> target, Action<FuzzRecipe> argument)
        => Call(GuestHypercall.VcpuOp, $"vcpu_op {name}", weight, r =>
        {
            argument(r);
            To(r, 2);
            r.Constant(command);
            To(r, 0);
            target(r);
            To(r, 1);
        });
}
