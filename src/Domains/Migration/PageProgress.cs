namespace XenSharp.Domains.Migration;

/// <summary>How far the work on a domain's memory has come.</summary>
/// <param name="Done">Pages that are done with.</param>
/// <param name="Total">Pages in all; 0 where that is not known beforehand.</param>
public readonly record struct PageProgress(ulong Done, ulong Total);
