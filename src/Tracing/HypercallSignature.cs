// How Xen's public headers call hypercalls, their commands, and what their arguments are.
using XenSharp.Core;

namespace XenSharp.Tracing;

/// <summary>What an argument of a hypercall is, as far as it matters for showing and for comparing it.</summary>
internal enum ArgumentForm
{
    /// <summary>A number that means the same in every run.</summary>
    Number,

    /// <summary>The operation: one of <see cref="HypercallSignature.Commands"/>.</summary>
    Command,

    /// <summary>A guest address.</summary>
    Pointer,

    /// <summary>Elements of a list; the upper bit says that it is the rest of one.</summary>
    Count,

    /// <summary>A domain's id.</summary>
    Domain,

    /// <summary>A page-table entry: the frame in it is a machine frame, the flags mean the same in every run.</summary>
    Entry,

    /// <summary>A machine address, or a time, or another value that no two runs share.</summary>
    Varying,
}

/// <summary>One hypercall for people.</summary>
/// <param name="Name">Its name in xen/xen.h, in lower case and without prefix.</param>
/// <param name="Arguments">What its arguments are.</param>
internal sealed record HypercallSignature(string Name, params ArgumentForm[] Arguments)
{
    private const ArgumentForm Number = ArgumentForm.Number;
    private const ArgumentForm Command = ArgumentForm.Command;
    private const ArgumentForm Pointer = ArgumentForm.Pointer;
    private const ArgumentForm Count = ArgumentForm.Count;
    private const ArgumentForm Domain = ArgumentForm.Domain;
    private const ArgumentForm Entry = ArgumentForm.Entry;
    private const ArgumentForm Varying = ArgumentForm.Varying;

    /// <summary>XENMEM commands have the position to go on from above these bits (MEMOP_CMD_MASK).</summary>
    private const ulong MemoryCommandMask = 0x3f;

    private static readonly Dictionary<HypercallNumber, HypercallSignature> Table = new()
    {
        [HypercallNumber.SetTrapTable] = new("set_trap_table", Pointer),
        [HypercallNumber.MmuUpdate] = new("mmu_update", Pointer, Count, Pointer, Domain),
        [HypercallNumber.SetGdt] = new("set_gdt", Pointer, Number),
        [HypercallNumber.StackSwitch] = new("stack_switch", Number, Pointer),
        [HypercallNumber.SetCallbacks] = new("set_callbacks", Pointer, Pointer, Pointer),
        [HypercallNumber.FpuTaskswitch] = new("fpu_taskswitch", Number),
        [HypercallNumber.SchedOpCompat] = new("sched_op_compat", Command, Number) { Commands = ["yield", "block", "shutdown"] },
        [HypercallNumber.PlatformOp] = new("platform_op", Pointer),
        [HypercallNumber.SetDebugreg] = new("set_debugreg", Number, Varying),
        [HypercallNumber.GetDebugreg] = new("get_debugreg", Number),
        [HypercallNumber.UpdateDescriptor] = new("update_descriptor", Varying, Varying),
        [HypercallNumber.MemoryOp] = new("memory_op", Command, Pointer)
        {
            Commands =
            [
                "increase_reservation", "decrease_reservation", "maximum_ram_page", "current_reservation", "maximum_reservation",
                "machphys_mfn_list", "populate_physmap", "add_to_physmap", "translate_gpfn_list", "memory_map", "machine_memory_map",
                "exchange", "machphys_mapping", "set_memory_map", "maximum_gpfn", "remove_from_physmap", "set_pod_target",
                "get_pod_target", "get_sharing_freed_pages", "get_sharing_shared_pages", "paging_op", "access_op", "sharing_op",
                "add_to_physmap_batch",
            ],
            CommandMask = MemoryCommandMask,
        },
        [HypercallNumber.Multicall] = new("multicall", Pointer, Count),
        [HypercallNumber.UpdateVaMapping] = new("update_va_mapping", Pointer, Entry, Varying),
        [HypercallNumber.SetTimerOp] = new("set_timer_op", Varying),
        [HypercallNumber.EventChannelOpCompat] = new("event_channel_op_compat", Pointer),
        [HypercallNumber.XenVersion] = new("xen_version", Command, Pointer)
        {
            Commands =
            [
                "version", "extraversion", "compile_info", "capabilities", "changeset", "platform_parameters", "get_features", "pagesize",
                "guest_handle", "commandline", "build_id",
            ],
        },
        [HypercallNumber.ConsoleIo] = new("console_io", Command, Number, Pointer) { Commands = ["write", "read"] },
        [HypercallNumber.PhysdevOpCompat] = new("physdev_op_compat", Pointer),
        [HypercallNumber.GrantTableOp] = new("grant_table_op", Command, Pointer, Count)
        {
            Commands =
            [
                "map_grant_ref", "unmap_grant_ref", "setup_table", "dump_table", "transfer", "copy", "query_size", "unmap_and_replace",
                "set_version", "get_status_frames", "get_version", "swap_grant_ref", "cache_flush",
            ],
        },
        [HypercallNumber.VmAssist] = new("vm_assist", Command, Number) { Commands = ["enable", "disable"] },
        [HypercallNumber.UpdateVaMappingOtherdomain] = new("update_va_mapping_otherdomain", Pointer, Entry, Varying, Domain),
        [HypercallNumber.Iret] = new("iret"),
        [HypercallNumber.VcpuOp] = new("vcpu_op", Command, Number, Pointer)
        {
            Commands =
            [
                "initialise", "up", "down", "is_up", "get_runstate_info", "register_runstate_memory_area", "set_periodic_timer",
                "stop_periodic_timer", "set_singleshot_timer", "stop_singleshot_timer", "register_vcpu_info", "send_nmi", "get_physid",
                "register_vcpu_time_memory_area",
            ],
        },
        [HypercallNumber.SetSegmentBase] = new("set_segment_base", Command, Varying) { Commands = ["fs", "gs_user", "gs_kernel", "gs_user_sel"] },
        [HypercallNumber.MmuextOp] = new("mmuext_op", Pointer, Count, Pointer, Domain),
        [HypercallNumber.XsmOp] = new("xsm_op", Pointer),
        [HypercallNumber.NmiOp] = new("nmi_op", Command, Pointer) { Commands = ["register_callback", "unregister_callback"] },
        [HypercallNumber.SchedOp] = new("sched_op", Command, Pointer)
        {
            Commands = ["yield", "block", "shutdown", "poll", "remote_shutdown", "shutdown_code", "watchdog", "pin_override"],
        },
        [HypercallNumber.CallbackOp] = new("callback_op", Command, Pointer) { Commands = ["register", "unregister"] },
        [HypercallNumber.XenoprofOp] = new("xenoprof_op", Number, Pointer),
        [HypercallNumber.EventChannelOp] = new("event_channel_op", Command, Pointer)
        {
            Commands =
            [
                "bind_interdomain", "bind_virq", "bind_pirq", "close", "send", "status", "alloc_unbound", "bind_ipi", "bind_vcpu", "unmask",
                "reset", "init_control", "expand_array", "set_priority", "reset_cont",
            ],
        },
        [HypercallNumber.PhysdevOp] = new("physdev_op", Command, Pointer)
        {
            Commands =
            [
                "0", "1", "2", "3", "irq_unmask_notify", "irq_status_query", "set_iopl", "set_iobitmap", "apic_read", "apic_write",
                "alloc_irq_vector", "free_irq_vector", "eoi", "map_pirq", "unmap_pirq", "manage_pci_add", "manage_pci_remove",
                "pirq_eoi_gmfn_v1", "18", "restore_msi", "manage_pci_add_ext", "setup_gsi", "22", "get_free_pirq", "pci_mmcfg_reserved",
                "pci_device_add", "pci_device_remove", "restore_msi_ext", "pirq_eoi_gmfn_v2", "dbgp_op", "prepare_msix", "release_msix",
            ],
        },
        [HypercallNumber.HvmOp] = new("hvm_op", Number, Pointer),
        [HypercallNumber.Sysctl] = new("sysctl", Pointer),
        [HypercallNumber.Domctl] = new("domctl", Pointer),
        [HypercallNumber.KexecOp] = new("kexec_op", Number, Pointer),
        [HypercallNumber.TmemOp] = new("tmem_op", Pointer),
        [HypercallNumber.ArgoOp] = new("argo_op", Number, Pointer, Pointer, Number, Number),
        [HypercallNumber.XenpmuOp] = new("xenpmu_op", Number, Pointer),
        [HypercallNumber.DmOp] = new("dm_op", Domain, Number, Pointer),
        [HypercallNumber.HypfsOp] = new("hypfs_op", Number, Pointer, Number, Pointer, Number),
        [HypercallNumber.Mca] = new("mca", Pointer),
        [HypercallNumber.PagingDomctlContinue] = new("paging_domctl_cont", Pointer),
    };

    private static readonly string[] MmuextCommands =
    [
        "pin_l1_table", "pin_l2_table", "pin_l3_table", "pin_l4_table", "unpin_table", "new_baseptr", "tlb_flush_local", "invlpg_local",
        "tlb_flush_multi", "invlpg_multi", "tlb_flush_all", "invlpg_all", "flush_cache", "set_ldt", "14", "new_user_baseptr", "clear_page",
        "copy_page", "flush_cache_global", "mark_super", "unmark_super",
    ];

    private static readonly string[] MmuUpdateTypes = ["normal_pt_update", "machphys_update", "pt_update_preserve_ad", "pt_update_no_translate_ad"];

    /// <summary>Names of the commands, by number.</summary>
    public string[] Commands { get; private init; } = [];

    /// <summary>The bits of the argument that are the command.</summary>
    public ulong CommandMask { get; private init; } = ulong.MaxValue;

    /// <summary>The signature of a number, or null.</summary>
    public static HypercallSignature? Find(ulong number)
        => number <= int.MaxValue && Table.TryGetValue((HypercallNumber)number, out HypercallSignature? found) ? found : null;

    /// <summary>All names.</summary>
    public static IEnumerable<string> Names => Table.Values.Select(static signature => signature.Name);

    /// <summary>The name of a command.</summary>
    public string CommandName(ulong value) => NameIn(Commands, value & CommandMask);

    /// <summary>The name of a mmuext_op's command.</summary>
    public static string MmuextCommand(uint command) => NameIn(MmuextCommands, command);

    /// <summary>The name of what a mmu_update's address asks for by its low bits.</summary>
    public static string MmuUpdateType(ulong pointer) => MmuUpdateTypes[pointer & 3];

    private static string NameIn(string[] names, ulong value) => value < (ulong)names.Length ? names[value] : $"{value}";
}
