// What an event channel is called and what it can be: port numbers, channel states, virtual interrupts, operation numbers.
namespace XenSharp.EventChannels;

/// <summary>evtchn_port_t: the number of an event channel in one domain. 0 never names a channel.</summary>
public readonly record struct EventChannelPort(uint Value)
{
    /// <summary>Ports of the 2-level ABI (EVTCHN_2L_NR_CHANNELS for a 64-bit guest): 64 words of 64 bits.</summary>
    public const uint TwoLevelCount = 64 * 64;

    public override string ToString() => $"port {Value}";
}

/// <summary>ECS_*: what a port is in use for.</summary>
public enum ChannelState : byte
{
    Free = 0,

    /// <summary>Never allocated: port 0.</summary>
    Reserved = 1,

    /// <summary>Waits for the domain it was made for to bind to it.</summary>
    Unbound = 2,

    /// <summary>Connected to a port of another domain, of this one, or to a back end in the manager.</summary>
    Interdomain = 3,

    // 4 is ECS_PIRQ: a port of a domain that owns hardware, which no domain here does.
    Virq = 5,
    Ipi = 6,
}

/// <summary>VIRQ_* of xen/xen.h, where something here raises or classifies them.</summary>
public static class Virq
{
    /// <summary>NR_VIRQS.</summary>
    public const int Count = 24;

    public const int Timer = 0;
    public const int Debug = 1;
    public const int Xenoprof = 7;
    public const int Argo = 11;
    public const int Xenpmu = 13;

    /// <summary>A global VIRQ is bound once in a domain, on vCPU 0; the others once on each vCPU.</summary>
    public static bool IsGlobal(int virq) => virq is not (Timer or Debug or Xenoprof or Xenpmu);
}

/// <summary>EVTCHNOP_* of xen/event_channel.h.</summary>
public enum EventChannelOperation
{
    BindInterdomain = 0,
    BindVirq = 1,
    BindPirq = 2,
    Close = 3,
    Send = 4,
    Status = 5,
    AllocUnbound = 6,
    BindIpi = 7,
    BindVcpu = 8,
    Unmask = 9,
    Reset = 10,
    InitControl = 11,
    ExpandArray = 12,
    SetPriority = 13,

    /// <summary>A reset that stopped half-way: made by the continuation, but a guest may issue it too.</summary>
    ResetContinue = 14,
}
