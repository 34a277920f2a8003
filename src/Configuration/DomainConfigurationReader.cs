// From an xl.cfg(5) file to a domain's configuration.

using XenSharp.Configuration.Devices;
using XenSharp.Configuration.Language;

namespace XenSharp.Configuration;

/// <summary>A configuration, and what is to be said about it.</summary>
/// <param name="Configuration">The configuration.</param>
/// <param name="Warnings">Sentences about settings that have no effect, or not the one that may be expected.</param>
public sealed record DomainConfigurationResult(DomainConfiguration Configuration, IReadOnlyList<ConfigurationMessage> Warnings);

/// <summary>
/// Reads configurations as xl 4.17 does (parse_config_data), with its defaults. Where xl warns of a value of the wrong type and goes on
/// without it, this is an error: a domain with less than was asked for is of no use to anyone.
/// </summary>
public sealed class DomainConfigurationReader
{
    private readonly SettingReader _settings;
    private readonly string _source;

    private DomainConfigurationReader(ConfigurationDocument document, string source)
    {
        _settings = new SettingReader(document.Evaluate());
        _source = source;
    }

    /// <summary>Reads a file.</summary>
    /// <param name="path">Its path.</param>
    /// <param name="settings">Settings that go behind it, as xl create takes them: memory=512, name="x".</param>
    /// <exception cref="ConfigurationException">The file cannot be read, or the configuration not be used.</exception>
    public static DomainConfigurationResult ReadFile(string path, IEnumerable<string> settings) => Read(ReadText(path), path, settings);

    /// <summary>Reads a text.</summary>
    /// <param name="text">Settings in the language of xl.cfg(5).</param>
    /// <param name="source">What messages are to call it.</param>
    /// <param name="settings">Settings that go behind it, each a text of its own.</param>
    /// <exception cref="ConfigurationException">The configuration cannot be used; the exception has every reason.</exception>
    public static DomainConfigurationResult Read(string text, string source, IEnumerable<string> settings)
    {
        ArgumentNullException.ThrowIfNull(settings);
        var document = new ConfigurationDocument();
        document.Append(text, source);
        foreach (string setting in settings)
            document.Append(setting, "command line");
        return new DomainConfigurationReader(document, source).Read();
    }

    /// <summary>The text of a configuration file.</summary>
    /// <exception cref="ConfigurationException">It cannot be read.</exception>
    public static string ReadText(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        try
        {
            if (Directory.Exists(path))
                throw Failure("This is a folder; name a file.");
            using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
            byte[] content = new byte[ConfigurationDocument.LargestText + 1];
            int length = file.ReadAtLeast(content, content.Length, throwOnEndOfStream: false);
            if (length > ConfigurationDocument.LargestText)
                throw Failure($"This is larger than any configuration ({ConfigurationDocument.LargestText >> 10} KiB at most).");
            return new System.Text.UTF8Encoding(false, throwOnInvalidBytes: true).GetString(content, 0, length);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            throw Failure("There is no such file.");
        }
        catch (UnauthorizedAccessException)
        {
            throw Failure("There is no permission to read this file.");
        }
        catch (System.Text.DecoderFallbackException)
        {
            throw Failure("This is no UTF-8 text.");
        }
        catch (IOException failure)
        {
            throw Failure($"This cannot be read: {failure.Message}");
        }
        catch (ArgumentException)
        {
            throw Failure("This is no name of a file.");
        }

        ConfigurationException Failure(string text) => new(new ConfigurationMessage(path.Length == 0 ? "\"\"" : path, 0, 0, text));
    }

    private DomainConfigurationResult Read()
    {
        WarnOfOthers();
        ReadType();
        string? name = _settings.Text("name");
        if (name is null && !_settings.TryGet("name", out _))
            Error("name", "The domain has no name: add name=\"NAME\".");
        else if (name is not null && name.Length > 0 && name.AsSpan().IndexOfAnyExceptInRange('0', '9') < 0)
            Warn("name", $"The name {name} is a number: where a command is given it, the domain of that id is meant, as with xl.");
        long? memory = _settings.Number("memory", 1, int.MaxValue);
        long? maxMemory = _settings.Number("maxmem", 1, int.MaxValue);
        if (memory is null && maxMemory is null && _settings.Errors.Count == 0)
            Warn("memory", $"memory is not given: the domain gets {DomainConfiguration.DefaultMemoryMiB} MiB.");
        long? vcpus = _settings.Number("vcpus", 1, DomainConfigurationRules.MostVcpus);
        var configuration = new DomainConfiguration
        {
            Name = name ?? "-",
            Uuid = ReadUuid(),
            Kernel = ReadKernel(),
            Ramdisk = _settings.Text("ramdisk"),
            CommandLine = ReadCommandLine(),
            Bootloader = ReadBootloader(),
            MemoryMiB = (int)(memory ?? maxMemory ?? DomainConfiguration.DefaultMemoryMiB),
            MaxMemoryMiB = (int)(maxMemory ?? 0),
            Vcpus = (int)(vcpus ?? 1),
            MaxVcpus = (int)(_settings.Number("maxvcpus", 1, DomainConfigurationRules.MostVcpus) ?? 0),
            OnPoweroff = ReadAction("on_poweroff", ShutdownAction.Destroy),
            OnReboot = ReadAction("on_reboot", ShutdownAction.Restart),
            OnCrash = ReadAction("on_crash", ShutdownAction.Destroy),
            OnWatchdog = ReadAction("on_watchdog", ShutdownAction.Destroy),
            OnSoftReset = ReadAction("on_soft_reset", ShutdownAction.Destroy),
            Disks = ReadDevices("disk", static (text, warnings) => DiskSpecification.Parse([text], warnings)),
            Vifs = ReadDevices("vif", static (text, warnings) => VifSpecification.Parse([text], warnings)),
            Channels = ReadDevices("channel", static (text, warnings) => ChannelSpecification.Parse(text, warnings)),
            LocalTime = _settings.Boolean("localtime") ?? false,
            RtcTimeOffset = (int)(_settings.Number("rtc_timeoffset", int.MinValue, int.MaxValue) ?? 0),
            Cpuid = ReadCpuid(),
            MaxEventChannels = (int)(_settings.Number("max_event_channels", 1, DomainConfigurationRules.HighestEventChannel) ?? 1023),
            MaxGrantFrames = (int?)_settings.Number("max_grant_frames", 1, DomainConfigurationRules.MostGrantFrames),
            MaxMaptrackFrames = (int?)_settings.Number("max_maptrack_frames", 0, DomainConfigurationRules.MostMaptrackFrames),
            MaxGrantVersion = (int?)_settings.Number("max_grant_version", 1, 2),
            Processors = ReadProcessors((int)(_settings.Number("maxvcpus", 1, DomainConfigurationRules.MostVcpus) ?? vcpus ?? 1)),
            NoMigrate = _settings.Boolean("nomigrate") ?? false,
        };

        // Rules speak of the values that were taken; where one could not be, they would speak of its default.
        if (_settings.Errors.Count == 0)
            _settings.Errors.AddRange(DomainConfigurationRules.Check(configuration).Select(found => _settings.Message(found.Key, _source, found.Text)));
        if (_settings.Errors.Count > 0)
            throw new ConfigurationException([.. _settings.Errors.OrderBy(error => error.Source == _source ? 0 : 1).ThenBy(static error => error.Line)]);
        return new DomainConfigurationResult(configuration, _settings.Warnings);
    }

    private void Error(string key, string text) => _settings.Errors.Add(_settings.Message(key, _source, text));

    private void Warn(string key, string text) => _settings.Warnings.Add(_settings.Message(key, _source, text));

    /// <summary>Says what becomes of the settings that nothing here reads.</summary>
    private void WarnOfOthers()
    {
        foreach (ConfigurationSetting setting in _settings.All)
        {
            if (KnownSettings.Used.Contains(setting.Name) || setting.Value is ListValue { Items.Count: 0 })
                continue;
            if (KnownSettings.FateOf(setting.Name) is not { } fate)
                _settings.Warnings.Add(setting.Message($"xl.cfg(5) has no setting {setting.Name}; it is ignored."));
            else if (fate.Refused)
                _settings.Errors.Add(setting.Message($"{setting.Name} cannot be had: {fate.Reason}. Take it out of the configuration."));
            else
                _settings.Warnings.Add(setting.Message($"{setting.Name} has no effect: {fate.Reason}."));
        }
    }

    private void ReadType()
    {
        string? type = _settings.Text("type");
        string? builder = _settings.Text("builder");
        switch (type)
        {
            case null or "pv":
                break;
            case "pvh" or "hvm":
                Error("type", $"Domains of the type {type} need hardware virtualization of their own; XenSharp runs PV guests: write type=\"pv\", and a kernel with PV support.");
                break;
            default:
                Error("type", $"\"{type}\" is no type of a domain: write type=\"pv\".");
                break;
        }

        switch (builder)
        {
            case null or "generic":
                break;
            case "hvm":
                Error("builder", type == "pv"
                    ? "builder=\"hvm\" and type=\"pv\" contradict each other: leave builder out."
                    : "builder=\"hvm\" asks for an HVM guest; XenSharp runs PV guests: write type=\"pv\", and a kernel with PV support.");
                break;
            default:
                Error("builder", $"\"{builder}\" is no builder: leave it out, and write type=\"pv\".");
                break;
        }
    }

    private Guid? ReadUuid()
    {
        if (_settings.Text("uuid") is not { } text)
            return null;

        // libxl takes the digits with or without hyphens.
        if (Guid.TryParseExact(text, "D", out Guid uuid) || Guid.TryParseExact(text, "N", out uuid))
            return uuid;
        Error("uuid", $"\"{text}\" is no UUID: write 32 hexadecimal digits as in 550e8400-e29b-41d4-a716-446655440000, or leave uuid out.");
        return null;
    }

    private string? ReadKernel()
    {
        string? kernel = _settings.Text("kernel");
        if (_settings.Text("firmware") is { } firmware)
        {
            Error("firmware", kernel is not null
                ? "Both kernel and firmware are given; leave firmware out."
                : $"There is no firmware ({firmware}) here: build PV GRUB (grub-mkimage -O x86_64-xen) and name it with kernel=, or write bootloader=\"pygrub\".");
        }

        return kernel;
    }

    /// <summary>cmdline, or root and extra: parse_cmdline in xl.</summary>
    private string ReadCommandLine()
    {
        string? all = _settings.Text("cmdline");
        string? root = _settings.Text("root");
        string? extra = _settings.Text("extra");
        if (all is null)
            return string.Join(' ', new[] { root is null ? null : $"root={root}", extra }.Where(static part => part is not null));
        if (root is not null || extra is not null)
            Warn(root is not null ? "root" : "extra", "root and extra have no effect beside cmdline, as with xl.");
        return all;
    }

    private BootloaderConfiguration? ReadBootloader()
    {
        IReadOnlyList<string> arguments = ReadBootloaderArguments();
        if (_settings.Text("bootloader") is not { Length: > 0 } bootloader)
        {
            if (arguments.Count > 0)
                Warn("bootloader_args", "bootloader_args has no effect without bootloader=\"pygrub\".");
            return null;
        }

        if (Path.GetFileName(bootloader) != "pygrub")
        {
            Error("bootloader", $"The bootloader {bootloader} cannot be run here: write bootloader=\"pygrub\", or name the kernel with kernel=.");
            return null;
        }

        try
        {
            var warnings = new List<string>();
            BootloaderConfiguration configuration = BootloaderArguments.Parse(arguments, warnings);
            foreach (string warning in warnings)
                Warn("bootloader_args", warning);
            return configuration;
        }
        catch (FormatException failure)
        {
            Error("bootloader_args", failure.Message);
            return null;
        }
    }

    private IReadOnlyList<string> ReadBootloaderArguments()
    {
        if (_settings.TryGet("bootloader_args", out ConfigurationSetting? setting) && setting.Value is TextValue text)
            return text.Text.Split([' ', '\t', '\n'], StringSplitOptions.RemoveEmptyEntries);
        return [.. _settings.List("bootloader_args").Select(static item => item.Text)];
    }

    private ShutdownAction ReadAction(string key, ShutdownAction otherwise)
    {
        switch (_settings.Text(key))
        {
            case null:
                return otherwise;
            case "destroy":
                return ShutdownAction.Destroy;
            case "restart":
                return ShutdownAction.Restart;
            case "rename-restart":
                return ShutdownAction.RenameRestart;
            case "preserve":
                return ShutdownAction.Preserve;
            case "coredump-destroy":
                return ShutdownAction.CoredumpDestroy;
            case "coredump-restart":
                return ShutdownAction.CoredumpRestart;
            case "soft-reset":
                Warn(key, $"{key}: a soft reset cannot be done to a PV guest, with Xen neither; the domain is destroyed.");
                return ShutdownAction.Destroy;
            case string other:
                Error(key, $"{key} takes destroy, restart, rename-restart, preserve, coredump-destroy or coredump-restart; \"{other}\" is none of them.");
                return otherwise;
        }
    }

    private List<T> ReadDevices<T>(string key, Func<string, ICollection<string>, T> parse)
    {
        var devices = new List<T>();
        foreach (TextValue item in _settings.List(key))
        {
            _settings.TryGet(key, out ConfigurationSetting? setting);
            var warnings = new List<string>();
            try
            {
                devices.Add(parse(item.Text, warnings));
            }
            catch (FormatException failure)
            {
                _settings.Errors.Add(setting!.Message(item, $"{key} \"{item.Text}\": {failure.Message}"));
            }

            _settings.Warnings.AddRange(warnings.Select(warning => setting!.Message(item, $"{key} \"{item.Text}\": {warning}")));
        }

        return devices;
    }

    /// <summary>One text for all vCPUs, or a list with one for each.</summary>
    private IReadOnlyList<string> ReadProcessors(int vcpus)
    {
        if (!_settings.TryGet("cpus", out ConfigurationSetting? setting))
            return [];
        return setting.Value is TextValue text ? [.. Enumerable.Repeat(text.Text, vcpus)] : [.. _settings.List("cpus").Select(static item => item.Text)];
    }

    private IReadOnlyList<CpuidMask> ReadCpuid()
    {
        if (!_settings.TryGet("cpuid", out ConfigurationSetting? setting))
            return [];
        var specification = new CpuidSpecification();
        if (setting.Value is TextValue text)
        {
            if (specification.AddLibxl(text.Text) is { } wrong)
                _settings.Errors.Add(setting.Message(text, wrong));
        }
        else
        {
            foreach (TextValue item in _settings.List("cpuid"))
            {
                if (specification.AddXend(item.Text) is { } wrong)
                    _settings.Errors.Add(setting.Message(item, wrong));
            }
        }

        _settings.Warnings.AddRange(specification.Warnings.Select(warning => setting.Message($"cpuid: {warning}")));
        return specification.Masks;
    }
}
