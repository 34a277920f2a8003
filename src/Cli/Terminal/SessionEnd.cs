// The ways in which a session at a domain's console ends.

using XenSharp.Devices.Console;

namespace XenSharp.Cli.Terminal;

/// <summary>Why an attached session ended.</summary>
public enum SessionEndReason
{
    /// <summary>The domain has ended, and all that it printed has been shown.</summary>
    DomainEnded,

    /// <summary>The user typed ^]. The domain goes on, and waits once its console ring is full and nobody reads it.</summary>
    Detached,

    /// <summary>The output takes no more: see <see cref="SessionEnd.Output"/>. As for <see cref="Detached"/>, the domain goes on.</summary>
    OutputClosed,
}

/// <summary>How an attached session ended.</summary>
/// <param name="Reason">Why.</param>
/// <param name="Output">For <see cref="SessionEndReason.OutputClosed"/>, the error. If its reader has gone away, a command
/// does as a Unix filter does: it ends quietly, with status 141 (128 + SIGPIPE).</param>
/// <param name="InputFailure">A sentence for the user if the input could not be read, whatever ended the session.</param>
public sealed record SessionEnd(SessionEndReason Reason, OutputClosed? Output = null, string? InputFailure = null);
