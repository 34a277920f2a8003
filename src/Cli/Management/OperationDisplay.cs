// How far the daemon has come with something long, on standard error: a bar where a person looks, nothing where nobody does.

using Spectre.Console;
using XenSharp.Api;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Shows the progress of save, restore and dump-core.</summary>
internal static class OperationDisplay
{
    /// <summary>Runs an operation under a display.</summary>
    internal static async Task<T> RunAsync<T>(Func<Action<OperationUpdate>?, Task<T>> operation)
    {
        if (Console.IsErrorRedirected)
            return await operation(null).ConfigureAwait(false);

        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        return await console.Progress()
            .AutoClear(true)
            .Columns(
                new TaskDescriptionColumn { Alignment = Justify.Left }, new ProgressBarColumn(), new PercentageColumn(), new RemainingTimeColumn(), new SpinnerColumn())
            .StartAsync(async context => await operation(new Bars(context).Show).ConfigureAwait(false))
            .ConfigureAwait(false);
    }

    private sealed class Bars(ProgressContext context)
    {
        private readonly StageBars _bars = new(context);
        private string _stage = "Working";

        internal void Show(OperationUpdate update)
        {
            _stage = update.Stage ?? _stage;
            if (update.Finished)
                _bars.Finish();
            else
                _bars.Show(_stage, update.Total > 0 ? (double)update.Done / update.Total : null);
        }
    }
}
