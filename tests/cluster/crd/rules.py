"""What the API server must take and must refuse by the rules in CEL: each on both sides of its edge.

`tests/unit/operator/api/test_crd.py` finds the rule that nobody has written a case for.
"""

from dataclasses import dataclass

from tests.cluster.crd.resources import ATTACHED, DIGEST, Json, over


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule in CEL, with specs (of what is not the least one) on both sides of it."""

    id: str
    message: str
    """As the CRD has it, or how it begins."""
    good: Json
    bad: Json
    kind: str = "asp"
    before: Json | None = None
    """Of a rule about changes: what both are changes of."""
    name: str = "chat"
    """Of the good one; a rule may be about it."""
    bad_name: str = "chat"


_ATTACHED_REFUSES: dict[str, object] = {
    "accelerator": {},
    "resources": {"limits": {"cpu": "1"}},
    "env": [{"name": "A", "value": "1"}],
    "podTemplate": {"spec": {}},
    "replicas": 2,
    "maxRunningRequests": 16,
    "maxContextTokens": 4096,
    "startupSeconds": 1800,
    "terminationGracePeriodSeconds": 90,
    "rollingUpdate": {"maxSurge": 1},
    "apiKeysSecretRef": {"name": "clients"},
    "tlsSecretRef": {"name": "certificate"},
}
"""Fields that are in the workload, with another value than their default."""


def _attached(field: str, value: object) -> Rule:
    """The same field is fine with pods of the operator."""
    return Rule(
        id=f"attached-{field}",
        message=f"{field}: with mode Attached, ",
        good={"engine": {"type": "VLLM"}, "serving": {field: value}},
        bad=over(ATTACHED, {"serving": {field: value}}),
    )


RULES = (
    Rule(
        id="attached-says-to-what",
        message="attached describes the pods of mode Attached: set both, or neither",
        good=ATTACHED,
        bad={"engine": {"type": "VLLM"}, "serving": {"mode": "Attached"}},
    ),
    Rule(
        id="attached-needs-its-mode",
        message="attached describes the pods of mode Attached: set both, or neither",
        good={"serving": {"mode": "Managed"}},
        bad={"serving": {"attached": ATTACHED["serving"]["attached"]}},
    ),
    Rule(
        id="mode-is-immutable",
        message="serving.mode is immutable: create another AdaptiveSpeculator",
        before=ATTACHED,
        good=over(ATTACHED, {"serving": {"disruptionBudget": {"maxUnavailable": "20%"}}}),
        bad={"engine": {"type": "VLLM"}},
    ),
    Rule(
        id="attached-to-a-server",
        message="mode Attached requires engine.type SGLang or VLLM",
        good=over(ATTACHED, {"engine": {"type": "SGLang"}}),
        bad=over(ATTACHED, {"engine": {"type": "Torch"}}),
    ),
    Rule(
        id="attached-is-not-suspended",
        message="suspend: with mode Attached, scale your workload",
        good=over(ATTACHED, {"trainer": {"suspend": True}}),
        bad=over(ATTACHED, {"suspend": True}),
    ),
    *(_attached(field, value) for field, value in _ATTACHED_REFUSES.items()),
    *(
        Rule(
            id=f"attached-engine-{field}",
            message=f"engine.{field}: with mode Attached, set it in your workload",
            good={"engine": {"type": "VLLM", field: value}},
            bad=over(ATTACHED, {"engine": {field: value}}),
        )
        for field, value in (("image", "mine:1"), ("args", ["--enforce-eager"]))
    ),
    Rule(id="name-length", message="name: at most 40 characters", good={}, bad={}, name="a" * 40, bad_name="a" * 41),
    Rule(
        id="name-without-dots",
        message="name: lowercase letters, digits and -, starting with a letter",
        good={},
        bad={},
        name="qwen3-8b",
        bad_name="qwen3.8b",
    ),
    Rule(
        id="name-of-a-service",
        message="name: lowercase letters, digits and -, starting with a letter",
        good={},
        bad={},
        name="b8",
        bad_name="8b",
    ),
    Rule(
        id="target-is-immutable",
        message="targetModel.uri is immutable: drafts are trained for one target",
        before={},
        good={"targetModel": {"uri": "hf://org/model", "revision": "main"}},
        bad={"targetModel": {"uri": "hf://org/other"}},
    ),
    Rule(
        id="tensor-parallel",
        message="tensorParallelSize above 1 requires type SGLang or VLLM; Torch uses one GPU",
        good={"engine": {"type": "VLLM", "tensorParallelSize": 2}},
        bad={"engine": {"type": "Torch", "tensorParallelSize": 2}},
    ),
    Rule(
        id="speculation-of-a-server",
        message="draft.speculation Disabled requires engine.type Torch",
        good={"draft": {"speculation": "Disabled"}},
        bad={"engine": {"type": "VLLM"}, "draft": {"speculation": "Disabled"}},
    ),
    Rule(
        id="draft-heads-together",
        message="set numAttentionHeads and numKeyValueHeads together",
        good={"draft": {"numAttentionHeads": 32, "numKeyValueHeads": 8}},
        bad={"draft": {"numAttentionHeads": 32}},
    ),
    Rule(
        id="draft-heads",
        message="numAttentionHeads must be a multiple of numKeyValueHeads",
        good={"draft": {"numAttentionHeads": 32, "numKeyValueHeads": 8}},
        bad={"draft": {"numAttentionHeads": 32, "numKeyValueHeads": 7}},
    ),
    Rule(
        id="draft-sizes",
        message="a draft's sizes are immutable",
        before={"draft": {"vocabSize": 65536}},
        good={"draft": {"vocabSize": 65536, "lookahead": 5}},
        bad={"draft": {"vocabSize": 65536, "intermediateSize": 4096}},
    ),
    Rule(
        id="arguments",
        message="args require type SGLang or VLLM",
        good={"engine": {"type": "VLLM", "args": ["--enforce-eager"]}},
        bad={"engine": {"args": ["--enable-metrics"]}},
    ),
    Rule(
        id="limit-per-key",
        message="maxRequestsPerKey requires apiKeysSecretRef",
        good={"serving": {"maxRequestsPerKey": 4, "apiKeysSecretRef": {"name": "clients"}}},
        bad={"serving": {"maxRequestsPerKey": 4}},
    ),
    Rule(
        id="revision",
        message="revision requires an hf:// uri",
        good={"targetModel": {"uri": "hf://org/model", "revision": "v1"}},
        bad={"targetModel": {"uri": "s3://bucket/model", "revision": "v1"}},
    ),
    Rule(
        id="target-of-no-claim",
        message="uri names no claim",
        good={"targetModel": {"uri": "pvc://models/target"}},
        bad={"targetModel": {"uri": "pvc:///target"}},
    ),
    Rule(
        id="initial-draft-of-no-claim",
        message="uri names no claim",
        good={"draft": {"initial": {"uri": "pvc://drafts"}}},
        bad={"draft": {"initial": {"uri": "pvc:///drafts"}}},
    ),
    Rule(
        id="rolling-update-of-nothing",
        message="maxSurge and maxUnavailable are both 0",
        good={"serving": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "25%"}}},
        bad={"serving": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}},
    ),
    Rule(
        id="model-cache",
        message="choose one of pvc and hostPath",
        good={"serving": {"modelCache": {"pvc": {"claimName": "models"}}}},
        bad={"serving": {"modelCache": {"pvc": {"claimName": "models"}, "hostPath": {"path": "/models"}}}},
    ),
    Rule(
        id="registry-storage-size",
        message="storage is immutable",
        before={"registry": {"storage": {"size": "20Gi"}}},
        good={"registry": {"storage": {"size": "20Gi"}, "bucket": {"url": "s3://drafts/chat"}}},
        bad={"registry": {"storage": {"size": "30Gi"}}},
    ),
    Rule(
        id="registry-storage-by-default",
        message="storage is immutable",
        before={},
        good={"registry": {"storage": {"size": "20Gi"}}},
        bad={"registry": {"storage": {"storageClassName": "fast"}}},
    ),
    Rule(
        id="a-volume-of-one-pod",
        message="storage.claimName is one volume, and with nodes above 1 every pod needs its own",
        good={"trainer": {"storage": {"claimName": "mine"}, "accelerator": {"perPod": 8}}},
        bad={"trainer": {"storage": {"claimName": "mine"}, "nodes": 2}},
    ),
    Rule(
        id="a-stream-per-rank",
        message="nodes times accelerator.perPod is at most 64",
        good={"trainer": {"nodes": 8, "accelerator": {"perPod": 8}}},
        bad={"trainer": {"nodes": 13, "accelerator": {"perPod": 5}}},
    ),
    Rule(
        id="a-stream-per-rank-of-cpus",
        message="nodes times accelerator.perPod is at most 64",
        good={"trainer": {"nodes": 64}},
        bad={"trainer": {"nodes": 64, "accelerator": {"perPod": 2}}},
    ),
    Rule(
        id="trainer-storage",
        message="storage is immutable",
        before={"trainer": {"storage": {"claimName": "mine"}}},
        good={"trainer": {"suspend": True, "storage": {"claimName": "mine"}}},
        bad={"trainer": {}},
    ),
    Rule(
        id="one-redis",
        message="mode Dedicated and urlSecretRef are two different Redis",
        good={"traces": {"redis": {"urlSecretRef": {"name": "mine"}}}},
        bad={"traces": {"redis": {"mode": "Dedicated", "urlSecretRef": {"name": "mine"}}}},
    ),
    Rule(
        id="a-reader-beside-its-writers",
        message="readerUrlSecretRef requires urlSecretRef",
        good={"traces": {"redis": {"urlSecretRef": {"name": "pods"}, "readerUrlSecretRef": {"name": "trainer"}}}},
        bad={"traces": {"redis": {"readerUrlSecretRef": {"name": "trainer"}}}},
    ),
    Rule(
        id="memory-of-a-shared-redis",
        message="maxMemory and storage require mode Dedicated",
        good={"traces": {"redis": {"mode": "Dedicated", "maxMemory": "2Gi", "storage": {"size": "5Gi"}}}},
        bad={"traces": {"redis": {"maxMemory": "2Gi"}}},
    ),
    Rule(
        id="storage-of-a-dedicated-redis",
        message="storage is immutable",
        before={"traces": {"redis": {"mode": "Dedicated", "storage": {"size": "5Gi"}}}},
        good={"traces": {"redis": {"mode": "Dedicated", "maxMemory": "2Gi", "storage": {"size": "5Gi"}}}},
        bad={"traces": {"redis": {"mode": "Dedicated", "storage": {"size": "6Gi"}}}},
    ),
    Rule(
        id="canary-without-steps",
        message="a canary needs at least one step",
        good={"rollout": {"strategy": "Manual", "steps": []}},
        bad={"rollout": {"steps": []}},
    ),
    Rule(
        id="steps-that-decrease",
        message="steps[].podsPercent must not decrease",
        good={"rollout": {"steps": [{"podsPercent": 10}, {"podsPercent": 10}, {"podsPercent": 100}]}},
        bad={"rollout": {"steps": [{"podsPercent": 20}, {"podsPercent": 10}]}},
    ),
    Rule(
        id="deadline",
        message="progressDeadlineSeconds is less than the sum of holdSeconds of all steps",
        good={"rollout": {"progressDeadlineSeconds": 240}},
        bad={"rollout": {"progressDeadlineSeconds": 239}},
    ),
    Rule(
        id="draft-retained-later",
        kind="dver",
        message="a DraftVersion is immutable except for retain",
        before={},
        good={"retain": True},
        bad={"version": 3},
    ),
    Rule(
        id="draft-of-another-speculator",
        kind="dver",
        message="a DraftVersion is immutable",
        before={},
        good={},
        bad={"speculatorRef": {"name": "other"}},
    ),
    Rule(
        id="draft-gets-a-digest",
        kind="dver",
        message="a DraftVersion is immutable",
        before={},
        good={},
        bad={"digest": DIGEST},
    ),
    Rule(
        id="draft-gets-another-parent",
        kind="dver",
        message="a DraftVersion is immutable",
        before={"parentVersion": 2},
        good={"parentVersion": 2, "training": {"samples": 7}},
        bad={"parentVersion": 1},
    ),
    Rule(
        id="draft-from-elsewhere",
        kind="dver",
        message="a DraftVersion is immutable",
        before={},
        good={},
        bad={"source": "Imported"},
    ),
    Rule(
        id="import-from-no-claim",
        kind="dimp",
        message="uri names no claim",
        good={"uri": "pvc://drafts/mine"},
        bad={"uri": "pvc:///mine"},
    ),
    Rule(
        id="import-with-another-secret",
        kind="dimp",
        message="a DraftImport is immutable except for secretRef",
        before={},
        good={"secretRef": {"name": "bucket"}},
        bad={"uri": "hf://org/other"},
    ),
    Rule(
        id="import-of-another-speculator",
        kind="dimp",
        message="a DraftImport is immutable",
        before={},
        good={},
        bad={"speculatorRef": {"name": "other"}},
    ),
    Rule(
        id="import-gets-a-digest",
        kind="dimp",
        message="a DraftImport is immutable",
        before={},
        good={},
        bad={"digest": DIGEST},
    ),
)
