// Two guests of one manager that send each other events in turn: none is lost, and none comes twice.

using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Benchmark;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

[TestFixture]
[CancelAfter(300_000)]
public sealed class EventPingPongTests : KvmFixture
{
    private const int Rounds = 10_000;

    /// <summary>One that is lost would have both wait for ever.</summary>
    [Test]
    [Category("Long")]
    public async Task Each_event_comes_once(CancellationToken cancellation)
    {
        await using var toolstack = new ToolstackContext(Host);
        using var output = new MemoryStream();
        await using RunningDomain first = Create(toolstack, 1, 2, new StreamSink(output));
        await using RunningDomain second = Create(toolstack, 2, 1, null);
        Assert.That((first.Domain.Id.Value, second.Domain.Id.Value), Is.EqualTo(((ushort)1, (ushort)2)), "what the kernels are built for");
        first.Start();
        second.Start();
        foreach (RunningDomain domain in (RunningDomain[])[first, second])
            Assert.That(await domain.Completion.WaitAsync(cancellation), Is.EqualTo(new DomainExit(ShutdownReason.PowerOff)));
        long received = EventPingPong.Received(GuestResults.Find(output.ToArray(), EventPingPong.Marker, EventPingPong.ResultBytes));
        Assert.That(received, Is.EqualTo(1 + (2 * Rounds)));
    }

    private static RunningDomain Create(ToolstackContext toolstack, ushort id, ushort peer, IConsoleSink? sink) => RunningDomain.Create(
        toolstack,
        new DomainSpecification
        {
            Name = $"ping-pong-{id}",
            MemoryMiB = 16,
            Image = new DomainImage(KernelImage.Parse(EventPingPong.Build(peer, isFirst: id < peer, Rounds))),
        },
        sink);
}
