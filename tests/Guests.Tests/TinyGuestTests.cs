// The tiny guest's images: their notes, their code, and what they do on a small interpreter of it.
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using Decoder = Iced.Intel.Decoder;

namespace XenSharp.Guests.Tests;

public class TinyGuestTests
{
    const string Greeting = "Hello from a Xen PV guest on XenSharp\n";

    [Test]
    public void TheNotesAreThoseOfAPvKernelWithoutAHypercallPage()
    {
        ElfReader elf = new(TinyGuest.Build());
        Assert.Multiple(() =>
        {
            Assert.That(elf.XenText(5), Is.EqualTo("xen-3.0"));
            Assert.That(elf.XenText(6), Is.EqualTo("xensharp-tiny"));
            Assert.That(elf.XenText(8), Is.EqualTo("generic"));
            Assert.That(elf.XenText(9), Is.EqualTo("yes"));
            Assert.That(elf.XenNumber(3), Is.EqualTo(0xffffffff80000000));
            Assert.That(elf.XenNumber(4), Is.Zero);
            Assert.That(elf.XenNumber(1), Is.EqualTo(elf.Entry));
            Assert.That(elf.Notes, Does.Not.ContainKey(("Xen", 2u)));
            Assert.That(elf.Loads.Select(s => s.VirtualAddress - s.PhysicalAddress), Is.All.EqualTo(0xffffffff80000000));
            Assert.That(elf.Loads.Select(s => s.VirtualAddress % 4096), Is.All.Zero);
        });
    }

    [Test]
    public void TheCodeDecodesWithoutAnInstructionThatRing3CannotRun([Values] TinyGuestBehaviour behaviour)
    {
        List<Instruction> code = Decode(TinyGuest.Build(new TinyGuestOptions { Behaviour = behaviour }));
        Assert.Multiple(() =>
        {
            Assert.That(code.Select(i => i.Code), Has.None.EqualTo(Code.INVALID));
            Assert.That(code.Where(i => i.IsPrivileged), Is.Empty);
            Assert.That(code.Select(i => i.Mnemonic), Has.Some.EqualTo(Mnemonic.Syscall));
        });
    }

    [TestCase(TinyGuestBehaviour.PowerOff, 0u)]
    [TestCase(TinyGuestBehaviour.Reboot, 1u)]
    [TestCase(TinyGuestBehaviour.Suspend, 2u)]
    [TestCase(TinyGuestBehaviour.Crash, 3u)]
    [TestCase(TinyGuestBehaviour.Watchdog, 4u)]
    [TestCase(TinyGuestBehaviour.SoftReset, 5u)]
    public void ItGreetsAndShutsDown(TinyGuestBehaviour behaviour, uint reason)
    {
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Behaviour = behaviour }));
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.Multiple(() =>
        {
            Assert.That(machine.ShutdownReason, Is.EqualTo(reason));
            Assert.That(machine.Output.ToString(), Is.EqualTo(Greeting));
            Assert.That(machine.Sends, Is.EqualTo(1));
        });
    }

    [Test]
    public void TheHypercallPageServesAsWell()
    {
        byte[] image = TinyGuest.Build(new TinyGuestOptions { HypercallStyle = HypercallStyle.Page });
        Assert.That(Decode(image).Select(i => i.Mnemonic), Has.None.EqualTo(Mnemonic.Syscall));
        Assert.That(new ElfReader(image).XenNumber(2) % 4096, Is.Zero);
        PvMachine machine = new(image);
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.That(machine.Output.ToString(), Is.EqualTo(Greeting));
    }

    [Test]
    public void WithoutAMachphysMappingTheClassicTableIsRead()
    {
        PvMachine machine = new(TinyGuest.Build()) { AnswersMachphysMapping = false };
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.That(machine.Output.ToString(), Is.EqualTo(Greeting));
    }

    [Test]
    public void TheInitialDomainPrintsThroughTheHypervisor()
    {
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Message = "dom0\n" })) { InitialDomain = true };
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.Multiple(() =>
        {
            Assert.That(machine.Output.ToString(), Is.EqualTo("dom0\n"));
            Assert.That(machine.Sends, Is.Zero);
        });
    }

    [TestCase(0L)]
    [TestCase(1L)]
    [TestCase(511L)]
    [TestCase(512L)]
    [TestCase(100_001L)]
    public void TheFloodWaitsForRoomAndLosesNothing(long bytes)
    {
        PvMachine machine = new(TinyGuest.Build(
            new TinyGuestOptions { Message = "", Behaviour = TinyGuestBehaviour.ConsoleFlood, FloodBytes = bytes }))
        {
            RingIndexes = uint.MaxValue - 3000,
            DrainPerYield = 333,
        };
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        StringBuilder expected = new();
        for (long i = 0; i < bytes; i++)
            expected.Append((char)TinyGuest.FloodByte(i));
        Assert.That(machine.Output.ToString(), Is.EqualTo(expected.ToString()));
        if (bytes > 2048)
            Assert.That(machine.Yields, Is.GreaterThan(100), "the ring was full more than once");
    }

    [Test]
    public void FloodBytesArePrintableLines()
    {
        byte[] flood = [.. Enumerable.Range(0, 20_000).Select(i => TinyGuest.FloodByte(i))];
        Assert.That(flood.Where(b => b != '\n'), Is.All.InRange((byte)'!', (byte)'~'));
        Assert.That(Encoding.ASCII.GetString(flood).Split('\n')[..^1].Select(line => line.Length), Is.All.EqualTo(63));
        Assert.That(TinyGuest.FloodByte(0), Is.Not.EqualTo(TinyGuest.FloodByte(64)), "lines differ");
    }

    [TestCase(1)]
    [TestCase(7)]
    [TestCase(1024)]
    public void TheEchoUppercasesUntilEndOfTransmission(int burst)
    {
        string text = string.Concat(Enumerable.Repeat("Hello, `az{ AZ 09\r\n", 200));
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Message = "", Behaviour = TinyGuestBehaviour.EchoInput }))
        {
            InputBurst = burst,
            RingIndexes = uint.MaxValue - 100,
        };
        foreach (byte b in Encoding.ASCII.GetBytes(text + "\u0004after"))
            machine.Input.Enqueue(b);
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.Multiple(() =>
        {
            Assert.That(machine.ShutdownReason, Is.Zero);
            Assert.That(machine.Output.ToString(), Is.EqualTo(text.ToUpperInvariant()));
        });
    }

    [Test]
    public void AnUndefinedInstructionStopsItAfterTheGreeting()
    {
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.UndefinedInstruction }));
        Assert.Multiple(() =>
        {
            Assert.That(machine.Run(), Is.EqualTo(PvStop.UndefinedInstruction));
            Assert.That(machine.Sends, Is.EqualTo(1));
        });
    }

    [Test]
    public void SpinningMakesNoHypercall()
    {
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.SpinForever }));
        Assert.That(machine.Run(100_000), Is.EqualTo(PvStop.OutOfSteps));
        Assert.That((machine.Sends, machine.Yields), Is.EqualTo((1, 0)));
    }

    [TestCase(TinyGuestBehaviour.JumpTo)]
    [TestCase(TinyGuestBehaviour.ReadFrom)]
    [TestCase(TinyGuestBehaviour.WriteTo)]
    public void ForbiddenAccessesGoToTheGivenAddress(TinyGuestBehaviour behaviour)
    {
        PvMachine machine = new(TinyGuest.Build(new TinyGuestOptions { Behaviour = behaviour, Address = 0xffff87fffffff000 }));
        Assert.That(machine.Run(), Is.EqualTo(PvStop.PageFault));
        Assert.That(machine.FaultAddress, Is.EqualTo(0xffff87fffffff000));
    }

    [TestCase(TinyGuestBehaviour.ReadFrom)]
    [TestCase(TinyGuestBehaviour.WriteTo)]
    public void AnAccessThatWorksIsTold(TinyGuestBehaviour behaviour)
    {
        PvMachine machine = new(TinyGuest.Build(
            new TinyGuestOptions { Message = "", Behaviour = behaviour, Address = 0xffffffff80000000 }));
        Assert.That(machine.Run(), Is.EqualTo(PvStop.Shutdown));
        Assert.That(machine.Output.ToString(), Is.EqualTo("Survived\n"));
    }

    [Test]
    public void SenselessOptionsAreRefused() => Assert.Multiple(() =>
    {
        Assert.That(() => TinyGuest.Build(new TinyGuestOptions { Message = "Grüße" }), Throws.ArgumentException);
        Assert.That(() => TinyGuest.Build(new TinyGuestOptions { FloodBytes = -1 }), Throws.ArgumentException);
        Assert.That(() => TinyGuest.Build(new TinyGuestOptions { Behaviour = (TinyGuestBehaviour)99 }), Throws.ArgumentException);
    });

    [Test]
    public void CodeThatCannotBeEncodedIsExplained()
    {
        PvAssembler guest = new();
        guest.Code.jmp(guest.Code.CreateLabel());
        Assert.That(() => guest.Build(new GuestIdentity("broken")),
            Throws.InvalidOperationException.With.Message.Contains("broken"));
    }

    [Test]
    public void DataIsAlignedAndInItsPlace()
    {
        PvAssembler guest = new();
        guest.Define([1]);
        ulong page = guest.Reserve(10, 4096);
        ulong text = guest.Define("abc"u8, 1);
        guest.Code.ud2();
        ElfLoad data = new ElfReader(guest.Build(new GuestIdentity("data"))).Loads[0];
        Assert.Multiple(() =>
        {
            Assert.That(page % 4096, Is.Zero);
            Assert.That(text, Is.EqualTo(page + 10));
            Assert.That(data.Contents.AsSpan((int)(text - data.VirtualAddress)).ToArray(), Is.EqualTo("abc"u8.ToArray()));
            Assert.That(() => guest.Reserve(1, 3), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That(() => guest.Reserve(1, 8192), Throws.InstanceOf<ArgumentOutOfRangeException>());
        });
    }

    static List<Instruction> Decode(byte[] image)
    {
        ElfLoad text = new ElfReader(image).Loads.Single(s => s.Flags == 5);
        Decoder decoder = Decoder.Create(64, text.Contents, text.VirtualAddress);
        List<Instruction> instructions = [];
        while (decoder.IP < text.VirtualAddress + (ulong)text.Contents.Length)
            instructions.Add(decoder.Decode());
        return instructions;
    }
}
