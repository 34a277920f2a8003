using System.Runtime.Intrinsics.X86;
using Tmds.Linux;

namespace XenSharp.Kvm;

/// <summary>The host's time-stamp counter, which .NET has no intrinsic for: three instructions in a page of our own.</summary>
public static unsafe class HostClock
{
    // rdtsc; shl rdx, 32; or rax, rdx; ret
    private static ReadOnlySpan<byte> ReadTscCode => [0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0xc3];

    /// <summary>The instructions themselves, for who may not go through managed code.</summary>
    internal static readonly delegate* unmanaged[SuppressGCTransition]<ulong> ReadTsc = Load();

    /// <summary>RDTSC on this processor.</summary>
    public static ulong TimeStampCounter => ReadTsc();

    /// <summary>CPUID.1:ECX.XSAVE of the host.</summary>
    internal static bool HasXsave => (X86Base.CpuId(1, 0).Ecx & (1 << 26)) != 0;

    private static delegate* unmanaged[SuppressGCTransition]<ulong> Load()
    {
        const int pageSize = 4096;
        void* page = LibC.mmap(null, pageSize, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS, -1, 0);
        if (page == LibC.MAP_FAILED)
            throw new KvmException("Cannot map a page of code", LibC.errno);
        ReadTscCode.CopyTo(new Span<byte>(page, pageSize));
        if (LibC.mprotect(page, pageSize, LibC.PROT_READ | LibC.PROT_EXEC) != 0)
            throw new KvmException("This host forbids executable pages that a program makes (check its security policy)", LibC.errno);
        return (delegate* unmanaged[SuppressGCTransition]<ulong>)page;
    }
}
