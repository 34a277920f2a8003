// The errors xenstore can answer with, by the names that travel in an XS_ERROR reply (xsd_errors of io/xs_wire.h).
namespace XenSharp.Devices.Xenstore;

/// <summary>An error of the store. The names are what an XS_ERROR reply carries, so they are kept in errno's spelling.</summary>
public enum XenstoreError
{
    None = 0,

    /// <summary>The request's payload is malformed, or a path has a form that is never allowed.</summary>
    EINVAL,

    /// <summary>The caller has no permission, or is not privileged enough for the request.</summary>
    EACCES,

    /// <summary>The same watch (path and token) exists already.</summary>
    EEXIST,
    EISDIR,

    /// <summary>No such node, watch, transaction or domain.</summary>
    ENOENT,

    /// <summary>The transaction failed earlier, or a domain it concerns is gone.</summary>
    ENOMEM,

    /// <summary>A quota on nodes, their size, permissions or transactions is exhausted.</summary>
    ENOSPC,

    /// <summary>The domain's memory quota is exhausted, or the store found itself inconsistent.</summary>
    EIO,
    ENOTEMPTY,

    /// <summary>Unknown request type.</summary>
    ENOSYS,
    EROFS,

    /// <summary>A transaction was to be started inside another.</summary>
    EBUSY,

    /// <summary>The transaction met a conflicting change: start it again.</summary>
    EAGAIN,
    EISCONN,

    /// <summary>The answer does not fit into one message, or there are too many watches.</summary>
    E2BIG,

    /// <summary>The owner of a node was to be changed by someone unprivileged.</summary>
    EPERM,
}

/// <summary>Wire names of <see cref="XenstoreError"/>.</summary>
internal static class XenstoreErrors
{
    /// <summary>The payload of an XS_ERROR reply: the name and its closing NUL.</summary>
    public static ReadOnlySpan<byte> WireName(XenstoreError error) => error switch
    {
        XenstoreError.EINVAL => "EINVAL\0"u8,
        XenstoreError.EACCES => "EACCES\0"u8,
        XenstoreError.EEXIST => "EEXIST\0"u8,
        XenstoreError.EISDIR => "EISDIR\0"u8,
        XenstoreError.ENOENT => "ENOENT\0"u8,
        XenstoreError.ENOMEM => "ENOMEM\0"u8,
        XenstoreError.ENOSPC => "ENOSPC\0"u8,
        XenstoreError.EIO => "EIO\0"u8,
        XenstoreError.ENOTEMPTY => "ENOTEMPTY\0"u8,
        XenstoreError.ENOSYS => "ENOSYS\0"u8,
        XenstoreError.EROFS => "EROFS\0"u8,
        XenstoreError.EBUSY => "EBUSY\0"u8,
        XenstoreError.EAGAIN => "EAGAIN\0"u8,
        XenstoreError.EISCONN => "EISCONN\0"u8,
        XenstoreError.E2BIG => "E2BIG\0"u8,
        XenstoreError.EPERM => "EPERM\0"u8,
        _ => "EINVAL\0"u8,
    };

    /// <summary>The error of a name on the wire; <see cref="XenstoreError.EINVAL"/> for one that io/xs_wire.h does not have.</summary>
    public static XenstoreError OfName(ReadOnlySpan<char> name) =>
        name.StartsWith('E') && Enum.TryParse(name, out XenstoreError error) ? error : XenstoreError.EINVAL;

    /// <summary>The sentence for people who called the in-process interface.</summary>
    public static string Explain(XenstoreError error) => error switch
    {
        XenstoreError.EINVAL => "the path or an argument is malformed; paths are made of letters, digits and -/_@, start with / " +
            "or are relative to the domain's folder, and have no double or trailing slash",
        XenstoreError.EACCES => "the caller may not do this; give it permission on the node",
        XenstoreError.EEXIST => "the same watch exists already; use another token or remove the first",
        XenstoreError.ENOENT => "there is no such node, watch, transaction or domain",
        XenstoreError.ENOMEM => "the transaction failed earlier or concerns a domain that is gone; start it again",
        XenstoreError.ENOSPC => "a quota is exhausted; remove nodes or transactions, or raise the quota",
        XenstoreError.EIO => "the memory quota of the domain is exhausted; remove nodes or raise the quota",
        XenstoreError.EBUSY => "a transaction cannot be started inside another",
        XenstoreError.EAGAIN => "something the transaction looked at was changed meanwhile; run it again",
        XenstoreError.E2BIG => "the answer does not fit into one message of 4096 bytes, or there are too many watches",
        XenstoreError.EPERM => "only a privileged caller may change the owner of a node",
        _ => "the store refused the request",
    };
}

/// <summary>Thrown by the in-process interface of the store when a request fails; never on a guest's behalf.</summary>
public sealed class XenstoreException : Exception
{
    public XenstoreException(XenstoreError error, string request)
        : base($"xenstore {request} failed with {error}: {XenstoreErrors.Explain(error)}.")
    {
        Error = error;
    }

    /// <summary>Which error a guest would have been told in the same situation.</summary>
    public XenstoreError Error { get; }
}
