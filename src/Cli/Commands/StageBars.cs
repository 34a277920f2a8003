// Long work on a terminal: a bar for each of its stages, one after the other.

using Spectre.Console;

namespace XenSharp.Cli.Commands;

/// <summary>Shows how far work has come that goes by stages. Any thread may tell.</summary>
/// <param name="context">Where bars are shown.</param>
internal sealed class StageBars(ProgressContext context)
{
    private readonly Lock _lock = new();
    private string? _stage;
    private ProgressTask? _task;

    /// <summary>Says what is done now, and how much of it is done.</summary>
    /// <param name="stage">What is done; another than before ends the bar of that.</param>
    /// <param name="fraction">How much, 0 to 1; <see langword="null"/> where that is not known.</param>
    internal void Show(string stage, double? fraction)
    {
        lock (_lock)
        {
            if (stage != _stage)
            {
                FinishStage();
                _stage = stage;
                _task = context.AddTask(Markup.Escape(stage), maxValue: 1);
            }

            _task!.IsIndeterminate = fraction is null;
            if (fraction is { } known)
                _task.Value = Math.Clamp(known, 0, 1);
        }
    }

    /// <summary>All is done.</summary>
    internal void Finish()
    {
        lock (_lock)
            FinishStage();
    }

    private void FinishStage()
    {
        if (_task is null)
            return;
        _task.IsIndeterminate = false;
        _task.Value = 1;
        _task.StopTask();
    }
}
