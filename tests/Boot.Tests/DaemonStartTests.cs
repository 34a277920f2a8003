// Domains made where no daemon runs: the command starts one, which goes when it is of no use any more.

using XenSharp.Cli.Tests;
using XenSharp.Guests;

namespace XenSharp.Boot.Tests;

[TestFixture]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(600_000)]
public sealed class DaemonStartTests : KvmFixture
{
    private string _folder = null!;

    private string Socket => Path.Combine(_folder, "socket");

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-start-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task A_daemon_comes_with_the_first_domain_and_goes_after_the_last(CancellationToken cancellation)
    {
        string kernel = Path.Combine(_folder, "kernel");
        await File.WriteAllBytesAsync(kernel, TinyGuest.Build(new TinyGuestOptions { Behaviour = TinyGuestBehaviour.SpinForever }), cancellation);
        CommandEnd made = await CommandProcess.RunAsync("create", "--daemon", Socket, "--name", "first", "--kernel", kernel, "--memory", "16");
        Assert.That((made.Status, made.Output), Is.EqualTo((0, "")), made.Error);
        CommandEnd listed = await CommandProcess.RunAsync("domid", "--daemon", Socket, "first");
        Assert.That((listed.Status, listed.Output), Is.EqualTo((0, "1\n")), listed.Error);

        // The second finds the same daemon.
        made = await CommandProcess.RunAsync("create", "--daemon", Socket, "--name", "second", "--kernel", kernel, "--memory", "16");
        Assert.That(made.Status, Is.Zero, made.Error);
        foreach (string name in (string[])["first", "second"])
            Assert.That((await CommandProcess.RunAsync("destroy", "--daemon", Socket, name)).Status, Is.Zero);
        while (File.Exists(Socket))
            await Task.Delay(100, cancellation);
        Assert.That(
            await File.ReadAllTextAsync(Path.Combine(_folder, "state", "daemon.log"), cancellation),
            Does.Contain("The daemon ends, as it has no domain any more."));
    }

    [Test]
    public async Task A_daemon_that_cannot_be_started_says_why()
    {
        string nowhere = Path.Combine(_folder, "kernel", "socket");
        await File.WriteAllTextAsync(Path.Combine(_folder, "kernel"), "");
        CommandEnd end = await CommandProcess.RunAsync("create", "--daemon", nowhere, "--name", "none", "--kernel", "/none", "--memory", "16");
        Assert.That((end.Status, end.Output), Is.EqualTo((1, "")));
        Assert.That(end.Error, Does.StartWith($"xensharp: No daemon answers at {nowhere}, and none can be started: "));
    }
}
