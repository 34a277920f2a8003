// The xl.cfg(5) language: what parses to what, and where what is wrong is found.

using CsCheck;
using XenSharp.Configuration.Language;

namespace XenSharp.Configuration.Tests;

[TestFixture]
[Parallelizable(ParallelScope.All)]
public sealed class LanguageTests
{
    private static readonly string[] s_pieces = ["a", "=", "+=", "'", "\"", "\\", "[", "]", ",", ";", "#", "\n", " ", "1", "x", "\0", "é"];

    [TestCase("", "")]
    [TestCase("\n\n  \n# only a comment", "")]
    [TestCase("a=1", "a=\"1\"")]
    [TestCase("a = 0x1f\n", "a=\"0x1f\"")]
    [TestCase("a=017;b='x' ; c=\"y\"", "a=\"017\" b=\"x\" c=\"y\"")]
    [TestCase("name=\"h0\"; memory=512", "name=\"h0\" memory=\"512\"")]
    [TestCase(";;a=1;;\n;b=2;", "a=\"1\" b=\"2\"")]
    [TestCase("a='#no comment' # a comment ; b=1\nc=2", "a=\"#no comment\" c=\"2\"")]
    [TestCase("a.b_c9=1", "a.b_c9=\"1\"")]
    [TestCase("a=1\r\nb=2\r\n", "a=\"1\" b=\"2\"")]
    [TestCase("a=[]", "a=[  ]")]
    [TestCase("a=[ 'x', \"y\", 3 ]", "a=[ \"x\", \"y\", \"3\" ]")]
    [TestCase("a=[\n 'x', # one\n\n 'y',\n]\nb=1", "a=[ \"x\", \"y\" ] b=\"1\"")]
    [TestCase("a=[['x'],[ 'y', [] ]]", "a=[ [ \"x\" ], [ \"y\", [  ] ] ]")]
    [TestCase("a=\"it's\"; b='say \"so\"'", "a=\"it's\" b=\"say \\\"so\\\"\"")]
    [TestCase(@"a=""\a\b\f\n\r\t\v\\\'\""\x41\101\0""", @"a=""\a\b\f\n\r\t\v\\'\""AA\x00""")]
    [TestCase("a='ü – λ'", "a=\"ü – λ\"")]
    [TestCase("a='x'\na+='y'", "a=\"x\" a+=\"y\"")]
    public void Parses(string text, string expected)
        => Assert.That(
            string.Join(' ', Parse(text).Settings.Select(static one => $"{one.Name}{(one.IsAddition ? "+=" : "=")}{one.Value.ToText()}")),
            Is.EqualTo(expected));

    [TestCase("a", 1, 2, "= or +=")]
    [TestCase("a=", 1, 3, "the end of the text")]
    [TestCase("a=\n1", 1, 3, "the end of the line")]
    [TestCase("\n\n  a=xenbr0", 3, 5, "Text and negative numbers are put in quotes")]
    [TestCase("a=-5", 1, 3, "Text and negative numbers are put in quotes")]
    [TestCase("a=1 b=2", 1, 5, "the end of the line or a semicolon")]
    [TestCase("a='x", 1, 5, "the closing '")]
    [TestCase("a=\"x\ny\"", 1, 5, "the closing \"")]
    [TestCase("a='\\q'", 1, 5, "octal number")]
    [TestCase("a='\\x4'", 1, 7, "hexadecimal digits")]
    [TestCase("a='\\777'", 1, 8, "at most \\377")]
    [TestCase("a=[1 2]", 1, 6, "a comma or the closing bracket")]
    [TestCase("a=[1,,2]", 1, 6, "nothing before it")]
    [TestCase("a=[1\n\n", 3, 1, "the closing bracket")]
    [TestCase("a=['x';'y']", 1, 7, "\";\"")]
    [TestCase("1=a", 1, 1, "the name of a setting")]
    [TestCase("Name='x'", 1, 1, "small letters")]
    [TestCase("a='x'+'y'", 1, 6, "rewritten")]
    [TestCase("def f():", 1, 5, "= or +=")]
    [TestCase("a=1\n\tb=\u0001", 2, 4, "control character")]
    public void SaysWhatIsWrongAndWhere(string text, int line, int column, string part)
    {
        ConfigurationMessage error = Assert.Throws<ConfigurationException>(() => Parse(text))!.Errors.Single();
        Assert.That((error.Line, error.Column), Is.EqualTo((line, column)), error.ToString());
        Assert.That(error.Text, Does.Contain(part));
    }

    [Test]
    public void ListsNestSixteenDeepAndNoDeeper()
    {
        Assert.That(Parse($"a={new string('[', 16)}{new string(']', 16)}").Settings, Has.Count.EqualTo(1));
        ConfigurationException failure = Assert.Throws<ConfigurationException>(() => Parse($"a={new string('[', 17)}{new string(']', 17)}"))!;
        Assert.That(failure.Message, Does.Contain("deeper than 16"));
        Assert.Throws<ConfigurationException>(() => Parse($"a={new string('[', 900_000)}"));
    }

    [Test]
    public void ATextThatIsTooLargeIsRefused()
        => Assert.That(Assert.Throws<ConfigurationException>(() => Parse(new string('\n', ConfigurationDocument.LargestText + 1)))!.Message, Does.Contain("larger"));

    [Test]
    public void TheLastAssignmentCountsAndAdditionsGoBehind()
    {
        ConfigurationDocument document = Parse("a='1'; l=['x']; a='2'\na+='3'; l+=['y','z']; n+='new'");
        document.Append("l+=['w']", "more");
        Assert.That(
            document.Evaluate().Select(static one => $"{one.Name}={one.Value.ToText()}"),
            Is.EqualTo(new[] { "a=\"23\"", "l=[ \"x\", \"y\", \"z\", \"w\" ]", "n=\"new\"" }));
    }

    [TestCase("a='x'\na+=['y']", 2)]
    [TestCase("a=['x']\n\na+='y'", 3)]
    public void ListsAndTextsAreNotAdded(string text, int line)
        => Assert.That(Assert.Throws<ConfigurationException>(() => Parse(text).Evaluate())!.Errors.Single().Line, Is.EqualTo(line));

    [Test]
    public void WhatIsWrittenIsReadAgain()
        => Gen.Char['\0', '\u0250'].Array[0, 40].Sample(static characters =>
        {
            string text = new(characters);
            return ((TextValue)Parse($"a={new TextValue(text).ToText()}").Settings.Single().Value).Text == text;
        });

    [Test]
    public void NoTextMakesTheParserThrowAnythingElse()
        => Gen.Int[0, 16].Select(static at => s_pieces[at]).Array[0, 60].Sample(static parts =>
        {
            try
            {
                _ = Parse(string.Concat(parts)).Evaluate();
            }
            catch (ConfigurationException failure)
            {
                Assert.That(failure.Errors[0].Line, Is.GreaterThan(0));
            }
        });

    private static ConfigurationDocument Parse(string text)
    {
        var document = new ConfigurationDocument();
        document.Append(text, "test");
        return document;
    }
}
