// What the hypervisor says of itself, and what it keeps from an unprivileged domain.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class HypervisorScript
{
    // XENVER_* of public version.h.
    private const int Version = 0;
    private const int ExtraVersion = 1;
    private const int CompileInfo = 2;
    private const int Capabilities = 3;
    private const int Changeset = 4;
    private const int PlatformParameters = 5;
    private const int GetFeatures = 6;
    private const int PageSize = 7;
    private const int GuestHandle = 8;
    private const int CommandLine = 9;
    private const int BuildId = 10;

    public static AbiScript CreateVersion() => new("xen-version", "xen_version", script =>
    {
        (int Command, string Name, int Size)[] texts =
        [
            (ExtraVersion, "extraversion", 16), (CompileInfo, "compile_info", 144), (Capabilities, "capabilities", 1024), (Changeset, "changeset", 64),
            (GuestHandle, "guest_handle", 16),
        ];
        script.Case("version", c =>
        {
            c.Hypercall(GuestHypercall.XenVersion, Version, 0);
            c.Hypercall(GuestHypercall.XenVersion, Version, BadAddress.NonCanonical);
            c.Hypercall(GuestHypercall.XenVersion, 0x1_0000_0000UL, 0);
        });
        script.Case("texts, each as long as its field", c =>
        {
            foreach ((int command, string name, int size) in texts)
            {
                ScriptBuffer text = c.Structure(name, size + 8, (size, 8, -1L));
                Say(c, command, name, text);
                c.Load(text[size]);
            }
        });
        script.Case("texts that end in their fields", c =>
        {
            foreach ((int command, string name, int size) in texts[..4])
            {
                ScriptBuffer text = c.Structure(name, size, (size - 1, 1, 0xff));
                Say(c, command, name, text);
                c.Load(text[size - 1], 1);
            }
        });
        script.Case("capabilities begin with the 64-bit PV ABI", c =>
        {
            ScriptBuffer text = c.Buffer("capabilities", 1024);
            Say(c, Capabilities, "capabilities", text);
            c.Load(text);
            c.Load(text[8], 4);
            c.Load(text[12], 2);
        });
        script.Case("places where they cannot be written", c =>
        {
            ScratchPage readOnly = c.ReadOnlyPageOf();
            ScratchPage unmapped = c.UnmappedPage();
            foreach ((int command, string name, int size) in texts)
            {
                Say(c, command, $"{name}, null", BadAddress.Null);
                Say(c, command, $"{name}, non-canonical", BadAddress.NonCanonical);
                Say(c, command, $"{name}, hypervisor's", BadAddress.Hypervisor);
                Say(c, command, $"{name}, read-only", readOnly.At);
                Say(c, command, $"{name}, unmapped", unmapped.At);
                Say(c, command, $"{name}, cut off", c.PageEnd(size - 1));
            }
        });
        script.Case("platform parameters", c =>
        {
            ScriptBuffer parameters = c.Buffer("parameters", 8);
            Say(c, PlatformParameters, "platform_parameters", parameters);
            c.Load(parameters);
            Say(c, PlatformParameters, "platform_parameters, null", BadAddress.Null);
            Say(c, PlatformParameters, "platform_parameters, cut off", c.PageEnd(4));
        });
        script.Case("features", c =>
        {
            const int dom0 = 1 << 11;
            const int enable = 0;
            const int disable = 1;
            const int paeExtendedCr3 = 3;
            ScriptBuffer features = c.Structure("features", 8, (4, 4, 0xffff_ffffU));
            foreach (int command in (int[])[disable, enable])
            {
                c.Hypercall(GuestHypercall.VmAssist, command, paeExtendedCr3);
                Say(c, GetFeatures, "get_features, submap 0", features);
                c.Show(((Value.Load(features) >> 32) & ~dom0).Named("features, but that of dom0"));
            }

            foreach (uint submap in (uint[])[1, 2, 0xffff_ffff])
            {
                ScriptBuffer other = c.Structure("features", 8, (0, 4, submap), (4, 4, 77));
                Say(c, GetFeatures, $"get_features, submap {submap}", other);
                c.Load(other[4], 4);
            }
        });
        script.Case("features that cannot be told", c =>
        {
            Say(c, GetFeatures, "get_features, null", BadAddress.Null);
            Say(c, GetFeatures, "get_features, non-canonical", BadAddress.NonCanonical);
            Say(c, GetFeatures, "get_features, cut off", c.PageEnd(4));
            Say(c, GetFeatures, "get_features, read-only", c.ReadOnlyPageOf().At);
        });
        script.Case("page size", c =>
        {
            c.Hypercall(GuestHypercall.XenVersion, PageSize, 0);
            Say(c, PageSize, "pagesize, a pointer", c.Buffer("text", 8));
            Say(c, PageSize, "pagesize, non-canonical", BadAddress.NonCanonical);
        });
        script.Case("unknown questions", c =>
        {
            foreach (long command in (long[])[11, 12, 255, -1])
                c.Hypercall(GuestCalls.XenVersion, $"xen_version({command})", AnswerFormat.Result, command, 0);
        });
    });

    public static AbiScript CreateUnprivileged() => new("xen-version-unprivileged", "xen_version", script =>
    {
        script.Case("the command line is kept from a domU", c =>
        {
            // "<denied>" and its end, and nothing more.
            ScriptBuffer text = c.Structure("text", 1032, (9, 1, 0x55));
            Say(c, CommandLine, "commandline", text);
            c.Load(text);
            c.Load(text[8], 2);
            Say(c, CommandLine, "commandline, null", BadAddress.Null);
            Say(c, CommandLine, "commandline, cut off", c.PageEnd(8));
            Say(c, CommandLine, "commandline, just long enough", c.PageEnd(9));
        });
        script.Case("the build's identity is kept from a domU", c =>
        {
            Say(c, BuildId, "build_id, null", BadAddress.Null);
            Say(c, BuildId, "build_id, a place", c.Structure("id", 64, (0, 4, 60)));
        });
    });

    public static AbiScript CreateUnknown() => new("unknown-hypercalls", "unknown hypercalls", script =>
    {
        script.Case("numbers that are not given out", c =>
        {
            foreach (long number in (long[])[11, 43, 44, 45, 46, 47, 50, 51, 52, 53, 54, 55, 56, 60, 63, 64, 65, 127, 128, 1000, int.MaxValue, 0xffff_ffff, -1, long.MinValue])
                Unknown(c, number);
        });
        script.Case("numbers whose hypercalls are gone", c =>
        {
            Unknown(c, (long)GuestHypercall.TmemOp);
        });
        script.Case("known numbers with high bits", c =>
        {
            Unknown(c, 0x1_0000_0000L | (long)GuestHypercall.XenVersion);
            Unknown(c, long.MinValue | (long)GuestHypercall.XenVersion);
        });
        script.Case("registers are kept", c =>
        {
            foreach (int number in (int[])[60, (int)GuestHypercall.XenVersion])
            {
                c.Kernel($"hypercall {number}", a =>
                {
                    a.mov(eax, number);
                    a.syscall();
                },
                show: [Register64.Rdi, Register64.Rsi, Register64.Rdx, Register64.R10, Register64.R8, Register64.R9, Register64.Rbp, Register64.R12, Register64.R13, Register64.R14, Register64.R15],
                with: [(Register64.Rdi, 0), (Register64.Rsi, 2), (Register64.Rdx, 3), (Register64.R10, 4), (Register64.R8, 5), (Register64.R9, 6), (Register64.Rbp, 7), (Register64.R12, 8), (Register64.R13, 9), (Register64.R14, 10), (Register64.R15, 11)]);
            }
        });
        script.Case("flags are kept", c =>
            c.Kernel("xen_version with flags", static a =>
            {
                a.mov(eax, (int)GuestHypercall.XenVersion);
                a.syscall();
            }, show: [Register64.Rflags], with: [(Register64.Rflags, 0x8d7)]));
    });

    public static AbiScript CreatePrivileged() => new("privileged-hypercalls", "privileged hypercalls", script =>
    {
        // XENPF_, XEN_SYSCTL_ and XEN_DOMCTL_INTERFACE_VERSION of 4.17.
        const int platformVersion = 0x0300_0001;
        const int sysctlVersion = 0x15;
        const int domctlVersion = 0x15;
        script.Case("requests that cannot be read", c =>
        {
            foreach (GuestHypercall number in (GuestHypercall[])[GuestHypercall.PlatformOp, GuestHypercall.Sysctl, GuestHypercall.Domctl, (GuestHypercall)49])
            {
                c.Hypercall(number, BadAddress.Null);
                c.Hypercall(number, BadAddress.NonCanonical);
                c.Hypercall(number, BadAddress.Hypervisor);
                c.Hypercall(number, c.PageEnd(16));
            }
        });
        script.Case("requests of another version", c =>
        {
            ScriptBuffer request = c.Structure("request", 256, (4, 4, 1));
            foreach (GuestHypercall number in (GuestHypercall[])[GuestHypercall.PlatformOp, GuestHypercall.Sysctl, GuestHypercall.Domctl, (GuestHypercall)49])
                c.Hypercall(number, request);
        });
        script.Case("requests of this version", c =>
        {
            c.Hypercall(GuestCalls.Number(GuestHypercall.PlatformOp), "platform_op(an unknown command)", AnswerFormat.Result,
                c.Structure("request", 256, (0, 4, 9999), (4, 4, platformVersion)));
            c.Hypercall(GuestCalls.Number(GuestHypercall.Sysctl), "sysctl(an unknown command)", AnswerFormat.Result,
                c.Structure("request", 256, (0, 4, 9999), (4, 4, sysctlVersion)));
            c.Hypercall(GuestCalls.Number(GuestHypercall.Domctl), "domctl(an unknown command, domain 0)", AnswerFormat.Result,
                c.Structure("request", 256, (0, 4, 9999), (4, 4, domctlVersion)));
            c.Hypercall(GuestCalls.Number(GuestHypercall.Domctl), "domctl(an unknown command, absent domain)", AnswerFormat.Result,
                c.Structure("request", 256, (0, 4, 9999), (4, 4, domctlVersion), (8, 2, DomainIds.Absent)));
        });
        script.Case("the rest", c =>
        {
            c.Hypercall(GuestHypercall.KexecOp, 0, BadAddress.Null);
            c.Hypercall(GuestHypercall.KexecOp, 99, BadAddress.Null);
            c.Hypercall(GuestHypercall.Mca, BadAddress.Null);
            c.Hypercall(GuestHypercall.HypfsOp, 0, 0, 0, 0, 0);
            c.Hypercall(GuestHypercall.HypfsOp, 99, 0, 0, 0, 0);
        });
    });

    public static AbiScript CreateOthers() => new("other-hypercalls", "other hypercalls", script =>
    {
        script.Case("xsm_op", c =>
        {
            c.Hypercall(GuestHypercall.XsmOp, BadAddress.Null);
            c.Hypercall(GuestHypercall.XsmOp, c.Buffer("request", 64));
        });
        script.Case("argo_op", c =>
        {
            c.Hypercall(GuestHypercall.ArgoOp, 1, 0, 0, 0, 0);
            c.Hypercall(GuestHypercall.ArgoOp, 99, 0, 0, 0, 0);
        });
        script.Case("xenpmu_op", c =>
        {
            c.Hypercall(GuestHypercall.XenpmuOp, 0, BadAddress.Null);
            c.Hypercall(GuestHypercall.XenpmuOp, 99, BadAddress.Null);
        });
        script.Case("dm_op", c =>
        {
            ScriptBuffer buffers = c.Buffer("buffers", 64);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 0, buffers);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 3, buffers);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 0xffff_ffffU, buffers);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 1, BadAddress.Null);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 1, BadAddress.NonCanonical);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 2, c.PageEnd(16));
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Absent, 1, buffers);
            c.Hypercall(GuestHypercall.DmOp, DomainIds.Self, 1, buffers);
        });
        script.Case("hvm_op: parameters of a domain that is no HVM domain", c =>
        {
            const int setParam = 0;
            const int getParam = 1;
            const int parameters = 39;
            foreach (int operation in (int[])[setParam, getParam])
            {
                c.Hypercall(GuestHypercall.HvmOp, operation, BadAddress.Null);
                c.Hypercall(GuestHypercall.HvmOp, operation, c.PageEnd(8));
                Hvm(c, operation, "self", c.Structure("parameter", 16, (0, 2, DomainIds.Self)));
                Hvm(c, operation, "absent domain", c.Structure("parameter", 16, (0, 2, DomainIds.Absent)));
                Hvm(c, operation, "an index too high", c.Structure("parameter", 16, (0, 2, DomainIds.Absent), (4, 4, parameters)));
            }
        });
        script.Case("hvm_op: the rest", c =>
        {
            const int flushTlbs = 5;
            const int pagetableDying = 9;
            const int getTime = 10;
            const int xentrace = 11;
            const int getMemType = 15;
            const int setUpcallVector = 23;
            const int guestRequest = 24;
            c.Hypercall(GuestHypercall.HvmOp, flushTlbs, 0);
            c.Hypercall(GuestHypercall.HvmOp, flushTlbs, 1);
            c.Hypercall(GuestHypercall.HvmOp, pagetableDying, BadAddress.Null);
            Hvm(c, pagetableDying, "absent domain", c.Structure("request", 16, (0, 2, DomainIds.Absent)));
            Hvm(c, pagetableDying, "self", c.Structure("request", 16, (0, 2, DomainIds.Self)));
            ScriptBuffer time = c.Buffer("time", 8);
            Value before = c.Keep(Value.SystemTime, "before");
            Hvm(c, getTime, "a place", time);
            c.Show(((Value.Load(time) - before + EventSteps.ClockTolerance) >> 63).Named("earlier than before"));
            c.Show(((Value.SystemTime - Value.Load(time) + EventSteps.ClockTolerance) >> 63).Named("later than after"));
            c.Hypercall(GuestHypercall.HvmOp, getTime, BadAddress.Null);
            c.Hypercall(GuestHypercall.HvmOp, xentrace, BadAddress.Null);
            Hvm(c, xentrace, "nothing", c.Buffer("trace", 32));
            Hvm(c, xentrace, "too much", c.Structure("trace", 32, (2, 2, 29)));
            c.Hypercall(GuestHypercall.HvmOp, getMemType, BadAddress.Null);
            Hvm(c, getMemType, "absent domain", c.Structure("request", 16, (0, 2, DomainIds.Absent)));
            c.Hypercall(GuestHypercall.HvmOp, setUpcallVector, BadAddress.Null);
            c.Hypercall(GuestHypercall.HvmOp, guestRequest, 0);
            c.Hypercall(GuestHypercall.HvmOp, guestRequest, 1);
            c.Hypercall(GuestHypercall.HvmOp, 255, 0);
            c.Hypercall(GuestHypercall.HvmOp, -1L, 0);
        });
    });

    public static AbiScript CreateConsole() => new("console-io", "console_io", script =>
    {
        const int write = 0;
        const int read = 1;
        script.Case("reading is not for a domU", c =>
        {
            ScriptBuffer text = c.Buffer("text", 16);
            c.Hypercall(GuestHypercall.ConsoleIo, read, 0, text);
            c.Hypercall(GuestHypercall.ConsoleIo, read, 0x8000_0000U, text);
        });
        script.Case("writing is not for a domU", c =>
        {
            c.Hypercall(GuestHypercall.ConsoleIo, write, 0, BadAddress.Null);
            c.Hypercall(GuestHypercall.ConsoleIo, write, 8, BadAddress.Null);
            c.Hypercall(GuestHypercall.ConsoleIo, write, 8, BadAddress.NonCanonical);
            c.Hypercall(GuestHypercall.ConsoleIo, write, 8, c.PageEnd(4));
            c.Hypercall(GuestHypercall.ConsoleIo, write, 1, c.Structure("text", 8, (0, 1, (int)'\n')));
        });
        script.Case("unknown commands", c =>
        {
            c.Hypercall(GuestHypercall.ConsoleIo, 2, 0, 0);
            c.Hypercall(GuestHypercall.ConsoleIo, -1L, 0, 0);
        });
    });

    private static void Say(AbiCase c, int command, string text, Value argument)
        => c.Hypercall(GuestCalls.XenVersion, $"xen_version({text})", AnswerFormat.Result, command, argument);

    private static void Unknown(AbiCase c, long number)
        => c.Hypercall(number, $"hypercall {Value.Constant((ulong)number, $"0x{number:x}").Text}", AnswerFormat.Result, 1, 2, 3, 4, 5, 6);

    private static void Hvm(AbiCase c, int operation, string text, Value argument)
        => c.Hypercall(GuestCalls.Number(GuestHypercall.HvmOp), $"hvm_op({operation}, {text})", AnswerFormat.Result, operation, argument);
}
