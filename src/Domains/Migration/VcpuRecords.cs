// What the vCPU records of an image hold beside the context: callbacks of 32-bit processes, and the extended state.
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;

namespace XenSharp.Domains.Migration;

/// <summary>The records of one vCPU, as they are read; null for what an image has not.</summary>
internal sealed class VcpuRecords
{
    /// <summary>Bytes of X86_PV_VCPU_EXTENDED at most, which grew with time.</summary>
    public const int MaxExtendedSize = 128;

    /// <summary>MSRs of a vCPU at most.</summary>
    public const int MaxMsrs = 64;

    /// <summary>XCR0 and the components that were ever in it, in front of the XSAVE area.</summary>
    public const int XsaveHeaderSize = 16;

    private const int LegacySize = 512;
    private const int HeaderSize = 64;
    private const int MxcsrOffset = 24;
    private const int CompactionOffset = 520;
    private const uint DefinedMxcsr = 0xffff;

    /// <summary>struct xen_domctl_ext_vcpucontext; what is left out of it is of machine checks.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 64)]
    private struct ExtendedContext
    {
        [FieldOffset(0)] public uint Vcpu;
        [FieldOffset(4)] public uint Size;
        [FieldOffset(8)] public ulong Syscall32Callback;
        [FieldOffset(16)] public ulong SysenterCallback;
        [FieldOffset(24)] public ushort Syscall32Cs;
        [FieldOffset(26)] public ushort SysenterCs;
        [FieldOffset(28)] public byte Syscall32DisablesEvents;
        [FieldOffset(29)] public byte SysenterDisablesEvents;
    }

    public byte[]? Basic { get; set; }

    public byte[]? Extended { get; set; }

    public byte[]? Xsave { get; set; }

    public byte[]? Msrs { get; set; }

    /// <summary>The body of X86_PV_VCPU_EXTENDED, without the head that all vCPU records have.</summary>
    public static unsafe byte[] CaptureExtended(Vcpu vcpu)
    {
        VcpuState* state = vcpu.Context->State;
        var context = new ExtendedContext
        {
            Vcpu = (uint)vcpu.Id,
            Size = (uint)sizeof(ExtendedContext),
            Syscall32Callback = state->Syscall32Callback,
            SysenterCallback = state->SysenterCallback,
            Syscall32Cs = FlatSelectors.Ring3Cs64,
            SysenterCs = FlatSelectors.Ring3Cs64,
            Syscall32DisablesEvents = (byte)((state->CallbackFlags & CallbackFlags.Syscall32DisablesEvents) != 0 ? 1 : 0),
            SysenterDisablesEvents = (byte)((state->CallbackFlags & CallbackFlags.SysenterDisablesEvents) != 0 ? 1 : 0),
        };
        return MemoryMarshal.AsBytes(new ReadOnlySpan<ExtendedContext>(ref context)).ToArray();
    }

    /// <summary>The body of X86_PV_VCPU_XSAVE; null for a vCPU that has no XSAVE.</summary>
    /// <param name="vcpu">The vCPU, at rest.</param>
    /// <param name="area">Its extended state.</param>
    public static unsafe byte[]? CaptureXsave(Vcpu vcpu, ReadOnlySpan<byte> area)
    {
        CpuidPolicy policy = vcpu.Domain.Cpuid;
        if (policy.MaxXcr0 == 0)
            return null;
        ulong xcr0 = vcpu.Context->State->Xcr0;

        // What the guest cannot have is in no use, but the host's own may show in the header.
        ulong inUse = BinaryPrimitives.ReadUInt64LittleEndian(area[LegacySize..]) & policy.MaxXcr0;
        ulong ever = xcr0 | inUse;
        byte[] body = new byte[XsaveHeaderSize + policy.Xstate.StandardSize(ever)];
        BinaryPrimitives.WriteUInt64LittleEndian(body, xcr0);
        BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(8), ever);
        Span<byte> saved = body.AsSpan(XsaveHeaderSize);
        area[..saved.Length].CopyTo(saved);
        saved.Slice(LegacySize, HeaderSize).Clear();
        BinaryPrimitives.WriteUInt64LittleEndian(saved[LegacySize..], inUse);
        return body;
    }

    /// <summary>The context; what the host cannot take of it is refused where it is loaded.</summary>
    public VcpuInitialisation.GuestContext ReadBasic() => MemoryMarshal.Read<VcpuInitialisation.GuestContext>(Basic);

    /// <summary>Loads what is beside the context into a vCPU that has it, and was never up.</summary>
    /// <exception cref="MigrationException">It is not what a vCPU here can have.</exception>
    public void Load(Vcpu vcpu, in VcpuInitialisation.GuestContext context)
    {
        LoadExtended(vcpu);
        if (Xsave is { Length: > 0 })
            LoadXsave(vcpu, Xsave);
        else if ((context.Flags & VcpuInitialisation.FpuValid) != 0)
            vcpu.Cpu.SetFpu(context.Fpu);
        CheckMsrs(vcpu);
    }

    private static MigrationException Refused(Vcpu vcpu, string how)
        => new($"The image is damaged, or of another kind of host: vCPU {vcpu.Id} {how}.");

    private unsafe void LoadExtended(Vcpu vcpu)
    {
        if (Extended is not { Length: > 0 })
            return;

        // Older ones are shorter.
        Span<byte> padded = stackalloc byte[MaxExtendedSize];
        padded.Clear();
        Extended.CopyTo(padded);
        ExtendedContext context = MemoryMarshal.Read<ExtendedContext>(padded);
        if (!new VirtualAddress(context.Syscall32Callback).IsCanonical || !new VirtualAddress(context.SysenterCallback).IsCanonical)
            throw Refused(vcpu, "has a callback for system calls of 32-bit processes at an address that is none");
        VcpuState* state = vcpu.Context->State;
        state->Syscall32Callback = context.Syscall32Callback;
        state->SysenterCallback = context.SysenterCallback;
        state->CallbackFlags |= (context.Syscall32DisablesEvents != 0 ? CallbackFlags.Syscall32DisablesEvents : CallbackFlags.None)
            | (context.SysenterDisablesEvents != 0 ? CallbackFlags.SysenterDisablesEvents : CallbackFlags.None);
    }

    private static unsafe void LoadXsave(Vcpu vcpu, byte[] body)
    {
        CpuidPolicy policy = vcpu.Domain.Cpuid;
        if (body.Length < XsaveHeaderSize + LegacySize + HeaderSize)
            throw Refused(vcpu, $"has an extended state of {body.Length} bytes");
        ulong xcr0 = BinaryPrimitives.ReadUInt64LittleEndian(body);
        ReadOnlySpan<byte> saved = body.AsSpan(XsaveHeaderSize);
        ulong inUse = BinaryPrimitives.ReadUInt64LittleEndian(saved[LegacySize..]);
        ulong lacking = (xcr0 | inUse) & ~policy.MaxXcr0;
        if (lacking != 0)
        {
            throw new MigrationException(
                $"vCPU {vcpu.Id} of the image uses parts of the extended state that this host's domains lack (XCR0 {lacking:x}). "
                + "Restore it on a host that has them.");
        }

        if (!policy.IsValidXcr0(xcr0))
            throw Refused(vcpu, $"has the value {xcr0:x} in XCR0, which no processor takes");
        uint needed = policy.Xstate.StandardSize(inUse);
        if (saved.Length < needed || saved[CompactionOffset..(LegacySize + HeaderSize)].ContainsAnyExcept((byte)0)
            || (BinaryPrimitives.ReadUInt32LittleEndian(saved[MxcsrOffset..]) & ~DefinedMxcsr) != 0)
            throw Refused(vcpu, "has an extended state that is not laid out as this processor's");
        byte[] area = new byte[ExtendedState.Size];
        saved[..(int)needed].CopyTo(area);
        vcpu.Cpu.SetXcr0(xcr0);
        if (!vcpu.Cpu.TrySetExtendedState(area))
            throw Refused(vcpu, "has an extended state that the processor does not take");
        vcpu.Context->State->Xcr0 = xcr0;
    }

    /// <summary>Those that Xen saves of a PV vCPU are not offered here: a guest that uses one has been shown another processor.</summary>
    private void CheckMsrs(Vcpu vcpu)
    {
        for (ReadOnlySpan<byte> left = Msrs; !left.IsEmpty; left = left[MigrationFormat.MsrSize..])
        {
            uint number = BinaryPrimitives.ReadUInt32LittleEndian(left);
            ulong value = BinaryPrimitives.ReadUInt64LittleEndian(left[8..]);
            if (value != 0)
            {
                throw new MigrationException(
                    $"vCPU {vcpu.Id} of the image uses the model-specific register {number:x}, which domains do not have here.");
            }
        }
    }
}
