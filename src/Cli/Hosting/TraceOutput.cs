// The file that run --trace writes.

using XenSharp.Cli.Commands;
using XenSharp.Core.Trace;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Hosting;

/// <summary>Opens traces, with a sentence for everything that can be wrong with their file.</summary>
internal static class TraceOutput
{
    /// <summary>The system's words without the file's name, which .NET puts behind them and the sentence has already.</summary>
    internal static string Reason(string message) => message.Split(" : '")[0].TrimEnd('.');

    /// <summary>Begins a trace of a domain; a trace of that name is written over, and no other file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="guest">The domain's name.</param>
    /// <param name="host">The KVM that it will run with.</param>
    /// <exception cref="UsageException">The file cannot be written.</exception>
    internal static TraceRecorder Open(string path, string guest, KvmHost host)
    {
        if (path.Length == 0)
            throw new UsageException("--trace was given an empty name; give it the name of a file.");
        if (Directory.Exists(path))
            throw new UsageException($"{path} is a folder; give --trace the name of a file.");
        var header = new TraceHeader(
            host.Capabilities.TimeStampCounter.KiloHertz, HostClock.TimeStampCounter, DateTimeOffset.UtcNow, guest, HostReport.AbiVersion, Tool.Version);
        try
        {
            RefuseOtherFile(path);
            return new TraceRecorder(new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.Read | FileShare.Delete, bufferSize: 0), header);
        }
        catch (DirectoryNotFoundException)
        {
            throw new UsageException($"The trace {path} cannot be written: its folder does not exist; make it, or name another.");
        }
        catch (UnauthorizedAccessException)
        {
            throw new UsageException($"There is no permission to write the trace {path}; name another file, or run as a user who may write it.");
        }
        catch (IOException failure)
        {
            throw new UsageException($"The trace {path} cannot be written: {Reason(failure.Message)}. Name another file with --trace.");
        }
    }

    /// <summary>A slip of the hand must not cost a kernel or a disk image.</summary>
    private static void RefuseOtherFile(string path)
    {
        // Pipes and devices have no length.
        var file = new FileInfo(path);
        if (!file.Exists || file.Length == 0)
            return;
        using var content = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
        Span<byte> magic = stackalloc byte[TraceFormat.Magic.Length];
        if (content.ReadAtLeast(magic, magic.Length, throwOnEndOfStream: false) < magic.Length || !magic.SequenceEqual(TraceFormat.Magic))
            throw new UsageException($"{path} exists and is no trace, so it is not written over; remove it, or name another file with --trace.");
    }
}
