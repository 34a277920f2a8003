// The commands that xl has and XenSharp has not: each says why, and what to do instead.

using System.CommandLine;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>A command of xl 4.17's that is refused.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Reason">Why there is none, and what serves in its place: one or two sentences.</param>
internal sealed record AbsentCommand(string Name, string Reason)
{
    /// <summary>What somebody is told who types it, or asks for help with it.</summary>
    internal string Refusal => $"There is no {Name} here. {Reason}";
}

/// <summary>All that xl's table of commands has and this one's has not, so that somebody who types one is told more than that it is unknown.</summary>
internal static class AbsentCommands
{
    private const string HvmDrive = "It is for HVM domains, with xl as well: the CD-ROM of a PV domain is a read-only disk. Take it out with block-detach, and plug "
        + "another in with block-attach, devtype=cdrom in its specification.";

    private const string NoMove = "A domain is not moved to another host while it runs: save it, take the file and its disks there, and restore it.";
    private const string NoScreen = "Domains here have no screen and no VNC server: use console.";
    private const string LinuxSchedules = "Linux schedules vCPUs, by no credits: vcpu-pin says where they run, and the daemon's control group how much they get.";
    private const string NoPools = "Processors are in no pools here: vcpu-pin says which of them a domain's vCPUs run on.";
    private const string NoPassThrough = "The host's PCI devices are not handed to domains: give them disks and network interfaces of the host's.";
    private const string NoUsb = "Domains here have no USB: give them disks and network interfaces.";
    private const string NoTpm = "Domains here have no TPM.";
    private const string NoSuchDevice = "Domains here have consoles, disks and network interfaces, and no keyboard, display or sound.";
    private const string NoFlask = "There is no Flask security module: who may write to the daemon's socket may do all.";
    private const string NoAllocation = "Caches and memory bandwidth are not shared out here; Linux's resctrl does that for the daemon's threads.";

    /// <summary>All of them, in xl's order.</summary>
    internal static IReadOnlyList<AbsentCommand> All { get; } =
    [
        .. Of(NoPassThrough, "pci-attach", "pci-detach", "pci-list", "pci-assignable-add", "pci-assignable-remove", "pci-assignable-list"),
        new("vncviewer", NoScreen),
        .. Of(NoMove, "migrate", "migrate-receive"),
        .. Of(HvmDrive, "cd-insert", "cd-eject"),
        new("button-press", "PV domains have no ACPI buttons: ask the guest with shutdown, or its kernel with sysrq."),
        new("sharing", "Domains here share no pages by themselves: each has its memory to itself, as list shows it."),
        .. Of(LinuxSchedules, "sched-credit", "sched-credit2", "sched-rtds"),
        new("debug-keys", "There is no hypervisor whose keys could be pressed: dmesg shows the manager's log, and run --trace what a guest does."),
        new("set-parameters", "There is no hypervisor whose parameters could be set: the daemon's are options of xensharp daemon."),
        .. Of(NoTpm, "vtpm-attach", "vtpm-list", "vtpm-detach"),
        .. Of(
            NoSuchDevice, "vkb-attach", "vkb-list", "vkb-detach", "vdispl-attach", "vdispl-list", "vdispl-detach", "vsnd-attach", "vsnd-list",
            "vsnd-detach"),
        new("claims", "Memory is not claimed before a domain is made: info shows what the host has free."),
        .. Of(
            NoPools, "cpupool-create", "cpupool-list", "cpupool-destroy", "cpupool-rename", "cpupool-cpu-add", "cpupool-cpu-remove", "cpupool-migrate",
            "cpupool-numa-split"),
        .. Of(NoFlask, "getenforce", "setenforce", "loadpolicy"),
        new("remus", "Domains are not kept in step with a copy on another host: save -c writes a checkpoint while the domain runs on."),
        new("devd", "Back ends run in the daemon, and so in no domain of their own: xensharp daemon is all there is to start."),
        .. Of(
            NoAllocation, "psr-hwinfo", "psr-cmt-attach", "psr-cmt-detach", "psr-cmt-show", "psr-cat-set", "psr-cat-show", "psr-mba-set", "psr-mba-show"),
        .. Of(NoUsb, "usbctrl-attach", "usbctrl-detach", "usbdev-attach", "usbdev-detach", "usb-list"),
        new("qemu-monitor-command", "No QEMU emulates devices for a domain here, so there is none to be commanded."),
    ];

    /// <summary>One of them; null if it is none.</summary>
    internal static AbsentCommand? Find(string name) => All.FirstOrDefault(command => command.Name == name);

    /// <summary>Commands that take anything, and refuse.</summary>
    internal static IEnumerable<Command> Create() => All.Select(static absent =>
    {
        var command = new Command(absent.Name, absent.Reason)
        {
            new Argument<string[]>("arguments") { Arity = ArgumentArity.ZeroOrMore },
        };
        command.Hidden = true;

        // Options of xl's are arguments, as all is: the refusal is the same.
        command.TreatUnmatchedTokensAsErrors = false;
        command.SetAction(_ =>
        {
            ManagementCommand.Say(absent.Refusal);
            return ExitStatus.Error;
        });
        return command;
    });

    private static IEnumerable<AbsentCommand> Of(string reason, params string[] names) => names.Select(name => new AbsentCommand(name, reason));
}
