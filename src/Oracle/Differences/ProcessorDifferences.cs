// Known differences of the scripts in guests/Scripts/Processor.
namespace XenSharp.Oracle.Differences;

internal static class ProcessorDifferences
{
    private const string QemuCanonical =
        "QEMU's software CPU finds out at the fetch that the target of a jump is not canonical; hardware raises #GP at the jump.";

    private const string QemuStackFault =
        "QEMU's software CPU raises #GP for every address that is not canonical; hardware raises #SS where the stack segment is used.";

    private const string QemuSimd =
        "QEMU's software CPU never raises #XM; hardware does.";

    private const string QemuAlignment =
        "QEMU's software CPU does not check alignment; hardware does at CPL 3, with CR0.AM, which Xen sets.";

    private const string QemuSoftwareInterrupt =
        "QEMU's software CPU names vector 2n in the error code where hardware names n (AMD64 manual volume 2, 8.4.1): XenSharp answers as Xen on hardware does.";

    private const string HostNestedTask =
        "A KVM without hardware underneath enters the guest without the NT flag.";

    private const string HostSelectors =
        "A KVM without hardware underneath runs the guest with the host's own descriptor table: native instructions find the host's selectors there, not Xen's or the guest's.";

    private const string HostSelectorRead =
        "Where KVM emulates the load of a selector, the segment is loaded, but a native read of the register shows what the hardware has there.";

    private const string QemuFsBase =
        "QEMU's software CPU lets WRFSBASE take any address; hardware raises #GP for one that is not canonical.";

    private const string HostStackSegment =
        "A KVM that emulates the load of SS does not hold a single step off behind it, as the processor does.";

    private const string QemuLock =
        "QEMU's software CPU raises #GP for a privileged instruction with LOCK, of which Xen's emulation makes the #UD that hardware raises at once.";

    private const string HostFsgsbase =
        "A KVM without hardware underneath runs guests with the host's CR4, where FSGSBASE is set.";

    private const string HostXcr0 =
        "XGETBV at CPL 3 shows the host's XCR0 on a KVM without hardware underneath.";

    private const string HostTimeStamp =
        "CR4.TSD has no effect on this host's KVM; xensharp info says so.";

    private const string HostTaskSwitched =
        "CR0.TS has no effect on this host's KVM; xensharp info says so.";

    private const string HostBreakpoints =
        "Debug registers have no effect on this host's KVM; xensharp info says so.";

    private const string IntelSyscall =
        "Processors of Intel's have no SYSCALL in 32-bit code, and raise #UD, under Xen too; the recorded Xen ran on one of AMD's.";

    private const string Timer =
        "A domU of Xen's has no timer at these ports and reads ones. XenSharp's answers, because kernels that measure by it would ask 100,000 times, and here each time leaves the VM.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByHost(
            "exceptions-kernel", "#GP without a selector",
            "kernel: jump to a non-canonical address, rcx 0x8000000000000000",
            "#GP(0){rip code, cs e030, rflags 202, same stack, ss e02b, mask 0->0}",
            QemuCanonical),
        KnownDifference.ByHost(
            "exceptions-kernel", "#SS: the stack at a non-canonical address",
            "kernel: load by rbp from a non-canonical address, rbp 0x8000000000000000",
            "#SS(0){rip code, cs e030, rflags 202, same stack, ss e02b, mask 0->0}",
            QemuStackFault),
        KnownDifference.ByHost(
            "exceptions-kernel", "#XM of an unmasked SIMD exception",
            "kernel: divide by 0 with the exception unmasked, rcx mxcsr",
            "#XM{rip code+0xf, cs e030, rflags 202, same stack, ss e02b, mask 0->0}",
            QemuSimd),
        KnownDifference.ByHost(
            "exceptions-kernel", "#AC with AC set",
            "kernel: load of eight bytes that are not aligned, rflags 0x40002",
            "#AC(0){rip code, cs e030, rflags 40202, same stack, ss e02b, mask 0->0}",
            QemuAlignment),
        KnownDifference.ByHost(
            "exceptions-user", "#GP without a selector",
            "user: jump to a non-canonical address, rcx 0x8000000000000000",
            "#GP(0){rip code, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuCanonical),
        KnownDifference.ByHost(
            "exceptions-user", "#SS: the stack at a non-canonical address",
            "user: load by rbp from a non-canonical address, rbp 0x8000000000000000",
            "#SS(0){rip code, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuStackFault),
        KnownDifference.ByHost(
            "exceptions-user", "#XM of an unmasked SIMD exception",
            "user: divide by 0 with the exception unmasked, rcx mxcsr",
            "#XM{rip code+0xf, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuSimd),
        KnownDifference.ByHost(
            "exceptions-user", "#AC with AC set",
            "user: load of eight bytes that are not aligned, rflags 0x40002",
            "#AC(0){rip code, cs e033, rflags 40002, kernel stack, ss e02b, mask 1->1}",
            QemuAlignment),
        KnownDifference.ByHost(
            "system-calls", "int n that the entry's level does not allow",
            "kernel: int 0x31",
            "#GP(18a){rip code, cs e030, rflags 202, same stack, ss e02b, mask 0->0}",
            QemuSoftwareInterrupt),
        KnownDifference.ByHost(
            "system-calls", "int n that the entry's level does not allow",
            "user: int 0x31",
            "#GP(18a){rip code, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuSoftwareInterrupt),
        KnownDifference.ByHost(
            "system-calls", "int n without an entry",
            "user: int 0x32",
            "#GP(192){rip code, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuSoftwareInterrupt),
        KnownDifference.ByHost(
            "system-calls", "int 0x82, the hypercall gate of 32-bit guests",
            "user: int 0x82",
            "vector 0x82{rip code+0x2, cs e033, rflags 2, kernel stack, ss e02b, mask 1->1}",
            QemuSoftwareInterrupt),
        KnownDifference.ByHost(
            "system-calls", "int 0x82, the hypercall gate of 32-bit guests",
            "kernel: int 0x82",
            "vector 0x82{rip code+0x2, cs e030, rflags 2, same stack, ss e02b, mask 1->1}",
            QemuSoftwareInterrupt),
        KnownDifference.ByHost(
            "iret", "flags that the guest cannot have are dropped",
            "kernel: iret to kernel code, rflags 0x4202 NT, rdx 0x4202, rbx 0xe02b, rsi 0xe030, r8 0x1111, r9 0x2222, r10 0, r12 0x3333",
            "rax 0x1111, rcx 0x2222, r11 0x3333, rflags 0x202",
            HostNestedTask),
        KnownDifference.ByHost(
            "stack-switch", "any selector is taken, and the flat one is what the kernel runs with",
            "kernel: mov eax, ss",
            "rax 43",
            HostSelectors),
        KnownDifference.ByHost(
            "set-segment-base", "GS of user mode by its selector",
            "user: mov eax, gs",
            "rax 0",
            HostSelectorRead),
        KnownDifference.ByHost(
            "set-segment-base", "bases that the guest writes itself",
            "kernel: wrfsbase, not canonical, rcx noncanonical",
            "#GP(0){rip code, cs e030, rflags 2, same stack, ss e02b, mask 1->1}",
            QemuFsBase),
        KnownDifference.ByHost(
            "set-segment-base", "without CR4.FSGSBASE there are no such instructions",
            "kernel: rdfsbase",
            "done",
            HostFsgsbase),
        KnownDifference.ByHost(
            "set-segment-base", "without CR4.FSGSBASE there are no such instructions",
            "user: wrgsbase",
            "done",
            HostFsgsbase),
        KnownDifference.ByHost(
            "selectors", "what was loaded is read back",
            "kernel: mov ds, ecx; mov eax, ds, rcx 0xe02b",
            "rax 0",
            HostSelectorRead),
        KnownDifference.ByHost(
            "selectors", "selectors that a bare Linux has, and no guest has installed",
            "kernel: retfq to cs 0x33",
            "#UD{rip code+0x10, cs e030, rflags 2, same stack, ss e02b, mask 1->1}",
            HostSelectors),
        KnownDifference.ByHost(
            "selectors", "selectors that a bare Linux has, and no guest has installed",
            "kernel: mov ds, ecx, rcx 43",
            "done",
            HostSelectors),
        KnownDifference.ByHost(
            "selectors", "selectors that a bare Linux has, and no guest has installed",
            "kernel: mov ss, ecx, rcx 43",
            "done",
            HostSelectors),
        KnownDifference.ByHost(
            "selectors", "questions about selectors",
            "kernel: lar, verr, verw, rcx 0xe02b",
            "rax 0, rdx 0, rbx 0, rsi 0",
            HostSelectors),
        KnownDifference.ByHost(
            "selectors", "questions about selectors",
            "kernel: lar, verr, verw, rcx 0xe033",
            "rax 0, rdx 0, rbx 0, rsi 0",
            HostSelectors),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's global table",
            "kernel: mov fs, ecx; mov eax, fs, rcx 323",
            "rax 0",
            HostSelectorRead),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's global table",
            "kernel: lar, rcx 267",
            "rax 0",
            HostSelectors),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's global table",
            "user: mov eax, gs",
            "rax 0",
            HostSelectorRead),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's local table",
            "kernel: mov fs, ecx; mov eax, fs, rcx 327",
            "rax 0",
            HostSelectorRead),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's local table",
            "kernel: lar, rcx 271",
            "rax 0",
            HostSelectors),
        KnownDifference.ByHost(
            "descriptor-table-selectors", "selectors of the guest's local table",
            "user: mov eax, gs",
            "rax 0",
            HostSelectorRead),
        .. new (string Case, string Step)[]
        {
            ("prefixes of in and out", "lock in al, dx, rax 0x1122334455667788, rcx 3, rdx 32"),
            ("prefixes of in and out", "lock in al, 0x20, rax 0x1122334455667788, rcx 3, rdx 32"),
            ("prefixes of in and out", "lock out dx, al, rax 0x1122334455667788, rcx 3, rdx 32"),
            ("operand and address sizes of string input", "lock insb, rcx 1, rdx 32, rdi area"),
            ("control registers", "lock mov rax, cr0, rax 0x1122334455667788"),
            ("other instructions with prefixes", "lock wbinvd, rax 0"),
            ("other instructions with prefixes", "lock clts, rax 0"),
            ("rdmsr and wrmsr with prefixes", "lock rdmsr, rax 0x112345678, rcx 0xc0000100, rdx 0xff00000000"),
        }.Select(static form => KnownDifference.ByHost(
            "instruction-forms", form.Case, $"kernel: {form.Step}",
            "#GP(0){rip code, cs e030, rflags 2, same stack, ss e02b, mask 1->1}", QemuLock)),
        .. new (string Case, string Step, string Answer)[]
        {
            ("with its callback", "32-bit code: syscall, rdx 514, rbx 0xe02b, rbp 0x400700, rsi 0xe023, rdi 0x400800", "0x400800, cs e023, rflags 202, kernel"),
            ("with its callback", "32-bit code: stc; std; syscall, rdx 514, rbx 0xe02b, rbp 0x400700, rsi 0xe023, rdi 0x400800", "0x400802, cs e023, rflags 603, kernel"),
            ("with its callback", "32-bit code: syscall, events masked before, rdx 514, rbx 0xe02b, rbp 0x400700, rsi 0xe023, rdi 0x400800", "0x400800, cs e023, rflags 202, kernel"),
            ("its flag is that of 64-bit system calls", "32-bit code: syscall, rdx 514, rbx 0xe02b, rbp 0x400700, rsi 0xe023, rdi 0x400800", "0x400800, cs e023, rflags 202, kernel"),
            ("from 32-bit code of kernel mode it is no hypercall", "32-bit code of kernel mode: syscall, rdx 514, rbx 0xe02b, rbp 0x400700, rsi 0xe020, rdi 0x400800", "0x400800, cs e020, rflags 202, same"),
        }.Select(static call => KnownDifference.ByHost(
            "compat-system-calls", call.Case, $"kernel: {call.Step}", $"#UD{{rip {call.Answer} stack, ss e02b, mask 0->0}}", IntelSyscall)),
        KnownDifference.ByHost(
            "instruction-forms", "a trap after each emulated instruction",
            "kernel: popf with TF; mov ss, ecx, flat; nop, rcx 0xe02b",
            "#DB{rip code+0xb, cs e030, rflags 102, same stack, ss e02b, mask 1->1}",
            HostStackSegment),
        KnownDifference.ByHost(
            "privileged-instructions", "xsetbv",
            "kernel: xsetbv(0) of x87 and SSE; xgetbv",
            "rax 231, rdx 0",
            HostXcr0),
        KnownDifference.ByHost(
            "control-registers", "CR4",
            "user: rdtsc, TSD set",
            "done",
            HostTimeStamp),
        KnownDifference.ByHost(
            "control-registers", "#NM with TS set, which clears it",
            "kernel: fnop",
            "done",
            HostTaskSwitched),
        KnownDifference.ByHost(
            "control-registers", "#NM with TS set, which clears it",
            "kernel: xorps xmm0, xmm0, resumed",
            "done",
            HostTaskSwitched),
        KnownDifference.ByHost(
            "control-registers", "#NM with TS set, which clears it",
            "kernel: mov rax, cr0",
            "rax 0x8005003b",
            HostTaskSwitched),
        KnownDifference.ByHost(
            "control-registers", "#NM with TS set, which clears it",
            "user: fnop",
            "done",
            HostTaskSwitched),
        KnownDifference.ByHost(
            "control-registers", "#NM with TS set, which clears it",
            "user: xorps xmm0, xmm0, resumed",
            "done",
            HostTaskSwitched),
        KnownDifference.ByHost(
            "debug-registers", "a breakpoint on an instruction, returned to",
            "kernel: breakpoint on the third instruction from here",
            "done",
            HostBreakpoints),
        KnownDifference.ByHost(
            "debug-registers", "a breakpoint on an instruction, returned to",
            "get_debugreg(6)",
            "0xffff0ff0",
            HostBreakpoints),
        KnownDifference.ByHost(
            "debug-registers", "a breakpoint on data",
            "kernel: load; store; nop, rcx watched",
            "done",
            HostBreakpoints),
        KnownDifference.ByHost(
            "debug-registers", "a breakpoint on data",
            "get_debugreg(6)",
            "0xffff0ff0",
            HostBreakpoints),
        KnownDifference.ByDesign(
            "io-ports", "the speaker's gate and data bits",
            "kernel: in al, 0x61, bits 0 and 1",
            "rax 0",
            Timer),
        KnownDifference.ByDesign(
            "io-ports", "the speaker's gate and data bits",
            "kernel: in al, 0x61, bits 0 and 1",
            "rax 1",
            Timer),
        KnownDifference.ByDesign(
            "io-ports", "the speaker's gate and data bits",
            "kernel: in al, 0x61, bits 0 and 1",
            "rax 2",
            Timer),
        KnownDifference.ByDesign(
            "io-ports", "channel 2 of the timer: mode and status",
            "kernel: in al, 0x42, the status without OUT",
            "rax 48",
            Timer),
        KnownDifference.ByDesign(
            "io-ports", "channel 2 of the timer: mode and status",
            "kernel: in al, 0x43",
            "rax 0",
            Timer),
    ];
}
