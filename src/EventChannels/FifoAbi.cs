// The FIFO ABI: event words that are linked to queues, one for each priority of a vCPU. The only file that touches them.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// Events as words of an array of the guest's pages, 1024 to a page, linked to queues whose heads are in a vCPU's control block
/// (xen/event_channel.h, "FIFO ABI"). Who sends appends to a queue, the guest takes from its head.
/// </summary>
/// <remarks>
/// <para>Callers are as <see cref="TwoLevelAbi"/>'s. What is in the guest's words is believed bit by bit and never becomes an index:
/// the tails of queues, which do, are kept here.</para>
/// <para>A word that is linked may only get its LINK set by who sends; the guest may set and clear MASKED, clear PENDING, and clear
/// LINKED with LINK when it takes the word from the queue.</para>
/// </remarks>
public static unsafe class FifoAbi
{
    /// <summary>EVTCHN_FIFO_PENDING.</summary>
    public const uint Pending = 1U << 31;

    /// <summary>EVTCHN_FIFO_MASKED.</summary>
    public const uint Masked = 1U << 30;

    /// <summary>EVTCHN_FIFO_LINKED: on a queue, or about to be.</summary>
    public const uint Linked = 1U << 29;

    /// <summary>EVTCHN_FIFO_BUSY: the guest must not unmask now.</summary>
    public const uint Busy = 1U << 28;

    /// <summary>EVTCHN_FIFO_LINK_MASK: the port behind this one on its queue.</summary>
    public const uint LinkMask = (1U << LinkBits) - 1;

    /// <summary>EVTCHN_FIFO_LINK_BITS.</summary>
    public const int LinkBits = 17;

    /// <summary>EVTCHN_FIFO_PRIORITY_DEFAULT; 0 comes first, 15 last.</summary>
    public const byte DefaultPriority = 7;

    /// <summary>EVTCHN_FIFO_MAX_QUEUES: priorities.</summary>
    public const int Priorities = 16;

    /// <summary>EVTCHN_FIFO_NR_CHANNELS.</summary>
    public const uint PortCount = 1U << LinkBits;

    /// <summary>Event words in a page of the array.</summary>
    public const uint WordsPerPage = (uint)(Paging.PageSize / sizeof(uint));

    /// <summary>Pages that the array can have.</summary>
    public const int MaxPages = (int)(PortCount / WordsPerPage);

    /// <summary>Bytes of a control block (struct evtchn_fifo_control_block): READY, 4 unused, HEAD of each priority.</summary>
    public const uint ControlBlockSize = HeadOffset + (Priorities * sizeof(uint));

    private const uint HeadOffset = 8;

    private const int QueueTries = 3;
    private const int LinkTries = 4;

    /// <summary>Sets a port pending and puts it on the queue of its vCPU and priority, unless it is masked or on a queue already.</summary>
    public static void SetPending(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        EventChannelPortState* state = context->Ports + port;
        uint* word = WordOf(context, port);
        if (word == null)
        {
            // Remembered until its page is there, which may be by now: who adds the page looks at this afterwards.
            _ = Interlocked.Exchange(ref state->WasPending, 1);
            word = WordOf(context, port);
            if (word == null)
                return;
        }

        int vcpu = Volatile.Read(ref state->NotifyVcpu);
        int priority = Volatile.Read(ref state->Priority);
        FifoQueue* queue = QueueOf(context, (vcpu * Priorities) + priority);
        FifoQueue* last = LockQueues(context, state, queue);
        if (last == null)
            return;

        // Without a control block there is nowhere to tell; a guest must not unmask before it has made one.
        FifoVcpu* target = context->FifoVcpus + vcpu;
        byte* block = ControlBlock(context, target);
        bool wasPending = true;
        bool linked = true;
        if (block != null)
        {
            wasPending = GuestBits.TestAndSet(word, Pending);
            if (!GuestBits.Test(word, Masked) && !GuestBits.TestAndSet(word, Linked))
            {
                // Taken from the end of the queue where it was: nothing may be appended to it there any more.
                if (last->Tail == port)
                    last->Tail = 0;
                if (last != queue)
                {
                    Volatile.Write(ref state->LastQueue, (ushort)((vcpu * Priorities) + priority));
                    PortLock.Exit(&last->Lock);
                    last = queue;
                }

                // The guest has taken all of the queue when it has unlinked the tail.
                uint* tail = queue->Tail == 0 ? null : WordOf(context, queue->Tail);
                linked = tail != null && SetLink(tail, port);
                if (!linked)
                    Volatile.Write(ref *Head(block, priority), port);
                queue->Tail = port;
            }
        }

        if (last != queue)
            PortLock.Exit(&last->Lock);
        PortLock.Exit(&queue->Lock);

        if (!linked && !GuestBits.TestAndSet((uint*)block, 1U << priority))
            EventAbi.MarkEventsPending(context, vcpu, wake);
        if (!wasPending)
            EventAbi.WakePollers(context, port, wake);
    }

    /// <summary>Clears PENDING; what is on a queue stays there, and the guest passes over it.</summary>
    public static void ClearPending(EventChannelContext* context, uint port)
    {
        uint* word = WordOf(context, port);
        if (word != null)
            _ = Interlocked.And(ref *word, ~Pending);
    }

    /// <summary>Unmasks a port; when it is pending, it is put on its queue now.</summary>
    public static void Unmask(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        uint* word = WordOf(context, port);
        if (word == null)
            return;
        _ = Interlocked.And(ref *word, ~Masked);
        if (GuestBits.Test(word, Pending))
            SetPending(context, port, wake);
    }

    public static bool IsPending(EventChannelContext* context, uint port)
    {
        uint* word = WordOf(context, port);
        return word != null && GuestBits.Test(word, Pending);
    }

    /// <summary>Whether a port is on a queue, which one that was closed can still be: it must not be used again before it is not.</summary>
    public static bool IsBusy(EventChannelContext* context, uint port)
    {
        uint* word = WordOf(context, port);
        return word != null && GuestBits.Test(word, Linked);
    }

    /// <summary>The word of a port; null while its page has not been added.</summary>
    private static uint* WordOf(EventChannelContext* context, uint port)
    {
        // The count is raised when the page is there.
        if (port >= Volatile.Read(ref context->Fifo->Words))
            return null;
        var frame = new Mfn(context->Fifo->Pages[(int)(port / WordsPerPage)]);
        return (uint*)context->Domain->Memory.Page(frame) + (port % WordsPerPage);
    }

    private static byte* ControlBlock(EventChannelContext* context, FifoVcpu* vcpu)
    {
        ulong frame = Volatile.Read(ref vcpu->ControlFrame);
        return frame == 0 ? null : context->Domain->Memory.Page(new Mfn(frame)) + vcpu->ControlOffset;
    }

    private static uint* Head(byte* block, int priority) => (uint*)(block + HeadOffset) + priority;

    private static FifoQueue* QueueOf(EventChannelContext* context, int number)
        => (FifoQueue*)&context->FifoVcpus[number / Priorities].Queues + (number % Priorities);

    /// <summary>
    /// Locks the queue that a port is to be put on and the one that it was on last, from before PENDING is set until the port is on its
    /// queue: the guest must not be told of what it cannot see yet.
    /// </summary>
    /// <returns>The latter; null when it kept changing.</returns>
    /// <remarks>
    /// Each change is by another sender that put the port on a queue meanwhile. The second one did so from the beginning after this one
    /// had begun, so the guest comes to see what this one would tell, and there is nothing left to do.
    /// </remarks>
    private static FifoQueue* LockQueues(EventChannelContext* context, EventChannelPortState* state, FifoQueue* queue)
    {
        for (int i = 0; i < QueueTries; i++)
        {
            int number = Volatile.Read(ref state->LastQueue);
            FifoQueue* last = QueueOf(context, number);
            PortLock.Enter(last < queue ? &last->Lock : &queue->Lock);
            if (last != queue)
                PortLock.Enter(last < queue ? &queue->Lock : &last->Lock);
            if (Volatile.Read(ref state->LastQueue) == number)
                return last;
            if (last != queue)
                PortLock.Exit(&last->Lock);
            PortLock.Exit(&queue->Lock);
        }

        return null;
    }

    /// <summary>Sets the LINK of a word, if it is linked still.</summary>
    /// <returns>
    /// False when the guest has taken it. True also for a word that a guest changes more often than it may: what is appended is lost to it.
    /// </returns>
    private static bool SetLink(uint* word, uint link)
    {
        uint seen = Volatile.Read(ref *word);
        if ((seen & Linked) == 0)
            return false;
        if (TryLink(word, ref seen, link))
            return true;

        // The guest does not unmask a word that is busy, so it can change this one four times more at most.
        _ = Interlocked.Or(ref *word, Busy);
        seen = Volatile.Read(ref *word);
        for (int i = 0; i < LinkTries && (seen & Linked) != 0; i++)
        {
            if (TryLink(word, ref seen, link))
                return true;
        }

        _ = Interlocked.And(ref *word, ~Busy);
        return (seen & Linked) != 0;
    }

    private static bool TryLink(uint* word, ref uint seen, uint link)
    {
        uint expected = seen;
        seen = Interlocked.CompareExchange(ref *word, (expected & ~(Busy | LinkMask)) | link, expected);
        return seen == expected;
    }
}
