// Every operation of event_channel_op and every error that Xen gives for it.
using XenSharp.Core;
using static XenSharp.EventChannels.EventChannelOperation;

namespace XenSharp.EventChannels.Tests;

[TestFixture]
public sealed unsafe class OperationTests
{
    private const long EPERM = -1;
    private const long ENOENT = -2;
    private const long ESRCH = -3;
    private const long EAGAIN = -11;
    private const long EFAULT = -14;
    private const long EBUSY = -16;
    private const long EEXIST = -17;
    private const long EINVAL = -22;
    private const long ENOSPC = -28;
    private const long ENOSYS = -38;

    private readonly Dictionary<ushort, EventChannelDomain> _directory = [];
    private FakeDomain _guest = null!;

    [SetUp]
    public void SetUp() => _guest = new FakeDomain(1, 3, _directory);

    [TearDown]
    public void TearDown()
    {
        bool intact = _guest.CanariesIntact;
        _guest.Dispose();
        _directory.Clear();
        Assert.That(intact, "memory beside the domain's was written");
    }

    [Test]
    public void StructuresHaveTheirPublicSizes()
    {
        Assert.That(
            new[]
            {
                sizeof(EvtchnAllocUnbound), sizeof(EvtchnBindInterdomain), sizeof(EvtchnBindVirq), sizeof(EvtchnBindPirq),
                sizeof(EvtchnBindIpi), sizeof(EvtchnBindVcpu), sizeof(EvtchnStatus), sizeof(EvtchnOp), sizeof(EventChannelPortState),
                sizeof(EvtchnInitControl), sizeof(EvtchnSetPriority),
            },
            Is.EqualTo(new[] { 8, 12, 12, 12, 8, 8, 24, 28, 32, 24, 8 }));
    }

    [Test]
    public void EveryOperationFaultsOnAnAddressThatIsNotMapped()
    {
        foreach (EventChannelOperation operation in Enum.GetValues<EventChannelOperation>())
        {
            Assert.That(_guest.CallAt(operation, FakeDomain.Unmapped), Is.EqualTo(EFAULT), $"{operation}");
            Assert.That(_guest.CallAt(operation, Paging.HypervisorVirtualStart), Is.EqualTo(EFAULT), $"{operation}");
        }
    }

    [TestCase(AllocUnbound), TestCase(BindIpi), TestCase(BindVirq), TestCase(Status)]
    public void ResultThatCannotBeWrittenFaultsAndLeavesThePort(EventChannelOperation operation)
    {
        *(ushort*)_guest.ReadOnlyPage = operation is AllocUnbound or Status ? DomainId.Self.Value : (ushort)0;
        Assert.That(_guest.CallAt(operation, FakeDomain.ReadOnly), Is.EqualTo(EFAULT));
        Assert.That(_guest.Channels.Context->State->ActivePorts, Is.EqualTo(operation == Status ? 0 : 1));
    }

    [Test]
    public void UnknownOperationsAreNotImplemented([Values(15UL, 99UL, 0xffff_ffffUL)] ulong command)
        => Assert.That(_guest.Channels.Execute(_guest.Vcpu(0), new HypercallArguments { A0 = command, A1 = FakeDomain.Arguments }),
            Is.EqualTo(ENOSYS));

    [Test]
    public void OnlyTheLowHalfOfTheCommandCounts()
        => Assert.That(_guest.Channels.Execute(
            _guest.Vcpu(0), new HypercallArguments { A0 = 0x7_0000_0000 + (ulong)Unmask, A1 = FakeDomain.Arguments }), Is.EqualTo(EINVAL).Or.Zero);

    [Test]
    public void AllocUnboundGivesTheLowestPortAndKnowsItsRemote()
    {
        Assert.That(_guest.AllocUnbound(7), Is.EqualTo(1));
        Assert.That(_guest.AllocUnbound(DomainId.Self.Value), Is.EqualTo(2));
        EvtchnStatus other = _guest.Status(1);
        EvtchnStatus self = _guest.Status(2);
        Assert.That((other.Status, other.RemoteDomain, other.Vcpu), Is.EqualTo((EvtchnStatus.Unbound, 7, 0u)));
        Assert.That((self.Status, self.RemoteDomain), Is.EqualTo((EvtchnStatus.Unbound, 1)));
    }

    [Test]
    public void PortsOfOthersAreNotTheGuestsToAllocate()
    {
        using var other = new FakeDomain(2, 1, _directory);
        foreach ((ushort domain, long expected) in new (ushort, long)[] { (0, EPERM), (2, EPERM), (3, ESRCH), (1, 0), (0x7ff1, ESRCH) })
        {
            var unbound = new EvtchnAllocUnbound { Domain = domain, RemoteDomain = 0, Port = 77 };
            Assert.That(_guest.Call(AllocUnbound, ref unbound), Is.EqualTo(expected), $"domain {domain}");
            Assert.That(unbound.Port, expected == 0 ? Is.EqualTo(1) : Is.EqualTo(77));
        }
    }

    [Test]
    public void PortsRunOutAtTheLimitAndComeBack()
    {
        using var guest = new FakeDomain(5, 1, maxPort: 100);
        for (uint port = 1; port <= 100; port++)
            Assert.That(guest.BindIpi(0), Is.EqualTo(port));
        var ipi = new EvtchnBindIpi();
        var virq = new EvtchnBindVirq();
        var interdomain = new EvtchnBindInterdomain { RemoteDomain = DomainId.Self.Value };
        var unbound = new EvtchnAllocUnbound { Domain = DomainId.Self.Value };
        Assert.That(guest.Call(BindIpi, ref ipi), Is.EqualTo(ENOSPC));
        Assert.That(guest.Call(BindVirq, ref virq), Is.EqualTo(ENOSPC));
        Assert.That(guest.Call(BindInterdomain, ref interdomain), Is.EqualTo(ENOSPC));
        Assert.That(guest.Call(AllocUnbound, ref unbound), Is.EqualTo(ENOSPC));
        Assert.That(() => guest.Channels.AllocateBackend(out _), Throws.InvalidOperationException.With.Message.Contains("raise its limit"));
        Assert.That(guest.Port(Close, 42), Is.Zero);
        Assert.That(guest.Port(Close, 17), Is.Zero);
        Assert.That(guest.BindIpi(0), Is.EqualTo(17));
        Assert.That(guest.BindIpi(0), Is.EqualTo(42));
    }

    [Test]
    public void AllPortsOfTheAbiCanBeUsed()
    {
        for (uint port = 1; port < 4096; port++)
            Assert.That(_guest.BindIpi(1), Is.EqualTo(port));
        var ipi = new EvtchnBindIpi();
        Assert.That(_guest.Call(BindIpi, ref ipi), Is.EqualTo(ENOSPC));
        Assert.That(_guest.Port(Send, 4095), Is.Zero);
        Assert.That(_guest.IsPending(4095));
        Assert.That(_guest.Info(1)->EvtchnPendingSel, Is.EqualTo(1UL << 63));
        Assert.That(_guest.Port(Send, 4096), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Send, uint.MaxValue), Is.EqualTo(EINVAL));
    }

    [Test]
    public void PortsExistInBucketsOf64()
    {
        Assert.That(_guest.Status(63).Status, Is.EqualTo(EvtchnStatus.Closed));
        var status = new EvtchnStatus { Domain = DomainId.Self.Value, Port = 64 };
        Assert.That(_guest.Call(Status, ref status), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Unmask, 63), Is.Zero);
        Assert.That(_guest.Port(Unmask, 64), Is.EqualTo(EINVAL));
        for (int i = 0; i < 64; i++)
            _guest.BindIpi(0);
        Assert.That(_guest.Status(127).Status, Is.EqualTo(EvtchnStatus.Closed));
        Assert.That(_guest.Port(Unmask, 128), Is.EqualTo(EINVAL));
    }

    [Test]
    public void BindInterdomainRefusesWhatDoesNotWaitForIt()
    {
        using var other = new FakeDomain(2, 1, _directory);
        uint forAnother = other.AllocUnbound(9);
        uint ipi = other.BindIpi(0);
        uint backend = _guest.AllocUnbound(0);
        foreach ((ushort domain, uint port, long expected) in new (ushort, uint, long)[]
        {
            (3, 1, ESRCH), (2, forAnother, EINVAL), (2, ipi, EINVAL), (2, 0, EINVAL), (2, 33, EINVAL), (2, 64, EINVAL),
            (2, uint.MaxValue, EINVAL), (0, 1, EINVAL), (1, backend, EINVAL), (DomainId.Self.Value, backend, EINVAL),

            // The port that this very call would get.
            (DomainId.Self.Value, 2, EINVAL),
        })
        {
            var bind = new EvtchnBindInterdomain { RemoteDomain = domain, RemotePort = port };
            Assert.That(_guest.Call(BindInterdomain, ref bind), Is.EqualTo(expected), $"domain {domain} port {port}");
        }

        Assert.That(_guest.Channels.Context->State->ActivePorts, Is.EqualTo(1));
    }

    [Test]
    public void InterdomainConnectsSendsAndFallsBackToUnbound()
    {
        using var other = new FakeDomain(2, 2, _directory);
        _guest.BindIpi(0);
        uint remote = other.AllocUnbound(1);
        Assert.That(other.Port(Send, remote), Is.Zero, "dropped without an error");
        uint local = _guest.BindInterdomain(2, remote);
        Assert.That(_guest.IsPending(local), "a send before the binding must not be lost");
        Assert.That(_guest.Info(0)->EvtchnUpcallPending, Is.EqualTo(1));
        Assert.That(_guest.Cpus[0].Kicks, Is.Zero, "the caller looks by itself");

        EvtchnStatus here = _guest.Status(local);
        EvtchnStatus there = other.Status(remote);
        Assert.That((here.Status, here.RemoteDomain, here.RemotePort), Is.EqualTo((EvtchnStatus.Interdomain, 2, remote)));
        Assert.That((there.Status, there.RemoteDomain, there.RemotePort), Is.EqualTo((EvtchnStatus.Interdomain, 1, local)));

        Assert.That(_guest.Port(Send, local), Is.Zero);
        Assert.That(other.IsPending(remote));
        Assert.That(other.Cpus[0].Kicks, Is.EqualTo(1));
        Assert.That(other.Channels.NotificationQueue(0).TryTake());
        Assert.That(other.Channels.NotificationQueue(0).TryTake(), Is.False);

        Assert.That(_guest.Port(Close, local), Is.Zero);
        there = other.Status(remote);
        Assert.That((there.Status, there.RemoteDomain), Is.EqualTo((EvtchnStatus.Unbound, 1)));
        Assert.That(_guest.IsPending(local), Is.False, "who gets the port next must not see its events");
        Assert.That(_guest.BindInterdomain(2, remote), Is.EqualTo(local));
        Assert.That(other.Port(Close, remote), Is.Zero);
        Assert.That(_guest.Status(local).Status, Is.EqualTo(EvtchnStatus.Unbound));
    }

    [Test]
    public void LoopbackIsTwoPortsOfOneDomain()
    {
        uint first = _guest.AllocUnbound(DomainId.Self.Value);
        uint second = _guest.BindInterdomain(DomainId.Self.Value, first);
        _guest.Acknowledge(0);
        Assert.That(_guest.Port(Send, second), Is.Zero);
        Assert.That((_guest.IsPending(first), _guest.IsPending(second)), Is.EqualTo((true, false)));
        Assert.That(_guest.Status(second).RemoteDomain, Is.EqualTo(1));
        Assert.That(_guest.Port(Close, first), Is.Zero);
        Assert.That(_guest.Status(second).Status, Is.EqualTo(EvtchnStatus.Unbound));
        Assert.That(_guest.Port(Close, second), Is.Zero);
        Assert.That(_guest.Port(Close, second), Is.EqualTo(EINVAL));
    }

    [Test]
    public void ADomainThatEndsLeavesItsPartnersUnbound()
    {
        var other = new FakeDomain(2, 1, _directory);
        uint local = _guest.BindInterdomain(2, other.AllocUnbound(1));
        other.Dispose();
        EvtchnStatus status = _guest.Status(local);
        Assert.That((status.Status, status.RemoteDomain), Is.EqualTo((EvtchnStatus.Unbound, 2)));
        Assert.That(_guest.Port(Send, local), Is.Zero);
        var bind = new EvtchnBindInterdomain { RemoteDomain = 2, RemotePort = 1 };
        Assert.That(_guest.Call(BindInterdomain, ref bind), Is.EqualTo(EINVAL), "it is still known, and has no ports");
    }

    [Test]
    public void BindVirqRules()
    {
        foreach ((uint virq, uint vcpu, long expected) in new (uint, uint, long)[]
        {
            (24, 0, EINVAL), (uint.MaxValue, 0, EINVAL), (Virq.Argo, 1, EINVAL), (16, 1, EINVAL), (Virq.Argo, 99, EINVAL),
            (Virq.Timer, 3, ENOENT), (Virq.Timer, uint.MaxValue, ENOENT), (Virq.Timer, 128, ENOENT),
            (Virq.Timer, 0, 0), (Virq.Timer, 0, EEXIST), (Virq.Timer, 2, 0), (Virq.Debug, 0, 0), (Virq.Debug, 2, 0),
            (Virq.Xenoprof, 1, 0), (Virq.Xenpmu, 1, 0), (Virq.Argo, 0, 0), (Virq.Argo, 0, EEXIST), (23, 0, 0),
        })
        {
            var bind = new EvtchnBindVirq { Virq = virq, Vcpu = vcpu };
            Assert.That(_guest.Call(BindVirq, ref bind), Is.EqualTo(expected), $"virq {virq} on {vcpu}");
            if (expected != 0)
                continue;
            EvtchnStatus status = _guest.Status(bind.Port);
            Assert.That((status.Status, status.Virq, status.Vcpu), Is.EqualTo((EvtchnStatus.BoundToVirq, virq, vcpu)));
        }
    }

    [Test]
    public void VirqsReachTheVcpuThatTheyAreBoundOn()
    {
        uint timer0 = _guest.BindVirq(Virq.Timer, 0);
        uint timer2 = _guest.BindVirq(Virq.Timer, 2);
        _guest.Channels.SendVirq(1, Virq.Timer);
        Assert.That((_guest.IsPending(timer0), _guest.IsPending(timer2)), Is.EqualTo((false, false)));
        _guest.Channels.SendVirq(2, Virq.Timer, callingVcpu: 2);
        Assert.That((_guest.IsPending(timer0), _guest.IsPending(timer2)), Is.EqualTo((false, true)));
        Assert.That((_guest.Info(2)->EvtchnUpcallPending, _guest.Cpus[2].Kicks), Is.EqualTo(((byte)1, 0)));
        _guest.Channels.SendVirq(0, Virq.Timer);
        Assert.That(_guest.Cpus[0].Kicks, Is.EqualTo(1));

        Assert.That(_guest.Port(Close, timer0), Is.Zero);
        _guest.Acknowledge(0);
        _guest.Channels.SendVirq(0, Virq.Timer);
        Assert.That(_guest.Info(0)->EvtchnUpcallPending, Is.Zero);
        Assert.That(_guest.BindVirq(Virq.Timer, 0), Is.EqualTo(timer0));
    }

    [Test]
    public void GlobalVirqsMoveButPerVcpuOnesDoNot()
    {
        uint global = _guest.BindVirq(Virq.Argo, 0);
        uint timer = _guest.BindVirq(Virq.Timer, 1);
        var move = new EvtchnBindVcpu { Port = global, Vcpu = 2 };
        Assert.That(_guest.Call(BindVcpu, ref move), Is.Zero);
        move.Port = timer;
        Assert.That(_guest.Call(BindVcpu, ref move), Is.EqualTo(EINVAL));
        _guest.Channels.SendVirq(0, Virq.Argo);
        Assert.That((_guest.Cpus[0].Kicks, _guest.Cpus[2].Kicks), Is.EqualTo((0, 1)));
        Assert.That(_guest.Port(Close, global), Is.Zero);
        Assert.That(_guest.BindVirq(Virq.Argo, 0), Is.EqualTo(global));
        Assert.That(_guest.Status(global).Vcpu, Is.Zero);
    }

    [Test]
    public void SendVirqSaysWhatNumbersItTakes()
    {
        Assert.That(() => _guest.Channels.SendVirq(0, 24), Throws.InstanceOf<ArgumentOutOfRangeException>());
        Assert.That(() => _guest.Channels.SendVirq(128, 0), Throws.InstanceOf<ArgumentOutOfRangeException>());
    }

    [Test]
    public void BindVcpuRules()
    {
        uint ipi = _guest.BindIpi(0);
        uint unbound = _guest.AllocUnbound(0);
        foreach ((uint port, uint vcpu, long expected) in new (uint, uint, long)[]
        {
            (unbound, 3, ENOENT), (9999, 3, ENOENT), (unbound, uint.MaxValue, ENOENT), (9999, 0, EINVAL), (5, 0, EINVAL), (0, 0, EINVAL),
            (ipi, 1, EINVAL), (unbound, 2, 0),
        })
        {
            var bind = new EvtchnBindVcpu { Port = port, Vcpu = vcpu };
            Assert.That(_guest.Call(BindVcpu, ref bind), Is.EqualTo(expected), $"port {port} to {vcpu}");
        }

        Assert.That(_guest.Status(unbound).Vcpu, Is.EqualTo(2));
        Assert.That(_guest.Port(Close, unbound), Is.Zero);
        Assert.That(_guest.AllocUnbound(0), Is.EqualTo(unbound));
        Assert.That(_guest.Status(unbound).Vcpu, Is.Zero);
    }

    [Test]
    public void AMaskedPendingPortIsAnnouncedWhereItWasMovedTo()
    {
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out EventChannelPort port);
        _guest.SetMasked(port.Value, true);
        backend.Notify();
        Assert.That((_guest.IsPending(port.Value), _guest.Cpus[0].Kicks), Is.EqualTo((true, 0)));
        var move = new EvtchnBindVcpu { Port = port.Value, Vcpu = 1 };
        Assert.That(_guest.Call(BindVcpu, ref move), Is.Zero);
        Assert.That((_guest.Cpus[0].Kicks, _guest.Cpus[1].Kicks), Is.EqualTo((0, 0)));
        Assert.That(_guest.Port(Unmask, port.Value), Is.Zero);
        Assert.That(_guest.IsMasked(port.Value), Is.False);
        Assert.That((_guest.Cpus[0].Kicks, _guest.Cpus[1].Kicks), Is.EqualTo((0, 1)));
        Assert.That((_guest.Info(0)->EvtchnPendingSel, _guest.Info(1)->EvtchnPendingSel), Is.EqualTo((0UL, 1UL)));
    }

    [Test]
    public void UnmaskOnlySpeaksUpForAPendingPortThatWasMasked()
    {
        uint ipi = _guest.BindIpi(1);
        _guest.SetMasked(ipi, true);
        Assert.That(_guest.Port(Unmask, ipi), Is.Zero);
        _guest.SetPending(ipi, true);
        Assert.That(_guest.Port(Unmask, ipi), Is.Zero);
        Assert.That((_guest.Info(1)->EvtchnUpcallPending, _guest.Cpus[1].Kicks), Is.EqualTo(((byte)0, 0)));
        _guest.SetMasked(40, true);
        _guest.SetPending(40, true);
        Assert.That(_guest.Port(Unmask, 40), Is.Zero, "a port not in use");
        Assert.That(_guest.IsMasked(40), "its bits are not touched");
    }

    [Test]
    public void SendRefusesWhatIsNoChannel()
    {
        uint virq = _guest.BindVirq(Virq.Debug, 0);
        Assert.That(_guest.Port(Send, virq), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Send, 0), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Send, 20), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Send, 4096), Is.EqualTo(EINVAL));
        Assert.That(_guest.Port(Send, _guest.AllocUnbound(3)), Is.Zero);
    }

    [Test]
    public void SetPendingTellsTheVcpuOnceUntilItHasLooked()
    {
        uint first = _guest.BindIpi(1);
        uint second = _guest.BindIpi(1);
        Assert.That(_guest.Port(Send, first), Is.Zero);
        Assert.That(_guest.Port(Send, first), Is.Zero);
        Assert.That(_guest.Port(Send, second), Is.Zero);
        Assert.That((_guest.IsPending(first), _guest.IsPending(second), _guest.Cpus[1].Kicks), Is.EqualTo((true, true, 1)));
        _guest.Acknowledge(1);
        Assert.That(_guest.Port(Send, second), Is.Zero);
        Assert.That(_guest.Cpus[1].Kicks, Is.EqualTo(2));
        _guest.Acknowledge(1);
        Assert.That(_guest.Port(Send, second, vcpu: 1), Is.Zero);
        Assert.That((_guest.Info(1)->EvtchnUpcallPending, _guest.Cpus[1].Kicks), Is.EqualTo(((byte)1, 2)), "an IPI to itself");
    }

    [Test]
    public void SendOnAPendingPortIsSilentEvenWhenTheUpcallWasTaken()
    {
        uint ipi = _guest.BindIpi(1);
        Assert.That(_guest.Port(Send, ipi), Is.Zero);
        _guest.Info(1)->EvtchnUpcallPending = 0;
        _guest.Info(1)->EvtchnPendingSel = 0;
        Assert.That(_guest.Port(Send, ipi), Is.Zero);
        Assert.That((_guest.Info(1)->EvtchnUpcallPending, _guest.Info(1)->EvtchnPendingSel), Is.EqualTo(((byte)0, 0UL)));
        Assert.That(_guest.Cpus[1].Kicks, Is.EqualTo(1));
    }

    [Test]
    public void VirqWhosePortWasClosedAndTakenMeanwhileReachesNobody()
    {
        // What a timer sees that read the table just before the port was closed and given to another use.
        uint ipi = _guest.BindIpi(0);
        uint debug = _guest.BindVirq(Virq.Debug, 1);
        foreach (uint stale in new[] { ipi, debug, 60u })
        {
            _guest.Channels.Context->Vcpus[0].Virqs[Virq.Timer] = stale;
            _guest.Channels.SendVirq(0, Virq.Timer);
            Assert.That(_guest.IsPending(stale), Is.False);
        }
    }

    [Test]
    public void PirqsAreNotForThisDomain()
    {
        foreach ((uint pirq, long expected) in new (uint, long)[] { (0, EPERM), (55, EPERM), (56, EINVAL), (uint.MaxValue, EINVAL) })
        {
            var bind = new EvtchnBindPirq { Pirq = pirq };
            Assert.That(_guest.Call(BindPirq, ref bind), Is.EqualTo(expected), $"pirq {pirq}");
        }
    }

    [Test]
    public void BindIpiNeedsAVcpu()
    {
        foreach (uint vcpu in new uint[] { 3, 127, 128, uint.MaxValue })
        {
            var bind = new EvtchnBindIpi { Vcpu = vcpu };
            Assert.That(_guest.Call(BindIpi, ref bind), Is.EqualTo(ENOENT));
        }

        EvtchnStatus status = _guest.Status(_guest.BindIpi(2));
        Assert.That((status.Status, status.Vcpu), Is.EqualTo((EvtchnStatus.BoundToIpi, 2u)));
    }

    [Test]
    public void StatusOfOthersIsPrivate()
    {
        using var other = new FakeDomain(2, 1, _directory);
        foreach ((ushort domain, uint port, long expected) in new (ushort, uint, long)[]
        {
            (2, 1, EPERM), (2, 64, EINVAL), (0, 1, EPERM), (0, 4096, EINVAL), (3, 1, ESRCH), (1, 1, 0), (1, 64, EINVAL),
        })
        {
            var status = new EvtchnStatus { Domain = domain, Port = port };
            Assert.That(_guest.Call(Status, ref status), Is.EqualTo(expected), $"domain {domain} port {port}");
        }
    }

    [Test]
    public void CloseRefusesWhatIsNotOpen([Values(0u, 1u, 63u, 64u, 4096u, uint.MaxValue)] uint port)
        => Assert.That(_guest.Port(Close, port), Is.EqualTo(EINVAL));

    [Test]
    public void ResetClosesEverything()
    {
        using var other = new FakeDomain(2, 1, _directory);
        uint local = _guest.BindInterdomain(2, other.AllocUnbound(1));
        EventChannelBackend backend = _guest.Channels.AllocateBackend(out _);
        _guest.BindVirq(Virq.Timer, 1);
        for (int i = 0; i < 200; i++)
            _guest.BindIpi(0);
        _guest.Acknowledge(0);
        ushort domain = DomainId.Self.Value;
        Assert.That(_guest.Call(Reset, ref domain), Is.Zero);
        Assert.That(_guest.Channels.Context->State->ActivePorts, Is.Zero);
        Assert.That(_guest.Status(local).Status, Is.EqualTo(EvtchnStatus.Closed));
        Assert.That(other.Status(1).Status, Is.EqualTo(EvtchnStatus.Unbound));
        Assert.That(backend.GuestPort.Value, Is.Zero);
        Assert.That(_guest.BindVirq(Virq.Timer, 1), Is.EqualTo(1));
    }

    [Test]
    public void ResetOfOthersIsRefused()
    {
        using var other = new FakeDomain(2, 1, _directory);
        foreach ((ushort domain, long expected) in new (ushort, long)[] { (0, EPERM), (2, EPERM), (3, ESRCH), (1, 0) })
        {
            ushort argument = domain;
            Assert.That(_guest.Call(Reset, ref argument), Is.EqualTo(expected), $"domain {domain}");
        }
    }

    [Test]
    public void ResetStopsForEventsAndGoesOn()
    {
        for (int i = 0; i < 300; i++)
            _guest.BindIpi(0);
        ushort domain = DomainId.Self.Value;
        Assert.That(_guest.Call(ResetContinue, ref domain), Is.EqualTo(EBUSY), "nothing to be continued");
        *_guest.KickPending = 1;
        VcpuContext* vcpu = _guest.Vcpu(0);
        var arguments = new HypercallArguments { A0 = (ulong)Reset, A1 = FakeDomain.Arguments };
        int rounds = 0;
        long result;
        do
        {
            vcpu->Continuation.Pending = 0;
            result = _guest.Channels.Execute(vcpu, arguments);
            if (vcpu->Continuation.Pending == 0)
                break;
            if (rounds++ == 0)
                Assert.That(_guest.Call(Reset, ref domain, vcpu: 1), Is.EqualTo(EBUSY), "another vCPU's is under way");
            Assert.That(vcpu->Continuation.Arguments.A0, Is.EqualTo((ulong)ResetContinue));
            arguments = vcpu->Continuation.Arguments;
            *(ushort*)_guest.ArgumentPage = domain;
        }
        while (true);

        Assert.That((rounds, result), Is.EqualTo((4, 0L)));
        Assert.That(_guest.Channels.Context->State->ActivePorts, Is.Zero);
    }

    [Test]
    public void ResetThatIsOvertakenAsksToBeRepeated()
    {
        for (int i = 0; i < 100; i++)
            _guest.BindIpi(0);
        *_guest.KickPending = 1;
        ushort domain = DomainId.Self.Value;
        Assert.That(_guest.Call(Reset, ref domain), Is.Zero);
        Assert.That(_guest.Vcpu(0)->Continuation.Pending, Is.EqualTo(1));
        *_guest.KickPending = 0;
        Assert.That(_guest.BindIpi(0), Is.EqualTo(1));
        Assert.That(_guest.Call(ResetContinue, ref domain), Is.EqualTo(EAGAIN));
        Assert.That(_guest.Call(Reset, ref domain), Is.Zero);
    }

    [Test]
    public void CompatHypercallCarriesTheOlderOperations()
    {
        uint* op = (uint*)_guest.ArgumentPage;
        op[0] = (uint)BindIpi;
        op[1] = 2;
        Assert.That(Compat(FakeDomain.Arguments), Is.Zero);
        Assert.That(op[2], Is.EqualTo(1));
        op[0] = (uint)Send;
        op[1] = 1;
        Assert.That(Compat(FakeDomain.Arguments), Is.Zero);
        Assert.That(_guest.IsPending(1));
        op[0] = (uint)Status;
        op[1] = DomainId.Self.Value;
        op[2] = 1;
        Assert.That(Compat(FakeDomain.Arguments), Is.Zero);
        Assert.That((op[3], op[4]), Is.EqualTo((EvtchnStatus.BoundToIpi, 2u)));
        foreach (uint command in new[] { (uint)Reset, (uint)InitControl, (uint)ResetContinue, 15u, uint.MaxValue })
        {
            op[0] = command;
            Assert.That(Compat(FakeDomain.Arguments), Is.EqualTo(ENOSYS), $"{command}");
        }

        Assert.That(Compat(FakeDomain.Unmapped), Is.EqualTo(EFAULT));
        Assert.That(Compat(FakeDomain.Unmapped - 4), Is.EqualTo(EFAULT), "the structure is read whole");
    }

    private long Compat(ulong address) => _guest.Channels.ExecuteCompat(_guest.Vcpu(0), new HypercallArguments { A0 = address });
}
