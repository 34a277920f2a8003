// The attributes that the hot files carry, and those by which the compilers are told what a method is.
namespace System
{
    public abstract class Attribute
    {
    }

    public enum AttributeTargets
    {
        All = 0x7fff,
    }

    public sealed class AttributeUsageAttribute(AttributeTargets validOn) : Attribute
    {
        public AttributeTargets ValidOn { get; } = validOn;

        public bool AllowMultiple { get; set; }

        public bool Inherited { get; set; }
    }

    public sealed class FlagsAttribute : Attribute
    {
    }

    public sealed class ParamArrayAttribute : Attribute
    {
    }
}

namespace System.Diagnostics
{
    /// <summary>Calls of the method are compiled where the symbol is defined.</summary>
    public sealed class ConditionalAttribute(string condition) : Attribute
    {
        public string ConditionString { get; } = condition;
    }
}

namespace System.Diagnostics.CodeAnalysis
{
    public sealed class DoesNotReturnAttribute : Attribute
    {
    }

    /// <summary>A struct's member may return a reference to the struct's own field.</summary>
    public sealed class UnscopedRefAttribute : Attribute
    {
    }
}

namespace System.Reflection
{
    public sealed class DefaultMemberAttribute(string memberName) : Attribute
    {
        public string MemberName { get; } = memberName;
    }
}

namespace System.Runtime
{
    /// <summary>The method is a symbol of the object file, callable by the platform's C convention.</summary>
    public sealed class RuntimeExportAttribute(string entryPoint) : Attribute
    {
        public string EntryPoint { get; } = entryPoint;
    }

    /// <summary>The method is a symbol that something else defines.</summary>
    public sealed class RuntimeImportAttribute(string entryPoint) : Attribute
    {
        public string EntryPoint { get; } = entryPoint;
    }
}

namespace System.Runtime.CompilerServices
{
    public enum MethodImplOptions
    {
        NoInlining = 8,
        AggressiveInlining = 256,
        InternalCall = 4096,
    }

    public sealed class MethodImplAttribute(MethodImplOptions options) : Attribute
    {
        public MethodImplOptions Value { get; } = options;
    }

    /// <summary>The compiler knows what the method does and emits that instead of a call.</summary>
    public sealed class IntrinsicAttribute : Attribute
    {
    }

    public sealed class ExtensionAttribute : Attribute
    {
    }

    public sealed class CompilerGeneratedAttribute : Attribute
    {
    }

    /// <summary>A field with fixed elements (<c>fixed byte Magic[32]</c>).</summary>
    public sealed class FixedBufferAttribute(Type elementType, int length) : Attribute
    {
        public Type ElementType { get; } = elementType;

        public int Length { get; } = length;
    }

    public sealed class UnsafeValueTypeAttribute : Attribute
    {
    }

    /// <summary>The struct's one field is repeated.</summary>
    public sealed class InlineArrayAttribute(int length) : Attribute
    {
        public int Length { get; } = length;
    }

    /// <summary>Locals keep what was on the stack.</summary>
    public sealed class SkipLocalsInitAttribute : Attribute
    {
    }

    /// <summary>Marks a call through a function pointer that tells no collector of itself.</summary>
    public class CallConvSuppressGCTransition
    {
    }

    /// <summary>Marks a property that only an initializer sets.</summary>
    public static class IsExternalInit
    {
    }

    /// <summary>Marks a volatile field.</summary>
    public static class IsVolatile
    {
    }
}

namespace System.Runtime.InteropServices
{
    public enum LayoutKind
    {
        Sequential = 0,
        Explicit = 2,
        Auto = 3,
    }

    public sealed class StructLayoutAttribute(LayoutKind layoutKind) : Attribute
    {
        public LayoutKind Value { get; } = layoutKind;

        public int Pack;

        public int Size;
    }

    public sealed class FieldOffsetAttribute(int offset) : Attribute
    {
        public int Value { get; } = offset;
    }

    public sealed class InAttribute : Attribute
    {
    }

    /// <summary>Marks the type parameter of an <c>unmanaged</c> constraint.</summary>
    public enum UnmanagedType
    {
    }
}
