using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>Whatever a guest executes in whatever state: no exception of ours, and no change where none was promised.</summary>
public sealed unsafe class EmulatorFuzzTests
{
    private const int Rounds = 100_000;

    // Beginnings that reach the emulator's branches more often than chance does.
    private static readonly byte[][] s_beginnings =
    [
        [0x0f, 0x20], [0x0f, 0x21], [0x0f, 0x22], [0x0f, 0x23], [0x0f, 0x30], [0x0f, 0x32], [0x0f, 0x31], [0x0f, 0xa2], [0x0f, 0x06],
        [0x0f, 0x09], [0x0f, 0x01, 0xd1], [0x0f, 0x01, 0xf9], [0xe4], [0xe5], [0xe6], [0xe7], [0xec], [0xed], [0xee], [0xef], [0x6c],
        [0x6d], [0x6e], [0x6f], [0xf3, 0x6c], [0xf3, 0x6f], [0xf2, 0x6d], [0x66, 0xf3, 0x6d], [0x67, 0x6e], [0xfa], [0xfb], [0x8e],
        [0x66, 0x8e], [0x48, 0x8e], [0xcd], [0x0f, 0x0b], [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2], [0x44, 0x0f, 0x20], [0x65, 0x6f], [0x0f, 0x05],
        [0x0f, 0x34], [],
    ];

    [TestCase(1)]
    [TestCase(2)]
    public void AnyInstructionInAnyState(int seed)
    {
        var random = new Random(seed);
        using var guest = new FakeGuest();
        guest.SetGdt(0, 0x00cf_fb00_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff, ulong.MaxValue, 0x0000_fb00_0000_ffff);
        Span<byte> bytes = stackalloc byte[15];
        int[] outcomes = new int[Enum.GetValues<EmulationOutcome>().Length];
        for (int round = 0; round < Rounds; round++)
        {
            guest.Reset();
            Randomise(guest, random);
            random.NextBytes(bytes);
            byte[] beginning = s_beginnings[random.Next(s_beginnings.Length)];
            beginning.CopyTo(bytes);
            ulong rip = FakeGuest.CodeStart + (random.Next(8) == 0 ? (ulong)random.Next(4080, 4096) : (ulong)random.Next(4080));
            guest.Poke(rip, bytes[..(int)Math.Min(15, FakeGuest.CodeStart + Paging.PageSize - rip)]);
            guest.Registers->Rip = random.Next(200) == 0 ? Any(random) : rip;
            CpuRegisters registers = *guest.Registers;
            SegmentRegisters segments = *guest.Segments;
            VcpuState state = *guest.State;
            VcpuInfo info = *guest.Info;

            uint error = random.Next(4) == 0 ? (uint)random.Next(0x10000) : 0;
            EmulationResult result = random.Next(8) switch
            {
                0 => guest.Emulator.InvalidOpcode(),
                1 => guest.Emulator.GuestIo(),
                _ => guest.Emulator.GeneralProtection(error),
            };

            outcomes[(int)result.Outcome]++;
            string what = $"seed {seed}, round {round}: {Convert.ToHexString(bytes)} at {registers.Rip:x} gives {result}";
            if (result.Outcome is EmulationOutcome.Done or EmulationOutcome.SystemCall or EmulationOutcome.SystemEnter
                || result is { Outcome: EmulationOutcome.Exception, Vector: ExceptionVector.Debug })
            {
                continue;
            }


            // A software interrupt has moved RIP; a string instruction that faults has done its first part.
            bool isString = result.Outcome == EmulationOutcome.Exception && IsString(bytes, guest.Segments->Cs);
            if (result.IsSoftwareInterrupt)
                registers.Rip = guest.Rip;
            if (isString)
                (registers.Rcx, registers.Rsi, registers.Rdi) = (guest.Registers->Rcx, guest.Registers->Rsi, guest.Registers->Rdi);
            if (!Same(&registers, guest.Registers) || !Same(&segments, guest.Segments) || !Same(&state, guest.State)
                || !Same(&info, guest.Info) || guest.Calls.Count(call => !call.StartsWith("CR3") && !call.StartsWith("PAGE")) != 0)
                Assert.Fail(what);
        }

        foreach (EmulationOutcome outcome in (EmulationOutcome[])[EmulationOutcome.Done, EmulationOutcome.Exception, EmulationOutcome.NotHandled])
            Assert.That(outcomes[(int)outcome], Is.GreaterThan(Rounds / 20), $"{outcome} was met often");

        // The processor is Intel's: it has SYSENTER, and no SYSCALL outside 64-bit code.
        Assert.That(outcomes[(int)EmulationOutcome.SystemEnter], Is.GreaterThan(Rounds / 200));
        Assert.That(outcomes[(int)EmulationOutcome.SystemCall], Is.Zero);
    }

    private static void Randomise(FakeGuest guest, Random random)
    {
        var values = new Span<ulong>(guest.Registers, sizeof(CpuRegisters) / sizeof(ulong));
        for (int i = 0; i < 16; i++)
            values[i] = Any(random);
        guest.Registers->Rflags = 0x202 | ((ulong)random.Next() & (ulong)(Rflags.Trap | Rflags.Direction | Rflags.Resume | Rflags.Carry));
        guest.Segments->Cs = random.Next(6) switch
        {
            0 => FlatSelectors.Ring3Cs32,
            1 => (ushort)random.Next(0x40),
            _ => FlatSelectors.Ring3Cs64,
        };
        guest.Segments->Ds = (ushort)random.Next(0x40);
        guest.Segments->Es = FlatSelectors.Ring3Data;
        guest.Segments->FsBase = Any(random);
        guest.State->KernelMode = random.Next(4) == 0 ? 0 : 1;
        guest.State->Iopl = (ulong)random.Next(4) << 12;
        guest.State->IoBitmap = Any(random);
        guest.State->IoBitmapPorts = (uint)random.Next(65537);
        guest.State->Cr4 = random.Next(2) == 0 ? 0x5_066cUL : 0x660;
        guest.State->DebugRegisters[random.Next(4)] = (ulong)random.Next(0x100);
        guest.State->DebugRegisters[7] = random.Next(4) == 0 ? (uint)random.Next() : 0x400u;
        guest.State->Traps[random.Next(256)].Flags = (byte)random.Next(8);
        guest.RootAnswer = (Errno)random.Next(3);
    }

    // Small numbers, port numbers, MSR numbers, addresses at and around what is mapped, and noise.
    private static ulong Any(Random random) => random.Next(7) switch
    {
        0 => (ulong)random.Next(16),
        1 => (ulong)random.Next(0x10000),
        2 => 0xc000_0080 + (ulong)random.Next(0x90),
        3 => FakeGuest.DataStart + (ulong)random.Next(0x2010),
        4 => FlatSelectors.Ring3Data,
        5 => FakeGuest.CodeStart + (ulong)random.Next(0x1000),
        _ => (ulong)random.NextInt64(long.MinValue, long.MaxValue),
    };

    private static bool IsString(ReadOnlySpan<byte> bytes, ushort cs)
    {
        // The mode does not matter for telling these apart: REX prefixes, which only 64-bit code has, do not turn others into them.
        foreach (int bitness in (int[])[cs == FlatSelectors.Ring3Cs64 ? 64 : 32, 64, 16])
        {
            if (Decoder.Create(bitness, bytes.ToArray()).Decode().IsStringInstruction)
                return true;
        }

        return false;
    }

    private static bool Same<T>(T* first, T* second)
        where T : unmanaged
        => MemoryMarshal.AsBytes(new ReadOnlySpan<T>(first, 1)).SequenceEqual(MemoryMarshal.AsBytes(new ReadOnlySpan<T>(second, 1)));
}
