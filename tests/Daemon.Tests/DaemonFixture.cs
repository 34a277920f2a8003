// A daemon in this process, on a socket and with records of its own.

using XenSharp.Api;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;
using XenSharp.Toolstack.Tests;

namespace XenSharp.Daemon.Tests;

/// <summary>Each test has a daemon, a typed client and a plain one.</summary>
public abstract class DaemonFixture
{
    private TemporaryFolder _folder = null!;

    private protected KvmHost Host { get; private set; } = null!;

    private protected DaemonServer Server { get; private set; } = null!;

    private protected DaemonClient Client { get; private set; } = null!;

    private protected HttpClient Raw { get; private set; } = null!;

    private protected DaemonOptions Options => new()
    {
        Socket = FileOf("run/xensharp.sock"),
        StateFolder = FileOf("state"),
        XenstoreSocket = FileOf("run/xenstored/socket"),
        Version = "1.2.3",
    };

    [SetUp]
    public async Task StartDaemonAsync()
    {
        _folder = new TemporaryFolder();
        Host = new KvmHost();
        Server = await DaemonServer.StartAsync(Host, Options, new ManagerLog());
        Client = new DaemonClient(Options.Socket);
        Raw = RawClient.Create(Options.Socket);
    }

    [TearDown]
    public async Task EndDaemonAsync()
    {
        Raw.Dispose();
        Client.Dispose();
        await Server.DisposeAsync();
        Assert.That(File.Exists(Options.Socket), Is.False, "its socket is gone");
        Host.Dispose();
        _folder.Dispose();
    }

    private protected string FileOf(string name) => _folder.File(name);

    private protected static async Task<ApiProblem> RefusedAsync(Func<Task> request, string kind, int status)
    {
        try
        {
            await request();
        }
        catch (DaemonException refusal)
        {
            Assert.That((refusal.Kind, refusal.Problem?.Status), Is.EqualTo((kind, status)), refusal.Message);
            return refusal.Problem!;
        }

        throw new AssertionException($"It was not refused ({kind}).");
    }
}
