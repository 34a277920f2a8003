// Why the daemon did not do what it was asked, for the one who asked.

namespace XenSharp.Api;

/// <summary>The daemon could not be asked, or refused; the message is a sentence that says what to do.</summary>
public sealed class DaemonException : Exception
{
    /// <param name="problem">What the daemon answered.</param>
    public DaemonException(ApiProblem problem)
        : base(problem?.Detail)
    {
        ArgumentNullException.ThrowIfNull(problem);
        Problem = problem;
    }

    /// <param name="message">Why it could not be asked.</param>
    /// <param name="inner">What lies behind that.</param>
    public DaemonException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }

    /// <summary>What it answered; null where it could not be asked.</summary>
    public ApiProblem? Problem { get; }

    /// <summary>A constant of <see cref="ProblemKind"/>, or null where it could not be asked.</summary>
    public string? Kind => Problem?.Kind;
}
