// Two guests that make random calls about each other: grants and event channels, until both end or one is killed.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Boot.Tests;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fuzz;
using XenSharp.Toolstack;

namespace XenSharp.Hostile.Tests;

[TestFixture]
public sealed class FuzzPairTests : KvmFixture
{
    private const ulong CallsPerSeed = 20_000;
    private const ulong Rounds = 8;

    /// <summary>Hypercalls in all of each kind of pair; XENSHARP_FUZZ_PAIR_CALLS asks for others.</summary>
    private static readonly ulong s_calls = ulong.Parse(
        Environment.GetEnvironmentVariable("XENSHARP_FUZZ_PAIR_CALLS") is { Length: > 0 } text ? text : "200000", CultureInfo.InvariantCulture);

    /// <summary>Of a domain without a toolstack's rights none of these succeeds, or only by luck.</summary>
    private static readonly string[] s_seldom = ["grant_table_op garbage"];

    [Test]
    public async Task Random_calls_about_each_other_end_with_balanced_counts([Values(1, 2)] int vcpus)
    {
        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(60 + (s_calls / 500)));
        var time = Stopwatch.StartNew();
        FuzzFigures figures = FuzzFigures.None;
        List<string> lost = [];
        int pairs = 0;
        int mapped = 0;
        for (ulong seed = 1; figures.Calls < s_calls; seed += 2, pairs++)
        {
            await using var toolstack = new ToolstackContext(Host);
            FuzzPeer[] peers = [new(toolstack, seed, CallsPerSeed, vcpus), new(toolstack, seed + 1, CallsPerSeed, vcpus)];
            Task<string?>[] ends = [.. peers.Select(peer => peer.RunAsync(limit.Token))];
            string?[] troubles = await Task.WhenAll(ends);
            Assert.That(troubles, Is.All.Null, $"Seed {seed} on {vcpus} vCPUs.");
            foreach (FuzzPeer peer in peers)
            {
                Assert.That(peer.Domain.Domain.AuditFrames(), Is.Null, $"Seed {seed} on {vcpus} vCPUs, domain {peer.Domain.Domain.Id.Value}.");
                if (peer.Lost is { } end)
                    lost.Add($"Seed {seed}: {end}");
                figures = figures.Add(peer.Figures);
                mapped += peer.Domain.Domain.ForeignPages;
            }

            // What the first had mapped is let go; what it had granted stays, until the second goes.
            await peers[0].DisposeAsync();
            Assert.That(peers[1].Domain.Domain.AuditFrames(), Is.Null, $"Seed {seed} on {vcpus} vCPUs, when the other is gone.");
            await peers[1].DisposeAsync();
            Assert.That(toolstack.Domains.Domains, Is.Empty);
            Assert.That(lost, Has.Count.LessThanOrEqualTo(1 + (pairs / 4)), string.Join(Environment.NewLine, lost));
        }

        await TestContext.Out.WriteLineAsync(
            $"{figures.Calls} calls of {pairs} pairs on {vcpus} vCPUs each in {time.Elapsed.TotalSeconds:0} s, {mapped} pages mapped in the end, {lost.Count} guests lost.\n{figures}{string.Join('\n', lost)}");
        IEnumerable<string> between = figures.Operations.Keys.Where(static name => name.StartsWith("grant_table_op", StringComparison.Ordinal)
            || name.StartsWith("event_channel_op", StringComparison.Ordinal));
        Assert.That(mapped, Is.Positive);
        Assert.That(between.Except(s_seldom).Where(operation => figures.Successes(operation) == 0), Is.Empty);
    }

    [Test]
    public async Task A_domain_that_is_killed_in_the_middle_leaves_its_peers_books_balanced([Values(1, 2)] int vcpus)
    {
        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(120));
        var random = new Random(vcpus);
        for (ulong round = 1; round <= Rounds; round++)
        {
            await using var toolstack = new ToolstackContext(Host);
            var survivor = new FuzzPeer(toolstack, round, CallsPerSeed / 2, vcpus);
            var victim = new FuzzPeer(toolstack, round + 100, ulong.MaxValue / 2, vcpus);
            Task<string?> end = survivor.RunAsync(limit.Token);
            Task<string?> killed = victim.RunAsync(limit.Token);
            _ = await Task.WhenAny(end, Task.Delay(random.Next(50, 800)));
            victim.Domain.Destroy();
            Assert.That(await killed, Is.Null, $"Round {round} on {vcpus} vCPUs.");
            await victim.DisposeAsync();

            // It comes back, with the same number.
            var again = new FuzzPeer(toolstack, round + 200, 2_000, vcpus);
            Task<string?> endOfAgain = again.RunAsync(limit.Token);
            Assert.That((await end, await endOfAgain), Is.EqualTo(((string?)null, (string?)null)), $"Round {round} on {vcpus} vCPUs.");
            Assert.That(survivor.Domain.Domain.AuditFrames(), Is.Null, $"Round {round} on {vcpus} vCPUs.");
            Assert.That(again.Domain.Domain.AuditFrames(), Is.Null, $"Round {round} on {vcpus} vCPUs.");
            await survivor.DisposeAsync();
            await again.DisposeAsync();
            Assert.That(toolstack.Domains.Domains, Is.Empty);
        }
    }

    /// <summary>One of two.</summary>
    private sealed class FuzzPeer : IAsyncDisposable
    {
        private readonly MemoryStream _output = new();
        private readonly int _vcpus;

        public FuzzPeer(ToolstackContext toolstack, ulong seed, ulong calls, int vcpus)
        {
            _vcpus = vcpus;
            var specification = new DomainSpecification
            {
                Name = $"fuzz-{seed}",
                MemoryMiB = FuzzRun.MemoryMiB,
                Vcpus = FuzzGuest.DomainVcpus(vcpus),
                Image = new DomainImage(KernelImage.Parse(FuzzGuest.Build(seed, calls, vcpus, hasPeer: true))),
            };
            Domain = RunningDomain.Create(toolstack, specification, new StreamSink(_output));
        }

        public RunningDomain Domain { get; }

        public FuzzFigures Figures => FuzzGuest.Read(_output.ToArray(), _vcpus, hasPeer: true) ?? FuzzFigures.None;

        /// <summary>How the guest ended, where it did not end by itself.</summary>
        public string? Lost { get; private set; }

        /// <summary>Runs the guest to its end.</summary>
        /// <returns>What is wrong with the manager; null when nothing is.</returns>
        public async Task<string?> RunAsync(CancellationToken cancellation)
        {
            Domain.Start();
            string? hang = await FuzzRun.WatchAsync(Domain, cancellation);
            if (hang != null)
            {
                Domain.Domain.Crash(hang);
                return await Task.WhenAny(Domain.Completion, Task.Delay(FuzzRun.Patience, CancellationToken.None)) == Domain.Completion
                    ? hang : $"A thread of the manager hangs. {hang}";
            }

            DomainExit exit = await Domain.Completion;
            Lost = exit.Reason != ShutdownReason.PowerOff ? $"The guest ended by {exit.Reason}. {exit.Report}" : null;
            return exit.Report is { } report && FuzzRun.IsOurs(report) ? report : null;
        }

        public async ValueTask DisposeAsync()
        {
            await Domain.DisposeAsync();
            await _output.DisposeAsync();
        }
    }
}
