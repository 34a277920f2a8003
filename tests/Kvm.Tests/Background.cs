namespace XenSharp.Kvm.Tests;

/// <summary>A thread beside the vCPU's. Its exception, if any, comes out of <see cref="Dispose"/>.</summary>
internal sealed class Background : IDisposable
{
    private readonly CancellationTokenSource _stop = new();
    private readonly Thread _thread;
    private volatile Exception? _failure;
    private volatile bool _done;

    public Background(Action work)
        : this(_ => work())
    {
    }

    public Background(Action<CancellationToken> work)
    {
        _thread = new Thread(() =>
        {
            try
            {
                work(_stop.Token);
            }
            catch (Exception failure)
            {
                _failure = failure;
            }
            finally
            {
                _done = true;
            }
        });
        _thread.Start();
    }

    public bool IsDone => _done;

    public void Dispose()
    {
        _stop.Cancel();
        _thread.Join();
        _stop.Dispose();
        if (_failure != null)
            throw new InvalidOperationException("The thread beside the vCPU failed.", _failure);
    }
}
