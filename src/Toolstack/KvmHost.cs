// This machine's KVM, as the command uses it: opened and probed when first asked for, and once only.

using XenSharp.Kvm;

namespace XenSharp.Toolstack;

/// <summary>The KVM device and what the probes found out about it. May be used by any thread.</summary>
/// <remarks>Nothing is opened before the first use: <c>xensharp --help</c> must work, and at once, where there is no KVM.</remarks>
/// <param name="device">Path of the device.</param>
public sealed class KvmHost(string device = KvmHost.DefaultDevice) : IDisposable
{
    /// <summary>Where Linux has the device.</summary>
    public const string DefaultDevice = "/dev/kvm";

    private readonly Lock _lock = new();
    private KvmSystem? _kvm;
    private HostCapabilities? _capabilities;
    private bool _disposed;

    /// <summary>Path of the device.</summary>
    public string Device { get; } = device;

    /// <summary>The open device.</summary>
    /// <exception cref="KvmException">It cannot be opened; the message is a sentence that says what to do.</exception>
    public KvmSystem Kvm
    {
        get
        {
            lock (_lock)
            {
                ObjectDisposedException.ThrowIf(_disposed, this);
                return _kvm ??= KvmSystem.Open(Device);
            }
        }
    }

    /// <summary>What the probes found.</summary>
    /// <exception cref="KvmException">The device cannot be opened, or no VM can be run with it.</exception>
    public HostCapabilities Capabilities
    {
        get
        {
            lock (_lock)
                return _capabilities ??= HostProbe.Run(Kvm);
        }
    }

    /// <summary>Closes the device. VMs that were made with it must be gone.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            _disposed = true;
            _kvm?.Dispose();
            _kvm = null;
        }
    }
}
