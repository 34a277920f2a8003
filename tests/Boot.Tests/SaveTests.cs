// Debian saved, taken away, and restored as another domain in other machine frames; and Debian that goes on where it was suspended.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 70 MB.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed class SaveTests : KvmFixture
{
    private const int MemoryMiB = 512;

    /// <summary>
    /// A process that counts, a file with its checksum, and answers to what is typed: "look" tells how far the count is, whether the file is
    /// what it was, and the time.
    /// </summary>
    private const string Script = """
        dd if=/dev/urandom of=/tmp/file bs=65536 count=64 2>/dev/null
        (cd /tmp && md5sum file >sum)
        (n=0; while :; do n=$((n+1)); echo $n >/tmp/.n; mv /tmp/.n /tmp/n; usleep 20000; done) &
        stty -echo
        echo "@ready"
        while read -r line; do
            case $line in
            look*) sleep 0.1; cd /tmp; md5sum -c sum >/dev/null && file=whole || file=broken
                read up idle </proc/uptime
                echo "@$line $(cat /tmp/n) $file $(date +%s) $(nproc) $up";;
            dmesg) echo "[dmesg]"; dmesg; echo "[end]"; echo "@dmesg";;
            work) for i in 1 2 3; do (ls /proc; ls /sys) >/dev/null 2>&1 & p="$p $!"; done; wait $p; p=; echo "@worked";;
            off) exit 0;;
            esac
        done
        """;

    private DomainImage _image = null!;

    [OneTimeSetUp]
    public async Task MakeImageAsync() => _image = await DebianGuest.ImageAsync(
        DebianKernelFlavour.CloudAmd64,
        new BusyboxInitramfsOptions { Banner = string.Empty, InitScript = Script.ReplaceLineEndings("\n") },
        reusable: true);

    [Test]
    public async Task A_saved_guest_goes_on_as_another_domain()
    {
        CancellationToken cancellation = TestContext.CurrentContext.CancellationToken;
        await using var context = new ToolstackContext(Host);
        await using SavableDomain source = await BootAsync(context, vcpus: 1, cancellation);
        await GoesOnElsewhereAsync(source, context, vcpus: 1, cancellation);
    }

    [Test]
    public async Task A_guest_with_two_vcpus_goes_on_in_place_is_dumped_and_goes_on_as_another_domain()
    {
        const int vcpus = 2;
        CancellationToken cancellation = TestContext.CurrentContext.CancellationToken;
        await using var context = new ToolstackContext(Host);
        await using SavableDomain source = await BootAsync(context, vcpus, cancellation);
        Look before = await LookAsync(source, "before", cancellation);
        await SuspendAsync(source, cancellation);
        source.Domain.Save(Stream.Null);
        source.Resume();
        await ShowsToBeWholeAsync(source, "resumed", before, vcpus, cancellation);
        await DumpsItselfAsync(source, vcpus);
        await GoesOnElsewhereAsync(source, context, vcpus, cancellation);
    }

    private async Task<SavableDomain> BootAsync(ToolstackContext context, int vcpus, CancellationToken cancellation)
    {
        var domain = SavableDomain.Build(context, Specification("source", vcpus));
        domain.Start();
        _ = await domain.WaitForAsync("@ready", cancellation);
        return domain;
    }

    private static async Task SuspendAsync(SavableDomain domain, CancellationToken cancellation)
    {
        DomainExit exit = await domain.SuspendAsync(cancellation);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.Suspend), exit.Report + domain.Lines.Text);
        Assert.That(domain.Domain.IsSuspended);
        Assert.That(domain.Domain.AuditFrames(), Is.Null);
    }

    /// <summary>Saves a guest, makes another domain of it, and shows that this one lacks nothing.</summary>
    private async Task GoesOnElsewhereAsync(SavableDomain source, ToolstackContext context, int vcpus, CancellationToken cancellation)
    {
        Look before = await LookAsync(source, "source", cancellation);
        await SuspendAsync(source, cancellation);
        using var image = new MemoryStream();
        ulong resident = source.ResidentMemory;
        long begin = Stopwatch.GetTimestamp();
        source.Domain.Save(image);
        Assert.That(source.ResidentMemory, Is.EqualTo(resident), "what takes no memory is not read");
        TestContext.Out.WriteLine($"saved {image.Length >> 20} MiB in {Stopwatch.GetElapsedTime(begin).TotalMilliseconds:F0} ms");

        // While the source is there, the other can have neither its machine frames nor its number.
        image.Position = 0;
        begin = Stopwatch.GetTimestamp();
        await using SavableDomain target = SavableDomain.Restore(context, Specification("target", vcpus), image);
        TestContext.Out.WriteLine($"restored in {Stopwatch.GetElapsedTime(begin).TotalMilliseconds:F0} ms");
        Assert.That(image.Position, Is.EqualTo(image.Length));
        Assert.That(target.Domain.Layout.Console, Is.Not.EqualTo(source.Domain.Layout.Console));
        Assert.That(target.Domain.Id, Is.Not.EqualTo(source.Domain.Id));
        Assert.That(target.Domain.OwnedPages, Is.EqualTo(source.Domain.OwnedPages));
        Assert.That(target.Domain.AuditFrames(), Is.Null);
        await source.DisposeAsync();

        target.Start();
        await ShowsToBeWholeAsync(target, "target", before, vcpus, cancellation);

        // By its new xenstore connection it is asked to do all that again.
        await SuspendAsync(target, cancellation);
        target.Domain.Save(Stream.Null);
        target.Resume();
        await target.TypeAsync("off", cancellation);
        Assert.That((await target.Domain.Completion.WaitAsync(cancellation)).Reason, Is.EqualTo(ShutdownReason.PowerOff), target.Lines.Text);
    }

    /// <summary>Dumps a guest that runs, and has binutils look at the file.</summary>
    private static async Task DumpsItselfAsync(SavableDomain domain, int vcpus)
    {
        string folder = Directory.CreateTempSubdirectory("xensharp-core-test-").FullName;
        try
        {
            string file = Path.Combine(folder, "core");
            await using (FileStream core = File.Create(file))
                domain.Domain.DumpCore(core);
            Assert.That(domain.Domain.PauseCount, Is.Zero);
            using var readelf = Process.Start(new ProcessStartInfo("readelf", ["-a", "-W", file]) { RedirectStandardOutput = true, RedirectStandardError = true })!;
            Task<string> error = readelf.StandardError.ReadToEndAsync();
            string output = await readelf.StandardOutput.ReadToEndAsync();
            await readelf.WaitForExitAsync();
            Assert.That(readelf.ExitCode, Is.Zero);
            Assert.That(await error, Is.Empty);
            Assert.That(output, Does.Contain("CORE (Core file)").And.Contain("Advanced Micro Devices X86-64").And.Contain(".note.Xen").And.Contain(".xen_shared_info"));
            Assert.That(output, Does.Match($@"\.xen_prstatus +PROGBITS +[0-9a-f]+ [0-9a-f]+ 0*{vcpus * 5168:x} 1430 "));
            Assert.That(output, Does.Match($@"\.xen_p2m +PROGBITS +[0-9a-f]+ [0-9a-f]+ 0*{domain.Domain.OwnedPages * 16:x} 10 "));
            Assert.That(new FileInfo(file).Length, Is.GreaterThan((long)domain.Domain.OwnedPages << 12));
        }
        catch (System.ComponentModel.Win32Exception missing)
        {
            Assert.Ignore($"readelf cannot be run: {missing.Message}");
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private DomainSpecification Specification(string name, int vcpus)
        => new() { Name = name, Image = _image, MemoryMiB = MemoryMiB, Vcpus = vcpus, CommandLine = "console=hvc0 quiet" };

    /// <summary>What the guest answers.</summary>
    private readonly record struct Look(long Count, string File, long UnixTime, int Processors, double Uptime);

    private static async Task<Look> LookAsync(SavableDomain domain, string name, CancellationToken cancellation)
    {
        await domain.TypeAsync($"look-{name}", cancellation);
        string[] words = (await domain.WaitForAsync($"@look-{name} ", cancellation)).Split(' ');
        Assert.That(words, Has.Length.EqualTo(5));
        CultureInfo culture = CultureInfo.InvariantCulture;
        return new Look(
            long.Parse(words[0], culture), words[1], long.Parse(words[2], culture), int.Parse(words[3], culture), double.Parse(words[4], culture));
    }

    private static async Task ShowsToBeWholeAsync(SavableDomain domain, string name, Look before, int vcpus, CancellationToken cancellation)
    {
        Look first = await LookAsync(domain, $"{name}-1", cancellation);
        await domain.TypeAsync("work", cancellation);
        _ = await domain.WaitForAsync("@worked", cancellation);
        Look second = await LookAsync(domain, $"{name}-2", cancellation);
        Assert.That(first.Count, Is.GreaterThanOrEqualTo(before.Count));
        Assert.That(second.Count, Is.GreaterThan(first.Count), "the process goes on");
        Assert.That((before.File, first.File, second.File), Is.EqualTo(("whole", "whole", "whole")));
        Assert.That((first.Processors, second.Processors), Is.EqualTo((vcpus, vcpus)));
        Assert.That(second.Uptime, Is.GreaterThan(before.Uptime));
        Assert.That(Math.Abs(second.UnixTime - DateTimeOffset.UtcNow.ToUnixTimeSeconds()), Is.LessThan(20), "the clock is the host's");
        await domain.TypeAsync("dmesg", cancellation);
        _ = await domain.WaitForAsync("@dmesg", cancellation);
        Assert.That(KernelLog.TroubleIn(KernelLog.Section(domain.Lines.Text, "[dmesg]", "[end]")), Is.Empty);
    }
}
