// event_channel_op: what ports can be, and how they come to be so.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class EventChannelScript
{
    private const int LastTwoLevelPort = 4095;

    public static AbiScript CreatePorts() => new("event-channel-ports", "event_channel_op", script =>
    {
        script.LevelPorts();
        script.Case("an unbound port, its status, and its end", c =>
        {
            Value port = c.AllocUnbound(DomainIds.Self, DomainIds.Zero);
            c.Show(port);
            ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
            c.Load(status[StatusField.Detail], 2);
            c.ClosePort(port);
            c.PortStatus(DomainIds.Self, port);
            c.ClosePort(port);
        });
        script.Case("a port for a domain that does not exist can be had", c =>
        {
            Value port = c.AllocUnbound(DomainIds.Self, DomainIds.Absent);
            ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
            c.Load(status[StatusField.Detail], 2);
            c.ClosePort(port);
        });
        script.Case("the lowest free port comes first", c =>
        {
            Value first = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "first");
            Value second = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "second");
            c.Show(second - first);
            c.ClosePort(first);
            Value again = c.AllocUnbound(DomainIds.Self, DomainIds.Self, "again");
            c.Show(again - first);
            c.ClosePort(again);
            c.ClosePort(second);
        });
        script.Case("ports of absent and special domains", c =>
        {
            c.AllocUnbound(DomainIds.Absent, DomainIds.Self);
            c.AllocUnbound(DomainIds.Io, DomainIds.Self);
            c.AllocUnbound(DomainIds.Xen, DomainIds.Self);
            c.AllocUnbound(DomainIds.Invalid, DomainIds.Self);
        });
        script.Case("a loop: both ends in one domain", c =>
        {
            Value far = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "far");
            Value near = c.Keep(c.BindInterdomain(DomainIds.Self, far), "near");
            c.Show(near - far);
            c.ShowPending();
            ScriptBuffer status = c.PortStatus(DomainIds.Self, near);
            c.Show(EventSteps.Field32(status[StatusField.RemotePort], "remote port") - far);
            ScriptBuffer farStatus = c.PortStatus(DomainIds.Self, far);
            c.Show(EventSteps.Field32(farStatus[StatusField.RemotePort], "remote port") - near);
            c.Send(far);
            c.ShowPending();
            c.Send(near);
            c.ShowPending();
            c.QuietEvents();
            c.ClosePort(near);
            ScriptBuffer after = c.PortStatus(DomainIds.Self, far);
            c.Show(EventSteps.Field32(after[StatusField.RemotePort], "remote port"));
            c.Send(far);
            c.ShowPending();
            Value rebound = c.Keep(c.BindInterdomain(DomainIds.Self, far), "rebound");
            c.Show(rebound - near);
            c.ShowPending();
            c.ClosePort(far);
            c.PortStatus(DomainIds.Self, rebound);
            c.ClosePort(rebound);
            c.ShowPending();
        });
        script.Case("far ends that cannot be bound to", c =>
        {
            Value other = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Absent), "for another");
            c.BindInterdomain(DomainIds.Self, other);
            Value ipi = c.Keep(c.BindIpi(0), "ipi port");
            c.BindInterdomain(DomainIds.Self, ipi);
            c.BindInterdomain(DomainIds.Self, 0);
            c.BindInterdomain(DomainIds.Self, 60);
            c.BindInterdomain(DomainIds.Self, LastTwoLevelPort);
            c.BindInterdomain(DomainIds.Self, LastTwoLevelPort + 1);
            c.BindInterdomain(DomainIds.Self, 0xffff_ffffU);
            c.BindInterdomain(DomainIds.Absent, other);
            c.BindInterdomain(DomainIds.Xen, other);
            c.ClosePort(other);
            c.ClosePort(ipi);
        });
        script.Case("a port is not taken by what is refused", c =>
        {
            Value first = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "first");
            c.BindInterdomain(DomainIds.Self, 0);
            c.BindInterdomain(DomainIds.Absent, 1);
            c.BindVirq(Virq.Count, 0);
            c.BindIpi(200);
            Value second = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "second");
            c.Show(second - first);
            c.ClosePort(first);
            c.ClosePort(second);
        });
        script.Case("a domain is asked for by its own number", c =>
        {
            // start_info has no domain's number; an unbound port that is its own tells it.
            Value port = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "port");
            ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
            Value self = c.Keep(Value.Load(status[StatusField.Detail]) & 0xffff, "own number");
            c.PortStatus(self, port);
            Value again = c.Keep(c.AllocUnbound(self, self), "again");
            Value near = c.Keep(c.BindInterdomain(self, again), "near");
            c.ClosePort(near);
            c.ClosePort(again);
            c.ClosePort(port);
        });
        script.Case("status of ports that are not in use", c =>
        {
            c.PortStatus(DomainIds.Self, 0);
            c.PortStatus(DomainIds.Self, 60);
            c.PortStatus(DomainIds.Self, LastTwoLevelPort);
            c.PortStatus(DomainIds.Self, LastTwoLevelPort + 1);
            c.PortStatus(DomainIds.Self, 0xffff_ffffU);
            c.PortStatus(DomainIds.Absent, 0);
            c.PortStatus(DomainIds.Xen, 0);
        });
        script.Case("close and send where there is no port", c =>
        {
            foreach (uint port in (uint[])[0, 60, LastTwoLevelPort, LastTwoLevelPort + 1, 0x8000_0000, 0xffff_ffff])
            {
                c.ClosePort(port);
                c.Send(port);
            }
        });
        script.Case("closing a port takes its event away", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            c.ShowPending();
            c.ClosePort(port);
            c.ShowPending();
            c.Send(port);
            c.QuietEvents();
        });
        script.Case("a sender to an unbound port is not told", c =>
        {
            Value port = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "port");
            c.Send(port);
            c.ShowPending();
            c.ClosePort(port);
        });
    });

    public static AbiScript CreateBindings() => new("event-channel-bindings", "event_channel_op", script =>
    {
        script.LevelPorts();
        script.Case("VIRQs of a vCPU", c =>
        {
            foreach (int virq in (int[])[Virq.Timer, Virq.Debug, Virq.Xenoprof, Virq.Xenpmu])
            {
                Value port = c.Keep(c.BindVirq(virq, 0), "virq port");
                ScriptBuffer status = c.PortStatus(DomainIds.Self, port);
                c.Load(status[StatusField.Detail], 4);
                c.BindVirq(virq, 0);
                c.Send(port);
                c.BindVcpu(port, 0);
                c.ClosePort(port);
                Value again = c.Keep(c.BindVirq(virq, 0), "again");
                c.Show(again - port);
                c.ClosePort(again);
            }
        });
        script.Case("global VIRQs", c =>
        {
            foreach (int virq in (int[])[Virq.Console, Virq.DomExc, Virq.Tbuf, 5, Virq.Debugger, Virq.ConRing, Virq.PcpuState, Virq.MemEvent, Virq.Argo, Virq.Enomem, 14, 15, Virq.Arch0, Virq.Count - 1])
            {
                Value port = c.Keep(c.BindVirq(virq, 0), "virq port");
                c.BindVirq(virq, 0);
                c.BindVirq(virq, 1);
                c.BindVcpu(port, 0);
                c.ClosePort(port);
            }
        });
        script.Case("VIRQs that do not exist", c =>
        {
            c.BindVirq(Virq.Count, 0);
            c.BindVirq(0x7fff_ffff, 0);
            c.BindVirq(0xffff_ffffU, 0);
        });
        script.Case("VIRQs of vCPUs that do not exist", c =>
        {
            c.BindVirq(Virq.Timer, 100);
            c.BindVirq(Virq.Timer, 0xffff_ffffU);
            c.BindVirq(Virq.Console, 100);
        });
        script.Case("IPIs", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "ipi port");
            c.PortStatus(DomainIds.Self, port);
            c.BindVcpu(port, 0);
            Value second = c.Keep(c.BindIpi(0), "second");
            c.Show(second - port);
            c.BindIpi(100);
            c.BindIpi(0xffff_ffffU);
            c.ClosePort(port);
            c.ClosePort(second);
        });
        script.Case("bind_vcpu of ports that can be moved, to the vCPU where they are", c =>
        {
            Value far = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "far");
            c.BindVcpu(far, 0);
            Value near = c.Keep(c.BindInterdomain(DomainIds.Self, far), "near");
            c.BindVcpu(near, 0);
            c.PortStatus(DomainIds.Self, near);
            c.ClosePort(near);
            c.ClosePort(far);
        });
        script.Case("bind_vcpu that is refused", c =>
        {
            Value port = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "port");
            c.BindVcpu(port, 100);
            c.BindVcpu(port, 0xffff_ffffU);
            c.BindVcpu(0, 0);
            c.BindVcpu(60, 0);
            c.BindVcpu(LastTwoLevelPort, 0);
            c.BindVcpu(LastTwoLevelPort, 100);
            c.ClosePort(port);
            c.BindVcpu(port, 0);
        });
        script.Case("unmask where there is no port", c =>
        {
            foreach (uint port in (uint[])[0, 60, LastTwoLevelPort, LastTwoLevelPort + 1, 0xffff_ffff])
                c.Unmask(port);
        });
        script.Case("unmask of a port that is closed leaves its mask", c =>
        {
            c.ShowMasked();
            c.Unmask(60);
            c.ShowMasked();
            c.QuietEvents();
        });
        script.Case("physical interrupts beyond all that there are", c =>
        {
            c.BindPirq(0xffff_ffffU, 0);
            c.BindPirq(0x10000, 1);
        });
        script.Case("a port in the second bucket and in the second word", c =>
        {
            ScriptBuffer request = c.Structure("request", 8, (0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
            for (int i = EventSteps.FirstPort; i < 64; i++)
                c.EventChannelOp(EventOperation.AllocUnbound, "again", request);
            c.PortStatus(DomainIds.Self, 64);
            Value port = c.Keep(c.BindIpi(0), "ipi port");
            c.Show(port);
            c.PortStatus(DomainIds.Self, port + 1);
            c.PortStatus(DomainIds.Self, 127);
            c.PortStatus(DomainIds.Self, 128);
            c.Unmask(128);
            c.Send(port);
            c.Load(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending + 8);
            c.ShowUpcallState();
            c.Unmask(port);
            c.ShowUpcallState();
            c.QuietEvents();
        });
    });

    public static AbiScript CreatePointers() => new("event-channel-pointers", "event_channel_op", script =>
    {
        EventOperation[] all =
        [
            EventOperation.BindInterdomain, EventOperation.BindVirq, EventOperation.BindPirq, EventOperation.Close, EventOperation.Send,
            EventOperation.Status, EventOperation.AllocUnbound, EventOperation.BindIpi, EventOperation.BindVcpu, EventOperation.Unmask,
            EventOperation.Reset, EventOperation.ResetContinue,
        ];
        script.LevelPorts();
        script.Case("null", c =>
        {
            foreach (EventOperation operation in all)
                c.EventChannelOp(operation, BadAddress.Null);
        });
        script.Case("an address in a page that is not mapped", c =>
        {
            ScratchPage page = c.UnmappedPage();
            foreach (EventOperation operation in all)
                c.EventChannelOp(operation, page.At);
        });
        script.Case("addresses that no guest has", c =>
        {
            foreach (EventOperation operation in (EventOperation[])[EventOperation.Send, EventOperation.AllocUnbound, EventOperation.Status])
            {
                c.EventChannelOp(operation, BadAddress.NonCanonical);
                c.EventChannelOp(operation, BadAddress.Hypervisor);
                c.EventChannelOp(operation, BadAddress.LastLowHalf);
            }
        });
        script.Case("a structure that is cut off by its page's end", c =>
        {
            Value end = c.PageEnd(4);
            c.Put(end, 4, 0);
            foreach (EventOperation operation in (EventOperation[])[EventOperation.AllocUnbound, EventOperation.BindIpi, EventOperation.BindVirq, EventOperation.Status, EventOperation.BindVcpu])
                c.EventChannelOp(operation, end);
            c.EventChannelOp(EventOperation.Send, end);
            c.EventChannelOp(EventOperation.Close, end);
            c.EventChannelOp(EventOperation.Unmask, end);
        });
        script.Case("a port that cannot be told is taken all the same", c =>
        {
            ScratchPage page = c.ReadOnlyPageOf((0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
            Value first = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "first");
            c.EventChannelOp(EventOperation.AllocUnbound, page.At);
            Value second = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "second");
            c.Show(second - first);
            c.ClosePort(first);
            c.ClosePort(first + 1);
            c.ClosePort(second);
        });
        script.Case("a VIRQ whose port cannot be told is bound all the same", c =>
        {
            ScratchPage page = c.ReadOnlyPageOf((0, 4, Virq.Debug));
            c.EventChannelOp(EventOperation.BindVirq, page.At);
            c.EventChannelOp(EventOperation.BindVirq, page.At);
            c.BindVirq(Virq.Debug, 0);
        });
        script.Case("an IPI whose port cannot be told", c =>
        {
            ScratchPage page = c.ReadOnlyPageOf();
            Value first = c.Keep(c.BindIpi(0), "first");
            c.EventChannelOp(EventOperation.BindIpi, page.At);
            Value second = c.Keep(c.BindIpi(0), "second");
            c.Show(second - first);
        });
        script.Case("a status that cannot be told", c =>
        {
            ScratchPage page = c.ReadOnlyPageOf((StatusField.Domain, 2, DomainIds.Self), (StatusField.Port, 4, 1));
            c.EventChannelOp(EventOperation.Status, page.At);
        });
        script.Case("read-only structures that nothing is written to", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            ScratchPage page = c.ReadOnlyPageOf((0, 4, port));
            c.EventChannelOp(EventOperation.Send, page.At);
            c.EventChannelOp(EventOperation.Unmask, page.At);
            c.EventChannelOp(EventOperation.Close, page.At);
            c.EventChannelOp(EventOperation.Close, page.At);
            c.QuietEvents();
        });
        script.Case("unknown operations", c =>
        {
            ScriptBuffer s = c.Structure("request", 32);
            foreach (long operation in (long[])[15, 16, 255, int.MaxValue, -1])
                c.Hypercall(GuestCalls.EventChannelOp, $"event_channel_op({Value.Constant((ulong)operation, $"{operation}").Text})", AnswerFormat.Result, operation, s);
        });
        script.Case("the operation is the low half of its argument", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            ScriptBuffer s = c.Structure("request", 8, (0, 4, port));
            c.Hypercall(GuestCalls.EventChannelOp, "event_channel_op(send with high bits)", AnswerFormat.Result, 0x1_0000_0000UL | (ulong)EventOperation.Send, s);
            c.ShowPending();
            c.ClosePort(port);
            c.QuietEvents();
        });
    });

    public static AbiScript CreateCompat() => new("event-channel-compat", "event_channel_op_compat", script =>
    {
        script.LevelPorts();
        script.Case("all operations of the older form", c =>
        {
            Value port = Compat(c, EventOperation.AllocUnbound, 8, "of self for self", (4, 2, DomainIds.Self), (6, 2, DomainIds.Self));
            port = c.Keep(port, "port");
            Value near = Compat(c, EventOperation.BindInterdomain, 12, "self, port", (4, 2, DomainIds.Self), (8, 4, port));
            near = c.Keep(near, "near");
            c.Show(near - port);
            Compat(c, EventOperation.Send, 0, "port", (4, 4, port));
            c.ShowPending();
            Compat(c, EventOperation.Unmask, 0, "near", (4, 4, near));
            c.ShowUpcallState();
            c.ShowMasked();
            Compat(c, EventOperation.BindVcpu, 0, "near, 0", (4, 4, near), (8, 4, 0));
            Value state = Compat(c, EventOperation.Status, 12, "near of self", (4, 2, DomainIds.Self), (8, 4, near));
            c.Show(state);
            Compat(c, EventOperation.Close, 0, "near", (4, 4, near));
            Compat(c, EventOperation.Close, 0, "port", (4, 4, port));
            Value ipi = c.Keep(Compat(c, EventOperation.BindIpi, 8, "0", (4, 4, 0)), "ipi port");
            c.Show(ipi - port);
            Value virq = c.Keep(Compat(c, EventOperation.BindVirq, 12, "debug, 0", (4, 4, Virq.Debug), (8, 4, 0)), "virq port");
            c.Show(virq - ipi);
            Compat(c, EventOperation.BindPirq, 0, "a physical interrupt beyond all", (4, 4, 0xffff_ffffU));
            c.ClosePort(ipi);
            c.ClosePort(virq);
            c.QuietEvents();
        });
        script.Case("operations that came later", c =>
        {
            Compat(c, EventOperation.Reset, 0, "self", (4, 2, DomainIds.Self));
            Compat(c, EventOperation.InitControl, 0, "zeros");
            Compat(c, EventOperation.ExpandArray, 0, "zeros");
            Compat(c, EventOperation.SetPriority, 0, "zeros");
            ScriptBuffer s = c.Structure("operation", 40, (0, 4, 0xffff_ffffU));
            c.Hypercall(GuestCalls.EventChannelOpCompat, "event_channel_op_compat(4294967295)", AnswerFormat.Result, s);
        });
        script.Case("bad pointers of the older form", c =>
        {
            foreach (Value bad in (Value[])[BadAddress.Null, BadAddress.NonCanonical, BadAddress.Hypervisor, c.UnmappedPage().At, c.PageEnd(16)])
                c.Hypercall(GuestCalls.EventChannelOpCompat, $"event_channel_op_compat({bad.Text})", AnswerFormat.Result, bad);
        });
        script.Case("a whole operation is read whatever it needs", c =>
        {
            // struct evtchn_op ends with the longest of its arguments.
            ScratchPage page = c.Page();
            c.UnmappedPage("behind");
            Value exact = page[ProbeLayout.PageSize - 28].Named("28 bytes before a page's end");
            Value shorter = page[ProbeLayout.PageSize - 24].Named("24 bytes before a page's end");
            c.Put(exact, 4, (int)EventOperation.Send);
            c.Hypercall(GuestCalls.EventChannelOpCompat, $"event_channel_op_compat({exact.Text})", AnswerFormat.Result, exact);
            c.Put(shorter, 4, (int)EventOperation.Send);
            c.Hypercall(GuestCalls.EventChannelOpCompat, $"event_channel_op_compat({shorter.Text})", AnswerFormat.Result, shorter);
        });
        script.Case("a result that cannot be told", c =>
        {
            ScratchPage page = c.ReadOnlyPageOf((0, 4, (int)EventOperation.BindIpi));
            c.Hypercall(GuestCalls.EventChannelOpCompat, "event_channel_op_compat(bind_ipi in a read-only page)", AnswerFormat.Result, page.At);
        });
    });

    public static AbiScript CreateFifo() => new("event-channel-fifo", "event_channel_op", script =>
    {
        const int offsetOfVcpu = 12;
        const int pageSize = ProbeLayout.PageSize;
        script.LevelPorts();
        script.Case("before there is a control block", c =>
        {
            ScratchPage array = c.Page();
            c.EventChannelOp(EventOperation.ExpandArray, "array", c.Structure("request", 8, (0, 8, array.Mfn)));
            Value port = c.Keep(c.BindIpi(0), "port");
            c.SetPriority(port, 0);
            c.SetPriority(port, 16);
            c.SetPriority(0, 0);
            c.SetPriority(LastTwoLevelPort, 0);
            c.ClosePort(port);
        });
        script.Case("control blocks that are refused", c =>
        {
            ScratchPage block = c.Page();
            void Init(string text, Value frame, Value offset, Value vcpu)
                => c.EventChannelOp(EventOperation.InitControl, text, c.Structure("request", 24, (0, 8, frame), (8, 4, offset), (offsetOfVcpu, 4, vcpu)));
            Init("vCPU 100", block.Mfn, 0, 100);
            Init("offset 4", block.Mfn, 4, 0);
            Init("offset beyond the page", block.Mfn, pageSize - 64, 0);
            Init("offset huge", block.Mfn, 0xffff_fff8U, 0);
            Init("frame of nobody", 0xff_ffff_ffffUL, 0, 0);
            Init("frame of the root table", c.Root, 0, 0);
        });
        script.Case("bad pointers", c =>
        {
            foreach (EventOperation operation in (EventOperation[])[EventOperation.InitControl, EventOperation.ExpandArray, EventOperation.SetPriority])
            {
                c.EventChannelOp(operation, BadAddress.Null);
                c.EventChannelOp(operation, BadAddress.NonCanonical);
                c.EventChannelOp(operation, BadAddress.Hypervisor);
            }
        });
        script.Case("a port under the FIFO ABI", c =>
        {
            ScratchPage block = c.Page();
            ScratchPage array = c.Page();
            ScriptBuffer request = c.Structure("request", 24, (0, 8, block.Mfn));
            c.EventChannelOp(EventOperation.InitControl, "control block", request);
            c.Load(request[16], 1);
            c.EventChannelOp(EventOperation.InitControl, "control block again", request);

            // What the toolstack's ports bring is not to be seen; they are masked in pairs.
            c.Fill(array.At, EventSteps.FirstPort / 2, 8, 0x4000_0000_4000_0000UL);
            c.EventChannelOp(EventOperation.ExpandArray, "array", c.Structure("request", 8, (0, 8, array.Mfn)));
            Value port = c.Keep(c.BindIpi(0), "port");
            c.SetPriority(port, 3);
            c.SetPriority(port, 16);
            Value word = (array.At + (port << 2)).Named("the port's word");
            c.Load(word, 4);
            c.Unmask(port);
            c.Send(port);
            c.Load(word, 4);
            c.Load(block.At, 4);
            c.ClosePort(port);
            c.EventChannelOp(EventOperation.ExpandArray, "a frame of nobody", c.Structure("request", 8, (0, 8, 0xff_ffff_ffffUL)));
        });
    });

    public static AbiScript CreateReset() => new("event-channel-reset", "event_channel_op", script =>
    {
        script.LevelPorts();
        script.Case("domains that cannot be reset", c =>
        {
            foreach (Value domain in (Value[])[DomainIds.Absent, DomainIds.Xen, DomainIds.Io, DomainIds.Invalid])
                c.EventChannelOp(EventOperation.Reset, domain.Text, c.Structure("request", 8, (0, 2, domain)));
        });
        script.Case("a reset that was not begun cannot go on", c =>
            c.EventChannelOp(EventOperation.ResetContinue, "self", c.Structure("request", 8, (0, 2, DomainIds.Self))));
        script.Case("ports can be had until there are no more", c =>
        {
            ScriptBuffer request = c.Structure("request", 8, (0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
            c.Kernel("alloc_unbound until it fails", a =>
            {
                Iced.Intel.Label next = a.CreateLabel();
                a.Label(ref next);
                a.mov(edi, (int)EventOperation.AllocUnbound);
                a.mov(rsi, request.Address);
                a.mov(eax, (int)GuestHypercall.EventChannelOp);
                a.syscall();
                a.test(rax, rax);
                a.jz(next);
            }, show: [Register64.Rax]);
            c.BindIpi(0);
            c.BindVirq(Virq.Debug, 0);
            c.BindInterdomain(DomainIds.Self, EventSteps.FirstPort);
            c.ClosePort(EventSteps.FirstPort);
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Show(port);
            c.Send(port);
            c.ShowPending();
        });

        // The console's port goes with the others, so it is the domain's end that tells: a reboot if all was as it should be.
        script.Case("a reset closes all ports, clears what is pending, and the lowest is free again", c =>
        {
            ScriptBuffer domain = c.Structure("domain", 8, (0, 2, DomainIds.Self));
            ScriptBuffer status = c.Structure("status", StatusField.Size, (StatusField.Domain, 2, DomainIds.Self), (StatusField.Port, 4, EventSteps.FirstPort), (StatusField.Status, 4, 77));
            ScriptBuffer request = c.Structure("request", 8, (0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
            ScriptBuffer good = c.Structure("good", 8, (0, 4, (int)GuestShutdownReason.Reboot));
            ScriptBuffer bad = c.Structure("bad", 8, (0, 4, (int)GuestShutdownReason.Crash));

            // What the console's other end has not taken before, it never will.
            c.Settle();
            c.Kernel("reset, status, alloc_unbound, shutdown", a =>
            {
                Iced.Intel.Label failed = a.CreateLabel();
                void Operation(EventOperation operation, ScriptBuffer structure) => EventSteps.EmitOperation(a, operation, structure, failed);

                Operation(EventOperation.Reset, domain);
                Operation(EventOperation.Status, status);
                a.mov(rsi, status.Address);
                a.cmp(__dword_ptr[rsi + StatusField.Status], 0);
                a.jne(failed);
                a.mov(rsi, ProbeLayout.SharedInfoPage);
                a.cmp(__qword_ptr[rsi + SharedInfoOffset.EvtchnPending], 0);
                a.jne(failed);
                Operation(EventOperation.AllocUnbound, request);
                a.mov(rsi, request.Address);
                a.cmp(__dword_ptr[rsi + 4], 1);
                a.jne(failed);
                EventSteps.EmitVerdict(a, good, bad, ref failed);
            });
        });
    });

    private static Value Compat(AbiCase c, EventOperation operation, int result, string arguments, params (int Offset, int Size, Value Value)[] fields)
    {
        ScriptBuffer s = c.Structure("operation", 40, [(0, 4, (int)operation), .. fields]);
        c.Hypercall(GuestCalls.EventChannelOpCompat, $"event_channel_op_compat({EventSteps.Name(operation)}, {arguments})", AnswerFormat.Result, s);
        return EventSteps.Field32(s[result], EventSteps.Name(operation));
    }
}
