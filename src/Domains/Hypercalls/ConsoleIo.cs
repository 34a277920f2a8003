// console_io (18).
using XenSharp.Core;

namespace XenSharp.Domains.Hypercalls;

/// <summary>The emergency console: what a guest prints before, or without, its PV console.</summary>
internal static unsafe class ConsoleIo
{
    private const int ChunkSize = 128;

    private enum Command : uint
    {
        Write = 0,
    }

    /// <summary>console_io(command, count, buffer).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Write:
                return Write(vcpu, arguments.A2, (uint)arguments.A1);
            default:
                // Input, and whatever else there may come to be, is the hardware domain's.
                return -(long)Errno.EPERM;
        }
    }

    private static long Write(Vcpu vcpu, ulong buffer, uint count)
    {
        byte* chunk = stackalloc byte[ChunkSize];
        for (bool first = true; count > 0; first = false)
        {
            if (!first && vcpu.Context->PreemptionDue)
                return Continuation.Create(vcpu.Context, new HypercallArguments { A0 = (ulong)Command.Write, A1 = count, A2 = buffer });
            uint length = Math.Min(count, ChunkSize);
            if (!GuestAccess.CopyFrom(vcpu.Context, buffer, chunk, length))
                return -(long)Errno.EFAULT;
            vcpu.Domain.WriteEmergencyConsole(new ReadOnlySpan<byte>(chunk, (int)length));
            buffer += length;
            count -= length;
        }

        return 0;
    }
}
