// A Debian guest with network interfaces, which a test gives commands to.

using System.Globalization;
using System.Text;
using XenSharp.Devices.Network;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>The guest, its console with a shell, and what is attached to it.</summary>
internal sealed class NetworkGuest : IAsyncDisposable
{
    /// <summary>How much is streamed: busybox moves it a KiB at a time.</summary>
    public const int StreamMiB = 1;

    private readonly ConsoleLines _console = new();
    private readonly List<NetworkBackend> _interfaces = [];
    private int _commands;

    private NetworkGuest(ToolstackContext toolstack, DomainImage image, string name, int vcpus)
        => Domain = RunningDomain.Create(
            toolstack,
            new DomainSpecification
            {
                Name = name,
                Image = image,
                MemoryMiB = 128,
                Vcpus = vcpus,
                CommandLine = $"console=hvc0 quiet {BusyboxInitramfs.PipedInputParameter}",
            },
            _console);

    public RunningDomain Domain { get; }

    public string Console => _console.Text;

    /// <summary>What was attached, in that order; what was detached too.</summary>
    public IReadOnlyList<NetworkBackend> Interfaces => _interfaces;

    /// <summary>What went through the interfaces, and what was said about them.</summary>
    public string Summary => string.Join('\n', _interfaces.Select(static vif => $"{vif.Device}: {vif.Statistics}").Concat(Reports));

    /// <summary>What the back ends said.</summary>
    public List<string> Reports { get; } = [];

    /// <summary>The kernel with a shell, and with netfront beside it and what else is wanted.</summary>
    public static Task<DomainImage> ImageAsync(CancellationToken cancellation, params InitramfsFile[] files) => DebianGuest.ImageAsync(
        DebianKernelFlavour.CloudAmd64,
        async cache =>
        {
            DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64, null, cancellation);
            string module = Path.Combine(kernel.Modules!, "kernel/drivers/net/xen-netfront.ko");
            return new BusyboxInitramfsOptions
            {
                Banner = "",
                Files = [new InitramfsFile("xen-netfront.ko", await File.ReadAllBytesAsync(module, cancellation)), .. files],
            };
        },
        reusable: true,
        cancellation);

    /// <summary>Makes a guest, which is not started yet.</summary>
    public static NetworkGuest Create(ToolstackContext toolstack, DomainImage image, string name, int vcpus)
        => new(toolstack, image, name, vcpus);

    /// <summary>Attaches an interface, before the start or while the guest runs.</summary>
    public NetworkBackend Attach(INetworkPort port, NetworkDeviceOptions options)
    {
        var backend = NetworkBackend.Create(Domain.Domain, Domain.Store.Domain0, options, port, sentence =>
        {
            lock (Reports)
                Reports.Add(sentence);
        });
        _interfaces.Add(backend);
        return backend;
    }

    /// <summary>Waits for an interface, whatever the kernel calls it, and gives it an address.</summary>
    public Task UpAsync(int number, string address, CancellationToken cancellation) => RunAsync(
        $"cd /sys/bus/xen/devices; until ls vif-{number}/net; do sleep 0.05; done 2>/dev/null; ip addr add {address} dev $(ls vif-{number}/net)"
        + $" && ip link set $(ls vif-{number}/net) up",
        cancellation);

    /// <summary>Has the shell run a command.</summary>
    /// <returns>What it printed, without the last line break.</returns>
    public async Task<string> RunAsync(string command, CancellationToken cancellation, int expected = 0)
    {
        string mark = string.Create(CultureInfo.InvariantCulture, $"@{++_commands}");
        _ = await Domain.WriteInputAsync(Encoding.ASCII.GetBytes($"echo '<''{mark}'; {command}; echo '{mark}' $?\n"), cancellation);
        string status = await _console.WaitForAsync(mark + " ", Domain.Stopped, cancellation);
        string text = Console;
        int start = text.IndexOf("<" + mark + "\r\n", StringComparison.Ordinal) + mark.Length + 3;
        string output = text[start..text.IndexOf(mark + " ", start, StringComparison.Ordinal)].ReplaceLineEndings("\n").TrimEnd('\n');
        Assert.That(status, Is.EqualTo(expected.ToString(CultureInfo.InvariantCulture)), $"{Domain.Specification.Name}: {command}\n{output}");
        return output;
    }

    public async ValueTask DisposeAsync()
    {
        Domain.Destroy();
        foreach (NetworkBackend backend in _interfaces)
            await backend.DisposeAsync();
        await Domain.DisposeAsync();
    }
}
