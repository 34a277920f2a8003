// A file that appears when it is whole, and not at all otherwise.

using XenSharp.Api;

namespace XenSharp.Toolstack.Management;

/// <summary>Writes beside the file that is wanted, and takes its place at the end.</summary>
internal sealed class UnfinishedFile : IAsyncDisposable
{
    private readonly string _path;
    private readonly string _unfinished;
    private bool _finished;

    /// <param name="path">Absolute path of the file that is wanted.</param>
    /// <exception cref="ToolstackException">It cannot be written there.</exception>
    internal UnfinishedFile(string path)
    {
        if (!Path.IsPathRooted(path))
            throw new ToolstackException(ProblemKind.BadRequest, $"\"{path}\" is a relative path; the daemon needs the whole one.");
        if (Directory.Exists(path))
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} is a folder; give the name of a file.");
        _path = path;
        _unfinished = $"{path}.{Guid.NewGuid():N}.part";
        try
        {
            Stream = new FileStream(
                _unfinished,
                new FileStreamOptions
                {
                    Mode = FileMode.CreateNew, Access = FileAccess.Write, BufferSize = 1 << 16, UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite,
                });
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} cannot be written: {failure.Message.Split(" : '")[0].TrimEnd('.')}.", failure);
        }
    }

    /// <summary>What is written.</summary>
    internal FileStream Stream { get; }

    /// <summary>All is written: it is to be there.</summary>
    internal void Finish()
    {
        try
        {
            Stream.Flush(flushToDisk: true);
            Stream.Dispose();
            File.Move(_unfinished, _path, overwrite: true);
            _finished = true;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(ProblemKind.HostCannot, $"{_path} cannot be written: {failure.Message.TrimEnd('.')}.", failure);
        }
    }

    public async ValueTask DisposeAsync()
    {
        if (_finished)
            return;
        try
        {
            await Stream.DisposeAsync().ConfigureAwait(false);
        }
        catch (IOException)
        {
            // What could not be written before cannot be now; it is not wanted any more.
        }

        File.Delete(_unfinished);
    }
}
