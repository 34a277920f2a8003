// The monitor's instructions, assembled with Iced.
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>
/// The code that runs at CPL 0 inside a VM: entries from the guest, each a single <c>out</c> that names what happened, and
/// the gadgets of the way back.
/// </summary>
/// <remarks>
/// The way back is a chain on the vCPU's return area: RIP is set to the first gadget, RSP to its operands, each gadget pops
/// what it needs and returns into the next, and the last ends in IRETQ. So page-table stores, a root change and the return
/// to the guest cost one KVM_RUN, and on a KVM that interprets CPL 0 code (0.7 µs an instruction) no instruction is executed
/// that is not needed.
/// </remarks>
internal sealed class MonitorCode
{
    /// <summary>Most single stores in one gadget.</summary>
    public const int MaxStores = 128;

    /// <summary>Most runs of neighbouring stores in one gadget.</summary>
    public const int MaxRuns = 32;

    /// <summary>Most neighbouring entries in one locked run: a page table.</summary>
    public const int MaxLockedRun = 512;

    private MonitorCode(byte[] bytes) => Bytes = bytes;

    /// <summary>The code page(s), to be placed at the address given to <see cref="Assemble"/>.</summary>
    public byte[] Bytes { get; }

    /// <summary>First exception stub; the others follow at <see cref="MonitorLayout.StubSize"/>.</summary>
    public ulong ExceptionStubs { get; private init; }

    /// <summary>Pops RCX, then <c>iretq</c>: the end of every chain.</summary>
    public ulong RestoreAndIret { get; private init; }

    /// <summary>Pops a page-table root, loads CR3 with it, goes on.</summary>
    public ulong LoadRoot { get; private init; }

    /// <summary>Pops an address, drops the translations of its page, goes on.</summary>
    public ulong InvalidatePage { get; private init; }

    /// <summary>Pops the address for <see cref="LockedRun"/>, goes on.</summary>
    public ulong PopAddress { get; private init; }

    private ulong LockedRunEnd { get; init; }

    private ulong LockedRunLength { get; init; }

    private ulong StoresEnd { get; init; }

    private ulong StoreLength { get; init; }

    private ulong FinalStoresEnd { get; init; }

    private ulong RunsEnd { get; init; }

    private ulong RunLength { get; init; }

    /// <summary>Pops <paramref name="count"/> addresses and stores each entry over itself, then goes on.</summary>
    public ulong Stores(int count) => StoresEnd - ((ulong)count * StoreLength);

    /// <summary>The same, followed by what <see cref="RestoreAndIret"/> does.</summary>
    public ulong FinalStores(int count) => FinalStoresEnd - ((ulong)count * StoreLength);

    /// <summary>
    /// Pops <paramref name="count"/> pairs of address and entry count, stores each run over itself, pops RDI and RSI, goes on.
    /// </summary>
    public ulong Runs(int count) => RunsEnd - ((ulong)count * RunLength);

    /// <summary>Stores <paramref name="count"/> neighbouring entries from <see cref="PopAddress"/>'s on over themselves, goes on.</summary>
    public ulong LockedRun(int count) => LockedRunEnd - ((ulong)count * LockedRunLength);

    /// <summary>Assembles all supervisor code for the given virtual address.</summary>
    public static MonitorCode Assemble(ulong address)
    {
        var code = new Assembler(64);
        Label stubs = Here(code);
        for (int vector = 0; vector < MonitorLayout.Vectors; vector++)
        {
            code.@out((byte)vector, al);
            code.ud2();
        }

        Label loadRoot = Here(code);
        code.pop(rcx);
        code.mov(cr3, rcx);
        code.ret();

        Label invalidatePage = Here(code);
        code.pop(rcx);
        code.invlpg(__[rcx]);
        code.ret();

        Label stores = Here(code);
        UnrollStores(code);
        Label storesEnd = Here(code);
        code.ret();

        UnrollStores(code);
        Label restoreAndIret = Here(code);
        code.pop(rcx);
        code.iretq();

        Label runs = Here(code);
        for (int i = 0; i < MaxRuns; i++)
        {
            code.pop(rdi);
            code.pop(rcx);
            code.mov(rsi, rdi);
            code.rep.movsq();
        }

        Label runsEnd = Here(code);
        code.pop(rdi);
        code.pop(rsi);
        code.ret();

        Label popAddress = Here(code);
        code.pop(rcx);
        code.ret();

        // Backwards, so that any number of entries ends with the first.
        Label lockedRun = Here(code);
        for (int i = MaxLockedRun - 1; i >= 0; i--)
            EmitLockedStore(code, i * sizeof(ulong));
        Label lockedRunEnd = Here(code);
        code.ret();

        byte[] bytes = Emit(code, address, out AssemblerResult result);
        ulong storesEndAt = result.GetLabelRIP(storesEnd);
        ulong lockedRunEndAt = result.GetLabelRIP(lockedRunEnd);
        ulong runsEndAt = result.GetLabelRIP(runsEnd);
        return new MonitorCode(bytes)
        {
            ExceptionStubs = result.GetLabelRIP(stubs),
            LoadRoot = result.GetLabelRIP(loadRoot),
            InvalidatePage = result.GetLabelRIP(invalidatePage),
            RestoreAndIret = result.GetLabelRIP(restoreAndIret),
            PopAddress = result.GetLabelRIP(popAddress),
            LockedRunEnd = lockedRunEndAt,
            LockedRunLength = (lockedRunEndAt - result.GetLabelRIP(lockedRun)) / MaxLockedRun,
            StoresEnd = storesEndAt,
            StoreLength = (storesEndAt - result.GetLabelRIP(stores)) / MaxStores,
            FinalStoresEnd = result.GetLabelRIP(restoreAndIret),
            RunsEnd = runsEndAt,
            RunLength = (runsEndAt - result.GetLabelRIP(runs)) / MaxRuns,
        };
    }

    /// <summary>
    /// <c>lock or qword [rcx + offset], 0</c> with an offset of four bytes always, so that all are equally long.
    /// </summary>
    private static void EmitLockedStore(Assembler code, int offset)
    {
        const int offsetSize = 8; // Iced's name for the long form in 64-bit code
        var entry = new MemoryOperand(Register.RCX, offset, offsetSize);
        Instruction store = Instruction.Create(Iced.Intel.Code.Or_rm64_imm8, entry, 0);
        store.HasLockPrefix = true;
        code.AddInstruction(store);
    }

    private static void UnrollStores(Assembler code)
    {
        for (int i = 0; i < MaxStores; i++)
        {
            code.pop(rcx);

            // Locked, so that another processor's Accessed and Dirty bits are not undone; the value is not changed.
            code.@lock.or(__qword_ptr[rcx], 0);
        }
    }

    /// <summary>A label for what is assembled next.</summary>
    internal static Label Here(Assembler code)
    {
        Label label = code.CreateLabel();
        code.Label(ref label);
        return label;
    }

    /// <summary>The bytes of what was assembled, for an address.</summary>
    internal static byte[] Emit(Assembler code, ulong address, out AssemblerResult result)
    {
        using var stream = new MemoryStream();
        result = code.Assemble(new StreamCodeWriter(stream), address, BlockEncoderOptions.ReturnNewInstructionOffsets);
        return stream.ToArray();
    }
}
