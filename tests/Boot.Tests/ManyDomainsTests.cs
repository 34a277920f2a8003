// Many domains at once: all answer, whatever others of them do to a processor or to each other.

using System.Text;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 70 MB.</summary>
[TestFixture]
[Category("Debian")]
[Category("Long")]
public sealed class ManyDomainsTests : KvmFixture
{
    private const int TinyGuests = 64;
    private const int DebianGuests = 8;
    private const int DebianMemoryMiB = 128;

    private const int ShareIntervals = 5;

    private static readonly TimeSpan s_shareInterval = TimeSpan.FromSeconds(3);

    /// <summary>A guest that answers what is typed, and what it printed.</summary>
    private sealed record Member(RunningDomain Domain, ConsoleLines Console, bool IsDebian) : IAsyncDisposable
    {
        public ValueTask DisposeAsync() => Domain.DisposeAsync();

        /// <summary>Types something and waits for the answer, which is not what was typed.</summary>
        public async Task AskAsync(int question, CancellationToken cancellation)
        {
            (string typed, string answer) = IsDebian
                ? ($"echo =$(({question}+1))=", $"={question + 1}=")
                : ($"q{question}=", $"Q{question}=");
            Assert.That(await Domain.WriteInputAsync(Encoding.ASCII.GetBytes(typed + "\n"), cancellation), Is.True, Domain.Specification.Name);
            await Console.WaitForTextAsync(answer, Domain.Stopped, cancellation);
        }
    }

    [Test]
    public async Task All_answer_while_others_crash_and_spin()
    {
        using var end = new CancellationTokenSource(TimeSpan.FromMinutes(5));
        DomainImage debian = await DebianGuest.ImageAsync(
            DebianKernelFlavour.CloudAmd64, new BusyboxInitramfsOptions { Banner = string.Empty }, reusable: true, end.Token);
        await using var toolstack = new ToolstackContext(Host);
        var all = new List<Member>();
        Member Make(DomainSpecification specification, bool isDebian = false)
        {
            var console = new ConsoleLines();
            var member = new Member(RunningDomain.Create(toolstack, specification, console), console, isDebian);
            all.Add(member);
            return member;
        }

        Member Begin(DomainSpecification specification, bool isDebian = false)
        {
            Member member = Make(specification, isDebian);
            member.Domain.Start();
            return member;
        }

        try
        {
            // These know each other by number, and begin when the others are there.
            (ushort first, ushort second) = (1, 2);
            Member[] storm =
            [
                Make(Guest("storm-1", EventPingPong.BuildFlood(second, isFirst: true))),
                Make(Guest("storm-2", EventPingPong.BuildFlood(first, isFirst: false))),
            ];
            Assert.That(storm.Select(static member => member.Domain.Domain.Id.Value), Is.EqualTo(new[] { first, second }), "what the kernels are built for");

            Member[] members =
            [
                .. Enumerable.Range(0, DebianGuests).Select(i => Begin(
                    new DomainSpecification { Name = $"debian-{i}", Image = debian, MemoryMiB = DebianMemoryMiB, CommandLine = $"console=hvc0 quiet {BusyboxInitramfs.PipedInputParameter}" },
                    isDebian: true)),
                .. Enumerable.Range(0, TinyGuests).Select(i => Begin(Tiny(TinyGuestBehaviour.EchoInput, message: "ready\n") with { Name = $"tiny-{i}" })),
            ];
            await AskAllAsync(members, 1, end.Token);

            // One that ends badly, and as many that never give up a processor as there are processors here.
            DomainExit exit = await Begin(Tiny(TinyGuestBehaviour.UndefinedInstruction)).Domain.Completion.WaitAsync(end.Token);
            Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.Crash));
            string[] spinners = [.. Enumerable.Range(0, Environment.ProcessorCount).Select(i => $"spin-{i}")];
            foreach (string spinner in spinners)
                _ = Begin(Tiny(TinyGuestBehaviour.SpinForever) with { Name = spinner });
            await AskAllAsync(members, 2, end.Token);

            // Two that send events to each other all the time.
            foreach (Member member in storm)
                member.Domain.Start();
            await AskAllAsync(members, 3, end.Token);
            ulong sent = storm.Aggregate(0UL, static (sum, member) => sum + member.Domain.Domain.HypercallCount);
            await ExpectFairShareAsync(members[0], [.. spinners, .. storm.Select(static member => member.Domain.Specification.Name)], end.Token);
            sent = storm.Aggregate(0UL, static (sum, member) => sum + member.Domain.Domain.HypercallCount) - sent;
            TestContext.Out.WriteLine($"{sent} hypercalls of those that send events meanwhile");
            Assert.That(sent, Is.GreaterThan(1_000));
            foreach (Member member in members)
                _ = await member.Domain.WriteInputAsync(member.IsDebian ? "poweroff -f\n"u8.ToArray() : new byte[] { 4 }, end.Token);
            foreach (Member member in members)
            {
                exit = await member.Domain.Completion.WaitAsync(end.Token);
                Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), $"{member.Domain.Specification.Name}: {exit.Report}{member.Console.Text}");
            }
        }
        finally
        {
            foreach (Member member in all)
                await member.DisposeAsync();
        }
    }

    private static DomainSpecification Guest(string name, byte[] kernel)
        => new() { Name = name, MemoryMiB = 16, Image = new DomainImage(KernelImage.Parse(kernel)) };

    private static Task AskAllAsync(IEnumerable<Member> members, int question, CancellationToken cancellation)
        => Task.WhenAll(members.Select(member => member.AskAsync(question, cancellation)));

    /// <summary>A guest that is busy gets as much of the processors as those that spin or send events do, give or take a half.</summary>
    private static async Task ExpectFairShareAsync(Member busy, string[] others, CancellationToken cancellation)
    {
        const string answer = "busy=";
        _ = await busy.Domain.WriteInputAsync("while :; do :; done & echo bu''sy=\n"u8.ToArray(), cancellation);
        _ = await busy.Console.WaitForAsync(answer, busy.Domain.Stopped, cancellation);
        string[] names = [busy.Domain.Specification.Name, .. others];

        // Whose processor is the slower one because of what else the machine does changes: one interval that is fair is enough.
        bool isFair = false;
        for (int interval = 0; interval < ShareIntervals && !isFair; interval++)
        {
            double[] before = [.. names.Select(VcpuThreads.ProcessorTime)];
            await Task.Delay(s_shareInterval, cancellation);
            double[] shares = [.. names.Select((name, i) => VcpuThreads.ProcessorTime(name) - before[i])];
            TestContext.Out.WriteLine($"seconds of {string.Join(", ", names.Zip(shares))}");
            isFair = shares[0] >= shares.Skip(1).Average() / 2;
        }

        Assert.That(isFair, $"at least half of what the others get on average, in one of {ShareIntervals} intervals");
    }
}
