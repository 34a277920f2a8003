// Turns what goes wrong in a request into problem details, with a sentence in each.

using System.Text.Json;
using Microsoft.AspNetCore.Http;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Daemon;

/// <summary>The outermost part of the daemon's HTTP pipeline.</summary>
/// <param name="log">Is told of defects.</param>
internal sealed class ProblemMiddleware(ManagerLog log)
{
    /// <summary>The problem that an exception stands for; a defect is told to the log as well.</summary>
    internal ApiProblem Describe(Exception failure)
    {
        switch (failure)
        {
            case ToolstackException known:
                return Make(known.Kind, known.Message);
            case ConfigurationException bad:
                return Make(ProblemKind.BadConfiguration, bad.Message);
            case BadHttpRequestException bad:
                return Make(
                    ProblemKind.BadRequest,
                    bad.InnerException is JsonException json ? $"The request's body is not what it should be: {Sentence(json.Message)}" : Sentence(bad.Message),
                    bad.StatusCode);
            case IOException or UnauthorizedAccessException:
                log.Write($"A request failed: {failure}");
                return Make(ProblemKind.HostCannot, Sentence(failure.Message));
            default:
                log.Write($"A request failed, which is a defect of XenSharp's; please report it with what follows.\n{failure}");
                return Make(ProblemKind.Failed, "The daemon failed, which is a defect of XenSharp's; its log has what to report.");
        }
    }

    internal async Task InvokeAsync(HttpContext context, RequestDelegate next)
    {
        try
        {
            await next(context).ConfigureAwait(false);
            if (!context.Response.HasStarted && context.Response.StatusCode is >= 400 and var status)
                await WriteAsync(context, DescribeStatus(context, status)).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (context.RequestAborted.IsCancellationRequested)
        {
            // Nobody waits for the answer.
        }
        catch (Exception failure)
        {
            ApiProblem problem = Describe(failure);
            if (context.Response.HasStarted)
            {
                // It is too late to say so: that the answer is cut off has to tell.
                context.Abort();
                return;
            }

            context.Response.Clear();
            await WriteAsync(context, problem).ConfigureAwait(false);
        }
    }

    /// <summary>Statuses that the framework sets by itself.</summary>
    private static ApiProblem DescribeStatus(HttpContext context, int status) => status switch
    {
        StatusCodes.Status404NotFound => Make(
            ProblemKind.NoSuchResource, $"There is nothing at {context.Request.Path}; {ApiRoutes.OpenApi} describes what there is.", status),
        StatusCodes.Status405MethodNotAllowed => Make(
            ProblemKind.BadRequest, $"{context.Request.Path} cannot be asked with {context.Request.Method}; {ApiRoutes.OpenApi} describes how.", status),
        StatusCodes.Status415UnsupportedMediaType => Make(
            ProblemKind.BadRequest, "The request's body has to be JSON: send it with Content-Type: application/json.", status),
        _ => Make(ProblemKind.BadRequest, $"The request cannot be served (status {status}); {ApiRoutes.OpenApi} describes how to ask.", status),
    };

    private static ApiProblem Make(string kind, string detail, int? status = null)
    {
        (int usual, string title) = kind switch
        {
            ProblemKind.NoSuchDomain => (StatusCodes.Status404NotFound, "No such domain"),
            ProblemKind.NoSuchDevice => (StatusCodes.Status404NotFound, "No such device"),
            ProblemKind.NoSuchResource => (StatusCodes.Status404NotFound, "Nothing there"),
            ProblemKind.NameTaken => (StatusCodes.Status409Conflict, "The name is taken"),
            ProblemKind.WrongState => (StatusCodes.Status409Conflict, "Not in this state"),
            ProblemKind.BadRequest => (StatusCodes.Status400BadRequest, "Bad request"),
            ProblemKind.BadConfiguration => (StatusCodes.Status422UnprocessableEntity, "The configuration cannot be used"),
            ProblemKind.NotSupported => (StatusCodes.Status501NotImplemented, "Not supported"),
            ProblemKind.HostCannot => (StatusCodes.Status503ServiceUnavailable, "The host cannot"),
            ProblemKind.GuestTimeout => (StatusCodes.Status504GatewayTimeout, "The guest did not do its part"),
            _ => (StatusCodes.Status500InternalServerError, "Failed"),
        };
        return new ApiProblem { Type = ApiProblem.TypePrefix + kind, Title = title, Status = status ?? usual, Detail = detail };
    }

    private static string Sentence(string text) => text.EndsWith('.') ? text : text + ".";

    private static Task WriteAsync(HttpContext context, ApiProblem problem)
    {
        context.Response.StatusCode = problem.Status;
        return context.Response.WriteAsJsonAsync(problem, ApiJson.Default.ApiProblem, ApiProblem.MediaType, context.RequestAborted);
    }
}
