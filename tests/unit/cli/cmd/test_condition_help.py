"""Every reason of the operator has help, and the fields that restart pods are those that change their templates."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import click
import pytest

from updraft_cli.cmd.explain.condition_help import CONDITION_HELP, READY, RESTARTS, condition_help
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import registry, serving, trainer
from updraft_operator.manifests.manifest import Images, OperatorConfig
from updraft_operator.planning import assessment, conditions, pods
from updraft_operator.planning.observed import ConnectionState
from updraft_operator.planning.serving import attached, availability

IMAGES = Images(inference="i", trainer="t", registry="r", operator="o", sglang="s", vllm="v")
CONFIG = OperatorConfig(images=IMAGES, namespace="updraft", has_redis=True)

BUILDS: dict[str, Any] = {"serving": serving.objects, "trainer": trainer.objects, "registry": registry.objects}

ASSESSED = {assessment.true.__name__, assessment.false.__name__, assessment.unknown.__name__}
OF_EVERY_PART = {"image", "resources", "env", "podTemplate"}

# Another value of each field.
OTHERS: dict[str, Any] = {
    "engine": {"type": "SGLang"},
    "targetModel.revision": "main",
    "targetModel.servedName": "other",
    "targetModel.secretRef": {"name": "token"},
    "draft.speculation": "Disabled",
    "draft.lookahead": 5,
    "traces.payloadPercent": 50,
    "traces.evaluationPercent": 20,
    "traces.maxSize": "1Gi",
    "traces.shards": 2,
    "trainer.nodes": 2,
    "trainer.accelerator": {"perPod": 2},
    "traces.redis": {"urlSecretRef": {"name": "mine"}},
    "traces.enabled": False,
    "registry.bucket": {"url": "s3://bucket"},
    "serving.accelerator": {},
    "serving.maxRunningRequests": 16,
    "serving.maxContextTokens": 4096,
    "serving.apiKeysSecretRef": {"name": "clients"},
    "serving.tlsSecretRef": {"name": "certificate"},
    "serving.tenantHeader": "X-Tenant",
    "serving.maxRequestsPerKey": 4,
    "serving.startupSeconds": 3600,
    "serving.terminationGracePeriodSeconds": 90,
    "serving.modelCache": {"pvc": {"claimName": "models"}},
    "image": "another",
    "resources": {"limits": {"memory": "1Gi"}},
    "env": [{"name": "A", "value": "1"}],
    "podTemplate": {"spec": {"nodeSelector": {"a": "b"}}},
}

# Neither a draft, nor who decides on it, nor how many pods there are, nor how they are replaced.
HARMLESS: dict[str, Any] = {
    "rollout": {"pinnedVersion": 2, "paused": True, "promotedVersion": 2, "strategy": "Manual"},
    "serving.replicas": 5,
    "serving.rollingUpdate": {"maxSurge": 2},
    "serving.disruptionBudget": {"maxUnavailable": 2},
    "trainer.suspend": True,
    "trainer.workload": "StatefulSet",
    "deletionPolicy": "Delete",
}


def _spec(field: str, *value: Any) -> AdaptiveSpeculator:
    """A small spec, with the field set if there is a value."""
    spec: dict[str, Any] = {"targetModel": {"uri": "hf://org/qwen"}}
    if field in ("serving.maxRequestsPerKey", "serving.tenantHeader"):
        spec["serving"] = {"apiKeysSecretRef": {"name": "clients"}}
    if value:
        *parents, last = field.split(".")
        part = spec
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value[0]
    return AdaptiveSpeculator.model_validate({"metadata": {"name": "qwen", "namespace": "team"}, "spec": spec})


def _template(part: str, owner: AdaptiveSpeculator) -> Any:
    workloads = [built for built in BUILDS[part](owner, CONFIG) if built["kind"] in {"Deployment", "StatefulSet"}]
    return workloads[0]["spec"]["template"] if workloads else None


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, fields in RESTARTS.items() for field in fields])
def test_a_field_that_is_said_to_restart_pods_changes_their_template(part: str, field: str) -> None:
    other = OTHERS[field] if field in OTHERS else OTHERS[field.rpartition(".")[2]]
    assert _template(part, _spec(field)) != _template(part, _spec(field, other))


_LEFT_ALONE = [
    (part, field)
    for part, named in RESTARTS.items()
    for field in (*OTHERS, *HARMLESS)
    if field not in named and field not in OF_EVERY_PART
]


@pytest.mark.parametrize(("part", "field"), _LEFT_ALONE)
def test_a_field_that_is_not_said_to_restart_pods_leaves_their_template(part: str, field: str) -> None:
    value = OTHERS[field] if field in OTHERS else HARMLESS[field]
    changed = _template(part, _spec(field, value))
    assert changed in (_template(part, _spec(field)), None)  # None: the part is not there at all


def _given_by_the_operator() -> Iterator[str]:
    """Every reason in the operator's code: what stands behind a status, what a pod's trouble is called, every link."""
    for module in (conditions, availability, attached):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASSESSED:
                yield from _constants(node.args[0])
    for node in (node for module in (pods, attached) for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.keyword) and node.arg == "reason":
            yield from _constants(node.value)
    yield from (connection.value for connection in ConnectionState)


def _constants(node: ast.expr) -> Iterator[str]:
    yield from (
        str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant) and str(each.value).isalpha()
    )


REASONS = {
    "Accepted": "SpecAccepted NameConflict InvalidPodTemplate GPUMismatch KeyInArguments Forbidden SecretNotFound"
    " VersionNotFound NoRedis",
    "Available": "PodsReady PodsMissing InsufficientGPU Unschedulable ImagePullBackOff OOMKilled CrashLoopBackOff"
    " CreateContainerConfigError ModelDownloadFailed ModelLoading RollingOut Suspended QuotaExceeded",
    "FullyScaled": "PodsReady PodsMissing ModelLoading RollingOut Suspended QuotaExceeded OOMKilled",
    "RegistryReady": "Connected Starting Unreachable Denied Unschedulable ImagePullBackOff OOMKilled CrashLoopBackOff"
    " CreateContainerConfigError",
    "TrainerReady": "Training Suspended Disabled Starting NoRedis Unschedulable ImagePullBackOff OOMKilled"
    " CrashLoopBackOff CreateContainerConfigError ModelDownloadFailed WaitingForRanks RendezvousFailed"
    " CommunicationFailed WorkloadNotServed RedisUsersRefused RedisUnreachable",
    "Sized": "LargeEnough TooSmall TracesDropped NotReported",
    "Adapting": "Adapting Learning NoSamples FewSamples NoSteps TooSmall NotReported TrainerNotReady RegistryNotReady"
    " CaptureUnavailable Suspended",
    "SpeculationEffective": "Effective NoDraft TooFewSamples SlowerThanNone AcceptanceCollapsed DraftNotLoaded"
    " SpeculationDisabled Suspended",
    "Reconciling": "MovingTraces",
    "AcceleratorInUse": "CPUFallback NotReported RegistryNotReady Suspended InUse",
    "PasswordsRotated": "Rotated Rotating NothingToRotate",
    "Progressing": "Complete Canary Waiting Paused Pinned Inconclusive CanaryFailed ProgressDeadlineExceeded NoVersion",
}


@pytest.mark.parametrize(
    ("condition", "reason"), [(condition, reason) for condition, all_of in REASONS.items() for reason in all_of.split()]
)
def test_every_reason_of_the_api_has_help_about_this_resource(condition: str, reason: str) -> None:
    found = condition_help(condition, reason, name="qwen", namespace="team")
    assert found is not None
    assert found.meaning.endswith(".")
    assert found.action.endswith(".")
    assert "{" not in f"{found.meaning}{found.action}"
    if condition in READY:
        assert condition_help("Ready", reason, name="qwen", namespace="team") is not None


def test_every_reason_in_the_operators_code_has_help() -> None:
    given = set(_given_by_the_operator()) - {ConnectionState.CONNECTING}  # told as Starting
    advised = {reason for reasons in CONDITION_HELP.values() for reason in reasons}
    assert len(given) > 20
    assert given <= advised


def test_a_reason_of_a_newer_operator_has_none() -> None:
    assert condition_help("Available", "NodeOnFire", name="qwen", namespace="team") is None
    assert condition_help("Cooling", "PodsReady", name="qwen", namespace="team") is None


def test_help_about_pods_names_the_pods_of_the_right_part() -> None:
    for condition, part in (("Available", names.SERVING), ("RegistryReady", names.REGISTRY)):
        found = condition_help(condition, "CrashLoopBackOff", name="qwen", namespace="team")
        assert found is not None
        assert f"-n team -l updraft.dev/speculator=qwen,app.kubernetes.io/component={part}" in found.action


def test_help_leads_only_to_commands_that_exist() -> None:
    from updraft_cli.kubectl import plugin

    texts = [known.action for reasons in CONDITION_HELP.values() for known in reasons.values()]
    named = [" ".join(text.split()) for all_of in texts for text in all_of.split("`kubectl updraft ")[1:]]
    assert len(named) > 10
    for command in named:
        noun, verb, *_ = command.split()
        group = plugin.commands[noun]
        assert not isinstance(group, click.Group) or verb in group.commands, command
