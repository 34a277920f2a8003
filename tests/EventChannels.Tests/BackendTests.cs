// Back ends, vCPUs that come late or move their vcpu_info, and polling.
using XenSharp.Core;
using static XenSharp.EventChannels.EventChannelOperation;

namespace XenSharp.EventChannels.Tests;

[TestFixture]
public sealed unsafe class BackendTests
{
    private FakeDomain _guest = null!;

    [SetUp]
    public void SetUp() => _guest = new FakeDomain(1, 3);

    [TearDown]
    public void TearDown() => _guest.Dispose();

    [Test]
    public void BackendLooksToTheGuestLikeDomainZero()
    {
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out EventChannelPort port);
        EvtchnStatus status = _guest.Status(port.Value);
        Assert.That((status.Status, status.RemoteDomain), Is.EqualTo((EvtchnStatus.Interdomain, 0)));
        Assert.That(status.RemotePort, Is.InRange(1, 4095));
        Assert.That(backend.WaitAsync().AsTask().Result, "bound: the guest may have sent before");

        ValueTask<bool> wait = backend.WaitAsync();
        Assert.That(wait.IsCompleted, Is.False);
        Assert.That(_guest.Port(Send, port.Value), Is.Zero);
        Assert.That(wait.AsTask().Result);

        backend.Notify();
        Assert.That((_guest.IsPending(port.Value), _guest.Cpus[0].Kicks), Is.EqualTo((true, 1)));
        Assert.That(_guest.Channels.NotificationQueue(0).TryTake());
    }

    [Test]
    public void SendsCoalesceUntilTheBackendWaits()
    {
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out EventChannelPort port);
        for (int i = 0; i < 5; i++)
            Assert.That(_guest.Port(Send, port.Value), Is.Zero);
        Assert.That(backend.WaitAsync().AsTask().Result);
        Assert.That(backend.WaitAsync().IsCompleted, Is.False);
    }

    [Test]
    public void GuestThatClosesItsPortCanBindAnotherToTheBackend()
    {
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out EventChannelPort port);
        EventChannelBackend another = _guest.Channels.AllocateBackend(out _);
        Assert.That(_guest.Status(port.Value).RemotePort, Is.EqualTo(backend.Port.Value));
        _ = backend.WaitAsync().AsTask().Result;
        ValueTask<bool> wait = backend.WaitAsync();
        var bind = new EvtchnBindInterdomain { RemoteDomain = 0, RemotePort = backend.Port.Value };
        Assert.That(_guest.Call(BindInterdomain, ref bind), Is.EqualTo(-22), "it has one");
        Assert.That(_guest.Port(Close, port.Value), Is.Zero);
        Assert.That((wait.IsCompleted, backend.GuestPort.Value), Is.EqualTo((false, 0)));

        // The port has another use: the back end must not reach it.
        Assert.That(_guest.BindIpi(0), Is.EqualTo(port.Value));
        backend.Notify();
        Assert.That(_guest.IsPending(port.Value), Is.False);

        bind.RemotePort = another.Port.Value;
        Assert.That(_guest.Call(BindInterdomain, ref bind), Is.EqualTo(-22), "that one is bound");
        bind.RemotePort = backend.Port.Value;
        Assert.That(_guest.Call(BindInterdomain, ref bind), Is.Zero);
        Assert.That(backend.GuestPort.Value, Is.EqualTo(bind.LocalPort).And.Not.EqualTo(port.Value));
        Assert.That(_guest.IsPending(bind.LocalPort), "what may have been sent meanwhile");
        EvtchnStatus status = _guest.Status(bind.LocalPort);
        Assert.That((status.Status, status.RemoteDomain, status.RemotePort), Is.EqualTo((EvtchnStatus.Interdomain, 0, backend.Port.Value)));
        Assert.That(wait.IsCompleted, Is.False);
        Assert.That(_guest.Port(Send, bind.LocalPort), Is.Zero);
        Assert.That(wait.AsTask().Result);
        _guest.SetPending(bind.LocalPort, false);
        backend.Notify();
        Assert.That(_guest.IsPending(bind.LocalPort));

        Assert.That(_guest.Port(Close, bind.LocalPort), Is.Zero);
        backend.Dispose();
        Assert.That(backend.WaitAsync().AsTask().Result, Is.False);
        Assert.That(_guest.Call(BindInterdomain, ref bind), Is.EqualTo(-22), "it is closed for good");
    }

    [Test]
    public void BackendThatClosesItsEndLeavesThePortUnboundForTheNext()
    {
        EventChannelBackend first = _guest.Channels.AllocateBackend(out EventChannelPort port);
        first.Dispose();
        EvtchnStatus status = _guest.Status(port.Value);
        Assert.That((status.Status, status.RemoteDomain), Is.EqualTo((EvtchnStatus.Unbound, 0)));
        Assert.That(_guest.Port(Send, port.Value), Is.Zero);
        EventChannelBackend second = _guest.Channels.BindBackend(port);
        first.Dispose();
        first.Notify();
        Assert.That(_guest.IsPending(port.Value), Is.False);
        second.Notify();
        Assert.That(_guest.IsPending(port.Value));
        Assert.That(second.WaitAsync().AsTask().Result);
    }

    [Test]
    public void OnlyAPortThatWaitsForDomainZeroCanBeBound()
    {
        uint forAnother = _guest.AllocUnbound(7);
        uint ipi = _guest.BindIpi(0);
        foreach (uint port in new[] { 0u, forAnother, ipi, 50u, 64u, uint.MaxValue })
        {
            Assert.That(_guest.Channels.TryBindBackend(new EventChannelPort(port), out EventChannelBackend? none), Is.EqualTo(-22));
            Assert.That(none, Is.Null);
        }

        Assert.That(() => _guest.Channels.BindBackend(new EventChannelPort(forAnother)),
            Throws.InvalidOperationException.With.Message.Contains("allocate the port unbound"));
        uint mine = _guest.AllocUnbound(0);
        Assert.That(_guest.Channels.TryBindBackend(new EventChannelPort(mine), out EventChannelBackend? backend), Is.Zero);
        Assert.That(backend!.GuestPort.Value, Is.EqualTo(mine));
    }

    [Test]
    public void WaitCanBeCancelled()
    {
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out EventChannelPort port);
        _ = backend.WaitAsync().AsTask().Result;
        using var source = new CancellationTokenSource();
        Task<bool> wait = backend.WaitAsync(source.Token).AsTask();
        source.Cancel();
        Assert.That(() => wait.GetAwaiter().GetResult(), Throws.InstanceOf<OperationCanceledException>());
        Assert.That(_guest.Port(Send, port.Value), Is.Zero);
        Assert.That(backend.WaitAsync().AsTask().Result);
    }

    [Test]
    public void EndOfTheDomainCompletesBackendsAndStillsThem()
    {
        var guest = new FakeDomain(9, 1);
        EventChannelBackend backend = guest.Channels.AllocateBackend(out _);
        guest.Dispose();
        Assert.That(backend.WaitAsync().AsTask().Result);
        Assert.That(backend.WaitAsync().AsTask().Result, Is.False);
        backend.Notify();
        backend.Dispose();
        guest.Channels.SendVirq(0, Virq.Timer);
        guest.Channels.Dispose();
        Assert.That(guest.Channels.TryBindBackend(new EventChannelPort(1), out _), Is.EqualTo(-3));
        Assert.That(guest.Channels.AllocateUnbound(new DomainId(0), out _), Is.EqualTo(-22));
    }

    [Test]
    public void EventsFromBeforeAVcpuExistedReachIt()
    {
        using var guest = new FakeDomain(9, 0);
        guest.Channels.AllocateBackend(out EventChannelPort port).Notify();
        Assert.That(guest.IsPending(port.Value));
        using var cpu = new FakeCpu();
        VcpuState state = default;
        var info = (VcpuInfo*)guest.Context->SharedInfo;
        VcpuContext context = default;
        VcpuContext* vcpu = &context;
        vcpu->State = &state;
        vcpu->Info = info;
        guest.Channels.AddVcpu(vcpu, cpu);
        Assert.That((info->EvtchnUpcallPending, info->EvtchnPendingSel, cpu.Kicks), Is.EqualTo(((byte)1, 1UL, 1)));
        Assert.That(() => guest.Channels.AddVcpu(vcpu, cpu), Throws.ArgumentException.With.Message.Contains("once"));
        state.Id = 128;
        Assert.That(() => guest.Channels.AddVcpu(vcpu, cpu), Throws.ArgumentException.With.Message.Contains("out of range"));
    }

    [Test]
    public void AMovedVcpuInfoHasEverythingRaised()
    {
        uint ipi = _guest.BindIpi(1);
        _guest.Vcpu(1)->Info = _guest.SpareInfo;
        _guest.Channels.VcpuInfoMoved(1);
        Assert.That((_guest.SpareInfo->EvtchnPendingSel, _guest.SpareInfo->EvtchnUpcallPending), Is.EqualTo((ulong.MaxValue, (byte)1)));
        Assert.That(_guest.Cpus[1].Kicks, Is.EqualTo(1));
        _guest.Acknowledge(1);
        Assert.That(_guest.Port(Send, ipi), Is.Zero);
        Assert.That(_guest.SpareInfo->EvtchnPendingSel, Is.EqualTo(1));
        Assert.That(((VcpuInfo*)_guest.Context->SharedInfo)[1].EvtchnPendingSel, Is.Zero);
        _guest.Acknowledge(1);
        _guest.Channels.VcpuInfoMoved(1, callingVcpu: 1);
        Assert.That(_guest.Cpus[1].Kicks, Is.EqualTo(2));
    }

    [Test]
    public void AVcpuWithoutInfoGetsItsEventsWhenItRegistersOne()
    {
        using var guest = new FakeDomain(9, 34);
        uint ipi = guest.BindIpi(33);
        Assert.That(guest.Port(Send, ipi), Is.Zero);
        Assert.That(guest.IsPending(ipi));
        guest.Channels.VcpuInfoMoved(33);
        guest.Vcpu(33)->Info = guest.SpareInfo;
        guest.Channels.VcpuInfoMoved(33);
        Assert.That((guest.SpareInfo->EvtchnUpcallPending, guest.Cpus[33].Kicks), Is.EqualTo(((byte)1, 1)));
    }

    [Test]
    public void PollTellsPendingPortsFromThoseThatCannotBe()
    {
        uint first = _guest.BindIpi(0);
        uint second = _guest.BindIpi(0);
        _guest.SetPending(second, true);
        Assert.That((_guest.Channels.IsPending(first), _guest.Channels.IsPending(second)), Is.EqualTo((0L, 1L)));
        foreach (uint bad in new[] { 0u, 50u, 64u, 4096u, uint.MaxValue })
            Assert.That(_guest.Channels.IsPending(bad), Is.EqualTo(-22L), $"{bad}");
    }

    [Test]
    public void MaskedPortWakesWhoPollsForIt()
    {
        uint awaited = _guest.BindIpi(0);
        uint another = _guest.BindIpi(0);
        _guest.SetMasked(awaited, true);
        _guest.SetMasked(another, true);
        _guest.Channels.BeginPoll(1);
        _guest.Channels.NarrowPoll(1, awaited);
        _guest.Channels.BeginPoll(2);
        Assert.That(_guest.Port(Send, another), Is.Zero);
        Assert.That((_guest.Channels.IsPolling(1), _guest.Channels.IsPolling(2)), Is.EqualTo((true, false)));
        Assert.That((_guest.Cpus[1].Kicks, _guest.Cpus[2].Kicks), Is.EqualTo((0, 1)));
        Assert.That(_guest.Port(Send, awaited), Is.Zero);
        Assert.That((_guest.Channels.IsPolling(1), _guest.Cpus[1].Kicks, _guest.Cpus[2].Kicks), Is.EqualTo((false, 1, 1)));
        Assert.That(_guest.Info(1)->EvtchnUpcallPending, Is.Zero);
    }

    [Test]
    public void UpcallEndsAPollForAnotherPort()
    {
        uint awaited = _guest.BindIpi(0);
        uint other = _guest.BindIpi(1);
        _guest.Info(1)->EvtchnUpcallMask = 1;
        _guest.Channels.BeginPoll(1);
        _guest.Channels.NarrowPoll(1, awaited);
        Assert.That(_guest.Port(Send, other), Is.Zero);
        Assert.That((_guest.Channels.IsPolling(1), _guest.Cpus[1].Kicks), Is.EqualTo((false, 1)));
    }

    [Test]
    public void PollThatTimedOutIsForgotten()
    {
        using var guest = new FakeDomain(9, 100);
        uint port = guest.BindIpi(0);
        guest.SetMasked(port, true);
        guest.Channels.BeginPoll(99);
        Assert.That(guest.Channels.IsPolling(99));
        guest.Channels.EndPoll(99);
        Assert.That(guest.Channels.IsPolling(99), Is.False);
        Assert.That(guest.Port(Send, port), Is.Zero);
        Assert.That(guest.Cpus[99].Kicks, Is.Zero);
        guest.Acknowledge(0);
        guest.Channels.BeginPoll(99);
        Assert.That(guest.Port(Send, port), Is.Zero);
        Assert.That(guest.Cpus[99].Kicks, Is.EqualTo(1));
    }
}
