using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>Where a vCPU is at a moment, as another thread sees it while it goes on.</summary>
/// <param name="Id">Its number.</param>
/// <param name="IsUp">It runs, or would if it had something to do.</param>
/// <param name="InGuest">The processor may be executing the guest's code.</param>
/// <param name="Waiting">What it sleeps for.</param>
/// <param name="Accessing">The manager is copying to or from the guest's memory for it.</param>
/// <param name="QueuedWrites">Runs of page-table entries that are still to be repeated inside the VM.</param>
/// <param name="FlushRequested">Another vCPU wants its translations dropped.</param>
/// <param name="Rip">Of the guest, as it last came out.</param>
/// <param name="Rax">Of the guest: the hypercall, where it came out for one.</param>
/// <param name="Hypercalls">Hypercalls that it has made, each part of one that was continued counted.</param>
/// <param name="ProcessorTime">What the host has given it by now.</param>
/// <param name="ThreadId">Linux's number of its thread; 0 where it has none, yet or any more.</param>
public readonly record struct VcpuActivity(
    int Id, bool IsUp, bool InGuest, WaitState Waiting, bool Accessing, int QueuedWrites, bool FlushRequested, ulong Rip, HypercallNumber Rax,
    ulong Hypercalls, TimeSpan ProcessorTime, int ThreadId);
