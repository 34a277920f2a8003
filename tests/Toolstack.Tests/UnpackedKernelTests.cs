// Kernels are unpacked once: found again as long as their file is the same, and never taken for another.

using System.IO.Compression;
using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Toolstack.Management;

namespace XenSharp.Toolstack.Tests;

[TestFixture]
public sealed class UnpackedKernelTests
{
    /// <summary>Some ticks of a file system.</summary>
    private static readonly TimeSpan s_settled = TimeSpan.FromMilliseconds(50);

    private TemporaryFolder _folder = null!;
    private string _kernel = null!;

    private string Kept => _folder.File("kernels");

    [SetUp]
    public void SetUp()
    {
        _folder = new TemporaryFolder();
        _kernel = _folder.File("vmlinuz");
    }

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public async Task What_was_unpacked_is_found_again_until_the_file_changes()
    {
        byte[] elf = TinyGuest.Build(new TinyGuestOptions { Message = "first" });
        await PackAsync(elf);
        Assert.That(await LoadAsync(), Is.EqualTo(SegmentsOf(elf)));
        string kept = Directory.GetFiles(Kept).Single();
        Assert.That(await File.ReadAllBytesAsync(kept), Is.EqualTo(elf));

        // That it is this which is loaded shows where it is another.
        byte[] other = TinyGuest.Build(new TinyGuestOptions { Message = "other" });
        await File.WriteAllBytesAsync(kept, other);
        Assert.That(await LoadAsync(), Is.EqualTo(SegmentsOf(other)));

        // As many bytes, at the same time as before: but for the time that nobody can set it would be the same file.
        DateTime written = File.GetLastWriteTimeUtc(_kernel);
        byte[] packed = await File.ReadAllBytesAsync(_kernel);
        await using (FileStream file = File.OpenWrite(_kernel))
            await file.WriteAsync(packed);
        File.SetLastWriteTimeUtc(_kernel, written);
        await SettleAsync();
        Assert.That(await LoadAsync(), Is.EqualTo(SegmentsOf(elf)));
    }

    [Test]
    public async Task What_is_kept_and_cannot_be_used_is_put_right()
    {
        byte[] elf = TinyGuest.Build();
        await PackAsync(elf);
        _ = await LoadAsync();
        string kept = Directory.GetFiles(Kept).Single();
        foreach (byte[] rubbish in (byte[][])[[], [1, 2, 3], elf[..(elf.Length / 2)]])
        {
            await File.WriteAllBytesAsync(kept, rubbish);
            Assert.That(await LoadAsync(), Is.EqualTo(SegmentsOf(elf)));
            Assert.That(await File.ReadAllBytesAsync(kept), Is.EqualTo(elf));
        }
    }

    [Test]
    public async Task What_was_changed_just_now_and_what_is_not_packed_is_not_kept()
    {
        byte[] elf = TinyGuest.Build();
        await File.WriteAllBytesAsync(_kernel, elf);
        await SettleAsync();
        Assert.That(await LoadAsync(), Is.EqualTo(SegmentsOf(elf)));
        await PackAsync(elf);
        Assert.That(await LoadAsync(patient: true), Is.EqualTo(SegmentsOf(elf)));
        Assert.That(Directory.Exists(Kept), Is.False);
    }

    [Test]
    public async Task No_more_are_kept_than_those_that_were_used_last()
    {
        byte[] elf = TinyGuest.Build();
        await PackAsync(elf);
        _ = Directory.CreateDirectory(Kept);
        for (int i = 0; i < UnpackedKernels.Most; i++)
        {
            await File.WriteAllBytesAsync(Path.Combine(Kept, $"{i}.elf"), elf);
            File.SetLastWriteTimeUtc(Path.Combine(Kept, $"{i}.elf"), DateTime.UtcNow.AddMinutes(i - 100));
        }

        _ = await LoadAsync();
        Assert.That(Directory.GetFiles(Kept), Has.Length.EqualTo(UnpackedKernels.Most).And.None.EndsWith("/0.elf").And.Some.EndsWith("/1.elf"));
    }

    [Test]
    public async Task Where_nothing_can_be_kept_the_kernel_is_loaded_all_the_same()
    {
        byte[] elf = TinyGuest.Build();
        await PackAsync(elf);
        await File.WriteAllTextAsync(Kept, "a file in the place of the folder");
        var log = new ManagerLog();
        Assert.That(await LoadAsync(log), Is.EqualTo(SegmentsOf(elf)));
        Assert.That(log.Text, Does.Contain("cannot be kept"));
    }

    [Test]
    public async Task What_came_out_of_a_guests_disk_is_found_again_by_all_of_it()
    {
        byte[] elf = TinyGuest.Build(new TinyGuestOptions { Message = "first" });
        byte[] other = TinyGuest.Build(new TinyGuestOptions { Message = "other" });
        await PackAsync(elf);
        byte[] packed = await File.ReadAllBytesAsync(_kernel);
        Assert.That(await LoadAsync(packed), Is.EqualTo(SegmentsOf(elf)));
        string kept = Directory.GetFiles(Kept).Single();
        Assert.That(await File.ReadAllBytesAsync(kept), Is.EqualTo((byte[])[.. elf, .. packed]));

        // That it is this which is loaded shows where it is another.
        await File.WriteAllBytesAsync(kept, [.. other, .. packed]);
        Assert.That(await LoadAsync(packed), Is.EqualTo(SegmentsOf(other)));

        // Another kernel for which the same name was found is none of this guest's; nor is what was cut short.
        foreach (byte[] rubbish in (byte[][])[[.. other, .. packed[..^1], (byte)~packed[^1]], [.. elf], packed, packed[1..], []])
        {
            await File.WriteAllBytesAsync(kept, rubbish);
            Assert.That(await LoadAsync(packed), Is.EqualTo(SegmentsOf(elf)));
            Assert.That(await File.ReadAllBytesAsync(kept), Is.EqualTo((byte[])[.. elf, .. packed]));
        }

        // What is not packed is not kept.
        Assert.That(await LoadAsync(elf), Is.EqualTo(SegmentsOf(elf)));
        Assert.That(Directory.GetFiles(Kept), Is.EqualTo(new[] { kept }));
    }

    private static (ulong, string)[] SegmentsOf(byte[] elf) => SegmentsOf(KernelImage.Parse(elf));

    private static (ulong, string)[] SegmentsOf(KernelImage image)
        => [.. image.Segments.Select(static segment => (segment.GuestPhysicalAddress, Convert.ToHexString(segment.Data.Span)))];

    /// <summary>Loads as a manager would that ends afterwards.</summary>
    private async Task<(ulong, string)[]> LoadAsync(ManagerLog? log = null, bool patient = false)
    {
        await using var kernels = new UnpackedKernels(Kept, log ?? new ManagerLog()) { Settled = patient ? TimeSpan.FromDays(1) : s_settled };
        LoadedKernel kernel = kernels.Load(_kernel, "kernel=");
        using (kernel.Memory)
            return SegmentsOf(kernel.Image);
    }

    private async Task<(ulong, string)[]> LoadAsync(byte[] packed)
    {
        await using var kernels = new UnpackedKernels(Kept, new ManagerLog());
        LoadedKernel kernel = kernels.Load(packed);
        using (kernel.Memory)
            return SegmentsOf(kernel.Image);
    }

    private async Task PackAsync(byte[] elf)
    {
        await using (var packed = new GZipStream(File.Create(_kernel), CompressionLevel.Fastest))
            await packed.WriteAsync(elf);
        await SettleAsync();
    }

    /// <summary>Waits until the file was not changed just now.</summary>
    private static Task SettleAsync() => Task.Delay(2 * s_settled);
}
