namespace XenSharp.Domains.Migration;

/// <summary>A domain that cannot be saved, dumped or restored; the message is a sentence that says why, and what to do where there is something.</summary>
public sealed class MigrationException : Exception
{
    public MigrationException(string message)
        : base(message)
    {
    }

    public MigrationException(string message, Exception inner)
        : base(message, inner)
    {
    }
}
