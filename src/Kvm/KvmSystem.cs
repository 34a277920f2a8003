using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Kvm;

/// <summary>/dev/kvm, opened and checked.</summary>
public sealed unsafe class KvmSystem : IDisposable
{
    private const int ApiVersion = 12;
    private int _file;

    private KvmSystem(int file, int runSize)
    {
        _file = file;
        RunSize = runSize;
    }

    /// <summary>Bytes of the kvm_run mapping.</summary>
    internal int RunSize { get; }

    internal int File => _file;

    /// <summary>Opens the device.</summary>
    /// <exception cref="KvmException">With a sentence that says what is missing and what to do.</exception>
    public static KvmSystem Open(string path = "/dev/kvm")
    {
        int file;
        byte* name = (byte*)Marshal.StringToCoTaskMemUTF8(path);
        try
        {
            file = LibC.open(name, LibC.O_RDWR | LibC.O_CLOEXEC);
        }
        finally
        {
            Marshal.FreeCoTaskMem((nint)name);
        }

        if (file < 0)
        {
            int error = LibC.errno;
            throw error switch
            {
                _ when error == LibC.ENOENT || error == LibC.ENXIO || error == LibC.ENODEV => new KvmException(
                    $"{path} does not exist: this machine offers no KVM. Load the kvm_intel or kvm_amd module, or turn on "
                    + "virtualization in the firmware (or nested virtualization in the hypervisor that runs this machine)"),
                _ when error == LibC.EACCES || error == LibC.EPERM => new KvmException(
                    $"No permission to open {path}: run as root, or join the group that owns it (usually: sudo usermod -aG kvm $USER, "
                    + "then log in again)"),
                _ => new KvmException($"Cannot open {path}", error),
            };
        }

        try
        {
            int version = LibC.ioctl(file, KvmRequest.GetApiVersion);
            if (version < 0)
                throw new KvmException($"{path} is not a KVM device: name the one that the kernel makes, usually /dev/kvm");
            if (version != ApiVersion)
                throw new KvmException($"{path} speaks KVM API version {version}; XenSharp needs version {ApiVersion}");
            foreach (KvmCapability needed in (ReadOnlySpan<KvmCapability>)[KvmCapability.UserMemory, KvmCapability.ImmediateExit])
            {
                if (LibC.ioctl(file, KvmRequest.CheckExtension, (int)needed) <= 0)
                    throw new KvmException($"This kernel's KVM lacks KVM_CAP {needed}: a newer Linux kernel is needed");
            }

            const int all = (int)(KvmSyncRegs.Regs | KvmSyncRegs.Sregs | KvmSyncRegs.Events);
            if ((LibC.ioctl(file, KvmRequest.CheckExtension, (int)KvmCapability.SyncRegs) & all) != all)
                throw new KvmException("This kernel's KVM lacks KVM_CAP_SYNC_REGS for x86: Linux 4.17 or newer is needed");
            int runSize = LibC.ioctl(file, KvmRequest.GetVcpuMmapSize);
            if (runSize < sizeof(KvmRun))
                throw new KvmException("KVM_GET_VCPU_MMAP_SIZE failed", LibC.errno);
            return new KvmSystem(file, runSize);
        }
        catch
        {
            _ = LibC.close(file);
            throw;
        }
    }

    internal int CheckExtension(KvmCapability capability) => LibC.ioctl(_file, KvmRequest.CheckExtension, (int)capability);

    public void Dispose()
    {
        int file = Interlocked.Exchange(ref _file, -1);
        if (file >= 0)
            _ = LibC.close(file);
    }
}
