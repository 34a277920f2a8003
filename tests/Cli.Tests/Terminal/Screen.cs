// What a pseudo-terminal has been sent, read as it comes, so that a test waits for a text and not for ever.

using System.Text;

namespace XenSharp.Cli.Tests.Terminal;

internal sealed class Screen
{
    private readonly StringBuilder _text = new();

    internal Screen(PseudoTerminal terminal)
    {
        var reader = new Thread(() =>
        {
            byte[] bytes;
            while ((bytes = terminal.ReadScreen()).Length > 0)
            {
                lock (_text)
                    _text.Append(Encoding.Latin1.GetString(bytes));
            }
        })
        {
            IsBackground = true,
        };
        reader.Start();
    }

    /// <summary>What has come and was not waited for.</summary>
    internal string Rest
    {
        get
        {
            lock (_text)
                return _text.ToString();
        }
    }

    /// <summary>Waits for a text, and takes all up to its end.</summary>
    /// <param name="text">The text.</param>
    /// <param name="patience">How long it may take to come; a minute where it is not said.</param>
    /// <returns>What came before it.</returns>
    internal string WaitFor(string text, TimeSpan? patience = null)
    {
        string? before = null;
        bool found = SpinWait.SpinUntil(
            () =>
            {
                lock (_text)
                {
                    string all = _text.ToString();
                    int at = all.IndexOf(text, StringComparison.Ordinal);
                    if (at < 0)
                        return false;
                    before = all[..at];
                    _text.Remove(0, at + text.Length);
                    return true;
                }
            },
            patience ?? TimeSpan.FromSeconds(60));
        if (!found)
            Assert.Fail($"\"{text}\" did not appear; there was: {_text}");
        return before!;
    }
}
