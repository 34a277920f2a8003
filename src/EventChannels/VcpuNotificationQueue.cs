using System.Threading.Channels;
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// How any thread makes a vCPU look at its vcpu_info. Holds at most one notification: the bits in the guest's memory say what
/// happened, this only says that something did.
/// </summary>
/// <remarks>
/// Senders set the bits, then <see cref="Post"/>. The vCPU's thread, after <see cref="IVirtualCpu.Run"/> came back with a kick or
/// <see cref="IVirtualCpu.WaitForKick"/> returned, takes the notification and only then looks at the bits; before it sleeps it
/// looks at them once more. A kick is never lost, so a bit set after that look ends the sleep.
/// </remarks>
public sealed class VcpuNotificationQueue
{
    private readonly IVirtualCpu _cpu;
    private readonly Channel<bool> _channel = Channel.CreateBounded<bool>(
        new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite, SingleReader = true });

    internal VcpuNotificationQueue(IVirtualCpu cpu) => _cpu = cpu;

    /// <summary>Leaves a notification and kicks the processor, running or asleep. Any thread.</summary>
    public void Post()
    {
        _channel.Writer.TryWrite(true);

        // Also when one was waiting already: who left that may not have come to its kick.
        _cpu.Kick();
    }

    /// <summary>Takes the notification. The vCPU's own thread only.</summary>
    /// <returns>False when there was none.</returns>
    public bool TryTake() => _channel.Reader.TryRead(out _);
}
