using System.Runtime.InteropServices;

namespace XenSharp.Domains.Tests.Runtime;

/// <summary>A memfd mapped into this process, whose pages can be shown in another one's place, as a VM's memory is.</summary>
internal sealed unsafe partial class FakeMemory : IDisposable
{
    private const int Read = 1;
    private const int Write = 2;
    private const int Shared = 1;
    private const int Fixed = 0x10;
    private const int PrivateAnonymous = 0x22;
    private readonly ulong _size;
    private readonly int _file;
    private int _holders = 1;

    public FakeMemory(ulong size)
    {
        _size = size;
        _file = Create("fake-ram", 0);
        Assert.That(_file, Is.Not.Negative);
        Assert.That(Resize(_file, (long)size), Is.Zero);
        Address = Map(null, (nuint)size, Read | Write, Shared, _file, 0);
    }

    public byte* Address { get; private set; }

    public void Show(ulong offset, FakeMemory memory, ulong from, bool writable)
        => _ = Map(Address + offset, 4096, writable ? Read | Write : Read, Shared | Fixed, memory._file, (long)from);

    public void Protect(ulong offset) => Assert.That(Protect(Address + offset, 4096, Read), Is.Zero);

    public void Hide(ulong offset) => _ = Map(Address + offset, 4096, 0, PrivateAnonymous | Fixed, -1, 0);

    public IDisposable Hold()
    {
        _ = Interlocked.Increment(ref _holders);
        return this;
    }

    public void Dispose()
    {
        if (Interlocked.Decrement(ref _holders) != 0)
            return;
        _ = Unmap(Address, (nuint)_size);
        _ = Close(_file);
        Address = null;
    }

    private static byte* Map(byte* address, nuint size, int protection, int flags, int file, long offset)
    {
        byte* mapped = MapPages(address, size, protection, flags, file, offset);
        Assert.That((nint)mapped, Is.Not.EqualTo((nint)(-1)));
        return mapped;
    }

    [LibraryImport("libc", EntryPoint = "memfd_create", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int Create(string name, uint flags);

    [LibraryImport("libc", EntryPoint = "ftruncate")]
    private static partial int Resize(int file, long size);

    [LibraryImport("libc", EntryPoint = "mmap")]
    private static partial byte* MapPages(byte* address, nuint size, int protection, int flags, int file, long offset);

    [LibraryImport("libc", EntryPoint = "mprotect")]
    private static partial int Protect(byte* address, nuint size, int protection);

    [LibraryImport("libc", EntryPoint = "munmap")]
    private static partial int Unmap(byte* address, nuint size);

    [LibraryImport("libc", EntryPoint = "close")]
    private static partial int Close(int file);
}
