// A guest's console as lines that a test waits for.

using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Boot.Tests;

/// <summary>Keeps what a guest prints.</summary>
internal sealed class ConsoleLines : IConsoleSink
{
    private readonly Lock _lock = new();
    private readonly StringBuilder _text = new();
    private TaskCompletionSource _more = new(TaskCreationOptions.RunContinuationsAsynchronously);

    /// <summary>All of it so far.</summary>
    internal string Text
    {
        get
        {
            lock (_lock)
                return _text.ToString();
        }
    }

    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        lock (_lock)
        {
            _ = _text.Append(Encoding.Latin1.GetString(bytes));
            _more.SetResult();
            _more = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        }

        return bytes.Length;
    }

    /// <summary>Waits for a line that begins with a marker.</summary>
    /// <param name="marker">The marker, which begins no other line.</param>
    /// <param name="stopped">The guest's end, after which nothing comes: the test fails with all that came.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <returns>The rest of the line.</returns>
    internal Task<string> WaitForAsync(string marker, Task stopped, CancellationToken cancellation) => WaitForAsync(marker, text =>
    {
        int start = text.StartsWith(marker, StringComparison.Ordinal) ? 0 : text.IndexOf("\n" + marker, StringComparison.Ordinal) + 1;
        int end = start == 0 && !text.StartsWith(marker, StringComparison.Ordinal) ? -1 : text.IndexOf("\r\n", start, StringComparison.Ordinal);
        return end >= 0 ? text[(start + marker.Length)..end].Trim() : null;
    }, stopped, cancellation);

    /// <summary>Waits for some text, wherever it stands.</summary>
    /// <param name="wanted">The text.</param>
    /// <param name="stopped">As in <see cref="WaitForAsync(string, Task, CancellationToken)"/>.</param>
    /// <param name="cancellation">Ends the wait.</param>
    internal Task WaitForTextAsync(string wanted, Task stopped, CancellationToken cancellation)
        => WaitForAsync(wanted, text => text.Contains(wanted, StringComparison.Ordinal) ? wanted : null, stopped, cancellation);

    private async Task<string> WaitForAsync(string wanted, Func<string, string?> find, Task stopped, CancellationToken cancellation)
    {
        while (true)
        {
            Task more;
            string text;
            bool over = stopped.IsCompleted;
            lock (_lock)
            {
                more = _more.Task;
                text = _text.ToString();
            }

            if (find(text) is { } found)
                return found;
            Assert.That(over, Is.False, $"The guest ended without \"{wanted}\"; it printed: {text}");
            _ = await Task.WhenAny(more, stopped).WaitAsync(cancellation);
        }
    }
}
