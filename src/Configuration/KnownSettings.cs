// Every key that xl.cfg(5) and xl 4.17 know, and what becomes of it here.

using System.Collections.Frozen;

namespace XenSharp.Configuration;

/// <summary>What becomes of a setting that is not simply used.</summary>
/// <param name="Refused">A domain that asks for it cannot be made; otherwise it is made without.</param>
/// <param name="Reason">Why; the end of a sentence.</param>
internal sealed record SettingFate(bool Refused, string Reason);

/// <summary>The keys that are known.</summary>
internal static class KnownSettings
{
    /// <summary>Keys that have an effect; <see cref="DomainConfigurationReader"/> reads each of them.</summary>
    internal static readonly FrozenSet<string> Used = Words("""
        name uuid type builder kernel ramdisk cmdline root extra firmware bootloader bootloader_args memory maxmem vcpus maxvcpus
        on_poweroff on_reboot on_crash on_watchdog on_soft_reset disk vif channel localtime rtc_timeoffset cpuid max_event_channels
        max_grant_frames max_maptrack_frames max_grant_version nomigrate cpus
        """).ToFrozenSet(StringComparer.Ordinal);

    private static readonly FrozenDictionary<string, SettingFate> s_fates = Fates();

    /// <summary>What becomes of a key that is not in <see cref="Used"/>; null for one that xl does not know either.</summary>
    internal static SettingFate? FateOf(string key) => s_fates.GetValueOrDefault(key);

    private static FrozenDictionary<string, SettingFate> Fates()
    {
        var fates = new Dictionary<string, SettingFate>(StringComparer.Ordinal);
        Add(false, "it is for HVM guests, and this is a PV domain", """
            boot hdtype hap oos shadow_memory bios bios_path_override pae acpi acpi_s3 acpi_s4 acpi_laptop_slate apic nx hpet altp2m altp2mhvm
            nestedhvm acpi_firmware smbios_firmware ms_vm_genid vpt_align timer_mode mmio_hole xen_platform_pci viridian videoram stdvga vga
            nographic spice spicehost spiceport spicetls_port spicedisable_ticketing spicepasswd spiceagent_mouse spicevdagent
            spice_clipboard_sharing spiceusbredirection spice_image_compression spice_streaming_video serial soundhw vkb_device usb usbversion
            usbdevice vendor_device device_model_version device_model_override stubdomain_kernel stubdomain_cmdline stubdomain_ramdisk
            stubdomain_memory device_model_stubdomain_override device_model_stubdomain_seclabel device_model_args device_model_args_pv
            device_model_args_hvm device_model device_model_user dm_restrict rdm rdm_mem_boundary mca_caps firmware_override gfx_passthru vif2
            """);
        Add(false, "it is for PVH guests, and this is a PV domain", "pvshim pvshim_path pvshim_cmdline pvshim_extra");
        Add(false, "it is for Arm", "gic_version vuart tee vpmu device_tree dtdev");
        Add(false, "vCPUs are threads that the host's Linux schedules; cgroups rule them, and cpus= says where they may run",
            "pool cpus_soft cpu_weight cap period slice latency extratime vnuma");
        Add(false, "there is no paravirtual framebuffer here; the guest has its console",
            "vfb vkb vdispl vnc vnclisten vncdisplay vncunused vncpasswd vncviewer sdl display xauthority opengl keymap");
        Add(false, "there is no paravirtual sound here", "vsnd");
        Add(false, "there are no XSM labels here", "seclabel init_seclabel");
        Add(false, "the guest reads the host's time-stamp counter, with Xen's clock beside it", "tsc_mode");
        Add(false, "the guest's memory map is one range of RAM", "e820_host");
        Add(false, "it is about PCI devices, which guests do not get here", "pci_permissive pci_msitranslate pci_seize pci_power_mgmt passthrough");
        Add(false, "domains do not serve other domains as back ends here", "driver_domain");
        Add(false, "no MSR that a PV guest does not know is answered", "msr_relaxed");
        Add(false, "guests suspend through control/shutdown", "xend_suspend_evtchn_compat");
        Add(false, "processor traces of guests are not taken here", "vmtrace_buf_kb");
        Add(true, "devices of the host are not passed through to guests here", "pci usbctrl usbdev ioports iomem irqs");
        Add(true, "there is no back end for it here", "vtpm p9 pvcalls");
        return fates.ToFrozenDictionary(StringComparer.Ordinal);

        void Add(bool refused, string reason, string keys)
        {
            foreach (string key in Words(keys))
                fates.Add(key, new SettingFate(refused, reason));
        }
    }

    private static string[] Words(string text) => text.Split([' ', '\n'], StringSplitOptions.RemoveEmptyEntries);
}
