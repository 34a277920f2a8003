// The commands of xl's: what they ask the daemon for, and what they print in which columns.

using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Configuration;

namespace XenSharp.Cli.Tests.Management;

[TestFixture]
[NonParallelizable]
[CancelAfter(120_000)]
public sealed class ManagementCommandTests
{
    private static readonly DomainInfo s_web = new()
    {
        Id = 3,
        Name = "web",
        Uuid = Guid.Parse("550e8400-e29b-41d4-a716-446655440000"),
        State = new DomainStateInfo { Blocked = true },
        MemoryKiB = 512 << 10,
        TargetMemoryKiB = 512 << 10,
        MaximumMemoryKiB = 1024 << 10,
        OnlineVcpus = 2,
        MaximumVcpus = 4,
        ProcessorSeconds = 12.34,
        StartTime = DateTimeOffset.UnixEpoch,
        UptimeSeconds = 93_784,
    };

    private static readonly DomainInfo s_old = s_web with
    {
        Id = 12,
        Name = "old guest",
        State = new DomainStateInfo { Shutdown = true, Reason = DomainShutdownReason.Reboot },
        UptimeSeconds = 61,
    };

    private static readonly string s_domains = JsonSerializer.Serialize([s_web, s_old], ApiJson.Default.IReadOnlyListDomainInfo);

    private FakeDaemon _daemon = null!;
    private string _folder = null!;

    [SetUp]
    public void StartDaemon()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-management-").FullName;
        _daemon = new FakeDaemon()
            .On("GET /v1/domains", s_domains)
            .On("GET /v1/domains/web", Json(s_web))
            .On("GET /v1/domains/3", Json(s_web))
            .On("GET /v1/domains/12", Json(s_old))
            .On("GET /v1/host", Json(Host()))
            .OnProblem("GET /v1/domains/none", 404, ProblemKind.NoSuchDomain, "There is no domain none.");
    }

    [TearDown]
    public void StopDaemon()
    {
        _daemon.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task ListHasXlsColumns()
    {
        CommandEnd end = await RunAsync("list");
        Assert.That(end, Is.EqualTo(new CommandEnd(0, """
            Name                                        ID   Mem VCPUs	State	Time(s)
            web                                          3   512     2     -b----      12.3
            old guest                                   12   512     2     ---s--      12.3

            """, "")));
        Assert.That((await RunAsync("list web")).Output.Split('\n'), Has.Length.EqualTo(3));
        end = await RunAsync("list none");
        Assert.That((end.Status, end.Error), Is.EqualTo((1, "xensharp: There is no domain none.\n")));
    }

    [Test]
    public async Task ListVerboseHasUuidsAndReasons()
    {
        string[] lines = (await RunAsync("list -v")).Output.Split('\n');
        Assert.That(lines[0], Does.EndWith("   UUID                            Reason-Code\tSecurity Label"));
        Assert.That(lines[1], Does.EndWith("12.3 550e8400-e29b-41d4-a716-446655440000        -                -"));
        Assert.That(lines[2], Does.EndWith("12.3 550e8400-e29b-41d4-a716-446655440000        1                -"));
    }

    [Test]
    public async Task ListHasXlsFurtherColumns()
    {
        string[] lines = (await RunAsync("list -Z -c -n")).Output.Split('\n');
        Assert.That(lines[0], Does.EndWith("Time(s)   Security Label         Cpupool NODE Affinity"));
        Assert.That(lines[1], Does.EndWith("12.3                -          Pool-0 all"));
    }

    [Test]
    public async Task VmListHasXlsColumns() => Assert.That(await RunAsync("vm-list"), Is.EqualTo(new CommandEnd(0, $"""
        UUID                                  ID    name
        550e8400-e29b-41d4-a716-446655440000  3    {"web",-30}
        550e8400-e29b-41d4-a716-446655440000  12    {"old guest",-30}

        """, "")));

    [Test]
    public async Task ChannelListHasXlsColumns()
    {
        _daemon.On("GET /v1/domains/web/channels", JsonSerializer.Serialize(
            [
                new ChannelInfo { DeviceId = 1, Name = "org.example.agent", Connection = "pty", Path = "/dev/pts/4", State = 4, EventChannel = 9, RingReference = 77 },
                new ChannelInfo { DeviceId = 2, Name = "other", Connection = "socket", Path = "/run/s" },
            ],
            ApiJson.Default.IReadOnlyListChannelInfo));
        string[] lines = (await RunAsync("channel-list web")).Output.Split('\n');
        Assert.That(lines.Select(static line => line.TrimEnd()), Is.EqualTo(new[]
        {
            "Idx BE state evt-ch ring-ref connection",
            "0   0  4     9      77       pty        /dev/pts/4",
            "1   0  0     -1     -1       socket     /run/s",
            "",
        }));
    }

    [TestCase("li -v")]
    [TestCase("-v list -v")]
    [TestCase("-vvf -tT lis -v")]
    public async Task NamesMayBeCutShortAndHaveXlsGlobalOptionsBefore(string command)
        => Assert.That(await RunAsync(command), Is.EqualTo(await RunAsync("list -v")));

    [Test]
    public async Task ADryRunPrintsTheDeviceAndAsksForNothing()
    {
        CommandEnd end = await RunAsync("-N block-attach web /a,raw,xvdb,r");
        Assert.That(end.Output, Does.StartWith("disk: {"));
        using JsonDocument disk = JsonDocument.Parse(end.Output[6..]);
        Assert.That((disk.RootElement.GetProperty("vdev").GetString(), disk.RootElement.GetProperty("readwrite").GetInt32()), Is.EqualTo(("xvdb", 0)));
        end = await RunAsync("-N network-att web bridge=lan");
        using JsonDocument vif = JsonDocument.Parse(end.Output[5..]);
        Assert.That(vif.RootElement.GetProperty("bridge").GetString(), Is.EqualTo("lan"));
        end = await RunAsync("-N", "create", "--name", "x", "--kernel", "/k");
        Assert.That(end.Output, Does.Contain("\"domid\": null"));
        Assert.That(_daemon.Requests, Is.Empty);
    }

    /// <summary>The one who asked gives up while the daemon is at it: the domain goes by the UUID that it was to have, whatever became of it.</summary>
    [TestCase(404, "xensharp: The domain web was not made, as a signal asked to end.\n")]
    [TestCase(204, "xensharp: The domain web was not made, as a signal asked to end.\n")]
    [TestCase(500, "xensharp: The domain web may have been made all the same; xensharp list shows whether it was.\n")]
    public async Task ASignalTakesBackWhatCreateHasBegun(int status, string said)
    {
        var asked = new TaskCompletionSource<Guid>(TaskCreationOptions.RunContinuationsAsynchronously);
        _daemon.OnStream("POST /v1/domains", async (request, stream) =>
        {
            Guid uuid = JsonSerializer.Deserialize(request.Body, ApiJson.Default.CreateDomainRequest)!.Uuid!.Value;
            string line = $"DELETE /v1/domains/{uuid}";
            _ = status switch
            {
                204 => _daemon.On(line, null),
                404 => _daemon.OnProblem(line, 404, ProblemKind.NoSuchDomain, "There is no such domain."),
                _ => _daemon.OnProblem(line, status, ProblemKind.Failed, "It hangs."),
            };
            asked.SetResult(uuid);

            // No answer comes before the client has gone.
            _ = await stream.ReadAsync(new byte[1]);
        });
        using CommandProcess process = CommandProcess.Start("create", "--daemon", _daemon.Path, "--name", "web", "--kernel", "/k");
        Guid asking = await asked.Task;
        process.Send(2);
        CommandEnd end = await process.FinishAsync();
        Assert.That((end.Status, end.Error), Is.EqualTo((130, said)));
        Assert.That(_daemon.Requests.Select(static request => request.Line), Is.EqualTo(new[] { "POST /v1/domains", $"DELETE /v1/domains/{asking}" }));
    }

    [Test]
    public async Task ListJsonIsWhatTheDaemonSaid()
    {
        using JsonDocument found = JsonDocument.Parse((await RunAsync("list --json")).Output);
        Assert.That(found.RootElement.EnumerateArray().Select(static one => one.GetProperty("name").GetString()), Is.EqualTo(new[] { "web", "old guest" }));
    }

    [Test]
    public async Task ListLongIsLibxlsJson()
    {
        var configuration = new DomainConfiguration { Name = "before it was renamed", Kernel = "/k", MemoryMiB = 512, Vcpus = 2, MaxVcpus = 4, CommandLine = "ro" };
        string document = $"{{\"json\":{DomainConfigurationJson.Write(configuration)}}}";
        _daemon.On("GET /v1/domains/3/config", document).OnProblem("GET /v1/domains/12/config", 404, ProblemKind.NoSuchDomain, "It is gone.");
        using JsonDocument all = JsonDocument.Parse((await RunAsync("list -l")).Output);
        JsonElement one = all.RootElement.EnumerateArray().Single();
        Assert.That(one.GetProperty("domid").GetInt32(), Is.EqualTo(3));
        JsonElement config = one.GetProperty("config");
        Assert.Multiple(() =>
        {
            Assert.That(config.GetProperty("c_info").GetProperty("name").GetString(), Is.EqualTo("web"));
            Assert.That(config.GetProperty("c_info").GetProperty("uuid").GetString(), Is.EqualTo("550e8400-e29b-41d4-a716-446655440000"));
            Assert.That(config.GetProperty("b_info").GetProperty("target_memkb").GetInt64(), Is.EqualTo(512 << 10));
            Assert.That(config.GetProperty("b_info").GetProperty("avail_vcpus").GetArrayLength(), Is.EqualTo(2));
            Assert.That(config.GetProperty("on_reboot").GetString(), Is.EqualTo("restart"));
        });
        using JsonDocument single = JsonDocument.Parse((await RunAsync("list -l web")).Output);
        Assert.That(single.RootElement.GetProperty("domid").GetInt32(), Is.EqualTo(3));
    }

    [Test]
    public async Task ListLostShowsWhatAnEarlierDaemonLeft()
    {
        _daemon.On("GET /v1/lost", JsonSerializer.Serialize(
            [new LostDomain { Name = "gone", Uuid = s_web.Uuid, Id = 9, StartTime = DateTimeOffset.UnixEpoch, FoundLost = DateTimeOffset.UnixEpoch, Configuration = new() }],
            ApiJson.Default.IReadOnlyListLostDomain));
        Assert.That((await RunAsync("list --lost")).Output.Split('\n')[1], Does.StartWith("gone ").And.Contain(" 550e8400-e29b-41d4-a716-446655440000 "));
    }

    [TestCase("pause web", "POST /v1/domains/web/pause", "")]
    [TestCase("unpause 3", "POST /v1/domains/3/unpause", "")]
    [TestCase("destroy web", "DELETE /v1/domains/web", "")]
    [TestCase("sysrq web s", "POST /v1/domains/web/sysrq", """{"key":"s"}""")]
    [TestCase("trigger web nmi", "POST /v1/domains/web/trigger", """{"trigger":"Nmi","vcpu":0}""")]
    [TestCase("trigger web s3resume 1", "POST /v1/domains/web/trigger", """{"trigger":"S3Resume","vcpu":1}""")]
    [TestCase("vcpu-set web 2", "PUT /v1/domains/web/vcpus", """{"online":2}""")]
    [TestCase("vcpu-set -i web 64", "PUT /v1/domains/web/vcpus", """{"online":64}""")]
    [TestCase("mem-set web 256", "PUT /v1/domains/web/memory/target", """{"memoryKiB":262144}""")]
    [TestCase("mem-max web 1g", "PUT /v1/domains/web/memory/max", """{"memoryKiB":1048576}""")]
    [TestCase("destroy -f web", "DELETE /v1/domains/web", "")]
    [TestCase("block-detach web xvdb", "DELETE /v1/domains/web/block/xvdb", "")]
    [TestCase("block-detach -f web xvdb", "DELETE /v1/domains/web/block/xvdb?force=true", "")]
    [TestCase("network-detach web 00:16:3e:00:00:01", "DELETE /v1/domains/web/network/00%3A16%3A3e%3A00%3A00%3A01", "")]
    public async Task ACommandAsksTheDaemonForOneThing(string command, string line, string body)
    {
        _daemon.On(line, null);
        Assert.That(await RunAsync(command), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(_daemon.Requests[^1], Is.EqualTo(new FakeRequest(line, body)));

        _daemon.OnProblem(line, 409, ProblemKind.WrongState, "It cannot be done now; wait.");
        Assert.That(await RunAsync(command), Is.EqualTo(new CommandEnd(1, "", "xensharp: It cannot be done now; wait.\n")));
    }

    [TestCase("sysrq web sync", "one letter or digit; \"sync\" is none")]
    [TestCase("trigger web explode", "\"explode\" is none of them")]
    [TestCase("trigger web 0", "\"0\" is none of them")]
    [TestCase("trigger web nmi -1", "-1")]
    [TestCase("trigger web nmi x", "\"x\" is none")]
    [TestCase("vcpu-set web 0", "from 1 on; \"0\" is none")]
    [TestCase("mem-set web 1.5", "\"1.5\" is none")]
    [TestCase("mem-set web 5x", "\"5x\" is none")]
    [TestCase("mem-set web 99999999999999g", "is none")]
    [TestCase("mem-set web 0", "\"0\" is none")]
    [TestCase("mem-set web", "mem-set takes <Domain> and <")]
    [TestCase("list -z", "does not know \"-z\"")]
    [TestCase("destroy --force", "does not know \"--force\"")]
    [TestCase("vcpu-pin web 0", "vcpu-pin takes <Domain> and <VCPU|all> and <CPUs|all>")]
    [TestCase("vcpu-pin web x 0", "\"x\" is neither")]
    [TestCase("vcpu-pin web 0 0-", "\"0-\" is no such name")]
    [TestCase("vcpu-pin web 0 1 2", "leave them out")]
    [TestCase("shutdown", "takes a domain, or --all")]
    [TestCase("reboot -a web", "not both")]
    [TestCase("save web f -c -p", "not both")]
    [TestCase("console -t serial web", "\"serial\" is another")]
    [TestCase("console -n x web", "\"x\" is none")]
    [TestCase("create", "Name a configuration file")]
    [TestCase("create a b", "\"b\" is another")]
    [TestCase("create -f a b", "\"b\" is another")]
    [TestCase("top --delay 0", "\"0\" is no such number")]
    [TestCase("completion tcsh", "\"tcsh\" is none of them")]
    [TestCase("restore", "restore takes <")]
    public async Task ACommandLineThatMeansNothingIsRefused(string command, string part)
    {
        CommandEnd end = await RunAsync(command);
        Assert.That((end.Status, end.Output), Is.EqualTo((ExitStatus2, "")), end.Error);
        Assert.That(end.Error, Does.Contain(part).And.EndsWith(" --help.\n"));
        Assert.That(_daemon.Requests, Is.Empty);
    }

    [Test]
    public async Task MoreVcpusThanTheHostHasProcessorsNeedAWord()
    {
        CommandEnd end = await RunAsync("vcpu-set web 64");
        Assert.That((end.Status, end.Error), Is.EqualTo((1, "xensharp: 64 vCPUs are more than the host's 8 processors; --ignore-host brings them online all the same.\n")));
    }

    [TestCase("vcpu-pin web 1 0-3,^1", """{"vcpu":1,"processors":"0-3,^1"}""")]
    [TestCase("vcpu-pin web all all -", """{"processors":"all"}""")]
    public async Task VcpusArePinned(string command, string body)
    {
        _daemon.On("PUT /v1/domains/web/vcpus/processors", null);
        Assert.That(await RunAsync(command), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(_daemon.Requests[^1].Body, Is.EqualTo(body));
    }

    [Test]
    public async Task AnAffinityThatIsToStayIsLeftAlone()
    {
        Assert.That(await RunAsync("vcpu-pin web 0 - all"), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(_daemon.Requests.Select(static request => request.Line), Is.EqualTo(new[] { "GET /v1/domains/web" }));
        Assert.That((await RunAsync("vcpu-pin none 0 -")).Error, Is.EqualTo("xensharp: There is no domain none.\n"));
    }

    [Test]
    public async Task NamesAndNumbersAreTurnedIntoEachOther()
    {
        Assert.That(await RunAsync("domid web"), Is.EqualTo(new CommandEnd(0, "3\n", "")));
        Assert.That((await RunAsync("domid 3")).Error, Does.Contain("There is no domain of the name 3"));
        Assert.That(await RunAsync("domname 12"), Is.EqualTo(new CommandEnd(0, "old guest\n", "")));
        Assert.That((await RunAsync("domname web")).Error, Does.Contain("\"web\" is none"));
    }

    [Test]
    public async Task RenameSaysNothing()
    {
        _daemon.On("POST /v1/domains/web/rename", Json(s_web));
        Assert.That(await RunAsync("rename web new"), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(_daemon.Requests[^1].Body, Is.EqualTo("""{"name":"new"}"""));
    }

    [Test]
    public async Task UptimeIsAsXlWritesIt()
    {
        Assert.That((await RunAsync("uptime")).Output, Is.EqualTo("""
            Name                                ID Uptime
            web                                  3 1 day,  2:03:04
            old guest                           12  0:01:01

            """));
        Assert.That((await RunAsync("uptime -s web")).Output, Does.Match(@"^ \d\d:\d\d:\d\d up 1 day,  2:03, web \(3\)\n$"));
    }

    [Test]
    public async Task VcpuListHasXlsColumns()
    {
        _daemon.On("GET /v1/domains/3/vcpus", JsonSerializer.Serialize(
            [
                new VcpuInfo { Id = 0, Online = true, Running = true, Blocked = false, Processor = 1, ProcessorSeconds = 1.25 },
                new VcpuInfo { Id = 1, Online = false, Running = false, Blocked = false, ProcessorSeconds = 0 },
            ],
            ApiJson.Default.IReadOnlyListVcpuInfo));
        Assert.That((await RunAsync("vcpu-list web")).Output, Is.EqualTo("""
            Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)
            web                                  3     0     1   r--       1.3  all / all
            web                                  3     1     -   --p       0.0  all / all

            """));
        using JsonDocument json = JsonDocument.Parse((await RunAsync("vcpu-list --json web")).Output);
        Assert.That(json.RootElement[0].GetProperty("vcpus")[1].GetProperty("online").GetBoolean(), Is.False);
    }

    [Test]
    public async Task DeviceListsHaveXlsColumns()
    {
        _daemon.On("GET /v1/domains/web/block", JsonSerializer.Serialize(
            [new BlockDeviceInfo { VirtualDevice = 51712, Name = "xvda", State = 4, EventChannel = 17, RingReference = 8, BackendPath = "/local/domain/0/backend/vbd/3/51712" }],
            ApiJson.Default.IReadOnlyListBlockDeviceInfo));
        _daemon.On("GET /v1/domains/web/network", JsonSerializer.Serialize(
            [new NetworkDeviceInfo { DeviceId = 0, Mac = "00:16:3e:00:00:01", State = 4, EventChannel = 18, TransmitRingReference = 768, ReceiveRingReference = 769, BackendPath = "/b" }],
            ApiJson.Default.IReadOnlyListNetworkDeviceInfo));
        _daemon.OnProblem("GET /v1/domains/none/block", 404, ProblemKind.NoSuchDomain, "There is no domain none.");
        CommandEnd end = await RunAsync("block-list none web");
        Assert.That(end.Output.Split('\n').Select(static line => line.TrimEnd()), Is.EqualTo(new[]
        {
            "Vdev  BE  handle state evt-ch ring-ref BE-path",
            "51712 0   0      4     17     8        /local/domain/0/backend/vbd/3/51712",
            "",
        }));
        Assert.That((end.Status, end.Error), Is.EqualTo((1, "xensharp: There is no domain none.\n")));
        Assert.That((await RunAsync("network-list web")).Output.Split('\n').Select(static line => line.TrimEnd()), Is.EqualTo(new[]
        {
            "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path",
            "0   0  00:16:3e:00:00:01      0     4     18   768/769         /b",
            "",
        }));
    }

    [Test]
    public async Task DevicesAreAttachedWithXlsWords()
    {
        _daemon.On("POST /v1/domains/web/block", JsonSerializer.Serialize(new BlockDeviceInfo { VirtualDevice = 51728, Name = "xvdb" }, ApiJson.Default.BlockDeviceInfo));
        _daemon.On("POST /v1/domains/web/network", JsonSerializer.Serialize(new NetworkDeviceInfo { DeviceId = 1, Mac = "00:16:3e:00:00:02" }, ApiJson.Default.NetworkDeviceInfo));
        Assert.That(await RunAsync("block-attach web phy:/dev/vg/x xvdb w"), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(Body<AttachDeviceRequest>().Specification, Is.EqualTo(new[] { "phy:/dev/vg/x", "xvdb", "w" }));
        CommandEnd end = await RunAsync("network-attach --json web bridge=lan model=e1000");
        Assert.That(Body<AttachDeviceRequest>().Specification, Is.EqualTo(new[] { "bridge=lan", "model=e1000" }));
        Assert.That(end.Output, Does.Contain("\"mac\": \"00:16:3e:00:00:02\""));
        Assert.That(end.Error, Does.Contain("model=e1000 is about emulated devices"));
        int before = _daemon.Requests.Count;
        end = await RunAsync("block-attach web /a vhd xvdb");
        Assert.That((end.Status, _daemon.Requests.Count), Is.EqualTo((1, before)));
        Assert.That(end.Error, Does.Contain("qemu-img convert"));
    }

    [Test]
    public async Task CreateSendsTheFileWithSettingsAndOptions()
    {
        string file = Path.Combine(_folder, "web.cfg");
        await File.WriteAllTextAsync(file, "name='web'\nkernel='k'\nmemory=64\ndisk=['/a,raw,xvda']\nhap=1\n");
        _daemon.On("POST /v1/domains", JsonSerializer.Serialize(
            new CreateDomainResult { Domain = s_web, Warnings = ["web.cfg:5:1: hap has no effect."] }, ApiJson.Default.CreateDomainResult));
        CommandEnd end = await RunAsync("create", file, "-p", "--memory", "128", "extra=\"ro\"", "--disk", "/b,raw,xvdb");
        Assert.That((end.Status, end.Output, end.Error), Is.EqualTo((0, "", "web.cfg:5:1: hap has no effect.\n")));
        CreateDomainRequest request = Body<CreateDomainRequest>();
        Assert.Multiple(() =>
        {
            Assert.That(request.Paused, Is.True);
            Assert.That(request.Configuration.FileName, Is.EqualTo(file));
            Assert.That(request.Configuration.Folder, Is.EqualTo(Directory.GetCurrentDirectory()));
            Assert.That(request.Configuration.Text, Does.StartWith("name='web'"));
            Assert.That(request.Configuration.Settings, Is.EqualTo(new[] { "extra=\"ro\"", "memory=\"128\"", "disk+=[ \"/b,raw,xvdb\" ]" }));
        });
        Assert.That((await RunAsync("create", "-q", file)).Error, Is.Empty);
        DomainConfiguration understood = DomainConfigurationReader.Read(request.Configuration.Text!, "x", request.Configuration.Settings).Configuration;
        Assert.That((understood.MemoryMiB, understood.CommandLine, understood.Disks.Count), Is.EqualTo((128, "ro", 2)));
    }

    [Test]
    public async Task ABrokenConfigurationIsRefusedWithItsPlaceBeforeTheDaemonIsAsked()
    {
        string file = Path.Combine(_folder, "bad.cfg");
        await File.WriteAllTextAsync(file, "name='web'\nkernel='k'\nmemory=lots\n");
        CommandEnd end = await RunAsync("create", file);
        Assert.That(end.Status, Is.EqualTo(1));
        Assert.That(end.Error, Does.StartWith($"{file}:3:8: "));
        Assert.That((await RunAsync("create", file + ".none")).Error, Does.Contain("There is no such file"));
        Assert.That((await RunAsync("create", "--name", "x")).Error, Does.Contain("neither a kernel nor a bootloader"));
        Assert.That(_daemon.Requests, Is.Empty);
    }

    [Test]
    public async Task ADryRunNeedsNoDaemon()
    {
        CommandEnd end = await RunAsync("create", "-n", "--name", "a \"b\"", "--kernel", "/k", "--memory", "64");
        using JsonDocument json = JsonDocument.Parse(end.Output);
        Assert.That(json.RootElement.GetProperty("domid").ValueKind, Is.EqualTo(JsonValueKind.Null));
        Assert.That(json.RootElement.GetProperty("config").GetProperty("c_info").GetProperty("name").GetString(), Is.EqualTo("a \"b\""));
        Assert.That(_daemon.Requests, Is.Empty);
    }

    [Test]
    public async Task ConfigUpdateSendsTheFile()
    {
        string file = Path.Combine(_folder, "web.cfg");
        await File.WriteAllTextAsync(file, "name='web'\nkernel='k'\nmemory=64\n");
        _daemon.On("PUT /v1/domains/web/config", null);
        Assert.That(await RunAsync("config-update", "web", file, "memory=96"), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(Body<DomainConfigurationDocument>().Settings, Is.EqualTo(new[] { "memory=96" }));
    }

    [TestCase("shutdown -w web", "shutdown", DomainEventKind.Shutdown, "Shutting down domain 3\n")]
    [TestCase("shutdown -w -w web", "shutdown", DomainEventKind.Destroyed, "Shutting down domain 3\n")]
    [TestCase("reboot --wait web", "reboot", DomainEventKind.Shutdown, "Rebooting domain 3\n")]
    public async Task ShutdownWaitsForTheDomainsEnd(string command, string what, DomainEventKind kind, string error)
    {
        var asked = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        var other = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _daemon.OnStream("GET /v1/events", async (_, stream) =>
        {
            await stream.WriteAsync(FakeDaemon.Answer("200 OK", "application/x-ndjson", null));
            await WriteEventAsync(stream, DomainEventKind.Ready, 0);

            // Only what happens after it was asked is its end; that of another domain is none.
            await asked.Task;
            await WriteEventAsync(stream, DomainEventKind.Destroyed, 12);
            other.SetResult();
            await WriteEventAsync(stream, DomainEventKind.Shutdown, 3);
            if (kind == DomainEventKind.Destroyed)
                await WriteEventAsync(stream, kind, 3);
            await Task.Delay(Timeout.Infinite);
        });
        _daemon.OnStream($"POST /v1/domains/3/{what}", async (_, stream) =>
        {
            await stream.WriteAsync(FakeDaemon.Answer("202 Accepted", "application/json", ""));
            asked.SetResult();
        });
        Assert.That(await RunAsync(command), Is.EqualTo(new CommandEnd(0, "", error)));
        Assert.That(other.Task.IsCompleted, Is.True);
    }

    [Test]
    public async Task ShutdownOfAllGoesOnAfterOneThatRefuses()
    {
        _daemon.OnProblem("POST /v1/domains/3/shutdown", 409, ProblemKind.WrongState, "The guest has ended.").On("POST /v1/domains/12/shutdown", null);
        CommandEnd end = await RunAsync("shutdown -a -F");
        Assert.That((end.Status, end.Error), Is.EqualTo((1, "Shutting down domain 3\nxensharp: The guest has ended.\nShutting down domain 12\n")));
        Assert.That(_daemon.Requests[^1], Is.EqualTo(new FakeRequest("POST /v1/domains/12/shutdown", "")));
    }

    [Test]
    public async Task ADaemonThatEndsEndsTheWaiting()
    {
        _daemon.OnStream("GET /v1/events", async (_, stream) =>
        {
            await stream.WriteAsync(FakeDaemon.Answer("200 OK", "application/x-ndjson", null));
            await WriteEventAsync(stream, DomainEventKind.Ready, 0);
        });
        _daemon.On("POST /v1/domains/3/shutdown", null);
        CommandEnd end = await RunAsync("shutdown -w web");
        Assert.That(end.Status, Is.EqualTo(1));
        Assert.That(end.Error, Does.Contain("has ended, and what it ran with it"));
    }

    [Test]
    public async Task SaveRestoreAndDumpCoreFollowTheirProgress()
    {
        string progress = "{\"stage\":\"Writing\",\"done\":1,\"total\":2}\n{\"done\":2,\"total\":2,\"finished\":true}\n";
        _daemon.On("POST /v1/domains/web/save", progress).On("POST /v1/domains/web/dump-core", progress)
            .On("POST /v1/restore", $"{{\"finished\":true,\"domain\":{Json(s_web)}}}\n");
        Assert.That(await RunAsync("save -c web file"), Is.EqualTo(new CommandEnd(0, "", "")));
        SaveDomainRequest save = Body<SaveDomainRequest>();
        Assert.That((save.Path, save.Checkpoint, save.LeavePaused), Is.EqualTo((Path.Combine(Directory.GetCurrentDirectory(), "file"), true, false)));
        Assert.That(save.Configuration, Is.Null);
        string file = Path.Combine(_folder, "other.cfg");
        await File.WriteAllTextAsync(file, "name='other'\nkernel='/k'\n");
        Assert.That(await RunAsync("save", "web", "file", file), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(Body<SaveDomainRequest>().Configuration!.Text, Does.StartWith("name='other'"));
        Assert.That(await RunAsync("dump-core web /tmp/core"), Is.EqualTo(new CommandEnd(0, "", "")));
        Assert.That(Body<DumpCoreRequest>().Path, Is.EqualTo("/tmp/core"));
        CommandEnd end = await RunAsync("restore -p --json /tmp/file");
        Assert.That(Body<RestoreDomainRequest>(), Is.EqualTo(new RestoreDomainRequest { Path = "/tmp/file", Paused = true }));
        Assert.That(end.Output, Does.Contain("\"name\": \"web\""));

        _daemon.On("POST /v1/domains/web/save", "{\"problem\":{\"type\":\"urn:xensharp:problem:failed\",\"detail\":\"The disk is full; make room.\"}}\n");
        Assert.That(await RunAsync("save web file"), Is.EqualTo(new CommandEnd(1, "", "xensharp: The disk is full; make room.\n")));
        _daemon.On("POST /v1/domains/web/save", "{\"done\":1}\n");
        Assert.That((await RunAsync("save web file")).Error, Does.Contain("ended before it was done"));
    }

    [Test]
    public async Task DmesgPrintsAndClears()
    {
        _daemon.OnStream("GET /v1/log", async (_, stream) => await stream.WriteAsync(FakeDaemon.Answer("200 OK", "text/plain", "one\ntwo\n"))).On("DELETE /v1/log", null);
        Assert.That(await RunAsync("dmesg"), Is.EqualTo(new CommandEnd(0, "one\ntwo\n", "")));
        Assert.That(await RunAsync("dmesg -c"), Is.EqualTo(new CommandEnd(0, "one\ntwo\n", "")));
        Assert.That(_daemon.Requests[^1].Line, Is.EqualTo("DELETE /v1/log"));
    }

    [Test]
    public async Task TopPrintsTablesInBatches()
    {
        CommandEnd end = await RunAsync("top -b -d 0.01 -i 2");
        string[] lines = end.Output.Split('\n');
        Assert.That(lines.Count(static line => line.Contains("CPU(sec) CPU(%)", StringComparison.Ordinal)), Is.EqualTo(2));
        Assert.That(lines.Count(static line => line.StartsWith("       web -b----         12    0.0     524288    1.6    1048576       3.1     4", StringComparison.Ordinal)), Is.EqualTo(2), end.Output);
        Assert.That(lines[1], Does.StartWith("2 domains: 0 running, 1 blocked, 0 paused, 0 crashed, 0 dying, 1 shutdown"));
        Assert.That((await RunAsync("top")).Error, Does.Contain("top --batch prints tables"));
    }

    [Test]
    public async Task ADaemonThatIsNotThereIsSaid()
    {
        CommandEnd end = await RunAsync("list", "--daemon", Path.Combine(_folder, "none"));
        Assert.That((end.Status, end.Output), Is.EqualTo((1, "")));
        Assert.That(end.Error, Does.StartWith("xensharp: No daemon answers at ").And.Contain("xensharp daemon"));
    }

    [Test]
    public async Task EverySuggestedNameIsADomains()
    {
        string? before = Environment.GetEnvironmentVariable(DaemonSocket.EnvironmentVariable);
        try
        {
            Environment.SetEnvironmentVariable(DaemonSocket.EnvironmentVariable, _daemon.Path);
            Assert.That((await RunPlainAsync("[suggest:15]", "xensharp pause ")).Output.Split('\n'), Does.Contain("web").And.Contain("old guest"));
            Assert.That((await RunPlainAsync("[suggest:16]", "xensharp pause w")).Output.Split('\n'), Does.Contain("web").And.Not.Contain("old guest"));
            Environment.SetEnvironmentVariable(DaemonSocket.EnvironmentVariable, _daemon.Path + ".none");
            string named = $"xensharp pause --daemon {_daemon.Path} ";
            Assert.That((await RunPlainAsync($"[suggest:{named.Length}]", named)).Output.Split('\n'), Does.Contain("web"));
            Assert.That((await RunPlainAsync("[suggest:15]", "xensharp pause ")).Output.Split('\n'), Does.Not.Contain("web"));
        }
        finally
        {
            Environment.SetEnvironmentVariable(DaemonSocket.EnvironmentVariable, before);
        }
    }

    [TestCase("512", 512L << 10)]
    [TestCase("512m", 512L << 10)]
    [TestCase("512M", 512L << 10)]
    [TestCase("4096b", 4L)]
    [TestCase("64k", 64L)]
    [TestCase("2g", 2L << 20)]
    [TestCase("1t", 1L << 30)]
    public void AmountsOfMemoryAreReadAsXlReadsThem(string text, long size) => Assert.That(Cli.Management.MemoryCommands.ParseSize(text), Is.EqualTo(size));

    private const int ExitStatus2 = 2;

    private static string Json(DomainInfo domain) => JsonSerializer.Serialize(domain, ApiJson.Default.DomainInfo);

    private static string Json(HostInfo host) => JsonSerializer.Serialize(host, ApiJson.Default.HostInfo);

    private static HostInfo Host() => new()
    {
        Host = "h", Release = "6.1", Machine = "x86_64", Processors = 8, TotalMemoryMiB = 32768, FreeMemoryMiB = 1000, Version = "0.1.0", XenVersion = "4.17",
        KvmDevice = "/dev/kvm", Domains = 2, StartTime = DateTimeOffset.UnixEpoch, ProcessId = 1, StateFolder = "/var/lib/xensharp",
    };

    private static async Task WriteEventAsync(Stream stream, DomainEventKind kind, int domain)
        => await stream.WriteAsync(Encoding.UTF8.GetBytes(
            JsonSerializer.Serialize(new DomainEvent { Kind = kind, Time = DateTimeOffset.UnixEpoch, Id = domain }, ApiJson.Default.DomainEvent) + "\n"));

    private T Body<T>() => (T)JsonSerializer.Deserialize(_daemon.Requests[^1].Body, typeof(T), ApiJson.Default)!;

    private Task<CommandEnd> RunAsync(string command) => RunAsync(command.Split(' '));

    private Task<CommandEnd> RunAsync(params string[] arguments)
        => RunPlainAsync([.. arguments, .. arguments.Contains("--daemon") || arguments[0] == "completion" ? Array.Empty<string>() : ["--daemon", _daemon.Path]]);

    /// <summary>Runs a command in this process, which no other test may write to standard output of meanwhile.</summary>
    private static async Task<CommandEnd> RunPlainAsync(params string[] arguments)
    {
        (TextWriter output, TextWriter error) = (Console.Out, Console.Error);
        using var newOutput = new StringWriter();
        using var newError = new StringWriter();
        try
        {
            Console.SetOut(newOutput);
            Console.SetError(newError);
            return new CommandEnd(await Tool.RunAsync(arguments), newOutput.ToString(), newError.ToString());
        }
        finally
        {
            Console.SetOut(output);
            Console.SetError(error);
        }
    }
}
