// A host whose apt-get, apt-cache and dpkg-deb are scripts of the test's, in a folder that goes before the real PATH.
using XenSharp.Guests.Fetching;

namespace XenSharp.Guests.Tests;

/// <summary>
/// The scripts share a folder: a call of any tool appends a line to <c>calls</c>; the files that tests put there steer them.
/// </summary>
sealed class FakeHost : IDisposable
{
    // apt-cache -c CONF show --no-all-versions PACKAGE. The file "no-system-lists" makes the system's lists look empty.
    const string AptCache = """
        echo "apt-cache $*" >>"$here/calls"
        case "$2" in */system.conf) [ -e "$here/no-system-lists" ] && exit 100;; esac
        [ -e "$here/packages/$5" ] || { echo "E: No packages found" >&2; exit 100; }
        cat "$here/packages/$5"
        """;

    // apt-get -c CONF install --print-uris --yes --no-install-recommends PACKAGE…; the file "closure" has the answer.
    // apt-get -c CONF -q -o APT::Status-Fd=1 (update | download NAME=VERSION…). "stale-system-lists" fails downloads by the
    // system's lists; "download-fails" fails all; "hang" waits for ever once half of the file is written.
    const string AptGet = """
        echo "apt-get $*" >>"$here/calls"
        case "$3" in
        install)
            case "$2" in */system.conf) [ -e "$here/no-system-lists" ] && { echo "E: Unable to locate package $7" >&2; exit 100; };; esac
            [ -e "$here/closure" ] || { echo "E: Unable to locate package $7" >&2; exit 100; }
            echo "NOTE: the following packages will be installed"
            cat "$here/closure"
            exit 0 ;;
        esac
        case "$6" in
        update)
            [ -e "$here/update-fails" ] && { echo "E: Could not resolve 'deb.example'" >&2; exit 100; }
            echo "dlstatus:1:50.0:Retrieving file 1 of 2"
            exit 0 ;;
        esac
        case "$2" in */system.conf) [ -e "$here/stale-system-lists" ] && { echo "E: Failed to fetch x.deb  404  Not Found" >&2; exit 100; };; esac
        [ -e "$here/download-fails" ] && { echo "Err:1 x"; echo "E: Failed to fetch x.deb  Hash Sum mismatch" >&2; exit 100; }
        echo "dlstatus:1:25.0:Retrieving file 1 of 1"
        shift 6
        for package; do
            name=${package%%=*}
            printf half >"${name}_1_amd64.deb"
            [ -e "$here/hang" ] && { touch "$here/hanging"; exec sleep 600; }
            echo "$name" >"${name}_1_amd64.deb"
        done
        echo "dlstatus:1:100.0000:Retrieving file 1 of 1"
        """;

    // dpkg-deb -x FILE FOLDER.
    const string DpkgDeb = """
        echo "dpkg-deb $*" >>"$here/calls"
        [ -e "$here/unpack-fails" ] && { mkdir -p "$3/boot"; echo "dpkg-deb: error: no space" >&2; exit 2; }
        mkdir -p "$3" && cp -r "$here/contents/$(cat "$2")/." "$3"
        """;

    public FakeHost()
    {
        Folder = Directory.CreateTempSubdirectory("xensharp-guests-test-").FullName;
        Install("apt-cache", AptCache);
        Install("apt-get", AptGet);
        Install("dpkg-deb", DpkgDeb);
        Directory.CreateDirectory(Path.Combine(Folder, "packages"));
        Package("linux-image-amd64", "6.1.9-1", "Depends: linux-base, linux-image-6.1.0-9-amd64 (= 6.1.9-1)\n");
        Package("linux-image-6.1.0-9-amd64", "6.1.9-1", "Size: 69000000\nDescription: kernel\n Depends: not-a-field\n");
        Package("busybox-static", "1:1.35.0-4", "");

        byte[] bzImage = new byte[0x400];
        "HdrS"u8.CopyTo(bzImage.AsSpan(0x202));
        Content("linux-image-6.1.0-9-amd64", "boot/vmlinuz-6.1.0-9-amd64", bzImage);
        Content("linux-image-6.1.0-9-amd64", "lib/modules/6.1.0-9-amd64/modules.dep", []);
        Content("busybox-static", "bin/busybox", [0x7f, (byte)'E', (byte)'L', (byte)'F', 2]);
    }

    public string Folder { get; }

    public string CacheRoot => Path.Combine(Folder, "cache");

    public string Tools => Path.Combine(Folder, "tools");

    /// <summary>What was called, in order.</summary>
    public string[] Calls => File.Exists(Path.Combine(Folder, "calls")) ? File.ReadAllLines(Path.Combine(Folder, "calls")) : [];

    public GuestCache Cache => new(CacheRoot, new CommandRunner($"{Tools}:/usr/bin:/bin"));

    /// <summary>Turns one of the scripts' failures on or off.</summary>
    public void Steer(string what, bool on = true)
    {
        string file = Path.Combine(Folder, what);
        if (on)
            File.WriteAllText(file, "");
        else
            File.Delete(file);
    }

    public void Package(string name, string version, string fields) => File.WriteAllText(
        Path.Combine(Folder, "packages", name), $"Package: {name}\nVersion: {version}\n{fields}\nPackage: {name}\nVersion: 0-other\n");

    public void Content(string package, string path, byte[] bytes)
    {
        string file = Path.Combine(Folder, "contents", package, path);
        Directory.CreateDirectory(Path.GetDirectoryName(file)!);
        File.WriteAllBytes(file, bytes);
    }

    public void Install(string tool, string script)
    {
        Directory.CreateDirectory(Tools);
        string file = Path.Combine(Tools, tool);
        File.WriteAllText(file, $"#!/bin/sh\nhere='{Folder}'\n{script}\n");
        File.SetUnixFileMode(file, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
    }

    /// <summary>What a fetch must not leave behind.</summary>
    public IEnumerable<string> Leftovers => Directory.Exists(CacheRoot)
        ? Directory.EnumerateFileSystemEntries(CacheRoot, ".fetch-*").Select(e => Path.GetFileName(e)!)
        : [];

    public void Dispose() => Directory.Delete(Folder, recursive: true);
}
