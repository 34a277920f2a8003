// How far the daemon has come with something long, on standard error: a bar where a person looks, nothing where nobody does.

using Spectre.Console;
using XenSharp.Api;

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
        private readonly Lock _lock = new();
        private string? _stage;
        private ProgressTask? _task;

        internal void Show(OperationUpdate update)
        {
            lock (_lock)
            {
                if (_task is null || (update.Stage is not null && update.Stage != _stage))
                {
                    Finish();
                    _stage = update.Stage;
                    _task = context.AddTask(Markup.Escape(update.Stage ?? "Working"), maxValue: 1);
                }

                _task.IsIndeterminate = update.Total <= 0 && !update.Finished;
                if (update.Total > 0)
                    _task.Value = Math.Clamp((double)update.Done / update.Total, 0, 1);
                if (update.Finished)
                    Finish();
            }
        }

        private void Finish()
        {
            if (_task is null)
                return;
            _task.IsIndeterminate = false;
            _task.Value = 1;
            _task.StopTask();
        }
    }
}
