// event_channel_op between two domains.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairEventScript
{
    private const int NoPort = 60;
    private const int LastPort = 4095;

    public static AbiScript CreateChannels() => AbiScript.OfPair("pair-event-channels", "event_channel_op between domains", script =>
    {
        script.LevelPortsOfBoth();
        script.Case("a port that waits for the other domain", static (a, b) =>
        {
            Value port = a.Offer();
            a.Show(port);
            a.ShowPort(port);
            b.PortStatus(b.Peer, port);
            b.PortStatus(DomainIds.Self, port);
            b.Send(port);
            b.ClosePort(port);
            a.ShowPort(port);
            a.Send(port);
            a.ShowPending();
            b.ShowPending();
            a.ClosePort(port);
            a.PortStatus(DomainIds.Self, port);
        });
        script.Case("both ends of a channel", static (a, b) =>
        {
            (Value far, Value near) = PairSteps.Connect(a, b);
            b.Show(near);
            b.ShowPending();
            a.ShowPending();
            a.ShowPort(far);
            b.ShowPort(near);
            b.ClosePort(near);
            b.ShowPending();
            b.PortStatus(DomainIds.Self, near);
            a.ShowPort(far);
            a.ClosePort(far);
            a.PortStatus(DomainIds.Self, far);
        });
        script.Case("a second channel that goes the other way", static (a, b) =>
        {
            (Value farOfA, Value nearOfB) = PairSteps.Connect(a, b, " of a");
            (Value farOfB, Value nearOfA) = PairSteps.Connect(b, a, " of b");
            a.ShowPort(farOfA);
            a.ShowPort(nearOfA);
            b.ShowPort(farOfB);
            b.ShowPort(nearOfB);
            a.QuietEvents();
            b.QuietEvents();
            a.Send(nearOfA);
            b.ShowPending();
            b.Send(nearOfB);
            a.ShowPending();
            a.ClosePort(farOfA);
            a.ClosePort(nearOfA);
            b.ClosePort(farOfB);
            b.ClosePort(nearOfB);
        });
        script.Case("domains that bind_interdomain refuses", static (a, b) =>
        {
            Value port = a.Offer();
            foreach (Value domain in (Value[])[DomainIds.Self, DomainIds.Absent, DomainIds.Xen, DomainIds.Io, DomainIds.Invalid, b.Own])
                b.BindInterdomain(domain, port);
            a.BindInterdomain(DomainIds.Self, port);
            a.BindInterdomain(a.Own, port);
            a.BindInterdomain(a.Peer, port);
            a.ShowPort(port);
            b.ShowPending();
            a.ClosePort(port);
        });
        script.Case("far ports that bind_interdomain refuses", static (a, b) =>
        {
            Value absent = a.Tell(a.AllocUnbound(DomainIds.Self, DomainIds.Absent), "for an absent domain");
            Value own = a.Tell(a.AllocUnbound(DomainIds.Self, DomainIds.Self), "for itself");
            Value ipi = a.Tell(a.BindIpi(0), "ipi port");
            Value virq = a.Tell(a.BindVirq(Virq.Debug, 0), "virq port");
            foreach (Value port in (Value[])[absent, own, ipi, virq, 0, NoPort, 64, LastPort, LastPort + 1, 0xffff_ffffU])
                b.BindInterdomain(b.Peer, port);
            Value next = b.Tell(b.AllocUnbound(DomainIds.Self, DomainIds.Self), "next");
            b.Show(next);
            b.ClosePort(next);
            foreach (Value port in (Value[])[absent, own, ipi, virq])
                a.ClosePort(port);
        });
    });
}
