// A Debian guest with network interfaces, which a test gives commands to.

using System.Globalization;
using System.Text;
using XenSharp.Cli.Hosting;
using XenSharp.Devices.Network;
using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Boot.Tests;

/// <summary>The guest, its console with a shell, and what is attached to it.</summary>
internal sealed class NetworkGuest : IAsyncDisposable
{
    private readonly ConsoleLines _console = new();
    private readonly List<NetworkBackend> _interfaces = [];
    private int _commands;

    private NetworkGuest(KvmHost host, DomainImage image, string name, int vcpus, DomainManager manager)
        => Domain = RunningDomain.Create(
            host,
            new DomainSpecification
            {
                Name = name,
                Image = image,
                MemoryMiB = 128,
                Vcpus = vcpus,
                CommandLine = $"console=hvc0 quiet {BusyboxInitramfs.PipedInputParameter}",
            },
            _console,
            manager: manager);

    public RunningDomain Domain { get; }

    public string Console => _console.Text;

    /// <summary>What the back ends said.</summary>
    public List<string> Reports { get; } = [];

    /// <summary>The kernel with a shell, and with netfront beside it.</summary>
    public static Task<DomainImage> ImageAsync(CancellationToken cancellation) => DebianGuest.ImageAsync(
        DebianKernelFlavour.CloudAmd64,
        async cache =>
        {
            DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64, null, cancellation);
            string module = Path.Combine(kernel.Modules!, "kernel/drivers/net/xen-netfront.ko");
            return new BusyboxInitramfsOptions
            {
                Banner = "",
                Files = [new InitramfsFile("xen-netfront.ko", await File.ReadAllBytesAsync(module, cancellation))],
            };
        },
        reusable: true,
        cancellation);

    /// <summary>Makes a guest, which is not started yet.</summary>
    public static NetworkGuest Create(KvmHost host, DomainImage image, string name, int vcpus, DomainManager manager)
        => new(host, image, name, vcpus, manager);

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
