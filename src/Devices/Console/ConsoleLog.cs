// The log file of a console: appended to, begun anew when it is long, and never a reason for the guest to stop.

using System.Globalization;
using System.Text;

namespace XenSharp.Devices.Console;

/// <summary>
/// Appends console output to a file. What cannot be written is lost to the log, counted, and told in the file as soon as it
/// can be written again. Members may be called by any thread.
/// </summary>
public sealed class ConsoleLog : IDisposable
{
    private readonly ConsoleLogOptions _options;
    private readonly TimeProvider _time;
    private readonly Lock _lock = new();
    private FileDescriptorSink? _file;
    private long _size;
    private long _failedAt;
    private long _lost;
    private string? _failure;
    private bool _disposed;

    /// <summary>How many bytes of its argument the last <see cref="Append"/> has written.</summary>
    private int _appended;

    /// <summary>Opens the file.</summary>
    /// <param name="options">Which, and how long it gets.</param>
    /// <param name="time">The clock by which a failed file is tried again; <see langword="null"/> for the system's.</param>
    /// <exception cref="ArgumentException">A setting makes no sense.</exception>
    /// <exception cref="IOException">The file cannot be opened; a sentence names it and the reason.</exception>
    public ConsoleLog(ConsoleLogOptions options, TimeProvider? time = null)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentException.ThrowIfNullOrEmpty(options.Path);
        ArgumentOutOfRangeException.ThrowIfNegative(options.MaximumBytes);
        ArgumentOutOfRangeException.ThrowIfNegative(options.Generations);
        _options = options;
        _time = time ?? TimeProvider.System;
        Open();
    }

    /// <summary>Why nothing can be written at the moment; <see langword="null"/> while all is well.</summary>
    public string? Failure
    {
        get
        {
            lock (_lock)
                return _failure;
        }
    }

    /// <summary>Bytes of output that could not be written since the last that were.</summary>
    public long Lost
    {
        get
        {
            lock (_lock)
                return _lost;
        }
    }

    /// <summary>Appends bytes. Blocks as long as the file system does; an error of it is kept in <see cref="Failure"/>.</summary>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            if (_file is null && !TryReopen())
            {
                _lost += bytes.Length;
                return;
            }
            if (_lost > 0)
            {
                string note = string.Create(CultureInfo.InvariantCulture,
                    $"\n[xensharp: {_lost} bytes of console output are missing here: {_failure}]\n");
                if (!Append(Encoding.UTF8.GetBytes(note)))
                {
                    _lost += bytes.Length;
                    return;
                }
                _lost = 0;
            }
            _failure = null;
            RotateIfLong(bytes.Length);
            if (_file is null)
                _lost += bytes.Length;
            else if (!Append(bytes))
                _lost += bytes.Length - _appended;
        }
    }

    /// <summary>
    /// Closes the file and opens the one that has its name now, for those who have moved it away (logrotate).
    /// </summary>
    /// <returns>Whether that could be done; if not, <see cref="Failure"/> says why, and it is tried again later.</returns>
    public bool Reopen()
    {
        lock (_lock)
        {
            if (_disposed)
                return false;
            Close();
            return TryOpen();
        }
    }

    /// <summary>Closes the file; what is written from then on is dropped.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            _disposed = true;
            Close();
        }
    }

    private bool Append(ReadOnlySpan<byte> bytes)
    {
        _appended = 0;
        while (_appended < bytes.Length)
        {
            int count = _file!.Write(bytes[_appended..], CancellationToken.None);
            if (count == 0)
            {
                OutputClosed closed = _file.Closed.Result;
                Fail($"{_options.Path} cannot be written: {closed.Message}.");
                return false;
            }
            _appended += count;
            _size += count;
        }
        return true;
    }

    private void RotateIfLong(int coming)
    {
        if (_options.MaximumBytes == 0 || _size == 0 || _size + coming <= _options.MaximumBytes)
            return;

        // Others may have cut it short meanwhile.
        _size = SizeOf(_options.Path);
        if (_size == 0 || _size + coming <= _options.MaximumBytes)
            return;
        Close();
        try
        {
            for (int generation = _options.Generations; generation > 0; generation--)
            {
                string from = generation == 1 ? _options.Path : Generation(generation - 1);
                if (File.Exists(from))
                    File.Move(from, Generation(generation), overwrite: true);
            }
            if (_options.Generations == 0)
                File.Delete(_options.Path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // Rather a log that is too long than none.
        }
        _ = TryOpen();
    }

    private string Generation(int number) => string.Create(CultureInfo.InvariantCulture, $"{_options.Path}.{number}");

    private bool TryReopen() =>
        _time.GetElapsedTime(_failedAt) >= _options.RetryInterval && TryOpen();

    private bool TryOpen()
    {
        try
        {
            Open();
            return true;
        }
        catch (IOException failure)
        {
            Fail(failure.Message);
            return false;
        }
    }

    private void Open()
    {
        _file = FileDescriptorSink.OpenLog(_options.Path);
        _size = SizeOf(_options.Path);
    }

    private static long SizeOf(string path)
    {
        var file = new FileInfo(path);
        return file.Exists ? file.Length : 0;
    }

    private void Fail(string why)
    {
        _failure = why;
        _failedAt = _time.GetTimestamp();
        Close();
    }

    private void Close()
    {
        _file?.Dispose();
        _file = null;
    }
}
