// The instructions of a SYSCALL entry, for tests that interrupt it at each of them.
using Iced.Intel;

namespace XenSharp.Kvm.Tests;

internal static class EntryCode
{
    /// <summary>Addresses of the instructions of kernel mode's 64-bit entry, but for those that leave the VM.</summary>
    internal static List<ulong> InstructionsOf(SyscallEntry entry)
    {
        byte[] bytes = entry.Code[..(int)(entry.End - entry.Of32BitCode)].ToArray();
        var decoder = Decoder.Create(64, bytes, entry.Of32BitCode);
        List<ulong> found = [];
        while (decoder.IP < entry.End)
        {
            Instruction instruction = decoder.Decode();
            if (instruction.IP >= entry.Of64BitCode && instruction.Mnemonic is not (Mnemonic.Out or Mnemonic.Ud2))
                found.Add(instruction.IP);
        }

        return found;
    }
}
