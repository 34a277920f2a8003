// set_callbacks (4), callback_op (30), nmi_op (28).
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>Where the guest wants to be entered.</summary>
internal static unsafe class Callbacks
{
    private const ushort MaskEvents = 1;

    private enum Command : uint
    {
        Register = 0,
        Unregister = 1,
    }

    /// <summary>CALLBACKTYPE_*.</summary>
    private enum CallbackType : ushort
    {
        Event = 0,
        Failsafe = 1,
        Syscall = 2,
        Nmi = 4,
        Sysenter = 5,
        Syscall32 = 7,
    }

    /// <summary>struct callback_register.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Registration
    {
        public CallbackType Type;
        public ushort Flags;
        private uint _padding;
        public ulong Address;
    }

    /// <summary>set_callbacks(event, failsafe, syscall): addresses that are not canonical are passed over.</summary>
    public static long SetCallbacks(Vcpu vcpu, in HypercallArguments arguments)
    {
        _ = Register(vcpu.Context, new Registration { Type = CallbackType.Event, Address = arguments.A0 });
        _ = Register(vcpu.Context, new Registration { Type = CallbackType.Failsafe, Address = arguments.A1 });
        _ = Register(vcpu.Context, new Registration { Type = CallbackType.Syscall, Address = arguments.A2 });
        return 0;
    }

    /// <summary>callback_op(command, argument).</summary>
    public static long CallbackOp(Vcpu vcpu, in HypercallArguments arguments)
    {
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Register:
                return GuestAccess.Read(vcpu.Context, arguments.A1, out Registration registration)
                    ? -(long)Register(vcpu.Context, registration)
                    : -(long)Errno.EFAULT;
            case Command.Unregister:
                return GuestAccess.Read(vcpu.Context, arguments.A1, out CallbackType type)
                    ? -(long)Unregister(vcpu.Context, type)
                    : -(long)Errno.EFAULT;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    /// <summary>nmi_op(command, argument): XENNMI_register_callback (struct xennmi_callback), XENNMI_unregister_callback.</summary>
    public static long NmiOp(Vcpu vcpu, in HypercallArguments arguments)
    {
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Register:
                return GuestAccess.Read(vcpu.Context, arguments.A1, out ulong address)
                    ? -(long)Register(vcpu.Context, new Registration { Type = CallbackType.Nmi, Address = address })
                    : -(long)Errno.EFAULT;
            case Command.Unregister:
                return -(long)Unregister(vcpu.Context, CallbackType.Nmi);
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    private static Errno Register(VcpuContext* vcpu, in Registration registration)
    {
        if (!new VirtualAddress(registration.Address).IsCanonical)
            return Errno.EINVAL;
        VcpuState* state = vcpu->State;
        switch (registration.Type)
        {
            case CallbackType.Event:
                state->EventCallback = registration.Address;
                return Errno.None;
            case CallbackType.Failsafe:
                state->FailsafeCallback = registration.Address;
                SetFlag(state, CallbackFlags.FailsafeDisablesEvents, registration.Flags);
                return Errno.None;
            case CallbackType.Syscall:
                state->SyscallCallback = registration.Address;
                SetFlag(state, CallbackFlags.SyscallDisablesEvents, registration.Flags);
                return Errno.None;
            case CallbackType.Syscall32:
                state->Syscall32Callback = registration.Address;
                SetFlag(state, CallbackFlags.Syscall32DisablesEvents, registration.Flags);
                return Errno.None;
            case CallbackType.Sysenter:
                state->SysenterCallback = registration.Address;
                SetFlag(state, CallbackFlags.SysenterDisablesEvents, registration.Flags);
                return Errno.None;
            case CallbackType.Nmi:
                const byte masksEvents = 4;
                state->Traps[(int)ExceptionVector.Nmi] = new TrapInfo
                {
                    Vector = (byte)ExceptionVector.Nmi,
                    Flags = masksEvents,
                    Cs = FlatSelectors.Ring3Cs64,
                    Address = registration.Address,
                };
                return Errno.None;
            default:
                return Errno.ENOSYS;
        }
    }

    private static Errno Unregister(VcpuContext* vcpu, CallbackType type)
    {
        switch (type)
        {
            case CallbackType.Event:
            case CallbackType.Failsafe:
            case CallbackType.Syscall:
            case CallbackType.Syscall32:
            case CallbackType.Sysenter:
                return Errno.EINVAL;
            case CallbackType.Nmi:
                vcpu->State->Traps[(int)ExceptionVector.Nmi] = default;
                return Errno.None;
            default:
                return Errno.ENOSYS;
        }
    }

    private static void SetFlag(VcpuState* state, CallbackFlags flag, ushort registrationFlags)
    {
        if ((registrationFlags & MaskEvents) != 0)
            state->CallbackFlags |= flag;
        else
            state->CallbackFlags &= ~flag;
    }
}
