// Debian saved on one class of host and restored on another: this machine's KVM, and an emulated one with nested and with shadow paging.

using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle.Nested;

namespace XenSharp.Nested.Tests;

/// <summary>
/// One guest boots here, goes on under nested paging, under shadow paging of an emulated SVM, and here again. Another boots under nested
/// paging and goes on here. One boot of the emulated machine; every test looks at something that happened in it.
/// </summary>
/// <remarks>
/// The emulated processor is AMD's. On a host of another vendor's a guest only goes from nested to shadow paging, and what is shown of the way
/// between here and there is that it is refused.
/// </remarks>
[TestFixture]
[Category("Nested")]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(780_000)]
public sealed partial class HostClassTests
{
    private const string Travelling = "travelling";
    private const string Fresh = "fresh";
    private const string Unmasked = "unmasked";
    private const int MemoryMiB = 80;

    /// <summary>
    /// Takes from a guest, with bits as xl.cfg(5) writes them, what processors differ in: of leaf 1 all but ACPI and SS stays, of the extended features
    /// SYSCALL, NX, long mode, LAHF and LZCNT, and nothing of what came after AVX.
    /// </summary>
    private static readonly string[] s_masks =
    [
        "0x1:edx=xxxx0xxxx0xxxxxxxxxxxxxxxxxxxxxx", "0x7,0:ebx=" + Nothing, "0x7,0:ecx=" + Nothing, "0x7,0:edx=" + Nothing, "0x7,1:eax=" + Nothing, "0x7,2:edx=" + Nothing, "0xd,1:eax=" + Nothing,
        "0x80000001:edx=00x00000000x00000000x00000000000", "0x80000001:ecx=00000000000000000000000000x0000x",
        "0x80000007:edx=" + Nothing, "0x80000008:ebx=" + Nothing, "0x80000021:eax=" + Nothing,
    ];

    /// <summary>
    /// What Linux gives to init as its environment. A KVM without hardware virtualization cannot hide a feature from user space, where
    /// CPUID does not trap; so the C library is told not to use what comes after AVX2.
    /// </summary>
    private const string UserSpace = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-ERMS,-FSRM";

    private const string OtherVendor = "The saved domain was shown a processor of another vendor. Restore it on a host with one of the same.";

    private const string Nothing = "00000000000000000000000000000000";

    /// <summary>Room in the emulated machine for a guest and the image that it is saved to.</summary>
    private const int BedMiB = 3 * MemoryMiB;

    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(9);

    /// <summary>
    /// Prints a line several times a second: how many that makes, whether a file is what it was, the wall clock, and how long the kernel has
    /// been up by its own clock.
    /// </summary>
    private const string GuestScript = """
        dd if=/dev/urandom of=/tmp/file bs=65536 count=16 2>/dev/null
        cd /tmp && md5sum file >sum
        n=0
        until [ -e /tmp/off ]; do
            md5sum -c sum >/dev/null 2>&1 && file=whole || file=broken
            read up idle </proc/uptime
            n=$((n+1))
            echo "@$n $file $(date +%s) $up"
            usleep 200000
        done
        dmesg >/tmp/log
        echo "[trouble]"; grep -E 'TROUBLE' /tmp/log | grep -v hw-vuln; echo "[end]"
        """;

    /// <summary>
    /// For a shell of either host, whose working folder is its own, and which has xensharp in its path and a function <c>fail SENTENCE</c>.
    /// The daemon is started and ended by name of the host class, which has its logs.
    /// </summary>
    private const string Library = """
        export XENSHARP_SOCKET=$PWD/socket
        run() {
            said=$(xensharp "$@" 2>&1 3>&- 5>&-) || fail "xensharp $*: $said"
        }
        begin() {
            class=$1
            date +%s >$class.begin
            mkdir -p $class
            xensharp daemon --socket socket --state $class/state --console-log $class >$class/daemon.log 2>&1 3>&- 5>&- &
            daemon=$!
            tries=0
            until xensharp list >/dev/null 2>&1 3>&- 5>&-; do
                tries=$((tries+1))
                [ $tries -lt 300 ] || fail "no daemon answers: $(cat $class/daemon.log)"
                sleep 0.2
            done
        }
        end() {
            kill $daemon
            wait $daemon || fail "the daemon ended with status $?: $(cat $class/daemon.log)"
            date +%s >$class.end
        }
        # Until it has printed some lines by its own clock; what was in the ring of its console when it was saved comes out first.
        goes_on() {
            tries=0
            until [ "$(awk '/^@/ && $3 >= begin { n++ } END { print n + 0 }' begin=$(cat $class.begin) $class/guest-$1.log)" -ge 4 ]; do
                tries=$((tries+1))
                ! grep -q "^xensharp: The domain $1 .* has shut down" $class/daemon.log && [ $tries -lt 600 ] ||
                    fail "$1 does not go on: $(cat $class/guest-$1.log $class/daemon.log)"
                sleep 0.2
            done
        }

        """;

    private readonly Dictionary<string, Stage> _stages = [];
    private string _folder = null!;
    private string _command = null!;
    private string _refusal = null!;
    private bool _isVendorsToo;

    /// <summary>What happened on one class of host.</summary>
    /// <param name="Begin">Seconds since 1970 before any guest ran.</param>
    /// <param name="End">And when none did any more.</param>
    /// <param name="Consoles">What each guest printed meanwhile.</param>
    private sealed record Stage(long Begin, long End, IReadOnlyDictionary<string, string> Consoles);

    /// <summary>A line of the guest's.</summary>
    private readonly record struct Line(int Number, string File, long UnixTime, double Uptime);

    [OneTimeSetUp]
    public async Task TravelAsync()
    {
        if (!File.Exists("/dev/kvm"))
            Assert.Ignore("There is no /dev/kvm on this machine, and so no second class of host.");
        _isVendorsToo = (await File.ReadAllTextAsync("/proc/cpuinfo")).Contains("AuthenticAMD", StringComparison.Ordinal);
        _command = await NativeCommand.GetAsync();
        _folder = Directory.CreateTempSubdirectory("xensharp-classes-").FullName;
        var cache = new GuestCache(GuestCache.DefaultRoot());
        string kernel;
        try
        {
            kernel = (await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64)).Image;
            await File.WriteAllBytesAsync(InFolder("initrd"), await BusyboxInitramfs.BuildAsync(await cache.GetBusyboxAsync(), new()
            {
                Banner = "",
                InitScript = GuestScript.ReplaceLineEndings("\n").Replace("TROUBLE", NestedKvmBedTests.Trouble, StringComparison.Ordinal),

                // What a kernel starts that is asked to power off.
                Files = [new("sbin/poweroff", "#!/bin/sh\n: >/tmp/off\n"u8.ToArray(), Executable: true)],
            }));
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }

        await File.WriteAllTextAsync(InFolder("travelling.cfg"), Configuration(Travelling, kernel, InFolder("initrd"), masked: true));
        await File.WriteAllTextAsync(InFolder("unmasked.cfg"), Configuration(Unmasked, kernel, InFolder("initrd"), masked: false));
        await RunHereAsync($"""
            begin here
            run create -q {Travelling}.cfg
            run create -q {Unmasked}.cfg
            goes_on {Travelling}
            run save {Travelling} {Travelling}.image
            goes_on {Unmasked}
            run save {Unmasked} {Unmasked}.image
            end
            """, "here", Travelling, Unmasked);
        await RunInBedAsync(cache, kernel);
        if (!_isVendorsToo)
        {
            await RunHereAsync($"""
                begin back
                xensharp restore {Fresh}.back >refusal 2>&1 && fail "a guest was restored that was shown a processor of another vendor"
                end
                """, "back");
            return;
        }

        await RunHereAsync($"""
            begin back
            run restore {Travelling}.back
            run restore {Fresh}.back
            goes_on {Travelling}
            goes_on {Fresh}
            run shutdown -a -w
            end
            """, "back", Travelling, Fresh);
    }

    [OneTimeTearDown]
    public void Delete()
    {
        if (_folder is not null)
            Directory.Delete(_folder, recursive: true);
    }

    [Test]
    public void A_guest_goes_on_under_nested_paging_and_under_shadow_paging_and_comes_back()
    {
        if (_isVendorsToo)
            GoesOn(Travelling, "here", "npt1", "npt0", "back");
        else
            GoesOn(Fresh, "npt1", "npt0");
    }

    [Test]
    public void A_guest_that_booted_under_nested_paging_goes_on_under_this_KVM()
    {
        if (_isVendorsToo)
            GoesOn(Fresh, "npt1", "back");
        else
            Assert.That(File.ReadAllText(InFolder("refusal")), Does.Contain(OtherVendor), "this host's processor is another vendor's");
    }

    [Test]
    public void A_guest_that_knows_more_than_a_host_can_is_refused_there()
        => Assert.That(_refusal, _isVendorsToo
            ? Does.Match("The saved domain was shown a processor with .*, which this host's domains lack. Restore it on a host that has (it|them).")
            : Does.Contain(OtherVendor));

    private static string Configuration(string name, string kernel, string ramdisk, bool masked)
    {
        string configuration = $"""
            name = "{name}"
            kernel = "{kernel}"
            ramdisk = "{ramdisk}"
            cmdline = "console=hvc0 quiet {UserSpace}"
            memory = {MemoryMiB}

            """;
        return masked ? configuration + $"cpuid = [ {string.Join(", ", s_masks.Select(static mask => $"'{mask}'"))} ]\n" : configuration;
    }

    /// <summary>Shows that a guest lost nothing on its way.</summary>
    private void GoesOn(string guest, params string[] classes)
    {
        Line last = default;
        foreach (string name in classes)
        {
            Stage stage = _stages[name];
            string console = stage.Consoles[guest];
            Line[] lines = [.. LinePattern().Matches(console).Select(Parse)];
            foreach (Line line in lines)
            {
                Assert.That(line.Number, Is.EqualTo(last.Number + 1), $"{name}: {console}");
                Assert.That(line.File, Is.EqualTo("whole"), $"{name}: {console}");
                Assert.That(line.UnixTime, Is.GreaterThanOrEqualTo(last.UnixTime), $"{name}: {console}");

                // It sleeps for 0.2 s between two lines, and the uptime has two digits.
                Assert.That(line.Uptime, Is.GreaterThan(last.Uptime + (last.Number == 0 ? 0 : 0.185)), $"{name}: {console}");
                last = line;
            }

            // A clock that is read by the parameters of another host is wrong, fast, or slow. The wall clock is asked by another process,
            // which on an emulated processor that has much to do is some seconds later.
            Line[] ofStage = [.. lines.Where(line => line.UnixTime >= stage.Begin)];
            Assert.That(ofStage, Has.Length.GreaterThanOrEqualTo(4), $"{name}: {console}");
            Assert.That(last.UnixTime, Is.LessThanOrEqualTo(stage.End + 1), $"{name}: {console}");
            Assert.That(last.Uptime - ofStage[0].Uptime, Is.EqualTo(last.UnixTime - ofStage[0].UnixTime).Within(10), $"{name}: {console}");
        }

        Assert.That(_stages[classes[^1]].Consoles[guest], Does.Contain("[trouble]\r\n[end]\r\n"), "it powers off, and has found nothing wrong");
    }

    [GeneratedRegex(@"^@(\d+) (\w+) (\d+) (\d+\.\d+)\r$", RegexOptions.Multiline)]
    private static partial Regex LinePattern();

    private static Line Parse(Match line) => new(
        int.Parse(line.Groups[1].Value, CultureInfo.InvariantCulture), line.Groups[2].Value, long.Parse(line.Groups[3].Value, CultureInfo.InvariantCulture),
        double.Parse(line.Groups[4].Value, CultureInfo.InvariantCulture));

    private string InFolder(string name) => Path.Combine(_folder, name);

    /// <summary>Runs commands on this host.</summary>
    private async Task RunHereAsync(string script, string name, params string[] guests)
    {
        string whole = $$"""
            cd {{_folder}}
            PATH={{Path.GetDirectoryName(_command)}}:$PATH
            fail() {
                echo "$1" >&2
                [ -z "$daemon" ] || kill $daemon
                exit 1
            }
            {{Library}}
            {{script}}
            """;
        CommandResult result = await new CommandRunner().RunAsync(new Command("sh", "-c", whole.ReplaceLineEndings("\n")), TestContext.CurrentContext.CancellationToken);
        Assert.That(result.ExitCode, Is.Zero, result.Output + result.Error);
        _stages[name] = new Stage(
            Seconds(await File.ReadAllTextAsync(InFolder(name + ".begin"))), Seconds(await File.ReadAllTextAsync(InFolder(name + ".end"))),
            guests.ToDictionary(static guest => guest, guest => File.ReadAllText(InFolder($"{name}/guest-{guest}.log"), Encoding.Latin1)));
    }

    private static long Seconds(string text) => long.Parse(text.Trim(), CultureInfo.InvariantCulture);

    /// <summary>Has the images go on in the emulated machine, and takes those that are saved there out of it.</summary>
    private async Task RunInBedAsync(GuestCache cache, string kernel)
    {
        // Of what is refused, not even the first page is looked at.
        byte[] start = new byte[256 << 10];
        await using (FileStream unmasked = File.OpenRead(InFolder(Unmasked + ".image")))
            _ = await unmasked.ReadAtLeastAsync(start, start.Length, throwOnEndOfStream: false);
        NestedFile[] files =
        [
            new("guests/" + Travelling, InFolder(Travelling + ".image")),
            new("guests/" + Unmasked) { Contents = start },
            // Unpacked here, where that is quicker.
            new("guests/kernel") { Contents = KernelImage.Unpack(await File.ReadAllBytesAsync(kernel)) },
            new("guests/initrd", InFolder("initrd")),
            new("guests/fresh.cfg") { Contents = Encoding.UTF8.GetBytes(Configuration(Fresh, "/guests/kernel", "/guests/initrd", masked: true)) },
        ];
        string travelling = $"""
            run restore /guests/{Travelling}
            goes_on {Travelling}
            run save {Travelling} {Travelling}.image
            rm /guests/{Travelling}
            """;

        // What goes on under shadow paging, and comes back.
        string next = _isVendorsToo ? Travelling : Fresh;
        string script = $$"""
            cd /tmp
            {{Library}}
            say() {
                echo "$1 $(base64 -w 0)" >&3
            }
            carry_out() {
                stat -c "image $1 %s" $1.image >&3
                cat $1.image >&5
                rm $1.image
            }
            say_class() {
                echo "stage $class $(cat $class.begin) $(cat $class.end)" >&3
                for guest in $*; do
                    say "console $class $guest" <$class/guest-$guest.log
                done
            }

            begin npt1
            xensharp restore /guests/{{Unmasked}} >/tmp/refusal 2>&1 3>&- 5>&- && fail "a guest was restored that this machine's processor is not enough for"
            say refusal </tmp/refusal
            {{(_isVendorsToo ? travelling : "")}}
            run create -q /guests/fresh.cfg
            goes_on {{Fresh}}
            run save {{Fresh}} {{Fresh}}.image
            end
            {{(_isVendorsToo ? "" : $"cp {Fresh}.image kept")}}
            carry_out {{Fresh}}
            say_class {{(_isVendorsToo ? Travelling : "")}} {{Fresh}}

            use_npt 0
            begin npt0
            run restore {{(_isVendorsToo ? Travelling + ".image" : "kept")}}
            goes_on {{next}}
            {{(_isVendorsToo ? $"run save {Travelling} {Travelling}.image" : "run shutdown -a -w")}}
            end
            {{(_isVendorsToo ? $"carry_out {Travelling}" : "")}}
            say_class {{next}}
            """;
        string carried = InFolder("carried");
        var machine = new NestedMachine(cache, _command, nestedPaging: true, null) { WriteFile = carried };
        List<(string Name, long Size)> images = [];
        Dictionary<string, string> consoles = [];
        await foreach (string line in machine.RunAsync(script, files, BedMiB, s_patience, TestContext.CurrentContext.CancellationToken))
        {
            switch (line.Split(' '))
            {
                case ["refusal", string text]:
                    _refusal = NestedText.Decode(text);
                    break;
                case ["image", string name, string size]:
                    images.Add((name, Seconds(size)));
                    break;
                case ["stage", string name, string begin, string end]:
                    _stages[name] = new Stage(Seconds(begin), Seconds(end), consoles = []);
                    break;
                case ["console", _, string guest, string text]:
                    consoles[guest] = NestedText.Decode(text);
                    break;
                default:
                    Assert.Fail($"The emulated machine says: {line}");
                    break;
            }
        }

        await using FileStream all = File.OpenRead(carried);
        Assert.That(all.Length, Is.EqualTo(images.Sum(static image => image.Size)));
        foreach ((string name, long size) in images)
        {
            byte[] image = new byte[size];
            await all.ReadExactlyAsync(image);
            await File.WriteAllBytesAsync(InFolder(name + ".back"), image);
        }
    }
}
