// Instructions that have no other name.
using System.Runtime.CompilerServices;

namespace System.Runtime.Intrinsics.X86;

[Intrinsic]
public abstract class X86Base
{
    /// <summary>PAUSE.</summary>
    [Intrinsic]
    public static void Pause() => Pause();
}
