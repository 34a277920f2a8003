// Grants as back ends in this process use them, in domain 0's name.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>
/// What a domain grants to domain 0: pages to map, and to copy from and to. Any thread, at any time; once the domain is going away every
/// request comes to <see cref="GrantStatus.BadDomain"/>.
/// </summary>
/// <remarks>What is mapped is memory that the guest changes as it likes: read once, believe nothing.</remarks>
public sealed unsafe class BackendGrants
{
    private const ushort DomainZero = 0;

    private readonly Domain _domain;

    internal BackendGrants(Domain domain) => _domain = domain;

    /// <summary>Maps a page, as GNTTABOP_map_grant_ref does. The guest sees that it is in use until the mapping is disposed.</summary>
    /// <param name="reference">The grant reference, as the guest gave it.</param>
    /// <param name="writable">Whether it is to be written to, which the entry has to allow.</param>
    /// <param name="mapping">The page.</param>
    /// <returns><see cref="GrantStatus.Okay"/>, or why there is no mapping.</returns>
    public GrantStatus TryMap(uint reference, bool writable, out MappedGrant? mapping)
    {
        MappedGrants pages = Prepare();
        GrantStatus status = pages.TryMap(new ReadOnlySpan<uint>(in reference), writable);
        mapping = status == GrantStatus.Okay ? new MappedGrant(pages, writable) : null;
        return status;
    }

    /// <summary>Prepares for mapping several pages in one turn.</summary>
    public MappedGrants Prepare() => new(_domain);

    /// <summary>Copies out of a page, as GNTTABOP_copy does: transitive entries and those of parts of pages are served too.</summary>
    /// <param name="reference">The grant reference, as the guest gave it.</param>
    /// <param name="offset">First byte in the page, 0..4095.</param>
    /// <param name="destination">Takes the bytes, which end in the page.</param>
    /// <returns><see cref="GrantStatus.BadCopyArgument"/> for what is not in a page; <see cref="GrantStatus.GeneralError"/> for what the
    /// entry does not allow.</returns>
    public GrantStatus CopyFrom(uint reference, int offset, Span<byte> destination)
    {
        GrantStatus status = Begin(reference, offset, destination.Length, readOnly: true, out GrantedPage page);
        if (status != GrantStatus.Okay)
            return status;
        new ReadOnlySpan<byte>(page.Host + offset, destination.Length).CopyTo(destination);
        End(reference, readOnly: true, page);
        return GrantStatus.Okay;
    }

    /// <summary>Copies into a page.</summary>
    /// <param name="reference">The grant reference, as the guest gave it.</param>
    /// <param name="offset">First byte in the page, 0..4095.</param>
    /// <param name="source">The bytes, which end in the page.</param>
    /// <returns>As <see cref="CopyFrom"/>.</returns>
    public GrantStatus CopyTo(uint reference, int offset, ReadOnlySpan<byte> source)
    {
        GrantStatus status = Begin(reference, offset, source.Length, readOnly: false, out GrantedPage page);
        if (status != GrantStatus.Okay)
            return status;
        source.CopyTo(new Span<byte>(page.Host + offset, source.Length));
        page.Table.PutWritable(page.Frame);
        End(reference, readOnly: false, page);
        return GrantStatus.Okay;
    }

    /// <summary>Gets hold of a page for a copy, and enters its domain and this one.</summary>
    private GrantStatus Begin(uint reference, int offset, int length, bool readOnly, out GrantedPage page)
    {
        page = default;
        if (offset < 0 || (uint)offset + (ulong)length > Paging.PageSize)
            return GrantStatus.BadCopyArgument;
        if (!_domain.Outside.TryEnter())
            return GrantStatus.BadDomain;
        GrantStatus status;
        while (true)
        {
            status = _domain.Grants.AcquireForCopy(reference, DomainZero, readOnly, _domain, out page);
            if (status == GrantStatus.Okay)
            {
                Errno error = offset < page.Start || offset + length > page.Start + page.Length ? Errno.EINVAL
                    : readOnly ? Errno.None
                    : page.Table.GetWritable(page.Frame);
                if (error == Errno.None)
                    return status;
                _domain.Grants.ReleaseCopy(reference, readOnly, page, _domain);
                status = error == Errno.ERESTART ? GrantStatus.Restart : GrantStatus.GeneralError;
            }

            if (status != GrantStatus.Restart)
                break;
            _ = Thread.Yield();
        }

        _domain.Outside.Exit();
        return status;
    }

    private void End(uint reference, bool readOnly, in GrantedPage page)
    {
        _domain.Grants.ReleaseCopy(reference, readOnly, page, _domain);
        _domain.Outside.Exit();
    }
}

/// <summary>
/// A page of a guest's that a back end has mapped, until <see cref="Dispose"/>; the domain may go before that, and the memory stays.
/// </summary>
public sealed unsafe class MappedGrant : IDisposable
{
    private readonly MappedGrants _pages;
    private int _disposed;

    /// <param name="pages">The mapping, of one page.</param>
    /// <param name="writable">Whether it may be written to.</param>
    internal MappedGrant(MappedGrants pages, bool writable)
    {
        _pages = pages;
        IsWritable = writable;
        Address = pages.AddressOf(0);
    }

    /// <summary>Host address of its 4096 bytes.</summary>
    public byte* Address { get; }

    /// <summary>Whether it may be written to.</summary>
    public bool IsWritable { get; }

    /// <summary>The page's 4096 bytes.</summary>
    public Span<byte> Span => new(Address, (int)Paging.PageSize);

    /// <summary>Ends the mapping: nothing may use the memory any more. The guest sees its entry free. Later calls do nothing.</summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _disposed, 1) == 0)
            _pages.Unmap();
    }
}
