// What each vCPU of the fuzz guest has to itself.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Fuzz;

/// <summary>The memory of a vCPU that makes calls.</summary>
internal sealed class FuzzVcpu(PvAssembler guest)
{
    public ulong Calls { get; } = guest.Reserve(FuzzMemory.MaxBatch * FuzzMemory.EntrySize, FuzzMemory.PageSize);

    /// <summary>The operation of each entry of the batch.</summary>
    public ulong Kinds { get; } = guest.Reserve(FuzzMemory.MaxBatch * 8);

    /// <summary>Calls made.</summary>
    public ulong Total { get; } = guest.Reserve(8);

    /// <summary>Where to go on after an exception, 0 where none is expected.</summary>
    public ulong Resume { get; } = guest.Reserve(8);

    /// <summary>Set by an exception.</summary>
    public ulong Faulted { get; } = guest.Reserve(8);

    /// <summary>Not 0 when all calls are made.</summary>
    public ulong Done { get; } = guest.Reserve(8);

    /// <summary>Counts of 32 bits, <see cref="FuzzMemory.ResultClasses"/> an operation.</summary>
    public ulong Histogram { get; } = guest.Reserve(FuzzMemory.HistogramSize);

    /// <summary>struct vcpu_guest_context that the vCPU starts with; the first one has no need of it.</summary>
    public ulong Context { get; } = guest.Reserve(GuestContextOffset.Size);

    public ulong StackTop { get; } = guest.Reserve(FuzzMemory.PageSize, FuzzMemory.PageSize) + FuzzMemory.PageSize;

    /// <summary>The calls' buffers.</summary>
    public ulong Buffers { get; } = guest.Reserve(FuzzMemory.MaxBatch * FuzzMemory.BufferSize, FuzzMemory.PageSize);

    /// <summary>A page that is not mapped: what is longer than a buffer does not reach another vCPU's memory.</summary>
    public ulong Guard { get; } = guest.Reserve(FuzzMemory.PageSize, FuzzMemory.PageSize);
}

/// <summary>The memory of a vCPU that only goes down whenever it was brought up.</summary>
/// <param name="guest">To reserve it from.</param>
/// <param name="id">Its number.</param>
internal sealed class FuzzBystander(PvAssembler guest, int id)
{
    public int Id { get; } = id;

    /// <summary>struct vcpu_guest_context, of which recipes write a part.</summary>
    public ulong Context { get; } = guest.Reserve(GuestContextOffset.Size);

    public ulong StackTop { get; } = guest.Reserve(512, 16) + 512;
}

/// <summary>Offsets in struct vcpu_guest_context (public arch-x86/xen.h) of a 64-bit guest.</summary>
internal static class GuestContextOffset
{
    public const int Flags = 512;
    public const int Rbx = 560;
    public const int Rip = 648;
    public const int Cs = 656;
    public const int Rflags = 664;
    public const int Rsp = 672;
    public const int Ss = 680;
    public const int Traps = 720;
    public const int LdtBase = 4816;
    public const int LdtEntries = 4824;
    public const int GdtFrames = 4832;
    public const int GdtEntries = 4960;
    public const int KernelSs = 4968;
    public const int KernelSp = 4976;
    public const int UserRoot = 4992;
    public const int KernelRoot = 5008;
    public const int EventCallback = 5112;
    public const int FailsafeCallback = 5120;
    public const int SyscallCallback = 5128;
    public const int Size = 5168;
}
