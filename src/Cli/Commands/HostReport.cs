// What is known of this build and this host, as data for JSON and as rows for people.

using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json.Serialization;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Commands;

/// <summary>One line for a person.</summary>
/// <param name="Name">What it is about.</param>
/// <param name="Value">What was found.</param>
/// <param name="Meaning">What that means.</param>
internal sealed record HostReportRow(string Name, string Value, string Meaning);

/// <summary>What the probes found, see <see cref="HostCapabilities"/>.</summary>
internal sealed record KvmReport(
    bool ShadowPageTables,
    bool StoresNeedFlush,
    int SyscallEntryLevel,
    bool CompatibilitySyscallAstray,
    bool InterpretsCompatibilityMode,
    bool HostDescriptorTable,
    bool Slot256Usable,
    string SoftwareInterruptVector,
    bool CpuidPolicyApplies,
    uint TscKiloHertz,
    long TscOffset,
    bool FlatSegmentLoads,
    bool TaskSwitchedTraps,
    bool TimeStampDisableTraps,
    bool DebugRegistersWork,
    int MaxVcpus);

/// <summary>Everything that <c>xensharp info</c> knows.</summary>
internal sealed record HostReport
{
    /// <summary>The version of Xen whose ABI guests see.</summary>
    internal const string AbiVersion = "4.17";

    /// <summary>XenSharp's version.</summary>
    public required string XenSharp { get; init; }

    /// <summary>The .NET runtime's name and version.</summary>
    public required string Runtime { get; init; }

    /// <summary>The host kernel's release.</summary>
    public required string Kernel { get; init; }

    /// <summary>The machine's memory in MiB.</summary>
    public required int MemoryMiB { get; init; }

    /// <summary>The version of Xen's ABI.</summary>
    public required string XenAbi { get; init; }

    /// <summary>Path of the KVM device.</summary>
    public required string KvmDevice { get; init; }

    /// <summary>What the probes found; <see langword="null"/> if there is no KVM to probe.</summary>
    public required KvmReport? Kvm { get; init; }

    /// <summary>Why there is none, as a sentence that says what to do.</summary>
    public required string? KvmError { get; init; }

    internal static HostReport Make(KvmHost host)
    {
        KvmReport? kvm = null;
        string? error = null;
        try
        {
            kvm = Report(host.Capabilities);
        }
        catch (Exception failure) when (FailureSentence.Of(failure) is { } sentence)
        {
            error = sentence;
        }

        return new HostReport
        {
            XenSharp = Tool.Version,
            Runtime = RuntimeInformation.FrameworkDescription,
            Kernel = HostMachine.KernelRelease,
            MemoryMiB = HostMachine.MemoryMiB,
            XenAbi = AbiVersion,
            KvmDevice = host.Device,
            Kvm = kvm,
            KvmError = error,
        };
    }

    internal IEnumerable<HostReportRow> Rows()
    {
        yield return new("XenSharp", XenSharp, "");
        yield return new("Runtime", Runtime, "");
        yield return new("Host kernel", Kernel, "");
        yield return new("Host memory", $"{MemoryMiB} MiB", "The most that a domain can be given.");
        yield return new("Xen ABI", XenAbi, "The version of Xen that guests see.");
        yield return new("KVM device", KvmDevice, Kvm is null ? "Not usable." : "Usable.");
        if (Kvm is not { } kvm)
            yield break;

        yield return new("Page tables", kvm.ShadowPageTables ? "shadowed" : "two-dimensional", kvm.ShadowPageTables
            ? "KVM walks copies of the guest's page tables, so each change is repeated inside the VM: slower."
            : "The processor walks the guest's page tables itself: changes need no exit from the VM.");
        if (kvm.ShadowPageTables)
        {
            yield return new("Repeated stores", kvm.StoresNeedFlush ? "with a flush" : "seen at once", kvm.StoresNeedFlush
                ? "KVM takes changed entries over when translations are flushed, so each batch ends in a flush."
                : "KVM takes changed entries over as they are stored.");
        }

        yield return new("SYSCALL entry", $"CPL {kvm.SyscallEntryLevel}", kvm.SyscallEntryLevel == 0
            ? "Hypercalls enter the monitor in ring 0, as on hardware."
            : "This KVM's SYSCALL stays in ring 3; the monitor's entry page is open to it, with the one port it needs.");
        yield return new("32-bit SYSCALL", kvm.CompatibilitySyscallAstray ? "kept from KVM" : "as on hardware", kvm.CompatibilitySyscallAstray
            ? "This KVM would run it into the guest's own memory at ring 0; its vCPUs have it raise #UD, and it is emulated."
            : "System calls of 32-bit processes arrive as the processor makes them.");
        yield return new("32-bit code", kvm.InterpretsCompatibilityMode ? "interpreted" : "native", kvm.InterpretsCompatibilityMode
            ? "32-bit processes are slow, most of all with floating point and vectors."
            : "32-bit processes run as fast as others.");
        yield return new("Descriptor table", kvm.HostDescriptorTable ? "the host's" : "the domain's", kvm.HostDescriptorTable
            ? "Guests can load the host's flat selectors unseen; 32-bit processes are given the flat data segment."
            : "Guests load segments of their own table.");
        yield return new("L4 slot 256", kvm.Slot256Usable ? "usable" : "not usable", kvm.Slot256Usable
            ? "The machine-to-physical table is where Xen has it."
            : "The machine-to-physical table is in slot 257, and reads at Xen's classic address are emulated.");
        yield return new("INT 0x80", kvm.SoftwareInterruptVector, kvm.SoftwareInterruptVector == nameof(Core.ExceptionVector.GeneralProtection)
            ? "Software interrupts of guests arrive as on hardware."
            : "Software interrupts of guests arrive as another exception, and are recognised by decoding.");
        yield return new("CPUID", kvm.CpuidPolicyApplies ? "filtered" : "not filtered", kvm.CpuidPolicyApplies
            ? "A plain CPUID shows the domain's policy."
            : "A plain CPUID shows the host's processor; the form that PV kernels use shows the domain's policy.");
        yield return new("Time-stamp counter", string.Create(CultureInfo.InvariantCulture, $"{kvm.TscKiloHertz / 1000.0:0.000} MHz"),
            kvm.TscOffset == 0 ? "Guests read the host's counter." : "Guests read the host's counter plus an offset.");
        yield return new("Flat segment loads", kvm.FlatSegmentLoads ? "native" : "emulated", kvm.FlatSegmentLoads
            ? "Guests load Xen's flat selectors without leaving the VM."
            : "Loads of Xen's flat selectors fault and are emulated.");
        yield return new("CR0.TS", kvm.TaskSwitchedTraps ? "traps" : "has no effect", kvm.TaskSwitchedTraps
            ? "Guests may switch their FPU state lazily."
            : "Guests that switch their FPU state lazily mix it up; Linux does not.");
        yield return new("CR4.TSD", kvm.TimeStampDisableTraps ? "traps" : "has no effect", kvm.TimeStampDisableTraps
            ? "A guest can keep its processes from reading the time-stamp counter."
            : "A guest's processes can always read the time-stamp counter.");
        yield return new("Debug registers", kvm.DebugRegistersWork ? "work" : "have no effect", kvm.DebugRegistersWork
            ? "Hardware breakpoints of guests are hit."
            : "Hardware breakpoints of guests are never hit; single-step and INT3 work.");
        yield return new("Virtual CPUs", kvm.MaxVcpus.ToString(CultureInfo.InvariantCulture), "The most that one VM can have.");
    }

    private static KvmReport Report(HostCapabilities capabilities) => new(
        capabilities.ShadowPageTables,
        capabilities.StoresNeedFlush,
        capabilities.SyscallEntryLevel,
        capabilities.CompatibilitySyscallAstray,
        capabilities.InterpretsCompatibilityMode,
        capabilities.HostDescriptorTable,
        capabilities.Slot256Usable,
        capabilities.SoftwareInterruptVector.ToString(),
        capabilities.CpuidPolicyApplies,
        capabilities.TimeStampCounter.KiloHertz,
        capabilities.TimeStampCounter.Offset,
        capabilities.FlatSegmentLoads,
        capabilities.TaskSwitchedTraps,
        capabilities.TimeStampDisableTraps,
        capabilities.DebugRegistersWork,
        capabilities.MaxVcpus);
}

/// <summary>The JSON form, made at compile time: NativeAOT has no reflection to make it with.</summary>
[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.CamelCase, WriteIndented = true)]
[JsonSerializable(typeof(HostReport))]
internal sealed partial class HostReportJson : JsonSerializerContext;
