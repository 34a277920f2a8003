// What outlives the manager's process: a record of each domain that runs, and of those that were lost.

using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;
using Microsoft.Win32.SafeHandles;
using Tmds.Linux;
using XenSharp.Api;
using XenSharp.Configuration;

namespace XenSharp.Toolstack.Management;

/// <summary>A domain, as it is recorded while it runs.</summary>
internal sealed record DomainRecord
{
    public required string Name { get; init; }

    public required Guid Uuid { get; init; }

    public required int Id { get; init; }

    public required DateTimeOffset StartTime { get; init; }

    /// <summary>When a later manager found that it is gone; null while it runs.</summary>
    public DateTimeOffset? FoundLost { get; init; }

    /// <summary>As <see cref="DomainConfigurationJson"/> writes it.</summary>
    public required JsonElement Configuration { get; init; }
}

[JsonSourceGenerationOptions(JsonSerializerDefaults.Web, WriteIndented = true, DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull)]
[JsonSerializable(typeof(DomainRecord))]
internal sealed partial class DomainRecordJson : JsonSerializerContext;

/// <summary>
/// The manager's folder of records, for one manager at a time. Files appear and change as a whole, whatever is killed when. Members are
/// called by one thread at a time.
/// </summary>
public sealed partial class StateFolder : IDisposable
{
    private const int LockExclusive = 2;
    private const int LockNonBlocking = 4;
    private const UnixFileMode Private = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;

    private readonly FileStream _lock;
    private readonly string _domains;
    private readonly string _lost;

    private StateFolder(string path, FileStream locked)
    {
        (Path, _lock) = (path, locked);
        (_domains, _lost) = (System.IO.Path.Combine(path, "domains"), System.IO.Path.Combine(path, "lost"));
    }

    /// <summary>Its absolute path.</summary>
    public string Path { get; }

    /// <summary>Takes the folder, which is made if need be; it is given back by <see cref="Dispose"/>, and by the end of the process.</summary>
    /// <param name="path">The folder.</param>
    /// <param name="log">Is told of domains that were lost, and of records that cannot be read.</param>
    /// <exception cref="ToolstackException">It cannot be used, or another manager has it.</exception>
    public static StateFolder Open(string path, ManagerLog log)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        ArgumentNullException.ThrowIfNull(log);
        path = System.IO.Path.GetFullPath(path);
        try
        {
            _ = Directory.CreateDirectory(path, Private);
            FileStream locked = OpenLock(System.IO.Path.Combine(path, "lock"));
            try
            {
                if (flock((int)locked.SafeFileHandle.DangerousGetHandle(), LockExclusive | LockNonBlocking) != 0)
                {
                    throw new ToolstackException(
                        ProblemKind.WrongState,
                        $"Another daemon{OwnerOf(locked)} has the state folder {path}: end it first, or give this one another folder with --state.");
                }

                locked.SetLength(0);
                locked.Write(Encoding.ASCII.GetBytes($"{Environment.ProcessId}\n"));
                var folder = new StateFolder(path, locked);
                folder.FindLost(log);
                return folder;
            }
            catch
            {
                locked.Dispose();
                throw;
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(
                ProblemKind.HostCannot, $"The state folder {path} cannot be used ({Reason(failure)}): name another with --state.", failure);
        }
    }

    /// <summary>Gives the folder back.</summary>
    public void Dispose() => _lock.Dispose();

    /// <summary>The domains that were lost, by their names.</summary>
    public IReadOnlyList<LostDomain> ListLost()
    {
        List<LostDomain> lost = [];
        foreach (string file in Files(_lost))
        {
            if (TryRead(file) is not { } record)
                continue;
            lost.Add(new LostDomain
            {
                Name = record.Name,
                Uuid = record.Uuid,
                Id = record.Id,
                StartTime = record.StartTime,
                FoundLost = record.FoundLost ?? DateTimeOffset.MinValue,
                Configuration = new DomainConfigurationDocument { Json = record.Configuration },
            });
        }

        return [.. lost.OrderBy(static domain => domain.Name, StringComparer.Ordinal)];
    }

    /// <summary>Forgets a domain that was lost.</summary>
    /// <returns>False where there is none.</returns>
    public bool ForgetLost(Guid uuid)
    {
        string file = FileOf(_lost, uuid);
        if (!File.Exists(file))
            return false;
        File.Delete(file);
        return true;
    }

    /// <summary>Records a domain that runs. One of that UUID that was lost is so no longer.</summary>
    /// <exception cref="ToolstackException">It cannot be written.</exception>
    internal void Save(DomainRecord record)
    {
        try
        {
            Write(FileOf(_domains, record.Uuid), record);
            _ = ForgetLost(record.Uuid);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(
                ProblemKind.HostCannot, $"The domain {record.Name} cannot be recorded in {Path} ({Reason(failure)}): make room there.", failure);
        }
    }

    /// <summary>Takes a record back, for a domain that is gone as it should.</summary>
    internal void Remove(Guid uuid) => File.Delete(FileOf(_domains, uuid));

    /// <summary>Opened past .NET, which would lock it in a way of its own.</summary>
    private static unsafe FileStream OpenLock(string path)
    {
        int descriptor;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + "\0"))
            descriptor = LibC.open(name, LibC.O_RDWR | LibC.O_CREAT | LibC.O_CLOEXEC, 0x180);
        return descriptor >= 0
            ? new FileStream(new SafeFileHandle(descriptor, ownsHandle: true), FileAccess.ReadWrite, bufferSize: 0)
            : throw new IOException($"{path}: {Marshal.GetPInvokeErrorMessage(LibC.errno)}");
    }

    private static string FileOf(string folder, Guid uuid) => System.IO.Path.Combine(folder, $"{uuid:D}.json");

    private static string[] Files(string folder) => Directory.Exists(folder) ? Directory.GetFiles(folder, "*.json") : [];

    private static string OwnerOf(FileStream locked)
    {
        Span<byte> text = stackalloc byte[16];
        int count = locked.Read(text);
        string owner = Encoding.ASCII.GetString(text[..count]).Trim();
        return owner.Length > 0 && owner.All(char.IsAsciiDigit) ? $" (process {owner})" : string.Empty;
    }

    private static string Reason(Exception failure) => failure.Message.Split(" : '")[0].TrimEnd('.');

    private static DomainRecord? TryRead(string file)
    {
        try
        {
            return JsonSerializer.Deserialize(File.ReadAllBytes(file), DomainRecordJson.Default.DomainRecord);
        }
        catch (Exception failure) when (failure is JsonException or IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Whatever has a record when a manager begins is a domain that ran in one that did not end as it should.</summary>
    private void FindLost(ManagerLog log)
    {
        _ = Directory.CreateDirectory(_domains, Private);
        _ = Directory.CreateDirectory(_lost, Private);
        foreach (string unfinished in Directory.GetFiles(_domains, "*.new").Concat(Directory.GetFiles(_lost, "*.new")))
            File.Delete(unfinished);
        foreach (string file in Files(_domains))
        {
            if (TryRead(file) is { } record)
            {
                Write(FileOf(_lost, record.Uuid), record with { FoundLost = DateTimeOffset.UtcNow });
                File.Delete(file);
                log.Write($"The domain {record.Name} (number {record.Id}) ran when an earlier daemon ended, and is lost; its configuration is kept in {_lost}.");
            }
            else
            {
                File.Move(file, file + ".bad", overwrite: true);
                log.Write($"The record {file} cannot be read; it is kept as {file}.bad.");
            }
        }
    }

    private static void Write(string file, DomainRecord record)
    {
        string unfinished = file + ".new";
        try
        {
            using (var stream = new FileStream(
                unfinished,
                new FileStreamOptions
                {
                    Mode = FileMode.Create, Access = FileAccess.Write, BufferSize = 0, UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite,
                }))
            {
                stream.Write(JsonSerializer.SerializeToUtf8Bytes(record, DomainRecordJson.Default.DomainRecord));
                stream.Flush(flushToDisk: true);
            }

            File.Move(unfinished, file, overwrite: true);
        }
        catch
        {
            File.Delete(unfinished);
            throw;
        }
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial int flock(int descriptor, int operation);
}
