// Programs out of Debian's packages, with what they need to run in an initramfs.
using XenSharp.Guests.Elf;
using XenSharp.Guests.Fetching;

namespace XenSharp.Guests.Initramfs;

/// <summary>Collects dynamically linked programs, their loader and their libraries.</summary>
public static class DebianPrograms
{
    // glibc loads this one by itself when a thread ends.
    const string UnwindLibrary = "libgcc_s.so.1";

    const string Loader = "ld-linux-x86-64.so.2";

    static readonly string[] LibraryFolders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

    /// <summary>The programs in bin, and all libraries that they need in the folders where Debian's dynamic loader looks for them.</summary>
    /// <param name="root">The root of unpacked packages, as of <see cref="GuestCache.GetPackagesAsync"/>: the programs' and their
    /// libraries', libgcc-s1 among them.</param>
    /// <param name="programs">Paths of the programs relative to it, without a leading slash.</param>
    /// <exception cref="GuestFetchException">One is missing or damaged; the message says what to do.</exception>
    public static IReadOnlyList<InitramfsFile> Collect(string root, IEnumerable<string> programs)
    {
        ArgumentException.ThrowIfNullOrEmpty(root);
        ArgumentNullException.ThrowIfNull(programs);
        List<InitramfsFile> files = [];
        Queue<string> needed = new([UnwindLibrary, Loader]);
        HashSet<string> known = [.. needed];
        void Add(string target, string file)
        {
            byte[] contents = File.ReadAllBytes(file);
            files.Add(new InitramfsFile(target, contents, Executable: true));
            try
            {
                foreach (string library in ElfDependencies.Needed(contents).Where(known.Add))
                    needed.Enqueue(library);
            }
            catch (InvalidDataException e)
            {
                throw Damaged(root, $"{file}: {e.Message}", e);
            }
        }

        foreach (string program in programs)
        {
            string file = Path.Combine(root, program);
            if (!File.Exists(file))
                throw Damaged(root, $"It lacks {program}.");
            Add("bin/" + Path.GetFileName(program), file);
        }
        while (needed.TryDequeue(out string? library))
        {
            string file = LibraryFolders.Select(folder => Path.Combine(root, folder, library)).FirstOrDefault(File.Exists)
                ?? throw Damaged(root, $"It lacks the library {library}.");
            Add((library == Loader ? "lib64/" : "lib/x86_64-linux-gnu/") + library, file);
        }
        return files;
    }

    /// <summary>The complaint about packages in the cache that are not what they should be.</summary>
    /// <param name="folder">Their folder.</param>
    /// <param name="what">What is wrong, a sentence or a part of one.</param>
    /// <param name="inner">Why, if it is known.</param>
    public static GuestFetchException Damaged(string folder, string what, Exception? inner = null) =>
        new($"The cached packages in {folder} are damaged ({what}); delete that folder and they are fetched again.", inner);
}
