// The same operations on the same memory, by the code of this process and by that of the image: nothing may differ but addresses.
using CsCheck;
using XenSharp.Core;
using XenSharp.Mmu;
using XenSharp.Mmu.Tests;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Freestanding.Tests;

/// <summary>100 pairs of machines, 512 steps each, half of them on a VM where stores have to be repeated inside.</summary>
public sealed unsafe class ExecutionTests
{
    private const int Pairs = 100;
    private const int Steps = 512;

    /// <summary>Any number: another one takes other steps.</summary>
    private const uint FirstStream = 7000;

    private HotImage _image = null!;

    [OneTimeSetUp]
    public void Place() => _image = new HotImage(HotImage.FilePath);

    [OneTimeTearDown]
    public void Remove() => _image.Dispose();

    [Test]
    public void Image_does_what_the_manager_does()
    {
        var inside = new CodeInside(_image);
        var outcomes = new Outcomes();
        Gen<(bool, ulong[])> runs = Gen.Select(Gen.Bool, Gen.ULong.Array[Steps]);
        for (uint i = 0; i < Pairs; i++)
        {
            runs.Sample(
                run =>
                {
                    using var pair = new MachinePair(inside, run.Item1, outcomes);
                    foreach (ulong step in run.Item2)
                        pair.Step(step);
                },
                seed: new PCG(FirstStream + i, 0x5eed).ToString(),
                iter: 1,
                threads: 1,
                print: run => $"pair {i}, in-guest stores {run.Item1}");
        }

        // A comparison of refusals alone would be worth little.
        TestContext.Out.WriteLine(outcomes);
        foreach (HotOperation operation in Enum.GetValues<HotOperation>())
        {
            Assert.That(outcomes.Done(operation), Is.GreaterThan(100), $"{operation} that were done");
            if (operation is not HotOperation.StackSwitch)
                Assert.That(outcomes.Refused(operation), Is.GreaterThan(10), $"{operation} that were refused");
        }

        Assert.That(outcomes.Continued, Is.GreaterThan(100), "continuations");
    }
}

/// <summary>How often each operation was done and refused.</summary>
internal sealed class Outcomes
{
    private readonly int[] _done = new int[Enum.GetValues<HotOperation>().Length];
    private readonly int[] _refused = new int[Enum.GetValues<HotOperation>().Length];

    public int Continued { get; set; }

    public int Done(HotOperation operation) => _done[(int)operation];

    public int Refused(HotOperation operation) => _refused[(int)operation];

    public void Note(HotOperation operation, bool done) => (done ? _done : _refused)[(int)operation]++;

    public override string ToString()
        => string.Join(", ", Enum.GetValues<HotOperation>().Select(o => $"{o} {Done(o)}+{Refused(o)}")) + $", continued {Continued}";
}
