// Domains come and go in one process by the hundred, and nothing of them stays.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Boot.Tests;

namespace XenSharp.Hostile.Tests;

[TestFixture]
public sealed class RemainsTests : KvmFixture
{
    /// <summary>What the first domains leave is the runtime's: compiled code, pools, threads.</summary>
    private const int Before = 100;
    private const int Domains = 300;
    private const ulong Calls = 100;

    /// <summary>Seconds in which a pool gives up the threads that it has no use for, several times over.</summary>
    private const int Settling = 90;

    /// <summary>Less than a KiB a domain: one object graph that were kept would be more.</summary>
    private const long MaxManagedGrowth = Domains * 1000;

    /// <summary>Compiled code still grows a little; the least that a domain has is 20 KiB of the manager's own memory.</summary>
    private const long MaxResidentGrowth = 6 << 20;

    [Test]
    public async Task Domains_that_are_gone_leave_nothing()
    {
        for (int i = 0; i < Before; i++)
            await RunAsync(i);
        Remains before = Remains.Measure();
        for (int i = 0; i < Domains; i++)
            await RunAsync(i);

        // On a busy machine the thread pool has more threads for a while than before, with stacks and memory of their own.
        Remains after = Remains.Measure();
        for (int i = 0; i < Settling && !IsNoMore(after); i++)
        {
            await Task.Delay(1000);
            after = Remains.Measure();
        }

        await TestContext.Out.WriteLineAsync($"before: {before}\nafter:  {after}\n{after.Difference(before)}");
        Assert.That(after.Files, Is.LessThanOrEqualTo(before.Files + 2));
        Assert.That(after.Threads, Is.LessThanOrEqualTo(before.Threads + 4));
        Assert.That(after.Mappings, Is.LessThanOrEqualTo(before.Mappings + (Domains / 3)));
        Assert.That(after.Managed - before.Managed, Is.LessThan(MaxManagedGrowth));
        Assert.That(after.Resident - before.Resident, Is.LessThan(MaxResidentGrowth));

        bool IsNoMore(Remains now) => now.Files <= before.Files + 2 && now.Threads <= before.Threads + 4 && now.Mappings <= before.Mappings + (Domains / 3)
            && now.Managed - before.Managed < MaxManagedGrowth && now.Resident - before.Resident < MaxResidentGrowth;
    }

    private async Task RunAsync(int seed)
    {
        FuzzRun run = await FuzzRun.RunAsync(Host, (ulong)seed + 1, Calls, CancellationToken.None, 1 + (seed % 2));
        Assert.That(run.Trouble, Is.Null);
    }

    /// <summary>What a process holds.</summary>
    /// <param name="Files">Open files.</param>
    /// <param name="Threads">Its threads.</param>
    /// <param name="Mappings">Mappings of its address space.</param>
    /// <param name="Managed">Bytes of live objects.</param>
    /// <param name="Resident">Bytes of memory that are not a file's.</param>
    /// <param name="ByName">KiB of resident memory by the name of what is mapped.</param>
    private sealed record Remains(int Files, int Threads, int Mappings, long Managed, long Resident, IReadOnlyDictionary<string, long> ByName)
    {
        public static Remains Measure()
        {
            for (int i = 0; i < 2; i++)
            {
                GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
                GC.WaitForPendingFinalizers();
            }

            Dictionary<string, long> byName = [];
            int mappings = 0;
            string name = string.Empty;
            foreach (string line in File.ReadLines("/proc/self/smaps"))
            {
                string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
                if (!words[0].EndsWith(':'))
                {
                    mappings++;
                    name = words.Length > 5 ? words[5] : "anonymous";
                }
                else if (words[0] == "Rss:")
                {
                    byName[name] = byName.GetValueOrDefault(name) + long.Parse(words[1], CultureInfo.InvariantCulture);
                }
            }

            using var process = Process.GetCurrentProcess();
            long resident = byName.Where(static mapping => mapping.Key == "anonymous" || mapping.Key[0] == '[').Sum(static mapping => mapping.Value) << 10;
            return new Remains(
                Directory.GetFileSystemEntries("/proc/self/fd").Length, process.Threads.Count, mappings, GC.GetTotalMemory(true), resident, byName);
        }

        /// <summary>Where more memory is resident than before, or less.</summary>
        public string Difference(Remains before) => string.Join(
            '\n',
            ByName.Keys.Union(before.ByName.Keys)
                .Select(name => (Name: name, KiB: ByName.GetValueOrDefault(name) - before.ByName.GetValueOrDefault(name)))
                .Where(static change => Math.Abs(change.KiB) >= 64)
                .OrderByDescending(static change => change.KiB)
                .Select(static change => $"{change.KiB,8} KiB {change.Name}"));

        public override string ToString()
            => $"{Files} files, {Threads} threads, {Mappings} mappings, {Managed >> 10} KiB managed, {Resident >> 10} KiB resident";
    }
}
