// The bed of XenSharp on hardware-style KVM: kvm_amd on the SVM that QEMU emulates, with and without nested paging.
using System.Globalization;
using System.Runtime.CompilerServices;
using System.Text;
using XenSharp.Guests.Fetching;
using XenSharp.Oracle.Nested;

namespace XenSharp.Oracle.Beds;

/// <summary>
/// Runs guests with the native xensharp command in one emulated machine whose KVM is kvm_amd. SYSCALL enters the monitor at
/// CPL 0 there; with nested paging the processor walks the guest's own tables, without it KVM shadows them.
/// </summary>
/// <remarks>Needs no /dev/kvm.</remarks>
public sealed class NestedKvmBed : IGuestBed
{
    // The statuses of `xensharp run`, as the README has them.
    private const int PoweredOff = 0;
    private const int Crashed = 1;
    private const int Rebooted = 3;
    private const int Suspended = 4;
    private const int WatchdogFired = 5;
    private const int SoftResetAsked = 6;

    /// <summary>SIGALRM, which nothing but the script's timeout sends.</summary>
    private const int RanTooLong = 128 + 14;

    /// <summary>How much of a guest's output is kept; nothing that is compared prints as much, but a guest gone wild may.</summary>
    private const int MostConsoleBytes = 4 << 20;

    private const int MostReportBytes = 256 << 10;
    private const string InfoWord = "info";
    private const string CommandWord = "command";
    private const string CommandFile = "guests/command";
    private const string GuestWord = "guest";

    /// <summary>The boot of the machine, on a slow host.</summary>
    private static readonly TimeSpan BootTime = TimeSpan.FromMinutes(3);

    /// <summary>What a guest may take beside its own time: the command's start, and the way of its output.</summary>
    private static readonly TimeSpan TimeAroundGuest = TimeSpan.FromSeconds(20);

    private readonly bool _nestedPaging;
    private readonly NestedMachine _machine;

    /// <param name="cache">Where QEMU and Debian's kernel and busybox are kept; what is missing there is fetched.</param>
    /// <param name="command">Path of the native xensharp command, as dotnet publish makes it.</param>
    /// <param name="nestedPaging">Whether the processor walks the guests' page tables (npt=1), or KVM shadows them (npt=0).</param>
    /// <param name="progress">Told what is fetched.</param>
    public NestedKvmBed(GuestCache cache, string command, bool nestedPaging, IProgress<FetchProgress>? progress = null)
        : this(new NestedMachine(cache, command, nestedPaging, progress), nestedPaging)
    {
    }

    internal NestedKvmBed(NestedMachine machine, bool nestedPaging)
    {
        _machine = machine;
        _nestedPaging = nestedPaging;
    }

    public string Name => $"XenSharp on kvm_amd (npt={(_nestedPaging ? 1 : 0)})";

    /// <summary>Emulated processors.</summary>
    public int Processors
    {
        get => _machine.Processors;
        init => _machine.Processors = value;
    }

    /// <summary>What <c>xensharp info --json</c> said in the machine of the last run; null before there was one.</summary>
    public string? HostReport { get; private set; }

    /// <summary>Arguments of one more xensharp command, which is run before the guests; null for none.</summary>
    public string? Command { get; init; }

    /// <summary>What <see cref="Command"/> printed in the machine of the last run.</summary>
    public string? CommandOutput { get; private set; }

    public async IAsyncEnumerable<GuestRun> RunAsync(
        IReadOnlyList<BedGuest> guests, [EnumeratorCancellation] CancellationToken cancellation = default)
    {
        BedGuests.Check(guests);
        BedGuests.CheckAlone(guests, Name);
        if (guests.Count == 0)
            yield break;
        int count = 0;
        TimeSpan timeout = guests.Aggregate(BootTime, static (sum, guest) => sum + guest.Timeout + TimeAroundGuest);
        int memory = guests.Max(static guest => guest.MemoryMiB);
        await foreach (string line in _machine.RunAsync(Script, Files(guests, Command), memory, timeout, cancellation).ConfigureAwait(false))
        {
            string[] words = line.Split(' ');
            switch (words)
            {
                case [InfoWord, string report]:
                    HostReport = NestedText.Decode(report);
                    break;
                case [CommandWord, string output]:
                    CommandOutput = NestedText.Decode(output);
                    break;
                case [GuestWord, string name, string status, string console, string report]
                    when count < guests.Count && name == guests[count].Name && int.TryParse(status, CultureInfo.InvariantCulture, out int number):
                    count++;
                    yield return Conclude(name, number, NestedText.Decode(console), NestedText.Decode(report));
                    break;
                default:
                    throw new OracleException("What came out of the emulated machine is damaged; run it again.");
            }
        }
        if (count < guests.Count)
            throw new OracleException($"The emulated machine ended before the guest {guests[count].Name} had run; run it again.");
    }

    private static GuestRun Conclude(string name, int status, string console, string report)
    {
        // The command's first line is not about the end.
        if (report.StartsWith("xensharp: Booting ", StringComparison.Ordinal))
            report = report[(report.IndexOf('\n', StringComparison.Ordinal) + 1)..];
        if (console.Length == MostConsoleBytes)
            report += $"What the guest printed after its first {MostConsoleBytes >> 20} MiB was dropped.\n";
        GuestEnding ending = status switch
        {
            PoweredOff => GuestEnding.PowerOff,
            Crashed => GuestEnding.Crash,
            Rebooted => GuestEnding.Reboot,
            Suspended => GuestEnding.Suspend,
            WatchdogFired => GuestEnding.Watchdog,
            SoftResetAsked => GuestEnding.SoftReset,
            RanTooLong => GuestEnding.TimedOut,
            _ => throw new OracleException($"xensharp could not run the guest {name} in the emulated machine (status {status}): {report.Trim()}"),
        };
        return new GuestRun(name, console, ending, report);
    }

    /// <summary>The command and the guests' files. A kernel or ramdisk that several guests share is there once.</summary>
    private static List<NestedFile> Files(IReadOnlyList<BedGuest> guests, string? command)
    {
        List<NestedFile> files = [];
        Dictionary<ReadOnlyMemory<byte>, int> known = [];
        StringBuilder list = new();
        foreach (BedGuest guest in guests)
        {
            string ramdisk = guest.Ramdisk.IsEmpty ? "-" : Add(guest.Ramdisk);
            int seconds = Math.Max(1, (int)Math.Ceiling(guest.Timeout.TotalSeconds));
            list.Append(CultureInfo.InvariantCulture, $"{guest.Name} {Add(guest.Kernel)} {ramdisk} {guest.MemoryMiB} {guest.Vcpus} {seconds}\n");
            files.Add(new($"guests/{guest.Name}.cmdline") { Contents = Encoding.UTF8.GetBytes(guest.CommandLine) });
        }
        if (command != null)
            files.Add(new(CommandFile) { Contents = Encoding.UTF8.GetBytes(command) });
        files.Add(new("guests/list") { Contents = Encoding.UTF8.GetBytes(list.ToString()) });
        return files;

        string Add(ReadOnlyMemory<byte> contents)
        {
            if (!known.TryGetValue(contents, out int number))
            {
                number = known[contents] = known.Count;
                files.Add(new($"guests/image-{number}") { Contents = contents });
            }
            return $"/guests/image-{number}";
        }
    }

    private static string Script { get; } = $$"""
        xensharp info --json >/tmp/info 2>/tmp/report ||
            fail "xensharp finds no KVM to its liking in the emulated machine: $(cat /tmp/report)"
        echo "{{InfoWord}} $(base64 -w 0 /tmp/info)" >&3

        if [ -e /{{CommandFile}} ]; then
            xensharp $(cat /{{CommandFile}}) >/tmp/command 2>/tmp/report 3>&- ||
                fail "xensharp $(cat /{{CommandFile}}) failed in the emulated machine: $(cat /tmp/report)"
            echo "{{CommandWord}} $(base64 -w 0 /tmp/command)" >&3
        fi

        mkfifo /tmp/input.pipe /tmp/console.pipe /tmp/report.pipe
        # The end of its input would be typed to the guest, as a ^D with an event.
        exec 4<>/tmp/input.pipe
        keep() {
            head -c $2 >$1
            cat >/dev/null
        }
        while read -r name kernel ramdisk memory vcpus seconds; do
            keep /tmp/console {{MostConsoleBytes}} </tmp/console.pipe &
            keep /tmp/report {{MostReportBytes}} </tmp/report.pipe &
            set -- run --name $name --kernel $kernel --memory $memory --vcpus $vcpus --cmdline "$(cat /guests/$name.cmdline)"
            [ $ramdisk = - ] || set -- "$@" --ramdisk $ramdisk
            xensharp "$@" <&4 >/tmp/console.pipe 2>/tmp/report.pipe 3>&- &
            guest=$!
            (exec 3>&-; sleep $seconds; kill -ALRM $guest) &
            alarm=$!
            wait $guest
            status=$?
            kill $alarm
            wait
            {
                printf '{{GuestWord}} %s %s ' $name $status
                base64 -w 0 /tmp/console
                printf ' '
                base64 -w 0 /tmp/report
                echo
            } >&3
        done </guests/list
        """;
}
