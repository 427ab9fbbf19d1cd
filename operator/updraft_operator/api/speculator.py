"""AdaptiveSpeculator: a target model, who serves it, who learns, and how new drafts come to serve.

`spec: {targetModel: {uri: ...}}` alone is a whole one. People and autoscalers write the spec, the operator only the
status; there are no floats in either, as Kubernetes' API conventions ask.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from updraft_operator.api.rollout import Rollout
from updraft_operator.api.schema import (
    NAME,
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
)
from updraft_operator.api.status import Status

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=NAME)]


class Engine(StrEnum):
    """Who decodes."""

    TORCH = "torch"
    SGLANG = "sglang"


class DeletionPolicy(StrEnum):
    """What becomes of data outside the cluster's objects."""

    RETAIN = "Retain"
    DELETE = "Delete"


class SecretName(Model):
    """A Secret of the same namespace."""

    name: Name


class SecretKey(Model):
    """One entry of a Secret of the same namespace."""

    name: Name
    key: Annotated[str, Field(min_length=1, max_length=253)] = "url"


class TargetModel(Model):
    """The model that answers; its words never change with the draft."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.revision) || self.uri.startsWith('hf://')",
                "revision is for hf:// only: other places hold one",
            ),
        )
    )

    uri: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^((hf|s3|gs|az|pvc|oci)://[^\s]+|/[^\s]*)$")]
    """Where the model is, in Hugging Face layout: hf://ORG/NAME, s3://BUCKET/PREFIX, gs://... and az://... (downloaded
    before a pod starts), pvc://CLAIM/FOLDER (mounted), oci://IMAGE (mounted as an image volume), or /FOLDER in the image."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of hf://. A change restarts the pods."""
    secret_ref: SecretName | None = None
    """Secret whose entries are variables of the download: HF_TOKEN, AWS_ACCESS_KEY_ID, ..."""
    served_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Name that clients ask for; the last part of the address unless given."""


class Draft(Model):
    """The kind of draft that is learned."""

    algorithm: Literal["EAGLE3"] = "EAGLE3"
    """EAGLE-3 is what the trainer learns."""
    lookahead: Annotated[int, Field(ge=0, le=16)] = 3
    """Most tokens drafted a verify step; the engine chooses up to it. 0 serves without speculation."""


class RollingUpdate(Model):
    """How pods are replaced when their template changes. A new draft never changes it."""

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
    """Pods above the wished number; with engine sglang 0 unless given, for a spare GPU is rare. Else 1."""
    max_unavailable: IntOrPercent | None = None
    """Pods below the wished number; 1 where no pod may be added, else 0."""


class HostPath(Model):
    """A folder of the node."""

    path: Annotated[str, Field(pattern=r"^/[^\s]+$", max_length=512)]


class Claim(Model):
    """An existing PersistentVolumeClaim of the same namespace."""

    claim_name: Name


class ModelCache(Model):
    """Where a downloaded model is kept; without it, in the pod, and downloaded again by each."""

    model_config = ConfigDict(json_schema_extra=rules(one_of("pvc", "hostPath")))

    pvc: Claim | None = None
    """Shared by all pods that mount it; it must allow that (ReadWriteMany), or there is one pod."""
    host_path: HostPath | None = None
    """A folder that is there on each node and that user 65532 may write; Pod Security must allow hostPath."""


class Workload(Model):
    """What can be said of the pods of every part."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Instead of the operator's own choice."""
    resources: Untyped = {}
    """Requests and limits, as in a container."""
    env: UntypedList = []
    """Variables, as in a container; they win over what the operator sets."""
    pod_template: Untyped = {}
    """What else a pod template can say (nodeSelector, tolerations, annotations, volumes, sidecars): merged over ours, lists
    of named things by name."""


class Serving(Workload):
    """The inference pods."""

    replicas: Count = 1
    """Autoscalers write it through the scale subresource."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs that share one model, with engine sglang."""
    args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=128)] = []
    """More arguments of the SGLang server."""
    max_running_requests: Positive = 8
    """Requests that a pod decodes at once; more wait."""
    max_context_tokens: Positive = 2048
    """Most tokens of a request, prompt and answer together."""
    termination_grace_period_seconds: Annotated[int, Field(ge=10, le=86_400)] = 60
    """How long running requests may go on when a pod has to go."""
    rolling_update: RollingUpdate = RollingUpdate()
    model_cache: ModelCache | None = None


class Storage(Model):
    """A volume: one that the operator asks for, or one that is there."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self == oldSelf", "storage is immutable: Kubernetes cannot change a claim; grow the claim itself"),
        )
    )

    size: Quantity = "10Gi"
    """Of a new claim."""
    storage_class_name: Annotated[str, Field(max_length=253)] | None = None
    """The cluster's default class unless given; "" takes a volume without a class."""
    claim_name: Name | None = None
    """An existing claim instead; the other fields then mean nothing."""


class TrainerStorage(Storage):
    """The trainer's volume; it needs less."""

    size: Quantity = "5Gi"
    """Of a new claim."""


class Trainer(Workload):
    """Who learns the drafts."""

    suspend: bool = False
    """Stop learning; serving goes on with what it has."""
    storage: TrainerStorage = TrainerStorage()
    """Replay, state of the optimizer, last draft. Deleted with the resource: the registry has what was published."""


class Redis(Model):
    """A Redis of your own."""

    url_secret_ref: SecretKey
    """Entry with redis://:PASSWORD@HOST:PORT/DB or rediss://...; the operator's Redis unless given."""


class Traces(Model):
    """What serving records for learning."""

    enabled: bool = True
    """Without traces there is nothing to learn from, and no trainer."""
    redis: Redis | None = None
    payload_percent: Percent = 100
    """Requests that carry hidden states to learn from."""
    evaluation_percent: Percent = 10
    """Requests held out for evaluation, never trained on."""
    max_size: Quantity = "256Mi"
    """Of the stream in Redis; the oldest traces go first."""


class Bucket(Model):
    """Weights in object storage."""

    url: Annotated[str, Field(pattern=r"^(s3|gs|az)://[^\s]+$", max_length=512)]
    """Bucket and prefix; one speculator each."""
    secret_ref: SecretName | None = None
    """Secret whose entries are variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT, GOOGLE_..., AZURE_..."""


class Registry(Workload):
    """Who keeps the drafts and decides who serves which."""

    storage: Storage = Storage()
    """Catalogue and weights; of a bucket's weights, copies."""
    bucket: Bucket | None = None
    """Keep weights and documents there, so that the catalogue can be made anew without the volume."""


class Spec(Model):
    """What is wished for."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                immutable("targetModel.uri", "drafts are learned for one target; make another AdaptiveSpeculator"),
                {
                    "rule": "self.engine == 'sglang' || self.serving.tensorParallelSize == 1",
                    "message": "tensorParallelSize is for engine sglang",
                },
                {
                    "rule": "self.engine == 'sglang' || !has(self.serving.args) || size(self.serving.args) == 0",
                    "message": "args are for engine sglang; settings of engine torch are variables (serving.env)",
                },
                {
                    "rule": "self.engine != 'sglang' || self.draft.lookahead > 0",
                    "message": "draft.lookahead is at least 1 with engine sglang: a server without a draft shows nothing",
                },
            ]
        }
    )

    target_model: TargetModel
    engine: Engine = Engine.TORCH
    """torch: Updraft's own, on a CPU or one GPU; sglang: a stock SGLang server on GPUs. A change restarts the pods."""
    suspend: bool = False
    """Scale serving and trainer to zero; versions, traces and status stay."""
    deletion_policy: DeletionPolicy = DeletionPolicy.RETAIN
    """Retain: the registry's volume and the traces outlive this resource, and one of the same name goes on with them.
    Delete: they go too. A bucket is never emptied."""
    draft: Draft = Draft()
    serving: Serving = Serving()
    trainer: Trainer = Trainer()
    traces: Traces = Traces()
    registry: Registry = Registry()
    rollout: Rollout = Rollout()


class Metadata(Model):
    """The part of an object's metadata that is read."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    finalizers: list[str] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: list[dict[str, Any]] = []


class AdaptiveSpeculator(Model):
    """A target model whose draft keeps learning from the traffic that it serves."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("size(self.metadata.name) <= 40", "name: at most 40 characters, for names of what is made derive from it"),
            (
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "name: small letters, digits and -, a letter first, for it is the name of a Service too",
            ),
        )
    )

    metadata: Metadata
    spec: Spec
    status: Status = Status()
