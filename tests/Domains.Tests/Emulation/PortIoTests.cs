using Iced.Intel;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>Port instructions: who may, what is there, and the string forms.</summary>
public sealed unsafe class PortIoTests
{
    private FakeGuest _guest = null!;

    [SetUp]
    public void CreateGuest() => _guest = new FakeGuest();

    [TearDown]
    public void DisposeGuest() => _guest.Dispose();

    [Test]
    public void EmptyPortsReadAsOnes()
    {
        _guest.Registers->Rdx = 0x3f8;
        Assert.That(_guest.Execute(c => c.@in(eax, dx)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0xffff_ffff));
        Assert.That(_guest.Execute(c => c.@out(dx, eax)), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rax = 0;
        Assert.That(_guest.Execute(c => c.@in(ax, 0x71)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0xffff));
        _guest.Registers->Rdx = 0xffff;
        Assert.That(_guest.Execute(c => c.@in(eax, dx)), Is.EqualTo(EmulationResult.Done));
    }

    [Test]
    public void CmosIndexAndPciAddressAreLatched()
    {
        _guest.Registers->Rax = 0x1234_56ab;
        Assert.That(_guest.Execute(c => c.@out(0x70, al)), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rdx = 0xcf8;
        Assert.That(_guest.Execute(c => c.@out(dx, eax)), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rax = 0;
        Assert.That(_guest.Execute(c => c.@in(al, 0x70)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0xab));
        Assert.That(_guest.Execute(c => c.@in(eax, dx)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0x1234_56ab));
        Assert.That(_guest.Execute(c => c.@in(al, dx)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0x1234_56ff));
    }

    [Test]
    public void BitmapOpensPortsToUserSpace()
    {
        _guest.State->KernelMode = 0;
        _guest.State->IoBitmap = FakeGuest.DataStart;
        _guest.State->IoBitmapPorts = 0x400;

        _guest.Registers->Rdx = 0x3f7;
        _guest.Poke(FakeGuest.DataStart + 0x7e, [0x7f, 0xfe]);
        Assert.That(_guest.Execute(c => c.@in(ax, dx)), Is.EqualTo(EmulationResult.Done), "both bits clear");
        Assert.That(_guest.State->KernelMode, Is.Zero);
        _guest.Poke(FakeGuest.DataStart + 0x7e, [0x7f, 0x01]);
        Assert.That(_guest.Execute(c => c.@in(ax, dx)), Is.EqualTo(EmulationResult.NotHandled), "the second is set");
        Assert.That(_guest.Execute(c => c.@in(al, dx)), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rdx = 0x3ff;
        Assert.That(_guest.Execute(c => c.@in(ax, dx)), Is.EqualTo(EmulationResult.NotHandled), "past the limit");
        _guest.State->IoBitmap = FakeGuest.DataEnd;
        Assert.That(_guest.Execute(c => c.@in(al, dx)), Is.EqualTo(EmulationResult.NotHandled), "bitmap not readable");
    }

    [Test]
    public void WithoutIoplEverythingBounces()
    {
        _guest.State->Iopl = 0;
        Assert.That(_guest.Execute(c => c.@in(al, 0x70)), Is.EqualTo(EmulationResult.NotHandled));
        Assert.That(_guest.Execute(c => c.@out(dx, ax)), Is.EqualTo(EmulationResult.NotHandled));
        Assert.That(_guest.Execute(c => c.rep.insb()), Is.EqualTo(EmulationResult.NotHandled));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart));
        _guest.Load(c => c.@in(al, 0x70));
        Assert.That(_guest.Emulator.GuestIo(), Is.EqualTo(EmulationResult.GeneralProtection), "nobody else raised it");
    }

    [Test]
    public void LetThroughInstructionsAreExecuted()
    {
        _guest.Load(c => c.@in(al, 0x70));
        Assert.That(_guest.Emulator.GuestIo(), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 2));
    }

    [Test]
    public void StringsMoveBetweenPortsAndMemory()
    {
        _guest.Registers->Rdx = 0x80;
        _guest.Registers->Rdi = FakeGuest.DataStart + 0xffe;
        _guest.Registers->Rcx = 3;
        Assert.That(_guest.Execute(c => c.rep.insd()), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Registers->Rdi, Is.EqualTo(FakeGuest.DataStart + 0x100a));
        Assert.That(_guest.Registers->Rcx, Is.Zero);
        Assert.That(_guest.Peek(FakeGuest.DataStart + 0xffd, 14), Is.EqualTo((byte[])[0, .. Enumerable.Repeat((byte)0xff, 12), 0]));

        _guest.Registers->Rdx = 0x70;
        _guest.Registers->Rsi = FakeGuest.DataStart;
        _guest.Poke(FakeGuest.DataStart, [0x11, 0x22, 0x33]);
        _guest.Registers->Rcx = 3;
        Assert.That(_guest.Execute(c => c.rep.outsb()), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Ports.Read(0x70, 1), Is.EqualTo(0x33));
        _guest.Registers->Rflags |= (ulong)Rflags.Direction;
        Assert.That(_guest.Execute(c => c.insb()), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Peek(FakeGuest.DataStart + 0x100a, 1), Is.EqualTo((byte[])[0x33]));
        Assert.That(_guest.Registers->Rdi, Is.EqualTo(FakeGuest.DataStart + 0x1009));
    }

    [Test]
    public void StringFaultKeepsWhatWasDone()
    {
        _guest.Registers->Rdx = 0x80;
        _guest.Registers->Rdi = FakeGuest.DataEnd - 6;
        _guest.Registers->Rcx = 9;
        Assert.That(
            _guest.Execute(c => c.rep.insd()),
            Is.EqualTo(EmulationResult.PageFault(FakeGuest.DataEnd, PageFaultError.Write | PageFaultError.User)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart));
        Assert.That((_guest.Registers->Rcx, _guest.Registers->Rdi), Is.EqualTo((8UL, FakeGuest.DataEnd - 2)));
        Assert.That(_guest.Peek(FakeGuest.DataEnd - 2, 2), Is.EqualTo((byte[])[0, 0]), "no part of the element that faults");
    }

    [Test]
    public void ReadOnlyDestinationFaultsWithoutSayingThatItIsPresent()
    {
        _guest.Registers->Rdi = FakeGuest.CodeStart;
        Assert.That(
            _guest.Execute(c => c.insb()),
            Is.EqualTo(EmulationResult.PageFault(FakeGuest.CodeStart, PageFaultError.Write | PageFaultError.User)));
        _guest.Registers->Rdi = 0x8000_0000_0000;
        Assert.That(_guest.Execute(c => c.insb()), Is.EqualTo(EmulationResult.GeneralProtection));
    }

    [Test]
    public void LongStringsLeaveRoomForEvents()
    {
        *_guest.KickPending = 1;
        _guest.Registers->Rdx = 0x80;
        _guest.Registers->Rsi = FakeGuest.DataStart;
        _guest.Registers->Rcx = 100;
        Assert.That(_guest.Execute(c => c.rep.outsw()), Is.EqualTo(EmulationResult.Done));
        Assert.That((_guest.Registers->Rcx, _guest.Rip), Is.EqualTo((99UL, FakeGuest.CodeStart)));
        *_guest.KickPending = 0;
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.Done));
        Assert.That((_guest.Registers->Rcx, _guest.Rip), Is.EqualTo((0UL, FakeGuest.CodeStart + 3)));
    }

    [Test]
    public void RepetitionsAreBounded()
    {
        _guest.Registers->Rdx = 0x80;
        _guest.Registers->Rsi = FakeGuest.DataStart;
        _guest.Registers->Rcx = 8000;
        Assert.That(_guest.Execute(c => c.rep.outsb()), Is.EqualTo(EmulationResult.Done));
        Assert.That((_guest.Registers->Rcx, _guest.Rip), Is.EqualTo((8000UL - 4096, FakeGuest.CodeStart)));
    }

    [Test]
    public void SingleStepStopsAfterEachRepetition()
    {
        _guest.Registers->Rdx = 0x80;
        _guest.Registers->Rsi = FakeGuest.DataStart;
        _guest.Registers->Rcx = 2;
        _guest.Registers->Rflags |= (ulong)Rflags.Trap;
        Assert.That(_guest.Execute(c => c.rep.outsb()), Is.EqualTo(EmulationResult.Raise(ExceptionVector.Debug)));
        Assert.That((_guest.Registers->Rcx, _guest.Rip), Is.EqualTo((1UL, FakeGuest.CodeStart)));
    }

    [Test]
    public void NoRepetitionTouchesNothing()
    {
        _guest.Registers->Rcx = 0x1_0000_0000;
        _guest.Registers->Rdi = ulong.MaxValue;
        Assert.That(_guest.Execute(c => c.db(0xf3, 0x67, 0x6c)), Is.EqualTo(EmulationResult.Done));
        Assert.That((_guest.Registers->Rcx, _guest.Registers->Rdi), Is.EqualTo((0UL, 0xffff_ffffUL)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 3));
    }

    [Test]
    public void SegmentOverrideUsesItsBase()
    {
        _guest.Registers->Rdx = 0x70;
        _guest.Segments->GsBase = FakeGuest.DataStart;
        _guest.Registers->Rsi = 4;
        _guest.Poke(FakeGuest.DataStart + 4, [0x5a]);
        Assert.That(_guest.Execute(c => c.db(0x65, 0x6e)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Ports.Read(0x70, 1), Is.EqualTo(0x5a));
    }

    [Test]
    public void CompatibilityModeUsesDescriptors()
    {
        _guest.SetGdt(0, 0x0040_f350_0000_000f);
        _guest.State->KernelMode = 0;
        _guest.State->Iopl = 0x3000;
        *_guest.Segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs32, Ds = 0x0b, Es = FlatSelectors.Ring3Cs32, Ss = 0x0b };
        _guest.Registers->Rdx = 0x70;
        _guest.Registers->Rsi = 0xf;
        _guest.Poke(FakeGuest.DataStart + 0xf, [0x77]);
        Assert.That(_guest.Execute(c => c.db(0x6e)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Ports.Read(0x70, 1), Is.EqualTo(0x77));
        Assert.That(_guest.Execute(c => c.db(0x6e)), Is.EqualTo(EmulationResult.GeneralProtection), "past the limit");
        _guest.Registers->Rsi = 0xd;
        Assert.That(
            _guest.Execute(c => c.db(0x36, 0x6f)),
            Is.EqualTo(EmulationResult.Raise(ExceptionVector.StackFault)), "the last byte is past the limit");
        Assert.That(_guest.Execute(c => c.db(0x6c)), Is.EqualTo(EmulationResult.GeneralProtection), "code cannot be written");
    }

    [Test]
    public void IoBreakpointTrapsAfterTheAccess()
    {
        _guest.State->Cr4 |= 8;
        Assert.That(DebugRegisters.Set(_guest.State, 1, 0x70, out _), Is.EqualTo(Errno.None));
        Assert.That(DebugRegisters.Set(_guest.State, 7, 0x0060_0004, out _), Is.EqualTo(Errno.None));
        Assert.That(_guest.Execute(c => c.@out(0x71, al)), Is.EqualTo(EmulationResult.Raise(ExceptionVector.Debug)), "two bytes wide");
        Assert.That(_guest.State->DebugRegisters[6], Is.EqualTo(0xffff_0ff2));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 2));
        Assert.That(_guest.Execute(c => c.@out(0x72, al)), Is.EqualTo(EmulationResult.Done));
    }
}
