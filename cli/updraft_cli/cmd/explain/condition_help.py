"""Help for each condition, by its reason: data for `kubectl updraft explain` and for the table in the docs.

`{name}`, `{namespace}` and `{part}` (serving, registry, trainer) are placeholders. A reason that is missing here comes from
a newer operator; its message still explains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionHelp:
    meaning: str
    action: str = "Nothing to do."


_PODS = "-n {namespace} -l updraft.dev/speculator={name},app.kubernetes.io/component={part}"
_EVENTS = f"`kubectl describe pods {_PODS}` ends with the scheduler's messages."
_PATIENCE = "Wait; `kubectl updraft status {name} -n {namespace} --watch` shows the progress."
_SUSPENDED = "Set spec.suspend to false to continue."

PARTS: Mapping[str, str] = {"ServingReady": "serving", "RegistryReady": "registry", "TrainerReady": "trainer"}
"""The part whose pods a condition describes."""

PODS: Mapping[str, ConditionHelp] = {
    "InsufficientGPU": ConditionHelp(
        meaning="No node has as many free GPUs as a pod requests.",
        action="Free or add GPU nodes, or request fewer: spec.serving.tensorParallelSize, spec.serving.resources,"
        " spec.serving.replicas. With spec.serving.rollingUpdate.maxSurge at 0, pods"
        f" are replaced one at a time and need no spare GPU. {_EVENTS}",
    ),
    "Unschedulable": ConditionHelp(
        meaning="The scheduler finds no node for a pod because of memory, CPU, taints, node selectors"
        " or a volume in another zone.",
        action=f"{_EVENTS} Then request less (spec.{{part}}.resources), or allow more nodes (tolerations and"
        " nodeSelector in spec.{part}.podTemplate).",
    ),
    "ImagePullBackOff": ConditionHelp(
        meaning="A node cannot pull an image: its name or tag is wrong, or the node may not pull it.",
        action="Correct spec.{part}.image or the chart's image values; for a private image registry, name a pull"
        f" secret in the chart's imagePullSecrets. `kubectl describe pods {_PODS}` shows the image and the error.",
    ),
    "OOMKilled": ConditionHelp(
        meaning="A container was killed because it used more memory than its limit or than the node has.",
        action="Raise the memory limit in spec.{part}.resources. In serving, fewer concurrent requests"
        " (spec.serving.maxRunningRequests) or a shorter context (spec.serving.maxContextTokens) also need less.",
    ),
    "CrashLoopBackOff": ConditionHelp(
        meaning="A container repeatedly exits soon after it starts.",
        action=f"Read its last messages: `kubectl logs {_PODS} --all-containers --previous --prefix`. Often it is a wrong"
        " variable in spec.{part}.env or an argument in spec.serving.args.",
    ),
    "CreateContainerConfigError": ConditionHelp(
        meaning="A container cannot start because a Secret, a ConfigMap or an entry that it names is missing.",
        action=f"Create it, or correct its name in the spec. `kubectl describe pods {_PODS}` shows which one it is.",
    ),
    "ModelDownloadFailed": ConditionHelp(
        meaning="The init container that downloads the target model failed.",
        action="Check spec.targetModel.uri and revision, the token in the Secret of spec.targetModel.secretRef, and that"
        f" pods can reach that address. Its own messages: `kubectl logs {_PODS} -c model --prefix`.",
    ),
    "ModelLoading": ConditionHelp(
        meaning="Pods are loading the target model.",
        action=f"{_PATIENCE} With a model cache (spec.serving.modelCache), pods do not download the model one by one.",
    ),
    "RollingOut": ConditionHelp(
        meaning="Pods are being replaced because the spec, an image or a setting changed. The others serve meanwhile.",
        action=_PATIENCE,
    ),
    "QuotaExceeded": ConditionHelp(
        meaning="A ResourceQuota of the namespace does not allow another pod.",
        action="Raise the quota or request less: `kubectl describe resourcequota -n {namespace}` shows usage and limits.",
    ),
}
"""Reasons that pods of any part give."""

_NO_REDIS = ConditionHelp(
    meaning="There is no Redis to carry traces from serving to the trainer, so it serves but does not learn.",
    action="Name one in spec.traces.redis.urlSecretRef, or configure one for all resources (the chart's redis values). To"
    " serve without learning, set spec.traces.enabled to false.",
)

_ACCEPTED: Mapping[str, ConditionHelp] = {
    "VersionUnusable": ConditionHelp(
        meaning="spec.rollout.pinnedVersion names a version that was rejected, rolled back or failed. It never serves again.",
        action="Pin another version of `kubectl updraft draft list {name} -n {namespace}`, or run `kubectl updraft draft unpin"
        " {name} -n {namespace}`. The last promoted version serves meanwhile.",
    ),
    "InvalidRollout": ConditionHelp(
        meaning="The registry refuses spec.rollout. The previous policy stays in force.",
        action="Correct the field named in the message.",
    ),
    "SpecAccepted": ConditionHelp(meaning="The spec is valid, and everything it names exists."),
    "NameConflict": ConditionHelp(
        meaning="Another object has a name that this resource needs.",
        action="Delete or rename the object that the message names, or give this AdaptiveSpeculator another name.",
    ),
    "InvalidPodTemplate": ConditionHelp(
        meaning="The API server refuses a pod that spec.serving, spec.trainer or spec.registry describes.",
        action="Correct podTemplate, resources or env; the message is the API server's. `updraft operator plan -f FILE`"
        " tries a spec without applying it.",
    ),
    "Forbidden": ConditionHelp(
        meaning="The operator may not create an object that this resource needs: a role or an admission policy forbids it.",
        action="Add what the message names to the operator's role, or change the policy. The chart grants everything needed;"
        " a role written by hand may lag behind an upgrade.",
    ),
    "SecretNotFound": ConditionHelp(
        meaning="A Secret named in the spec is not in the namespace, or lacks the entry.",
        action="Create it (`kubectl create secret generic ... -n {namespace}`), or correct its name or key in the spec.",
    ),
    "VersionNotFound": ConditionHelp(
        meaning="spec.rollout.pinnedVersion or promotedVersion names a version that the registry does not have."
        " Nothing changed.",
        action="Name another version of `kubectl updraft draft list {name} -n {namespace}`, or remove the field from the spec;"
        " `kubectl updraft draft unpin {name} -n {namespace}` removes a pin.",
    ),
    "NoRedis": _NO_REDIS,
}

_SERVING: Mapping[str, ConditionHelp] = {
    "PodsReady": ConditionHelp(meaning="All requested inference pods are ready."),
    **PODS,
    "Suspended": ConditionHelp(meaning="spec.suspend is set: no inference pod runs.", action=_SUSPENDED),
}

_REGISTRY: Mapping[str, ConditionHelp] = {
    "Connected": ConditionHelp(meaning="The operator is connected to the registry."),
    "Starting": ConditionHelp(
        meaning="The registry's pod is starting.",
        action=f"{_PATIENCE} If this lasts, its volume may not be bound: `kubectl get pvc -n {{namespace}}`.",
    ),
    "Unreachable": ConditionHelp(
        meaning="The registry's pod is ready, but the operator cannot reach it. Pods keep the draft that they have.",
        action="Look for a NetworkPolicy or a service mesh between the operator's namespace and port 50051 of Service"
        " {name}-registry, and read `kubectl logs -n {namespace} {name}-registry-0`.",
    ),
    "Denied": ConditionHelp(
        meaning="The registry refuses the operator's token because Secret {name}-access was changed after the registry"
        " started.",
        action="Restart the registry, which then reads it again: `kubectl rollout restart statefulset/{name}-registry"
        " -n {namespace}`.",
    ),
    **{reason: known for reason, known in PODS.items() if reason not in {"ModelDownloadFailed", "ModelLoading"}},
}

_TRAINER: Mapping[str, ConditionHelp] = {
    "Training": ConditionHelp(meaning="The trainer receives traces and learns."),
    "Suspended": ConditionHelp(
        meaning="spec.suspend or spec.trainer.suspend is set: nothing is learned, and serving keeps the draft that it has.",
        action="Set spec.suspend and spec.trainer.suspend to false to continue.",
    ),
    "Disabled": ConditionHelp(
        meaning="There is no trainer because serving records no traces: spec.traces.enabled is false.",
        action="Nothing to do. To learn from traffic, set spec.traces.enabled to true.",
    ),
    "NoRedis": _NO_REDIS,
    "Starting": ConditionHelp(
        meaning="The trainer's pod is starting.",
        action=f"{_PATIENCE} If this lasts, its volume may not be bound: `kubectl get pvc -n {{namespace}}`.",
    ),
    **PODS,
}

_ADAPTING: Mapping[str, ConditionHelp] = {
    "Adapting": ConditionHelp(meaning="Trainer, traces and registry work, so drafts follow the traffic."),
    "TrainerNotReady": ConditionHelp(
        meaning="Nothing is learned while the trainer is not ready. Serving is not affected.",
        action="See TrainerReady.",
    ),
    "RegistryNotReady": ConditionHelp(
        meaning="Nothing can be published while the registry is not ready. Pods keep the draft they have.",
        action="See RegistryReady.",
    ),
    "CaptureUnavailable": ConditionHelp(
        meaning="A pod cannot record what its engine verifies, so nothing is learned from its traffic."
        " Serving is not affected.",
        action="The message names the missing hook or setting. The usual cause is an engine image of an unsupported version"
        " (spec.serving.image). Traces flow again once the pods run a supported one.",
    ),
    "Suspended": ConditionHelp(meaning="Suspended: nothing is learned.", action=_SUSPENDED),
}

_EFFECTIVE: Mapping[str, ConditionHelp] = {
    "Effective": ConditionHelp(meaning="Drafts are accepted often enough to pay for themselves."),
    "NoDraft": ConditionHelp(
        meaning="No version serves yet. Answers are right, and no faster than without speculation.",
        action="The trainer publishes the first version once it has seen enough traffic;"
        " `kubectl updraft draft list {name} -n {namespace}` lists the versions. To use a draft of your own, apply a"
        " DraftVersion with source Imported.",
    ),
    "TooFewSamples": ConditionHelp(
        meaning="Too few verify steps were measured.", action="Nothing to do: wait for traffic."
    ),
    "AcceptanceCollapsed": ConditionHelp(
        meaning="Almost no drafted token is accepted. Answers are right, but speculation gains nothing.",
        action="The traffic has probably changed. Let the draft learn (is TrainerReady true?), or serve an earlier version:"
        " `kubectl updraft draft list {name} -n {namespace}`, then `kubectl updraft draft pin {name} N -n {namespace}`.",
    ),
    "DraftNotLoaded": ConditionHelp(
        meaning="Pods have not loaded the version that they should serve: they are fetching it, or cannot load it.",
        action=f"If this lasts, read their logs: `kubectl logs {_PODS.replace('{part}', 'serving')} -c inference"
        " --prefix`.",
    ),
    "SpeculationDisabled": ConditionHelp(
        meaning="spec.draft.lookahead is 0, so nothing is drafted.",
        action="Nothing to do. To speculate, set spec.draft.lookahead, for example to 3. That restarts the pods.",
    ),
    "Suspended": ConditionHelp(meaning="Suspended: nothing is served.", action=_SUSPENDED),
}

_PROGRESSING: Mapping[str, ConditionHelp] = {
    "Complete": ConditionHelp(meaning="The last promoted version serves on all pods, and there is no canary."),
    "Canary": ConditionHelp(meaning="A version is in canary: on some of the pods, or in turns."),
    "Waiting": ConditionHelp(
        meaning="A version waits: for its canary, or with strategy Manual for a person.",
        action="If it waits for a person, run `kubectl updraft draft promote {name} N -n {namespace}`.",
    ),
    "Paused": ConditionHelp(
        meaning="spec.rollout.paused is set: the rollout stays where it is. A canary that fails is still rolled back.",
        action="`kubectl updraft rollout resume {name} -n {namespace}` continues it.",
    ),
    "Pinned": ConditionHelp(
        meaning="spec.rollout.pinnedVersion is set: exactly that version serves, and newer versions are held.",
        action="`kubectl updraft draft unpin {name} -n {namespace}` ends the pin.",
    ),
    "Inconclusive": ConditionHelp(
        meaning="A canary reached its deadline without a verdict, and spec.rollout.analysis.onInconclusive is Pause.",
        action="Run `kubectl updraft draft promote {name} N -n {namespace}`, or pin the stable version. More traffic, more"
        " time (progressDeadlineSeconds) or fewer minSamples lead to a verdict next time.",
    ),
    "CanaryFailed": ConditionHelp(
        meaning="A canary did worse than the stable version. It waits because spec.rollout.autoRollback is false.",
        action="Pin the stable version (`kubectl updraft draft pin {name} N -n {namespace}`), or promote the canary"
        " anyway (`kubectl updraft draft promote {name} N -n {namespace}`).",
    ),
    "ProgressDeadlineExceeded": ConditionHelp(
        meaning="A rollout did not end within spec.rollout.progressDeadlineSeconds.",
        action="`kubectl updraft draft history {name} -n {namespace}` shows the outcome. Raise the deadline, or"
        " for little traffic lower spec.rollout.analysis.minSamples.",
    ),
    "NoVersion": ConditionHelp(
        meaning="There is no version to roll out yet.",
        action="Nothing to do: the trainer publishes the first one after enough traffic.",
    ),
}

CONDITION_HELP: Mapping[str, Mapping[str, ConditionHelp]] = {
    "Ready": {"Ready": ConditionHelp(meaning="The spec is accepted, pods serve, and the registry answers.")},
    "Accepted": _ACCEPTED,
    "ServingReady": _SERVING,
    "RegistryReady": _REGISTRY,
    "TrainerReady": _TRAINER,
    "Adapting": _ADAPTING,
    "SpeculationEffective": _EFFECTIVE,
    "Progressing": _PROGRESSING,
}
"""By condition, then by reason. Ready also has the reasons of the three conditions in `READY`."""

READY = ("Accepted", "ServingReady", "RegistryReady")
"""The conditions that Ready combines; it has the reason of the first one that is not True."""


def condition_help(condition: str, reason: str, *, name: str, namespace: str) -> ConditionHelp | None:
    """Return the help for a condition's reason; None for an unknown one."""
    sources = (condition, *READY) if condition == "Ready" else (condition,)
    for source in sources:
        known = CONDITION_HELP.get(source, {}).get(reason)
        if known is not None:
            words = {"name": name, "namespace": namespace, "part": PARTS.get(source, "serving")}
            return ConditionHelp(meaning=known.meaning.format(**words), action=known.action.format(**words))
    return None


RESTARTS: Mapping[str, tuple[str, ...]] = {
    "serving": (
        "engine",
        "targetModel.revision",
        "targetModel.servedName",
        "targetModel.secretRef",
        "draft.lookahead",
        "serving.image",
        "serving.args",
        "serving.tensorParallelSize",
        "serving.resources",
        "serving.env",
        "serving.podTemplate",
        "serving.maxRunningRequests",
        "serving.maxContextTokens",
        "serving.terminationGracePeriodSeconds",
        "serving.modelCache",
        "traces.payloadPercent",
        "traces.evaluationPercent",
        "traces.maxSize",
        "traces.redis",
        "traces.enabled",
    ),
    "trainer": (
        "engine",
        "targetModel.revision",
        "targetModel.secretRef",
        "draft.lookahead",
        "serving.modelCache",
        "traces.redis",
        "trainer.image",
        "trainer.resources",
        "trainer.env",
        "trainer.podTemplate",
    ),
    "registry": (
        "registry.image",
        "registry.resources",
        "registry.env",
        "registry.podTemplate",
        "registry.bucket",
    ),
}
"""Fields of the spec that are in a part's pod template; changing one replaces its pods."""
