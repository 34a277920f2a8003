// The channels of xl.cfg(5).

namespace XenSharp.Configuration.Devices;

/// <summary>Parses channel specifications as xl does.</summary>
public static class ChannelSpecification
{
    /// <summary>Longest path of a Unix socket (sun_path less its NUL).</summary>
    private const int LongestSocketPath = 107;

    /// <summary>Parses a specification.</summary>
    /// <param name="text">KEY=VALUE, separated by commas; blanks around both do not count.</param>
    /// <param name="warnings">Gets sentences about what has no effect.</param>
    /// <exception cref="FormatException">It is none; the message is a sentence.</exception>
    public static ChannelConfiguration Parse(string text, ICollection<string> warnings)
    {
        ArgumentNullException.ThrowIfNull(text);
        ArgumentNullException.ThrowIfNull(warnings);
        string? name = null;
        string? connection = null;
        string? path = null;
        foreach (string item in text.Split(',', StringSplitOptions.RemoveEmptyEntries))
        {
            string[] pair = item.Split('=');
            if (pair.Length != 2)
                throw new FormatException($"\"{item.Trim()}\" is not KEY=VALUE.");
            string value = pair[1].Trim();
            switch (pair[0].Trim())
            {
                case "name":
                    name = value;
                    break;
                case "connection":
                    connection = value.ToLowerInvariant();
                    break;
                case "path":
                    path = value;
                    break;
                case "backend":
                    if (!BackendDomain.IsHost(value))
                        throw new FormatException($"The back end cannot be in another domain ({value}): leave backend= out.");
                    break;
                case string other:
                    warnings.Add($"{other}= is no parameter of a channel; it has no effect.");
                    break;
            }
        }

        if (string.IsNullOrEmpty(name))
            throw new FormatException("A channel has a name, by which the guest's program finds it: add name=NAME.");
        if (connection is not ("pty" or "socket"))
            throw new FormatException($"A channel has connection=pty, or connection=socket and path=PATH{(connection is null ? string.Empty : $"; \"{connection}\" is neither")}.");
        if (connection == "pty")
            return new ChannelConfiguration { Name = name, Connection = ChannelConnection.Pty };
        if (path is null || !Path.IsPathRooted(path) || path.Length > LongestSocketPath)
            throw new FormatException($"A channel of connection=socket has path= with an absolute path of at most {LongestSocketPath} characters.");
        return new ChannelConfiguration { Name = name, Connection = ChannelConnection.Socket, Path = path };
    }
}
