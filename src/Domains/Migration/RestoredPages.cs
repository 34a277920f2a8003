using XenSharp.Core;

namespace XenSharp.Domains.Migration;

/// <summary>
/// The pages of an image by their pfns: where each is now, and what it is. Takes memory for what there is, not for what an image claims to
/// have.
/// </summary>
/// <param name="memory">Where the frames are.</param>
/// <param name="lastPfn">The last pfn that there can be, below 2^32.</param>
internal sealed class RestoredPages(MachineMemory memory, ulong lastPfn)
{
    private const int ChunkSize = MigrationFormat.P2MEntriesPerPage;

    private readonly Chunk?[] _chunks = new Chunk?[(lastPfn / ChunkSize) + 1];
    private readonly ulong _firstFrame = memory.FirstFrame.Value;

    private sealed class Chunk
    {
        /// <summary>Indexes in memory, and one more: 0 for none.</summary>
        public readonly uint[] Frames = new uint[ChunkSize];
        public readonly PageInfoType[] Types = new PageInfoType[ChunkSize];
    }

    /// <summary>A page that there is.</summary>
    /// <param name="Pfn">Its pfn.</param>
    /// <param name="Frame">Its machine frame.</param>
    /// <param name="Type">What it is.</param>
    public readonly record struct Page(ulong Pfn, Mfn Frame, PageInfoType Type);

    /// <summary>The last pfn that there can be.</summary>
    public ulong LastPfn => lastPfn;

    /// <summary>All pages, in the order of their pfns.</summary>
    public IEnumerable<Page> All
    {
        get
        {
            for (int i = 0; i < _chunks.Length; i++)
            {
                if (_chunks[i] is not { } chunk)
                    continue;
                for (int j = 0; j < ChunkSize; j++)
                {
                    if (chunk.Frames[j] != 0)
                        yield return new Page(((ulong)i * ChunkSize) + (ulong)j, FrameOf(chunk.Frames[j]), chunk.Types[j]);
                }
            }
        }
    }

    /// <summary>Finds a page.</summary>
    /// <param name="pfn">Any number.</param>
    /// <param name="page">The page.</param>
    /// <returns>False where there is none.</returns>
    public bool TryFind(ulong pfn, out Page page)
    {
        page = default;
        if (pfn > lastPfn || _chunks[pfn / ChunkSize] is not { } chunk || chunk.Frames[pfn % ChunkSize] == 0)
            return false;
        page = new Page(pfn, FrameOf(chunk.Frames[pfn % ChunkSize]), chunk.Types[pfn % ChunkSize]);
        return true;
    }

    /// <summary>Adds a page, or changes what it is.</summary>
    /// <param name="page">The page; its pfn is not past <see cref="LastPfn"/>.</param>
    public void Set(in Page page)
    {
        Chunk chunk = _chunks[page.Pfn / ChunkSize] ??= new Chunk();
        chunk.Frames[page.Pfn % ChunkSize] = (uint)(page.Frame.Value - _firstFrame) + 1;
        chunk.Types[page.Pfn % ChunkSize] = page.Type;
    }

    private Mfn FrameOf(uint entry) => new(_firstFrame + entry - 1);
}
