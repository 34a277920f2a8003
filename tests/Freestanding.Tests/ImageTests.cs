// What the image is made of: nothing that a monitor could not place, and no instruction that must not run there.
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Freestanding.Tests;

public sealed class ImageTests
{
    private HotImage _image = null!;

    [OneTimeSetUp]
    public void Place() => _image = new HotImage(HotImage.FilePath);

    [OneTimeTearDown]
    public void Remove() => _image.Dispose();

    [Test]
    public void Nothing_is_looked_for_elsewhere()
    {
        Assert.That(_image.Undefined, Is.Empty);
        Assert.That(_image.Symbols.Keys, Has.All.StartsWith("xensharp_"));
        const ulong needed = 1;
        Assert.That(_image.Dynamic.Keys, Has.No.Member(needed), "no library");
    }

    [Test]
    public void Nothing_is_relocated_or_run_at_start()
    {
        // DT_PLTRELSZ, DT_PLTGOT, DT_RELA, DT_INIT, DT_FINI, DT_REL, DT_TEXTREL, DT_JMPREL, DT_INIT_ARRAY, DT_FINI_ARRAY, DT_RELR.
        ulong[] tags = [2, 3, 7, 12, 13, 17, 22, 23, 25, 26, 36];
        Assert.That(_image.Dynamic.Keys.Intersect(tags), Is.Empty);
    }

    [Test]
    public void There_is_code_and_there_are_constants_and_no_variables()
    {
        Assert.That(_image.Segments.Count(s => s.IsCode), Is.EqualTo(1));
        Assert.That(_image.Segments.Count(s => s.IsConstants), Is.EqualTo(1));
        Assert.That(_image.Segments.Single(s => s.IsCode).Flags, Is.EqualTo(5), "readable and executable");
        Assert.That(_image.Segments, Has.None.Matches<Segment>(s => s.Type == 7), "thread-local storage");

        // The one writable segment is the dynamic linker's table, which is not placed.
        Segment dynamic = _image.Segments.Single(s => s.Type == 2);
        Segment writable = _image.Segments.Single(s => s.IsLoaded && (s.Flags & 2) != 0);
        Assert.That((writable.Address, writable.MemorySize), Is.EqualTo((dynamic.Address, dynamic.MemorySize)));
    }

    [Test]
    public void No_instruction_breaks_the_rules()
    {
        Segment constants = _image.Segments.Single(s => s.IsConstants);
        Assert.That(InstructionRules.Violations(_image.Code, constants.Address + constants.Size), Is.Empty);
    }

    [Test]
    public void Atomic_operations_are_locked_instructions()
    {
        HashSet<(Mnemonic, int)> locked = [];
        var decoder = Decoder.Create(64, new ByteArrayCodeReader(_image.Code.ToArray()));
        while (decoder.IP < (ulong)_image.Code.Length)
        {
            Instruction instruction = decoder.Decode();
            bool locks = instruction.HasLockPrefix || instruction.Mnemonic == Mnemonic.Xchg;
            if (locks && instruction.Op0Kind == OpKind.Memory)
                locked.Add((instruction.Mnemonic, instruction.MemorySize.GetSize()));

            // Without the prefix they are atomic on one processor only.
            if (instruction.Mnemonic is Mnemonic.Cmpxchg or Mnemonic.Xadd)
                Assert.That(locks, Is.True, $"{instruction.IP:x}: {instruction}");
        }

        // Port locks; entries that a processor is walking; an upcall flag; bits of the accessed, dirty and shadowed; masks of ports.
        Assert.That(locked, Is.SupersetOf(new[]
        {
            (Mnemonic.Cmpxchg, 4), (Mnemonic.Cmpxchg, 8), (Mnemonic.Xchg, 8), (Mnemonic.Xchg, 1), (Mnemonic.Or, 8), (Mnemonic.And, 8),
        }));
    }

    /// <summary>The bytes are accesses relative to RIP, which the assembler has no words for.</summary>
    private static readonly (string Name, Action<Assembler> Code)[] Breaches =
    [
        ("xmm", a => a.movups(__[rdi], xmm0)),
        ("x87", a => a.fld1()),
        ("mask register", a => a.kmovq(k1, rax)),
        ("segment", a => a.mov(rax, __qword_ptr.gs[rcx])),
        ("below the stack", a => a.mov(__qword_ptr[rsp - 8], rax)),
        ("privileged", a => a.mov(cr3, rax)),
        ("cli", a => a.cli()),
        ("interrupt", a => a.int3()),
        ("syscall", a => a.syscall()),
        ("call outside", a => a.call(0x10_0000)),
        ("jump outside", a => a.jne(0x10_0000)),
        ("constants outside", a => a.db(0x48, 0x8b, 0x05, 0x00, 0x00, 0x10, 0x00)),
        ("store to the image", a => a.db(0x48, 0x89, 0x05, 0x20, 0x00, 0x00, 0x00)),
    ];

    [TestCaseSource(nameof(BreachNames))]
    public void Rules_are_noticed_to_be_broken(string name)
    {
        var assembler = new Assembler(64);
        Breaches.Single(b => b.Name == name).Code(assembler);
        Assert.That(Check(assembler), Has.Count.GreaterThanOrEqualTo(1));
    }

    [Test]
    public void Ordinary_code_breaks_no_rule()
    {
        var assembler = new Assembler(64);
        assembler.push(rbp);
        assembler.mov(rax, __qword_ptr[rdi + 8]);
        assembler.@lock.or(__qword_ptr[rax], rcx);
        assembler.db(0x48, 0x8b, 0x05, 0x20, 0x00, 0x00, 0x00);
        assembler.pause();
        assembler.call(rax);
        assembler.ret();
        Assert.That(Check(assembler), Is.Empty);
    }

    private static IEnumerable<string> BreachNames() => Breaches.Select(b => b.Name);

    private static List<string> Check(Assembler assembler)
    {
        using var code = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(code), 0);
        return InstructionRules.Violations(code.ToArray(), end: 4096);
    }
}
