// Fetches the real Debian guest by the real apt: needs the network, tens of megabytes of it.
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;

namespace XenSharp.Guests.Tests;

[Category("Network")]
public sealed class NetworkTests
{
    string folder = null!;

    [SetUp]
    public void MakeFolder() => folder = Directory.CreateTempSubdirectory("xensharp-fetch-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(folder, recursive: true);

    [Test]
    public async Task TheDebianGuestIsFetchedAndItsInitramfsBuilt()
    {
        GuestCache cache = new(Path.Combine(folder, "cache"));
        DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64);
        string busybox = await cache.GetBusyboxAsync();
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(busybox);
        Assert.Multiple(() =>
        {
            Assert.That(new FileInfo(kernel.Image).Length, Is.GreaterThan(1_000_000));
            Assert.That(kernel.Release, Does.EndWith("-cloud-amd64"));
            Assert.That(ramdisk, Has.Length.GreaterThan(500_000));
        });
    }

    [Test]
    public async Task PrivatePackageListsServeWhereTheSystemHasNone()
    {
        string tools = Directory.CreateDirectory(Path.Combine(folder, "tools")).FullName;
        string wrapper = Path.Combine(tools, "apt-cache");
        await File.WriteAllTextAsync(wrapper,
            "#!/bin/sh\ncase \"$2\" in */system.conf) exit 100;; esac\nexec /usr/bin/apt-cache \"$@\"\n");
        File.SetUnixFileMode(wrapper, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);

        GuestCache cache = new(Path.Combine(folder, "cache"), new CommandRunner($"{tools}:/usr/bin:/bin"));
        Assert.That(await cache.GetBusyboxAsync(), Does.Exist);
    }
}
