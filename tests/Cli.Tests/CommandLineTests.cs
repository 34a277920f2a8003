// What the command says to bad input, and to questions that need no KVM.

using System.Text.Json;

namespace XenSharp.Cli.Tests;

[TestFixture]
[CancelAfter(120_000)]
[Parallelizable(ParallelScope.Children)]
public sealed class CommandLineTests
{
    private const string NoKvm = "/nonexistent/kvm";

    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeFolder()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-cli-test-").FullName;
        File.WriteAllText(PathOf("text"), "This is no kernel.\n");
        File.WriteAllBytes(PathOf("empty"), []);
        File.WriteAllBytes(PathOf("tiny"), Guests.TinyGuest.Build());
        using FileStream large = File.Create(PathOf("large"));
        large.SetLength((8L << 20) + 1);
        WriteTraces();
        using FileStream huge = File.Create(PathOf("huge"));
        huge.SetLength((1L << 30) + 1);
    }

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("run", "Option '--kernel' is required")]
    [TestCase("run --kernal x", "does not know \"--kernal\"")]
    [TestCase("run --kernel", "--kernel")]
    [TestCase("re web", "\"re\" may stand for reboot, rename, restore, remus: write more of it")]
    [TestCase("-N destroy web", "destroy has no dry run: -N goes with create, block-attach, network-attach, config-update")]
    [TestCase("-x list", "does not know \"-x\"")]
    [TestCase("migrate -s ssh web host", "There is no migrate here. A domain is not moved to another host while it runs: save it,")]
    [TestCase("cd-eject web xvdc", "There is no cd-eject here. It is for HVM domains, with xl as well")]
    [TestCase("sched-credit2 -d web -w 512", "There is no sched-credit2 here. Linux schedules vCPUs")]
    [TestCase("help frob", "There is no command \"frob\"; xensharp help lists")]
    [TestCase("help trace frob", "There is no command \"trace frob\"")]
    [TestCase("create --vncviewer text", "Domains here have no screen")]
    [TestCase("restore -A file", "Domains here have no screen")]
    [TestCase("save -D web file", "gets the next free number here")]
    [TestCase("frob", "does not know \"frob\"")]
    [TestCase("run --kernel text --memory", "--memory")]
    [TestCase("run --kernel text --memory 1G", "\"1G\" is none")]
    [TestCase("run --kernel text --memory 1.5", "\"1.5\" is none")]
    [TestCase("run --kernel text --memory 0", "--memory 0 is too little")]
    [TestCase("run --kernel text --memory -1", "--memory -1 is too little")]
    [TestCase("run --kernel text --memory 3", "--memory 3 is too little")]
    [TestCase("run --kernel text --memory 1000000000", "is more than this machine's")]
    [TestCase("run --kernel text --memory 9223372036854775807", "is more than this machine's")]
    [TestCase("run --kernel text --memory 9223372036854775808", "is none")]
    [TestCase("run --kernel text --on-reboot explode", "\"explode\" is neither")]
    [TestCase("run --kernel text --name a/b", "\"a/b\" is not such a name")]
    [TestCase("demo --tiny --cloud", "two different guests")]
    [TestCase("demo --memory 2", "--memory 2 is too little")]
    [TestCase("demo --maxmem 1000000000", "--maxmem 1000000000 is more than this machine's")]
    [TestCase("demo --maxmem 128", "--maxmem 128 is less than the 512 MiB")]
    [TestCase("run --kernel text --memory 64 --maxmem 63", "--maxmem 63 is less than the 64 MiB")]
    [TestCase("run --kernel text --maxmem much", "--maxmem takes a whole number of MiB, such as 512; \"much\" is none")]
    [TestCase("run --kernel missing", "There is no file")]
    [TestCase("run --kernel missing/kernel", "There is no file")]
    [TestCase("run --kernel .", "is a folder")]
    [TestCase("run --kernel empty", "is empty")]
    [TestCase("run --kernel text", "is not a kernel")]
    [TestCase("run --kernel huge", "is larger than any kernel")]
    [TestCase("run --kernel /dev/zero", "is larger than any kernel")]
    [TestCase("run --kernel tiny --ramdisk missing", "There is no file")]
    [TestCase("run --kernel tiny --ramdisk .", "is a folder")]
    [TestCase("run --kernel tiny --ramdisk large --memory 8", "does not fit into the domain's 8 MiB")]
    [TestCase("run --kernel tiny", "/nonexistent/kvm does not exist")]
    [TestCase("run --kernel tiny --kvm-device text", "text")]
    [TestCase("run --kernel tiny --kvm-device .", "Cannot open .")]
    [TestCase("demo --tiny", "/nonexistent/kvm does not exist")]
    [TestCase("demo --tiny --trace text", "/nonexistent/kvm does not exist")]
    [TestCase("trace", "trace takes <")]
    [TestCase("trace summary", "See xensharp trace summary --help.")]
    [TestCase("trace diff good", "See xensharp trace diff --help.")]
    [TestCase("trace missing", "There is no file")]
    [TestCase("trace .", "is a folder")]
    [TestCase("trace empty", "is empty")]
    [TestCase("trace text", "is no trace of XenSharp's")]
    [TestCase("trace large", "is no trace of XenSharp's")]
    [TestCase("trace summary missing", "There is no file")]
    [TestCase("trace summary text --json", "is no trace of XenSharp's")]
    [TestCase("trace diff good missing", "There is no file")]
    [TestCase("trace diff text good", "text is no trace of XenSharp's")]
    [TestCase("trace header", "breaks off within its header")]
    [TestCase("trace nothing", "has no records")]
    [TestCase("trace begun", "has no whole block")]
    [TestCase("trace diff good begun", "has no whole block")]
    [TestCase("trace newer", "is a trace of version 9")]
    [TestCase("trace good --kind frob", "\"frob\" is none of them")]
    [TestCase("trace good --hypercall frob", "\"frob\" is none")]
    [TestCase("trace good --from yesterday", "\"yesterday\" is none")]
    [TestCase("trace good --to NaN", "\"NaN\" is none")]
    [TestCase("trace good --vcpu -1", "\"-1\" is none")]
    [TestCase("trace good --limit 0", "--limit must be at least 1")]
    [TestCase("trace good --frob", "does not know \"--frob\"")]
    [TestCase("trace summary good --svg .", "is a folder")]
    [TestCase("trace summary good --svg /nonexistent/picture", "its folder does not exist")]
    public async Task What_cannot_be_done_gets_one_sentence_and_status_2(string arguments, string sentence)
    {
        CommandEnd end = await RunAsync(arguments.Split(' '));
        TestContext.Out.Write(end.Error);
        Assert.Multiple(() =>
        {
            Assert.That(end.Status, Is.EqualTo(2));
            Assert.That(end.Error, Does.Contain(sentence));
            Assert.That(end.Error, Does.StartWith("xensharp: "));
            Assert.That(end.Error, Does.EndWith(".\n").Or.EndWith("--help.\n"));
            Assert.That(end.Error.Count(character => character == '\n'), Is.EqualTo(1), "one line");
            Assert.That(end.Error, Does.Not.Contain("   at "), "a stack trace");
            Assert.That(end.Output, Is.Empty);
        });
    }

    [Test]
    public async Task An_argument_that_begins_with_an_at_sign_is_no_response_file()
    {
        CommandEnd end = await RunAsync("run", "--kernel", "@text");
        Assert.That(end.Error, Does.Contain("There is no file @text"));
        Assert.That(end.Status, Is.EqualTo(2));
    }

    [Test]
    public async Task A_kernel_that_may_not_be_read_gets_a_sentence()
    {
        string secret = PathOf("secret");
        await File.WriteAllTextAsync(secret, "x");
        Assert.That(Terminal.Descriptors.ChangeMode(secret, 0), Is.Zero);
        Assert.That(Terminal.Descriptors.ChangeMode(Path.GetDirectoryName(secret)!, 0b111_101_101), Is.Zero);

        // The superuser may read every file, and so becomes somebody else first.
        string become = Environment.UserName == "root" ? "exec setpriv --reuid 65534 --regid 65534 --clear-groups " : "exec ";
        using CommandProcess process = CommandProcess.StartInShell(become + "\"$0\" \"$@\"", "run", "--kernel", secret);
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Error, Does.Contain("no permission to read"));
        Assert.That(end.Status, Is.EqualTo(2));
    }

    [Test]
    public async Task A_kernel_can_come_through_a_pipe()
    {
        using CommandProcess process = CommandProcess.StartInShell(
            $"cat '{PathOf("tiny")}' | \"$0\" \"$@\"", "run", "--kernel", "/dev/stdin", "--kvm-device", NoKvm);
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Error, Does.Contain(NoKvm + " does not exist"), "it was read and found good");
    }

    [Test]
    public async Task Info_prints_JSON_also_without_a_KVM()
    {
        CommandEnd end = await RunAsync("info", "--json");
        using JsonDocument report = JsonDocument.Parse(end.Output);
        JsonElement root = report.RootElement;
        Assert.Multiple(() =>
        {
            Assert.That(end.Status, Is.EqualTo(2));
            Assert.That(end.Error, Does.Contain("/nonexistent/kvm does not exist"));
            Assert.That(root.GetProperty("xenAbi").GetString(), Is.EqualTo("4.17"));
            Assert.That(root.GetProperty("kernel").GetString(), Is.EqualTo(File.ReadAllText("/proc/sys/kernel/osrelease").Trim()));
            Assert.That(root.GetProperty("memoryMiB").GetInt32(), Is.GreaterThan(0));
            Assert.That(root.GetProperty("kvm").ValueKind, Is.EqualTo(JsonValueKind.Null));
            Assert.That(root.GetProperty("kvmError").GetString(), Does.StartWith("/nonexistent/kvm does not exist"));
        });
    }

    [Test]
    public async Task Info_prints_a_table_also_without_a_KVM()
    {
        CommandEnd end = await RunAsync("info");
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Output, Does.Contain(File.ReadAllText("/proc/sys/kernel/osrelease").Trim()));
        Assert.That(end.Output, Does.Contain("Not usable."));
        Assert.That(end.Error, Does.Contain("/nonexistent/kvm does not exist"));
        string[] lines = end.Output.Split('\n');
        Assert.That(lines, Does.Contain($"host                   : {Environment.MachineName}").And.Contain("xen_version            : 4.17.xensharp"));
        Assert.That(lines.Single(static line => line.StartsWith("free_memory ", StringComparison.Ordinal)), Does.Match(@"^free_memory            : [1-9]\d*$"));
    }

    [Test]
    public async Task Info_lists_every_processor_with_its_node()
    {
        CommandEnd end = await RunAsync("info", "-n");
        Assert.That(System.Text.RegularExpressions.Regex.Count(end.Output.Split("numa_info")[0], @"(?m)^ *\d+: +\d+ +\d+ +\d+$"), Is.EqualTo(Toolstack.HostMachine.OnlineProcessors.Count));
        Assert.That(end.Output, Does.Match(@"(?m)^ +0: +[1-9]\d* +\d+ +\d+"));
    }

    /// <summary>Each command of xl 4.17's table (xl_cmdtable.c) is known: it is there, or refused in a sentence of its own.</summary>
    [Test]
    public async Task Every_command_of_xls_is_known()
    {
        string[] names = (
            "create config-update list destroy shutdown reboot pci-attach pci-detach pci-list pci-assignable-add pci-assignable-remove pci-assignable-list "
            + "pause unpause console vncviewer save migrate restore migrate-receive dump-core cd-insert cd-eject mem-max mem-set button-press vcpu-list "
            + "vcpu-pin vcpu-set vm-list info sharing sched-credit sched-credit2 sched-rtds domid domname rename trigger sysrq debug-keys set-parameters "
            + "dmesg top network-attach network-list network-detach channel-list block-attach block-list block-detach vtpm-attach vtpm-list vtpm-detach "
            + "vkb-attach vkb-list vkb-detach vdispl-attach vdispl-list vdispl-detach vsnd-attach vsnd-list vsnd-detach uptime claims cpupool-create "
            + "cpupool-list cpupool-destroy cpupool-rename cpupool-cpu-add cpupool-cpu-remove cpupool-migrate cpupool-numa-split getenforce setenforce "
            + "loadpolicy remus devd psr-hwinfo psr-cmt-attach psr-cmt-detach psr-cmt-show psr-cat-set psr-cat-show psr-mba-set psr-mba-show "
            + "usbctrl-attach usbctrl-detach usbdev-attach usbdev-detach usb-list qemu-monitor-command help").Split(' ');
        string all = (await CommandProcess.RunAsync("help", "--long")).Output;
        Assert.Multiple(() =>
        {
            foreach (string name in names)
                Assert.That(all, Does.Match($@"(?m)^  (.*, )?{name}\b"), name);
        });
    }

    [TestCase("--help", "demo")]
    [TestCase("run --help", "--console-log")]
    [TestCase("demo --help", "--cloud")]
    [TestCase("info --help", "--json")]
    [TestCase("help", "vcpu-pin")]
    [TestCase("help demo", "--cloud")]
    [TestCase("help trace diff", "Status 0: the same, 1: different.")]
    [TestCase("help --long", "psr-hwinfo")]
    [TestCase("help migrate", "There is no migrate here.")]
    [TestCase("hel dem", "--cloud")]
    [TestCase("trace --help", "--hypercall")]
    [TestCase("trace summary --help", "--svg")]
    [TestCase("trace diff --help", "Status 0: the same, 1: different.")]
    public async Task Help_needs_no_KVM(string arguments, string mentions)
    {
        CommandEnd end = await RunAsync(arguments.Split(' '));
        Assert.That(end.Status, Is.Zero);
        Assert.That(end.Output, Does.Contain(mentions));
        Assert.That(end.Output, Does.Not.Contain("--kvm-device"), "an option for tests");
        Assert.That(end.Error, Is.Empty);
    }

    [Test]
    public async Task The_version_is_a_number()
    {
        CommandEnd end = await CommandProcess.RunAsync("--version");
        Assert.That(end.Status, Is.Zero);
        Assert.That(Version.TryParse(end.Output.Trim(), out _), end.Output);
    }

    [Test]
    public async Task Without_a_command_the_commands_are_shown()
    {
        CommandEnd end = await CommandProcess.RunAsync();
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Output, Does.Contain("demo"));
    }

    private void WriteTraces()
    {
        byte[] trace = TraceCommandTests.Trace(1);
        File.WriteAllBytes(PathOf("good"), trace);
        File.WriteAllBytes(PathOf("header"), trace[..20]);
        File.WriteAllBytes(PathOf("nothing"), TraceCommandTests.Trace(0));
        File.WriteAllBytes(PathOf("begun"), trace[..70]);
        trace[8] = 9;
        File.WriteAllBytes(PathOf("newer"), trace);
    }

    /// <summary>With names of the folder's files made absolute, and no KVM unless another device is named.</summary>
    private Task<CommandEnd> RunAsync(params string[] arguments)
    {
        IEnumerable<string> full = arguments.Select(argument => File.Exists(PathOf(argument)) || argument == "missing" ? PathOf(argument) : argument);
        return CommandProcess.RunAsync(arguments.Contains("--kvm-device") ? full : ["--kvm-device", NoKvm, .. full]);
    }

    private string PathOf(string name) => Path.Combine(_folder, name);
}
