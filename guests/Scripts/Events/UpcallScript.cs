// The event callback: when it comes, what it finds, and what masks do.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class UpcallScript
{
    private const int CallbackMaskEvents = 1;

    public static AbiScript Create() => new("upcalls", "callbacks", script =>
    {
        script.LevelPorts();
        script.Case("an event that nothing masks", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowUpcallState();
            c.ShowPending();
            c.Send(port);
            End(c, port);
        });
        script.Case("a masked port stays pending, and is delivered by its unmasking", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowPending();
            c.ShowUpcallState();
            c.Unmask(port);
            c.ShowPending();
            End(c, port);
        });
        script.Case("unmasking a port that is not pending", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.MaskUpcalls(false);
            c.Unmask(port);
            c.Unmask(port);
            End(c, port);
        });
        script.Case("upcalls are masked: flag, selector and bit are there", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(true);
            c.Send(port);
            c.ShowUpcallState();
            c.ShowPending();
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("clearing the mask alone brings nothing before the kernel is entered", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.Kernel("clear the mask, look, make a hypercall, look", a =>
            {
                a.mov(rax, ProbeLayout.SharedInfoPage);
                a.mov(__byte_ptr[rax + VcpuInfoField.UpcallMask], 0);
                a.movzx(r12d, __byte_ptr[rax + VcpuInfoField.UpcallPending]);
                a.xor(edi, edi);
                a.xor(esi, esi);
                a.mov(eax, (int)GuestHypercall.XenVersion);
                a.syscall();
                a.mov(rax, ProbeLayout.SharedInfoPage);
                a.movzx(r13d, __byte_ptr[rax + VcpuInfoField.UpcallPending]);
            }, show: [Register64.R12, Register64.R13]);
            End(c, port);
        });
        script.Case("an event that is sent twice is delivered once", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(true);
            c.Send(port);
            c.Send(port);
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            End(c, port);
        });
        script.Case("several ports come in one upcall", c =>
        {
            Value[] ports = [.. Enumerable.Range(0, 3).Select(i => c.Keep(c.BindIpi(0), $"port {i}"))];
            foreach (Value port in ports)
                c.Unmask(port);
            c.MaskUpcalls(true);
            foreach (Value port in ports)
                c.Send(port);
            c.ShowPending();
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.ShowPending();
            End(c, ports);
        });
        script.Case("one of two ports is masked", c =>
        {
            Value open = c.Keep(c.BindIpi(0), "open port");
            Value masked = c.Keep(c.BindIpi(0), "masked port");
            c.Unmask(open);
            c.MaskUpcalls(false);
            c.Send(masked);
            c.Send(open);
            c.ShowPending();
            c.Unmask(masked);
            c.ShowPending();
            End(c, open, masked);
        });
        script.Case("a pending port that is set again raises nothing", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Send(port);
            c.UnmaskOwnPorts();
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowPending();
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("a selector that is set keeps the flag from being set", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.PendingSelector, 8, 1);
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowPending();
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("the flag alone makes an upcall", c =>
        {
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1, 1);
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.ShowUpcallState();
            c.QuietEvents();
        });
        script.Case("any value of the flag and of the mask", c =>
        {
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1, 0x80);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallMask, 1, 0);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1, 0);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallMask, 1, 0x80);
            c.Store(ProbeLayout.SharedInfoPage + VcpuInfoField.UpcallPending, 1, 1);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.ShowUpcallState();
            c.QuietEvents();
        });
        script.Case("an event that comes in user mode", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.MaskUpcalls(false);
            c.User("nothing", static _ => { });
            c.Send(port);
            End(c, port);
        });
        script.Case("an exception keeps the mask, and its handler can be interrupted", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(false);
            c.Kernel("ud2", static a => a.ud2());
            c.Send(port);
            c.MaskUpcalls(true);
            c.Kernel("ud2", static a => a.ud2());
            End(c, port);
        });
        script.Case("ports of the second word", c =>
        {
            ScriptBuffer request = c.Structure("request", 8, (0, 2, DomainIds.Self), (2, 2, DomainIds.Self));
            for (int i = EventSteps.FirstPort; i < 70; i++)
                c.EventChannelOp(EventOperation.AllocUnbound, "again", request);
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowUpcallState();
            c.ClosePort(16);
            Value low = c.Keep(c.BindIpi(0), "low port");
            c.Unmask(low);
            c.MaskUpcalls(true);
            c.Send(low);
            c.Send(port);
            c.Load(ProbeLayout.SharedInfoPage + VcpuInfoField.PendingSelector);
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.Load(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnPending + 8);
            End(c, port, low);
        });
        script.Case("the bind that makes a loop is an event to who binds", c =>
        {
            Value far = c.Keep(c.AllocUnbound(DomainIds.Self, DomainIds.Self), "far");
            c.Store(ProbeLayout.SharedInfoPage + SharedInfoOffset.EvtchnMask + 8, 8, 0);
            c.MaskUpcalls(false);
            Value near = c.Keep(c.BindInterdomain(DomainIds.Self, far), "near");
            c.Send(far);
            c.Send(near);
            End(c, near, far);
        });
        script.Case("closing a port that is pending and masked by the flag leaves the flag", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            c.ClosePort(port);
            c.ShowUpcallState();
            c.MaskUpcalls(false);
            c.Hypercall(GuestHypercall.XenVersion, 0, 0);
            c.QuietEvents();
        });
        script.Case("a callback registered with its events masked", c =>
        {
            ScriptBuffer register = c.Structure("callback", 16, (0, 2, 0), (2, 2, CallbackMaskEvents), (8, 8, c.UpcallHandler));
            c.Hypercall(GuestHypercall.CallbackOp, 0, register);
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.MaskUpcalls(false);
            c.Send(port);
            c.ShowUpcallState();
            End(c, port);
        });
        script.Case("iret to a frame whose interrupt flag is clear masks", c =>
        {
            c.MaskUpcalls(false);
            Return(c, 0x2);
            c.ShowUpcallState();
            Return(c, 0x202);
            c.ShowUpcallState();
            c.QuietEvents();
        });
        script.Case("iret that unmasks delivers at once", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            c.Send(port);
            Return(c, 0x202);
            c.ShowUpcallState();
            End(c, port);
        });
    });

    /// <summary>Returns by iret to the next instruction in kernel mode.</summary>
    private static void Return(AbiCase c, int flags)
        => c.Kernel($"iret with rflags 0x{flags:x}", a =>
        {
            const int flatKernelSs = 0xe02b;
            // Of a frame, a privilege level of 0 is the kernel's, 3 user mode's.
            const int flatKernelCs = 0xe030;
            Iced.Intel.Label after = a.CreateLabel();
            a.mov(rdx, rsp);
            a.mov(eax, flatKernelSs);
            a.push(rax);
            a.push(rdx);
            a.push(flags);
            a.mov(eax, flatKernelCs);
            a.push(rax);
            a.lea(rax, __[after]);
            a.push(rax);
            a.push(0);
            a.push(rcx);
            a.push(r11);
            a.push(rax);
            a.mov(eax, (int)GuestHypercall.Iret);
            a.syscall();
            a.Label(ref after);
            a.nop();
        });

    private static void End(AbiCase c, params Value[] ports)
    {
        c.QuietEvents();
        foreach (Value port in ports)
            c.ClosePort(port);
        c.QuietEvents();
    }
}
