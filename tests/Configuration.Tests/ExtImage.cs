// File systems made by mke2fs, for tests that read them.

using System.Diagnostics;

namespace XenSharp.Configuration.Tests;

/// <summary>Makes images of ext2, ext3 and ext4 file systems from folders.</summary>
internal static class ExtImage
{
    /// <summary>Makes a file system.</summary>
    /// <param name="image">The image's path.</param>
    /// <param name="folder">What is to be in it.</param>
    /// <param name="kibibytes">Its size.</param>
    /// <param name="options">Options of mke2fs.</param>
    internal static void Make(string image, string folder, int kibibytes, params string[] options)
    {
        string program = Path.Exists("/usr/sbin/mke2fs") ? "/usr/sbin/mke2fs" : "/sbin/mke2fs";
        if (!File.Exists(program))
            Assert.Ignore("There is no mke2fs here to make file systems with: install e2fsprogs.");
        Run(program, ["-q", "-F", "-E", "root_owner=0:0", "-d", folder, .. options, image, $"{kibibytes}k"]);
    }

    /// <summary>Runs debugfs on an image, for what mke2fs cannot make.</summary>
    internal static void Debug(string image, string request)
    {
        string program = Path.Exists("/usr/sbin/debugfs") ? "/usr/sbin/debugfs" : "/sbin/debugfs";
        if (!File.Exists(program))
            Assert.Ignore("There is no debugfs here to change file systems with: install e2fsprogs.");
        Run(program, ["-w", "-R", request, image]);
    }

    private static void Run(string program, IReadOnlyList<string> arguments)
    {
        using var process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardError = true, RedirectStandardOutput = true })!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        string errors = process.StandardError.ReadToEnd();
        if (!process.WaitForExit(60_000))
        {
            process.Kill();
            Assert.Fail($"{program} {string.Join(' ', arguments)} does not end.");
        }

        Assert.That(process.ExitCode, Is.Zero, $"{program} {string.Join(' ', arguments)}: {output.Result}{errors}");
    }
}
