// set_gdt, update_descriptor: which descriptors a guest may have, and what becomes of them.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class DescriptorTablesTests
{
    private const int Gdt = 20;
    private const ulong Code = 0x00af_9a00_0000_ffff;
    private const ulong Dpl3 = 3UL << 45;

    private static IEnumerable<TestCaseData> Descriptors()
    {
        static TestCaseData Case(string name, ulong descriptor, ulong? stored)
            => new TestCaseData(descriptor, stored).SetArgDisplayNames(name);
        yield return Case("null", 0, 0);
        yield return Case("not present, whatever it is", 0x0000_0b00_0000_0000, 0x0000_0b00_0000_0000);
        yield return Case("code of privilege 0", Code, Code | Dpl3);
        yield return Case("code of privilege 1", Code | (1UL << 45), Code | Dpl3);
        yield return Case("data of privilege 3", 0x00cf_f300_0000_ffff, 0x00cf_f300_0000_ffff);
        yield return Case("type 0, the second half of a gate", 0x0000_8000_0000_0000, 0x0000_8000_0000_0000);
        yield return Case("TSS", 0x0000_8900_0000_0067, null);
        yield return Case("busy TSS", 0x0000_8b00_0000_0067, null);
        yield return Case("LDT", 0x0000_8200_0000_ffff, null);
        yield return Case("interrupt gate", 0x0000_8e00_0010_0000, null);
        yield return Case("trap gate", 0x0000_8f00_0010_0000, null);

        // A call gate keeps faulting: its privilege goes to the selector, and is always the guest's.
        yield return Case("call gate to the guest's code", 0x1234_8c00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 1", 0x1234_ac00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 2", 0x1234_cc00_0009_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 3", 0x1234_ec00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate to the LDT", 0x1234_8c00_fffc_5678, 0x1234_8c00_ffff_5678);
        yield return Case("call gate to Xen's flat code", 0x1234_8c00_e033_5678, 0x1234_8c00_e033_5678);
        yield return Case("call gate to Xen's own code", 0x1234_8c00_e008_5678, null);
        yield return Case("call gate with reserved bits", 0x1234_8c01_0008_5678, null);
    }

    [TestCaseSource(nameof(Descriptors))]
    public void A_descriptor_is_made_harmless_or_refused(ulong descriptor, ulong? stored)
    {
        using var machine = new TestMachine();
        *(ulong*)machine.Entry(Gdt, 5) = 0x42;
        long result = Update(machine, Gdt, 5, descriptor);
        Assert.That(result, Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
        Assert.That(*(ulong*)machine.Entry(Gdt, 5), Is.EqualTo(stored ?? 0x42));

        // The same by handing over the page with it in.
        *(ulong*)machine.Entry(Gdt, 5) = descriptor;
        Assert.That(Set(machine, 512, Gdt), Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
        Assert.That(*(ulong*)machine.Entry(Gdt, 5), Is.EqualTo(stored ?? descriptor));
        Assert.That(machine.Info(Gdt).TypeCount, Is.EqualTo(stored == null ? 0 : 1));

        // And once it is a descriptor page.
        *(ulong*)machine.Entry(Gdt, 5) = 0;
        Assert.That(Set(machine, 512, Gdt), Is.Zero);
        Assert.That(Update(machine, Gdt, 5, descriptor), Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
    }

    [TestCase(0U, 0)]
    [TestCase(1U, 1)]
    [TestCase(512U, 1)]
    [TestCase(513U, 2)]
    [TestCase(14U * 512, 14)]
    public void As_many_frames_as_entries_need(uint entries, int frames)
    {
        using var machine = new TestMachine();
        Assert.That(Set(machine, 1024, 40, 41), Is.Zero);
        int[] list = [.. Enumerable.Range(Gdt, frames)];
        Assert.That(Set(machine, entries, list), Is.Zero);
        Assert.That(machine.Vcpu->State->GdtEntries, Is.EqualTo(entries));
        for (int i = 0; i < 14; i++)
        {
            Assert.That(machine.Vcpu->State->GdtFrames[i], Is.EqualTo(i < frames ? Frame(Gdt + i).Value : 0));
            Assert.That(machine.DescriptorPages[i].IsPresent, Is.EqualTo(i < frames));
            if (i < frames)
                Assert.That(machine.DescriptorPages[i].Frame, Is.EqualTo(Frame(Gdt + i)));
        }

        Assert.That(machine.Info(40).TypeCount, Is.Zero, "the old ones are let go");
    }

    [Test]
    public void A_table_that_is_refused_leaves_the_old_one()
    {
        using var machine = new TestMachine(64, 60);
        Assert.That(Set(machine, 512, Gdt), Is.Zero);
        Assert.That(Set(machine, (14 * 512) + 1, Gdt), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(Set(machine, 1024, Gdt + 1, 0), Is.EqualTo(-(long)Errno.EINVAL), "a page table");
        Assert.That(Set(machine, 1024, Gdt + 1, 4), Is.EqualTo(-(long)Errno.EINVAL), "a page that is mapped writable");
        Assert.That(Set(machine, 1024, Gdt + 1, 62), Is.EqualTo(-(long)Errno.EINVAL), "nobody's page");
        var arguments = new HypercallArguments { A0 = 0x7000_0000, A1 = 512 };
        Assert.That(DescriptorTables.SetGdt(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EFAULT));
        Assert.That(machine.Info(Gdt).TypeCount, Is.EqualTo(1));
        Assert.That(machine.Info(Gdt + 1).TypeCount, Is.Zero);
        Assert.That(machine.DescriptorPages[0].Frame, Is.EqualTo(Frame(Gdt)));
    }

    [Test]
    public void Where_update_descriptor_may_not_write()
    {
        using var machine = new TestMachine(64, 60);
        Assert.That(Update(machine, 0, 5, 0), Is.EqualTo(-(long)Errno.EINVAL), "a page table");
        Assert.That(Update(machine, 62, 5, 0), Is.EqualTo(-(long)Errno.EINVAL), "nobody's page");
        var arguments = new HypercallArguments { A0 = EntryAddress(Gdt, 5).Value + 4 };
        Assert.That(DescriptorTables.UpdateDescriptor(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EINVAL), "between two");
    }

    private static long Set(TestMachine machine, uint entries, params int[] frames)
    {
        for (int i = 0; i < frames.Length; i++)
            ((ulong*)machine.Data)[i] = Frame(frames[i]).Value;
        return DescriptorTables.SetGdt(machine.Vcpu, new HypercallArguments { A0 = DataAddress, A1 = entries });
    }

    private static long Update(TestMachine machine, int frame, int index, ulong descriptor)
        => DescriptorTables.UpdateDescriptor(machine.Vcpu, new HypercallArguments { A0 = EntryAddress(frame, index).Value, A1 = descriptor });
}
