"""What the API server must take and must refuse by the schema of a spec: each limit on both sides of its edge.

`tests/unit/operator/api/test_crd.py` finds the limit that nobody has written a case for.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from tests.cluster.crd.resources import ATTACHED, DIGEST, SPECULATOR, Json, at


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit of the schema of a field."""

    path: str
    good: tuple[Any, ...]
    bad: Any
    message: str
    kind: str = "asp"
    around: Json = field(default_factory=dict)
    """What else the spec must say."""


_LEAST, _MOST = "should be greater than or equal to {}", "should be less than or equal to {}"
_SHORT, _LONG, _MATCH = "should be at least 1 chars long", "may not be more than {} bytes", "should match"
_MILLION = 1_000_000
_MONTH = 2_592_000
_HELD_BRIEFLY: Json = {"rollout": {"steps": [{"podsPercent": 10, "holdSeconds": 0}]}}
_GPU: Json = {"engine": {"type": "SGLang"}}
_LABELS = "serving.attached.selector.matchLabels"


def _span(path: str, least: int, most: int, **more: Any) -> tuple[Limit, Limit]:
    """Both ends of a whole number."""
    return (
        Limit(path=path, good=(least,), bad=least - 1, message=_LEAST.format(least), **more),
        Limit(path=path, good=(most,), bad=most + 1, message=_MOST.format(most), **more),
    )


def _text(path: str, most: int, *, start: str = "a", **more: Any) -> Limit:
    """The longest text."""
    good = start + "a" * (most - len(start))
    return Limit(path=path, good=(good,), bad=f"{good}a", message=_LONG.format(most), **more)


def _choice(path: str, *good: str, **more: Any) -> Limit:
    return Limit(path=path, good=good, bad="Other", message="supported values", **more)


def _name(path: str, most: int = 253, **more: Any) -> tuple[Limit, ...]:
    """A name of another object."""
    return (
        Limit(path=path, good=("a", "my.secret-1"), bad="No", message=_MATCH, **more),
        Limit(path=path, good=("a",), bad="", message=_SHORT, **more),
        _text(path, most, **more),
    )


def _filled(path: str, most: int, **more: Any) -> tuple[Limit, Limit]:
    """A text that is not empty."""
    return (Limit(path=path, good=("a",), bad="", message=_SHORT, **more), _text(path, most, **more))


def _workload(part: str) -> tuple[Limit, ...]:
    """What every part's pods have."""
    variables = [{"name": f"V{number}"} for number in range(129)]
    path = f"{part}.env"
    return (
        Limit(path=path, good=(variables[:128],), bad=variables, message="must have at most 128 items"),
        Limit(path=path, good=([{"name": "A", "value": "1"}],), bad=[{"value": "1"}], message="name: Required value"),
        Limit(path=path, good=([{"name": "A"}],), bad=[{"name": ""}], message=_SHORT),
        Limit(path=path, good=([{"name": "A"}],), bad=[{"name": "A"}, {"name": "A"}], message="Duplicate value"),
    )


def _accelerator(part: str) -> tuple[Limit, ...]:
    path = f"{part}.accelerator"
    names = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "amd.com/gpu")
    return (
        *_span(f"{path}.perPod", 1, 64),
        Limit(path=f"{path}.resourceName", good=names, bad="gpu", message=_MATCH),
        _text(f"{path}.resourceName", 253, start="a/"),
    )


def _quantity(path: str) -> tuple[Limit, ...]:
    good = ("1", "512Mi", "1.5Ti", "20G")
    return (
        Limit(path=path, good=good, bad="10GB", message=_MATCH),
        Limit(path=path, good=good, bad="0", message=_MATCH),
        Limit(path=path, good=("1" * 32,), bad="1" * 33, message=_LONG.format(32)),
    )


def _storage(part: str, around: Json | None = None) -> tuple[Limit, ...]:
    path = f"{part}.storage"
    limits = (
        *_quantity(f"{path}.size"),
        Limit(path=f"{path}.storageClassName", good=("",), bad="a" * 254, message=_LONG.format(253)),
        *_name(f"{path}.claimName"),
    )
    return limits if around is None else tuple(replace(limit, around=around) for limit in limits)


def _int_or_percent(path: str, other: str = "") -> tuple[Limit, ...]:
    around = at(f"serving.rollingUpdate.{other}", 1) if other else {}
    return (
        Limit(path=path, good=(0, 3, "0%", "100%"), bad=-1, message=_LEAST.format(0), around=around),
        Limit(path=path, good=("25%",), bad="25", message=_MATCH, around=around),
        Limit(path=path, good=("200%",), bad="1000%", message=_LONG.format(4), around=around),
        Limit(path=path, good=(1,), bad=True, message="must be of type", around=around),
    )


_STEPS = [{"podsPercent": 10, "holdSeconds": 0}] * 11


def _step(name: str, least: int, most: int) -> tuple[Limit, Limit]:
    around = {"rollout": {"progressDeadlineSeconds": _MONTH}}
    whole = {"podsPercent": 10, "holdSeconds": 0}
    steps = [[{**whole, name: value}] for value in (least, least - 1, most, most + 1)]
    path = "rollout.steps"
    return (
        Limit(
            path=path, good=(steps[0],), bad=steps[1], message=f"{name} in body {_LEAST.format(least)}", around=around
        ),
        Limit(path=path, good=(steps[2],), bad=steps[3], message=f"{name} in body {_MOST.format(most)}", around=around),
    )


_DEDICATED = {"traces": {"redis": {"mode": "Dedicated"}}}
_TWO_USERS = {"traces": {"redis": {"urlSecretRef": {"name": "pods"}, "readerUrlSecretRef": {"name": "trainer"}}}}

LIMITS = (
    Limit(path="targetModel", good=({"uri": "/models/a"},), bad={}, message="spec.targetModel.uri: Required value"),
    Limit(
        path="targetModel.uri",
        good=("hf://a/b", "s3://a/b", "gs://a", "az://a", "pvc://claim/folder", "oci://host/image:1", "/models/a"),
        bad="https://host/model",
        message=_MATCH,
    ),
    Limit(path="targetModel.uri", good=("/a",), bad="hf://a b", message=_MATCH),
    Limit(path="targetModel.uri", good=("/",), bad="", message=_SHORT),
    _text("targetModel.uri", 512, start="hf://"),
    *_filled("targetModel.revision", 128, around=SPECULATOR),
    *_name("targetModel.secretRef.name", around=SPECULATOR),
    *_filled("targetModel.servedName", 253, around=SPECULATOR),
    _choice("engine.type", "Torch", "SGLang", "VLLM"),
    *(limit for part in ("engine", "trainer", "registry") for limit in _filled(f"{part}.image", 512)),
    _choice("deletionPolicy", "Retain", "Delete"),
    _choice("draft.algorithm", "EAGLE3"),
    _choice("draft.speculation", "Enabled", "Disabled"),
    *_span("draft.lookahead", 1, 16),
    Limit(
        path="draft.initial.uri",
        good=("hf://a/b", "s3://a/b", "gs://a", "az://a", "pvc://claim/folder"),
        bad="oci://a/b",
        message=_MATCH,
    ),
    Limit(path="draft.initial.uri", good=("hf://a",), bad="", message=_SHORT),
    _text("draft.initial.uri", 1024, start="hf://"),
    *_name("draft.initial.secretRef.name", around={"draft": {"initial": {"uri": "hf://a/b"}}}),
    Limit(
        path="draft.initial.digest",
        good=(DIGEST,),
        bad=DIGEST.upper(),
        message=_MATCH,
        around={"draft": {"initial": {"uri": "hf://a/b"}}},
    ),
    Limit(
        path="draft.initial.digest",
        good=(DIGEST,),
        bad=f"{DIGEST}0",
        message=_LONG.format(71),
        around={"draft": {"initial": {"uri": "hf://a/b"}}},
    ),
    *_span("draft.numAttentionHeads", 1, 1024, around=at("draft.numKeyValueHeads", 1)),
    *_span("draft.numKeyValueHeads", 1, 1024, around=at("draft.numAttentionHeads", 1024)),
    *_span("draft.intermediateSize", 1, 2**24),
    *_span("draft.vocabSize", 16, 2**24),
    *_workload("serving"),
    *_accelerator("serving"),
    *_span("serving.replicas", 0, _MILLION),
    *_span("engine.tensorParallelSize", 1, 64, around=_GPU),
    Limit(
        path="engine.args",
        good=(["a"] * 128,),
        bad=["a"] * 129,
        message="must have at most 128 items",
        around=_GPU,
    ),
    Limit(path="engine.args", good=(["a" * 1024],), bad=["a" * 1025], message=_LONG.format(1024), around=_GPU),
    *_span("serving.maxRunningRequests", 1, _MILLION),
    *_span("serving.maxContextTokens", 1, _MILLION),
    *_span("serving.maxRequestsPerKey", 1, _MILLION, around=at("serving.apiKeysSecretRef.name", "clients")),
    _choice("serving.mode", "Managed"),
    *(
        Limit(path=_LABELS, good=({"app": "a", "b": ""},), bad={"app": bad}, message=message, around=ATTACHED)
        for bad, message in (("my model", _MATCH), ("a,b", _MATCH), ("a" * 64, _LONG.format(63)))
    ),
    *_name("serving.attached.container", around=ATTACHED),
    *_name("serving.attached.serviceAccountName", around=ATTACHED),
    *_span("serving.attached.port", 1, 65_535, around=ATTACHED),
    *_name("serving.apiKeysSecretRef.name"),
    *_name("serving.tlsSecretRef.name"),
    *_filled("serving.apiKeysSecretRef.key", 253, around=at("serving.apiKeysSecretRef.name", "clients")),
    Limit(path="serving.tenantHeader", good=("X-Team",), bad="X Team", message=_MATCH),
    _text("serving.tenantHeader", 64),
    *_span("serving.startupSeconds", 60, 7200),
    *_span("serving.terminationGracePeriodSeconds", 10, 86_400),
    *_int_or_percent("serving.rollingUpdate.maxSurge", "maxUnavailable"),
    *_int_or_percent("serving.rollingUpdate.maxUnavailable", "maxSurge"),
    *_int_or_percent("serving.disruptionBudget.maxUnavailable"),
    *_name("serving.modelCache.pvc.claimName"),
    Limit(path="serving.modelCache.hostPath.path", good=("/data/models",), bad="models", message=_MATCH),
    _text("serving.modelCache.hostPath.path", 512, start="/"),
    *_workload("trainer"),
    *_storage("trainer"),
    *_span("trainer.nodes", 1, 64),
    *_accelerator("trainer"),
    _choice("trainer.workload", "Auto", "StatefulSet", "LeaderWorkerSet"),
    *_name("traces.redis.urlSecretRef.name"),
    *_filled("traces.redis.urlSecretRef.key", 253, around=at("traces.redis.urlSecretRef.name", "redis")),
    *_name("traces.redis.readerUrlSecretRef.name", around=at("traces.redis.urlSecretRef.name", "redis")),
    *_filled("traces.redis.readerUrlSecretRef.key", 253, around=_TWO_USERS),
    _choice("traces.redis.mode", "Shared", "Dedicated"),
    *(replace(limit, around=_DEDICATED) for limit in _quantity("traces.redis.maxMemory")),
    *_storage("traces.redis", _DEDICATED),
    _choice("traces.capture", "All", "OptIn"),
    Limit(path="traces.retention", good=("90m", "12h", "30d"), bad="0d", message=_MATCH),
    Limit(path="traces.retention", good=("99999d",), bad="100000d", message=_LONG.format(6)),
    *_span("traces.payloadPercent", 0, 100),
    *_span("traces.evaluationPercent", 0, 100),
    *_quantity("traces.maxSize"),
    *_span("traces.shards", 1, 64),
    *_workload("registry"),
    *_storage("registry"),
    Limit(path="registry.bucket.url", good=("s3://a", "gs://a/b", "az://a/b"), bad="hf://a/b", message=_MATCH),
    _text("registry.bucket.url", 512, start="s3://"),
    *_name("registry.bucket.secretRef.name", around=at("registry.bucket.url", "s3://a")),
    _choice("rollout.strategy", "Canary", "Immediate", "Manual"),
    *_span("rollout.pinnedVersion", 1, _MILLION),
    Limit(path="rollout.pinnedVersion", good=("NoDraft",), bad="NoDrafts", message=_LONG.format(7)),
    Limit(path="rollout.pinnedVersion", good=("NoDraft",), bad="3", message=_MATCH),
    *_span("rollout.promotedVersion", 1, _MILLION),
    Limit(path="rollout.steps", good=(_STEPS[:10],), bad=_STEPS, message="must have at most 10 items"),
    Limit(path="rollout.steps", good=(_STEPS[:1],), bad=[{}], message="podsPercent: Required value"),
    *_step("podsPercent", 1, 100),
    *_step("holdSeconds", 0, _MONTH),
    *_span("rollout.maxPodsSwapping", 1, _MILLION),
    *_span("rollout.analysis.intervalSeconds", 1, 86_400),
    *_span("rollout.analysis.minSamples", 1, _MILLION),
    *_span("rollout.analysis.failureLimit", 0, _MILLION),
    *_span("rollout.analysis.maxAcceptanceRegressionPercent", 0, 100),
    *_span("rollout.analysis.maxDomainRegressionPercent", 0, 100),
    *_span("rollout.analysis.maxLatencyRegressionPercent", 0, 100),
    _choice("rollout.analysis.onInconclusive", "Pause", "Rollback", "Promote"),
    _choice("rollout.analysis.comparison", "Auto", "Pods", "Switchback"),
    *_span("rollout.analysis.switchbackSeconds", 2, 3600),
    *_span("rollout.progressDeadlineSeconds", 30, _MONTH, around=_HELD_BRIEFLY),
    *_span("rollout.revisionHistoryLimit", 1, 50),
    *_span("rollout.revisionHistoryMegabytes", 1, _MILLION),
    *_name("speculatorRef.name", 40, kind="dver"),
    _choice("updatePolicy.mode", "Automatic", "OnSpecChange"),
    Limit(
        path="updatePolicy.windows",
        good=(["22:30-04:00"], ["Sat,Sun 00:00-23:59 Europe/Berlin"], ["Mon 01:00-02:00"], ["01:00-02:00 UTC"] * 8),
        bad=["24:00-01:00"],
        message=_MATCH,
    ),
    Limit(path="updatePolicy.windows", good=([],), bad=["Sat,Son 01:00-02:00"], message=_MATCH),
    Limit(
        path="updatePolicy.windows",
        good=([f"01:00-02:00 {'a' * 84}"],),
        bad=[f"01:00-02:00 {'a' * 85}"],
        message=_LONG.format(96),
    ),
    Limit(
        path="updatePolicy.windows",
        good=(["01:00-02:00"] * 8,),
        bad=["01:00-02:00"] * 9,
        message="must have at most 8 items",
    ),
    _choice("source", "Initial", "Trainer", "Imported", kind="dver"),
    Limit(path="version", good=(1, 2**40), bad=0, message=_LEAST.format(1), kind="dver"),
    Limit(path="digest", good=(DIGEST,), bad=DIGEST.upper(), message=_MATCH, kind="dver"),
    Limit(path="digest", good=(DIGEST,), bad=f"{DIGEST}0", message=_LONG.format(71), kind="dver"),
    Limit(path="parentVersion", good=(1,), bad=0, message=_LEAST.format(1), kind="dver"),
    Limit(path="training.samples", good=(0, 2**40), bad=-1, message=_LEAST.format(0), kind="dver"),
    _text("training.firstTraceId", 1024, kind="dver"),
    _text("training.lastTraceId", 1024, kind="dver"),
    *_name("speculatorRef.name", 40, kind="dimp"),
    Limit(
        path="uri",
        good=("hf://a/b", "s3://a/b", "gs://a", "az://a", "pvc://claim/folder"),
        bad="/models/a",
        message=_MATCH,
        kind="dimp",
    ),
    Limit(path="uri", good=("hf://a",), bad="", message=_SHORT, kind="dimp"),
    _text("uri", 1024, start="hf://", kind="dimp"),
    *_name("secretRef.name", kind="dimp"),
    Limit(path="digest", good=(DIGEST,), bad=DIGEST.upper(), message=_MATCH, kind="dimp"),
    Limit(path="digest", good=(DIGEST,), bad=f"{DIGEST}0", message=_LONG.format(71), kind="dimp"),
)
