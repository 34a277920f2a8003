// A XenSharp that was broken on purpose is caught: its assemblies are changed in a copy, and the command compares.

using Mono.Cecil;
using Mono.Cecil.Cil;
using XenSharp.Boot.Tests;
using XenSharp.Cli.Tests;
using XenSharp.Core;

namespace XenSharp.Conformance.Tests;

[TestFixture]
[CancelAfter(240_000)]
public sealed class SeededFaultTests : KvmFixture
{
    private const int Different = 1;

    private string _copy = "";

    [SetUp]
    public void Copy()
    {
        _copy = Directory.CreateTempSubdirectory("xensharp-fault-").FullName;
        foreach (string file in Directory.EnumerateFiles(AppContext.BaseDirectory, "*", SearchOption.AllDirectories))
        {
            string target = Path.Combine(_copy, Path.GetRelativePath(AppContext.BaseDirectory, file));
            Directory.CreateDirectory(Path.GetDirectoryName(target)!);
            File.Copy(file, target);
        }
    }

    [TearDown]
    public void Remove() => Directory.Delete(_copy, recursive: true);

    [Test]
    public async Task The_copy_as_it_is_agrees()
    {
        CommandEnd end = await CompareAsync("update-va-mapping", "upcalls");
        Assert.That(end.Status, Is.Zero, end.Output + end.Error);
    }

    [Test]
    public async Task A_wrong_errno_is_caught()
    {
        Change("XenSharp.Domains.dll", "XenSharp.Domains.Hypercalls.HypercallDispatcher", "Serve", static body =>
        {
            Instruction constant = body.Instructions.Single(static i => i.OpCode == OpCodes.Ldc_I4_S && (sbyte)i.Operand == -(int)Errno.ENOSYS);
            constant.Operand = (sbyte)-(int)Errno.EINVAL;
        });
        CommandEnd end = await CompareAsync("unknown-hypercalls");
        Assert.That(end.Status, Is.EqualTo(Different), end.Error);
        Assert.That(end.Output, Does.Contain("-ENOSYS").And.Contain("-EINVAL"));
    }

    [Test]
    public async Task A_missing_upcall_mask_is_caught()
    {
        Change("XenSharp.Domains.dll", "XenSharp.Domains.GuestMode", "Push", static body =>
        {
            Instruction store = body.Instructions.Single(static i => i.Operand is MethodReference { Name: nameof(Volatile.Write) });
            Assert.That(store.Previous.OpCode, Is.EqualTo(OpCodes.Ldc_I4_1));
            store.Previous.OpCode = OpCodes.Ldc_I4_0;
        });
        CommandEnd end = await CompareAsync("upcalls");
        Assert.That(end.Status, Is.EqualTo(Different), end.Error);
        Assert.That(end.Output, Does.Contain("mask 0->1").And.Contain("mask 0->0"));
    }

    [Test]
    public async Task A_page_table_write_that_is_let_through_is_caught()
    {
        Change("XenSharp.Mmu.dll", "XenSharp.Mmu.PageTables", "ReferencePage", static body =>
        {
            // As if no entry were writable: a writable mapping of a page table is not refused.
            Instruction isWritable = body.Instructions.Single(static i => i.Operand is MethodReference { Name: "get_IsWritable" });
            isWritable.OpCode = OpCodes.Pop;
            isWritable.Operand = null;
            body.GetILProcessor().InsertAfter(isWritable, Instruction.Create(OpCodes.Ldc_I4_0));
        });
        CommandEnd end = await CompareAsync("update_va_mapping", "mmu_update");
        Assert.That(end.Status, Is.EqualTo(Different), end.Error);
    }

    private Task<CommandEnd> CompareAsync(params string[] scripts) => CommandProcess.RunIn(_copy, ["compare", .. scripts]);

    private void Change(string assembly, string type, string method, Action<MethodBody> change)
    {
        string path = Path.Combine(_copy, assembly);
        using var module = ModuleDefinition.ReadModule(new MemoryStream(File.ReadAllBytes(path)));
        change(module.GetType(type).Methods.Single(candidate => candidate.Name == method).Body);
        module.Write(path);
    }
}
