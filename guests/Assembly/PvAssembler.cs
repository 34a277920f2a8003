// The workbench for PV guests written in assembly: Iced's assembler, a data area, hypercalls, and the ELF image of it all.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Assembly;

/// <summary>How a guest enters the hypervisor.</summary>
public enum HypercallStyle
{
    /// <summary>The <c>syscall</c> instruction in the guest's own code; no HYPERCALL_PAGE note.</summary>
    Syscall,

    /// <summary>A call into a page that the hypervisor fills in, named by the HYPERCALL_PAGE note, as older kernels do.</summary>
    Page,
}

/// <summary>What the guest's ELF notes say of it, beyond the addresses that <see cref="PvAssembler"/> knows itself.</summary>
/// <param name="GuestOs">XEN_ELFNOTE_GUEST_OS.</param>
/// <param name="GuestVersion">XEN_ELFNOTE_GUEST_VERSION.</param>
/// <param name="Features">XEN_ELFNOTE_FEATURES: names separated by '|', a leading '!' makes one required.</param>
public sealed record GuestIdentity(string GuestOs, string GuestVersion = "0.1", string Features = "pae_pgdir_above_4gb");

/// <summary>
/// Assembles one 64-bit Xen PV guest. The image is a data segment at <see cref="ImageBase"/>, laid out as the program is
/// written so that its addresses are known at once, followed by the code.
/// </summary>
/// <remarks>
/// Absolute memory operands (<c>__qword_ptr[address]</c>) reach the whole image: it is in the top 2 GiB, where a 32-bit
/// displacement, sign-extended, suffices.
/// At the entry RSI holds the virtual address of struct start_info and RSP a boot stack of one page. Emitted routines keep the
/// System V convention: arguments in RDI, RSI, RDX; RBX, RBP and R12–R15 are preserved; the rest, and RCX and R11 by every
/// hypercall, may be lost.
/// </remarks>
public sealed class PvAssembler
{
    /// <summary>XEN_ELFNOTE_VIRT_BASE: the virtual address of pseudo-physical address 0.</summary>
    public const ulong VirtBase = 0xffffffff80000000;

    /// <summary>Virtual address of the first byte of the image.</summary>
    public const ulong ImageBase = VirtBase + 0x100000;

    const int PageSize = 4096;
    const int HypercallStubSize = 32;

    readonly HypercallStyle style;
    readonly ulong hypercallPage;

    /// <summary>The data as far as something is defined: megabytes may be reserved behind it, in each of many guests.</summary>
    readonly List<byte> data = [];
    int length;

    public PvAssembler(HypercallStyle style = HypercallStyle.Syscall)
    {
        this.style = style;
        if (style == HypercallStyle.Page)
            hypercallPage = Reserve(PageSize, PageSize);
    }

    /// <summary>The instructions so far; the first one emitted is the guest's entry.</summary>
    public Assembler Code { get; } = new(64);

    /// <summary>Reserves zeroed, writable memory.</summary>
    /// <param name="bytes">How much.</param>
    /// <param name="alignment">A power of two of at most 4096.</param>
    /// <returns>Its virtual address.</returns>
    public ulong Reserve(int bytes, int alignment = 8)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        if (alignment is < 1 or > PageSize || !int.IsPow2(alignment))
            throw new ArgumentOutOfRangeException(nameof(alignment), alignment, "The alignment must be a power of two from 1 to 4096.");
        int start = (length + alignment - 1) & -alignment;
        length = start + bytes;
        return ImageBase + (ulong)start;
    }

    /// <summary>Puts bytes into the writable data segment.</summary>
    /// <returns>Their virtual address.</returns>
    public ulong Define(ReadOnlySpan<byte> bytes, int alignment = 8)
    {
        ulong address = Reserve(bytes.Length, alignment);
        data.AddRange(Enumerable.Repeat((byte)0, (int)(address - ImageBase) - data.Count));
        data.AddRange(bytes);
        return address;
    }

    /// <summary>Reserves zeroed, writable memory up to an address; it takes no room in the file where nothing is defined behind it.</summary>
    /// <exception cref="InvalidOperationException">What was reserved before goes beyond <paramref name="start"/>.</exception>
    public void ReserveRange(ulong start, ulong end)
    {
        ulong used = ImageBase + (ulong)length;
        if (used > start)
            throw new InvalidOperationException($"The guest's data is {used - start} bytes too long.");
        length = (int)(end - ImageBase);
    }

    /// <summary>Emits the hypercall; the arguments are already in RDI, RSI, RDX, R10 and R8, the result comes in RAX.</summary>
    public void Hypercall(GuestHypercall number)
    {
        if (style == HypercallStyle.Page)
        {
            Code.call(hypercallPage + (ulong)number * HypercallStubSize);
            return;
        }
        Code.mov(eax, (uint)number);
        Code.syscall();
    }

    /// <summary>Emits SCHEDOP_shutdown (public sched.h), which does not return.</summary>
    public void Shutdown(GuestShutdownReason reason)
    {
        const int Shutdown = 2;
        ulong argument = Define(BitConverter.GetBytes((uint)reason), 4);
        Code.mov(edi, Shutdown);
        Code.mov(rsi, argument);
        Hypercall(GuestHypercall.SchedOp);
        // A hypervisor that lets a domain go on after its shutdown is broken; do not run into whatever follows.
        Code.ud2();
    }

    /// <summary>Assembles the code behind the data and writes the ELF file with its Xen notes.</summary>
    /// <exception cref="InvalidOperationException">Iced cannot encode the code, for example an undefined label.</exception>
    public byte[] Build(GuestIdentity identity)
    {
        ArgumentNullException.ThrowIfNull(identity);
        ulong codeBase = (ImageBase + (ulong)length + PageSize - 1) & ~(ulong)(PageSize - 1);
        MemoryStream code = new();
        try
        {
            RequirePlacedLabels();
            Code.Assemble(new StreamCodeWriter(code), codeBase);
        }
        catch (Exception e) when (e is ArgumentException or InvalidOperationException)
        {
            throw new InvalidOperationException($"The guest \"{identity.GuestOs}\" cannot be assembled: {e.Message}", e);
        }

        ElfWriter elf = new() { EntryPoint = codeBase };
        if (length != 0)
        {
            byte[] contents = [.. data];
            elf.AddSegment(new ElfSegment(ImageBase, ImageBase - VirtBase, ElfSegmentFlags.Read | ElfSegmentFlags.Write,
                contents.AsMemory(0, contents.AsSpan().LastIndexOfAnyExcept((byte)0) + 1), codeBase - ImageBase));
        }
        elf.AddSegment(new ElfSegment(codeBase, codeBase - VirtBase, ElfSegmentFlags.Read | ElfSegmentFlags.Execute,
            code.ToArray(), (ulong)code.Length));
        AddNotes(elf, identity, codeBase);
        return elf.ToArray();
    }

    // Iced takes a branch to a label that was never placed for one to a far address. It keeps a label's number as the IP of the
    // instruction it names and as the target of the branches to it.
    void RequirePlacedLabels()
    {
        HashSet<ulong> placed = [.. Code.Instructions.Select(instruction => instruction.IP)];
        foreach (Instruction instruction in Code.Instructions)
        {
            if (instruction.Op0Kind == OpKind.NearBranch64 && instruction.NearBranchTarget < ImageBase
                && !placed.Contains(instruction.NearBranchTarget))
                throw new InvalidOperationException($"a {instruction.Mnemonic} leads to a label that is not placed anywhere.");
        }
    }

    void AddNotes(ElfWriter elf, GuestIdentity identity, ulong entry)
    {
        void Text(XenElfNote note, string text) => elf.AddNote("Xen", (uint)note, text);
        void Number(XenElfNote note, ulong number) => elf.AddNote("Xen", (uint)note, number);

        Text(XenElfNote.XenVersion, "xen-3.0");
        Text(XenElfNote.GuestOs, identity.GuestOs);
        Text(XenElfNote.GuestVersion, identity.GuestVersion);
        Text(XenElfNote.Loader, "generic");
        Text(XenElfNote.Features, identity.Features);
        Text(XenElfNote.PaeMode, "yes");
        Number(XenElfNote.VirtBase, VirtBase);
        Number(XenElfNote.PaddrOffset, 0);
        Number(XenElfNote.Entry, entry);
        if (style == HypercallStyle.Page)
            Number(XenElfNote.HypercallPage, hypercallPage);
    }
}
