// The fetcher of Debian guests against tools that succeed, fail, hang and lie.
using System.Runtime.Versioning;
using XenSharp.Guests.Fetching;

// Everything tested here is for Linux hosts.
[assembly: SupportedOSPlatform("linux")]

namespace XenSharp.Guests.Tests;

public sealed class GuestCacheTests
{
    FakeHost host = null!;

    [SetUp]
    public void MakeHost() => host = new FakeHost();

    [TearDown]
    public void RemoveHost() => host.Dispose();

    [Test]
    public async Task TheKernelIsResolvedDownloadedAndKept()
    {
        Progress progress = new();
        DebianKernel kernel = await host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64, progress);
        int calls = host.Calls.Length;
        DebianKernel again = await host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64);

        Assert.Multiple(() =>
        {
            Assert.That(kernel.Image, Is.EqualTo(Path.Combine(host.CacheRoot, "linux-image-amd64/boot/vmlinuz-6.1.0-9-amd64")));
            Assert.That(kernel.Image, Does.Exist);
            Assert.That((kernel.Release, kernel.PackageVersion), Is.EqualTo(("6.1.0-9-amd64", "6.1.9-1")));
            Assert.That(Path.Combine(kernel.Modules!, "modules.dep"), Does.Exist);
            Assert.That(again, Is.EqualTo(kernel));
            Assert.That(host.Calls, Has.Length.EqualTo(calls), "the second time nothing is run");
            Assert.That(host.Calls, Has.None.Contains(" update"), "the system's lists sufficed");
            Assert.That(host.Calls, Has.Some.EndsWith("download linux-image-6.1.0-9-amd64=6.1.9-1"));
            Assert.That(host.Leftovers, Is.Empty);
            Assert.That(progress.Reports, Has.Some.EqualTo(new FetchProgress("Downloading linux-image-6.1.0-9-amd64 (69.0 MB)", 0.25)));
            Assert.That(progress.Reports.Select(r => r.Stage), Has.Some.StartsWith("Unpacking"));
        });
    }

    [Test]
    public async Task AptIsKeptFromTheSystemsState()
    {
        host.Steer("no-system-lists");
        await host.Cache.GetBusyboxAsync();
        string configuration = host.Calls.First(call => call.EndsWith(" update", StringComparison.Ordinal)).Split(' ')[2];
        string text = await File.ReadAllTextAsync(configuration);
        Assert.Multiple(() =>
        {
            Assert.That(host.Calls.Where(call => call.StartsWith("apt-", StringComparison.Ordinal)), Is.All.Contains($" -c {host.CacheRoot}/apt/"));
            foreach (string setting in (string[])["Dir::Cache", "Dir::State", "Dir::State::status"])
                Assert.That(text, Does.Contain($"{setting} \"{host.CacheRoot}/apt/"));
            Assert.That(text, Does.Contain("#clear APT::Update::Post-Invoke;"));
        });
    }

    [Test]
    public async Task AnotherArchitectureHasListsAndFoldersOfItsOwn()
    {
        host.Steer("no-system-lists");
        string other = await host.Cache.GetBusyboxAsync(architecture: "i386");
        int calls = host.Calls.Length;
        string own = await host.Cache.GetBusyboxAsync();
        string configuration = host.Calls.First(call => call.EndsWith(" update", StringComparison.Ordinal)).Split(' ')[2];
        Assert.Multiple(() =>
        {
            Assert.That(other, Is.EqualTo(Path.Combine(host.CacheRoot, "busybox-static-i386/bin/busybox")));
            Assert.That(own, Is.EqualTo(Path.Combine(host.CacheRoot, "busybox-static/bin/busybox")));
            Assert.That(File.ReadAllText(configuration), Does.Contain("APT::Architecture \"i386\";").And.Contain("#clear APT::Architectures;"));
            Assert.That(File.ReadAllText(configuration), Does.Contain($"Dir::State \"{host.CacheRoot}/apt-i386/"));
            Assert.That(host.Calls[calls..].Where(call => call.StartsWith("apt-", StringComparison.Ordinal)), Is.All.Contains($" -c {host.CacheRoot}/apt/"));
        });
    }

    [TestCase("no-system-lists")]
    [TestCase("stale-system-lists")]
    public async Task EmptyOrStaleListsAreFetchedAnew(string trouble)
    {
        host.Steer(trouble);
        Progress progress = new();
        DebianKernel kernel = await host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64, progress);
        Assert.Multiple(() =>
        {
            Assert.That(kernel.Image, Does.Exist);
            Assert.That(host.Calls.Count(call => call.EndsWith(" update", StringComparison.Ordinal)), Is.EqualTo(1));
            Assert.That(progress.Reports, Has.Some.EqualTo(new FetchProgress("Fetching the package lists", 0.5)));
        });
    }

    [Test]
    public async Task BusyboxIsFoundWhereEitherReleaseHasIt([Values("bin/busybox", "usr/bin/busybox")] string place)
    {
        Directory.Delete(Path.Combine(host.Folder, "contents/busybox-static"), recursive: true);
        host.Content("busybox-static", place, [0x7f, (byte)'E', (byte)'L', (byte)'F']);
        Assert.That(await host.Cache.GetBusyboxAsync(), Is.EqualTo(Path.Combine(host.CacheRoot, "busybox-static", place)));
    }

    [Test]
    public async Task AFailedDownloadSaysWhyAndCanBeRepeated()
    {
        host.Steer("download-fails");
        GuestFetchException failure = FetchFails();
        Assert.That(failure.Message, Does.Contain("Hash Sum mismatch").And.Contain("--kernel").And.Contain("--ramdisk"));
        AssertNothingKept();

        host.Steer("download-fails", on: false);
        Assert.That((await host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64)).Image, Does.Exist);
    }

    [Test]
    public void AnUnreachableMirrorSaysWhatAptSays()
    {
        host.Steer("no-system-lists");
        host.Steer("update-fails");
        host.Steer("download-fails");
        File.Delete(Path.Combine(host.Folder, "packages/linux-image-amd64"));
        Assert.That(FetchFails().Message, Does.Contain("Could not resolve"));
        AssertNothingKept();
    }

    [Test]
    public void SourcesWithoutTheKernelAreNamedAsTheTrouble()
    {
        File.Delete(Path.Combine(host.Folder, "packages/linux-image-amd64"));
        Assert.That(FetchFails().Message, Does.Contain("have no linux-image-amd64"));
    }

    [TestCase("apt-get", "apt-cache")]
    [TestCase("apt-cache")]
    public void AHostWithoutAptIsToldHowToGiveAGuest(params string[] missing)
    {
        foreach (string tool in missing)
            File.Delete(Path.Combine(host.Tools, tool));
        GuestCache cache = new(host.CacheRoot, new CommandRunner(host.Tools));
        Assert.That(() => cache.GetKernelAsync(DebianKernelFlavour.Amd64),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains("apt-get")
                .And.Message.Contains("xensharp run --kernel").And.Message.Contains("CONFIG_XEN_PV"));
        AssertNothingKept();
    }

    [Test]
    public void AHostWithoutDpkgIsTold()
    {
        foreach (string tool in (string[])["cat", "mkdir", "cp", "touch", "sleep"])
            File.CreateSymbolicLink(Path.Combine(host.Tools, tool), "/bin/" + tool);
        File.Delete(Path.Combine(host.Tools, "dpkg-deb"));
        Assert.That(() => new GuestCache(host.CacheRoot, new CommandRunner(host.Tools)).GetBusyboxAsync(),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains("dpkg-deb"));
        AssertNothingKept();
    }

    [Test]
    public void AFailedUnpackingLeavesNothing()
    {
        host.Steer("unpack-fails");
        Assert.That(FetchFails().Message, Does.Contain("no space"));
        AssertNothingKept();
    }

    [TestCase("boot/vmlinuz-6.1.0-9-amd64")]
    [TestCase("usr/share/doc/readme")]
    public void AWrongPackageIsNotKept(string path)
    {
        Directory.Delete(Path.Combine(host.Folder, "contents/linux-image-6.1.0-9-amd64"), recursive: true);
        host.Content("linux-image-6.1.0-9-amd64", path, new byte[0x1000]);
        Assert.That(FetchFails().Message, Does.Contain("does not hold a Linux bzImage"));
        AssertNothingKept();
    }

    [Test]
    public async Task AnInterruptedFetchLeavesNothingAndEndsItsTools()
    {
        host.Steer("hang");
        using CancellationTokenSource interrupt = new();
        Task<DebianKernel> fetch = host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64, null, interrupt.Token);
        await UntilAsync(() => File.Exists(Path.Combine(host.Folder, "hanging")));
        await interrupt.CancelAsync();
        Assert.That(() => fetch, Throws.InstanceOf<OperationCanceledException>());
        AssertNothingKept();

        host.Steer("hang", on: false);
        Assert.That((await host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64)).Image, Does.Exist);
    }

    [Test]
    public async Task WhatAKilledProcessLeftIsCleanedAway()
    {
        Directory.CreateDirectory(Path.Combine(host.CacheRoot, ".fetch-dead", "unpacked"));
        await host.Cache.GetBusyboxAsync();
        Assert.That(host.Leftovers, Is.Empty);
    }

    [Test]
    public async Task FetchesAtOnceTakeTurnsAndDownloadOnce()
    {
        string[] paths = await Task.WhenAll(Enumerable.Range(0, 4).Select(_ => host.Cache.GetBusyboxAsync()));
        Assert.Multiple(() =>
        {
            Assert.That(paths.Distinct().Count(), Is.EqualTo(1));
            Assert.That(host.Calls.Count(call => call.Contains(" download ", StringComparison.Ordinal)), Is.EqualTo(1));
        });
    }

    [Test]
    public async Task AWaitForAnotherFetchIsToldAndCanBeGivenUp()
    {
        host.Steer("hang");
        using CancellationTokenSource first = new();
        Task<string> holder = host.Cache.GetBusyboxAsync(null, first.Token);
        await UntilAsync(() => File.Exists(Path.Combine(host.Folder, "hanging")));

        Progress progress = new();
        using CancellationTokenSource second = new();
        Task<string> waiter = host.Cache.GetBusyboxAsync(progress, second.Token);
        await UntilAsync(() => progress.Reports.Any(r => r.Stage.Contains("another fetch", StringComparison.Ordinal)));
        await second.CancelAsync();
        Assert.That(() => waiter, Throws.InstanceOf<OperationCanceledException>());
        await first.CancelAsync();
        Assert.That(() => holder, Throws.InstanceOf<OperationCanceledException>());
    }

    [Test]
    public void ACacheThatCannotBeMadeIsExplained()
    {
        string file = Path.Combine(host.Folder, "a-file");
        File.WriteAllText(file, "");
        Assert.That(() => new GuestCache(Path.Combine(file, "cache")).GetBusyboxAsync(),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains("XENSHARP_CACHE"));
        Assert.That(() => new GuestCache("/tmp/a\"b").GetBusyboxAsync(),
            Throws.InstanceOf<GuestFetchException>().With.Message.Contains("quotation mark"));
    }

    [Test]
    public async Task ADamagedCacheIsNotUsed()
    {
        string busybox = await host.Cache.GetBusyboxAsync();
        File.Delete(busybox);
        Assert.That(() => host.Cache.GetBusyboxAsync(), Throws.InstanceOf<GuestFetchException>().With.Message.Contains("damaged"));
    }

    [TestCase("/x", "/xdg", "/home/u", "/x")]
    [TestCase(null, "/xdg", "/home/u", "/xdg/xensharp")]
    [TestCase("", "relative", "/home/u", "/home/u/.cache/xensharp")]
    [TestCase(null, null, "/home/u", "/home/u/.cache/xensharp")]
    public void TheCacheFolderFollowsTheEnvironment(string? own, string? xdg, string? home, string expected) =>
        Assert.That(GuestCache.DefaultRoot(name => name switch
        {
            "XENSHARP_CACHE" => own,
            "XDG_CACHE_HOME" => xdg,
            "HOME" => home,
            _ => null,
        }), Is.EqualTo(expected));

    [Test]
    public void WithoutAnyOfTheVariablesThereIsNoCacheFolder() =>
        Assert.That(() => GuestCache.DefaultRoot(_ => null), Throws.InstanceOf<GuestFetchException>());

    static readonly PackageSet Set = new("tool", "usr/bin/tool")
    {
        WithDependencies = ["tool"], Alone = ["extra"], Advice = "Install the tool.",
    };

    // A tool with a library that it depends on, and a package that is taken alone.
    void OfferSet()
    {
        File.WriteAllText(
            Path.Combine(host.Folder, "closure"),
            "'http://deb.example/libtool1_2_amd64.deb' libtool1_2_amd64.deb 1500000 SHA256:00\n" +
            "'http://deb.example/tool_1.0-1_amd64.deb' tool_1%3a1.0-1_amd64.deb 500000 SHA256:00\n");
        host.Package("extra", "3", "Size: 1000000\nDepends: not-wanted\n");
        host.Content("libtool1", "usr/lib/libtool.so", [1]);
        host.Content("tool", "usr/bin/tool", [2]);
        host.Content("extra", "usr/share/extra", [3]);
    }

    [TestCase(false)]
    [TestCase(true)]
    public async Task ASetOfPackagesIsOneFolder(bool withoutSystemLists)
    {
        OfferSet();
        host.Steer("no-system-lists", withoutSystemLists);
        Progress progress = new();
        string folder = await host.Cache.GetPackagesAsync(Set, progress);
        int calls = host.Calls.Length;
        Assert.Multiple(async () =>
        {
            foreach (string file in (string[])["usr/lib/libtool.so", "usr/bin/tool", "usr/share/extra"])
                Assert.That(Path.Combine(folder, file), Does.Exist);
            Assert.That(GuestCache.VersionOf(folder), Is.EqualTo("libtool1 2\ntool 1:1.0-1\nextra 3"));
            Assert.That(host.Calls, Has.Some.EndsWith(" install --print-uris --yes --no-install-recommends tool"));
            Assert.That(host.Calls, Has.Some.EndsWith(" download libtool1=2 tool=1:1.0-1 extra=3"));
            Assert.That(progress.Reports.Select(r => r.Stage), Has.Some.EqualTo("Downloading tool, 3 packages (3.0 MB)"));
            Assert.That(await host.Cache.GetPackagesAsync(Set), Is.EqualTo(folder));
            Assert.That(host.Calls, Has.Length.EqualTo(calls), "the second time nothing is run");
            Assert.That(host.Leftovers, Is.Empty);
        });
    }

    [Test]
    public void ASetThatCannotBeHadSaysWhyAndWhatToDo()
    {
        Assert.That(() => host.Cache.GetPackagesAsync(Set), Throws.InstanceOf<GuestFetchException>()
            .With.Message.Contains("Unable to locate package tool").And.Message.EndsWith("Install the tool."));
        OfferSet();
        File.Delete(Path.Combine(host.Folder, "packages/extra"));
        Assert.That(() => host.Cache.GetPackagesAsync(Set), Throws.InstanceOf<GuestFetchException>()
            .With.Message.Contains("have no tool").And.Message.EndsWith("Install the tool."));
        File.WriteAllText(Path.Combine(host.Folder, "closure"), "'nonsense\n");
        Assert.That(() => host.Cache.GetPackagesAsync(Set), Throws.InstanceOf<GuestFetchException>().With.Message.Contains("'nonsense"));
        Assert.That(Path.Combine(host.CacheRoot, "tool"), Does.Not.Exist);
        Assert.That(host.Leftovers, Is.Empty);
    }

    [Test]
    public async Task AMadeFileIsMadeOnceForEachKey()
    {
        int made = 0;
        Task<string> Get(string key) => host.Cache.GetFileAsync("image", key, "Making the image", async (path, cancellation) =>
        {
            Interlocked.Increment(ref made);
            await File.WriteAllTextAsync(path, key, cancellation);
        });
        string[] files = await Task.WhenAll(Get("a"), Get("a"), Get("b"));
        Assert.Multiple(() =>
        {
            Assert.That(files[0], Is.EqualTo(files[1]).And.Not.EqualTo(files[2]));
            Assert.That(files.Select(File.ReadAllText), Is.EqualTo(new[] { "a", "a", "b" }));
            Assert.That(made, Is.EqualTo(2));
        });
    }

    [Test]
    public async Task AFileWhoseMakingFailsIsNotThere()
    {
        Assert.That(() => host.Cache.GetFileAsync("image", "a", "Making the image", async (path, cancellation) =>
        {
            await File.WriteAllTextAsync(path, "half", cancellation);
            throw new GuestFetchException("It is damaged.");
        }), Throws.InstanceOf<GuestFetchException>().With.Message.EqualTo("It is damaged."));
        Assert.That(host.Leftovers, Is.Empty);
        string file = await host.Cache.GetFileAsync("image", "a", "Making the image",
            (path, cancellation) => File.WriteAllTextAsync(path, "whole", cancellation));
        Assert.That(await File.ReadAllTextAsync(file), Is.EqualTo("whole"));
    }

    GuestFetchException FetchFails() =>
        Assert.ThrowsAsync<GuestFetchException>(() => host.Cache.GetKernelAsync(DebianKernelFlavour.Amd64))!;

    void AssertNothingKept()
    {
        Assert.That(host.Leftovers, Is.Empty);
        Assert.That(Path.Combine(host.CacheRoot, "linux-image-amd64"), Does.Not.Exist);
        Assert.That(Path.Combine(host.CacheRoot, "busybox-static"), Does.Not.Exist);
    }

    static async Task UntilAsync(Func<bool> condition)
    {
        using CancellationTokenSource limit = new(TimeSpan.FromSeconds(60));
        while (!condition())
            await Task.Delay(10, limit.Token);
    }

    // IProgress without the thread hop of System.Progress, so that reports are there when the fetch is over.
    sealed class Progress : IProgress<FetchProgress>
    {
        readonly List<FetchProgress> reports = [];

        public FetchProgress[] Reports
        {
            get
            {
                lock (reports)
                    return [.. reports];
            }
        }

        public void Report(FetchProgress value)
        {
            lock (reports)
                reports.Add(value);
        }
    }
}
