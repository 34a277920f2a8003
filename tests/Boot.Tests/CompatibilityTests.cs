// 32-bit processes of a 64-bit Debian guest: the busybox of Debian's i386, and a program that calls the kernel by SYSENTER.
using System.Text.RegularExpressions;
using XenSharp.Cli.Tests;
using XenSharp.Domains.Emulation;
using XenSharp.Guests.Elf;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed class CompatibilityTests : KvmFixture
{
    /// <summary>
    /// Everything in it but the outer shell's own lines is done by 32-bit processes. A function that calls itself runs into the end of the
    /// stack, and a shell that puts off a trap has a signal frame on it.
    /// </summary>
    private const string Script = """
        b=/bin/busybox-i386
        say() { echo "[$1: $2]"; }
        $b echo hello; say echo $?
        $b sh -c 'trap "echo trapped" USR1; kill -USR1 $$; echo after'; say signal $?
        $b sh -c 'ulimit -s 100; f() { f; }; f' 2>/dev/null; say segfault $?
        $b sh -c 'sleep 0.1 & wait $!; sleep 0.1; /bin/busybox-i386 seq 1 5 | /bin/busybox-i386 wc -l'; say child $?
        $b awk 'BEGIN { printf "%.4f\n", 1.5 * 2.25 }'; say float $?
        $b dd if=/dev/zero bs=64k count=4 2>/dev/null | $b md5sum; say vectors $?
        $b kill -9 1000000 2>/dev/null; say errno $?
        /bin/sysenter; say sysenter $?
        for i in 1 2 3 4; do $b sh -c 'for j in 1 2 3; do sleep 0.01; done; exit 7' & done
        for p in $(jobs -p); do wait $p; say switched $?; done
        echo "[dmesg]"; dmesg; echo "[end]"
        """;

    /// <summary>
    /// Status of the program that lives on SYSENTER: Intel's processors have the instruction for 32-bit code of a 64-bit kernel, and AMD's do
    /// not, where the kernel sends SIGILL.
    /// </summary>
    private static readonly int s_sysenterStatus = CpuidPolicy.FromHost(new CpuidOptions()).Vendor == CpuVendor.Intel ? SysenterDone : 128 + 4;

    private const int SysenterDone = 42;
    private const int SysenterTimes = 100;

    [Test]
    public async Task Debians_i386_busybox_works()
    {
        string kernel;
        string busybox;
        string busybox32;
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            kernel = (await cache.GetKernelAsync(DebianKernelFlavour.Amd64)).Image;
            busybox = await cache.GetBusyboxAsync();
            busybox32 = await cache.GetBusyboxAsync(architecture: "i386");
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            return;
        }

        string folder = Directory.CreateTempSubdirectory("xensharp-boot-test-").FullName;
        try
        {
            string ramdisk = Path.Combine(folder, "ramdisk");
            await File.WriteAllBytesAsync(ramdisk, await BusyboxInitramfs.BuildAsync(busybox, new BusyboxInitramfsOptions
            {
                InitScript = Script,
                Files =
                [
                    new InitramfsFile("bin/busybox-i386", await File.ReadAllBytesAsync(busybox32), Executable: true),
                    new InitramfsFile("bin/sysenter", SysenterProgram.Build("by sysenter\n", SysenterTimes, SysenterDone), Executable: true),
                ],
            }));
            CommandEnd end = await CommandProcess.RunAsync(
                "run", "--kernel", kernel, "--ramdisk", ramdisk, "--cmdline", "console=hvc0 quiet", "--memory", "256", "--vcpus", "2");
            Assert.That(end.Status, Is.Zero, end.Error);
            Assert.That(
                Regex.Matches(end.Output, @"\[(\w+: \d+)\]").Select(static match => match.Groups[1].Value),
                Is.EqualTo((string[])
                [
                    "echo: 0", "signal: 0", "segfault: 139", "child: 0", "float: 0", "vectors: 0", "errno: 1", $"sysenter: {s_sysenterStatus}",
                    .. Enumerable.Repeat("switched: 7", 4),
                ]),
                end.Output);
            foreach (string line in (string[])["hello\r\n", "trapped\r\nafter\r\n", "5\r\n", "3.3750\r\n", "ec87a838931d4d5d2e94a04644788a55  -\r\n"])
                Assert.That(end.Output, Does.Contain(line));

            int written = Regex.Matches(end.Output, "by sysenter\r\n").Count;
            Assert.That(written, Is.EqualTo(s_sysenterStatus == SysenterDone ? SysenterTimes : 0));

            // The overflow of the stack is reported, and nothing else.
            string log = KernelLog.Section(end.Output, "[dmesg]", "[end]");
            Assert.That(Regex.Matches(log, "segfault at"), Has.Count.EqualTo(1));
            Assert.That(KernelLog.TroubleIn(log), Is.Empty);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }
}
