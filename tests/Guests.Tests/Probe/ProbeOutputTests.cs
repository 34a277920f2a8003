// The way from what the probe guest prints to a transcript, and a transcript's text.
using CsCheck;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Tests.Probe;

public class ProbeOutputTests
{
    static readonly Gen<string> Printable = Gen.String[Gen.Char['!', '~'], 1, 20].Where(text => !text.Contains('='));

    static readonly Gen<Transcript> Transcripts =
        Gen.Select(
            Gen.Select(
                Printable,
                Gen.Select(Printable.Where(step => step[0] != '#'), Gen.OneOf(Printable.Select(text => (string?)text), Gen.Const((string?)null)))
                    .Select((step, answer) => new TranscriptLine("step " + step, answer)).List[0, 5])
                .Select((name, lines) => new CaseTranscript(name, lines)).List[0, 4],
            Printable)
        .Select((cases, ending) => new Transcript("s", cases, ending));

    [Test]
    public void TextIsReadBackAsItWas() => Transcripts.Sample(transcript =>
    {
        string text = transcript.ToText();
        Assert.That(Transcript.Parse("s", "# a comment\n" + text).ToText(), Is.EqualTo(text));
    });

    [Test]
    public void TextThatIsCutShortIsRefusedAtEveryPlace()
    {
        const string whole = "== a case\nload64 page0 = 7\n-- ended: power off\n";
        for (int length = 0; length < whole.Length - "-- ended: power off\n".Length + 1; length++)
            Assert.That(() => Transcript.Parse("s", whole[..length]), Throws.TypeOf<FormatException>(), whole[..length]);
    }

    [TestCase("load64 page0 = 7\n-- ended: power off\n", "Line 1")]
    [TestCase("== a\nnonsense\n-- ended: power off\n", "Line 2")]
    [TestCase("== a\n-- ended: power off\nx = 1\n", "goes on")]
    public void OtherTextIsRefusedWithTheLine(string text, string part)
        => Assert.That(() => Transcript.Parse("s", text), Throws.TypeOf<FormatException>().With.Message.Contains(part));

    [Test]
    public void AnyLineIsTakenApartOrRefusedButNeverThrows()
        => Gen.OneOf(Gen.String, Gen.String[Gen.Char["@0123456789abcdefrvgxu=,+ "], 0, 60].Select(text => "@" + text))
            .Sample(line => Assert.That(() => ProbeLine.TryParse(line), Throws.Nothing));

    [Test]
    public void EveryFieldOfALineIsTaken()
    {
        ProbeLine line = ProbeLine.TryParse("@1f r=ffffffffffffffea g0=7 g10=246 x=e,2,1000,2000,10000e030,202,3000,e02b,3000,1, u=10001,1,8, x=+3\r")!;
        Assert.Multiple(() =>
        {
            Assert.That(line.Step, Is.EqualTo(0x1f));
            Assert.That(line.Result, Is.EqualTo(unchecked((ulong)-22)));
            Assert.That(line.Registers, Is.EqualTo(new Dictionary<int, ulong> { [0] = 7, [16] = 0x246 }));
            Assert.That(line.Exceptions, Is.EqualTo(new[] { new ProbeException(14, 2, 0x1000, 0x2000, 0xe030, 1, 0x202, 0x3000, 0xe02b, 0x3000, 1) }));
            Assert.That(line.Upcalls, Is.EqualTo(new[] { new ProbeUpcall(1, 0, 1, 1, 8) }));
            Assert.That(line.Unlogged, Is.EqualTo(3));
        });
    }

    [Test]
    public void StepsThatWereNotReachedAreSaidToBe()
    {
        AbiScript script = new("s", "s", s =>
        {
            s.Case("one", c =>
            {
                c.Show(5);
                c.Put(ProbeLayout.ScratchBase, 8, 1);
            });
            s.Case("two", c => c.Show(6));
        });
        Assert.That(script.Read("@0 v=5\nnoise\n", "crash").ToText(), Is.EqualTo(
            "== one\n5 = 5\n== two\n6 = (not reached)\n-- ended: crash, before the script's end\n"));
    }

    [Test]
    public void AnImageHasNoPageOfZerosForWhatIsNotInTheFile()
    {
        AbiScript script = new("s", "s", s => s.Case("one", c => c.Show(5)));
        Assert.That(script.Build(), Has.Length.LessThan(64 << 10));
    }

    [Test]
    public void WhatATranscriptCouldNotTellApartIsRefused()
    {
        Assert.That(() => new AbiScript("s", "s", s => s.Case("c", c => c.Show(((Value)1).Named("a = b")))), Throws.ArgumentException);
        Assert.That(() => new AbiScript("s", "s", s => { s.Case("c", _ => { }); s.Case("c", _ => { }); }), Throws.ArgumentException);
        Assert.That(
            () => new AbiScript("s", "s", s => s.Case("c", c => c.Pages(ProbeLayout.ScratchPages + 1))),
            Throws.InvalidOperationException.With.Message.Contains("scratch pages"));
    }
}
