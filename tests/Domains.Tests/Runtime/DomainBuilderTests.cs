// What the domain builder leaves in the memory of a fresh domain.
using System.Text;
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Mmu;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class DomainBuilderTests
{
    private const ulong InitP2M = 0x80_0000_0000;

    public static IEnumerable<TestCaseData> Kernels()
    {
        yield return new TestCaseData(FakeDomain.Kernel(), 0).SetArgDisplayNames("plain");
        yield return new TestCaseData(FakeDomain.Kernel(), 300_000).SetArgDisplayNames("with a ramdisk");
        yield return new TestCaseData(FakeDomain.Kernel(initP2M: InitP2M), 300_000).SetArgDisplayNames("INIT_P2M");
        yield return new TestCaseData(FakeDomain.Kernel(modStartPfn: true), 300_000).SetArgDisplayNames("MOD_START_PFN");
        yield return new TestCaseData(FakeDomain.Kernel(initP2M: InitP2M, modStartPfn: true), 300_001).SetArgDisplayNames("both, as Linux");
        yield return new TestCaseData(FakeDomain.Kernel(initP2M: InitP2M, modStartPfn: true), 0).SetArgDisplayNames("both, no ramdisk");
        yield return new TestCaseData(FakeDomain.Kernel(size: 0x30_1234), 5000).SetArgDisplayNames("odd size");
        yield return new TestCaseData(FakeDomain.Kernel(virtualBase: 0x10_0000), 5000).SetArgDisplayNames("low half");
        yield return new TestCaseData(FakeDomain.Kernel(hypercallPage: FakeDomain.Base + 0x3000), 0).SetArgDisplayNames("hypercall page");
    }

    [TestCaseSource(nameof(Kernels))]
    public void Everything_is_where_start_info_says(KernelImage kernel, int ramdiskSize)
    {
        byte[] ramdisk = new byte[ramdiskSize];
        new Random(3).NextBytes(ramdisk);
        using var domain = new FakeDomain(16, options => options with { Kernel = kernel, Ramdisk = ramdisk, CommandLine = "root=/dev/xvda ünïcode" });
        StartInfo* info = domain.StartInfo;
        const ulong pages = 16 << 8;
        Assert.That(Encoding.ASCII.GetString(new ReadOnlySpan<byte>(info->Magic, 14)), Is.EqualTo("xen-3.0-x86_64"));
        Assert.That(info->PageCount, Is.EqualTo(pages));
        Assert.That(info->SharedInfo, Is.EqualTo(domain.Domain.Context->State->SharedInfoFrame << 12));
        Assert.That((nint)domain.Domain.Context->SharedInfo, Is.EqualTo((nint)domain.Machine.Memory.Page(new Mfn(info->SharedInfo >> 12))));
        Assert.That((info->StoreMfn, info->ConsoleMfn), Is.EqualTo((domain.Domain.Layout.Store.Value, domain.Domain.Layout.Console.Value)));
        Assert.That((info->StoreEventChannel, info->ConsoleEventChannel), Is.EqualTo((domain.Domain.StorePort, domain.Domain.ConsolePort)));
        Assert.That(new ReadOnlySpan<byte>(domain.Domain.ConsolePage, 4096).ContainsAnyExcept((byte)0), Is.False);
        string commandLine = Encoding.UTF8.GetString(new ReadOnlySpan<byte>(info->CommandLine, 1024)).TrimEnd('\0');
        Assert.That(commandLine, Is.EqualTo("root=/dev/xvda ünïcode"));
        Assert.That(info->Flags, Is.EqualTo(ramdiskSize != 0 && kernel.ModStartPfn ? 8U : 0));
        Assert.That((info->FirstP2MPfn != 0, info->P2MFrames), Is.EqualTo((kernel.InitP2M != null, kernel.InitP2M != null ? pages / 512 : 0)));

        // The p2m list, read as the guest would, and the M2P table against it.
        for (ulong pfn = 0; pfn < pages; pfn++)
        {
            Assert.That(GuestAccess.Read(domain.Context, info->MfnList + (pfn * 8), out ulong mfn), Is.True);
            Assert.That(domain.Machine.MachineToPhys[mfn - FakeMachine.FirstFrame], Is.EqualTo(pfn));
        }

        Assert.That(domain.Machine.MachineToPhys[(info->SharedInfo >> 12) - FakeMachine.FirstFrame], Is.EqualTo(ulong.MaxValue), "not one of the guest's own");

        // The ramdisk, by address or by pfn.
        Assert.That(info->ModuleLength, Is.EqualTo((ulong)ramdiskSize));
        byte[] found = new byte[ramdiskSize];
        fixed (byte* bytes = found)
        {
            if (ramdiskSize != 0 && kernel.ModStartPfn)
                new ReadOnlySpan<byte>(domain.Machine.Memory.Page(new Mfn(FakeMachine.FirstFrame + info->ModuleStart)), ramdiskSize).CopyTo(found);
            else if (ramdiskSize != 0)
                Assert.That(GuestAccess.CopyFrom(domain.Context, info->ModuleStart, bytes, (ulong)ramdiskSize), Is.True);
        }

        Assert.That(found, Is.EqualTo(ramdisk));

        // The kernel, and how it is entered.
        Assert.That(GuestAccess.Read(domain.Context, kernel.VirtualBase, out uint code), Is.True);
        Assert.That(code, Is.EqualTo(0x0092_9190U));
        CpuRegisters* registers = domain.Context->Registers;
        Assert.That((registers->Rip, registers->Rflags), Is.EqualTo((kernel.VirtualEntry, 0x202UL)));
        Assert.That(GuestAccess.Read(domain.Context, registers->Rsi, out ulong magic), Is.True);
        Assert.That(magic, Is.EqualTo(*(ulong*)info->Magic));
        Assert.That(GuestAccess.Write(domain.Context, registers->Rsp - 8, 0UL), Is.True);
        Assert.That((domain.Context->State->KernelMode, domain.Context->Info->EvtchnUpcallMask), Is.EqualTo((1, (byte)1)));
        Assert.That((domain.Context->Segments->Cs, domain.Context->Segments->Ss), Is.EqualTo((FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data)));
        if (kernel.HypercallPage is { } page)
        {
            byte* stub = domain.Host(page) + (17 * 32);
            Assert.That(Convert.ToHexString(new ReadOnlySpan<byte>(stub, 14)), Is.EqualTo("514153B8110000000F05415B59C3"));
            Assert.That(Convert.ToHexString(new ReadOnlySpan<byte>(domain.Host(page) + (23 * 32), 11)), Is.EqualTo("51415350B8170000000F05"));
        }
    }

    [TestCaseSource(nameof(Kernels))]
    public void Page_tables_are_read_only_and_all_else_is_writable(KernelImage kernel, int ramdiskSize)
    {
        using var domain = new FakeDomain(16, options => options with { Kernel = kernel, Ramdisk = new byte[ramdiskSize] });
        StartInfo* info = domain.StartInfo;
        ulong tables = (info->PageTableBase - kernel.VirtualBase) >> 12;
        ulong mapped = 0;
        ulong address = kernel.VirtualBase;
        for (; ; address += 4096, mapped++)
        {
            PageTableEntry* entry = GuestAccess.FindEntry(domain.Context, new VirtualAddress(address));
            if (entry == null || !entry->IsPresent)
                break;
            ulong pfn = (address - kernel.VirtualBase) >> 12;
            Assert.That(entry->Frame.Value, Is.EqualTo(FakeMachine.FirstFrame + pfn));
            Assert.That(entry->IsWritable, Is.EqualTo(pfn - tables >= info->PageTableFrames), $"pfn {pfn:x}");
        }

        // To a 4 MiB boundary, 512 KiB or more behind the boot stack.
        Assert.That(address % (4 << 20), Is.Zero);
        Assert.That(address - domain.Context->Registers->Rsp, Is.GreaterThanOrEqualTo(512UL << 10).And.LessThan((4UL << 20) + (512UL << 10)));
        Assert.That(mapped, Is.LessThan(info->PageCount));

        // As many tables as are said, each of them in use as one, none besides.
        for (ulong pfn = 0; pfn < info->PageCount; pfn++)
        {
            FrameInfo* frame = FrameTable.Of(domain.Domain.Context)->Find(new Mfn(FakeMachine.FirstFrame + pfn));
            Assert.That(frame->IsPageTable && frame->TypeCount > 0, Is.EqualTo(pfn - tables < info->PageTableFrames), $"pfn {pfn:x}");
        }

        Assert.That(domain.Domain.Layout.PageTableRoot.Value, Is.EqualTo(FakeMachine.FirstFrame + tables));
        Assert.That(domain.Context->State->KernelRoot, Is.EqualTo(domain.Domain.Layout.PageTableRoot.Value));
        FrameInfo* root = FrameTable.Of(domain.Domain.Context)->Find(domain.Domain.Layout.PageTableRoot);
        Assert.That((root->Has(FrameFlags.Pinned), root->TypeCount), Is.EqualTo((true, 2U)));
    }

    [Test]
    public void Every_size_of_memory_either_works_or_is_refused_with_a_sentence([Values] bool asLinux)
    {
        KernelImage kernel = FakeDomain.Kernel(initP2M: asLinux ? InitP2M : null, modStartPfn: asLinux);
        bool worked = false;
        for (int memory = 1; memory <= 40; memory++)
        {
            int size = memory;
            try
            {
                using var domain = new FakeDomain(size, options => options with { Kernel = kernel, Ramdisk = new byte[1_500_000] });
                Assert.That(domain.StartInfo->PageCount, Is.EqualTo((ulong)size << 8));
                worked = true;
            }
            catch (DomainBuildException exception)
            {
                Assert.That(worked, Is.False, $"{size} MiB are refused, and less was enough");
                Assert.That(exception.Message, Does.Match($"^{size} MiB of memory are too few: .* takes [0-9]+ MiB.*--memory [0-9]+"));
                int advised = int.Parse(exception.Message.Split("--memory ")[1].TrimEnd('.', ')'), System.Globalization.CultureInfo.InvariantCulture);
                Assert.That(advised, Is.GreaterThan(size));
            }
        }

        Assert.That(worked, Is.True);
    }

    [Test]
    public void A_guest_of_many_tables()
    {
        // 200 MiB of ramdisk in the initial mapping take 100 and some L1 tables.
        using var domain = new FakeDomain(512, options => options with { Ramdisk = new byte[200 << 20] });
        Assert.That(domain.StartInfo->PageTableFrames, Is.InRange(104UL, 110UL));
        Assert.That(domain.Domain.Context->State->OwnedPages, Is.EqualTo(512UL << 8));
    }

    [Test]
    public void Command_lines_up_to_1023_bytes([Values(1023, 1024)] int length)
    {
        var line = new string('x', length);
        if (length < 1024)
        {
            using var domain = new FakeDomain(8, options => options with { CommandLine = line });
            Assert.That((domain.StartInfo->CommandLine[1022], domain.StartInfo->CommandLine[1023]), Is.EqualTo(((byte)'x', (byte)0)));
            return;
        }

        Assert.That(
            () => new FakeDomain(8, options => options with { CommandLine = line }),
            Throws.TypeOf<DomainBuildException>().With.Message.Contains("1024 bytes").And.Message.Contains("1023"));
        Assert.That(
            () => new FakeDomain(8, options => options with { CommandLine = new string('ü', 512) }),
            Throws.TypeOf<DomainBuildException>(), "bytes count, not letters");
    }

    [Test]
    public void A_machine_that_is_too_small()
    {
        Assert.That(() => new FakeDomain(8, spareFrames: 0), Throws.TypeOf<DomainBuildException>().With.Message.Contains("shared_info"));
    }

    [Test]
    public void Later_segments_win_with_their_zeroes()
    {
        KernelImage kernel = FakeDomain.Kernel(segments:
        [
            new KernelSegment(0, FakeDomain.Base, Enumerable.Repeat((byte)0xaa, 0x3000).ToArray(), 0x4000),
            new KernelSegment(0x1004, FakeDomain.Base + 0x1004, new byte[] { 1, 2, 3 }, 0x10),
        ]);
        using var domain = new FakeDomain(8, options => options with { Kernel = kernel });
        Assert.That(new ReadOnlySpan<byte>(domain.Host(FakeDomain.Base + 0x1000), 24).ToArray(), Is.EqualTo(
            (byte[])[0xaa, 0xaa, 0xaa, 0xaa, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa]));
        Assert.That(domain.Read<ulong>(FakeDomain.Base + 0x3000), Is.Zero);
    }
}
