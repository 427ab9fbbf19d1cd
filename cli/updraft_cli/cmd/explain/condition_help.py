"""What to do about a condition, by its reason: data for `kubectl updraft explain` and for the table in the docs.

`{name}`, `{namespace}` and `{part}` (serving, registry, trainer) stand for what it is about. A reason that is not here
is a newer operator's; its message still says what is.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A reason in words."""

    meaning: str
    action: str = "Nothing to do."


_PODS = "-n {namespace} -l updraft.dev/speculator={name},app.kubernetes.io/component={part}"
_EVENTS = f"`kubectl describe pods {_PODS}` has the scheduler's words at its end."
_PATIENCE = "Nothing to do but wait; `kubectl updraft status {name} -n {namespace} --watch` shows it come."
_SUSPENDED = "Set spec.suspend to false to go on."

PARTS: Mapping[str, str] = {"ServingReady": "serving", "RegistryReady": "registry", "TrainerReady": "trainer"}
"""The part whose pods a condition is about."""

PODS: Mapping[str, Advice] = {
    "InsufficientGPU": Advice(
        meaning="No node has as many free GPUs as a pod asks for.",
        action="Free or add GPU nodes, or ask for fewer: spec.serving.tensorParallelSize, spec.serving.resources,"
        " spec.serving.replicas. While pods are replaced one at a time no spare GPU is needed: leave"
        f" spec.serving.rollingUpdate.maxSurge at 0. {_EVENTS}",
    ),
    "Unschedulable": Advice(
        meaning="The scheduler finds no node for a pod: memory, CPU, taints, node selectors, or a volume in another zone.",
        action=f"{_EVENTS} Then ask for less (spec.{{part}}.resources), or let it on more nodes (tolerations and"
        " nodeSelector in spec.{part}.podTemplate).",
    ),
    "ImagePullBackOff": Advice(
        meaning="A node cannot pull an image: a wrong name or tag, or no right to pull it.",
        action="Correct spec.{part}.image or the chart's image values; for a private registry of images name a pull"
        f" secret in the chart's imagePullSecrets. `kubectl describe pods {_PODS}` names the image and the answer.",
    ),
    "OOMKilled": Advice(
        meaning="A container was killed because it used more memory than its limit, or than the node has.",
        action="Raise the memory limit in spec.{part}.resources; in serving also fewer requests at once"
        " (spec.serving.maxRunningRequests) or shorter ones (spec.serving.maxContextTokens) need less.",
    ),
    "CrashLoopBackOff": Advice(
        meaning="A container ends soon after it starts, again and again.",
        action=f"Read its last words: `kubectl logs {_PODS} --all-containers --previous --prefix`. Often it is a wrong"
        " variable in spec.{part}.env or an argument in spec.serving.args.",
    ),
    "CreateContainerConfigError": Advice(
        meaning="A container cannot be started: a Secret, a ConfigMap or an entry of one that it names is missing.",
        action=f"Make it, or correct its name in the spec. `kubectl describe pods {_PODS}` says which it is.",
    ),
    "ModelDownloadFailed": Advice(
        meaning="The init container that downloads the target model failed.",
        action="Check spec.targetModel.uri and revision, the token in the Secret of spec.targetModel.secretRef, and that"
        f" pods may reach the place. Its own words: `kubectl logs {_PODS} -c model --prefix`.",
    ),
    "ModelLoading": Advice(
        meaning="Pods run and load the target model.",
        action=f"{_PATIENCE} A model cache (spec.serving.modelCache) spares each pod its own download.",
    ),
    "RollingOut": Advice(
        meaning="Pods are replaced, because the spec, an image or a setting changed; the others serve meanwhile.",
        action=_PATIENCE,
    ),
    "QuotaExceeded": Advice(
        meaning="A ResourceQuota of the namespace does not allow another pod.",
        action="Raise the quota or ask for less: `kubectl describe resourcequota -n {namespace}` tells used and allowed.",
    ),
}
"""Reasons that pods give, whichever part they are of."""

_NO_REDIS = Advice(
    meaning="There is no Redis to carry traces from serving to the trainer: it serves, and learns nothing.",
    action="Name one in spec.traces.redis.urlSecretRef, or give the operator one for all (the chart's redis values). To"
    " serve without learning, set spec.traces.enabled to false.",
)

_ACCEPTED: Mapping[str, Advice] = {
    "VersionUnusable": Advice(
        meaning="spec.rollout.pinnedVersion names a version that was rejected, rolled back or failed: it never serves again.",
        action="Pin another one of `kubectl updraft versions {name} -n {namespace}`, or `kubectl updraft unpin {name} -n"
        " {namespace}`. What won last serves meanwhile.",
    ),
    "InvalidRollout": Advice(
        meaning="The registry refuses spec.rollout; what it followed before stays in force.",
        action="Correct the field that the message names.",
    ),
    "SpecAccepted": Advice(meaning="The spec is coherent, and what it names is there."),
    "NameConflict": Advice(
        meaning="An object that somebody else made has a name that this resource needs.",
        action="Delete or rename that object (the message names it), or make this AdaptiveSpeculator under another name.",
    ),
    "InvalidPodTemplate": Advice(
        meaning="The API server refuses a pod that spec.serving, spec.trainer or spec.registry asks for.",
        action="Correct podTemplate, resources or env; the message is the API server's. `updraft operator plan -f FILE`"
        " tries a spec without applying it.",
    ),
    "Forbidden": Advice(
        meaning="The operator may not make an object that this resource needs: a role or an admission policy is against it.",
        action="Give the operator's role what the message names, or change the policy. The chart grants all that it needs;"
        " a role written by hand may lag behind an upgrade.",
    ),
    "SecretNotFound": Advice(
        meaning="A Secret that the spec names is not in the namespace, or lacks the entry.",
        action="Make it (`kubectl create secret generic ... -n {namespace}`), or correct its name or key in the spec.",
    ),
    "VersionNotFound": Advice(
        meaning="spec.rollout.pinnedVersion or promotedVersion names a version that the registry does not have. Nothing"
        " changed.",
        action="Name another one of `kubectl updraft versions {name} -n {namespace}`, or take the field out of the spec; for"
        " a pin `kubectl updraft unpin {name} -n {namespace}` does it.",
    ),
    "NoRedis": _NO_REDIS,
}

_SERVING: Mapping[str, Advice] = {
    "PodsReady": Advice(meaning="As many inference pods are ready as are wished for."),
    **PODS,
    "Suspended": Advice(meaning="spec.suspend is set: no inference pod runs.", action=_SUSPENDED),
}

_REGISTRY: Mapping[str, Advice] = {
    "Connected": Advice(meaning="The operator is in touch with the registry."),
    "Starting": Advice(
        meaning="The registry's pod is starting.",
        action=f"{_PATIENCE} If it stays so, its volume may not be bound: `kubectl get pvc -n {{namespace}}`.",
    ),
    "Unreachable": Advice(
        meaning="The registry's pod is ready, but the operator cannot reach it. Pods go on with the draft they have.",
        action="Look for a NetworkPolicy or a mesh between the operator's namespace and port 50051 of Service"
        " {name}-registry, and at `kubectl logs -n {namespace} {name}-registry-0`.",
    ),
    "Denied": Advice(
        meaning="The registry does not take the operator's token: Secret {name}-access was changed after the registry"
        " started.",
        action="Restart the registry, which reads it anew: `kubectl rollout restart statefulset/{name}-registry"
        " -n {namespace}`.",
    ),
    **{reason: advice for reason, advice in PODS.items() if reason not in {"ModelDownloadFailed", "ModelLoading"}},
}

_TRAINER: Mapping[str, Advice] = {
    "Training": Advice(meaning="The trainer takes traces and learns."),
    "Suspended": Advice(
        meaning="spec.suspend or spec.trainer.suspend is set: nothing is learned, serving goes on with what it has.",
        action="Set spec.suspend and spec.trainer.suspend to false to go on.",
    ),
    "Disabled": Advice(
        meaning="There is no trainer, because serving records no traces: spec.traces.enabled is false.",
        action="Nothing to do, unless it should learn: then set spec.traces.enabled to true.",
    ),
    "NoRedis": _NO_REDIS,
    "Starting": Advice(
        meaning="The trainer's pod is starting.",
        action=f"{_PATIENCE} If it stays so, its volume may not be bound: `kubectl get pvc -n {{namespace}}`.",
    ),
    **PODS,
}

_ADAPTING: Mapping[str, Advice] = {
    "Adapting": Advice(meaning="Trainer, traces and registry work: drafts follow the traffic."),
    "TrainerNotReady": Advice(
        meaning="Nothing is learned while the trainer is not ready. Serving is not touched.",
        action="See what TrainerReady says.",
    ),
    "RegistryNotReady": Advice(
        meaning="Nothing can be published while the registry is not ready. Pods keep the draft they have.",
        action="See what RegistryReady says.",
    ),
    "CaptureUnavailable": Advice(
        meaning="A pod cannot record what its engine verifies, so nothing is learned from it. Serving is not touched.",
        action="The message says which hook or setting is missing: most often an engine image of a version that is not"
        " supported (spec.serving.image). Traces flow again once the pods run one that is.",
    ),
    "Suspended": Advice(meaning="Suspended: nothing is learned.", action=_SUSPENDED),
}

_EFFECTIVE: Mapping[str, Advice] = {
    "Effective": Advice(meaning="Drafts are accepted often enough to be worth their time."),
    "NoDraft": Advice(
        meaning="No version serves yet. Answers are right, and no faster than without a draft.",
        action="The first version comes by itself once the trainer has seen enough traffic;"
        " `kubectl updraft versions {name} -n {namespace}` lists what there is. A draft that you have can be applied as a"
        " DraftVersion with source Imported.",
    ),
    "TooFewSamples": Advice(
        meaning="Too few verify steps were measured to tell.", action="Nothing to do: it needs traffic."
    ),
    "AcceptanceCollapsed": Advice(
        meaning="Nearly no drafted token is accepted. Answers are right, but speculation gains nothing.",
        action="Traffic has probably changed: let it learn (is TrainerReady true?), or serve an earlier version:"
        " `kubectl updraft versions {name} -n {namespace}`, then `kubectl updraft pin {name} N -n {namespace}`.",
    ),
    "DraftNotLoaded": Advice(
        meaning="Pods do not hold the version that they should serve: it is on its way, or they cannot load it.",
        action=f"If it lasts, look for their reasons: `kubectl logs {_PODS.replace('{part}', 'serving')} -c inference"
        " --prefix`.",
    ),
    "SpeculationDisabled": Advice(
        meaning="spec.draft.lookahead is 0: nothing is drafted.",
        action="Nothing to do, unless it should: then set spec.draft.lookahead, for example to 3. That restarts the pods.",
    ),
    "Suspended": Advice(meaning="Suspended: nothing is served.", action=_SUSPENDED),
}

_PROGRESSING: Mapping[str, Advice] = {
    "Complete": Advice(meaning="The version that won last serves everywhere; none is tried."),
    "Canary": Advice(meaning="A version is tried on a part of the pods, or in turns."),
    "Waiting": Advice(
        meaning="A version waits: to be tried, or with strategy Manual for a person.",
        action="If it waits for a person, decide: `kubectl updraft promote {name} N -n {namespace}`.",
    ),
    "Paused": Advice(
        meaning="spec.rollout.paused is set: the rollout stays where it is. What fails is still rolled back.",
        action="`kubectl updraft resume {name} -n {namespace}` goes on.",
    ),
    "Pinned": Advice(
        meaning="spec.rollout.pinnedVersion is set: exactly that version serves, and newer ones are held.",
        action="`kubectl updraft unpin {name} -n {namespace}` lets the registry choose again.",
    ),
    "Inconclusive": Advice(
        meaning="A canary reached its deadline without a verdict, and spec.rollout.analysis.onInconclusive is Pause.",
        action="Decide: `kubectl updraft promote {name} N -n {namespace}`, or pin the stable version. More traffic, more"
        " time (progressDeadlineSeconds) or fewer minSamples give a verdict next time.",
    ),
    "CanaryFailed": Advice(
        meaning="A canary did worse than the stable version, and spec.rollout.autoRollback is false: it waits.",
        action="Decide: pin the stable version (`kubectl updraft pin {name} N -n {namespace}`), or take the canary after"
        " all (`kubectl updraft promote {name} N -n {namespace}`).",
    ),
    "ProgressDeadlineExceeded": Advice(
        meaning="A rollout did not end within spec.rollout.progressDeadlineSeconds.",
        action="`kubectl updraft history {name} -n {namespace}` tells what became of it. Raise the deadline, or lower"
        " spec.rollout.analysis.minSamples for little traffic.",
    ),
    "NoVersion": Advice(
        meaning="There is no version yet to roll out.",
        action="Nothing to do: the first one needs traffic and a trainer.",
    ),
}

ADVICE: Mapping[str, Mapping[str, Advice]] = {
    "Ready": {"Ready": Advice(meaning="The spec is accepted, pods serve, and the registry answers.")},
    "Accepted": _ACCEPTED,
    "ServingReady": _SERVING,
    "RegistryReady": _REGISTRY,
    "TrainerReady": _TRAINER,
    "Adapting": _ADAPTING,
    "SpeculationEffective": _EFFECTIVE,
    "Progressing": _PROGRESSING,
}
"""By condition, then by reason. Ready also has the reasons of the three that it is made of."""

READY = ("Accepted", "ServingReady", "RegistryReady")
"""The conditions that Ready is made of; it has the reason of the first that is not True."""


def advice(condition: str, reason: str, *, name: str, namespace: str) -> Advice | None:
    """Return what a reason of a condition means there, and what to do; None for one that is not known."""
    sources = (condition, *READY) if condition == "Ready" else (condition,)
    for source in sources:
        found = ADVICE.get(source, {}).get(reason)
        if found is not None:
            words = {"name": name, "namespace": namespace, "part": PARTS.get(source, "serving")}
            return Advice(meaning=found.meaning.format(**words), action=found.action.format(**words))
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
"""Fields of the spec that are in a part's pod template: a change of one replaces its pods."""
