// The ABI scripts on hardware-style KVM, held against real Xen's recorded transcripts.

using System.Text.Json;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Nested;

namespace XenSharp.Nested.Tests;

/// <summary>
/// What <see cref="NestedKvmBedTests"/> needs. A xensharp command runs some scripts each: starting it anew for every one, on an emulated
/// processor, takes longer than the script does; and one for all, which makes their kernels first, would take more memory than the machine has.
/// </summary>
/// <remarks>
/// Scripts about timers set one some tens of milliseconds ahead and then do what it is to interrupt. An emulated processor that gets little of
/// this machine's can take longer for that, and the timer has run out before: the answer is another, and a wait "for ever" is one. So a script
/// that does not answer as Xen did is asked again, and nothing is wrong if it does then. Where nothing is emulated, in the conformance tests,
/// each has to at once.
/// </remarks>
[TestFixture(true)]
[TestFixture(false)]
[Category("Nested")]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(1_800_000)]
public sealed class NestedConformanceTests(bool nestedPaging)
{
    /// <summary>How many scripts a command runs.</summary>
    private const int ScriptsAtOnce = 12;

    /// <summary>Memory of the two domains of a pair, and of the scripts' kernels.</summary>
    private const int DomainsMiB = 256;

    /// <summary>Two processors' worth of emulation lie between a script and this machine.</summary>
    private const int SecondsForScript = 120;

    /// <summary>How often a script is asked at most.</summary>
    private const int Attempts = 3;

    private const string EndWord = "end";

    private readonly Dictionary<string, string[]> _complaints = [];
    private string _ends = "";

    private static IEnumerable<string> Scripts => AbiScripts.Create().Select(static script => script.Name);

    [OneTimeSetUp]
    public async Task RunAllAsync()
    {
        string command = await NativeCommand.GetAsync();
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            _ = await cache.GetKernelAsync(DebianKernelFlavour.Amd64);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }

        string script = $$"""
            compare() {
                attempts=0
                while [ $# -gt 0 ] && [ $attempts -lt {{Attempts}} ]; do
                    attempts=$((attempts + 1))
                    xensharp compare --json --timeout {{SecondsForScript}} "$@" >/tmp/lines 2>/tmp/report
                    echo "{{EndWord}} $? $(base64 -w 0 /tmp/report)" >>/tmp/lines
                    cat /tmp/lines >&3
                    set -- $(grep -v -F '"complaints":[]' /tmp/lines | sed -n 's/.*"script":"\([^"]*\)".*/\1/p')
                done
            }
            {{string.Join('\n', Scripts.Chunk(ScriptsAtOnce).Select(static names => $"compare {string.Join(' ', names)}"))}}
            """;
        var machine = new NestedMachine(cache, command, nestedPaging, null);
        await foreach (string line in machine.RunAsync(script, [], DomainsMiB, TimeSpan.FromMinutes(28), TestContext.CurrentContext.CancellationToken))
        {
            if (line.Split(' ') is [EndWord, string status, string report])
            {
                _ends += $"status {status}: {NestedText.Decode(report)}\n";
                continue;
            }

            using JsonDocument result = JsonDocument.Parse(line);
            string name = result.RootElement.GetProperty("script").GetString()!;

            string[] complaints = [.. result.RootElement.GetProperty("complaints").EnumerateArray().Select(static complaint => complaint.GetString()!)];

            // The best of its attempts. What is the name of one script can also be what others are about, which are run then, too.
            if (!_complaints.TryGetValue(name, out string[]? before) || complaints.Length < before.Length)
                _complaints[name] = complaints;
            if (complaints.Length > 0)
                TestContext.Progress.WriteLine($"npt={(nestedPaging ? 1 : 0)}: {name} has another answer, {complaints[0]}");
        }

        TestContext.Progress.WriteLine($"npt={(nestedPaging ? 1 : 0)}: {_complaints.Count} scripts");
    }

    [TestCaseSource(nameof(Scripts))]
    public void XenSharp_answers_as_Xen_did(string name)
    {
        Assert.That(_complaints, Does.ContainKey(name), _ends);
        Assert.That(_complaints[name], Is.Empty, _ends);
    }
}
