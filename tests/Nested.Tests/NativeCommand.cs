// The native xensharp command, which the nested beds put into their machine: the one at hand, or published once for the run.

using XenSharp.Guests.Fetching;

namespace XenSharp.Nested.Tests;

internal static class NativeCommand
{
    /// <summary>Names a command that was published already, as .ci/run does.</summary>
    private const string Variable = "XENSHARP_NATIVE";

    private static readonly Lazy<Task<string>> Published = new(PublishAsync);

    /// <summary>Its path. Skips the test, saying what is missing, where nothing can be linked.</summary>
    internal static Task<string> GetAsync() => Published.Value;

    private static async Task<string> PublishAsync()
    {
        if (Environment.GetEnvironmentVariable(Variable) is { Length: > 0 } given)
            return File.Exists(given) ? given : throw new AssertionException($"{Variable} names {given}, which is not there.");

        var runner = new CommandRunner();
        List<string> missing = [];
        if (runner.Find("clang") is null && runner.Find("gcc") is null)
            missing.Add("gcc libc6-dev");
        if (!File.Exists("/usr/include/zlib.h"))
            missing.Add("zlib1g-dev");
        if (missing.Count > 0)
            Assert.Ignore($"The native command cannot be linked here; on Debian: apt-get install {string.Join(' ', missing)}.");

        string root = Root();
        string folder = Path.Combine(root, "artifacts", "native");
        CommandResult result = await runner.RunAsync(new Command(
            Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet",
            "publish", Path.Combine(root, "src", "Cli"), "-c", "Release", "-r", "linux-x64", "-o", folder, "-v", "quiet", "-nodeReuse:false"));
        Assert.That(result.ExitCode, Is.Zero, result.Output + result.Error);
        return Path.Combine(folder, "xensharp");
    }

    private static string Root()
    {
        string? folder = AppContext.BaseDirectory;
        while (folder is not null && !File.Exists(Path.Combine(folder, "XenSharp.sln")))
            folder = Path.GetDirectoryName(folder);
        return folder ?? throw new AssertionException($"These tests are run from within the repository, not from {AppContext.BaseDirectory}.");
    }
}
