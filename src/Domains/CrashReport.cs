using System.Text;
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>What a person gets to read when a domain crashes: why, registers, code, stack, the last hypercalls.</summary>
internal static unsafe class CrashReport
{
    private const int CodeBytes = 32;
    private const int StackWords = 32;

    /// <summary>Writes the report of a vCPU as it stands; called on its own thread.</summary>
    public static string Write(Vcpu vcpu, string why)
    {
        var text = new StringBuilder();
        CpuRegisters* registers = vcpu.Context->Registers;
        SegmentRegisters* segments = vcpu.Context->Segments;
        VcpuState* state = vcpu.Context->State;
        _ = text.AppendLine($"Domain {vcpu.Domain.Id.Value} ({vcpu.Domain.Name}) crashed on vCPU {vcpu.Id}: {why}")
            .AppendLine()
            .AppendLine($"rip {registers->Rip:x16}  cs {segments->Cs:x4}  rflags {registers->Rflags:x8}  guest-{(state->KernelMode != 0 ? "kernel" : "user")} mode")
            .AppendLine($"rsp {registers->Rsp:x16}  ss {segments->Ss:x4}  cr2 {vcpu.Cpu.FaultAddress.Value:x16}  cr3 mfn {vcpu.Context->CurrentRoot:x}")
            .AppendLine($"rax {registers->Rax:x16}  rbx {registers->Rbx:x16}  rcx {registers->Rcx:x16}")
            .AppendLine($"rdx {registers->Rdx:x16}  rsi {registers->Rsi:x16}  rdi {registers->Rdi:x16}")
            .AppendLine($"rbp {registers->Rbp:x16}  r8  {registers->R8:x16}  r9  {registers->R9:x16}")
            .AppendLine($"r10 {registers->R10:x16}  r11 {registers->R11:x16}  r12 {registers->R12:x16}")
            .AppendLine($"r13 {registers->R13:x16}  r14 {registers->R14:x16}  r15 {registers->R15:x16}")
            .AppendLine($"fs base {segments->FsBase:x16}  gs base {segments->GsBase:x16}  other gs base {state->InactiveGsBase:x16}")
            .AppendLine();
        WriteCode(text, vcpu.Context);
        WriteStack(text, vcpu.Context);
        WriteHypercalls(text, vcpu.History);
        return text.ToString();
    }

    private static void WriteCode(StringBuilder text, VcpuContext* vcpu)
    {
        ulong rip = vcpu->Registers->Rip;
        byte[] code = ReadAsMuchAsPossible(vcpu, rip, CodeBytes);
        if (code.Length == 0)
        {
            _ = text.AppendLine("Code: not readable.").AppendLine();
            return;
        }

        _ = text.AppendLine($"Code: {Convert.ToHexStringLower(code)}");
        var decoder = Iced.Intel.Decoder.Create(64, code, rip);
        var formatter = new NasmFormatter();
        var output = new StringOutput();
        for (int i = 0; i < 4 && decoder.IP < rip + (ulong)code.Length; i++)
        {
            decoder.Decode(out Instruction instruction);
            formatter.Format(instruction, output);
            _ = text.AppendLine($"  {instruction.IP:x16}  {output.ToStringAndReset()}");
        }

        _ = text.AppendLine();
    }

    private static void WriteStack(StringBuilder text, VcpuContext* vcpu)
    {
        byte[] stack = ReadAsMuchAsPossible(vcpu, vcpu->Registers->Rsp, StackWords * sizeof(ulong));
        if (stack.Length < sizeof(ulong))
        {
            _ = text.AppendLine("Stack: not readable.").AppendLine();
            return;
        }

        _ = text.Append("Stack:");
        for (int i = 0; i + sizeof(ulong) <= stack.Length; i += sizeof(ulong))
            _ = text.Append(i % 32 == 0 ? Environment.NewLine + " " : string.Empty).Append($" {BitConverter.ToUInt64(stack, i):x16}");
        _ = text.AppendLine().AppendLine();
    }

    private static void WriteHypercalls(StringBuilder text, HypercallHistory history)
    {
        _ = text.AppendLine($"Last hypercalls, of {history.Count}:");
        foreach (HypercallRecord record in history.Records)
        {
            var number = (HypercallNumber)record.Number;
            string name = Enum.IsDefined(number) ? number.ToString() : $"#{record.Number}";
            HypercallArguments a = record.Arguments;
            int count = Hypercalls.HypercallTable.Find(record.Number).ArgumentCount;
            ulong[] all = [a.A0, a.A1, a.A2, a.A3, a.A4, a.A5];
            string list = string.Join(", ", all.Take(count == 0 ? 6 : count).Select(static value => $"{value:x}"));
            string result = record.Result is < 0 and > -4096 && Enum.IsDefined((Errno)(-record.Result))
                ? $"-{(Errno)(-record.Result)}"
                : $"{record.Result:x}";
            _ = text.AppendLine($"  {record.Rip:x16}  {name}({list}) = {result}");
        }
    }

    private static byte[] ReadAsMuchAsPossible(VcpuContext* vcpu, ulong address, int length)
    {
        var bytes = new byte[length];
        int read = 0;
        fixed (byte* to = bytes)
        {
            while (read < length && GuestAccess.CopyFrom(vcpu, address + (ulong)read, to + read, 1))
                read++;
        }

        return bytes[..read];
    }
}
