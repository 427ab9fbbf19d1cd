"""AdaptiveSpeculator: a target model, how it is served, how drafts are trained, and how new drafts roll out.

`spec: {targetModel: {uri: ...}}` alone is a complete spec. People and autoscalers write the spec, the operator writes only
the status. Neither has floats, as Kubernetes' API conventions require.
"""

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from updraft_artifacts.draft_shape import MIN_VOCAB
from updraft_artifacts.sizing import quantity, usual
from updraft_chassis.streams import MAX_SHARDS
from updraft_operator.api import attached, names
from updraft_operator.api.attached import Attached, Mode
from updraft_operator.api.rollout import Rollout
from updraft_operator.api.schema import (
    NAME,
    NAMES_A_CLAIM,
    Count,
    IntOrPercent,
    Model,
    Percent,
    Positive,
    Quantity,
    Untyped,
    UntypedList,
    immutable,
    one_of,
    rules,
    same,
)
from updraft_operator.api.status import Status
from updraft_operator.api.upgrades import UpdatePolicy

_ROTATION = r"[A-Za-z0-9:.+_-]{1,64}"
_SIZES = usual()

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=NAME)]


class EngineType(StrEnum):
    """The inference engines."""

    TORCH = "Torch"
    SGLANG = "SGLang"
    VLLM = "VLLM"

    @property
    def word(self) -> str:
        """Its name in commands and settings."""
        return self.value.lower()


class Engine(Model):
    """The software that serves the target model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.type != 'Torch' || self.tensorParallelSize == 1",
                "tensorParallelSize above 1 requires type SGLang or VLLM; Torch uses one GPU",
            ),
            (
                "self.type != 'Torch' || !has(self.args) || size(self.args) == 0",
                "args require type SGLang or VLLM; Torch has environment variables (serving.env)",
            ),
        )
    )

    type: EngineType = EngineType.TORCH
    """Torch: Updraft's own engine, on CPUs or one GPU; SGLang, VLLM: a stock server on GPUs."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Image with the engine, to run instead of the operator's default."""
    args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=128)] = []
    """Additional arguments of the SGLang or vLLM server. They override Updraft's."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of GPUs that share one model; above 1 with SGLang and VLLM only."""


class Speculation(StrEnum):
    """Whether drafts are proposed."""

    ENABLED = "Enabled"
    DISABLED = "Disabled"


class DeletionPolicy(StrEnum):
    """Whether data is deleted with the objects."""

    RETAIN = "Retain"
    DELETE = "Delete"


class SecretName(Model):
    """A Secret in the same namespace."""

    name: Name


class SecretKey(Model):
    """One entry of a Secret in the same namespace."""

    name: Name
    key: Annotated[str, Field(min_length=1, max_length=253)] = "url"


class KeysSecret(SecretKey):
    """The entry of a Secret with API keys."""

    key: Annotated[str, Field(min_length=1, max_length=253)] = "keys"


Size = Annotated[int, Field(ge=1, le=1024)]

_DRAFT_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


class TargetModel(Model):
    """The model that generates output. Drafts never change its output."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            NAMES_A_CLAIM,
            (
                "!has(self.revision) || self.uri.startsWith('hf://')",
                "revision requires an hf:// uri: other locations hold one revision",
            ),
        )
    )

    uri: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^((hf|s3|gs|az|pvc|oci)://[^\s]+|/[^\s]*)$")]
    """Location of the model in Hugging Face layout: hf://ORG/NAME, s3://BUCKET/PREFIX, gs://... and az://... (downloaded
    before a pod starts), pvc://CLAIM/FOLDER (mounted), oci://IMAGE (mounted as an image volume), or /FOLDER in the image."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// model. A change restarts the pods."""
    secret_ref: SecretName | None = None
    """Secret whose entries become environment variables of the download: HF_TOKEN, AWS_ACCESS_KEY_ID, ..."""
    served_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Model name in the API that clients use. Defaults to the last part of uri."""


class InitialDraft(Model):
    """A published EAGLE-3 draft to start from. It becomes the next version, as with a DraftImport."""

    model_config = ConfigDict(json_schema_extra=rules(NAMES_A_CLAIM))

    uri: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^(hf|s3|gs|az|pvc)://[^\s]+$")]
    """Folder of the draft in Hugging Face layout: config.json with model.safetensors or pytorch_model.bin."""
    secret_ref: SecretName | None = None
    """Secret whose entries become environment variables of the download."""
    digest: Annotated[str, Field(max_length=71, pattern=r"^sha256:[a-f0-9]{64}$")] | None = None
    """Digest of the weights file. An import whose weights have another digest fails."""


class Draft(Model):
    """The kind of draft model that is trained. The sizes are those of new drafts; by default they follow from the target."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                " && ".join(same(to_camel(size)) for size in _DRAFT_SIZES),
                "a draft's sizes are immutable: pods cannot swap to other sizes; create another AdaptiveSpeculator",
            ),
            (
                "has(self.numAttentionHeads) == has(self.numKeyValueHeads)",
                "set numAttentionHeads and numKeyValueHeads together: the operator does not know the target's heads",
            ),
            (
                "!has(self.numAttentionHeads) || self.numAttentionHeads % self.numKeyValueHeads == 0",
                "numAttentionHeads must be a multiple of numKeyValueHeads",
            ),
        )
    )

    algorithm: Literal["EAGLE3"] = "EAGLE3"
    """Architecture of the draft. The trainer supports EAGLE-3."""
    speculation: Speculation = Speculation.ENABLED
    """Disabled serves without speculation, with engine Torch only. A change restarts the pods."""
    lookahead: Annotated[int, Field(ge=1, le=16)] = 3
    """Maximum number of tokens drafted per verify step; the engine chooses up to it."""
    initial: InitialDraft | None = None
    """Draft to start from: the trainer waits until it is imported, and continues it. Another one becomes a later version."""
    num_attention_heads: Size | None = None
    """Attention heads of the draft's layer. Defaults to the target's, or to heads of 128 if its attention is compressed."""
    num_key_value_heads: Size | None = None
    """Key-value heads of the draft's layer. Defaults to the target's, or to 8."""
    intermediate_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """MLP width of the draft's layer. Defaults to the target's, or to 3 times its hidden size if its experts are narrower."""
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB, le=2**24)] | None = None
    """Number of the target's tokens that the draft can propose, chosen by traffic. Defaults to as many as make the draft's head
    as large as its layer, within 8192 and 32000."""

    @property
    def is_speculating(self) -> bool:
        return self.speculation is Speculation.ENABLED

    @property
    def sizes(self) -> dict[str, int]:
        """The chosen sizes, by name."""
        return {name: size for name in _DRAFT_SIZES if (size := getattr(self, name)) is not None}


class RollingUpdate(Model):
    """How pods are replaced when their template changes. A new draft never changes the template."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                (
                    "!has(self.maxSurge) || !has(self.maxUnavailable)"
                    " || [self.maxSurge, self.maxUnavailable].exists(x, !(string(x) in ['0', '0%', '00%', '000%']))"
                ),
                "maxSurge and maxUnavailable are both 0: no pod could ever be replaced",
            ),
        )
    )

    max_surge: IntOrPercent | None = None
    """Pods above spec.serving.replicas. Defaults to 1 with engine Torch on CPUs, otherwise to 0: a spare GPU is rare."""
    max_unavailable: IntOrPercent | None = None
    """Pods below spec.serving.replicas. Defaults to 1 if maxSurge is 0, otherwise to 0."""


class DisruptionBudget(Model):
    """How many pods may be missing: node drains wait for it, and Available allows for it."""

    max_unavailable: IntOrPercent = "10%"
    """Number or share of the pods, rounded up."""


class HostPath(Model):
    """A folder on the node."""

    path: Annotated[str, Field(pattern=r"^/[^\s]+$", max_length=512)]


class Claim(Model):
    """An existing PersistentVolumeClaim in the same namespace."""

    claim_name: Name


class ModelCache(Model):
    """Where downloaded models are cached. Without a cache, every pod downloads the model."""

    model_config = ConfigDict(json_schema_extra=rules(one_of("pvc", "hostPath")))

    pvc: Claim | None = None
    """Claim that all pods share. It must allow ReadWriteMany unless there is only one pod."""
    host_path: HostPath | None = None
    """A folder that exists on every node and that user 65532 can write. Pod Security must allow hostPath."""


class Workload(Model):
    """Settings of the pods of a part."""

    resources: Untyped = {}
    """Resource requests and limits, as in a container."""
    env: UntypedList = []
    """Environment variables, as in a container; they override the operator's."""
    pod_template: Untyped = {}
    """More of a pod template, such as nodeSelector or sidecars, merged over the operator's."""


class OwnWorkload(Workload):
    """Settings of the pods of a part that runs Updraft's own software."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Image to run instead of the operator's default."""


class Accelerator(Model):
    """Devices of a pod."""

    resource_name: Annotated[
        str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9._-]+$")
    ] = "nvidia.com/gpu"
    """Extended resource of a device plugin, such as nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-1g.10gb."""


class ServingAccelerator(Accelerator):
    """Devices that every inference pod gets."""

    per_pod: Annotated[int, Field(ge=1, le=64)] | None = None
    """Devices per pod. Defaults to engine.tensorParallelSize."""


class Serving(Workload):
    """The inference pods."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.maxRequestsPerKey) || has(self.apiKeysSecretRef)",
                "maxRequestsPerKey requires apiKeysSecretRef",
            ),
            *attached.rules(),
        )
    )

    mode: Mode = Mode.MANAGED
    """Managed: the operator runs the pods; Attached: Updraft is added to pods of your own workload."""
    attached: Attached | None = None

    replicas: Count = 1
    """Number of pods. Autoscalers set it through the scale subresource."""
    accelerator: ServingAccelerator | None = None
    """Devices of every pod. Without it, the pods have those in resources and podTemplate."""
    max_running_requests: Positive = 8
    """Number of requests that a pod decodes concurrently; further requests wait."""
    max_context_tokens: Positive | None = None
    """Maximum number of tokens of a request, prompt and output together. Defaults to 2048 with engine Torch, which reserves
    memory for it, otherwise to the model's maximum."""
    api_keys_secret_ref: KeysSecret | None = None
    """Secret entry with the API keys of clients, one per line after the name of its tenant. Without it, no key is required."""
    tls_secret_ref: SecretName | None = None
    """Secret of type kubernetes.io/tls with the certificate of the port of clients, which then speaks HTTPS only. A renewed one
    is used without a restart."""
    tenant_header: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]+$")] | None = None
    """Header by which a gateway names the tenant. Its API key has the word gateway."""
    max_requests_per_key: Positive | None = None
    """Maximum number of concurrent requests per API key and pod; each choice counts. Defaults to no limit."""
    startup_seconds: Annotated[int, Field(ge=60, le=7200)] | None = None
    """How long a container may load the model before it is restarted. Defaults to 1800."""
    termination_grace_period_seconds: Annotated[int, Field(ge=10, le=86_400)] = 60
    """How long running requests may continue when a pod is terminated."""
    rolling_update: RollingUpdate = RollingUpdate()
    disruption_budget: DisruptionBudget = DisruptionBudget()
    model_cache: ModelCache | None = None

    @property
    def is_attached(self) -> bool:
        return self.attached is not None


class Storage(Model):
    """A volume: one that the operator creates, or an existing one."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self == oldSelf", "storage is immutable: Kubernetes cannot change a claim; expand the claim itself"),
        )
    )

    size: Quantity = quantity(_SIZES.registry_volume.amount)
    """Size of the new claim. The default fits an 8B target; see `updraft size`."""
    storage_class_name: Annotated[str, Field(max_length=253)] | None = None
    """Storage class of the new claim. Defaults to the cluster's default class; "" selects a volume without a class."""
    claim_name: Name | None = None
    """An existing claim to use instead of a new one."""


class TrainerStorage(Storage):
    """The trainer's volume."""

    size: Quantity = quantity(_SIZES.trainer_volume.amount)
    """Size of the new claim. The default fits an 8B target; see `updraft size`."""


class TrainerAccelerator(Accelerator):
    """Devices that every pod of the trainer gets. Without them it trains on the CPU."""

    per_pod: Annotated[int, Field(ge=1, le=MAX_SHARDS)] = 1
    """Devices per pod. Each is used by a process of its own, a rank."""


class TrainerWorkload(StrEnum):
    """The kind of object that runs a trainer of more than one rank."""

    AUTO = "Auto"
    STATEFUL_SET = "StatefulSet"
    LEADER_WORKER_SET = "LeaderWorkerSet"


class Trainer(OwnWorkload):
    """Configures draft training."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.nodes == 1 || !has(self.storage.claimName)",
                "storage.claimName is one volume, and with nodes above 1 every pod needs its own: remove it",
            ),
            (
                f"self.nodes * (has(self.accelerator) ? self.accelerator.perPod : 1) <= {MAX_SHARDS}",
                f"nodes times accelerator.perPod is at most {MAX_SHARDS}: every rank reads a stream of its own",
            ),
        )
    )

    suspend: bool = False
    """Stop training. Serving continues with the current draft."""
    accelerator: TrainerAccelerator | None = None
    """GPUs of every pod. Without it the trainer uses CPUs."""
    nodes: Annotated[int, Field(ge=1, le=MAX_SHARDS)] = 1
    """Number of pods that train one draft together. A change restarts all of them."""
    workload: TrainerWorkload = TrainerWorkload.AUTO
    """Workload for several ranks. Auto keeps the one that exists, or else takes a LeaderWorkerSet for several pods if its API
    is served. It has its own volumes, so after a change training starts from the stable version."""
    storage: TrainerStorage = TrainerStorage()
    """Volume of a pod for replay samples, optimizer state and the latest draft. It is deleted with the resource, because the
    registry keeps the published versions."""

    @property
    def ranks_per_pod(self) -> int:
        return self.accelerator.per_pod if self.accelerator is not None else 1

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_pod


class RedisMode(StrEnum):
    """Which Redis the operator uses."""

    SHARED = "Shared"
    DEDICATED = "Dedicated"


class RedisStorage(Storage):
    """Volume of a dedicated Redis."""

    size: Quantity = "10Gi"
    """Size of the new claim, about twice maxMemory."""


class Redis(Model):
    """Where traces wait for the trainer."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.mode == 'Shared' || !has(self.urlSecretRef)",
                "mode Dedicated and urlSecretRef are two different Redis: remove one",
            ),
            ("has(self.urlSecretRef) || !has(self.readerUrlSecretRef)", "readerUrlSecretRef requires urlSecretRef"),
            (
                "self.mode == 'Dedicated' || !has(self.maxMemory) && !has(self.storage)",
                "maxMemory and storage require mode Dedicated",
            ),
        )
    )

    mode: RedisMode = RedisMode.SHARED
    """Shared: the operator's Redis; Dedicated: one that only this resource uses, in its namespace."""
    max_memory: Quantity | None = None
    """Memory of a dedicated Redis for traces, at least 64Mi. Defaults to 1.5 times maxSize. A change restarts it."""
    storage: RedisStorage | None = None
    url_secret_ref: SecretKey | None = None
    """Your own Redis. Secret entry with the address: redis://USER:PASSWORD@HOST:PORT/DB or
    redis+cluster://USER:PASSWORD@HOST:PORT; rediss:// and rediss+cluster:// with TLS."""
    reader_url_secret_ref: SecretKey | None = None
    """The same with the trainer's user. Defaults to the address of the pods."""


class Capture(StrEnum):
    """Which requests are captured."""

    ALL = "All"
    OPT_IN = "OptIn"


class Traces(Model):
    """Configures the recording of traces for training."""

    enabled: bool = True
    """Record traces. Without traces there is no training data, so no trainer runs."""
    capture: Capture = Capture.ALL
    """All: requests that do not opt out; OptIn: only those that opt in."""
    retention: Annotated[str, Field(max_length=6, pattern=r"^[1-9][0-9]*[mhd]$")] | None = None
    """Age at which traces are deleted everywhere, such as 30d. Defaults to no limit."""
    redis: Redis | None = None
    """Redis for the traces. Defaults to the operator's Redis."""
    payload_percent: Percent = 100
    """Percentage of requests whose traces include hidden states to train on."""
    evaluation_percent: Percent = 10
    """Percentage of requests held out for evaluation; they are never trained on."""
    max_size: Quantity | None = None
    """Maximum size of all streams in Redis; the oldest traces are dropped first. Defaults to what `updraft size` shows."""
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)] | None = None
    """Minimum number of streams; every rank of the trainer has its own. If unset, the number never falls, because the traces in
    the other streams would be lost."""


class Bucket(Model):
    """Object storage for draft weights."""

    url: Annotated[str, Field(pattern=r"^(s3|gs|az)://[^\s]+$", max_length=512)]
    """Bucket and prefix. Every speculator needs its own."""
    secret_ref: SecretName | None = None
    """Secret whose entries become environment variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT, GOOGLE_..., AZURE_..."""


class Registry(OwnWorkload):
    """The registry stores draft versions and decides which pods serve which version."""

    storage: Storage = Storage()
    """Volume for the catalogue and the weights. With a bucket, the weights on it are copies."""
    bucket: Bucket | None = None
    """Store weights and documents in a bucket, so that the catalogue can be rebuilt if the volume is lost."""


class Spec(Model):
    """Desired state."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                immutable("targetModel.uri", "drafts are trained for one target; create another AdaptiveSpeculator"),
                immutable("serving.mode", "create another AdaptiveSpeculator"),
                {
                    "rule": "self.serving.mode == 'Managed' || self.engine.type != 'Torch'",
                    "message": "mode Attached requires engine.type SGLang or VLLM",
                },
                {
                    "rule": "self.serving.mode == 'Managed' || !self.suspend",
                    "message": "suspend: with mode Attached, scale your workload, and set trainer.suspend",
                },
                {
                    "rule": "self.serving.mode == 'Managed' || !has(self.engine.image)",
                    "message": "engine.image: with mode Attached, set it in your workload",
                },
                {
                    "rule": "self.serving.mode == 'Managed' || !has(self.engine.args)",
                    "message": "engine.args: with mode Attached, set it in your workload",
                },
                {
                    "rule": "self.engine.type == 'Torch' || self.draft.speculation == 'Enabled'",
                    "message": "draft.speculation Disabled requires engine.type Torch: the others capture only verified drafts",
                },
            ]
        }
    )

    target_model: TargetModel
    engine: Engine = Engine()
    """The software that serves the target model. A change restarts the pods."""
    suspend: bool = False
    """Scale serving and the trainer to zero. Versions, traces and status are kept."""
    deletion_policy: DeletionPolicy = DeletionPolicy.RETAIN
    """Retain: the registry's volume and the traces outlive this resource; a new one of the same name continues with them.
    Delete: they are deleted too. A bucket is never emptied."""
    draft: Draft = Draft()
    serving: Serving = Serving()
    trainer: Trainer = Trainer()
    traces: Traces = Traces()
    registry: Registry = Registry()
    rollout: Rollout = Rollout()
    update_policy: UpdatePolicy = UpdatePolicy()

    @property
    def num_shards(self) -> int:
        """Number of streams, the same for the pods that write and the ranks that read."""
        return max(self.traces.shards or 1, self.trainer.num_ranks)


class Metadata(Model):
    """The fields of an object's metadata that the operator reads."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    finalizers: list[str] = []
    annotations: dict[str, str] = {}

    @property
    def rotation(self) -> str:
        """The request for new passwords; empty without one that is as it should be."""
        asked = self.annotations.get(names.ROTATE, "")
        return asked if re.fullmatch(_ROTATION, asked) else ""

    @property
    def upgrade(self) -> str:
        """The runtime that its pods are to get now, whatever the policy says; empty for none."""
        return self.annotations.get(names.UPGRADE, "")

    @property
    def skipped_upgrade(self) -> str:
        """The runtime whose failure here does not stop the updates of others; empty for none."""
        return self.annotations.get(names.SKIP_UPGRADE, "")


class AdaptiveSpeculator(Model):
    """A target model, served with a draft model that is trained continuously on its traffic."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "size(self.metadata.name) <= 40",
                "name: at most 40 characters, because the names of child objects derive from it",
            ),
            (
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "name: lowercase letters, digits and -, starting with a letter, because a Service has the same name",
            ),
        )
    )

    metadata: Metadata
    spec: Spec
    status: Status = Status()
