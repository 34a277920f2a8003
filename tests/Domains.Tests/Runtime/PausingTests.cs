// A domain that is paused from outside, and goes on.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class PausingTests : ScriptedGuest
{
    private static readonly TimeSpan Ample = TimeSpan.FromSeconds(60);

    private long _steps;

    private long Steps => Volatile.Read(in _steps);

    private ulong[] Times => Fake.Vcpu.Runstate.Snapshot() is var info ? [info.Time[0], info.Time[1], info.Time[2], info.Time[3]] : [];

    [Test]
    public void Nothing_runs_once_it_is_paused_and_it_goes_on_when_all_pauses_are_taken_back()
    {
        Fake.Machine.Script = Counting;
        Fake.Domain.Start();
        WaitForSteps(100);
        Fake.Domain.Pause();
        Fake.Domain.Pause();
        long paused = Steps;
        long start = Now;
        Thread.Sleep(50);
        Assert.That(Fake.Domain.PauseCount, Is.EqualTo(2));
        Assert.That(Fake.Domain.Unpause());
        Thread.Sleep(50);
        Assert.That(Steps, Is.EqualTo(paused), "One pause is left.");
        Assert.That(Now - start, Is.GreaterThanOrEqualTo(100_000_000), "Time goes on.");
        Assert.That(Fake.Domain.Unpause());
        Assert.That(Fake.Domain.Unpause(), Is.False);
        WaitForSteps(paused + 100);
        ulong offline = Times[3];
        Assert.That(offline, Is.GreaterThanOrEqualTo(100_000_000), "It was offline meanwhile.");
        End();
    }

    [Test]
    public void A_domain_that_is_paused_before_its_start_waits()
    {
        Fake.Machine.Script = Counting;
        Fake.Domain.Pause();
        Fake.Domain.Start();
        Thread.Sleep(50);
        Assert.That(Steps, Is.Zero);
        Assert.That(Fake.Domain.Unpause());
        WaitForSteps(1);
        End();
    }

    [Test]
    public void A_domain_that_is_paused_can_be_destroyed()
    {
        Fake.Machine.Script = Counting;
        Fake.Domain.Start();
        WaitForSteps(1);
        Fake.Domain.Pause();
        End();
    }

    [Test]
    public void A_timer_that_ran_out_meanwhile_fires_afterwards()
    {
        const uint timer = 0;
        bool enough = false;
        int woken = 0;
        long deadline = 0;
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, timer);
            uint port = Port();
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 7);
            while (!Volatile.Read(in enough))
            {
                Volatile.Write(ref deadline, Now + 100_000_000);
                yield return cpu.Hypercall(HypercallNumber.SetTimerOp, (ulong)deadline);
                _ = Interlocked.Increment(ref _steps);
                yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
                Assert.That(IsPending(port));
                ClearPending(port);
                _ = Interlocked.Increment(ref woken);
            }

            Fake.WriteAll(Data, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 2, Data);
        }

        Fake.Machine.Script = Guest;
        Fake.Domain.Start();
        WaitForSteps(1);
        Fake.Domain.Pause();

        // Again where this thread was held up until the timer had run out.
        while (Now >= Volatile.Read(in deadline))
        {
            long steps = Steps;
            Assert.That(Fake.Domain.Unpause());
            WaitForSteps(steps + 1);
            Fake.Domain.Pause();
        }

        int before = Volatile.Read(in woken);
        Thread.Sleep(200);
        Assert.That(Volatile.Read(in woken), Is.EqualTo(before));
        Volatile.Write(ref enough, true);
        Assert.That(Fake.Domain.Unpause());
        Assert.That(Fake.Domain.Completion.Wait(Ample));
        Assert.That(Fake.Cpu.Failure, Is.Null);
        Assert.That(woken, Is.EqualTo(before + 1));
    }

    [Test]
    public void Pauses_of_many_threads_add_up()
    {
        Fake.Machine.Script = Counting;
        Fake.Domain.Start();
        Thread[] threads = [.. Enumerable.Repeat<ThreadStart>(() =>
        {
            for (int i = 0; i < 200; i++)
            {
                Fake.Domain.Pause();
                long paused = Steps;
                Thread.SpinWait(100);
                if (Steps != paused)
                    _steps = long.MinValue;
                _ = Fake.Domain.Unpause();
            }
        }, 4).Select(static work => new Thread(work))];
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            Assert.That(thread.Join(Ample));
        Assert.That(Fake.Domain.PauseCount, Is.Zero);
        Assert.That(Steps, Is.Not.Negative, "It ran while it was paused.");
        WaitForSteps(Steps + 10);
        End();
    }

    /// <summary>All states' times together are the vCPU's age, through running, blocking and pauses.</summary>
    [Test]
    public void Runstate_times_add_up_to_real_time()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            while (true)
            {
                yield return cpu.Hypercall(HypercallNumber.SetTimerOp, (ulong)Now + 1_000_000);
                yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
                ClearPending(Port());
                _ = Interlocked.Increment(ref _steps);
            }
        }

        IEnumerable<VcpuExit> Bound(FakeVcpu cpu) => new[] { BindVirq(cpu, 0) }.Concat(Guest(cpu));
        long before = Now;
        Fake.Machine.Script = Bound;
        Fake.Domain.Start();
        WaitForSteps(1);
        ulong first = Sum();
        long started = Now;
        for (int i = 0; i < 20; i++)
        {
            Thread.Sleep(10);
            Fake.Domain.Pause();
            Thread.Sleep(5);
            _ = Fake.Domain.Unpause();
        }

        long beforeSum = Now;
        ulong passed = Sum() - first;
        Assert.That(passed, Is.InRange((ulong)(beforeSum - started), (ulong)(Now - before)));
        Assert.That(Times[3], Is.GreaterThan(0));
        Assert.That(Times[2], Is.GreaterThan(0));
        End();
    }

    private ulong Sum() => Times.Aggregate(0UL, static (sum, time) => sum + time);

    private IEnumerable<VcpuExit> Counting(FakeVcpu cpu)
    {
        while (true)
        {
            _ = Interlocked.Increment(ref _steps);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 0);
        }
    }

    private void WaitForSteps(long count)
        => Assert.That(SpinWait.SpinUntil(() => Steps >= count, Ample), () => $"{Steps} steps; {Fake.Cpu.Failure}");

    private void End()
    {
        Fake.Domain.Destroy();
        Assert.That(Fake.Domain.Completion.Wait(Ample));
        Assert.That(Fake.Cpu.Failure, Is.Null);
    }
}
