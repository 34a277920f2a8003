// The one failure of the kernel loader: a sentence for the person who named the kernel file.

namespace XenSharp.Domains.Builder;

/// <summary>
/// A kernel file cannot be loaded. <see cref="Exception.Message"/> is a complete sentence for people: what is wrong with the
/// file, and what to do about it. It is the only exception that <see cref="KernelImage.Parse"/> lets out, whatever the input.
/// </summary>
public sealed class KernelImageException : Exception
{
    public KernelImageException(string message) : base(message)
    {
    }

    public KernelImageException(string message, Exception innerException) : base(message, innerException)
    {
    }
}
