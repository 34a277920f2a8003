// Completion in the shells themselves: what is typed, and a tab, become the words of the command.

using System.Diagnostics;
using System.Text;
using XenSharp.Api;
using XenSharp.Cli.Tests.Management;
using XenSharp.Cli.Tests.Terminal;
using XenSharp.Guests.Fetching;

namespace XenSharp.Cli.Tests;

/// <summary>Needs the network at its first run, for zsh and fish (10 MB).</summary>
[TestFixture]
[CancelAfter(300_000)]
[Parallelizable(ParallelScope.Children)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class ShellCompletionTests : IDisposable
{
    private const string Prompt = "ready> ";

    private static readonly PackageSet s_packages = new("shells", "bin/zsh-static")
    {
        // zsh's modules are in its binary; fish finds its functions where it is told to.
        Alone = ["zsh-static", "zsh-common", "fish", "fish-common"],
        WithDependencies = ["libpcre2-32-0", "libstdc++6", "libtinfo6"],
        Advice = "Install zsh-static and fish.",
    };

    private readonly string _folder = Directory.CreateTempSubdirectory("xensharp-shells-").FullName;
    private readonly FakeDaemon _daemon = new FakeDaemon().On("GET /v1/domains", """
        [{"id":1,"name":"web","uuid":"550e8400-e29b-41d4-a716-446655440000","state":{},"memoryKiB":0,"targetMemoryKiB":0,"maximumMemoryKiB":0,
          "onlineVcpus":1,"maximumVcpus":1,"processorSeconds":0,"startTime":"2026-01-01T00:00:00Z","uptimeSeconds":1}]
        """);

    private string Typed => Path.Combine(_folder, "typed");

    public void Dispose()
    {
        _daemon.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public async Task Bash_completes_commands_domains_and_options(CancellationToken cancellation)
    {
        await InstallAsync("bash");
        await TypeAsync("/bin/bash", ["--norc", "--noprofile", "-i"], "", cancellation);
    }

    [Test]
    public async Task Zsh_completes_commands_domains_and_options(CancellationToken cancellation)
    {
        string root = await GetShellsAsync(cancellation);
        await InstallAsync("zsh");
        string functions = Path.Combine(root, "usr/share/zsh/functions");
        string path = string.Join(' ', [functions, .. Directory.GetDirectories(functions), .. Directory.GetDirectories(Path.Combine(functions, "Completion"))]);
        string start = Path.Combine(_folder, "start");
        await File.WriteAllTextAsync(start, $"fpath=({path})\nautoload -U compinit\ncompinit -u -D\n", cancellation);
        await TypeAsync(Path.Combine(root, "bin/zsh-static"), ["-f", "-i"], $". {start}\r", cancellation);
    }

    [Test]
    public async Task Fish_completes_commands_domains_and_options(CancellationToken cancellation)
    {
        string root = await GetShellsAsync(cancellation);
        await InstallAsync("fish");
        string[] libraries = [.. ((string[])["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"]).Select(folder => Path.Combine(root, folder)).Where(Directory.Exists)];
        string loader = libraries.Select(static folder => Path.Combine(folder, "ld-linux-x86-64.so.2")).First(File.Exists);
        string script = $"set -p fish_function_path {root}/usr/share/fish/functions; source {_folder}/completion; cd {_folder}; "
            + "for line in 'xensharp vcpu-p' 'xensharp pause w' 'xensharp list --verb' 'xensharp create comp'; complete -C $line; end";
        var start = new ProcessStartInfo(loader, ["--library-path", string.Join(':', libraries), Path.Combine(root, "usr/bin/fish"), "--no-config", "-c", script])
        {
            RedirectStandardOutput = true, RedirectStandardError = true,
        };
        SetEnvironment(start);
        using Process fish = Process.Start(start)!;
        Task<string> errors = fish.StandardError.ReadToEndAsync(cancellation);
        string[] offered = (await fish.StandardOutput.ReadToEndAsync(cancellation)).Split('\n', StringSplitOptions.RemoveEmptyEntries);

        // Behind a tab there is what fish says of it.
        Assert.That(offered.Select(static line => line.Split('\t')[0]), Is.EqualTo(new[] { "vcpu-pin", "web", "--verbose", "completion" }), await errors);
    }

    private static async Task<string> GetShellsAsync(CancellationToken cancellation)
    {
        try
        {
            return await new GuestCache(GuestCache.DefaultRoot()).GetPackagesAsync(s_packages, null, cancellation);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
    }

    /// <summary>
    /// Has the command print its script for a shell, and puts a command of its name into a folder, which answers what completion asks and
    /// notes down all else.
    /// </summary>
    private async Task InstallAsync(string shell)
    {
        await File.WriteAllTextAsync(Path.Combine(_folder, "completion"), (await CommandProcess.RunAsync("completion", shell)).Output);
        string command = Path.Combine(_folder, "xensharp");
        await File.WriteAllTextAsync(command, $"""
            #!/bin/sh
            case "$1" in
            \[suggest*) exec '{CommandProcess.Host}' exec '{CommandProcess.Program}' "$@" ;;
            esac
            echo "$@" >>'{Typed}'

            """);
        using var chmod = Process.Start("chmod", ["+x", command]);
        await chmod.WaitForExitAsync();
    }

    private void SetEnvironment(ProcessStartInfo start)
    {
        start.Environment["PATH"] = $"{_folder}:/usr/bin:/bin";
        start.Environment["HOME"] = _folder;
        start.Environment["TERM"] = "dumb";
        start.Environment["PS1"] = Prompt;
        start.Environment["HISTFILE"] = "";
        start.Environment[DaemonSocket.EnvironmentVariable] = _daemon.Path;
    }

    /// <summary>Sits down at a terminal with a shell, and types words in parts, with tabs.</summary>
    private async Task TypeAsync(string shell, string[] arguments, string first, CancellationToken cancellation)
    {
        using var terminal = new PseudoTerminal();
        terminal.Resize(200, 50);
        var start = new ProcessStartInfo("/bin/sh", ["-c", "terminal=$1; shift; exec \"$0\" \"$@\" <\"$terminal\" >\"$terminal\" 2>&1", shell, terminal.Name, .. arguments]);
        SetEnvironment(start);
        using Process process = Process.Start(start)!;
        var screen = new Screen(terminal);
        try
        {
            screen.WaitFor(Prompt);
            terminal.Type(Encoding.ASCII.GetBytes(
                $"{first}cd {_folder}\r. ./completion\rxensharp vcpu-p\t\rxensharp pause w\t\rxensharp list --verb\t\rxensharp create comp\t\rexit\r"));
            await process.WaitForExitAsync(cancellation);
        }
        finally
        {
            if (!process.HasExited)
                process.Kill();
        }

        Assert.That(File.Exists(Typed), Is.True, screen.Rest);
        Assert.That(await File.ReadAllLinesAsync(Typed, cancellation), Is.EqualTo(new[] { "vcpu-pin", "pause web", "list --verbose", "create completion" }), screen.Rest);
    }
}
