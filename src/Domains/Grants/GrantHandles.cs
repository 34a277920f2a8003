// What a domain has mapped of others' grants: a handle for each mapping (maptrack).
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>One mapping (struct grant_mapping).</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct GrantMappingInfo
{
    /// <summary>Of a free one, the next in its list.</summary>
    public uint Reference;

    /// <summary>How it is mapped still; 0 of a free one.</summary>
    public GrantMapFlags Flags;

    /// <summary>Whose grant it is.</summary>
    public ushort Domain;

    /// <summary>The vCPU whose list it goes to.</summary>
    public ushort Vcpu;

    /// <summary>The frame of the window that is mapped, counted from 1; 0 where the page is the domain's own.</summary>
    public uint Window;
}

/// <summary>
/// The handles of a domain. Each vCPU has a list of free ones, taken from its head and given back to its tail; a list that has but its
/// last gets a page of them, until the domain has all that it may have.
/// </summary>
internal sealed unsafe class GrantHandles : IDisposable
{
    public const uint Invalid = uint.MaxValue;

    /// <summary>Handles in a page of them.</summary>
    public const uint PerPage = 256;

    private const uint End = uint.MaxValue;
    private readonly Lock _lock = new();
    private readonly uint _max;
    private readonly uint[] _heads;
    private readonly uint[] _tails;
    private GrantMappingInfo* _mappings;

    /// <param name="vcpus">vCPUs of the domain.</param>
    /// <param name="maxPages">Pages of handles that it may have (max_maptrack_frames).</param>
    public GrantHandles(int vcpus, int maxPages)
    {
        _max = (uint)maxPages * PerPage;
        _heads = new uint[vcpus];
        _tails = new uint[vcpus];
        Array.Fill(_heads, End);
        Array.Fill(_tails, End);
        _mappings = _max == 0 ? null : (GrantMappingInfo*)HostPages.Allocate(Size);
    }

    private nuint Size => _max * (nuint)sizeof(GrantMappingInfo);

    /// <summary>Handles that there are, free ones included: all below this.</summary>
    public uint Limit { get; private set; }

    /// <summary>The mapping of a handle below <see cref="Limit"/>.</summary>
    public ref GrantMappingInfo this[uint handle] => ref _mappings[handle];

    /// <summary>Takes a free handle for a vCPU.</summary>
    /// <returns><see cref="Invalid"/> where there is none.</returns>
    public uint Take(int vcpu)
    {
        lock (_lock)
        {
            uint handle = TakeFrom(vcpu);
            if (handle != Invalid)
                return handle;
            if (Limit < _max)
                return AddPage(vcpu);

            // One stays in each list, so that there is always a tail to add to.
            if (_tails[vcpu] == End)
            {
                handle = Steal(vcpu);
                if (handle == Invalid)
                    return handle;
                _mappings[handle].Reference = End;
                _heads[vcpu] = _tails[vcpu] = handle;
            }

            return Steal(vcpu);
        }
    }

    /// <summary>Gives a handle back.</summary>
    public void Return(uint handle)
    {
        lock (_lock)
        {
            ref GrantMappingInfo mapping = ref _mappings[handle];
            mapping.Flags = GrantMapFlags.None;
            mapping.Reference = End;
            _mappings[_tails[mapping.Vcpu]].Reference = handle;
            _tails[mapping.Vcpu] = handle;
        }
    }

    public void Dispose()
    {
        HostPages.Free(_mappings, Size);
        _mappings = null;
    }

    private uint TakeFrom(int vcpu)
    {
        uint head = _heads[vcpu];
        if (head == End || _mappings[head].Reference == End)
            return Invalid;
        _heads[vcpu] = _mappings[head].Reference;
        return head;
    }

    private uint AddPage(int vcpu)
    {
        uint first = Limit;
        for (uint i = 0; i < PerPage; i++)
            _mappings[first + i] = new GrantMappingInfo { Reference = first + i + 1, Vcpu = (ushort)vcpu };
        uint last = first + PerPage - 1;
        if (_tails[vcpu] == End)
            _tails[vcpu] = last;
        _mappings[last].Reference = _heads[vcpu];
        _heads[vcpu] = first + 1;
        Limit += PerPage;
        return first;
    }

    private uint Steal(int thief)
    {
        for (int i = 1; i <= _heads.Length; i++)
        {
            uint handle = TakeFrom((thief + i) % _heads.Length);
            if (handle == Invalid)
                continue;
            _mappings[handle].Vcpu = (ushort)thief;
            return handle;
        }

        return Invalid;
    }
}
