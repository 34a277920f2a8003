// A domain run in the foreground: attached to the user's terminal, ended with the command.

using Tmds.Linux;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Terminal;
using XenSharp.Core.Trace;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Hosting;

/// <summary>What becomes of a guest that asks for a reboot.</summary>
internal enum RebootAction
{
    /// <summary>The command ends and says so by its status.</summary>
    Exit,

    /// <summary>A fresh domain takes its place.</summary>
    Restart,
}

/// <summary>Runs domains for the commands that have a terminal.</summary>
/// <param name="host">The KVM to run them with.</param>
internal sealed class ForegroundRun(KvmHost host)
{
    private const int StandardError = 2;

    private sealed record Outcome(SessionEnd Session, DomainExit? Exit);

    /// <summary>Boots a domain and stays with it to its end, or the user's, and says on standard error how that was.</summary>
    /// <param name="specification">The domain.</param>
    /// <param name="description">What is booted, for the line that is printed before: "the kernel vmlinuz".</param>
    /// <param name="onReboot">What to do when the guest asks for a reboot.</param>
    /// <param name="consoleLog">A file that gets a copy of the output, or <see langword="null"/>.</param>
    /// <param name="trace">A file that gets the ABI trace, or <see langword="null"/>.</param>
    /// <param name="signals">What may ask the command to end.</param>
    /// <returns>The command's exit status.</returns>
    internal async Task<int> RunAsync(
        DomainSpecification specification, string description, RebootAction onReboot, string? consoleLog, string? trace, EndingSignals signals)
    {
        // Before anything is said of booting: whether there is a KVM at all.
        _ = host.Capabilities;
        using FileDescriptorSink? log = consoleLog is null ? null : OpenLog(consoleLog);
        using TraceRecorder? recorder = trace is null ? null : TraceOutput.Open(trace, specification.Name, host);
        specification = specification with { Trace = recorder };
        bool typed = LibC.isatty(0) == 1;
        Say($"Booting {description} with {specification.MemoryMiB} MiB of memory." + (typed ? $" {TerminalSession.DetachKeyName} ends the domain and leaves." : ""));
        try
        {
            Outcome outcome = await AttachAsync(specification, onReboot, log, signals.Token).ConfigureAwait(false);
            int status = Conclude(outcome, specification);
            return recorder is null || IsWhole(recorder, trace!) || status != ExitStatus.Success ? status : ExitStatus.Error;
        }
        catch (OperationCanceledException) when (signals.Received != 0)
        {
            Say($"The domain {specification.Name} was destroyed: signal {signals.Received} asked {Tool.Name} to end.");
            _ = recorder is null || IsWhole(recorder, trace!);
            return ExitStatus.OfSignal + signals.Received;
        }
    }

    /// <summary>Ends a trace whose domain is gone, and says so if it is not all there.</summary>
    private static bool IsWhole(TraceRecorder recorder, string path)
    {
        recorder.Dispose();
        if (recorder.Failure is not { } failure)
            return true;
        Say($"The trace {path} ends early, since it could not be written ({TraceOutput.Reason(failure)}). Write it where there is room for it.");
        return false;
    }

    private async Task<Outcome> AttachAsync(
        DomainSpecification specification, RebootAction onReboot, FileDescriptorSink? log, CancellationToken cancellation)
    {
        using FileDescriptorSink? error = TryOpenStandardError();
        RunningDomain Create()
        {
            RunningDomain domain = RunningDomain.Create(host, specification, emergencySink: EmergencySink(error));

            // Nobody sets this domain's target from outside, so that the guest may choose it.
            domain.Domain.MaxPages = DomainOptions.MaxPages(specification.MaxMemoryMiB);
            return domain;
        }

        await using var first = new Disposer(Create());
        using var terminal = new TerminalAttachment();
        while (true)
        {
            RunningDomain domain = first.Domain;
            domain.Start();
            ProgramPages.GiveBack();
            SessionEnd end = await terminal.ServeAsync(domain.Console, domain.Stopped, log, cancellation).ConfigureAwait(false);
            if (end.Reason != SessionEndReason.DomainEnded)
                return new Outcome(end, null);
            DomainExit exit = await domain.Stopped.ConfigureAwait(false);
            if (exit.Reason != ShutdownReason.Reboot || onReboot != RebootAction.Restart)
                return new Outcome(end, exit);
            cancellation.ThrowIfCancellationRequested();
            await first.ReplaceAsync(Create).ConfigureAwait(false);
        }
    }

    /// <summary>Says what there is to say, with the terminal back in its own mode, and finds the status.</summary>
    private static int Conclude(Outcome outcome, DomainSpecification specification)
    {
        string name = specification.Name;
        if (outcome.Session.InputFailure is { } failure)
            Say(failure);
        switch (outcome.Session.Reason)
        {
            case SessionEndReason.Detached:
                Say($"The domain {name} was destroyed.");
                return ExitStatus.Success;
            case SessionEndReason.OutputClosed when outcome.Session.Output!.ReaderGone:
                return ExitStatus.OutputReaderGone;
            case SessionEndReason.OutputClosed:
                Say($"The domain {name} was destroyed: the console's output cannot be written ({outcome.Session.Output!.Message}). "
                    + "Send standard output where there is room for it.");
                return ExitStatus.Error;
        }

        DomainExit exit = outcome.Exit!;
        switch (exit.Reason)
        {
            case ShutdownReason.PowerOff:
                return ExitStatus.Success;
            case ShutdownReason.Reboot:
                Say($"The domain {name} asked for a reboot; with --on-reboot restart {Tool.Name} run does it.");
                return ExitStatus.GuestReboot;
            case ShutdownReason.Crash:
                Console.Error.WriteLine();
                Console.Error.Write(exit.Report ?? $"The domain {name} crashed.{Environment.NewLine}");
                return ExitStatus.GuestCrash;
            case ShutdownReason.Watchdog:
                Say($"The domain {name} was stopped by its own watchdog: the guest did not rearm it in time, so it hung or was starved of CPU time.");
                return ExitStatus.GuestWatchdog;
            case ShutdownReason.Suspend:
                Say($"The domain {name} suspended itself, which {Tool.Name} cannot save and resume; it is gone.");
                return ExitStatus.GuestSuspend;
            case ShutdownReason.SoftReset:
                Say($"The domain {name} asked for a soft reset (kexec), which {Tool.Name} does not offer; it is gone.");
                return ExitStatus.GuestSoftReset;
            default:
                Say($"The domain {name} stopped with reason {(uint)exit.Reason}, which Xen's interface does not define.");
                return ExitStatus.GuestCrash;
        }
    }

    private static FileDescriptorSink OpenLog(string path)
    {
        if (path.Length == 0)
            throw new UsageException("--console-log was given an empty name; give it the name of a file.");
        return FileDescriptorSink.OpenLog(path);
    }

    /// <summary>Standard error may be closed: then what the guest prints in an emergency is dropped.</summary>
    private static FileDescriptorSink? TryOpenStandardError()
    {
        try
        {
            return new FileDescriptorSink(StandardError);
        }
        catch (IOException)
        {
            return null;
        }
    }

    private static IConsoleSink? EmergencySink(FileDescriptorSink? error)
        => error is not null && LibC.isatty(StandardError) == 1 && LibC.isatty(0) == 1 ? new CarriageReturnSink(error) : error;

    private static void Say(string sentence) => Console.Error.WriteLine($"{Tool.Name}: {sentence}");

    /// <summary>Holds the domain of the moment, whichever it is when the run is over.</summary>
    private sealed class Disposer(RunningDomain domain) : IAsyncDisposable
    {
        internal RunningDomain Domain { get; private set; } = domain;

        /// <summary>The old one is gone before the new one is made: the host may have memory for one.</summary>
        internal async Task ReplaceAsync(Func<RunningDomain> create)
        {
            await Domain.DisposeAsync().ConfigureAwait(false);
            Domain = create();
        }

        public ValueTask DisposeAsync() => Domain.DisposeAsync();
    }
}
