namespace XenSharp.Domains.Builder;

/// <summary>A domain that cannot be built as asked; the message is a sentence that says what to change.</summary>
public sealed class DomainBuildException(string message) : Exception(message);
