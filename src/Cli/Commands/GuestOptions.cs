// Options that several commands share.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using XenSharp.Domains;
using XenSharp.Kvm;
using XenSharp.Toolstack;

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

    /// <summary><c>--maxmem MiB</c>, 0 where it is not given.</summary>
    /// <param name="memory">The option that it must not be below.</param>
    internal static Option<int> MaxMemory(Option<int> memory)
    {
        var option = new Option<int>("--maxmem")
        {
            Description = "Memory in MiB up to which the guest's balloon driver can grow the domain, if that is more than it boots with.",
            HelpName = "MiB",
            DefaultValueFactory = static _ => 0,
            CustomParser = ParseMemory,
        };
        option.Validators.Add(result =>
        {
            // What is no number is complained of by the parser.
            if (NumberOf(result) is { } most && (NumberOf(result.GetResult(memory)) ?? DomainSpecification.DefaultMemoryMiB) is var first && most < first)
                result.AddError($"--maxmem {most} is less than the {first} MiB that the domain boots with (--memory); it is to be at least that.");
        });
        return option;
    }

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

    private static int? NumberOf(OptionResult? result)
        => result is { Tokens: [var token, ..] } && int.TryParse(token.Value, NumberStyles.None, CultureInfo.InvariantCulture, out int number) ? number : null;

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
        string name = ((OptionResult)result.Parent!).Option.Name;
        if (!long.TryParse(text, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long memory))
        {
            result.AddError($"{name} takes a whole number of MiB, such as {DomainSpecification.DefaultMemoryMiB}; \"{text}\" is none.");
            return 0;
        }

        if (memory < DomainOptions.MinMemoryMiB)
            result.AddError($"{name} {memory} is too little: a domain has {DomainOptions.MinMemoryMiB} MiB at least, and a Linux kernel needs some 64.");
        else if (memory > HostMachine.MemoryMiB)
            result.AddError($"{name} {memory} is more than this machine's {HostMachine.MemoryMiB} MiB; give the domain less.");
        return (int)Math.Clamp(memory, 0, int.MaxValue);
    }
}
