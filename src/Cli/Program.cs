// xensharp: Xen PV guests on KVM, from the command line.

using XenSharp.Cli.Commands;

return await Tool.RunAsync(args).ConfigureAwait(false);
