// xensharp run: any kernel, in the foreground.

using System.CommandLine;
using Microsoft.Extensions.DependencyInjection;
using XenSharp.Cli.Hosting;
using XenSharp.Domains.Builder;

namespace XenSharp.Cli.Commands;

/// <summary>Boots a kernel that the user names, and attaches the terminal to it.</summary>
internal static class RunCommand
{
    private const int LongestName = 255;

    internal static Command Create(IServiceProvider services)
    {
        var kernel = new Option<string>("--kernel", "-k")
        {
            Description = "The kernel: a bzImage with Xen PV support (as distributions build it), or a 64-bit ELF image.",
            HelpName = "FILE",
            Required = true,
        };
        var ramdisk = new Option<string?>("--ramdisk", "-r") { Description = "The initial ramdisk.", HelpName = "FILE" };
        Option<int> memory = GuestOptions.Memory();
        var commandLine = new Option<string>("--cmdline", "-c")
        {
            Description = "The kernel's command line.",
            HelpName = "TEXT",
            DefaultValueFactory = static _ => string.Empty,
        };
        var name = new Option<string>("--name", "-n")
        {
            Description = "The domain's name.",
            HelpName = "NAME",
            DefaultValueFactory = static _ => "guest",
        };
        name.Validators.Add(static result =>
        {
            string text = result.GetValueOrDefault<string>();
            if (text.Length is 0 or > LongestName || text.AsSpan().IndexOfAnyExceptInRange(' ', '~') >= 0 || text.Contains('/'))
                result.AddError($"--name takes 1 to {LongestName} printable ASCII characters without a slash; \"{text}\" is not such a name.");
        });
        var onReboot = new Option<string>("--on-reboot")
        {
            Description = "When the guest asks for a reboot: end with status 3, or boot it again.",
            DefaultValueFactory = static _ => "exit",
        };
        onReboot.AcceptOnlyFromAmong("exit", "restart");
        var consoleLog = new Option<string?>("--console-log")
        {
            Description = "A file that gets a copy of what the guest prints, appended.",
            HelpName = "FILE",
        };

        var command = new Command("run", "Boots a Xen PV kernel in this terminal. Ctrl-] ends the domain and leaves.")
        {
            kernel, ramdisk, memory, commandLine, name, onReboot, consoleLog,
        };
        command.SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            DomainSpecification specification = Specify(
                parsed.GetRequiredValue(kernel), parsed.GetValue(ramdisk), parsed.GetValue(memory), parsed.GetValue(commandLine)!, parsed.GetValue(name)!);
            RebootAction action = parsed.GetValue(onReboot) == "restart" ? RebootAction.Restart : RebootAction.Exit;
            return await services.GetRequiredService<ForegroundRun>()
                .RunAsync(specification, specification.KernelFile, action, parsed.GetValue(consoleLog), signals).ConfigureAwait(false);
        });
        return command;
    }

    private static DomainSpecification Specify(string kernel, string? ramdisk, int memory, string commandLine, string name)
    {
        byte[] image = HostFile.Read(kernel, "--kernel", KernelImage.LargestUnpackedSize, "is larger than any kernel; name the kernel itself.");
        byte[] disk = ramdisk is null
            ? []
            : HostFile.Read(
                ramdisk, "--ramdisk", (int)Math.Min((long)memory << 20, Array.MaxLength),
                $"does not fit into the domain's {memory} MiB of memory; give it more with --memory.");
        return new DomainSpecification
        {
            Name = name,
            Kernel = Parse(image, kernel),
            Ramdisk = disk,
            MemoryMiB = memory,
            CommandLine = commandLine,
            KernelFile = kernel,
            RamdiskFile = ramdisk,
        };
    }

    private static KernelImage Parse(byte[] image, string path)
    {
        try
        {
            return KernelImage.Parse(image);
        }
        catch (KernelImageException failure)
        {
            throw new UsageException($"{path}: {failure.Message}");
        }
    }
}
