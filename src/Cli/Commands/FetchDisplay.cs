// How far a download has come, on standard error: bars where a person looks, a line per stage where a log is kept.

using Spectre.Console;
using XenSharp.Guests.Fetching;

namespace XenSharp.Cli.Commands;

/// <summary>Shows the progress of a fetch.</summary>
internal static class FetchDisplay
{
    /// <summary>Runs a fetch under a display. A fetch that reports nothing, because all is in the cache, shows nothing.</summary>
    internal static async Task<T> RunAsync<T>(Func<IProgress<FetchProgress>, Task<T>> fetch)
    {
        if (Console.IsErrorRedirected)
            return await fetch(new PlainDisplay()).ConfigureAwait(false);

        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        return await console.Progress()
            .AutoClear(true)
            .Columns(new TaskDescriptionColumn { Alignment = Justify.Left }, new ProgressBarColumn(), new PercentageColumn(), new SpinnerColumn())
            .StartAsync(async context => await fetch(new BarDisplay(context)).ConfigureAwait(false))
            .ConfigureAwait(false);
    }

    private sealed class PlainDisplay : IProgress<FetchProgress>
    {
        private readonly Lock _lock = new();
        private string? _stage;

        public void Report(FetchProgress value)
        {
            lock (_lock)
            {
                if (value.Stage == _stage)
                    return;
                _stage = value.Stage;
                Console.Error.WriteLine($"{Tool.Name}: {value.Stage}.");
            }
        }
    }

    private sealed class BarDisplay(ProgressContext context) : IProgress<FetchProgress>
    {
        private readonly StageBars _bars = new(context);

        public void Report(FetchProgress value) => _bars.Show(value.Stage, value.Fraction);
    }
}
