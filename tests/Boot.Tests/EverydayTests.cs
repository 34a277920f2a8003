// Days with a Debian system, as somebody types them who knows xl: created, looked at, changed while it runs, saved, restored, shut down;
// and one on which the daemon is killed.

using System.Diagnostics;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using XenSharp.Cli.Tests;
using XenSharp.Cli.Tests.Terminal;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Images;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, and root, to make the system's disk.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[Category("Long")]
[CancelAfter(900_000)]
public sealed partial class EverydayTests : KvmFixture
{
    private const string Name = "everyday";

    /// <summary>The environment variable that says how much is written to a disk and read back, in MiB.</summary>
    private const string DiskVariable = "XENSHARP_DISK_MIB";

    private const int DefaultDiskMiB = 256;

    private static readonly TimeSpan s_bootPatience = TimeSpan.FromMinutes(5);

    private string _folder = null!;
    private CommandProcess _daemon = null!;

    [SetUp]
    public async Task MakeFolder()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-everyday-").FullName;
        Environment.SetEnvironmentVariable("XENSHARP_SOCKET", Path.Combine(_folder, "socket"));
        await StartDaemonAsync();
    }

    [TearDown]
    public async Task EndDaemon()
    {
        _daemon.Send(15);
        int status = await _daemon.WaitAsync();
        string said = _daemon.Error;
        _daemon.Dispose();
        Environment.SetEnvironmentVariable("XENSHARP_SOCKET", null);
        Directory.Delete(_folder, recursive: true);
        Assert.That(status, Is.Zero, said);
    }

    /// <summary>What the guest was told to be on its disk is there, though nothing was said to anybody at the end.</summary>
    [Test]
    public async Task A_killed_daemon_loses_nothing_that_was_flushed(CancellationToken cancellation)
    {
        string disk = await CopyDiskAsync(cancellation);
        _ = await TypeAsync("create", $"name=\"{Name}\"", "bootloader=\"pygrub\"", "memory=256", $"disk=[ '{disk},raw,xvda,w' ]");
        int flushed;
        using (var console = new GuestShell())
        {
            console.LogIn();
            console.Type("i=0; while i=$((i+1)); do echo $i >> /root/count && sync /root/count && echo \"flushed $i.\"; done");
            console.WaitFor("flushed 40.");
            _daemon.Send(9);
            _ = await _daemon.WaitAsync();
            _daemon.Dispose();
            await console.EndedAsync();
            flushed = Flushed().Matches(console.Rest).Select(static match => int.Parse(match.Groups[1].Value, CultureInfo.InvariantCulture)).Append(40).Max();
        }

        // As at the next boot: the journal first, which is all that it takes.
        CommandResult recovered = await RunAsync(cancellation, "e2fsck", "-p", disk);
        Assert.That(recovered.ExitCode, Is.LessThanOrEqualTo(1), recovered.Output);
        await CheckFileSystemAsync(disk, cancellation);
        CommandResult count = await RunAsync(cancellation, "debugfs", "-R", "cat /root/count", disk);
        string[] lines = count.Output.Split('\n', StringSplitOptions.RemoveEmptyEntries);
        Assert.That(lines.Take(flushed), Is.EqualTo(Enumerable.Range(1, flushed).Select(static i => i.ToString(CultureInfo.InvariantCulture))));

        await StartDaemonAsync();
        Assert.That((await TypeAsync("list")).Output, Does.Not.Contain(Name));
        Assert.That((await TypeAsync("list", "--lost")).Output, Does.Contain(Name));
    }

    [Test]
    public async Task A_day_with_a_Debian_system(CancellationToken cancellation)
    {
        string disk = await CopyDiskAsync(cancellation);
        string second = Path.Combine(_folder, "second.img");
        await using (FileStream file = File.Create(second))
            file.SetLength(256 << 20);
        string configuration = Path.Combine(_folder, "everyday.cfg");
        await File.WriteAllTextAsync(
            configuration,
            $"""
            # What a Debian domU's file looks like.
            name       = "{Name}"
            bootloader = "pygrub"
            memory     = 256
            maxmem     = 512
            vcpus      = 1
            maxvcpus   = 2
            disk       = [ '{disk},raw,xvda,w' ]
            vif        = [ 'bridge=everyday' ]
            """,
            cancellation);

        _ = await TypeAsync("create", configuration);
        Assert.That(await RowAsync(), Does.Match($@"^{Name}\s+1\s+256\s+1\s+[r-][b-]-----?\s+\d+\.\d$"));
        using (var console = new GuestShell())
        {
            console.LogIn();
            Assert.That(console.Run("systemctl --failed --no-legend | wc -l"), Is.EqualTo("0"));
            Assert.That(console.Run("ls /sys/class/net | tr '\\n' ' '").Split(' '), Does.Contain("eth0").Or.Contain("enX0"));

            // Another disk, with a file system and a file on it.
            _ = await TypeAsync("block-attach", Name, $"{second},raw,xvdb,w");
            Assert.That((await TypeAsync("block-list", Name)).Output, Does.Contain("51728"));
            string sum = console.Run(
                "until [ -b /dev/xvdb ]; do sleep 0.2; done; mkfs.ext4 -q /dev/xvdb && mount /dev/xvdb /mnt && head -c 8M /dev/urandom > /mnt/file && sync && sha256sum < /mnt/file");

            // More memory, and another processor.
            _ = await TypeAsync("mem-set", Name, "384");
            _ = await TypeAsync("vcpu-set", Name, "2");

            // Debian has no rule that brings up a processor which comes; whoever wants one writes this.
            console.Run("until echo 1 > /sys/devices/system/cpu/cpu1/online; do sleep 0.2; done 2>/dev/null; nproc");
            console.Run("until [ $(awk '/MemTotal/ {print $2}' /proc/meminfo) -gt 330000 ]; do sleep 0.2; done");
            while (!Regex.IsMatch(await RowAsync(), $@"^{Name}\s+1\s+384\s+2\s"))
                await Task.Delay(100, cancellation);

            // What runs goes on where it was.
            console.Run("(i=0; while sleep 0.2; do i=$((i+1)); echo $i > /run/count; done) & until [ -s /run/count ]; do sleep 0.1; done");
            string saved = Path.Combine(_folder, "saved");
            int before = int.Parse(console.Run("cat /run/count"), CultureInfo.InvariantCulture);
            _ = await TypeAsync("save", Name, saved);
            Assert.That((await TypeAsync("list")).Output, Does.Not.Contain(Name));
            await console.EndedAsync();
            _ = await TypeAsync("restore", saved);
            using var restored = new GuestShell();
            restored.Wake();
            Assert.That(restored.Run("sha256sum < /mnt/file"), Is.EqualTo(sum));
            restored.Run(string.Create(CultureInfo.InvariantCulture, $"until [ \"0$(cat /run/count)\" -gt {before} ]; do sleep 0.1; done"));
            Assert.That(restored.Run("nproc"), Is.EqualTo("2"));
            Assert.That(restored.Run("dmesg --level=emerg,alert,crit | wc -l"), Is.EqualTo("0"));

            restored.Run("umount /mnt");
            _ = await TypeAsync("block-detach", Name, "xvdb");
            restored.Run("until [ ! -e /dev/xvdb ]; do sleep 0.2; done");
            _ = await TypeAsync("shutdown", "-w", Name);
            await restored.EndedAsync();
        }

        Assert.That((await TypeAsync("list")).Output, Does.Not.Contain(Name));
        foreach (string image in (string[])[disk, second])
            await CheckFileSystemAsync(image, cancellation);
    }

    /// <summary>fio writes a file with a checksum in each of its blocks and checks them; the file is the same on the host once the guest is gone.</summary>
    [Test]
    public async Task What_fio_wrote_is_on_the_disk_after_the_power_is_off(CancellationToken cancellation)
    {
        int size = Durations.Number(DiskVariable, DefaultDiskMiB);
        string disk = await CopyDiskAsync(cancellation);
        string second = Path.Combine(_folder, "second.img");
        await using (FileStream file = File.Create(second))
            file.SetLength((long)(size + Math.Max(64, size / 16)) << 20);
        _ = await TypeAsync(
            "create", $"name=\"{Name}\"", "bootloader=\"pygrub\"", "memory=384", "vcpus=2",
            $"disk=[ '{disk},raw,xvda,w', '{second},raw,xvdb,w' ]");
        string sum;
        using (var console = new GuestShell())
        {
            console.LogIn();
            console.Run("mkfs.ext4 -q /dev/xvdb && mount /dev/xvdb /mnt");
            string job = string.Create(
                CultureInfo.InvariantCulture,
                $"fio --name=file --directory=/mnt --filename=file --size={size}M --bs=128k --ioengine=libaio --iodepth=32 --direct=1");
            long start = Stopwatch.GetTimestamp();
            console.Run($"{job} --rw=write --end_fsync=1 --verify=crc32c --do_verify=1 > /run/fio 2>&1 || {{ cat /run/fio; false; }}");
            TestContext.Out.WriteLine($"{size} MiB written and checked by fio in {Stopwatch.GetElapsedTime(start).TotalSeconds:0.0} s");
            TestContext.Out.WriteLine(console.Run("grep -E 'WRITE:|READ:' /run/fio"));
            Assert.That(console.Run("grep -c 'err= 0' /run/fio"), Is.EqualTo("1"));
            sum = console.Run("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/file").Split(' ')[0];
            Assert.That(console.Run("dmesg --level=emerg,alert,crit,err | grep -c 'I/O error\\|EXT4-fs error'; true"), Is.EqualTo("0"));

            // Nothing is unmounted by hand: the system does that on its way to powering off.
            _ = await TypeAsync("shutdown", "-w", Name);
            await console.EndedAsync();
        }

        foreach (string image in (string[])[disk, second])
            await CheckFileSystemAsync(image, cancellation);
        string copy = Path.Combine(_folder, "file");
        _ = await RunAsync(cancellation, "debugfs", "-R", $"dump /file {copy}", second);
        await using FileStream read = File.OpenRead(copy);
        Assert.That(read.Length, Is.EqualTo((long)size << 20));
        Assert.That(Convert.ToHexStringLower(await SHA256.HashDataAsync(read, cancellation)), Is.EqualTo(sum));
    }

    private async Task StartDaemonAsync()
    {
        _daemon = CommandProcess.Start("daemon", "--state", Path.Combine(_folder, "state"));
        while ((await CommandProcess.RunAsync("list")).Status != 0)
            await Task.Delay(100);
    }

    /// <summary>A copy of the Debian system's disk.</summary>
    private async Task<string> CopyDiskAsync(CancellationToken cancellation)
    {
        string disk = Path.Combine(_folder, "debian.img");
        try
        {
            string image = await DebianRootImage.GetAsync(new GuestCache(GuestCache.DefaultRoot()), null, cancellation);
            await DebianRootImage.CopyAsync(image, disk, cancellation);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }

        return disk;
    }

    private static async Task CheckFileSystemAsync(string image, CancellationToken cancellation)
    {
        CommandResult check = await RunAsync(cancellation, "e2fsck", "-f", "-n", image);
        Assert.That(check.ExitCode, Is.Zero, check.Output);
    }

    private static Task<CommandResult> RunAsync(CancellationToken cancellation, string program, params string[] arguments)
        => new CommandRunner(CommandRunner.SystemSearchPath).RunAsync(new Command(program, arguments), cancellation);

    [GeneratedRegex(@"flushed (\d+)\.")]
    private static partial Regex Flushed();

    /// <summary>A command that has to succeed.</summary>
    private static async Task<CommandEnd> TypeAsync(params string[] arguments)
    {
        CommandEnd end = await CommandProcess.RunAsync(arguments);
        Assert.That(end.Status, Is.Zero, $"xensharp {string.Join(' ', arguments)}: {end.Output}{end.Error}");
        return end;
    }

    /// <summary>The domain's line of the list.</summary>
    private static async Task<string> RowAsync()
        => (await TypeAsync("list")).Output.Split('\n').Single(static line => line.StartsWith(Name, StringComparison.Ordinal));

    /// <summary>Somebody at a terminal with <c>xensharp console</c>, and in it a shell of the guest's.</summary>
    private sealed partial class GuestShell : IDisposable
    {
        private readonly PseudoTerminal _terminal = new();
        private readonly CommandProcess _process;
        private readonly Screen _screen;
        private int _commands;

        internal GuestShell()
        {
            _process = CommandProcess.StartAt(_terminal.Name, "console", Name);
            _screen = new Screen(_terminal);
        }

        internal void LogIn()
        {
            _screen.WaitFor("login: ", s_bootPatience);
            Type("root");
            _screen.WaitFor("assword: ", s_bootPatience);
            Type(DebianRootImage.RootPassword);
            _screen.WaitFor(":~# ", s_bootPatience);

            // No colours, bracketed pastes and words of the kernel's between the lines.
            Type("export TERM=dumb; bind 'set enable-bracketed-paste off'; PS1='# '; stty -echo; dmesg -n 1");
            _screen.WaitFor("# ", s_bootPatience);
        }

        /// <summary>Has the shell of a restored guest say that it is there.</summary>
        internal void Wake() => Run("true");

        /// <summary>Has the shell run something that must succeed.</summary>
        /// <returns>What it printed, without the last line's end.</returns>
        internal string Run(string command)
        {
            string mark = string.Create(CultureInfo.InvariantCulture, $"{Environment.ProcessId}-{++_commands}");
            Type($"echo \"<{mark}\"; {command}; echo \"$?{mark}>\"");
            _screen.WaitFor($"<{mark}\r\n", s_bootPatience);
            string output = _screen.WaitFor($"{mark}>", s_bootPatience).Replace("\r", "", StringComparison.Ordinal);
            Match end = Status().Match(output);
            Assert.That(end.Value, Is.EqualTo("0"), $"{command}: {output}");
            return output[..end.Index].TrimEnd('\n');
        }

        /// <summary>What has come and was not waited for.</summary>
        internal string Rest => _screen.Rest;

        internal void WaitFor(string text) => _screen.WaitFor(text, s_bootPatience);

        internal async Task EndedAsync() => Assert.That(await _process.WaitAsync(), Is.Zero, _process.Error);

        public void Dispose()
        {
            _process.Dispose();
            _terminal.Dispose();
        }

        internal void Type(string line) => _terminal.Type(Encoding.ASCII.GetBytes(line + "\r"));

        [GeneratedRegex(@"\d+$")]
        private static partial Regex Status();
    }
}
