// Pages of one request to a back end, mapped and unmapped in one turn.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>
/// Pages that a back end maps, as GNTTABOP_map_grant_ref does, all or none, with one look at the grant table and one at the domain's other uses. It can be used again once the pages are unmapped. One thread at a time calls; the
/// domain may go while pages are mapped, and their memory stays.
/// </summary>
public sealed unsafe class MappedGrants : IDisposable
{
    private const ushort DomainZero = 0;

    private readonly Domain _domain;
    private uint[] _references = [];
    private Mfn[] _frames = [];
    private nint[] _addresses = [];
    private bool _writable;
    private IDisposable? _memory;

    internal MappedGrants(Domain domain) => _domain = domain;

    /// <summary>Pages that are mapped.</summary>
    public int Count { get; private set; }

    /// <summary>Host address of a page's 4096 bytes. What is there the guest changes as it likes: read once, believe nothing.</summary>
    /// <param name="index">Which of the references that were mapped.</param>
    /// <exception cref="ArgumentOutOfRangeException">There are fewer.</exception>
    public byte* AddressOf(int index)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(index);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(index, Count);
        return (byte*)_addresses[index];
    }

    /// <summary>Maps pages, all or none. The guest sees that they are in use until <see cref="Unmap"/>.</summary>
    /// <param name="references">Their grant references, as the guest gave them; one may come more than once.</param>
    /// <param name="writable">Whether they are to be written to, which the entries have to allow.</param>
    /// <returns><see cref="GrantStatus.Okay"/>, or why the first that failed did.</returns>
    /// <exception cref="InvalidOperationException">Some are mapped.</exception>
    public GrantStatus TryMap(ReadOnlySpan<uint> references, bool writable)
    {
        if (Count != 0)
            throw new InvalidOperationException("Pages are mapped still.");
        if (_references.Length < references.Length)
        {
            _references = new uint[references.Length];
            _frames = new Mfn[references.Length];
            _addresses = new nint[references.Length];
        }

        references.CopyTo(_references);
        _writable = writable;
        OutsideUse outside = _domain.Outside;
        if (!outside.TryEnter())
            return GrantStatus.BadDomain;
        GrantStatus status = Map(references.Length);
        if (status == GrantStatus.Okay && references.Length != 0)
        {
            _memory = outside.Machine.HoldMemory();
            Count = references.Length;
            for (int i = 0; i < Count; i++)
                _addresses[i] = (nint)_domain.Context->Memory.Page(_frames[i]);
        }

        outside.Exit();
        return status;
    }

    /// <summary>Ends the mappings, if there are any: nothing may use the memory any more. The guest sees its entries free.</summary>
    public void Unmap()
    {
        int count = Count;
        if (count == 0)
            return;
        Count = 0;
        OutsideUse outside = _domain.Outside;
        ReadOnlySpan<Mfn> frames = _frames.AsSpan(0, count);
        if (outside.TryEnter())
        {
            outside.LetGo(frames, _writable);
            _domain.Grants.Release(_references.AsSpan(0, count), PinOf(_writable), !_writable);
            outside.Exit();
        }
        else
        {
            outside.Abandon(frames, _writable);
        }

        _memory!.Dispose();
        _memory = null;
    }

    /// <summary>As <see cref="Unmap"/>.</summary>
    public void Dispose() => Unmap();

    private GrantStatus Map(int count)
    {
        GrantTable table = _domain.Grants;
        uint pin = PinOf(_writable);
        GrantStatus status = GrantStatus.Okay;
        int acquired = 0;
        int referenced = 0;
        lock (table.Lock)
        {
            for (; acquired < count && status == GrantStatus.Okay; acquired++)
            {
                status = table.AcquireForMap(_references[acquired], DomainZero, pin, !_writable, out _frames[acquired], out FrameInfo* info);
                if (status != GrantStatus.Okay)
                    break;

                // The first use of an entry has come with a reference to the page.
                if (info == null && table.GetPage(_frames[acquired]) == null)
                    status = GrantStatus.GeneralError;
                else
                    referenced++;
            }
        }

        OutsideUse outside = _domain.Outside;
        if (status == GrantStatus.Okay && !outside.TryHold(_frames.AsSpan(0, count), _writable))
            status = GrantStatus.GeneralError;
        else if (status == GrantStatus.Okay)
            return status;
        for (int i = 0; i < referenced; i++)
            table.PutPage(_frames[i]);
        table.Release(_references.AsSpan(0, acquired), pin, !_writable);
        return status;
    }

    private static uint PinOf(bool writable) => writable ? GrantPin.HostWrite : GrantPin.HostRead;
}
