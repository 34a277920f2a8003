// event_channel_op under the FIFO ABI: what is seen of queues in control blocks and event words.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class FifoScript
{
    private const uint Pending = 1U << 31;
    private const uint Masked = 1U << 30;
    private const uint Linked = 1U << 29;
    private const uint Busy = 1U << 28;
    private const int DefaultPriority = 7;
    private const int LastPriority = 15;

    public static AbiScript CreateQueues() => new("event-channel-fifo-queues", "event_channel_op", script =>
    {
        const int offset = ProbeLayout.PageSize - 72;
        ScratchPage block = null!;
        ScratchPage array = null!;
        Value[] ports = [];
        Value Word(Value port) => (array.At + (port << 2)).Named($"word of {port.Text}");
        script.LevelPorts();
        script.Case("events from before the control block and the array", c =>
        {
            block = c.Page("block");
            array = c.Page("array");
            ports = [.. Enumerable.Range(0, 6).Select(i => c.Keep(c.BindIpi(0), $"p{i}"))];
            c.Send(ports[0]);
            c.InitControl(block.Mfn, offset, 0);
            c.InitControl(block.Mfn, 0, 0);
            c.SetPriority(ports[0], 3);
            c.Send(ports[1]);
            c.Send(ports[2]);
            c.Unmask(ports[2]);
            c.ClosePort(ports[2]);
            c.ShowQueues(block, offset, 3, DefaultPriority);

            // The toolstack's ports are not to be seen; they are masked in pairs.
            c.Fill(array.At, EventSteps.FirstPort / 2, 8, ((ulong)Masked << 32) | Masked);
            c.ExpandArray(array.Mfn);
            foreach (Value port in ports)
                c.Load(Word(port), 4);
            c.ShowQueues(block, offset, 3, DefaultPriority);
            c.ShowUpcallState();
        });
        script.Case("a closed port that is linked is not given away", c =>
        {
            Value other = c.Keep(c.BindIpi(0), "other");
            c.Show(other - ports[0]);
            c.Put(Word(ports[2]), 4, 0);
            Value again = c.Keep(c.BindIpi(0), "again");
            c.Show(again - ports[2]);
            c.Load(Word(again), 4);
            c.ClosePort(other);
        });
        script.Case("priorities have queues of their own", c =>
        {
            c.ClearQueues(block, offset, array);
            c.SetPriority(ports[0], 0);
            c.SetPriority(ports[1], LastPriority);
            foreach (Value port in ports[..3])
                c.Send(port);
            c.ShowQueues(block, offset, 0, DefaultPriority, LastPriority);
            c.ShowUpcallState();
        });
        script.Case("priorities that there are not, and ports that are not in use", c =>
        {
            c.SetPriority(ports[0], LastPriority + 1);
            c.SetPriority(ports[0], 0xffff_ffffU);
            c.SetPriority(60, 0);
            c.SetPriority(60, LastPriority + 1);
            c.SetPriority(0, 0);
            c.SetPriority(4095, 0);
        });
        script.Case("ports of a queue are linked in their order", c =>
        {
            c.ClearQueues(block, offset, array);
            foreach (Value port in ports[..4])
                c.SetPriority(port, 5);
            foreach (Value port in ports[..3])
                c.Send(port);
            c.Send(ports[0]);
            foreach (Value port in ports[..3])
                c.Load(Word(port), 4);
            c.ShowQueues(block, offset, 5);
            c.ShowUpcallState();
        });
        script.Case("a port that was taken is appended again", c =>
        {
            c.Put(Word(ports[0]), 4, 0);
            c.Send(ports[0]);
            foreach (Value port in ports[..3])
                c.Load(Word(port), 4);
            c.ShowQueues(block, offset, 5);
        });
        script.Case("a queue that was taken whole begins anew", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Send(ports[1]);
            c.ShowQueues(block, offset, 5);
            c.Load(Word(ports[1]), 4);
            c.Load(Word(ports[0]), 4);
            c.ShowUpcallState();
        });
        script.Case("READY that is set stays without an upcall", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Put(block[offset], 4, 1 << 5);
            c.Send(ports[1]);
            c.ShowQueues(block, offset, 5);
            c.ShowUpcallState();
        });
        script.Case("masked ports become pending and are linked when unmasked", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Put(Word(ports[3]), 4, Masked);
            c.Send(ports[3]);
            c.Load(Word(ports[3]), 4);
            c.ShowQueues(block, offset, 5);
            c.Unmask(ports[3]);
            c.Load(Word(ports[3]), 4);
            c.ShowQueues(block, offset, 5);
            c.Put(Word(ports[0]), 4, Masked);
            c.Unmask(ports[0]);
            c.Load(Word(ports[0]), 4);
        });
        script.Case("a linked port with another priority stays where it is until it was taken", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Send(ports[0]);
            c.SetPriority(ports[0], 6);
            c.Put(Word(ports[0]), 4, Linked);
            c.Send(ports[0]);
            c.ShowQueues(block, offset, 5, 6);
            c.Put(Word(ports[0]), 4, 0);
            c.Send(ports[0]);
            c.ShowQueues(block, offset, 5, 6);

            // It was the end of the old queue, which has none now.
            c.Send(ports[1]);
            c.Load(Word(ports[0]), 4);
            c.ShowQueues(block, offset, 5, 6);
        });
        script.Case("words that the guest has no business to write", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Send(ports[1]);
            c.Put(Word(ports[1]), 4, Linked | Busy | 0x0fff_ffff);
            c.Send(ports[2]);
            c.Load(Word(ports[1]), 4);
            c.Put(Word(ports[2]), 4, 0x0fff_ffff | Masked);
            c.Send(ports[2]);
            c.Load(Word(ports[2]), 4);
            c.Put(block[offset + 4], 4, 0xffff_ffffU);
            c.Put(block[offset + 8 + (5 * 4)], 4, 0xffff_ffffU);
            c.Put(Word(ports[2]), 4, Busy);
            c.Send(ports[2]);
            c.Load(Word(ports[2]), 4);
            c.Load(block[offset + 4], 4);
            c.ShowQueues(block, offset, 5);
        });
        script.Case("closing a port takes PENDING and leaves the rest", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Put(Word(ports[4]), 4, Masked);
            c.Send(ports[4]);
            c.ClosePort(ports[4]);
            c.Load(Word(ports[4]), 4);
            c.Send(ports[5]);
            c.ClosePort(ports[5]);
            c.Load(Word(ports[5]), 4);
            c.ShowQueues(block, offset, DefaultPriority);
            Value masked = c.Keep(c.BindIpi(0), "masked");
            c.Show(masked - ports[4]);
            c.Load(Word(masked), 4);
            c.ClosePort(masked);
        });
        script.Case("polling looks at the words", c =>
        {
            c.ClearQueues(block, offset, array);
            c.Put(Word(ports[0]), 4, Pending | Masked);
            c.Poll(ports[0], "without a timeout", 0);
            c.Poll(60, "without a timeout", 0);
        });
        script.Case("another vCPU, without a control block and with one", c =>
        {
            c.VcpuContext(1, static _ => { });
            ScratchPage second = c.Page("second block");
            c.ClearQueues(block, offset, array);
            Value ipi = c.Keep(c.BindIpi(1), "ipi");
            c.Send(ipi);
            c.Load(Word(ipi), 4);
            c.InitControl(second.Mfn, 8, 1);
            c.InitControl(second.Mfn, 8, 1);
            c.Send(ipi);
            c.Load(Word(ipi), 4);
            c.ShowQueues(second, 8, DefaultPriority);
            c.Load(Value.Load(ProbeLayout.VcpuInfoPointer(0)) + 64 + VcpuInfoField.UpcallPending, 1);
            Value far = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "far");
            Value near = c.Keep(c.BindInterdomain(DomainIds.Self, far), "near");
            c.ClearQueues(block, offset, array);
            c.ClearQueues(second, 8, array);
            c.Send(far);
            c.BindVcpu(near, 1);
            c.Put(Word(near), 4, 0);
            c.Send(far);
            c.Load(Word(near), 4);
            c.ShowQueues(block, offset, DefaultPriority);
            c.ShowQueues(second, 8, DefaultPriority);
        });
        script.Case("frames for the array", c =>
        {
            c.ExpandArray(c.Root);
            c.ExpandArray(0xff_ffff_ffffUL);
            ScratchPage page = c.Page();
            ScriptBuffer request = c.Structure("request", 8, (0, 8, page.Mfn));
            c.Kernel("expand_array with one frame until it fails", a =>
            {
                Iced.Intel.Label next = a.CreateLabel();
                a.Label(ref next);
                a.inc(rbx);
                a.mov(edi, (int)EventOperation.ExpandArray);
                a.mov(rsi, request.Address);
                a.mov(eax, (int)GuestHypercall.EventChannelOp);
                a.syscall();
                a.test(rax, rax);
                a.jz(next);
            }, show: [Register64.Rax, Register64.Rbx]);
            c.PinL1(block);
            c.PinL1(page);
        });
    });

    // The console's port goes with the others, so it is the domain's end that tells: a reboot if all was as it should be.
    public static AbiScript CreateReset() => new("event-channel-fifo-reset", "event_channel_op", script =>
    {
        script.LevelPorts();
        script.Case("a reset goes back to two levels, from where a control block leads to queues again", c =>
        {
            ScratchPage block = c.Page("block");
            ScratchPage array = c.Page("array");
            ScriptBuffer control = c.Structure("control", 24, (0, 8, block.Mfn));
            ScriptBuffer page = c.Structure("page", 8, (0, 8, array.Mfn));
            ScriptBuffer domain = c.Structure("domain", 8, (0, 2, DomainIds.Self));
            ScriptBuffer ipi = c.Structure("ipi", 8, (0, 4, 0));
            ScriptBuffer port = c.Structure("port", 8, (0, 4, 1));
            ScriptBuffer pin = c.Structure("pin", 24, (8, 8, block.Mfn));
            ScriptBuffer unpin = c.Structure("unpin", 24, (0, 4, 4), (8, 8, block.Mfn));
            ScriptBuffer good = c.Structure("good", 8, (0, 4, (int)GuestShutdownReason.Reboot));
            ScriptBuffer bad = c.Structure("bad", 8, (0, 4, (int)GuestShutdownReason.Crash));
            c.Fill(array.At, EventSteps.FirstPort / 2, 8, ((ulong)Masked << 32) | Masked);
            c.InitControl(block.Mfn, 0, 0);
            c.ExpandArray(array.Mfn);

            // What the console's other end has not taken before, it never will.
            c.Settle();
            c.Hypercall(GuestHypercall.UpdateVaMapping, block.At, block.Entry(0x61), 2);
            c.Kernel("reset, pin the block, unpin it, bind, send, init_control, expand_array, shutdown", a =>
            {
                Iced.Intel.Label failed = a.CreateLabel();
                void Operation(EventOperation operation, ScriptBuffer structure) => EventSteps.EmitOperation(a, operation, structure, failed);

                void Mmuext(ScriptBuffer structure)
                {
                    a.mov(rdi, structure.Address);
                    a.mov(esi, 1);
                    a.xor(edx, edx);
                    a.mov(r10d, 0x7ff0);
                    a.mov(eax, (int)GuestHypercall.MmuextOp);
                    a.syscall();
                    a.test(rax, rax);
                    a.jnz(failed);
                }

                // A block that is all zero is a fine table, once nobody writes to it any more.
                Operation(EventOperation.Reset, domain);
                Mmuext(pin);
                Mmuext(unpin);
                Operation(EventOperation.BindIpi, ipi);
                a.mov(rsi, ipi.Address);
                a.cmp(__dword_ptr[rsi + 4], 1);
                a.jne(failed);
                Operation(EventOperation.Send, port);
                a.mov(rsi, ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending);
                a.test(__dword_ptr[rsi], 2);
                a.jz(failed);
                a.mov(rsi, array.Address);
                a.mov(__dword_ptr[rsi + 4], 0);
                Operation(EventOperation.InitControl, control);
                Operation(EventOperation.ExpandArray, page);
                a.mov(rsi, array.Address);
                a.mov(eax, __dword_ptr[rsi + 4]);
                a.cmp(eax, unchecked((int)(Pending | Linked)));
                a.jne(failed);
                EventSteps.EmitVerdict(a, good, bad, ref failed);
            });
        });
    });

    public static void InitControl(this AbiCase c, Value frame, Value offset, Value vcpu)
        => c.EventChannelOp(
            EventOperation.InitControl, $"{frame.Text}, offset {offset.Text}, vCPU {vcpu.Text}",
            c.Structure("request", 24, (0, 8, frame), (8, 4, offset), (12, 4, vcpu)));

    public static void ExpandArray(this AbiCase c, Value frame)
        => c.EventChannelOp(EventOperation.ExpandArray, frame.Text, c.Structure("request", 8, (0, 8, frame)));

    private static void PinL1(this AbiCase c, ScratchPage page)
        => c.Hypercall(
            (ulong)GuestHypercall.MmuextOp, $"mmuext_op(pin_l1_table, {page.Mfn.Text})", AnswerFormat.Result,
            c.Structure("pin", 24, (8, 8, page.Mfn)), 1, 0, DomainIds.Self);

    public static void ShowQueues(this AbiCase c, ScratchPage block, int offset, params int[] priorities)
    {
        c.Load(block[offset].Named($"READY of {block.Name}"), 4);
        foreach (int priority in priorities)
            c.Load(block[offset + 8 + (priority * 4)].Named($"HEAD {priority} of {block.Name}"), 4);
    }

    /// <summary>Quietly takes all events of the ports from <see cref="EventSteps.FirstPort"/> to 63 away, and the upcall.</summary>
    public static void ClearQueues(this AbiCase c, ScratchPage block, int offset, ScratchPage array)
    {
        c.Fill(array[EventSteps.FirstPort * 4], (64 - EventSteps.FirstPort) / 2, 8, 0);
        c.Fill(block[offset], 9, 8, 0);
        c.Put(Value.Load(ProbeLayout.VcpuInfoPointer(0)) + VcpuInfoField.UpcallPending, 1, 0);
    }
}
