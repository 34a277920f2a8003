// Quotas of unprivileged domains, and what one guest can do to another or to the manager's memory.
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Tests.Xenstore;

[TestFixture]
internal sealed class XenstoreQuotaTests
{
    [Test]
    public void Nodes_are_counted_by_owner()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Nodes = 10 } });
        FakeGuest guest = store.Guest(5);
        for (int index = 1; index < 10; index++)
            Assert.That(guest.Write($"n{index}", ""), Is.Empty);
        Assert.That(guest.Write("one-more", ""), Is.EqualTo("ENOSPC"));
        Assert.That(guest.Do(XenstoreMessageType.MakeDirectory, "one-more\0"), Is.EqualTo("ENOSPC"));
        Assert.That(guest.Write("n1", "existing nodes can be written"), Is.Empty);
        guest.Do(XenstoreMessageType.Remove, "n1\0");
        guest.Do(XenstoreMessageType.Remove, "n2\0");
        Assert.That(guest.Write("a/b/c", ""), Is.EqualTo("ENOSPC"), "three for two places");
        Assert.That(guest.Read("a"), Is.EqualTo("ENOENT"), "nothing is left of it");
        Assert.That(guest.Write("a/b", ""), Is.Empty);
        Assert.That(store.Server.Database.FindDomain(5)!.Nodes, Is.EqualTo(10));
        store.Domain0.Write("/local/domain/5/by-the-host", "");
        Assert.That(store.Server.Database.FindDomain(5)!.Nodes, Is.EqualTo(11), "owned by the guest, but the host is not limited");
    }

    [Test]
    public void Nodes_are_counted_on_commit()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Nodes = 10 } });
        FakeGuest guest = store.Guest(5);
        uint first = guest.Begin();
        uint second = guest.Begin();
        for (int index = 0; index < 6; index++)
            guest.Write($"x/{index}", "", first);
        guest.Write("y", "", second);
        for (int index = 0; index < 6; index++)
            Assert.That(guest.Write($"z{index}", ""), Is.Empty);
        Assert.That(guest.End(first), Is.EqualTo("ENOSPC"));
        Assert.That(guest.End(second), Is.EqualTo("EAGAIN"));
        Assert.That(store.Server.Database.FindDomain(5)!.Nodes, Is.EqualTo(7));
    }

    [Test]
    public void A_node_is_limited_with_value_and_children()
    {
        using StoreFixture store = new();
        FakeGuest guest = store.Guest(5);
        Assert.That(guest.Write("v", new string('x', 2048 - 32 - 1)), Is.Empty);
        Assert.That(guest.Write("v", new string('x', 2048 - 32)), Is.EqualTo("ENOSPC"));
        Assert.That(guest.Write("w", new string('x', 2048 - 32)), Is.EqualTo("ENOSPC"));
        Assert.That(guest.Read("w"), Is.EqualTo("ENOENT"));
        string name = new('c', 1000);
        Assert.That(guest.Write($"d/{name}1", ""), Is.Empty);
        Assert.That(guest.Write($"d/{name}2", ""), Is.Empty);
        Assert.That(guest.Write($"d/{name}3", ""), Is.EqualTo("ENOSPC"), "the list of children is part of the node");
        store.Domain0.Write($"/local/domain/5/d/{name}3", new string('x', 3000));
        Assert.That(guest.Do(XenstoreMessageType.Remove, $"d/{name}1\0"), Is.Empty, "shrinking is always allowed");
    }

    [Test]
    public void A_change_refused_for_its_size_spoils_the_transaction()
    {
        using StoreFixture store = new();
        FakeGuest guest = store.Guest(5);
        uint transaction = guest.Begin();
        Assert.That(guest.Write("small", "", transaction), Is.Empty);
        Assert.That(guest.Write("big", new string('x', 3000), transaction), Is.EqualTo("ENOSPC"));
        Assert.That(guest.End(transaction), Is.EqualTo("ENOMEM"));
        Assert.That(guest.Read("small"), Is.EqualTo("ENOENT"));
    }

    [Test]
    public void Watches_and_transactions_are_limited_where_xenstored_limits_them()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Watches = 3, Transactions = 2 } });
        FakeGuest guest = store.Guest(5);
        for (int index = 0; index < 4; index++)
            Assert.That(guest.Watch("w", $"{index}"), Is.Empty);
        Assert.That(guest.Watch("w", "more"), Is.EqualTo("E2BIG"));
        for (int index = 0; index < 3; index++)
            guest.Begin();
        Assert.That(guest.Call(XenstoreMessageType.TransactionStart, "\0").Error, Is.EqualTo("ENOSPC"));
        FakeGuest tool = store.Tool();
        for (int index = 0; index < 10; index++)
        {
            Assert.That(tool.Watch("w", $"{index}"), Is.Empty);
            tool.Begin();
        }
    }

    [Test]
    public void A_transaction_can_look_at_so_many_nodes()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { TransactionNodes = 20 } });
        FakeGuest guest = store.Guest(5);
        uint transaction = guest.Begin();
        string error = "";
        for (int index = 0; index < 30 && error.Length == 0; index++)
            error = guest.Write($"n{index}", "", transaction);
        Assert.That(error, Is.EqualTo("ENOSPC"));
        Assert.That(guest.End(transaction), Is.EqualTo("ENOMEM"));
    }

    [Test]
    public void Memory_is_limited_in_and_out_of_transactions_and_comes_back()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Memory = 20_000 } });
        FakeGuest guest = store.Guest(5);
        string value = new('x', 1900);
        int written = 0;
        while (guest.Write($"n{written}", value) is not "EIO")
            Assert.That(++written, Is.LessThan(20));
        Assert.That(written, Is.GreaterThan(5));
        for (int index = 0; index < written; index++)
            Assert.That(guest.Do(XenstoreMessageType.Remove, $"n{index}\0"), Is.Empty);

        uint transaction = guest.Begin();
        for (int round = 0; round < 30; round++)
            Assert.That(guest.Write("same", value, transaction), Is.Empty, "only the last version counts");
        int inside = 0;
        while (guest.Write($"n{inside}", value, transaction) is not "EIO")
            Assert.That(++inside, Is.LessThan(20));
        Assert.That(guest.End(transaction, commit: false), Is.Empty);
        Assert.That(guest.Write("again", value), Is.Empty);
        guest.Do(XenstoreMessageType.Remove, "again\0");
        Assert.That(guest.AllEvents(), Is.Empty);
        Assert.That(guest.Do(XenstoreMessageType.ResetWatches, "\0"), Is.Empty);
        FakeGuest.Until(
            () =>
            {
                lock (store.Server.Database.Gate)
                    return store.Server.Database.FindDomain(5)!.Memory == 24 + 8 + "/local/domain/5".Length;
            },
            "only the guest's folder is accounted");
    }

    [Test]
    public void A_transaction_pays_for_its_own_version_of_a_node()
    {
        using StoreFixture store = new();
        FakeGuest guest = store.Guest(5);
        guest.Write("x", new string('a', 1000));
        long before = Memory();
        uint transaction = guest.Begin();
        for (int round = 0; round < 3; round++)
            guest.Write("x", new string('b', 1500), transaction);
        Assert.That(Memory() - before, Is.EqualTo(24 + 8 + 1500 + "/local/domain/5/x".Length));
        guest.End(transaction);
        Assert.That(Memory() - before, Is.EqualTo(500));

        long Memory()
        {
            // The round trip makes sure that no reply is still accounted.
            FakeGuest.Until(() => store.Connections[0].QueuedMessages == 0, "all is taken");
            lock (store.Server.Database.Gate)
                return store.Server.Database.FindDomain(5)!.Memory - (store.Connections[0].Session.Outstanding * 19);
        }
    }

    [Test]
    public void Watch_quota_includes_memory()
    {
        using StoreFixture store = new(new XenstoreOptions { Quotas = new XenstoreQuotas { Memory = 5_000 } });
        FakeGuest guest = store.Guest(5);
        Assert.That(guest.Watch("w", new string('t', 3000)), Is.Empty);
        guest.AllEvents();
        Assert.That(guest.Watch("w", new string('u', 3000)), Is.EqualTo("ENOMEM"));
    }

    [Test]
    public void A_guest_whose_events_are_not_taken_is_held_up_and_then_freed()
    {
        FakeTime time = new();
        using StoreFixture store = new(new XenstoreOptions { Time = time });
        FakeGuest writer = store.Guest(5);
        FakeGuest sleeper = store.Guest(6);
        writer.Write("shared", "");
        writer.Do(XenstoreMessageType.SetPermissions, "shared\0n5\0r6\0");
        sleeper.Watch("/local/domain/5/shared", "t");
        sleeper.AllEvents();

        // The sleeper's ring holds about twenty events and the quota twenty more; then the writer gets no answers.
        int quota = new XenstoreQuotas().Outstanding;
        string pad = new('p', 60);
        Task<int> writes = Task.Run(() =>
        {
            int count = 0;
            while (count < 100)
            {
                writer.Write($"shared/{pad}{count}", "");
                count++;
            }
            return count;
        });
        FakeGuest.Until(
            () =>
            {
                lock (store.Server.Database.Gate)
                    return store.Connections[0].Session.Throttled;
            },
            "the writer is held up");
        Assert.That(writes.IsCompleted, Is.False);
        Assert.That(store.Connections[1].QueuedMessages, Is.InRange(1, quota));
        Assert.That(sleeper.NextEvent(), Does.StartWith("/local/domain/5/shared/"));

        // Time frees the writer as often as it takes, and never more waits than the quota allows.
        while (!writes.Wait(1))
        {
            time.Advance(TimeSpan.FromSeconds(21));
            Assert.That(store.Connections[1].QueuedMessages, Is.LessThanOrEqualTo(quota));
        }
        Assert.That(writes.Result, Is.EqualTo(100));
        Assert.That(sleeper.AllEvents(), Is.Not.Empty);
    }

    [Test]
    public void Events_of_the_host_do_not_expire()
    {
        FakeTime time = new();
        using StoreFixture store = new(new XenstoreOptions { Time = time });
        FakeGuest sleeper = store.Guest(6);
        sleeper.Watch("x", "t");
        sleeper.AllEvents();
        List<string> expected = [];
        for (int index = 0; index < 100; index++)
        {
            store.Domain0.Write($"/local/domain/6/x/{index}", "");
            expected.Add($"x/{index}|t");
        }
        time.Advance(TimeSpan.FromHours(1));
        Assert.That(sleeper.AllEvents(), Is.EqualTo(expected));
    }

    /// <summary>A clock that stands until it is moved.</summary>
    private sealed class FakeTime : TimeProvider
    {
        private readonly List<FakeTimer> _timers = [];
        private long _now;

        public override long TimestampFrequency => TimeSpan.TicksPerSecond;

        public override long GetTimestamp() => Interlocked.Read(ref _now);

        public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
        {
            FakeTimer timer = new(this, () => callback(state), GetTimestamp() + dueTime.Ticks);
            lock (_timers)
                _timers.Add(timer);
            return timer;
        }

        public void Advance(TimeSpan by)
        {
            Interlocked.Add(ref _now, by.Ticks);
            FakeTimer[] due;
            lock (_timers)
            {
                due = [.. _timers.Where(timer => timer.Due <= GetTimestamp())];
                _timers.RemoveAll(timer => timer.Due <= GetTimestamp());
            }
            foreach (FakeTimer timer in due)
                timer.Fire();
        }

        private sealed class FakeTimer(FakeTime time, Action fire, long due) : ITimer
        {
            public long Due => due;

            public void Fire() => fire();

            public bool Change(TimeSpan dueTime, TimeSpan period) => throw new NotSupportedException();

            public void Dispose()
            {
                lock (time._timers)
                    time._timers.Remove(this);
            }

            public ValueTask DisposeAsync()
            {
                Dispose();
                return ValueTask.CompletedTask;
            }
        }
    }
}
