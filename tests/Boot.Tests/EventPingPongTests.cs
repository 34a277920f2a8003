// Events between guests of one manager, and between a guest and a back end in it: none is lost, none comes twice, none overtakes another.

using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Grants;
using XenSharp.EventChannels;
using XenSharp.Guests.Benchmark;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Each test sends <see cref="Variable"/> events, or some thousands where that is not set.</summary>
[TestFixture]
[Category("Long")]
public sealed class EventPingPongTests : KvmFixture
{
    /// <summary>The environment variable with the number of events that each test sends.</summary>
    private const string Variable = "XENSHARP_EVENTS";

    private const int Ports = 4;
    private const ushort First = 1, Second = 2;

    private static readonly int s_waits = Enum.GetValues<PingPongWait>().Length;

    /// <summary>One event that is lost would have its end wait for ever.</summary>
    [Test]
    public async Task Each_event_comes_once()
    {
        int events = Durations.Number(Variable, 40_000);
        int rounds = events / 2 / s_waits;
        using CancellationTokenSource end = Patience(events);
        await using var toolstack = new ToolstackContext(Host);
        using var output = new MemoryStream();
        await using RunningDomain first = Create(toolstack, First, EventPingPong.Build(Second, isFirst: true, rounds), output);
        await using RunningDomain second = Create(toolstack, Second, EventPingPong.Build(First, isFirst: false, rounds), null);
        first.Start();
        second.Start();
        await ExpectPowerOffAsync(first, end.Token);
        await ExpectPowerOffAsync(second, end.Token);
        long received = EventPingPong.Received(GuestResults.Find(output.ToArray(), EventPingPong.Marker, EventPingPong.ResultBytes));
        Assert.That(received, Is.EqualTo(1 + (s_waits * rounds)));
    }

    [Test]
    public async Task Events_of_several_ports_come_in_order_from_another_guest()
    {
        int events = Durations.Number(Variable, 20_000);
        int rounds = events / 2 / Ports;
        using CancellationTokenSource end = Patience(events);
        await using var toolstack = new ToolstackContext(Host);
        using var offered = new MemoryStream();
        using var taken = new MemoryStream();
        await using RunningDomain offering = Create(toolstack, First, EventExchange.BuildOffering(Second, Ports, rounds), offered);
        await using RunningDomain taking = Create(toolstack, Second, EventExchange.BuildTaking(First, Ports, rounds), taken);
        offering.Start();
        taking.Start();
        await ExpectPowerOffAsync(offering, end.Token);
        await ExpectPowerOffAsync(taking, end.Token);
        var expected = new EventExchangeFigures(Ports * rounds, Doubled: 0, Lost: 0);
        Assert.That((EventExchange.Find(offered.ToArray()), EventExchange.Find(taken.ToArray())), Is.EqualTo((expected, expected)));
    }

    [Test]
    public async Task Events_of_several_ports_come_in_order_from_a_back_end()
    {
        int events = Durations.Number(Variable, 20_000);
        int rounds = events / 2 / Ports;
        using CancellationTokenSource end = Patience(events);
        using var output = new MemoryStream();
        await using RunningDomain running = RunningDomain.Create(
            Host, Specification("exchange", EventExchange.BuildOffering(peer: 0, Ports, rounds)), new StreamSink(output));
        running.Start();
        var backends = new EventChannelBackend[Ports];
        for (int i = 0; i < Ports; i++)
        {
            EventChannelBackend? backend;
            while (!running.Domain.TryConnect((uint)(EventExchange.FirstPort + i), out backend))
                await Task.Delay(1, end.Token);
            backends[i] = backend;
        }

        GrantStatus status = running.Domain.Granted.TryMap(EventExchange.Reference, writable: true, out MappedGrant? page);
        Assert.That(status, Is.EqualTo(GrantStatus.Okay));
        using (page)
        {
            EventExchangeFigures[] seen = await Task.WhenAll(
                backends.Select((backend, port) => Task.Run(() => ExchangeAsync(backend, page!, port, rounds, end.Token))));
            Assert.That(seen, Is.All.EqualTo(new EventExchangeFigures(rounds, Doubled: 0, Lost: 0)));
        }

        await ExpectPowerOffAsync(running, end.Token);
        Assert.That(EventExchange.Find(output.ToArray()), Is.EqualTo(new EventExchangeFigures(Ports * rounds, Doubled: 0, Lost: 0)));
        await running.DisposeAsync();
        foreach (EventChannelBackend backend in backends)
            Assert.That(await backend.WaitAsync(end.Token), Is.False, "no event came behind the last");
    }

    /// <summary>Takes the offer of a port, as <see cref="EventExchange"/> describes it.</summary>
    private static async Task<EventExchangeFigures> ExchangeAsync(
        EventChannelBackend backend, MappedGrant page, int port, int rounds, CancellationToken cancellation)
    {
        var seen = default(EventExchangeFigures);
        long last = 0;

        // To be connected counts as an event.
        _ = await backend.WaitAsync(cancellation);
        Volatile.Write(ref Number(page, port, EventExchange.TakenNumber), 1);
        backend.Notify();
        while (last < rounds)
        {
            if (!await backend.WaitAsync(cancellation))
                throw new InvalidOperationException($"The channel of port {port} ended after {last} of {rounds} events.");
            long number = Volatile.Read(ref Number(page, port, EventExchange.OfferedNumber));
            if (number == last)
            {
                seen = seen with { Doubled = seen.Doubled + 1 };
                continue;
            }

            seen = seen with { Received = seen.Received + 1, Lost = seen.Lost + (number - last - 1) };
            last = number;
            if (number == rounds)
                break;
            Volatile.Write(ref Number(page, port, EventExchange.TakenNumber), number + 1);
            backend.Notify();
        }

        return seen;
    }

    private static ref long Number(MappedGrant page, int port, int whose)
        => ref MemoryMarshal.AsRef<long>(page.Span.Slice((port * EventExchange.Stride) + whose, sizeof(long)));

    /// <summary>Generous: what hangs is to be told from what is slow on a busy host.</summary>
    private static CancellationTokenSource Patience(int events) => new(TimeSpan.FromSeconds(300) + TimeSpan.FromMilliseconds(events));

    private static RunningDomain Create(ToolstackContext toolstack, ushort id, byte[] kernel, MemoryStream? output)
    {
        RunningDomain domain = RunningDomain.Create(toolstack, Specification($"peer-{id}", kernel), output == null ? null : new StreamSink(output));
        Assert.That(domain.Domain.Id.Value, Is.EqualTo(id), "what the kernels are built for");
        return domain;
    }

    private static DomainSpecification Specification(string name, byte[] kernel)
        => new() { Name = name, MemoryMiB = 16, Image = new DomainImage(KernelImage.Parse(kernel)) };

    private static async Task ExpectPowerOffAsync(RunningDomain domain, CancellationToken cancellation)
    {
        DomainExit exit = await domain.Completion.WaitAsync(cancellation);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report);
    }
}
