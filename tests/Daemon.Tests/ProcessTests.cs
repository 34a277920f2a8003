// The daemon as a process of its own: how it ends, and what the next one finds when it was killed.

using XenSharp.Api;
using XenSharp.Cli.Tests;
using XenSharp.Guests;
using XenSharp.Toolstack.Tests;

namespace XenSharp.Daemon.Tests;

[TestFixture]
[CancelAfter(180_000)]
public sealed class ProcessTests
{
    private const int SigKill = 9;
    private const int SigTerm = 15;

    private TemporaryFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TemporaryFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public async Task A_killed_daemons_domains_are_listed_as_lost_by_the_next()
    {
        using var client = new DaemonClient(_folder.File("s"));
        File.WriteAllBytes(_folder.File("kernel"), TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.SpinForever }));
        bool hasKvm;
        using (CommandProcess first = await StartAsync(client))
        {
            hasKvm = (await client.GetHostAsync()).KvmProblem is null;
            if (hasKvm)
            {
                _ = await client.CreateAsync(new CreateDomainRequest
                {
                    Configuration = new DomainConfigurationDocument { Text = "name='web'\nmemory=16\nkernel='kernel'", Folder = _folder.Path },
                });
            }

            first.Send(SigKill);
            _ = await first.WaitAsync();
        }

        Assert.That(File.Exists(_folder.File("s")), "what the dead one left");
        using CommandProcess second = await StartAsync(client);
        Assert.That(await client.ListAsync(), Is.Empty);
        if (hasKvm)
        {
            LostDomain lost = (await client.ListLostAsync()).Single();
            Assert.That(lost.Name, Is.EqualTo("web"));
            CreateDomainResult again = await client.CreateAsync(new CreateDomainRequest { Configuration = lost.Configuration });
            Assert.That(again.Domain!.Uuid, Is.EqualTo(lost.Uuid));
            Assert.That(await client.ListLostAsync(), Is.Empty, "it runs again");
        }

        second.Send(SigTerm);
        Assert.That(await second.WaitAsync(), Is.Zero, second.Error);
        Assert.That(File.Exists(_folder.File("s")), Is.False);
        Assert.That(Directory.GetFiles(_folder.File("state/domains")), Is.Empty, "and nothing is lost by an end that was asked for");
    }

    [Test]
    public async Task A_second_daemon_ends_with_a_sentence()
    {
        using var client = new DaemonClient(_folder.File("s"));
        using CommandProcess first = await StartAsync(client);
        CommandEnd second = await CommandProcess.RunAsync(Arguments());
        Assert.That(second.Status, Is.Not.Zero);
        Assert.That(second.Error, Does.Contain($"(process {first.Id})").And.Contain("--state").And.Not.Contain("   at "));
        first.Send(SigTerm);
        Assert.That(await first.WaitAsync(), Is.Zero);
    }

    private string[] Arguments() => ["daemon", "--socket", _folder.File("s"), "--state", _folder.File("state"), "--xenstore-socket", "none", "--exit-timeout", "0"];

    private async Task<CommandProcess> StartAsync(DaemonClient client)
    {
        CommandProcess process = CommandProcess.Start(Arguments());
        for (int i = 0; i < 6000; i++)
        {
            try
            {
                _ = await client.ListAsync();
                return process;
            }
            catch (DaemonException)
            {
                await Task.Delay(10);
            }
        }

        string said = process.Error;
        process.Dispose();
        throw new AssertionException($"The daemon did not answer: {said}");
    }
}
