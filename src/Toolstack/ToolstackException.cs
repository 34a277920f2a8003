// Why the toolstack does not do what it was asked.

using XenSharp.Api;

namespace XenSharp.Toolstack;

/// <summary>Something cannot be done with a domain; the message is a sentence that says why, and what to do.</summary>
/// <param name="kind">A constant of <see cref="ProblemKind"/>.</param>
/// <param name="message">The sentence.</param>
/// <param name="inner">What lies behind it.</param>
public sealed class ToolstackException(string kind, string message, Exception? inner = null) : Exception(message, inner)
{
    /// <summary>A constant of <see cref="ProblemKind"/>.</summary>
    public string Kind { get; } = kind;
}
