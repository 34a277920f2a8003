// A Debian guest with channels, which its own hvc driver finds, and with a console that anyone can look at later.

using System.Net.Sockets;
using System.Text;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 100 MB.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed class ChannelTests : KvmFixture
{
    private const string Script = """
        for n in 1 2; do
            i=0
            until [ -c /dev/hvc$n ]; do
                i=$((i + 1))
                if [ $i -gt 600 ]; then echo "@failed /dev/hvc$n"; poweroff -f; fi
                usleep 50000
            done
        done
        exec 3<>/dev/hvc1 4<>/dev/hvc2
        stty raw -echo <&3
        stty raw -echo <&4
        echo "ready" >&3
        read a <&3
        echo "to $a from the guest" >&3
        echo "ready" >&4
        read b <&4
        echo "to $b from the guest" >&4
        echo "@ready"
        read c
        echo "@typed $c"
        read a <&3
        """;

    private string _folder = null!;

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-channel-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task A_guest_has_channels_and_a_console_for_everybody(CancellationToken cancellation)
    {
        string log = Path.Combine(_folder, "guest.log");
        string path = Path.Combine(_folder, "agent");
        await using ConsoleHub console = new(new ConsoleHubOptions { Log = new ConsoleLogOptions(log) });
        DomainImage image = await DebianGuest.ImageAsync(
            DebianKernelFlavour.CloudAmd64, new BusyboxInitramfsOptions { Banner = string.Empty, InitScript = Script }, reusable: false, cancellation);
        await using RunningDomain domain = RunningDomain.Create(
            Host, new DomainSpecification { Name = "channels", Image = image, MemoryMiB = 192, Vcpus = 1, CommandLine = "console=hvc0" }, console, console);
        console.Connect(domain.WriteInputAsync);
        List<string> reports = [];
        await using ConsoleChannel socket = Channel(1, path);
        await using ConsoleChannel terminal = Channel(2, null);
        using Socket agent = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await agent.ConnectAsync(new UnixDomainSocketEndPoint(path), cancellation);
        await using NetworkStream stream = new(agent);
        await using FileStream program = new(terminal.Terminal!, new FileStreamOptions { Mode = FileMode.Open, Access = FileAccess.ReadWrite, BufferSize = 0 });
        domain.Start();
        foreach ((Stream channel, string name) in new (Stream, string)[] { (stream, "the agent"), (program, "the terminal") })
        {
            // Only then the guest's own terminals are raw, and echo no more.
            Assert.That(await LineAsync(channel), Is.EqualTo("ready"));
            await channel.WriteAsync(Encoding.ASCII.GetBytes(name + "\n"), cancellation);
            Assert.That(await LineAsync(channel), Is.EqualTo($"to {name} from the guest"));
        }

        // Somebody comes late, and sees it from the beginning.
        using ConsoleViewer viewer = console.Attach();
        Assert.That(await UntilAsync("@ready"), Does.Contain("Linux version"));
        Assert.That(await viewer.TypeAsync("by somebody\r"u8.ToArray(), cancellation), Is.True);
        await UntilAsync("@typed by somebody");
        await agent.SendAsync("end\n"u8.ToArray(), cancellation);
        DomainExit exit = await domain.Completion.WaitAsync(cancellation);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report);
        await console.CompleteAsync();
        string all = Encoding.Latin1.GetString(console.ReadHistory());
        Assert.That(await File.ReadAllTextAsync(log, Encoding.Latin1, cancellation), Is.EqualTo(all));
        Assert.That(all, Does.Not.Contain("@failed"));
        lock (reports)
            Assert.That(reports, Is.Empty);

        ConsoleChannel Channel(uint id, string? socketPath) => ConsoleChannel.Create(
            domain.Domain, domain.Store.Domain0, new ConsoleChannelOptions(id, $"org.example.agent.{id}") { SocketPath = socketPath }, sentence =>
            {
                lock (reports)
                    reports.Add(sentence);
            });

        async Task<string> LineAsync(Stream from)
        {
            List<byte> line = [];
            byte[] next = new byte[1];
            while (true)
            {
                Assert.That(await from.ReadAsync(next, cancellation).AsTask().WaitAsync(cancellation), Is.EqualTo(1), "the channel ended");
                if (next[0] == '\n')
                    return Encoding.Latin1.GetString([.. line]);
                line.Add(next[0]);
            }
        }

        async Task<string> UntilAsync(string wanted)
        {
            StringBuilder seen = new();
            byte[] batch = new byte[4096];
            while (!seen.ToString().Contains(wanted, StringComparison.Ordinal))
            {
                int count = await viewer.ReadAsync(batch, cancellation);
                Assert.That(count, Is.Positive, $"the console ended without \"{wanted}\": {seen}");
                _ = seen.Append(Encoding.Latin1.GetString(batch, 0, count));
            }
            return seen.ToString();
        }
    }
}
