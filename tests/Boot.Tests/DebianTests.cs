// Stock Debian kernels, by the command's own demonstration: to the shell, through it, and out of it.

using System.IO.Compression;
using System.Text.RegularExpressions;
using XenSharp.Cli.Tests;
using XenSharp.Cli.Tests.Terminal;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 70 MB.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed class DebianTests : KvmFixture
{
    private string _release = null!;

    [OneTimeSetUp]
    public async Task FetchAsync()
    {
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            _release = (await cache.GetKernelAsync(DebianKernelFlavour.Amd64)).Release;
            _ = await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64);
            _ = await cache.GetBusyboxAsync();
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [Test]
    public async Task Piped_commands_are_run_and_their_end_powers_off()
    {
        CommandEnd end = await CommandProcess.RunAsync("uname -a\n", ["demo"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Does.Contain($"Linux xensharp {_release} "));
        Assert.That(end.Error, Does.Contain($"Booting Debian's Linux {_release} into a busybox shell with 512 MiB of memory."));
    }

    [TestCase(128)]
    [TestCase(1024)]
    [TestCase(8192, Category = "Long")]
    public async Task The_kernel_finds_nothing_wrong(int memory)
    {
        if (memory > HostMachine.MemoryMiB / 2)
            Assert.Ignore($"this machine has too little memory for a domain of {memory} MiB.");
        CommandEnd end = await CommandProcess.RunAsync(
            "echo \"[dmesg]\"; dmesg; echo \"[cpuinfo]\"; cat /proc/cpuinfo; echo \"[meminfo]\"; cat /proc/meminfo; echo \"[end]\"\n",
            ["demo", "--memory", $"{memory}"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        string log = KernelLog.Section(end.Output, "[dmesg]", "[cpuinfo]");
        Assert.That(log, Does.Contain("Hypervisor detected: Xen PV"));
        Assert.That(KernelLog.TroubleIn(log), Is.Empty);
        Assert.That(KernelLog.Section(end.Output, "[cpuinfo]", "[meminfo]"), Does.Contain("model name").And.Contain("flags"));

        // Of a domain's memory the kernel keeps a part for itself.
        Match total = Regex.Match(KernelLog.Section(end.Output, "[meminfo]", "[end]"), @"MemTotal:\s+(\d+) kB");
        Assert.That(int.Parse(total.Groups[1].Value) >> 10, Is.InRange(memory * 3 / 4 - 32, memory));
    }

    [Test]
    public async Task The_cloud_kernel_boots_as_well()
    {
        CommandEnd end = await CommandProcess.RunAsync("dmesg\nuname -r\n", ["demo", "--cloud"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Does.Contain("-cloud-amd64\r\n"));
        Assert.That(KernelLog.TroubleIn(end.Output), Is.Empty);
    }

    [Test]
    public async Task Four_vcpus_work_go_away_and_come_back()
    {
        // Twice what the host has, so that they also wait for each other's threads.
        CommandEnd end = await CommandProcess.RunAsync(
            """
            work() { i=0; while [ $i -lt 40 ]; do ls / >/dev/null; i=$((i+1)); done; }
            all() { for j in 1 2 3 4; do work & done; wait; echo "worked on $(nproc)"; }
            all
            for c in 1 2 3; do echo 0 >/sys/devices/system/cpu/cpu$c/online; done
            all
            for c in 1 2 3; do echo 1 >/sys/devices/system/cpu/cpu$c/online; done
            all
            dmesg

            """.ReplaceLineEndings("\n"),
            ["demo", "--vcpus", "4"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(Regex.Matches(end.Output, @"worked on (\d)\r").Select(static match => match.Groups[1].Value), Is.EqualTo((string[])["4", "1", "4"]));
        Assert.That(KernelLog.TroubleIn(end.Output), Is.Empty);
    }

    [Test]
    public async Task Processes_live_on_their_local_descriptor_tables()
    {
        CommandEnd end = await CommandProcess.RunAsync(
            Typed("/ldt", LocalTableProgram.Build())
            + "for i in 1 2 3; do /ldt; echo status: $?; done\n/ldt & /ldt; echo status: $?; wait $!; echo status: $?\ndmesg\n",
            ["demo"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(Regex.Matches(end.Output, @"status: (\d+)").Select(static match => match.Groups[1].Value), Is.EqualTo(Enumerable.Repeat("0", 5)));
        Assert.That(KernelLog.TroubleIn(end.Output), Is.Empty);
    }

    [Test]
    public async Task Processes_keep_their_state_and_are_single_stepped()
    {
        const int calls = 5;
        const int stepsOfACall = 2, stepsToTheEnd = 2;
        CommandEnd end = await CommandProcess.RunAsync(
            Typed("/one", KeptStateProgram.Build(0x1111_0001, 3000)) + Typed("/two", KeptStateProgram.Build(0x2222_0002, 3000))
            + Typed("/step", SingleStepProgram.Build(calls))
            + "/one & a=$!; /two & b=$!; /step; echo steps: $?; wait $a; echo status: $?; wait $b; echo status: $?\ndmesg\n",
            ["demo"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Does.Contain($"steps: {(calls * stepsOfACall) + stepsToTheEnd}\r"));
        Assert.That(Regex.Matches(end.Output, @"status: (\d+)").Select(static match => match.Groups[1].Value), Is.EqualTo((string[])["0", "0"]));
        Assert.That(KernelLog.TroubleIn(end.Output), Is.Empty);
    }

    /// <summary>
    /// What the kernel shares with its SYSCALL entries would give a process the kernel's rights; the rest is the monitor's. Where the host's
    /// KVM runs the entries as the guest, user mode's can be read.
    /// </summary>
    [Test]
    public async Task Processes_reach_nothing_of_the_hypervisor()
    {
        const ulong windows = 0xffff_8280_0000_0000;
        const ulong entry = windows, secondEntry = windows + 0x3000;
        ulong[] addresses =
        [
            entry, windows + 0x1000, windows + 0x2000, secondEntry, windows + 0x4000, windows + 0x5000, 0xffff_8180_0010_0000, 0xffff_8200_0000_e008,
        ];
        string input = string.Concat(addresses.SelectMany(address => (bool[])[false, true], (address, writes)
            => Typed("/touch", TouchProgram.Build(address, writes)) + $"/touch; echo touched {address:x}: $?\n"));
        CommandEnd end = await CommandProcess.RunAsync(input + "dmesg -n 1; dmesg\n", ["demo", "--vcpus", "2"]);
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(
            Regex.Matches(end.Output, @"touched (\w+): (\d+)").Select(static match => match.Value),
            Is.EqualTo(addresses.SelectMany(static address => (bool[])[false, true], (address, writes)
                => $"touched {address:x}: {(Host.Capabilities.SyscallEntryLevel == 3 && !writes && address is entry or secondEntry ? 0 : 139)}")),
            end.Output);
    }

    /// <summary>A line for the shell that makes an executable file; packed, because a terminal takes none of more than 4096 characters.</summary>
    private static string Typed(string path, byte[] file)
    {
        using var packed = new MemoryStream();
        using (var writer = new GZipStream(packed, CompressionLevel.Optimal, leaveOpen: true))
            writer.Write(file);
        return $"echo {Convert.ToBase64String(packed.ToArray())} | base64 -d | gunzip >{path}; chmod +x {path}\n";
    }

    [TestCase("poweroff", 0)]
    [TestCase("reboot", 3)]
    public async Task What_the_shell_is_told_becomes_the_status(string command, int status)
    {
        CommandEnd end = await CommandProcess.RunAsync($"{command}\nsleep 60\n", ["demo"]);
        Assert.That(end.Status, Is.EqualTo(status), end.Error + end.Output);
    }

    [Test]
    public async Task A_kernel_that_panics_is_a_crash()
    {
        CommandEnd end = await CommandProcess.RunAsync("echo c >/proc/sysrq-trigger\nsleep 60\n", ["demo"]);
        Assert.That(end.Status, Is.EqualTo(1), end.Error + end.Output);
        Assert.That(end.Error, Does.Contain("reported that it has crashed"));
        Assert.That(end.Output, Does.Contain("Kernel panic"));
    }

    [Test]
    public async Task At_a_terminal_there_is_a_shell_and_the_detach_key_leaves()
    {
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess process = CommandProcess.StartAt(terminal.Name, "demo");
        var screen = new Screen(terminal);
        screen.WaitFor("/root # ");
        terminal.Type("echo $((6*7))x\r"u8);
        screen.WaitFor("42x\r\n");
        screen.WaitFor("/root # ");
        terminal.Type("sleep 1000\r"u8);
        screen.WaitFor("sleep 1000");
        terminal.Type([0x1d]);
        Assert.That(await process.WaitAsync(), Is.Zero);
        Assert.That(terminal.Mode, Is.EqualTo(before));
    }

    [Test]
    public async Task A_signal_while_the_kernel_boots_destroys_the_domain_and_restores_the_terminal()
    {
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess process = CommandProcess.StartAt(terminal.Name, "demo");
        Assert.That(SpinWait.SpinUntil(() => terminal.IsRaw, TimeSpan.FromSeconds(60)));
        await Task.Delay(500);
        process.Send(15);
        Assert.That(await process.WaitAsync(), Is.EqualTo(143));
        Assert.That(terminal.Mode, Is.EqualTo(before));
    }

    [Test]
    public async Task It_boots_while_all_processors_are_busy()
    {
        using var done = new CancellationTokenSource();
        Thread[] load = [.. Enumerable.Range(0, Environment.ProcessorCount).Select(_ => new Thread(() =>
        {
            while (!done.IsCancellationRequested)
                Thread.SpinWait(1000);
        }))];
        foreach (Thread thread in load)
            thread.Start();
        try
        {
            CommandEnd end = await CommandProcess.RunAsync("echo \"[dmesg]\"; dmesg; echo \"[end]\"\n", ["demo", "--memory", "256"]);
            Assert.That(end.Status, Is.Zero, end.Error);
            Assert.That(KernelLog.Trouble.Matches(KernelLog.Section(end.Output, "[dmesg]", "[end]").Replace("This is not a bug", "")), Is.Empty);
        }
        finally
        {
            await done.CancelAsync();
            foreach (Thread thread in load)
                thread.Join();
        }
    }

    /// <summary>Eight times, or as often as XENSHARP_BOOTS says, in a domain that is booted again each time.</summary>
    [Test]
    public async Task Boots_in_a_row()
    {
        int wanted = Durations.Number("XENSHARP_BOOTS", 8);
        var cache = new GuestCache(GuestCache.DefaultRoot());
        string folder = Directory.CreateTempSubdirectory("xensharp-boot-test-").FullName;
        try
        {
            string ramdisk = Path.Combine(folder, "ramdisk");
            await File.WriteAllBytesAsync(ramdisk, await BusyboxInitramfs.BuildAsync(
                await cache.GetBusyboxAsync(), new BusyboxInitramfsOptions { Banner = "it booted", InitScript = "reboot -f\n" }));
            string kernel = (await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64)).Image;
            using CommandProcess process = CommandProcess.Start(
                "run", "--kernel", kernel, "--ramdisk", ramdisk, "--cmdline", "console=hvc0 quiet", "--memory", "128", "--on-reboot", "restart");
            using var reader = new StreamReader(process.Output);
            int boots = 0;
            while (boots < wanted && await reader.ReadLineAsync() is { } line)
                boots += line.Contains("it booted") ? 1 : 0;
            if (boots < wanted)
                Assert.Fail($"{boots} boots, then status {await process.WaitAsync()}: {process.Error}");
            process.Send(2);
            _ = reader.ReadToEndAsync();
            Assert.That(await process.WaitAsync(), Is.EqualTo(130));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    [Test]
    public async Task Memory_that_is_too_small_for_the_kernel_gets_a_sentence()
    {
        CommandEnd end = await CommandProcess.RunAsync("demo", "--memory", "16");
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain("16 MiB of memory are too few").And.Contain("--memory"));
    }
}
