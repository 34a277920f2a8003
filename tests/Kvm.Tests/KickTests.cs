// Kicks, timers and sleep: nothing lost, nothing corrupted, at whatever moment the interruption comes.
using System.Diagnostics;
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class KickTests : KvmTest
{
    private const long Millisecond = 1_000_000;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);

    private ScratchGuest _guest = null!;

    private KvmVirtualCpu Vcpu => _guest.Vcpu;

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void KickBeforeRun()
    {
        _guest.Load(code => code.syscall());
        Vcpu.Kick();
        Vcpu.Kick();
        Assert.That(*Vcpu.KickPending, Is.Not.Zero);
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked));
        Assert.That(*Vcpu.KickPending, Is.Zero);
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Syscall), "Two kicks at rest are one.");
    }

    [Test]
    public void KickEndsASpin()
    {
        LoadSpin();
        using var kicker = new Background(() =>
        {
            Thread.Sleep(20);
            Vcpu.Kick();
        });
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked));
        Assert.That(Vcpu.Registers->Rip, Is.EqualTo(ScratchGuest.CodeAddress));
    }

    [Test]
    public void WaitForKickHasADeadline()
    {
        long start = Libc.MonotonicNow();
        Vcpu.WaitForKick(start + (5 * Millisecond));
        Assert.That(Libc.MonotonicNow(), Is.GreaterThanOrEqualTo(start + (5 * Millisecond)));
        Vcpu.WaitForKick(start);
        Vcpu.WaitForKick(0);
        Vcpu.WaitForKick(long.MinValue);
        Vcpu.Kick();
        Vcpu.WaitForKick(long.MaxValue);
        Assert.That(*Vcpu.KickPending, Is.Zero);
    }

    [Test]
    public void KickEndsAWait()
    {
        Vcpu.WaitForKick(0);
        using var kicker = new Background(stop =>
        {
            for (int i = 0; i < 200; i++)
            {
                Vcpu.Kick();
                WaitUntil(() => Volatile.Read(ref *Vcpu.KickPending) == 0, stop);
            }
        });
        while (!kicker.IsDone)
            Vcpu.WaitForKick(Libc.MonotonicNow() + Millisecond);
    }

    [Test]
    public void WakeTimer()
    {
        LoadSpin();
        long deadline = Libc.MonotonicNow() + (10 * Millisecond);
        Vcpu.SetWakeTimer(deadline);
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked));
        Assert.That(Libc.MonotonicNow(), Is.GreaterThanOrEqualTo(deadline));

        // Set again, earlier than before; then into the past.
        foreach (long next in (ReadOnlySpan<long>)[Libc.MonotonicNow() + (5 * Millisecond), 1, 0, -5, deadline])
        {
            Vcpu.SetWakeTimer(next);
            Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked), $"deadline {next}");
        }
    }

    /// <summary>A timer that has fired is disarmed, so the same moment set again, now in the past, fires at once.</summary>
    [Test]
    public void WakeTimerMayBeSetToTheSameMomentAgain()
    {
        LoadSpin();
        long deadline = Libc.MonotonicNow() + Millisecond;
        using var rescue = new Rescue(Vcpu);
        for (int i = 0; i < 3; i++)
        {
            Vcpu.SetWakeTimer(deadline);
            Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked));
            Assert.That(rescue.WasNeeded, Is.False, $"The timer did not fire, time {i + 1}.");
        }
    }

    /// <summary>One that expires while the processor sleeps for another reason still counts for the next entry.</summary>
    [Test]
    public void WakeTimerExpiresDuringAWait()
    {
        LoadSpin();
        long deadline = Libc.MonotonicNow() + Millisecond;
        Vcpu.SetWakeTimer(deadline);
        Vcpu.WaitForKick(deadline + (5 * Millisecond));
        using var rescue = new Rescue(Vcpu);
        Vcpu.SetWakeTimer(deadline);
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Kicked));
        Assert.That(rescue.WasNeeded, Is.False);
    }

    [Test]
    public void WakeTimerDisarmed()
    {
        _guest.Load(code =>
        {
            code.mov(ecx, 3_000_000);
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.dec(ecx);
            code.jne(again);
            code.syscall();
        });

        // Again where this thread was held up for so long that it had fired before it was disarmed.
        long deadline;
        do
        {
            Vcpu.WaitForKick(Libc.MonotonicNow() + Millisecond);
            deadline = Libc.MonotonicNow() + (5 * Millisecond);
            Vcpu.SetWakeTimer(deadline);
            Vcpu.SetWakeTimer(long.MaxValue);
        }
        while (Libc.MonotonicNow() >= deadline);
        Thread.Sleep(10);
        Assert.That(Vcpu.Run().Kind, Is.EqualTo(VcpuExitKind.Syscall));
    }

    /// <summary>A kick for a thread that has meanwhile ended, or been replaced by one that knows nothing of kicks, harms nobody.</summary>
    [Test]
    public void KickAfterTheThreadHasEnded()
    {
        var thread = new Thread(() => Vcpu.WaitForKick(0));
        thread.Start();
        thread.Join();
        for (int i = 0; i < 20; i++)
        {
            Vcpu.Kick();
            Volatile.Write(ref *Vcpu.KickPending, 0);
        }

        // The worst case of a number used again: a thread of this process that does not block the signal gets it.
        var innocent = new Thread(() => Libc.KickThread(Libc.CurrentThread));
        innocent.Start();
        Assert.That(innocent.Join(Patience));
    }

    /// <summary>A kick that finds the vCPU on its way out with something else is not spent by it.</summary>
    [Test]
    public void EveryKickIsTakenNoteOf()
    {
        const int kicks = 500;
        _guest.Load(code =>
        {
            Label again = code.CreateLabel();
            code.Label(ref again);
            code.syscall();
            code.jmp(again);
        });
        Vcpu.WaitForKick(0);
        int accepted = 0;
        using var kicker = new Background(stop =>
        {
            var random = new Random(1);
            for (int i = 0; i < kicks; i++)
            {
                WaitUntil(() => Volatile.Read(ref *Vcpu.KickPending) == 0, stop);
                SpinFor(random.Next(60));
                Vcpu.Kick();
                accepted++;
            }
        });
        int taken = 0;
        int syscalls = 0;
        while (!kicker.IsDone || *Vcpu.KickPending != 0)
        {
            VcpuExit exit = Vcpu.Run();
            if (exit.Kind == VcpuExitKind.Kicked)
                taken++;
            else
                syscalls++;
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Kicked).Or.EqualTo(VcpuExitKind.Syscall), exit.Failure);
        }

        Assert.That(accepted, Is.EqualTo(kicks));
        Assert.That(taken, Is.GreaterThanOrEqualTo(kicks), "One return for every kick; a signal that came late may add one.");
        Assert.That(syscalls, Is.Not.Zero);
    }

    /// <summary>
    /// The guest checks all its registers, flags and eight translations, works for a while, and leaves by SYSCALL or INT3;
    /// the host changes everything at each entry; a thread kicks at random; another one collects garbage.
    /// </summary>
    [Test]
    public void NothingIsCorruptedAtWhateverMomentAKickComes()
    {
        const int kicks = 10_000;
        var checker = new CheckingGuest(_guest);
        Vcpu.WaitForKick(0);
        using var collector = new Background(stop =>
        {
            while (!stop.IsCancellationRequested)
            {
                GC.KeepAlive(new byte[10_000]);
                GC.Collect();
                Thread.Sleep(1);
            }
        });
        using var kicker = new Background(stop =>
        {
            var random = new Random(2);
            for (int i = 0; i < kicks; i++)
            {
                WaitUntil(() => Volatile.Read(ref *Vcpu.KickPending) == 0, stop);
                SpinFor(random.Next(80));
                Vcpu.Kick();
            }
        });
        var random = new Random(3);
        int kicked = 0;
        int endless = 0;
        checker.Prepare(random, mayBeEndless: false);
        while (!kicker.IsDone || *Vcpu.KickPending != 0)
        {
            if (random.Next(8) == 0)
                Vcpu.SetWakeTimer(Libc.MonotonicNow() + random.Next(1, 100_000));
            VcpuExit exit = Vcpu.Run();
            if (exit.Kind == VcpuExitKind.Kicked)
            {
                kicked++;

                // Mostly the guest goes on where it was; sometimes it is sent elsewhere, as an upcall does. One that never
                // ends by itself is left only when a kick (not a late signal) came.
                if (checker.IsEndless || random.Next(4) == 0)
                {
                    checker.CheckInterrupted();
                    checker.Prepare(random, mayBeEndless: random.Next(10) == 0 && !kicker.IsDone);
                    endless += checker.IsEndless ? 1 : 0;
                    if (checker.IsEndless)
                        Vcpu.SetWakeTimer(Libc.MonotonicNow() + (50 * Millisecond));
                }

                continue;
            }

            checker.CheckFinished(exit);
            checker.Prepare(random, mayBeEndless: false);
        }

        Assert.That(kicked, Is.GreaterThanOrEqualTo(kicks));
        Assert.That(endless, Is.Not.Zero);
        Assert.That(checker.Finished, Is.Not.Zero);
    }

    private static void SpinFor(int microseconds)
    {
        long until = Stopwatch.GetTimestamp() + (microseconds * 1000L);
        while (Stopwatch.GetTimestamp() < until)
            Thread.SpinWait(5);
    }

    private static void WaitUntil(Func<bool> condition, CancellationToken stop)
    {
        long start = Stopwatch.GetTimestamp();
        while (!condition() && !stop.IsCancellationRequested)
        {
            if (Stopwatch.GetElapsedTime(start) > Patience)
                throw new TimeoutException("A kick was lost.");
            Thread.Yield();
        }
    }

    private void LoadSpin() => _guest.Load(code =>
    {
        Label here = code.CreateLabel();
        code.Label(ref here);
        code.jmp(here);
    });

    /// <summary>Kicks a vCPU that would otherwise spin for ever, so that a failing test ends.</summary>
    private sealed class Rescue : IDisposable
    {
        private readonly Timer _timer;
        private int _needed;

        public Rescue(KvmVirtualCpu vcpu) => _timer = new Timer(
            _ =>
            {
                Volatile.Write(ref _needed, 1);
                vcpu.Kick();
            },
            null,
            30_000,
            30_000);

        public bool WasNeeded => Volatile.Read(ref _needed) != 0;

        public void Dispose() => _timer.Dispose();
    }
}
