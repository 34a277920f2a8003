// A disk that no kernel can be had from.

namespace XenSharp.Configuration.Boot;

/// <summary>What is wrong with a disk image, its file system or its boot configuration; the message is a sentence.</summary>
public sealed class BootException : Exception
{
    /// <param name="message">The sentence.</param>
    /// <param name="inner">What it came of, if anything.</param>
    public BootException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}
