// What tests of the SYSCALL entry start from: a guest whose entry serves, with a vcpu_info.
using XenSharp.Core;

namespace XenSharp.Kvm.Tests;

/// <summary>Makes the guest; where the host's entries serve nothing, every test passes by saying so.</summary>
public abstract unsafe class EntryTest : KvmTest
{
    private protected const int InfoOffset = 0x140;
    private protected const Rflags Always = Rflags.Fixed | Rflags.InterruptEnable;

    private protected ScratchGuest Guest { get; private set; } = null!;

    private protected KvmVirtualCpu Vcpu => Guest.Vcpu;

    /// <summary>evtchn_upcall_pending.</summary>
    private protected ref byte Pending => ref Guest.Machine.Memory.Page(Guest.SecondDataFrame)[InfoOffset];

    /// <summary>evtchn_upcall_mask.</summary>
    private protected ref byte Mask => ref Guest.Machine.Memory.Page(Guest.SecondDataFrame)[InfoOffset + 1];

    [SetUp]
    public void MakeGuest()
    {
        Guest = NewGuest();
        if (Vcpu.EntryService == null)
        {
            Assert.That(Capabilities.SyscallEntryLevel, Is.Zero, "The entry serves where it runs at CPL 3.");
            Assert.Pass("This host enters SYSCALL at CPL 0, where the entry serves nothing by itself.");
        }

        Vcpu.ShowVcpuInfo(Guest.SecondDataFrame, InfoOffset);
    }

    /// <summary>An L4 of its own that leads to the same tables, with user mode's entry in the slot where kernel mode has its own.</summary>
    private protected Mfn MakeUserRoot()
    {
        Mfn root = Vcpu.PageTableRoot + 64;
        PageTableEntry* user = Guest.Machine.Memory.Table(root);
        new Span<PageTableEntry>(Guest.Machine.Memory.Table(Vcpu.PageTableRoot), Paging.EntriesPerTable)
            .CopyTo(new Span<PageTableEntry>(user, Paging.EntriesPerTable));
        user[Guest.Machine.KernelSlot] = new PageTableEntry(Guest.Machine.UserSlot);
        return root;
    }

    /// <summary>Kicks the vCPU of the calling thread 4000 times, in half of them soon after it has taken note of the one before.</summary>
    private protected Background KickAtRandom(int seed)
    {
        Vcpu.WaitForKick(0);
        return new Background(stop =>
        {
            var random = new Random(seed);
            for (int i = 0; i < 4000; i++)
            {
                while (Volatile.Read(ref *Vcpu.KickPending) != 0 && !stop.IsCancellationRequested)
                    Thread.SpinWait(10);
                Thread.SpinWait(random.Next(i % 2 == 0 ? 300 : 10_000));
                Vcpu.Kick();
            }
        });
    }

    [TearDown]
    public void DropGuest() => Guest?.Dispose();
}
