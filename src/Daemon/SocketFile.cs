// The socket's file: who may use it, and what is done about one that is there already.

using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using XenSharp.Api;
using XenSharp.Devices;
using XenSharp.Toolstack;

namespace XenSharp.Daemon;

/// <summary>Makes the Unix socket that the daemon listens on.</summary>
internal static partial class SocketFile
{
    /// <summary>Sees to it that a socket can be made: its folder is there, and a socket that a dead daemon left is not.</summary>
    /// <exception cref="ToolstackException">It cannot be; a sentence says why.</exception>
    internal static void Prepare(string path)
    {
        if (Encoding.UTF8.GetByteCount(path) > LocalSocket.LongestPath)
            throw Problem($"{path} cannot be a socket's name: it has more than {LocalSocket.LongestPath} bytes. Name another with --socket.");
        try
        {
            if (Path.GetDirectoryName(path) is { Length: > 0 } folder)
                _ = Directory.CreateDirectory(folder);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw Problem($"The socket {path} cannot be made ({failure.Message.TrimEnd('.')}): name another with --socket.", failure);
        }

        switch (LocalSocket.Look(path, out SocketException? refusal))
        {
            case LocalSocketState.Abandoned:
                File.Delete(path);
                break;
            case LocalSocketState.Served:
                throw Problem($"Another daemon answers at {path} already: end it first, or give this one another socket with --socket.");
            case LocalSocketState.Other:
                throw Problem($"{path} is there already, and no socket that a daemon left ({refusal!.Message}): remove it, or name another with --socket.", refusal);
        }
    }

    /// <summary>Sets who may connect. Nobody can before the socket listens, so this is done between.</summary>
    /// <exception cref="ToolstackException">That is not permitted, or there is no such group.</exception>
    internal static void SetAccess(string path, UnixFileMode mode, string? group)
    {
        try
        {
            if (group is not null)
                ChangeGroup(path, GroupNumber(group));
            File.SetUnixFileMode(path, mode);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw Problem($"The mode of the socket {path} cannot be set: {failure.Message}", failure);
        }
    }

    private static unsafe void ChangeGroup(string path, uint group)
    {
        fixed (byte* name = Encoding.UTF8.GetBytes(path + "\0"))
        {
            if (chown(name, uint.MaxValue, group) != 0)
                throw new IOException($"{path}: {Marshal.GetLastPInvokeErrorMessage()}");
        }
    }

    /// <summary>As /etc/group has it; groups of a directory service can be named by their numbers.</summary>
    private static uint GroupNumber(string group)
    {
        if (uint.TryParse(group, out uint number))
            return number;
        foreach (string line in File.ReadLines("/etc/group"))
        {
            string[] fields = line.Split(':');
            if (fields.Length >= 3 && fields[0] == group && uint.TryParse(fields[2], out number))
                return number;
        }

        throw Problem($"There is no group {group}; name another, or give its number.");
    }

    private static ToolstackException Problem(string message, Exception? inner = null) => new(ProblemKind.HostCannot, message, inner);

    [LibraryImport("libc", SetLastError = true)]
    private static unsafe partial int chown(byte* path, uint owner, uint group);
}
