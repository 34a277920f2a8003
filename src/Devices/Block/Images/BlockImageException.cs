namespace XenSharp.Devices.Block.Images;

/// <summary>An image cannot be opened; the message says why and what to do.</summary>
public sealed class BlockImageException(string message, Exception? inner = null) : Exception(message, inner);
