// Going over to the FIFO ABI and back: control blocks, the event array, and the frames of the guest's that both are in.
using XenSharp.Core;

namespace XenSharp.EventChannels;

public sealed unsafe partial class EventChannelDomain
{
    /// <summary>Frames that control blocks and the event array are in: one reference and one writable use for each time it is named.</summary>
    public IReadOnlyList<ulong> HeldFrames
    {
        get
        {
            var frames = new List<ulong>();
            lock (EventLock)
            {
                for (int vcpu = 0; vcpu < EventChannelState.MaxVcpus; vcpu++)
                {
                    if (_context->FifoVcpus[vcpu].ControlFrame != 0)
                        frames.Add(_context->FifoVcpus[vcpu].ControlFrame);
                }

                for (int page = 0; page < ArrayPages; page++)
                    frames.Add(_context->Fifo->Pages[page]);
            }

            return frames;
        }
    }

    private int ArrayPages => (int)(_context->Fifo->Words / FifoAbi.WordsPerPage);

    /// <summary>Gives a vCPU its control block (EVTCHNOP_init_control); the first one of a domain takes it to the FIFO ABI.</summary>
    /// <returns>0; -ENOENT for no such vCPU; -EINVAL for a block that does not fit or is not aligned, a frame that cannot be held, or a
    /// vCPU that has one; -ERESTART.</returns>
    private long InitControl(VcpuContext* caller, ref EvtchnInitControl request)
    {
        request.LinkBits = FifoAbi.LinkBits;
        if (_context->Vcpu(request.Vcpu) == null)
            return -(long)Errno.ENOENT;
        if (request.Offset > Paging.PageSize - FifoAbi.ControlBlockSize || request.Offset % 8 != 0)
            return -(long)Errno.EINVAL;
        lock (EventLock)
        {
            FifoVcpu* vcpu = _context->FifoVcpus + request.Vcpu;
            if (vcpu->ControlFrame != 0)
                return -(long)Errno.EINVAL;
            Errno error = _frames.Hold(caller, new Mfn(request.Frame));
            if (error != Errno.None)
                return -(long)error;
            vcpu->ControlOffset = request.Offset;
            Volatile.Write(ref vcpu->ControlFrame, request.Frame);
            if (!EventAbi.IsFifo(_context))
            {
                _ = Interlocked.Exchange(ref _context->Fifo->InUse, 1);
                TakeOverPorts();
            }

            return 0;
        }
    }

    /// <summary>Remembers what is pending in shared_info, until the event array is there (setup_ports).</summary>
    private void TakeOverPorts()
    {
        uint end = Math.Min(_context->State->ValidPorts, EventChannelPort.TwoLevelCount);
        for (uint port = 1; port < end; port++)
        {
            // Who sends from the port has either set the bit by now or sees the new ABI.
            EventChannelPortState* state = _context->Ports + port;
            PortLock.Enter(state);
            if (TwoLevelAbi.IsPending(_context, port))
                Volatile.Write(ref state->WasPending, 1);
            Volatile.Write(ref state->Priority, FifoAbi.DefaultPriority);
            PortLock.Exit(state);
        }
    }

    /// <summary>Adds a page to the event array (EVTCHNOP_expand_array), and raises what was pending without it.</summary>
    /// <returns>0; -EOPNOTSUPP under the 2-level ABI; -ENOSPC when the array is whole; -EINVAL for a frame that cannot be held;
    /// -ERESTART.</returns>
    private long ExpandArray(VcpuContext* caller, Mfn frame)
    {
        VcpuMask wake = default;
        lock (EventLock)
        {
            if (!EventAbi.IsFifo(_context))
                return -(long)Errno.EOPNOTSUPP;
            int page = ArrayPages;
            if (page == FifoAbi.MaxPages)
                return -(long)Errno.ENOSPC;
            Errno error = _frames.Hold(caller, frame);
            if (error != Errno.None)
                return -(long)error;
            _context->Fifo->Pages[page] = frame.Value;
            uint port = _context->Fifo->Words;
            uint end = Math.Min(_context->State->ValidPorts, port + FifoAbi.WordsPerPage);
            _ = Interlocked.Add(ref _context->Fifo->Words, FifoAbi.WordsPerPage);
            for (; port < end; port++)
            {
                // Also of a port that was closed since, as on Xen.
                EventChannelPortState* state = _context->Ports + port;
                PortLock.Enter(state);
                if (state->WasPending != 0)
                    FifoAbi.SetPending(_context, port, &wake);
                PortLock.Exit(state);
            }
        }

        Deliver(wake, caller->State->Id);
        return 0;
    }

    /// <summary>Goes back to the 2-level ABI (evtchn_fifo_destroy), with the event lock held. No port is in use: nobody is at its word.</summary>
    private void LeaveFifo(VcpuContext* caller)
    {
        FifoDomain* fifo = _context->Fifo;
        if (fifo->InUse == 0)
            return;
        IReadOnlyList<ulong> frames = HeldFrames;
        *fifo = default;
        new Span<FifoVcpu>(_context->FifoVcpus, EventChannelState.MaxVcpus).Clear();
        foreach (ulong frame in frames)
            _frames.Release(caller, new Mfn(frame));
    }
}
