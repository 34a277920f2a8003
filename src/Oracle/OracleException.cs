// What keeps a comparison from being made, as a sentence for people.
namespace XenSharp.Oracle;

/// <summary>The comparison cannot be made; the message is a sentence that says what is wrong and what to do.</summary>
public sealed class OracleException(string message, Exception? inner = null) : Exception(message, inner);
