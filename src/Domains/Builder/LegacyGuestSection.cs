// The parameters of kernels older than the Xen notes: one line of text in the section __xen_guest.

using System.Globalization;
using System.Text;

namespace XenSharp.Domains.Builder;

/// <summary>
/// Reads text such as <c>GUEST_OS=linux,GUEST_VER=2.6,XEN_VER=xen-3.0,VIRT_BASE=0xffffffff80000000,HYPERCALL_PAGE=0x202,
/// LOADER=generic,BSD_SYMTAB</c>. The names are those that Xen's public elfnote.h lists as LEGACY.
/// </summary>
internal static class LegacyGuestSection
{
    private const int LongestText = 4096;
    private const int PageShift = 12;

    /// <exception cref="KernelImageException">A number is not one, or an unknown feature is required.</exception>
    public static void Read(ReadOnlySpan<byte> section, KernelNotes notes)
    {
        int end = section.IndexOf((byte)0);
        if (end >= 0)
            section = section[..end];
        if (section.Length > LongestText)
            throw new KernelImageException(
                $"The kernel's section __xen_guest is longer than {LongestText} characters; copy or download the file again.");

        string text = Encoding.Latin1.GetString(section);
        ulong? hypercallPageNumber = null;
        foreach (Range range in text.AsSpan().Split(','))
        {
            ReadOnlySpan<char> item = text.AsSpan(range);
            int equals = item.IndexOf('=');
            ReadOnlySpan<char> name = equals < 0 ? item : item[..equals];
            ReadOnlySpan<char> value = equals < 0 ? [] : item[(equals + 1)..];
            switch (name)
            {
                case "LOADER":
                    notes.Loader = value.ToString();
                    break;
                case "GUEST_OS":
                    notes.GuestOs = value.ToString();
                    break;
                case "GUEST_VER":
                    notes.GuestVersion = value.ToString();
                    break;
                case "XEN_VER":
                    notes.XenVersion = value.ToString();
                    break;
                case "PAE":
                    if (value is "yes[extended-cr3]")
                        notes.PaeMode = PaeMode.ExtendedCr3;
                    else if (value.StartsWith("yes"))
                        notes.PaeMode = PaeMode.Yes;
                    break;
                case "BSD_SYMTAB":
                    notes.BsdSymbolTable = true;
                    break;
                case "VIRT_BASE":
                    notes.VirtualBase = Number(name, value);
                    break;
                case "VIRT_ENTRY":
                    notes.VirtualEntry = Number(name, value);
                    break;
                case "ELF_PADDR_OFFSET":
                    notes.PaddrOffset = Number(name, value);
                    break;
                case "HYPERCALL_PAGE":
                    hypercallPageNumber = Number(name, value);
                    break;
                case "FEATURES":
                    notes.AddFeatures(value.ToString());
                    break;
            }
        }

        // Here it is a page number counted from VIRT_BASE, in the note a virtual address.
        if (hypercallPageNumber is { } number)
            notes.HypercallPage = number <= ulong.MaxValue >> PageShift
                ? unchecked((number << PageShift) + (notes.VirtualBase ?? 0))
                : throw NotANumber("HYPERCALL_PAGE", $"0x{number:x}");
    }

    /// <summary>A number as C's strtoull reads it with base 0; what follows the digits (such as UL) is ignored. All ones is "unset".</summary>
    private static ulong? Number(ReadOnlySpan<char> name, ReadOnlySpan<char> text)
    {
        bool isHexadecimal = text.StartsWith("0x", StringComparison.OrdinalIgnoreCase);
        bool isOctal = !isHexadecimal && text.Length > 1 && text[0] == '0' && char.IsAsciiDigit(text[1]);
        ReadOnlySpan<char> digits = isHexadecimal ? text[2..] : text;
        int count = 0;
        while (count < digits.Length && (isHexadecimal ? char.IsAsciiHexDigit(digits[count])
            : isOctal ? digits[count] is >= '0' and <= '7' : char.IsAsciiDigit(digits[count])))
            count++;
        digits = digits[..count];

        ulong value;
        if (isOctal)
        {
            value = 0;
            foreach (char digit in digits)
            {
                if (value > ulong.MaxValue >> 3)
                    throw NotANumber(name, text);
                value = (value << 3) | (uint)(digit - '0');
            }
        }
        else if (!ulong.TryParse(
            digits, isHexadecimal ? NumberStyles.AllowHexSpecifier : NumberStyles.None, CultureInfo.InvariantCulture, out value))
        {
            throw NotANumber(name, text);
        }

        return value == ulong.MaxValue ? null : value;
    }

    private static KernelImageException NotANumber(ReadOnlySpan<char> name, ReadOnlySpan<char> text) => new(
        $"The kernel's section __xen_guest says {Printable.Of(name)}=\"{Printable.Of(text)}\", which is not a number; "
        + "copy or download the file again.");
}
