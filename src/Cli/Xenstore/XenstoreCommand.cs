// xensharp xenstore: what Xen's xenstore-ls, -read, -write and their like are, with their options and output.

using System.CommandLine;
using XenSharp.Api;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Cli.Xenstore;

/// <summary>The commands on the store of the daemon, or of any xenstored that has a socket. Needs no KVM.</summary>
internal static class XenstoreCommand
{
    /// <summary>What Xen's tools would take; where they are not told, but where the daemon is, the store that it has beside its own socket.</summary>
    private static string DefaultSocket
        => XenstoreSocketPath.Named ?? (Environment.GetEnvironmentVariable(DaemonSocket.EnvironmentVariable) is { Length: > 0 } daemon
            ? DaemonSocket.XenstoreBeside(Path.GetFullPath(daemon)) : XenstoreSocketPath.Default);

    internal static Command Create()
    {
        var socket = new Option<string>("--socket")
        {
            Description = "The store's Unix socket; else XENSTORED_PATH, or \"socket\" in XENSTORED_RUNDIR, or the daemon's.",
            HelpName = "PATH",
            Recursive = true,
            DefaultValueFactory = static _ => DefaultSocket,
        };

        // Xen's tools take it for what is always so: the socket is used.
        var viaSocket = new Option<bool>("-s") { Hidden = true, Recursive = true };
        var command = new Command("xenstore", "Looks at and changes the store that guests and back ends talk through.")
        {
            Ls(socket), List(socket), Read(socket), Write(socket), Remove(socket), ChangeMode(socket), Exists(socket), Watch(socket),
        };
        command.Add(socket);
        command.Add(viaSocket);
        return command;
    }

    private static Command Ls(Option<string> socket)
    {
        Argument<string[]> paths = Paths("PATH", "Where to begin; all of the store if there is none.", ArgumentArity.ZeroOrMore);
        var flat = new Option<bool>("--flat", "-f") { Description = "Show whole paths and values, a node a line, not indented." };
        var permissions = new Option<bool>("--prefix", "-p") { Description = "Show permissions, too." };
        Option<bool> json = Json("Print an object of path, value and permissions a line, for programs.");
        var command = new Command("ls", "Shows nodes with all that is below them.") { paths, flat, permissions, json };
        command.SetAction((parsed, cancellation) => XenstoreSession.RunAsync(parsed.GetValue(socket)!, async (client, output) =>
        {
            XenstoreListing listing = new(client, output, parsed.GetValue(flat), parsed.GetValue(permissions), parsed.GetValue(json));
            string[] from = parsed.GetValue(paths)!;
            foreach (string path in from.Length == 0 ? ["/"] : from)
                await listing.ShowAsync(path, cancellation).ConfigureAwait(false);
            return true;
        }, cancellation));
        return command;
    }

    private static Command List(Option<string> socket)
    {
        Argument<string[]> paths = Paths("KEY", "A node whose children are listed.");
        var prefix = new Option<bool>("--prefix", "-p") { Description = "Print the node's path in front of each name." };
        Option<bool> json = Json("Print an array of names for each node, a line each.");
        var command = new Command("list", "Lists the names of nodes' children.") { paths, prefix, json };
        command.SetAction((parsed, cancellation) => XenstoreSession.TransactAsync(parsed.GetValue(socket)!, true, async (client, id, output) =>
        {
            foreach (string path in parsed.GetValue(paths)!)
            {
                IReadOnlyList<string> names = await client.ListAsync(path, id, cancellation).ConfigureAwait(false);
                if (parsed.GetValue(json))
                {
                    output.WriteJson(writer =>
                    {
                        writer.WriteStartArray();
                        foreach (string name in names)
                            writer.WriteStringValue(name);
                        writer.WriteEndArray();
                    });
                    continue;
                }
                foreach (string name in names)
                    output.WriteLine(parsed.GetValue(prefix) ? $"{path}/{name}" : name);
            }
        }, cancellation));
        return command;
    }

    private static Command Read(Option<string> socket)
    {
        Argument<string[]> paths = Paths("KEY", "A node whose value is printed.");
        var prefix = new Option<bool>("--prefix", "-p") { Description = "Print each node's path in front of its value." };
        var raw = new Option<bool>("--raw", "-R") { Description = "Print the bytes of values as they are, without an end of line." };
        Option<bool> json = Json("Print an object of path and value a line.");
        var command = new Command("read", "Prints values.") { paths, prefix, raw, json };
        command.SetAction((parsed, cancellation) =>
        {
            string[] all = parsed.GetValue(paths)!;
            return XenstoreSession.TransactAsync(parsed.GetValue(socket)!, all.Length > 1, async (client, id, output) =>
            {
                foreach (string path in all)
                {
                    byte[] value = await client.ReadAsync(path, id, cancellation).ConfigureAwait(false);
                    if (parsed.GetValue(json))
                    {
                        output.WriteJson(writer =>
                        {
                            writer.WriteStartObject();
                            writer.WriteString("path", path);
                            writer.WriteString("value", XenstoreText.Escape(value));
                            writer.WriteEndObject();
                        });
                        continue;
                    }
                    if (parsed.GetValue(prefix))
                        output.Write($"{path}: ");
                    if (parsed.GetValue(raw))
                        output.Write(value);
                    else
                        output.WriteLine(XenstoreText.Escape(value));
                }
            }, cancellation);
        });
        return command;
    }

    private static Command Write(Option<string> socket)
    {
        Argument<string[]> pairs = Paths("KEY VALUE", "A node and the value it gets; \\t, \\n, \\r, \\\\, \\xHH and \\OOO stand for bytes.");
        var raw = new Option<bool>("--raw", "-R") { Description = "Take values as they are, backslashes too." };
        var command = new Command("write", "Sets values, all or none of them. Missing nodes are created.") { pairs, raw };
        command.Validators.Add(result =>
        {
            if (result.GetValue(pairs)!.Length % 2 != 0)
                result.AddError("A value is missing: give each key its value.");
        });
        command.SetAction((parsed, cancellation) =>
        {
            string[] all = parsed.GetValue(pairs)!;
            return XenstoreSession.TransactAsync(parsed.GetValue(socket)!, all.Length > 2, async (client, id, _) =>
            {
                for (int index = 0; index < all.Length; index += 2)
                {
                    byte[] value = XenstoreText.Value(all[index + 1], unescape: !parsed.GetValue(raw));
                    await client.WriteAsync(all[index], value, id, cancellation).ConfigureAwait(false);
                }
            }, cancellation);
        });
        return command;
    }

    private static Command Remove(Option<string> socket)
    {
        Argument<string[]> paths = Paths("KEY", "A node to remove, with all that is below.");
        var tidy = new Option<bool>("--tidy", "-t") { Description = "Remove nodes above, too, that are left without a value and without children." };
        var command = new Command("rm", "Removes nodes, all or none of them.") { paths, tidy };
        command.SetAction((parsed, cancellation) => XenstoreSession.TransactAsync(parsed.GetValue(socket)!, true, async (client, id, _) =>
        {
            foreach (string path in parsed.GetValue(paths)!)
            {
                await client.RemoveAsync(path, id, cancellation).ConfigureAwait(false);
                if (!parsed.GetValue(tidy))
                    continue;
                for (string above = Above(path); above.Length > 0; above = Above(above))
                {
                    if ((await client.ReadAsync(above, id, cancellation).ConfigureAwait(false)).Length > 0 ||
                        (await client.ListAsync(above, id, cancellation).ConfigureAwait(false)).Count > 0)
                        break;
                    await client.RemoveAsync(above, id, cancellation).ConfigureAwait(false);
                }
            }
        }, cancellation));
        return command;
    }

    private static Command ChangeMode(Option<string> socket)
    {
        var path = new Argument<string>("KEY") { Description = "The node." };
        var modes = new Argument<XenstorePermission[]>("MODE")
        {
            Description = "n (nothing), r (read), w (write) or b (both) and a domain id. The first names the owner, and what others may do.",
            Arity = ArgumentArity.OneOrMore,
            CustomParser = static result =>
            {
                var entries = new XenstorePermission[result.Tokens.Count];
                for (int index = 0; index < entries.Length; index++)
                {
                    if (!XenstorePermission.TryParse(result.Tokens[index].Value, out entries[index]))
                    {
                        result.AddError($"\"{result.Tokens[index].Value}\" is no mode: write one of n, r, w, b and a domain id, such as r5.");
                        return [];
                    }
                }
                return entries;
            },
        };
        var upTo = new Option<bool>("--upto", "-u") { Description = "Do the same with all nodes above." };
        var recurse = new Option<bool>("--recurse", "-r") { Description = "Do the same with all nodes below." };
        var command = new Command("chmod", "Sets who may do what with a node.") { path, modes, upTo, recurse };
        command.SetAction((parsed, cancellation) => XenstoreSession.TransactAsync(parsed.GetValue(socket)!, true, async (client, id, _) =>
        {
            string node = parsed.GetRequiredValue(path);
            XenstorePermissions permissions = new(parsed.GetRequiredValue(modes));
            await client.SetPermissionsAsync(node, permissions, id, cancellation).ConfigureAwait(false);
            for (string above = Above(node); parsed.GetValue(upTo) && above.Length > 0; above = Above(above))
                await client.SetPermissionsAsync(above, permissions, id, cancellation).ConfigureAwait(false);
            if (parsed.GetValue(recurse))
                await ChangeBelowAsync(client, node, permissions, id, cancellation).ConfigureAwait(false);
        }, cancellation));
        return command;
    }

    private static Command Exists(Option<string> socket)
    {
        Argument<string[]> paths = Paths("KEY", "A node.");
        var command = new Command("exists", "Says by its status whether all the nodes exist. Status 0: they do, 1: one does not.") { paths };
        command.SetAction((parsed, cancellation) => XenstoreSession.RunAsync(parsed.GetValue(socket)!, async (client, _) =>
        {
            foreach (string path in parsed.GetValue(paths)!)
            {
                try
                {
                    await client.ReadAsync(path, 0, cancellation).ConfigureAwait(false);
                }
                catch (XenstoreException refusal) when (refusal.Error == XenstoreError.ENOENT)
                {
                    return false;
                }
            }
            return true;
        }, cancellation));
        return command;
    }

    private static Command Watch(Option<string> socket)
    {
        Argument<string[]> paths = Paths("KEY", "A node to watch, with all that is below, or @introduceDomain or @releaseDomain.");
        var number = new Option<int>("--number", "-n")
        {
            Description = "End after so many events.",
            HelpName = "COUNT",
            DefaultValueFactory = static _ => -1,
        };
        Option<bool> json = Json("Print an object of path and watched path a line.");
        var command = new Command("watch", "Prints the path of each change; each node's own once at first.") { paths, number, json };
        command.SetAction((parsed, cancellation) => XenstoreSession.RunAsync(parsed.GetValue(socket)!, async (client, output) =>
        {
            foreach (string path in parsed.GetValue(paths)!)
                await client.WatchAsync(path, path, null, cancellation).ConfigureAwait(false);
            int most = parsed.GetValue(number);
            for (int count = 0; count != most; count++)
            {
                // A connection that ends is an error of its own, told by the next request.
                if (!await client.Events.WaitToReadAsync(cancellation).ConfigureAwait(false))
                    _ = await client.ReadAsync("/", 0, cancellation).ConfigureAwait(false);
                XenstoreEvent change = await client.Events.ReadAsync(cancellation).ConfigureAwait(false);
                if (parsed.GetValue(json))
                {
                    output.WriteJson(writer =>
                    {
                        writer.WriteStartObject();
                        writer.WriteString("path", change.Path);
                        writer.WriteString("watch", change.Token);
                        writer.WriteEndObject();
                    });
                }
                else
                {
                    output.WriteLine(change.Path);
                }
                output.Flush();
            }
            return true;
        }, cancellation));
        return command;
    }

    private static Argument<string[]> Paths(string name, string description, ArgumentArity? arity = null) =>
        new(name) { Description = description, Arity = arity ?? ArgumentArity.OneOrMore };

    private static Option<bool> Json(string description) => new("--json") { Description = description };

    /// <summary>The path above; empty when that is the root, or what a relative path starts from.</summary>
    private static string Above(string path)
    {
        int slash = path.LastIndexOf('/');
        return slash < 0 ? "" : path[..slash];
    }

    private static async Task ChangeBelowAsync(
        XenstoreSocketClient client, string path, XenstorePermissions permissions, uint id, CancellationToken cancellation)
    {
        foreach (string name in await client.ListAsync(path, id, cancellation).ConfigureAwait(false))
        {
            string child = path.EndsWith('/') ? path + name : $"{path}/{name}";
            await client.SetPermissionsAsync(child, permissions, id, cancellation).ConfigureAwait(false);
            await ChangeBelowAsync(client, child, permissions, id, cancellation).ConfigureAwait(false);
        }
    }
}
