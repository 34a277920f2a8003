// Domains that know of each other: their numbers, what they may learn of each other, and event channels between them.
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Mmu;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class DomainManagerTests
{
    private const ulong AllocUnbound = 6;
    private const ulong BindInterdomain = 0;
    private const ulong Send = 4;
    private const ulong Status = 5;

    private DomainManager _manager = null!;

    [SetUp]
    public void SetUp() => _manager = new DomainManager();

    [Test]
    public void Numbers_are_handed_out_above_the_last_and_may_be_chosen()
    {
        using (FakeDomain first = Create(), second = Create(), third = Create(7))
        {
            Assert.That(new[] { first, second, third }.Select(static domain => domain.Domain.Id.Value), Is.EqualTo(new[] { 1, 2, 7 }));
            Assert.That(() => Create(7), Throws.TypeOf<DomainBuildException>());
            Assert.That(_manager.Domains, Is.EquivalentTo(new[] { first.Domain, second.Domain, third.Domain }));
        }

        Assert.That(_manager.Domains, Is.Empty);
        using FakeDomain later = Create();
        Assert.That(later.Domain.Id.Value, Is.EqualTo(3), "a number is not used again at once");
        using FakeDomain last = Create(DomainId.FirstReserved - 1);
        Assert.That(() => Create(DomainId.FirstReserved), Throws.TypeOf<DomainBuildException>());
    }

    [Test]
    public void Numbers_begin_anew_after_the_last_that_a_domain_can_have()
    {
        for (int i = 1; i < DomainId.FirstReserved; i++)
            Assert.That(_manager.Reserve(0), Is.EqualTo(i));
        Assert.That(() => _manager.Reserve(0), Throws.TypeOf<DomainBuildException>());
        _manager.Remove(3);
        _manager.Remove(9);
        Assert.That((_manager.Reserve(0), _manager.Reserve(0)), Is.EqualTo((3, 9)));
    }

    /// <summary>No processor identity has room for so many vCPUs, which shows before the builder begins.</summary>
    [Test]
    public void A_domain_that_cannot_be_made_gives_its_number_back()
    {
        Assert.That(() => new FakeDomain(change: static options => options with { Id = 5, Vcpus = int.MaxValue }, manager: _manager), Throws.InstanceOf<ArgumentException>());
        using FakeDomain next = Create(5);
        Assert.That(_manager.Domains, Is.EqualTo(new[] { next.Domain }));
    }

    [Test]
    public void Each_domain_has_machine_frames_of_its_own()
    {
        const ulong first = 0x10_0000;
        Mfn[] taken = [_manager.TakeFrames(0x401), _manager.TakeFrames(0x200), _manager.TakeFrames(1)];
        Assert.That(taken, Is.EqualTo(new Mfn[] { new(first), new(first + 0x600), new(first + 0x800) }));
        Assert.That((_manager.MachineFrames->First, _manager.MachineFrames->End), Is.EqualTo((first, first + 0x801)));
        _manager.ReturnFrames(taken[1]);
        Assert.That(_manager.TakeFrames(0x201), Is.EqualTo(new Mfn(first + 0xa00)), "too large for what is free between others");
        Assert.That(_manager.TakeFrames(0x200), Is.EqualTo(taken[1]));
    }

    [Test]
    public void A_frame_that_another_domain_has_is_not_ones_own_to_map()
    {
        using FakeDomain one = Create();
        Mfn others = _manager.TakeFrames(1);
        const ulong writable = 0x63;
        Assert.That(one.Call(HypercallNumber.UpdateVaMapping, FakeDomain.Data, others.Address.Value | writable), Is.EqualTo(-(long)Errno.EBUSY));
        Assert.That(one.Call(HypercallNumber.UpdateVaMapping, FakeDomain.Data, (others + 1).Address.Value | writable), Is.EqualTo(-(long)Errno.EPERM));
    }

    [Test]
    public void A_domain_learns_which_others_there_are_and_may_do_nothing_to_them()
    {
        using FakeDomain one = Create();
        long TryMmu(ushort domain)
        {
            one.WriteAll(FakeDomain.Data, 0, 0);
            return one.Call(HypercallNumber.MmuUpdate, FakeDomain.Data, 1, 0, domain);
        }

        Assert.That(TryMmu(2), Is.EqualTo(-(long)Errno.ESRCH));
        using (FakeDomain two = Create())
        {
            Assert.That(TryMmu(2), Is.EqualTo(-(long)Errno.EPERM));
            Assert.That(TryMmu(1), Is.EqualTo(-(long)Errno.ESRCH), "oneself by number");
            Assert.That(one.Call(HypercallNumber.MmuUpdate, FakeDomain.Data, 1, 0, DomainId.Self.Value | (3UL << 16)), Is.EqualTo(-(long)Errno.EPERM));
            Assert.That(StatusOf(one, 2, 1), Is.EqualTo(-(long)Errno.EPERM));
        }

        Assert.That(TryMmu(2), Is.EqualTo(-(long)Errno.ESRCH));
        Assert.That(one.Call(HypercallNumber.MmuUpdate, FakeDomain.Data, 1, 0, DomainId.Self.Value | (3UL << 16)), Is.EqualTo(-(long)Errno.ESRCH));
        Assert.That(StatusOf(one, 2, 1), Is.EqualTo(-(long)Errno.ESRCH));
    }

    [Test]
    public void Two_domains_send_each_other_events_until_one_is_gone()
    {
        using FakeDomain one = Create();
        FakeDomain two = Create();
        one.Write(FakeDomain.Data, DomainId.Self.Value | (2u << 16));
        Assert.That(one.Call(HypercallNumber.EventChannelOp, AllocUnbound, FakeDomain.Data), Is.Zero);
        uint port = one.Read<uint>(FakeDomain.Data + 4);
        Assert.That(Bind(two, 1, port, out uint far), Is.Zero);
        Assert.That(Bind(two, 1, port, out _), Is.EqualTo(-(long)Errno.EINVAL), "it is bound");
        Assert.That(StatusOf(one, DomainId.Self.Value, port), Is.Zero);
        Assert.That((one.Read<uint>(FakeDomain.Data + 8), one.Read<ushort>(FakeDomain.Data + 16), one.Read<uint>(FakeDomain.Data + 20)), Is.EqualTo((2u, 2, far)));

        one.Write(FakeDomain.Data, port);
        Assert.That(IsPending(two, far), Is.True, "what may have been sent before");
        ClearPending(two, far);
        Assert.That(one.Call(HypercallNumber.EventChannelOp, Send, FakeDomain.Data), Is.Zero);
        Assert.That((IsPending(one, port), IsPending(two, far)), Is.EqualTo((false, true)));
        two.Write(FakeDomain.Data, far);
        Assert.That(two.Call(HypercallNumber.EventChannelOp, Send, FakeDomain.Data), Is.Zero);
        Assert.That(IsPending(one, port), Is.True);

        two.Dispose();
        Assert.That(StatusOf(one, DomainId.Self.Value, port), Is.Zero);
        Assert.That((one.Read<uint>(FakeDomain.Data + 8), one.Read<ushort>(FakeDomain.Data + 16)), Is.EqualTo((1u, 2)), "waits for one of that number");
        one.Write(FakeDomain.Data, port);
        Assert.That(one.Call(HypercallNumber.EventChannelOp, Send, FakeDomain.Data), Is.Zero, "and is lost");
        using FakeDomain again = Create(2);
        Assert.That(Bind(again, 1, port, out _), Is.Zero);
    }

    private static long Bind(FakeDomain domain, ushort remote, uint port, out uint local)
    {
        domain.Write(FakeDomain.Data, remote | ((ulong)port << 32));
        long result = domain.Call(HypercallNumber.EventChannelOp, BindInterdomain, FakeDomain.Data);
        local = domain.Read<uint>(FakeDomain.Data + 8);
        return result;
    }

    private static long StatusOf(FakeDomain domain, ushort of, uint port)
    {
        domain.Write(FakeDomain.Data, of | ((ulong)port << 32));
        return domain.Call(HypercallNumber.EventChannelOp, Status, FakeDomain.Data);
    }

    private static bool IsPending(FakeDomain domain, uint port) => (*PendingWord(domain, port) & (1UL << (int)(port % 64))) != 0;

    private static void ClearPending(FakeDomain domain, uint port) => *PendingWord(domain, port) &= ~(1UL << (int)(port % 64));

    private static ulong* PendingWord(FakeDomain domain, uint port)
        => (ulong*)(domain.Context->Domain->SharedInfo + SharedInfoLayout.EvtchnPending) + (port / 64);

    private FakeDomain Create(ushort id = 0) => new(change: options => options with { Id = id }, manager: _manager);
}
