// Where code ends that cannot go on.
using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using System.Runtime;
using System.Runtime.CompilerServices;

namespace System
{
    /// <summary>What would be an exception outside: a bug of ours, never something that a guest can cause.</summary>
    internal static unsafe class Trap
    {
        /// <summary>
        /// An access to address 0, which is mapped nowhere: the page fault, with the address of who called on the stack, is the report.
        /// </summary>
        [DoesNotReturn]
        [MethodImpl(MethodImplOptions.NoInlining)]
        internal static void Take()
        {
            while (true)
                Threading.Volatile.Write(ref *(int*)0, 0);
        }
    }
}

namespace System.Diagnostics
{
    public static class Debug
    {
        [Conditional("DEBUG")]
        public static void Assert(bool condition, string message)
        {
            if (!condition)
                Trap.Take();
        }
    }
}

namespace Internal.Runtime.CompilerHelpers
{
    /// <summary>What compiled code calls where the language says that an exception is thrown.</summary>
    internal static class ThrowHelpers
    {
        private static void ThrowOverflowException() => Trap.Take();

        private static void ThrowIndexOutOfRangeException() => Trap.Take();

        private static void ThrowNullReferenceException() => Trap.Take();

        private static void ThrowDivideByZeroException() => Trap.Take();
    }

    /// <summary>What compiled code calls by a symbol's name.</summary>
    internal static unsafe class RuntimeHelpers
    {
        /// <summary>A buffer on the stack was written past its end.</summary>
        [RuntimeExport("RhpFallbackFailFast")]
        private static void FailFast() => Trap.Take();

        /// <summary>A call from outside begins: a collector would be told, and there is none.</summary>
        [RuntimeExport("RhpReversePInvoke")]
        private static void EnterFromOutside(void* frame)
        {
        }

        /// <summary>A collector wants this thread to stop: never, see <c>RhpTrapThreads</c> in freestanding.ld.</summary>
        [RuntimeExport("RhpGcPoll")]
        private static void Poll()
        {
        }

        /// <summary>A call from outside ends.</summary>
        [RuntimeExport("RhpReversePInvokeReturn")]
        private static void ReturnOutside(void* frame)
        {
        }
    }
}
