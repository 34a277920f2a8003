// platform_op (7), sysctl (35), domctl (36) and others that only a toolstack or a device model can use.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>
/// Hypercalls that an unprivileged domain has no use for. What Xen looks at before it looks at who asks, it answers to everybody.
/// </summary>
internal static unsafe class PrivilegedOp
{
    /// <summary>XENPF_INTERFACE_VERSION, XEN_SYSCTL_INTERFACE_VERSION and XEN_DOMCTL_INTERFACE_VERSION of 4.17.</summary>
    private const uint PlatformVersion = 0x0300_0001, SysctlVersion = 0x15, DomctlVersion = 0x15;

    /// <summary>XEN_DOMCTL_shadow_op.</summary>
    private const uint ShadowOperation = 10;

    /// <summary>Buffers that a dm_op can have.</summary>
    private const uint MaxDmBuffers = 2;

    /// <summary>What platform_op, sysctl and domctl begin with.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 136)]
    private struct Request
    {
        public uint Command, Version;
    }

    /// <summary>struct xen_domctl.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 144)]
    private struct DomctlRequest
    {
        public uint Command, Version;
        public ushort Domain;
    }

    /// <summary>struct xen_dm_op_buf.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct DmBuffer
    {
        public ulong Address, Size;
    }

    /// <summary>For those that look at nothing before.</summary>
    public static long Refuse(Vcpu vcpu, in HypercallArguments arguments) => -(long)Errno.EPERM;

    /// <summary>platform_op(request).</summary>
    public static long Platform(Vcpu vcpu, in HypercallArguments arguments) => Refuse(vcpu, arguments.A0, PlatformVersion);

    /// <summary>sysctl(request).</summary>
    public static long Sysctl(Vcpu vcpu, in HypercallArguments arguments) => Refuse(vcpu, arguments.A0, SysctlVersion);

    /// <summary>domctl(request).</summary>
    public static long Domctl(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu.Context, arguments.A0, out DomctlRequest request))
            return -(long)Errno.EFAULT;
        if (request.Version != DomctlVersion)
            return -(long)Errno.EACCES;
        return -(long)(vcpu.Domain.Knows(request.Domain) ? Errno.EPERM : Errno.ESRCH);
    }

    /// <summary>paging_domctl_cont(request): the rest of an operation on a domain's shadow page tables.</summary>
    public static long PagingDomctlContinue(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu.Context, arguments.A0, out DomctlRequest request))
            return -(long)Errno.EFAULT;
        if (request.Version != DomctlVersion || request.Command != ShadowOperation)
            return -(long)Errno.EOPNOTSUPP;
        return -(long)(vcpu.Domain.Knows(request.Domain) ? Errno.EPERM : Errno.ESRCH);
    }

    /// <summary>xenpmu_op(command, argument): no hypervisor offers it that is not told to.</summary>
    public static long Xenpmu(Vcpu vcpu, in HypercallArguments arguments) => -(long)Errno.EOPNOTSUPP;

    /// <summary>dm_op(domain, number of buffers, buffers): only for the device model of an HVM domain.</summary>
    public static long Dm(Vcpu vcpu, in HypercallArguments arguments)
    {
        uint count = (uint)arguments.A1;
        if (count == 0)
            return -(long)Errno.ENODATA;
        if (count > MaxDmBuffers)
            return -(long)Errno.E2BIG;
        DmBuffer* buffers = stackalloc DmBuffer[(int)MaxDmBuffers];
        if (!GuestAccess.CopyFrom(vcpu.Context, arguments.A2, buffers, count * (ulong)sizeof(DmBuffer)))
            return -(long)Errno.EFAULT;
        ushort domain = (ushort)arguments.A0;
        return -(long)(!vcpu.Domain.Knows(domain) ? Errno.ESRCH : domain == vcpu.Domain.Id.Value ? Errno.EPERM : Errno.EINVAL);
    }

    private static long Refuse(Vcpu vcpu, ulong address, uint version)
    {
        if (!GuestAccess.Read(vcpu.Context, address, out Request request))
            return -(long)Errno.EFAULT;
        return -(long)(request.Version == version ? Errno.EPERM : Errno.EACCES);
    }
}
