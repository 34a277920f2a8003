using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// All the unmanaged state of one domain, in one block: domain, vCPUs, frame table. What hypercalls work on refers into it by
/// index, so that it can one day lie inside the VM as well.
/// </summary>
internal sealed unsafe class DomainMemory : IDisposable
{
    private const nuint Alignment = 4096;
    private readonly nuint _size;
    private byte* _block;

    /// <param name="machine">The VM.</param>
    /// <param name="id">The domain's id.</param>
    /// <param name="maxVcpus">vCPUs to have room for.</param>
    /// <param name="maxPages">Frames that it may own at first.</param>
    /// <param name="mappedPages">Where its pseudo-physical memory map ends.</param>
    /// <param name="shadowed">KVM shadows the guest's page tables.</param>
    public DomainMemory(IVirtualMachine machine, ushort id, int maxVcpus, ulong maxPages, ulong mappedPages, bool shadowed)
    {
        ulong frames = machine.Memory.FrameCount;
        nuint bitmap = shadowed ? (nuint)((frames + 63) / 64 * sizeof(ulong)) : 0;
        nuint offset = 0;
        nuint Take(nuint size)
        {
            nuint at = offset;
            offset += (size + Alignment - 1) & ~(Alignment - 1);
            return at;
        }

        nuint contextAt = Take((nuint)sizeof(DomainContext));
        nuint stateAt = Take((nuint)sizeof(DomainState));
        nuint tableAt = Take((nuint)sizeof(FrameTable));
        nuint slotsAt = Take(Paging.HypervisorSlots * sizeof(ulong));
        nuint memoryMapAt = Take((nuint)(E820Entry.MaxEntries * sizeof(E820Entry)));
        nuint vcpuContextsAt = Take((nuint)(maxVcpus * sizeof(VcpuContext)));
        nuint vcpusAt = Take((nuint)(maxVcpus * sizeof(VcpuState)));
        nuint vcpuInfosAt = Take((nuint)(maxVcpus * sizeof(VcpuInfo)));
        nuint bitmapAt = Take(bitmap);
        ulong windowWords = (machine.Window.FrameCount + 63) / 64;
        nuint releasesAt = Take((nuint)(windowWords * sizeof(ulong)));
        nuint scrubAt = Take(ScrubMap.SizeOf(frames));
        nuint usesAt = Take((nuint)machine.Window.FrameCount * sizeof(ulong));
        nuint framesAt = Take((nuint)frames * (nuint)sizeof(FrameInfo));
        _size = offset;
        _block = (byte*)HostPages.Allocate(_size);

        Context = (DomainContext*)(_block + contextAt);
        VcpuContexts = (VcpuContext*)(_block + vcpuContextsAt);
        Context->Vcpus = VcpuContexts;
        VcpuInfos = (VcpuInfo*)(_block + vcpuInfosAt);
        VcpuStates = (VcpuState*)(_block + vcpusAt);
        Context->State = (DomainState*)(_block + stateAt);
        Context->State->Id = id;
        Context->State->MaxPages = maxPages;
        Context->Memory = machine.Memory;
        Context->MachineToPhys = machine.MachineToPhys;
        Context->MachineToPhysFrame = machine.MachineToPhysFrame;
        Context->MachineToPhysStart = machine.MachineToPhysStart;
        Context->Window = machine.Window;
        Context->WindowToPhys = machine.WindowToPhys;
        Context->WindowReleases = (ulong*)(_block + releasesAt);
        Context->WindowUses = (ulong*)(_block + usesAt);
        Context->HypervisorSlots = (ulong*)(_block + slotsAt);
        machine.HypervisorSlots.CopyTo(new Span<ulong>(Context->HypervisorSlots, Paging.HypervisorSlots));
        Context->KernelSlot = machine.KernelSlot;
        Context->UserSlot = machine.UserSlot;
        Context->ShadowedFrames = shadowed ? (ulong*)(_block + bitmapAt) : null;
        Context->MemoryMap = (E820Entry*)(_block + memoryMapAt);
        *Context->MemoryMap = new E820Entry { Size = mappedPages << Paging.PageShift, Type = E820Entry.Ram };
        Context->State->MemoryMapEntries = 1;
        Context->Frames = _block + tableAt;
        FrameTable.Of(Context)->Initialize(
            (FrameInfo*)(_block + framesAt), machine.Memory, Context->State, Context->MachineToPhys, (ulong*)(_block + scrubAt));
        for (ulong i = 0; i < frames; i++)
            machine.MachineToPhys[i] = Mfn.Invalid.Value;
    }

    public DomainContext* Context { get; }

    public VcpuContext* VcpuContexts { get; }

    /// <summary>What stands in for the vcpu_info of vCPUs that have none (dummy_vcpu_info): nobody ever looks at it.</summary>
    public VcpuInfo* VcpuInfos { get; }

    public VcpuState* VcpuStates { get; }

    public void Dispose()
    {
        HostPages.Free(_block, _size);
        _block = null;
    }
}
