// How scripts are handed to beds.
using System.Runtime.CompilerServices;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Comparison;

namespace XenSharp.Oracle.Tests;

[TestFixture]
public sealed class ScriptRunTests
{
    /// <summary>The images of all guests together take hundreds of megabytes: a bed that need not have them all at once gets a script's at a time.</summary>
    [TestCase(true, new[] { 1, 2, 1 })]
    [TestCase(false, new[] { 4 })]
    public async Task A_bed_is_given_as_many_guests_as_it_needs_at_once(bool oneByOne, int[] turns)
    {
        AbiScript[] all = [.. AbiScripts.Create()];
        AbiScript[] alone = [.. all.Where(static script => !script.IsPair).Take(2)];
        AbiScript[] scripts = [alone[0], all.First(static script => script.IsPair), alone[1]];
        var bed = new CountingBed(oneByOne);
        List<string> done = [];
        await foreach (ScriptRun run in ScriptRun.RunAsync(bed, scripts))
        {
            done.Add(run.Script.Name);
            Assert.That(run.Runs, Has.Count.EqualTo(run.Script.IsPair ? 2 : 1));
        }

        Assert.That(done, Is.EqualTo(scripts.Select(static script => script.Name)));
        Assert.That(bed.Turns, Is.EqualTo(turns));
    }

    private sealed class CountingBed(bool oneByOne) : IGuestBed
    {
        public string Name => "none";

        public bool TakesOneByOne => oneByOne;

        internal List<int> Turns { get; } = [];

        public async IAsyncEnumerable<GuestRun> RunAsync(
            IReadOnlyList<BedGuest> guests, [EnumeratorCancellation] CancellationToken cancellation = default)
        {
            Turns.Add(guests.Count);
            foreach (BedGuest guest in guests)
            {
                await Task.Yield();
                yield return new GuestRun(guest.Name, "", GuestEnding.PowerOff, "");
            }
        }
    }
}
