// Channels of a domain's configuration (channel=): where they lead to, and that they go with the domain.

using XenSharp.Configuration;
using XenSharp.Configuration.Devices;
using XenSharp.Guests;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ChannelTests : ManagementFixture
{
    [Test]
    public async Task Channels_lead_to_a_socket_and_a_terminal_as_long_as_there_is_the_domain()
    {
        string socket = FileOf("agent");
        DomainConfiguration configuration = Tiny(TinyGuestBehaviour.SpinForever) with
        {
            Channels =
            [
                new ChannelConfiguration { Name = "org.example.agent", Connection = ChannelConnection.Socket, Path = socket },
                new ChannelConfiguration { Name = "org.example.shell", Connection = ChannelConnection.Pty },
            ],
        };
        ManagedDomain domain = await Toolstack.CreateAsync(configuration);
        Assert.That(File.Exists(socket));
        Assert.That(domain.FindChannel(1), Is.EqualTo(socket));
        Assert.That(domain.FindChannel(2), Does.StartWith("/dev/pts/"));
        Assert.That(domain.FindChannel(3), Is.Null);
        string folder = $"/local/domain/{domain.Id}/device/console/";
        Assert.That(Toolstack.Context.Store.Domain0.Read(folder + "1/name"), Is.EqualTo("org.example.agent"));
        Assert.That(Toolstack.Context.Store.Domain0.Read(folder + "2/tty"), Is.EqualTo(domain.FindChannel(2)));
        await Toolstack.DestroyAsync(domain);
        Assert.That(File.Exists(socket), Is.False);
        Assert.That(Toolstack.Context.Store.Domain0.Exists(folder + "1"), Is.False);
    }

    [Test]
    public void A_socket_that_cannot_be_made_leaves_no_domain()
    {
        DomainConfiguration configuration = Tiny(TinyGuestBehaviour.SpinForever) with
        {
            Channels = [new ChannelConfiguration { Name = "agent", Connection = ChannelConnection.Socket, Path = FileOf("none/agent") }],
        };
        ToolstackException failure = Assert.ThrowsAsync<ToolstackException>(() => Toolstack.CreateAsync(configuration))!;
        Assert.That(failure.Message, Does.StartWith("The channel agent of tiny: "));
        Assert.That(Toolstack.Domains, Is.Empty);
    }
}
