// The commands that have xl's names.

using System.CommandLine;

namespace XenSharp.Cli.Management;

/// <summary>Makes the commands about domains.</summary>
internal static class ManagementCommands
{
    /// <summary>All of them, in the order in which help lists them.</summary>
    internal static IEnumerable<Command> Create() =>
    [
        CreateCommand.Create(),
        ListCommand.Create(),
        ListCommand.CreateVmList(),
        ConsoleCommand.Create(),
        ShutdownCommands.CreateShutdown(),
        ShutdownCommands.CreateReboot(),
        DomainCommands.CreateDestroy(),
        DomainCommands.CreatePause(),
        DomainCommands.CreateUnpause(),
        DomainCommands.CreateRename(),
        DomainCommands.CreateDomid(),
        DomainCommands.CreateDomname(),
        DomainCommands.CreateUptime(),
        TopCommand.Create(),
        VcpuCommands.CreateList(),
        VcpuCommands.CreateSet(),
        VcpuCommands.CreatePin(),
        MemoryCommands.CreateSet(),
        MemoryCommands.CreateMax(),
        DomainCommands.CreateSysrq(),
        DomainCommands.CreateTrigger(),
        SaveCommands.CreateSave(),
        SaveCommands.CreateRestore(),
        SaveCommands.CreateDumpCore(),
        BlockCommands.CreateAttach(),
        BlockCommands.CreateDetach(),
        BlockCommands.CreateList(),
        NetworkCommands.CreateAttach(),
        NetworkCommands.CreateDetach(),
        NetworkCommands.CreateList(),
        ChannelCommand.Create(),
        CreateCommand.CreateConfigUpdate(),
        DomainCommands.CreateDmesg(),
        CompletionCommand.Create(),
    ];
}
