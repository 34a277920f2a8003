// The nodes that Xen's toolstack writes for a PV domain, so that a guest finds what it finds under xl.
using System.Globalization;

namespace XenSharp.Devices.Xenstore;

/// <summary>What the nodes of a domain say.</summary>
public sealed record XenstoreDomainDescription
{
    /// <summary>The guest's id.</summary>
    public required ushort DomainId { get; init; }

    /// <summary>The name people know it by.</summary>
    public required string Name { get; init; }

    public required Guid Uuid { get; init; }

    /// <summary>memory/static-max, in KiB.</summary>
    public required ulong MaximumMemoryKiB { get; init; }

    /// <summary>memory/target, in KiB: what a balloon driver shrinks or grows to.</summary>
    public required ulong TargetMemoryKiB { get; init; }

    /// <summary>How many vCPUs there can be.</summary>
    public required int MaximumVcpus { get; init; }

    /// <summary>How many of them, from vCPU 0 on, are online at the start; the others are "offline".</summary>
    public required int OnlineVcpus { get; init; }

    /// <summary>The guest's event channel port of its console, as in start_info.</summary>
    public required uint ConsolePort { get; init; }

    /// <summary>The machine frame number of the console ring, as in start_info.</summary>
    public required ulong ConsoleFrame { get; init; }

    /// <summary>The guest's event channel port of the store, as in start_info.</summary>
    public required uint StorePort { get; init; }

    /// <summary>The machine frame number of the store's ring, as in start_info.</summary>
    public required ulong StoreFrame { get; init; }

    /// <summary>The host's terminal of the console, empty if there is none.</summary>
    public string ConsoleTerminal { get; init; } = "";

    /// <summary>The kernel's file, for people; likewise the ramdisk and the command line.</summary>
    public string Kernel { get; init; } = "";

    public string? Ramdisk { get; init; }

    public string? CommandLine { get; init; }

    /// <summary>When the domain was started.</summary>
    public DateTimeOffset StartTime { get; init; }
}

/// <summary>Writes and removes the nodes of domains. Which exist, and whose they are, follows libxl of Xen 4.17.</summary>
public static class XenstoreDomainTree
{
    // XenbusStateInitialising of io/xenbus.h.
    private const string Initialising = "1";

    // How much console output is buffered for a reader, in bytes.
    private const string ConsoleLimit = "1048576";

    // What the guest owns and fills in.
    private static readonly string[] GuestNodes =
    [
        "device/suspend/event-channel", "control/shutdown", "control/feature-poweroff", "control/feature-reboot",
        "control/feature-suspend", "control/sysrq", "data", "drivers", "feature", "attr", "error",
    ];

    // What it may only read.
    private static readonly string[] ReadOnlyNodes = ["cpu", "memory", "device", "control"];

    /// <summary>The nodes about domain 0 itself that guests and tools expect.</summary>
    public static void WriteDomain0(XenstoreClient store)
    {
        ArgumentNullException.ThrowIfNull(store);
        store.Transact(static transaction =>
        {
            transaction.Write("/local/domain/0/domid", "0");
            transaction.Write("/local/domain/0/name", "Domain-0");
            transaction.Write("/tool/xenstored/domid", "0");
        });
    }

    /// <summary>
    /// Writes everything a PV domain with a console and no other device finds in the store, in one transaction: its folder
    /// /local/domain/N, /vm/UUID, /libxl/N and the console's back end. What an earlier domain of that id left there goes.
    /// </summary>
    /// <exception cref="ArgumentException">A count of vCPUs or the domain id makes no sense.</exception>
    public static void Create(XenstoreClient store, XenstoreDomainDescription domain)
    {
        ArgumentNullException.ThrowIfNull(store);
        ArgumentNullException.ThrowIfNull(domain);
        if (domain.DomainId == 0)
            throw new ArgumentException("Domain 0 is the host; give the guest an id from 1 on.", nameof(domain));
        if (domain.MaximumVcpus < 1 || domain.OnlineVcpus < 1 || domain.OnlineVcpus > domain.MaximumVcpus)
            throw new ArgumentException("A domain needs at least one vCPU online, and not more online than there are.", nameof(domain));
        store.Transact(transaction => Write(transaction, domain));
    }

    /// <summary>Removes what <see cref="Create"/> wrote, and all back ends in domain 0 for that domain.</summary>
    public static void Remove(XenstoreClient store, ushort domainId)
    {
        ArgumentNullException.ThrowIfNull(store);
        store.Transact(transaction =>
        {
            string folder = XenstorePath.OfDomain(domainId);

            // The guest can read but not write this node; still, nothing outside /vm is removed for it.
            if (transaction.Read(folder + "/vm") is { } vm && vm.StartsWith("/vm/", StringComparison.Ordinal))
                transaction.Remove(vm);
            foreach (string kind in transaction.List("/local/domain/0/backend"))
                transaction.Remove(string.Create(CultureInfo.InvariantCulture, $"/local/domain/0/backend/{kind}/{domainId}"));
            transaction.Remove(string.Create(CultureInfo.InvariantCulture, $"/libxl/{domainId}"));
            transaction.Remove(folder);
        });
    }

    /// <summary>Says what a domain's balloon is to shrink or grow to.</summary>
    /// <param name="store">The store.</param>
    /// <param name="domainId">A domain that <see cref="Create"/> wrote.</param>
    /// <param name="memoryKiB">Its memory in KiB, at most what memory/static-max says.</param>
    public static void SetMemoryTarget(XenstoreClient store, ushort domainId, ulong memoryKiB)
    {
        ArgumentNullException.ThrowIfNull(store);
        store.Transact(transaction =>
        {
            string folder = XenstorePath.OfDomain(domainId);
            transaction.Write(folder + "/memory/target", Decimal(memoryKiB));
            if (transaction.Read(folder + "/vm") is { } vm && vm.StartsWith("/vm/", StringComparison.Ordinal))
                transaction.Write(vm + "/memory", Decimal(memoryKiB >> 10));
        });
    }

    private static void Write(XenstoreTransaction store, XenstoreDomainDescription domain)
    {
        string folder = XenstorePath.OfDomain(domain.DomainId);
        string vm = $"/vm/{domain.Uuid:D}";
        string libxl = string.Create(CultureInfo.InvariantCulture, $"/libxl/{domain.DomainId}");
        XenstorePermissions guestReads = new(new XenstorePermission(0, XenstoreAccess.None),
            new XenstorePermission(domain.DomainId, XenstoreAccess.Read));
        XenstorePermissions guestOwns = new(new XenstorePermission(domain.DomainId, XenstoreAccess.None));
        XenstorePermissions hostOnly = XenstorePermissions.Domain0Only;

        foreach ((string path, XenstorePermissions permissions) in new[]
            { (folder, guestReads), (vm, guestReads), (libxl, hostOnly), (libxl + "/device", hostOnly) })
        {
            store.Remove(path);
            store.Write(path, "", permissions);
        }

        store.Write(folder + "/vm", vm);
        store.Write(folder + "/name", domain.Name);
        foreach (string name in ReadOnlyNodes)
            store.Write($"{folder}/{name}", "", guestReads);
        foreach (string name in GuestNodes)
            store.Write($"{folder}/{name}", "", guestOwns);
        store.Write(vm + "/uuid", domain.Uuid.ToString("D"));
        store.Write(vm + "/name", domain.Name);
        store.Write(folder + "/control/platform-feature-multiprocessor-suspend", "1");
        store.Write(folder + "/control/platform-feature-xs_reset_watches", "1");
        store.Write(libxl + "/type", "pv");

        store.Write(folder + "/memory/static-max", Decimal(domain.MaximumMemoryKiB));
        store.Write(folder + "/memory/target", Decimal(domain.TargetMemoryKiB));
        store.Write(folder + "/memory/videoram", "0");
        store.Write(folder + "/domid", Decimal(domain.DomainId));
        store.Write(folder + "/store/port", Decimal(domain.StorePort));
        store.Write(folder + "/store/ring-ref", Decimal(domain.StoreFrame));
        for (int vcpu = 0; vcpu < domain.MaximumVcpus; vcpu++)
        {
            store.Write(string.Create(CultureInfo.InvariantCulture, $"{folder}/cpu/{vcpu}/availability"),
                vcpu < domain.OnlineVcpus ? "online" : "offline");
        }

        store.Write(vm + "/image/ostype", "linux");
        store.Write(vm + "/image/kernel", domain.Kernel);
        store.Write(vm + "/start_time", StartTime(domain.StartTime));
        if (domain.Ramdisk is not null)
            store.Write(vm + "/image/ramdisk", domain.Ramdisk);
        if (domain.CommandLine is not null)
            store.Write(vm + "/image/cmdline", domain.CommandLine);

        WriteConsole(store, domain, folder, libxl, guestReads);
    }

    // The first console has its ring from the domain builder: its front end has no state of its own, and the guest only reads it.
    private static void WriteConsole(
        XenstoreTransaction store, XenstoreDomainDescription domain, string folder, string libxl, XenstorePermissions guestReads)
    {
        string frontEnd = folder + "/console";
        string backEnd = string.Create(CultureInfo.InvariantCulture, $"/local/domain/0/backend/console/{domain.DomainId}/0");
        string record = libxl + "/device/console/0";
        XenstorePermissions guestOwnsHostReads = new(new XenstorePermission(domain.DomainId, XenstoreAccess.None),
            new XenstorePermission(0, XenstoreAccess.Read));

        store.Remove(backEnd);
        store.Write(record + "/frontend", frontEnd);
        store.Write(record + "/backend", backEnd);

        store.Write(frontEnd, "", guestReads);
        store.Write(frontEnd + "/backend", backEnd);
        store.Write(frontEnd + "/backend-id", "0", guestOwnsHostReads);
        (string Name, string Value)[] front =
        [
            ("limit", ConsoleLimit), ("type", "xenconsoled"), ("output", "pty"), ("tty", domain.ConsoleTerminal),
            ("port", Decimal(domain.ConsolePort)), ("ring-ref", Decimal(domain.ConsoleFrame)),
        ];
        foreach ((string name, string value) in front)
            store.Write($"{frontEnd}/{name}", value, guestReads);

        store.Write(backEnd, "", guestReads);
        store.Write(backEnd + "/frontend", frontEnd);
        (string Name, string Value)[] back =
            [("frontend-id", Decimal(domain.DomainId)), ("online", "1"), ("state", Initialising), ("protocol", "vt100")];
        foreach ((string name, string value) in back)
        {
            store.Write($"{backEnd}/{name}", value);
            store.Write($"{record}/{name}", value);
        }
    }

    private static string Decimal(ulong value) => value.ToString(CultureInfo.InvariantCulture);

    // Seconds since 1970 with hundredths.
    private static string StartTime(DateTimeOffset time)
    {
        long milliseconds = time.ToUnixTimeMilliseconds();
        return string.Create(CultureInfo.InvariantCulture, $"{milliseconds / 1000}.{milliseconds % 1000 / 10:00}");
    }
}
