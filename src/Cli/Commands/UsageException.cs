// What is wrong with what the user asked for, or with the host, as the sentence that the command prints before it gives up.

using XenSharp.Devices.Xenstore;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fetching;
using XenSharp.Kvm;
using XenSharp.Oracle;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Commands;

/// <summary>The command cannot do what was asked; the message is a sentence that says what to do.</summary>
internal sealed class UsageException(string message) : Exception(message);

/// <summary>Tells failures that are the user's to mend from defects.</summary>
internal static class FailureSentence
{
    /// <summary>The sentence for the user, or <see langword="null"/> if the exception is a defect of XenSharp's.</summary>
    internal static string? Of(Exception exception) => exception switch
    {
        UsageException or HostFileException or KernelImageException or DomainBuildException or GuestFetchException or IOException => Sentence(exception.Message),
        OracleException => exception.Message,
        KvmException or XenstoreException => Sentence(exception.Message),
        OutOfMemoryException => "There is not enough memory on this host for the domain; give it less with --memory, or end other programs.",

        // What fails in preparing a class is thrown wrapped.
        TypeInitializationException { InnerException: { } inner } => Of(inner),
        _ => null,
    };

    private static string Sentence(string text) => text.EndsWith('.') ? text : text + ".";
}
