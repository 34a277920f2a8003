// Options that several commands share.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using XenSharp.Cli.Hosting;
using XenSharp.Domains;
using XenSharp.Kvm;

namespace XenSharp.Cli.Commands;

/// <summary>Makes the options by which a guest is described.</summary>
internal static class GuestOptions
{
    /// <summary><c>--memory MiB</c>, checked against what a domain can have and this machine has.</summary>
    internal static Option<int> Memory() => new("--memory", "-m")
    {
        Description = $"Memory of the domain in MiB, from {DomainOptions.MinMemoryMiB} on.",
        HelpName = "MiB",
        DefaultValueFactory = static _ => DomainSpecification.DefaultMemoryMiB,
        CustomParser = ParseMemory,
    };

    /// <summary><c>--vcpus N</c>.</summary>
    internal static Option<int> Vcpus() => new("--vcpus")
    {
        Description = $"Virtual processors of the domain, from 1 to {KvmVirtualMachine.MaxVcpus}.",
        HelpName = "N",
        DefaultValueFactory = static _ => 1,
        CustomParser = ParseVcpus,
    };

    /// <summary><c>--trace FILE</c>.</summary>
    internal static Option<string?> Trace() => new("--trace")
    {
        Description = "A file that gets a record of every hypercall, exception, upcall and emulated instruction; xensharp trace reads it.",
        HelpName = "FILE",
    };

    private static int ParseVcpus(ArgumentResult result)
    {
        string text = result.Tokens[0].Value;
        if (int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int vcpus) && vcpus is >= 1 and <= KvmVirtualMachine.MaxVcpus)
            return vcpus;
        result.AddError($"--vcpus takes a whole number from 1 to {KvmVirtualMachine.MaxVcpus}; \"{text}\" is none.");
        return 1;
    }

    private static int ParseMemory(ArgumentResult result)
    {
        string text = result.Tokens[0].Value;
        if (!long.TryParse(text, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long memory))
        {
            result.AddError($"--memory takes a whole number of MiB, such as {DomainSpecification.DefaultMemoryMiB}; \"{text}\" is none.");
            return 0;
        }

        if (memory < DomainOptions.MinMemoryMiB)
            result.AddError($"--memory {memory} is too little: a domain has {DomainOptions.MinMemoryMiB} MiB at least, and a Linux kernel needs some 64.");
        else if (memory > HostMachine.MemoryMiB)
            result.AddError($"--memory {memory} is more than this machine's {HostMachine.MemoryMiB} MiB; give the domain less.");
        return (int)Math.Clamp(memory, 0, int.MaxValue);
    }
}
