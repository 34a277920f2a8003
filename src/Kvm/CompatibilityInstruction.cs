// Instructions of 32-bit code that KVM's interpreter does not know, made ready for the processor.
using Iced.Intel;

namespace XenSharp.Kvm;

/// <summary>
/// Where KVM interprets 32-bit code, floating point and vectors raise #UD in it. Such an instruction is encoded anew for 64-bit mode, in
/// which the processor runs the guest itself, onto a page of the vCPU's, with an UD2 behind it. One per vCPU; allocates nothing afterwards.
/// </summary>
internal sealed unsafe class CompatibilityInstruction
{
    /// <summary>Most bytes of an instruction.</summary>
    public const int MaxLength = 15;

    private readonly byte* _page;
    private readonly Source _source = new();
    private readonly Target _target;
    private readonly Decoder _decoder;
    private readonly Encoder _encoder;
    private Instruction _instruction;

    /// <param name="address">Where the guest sees the page.</param>
    /// <param name="page">Host view of the page.</param>
    public CompatibilityInstruction(ulong address, byte* page)
    {
        Start = address;
        _page = page;
        _target = new Target(page);
        _decoder = Decoder.Create(32, _source);
        _encoder = Encoder.Create(64, _target);
    }

    /// <summary>Where the instruction lies.</summary>
    public ulong Start { get; }

    /// <summary>Where the UD2 behind it does.</summary>
    public ulong End { get; private set; }

    /// <summary>Bytes that it has in 32-bit code.</summary>
    public uint Length => (uint)_instruction.Length;

    /// <summary>The segment of its memory operand, or none.</summary>
    public Register Segment { get; private set; }

    /// <summary>Where instructions are read into.</summary>
    public Span<byte> Code => _source.Bytes;

    /// <summary>Encodes the instruction that <see cref="Code"/> begins with.</summary>
    /// <param name="length">Bytes of it that could be read.</param>
    /// <param name="address">Where it stands, the offset in its code segment.</param>
    /// <returns>False for one that is none, that the interpreter knows, or that is not the same in 64-bit mode.</returns>
    public bool TryEncode(int length, ulong address)
    {
        const int undefinedInstruction = 0x0b0f;
        _source.Rewind(length);
        _target.Rewind();
        _decoder.IP = address;
        _decoder.Decode(out _instruction);
        if (_instruction.IsInvalid || _instruction.FlowControl != FlowControl.Next || _instruction.IsStackInstruction)
            return false;
        Segment = Register.None;
        for (int operand = 0; operand < _instruction.OpCount; operand++)
        {
            OpKind kind = _instruction.GetOpKind(operand);
            if (kind == OpKind.Register && _instruction.GetOpRegister(operand).IsSegmentRegister())
                return false;
            if (kind == OpKind.Memory)
                Segment = _instruction.MemorySegment;
            else if (kind is >= OpKind.MemorySegSI and <= OpKind.MemoryESRDI)
                return false;
        }

        if (!_encoder.TryEncode(_instruction, Start, out uint encoded, out _))
            return false;
        End = Start + encoded;
        *(ushort*)(_page + encoded) = undefinedInstruction;
        return true;
    }

    private sealed class Source : CodeReader
    {
        private readonly byte[] _bytes = new byte[MaxLength];
        private int _next;
        private int _end;

        public Span<byte> Bytes => _bytes;

        public void Rewind(int length) => (_next, _end) = (0, length);

        public override int ReadByte() => _next < _end ? _bytes[_next++] : -1;
    }

    private sealed class Target(byte* page) : CodeWriter
    {
        private readonly byte* _start = page;
        private byte* _next;

        public void Rewind() => _next = _start;

        public override void WriteByte(byte value) => *_next++ = value;
    }
}
