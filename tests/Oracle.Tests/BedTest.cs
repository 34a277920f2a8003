// What the tests of beds share: guests, hosts with and without QEMU, and what a run must not leave behind.
using System.Runtime.Versioning;
using System.Text;
using System.Text.RegularExpressions;
using XenSharp.Guests;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Fetching;
using XenSharp.Oracle.Beds;
using static Iced.Intel.AssemblerRegisters;

// Everything tested here is for Linux hosts.
[assembly: SupportedOSPlatform("linux")]

namespace XenSharp.Oracle.Tests;

static class BedTest
{
    public static GuestCache Cache => new(GuestCache.DefaultRoot());

    /// <summary>A host on which no program is found.</summary>
    public static CommandRunner EmptyHost => new("/nonexistent");

    public static BedGuest Tiny(string name, TinyGuestBehaviour behaviour = TinyGuestBehaviour.PowerOff) =>
        new(name, TinyGuest.Build(new TinyGuestOptions { Message = $"I am {name}\n", Behaviour = behaviour }));

    /// <summary>Prints a line and shuts down with a reason of SCHEDOP_shutdown.</summary>
    public static BedGuest ShutDown(string name, uint reason)
    {
        PvAssembler guest = new();
        PvConsole console = new(guest);
        console.EmitInitialise();
        byte[] line = Encoding.ASCII.GetBytes($"reason {reason}\n");
        console.EmitWrite(guest.Define(line), line.Length);
        guest.Shutdown((GuestShutdownReason)reason);
        console.EmitRoutines();
        return new BedGuest(name, guest.Build(new GuestIdentity("xensharp-test")));
    }

    /// <summary>Prints the command line that it was given, which is <paramref name="commandLine"/>, and powers off.</summary>
    public static BedGuest Repeat(string name, string commandLine)
    {
        PvAssembler guest = new();
        PvConsole console = new(guest);
        console.EmitInitialise();
        guest.Code.mov(rdi, __qword_ptr[console.StartInfoVariable]);
        guest.Code.add(rdi, StartInfoOffset.CmdLine);
        guest.Code.mov(esi, commandLine.Length);
        console.EmitWriteCall();
        guest.Shutdown(GuestShutdownReason.PowerOff);
        console.EmitRoutines();
        return new BedGuest(name, guest.Build(new GuestIdentity("xensharp-test"))) { CommandLine = commandLine };
    }

    /// <summary>What <see cref="TinyGuestBehaviour.ConsoleFlood"/> prints after its message.</summary>
    public static string Flood(long bytes)
    {
        StringBuilder flood = new();
        for (long i = 0; i < bytes; i++)
            flood.Append((char)TinyGuest.FloodByte(i));
        return flood.ToString();
    }

    public static async Task<List<GuestRun>> RunAsync(IGuestBed bed, params IReadOnlyList<BedGuest> guests)
    {
        using CancellationTokenSource limit = new(TimeSpan.FromMinutes(10));
        List<GuestRun> runs = [];
        await foreach (GuestRun run in bed.RunAsync(guests, limit.Token))
            runs.Add(run);
        return runs;
    }
}

/// <summary>A host whose QEMU is the real one, or the cache's, behind a script that notes its process and its arguments.</summary>
sealed class WatchedQemu : IDisposable
{
    readonly string folder = Directory.CreateTempSubdirectory("xensharp-oracle-test-").FullName;

    /// <param name="then">Shell commands that take QEMU's place; null for QEMU.</param>
    public static async Task<WatchedQemu> MakeAsync(string? then = null)
    {
        Qemu.QemuProgram real = await Qemu.QemuProgram.GetAsync(BedTest.Cache);
        WatchedQemu watched = new();
        string variables = string.Concat(real.Environment.Select(variable => $"export {variable.Key}='{variable.Value}'\n"));
        string command = string.Join(' ', new[] { real.Path }.Concat(real.Arguments).Select(argument => $"'{argument}'"));
        string script = Path.Combine(watched.folder, "qemu-system-x86_64");
        await File.WriteAllTextAsync(script, $"#!/bin/sh\necho $$ >>'{watched.folder}/pids'\necho \"$*\" >>'{watched.folder}/arguments'\n{variables}{then ?? $"exec {command} \"$@\""}\n");
        File.SetUnixFileMode(script, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return watched;
    }

    public CommandRunner Host => new(folder);

    /// <summary>The processes that were started.</summary>
    public int[] Processes => [.. File.ReadAllLines(Path.Combine(folder, "pids")).Select(int.Parse)];

    /// <summary>Whether one was started.</summary>
    public bool HasStarted => new FileInfo(Path.Combine(folder, "arguments")) is { Exists: true, Length: > 0 };

    static bool IsAlive(int process) => Directory.Exists($"/proc/{process}");

    /// <summary>Asserts that no process that was started and no temporary file that it was given is there any more.</summary>
    public void AssertNothingLeft()
    {
        string arguments = File.ReadAllText(Path.Combine(folder, "arguments"));
        string[] folders = [.. Regex.Matches(arguments, @"/[^\s,]*xensharp-bed-\w+").Select(match => match.Value).Distinct()];
        Assert.Multiple(() =>
        {
            Assert.That(Processes.Where(IsAlive), Is.Empty);
            Assert.That(folders, Is.Not.Empty);
            Assert.That(folders.Where(Directory.Exists), Is.Empty);
        });
    }

    public void Dispose() => Directory.Delete(folder, recursive: true);
}
