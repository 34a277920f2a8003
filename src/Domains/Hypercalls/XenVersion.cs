// xen_version (17).
using System.Runtime.InteropServices;
using System.Text;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>What the hypervisor says of itself.</summary>
internal static unsafe class XenVersion
{
    /// <summary>The version that XenSharp's ABI follows: 4.17.</summary>
    public const uint Version = (4 << 16) | 17;

    private const int ExtraVersionSize = 16;
    private const int CompilerSize = 64;
    private const int CompiledBySize = 16;
    private const int CapabilitiesSize = 1024;
    private const int ChangesetSize = 64;

    private const string ExtraVersion = ".xensharp";
    private const string CompiledBy = "xensharp";
    private const string Changeset = "unavailable";

    /// <summary>What a domain gets that may not know.</summary>
    private const string Denied = "<denied>";
    private const string Capabilities = "xen-3.0-x86_64 ";

    private enum Command : uint
    {
        Version = 0,
        ExtraVersion = 1,
        CompileInfo = 2,
        Capabilities = 3,
        Changeset = 4,
        PlatformParameters = 5,
        GetFeatures = 6,
        PageSize = 7,
        GuestHandle = 8,
        CommandLine = 9,
        BuildId = 10,
    }

    private static string Compiler => $".NET {Environment.Version}";

    /// <summary>XENFEAT_* bits of feature map 0 (xen/features.h).</summary>
    [Flags]
    private enum Features : uint
    {
        PaePgdirAbove4Gb = 1 << 4,
        MmuPtUpdatePreserveAd = 1 << 5,
        HighmemAssist = 1 << 6,
        GnttabMapAvailBits = 1 << 7,
        MemoryOpVnodeSupported = 1 << 13,
        DirectMapped = 1 << 17,
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct FeatureInfo
    {
        public uint Index;
        public Features Map;
    }

    /// <summary>xen_version(command, argument).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        ulong argument = arguments.A1;
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Version:
                return Version;
            case Command.ExtraVersion:
                return CopyText(context, argument, ExtraVersionSize, ExtraVersion);
            case Command.CompileInfo:
                return CopyCompileInfo(context, argument);
            case Command.Capabilities:
                return CopyText(context, argument, CapabilitiesSize, Capabilities);
            case Command.Changeset:
                return CopyText(context, argument, ChangesetSize, Changeset);
            case Command.PlatformParameters:
                return GuestAccess.Write(context, argument, Paging.HypervisorVirtualStart) ? 0 : -(long)Errno.EFAULT;
            case Command.GetFeatures:
                return GetFeatures(context, argument);
            case Command.PageSize:
                return argument == 0 ? (long)Paging.PageSize : -(long)Errno.EINVAL;
            case Command.GuestHandle:
                return GuestAccess.CopyTo(context, argument, vcpu.Domain.Handle, 16) ? 0 : -(long)Errno.EFAULT;
            case Command.CommandLine:
                return CopyText(context, argument, Denied.Length + 1, Denied);
            case Command.BuildId:
                return -(long)Errno.EPERM;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    private static long GetFeatures(VcpuContext* context, ulong argument)
    {
        if (!GuestAccess.Read(context, argument, out FeatureInfo info))
            return -(long)Errno.EFAULT;
        if (info.Index != 0)
            return -(long)Errno.EINVAL;
        info.Map = Features.MemoryOpVnodeSupported | Features.MmuPtUpdatePreserveAd | Features.HighmemAssist
            | Features.GnttabMapAvailBits | Features.DirectMapped;
        if (context->Domain->State->Has(VmAssist.PaeExtendedCr3))
            info.Map |= Features.PaePgdirAbove4Gb;
        return GuestAccess.Write(context, argument, info) ? 0 : -(long)Errno.EFAULT;
    }

    /// <summary>struct xen_compile_info: compiler (64), by (16), domain (32), date (32).</summary>
    private static long CopyCompileInfo(VcpuContext* context, ulong argument)
    {
        long result = CopyText(context, argument, CompilerSize, Compiler);
        result = result == 0 ? CopyText(context, argument + 64, CompiledBySize, CompiledBy) : result;
        result = result == 0 ? CopyText(context, argument + 80, 32, string.Empty) : result;
        return result == 0 ? CopyText(context, argument + 112, 32, string.Empty) : result;
    }

    /// <summary>
    /// Extra version, compile_info, capabilities and changeset, one behind the other, as a core dump has them
    /// (struct xen_dumpcore_elfnote_xen_version_desc).
    /// </summary>
    internal static byte[] Texts()
    {
        const int compileInfoSize = 144;
        byte[] texts = new byte[ExtraVersionSize + compileInfoSize + CapabilitiesSize + ChangesetSize];
        Span<byte> rest = texts;
        FillText(rest[..ExtraVersionSize], ExtraVersion);
        rest = rest[ExtraVersionSize..];
        FillText(rest[..CompilerSize], Compiler);
        FillText(rest.Slice(CompilerSize, CompiledBySize), CompiledBy);
        rest = rest[compileInfoSize..];
        FillText(rest[..CapabilitiesSize], Capabilities);
        FillText(rest[CapabilitiesSize..], Changeset);
        return texts;
    }

    /// <summary>Fills a field with a text, padded with zeros and always ended by one.</summary>
    private static void FillText(Span<byte> field, string text)
    {
        field.Clear();
        _ = Encoding.ASCII.GetBytes(text.AsSpan(0, Math.Min(text.Length, field.Length - 1)), field);
    }

    /// <summary>Copies a text, padded with zeros to the size of its field and always ended by one.</summary>
    private static long CopyText(VcpuContext* context, ulong argument, int size, string text)
    {
        Span<byte> field = stackalloc byte[size];
        FillText(field, text);
        fixed (byte* bytes = field)
            return GuestAccess.CopyTo(context, argument, bytes, (ulong)size) ? 0 : -(long)Errno.EFAULT;
    }
}
