// Console pages as a hostile guest writes them: no byte outside the rings is read or written, and nothing stops working.

using CsCheck;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ConsoleHostileGuestTests
{
    /// <summary>Indexes near each other, near the size of a ring, near the wrap, and anywhere.</summary>
    private static readonly Gen<(uint Base, uint Distance)> Indexes =
        Gen.Select(
            Gen.OneOf(Gen.UInt[0, 4], Gen.UInt[uint.MaxValue - 3000, uint.MaxValue], Gen.UInt),
            Gen.OneOf(Gen.UInt[0, 3000], Gen.UInt[1022, 1026], Gen.UInt[2046, 2050], Gen.UInt[uint.MaxValue - 3000, uint.MaxValue], Gen.UInt));

    [Test]
    public void Any_indexes_move_what_a_simple_model_moves()
    {
        Gen.Select(Indexes, Indexes, Gen.Byte.Array[0, 1500], Gen.Int[0, 1 << 20]).Sample(
            (output, input, typed, seed) =>
            {
                using var guest = new FakeGuest();
                new Random(seed).NextBytes(guest.WholePage[..FakeGuest.Indexes]);
                guest.OutputConsumer = output.Base;
                guest.OutputProducer = output.Base + output.Distance;
                guest.InputConsumer = input.Base;
                guest.InputProducer = input.Base + input.Distance;
                byte[] expected = guest.WholePage.ToArray();

                var printed = new List<byte>();
                if (output.Distance <= 2048)
                {
                    for (uint i = 0; i < output.Distance; i++)
                        printed.Add(expected[1024 + ((output.Base + i) & 2047)]);
                    BitConverter.TryWriteBytes(expected.AsSpan(FakeGuest.Indexes + 8), output.Base + output.Distance);
                }
                uint placed = 0;
                while (placed < typed.Length && input.Distance + placed < 1024 && input.Distance <= 1024)
                {
                    expected[(input.Base + input.Distance + placed) & 1023] = typed[placed];
                    placed++;
                }
                BitConverter.TryWriteBytes(expected.AsSpan(FakeGuest.Indexes + 4), input.Base + input.Distance + placed);

                var console = guest.NewBackend();
                using var cancel = new CancellationTokenSource();
                Task<bool> write = console.WriteAsync(typed, cancel.Token).AsTask();
                Assert.That(write.IsCompleted, Is.EqualTo(placed == typed.Length));
                cancel.Cancel();
                if (placed < typed.Length)
                    Assert.That(async () => await write, Throws.InstanceOf<OperationCanceledException>());

                using var sink = new MemoryStream();
                console.CompleteAsync().Wait();
                Assert.That(console.RunAsync(new StreamSink(sink)).Wait(20_000));

                Assert.That(sink.ToArray(), Is.EqualTo(printed));
                Assert.That(guest.WholePage.ToArray(), Is.EqualTo(expected));
            },
            iter: 1000,
            threads: 1);
    }

    [Test]
    public void A_console_works_again_when_the_guest_has_put_its_indexes_right()
    {
        using var guest = new FakeGuest();
        var console = guest.NewBackend();
        using var output = new MemoryStream();
        Task run = console.RunAsync(new StreamSink(output));
        guest.OutputProducer = 2049;
        guest.InputConsumer = 77;
        guest.NotifyBackend();
        Task<bool> write = console.WriteAsync("typed"u8.ToArray()).AsTask();
        Assert.That(write.IsCompleted, Is.False);
        Assert.That(guest.OutputConsumer, Is.Zero);

        guest.OutputProducer = 0;
        guest.InputConsumer = 0;
        guest.PrintAll("well again"u8, sleeps: false);
        Assert.That(write.Wait(20_000) && write.Result);
        Assert.That(guest.Read(), Is.EqualTo("typed"u8.ToArray()));
        console.CompleteAsync().Wait();
        Assert.That(run.Wait(20_000));
        Assert.That(output.ToArray(), Is.EqualTo("well again"u8.ToArray()));
    }

    [Test]
    public void A_guest_that_scribbles_over_its_page_meanwhile_hurts_only_itself()
    {
        using var guest = new FakeGuest();
        var console = guest.NewBackend();
        using var stop = new CancellationTokenSource();
        long taken = 0;
        int longest = 0;
        var sink = new FakeSink((bytes, _) =>
        {
            longest = Math.Max(longest, bytes.Length);
            Interlocked.Add(ref taken, bytes.Length);
            return Math.Max(1, bytes.Length / 2);
        });
        Task run = console.RunAsync(sink, stop.Token);
        Task input = Task.Run(async () =>
        {
            while (await console.WriteAsync(new byte[300], stop.Token))
                ;
        });

        var random = new Random(1);
        for (int i = 0; i < 200_000 || (Interlocked.Read(ref taken) < 1_000_000 && i < 50_000_000); i++)
        {
            // Mostly plausible distances, so that bytes do move; sometimes anything.
            uint value = random.Next(4) == 0 ? (uint)random.NextInt64(1L << 32) : guest.Index(random.Next(4)) + (uint)random.Next(3000);
            Volatile.Write(ref guest.Index(random.Next(4)), value);
            if (i % 16 == 0)
                guest.NotifyBackend();
        }
        stop.Cancel();

        Assert.That(async () => await run, Throws.InstanceOf<OperationCanceledException>());
        Assert.That(async () => await input, Throws.InstanceOf<OperationCanceledException>());
        Assert.That(taken, Is.Positive);
        Assert.That(longest, Is.InRange(1, 2048));
        Assert.That(guest.Canary.IndexOfAnyExcept((byte)0xc5), Is.EqualTo(-1));
    }
}
