// A domain with a guest that the test plays, and what a script needs to look at it.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

/// <summary>
/// Scripts are iterators, and iterators cannot use pointers: whatever needs one is a method here.
/// </summary>
public abstract unsafe class ScriptedGuest
{
    private protected const ulong Data = FakeDomain.Data;
    private protected const ulong Stack = FakeDomain.Stack;
    private protected const ulong Handler = FakeDomain.Handler;
    private FakeDomain _domain = null!;

    internal FakeDomain Fake => _domain;

    [SetUp]
    public void SetUpDomain()
    {
        _domain = new FakeDomain(change: Change);
        _domain.Context->State->EventCallback = Handler;
    }

    /// <summary>What the domain is to be beyond the usual.</summary>
    private protected virtual DomainOptions Change(DomainOptions options) => options;

    [TearDown]
    public void TearDownDomain() => _domain.Dispose();

    private protected readonly record struct Registers(
        ulong Rax, ulong Rbx, ulong Rcx, ulong Rdx, ulong Rsi, ulong Rdi, ulong Rsp, ulong R8, ulong R9, ulong R10, ulong R11, ulong R12, ulong Rip, ulong Rflags)
    {
        public static Registers Of(FakeVcpu cpu)
        {
            CpuRegisters r = *cpu.Registers;
            return new Registers(r.Rax, r.Rbx, r.Rcx, r.Rdx, r.Rsi, r.Rdi, r.Rsp, r.R8, r.R9, r.R10, r.R11, r.R12, r.Rip, r.Rflags);
        }

        public void Load(FakeVcpu cpu)
        {
            CpuRegisters* r = cpu.Registers;
            (r->Rax, r->Rbx, r->Rcx, r->Rdx, r->Rsi, r->Rdi, r->Rsp) = (Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp);
            (r->R8, r->R9, r->R10, r->R11, r->R12, r->Rip, r->Rflags) = (R8, R9, R10, R11, R12, Rip, Rflags);
        }
    }

    private protected int KernelMode => _domain.Context->State->KernelMode;

    private protected ulong KernelSp => _domain.Context->State->KernelSp;

    private protected ulong Cr2 => _domain.Context->Info->Cr2;

    private protected int Mask => _domain.Context->Info->EvtchnUpcallMask;

    private protected long Now => _domain.Domain.Time.SystemTime;

    private protected static void SetRegisters(FakeVcpu cpu, ulong rax, ulong rdi) => (cpu.Registers->Rax, cpu.Registers->Rdi) = (rax, rdi);

    private protected static void SetFsBase(FakeVcpu cpu, ulong value) => cpu.Segments->FsBase = value;

    private protected void SetMask(byte value) => _domain.Context->Info->EvtchnUpcallMask = value;

    private protected void SetUserRoot() => _domain.Context->State->UserRoot = _domain.Context->State->KernelRoot;

    /// <summary>As it is between two exits, when the entry has it too.</summary>
    private protected void SetKernelStack(ulong stack) => _domain.Context->State->KernelSp = _domain.Vcpu.Cpu.EntryReport->KernelSp = stack;

    private protected ulong MachineToPhys(ulong index) => _domain.Machine.MachineToPhys[index];

    private protected void ToUser(FakeVcpu cpu)
    {
        SetUserRoot();
        SetKernelStack(Stack);
        _domain.Context->State->KernelMode = 0;
        cpu.Rsp = 0x7fff_0000;
    }

    private protected void BackToKernel(FakeVcpu cpu)
    {
        _domain.Context->State->KernelMode = 1;
        _domain.Context->State->UserRoot = 0;
        cpu.Rsp = Stack;
    }

    private protected void SetTrap(ExceptionVector vector, ulong address, bool masks = false)
        => _domain.Context->State->Traps[(int)vector] = new TrapInfo { Vector = (byte)vector, Flags = masks ? (byte)4 : (byte)0, Cs = FlatSelectors.Ring3Cs64, Address = address };

    private protected void WriteMulticall(ulong index, HypercallNumber number, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0, ulong a3 = 0)
        => _domain.WriteAll(Data + (index * 64), (ulong)number, 0xdead, a0, a1, a2, a3, 0, 0);

    private protected long[] MulticallResults(int count) => [.. Enumerable.Range(0, count).Select(i => _domain.Read<long>(Data + ((ulong)i * 64) + 8))];

    private protected VcpuExit BindVirq(FakeVcpu cpu, uint virq)
    {
        _domain.WriteAll(Data, virq, 0);
        return cpu.Hypercall(HypercallNumber.EventChannelOp, 1, Data);
    }

    private protected VcpuExit BindIpi(FakeVcpu cpu)
    {
        // The port is behind the vCPU: read it as the virq's is.
        _domain.WriteAll(Data, 0, 0);
        VcpuExit exit = cpu.Hypercall(HypercallNumber.EventChannelOp, 7, Data + 4);
        return exit;
    }

    private protected VcpuExit Send(FakeVcpu cpu, uint port)
    {
        _domain.WriteAll(Data, port);
        return cpu.Hypercall(HypercallNumber.EventChannelOp, 4, Data);
    }

    private protected uint Port() => _domain.Read<uint>(Data + 8);

    private protected bool IsPending(uint port) => (_domain.Context->Domain->SharedInfo[SharedInfoLayout.EvtchnPending + (port / 8)] & (1 << (int)(port % 8))) != 0;

    private protected void ClearPending(uint port)
    {
        _domain.Context->Info->EvtchnUpcallPending = 0;
        _domain.Context->Info->EvtchnPendingSel = 0;
        _domain.Context->Domain->SharedInfo[SharedInfoLayout.EvtchnPending + (port / 8)] &= (byte)~(1 << (int)(port % 8));
    }

    /// <summary>Where the guest sees the L1 entry that maps an address: the tables are mapped read-only behind start_info.</summary>
    private protected ulong EntryOf(ulong address)
    {
        PageTableEntry* entry = GuestAccess.FindEntry(_domain.Context, new VirtualAddress(address));
        return FakeDomain.Base + (ulong)((byte*)entry - _domain.Host(FakeDomain.Base));
    }

    private protected void EventWithoutCallback()
    {
        _domain.Context->State->EventCallback = 0;
        _domain.Context->Info->EvtchnUpcallPending = 1;
        _domain.Context->Info->EvtchnUpcallMask = 0;
    }
}
