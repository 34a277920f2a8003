// Which device of which domain, and where its two ends live in the store.
using System.Globalization;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Xenbus;

/// <summary>A PV device of a guest whose back end is in domain 0.</summary>
/// <param name="Kind">The kind as it is written in paths: "vbd", "vif".</param>
/// <param name="DomainId">The guest.</param>
/// <param name="Id">The device's number among the guest's of that kind; for a vbd the encoded virtual device number.</param>
public readonly record struct XenbusDevice(string Kind, ushort DomainId, uint Id)
{
    /// <summary>The guest's part, which it owns: /local/domain/N/device/KIND/ID.</summary>
    public string FrontEnd => string.Create(CultureInfo.InvariantCulture, $"/local/domain/{DomainId}/device/{Kind}/{Id}");

    /// <summary>The back end's part, which the guest may read: /local/domain/0/backend/KIND/N/ID.</summary>
    public string BackEnd => string.Create(CultureInfo.InvariantCulture, $"/local/domain/0/backend/{Kind}/{DomainId}/{Id}");

    /// <summary>The toolstack's own record of the device, which no guest sees: /libxl/N/device/KIND/ID.</summary>
    public string Record => string.Create(CultureInfo.InvariantCulture, $"/libxl/{DomainId}/device/{Kind}/{Id}");

    /// <summary>Where the back end's error is told: /local/domain/0/error/backend/KIND/N/ID, with a node "error".</summary>
    public string Error => string.Create(CultureInfo.InvariantCulture, $"/local/domain/0/error/backend/{Kind}/{DomainId}/{Id}");

    /// <summary>The device for people: "vbd 51712 of domain 3".</summary>
    public override string ToString() => string.Create(CultureInfo.InvariantCulture, $"{Kind} {Id} of domain {DomainId}");

    /// <summary>
    /// Writes the nodes of both ends, and the toolstack's record, as libxl's libxl__device_generic_add does. What an earlier device of
    /// that name left goes.
    /// </summary>
    internal void WriteNodes(XenstoreTransaction store, XenbusNodes nodes)
    {
        XenstorePermissions guestOwns = new(new XenstorePermission(DomainId, XenstoreAccess.None), new XenstorePermission(0, XenstoreAccess.Read));
        XenstorePermissions guestReads = new(new XenstorePermission(0, XenstoreAccess.None), new XenstorePermission(DomainId, XenstoreAccess.Read));
        string initialising = Number((uint)XenbusState.Initialising);

        store.Remove(Record);
        store.Remove(BackEnd);
        store.Remove(FrontEnd);
        store.Remove(Error);
        store.Write(Record + "/frontend", FrontEnd);
        store.Write(Record + "/backend", BackEnd);

        store.Write(FrontEnd, "", guestOwns);
        store.Write(FrontEnd + "/backend", BackEnd);
        store.Write(FrontEnd + "/backend-id", "0", guestOwns);
        store.Write(FrontEnd + "/state", initialising, guestOwns);
        foreach ((string name, string value) in nodes.FrontEnd)
            store.Write($"{FrontEnd}/{name}", value, guestOwns);
        foreach ((string name, string value) in nodes.ReadOnlyFrontEnd)
            store.Write($"{FrontEnd}/{name}", value, guestReads);

        store.Write(BackEnd, "", guestReads);
        store.Write(BackEnd + "/frontend", FrontEnd);
        foreach ((string name, string value) in
                 (IEnumerable<(string, string)>)[("frontend-id", Number(DomainId)), ("online", "1"), ("state", initialising), .. nodes.BackEnd])
        {
            store.Write($"{BackEnd}/{name}", value);
            store.Write($"{Record}/{name}", value);
        }
    }

    /// <summary>Removes all that there is of the device, and folders that are empty then (libxl__device_destroy).</summary>
    internal void RemoveNodes(XenstoreTransaction store)
    {
        foreach (string path in new[] { Record, FrontEnd, BackEnd, Error })
        {
            store.Remove(path);

            // The folder of the kind, and above a back end's that of the domain.
            string parent = XenstorePath.ParentOf(path);
            for (int level = 0; level < 2 && store.Exists(parent) && store.List(parent).Count == 0 && !IsKept(parent); level++)
            {
                store.Remove(parent);
                parent = XenstorePath.ParentOf(parent);
            }
        }
    }

    private static string Number(uint value) => value.ToString(CultureInfo.InvariantCulture);

    // The guest's and the record's folder of all devices belong to the domain's tree.
    private static bool IsKept(string path) => XenstorePath.NameOf(path) == "device";
}

/// <summary>The nodes that a device has from the beginning, besides those that every device has (frontend, frontend-id, backend,
/// backend-id, online, state).</summary>
public sealed record XenbusNodes
{
    /// <summary>Nodes of the back end, which the guest can read: name, relative to its folder, and value.</summary>
    public IReadOnlyList<(string Name, string Value)> BackEnd { get; init; } = [];

    /// <summary>Nodes of the front end, which the guest owns.</summary>
    public IReadOnlyList<(string Name, string Value)> FrontEnd { get; init; } = [];

    /// <summary>Nodes in the front end's folder that the guest can only read.</summary>
    public IReadOnlyList<(string Name, string Value)> ReadOnlyFrontEnd { get; init; } = [];
}
