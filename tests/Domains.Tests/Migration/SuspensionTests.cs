using XenSharp.Core;
using XenSharp.Domains.Migration;
using XenSharp.Domains.Tests.Runtime;

namespace XenSharp.Domains.Tests.Migration;

/// <summary>What a suspended domain can do, and what becomes of it where the host fails.</summary>
internal sealed unsafe class SuspensionTests
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private SuspendingGuest _guest = null!;

    [SetUp]
    public void Build() => _guest = SuspendingGuest.Build();

    [TearDown]
    public void TakeApart() => _guest.Dispose();

    [Test]
    public void A_resumed_guest_learns_that_it_was_cancelled_and_goes_on()
    {
        long result = -1;
        _guest.Suspend(vcpu => Once(() => result = vcpu.Result));
        Task<DomainExit> suspension = _guest.Domain.Completion;
        _guest.Domain.Resume();
        Assert.That(_guest.Domain.Completion.Wait(s_patience), Is.True);
        Assert.That(_guest.Domain.Completion.Result.Reason, Is.EqualTo(ShutdownReason.PowerOff), _guest.Domain.Completion.Result.Report);
        Assert.That(suspension.Result.Reason, Is.EqualTo(ShutdownReason.Suspend), "what has been is not changed");
        Assert.That(result, Is.EqualTo(1));
        Assert.That(_guest.Domain.IsSuspended, Is.False);
    }

    [Test]
    public void It_can_suspend_again_and_again()
    {
        const int times = 5;
        int resumed = 0;
        _guest.Suspend(vcpu => Again(vcpu, times, () => resumed++));
        for (int i = 0; i < times; i++)
        {
            Assert.That(_guest.Domain.IsSuspended);
            _guest.Domain.Resume();
            Assert.That(_guest.Domain.Completion.Wait(s_patience), Is.True);
        }

        Assert.That(resumed, Is.EqualTo(times));
        _ = _guest.Save();
    }

    [Test]
    public void One_that_is_not_suspended_is_neither_resumed_nor_saved()
    {
        Assert.That(_guest.Domain.Resume, Throws.InvalidOperationException);
        Assert.That(() => _guest.Domain.Save(Stream.Null), Throws.InvalidOperationException);
        _guest.Suspend();
        _guest.Domain.Destroy();
        Assert.That(_guest.Domain.Resume, Throws.InvalidOperationException);
        Assert.That(_guest.Domain.IsSuspended, "there is still all of it");
        _ = _guest.Save();
    }

    [Test]
    public void A_pause_outlasts_the_suspension()
    {
        bool ran = false;
        _guest.Suspend(_ => Once(() => ran = true));
        _guest.Domain.Pause();
        _guest.Domain.Resume();
        Thread.Sleep(50);
        Assert.That(ran, Is.False);
        _ = _guest.Domain.Unpause();
        Assert.That(_guest.Domain.Completion.Wait(s_patience), Is.True);
        Assert.That(ran);
    }

    [Test]
    public void A_full_disk_leaves_the_domain_suspended()
    {
        bool ran = false;
        _guest.Suspend(_ => Once(() => ran = true));
        byte[] whole = _guest.Save();
        for (int room = 0; room < whole.Length; room += 997)
        {
            var disk = new FullDisk(room);
            MigrationException failure = Assert.Throws<MigrationException>(() => _guest.Domain.Save(disk))!;
            Assert.That(failure.Message, Is.EqualTo("The image cannot be written: No space left on device."));
            Assert.That(_guest.Domain.IsSuspended);
        }

        Assert.That(_guest.Save(), Has.Length.EqualTo(whole.Length), "and it can be saved afterwards");
        Assert.That(_guest.Domain.AuditFrames(), Is.Null);
        _guest.Domain.Resume();
        Assert.That(_guest.Domain.Completion.Wait(s_patience), Is.True);
        Assert.That(ran);
    }

    [Test]
    public void Who_does_not_want_it_any_more_gets_out()
    {
        _guest.Suspend();
        using var cancellation = new CancellationTokenSource();
        var seen = new List<PageProgress>();
        var progress = new Immediately(report =>
        {
            seen.Add(report);
            cancellation.Cancel();
        });
        Assert.That(() => _guest.Domain.Save(Stream.Null, progress, cancellation.Token), Throws.InstanceOf<OperationCanceledException>());
        Assert.That(seen, Has.Count.EqualTo(1));
        using var image = new MemoryStream(_guest.Save());
        using var machine = new FakeMachine(2000, new TimeStampCounter(1_000_000, 0));
        Assert.That(
            () => Domain.Restore(SuspendingGuest.Options(), image, machine, null, progress, cancellation.Token), Throws.InstanceOf<OperationCanceledException>());
    }

    [Test]
    public void Progress_goes_up_to_the_end()
    {
        _guest.Suspend();
        var seen = new List<PageProgress>();
        using var image = new MemoryStream();
        _guest.Domain.Save(image, new Immediately(seen.Add));
        ulong total = _guest.Domain.OwnedPages;
        Assert.That(seen[0], Is.EqualTo(new PageProgress(0, total)));
        Assert.That(seen[^1], Is.EqualTo(new PageProgress(total, total)));
        Assert.That(seen.Select(static report => report.Done), Is.Ordered);
        seen.Clear();
        image.Position = 0;
        using var machine = new FakeMachine(2000, new TimeStampCounter(1_000_000, 0));
        using var domain = Domain.Restore(SuspendingGuest.Options(), image, machine, null, new Immediately(seen.Add));
        Assert.That(seen[^1], Is.EqualTo(new PageProgress(total, 0)));
    }

    private static IEnumerable<VcpuExit> Once(Action action)
    {
        action();
        yield break;
    }

    private static IEnumerable<VcpuExit> Again(FakeVcpu vcpu, int times, Action resumed)
    {
        ulong start = vcpu.Registers->Rdx;
        return Suspensions();

        IEnumerable<VcpuExit> Suspensions()
        {
            for (int i = 0; i < times; i++)
            {
                Assert.That(vcpu.Result, Is.EqualTo(1));
                resumed();
                yield return vcpu.Hypercall(HypercallNumber.SchedOpCompat, 2, (ulong)ShutdownReason.Suspend, start);
            }
        }
    }

    private sealed class Immediately(Action<PageProgress> action) : IProgress<PageProgress>
    {
        public void Report(PageProgress value) => action(value);
    }

    /// <summary>Takes so many bytes and no more.</summary>
    private sealed class FullDisk(int room) : MemoryStream
    {
        public override void Write(ReadOnlySpan<byte> buffer)
        {
            if (Length + buffer.Length > room)
                throw new IOException("No space left on device");
            base.Write(buffer);
        }
    }
}
