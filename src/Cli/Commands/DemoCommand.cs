// xensharp demo: a stock Debian kernel with a busybox shell, or the tiny guest, with nothing to prepare.

using System.CommandLine;
using Microsoft.Extensions.DependencyInjection;
using Tmds.Linux;
using XenSharp.Cli.Hosting;
using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;
using Command = System.CommandLine.Command;

namespace XenSharp.Cli.Commands;

/// <summary>Boots a guest that is fetched or made on the spot.</summary>
internal static class DemoCommand
{
    private const string Name = "demo";

    internal static Command Create(IServiceProvider services)
    {
        var tiny = new Option<bool>("--tiny") { Description = "The tiny guest: it says hello and powers off. Nothing is downloaded." };
        var cloud = new Option<bool>("--cloud") { Description = "Debian's cloud kernel: a smaller download than the usual one." };
        Option<int> memory = GuestOptions.Memory();
        Option<int> maxMemory = GuestOptions.MaxMemory(memory);
        Option<int> vcpus = GuestOptions.Vcpus();
        Option<string?> trace = GuestOptions.Trace();
        var command = new Command(Name, "Boots a stock Debian kernel into a shell, downloading both at the first time.")
        {
            tiny, cloud, memory, maxMemory, vcpus, trace,
        };
        command.Validators.Add(result =>
        {
            if (result.GetValue(tiny) && result.GetValue(cloud))
                result.AddError("--tiny and --cloud name two different guests; give one of them.");
        });
        command.SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            try
            {
                (DomainSpecification specification, string description) = parsed.GetValue(tiny)
                    ? Tiny()
                    : await FetchAsync(parsed.GetValue(cloud), signals.Token).ConfigureAwait(false);
                specification = specification with
                {
                    MemoryMiB = parsed.GetValue(memory),
                    MaxMemoryMiB = parsed.GetValue(maxMemory),
                    Vcpus = parsed.GetValue(vcpus),
                };
                return await services.GetRequiredService<ForegroundRun>()
                    .RunAsync(specification, description, RebootAction.Exit, consoleLog: null, parsed.GetValue(trace), signals)
                    .ConfigureAwait(false);
            }
            catch (OperationCanceledException) when (signals.Received != 0)
            {
                return ExitStatus.OfSignal + signals.Received;
            }
        });
        return command;
    }

    private static (DomainSpecification Specification, string Description) Tiny() =>
        (new DomainSpecification { Name = Name, Image = new DomainImage(KernelImage.Parse(TinyGuest.Build())) { Reusable = false } }, "the tiny guest");

    private static async Task<(DomainSpecification Specification, string Description)> FetchAsync(bool cloud, CancellationToken cancellation)
    {
        DebianKernelFlavour flavour = cloud ? DebianKernelFlavour.CloudAmd64 : DebianKernelFlavour.Amd64;
        var cache = new GuestCache(GuestCache.DefaultRoot());
        (DebianKernel kernel, string busybox) = await FetchDisplay.RunAsync(
            async progress => (
                await cache.GetKernelAsync(flavour, progress, cancellation).ConfigureAwait(false),
                await cache.GetBusyboxAsync(progress, cancellation).ConfigureAwait(false))).ConfigureAwait(false);
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(busybox, cancellation: cancellation).ConfigureAwait(false);

        // Quiet: of the kernel's messages only the serious ones are shown; dmesg has them all.
        string commandLine = "console=hvc0 quiet";
        if (LibC.isatty(0) == 0)
            commandLine += " " + BusyboxInitramfs.PipedInputParameter;
        var specification = new DomainSpecification
        {
            Name = Name,
            Image = new DomainImage(
                KernelImage.Parse(await File.ReadAllBytesAsync(kernel.Image, cancellation).ConfigureAwait(false)), ramdisk) { Reusable = false },
            CommandLine = commandLine,
            KernelFile = kernel.Image,
        };
        return (specification, $"Debian's Linux {kernel.Release} into a busybox shell");
    }
}
