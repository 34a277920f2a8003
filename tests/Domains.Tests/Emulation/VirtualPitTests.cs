using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>The timer against a clock that the test moves.</summary>
public sealed class VirtualPitTests
{
    private long _now;
    private IoPorts _ports = null!;

    [SetUp]
    public void CreatePorts()
    {
        _now = 1_000_000;
        _ports = new IoPorts(() => _now);
    }

    private void Out(uint port, uint value) => _ports.Write(port, 1, value);

    private uint In(uint port) => _ports.Read(port, 1);

    [Test]
    public void Mode0RaisesItsOutputAfterTheCount()
    {
        Out(0x61, 1);
        Out(0x43, 0xb0);
        Out(0x42, 11932 & 0xff);
        Out(0x42, 11932 >> 8);
        Assert.That(In(0x61) & 0x21, Is.EqualTo(1));
        _now += 9_990_000;
        Assert.That(In(0x61) & 0x20, Is.Zero);
        _now += 20_000;
        Assert.That(In(0x61) & 0x20, Is.Not.Zero);
    }

    [Test]
    public void CountRunsDownAtItsFrequency()
    {
        Out(0x43, 0xb0);
        Out(0x42, 0xff);
        Out(0x42, 0xff);
        _now += 10_000_000;
        uint count = In(0x42) | (In(0x42) << 8);
        Assert.That(0xffff - count, Is.EqualTo(11931u));
        _now += 50_000_000;
        count = In(0x42) | (In(0x42) << 8);
        Assert.That(count, Is.EqualTo(0x1_ffffu - 71590), "it wraps");
    }

    [Test]
    public void LatchHoldsTheCount()
    {
        Out(0x43, 0xb4);
        Out(0x42, 0x00);
        Out(0x42, 0x10);
        _now += 1_000_000;
        Out(0x43, 0x80);
        _now += 1_000_000;
        Out(0x43, 0x80);
        Assert.That(In(0x42) | (In(0x42) << 8), Is.EqualTo(0x1000u - 1193), "the first latch counts");
        Assert.That(In(0x42) | (In(0x42) << 8), Is.EqualTo(0x1000u - 2386), "then the running count");
    }

    [Test]
    public void ReadBackLatchesStatusThenCount()
    {
        Out(0x43, 0xb6);
        Out(0x42, 0x00);
        Out(0x42, 0x10);
        Out(0x43, 0xc8);
        Assert.That(In(0x42), Is.EqualTo(0xb6), "output high, both bytes, mode 3");
        Assert.That(In(0x42) | (In(0x42) << 8), Is.EqualTo(0x1000));
        Out(0x43, 0xc2);
        Assert.That(In(0x42), Is.Not.EqualTo(0x36), "another channel's latch is not ours");
    }

    [TestCase(0x90u, 0x34u, 0x34u, TestName = "Low byte only")]
    [TestCase(0xa0u, 0x12u, 0x12u, TestName = "High byte only")]
    public void OneByteAccess(uint command, uint written, uint read)
    {
        Out(0x43, command);
        Out(0x42, written);
        Assert.That(In(0x42), Is.EqualTo(read));
        Assert.That(In(0x42), Is.EqualTo(read));
    }

    [Test]
    public void ZeroIsTheLongestCount()
    {
        Out(0x43, 0xb0);
        Out(0x42, 0);
        Out(0x42, 0);
        _now += 54_900_000;
        Assert.That(In(0x61) & 0x20, Is.Zero);
        _now += 100_000;
        Assert.That(In(0x61) & 0x20, Is.Not.Zero);
    }

    [Test]
    public void RisingGateRestartsAPeriodicCount()
    {
        Out(0x43, 0xb4);
        Out(0x42, 0);
        Out(0x42, 0x80);
        _now += 10_000_000;
        Out(0x61, 1);
        Assert.That(In(0x42) | (In(0x42) << 8), Is.EqualTo(0x8000));
        _now += 1_000_000;
        Out(0x61, 3);
        Assert.That(In(0x42) | (In(0x42) << 8), Is.EqualTo(0x8000u - 1193), "the gate was up already");
        Assert.That(In(0x61) & 3, Is.EqualTo(3));
    }

    [Test]
    public void RefreshBitToggles()
    {
        uint first = In(0x61) & 0x10;
        _now += 1 << 14;
        Assert.That(In(0x61) & 0x10, Is.Not.EqualTo(first));
    }

    [Test]
    public void OtherChannelsAndTheCommandRegisterAreOutOfReach()
    {
        Assert.That(_ports.Read(0x40, 4), Is.EqualTo(0x00_00_ffffu | (In(0x42) << 16)));
        Out(0x40, 5);
        Assert.That(In(0x43), Is.Zero);
    }

    /// <summary>The quick calibration: the high byte of a mode 0 count must go down in steps of 256 ticks, each of 215 µs.</summary>
    [Test]
    public void QuickCalibrationFindsTheFrequency()
    {
        const long tick = 3_000;
        const double kiloHertz = 2_500_000;
        Out(0x61, (In(0x61) & ~2u) | 1);
        Out(0x43, 0xb0);
        Out(0x42, 0xff);
        Out(0x42, 0xff);
        _ = (In(0x42), In(0x42));
        double start = 0;
        double end = 0;
        const int steps = 25;
        for (int i = 0; i <= steps; i++)
        {
            int seen = 0;
            while (true)
            {
                _ = In(0x42);
                uint high = In(0x42);
                _now += tick;
                if (high != 0xff - (uint)i)
                    break;
                seen++;
                end = _now * kiloHertz / 1e6;
            }

            Assert.That(seen, Is.GreaterThan(5), $"high byte {0xff - i:x} was seen long enough");
            if (i == 0)
                start = end;
        }

        double measured = (end - start) * VirtualPit.Frequency / (steps * 256 * 1000.0);
        Assert.That(measured, Is.EqualTo(kiloHertz).Within(0.1).Percent);
    }

    /// <summary>The slow calibration: wait with polling for the output of a 10 ms count.</summary>
    [Test]
    public void SlowCalibrationFindsTheFrequency()
    {
        Out(0x61, (In(0x61) & ~2u) | 1);
        Out(0x43, 0xb0);
        Out(0x42, 11931 & 0xff);
        Out(0x42, 11931 >> 8);
        long start = _now;
        int loops = 0;
        while ((In(0x61) & 0x20) == 0)
        {
            _now += 5_000;
            loops++;
        }

        Assert.That(loops, Is.GreaterThan(1000));
        Assert.That(_now - start, Is.EqualTo(10_000_000).Within(0.1).Percent);
    }
}
