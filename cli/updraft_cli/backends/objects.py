"""AdaptiveSpeculators, DraftVersions and Events as plain values; a field that a status does not have stays absent."""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from updraft_cli.backends.drafts import (
    Acceptance,
    DomainAcceptance,
    Draft,
    HistoryEntry,
    KubernetesEvent,
    WaitingImport,
)
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.speculators import (
    ROLES,
    Condition,
    Failure,
    MetricChange,
    Pace,
    Pods,
    Resource,
    Speculator,
    Speedup,
    Trial,
)

Json = Mapping[str, Any]

_PENDING = "Pending"
"""Reason of the only condition that an object has before an operator has written its status."""

NO_DRAFT = "NoDraft"
"""Value of spec.rollout.pinnedVersion: serve without a draft."""

GROUP = "updraft.dev"
SPECULATORS = "adaptivespeculators"
DRAFT_VERSIONS = "draftversions"
DRAFT_IMPORTS = "draftimports"


def speculator(content: Json) -> Speculator:
    resource = _resource(content)
    sized = resource.condition("Sized")
    metadata, spec, status = content["metadata"], _part(content, "spec"), _part(content, "status")
    serving, rollout = _part(status, "serving"), _part(spec, "rollout")
    roles: dict[str, Any] = {role: _part(status, "versions").get(role) or 0 for role in ROLES}
    acceptance = _part(status, "acceptance")
    return Speculator(
        name=metadata["name"],
        namespace=metadata.get("namespace", ""),
        message=_part(status, "rollout").get("message", ""),
        **roles,
        pinned=_pinned(rollout),
        paused=rollout.get("paused", False),
        pods=Pods(
            ready=serving.get("readyReplicas", 0),
            wanted=0 if spec.get("suspend") else _part(spec, "serving").get("replicas"),
            serving_stable=serving.get("updatedReplicas"),
            failed=serving.get("failedReplicas", 0),
        ),
        acceptance=_acceptance(acceptance.get("stable"), acceptance.get("verifySteps")),
        domains=_domains(acceptance),
        speedup=_speedup(acceptance),
        trial=_trial(roles, _part(status, "rollout"), acceptance) if roles["candidate"] else None,
        policy=Policy.from_kubernetes(rollout),
        trainer_message=_part(status, "trainer").get("message", ""),
        pace=_pace(_part(_part(status, "trainer"), "progress")),
        too_small=sized.message if sized is not None and sized.status == "False" else "",
        resource=resource,
    )


def draft(content: Json, owner: Speculator | None) -> Draft:
    """Read a DraftVersion of `owner`."""
    metadata, spec, status = content["metadata"], _part(content, "spec"), _part(content, "status")
    pods, number = _part(status, "pods"), spec["version"]
    phase = words(status.get("phase", ""))
    changes = status.get("history", ())
    return Draft(
        speculator=_part(spec, "speculatorRef").get("name", ""),
        namespace=metadata.get("namespace", ""),
        object=metadata["name"],
        version=number,
        phase=phase,
        since=time(changes[-1].get("time")) if changes and words(changes[-1]["phase"]) == phase else None,
        reason=status.get("reason", ""),
        source=words(spec.get("source", "")),
        parent=spec.get("parentVersion"),
        samples=_part(spec, "training").get("samples"),
        digest=spec.get("digest", ""),
        published=time(metadata.get("creationTimestamp")),
        pinned=owner is not None and owner.pinned == number,
        retained=spec.get("retain", False),
        acceptance=_acceptance(_part(status, "acceptance").get("length")),
        pods_loaded=pods.get("loaded"),
        pods_wanted=pods.get("target"),
    )


def history(content: Json) -> Iterator[HistoryEntry]:
    """Read the changes of phase that a DraftVersion keeps, oldest first."""
    before = ""
    for change in _part(content, "status").get("history", ()):
        phase = words(change["phase"])
        if (moment := time(change.get("time"))) is not None:
            yield HistoryEntry(
                time=moment,
                version=content["spec"]["version"],
                object=content["metadata"]["name"],
                before=before,
                phase=phase,
                reason=change.get("reason", ""),
                actor=change.get("actor", ""),
            )
        before = phase


def event(content: Json) -> KubernetesEvent:
    """Read an Event of either API: the newer one has a time, and a series instead of a count."""
    involved, series = _part(content, "involvedObject"), _part(content, "series")
    times = (series.get("lastObservedTime"), content.get("lastTimestamp"), content.get("eventTime"))
    return KubernetesEvent(
        time=time(next(filter(None, (*times, content["metadata"].get("creationTimestamp"))), None)),
        kind=involved.get("kind", ""),
        name=involved.get("name", ""),
        type=content.get("type", ""),
        reason=content.get("reason", ""),
        message=content.get("message", ""),
        count=series.get("count") or content.get("count") or 1,
    )


def events_of(contents: Iterable[Json], speculator: str, version: str = "") -> tuple[KubernetesEvent, ...]:
    """Return the Events of a speculator and its versions, or of the DraftVersion `version` alone; oldest first."""
    events = map(event, contents)
    if version:
        kept = [event for event in events if (event.kind, event.name) == ("DraftVersion", version)]
    else:
        kept = [event for event in events if event.name == speculator or _is_version(event, speculator)]
    return tuple(sorted(kept, key=lambda event: event.time.timestamp() if event.time else 0.0))


def newest_first(drafts: Iterable[Draft]) -> tuple[Draft, ...]:
    """Sort versions by speculator, newest first."""
    return tuple(sorted(drafts, key=lambda draft: (draft.namespace, draft.speculator, -draft.version)))


def waiting_imports(contents: Iterable[Json]) -> Iterator[WaitingImport]:
    """Read the DraftImports that the registry has given no number."""
    for content in contents:
        status = _part(content, "status")
        conditions = {each["type"]: each for each in status.get("conditions", ())}
        if "version" not in status:
            ready = conditions.get("Ready", {"reason": _PENDING, "message": "the operator has not said yet"})
            namespace, speculator = owner_key(content)
            yield WaitingImport(
                namespace=namespace,
                name=content["metadata"]["name"],
                speculator=speculator,
                has_failed="Stalled" in conditions,
                reason=ready["reason"],
                message=ready["message"],
            )


def words(constant: str) -> str:
    """Turn RolledBack into `rolled back`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", constant).lower()


def writers(content: Json, field: str) -> tuple[str, ...]:
    """Return the field managers that have set `spec.rollout.<field>`."""
    managed = content["metadata"].get("managedFields", ())
    return tuple(
        dict.fromkeys(
            entry.get("manager", "")
            for entry in managed
            if f"f:{field}" in _part(_part(_part(entry, "fieldsV1"), "f:spec"), "f:rollout")
        )
    )


def _part(content: Json, name: str) -> Json:
    return content.get(name) or {}


def _pinned(rollout: Json) -> int | None:
    """Return the pinned version, where 0 is no draft; None without a pin."""
    pinned = rollout.get("pinnedVersion")
    return 0 if pinned == NO_DRAFT else pinned


def _is_version(event: KubernetesEvent, speculator: str) -> bool:
    """By name, because the Events of a version outlive it."""
    number = event.name.removeprefix(f"{speculator}-v")
    return event.kind == "DraftVersion" and number != event.name and number.isdecimal()


def _acceptance(length: str | None, verify_steps: int | None = None) -> Acceptance | None:
    return Acceptance(length=float(length), verify_steps=verify_steps) if length else None


def _speedup(acceptance: Json) -> Speedup | None:
    ratio, low, high = (acceptance.get(name) for name in ("speedup", "speedupLow", "speedupHigh"))
    return Speedup(ratio=float(ratio), low=float(low), high=float(high)) if ratio and low and high else None


def _domains(acceptance: Json) -> tuple[DomainAcceptance, ...]:
    return tuple(
        DomainAcceptance(
            domain=one["domain"],
            **{role: float(one[role]) if one.get(role) else None for role in ("stable", "candidate")},
        )
        for one in acceptance.get("domains", ())
    )


def _trial(roles: Mapping[str, int], rollout: Json, acceptance: Json) -> Trial:
    return Trial(
        candidate=roles["candidate"],
        baseline=rollout.get("baseline") or roles["stable"],
        step=rollout.get("step"),
        steps=rollout.get("steps"),
        started=time(rollout.get("startTime")),
        step_since=time(rollout.get("stepStartTime")),
        acceptance_length=_change(acceptance.get("candidate"), acceptance.get("stable")),
    )


def _change(candidate: str | None, stable: str | None) -> MetricChange | None:
    if not candidate or not stable or not float(stable):
        return None
    change = 100 * (float(candidate) / float(stable) - 1)
    return MetricChange(candidate=float(candidate), stable=float(stable), change_percent=change)


def _resource(content: Json) -> Resource:
    metadata, spec, status = content["metadata"], _part(content, "spec"), _part(content, "status")
    trainer, conditions = _part(status, "trainer"), list(map(_condition, status.get("conditions", ())))
    if conditions and conditions[0].reason == _PENDING:
        conditions.clear()
    return Resource(
        target=_part(spec, "targetModel").get("uri", ""),
        engine=_part(spec, "engine").get("type", ""),
        url=_part(status, "serving").get("url", ""),
        is_suspended=spec.get("suspend", False),
        is_current=status.get("observedGeneration") == metadata.get("generation"),
        is_reconciled=bool(conditions),
        promoted=_part(spec, "rollout").get("promotedVersion"),
        trainer_state=trainer.get("state", ""),
        last_published=time(trainer.get("lastPublishTime")),
        last_failure=_failure(_part(status, "lastFailure")),
        conditions=tuple(conditions),
    )


def _pace(progress: Json) -> Pace | None:
    if not progress:
        return None
    percent = progress.get("flopsUtilizationPercent")
    return Pace(
        device=progress.get("device", ""),
        ranks=progress.get("ranks", 0),
        tokens_per_second=progress.get("tokensPerSecond", 0),
        utilization=None if percent is None else percent / 100,
        shares={one["phase"]: one["percent"] / 100 for one in progress.get("phases", ())},
        steps_to_estimate=progress.get("stepsToEstimate", 0),
        estimate_due=time(progress.get("estimateTime")),
        last_save=time(progress.get("lastSaveTime")),
    )


def _failure(failure: Json) -> Failure | None:
    if not failure:
        return None
    return Failure(
        version=failure["version"],
        reason=failure["reason"],
        message=failure.get("message", ""),
        time=time(failure.get("time")),
    )


def _condition(condition: Json) -> Condition:
    return Condition(
        type=condition["type"],
        status=condition["status"],
        reason=condition["reason"],
        message=condition.get("message", ""),
        since=time(condition.get("lastTransitionTime")),
    )


def time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def key(content: Json) -> tuple[str, str]:
    """Namespace and name of an object."""
    return content["metadata"]["namespace"], content["metadata"]["name"]


def owner_key(content: Json) -> tuple[str, str]:
    """Namespace and name of the AdaptiveSpeculator of a DraftVersion or a DraftImport."""
    return content["metadata"].get("namespace", ""), content["spec"]["speculatorRef"]["name"]
