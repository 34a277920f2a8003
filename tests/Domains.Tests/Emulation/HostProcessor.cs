// Invented host processors to derive policies from.
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

internal static class HostProcessor
{
    public static readonly CpuidLeaf Intel = new(0x20, 0x756e6547, 0x6c65746e, 0x49656e69);
    public static readonly CpuidLeaf Amd = new(0x10, 0x68747541, 0x444d4163, 0x69746e65);

    public static CpuidOptions Options { get; } = new()
    {
        VcpuCount = 4, TscAuxUsable = true, TscKiloHertz = 2_000_000, HostTscKiloHertz = 2_000_000, TscReliable = true,
        MicrocodeRevision = 0xa201_025, EndOfMachineFrames = new Mfn(0x10_0000),
    };

    /// <summary>A processor with every bit of every feature word, and XSAVE components 2–9 of 256 bytes each.</summary>
    public static CpuidSource Everything(CpuidLeaf identity) => WithFeatures(identity, _ => uint.MaxValue);

    /// <summary>The same, with feature words of one's choice. They are numbered by leaf and register.</summary>
    public static CpuidSource WithFeatures(CpuidLeaf identity, Func<(uint Leaf, uint Subleaf, char Register), uint> word)
        => (leaf, subleaf) => (leaf, subleaf) switch
        {
            (0, _) => identity,
            (1, _) => new CpuidLeaf(0x00a2_0f12, 0x0510_0800, word((1, 0, 'c')), word((1, 0, 'd'))),
            (4, 0) => new CpuidLeaf(0x1c00_c121, 0x01c0_003f, 0x3f, 0x8),
            (4, 1) => new CpuidLeaf(0x1c03_c163, 0x03c0_003f, 0xfff, 0xe),
            (7, 0) => new CpuidLeaf(2, word((7, 0, 'b')), word((7, 0, 'c')), word((7, 0, 'd'))),
            (7, 1) => new CpuidLeaf(word((7, 1, 'a')), uint.MaxValue, uint.MaxValue, uint.MaxValue),
            (7, 2) => new CpuidLeaf(uint.MaxValue, uint.MaxValue, uint.MaxValue, word((7, 2, 'd'))),
            (0xd, 0) => new CpuidLeaf(0x2e7, 0x988, 0xa88, 0),
            (0xd, 1) => new CpuidLeaf(word((0xd, 1, 'a')), 0x988, 0x1800, 0),
            (0xd, 2) => new CpuidLeaf(256, 576, 0, 0),
            (0xd, 5) => new CpuidLeaf(64, 832, 0, 0),
            (0xd, 6) => new CpuidLeaf(512, 896, 2, 0),
            (0xd, 7) => new CpuidLeaf(1024, 1408, 2, 0),
            (0xd, _) => new CpuidLeaf(8, 2432, 0, 0),
            (0x80000000, _) => new CpuidLeaf(0x80000028, identity.Ebx, identity.Ecx, identity.Edx),
            (0x80000001, _) => new CpuidLeaf(0x00a2_0f12, 0x4000_0000, word((0x80000001, 0, 'c')), word((0x80000001, 0, 'd'))),
            (0x80000007, _) => new CpuidLeaf(0x3b, 0x3b, 0x3b, word((0x80000007, 0, 'd'))),
            (0x80000008, _) => new CpuidLeaf(0x0030_3930, word((0x80000008, 0, 'b')), 0x7007, 0x10007),
            (0x80000021, _) => new CpuidLeaf(word((0x80000021, 0, 'a')), uint.MaxValue, uint.MaxValue, uint.MaxValue),
            (>= 0x80000002 and <= 0x80000006, _) => new CpuidLeaf(0x41414141, 0x42424242, 0x43434343, 0x44444444),
            _ => new CpuidLeaf(uint.MaxValue, uint.MaxValue, uint.MaxValue, uint.MaxValue),
        };
}
