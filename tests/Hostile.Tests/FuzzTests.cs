// A guest that makes random calls about memory: the manager survives it, and its books stay balanced.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Boot.Tests;
using XenSharp.Guests.Fuzz;

namespace XenSharp.Hostile.Tests;

[TestFixture]
public sealed class FuzzTests : KvmFixture
{
    /// <summary>Calls of one seed: the counts are audited after each.</summary>
    private const ulong CallsPerSeed = 25_000;

    private const long MaxGrowth = 32 << 20;

    /// <summary>Of each operation but those that are always refused, one of so many calls in all must succeed at least.</summary>
    private const ulong CallsPerSuccess = 5_000;

    /// <summary>A guest that its own calls take the ground from under is no trouble of the manager's, as long as it is rare.</summary>
    private const ulong CallsPerLostGuest = 2_000_000;

    /// <summary>What Xen has for no such guest, or what is wrong on purpose.</summary>
    private static readonly string[] AlwaysRefused =
    [
        "mmu_update own L1, refused", "mmu_update own upper tables, refused", "mmu_update garbage", "mmuext_op flush_cache", "mmuext_op flush_cache_global",
        "mmuext_op mark_super", "mmuext_op unmark_super", "mmuext_op garbage", "memory_op machphys_mfn_list", "memory_op add_to_physmap",
        "memory_op machine_memory_map", "memory_op remove_from_physmap", "memory_op set_pod_target", "memory_op get_pod_target", "memory_op paging_op",
        "memory_op access_op", "memory_op sharing_op", "memory_op add_to_physmap_batch", "memory_op claim_pages", "memory_op get_vnumainfo",
        "memory_op reserved_device_memory_map", "memory_op acquire_resource", "memory_op garbage",
    ];

    /// <summary>Hypercalls in all; XENSHARP_FUZZ_CALLS asks for others.</summary>
    private static ulong Calls => Number("XENSHARP_FUZZ_CALLS", 1_000_000);

    /// <summary>The first seed, XENSHARP_FUZZ_SEED; those of the next domains follow.</summary>
    private static ulong FirstSeed => Number("XENSHARP_FUZZ_SEED", 1);

    [Test]
    public async Task Random_calls_end_with_balanced_counts()
    {
        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(30 + (Calls / 2_000)));
        var time = Stopwatch.StartNew();
        FuzzFigures figures = FuzzFigures.None;
        long resident = 0;
        int seeds = 0;
        List<string> lost = [];
        for (ulong seed = FirstSeed; figures.Calls < Calls; seed++)
        {
            FuzzRun run = await FuzzRun.RunAsync(Host, seed, Math.Min(CallsPerSeed, Calls), limit.Token);
            if (run.Lost is { } end)
                lost.Add($"Seed {seed}: {end}");

            // Once in some millions of calls what lies in a page by chance is a request that unmaps the guest's own kernel.
            if (run.Trouble is not null || lost.Count > (int)(Calls / CallsPerLostGuest))
            {
                FuzzRun least = await run.NarrowAsync(Host, limit.Token);
                Assert.Fail(
                    $"Seed {seed} goes wrong by call {least.Calls}; XENSHARP_FUZZ_SEED={seed} XENSHARP_FUZZ_CALLS={least.Calls} repeats it. {least.Trouble} {least.Lost}");
            }

            figures = figures.Add(run.Figures);

            // What the first domains leave is the runtime's: compiled code, pools.
            if (++seeds == 8)
                resident = Resident();
        }

        long growth = seeds > 8 ? Resident() - resident : 0;
        await TestContext.Out.WriteLineAsync(
            $"{figures.Calls} calls of {seeds} seeds in {time.Elapsed.TotalSeconds:0} s, {growth >> 10} KiB more resident memory, {lost.Count} guests lost.\n{figures}{string.Join('\n', lost)}");
        Assert.That(growth, Is.LessThan(MaxGrowth));
        if (Calls >= 1_000_000)
            AssertDepth(figures);
    }

    /// <summary>
    /// Every call races against itself on other vCPUs. What comes of it depends on who is faster, so a seed does not repeat itself, and the
    /// guest may be hit by its own doing; the manager may not.
    /// </summary>
    [Test]
    public async Task Random_calls_of_several_vcpus_end_with_balanced_counts([Values(2, 4)] int vcpus)
    {
        ulong calls = Number("XENSHARP_FUZZ_SMP_CALLS", 200_000);
        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(60 + (calls / 500)));
        var time = Stopwatch.StartNew();
        FuzzFigures figures = FuzzFigures.None;
        List<string> lost = [];
        int seeds = 0;
        for (ulong seed = FirstSeed; figures.Calls < calls; seed++, seeds++)
        {
            FuzzRun run = await FuzzRun.RunAsync(Host, seed, CallsPerSeed, limit.Token, vcpus);
            Assert.That(run.Trouble, Is.Null, $"Seed {seed} on {vcpus} vCPUs.");
            if (run.Lost is { } end)
                lost.Add($"Seed {seed}: {end}");
            figures = figures.Add(run.Figures);
            Assert.That(lost, Has.Count.LessThanOrEqualTo(1 + (seeds / 4)), string.Join(Environment.NewLine, lost));
        }

        await TestContext.Out.WriteLineAsync(
            $"{figures.Calls} calls of {seeds} seeds on {vcpus} vCPUs in {time.Elapsed.TotalSeconds:0} s, {lost.Count} guests lost.\n{figures}{string.Join('\n', lost)}");
        Assert.That(figures.Operations.Keys.Except(AlwaysRefused).Where(operation => figures.Successes(operation) == 0), Is.Empty);
    }

    [Test]
    public async Task A_seed_makes_the_same_calls_every_time()
    {
        // What they come to may differ: the manager writes clocks and runstates into the guest's memory when it is time to.
        List<(string Operation, long Calls)[]> made = [];
        for (int i = 0; i < 2; i++)
        {
            FuzzRun run = await FuzzRun.RunAsync(Host, FirstSeed, 3_000, CancellationToken.None);
            Assert.That(run.Trouble ?? run.Lost, Is.Null);
            made.Add([.. run.Figures.Operations.Select(static operation => (operation.Key, operation.Value.Values.Sum()))]);
        }

        Assert.That(made[0], Is.Not.Empty.And.EqualTo(made[1]));
    }

    /// <summary>Whether the calls got anywhere: a fuzz that is refused proves nothing.</summary>
    private static void AssertDepth(FuzzFigures figures)
    {
        Assert.That(AlwaysRefused, Is.SubsetOf(figures.Operations.Keys));
        foreach (string operation in figures.Operations.Keys.Except(AlwaysRefused))
            Assert.That(figures.Successes(operation), Is.GreaterThan((long)(figures.Calls / CallsPerSuccess)), operation);
    }

    private static long Resident()
    {
        GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
        using var process = Process.GetCurrentProcess();
        return process.WorkingSet64;
    }

    private static ulong Number(string variable, ulong otherwise)
        => Environment.GetEnvironmentVariable(variable) is { Length: > 0 } text ? ulong.Parse(text, CultureInfo.InvariantCulture) : otherwise;
}
