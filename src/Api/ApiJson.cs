// How the API's types are written as JSON, without reflection.

using System.Text.Json;
using System.Text.Json.Serialization;

namespace XenSharp.Api;

/// <summary>Names in camel case, enumerations by name, nulls left out.</summary>
/// <remarks>What a body leaves out comes as null or 0, whatever a property begins with: lists of the API's types are empty then.</remarks>
[JsonSourceGenerationOptions(
    JsonSerializerDefaults.Web,
    UseStringEnumConverter = true,
    NumberHandling = JsonNumberHandling.Strict,
    DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull,
    RespectNullableAnnotations = true,
    UnmappedMemberHandling = JsonUnmappedMemberHandling.Disallow)]
[JsonSerializable(typeof(ApiProblem))]
[JsonSerializable(typeof(HostInfo))]
[JsonSerializable(typeof(DomainInfo))]
[JsonSerializable(typeof(IReadOnlyList<DomainInfo>))]
[JsonSerializable(typeof(IReadOnlyList<VcpuInfo>))]
[JsonSerializable(typeof(IReadOnlyList<LostDomain>))]
[JsonSerializable(typeof(IReadOnlyList<BlockDeviceInfo>))]
[JsonSerializable(typeof(IReadOnlyList<NetworkDeviceInfo>))]
[JsonSerializable(typeof(IReadOnlyList<ChannelInfo>))]
[JsonSerializable(typeof(DomainEvent))]
[JsonSerializable(typeof(OperationUpdate))]
[JsonSerializable(typeof(CreateDomainRequest))]
[JsonSerializable(typeof(CreateDomainResult))]
[JsonSerializable(typeof(RenameRequest))]
[JsonSerializable(typeof(SetVcpusRequest))]
[JsonSerializable(typeof(PinVcpusRequest))]
[JsonSerializable(typeof(SetMemoryRequest))]
[JsonSerializable(typeof(SysrqRequest))]
[JsonSerializable(typeof(TriggerRequest))]
[JsonSerializable(typeof(SaveDomainRequest))]
[JsonSerializable(typeof(RestoreDomainRequest))]
[JsonSerializable(typeof(DumpCoreRequest))]
[JsonSerializable(typeof(AttachDeviceRequest))]
[JsonSerializable(typeof(DomainConfigurationDocument))]
[JsonSerializable(typeof(string))]
[JsonSerializable(typeof(bool))]
[JsonSerializable(typeof(int))]
[JsonSerializable(typeof(Guid))]
public sealed partial class ApiJson : JsonSerializerContext;
