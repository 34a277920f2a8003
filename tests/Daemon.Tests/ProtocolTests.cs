// The API as such: what is there, how requests are refused, who may ask. Needs no KVM.

using System.Net;
using System.Net.Sockets;
using System.Reflection;
using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon.Tests;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ProtocolTests : DaemonFixture
{
    [Test]
    public async Task It_says_what_it_is()
    {
        HostInfo host = await Client.GetHostAsync();
        Assert.That((host.Version, host.ProcessId, host.Domains, host.Machine), Is.EqualTo(("1.2.3", Environment.ProcessId, 0, "x86_64")));
        Assert.That(host.TotalMemoryMiB, Is.GreaterThanOrEqualTo(host.FreeMemoryMiB).And.Positive);
        Assert.That(await Client.ListAsync(), Is.Empty);
        Assert.That(await Client.ListLostAsync(), Is.Empty);
        Assert.That(await Raw.GetStringAsync(ApiRoutes.Domains), Is.EqualTo("[]"));
    }

    [Test]
    public async Task The_description_has_every_path()
    {
        using JsonDocument document = JsonDocument.Parse(await Raw.GetStringAsync(ApiRoutes.OpenApi));
        Assert.That(document.RootElement.GetProperty("openapi").GetString(), Does.StartWith("3."));
        string[] described = [.. document.RootElement.GetProperty("paths").EnumerateObject().Select(static path => path.Name)];
        string[] paths =
        [
            .. typeof(ApiRoutes).GetFields(BindingFlags.Public | BindingFlags.Static).Select(static field => (string)field.GetRawConstantValue()!)
                .Where(static path => path.StartsWith(ApiRoutes.Version + "/", StringComparison.Ordinal)),
        ];
        Assert.That(paths, Has.Length.GreaterThan(20));
        Assert.That(described, Is.EquivalentTo(paths));
    }

    [Test]
    public async Task What_is_not_there_is_a_problem_with_a_sentence()
    {
        await ExpectProblemAsync(HttpMethod.Get, "/v1/nothing", null, HttpStatusCode.NotFound, ProblemKind.NoSuchResource);
        await ExpectProblemAsync(HttpMethod.Get, "/v1/domains/web", null, HttpStatusCode.NotFound, ProblemKind.NoSuchDomain);
        await ExpectProblemAsync(HttpMethod.Get, "/v1/domains/0", null, HttpStatusCode.NotFound, ProblemKind.NoSuchDomain);
        await ExpectProblemAsync(HttpMethod.Patch, "/v1/domains", null, HttpStatusCode.MethodNotAllowed, ProblemKind.BadRequest);
        await ExpectProblemAsync(HttpMethod.Delete, "/v1/lost/no-uuid", null, HttpStatusCode.BadRequest, ProblemKind.BadRequest);
        await ExpectProblemAsync(HttpMethod.Delete, $"/v1/lost/{Guid.NewGuid()}", null, HttpStatusCode.NotFound, ProblemKind.NoSuchResource);
    }

    [TestCase("", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("{", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("[]", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("null", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("{}", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("""{"configuration":null}""", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("""{"configuration":{}}""", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("""{"configuration":{"text":"name='a'"},"pausde":true}""", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("""{"configuration":{"text":"name="}}""", HttpStatusCode.UnprocessableEntity, ProblemKind.BadConfiguration)]
    [TestCase("""{"configuration":{"text":"name='a'\ntype='hvm'"}}""", HttpStatusCode.UnprocessableEntity, ProblemKind.BadConfiguration)]
    [TestCase("""{"configuration":{"text":"name='a'\nkernel='k'","folder":"here"}}""", HttpStatusCode.BadRequest, ProblemKind.BadRequest)]
    [TestCase("""{"configuration":{"text":"name='a'\nkernel='/nowhere/k'"}}""", HttpStatusCode.UnprocessableEntity, ProblemKind.BadConfiguration)]
    [TestCase("""{"configuration":{"json":{"nam":"a"}}}""", HttpStatusCode.UnprocessableEntity, ProblemKind.BadConfiguration)]
    public Task A_bad_request_to_create_gets_a_sentence(string body, HttpStatusCode status, string kind)
        => ExpectProblemAsync(HttpMethod.Post, ApiRoutes.Domains, body, status, kind);

    [Test]
    public async Task Only_JSON_is_taken()
    {
        using HttpResponseMessage response = await Raw.PostAsync(ApiRoutes.Domains, new StringContent("name='a'", Encoding.UTF8, "text/plain"));
        Assert.That(response.StatusCode, Is.EqualTo(HttpStatusCode.UnsupportedMediaType));
        using var large = new StringContent(new string(' ', 8 << 20), Encoding.UTF8, "application/json");
        using var request = new HttpRequestMessage(HttpMethod.Post, ApiRoutes.Domains) { Content = large };
        request.Headers.ExpectContinue = true;
        using HttpResponseMessage tooLarge = await Raw.SendAsync(request);
        Assert.That(tooLarge.StatusCode, Is.EqualTo(HttpStatusCode.RequestEntityTooLarge));
        Assert.That(await Client.ListAsync(), Is.Empty, "and it goes on");
    }

    [Test]
    public async Task The_log_is_read_and_emptied()
    {
        Server.Toolstack.Log.Write("something happened");
        Assert.That(await Client.GetLogAsync(), Does.EndWith("something happened\n"));
        await Client.ClearLogAsync();
        Assert.That(await Client.GetLogAsync(), Is.Empty);
    }

    [Test]
    public void The_socket_is_its_owners_and_groups()
    {
        Assert.That(File.GetUnixFileMode(Options.Socket), Is.EqualTo(DaemonOptions.DefaultSocketMode));
        Assert.That(File.GetUnixFileMode(Options.StateFolder), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute));
    }

    [Test]
    public async Task A_second_daemon_is_refused_with_a_sentence()
    {
        await ExpectRefusalAsync(Options, "Another daemon");
        await ExpectRefusalAsync(Options with { StateFolder = FileOf("other") }, "answers at");
        await ExpectRefusalAsync(Options with { Socket = FileOf("other.sock") }, "--state");
        await ExpectRefusalAsync(Options with { Socket = FileOf("o.sock"), StateFolder = FileOf("other"), SocketGroup = "no-such-group", XenstoreSocket = null }, "no group");
        File.WriteAllText(FileOf("file"), "precious");
        await ExpectRefusalAsync(Options with { Socket = FileOf("file"), StateFolder = FileOf("other"), XenstoreSocket = null }, "no socket");
        Assert.That(File.ReadAllText(FileOf("file")), Is.EqualTo("precious"));
        Assert.That(await Client.ListAsync(), Is.Empty, "the first goes on");
    }

    [Test]
    public async Task A_socket_that_a_dead_daemon_left_is_taken_over()
    {
        string path = FileOf("stale.sock");
        using (var dead = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            // Under its name .NET would remove it.
            dead.Bind(new UnixDomainSocketEndPoint(path + ".bound"));
            File.Move(path + ".bound", path);
        }

        Assert.That(File.Exists(path), "as a killed process leaves it");
        await using DaemonServer server = await DaemonServer.StartAsync(
            Host, Options with { Socket = path, StateFolder = FileOf("other"), XenstoreSocket = null, SocketMode = UnixFileMode.UserRead | UnixFileMode.UserWrite }, new ManagerLog());
        using var client = new DaemonClient(path);
        Assert.That(await client.ListAsync(), Is.Empty);
        Assert.That(File.GetUnixFileMode(path), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite));
    }

    [Test]
    public async Task Without_a_daemon_the_client_says_what_to_do()
    {
        using var client = new DaemonClient(FileOf("nobody.sock"));
        DaemonException? missing = Assert.ThrowsAsync<DaemonException>(async () => await client.ListAsync());
        Assert.That(missing!.Message, Does.Contain("xensharp daemon").And.Contain("nobody.sock"));
        using var tooLong = new DaemonClient(FileOf(new string('x', 200)));
        Assert.That(async () => await tooLong.ListAsync(), Throws.TypeOf<DaemonException>());
        Assert.That(await Client.ListAsync(), Is.Empty);
    }

    [Test]
    public async Task Events_begin_at_once_and_end_with_the_daemon()
    {
        await using IAsyncEnumerator<DomainEvent> events = Client.FollowEventsAsync().GetAsyncEnumerator();
        Assert.That(await events.MoveNextAsync(), Is.True);
        Assert.That(events.Current.Kind, Is.EqualTo(DomainEventKind.Ready));
        await Server.CloseAsync(TimeSpan.Zero);
        Assert.That(await events.MoveNextAsync(), Is.False);
    }

    private async Task ExpectRefusalAsync(DaemonOptions options, string sentence)
    {
        ToolstackException? refusal = Assert.ThrowsAsync<ToolstackException>(async () => await DaemonServer.StartAsync(Host, options, new ManagerLog()));
        Assert.That(refusal!.Message, Does.Contain(sentence));
        await Task.CompletedTask;
    }

    private async Task ExpectProblemAsync(HttpMethod method, string path, string? body, HttpStatusCode status, string kind)
    {
        using var request = new HttpRequestMessage(method, path);
        if (body is not null)
            request.Content = new StringContent(body, Encoding.UTF8, "application/json");
        using HttpResponseMessage response = await Raw.SendAsync(request);
        string text = await response.Content.ReadAsStringAsync();
        Assert.That((response.StatusCode, response.Content.Headers.ContentType?.MediaType), Is.EqualTo((status, ApiProblem.MediaType)), text);
        ApiProblem problem = JsonSerializer.Deserialize(text, ApiJson.Default.ApiProblem)!;
        Assert.Multiple(() =>
        {
            Assert.That((problem.Status, problem.Kind), Is.EqualTo(((int)status, kind)), text);
            Assert.That(problem.Title, Is.Not.Empty);
            Assert.That(problem.Detail, Does.EndWith(".").And.Not.Contain("   at "));
        });
    }
}
