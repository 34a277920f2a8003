// What tests of managed domains have in common: a toolstack in a folder of its own, and tiny guests.

using XenSharp.Configuration;
using XenSharp.Guests;
using XenSharp.Kvm;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

/// <summary>Needs this machine's KVM, and skips where there is none.</summary>
[Category("Kvm")]
public abstract class ManagementFixture
{
    private protected const string Hello = "hello\n";

    private KvmHost _host = null!;
    private TemporaryFolder _folder = null!;
    private ToolstackContext _context = null!;

    private protected DomainToolstack Toolstack { get; private set; } = null!;

    private protected string StateFolder => _folder.File("state");

    /// <summary>Where domains fail to be made; null for nowhere.</summary>
    private protected CreateStep? FailingStep { get; set; }

    /// <summary>Is told of the steps that domains are made in; null for nothing.</summary>
    private protected Action<CreateStep>? OnStep { get; set; }

    [OneTimeSetUp]
    public void OpenKvm()
    {
        _host = new KvmHost();
        try
        {
            _ = _host.Capabilities;
        }
        catch (KvmException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [OneTimeTearDown]
    public void CloseKvm() => _host.Dispose();

    [SetUp]
    public void MakeToolstack()
    {
        (FailingStep, OnStep) = (null, null);
        _folder = new TemporaryFolder();
        _context = new ToolstackContext(_host);
        Toolstack = new DomainToolstack(
            _context,
            new ToolstackOptions
            {
                StateFolder = StateFolder,
                ConsoleLogFolder = _folder.File("console"),
                RestartInterval = TimeSpan.FromMilliseconds(10),
                SuspendTimeout = TimeSpan.FromMilliseconds(200),
                BeforeStep = step =>
                {
                    OnStep?.Invoke(step);
                    if (step == FailingStep)
                        throw new IOException($"The test fails {step}.");
                },
            },
            new ManagerLog());
    }

    [TearDown]
    public async Task EndToolstackAsync()
    {
        await Toolstack.DisposeAsync();
        await _context.DisposeAsync();
        _folder.Dispose();
    }

    private protected string FileOf(string name) => _folder.File(name);

    private protected DomainConfiguration Tiny(TinyGuestBehaviour behaviour, string name = "tiny", string message = "")
    {
        string kernel = _folder.File($"{name}-{behaviour}");
        File.WriteAllBytes(kernel, TinyGuest.Build(new TinyGuestOptions { Behaviour = behaviour, Message = message }));
        return new DomainConfiguration { Name = name, Kernel = kernel, MemoryMiB = 16 };
    }

    /// <summary>Waits for something that is about to become true.</summary>
    private protected static async Task EventuallyAsync(Func<bool> condition, string what)
    {
        // Asked once a round: what makes something true need not be so a second time.
        bool met = condition();
        for (int i = 0; i < 6000 && !met; i++)
        {
            await Task.Delay(10);
            met = condition();
        }
        Assert.That(met, Is.True, what);
    }
}
