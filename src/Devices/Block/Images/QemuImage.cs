// Images in formats that QEMU knows, served to this process by a qemu-nbd of its own.
using System.Diagnostics;
using System.Net.Sockets;
using System.Text;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// A qcow2 or other image, behind a qemu-nbd on a socket that only this process can reach. It ends when the connection does, so it
/// does not outlive this process, however that ends; if it ends first, all operations come to EIO.
/// </summary>
public sealed class QemuImage : IBlockImage
{
    private const uint LargestSector = 4096;
    private const uint SmallestSector = 512;
    private const int LongestComplaint = 500;

    // What QEMU's formats give back at once: a cluster of qcow2 by default.
    private const uint DiscardUnit = 64 << 10;

    private static readonly TimeSpan StartTime = TimeSpan.FromSeconds(20);
    private static readonly TimeSpan EndTime = TimeSpan.FromSeconds(30);
    private static readonly TimeSpan Retry = TimeSpan.FromMilliseconds(10);

    private readonly ImageFile _file;
    private readonly Process _process;
    private readonly NbdClient _client;

    private QemuImage(ImageFile file, Process process, NbdClient client)
    {
        (_file, _process, _client) = (file, process, client);
        SectorSize = Math.Max(client.Export.MinimumBlock, SmallestSector);
        Size = client.Export.Size & ~(ulong)(SectorSize - 1);
        PhysicalSectorSize = Size % LargestSector == 0 ? LargestSector : SectorSize;
        if (client.Export.Flags.HasFlag(NbdFlags.SendTrim) && !IsReadOnly)
            Discard = new DiscardLimits(DiscardUnit, 0);
    }

    /// <inheritdoc/>
    public ulong Size { get; }

    /// <inheritdoc/>
    public uint SectorSize { get; }

    /// <inheritdoc/>
    public uint PhysicalSectorSize { get; }

    /// <inheritdoc/>
    public bool IsReadOnly => _file.IsReadOnly;

    /// <inheritdoc/>
    public DiscardLimits? Discard { get; }

    /// <inheritdoc/>
    public string Description => _file.Path;

    /// <inheritdoc/>
    public string? Failure => _client.IsBroken
        ? $"the qemu-nbd that served it (process {ProcessId}) has ended; the guest gets errors for all it asks of this disk, until the disk is detached and attached again"
        : null;

    /// <summary>The number of the qemu-nbd process.</summary>
    public int ProcessId => _process.Id;

    /// <summary>Starts qemu-nbd on an image, and locks the image against a second use to write.</summary>
    /// <param name="path">The image.</param>
    /// <param name="format">Its format.</param>
    /// <param name="readOnly">Whether it is only read.</param>
    /// <param name="program">The qemu-nbd to use; null for the one in PATH.</param>
    /// <param name="direct">Whether it is used past the host's page cache (O_DIRECT).</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <exception cref="BlockImageException">It cannot be opened or is in use, or there is no qemu-nbd; the message says what to do.</exception>
    public static async Task<QemuImage> OpenAsync(
        string path, BlockImageFormat format, bool readOnly, QemuNbdProgram? program = null, bool direct = false,
        CancellationToken cancellation = default)
    {
        ImageFile file = ImageFile.Open(path, readOnly);
        try
        {
            program ??= QemuNbdProgram.Find() ?? throw new BlockImageException(
                $"{path} is served by qemu-nbd, as its format is {BlockImage.QemuName(format)}, and there is none on this host; install it (on Debian: "
                + $"apt-get install qemu-utils), or convert the image: qemu-img convert -O raw {path} NEW.");

            // The folder is for this user alone, and so is the socket in it.
            DirectoryInfo folder = Directory.CreateTempSubdirectory("xensharp-nbd-");
            try
            {
                return await ServeAsync(file, program, format, direct, Path.Combine(folder.FullName, "nbd"), cancellation).ConfigureAwait(false);
            }
            finally
            {
                folder.Delete(recursive: true);
            }
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Submit(BlockOperation operation)
    {
        ArgumentNullException.ThrowIfNull(operation);
        _client.Submit(operation);
    }

    /// <summary>Waits for what is under way, and until qemu-nbd has closed the image.</summary>
    public async ValueTask DisposeAsync()
    {
        await Task.Run(_client.Dispose).ConfigureAwait(false);
        await EndAsync(_process, EndTime).ConfigureAwait(false);
        _file.Dispose();
    }

    private static async Task<QemuImage> ServeAsync(
        ImageFile file, QemuNbdProgram program, BlockImageFormat format, bool direct, string socketPath, CancellationToken cancellation)
    {
        var complaint = new StringBuilder();
        Process process = Start(file, program, format, direct, socketPath, complaint);
        Socket? socket = null;
        try
        {
            socket = await ConnectAsync(process, socketPath, cancellation).ConfigureAwait(false);
            (socket.ReceiveTimeout, socket.SendTimeout) = ((int)StartTime.TotalMilliseconds, (int)StartTime.TotalMilliseconds);
            NbdExport export;
            await using (var stream = new NetworkStream(socket, ownsSocket: false))
                export = NbdProtocol.Negotiate(stream);
            (socket.ReceiveTimeout, socket.SendTimeout) = (0, 0);
            if (export.Size < SmallestSector || export.MinimumBlock > LargestSector)
                throw new BlockImageException($"{file.Path} is no disk that guests can use: it has {export.Size} bytes in units of {export.MinimumBlock}.");
            return new QemuImage(file, process, new NbdClient(socket, export));
        }
        catch (Exception failure)
        {
            // It listens before it looks at the image, so a connection that breaks has mostly to do with that, and it says with what.
            bool isBroken = failure is IOException or SocketException;
            socket?.Dispose();
            await EndAsync(process, isBroken ? StartTime : TimeSpan.Zero).ConfigureAwait(false);
            if (!isBroken)
                throw;
            string said;
            lock (complaint)
                said = complaint.ToString();
            throw new BlockImageException(
                $"{file.Path} cannot be served by qemu-nbd: {(said.Length > 0 ? said : failure.Message)}. Check the image and its format.", failure);
        }
    }

    private static Process Start(
        ImageFile file, QemuNbdProgram program, BlockImageFormat format, bool direct, string socketPath, StringBuilder complaint)
    {
        var start = new ProcessStartInfo(program.Path) { RedirectStandardError = true, RedirectStandardInput = true, RedirectStandardOutput = true };
        foreach (string argument in program.Arguments)
            start.ArgumentList.Add(argument);
        string[] arguments =
        [
            $"--socket={socketPath}", $"--format={BlockImage.QemuName(format)}", direct ? "--cache=none" : "--cache=writeback", "--aio=threads",
            "--discard=unmap",
        ];
        foreach (string argument in arguments)
        {
            start.ArgumentList.Add(argument);
        }

        if (file.IsReadOnly)
            start.ArgumentList.Add("--read-only");
        start.ArgumentList.Add("--");
        start.ArgumentList.Add(Path.GetFullPath(file.Path));
        try
        {
            Process process = Process.Start(start)!;
            process.ErrorDataReceived += (_, line) =>
            {
                lock (complaint)
                {
                    if (line.Data is not null && complaint.Length < LongestComplaint)
                        _ = complaint.Append(complaint.Length == 0 ? "" : " ").Append(line.Data);
                }
            };
            process.OutputDataReceived += static (_, _) => { };
            process.BeginErrorReadLine();
            process.BeginOutputReadLine();
            process.StandardInput.Close();
            return process;
        }
        catch (System.ComponentModel.Win32Exception failure)
        {
            throw new BlockImageException($"{program.Path}, which serves {file.Path}, cannot be run: {failure.Message}.", failure);
        }
    }

    /// <exception cref="IOException">It does not listen.</exception>
    private static async Task<Socket> ConnectAsync(Process process, string socketPath, CancellationToken cancellation)
    {
        var endPoint = new UnixDomainSocketEndPoint(socketPath);
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            try
            {
                // Not the asynchronous call, which would leave the descriptor non-blocking.
                socket.Connect(endPoint);
                return socket;
            }
            catch (SocketException failure)
            {
                socket.Dispose();
                if (process.HasExited)
                    throw new IOException("it has ended at once", failure);
                if (Stopwatch.GetElapsedTime(start) > StartTime)
                    throw new IOException($"it does not listen after {StartTime.TotalSeconds:0} seconds ({failure.Message})", failure);
                await Task.Delay(Retry, cancellation).ConfigureAwait(false);
            }
        }
    }

    /// <summary>Waits for the end, and until all that it has said was read; and ends it when that takes too long.</summary>
    private static async Task EndAsync(Process process, TimeSpan patience)
    {
        using (process)
        {
            try
            {
                await process.WaitForExitAsync().WaitAsync(patience).ConfigureAwait(false);
            }
            catch (TimeoutException)
            {
                try
                {
                    process.Kill();
                }
                catch (InvalidOperationException)
                {
                    // It has ended after all.
                }

                await process.WaitForExitAsync().ConfigureAwait(false);
            }
        }
    }
}
