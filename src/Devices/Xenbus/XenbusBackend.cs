// The life of a PV device's back end: its nodes, the two ends' states, connecting, closing, unplugging, the domain's end.
using System.Threading.Channels;
using XenSharp.Core;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;

namespace XenSharp.Devices.Xenbus;

/// <summary>
/// Hosts a back end of any kind in this process: what xenbus and its driver core do in a driver domain, and libxl in the toolstack.
/// </summary>
/// <remarks>
/// <para><b>States.</b> The back end offers itself (InitWait), connects when the front end is Initialised or Connected, follows it
/// to Closing and Closed, and offers itself again when it starts anew: after a driver was loaded again, a kexec, a resume.</para>
/// <para><b>Hostile front ends.</b> One loop a device does everything, step by step; a front end that writes nonsense gets an error
/// node and a back end that closes, and can start anew. What is said about it to people is limited.</para>
/// <para><b>The domain's end</b> ends the connection as well, whatever was under way; that it suspends itself does not. The nodes stay until <see cref="DisposeAsync"/>,
/// which has to come before the domain's memory and the store go.</para>
/// </remarks>
public sealed class XenbusBackend : IAsyncDisposable
{
    private static readonly TimeSpan ReportInterval = TimeSpan.FromSeconds(10);
    private const int ReportsPerInterval = 5;

    private readonly Domain _domain;
    private readonly XenstoreClient _store;
    private readonly IXenbusDriver _driver;
    private readonly Action<string> _report;
    private readonly CancellationTokenSource _stop = new();
    private readonly Channel<bool> _wake = Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });
    private readonly Task _run;
    private IXenbusConnection? _connection;
    private XenbusState _frontSeen = XenbusState.Unknown;
    private volatile XenbusState _state = XenbusState.Initialising;
    private volatile bool _unplug;
    private bool _failed;
    private bool _domainEnded;
    private long _reportsSince;
    private int _reports;

    /// <summary>Writes the device's nodes and starts serving it. Any time as long as there is the domain, before it runs as well.</summary>
    /// <param name="domain">The guest.</param>
    /// <param name="store">The store that it uses, with all rights; has to stay until the back end is gone.</param>
    /// <param name="device">The device.</param>
    /// <param name="nodes">What its nodes say from the beginning.</param>
    /// <param name="driver">What serves it; the caller's to dispose where this throws, and the device's own otherwise.</param>
    /// <param name="report">Takes sentences for people; called on any thread, must not block for long.</param>
    /// <exception cref="InvalidOperationException">The domain has that device.</exception>
    public XenbusBackend(
        Domain domain, XenstoreClient store, XenbusDevice device, XenbusNodes nodes, IXenbusDriver driver, Action<string>? report = null)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(store);
        ArgumentNullException.ThrowIfNull(nodes);
        ArgumentNullException.ThrowIfNull(driver);
        (_domain, _store, _driver, Device) = (domain, store, driver, device);
        _report = report ?? (static _ => { });
        store.Transact(transaction =>
        {
            if (transaction.Exists(device.Record))
                throw new InvalidOperationException($"There is a {device} already: detach it first, or choose another number.");
            device.WriteNodes(transaction, nodes);
        });
        _run = Task.Run(RunAsync);
        Completion = EndAsync();
    }

    /// <summary>Which device it is.</summary>
    public XenbusDevice Device { get; }

    /// <summary>The back end's state.</summary>
    public XenbusState State => _state;

    /// <summary>Completes when the device is gone: nothing of the guest's is in use, its nodes are removed, and its driver is disposed.</summary>
    public Task Completion { get; }

    /// <summary>
    /// Unplugs the device as libxl does: says "online" 0 and Closing, and waits until the front end has closed. A device that is not
    /// connected goes at once.
    /// </summary>
    /// <param name="timeout">How long to wait for the guest.</param>
    /// <param name="force">Whether to take the device away from a guest that has not closed it by then.</param>
    /// <param name="cancellation">Ends the waiting; the unplugging goes on.</param>
    /// <returns>False if the guest still has it; it goes by itself when the guest closes it after all.</returns>
    public async Task<bool> RemoveAsync(TimeSpan timeout, bool force, CancellationToken cancellation = default)
    {
        _unplug = true;
        Wake();



        // How the run ended is for Completion to say; here it is only waited for.
        Task end = Task.WhenAny(_run);
        try
        {
            await end.WaitAsync(timeout, cancellation).ConfigureAwait(false);
        }
        catch (TimeoutException)
        {
            // It may have ended since.
        }

        if (end.IsCompleted)
        {
            await Completion.ConfigureAwait(false);
            return true;
        }

        if (!force)
            return false;
        Report("the guest did not close it in time; it is taken away");
        await DisposeAsync().ConfigureAwait(false);
        return true;
    }

    /// <summary>Takes the device away at once, whatever the guest does with it, and removes its nodes.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        await Completion.ConfigureAwait(false);
    }

    /// <summary>Says something about the device to people; not more than a few times in a while, as guests can cause it.</summary>
    /// <param name="sentence">What goes after the device's name and a colon.</param>
    public void Report(string sentence)
    {
        long now = Environment.TickCount64;
        lock (_wake)
        {
            if (now - _reportsSince >= (long)ReportInterval.TotalMilliseconds || _reportsSince == 0)
                (_reportsSince, _reports) = (now, 0);
            if (++_reports > ReportsPerInterval + 1)
                return;
            if (_reports == ReportsPerInterval + 1)
                sentence = $"more is not reported for {ReportInterval.TotalSeconds:0} seconds";
        }

        _report($"{Device}: {sentence}.");
    }

    private async Task EndAsync()
    {
        await _run.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        await _driver.DisposeAsync().ConfigureAwait(false);
        await _run.ConfigureAwait(false);
    }

    private void Wake() => _wake.Writer.TryWrite(true);

    /// <summary>Wakes the loop when the domain's run ends.</summary>
    private void FollowRun() => _ = _domain.Completion.ContinueWith(
        static (_, backend) => ((XenbusBackend)backend!).Wake(), this, _stop.Token, TaskContinuationOptions.None, TaskScheduler.Default);

    private async Task RunAsync()
    {
        IDisposable? watch = null;
        try
        {
            Offer();
            watch = _store.Watch(Device.FrontEnd + "/state", _ => Wake());
            _domain.Resumed += FollowRun;
            FollowRun();
            do
            {
                await _wake.Reader.ReadAsync(_stop.Token).ConfigureAwait(false);
            }
            while (!await StepAsync().ConfigureAwait(false));
        }
        catch (OperationCanceledException) when (_stop.IsCancellationRequested)
        {
            // Disposed.
        }
        catch (Exception failure)
        {
            // A defect of ours, or a store that is gone: it must end this device, and only this one.
            Report($"it cannot be served any longer: {failure.Message}");
        }
        finally
        {
            watch?.Dispose();
            _domain.Resumed -= FollowRun;
            await DisconnectAsync().ConfigureAwait(false);
            _state = XenbusState.Closed;
            await _stop.CancelAsync().ConfigureAwait(false);
            try
            {
                _store.Transact(Device.RemoveNodes);
            }
            catch (ObjectDisposedException)
            {
                // The store is gone, and the nodes with it.
            }
        }
    }

    /// <summary>Looks at everything that may have changed.</summary>
    /// <returns>Whether the device is unplugged.</returns>
    private async ValueTask<bool> StepAsync()
    {
        // A domain that has suspended itself keeps its devices: it may go on in place, with the rings that it has.
        if (!_domainEnded && _domain.Completion is { IsCompletedSuccessfully: true } end && end.Result.Reason != ShutdownReason.Suspend)
        {
            _domainEnded = true;
            await DisconnectAsync().ConfigureAwait(false);
            Become(XenbusState.Closed);
        }

        if (_domainEnded)
            return _unplug;
        if (_connection is { Failure: { IsCompleted: true } failure })
            await FailAsync(failure.Exception?.InnerException ?? new XenbusException(Errno.EIO, "the device has stopped")).ConfigureAwait(false);
        XenbusState front = FrontState(out string text);
        if (_unplug)
            return await UnplugAsync(front).ConfigureAwait(false);
        await FollowAsync(front, text).ConfigureAwait(false);
        _frontSeen = front;
        return false;
    }

    private async ValueTask FollowAsync(XenbusState front, string text)
    {
        switch (front)
        {
            case XenbusState.Initialising:
                if (_state is XenbusState.InitWait)
                    return;
                if (_connection is not null)
                {
                    // It began anew without closing; it will not look at what it had.
                    await DisconnectAsync().ConfigureAwait(false);
                    Become(XenbusState.Closed);
                }

                Offer();
                break;

            case XenbusState.InitWait:
                break;

            case XenbusState.Initialised:
            case XenbusState.Connected:
                // A front end that is Initialised again has new rings.
                if (front == XenbusState.Initialised && _frontSeen == XenbusState.Connected)
                    await DisconnectAsync().ConfigureAwait(false);
                if (_connection is null && !_failed)
                    await ConnectAsync().ConfigureAwait(false);
                break;

            case XenbusState.Closing:
                Become(XenbusState.Closing);
                break;

            // A guest that removes its nodes has no device any more.
            case XenbusState.Closed:
            case XenbusState.Unknown when text.Length == 0:
                await DisconnectAsync().ConfigureAwait(false);
                _failed = false;
                Become(XenbusState.Closed);
                break;

            default:
                if (!_failed)
                {
                    await FailAsync(new XenbusException(Errno.EINVAL, $"saw state \"{XenbusFrontEnd.Shown(text)}\" at the front end"))
                        .ConfigureAwait(false);
                }
                break;
        }
    }

    private async ValueTask<bool> UnplugAsync(XenbusState front)
    {
        if (_connection is null || front is XenbusState.Closed or XenbusState.Unknown)
            return true;
        if (_state != XenbusState.Closing)
        {
            _store.Transact(transaction =>
            {
                if (transaction.Exists(Device.BackEnd + "/state"))
                    transaction.Write(Device.BackEnd + "/online", "0");
            });
            Become(XenbusState.Closing);
        }

        if (_connection.Failure.IsCompleted)
            await DisconnectAsync().ConfigureAwait(false);
        return _connection is null;
    }

    private void Offer()
    {
        _failed = false;
        Become(XenbusState.InitWait, transaction => _driver.Announce(transaction, Device.BackEnd));
    }

    private async ValueTask ConnectAsync()
    {
        try
        {
            IXenbusConnection connection =
                await _driver.ConnectAsync(new XenbusFrontEnd(_store, Device.FrontEnd), _stop.Token).ConfigureAwait(false);
            _connection = connection;
            _ = connection.Failure.ContinueWith(_ => Wake(), _stop.Token, TaskContinuationOptions.None, TaskScheduler.Default);
            Become(XenbusState.Connected, transaction => connection.Publish(transaction, Device.BackEnd));
        }
        catch (XenbusException exception)
        {
            await FailAsync(exception).ConfigureAwait(false);
        }
    }

    /// <summary>Ends the connection for a reason, which the guest and people are told (xenbus_dev_fatal).</summary>
    private async ValueTask FailAsync(Exception reason)
    {
        _failed = true;
        await DisconnectAsync().ConfigureAwait(false);
        int error = (int)((reason as XenbusException)?.Error ?? Errno.EIO);

        // People first: who sees the state finds that it was told why.
        Report(reason.Message);
        Become(XenbusState.Closing, transaction => transaction.Write(Device.Error + "/error", $"{error} {reason.Message}"));
    }

    private async ValueTask DisconnectAsync()
    {
        if (_connection is not { } connection)
            return;
        _connection = null;
        await connection.DisposeAsync().ConfigureAwait(false);
    }

    /// <summary>Writes the state, with what belongs to it, unless the toolstack has taken the nodes away.</summary>
    private void Become(XenbusState state, Action<XenstoreTransaction>? with = null)
    {
        if (_state == state && with is null)
            return;

        // Before it is written: who has read it in the store finds it here as well.
        _state = state;
        string node = Device.BackEnd + "/state";
        _store.Transact(transaction =>
        {
            if (!transaction.Exists(node))
                return;
            with?.Invoke(transaction);
            transaction.Write(node, ((int)state).ToString(System.Globalization.CultureInfo.InvariantCulture));
        });
    }

    private XenbusState FrontState(out string text)
    {
        text = _store.Read(Device.FrontEnd + "/state") ?? "";
        return XenbusFrontEnd.TryParse(text, out uint number) && number <= (uint)XenbusState.Reconfigured
            ? (XenbusState)number
            : XenbusState.Unknown;
    }
}
