// Names of Xen's error numbers, from the guest's side (public errno.h).
namespace XenSharp.Guests.Probe;

/// <summary>Names for transcripts. Not XenSharp.Core's list, for the same reason as <see cref="Assembly.GuestHypercall"/>.</summary>
internal static class ErrorNames
{
    private static readonly Dictionary<int, string> Names = new()
    {
        [1] = "EPERM", [2] = "ENOENT", [3] = "ESRCH", [4] = "EINTR", [5] = "EIO", [6] = "ENXIO", [7] = "E2BIG", [8] = "ENOEXEC",
        [9] = "EBADF", [10] = "ECHILD", [11] = "EAGAIN", [12] = "ENOMEM", [13] = "EACCES", [14] = "EFAULT", [16] = "EBUSY",
        [17] = "EEXIST", [18] = "EXDEV", [19] = "ENODEV", [20] = "ENOTDIR", [21] = "EISDIR", [22] = "EINVAL", [23] = "ENFILE",
        [24] = "EMFILE", [28] = "ENOSPC", [30] = "EROFS", [31] = "EMLINK", [33] = "EDOM", [34] = "ERANGE", [35] = "EDEADLK",
        [36] = "ENAMETOOLONG", [37] = "ENOLCK", [38] = "ENOSYS", [39] = "ENOTEMPTY", [61] = "ENODATA", [62] = "ETIME", [74] = "EBADMSG",
        [75] = "EOVERFLOW", [84] = "EILSEQ", [85] = "ERESTART", [88] = "ENOTSOCK", [90] = "EMSGSIZE", [95] = "EOPNOTSUPP",
        [98] = "EADDRINUSE", [99] = "EADDRNOTAVAIL", [105] = "ENOBUFS", [106] = "EISCONN", [107] = "ENOTCONN", [110] = "ETIMEDOUT",
        [111] = "ECONNREFUSED",
    };

    public static string Of(int error) => Names.TryGetValue(error, out string? name) ? $"-{name}" : $"-{error}";
}
