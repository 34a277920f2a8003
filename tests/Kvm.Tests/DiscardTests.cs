// Frames whose memory is given back to the host while a guest has them mapped, and used again.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class DiscardTests : KvmTest
{
    private const byte Mark = 0x5a;
    private ScratchGuest _guest = null!;

    private byte* Page => _guest.Machine.Memory.Page(_guest.FirstDataFrame);

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void A_discarded_frame_takes_no_memory_and_reads_as_zeroes()
    {
        Exchange(Mark);
        ulong before = _guest.Machine.ResidentRam;
        _guest.Machine.Discard(_guest.FirstDataFrame, 1);
        Assert.That(before - _guest.Machine.ResidentRam, Is.EqualTo(Paging.PageSize));
        Assert.That(*Page, Is.Zero);
    }

    /// <summary>The guest's translation leads to the frame, not to the page that was the frame's memory.</summary>
    [Test]
    public void A_translation_that_the_guest_still_has_does_not_reach_the_old_page()
    {
        Exchange(Mark);
        for (byte next = 1; next < 50; next++)
        {
            _guest.Machine.Discard(_guest.FirstDataFrame, 1);
            Assert.That(Exchange(next), Is.Zero, "What the guest found");
            Assert.That(*Page, Is.EqualTo(next), "What it wrote, as the host sees it");
            *Page = Mark;
            Assert.That(Exchange(next), Is.EqualTo(Mark), "What the host wrote, as the guest sees it");
        }
    }

    [Test]
    public void A_frame_that_was_unmapped_discarded_and_mapped_elsewhere_is_one_page_for_all()
    {
        Exchange(Mark);
        PageTableEntry entry = *_guest.DataEntry;
        _guest.Vcpu.PageTableWrites->Store(_guest.DataEntry, _guest.DataEntryAddress, default);
        if (_guest.Vcpu.PageTableWrites->InGuest == 0)
            _guest.Vcpu.PageTableWrites->Flush();
        _guest.Machine.Discard(_guest.FirstDataFrame, 1);
        VcpuExit exit = RunCode(_guest, static code =>
        {
            code.mov(al, __byte_ptr[ScratchGuest.DataAddress]);
            code.syscall();
        });
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)));
        Assert.That(*Page, Is.Zero);

        _guest.Vcpu.PageTableWrites->Store(_guest.DataEntry, _guest.DataEntryAddress, entry);
        Assert.That(Exchange(7), Is.Zero);
        Assert.That(*Page, Is.EqualTo(7));
    }

    [Test]
    public void A_run_of_frames_goes_and_its_neighbours_stay()
    {
        Mfn first = _guest.Machine.Memory.FirstFrame + 60;
        for (ulong i = 0; i < 20; i++)
            *_guest.Machine.Memory.Page(first + i) = (byte)(i + 1);
        ulong before = _guest.Machine.ResidentRam;
        _guest.Machine.Discard(first + 5, 10);
        Assert.That(before - _guest.Machine.ResidentRam, Is.EqualTo(10 * Paging.PageSize));
        for (ulong i = 0; i < 20; i++)
            Assert.That(*_guest.Machine.Memory.Page(first + i), Is.EqualTo(i is >= 5 and < 15 ? 0 : i + 1));
    }

    /// <summary>The guest puts a byte into the page, and says what was there.</summary>
    private byte Exchange(byte value)
    {
        AssertSyscall(RunCode(
            _guest,
            static code =>
            {
                code.movzx(eax, __byte_ptr[ScratchGuest.DataAddress]);
                code.mov(__byte_ptr[ScratchGuest.DataAddress], cl);
                code.syscall();
            },
            (ref CpuRegisters registers) => registers.Rcx = value));
        return (byte)_guest.Vcpu.Registers->Rax;
    }
}
