// Answers that go on for a while: a JSON object a line.

using System.Text.Json;
using System.Text.Json.Serialization.Metadata;
using System.Threading.Channels;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.Features;
using XenSharp.Api;
using XenSharp.Domains.Migration;

namespace XenSharp.Daemon;

/// <summary>Writes application/x-ndjson.</summary>
internal static class LineStream
{
    /// <summary>The media type.</summary>
    internal const string MediaType = "application/x-ndjson";

    private static readonly TimeSpan ProgressInterval = TimeSpan.FromMilliseconds(100);

    /// <summary>Writes items as they come, until there are no more or the client is gone.</summary>
    internal static async Task WriteAsync<T>(HttpContext context, IAsyncEnumerable<T> items, JsonTypeInfo<T> type)
    {
        Begin(context);
        await foreach (T item in items.ConfigureAwait(false))
            await WriteLineAsync(context, item, type).ConfigureAwait(false);
    }

    /// <summary>
    /// Does something long, and tells of its progress. What fails before there is any is thrown, for the status to tell; what fails later
    /// is the last line's problem.
    /// </summary>
    /// <param name="context">The request.</param>
    /// <param name="stage">What is done, for people.</param>
    /// <param name="describe">The problem that an exception stands for.</param>
    /// <param name="work">Does it; what it returns is told with the last line. Its token is signalled when the client is gone.</param>
    internal static async Task OperateAsync(
        HttpContext context, string stage, Func<Exception, ApiProblem> describe, Func<IProgress<PageProgress>, CancellationToken, Task<DomainInfo?>> work)
    {
        var progress = new Progress();
        Task<DomainInfo?> running = work(progress, context.RequestAborted);
        _ = running.ContinueWith(_ => progress.End(), CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
        try
        {
            await foreach (PageProgress step in progress.Steps.ReadAllAsync(CancellationToken.None).ConfigureAwait(false))
            {
                if (!context.Response.HasStarted)
                    Begin(context);
                var update = new OperationUpdate { Stage = stage, Done = (long)step.Done, Total = (long)step.Total };
                await WriteLineAsync(context, update, ApiJson.Default.OperationUpdate).ConfigureAwait(false);
                await Task.WhenAny(running, Task.Delay(ProgressInterval, context.RequestAborted)).ConfigureAwait(false);
            }
        }
        catch (OperationCanceledException) when (context.RequestAborted.IsCancellationRequested)
        {
            // What is done is taken back, and nobody is told.
            await ((Task)running).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            throw;
        }

        OperationUpdate last;
        try
        {
            last = new OperationUpdate { Stage = stage, Finished = true, Domain = await running.ConfigureAwait(false) };
        }
        catch (Exception failure) when (context.Response.HasStarted && !context.RequestAborted.IsCancellationRequested)
        {
            last = new OperationUpdate { Stage = stage, Problem = describe(failure) };
        }

        if (!context.Response.HasStarted)
            Begin(context);
        await WriteLineAsync(context, last, ApiJson.Default.OperationUpdate).ConfigureAwait(false);
    }

    private static void Begin(HttpContext context)
    {
        context.Response.ContentType = MediaType;
        context.Features.Get<IHttpResponseBodyFeature>()?.DisableBuffering();
    }

    private static async Task WriteLineAsync<T>(HttpContext context, T item, JsonTypeInfo<T> type)
    {
        byte[] line = [.. JsonSerializer.SerializeToUtf8Bytes(item, type), (byte)'\n'];
        await context.Response.Body.WriteAsync(line, context.RequestAborted).ConfigureAwait(false);
        await context.Response.Body.FlushAsync(context.RequestAborted).ConfigureAwait(false);
    }

    /// <summary>Keeps the newest step only: what is reported must not hold up what is done.</summary>
    private sealed class Progress : IProgress<PageProgress>
    {
        private readonly Channel<PageProgress> _steps =
            Channel.CreateBounded<PageProgress>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropOldest });

        internal ChannelReader<PageProgress> Steps => _steps.Reader;

        public void Report(PageProgress value) => _ = _steps.Writer.TryWrite(value);

        internal void End() => _ = _steps.Writer.TryComplete();
    }
}
