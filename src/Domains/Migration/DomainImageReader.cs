namespace XenSharp.Domains.Migration;

/// <summary>An image that a domain is restored from, and who wants to know of it.</summary>
/// <param name="Reader">The image.</param>
/// <param name="Progress">Is told of the pages; null for nobody.</param>
/// <param name="Cancellation">Ends the work.</param>
internal sealed record DomainImageReader(MigrationReader Reader, IProgress<PageProgress>? Progress, CancellationToken Cancellation);
