// The table of top: what domains have done since the last look.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>Makes xentop's table of one look after another.</summary>
internal sealed class TopTable
{
    private const string Heading =
        "      NAME  STATE   CPU(sec) CPU(%)     MEM(k) MEM(%)  MAXMEM(k) MAXMEM(%) VCPUS NETS NETTX(k) NETRX(k) VBDS   VBD_RD   VBD_WR  VBD_RSECT  VBD_WSECT";

    private const int SectorSize = 512;

    private Dictionary<int, double> _earlier = [];
    private long _time;

    /// <summary>The next table.</summary>
    /// <param name="domains">The domains as they are now.</param>
    /// <param name="host">The machine.</param>
    /// <param name="now">When, as <see cref="Stopwatch.GetTimestamp"/> has it.</param>
    internal IReadOnlyList<string> Next(IReadOnlyList<DomainInfo> domains, HostInfo host, long now)
    {
        double elapsed = _time == 0 ? 0 : Stopwatch.GetElapsedTime(_time, now).TotalSeconds;
        var rows = domains.Select(domain => (Domain: domain, Load: LoadOf(domain, elapsed))).ToList();
        _earlier = domains.ToDictionary(static domain => domain.Id, static domain => domain.ProcessorSeconds);
        _time = now;
        var lines = new List<string>
        {
            string.Create(CultureInfo.InvariantCulture, $"xensharp top - {DateTime.Now:HH:mm:ss}   {host.Host}   XenSharp {host.Version} (Xen {host.XenVersion})"),
            string.Create(
                CultureInfo.InvariantCulture,
                $"{domains.Count} domains: {Count(static state => state.Running)} running, {Count(static state => state.Blocked)} blocked, {Count(static state => state.Paused)} paused, "
                + $"{Count(static state => state.Crashed)} crashed, {Count(static state => state.Dying)} dying, {Count(static state => state.Shutdown)} shutdown"),
            string.Create(
                CultureInfo.InvariantCulture,
                $"Mem: {host.TotalMemoryMiB << 10}k total, {(host.TotalMemoryMiB - host.FreeMemoryMiB) << 10}k used, {host.FreeMemoryMiB << 10}k free    CPUs: {host.Processors}"),
            Heading,
        };
        lines.AddRange(rows.OrderByDescending(static row => row.Load).ThenBy(static row => row.Domain.Id).Select(row => Row(row.Domain, row.Load, host)));
        return lines;

        int Count(Func<DomainStateInfo, bool> which) => domains.Count(domain => which(domain.State));
    }

    /// <summary>Processor time as a share of the time that has passed, in percent; above 100 for more than one vCPU.</summary>
    private double LoadOf(DomainInfo domain, double elapsed)
        => elapsed > 0 && _earlier.TryGetValue(domain.Id, out double before) ? Math.Max(0, domain.ProcessorSeconds - before) / elapsed * 100 : 0;

    private static string Row(DomainInfo domain, double load, HostInfo host)
    {
        double total = Math.Max(1, host.TotalMemoryMiB << 10);
        string name = domain.Name.Length > 10 ? domain.Name[..10] : domain.Name;
        DomainIoStatistics io = domain.Io;
        return string.Create(
            CultureInfo.InvariantCulture,
            $"{name,10} {domain.State.Letters,6} {domain.ProcessorSeconds,10:0} {load,6:0.0} {domain.MemoryKiB,10} {domain.MemoryKiB / total * 100,6:0.0} "
            + $"{domain.MaximumMemoryKiB,10} {domain.MaximumMemoryKiB / total * 100,9:0.0} {domain.MaximumVcpus,5} {io.NetworkDevices,4} {io.NetworkBytesSent >> 10,8} "
            + $"{io.NetworkBytesReceived >> 10,8} {io.BlockDevices,4} {io.BlockReads,8} {io.BlockWrites,8} {io.BlockBytesRead / SectorSize,10} {io.BlockBytesWritten / SectorSize,10}");
    }
}
