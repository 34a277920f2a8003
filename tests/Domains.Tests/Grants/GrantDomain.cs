// A domain that does things with its own grants, for tests.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Runtime;
using XenSharp.Mmu;

namespace XenSharp.Domains.Tests.Grants;

/// <summary>Requests of grant_table_op on a domain that is not running.</summary>
internal sealed unsafe class GrantDomain : IDisposable
{
    public const ulong Request = FakeDomain.Data;
    public const ushort Self = 0x7ff0;
    public const ushort Id = 7;

    /// <summary>First of the pages that are for anything: mapped, and not the builder's.</summary>
    public const ulong FirstPfn = 0x200;

    public GrantDomain(ulong spareFrames = 96, Func<DomainOptions, DomainOptions>? change = null, DomainManager? manager = null)
        => Fake = new FakeDomain(change: change, spareFrames: spareFrames, manager: manager);

    public FakeDomain Fake { get; }

    public GrantTable Table => Fake.Domain.Grants;

    public VcpuContext* Context => Fake.Context;

    public static ulong AddressOf(ulong page) => FakeDomain.Base + ((FirstPfn + page) << 12);

    public static ulong FrameOf(ulong page) => FakeMachine.FirstFrame + FirstPfn + page;

    public long Op(uint operation, uint count = 1, ulong requests = Request) => Fake.Call(HypercallNumber.GrantTableOp, operation, requests, count);

    public void PutEntry(uint reference, GrantFlags flags, ulong frame, ushort domain = Id)
    {
        if (Table.Version == 1)
            *Table.Entry1(reference) = new GrantEntry1 { Header = new GrantHeader(flags, domain), Frame = (uint)frame };
        else
            *Table.Entry2(reference) = new GrantEntry2 { Header = new GrantHeader(flags, domain), Frame = frame };
    }

    public GrantFlags FlagsOf(uint reference) => Table.Version == 1 ? Table.Entry1(reference)->Header.Flags : Table.Entry2(reference)->Header.Flags;

    public static MapGrantRef MapRequest(uint reference, GrantMapFlags flags, ulong address, ushort domain = Id)
        => new() { HostAddress = address, Flags = flags, Reference = reference, Domain = domain };

    public GrantStatus Map(uint reference, GrantMapFlags flags, ulong address, out uint handle, ushort domain = Id)
    {
        Fake.Write(Request, MapRequest(reference, flags, address, domain));
        Assert.That(Op(0), Is.Zero);
        MapGrantRef answer = Fake.Read<MapGrantRef>(Request);
        handle = answer.Handle;
        return answer.Status;
    }

    public GrantStatus Unmap(uint handle, ulong address, ulong busAddress = 0)
    {
        Fake.Write(Request, new UnmapGrantRef { Handle = handle, HostAddress = address, DeviceBusAddress = busAddress });
        Assert.That(Op(1), Is.Zero);
        return Fake.Read<GrantStatus>(Request + UnmapGrantRef.StatusOffset);
    }

    public GrantStatus Copy(CopyPointer source, CopyPointer destination, ushort length, CopyFlags flags)
    {
        Fake.Write(Request, new CopyRequest { Source = source, Destination = destination, Length = length, Flags = flags });
        Assert.That(Op(5), Is.Zero);
        return Fake.Read<GrantStatus>(Request + CopyRequest.StatusOffset);
    }

    public GrantStatus Transfer(ulong frame, ushort domain, uint reference)
    {
        Fake.Write(Request, new TransferFrame { Frame = frame, Domain = domain, Reference = reference });
        Assert.That(Op(4), Is.Zero);
        return Fake.Read<GrantStatus>(Request + TransferFrame.StatusOffset);
    }

    public Errno SetVersion(uint version)
    {
        Fake.Write(Request, version);
        return (Errno)(-Op(8));
    }

    public GrantStatus Setup(uint frames, out ulong[] list)
    {
        Fake.Write(Request, new SetupTable { Domain = Self, FrameCount = frames, FrameList = Request + 0x800 });
        Assert.That(Op(2), Is.Zero);
        list = [.. new ReadOnlySpan<ulong>(Fake.Host(Request + 0x800), (int)Math.Min(frames, 64))];
        return Fake.Read<GrantStatus>(Request + SetupTable.StatusOffset);
    }

    public PageTableEntry EntryOf(ulong address) => *GuestAccess.FindEntry(Context, new VirtualAddress(address));

    public MachineAddress EntryAddressOf(ulong address)
    {
        MachineMemory memory = Context->Domain->Memory;
        return memory.FirstFrame.Address + (ulong)((byte*)GuestAccess.FindEntry(Context, new VirtualAddress(address)) - memory.Page(memory.FirstFrame));
    }

    public uint Uses(ulong frame) => FrameTable.Of(Context->Domain)->Find(new Mfn(frame))->TypeCount;

    public uint References(ulong frame) => FrameTable.Of(Context->Domain)->Find(new Mfn(frame))->ReferenceCount;

    /// <summary>Has back ends use eight grants of domains that go meanwhile, each until it hears so; what they had mapped goes with them.</summary>
    /// <param name="first">The first of the eight references.</param>
    /// <param name="prepare">Makes what one back end does again and again, with a source of randomness.</param>
    public static void UseWhileItGoes(uint first, Func<BackendGrants, Func<Random, GrantStatus>> prepare)
    {
        const int rounds = 20, grants = 8, backends = 3;
        for (int round = 0; round < rounds; round++)
        {
            var manager = new DomainManager();
            var guest = new GrantDomain(manager: manager);
            for (uint i = 0; i < grants; i++)
                guest.PutEntry(first + i, GrantFlags.PermitAccess, FrameOf(i), domain: 0);
            BackendGrants granted = guest.Fake.Domain.Granted;
            Task[] users = [.. Enumerable.Range(0, backends).Select(number => Task.Run(() =>
            {
                var random = new Random(number);
                Func<Random, GrantStatus> use = prepare(granted);
                GrantStatus status;
                while ((status = use(random)) == GrantStatus.Okay)
                {
                }

                Assert.That(status, Is.EqualTo(GrantStatus.BadDomain));
            }))];
            Thread.Sleep(2);
            guest.Dispose();
            Assert.That(Task.WaitAll(users, TimeSpan.FromSeconds(60)), Is.True);
            Assert.That(manager.Domains, Is.Empty);
        }
    }

    public void Audit() => Assert.That(Fake.Domain.AuditFrames(), Is.Null);

    public void Dispose() => Fake.Dispose();
}
