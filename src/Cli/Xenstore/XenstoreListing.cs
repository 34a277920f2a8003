// The tree of the store as xenstore-ls shows it: indented and cut to the terminal's width, or flat and whole.

using XenSharp.Devices.Xenstore;

namespace XenSharp.Cli.Xenstore;

/// <summary>Shows what is below nodes.</summary>
internal sealed class XenstoreListing
{
    // What stands around a value that is cut: = "...".
    private const string CutValue = " = \"...\"";

    // Where permissions are aligned to, and how wide lines are where there is no terminal.
    private const int PermissionsColumn = 60;
    private const int UsualWidth = 80;

    private readonly XenstoreSocketClient _client;
    private readonly XenstoreOutput _output;
    private readonly bool _flat;
    private readonly bool _permissions;
    private readonly bool _json;
    private readonly int _width;
    private readonly int _column;

    internal XenstoreListing(XenstoreSocketClient client, XenstoreOutput output, bool flat, bool permissions, bool json)
    {
        _client = client;
        _output = output;
        _flat = flat;
        _permissions = permissions;
        _json = json;
        _width = flat ? int.MaxValue : Console.IsOutputRedirected ? UsualWidth : Math.Max(CutValue.Length + 1, Console.WindowWidth - 2);
        _column = flat ? 0 : Math.Min(PermissionsColumn, _width);
    }

    /// <summary>Shows everything below a node, not the node itself.</summary>
    internal Task ShowAsync(string path, CancellationToken cancellation) => ShowBelowAsync(path, 0, cancellation);

    private async Task ShowBelowAsync(string path, int depth, CancellationToken cancellation)
    {
        if (await IfThereAsync(_client.ListAsync(path, 0, cancellation), always: depth == 0).ConfigureAwait(false) is not { } names)
            return;
        foreach (string name in names)
        {
            string child = path.EndsWith('/') ? path + name : $"{path}/{name}";
            byte[]? value = await IfThereAsync(_client.ReadAsync(child, 0, cancellation)).ConfigureAwait(false);
            XenstorePermissions? permissions = value is not null && (_permissions || _json)
                ? await IfThereAsync(_client.GetPermissionsAsync(child, 0, cancellation)).ConfigureAwait(false)
                : null;
            if (_json)
                ShowJson(child, value, permissions);
            else
                Show(child, name, depth, value, permissions);
            _output.Flush();
            await ShowBelowAsync(child, depth + 1, cancellation).ConfigureAwait(false);
        }
    }

    private void Show(string path, string name, int depth, byte[]? value, XenstorePermissions? permissions)
    {
        string line = path;
        if (!_flat)
        {
            int room = Math.Max(0, _width - CutValue.Length - depth);
            line = new string(' ', depth) + name[..Math.Min(name.Length, room)];
        }
        if (value is null)
        {
            // It has gone meanwhile.
            _output.WriteLine(line + ":");
            return;
        }
        string text = XenstoreText.Escape(value);
        if ((long)line.Length + value.Length + CutValue.Length > _width)
        {
            int room = Math.Max(0, _width - CutValue.Length - line.Length);
            line += $" = \"{text[..Math.Min(text.Length, room)]}\\...\"";
        }
        else
        {
            line += $" = \"{text}\"";
            if (permissions is not null)
                line += " " + Dots(line.Length + 1);
        }
        if (permissions is not null)
            line += $"  ({string.Join(',', permissions.Entries)})";
        _output.WriteLine(line);
    }

    // A dot at every other column leads to the permissions.
    private string Dots(int from) => from >= _column
        ? ""
        : string.Create(_column - from, from, static (dots, start) =>
        {
            for (int index = 0; index < dots.Length; index++)
                dots[index] = ((start + index) & 1) != 0 ? '.' : ' ';
        });

    private void ShowJson(string path, byte[]? value, XenstorePermissions? permissions)
    {
        if (value is null || permissions is null)
            return;
        _output.WriteJson(writer =>
        {
            writer.WriteStartObject();
            writer.WriteString("path", path);
            writer.WriteString("value", XenstoreText.Escape(value));
            writer.WriteStartArray("permissions");
            foreach (XenstorePermission entry in permissions.Entries)
                writer.WriteStringValue(entry.ToString());
            writer.WriteEndArray();
            writer.WriteEndObject();
        });
    }

    // Others change the store while it is shown: what has gone is passed over.
    private static async Task<T?> IfThereAsync<T>(Task<T> request, bool always = false)
        where T : class
    {
        try
        {
            return await request.ConfigureAwait(false);
        }
        catch (XenstoreException refusal) when (refusal.Error == XenstoreError.ENOENT && !always)
        {
            return null;
        }
    }
}
