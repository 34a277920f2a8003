// The disk specifications of xl-disk-configuration(5), old forms included.

using System.Text.RegularExpressions;
using XenSharp.Core;

namespace XenSharp.Configuration.Devices;

/// <summary>Parses disk specifications as libxlu's does (libxlu_disk_l.l, 4.17).</summary>
public static partial class DiskSpecification
{
    /// <summary>Parses a specification: one of a configuration, or the words of a block-attach command.</summary>
    /// <param name="parts">
    /// The specification. Several parts, as a command has them, are read one after another; positional parameters go on from where they
    /// were.
    /// </param>
    /// <param name="warnings">Gets sentences about what has no effect.</param>
    /// <exception cref="FormatException">It is none, or one of a disk that cannot be had here; the message is a sentence.</exception>
    public static DiskConfiguration Parse(IEnumerable<string> parts, ICollection<string> warnings)
    {
        ArgumentNullException.ThrowIfNull(parts);
        ArgumentNullException.ThrowIfNull(warnings);
        var state = new Reading(warnings);
        foreach (string part in parts)
            state.Read(part);
        return state.Finish();
    }

    [GeneratedRegex("^[a-z][a-z0-9]*:")]
    private static partial Regex Prefix();

    /// <summary>What has been read of a specification.</summary>
    private sealed class Reading(ICollection<string> warnings)
    {
        private string? _target;
        private string? _format;
        private string? _device;
        private string? _access;
        private bool _accessByPosition;
        private string? _backendType;
        private bool _hadPrefix;
        private bool? _cdrom;
        private bool? _discard;
        private bool? _trusted;
        private bool _directIoSafe;

        internal void Read(string text)
        {
            int at = 0;
            while (at < text.Length)
            {
                if (text[at] is ' ' or '\t' or '\n')
                {
                    at++;
                    continue;
                }

                if (string.CompareOrdinal(text, at, "target=", 0, 7) == 0)
                {
                    Set(ref _target, text[(at + 7)..], "target");
                    return;
                }

                if (Prefix().Match(text[at..]) is { Success: true } prefix && TakePrefix(prefix.Value[..^1], text[(at + prefix.Length)..]))
                {
                    at += prefix.Length;
                    continue;
                }

                int comma = text.IndexOf(',', at);
                string item = comma < 0 ? text[at..] : text[at..comma];
                at = comma < 0 ? text.Length : comma + 1;
                int equals = item.IndexOf('=');
                if (equals > 0)
                    TakeParameter(item[..equals], item[(equals + 1)..]);
                else if (equals == 0)
                    throw new FormatException($"\"{item}\" is not KEY=VALUE, and no part of a disk specification may begin with =.");
                else if (!TakeFlag(item))
                    TakePosition(item);
            }
        }

        internal DiskConfiguration Finish()
        {
            if (_device is null)
                throw new FormatException("It names no device of the guest: add vdev=xvda or another.");
            _ = VirtualDevice.Parse(_device);
            bool cdrom = _cdrom == true;
            string target = _target ?? string.Empty;
            if (target.Length == 0 && !cdrom && _format != "empty")
                throw new FormatException("It names no file or block device: add target=PATH as its last parameter.");
            if (_format is "qcow" or "vhd" or "qed")
                throw new FormatException($"Images of the format {_format} cannot be used here: convert it with qemu-img convert -O qcow2, or -O raw.");
            DiskFormat format = target.Length == 0 || _format == "empty" ? DiskFormat.Empty : _format == "qcow2" ? DiskFormat.Qcow2 : DiskFormat.Raw;
            if (_backendType == "phy" && format == DiskFormat.Qcow2)
                throw new FormatException("backendtype=phy is for raw block devices and files; leave it out with format=qcow2.");
            if (target.Contains('\0'))
                throw new FormatException("The target has a NUL character in it, which no path has.");
            if (target.Length > 0 && target[0] != '/')
            {
                warnings.Add($"The target {target} is taken as /dev/{target}, as xl does; write a file's whole path.");
                target = "/dev/" + target;
            }

            bool readOnly = cdrom || _access is "r" or "ro";
            return new DiskConfiguration
            {
                Target = target,
                Format = format,
                VirtualDevice = _device,
                ReadOnly = readOnly,
                Cdrom = cdrom,
                Discard = _discard,
                Trusted = _trusted,
                BackendType = _backendType,
                DirectIoSafe = _directIoSafe,
            };
        }

        /// <summary>What stood before paths in the times of xend.</summary>
        private bool TakePrefix(string prefix, string rest)
        {
            switch (prefix)
            {
                case "raw" or "qcow" or "qcow2" or "vhd":
                    SetFormat(prefix);
                    break;
                case "iscsi" or "nbd" or "enbd" or "drbd":
                    throw new FormatException($"{prefix}: asks for the script block-{prefix}, and scripts are not run here: connect the device on the host, and name it.");
                case "tapdisk" or "tap" or "tap2" or "aio" or "ioemu" or "file" or "phy":
                    break;
                default:
                    // A word behind it, as in hda:cdrom, makes it a device and its kind, or a name with a colon.
                    if (rest.Length > 0 && (char.IsAsciiLetterLower(rest[0]) || char.IsAsciiDigit(rest[0])))
                        return false;
                    throw new FormatException($"The prefix {prefix}: is none that xl knows; if it is part of a path, write target=PATH as the last parameter.");
            }

            _hadPrefix = true;
            return true;
        }

        private void TakeParameter(string key, string value)
        {
            switch (key)
            {
                case "format":
                    SetFormat(value);
                    break;
                case "vdev":
                    Set(ref _device, value, "vdev");
                    break;
                case "access":
                    SetAccess(value);
                    break;
                case "devtype":
                    _cdrom = value switch
                    {
                        "cdrom" => true,
                        "disk" => false,
                        _ => throw new FormatException($"devtype= takes cdrom or disk; \"{value}\" is neither."),
                    };
                    break;
                case "backendtype":
                    if (value is not ("phy" or "tap" or "qdisk" or "standalone"))
                        throw new FormatException($"backendtype= takes phy, qdisk or tap; \"{value}\" is none of them.");
                    if (value == "standalone")
                        throw new FormatException("backendtype=standalone is for virtio disks, which PV guests here do not have: leave it out.");
                    Set(ref _backendType, value, "backendtype");
                    break;
                case "backend":
                    if (!BackendDomain.IsHost(value))
                        throw new FormatException($"The back end cannot be in another domain ({value}): leave backend= out.");
                    break;
                case "specification":
                    if (value is not ("xen" or "virtio"))
                        throw new FormatException($"specification= takes xen; \"{value}\" is none.");
                    if (value == "virtio")
                        throw new FormatException("specification=virtio is for virtio disks, which PV guests here do not have: leave it out.");
                    break;
                case "script":
                    if (value.Length > 0)
                        throw new FormatException($"Scripts ({value}) are not run here: set up the device on the host, and name it as the target.");
                    break;
                case "colo-host" or "colo-port" or "colo-export" or "active-disk" or "hidden-disk":
                    throw new FormatException($"{key}= is for COLO replication, which there is not here: leave it out.");
                default:
                    throw new FormatException(key.Contains('/')
                        ? $"\"{key}=\" is no parameter of a disk; write a path that has = or a comma in it as target=PATH, as the last parameter."
                        : $"{key}= is no parameter of a disk.");
            }
        }

        private bool TakeFlag(string item)
        {
            switch (item)
            {
                case "cdrom":
                    _cdrom = true;
                    return true;
                case "discard":
                    _discard = true;
                    return true;
                case "no-discard":
                    _discard = false;
                    return true;
                case "direct-io-safe":
                    _directIoSafe = true;
                    return true;
                case "trusted":
                    _trusted = true;
                    return true;
                case "untrusted":
                    _trusted = false;
                    return true;
                case "no-colo":
                    return true;
                case "colo":
                    throw new FormatException("colo asks for COLO replication, which there is not here: leave it out.");
                default:
                    return false;
            }
        }

        private void TakePosition(string item)
        {
            if (_target is null)
            {
                _target = item;
            }
            else if (!_hadPrefix && _format is null)
            {
                // ",hdc:cdrom,r" is xend's for an empty drive: where a format should be, there is the device.
                if (_target.Length == 0 && TakeDeviceAndType(item))
                    _format = "empty";
                else
                    SetFormat(item);
            }
            else if (_device is null)
            {
                if (!TakeDeviceAndType(item))
                    Set(ref _device, item, "vdev");
            }
            else if (!_accessByPosition)
            {
                _accessByPosition = true;
                SetAccess(item);
            }
            else
            {
                throw new FormatException($"\"{item}\" is one parameter too many: without names there are the target, the format, the device and the access.");
            }
        }

        private bool TakeDeviceAndType(string item)
        {
            int colon = item.LastIndexOf(':');
            if (colon < 0)
                return false;
            Set(ref _device, item[..colon], "vdev");
            _cdrom = item[(colon + 1)..] switch
            {
                "cdrom" => true,
                "disk" => false,
                string other => throw new FormatException($"Behind a device and a colon there is cdrom or disk; \"{other}\" is neither."),
            };
            return true;
        }

        private void SetFormat(string value)
        {
            if (value.Length == 0)
                value = "raw";
            if (value is not ("raw" or "qcow" or "qcow2" or "vhd" or "qed" or "empty"))
                throw new FormatException($"The format of a disk is raw or qcow2; \"{value}\" is none.");
            if (_format is not null && _format != value)
                throw new FormatException($"It gives the format twice: {_format} and {value}.");
            _format = value;
        }

        private void SetAccess(string value) => _access = value switch
        {
            "r" or "ro" => "r",
            "w" or "rw" or "" => "w",
            _ => throw new FormatException($"The access to a disk is r or w; \"{value}\" is neither."),
        };

        private static void Set(ref string? where, string value, string what)
        {
            if (!string.IsNullOrEmpty(where))
                throw new FormatException($"It gives the {what} twice: {where} and {value}.");
            where = value;
        }
    }
}
