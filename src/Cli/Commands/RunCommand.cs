// xensharp run: any kernel, in the foreground.

using System.CommandLine;
using System.CommandLine.Parsing;
using Microsoft.Extensions.DependencyInjection;
using XenSharp.Cli.Hosting;
using XenSharp.Domains.Builder;
using XenSharp.Toolstack;

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
        Option<int> maxMemory = GuestOptions.MaxMemory(memory);
        Option<int> vcpus = GuestOptions.Vcpus();
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
        var onReboot = new Option<RebootAction>("--on-reboot")
        {
            Description = "When the guest asks for a reboot: end with status 3, or boot it again.",
            HelpName = "exit|restart",
            DefaultValueFactory = static _ => RebootAction.Exit,
            CustomParser = ParseRebootAction,
        };
        onReboot.CompletionSources.Add("exit", "restart");
        var consoleLog = new Option<string?>("--console-log")
        {
            Description = "A file that gets a copy of what the guest prints, appended.",
            HelpName = "FILE",
        };
        Option<string?> trace = GuestOptions.Trace();

        var command = new Command("run", "Boots a Xen PV kernel in this terminal. Ctrl-] ends the domain and leaves.")
        {
            kernel, ramdisk, memory, maxMemory, vcpus, commandLine, name, onReboot, consoleLog, trace,
        };
        command.SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            RebootAction action = parsed.GetValue(onReboot);
            int memoryMiB = parsed.GetValue(memory);
            var specification = new DomainSpecification
            {
                Name = parsed.GetValue(name)!,
                Image = Load(parsed.GetRequiredValue(kernel), parsed.GetValue(ramdisk), memoryMiB, reusable: action == RebootAction.Restart),
                MemoryMiB = memoryMiB,
                MaxMemoryMiB = parsed.GetValue(maxMemory),
                Vcpus = parsed.GetValue(vcpus),
                CommandLine = parsed.GetValue(commandLine)!,
                KernelFile = parsed.GetRequiredValue(kernel),
                RamdiskFile = parsed.GetValue(ramdisk),
            };
            return await services.GetRequiredService<ForegroundRun>()
                .RunAsync(specification, specification.KernelFile, action, parsed.GetValue(consoleLog), parsed.GetValue(trace), signals)
                .ConfigureAwait(false);
        });
        return command;
    }

    private static RebootAction ParseRebootAction(ArgumentResult result)
    {
        string text = result.Tokens[0].Value;
        if (text is not ("exit" or "restart"))
            result.AddError($"--on-reboot takes exit or restart; \"{text}\" is neither.");
        return text == "restart" ? RebootAction.Restart : RebootAction.Exit;
    }

    private static DomainImage Load(string kernel, string? ramdisk, int memory, bool reusable)
    {
        byte[] image = HostFile.Read(kernel, "--kernel", KernelImage.LargestUnpackedSize, "is larger than any kernel; name the kernel itself.");
        byte[] disk = ramdisk is null
            ? []
            : HostFile.Read(
                ramdisk, "--ramdisk", (int)Math.Min((long)memory << 20, Array.MaxLength),
                $"does not fit into the domain's {memory} MiB of memory; give it more with --memory.");
        return new DomainImage(Parse(image, kernel), disk) { Reusable = reusable };
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
