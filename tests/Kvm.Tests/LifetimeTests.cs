// Opening the device, making VMs and taking them away again.
using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class LifetimeTests : KvmTest
{
    [Test]
    public void NothingIsLeftBehind()
    {
        // Once before counting: lazily made things of the runtime and of the host.
        UseVms(5);
        (int files, int mappings, int threads) = Count();
        UseVms(200);

        // Something of another test's may still have been there when it was counted first, and threads that end are listed for a moment longer.
        (int filesAfter, int mappingsAfter, int threadsAfter) = (0, 0, 0);
        _ = SpinWait.SpinUntil(
            () =>
            {
                (filesAfter, mappingsAfter, threadsAfter) = Count();
                return filesAfter <= files && mappingsAfter <= mappings && threadsAfter <= threads + 4;
            },
            TimeSpan.FromSeconds(60));
        Assert.That(filesAfter, Is.LessThanOrEqualTo(files), "open files");
        Assert.That(mappingsAfter, Is.LessThanOrEqualTo(mappings), "mappings of VMs");
        Assert.That(threadsAfter, Is.LessThanOrEqualTo(threads + 4), "threads; the runtime may add some of its own");

        static void UseVms(int count)
        {
            for (int i = 0; i < count; i++)
            {
                using ScratchGuest guest = NewGuest();
                AssertSyscall(RunCode(guest, code => code.syscall()));
                if (i % 4 == 0)
                    _ = guest.Machine.CreateVcpu(1);
            }
        }

        static (int Files, int Mappings, int Threads) Count() => (
            Directory.GetFileSystemEntries("/proc/self/fd").Length,
            File.ReadLines("/proc/self/maps").Count(line => line.Contains("xensharp-", StringComparison.Ordinal) || line.Contains("kvm", StringComparison.Ordinal)),
            Directory.GetDirectories("/proc/self/task").Length);
    }

    /// <summary>A vCPU's owner and the machine may both dispose of it; the second time must not touch what the addresses mean by then.</summary>
    [Test]
    public void DisposingTwiceIsHarmless()
    {
        using ScratchGuest guest = NewGuest();
        AssertSyscall(RunCode(guest, code => code.syscall()));
        nint page = (nint)guest.Vcpu.SharedPage;
        guest.Vcpu.Dispose();

        // Something else comes to lie where kvm_run was.
        void* other = LibC.mmap(
            (void*)page,
            4096,
            LibC.PROT_READ | LibC.PROT_WRITE,
            LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS | LibC.MAP_FIXED,
            -1,
            0);
        Assert.That((nint)other, Is.EqualTo(page));
        guest.Vcpu.Dispose();
        guest.Machine.Dispose();
        guest.Machine.Dispose();
        bool mapped = File.ReadLines("/proc/self/maps").Any(line => line.StartsWith($"{page:x}-", StringComparison.Ordinal)
            || (Convert.ToInt64(line[..line.IndexOf('-')], 16) <= page && Convert.ToInt64(line[(line.IndexOf('-') + 1)..line.IndexOf(' ')], 16) > page));
        Assert.That(mapped, "The other mapping is still there.");
        _ = LibC.munmap(other, 4096);
    }

    [Test]
    public void ProbesAgree() => Assert.That(HostProbe.Run(Host), Is.EqualTo(Capabilities));

    [Test]
    public void DeviceIsMissing()
        => Assert.That(
            () => KvmSystem.Open("/nonexistent/kvm"),
            Throws.TypeOf<KvmException>().With.Message.StartsWith("/nonexistent/kvm does not exist").And.Message.Contains("kvm_amd"));

    [Test]
    public void FileIsNoKvmDevice([Values("/dev/null", "/proc/self/comm")] string path)
        => Assert.That(() => KvmSystem.Open(path), Throws.TypeOf<KvmException>().With.Message.StartsWith($"{path} is not a KVM device"));

    [Test]
    public void FileIsAFolder()
        => Assert.That(() => KvmSystem.Open("/dev"), Throws.TypeOf<KvmException>().With.Message.StartsWith("Cannot open /dev: "));

    [Test]
    [System.Runtime.Versioning.UnsupportedOSPlatform("windows")]
    public void NoPermission()
    {
        // File access has an identity of its own in every thread, so that even root can be refused in one that ends here.
        const int sysSetfsuid = 122;
        const int nobody = 65534;
        string path = Path.GetTempFileName();
        try
        {
            File.SetUnixFileMode(path, UnixFileMode.None);
            Exception? failure = null;
            var thread = new Thread(() =>
            {
                if (Environment.IsPrivilegedProcess)
                    _ = LibC.syscall(sysSetfsuid, nobody);
                failure = Assert.Catch(() => KvmSystem.Open(path));
            });
            thread.Start();
            thread.Join();
            Assert.That(failure, Is.TypeOf<KvmException>().With.Message.StartsWith($"No permission to open {path}").And.Message.Contains("group"));
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Test]
    public void MachinesOfEverySize([Values(0x1000UL, 0x2000UL, 0x1f_f000UL, 0x20_1000UL, 0x4000_1000UL, 0x10_0000_0000UL)] ulong size)
    {
        using var machine = new KvmVirtualMachine(Host, Capabilities, size);
        Assert.That(machine.Memory.FrameCount, Is.EqualTo(size >> Paging.PageShift));
        *machine.Memory.Page(machine.Memory.FirstFrame + (machine.Memory.FrameCount - 1)) = 1;
        machine.MachineToPhys[machine.Memory.FrameCount - 1] = 1;
    }

    [Test]
    public void MachineThatIsTooLarge()
        => Assert.That(
            () => new KvmVirtualMachine(Host, Capabilities, 1UL << 39),
            Throws.TypeOf<KvmException>().With.Message.Contains("508 GiB"));

    [Test]
    public void EveryProcessorCanBeMade()
    {
        using var machine = new KvmVirtualMachine(Host, Capabilities, 1 << 20);
        int count = Math.Min(KvmVirtualMachine.MaxVcpus, Capabilities.MaxVcpus);
        for (int number = count - 1; number >= 0; number--)
            _ = machine.CreateVcpu(number);
        Assert.That(() => machine.CreateVcpu(0), Throws.ArgumentException);
        Assert.That(() => machine.CreateVcpu(KvmVirtualMachine.MaxVcpus), Throws.TypeOf<ArgumentOutOfRangeException>());
    }
}
