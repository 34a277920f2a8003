// What the hot code may not do, because the guest's state is in the processor while it runs and no runtime is there to help.
using Iced.Intel;

namespace XenSharp.Freestanding.Tests;

/// <summary>
/// The rules: the guest's vector, x87 and mask registers are not touched, which nobody saves; no segment is used, whose bases are the
/// guest's; nothing is kept below RSP; nothing is privileged or leads to an interrupt; control stays within the code but for calls
/// through a pointer that the caller supplies; what is addressed relative to RIP is read only.
/// </summary>
internal static class InstructionRules
{
    /// <summary>Sentences about what breaks the rules.</summary>
    /// <param name="code">All of it, from offset 0.</param>
    /// <param name="end">Offset of the end of what can be read.</param>
    public static List<string> Violations(ReadOnlySpan<byte> code, int end)
    {
        List<string> violations = [];
        var decoder = Decoder.Create(64, new ByteArrayCodeReader(code.ToArray()));
        var factory = new InstructionInfoFactory();
        while (decoder.IP < (ulong)code.Length)
        {
            decoder.Decode(out Instruction instruction);
            string what = $"{instruction.IP:x}: {instruction}";
            if (instruction.IsInvalid)
                violations.Add($"{what}: no instruction");
            if (instruction.IsPrivileged)
                violations.Add($"{what}: privileged");
            if (instruction.FlowControl is FlowControl.Interrupt or FlowControl.Exception
                || instruction.Mnemonic is Mnemonic.Syscall or Mnemonic.Sysenter)
            {
                violations.Add($"{what}: leaves the code");
            }

            if (instruction.SegmentPrefix is Register.FS or Register.GS)
                violations.Add($"{what}: uses a segment");
            if (instruction.MemoryBase == Register.RSP && (long)instruction.MemoryDisplacement64 < 0)
                violations.Add($"{what}: below the stack pointer, where an interrupt pushes its frame");
            if (instruction.CpuidFeatures.Contains(CpuidFeature.FPU))
                violations.Add($"{what}: uses the x87");
            InstructionInfo info = factory.GetInfo(instruction);
            foreach (UsedRegister used in info.GetUsedRegisters())
            {
                if (used.Register.IsVectorRegister() || used.Register.IsMM() || used.Register.IsK())
                    violations.Add($"{what}: touches {used.Register}");
            }

            if (instruction.IsIPRelativeMemoryOperand)
            {
                if (instruction.IPRelativeMemoryAddress >= (ulong)end)
                    violations.Add($"{what}: outside the image");
                if (info.GetUsedMemory().Any(used => used.Access is not (OpAccess.Read or OpAccess.None or OpAccess.NoMemAccess)))
                    violations.Add($"{what}: writes to the image");
            }

            if (instruction.FlowControl is FlowControl.Call or FlowControl.ConditionalBranch or FlowControl.UnconditionalBranch
                && instruction.NearBranchTarget >= (ulong)code.Length)
            {
                violations.Add($"{what}: leaves the code");
            }
        }

        return violations;
    }

    private static bool Any(this ReadOnlySpan<UsedMemory> memory, Func<UsedMemory, bool> condition)
    {
        foreach (UsedMemory used in memory)
        {
            if (condition(used))
                return true;
        }

        return false;
    }
}
