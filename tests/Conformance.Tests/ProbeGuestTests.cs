// The probe guest does what its script says: expressions, memory, registers, its logs. Run here, checked against C#.

using CsCheck;
using XenSharp.Boot.Tests;
using XenSharp.Cli.Compare;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Comparison;

namespace XenSharp.Conformance.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class ProbeGuestTests : KvmFixture
{
    private const ulong Constant = 0x0123_4567_89ab_cdef;

    private sealed record Expression(Value Value, ulong Expected);

    private static readonly Gen<Expression> Leaf = Gen.OneOf(Gen.ULong, Gen.ULong[0, 5000]).Select(static number => new Expression(number, number));

    private static readonly Gen<Expression> Expressions = Gen.Recursive<Expression>(static (depth, inner) => depth == 4
        ? Leaf
        : Gen.OneOf(
            Leaf,
            Gen.Select(inner, inner, Gen.Int[0, 4]).Select(static (left, right, operation) => operation switch
            {
                0 => new Expression(left.Value + right.Value, left.Expected + right.Expected),
                1 => new Expression(left.Value - right.Value, left.Expected - right.Expected),
                2 => new Expression(left.Value & right.Value, left.Expected & right.Expected),
                3 => new Expression(left.Value | right.Value, left.Expected | right.Expected),
                _ => new Expression(left.Value ^ right.Value, left.Expected ^ right.Expected),
            }),
            Gen.Select(inner, Gen.Int[0, 63], Gen.Bool).Select(static (value, distance, left) => left
                ? new Expression(value.Value << distance, value.Expected << distance)
                : new Expression(value.Value >> distance, value.Expected >> distance))));

    [Test]
    public async Task Expressions_are_what_they_are_in_CSharp()
    {
        List<Expression> expressions = [];
        Expressions.Sample(expressions.Add, iter: 300, threads: 1);
        IReadOnlyList<string?> answers = await RunAsync(c =>
        {
            foreach (Expression expression in expressions)
                c.Show(expression.Value.Named("x"));
        });
        Assert.That(answers, Is.EqualTo(expressions.Select(static expression => new AddressMap().Format(expression.Expected))));
    }

    [Test]
    public async Task Stores_and_loads_have_their_size()
    {
        IReadOnlyList<string?> answers = await RunAsync(static c =>
        {
            ScriptBuffer buffer = c.Buffer("buffer", 16);
            foreach (int size in (int[])[8, 4, 2, 1])
            {
                c.Put(buffer, 8, ulong.MaxValue);
                c.Put(buffer, size, Constant);
                c.Load(buffer);
                c.Put(buffer, 8, Constant);
                c.Load(buffer, size);
            }

            c.Fill(buffer, 2, 8, 100, 11);
            c.Load(buffer);
            c.Load(buffer[8]);
        });
        Assert.That(answers, Is.EqualTo(new[]
        {
            "0x123456789abcdef", "0x123456789abcdef", "0xffffffff89abcdef", "0x89abcdef", "0xffffffffffffcdef", "0xcdef", "-17", "239", "100", "111",
        }));
    }

    [Test]
    public async Task Code_gets_and_gives_every_register_at_both_privileges()
    {
        IEnumerable<Register64> given = Enum.GetValues<Register64>().Where(static r => r is not (Register64.Rsp or Register64.Rflags));
        (Register64, Value)[] with = [.. given.Select(static r => (r, (Value)(1000 + (int)r)))];
        Register64[] kept = [.. with.Select(static pair => pair.Item1).Where(static r => r is not (Register64.Rcx or Register64.R11))];
        IReadOnlyList<string?> answers = await RunAsync(c =>
        {
            c.Kernel("nop", static code => code.nop(), kept, with);
            c.User("nop", static code => code.nop(), kept, with);
        });
        string expected = string.Join(", ", kept.Select(static r => $"{r.ToString().ToLowerInvariant()} {1000 + (int)r}"));
        Assert.That(answers, Is.EqualTo(new[] { expected, expected }));
    }

    [Test]
    public async Task What_a_log_has_no_room_for_is_counted()
    {
        IReadOnlyList<string?> answers = await RunAsync(static c =>
        {
            c.Kernel("int3 twenty times", static code =>
            {
                for (int i = 0; i < 20; i++)
                    code.int3();
            }, resumes: 100);
            c.Show(1);
        });
        Assert.That(answers[0]!.Split("#BP"), Has.Length.EqualTo(17));
        Assert.That(answers[0], Does.EndWith("and 4 more"));
        Assert.That(answers[1], Is.EqualTo("1"));
    }

    [Test]
    public async Task Time_goes_on_and_waiting_ends()
    {
        IReadOnlyList<string?> answers = await RunAsync(static c =>
        {
            Value before = c.Keep(Value.SystemTime, "before");
            c.WaitUpcalls(1, TimeSpan.FromMilliseconds(20));
            c.Show(((Value.SystemTime - before) >> 24).Named("sixteenths of a second"), AnswerFormat.Sign);
        });
        Assert.That(answers, Is.EqualTo(new[] { "done", "positive" }));
    }

    [Test]
    public async Task Two_domains_take_turns_and_tell_each_other_what_they_find()
    {
        bool[] turns = [.. Enumerable.Repeat(true, 3), .. Gen.Bool.Array[100].Single(), false];
        AbiScript script = AbiScript.OfPair("pair", "probe", s => s.Case("counting", (a, b) =>
        {
            Value count = a.Tell(0, "count");
            foreach (bool first in turns)
            {
                AbiCase c = first ? a : b;
                count = c.Tell(count + 1, "count");
                c.Show(count);
            }
        }));
        ScriptRun run = await ScriptRun.RunAsync(new XenSharpBed(Host), [script]).SingleAsync();
        Assert.That(run.Transcript.Ending, Is.EqualTo("a: power off; b: power off"), run.Report);
        Assert.That(
            run.Transcript.Cases[0].Lines.Select(static line => line.ToString()),
            Is.EqualTo(turns.Select(static (first, i) => $"{(first ? "a" : "b")}: count = {i + 1}")));
    }

    private async Task<IReadOnlyList<string?>> RunAsync(Action<AbiCase> steps)
    {
        var script = new AbiScript("probe", "probe", s => s.Case("case", steps));
        ScriptRun run = await ScriptRun.RunAsync(new XenSharpBed(Host), [script]).SingleAsync();
        Assert.That(run.Transcript.Ending, Is.EqualTo("power off"), run.Report);
        return [.. run.Transcript.Cases[0].Lines.Select(static line => line.Answer)];
    }
}
