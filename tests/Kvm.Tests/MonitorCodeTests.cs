// The gadgets, read back with Iced's decoder.
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Kvm.Tests;

/// <summary>The monitor's code is what its entry addresses promise.</summary>
public sealed class MonitorCodeTests
{
    private const ulong Start = MonitorLayout.MonitorStart + 0x2000;

    private static readonly MonitorCode Code = MonitorCode.Assemble(Start);

    /// <summary>Who is found on such an entry is on the way out, and must be let go on: it is at CPL 0, with registers that only it has.</summary>
    [Test]
    public unsafe void SyscallEntriesThatServeNothingNameThemselvesAndEnd()
    {
        byte[] page = new byte[Paging.PageSize];
        fixed (byte* bytes = page)
        {
            var entry = new SyscallEntry(
                new SyscallEntryKind(Serves: false, FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data), new EntryPages { Entry = Start, KernelEntry = bytes }, 0);
            foreach (ulong address in (ulong[])[entry.Of32BitCode, entry.Of64BitCode])
            {
                Assert.That(Decode(page, Start, address, 2), Is.EqualTo(new[] { "out 0E0h,al", "ud2" }));
                Assert.That(entry.IsLeaving(address), Is.True);
            }

            Assert.That((entry.Serves, entry.Service is null, entry.Switch is null), Is.EqualTo((false, true, true)));
            Assert.That((entry.IsExitOf32BitCode(entry.Of32BitCode + 2), entry.Contains(entry.Of64BitCode + 2)), Is.EqualTo((true, true)));
            Assert.That((entry.IsExitOf32BitCode(entry.Of64BitCode), entry.Contains(entry.Of32BitCode + 2)), Is.EqualTo((false, false)));
        }
    }

    [Test]
    public void EveryExceptionStubNamesItsVector([Range(0, MonitorLayout.Vectors - 1)] int vector)
    {
        ulong stub = Code.ExceptionStubs + (ulong)(vector * MonitorLayout.StubSize);
        Assert.That(Decode(stub, 2), Is.EqualTo(new[] { $"out {Hexadecimal(vector)},al", "ud2" }));
    }

    [Test]
    public void StubsAndSyscallPortAreApart() => Assert.That(MonitorLayout.SyscallPort, Is.GreaterThanOrEqualTo(MonitorLayout.Vectors));

    [Test]
    public void RootIsPoppedAndLoaded() => Assert.That(Decode(Code.LoadRoot, 3), Is.EqualTo(new[] { "pop rcx", "mov cr3,rcx", "ret" }));

    [Test]
    public void ChainEndsInIret() => Assert.That(Decode(Code.RestoreAndIret, 2), Is.EqualTo(new[] { "pop rcx", "iretq" }));

    [Test]
    public void StoresAreAsManyAsAsked()
    {
        for (int count = 0; count <= MonitorCode.MaxStores; count++)
        {
            Assert.That(Decode(Code.Stores(count), (2 * count) + 1), Is.EqualTo(Stores(count).Append("ret")), $"Stores({count})");
            Assert.That(
                Decode(Code.FinalStores(count), (2 * count) + 2), Is.EqualTo(Stores(count).Append("pop rcx").Append("iretq")), $"FinalStores({count})");
        }
    }

    [Test]
    public void RunsAreAsManyAsAsked()
    {
        for (int count = 1; count <= MonitorCode.MaxRuns; count++)
        {
            IEnumerable<string> expected = Enumerable.Repeat<string[]>(["pop rdi", "pop rcx", "mov rsi,rdi", "rep movsq"], count)
                .SelectMany(one => one)
                .Concat(["pop rdi", "pop rsi", "ret"]);
            Assert.That(Decode(Code.Runs(count), (4 * count) + 3), Is.EqualTo(expected), $"Runs({count})");
        }
    }

    [Test]
    public void LockedRunsAreAsManyAsAsked()
    {
        Assert.That(Decode(Code.PopAddress, 2), Is.EqualTo(new[] { "pop rcx", "ret" }));
        for (int count = 0; count <= MonitorCode.MaxLockedRun; count++)
        {
            IEnumerable<string> expected = Enumerable.Range(0, count)
                .Reverse()
                .Select(entry => entry * 8)
                .Select(offset => $"lock or qword ptr [rcx{(offset == 0 ? string.Empty : "+" + Hexadecimal(offset))}],0")
                .Append("ret");
            Assert.That(Decode(Code.LockedRun(count), count + 1), Is.EqualTo(expected), $"LockedRun({count})");
        }
    }

    private static string Hexadecimal(int value)
    {
        string digits = $"{value:X}";
        return value < 10 ? digits : (char.IsLetter(digits[0]) ? "0" : string.Empty) + digits + "h";
    }

    private static IEnumerable<string> Stores(int count)
        => Enumerable.Repeat<string[]>(["pop rcx", "lock or qword ptr [rcx],0"], count).SelectMany(one => one);

    private static List<string> Decode(ulong address, int instructions) => Decode(Code.Bytes, Start, address, instructions);

    private static List<string> Decode(byte[] bytes, ulong start, ulong address, int instructions)
    {
        Assert.That(address, Is.InRange(start, start + (ulong)bytes.Length));
        var decoder = Decoder.Create(64, bytes.AsSpan((int)(address - start)).ToArray(), address);
        var formatter = new MasmFormatter();
        var output = new StringOutput();
        var found = new List<string>();
        for (int i = 0; i < instructions; i++)
        {
            formatter.Format(decoder.Decode(), output);
            found.Add(output.ToStringAndReset());
        }

        return found;
    }
}
