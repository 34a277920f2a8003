// What the tests that run guests have in common.

using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs this machine's KVM, and skips where there is none.</summary>
[Category("Kvm")]
public abstract class KvmFixture
{
    private protected KvmHost Host { get; private set; } = null!;

    [OneTimeSetUp]
    public void OpenKvm()
    {
        Host = new KvmHost();
        try
        {
            _ = Host.Kvm;
        }
        catch (KvmException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [OneTimeTearDown]
    public void CloseKvm() => Host.Dispose();

    private protected static DomainSpecification Tiny(
        TinyGuestBehaviour behaviour, ulong address = 0, string message = "", long floodBytes = 0, int memoryMiB = 16) => new()
        {
            Name = "tiny",
            MemoryMiB = memoryMiB,
            Image = new DomainImage(KernelImage.Parse(TinyGuest.Build(
                new TinyGuestOptions { Behaviour = behaviour, Address = address, Message = message, FloodBytes = floodBytes }))),
        };
}
