"""One verdict an aspect: every reason with the smallest world that it is true in."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import ATTACHED, CONFIG, CONFIG_WITHOUT_REDIS, speculator
from tests.support.observed import NOW, connected, observed, pod, ready_pods, traffic, version, workload

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.cmd.explain.condition_help import CONDITION_HELP
from updraft_operator.manifests.tls.terms import Issuer, Tls, TlsMode
from updraft_operator.planning.assessment import Assessment, true
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import ConnectionState, MissingSecret, Refusal, RegistryView, UsersProblem
from updraft_operator.planning.status import status

STABLE = version(3)
TRIED = version(4, pb.PHASE_CANARY)
WAITING = version(4, pb.PHASE_HELD)
TROUBLES = (
    "InsufficientGPU",
    "Unschedulable",
    "ImagePullBackOff",
    "OOMKilled",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "ModelDownloadFailed",
)

Case = tuple[str, str, str, dict[str, Any]]


def _refused(reason: str, kind: str = "Deployment", name: str = "qwen-serving") -> dict[str, Any]:
    refusal = Refusal(ref=Ref(kind, name), digest="x", reason=reason, message="said the API server")
    return {"refusals": (refusal,)}


def _canary(message: str) -> RegistryView:
    return connected([STABLE, TRIED], message=message)


def _serves(length: float | None, *, steps: int = 1000, **more: Any) -> RegistryView:
    measured = [] if length is None else [traffic(3, length, steps)]
    return connected([STABLE], traffic=measured, **more)


ACCEPTED: list[Case] = [
    ("Accepted", "True", "SpecAccepted", {}),
    ("Accepted", "False", "NameConflict", _refused("NameConflict")),
    ("Accepted", "False", "InvalidPodTemplate", _refused("InvalidPodTemplate")),
    ("Accepted", "False", "GPUMismatch", _refused("GPUMismatch")),
    ("Accepted", "False", "KeyInArguments", _refused("KeyInArguments")),
    ("Accepted", "False", "Forbidden", _refused("Forbidden")),
    ("Accepted", "False", "InvalidRollout", _refused("InvalidRollout")),
    (
        "Accepted",
        "False",
        "VersionUnusable",
        {"spec": {"rollout": {"pinnedVersion": 2}}, "registry": connected([version(2, pb.PHASE_ROLLED_BACK), STABLE])},
    ),
    ("Accepted", "False", "SecretNotFound", {"missing_secrets": (MissingSecret("hub"),)}),
    (
        "Accepted",
        "False",
        "VersionNotFound",
        {"spec": {"rollout": {"pinnedVersion": 9}}, "registry": connected([STABLE])},
    ),
    (
        "Accepted",
        "False",
        "VersionNotFound",
        {"spec": {"rollout": {"promotedVersion": 9}}, "registry": connected([STABLE])},
    ),
    ("Accepted", "True", "SpecAccepted", {"spec": {"rollout": {"pinnedVersion": 9}}}),
    (
        "Accepted",
        "True",
        "SpecAccepted",
        {"spec": {"rollout": {"pinnedVersion": "NoDraft"}}, "registry": connected([STABLE])},
    ),
]
SERVING: list[Case] = [
    ("Available", "True", "PodsReady", {"pods": (pod(is_ready=True),)}),
    ("Available", "True", "PodsReady", {"spec": {"serving": {"replicas": 2}}, "pods": (pod(is_ready=True),)}),
    ("FullyScaled", "True", "PodsReady", {"pods": (pod(is_ready=True),)}),
    ("FullyScaled", "False", "ModelLoading", {"spec": {"serving": {"replicas": 2}}, "pods": (pod(is_ready=True),)}),
    (
        "FullyScaled",
        "False",
        "RollingOut",
        {
            "pods": (pod(is_ready=True),),
            "children": workload("Deployment", "serving", {"replicas": 2, "updatedReplicas": 1}),
        },
    ),
    ("Available", "False", "ModelLoading", {}),
    ("Available", "False", "ModelLoading", {"pods": (pod(),)}),
    ("Available", "False", "ModelLoading", {"spec": {"serving": {"replicas": 3}}, "pods": (pod(is_ready=True),)}),
    *(
        (kind, "False", "PodsMissing", {"speculator": speculator(status={"serving": {"reachedReplicas": 1}})})
        for kind in ("Available", "FullyScaled")
    ),
    *((kind, "True", "Suspended", {"spec": {"suspend": True}}) for kind in ("Ready", "Available", "FullyScaled")),
    ("Available", "True", "Suspended", {"spec": {"serving": {"replicas": 0}}}),
    ("Available", "False", "QuotaExceeded", _refused("QuotaExceeded")),
    (
        "Available",
        "False",
        "QuotaExceeded",
        {
            "children": workload(
                "Deployment", "serving", {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "x"}]}
            )
        },
    ),
    *(("Available", "False", reason, {"pods": (pod(problem=(reason, "x")),)}) for reason in TROUBLES),
]
REGISTRY: list[Case] = [
    ("RegistryReady", "True", "Connected", {"registry": connected()}),
    ("RegistryReady", "False", "Starting", {}),
    ("RegistryReady", "False", "NoCertificate", {"config": replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED))}),
    (
        "RegistryReady",
        "False",
        "NoCertificate",
        {"config": replace(CONFIG, tls=Tls(mode=TlsMode.CERT_MANAGER, issuer=Issuer(name="corporate")))},
    ),
    (
        "RegistryReady",
        "False",
        "Unreachable",
        {"registry": RegistryView(connection=ConnectionState.UNREACHABLE, problem="refused")},
    ),
    (
        "RegistryReady",
        "False",
        "Denied",
        {"registry": RegistryView(connection=ConnectionState.DENIED, problem="no token")},
    ),
    ("RegistryReady", "False", "QuotaExceeded", _refused("QuotaExceeded", "StatefulSet", "qwen-registry")),
    *(
        ("RegistryReady", "False", reason, {"pods": (pod("r", "registry", problem=(reason, "x")),)})
        for reason in TROUBLES
        if reason != "ModelDownloadFailed"
    ),
]
TRAINER: list[Case] = [
    ("TrainerReady", "True", "Training", {"pods": (pod("t", "trainer", is_ready=True),)}),
    ("TrainerReady", "False", "Starting", {"pods": (pod("t", "trainer"),)}),
    ("TrainerReady", "False", "Disabled", {"spec": {"traces": {"enabled": False}}}),
    ("TrainerReady", "False", "NoRedis", {"config": CONFIG_WITHOUT_REDIS}),
    *(
        ("TrainerReady", "False", reason, {"users_problem": UsersProblem(reason=reason, message="no")})
        for reason in ("RedisUsersRefused", "RedisUnreachable")
    ),
    ("TrainerReady", "False", "Suspended", {"spec": {"trainer": {"suspend": True}}}),
    ("TrainerReady", "False", "Suspended", {"spec": {"suspend": True}}),
    (
        "TrainerReady",
        "False",
        "QuotaExceeded",
        _refused("QuotaExceeded", "PersistentVolumeClaim", "data-qwen-trainer-0"),
    ),
    *(
        ("TrainerReady", "False", reason, {"pods": (pod("t", "trainer", problem=(reason, "x")),)})
        for reason in TROUBLES
    ),
]
LEARNED = pb.Learning(samples=1_200, held_out=130, steps=500, estimates=20, version_bytes=800_000_000)


def _dedicated_redis(max_memory: str, size: str) -> dict[str, Any]:
    redis = {"mode": "Dedicated", "maxMemory": max_memory, "storage": {"size": size}}
    return {
        "spec": {"traces": {"redis": redis}},
        "config": replace(CONFIG, has_dedicated_redis=True),
        "dedicated_url": "redis://admin:secret@own",
    }


def _learning(
    *versions: pb.Version, volume_bytes: int = 0, max_draft_bytes: int = 2**30, **changed: Any
) -> dict[str, Any]:
    learning = pb.Learning()
    learning.CopyFrom(LEARNED)
    for name, value in changed.items():
        setattr(learning, name, value)
    state: dict[str, Any] = {
        "learning": learning,
        "trainer_message": "not sure yet",
        "volume_bytes": volume_bytes,
        "max_draft_bytes": max_draft_bytes,
    }
    return {"pods": ready_pods(), "registry": connected(versions, **state)}


OWN_REDIS = {"traces": {"redis": {"urlSecretRef": {"name": "mine"}}}}
SIZED: list[Case] = [
    ("Sized", "True", "LargeEnough", _learning()),
    ("Sized", "False", "TooSmall", _learning(too_small="replay has room for 3 requests")),
    ("Sized", "False", "TooSmall", _learning(volume_bytes=2 * 2**30)),
    ("Sized", "False", "TooSmall", _learning(max_draft_bytes=799_999_999)),
    ("Sized", "True", "LargeEnough", _learning(max_draft_bytes=0)),
    ("Sized", "False", "TooSmall", {**_learning(stream_bytes=2 * 10**9), "redis_max_memory": 10**9}),
    ("Sized", "False", "TooSmall", {**_learning(), **_dedicated_redis("6Gi", "10Gi")}),
    ("Sized", "True", "LargeEnough", {**_learning(), **_dedicated_redis("5Gi", "10Gi")}),
    ("Sized", "True", "LargeEnough", {**_learning(stream_bytes=10**9), "redis_max_memory": 10**9}),
    (
        "Sized",
        "True",
        "LargeEnough",
        {**_learning(stream_bytes=2 * 10**9), "redis_max_memory": 10**9, "spec": OWN_REDIS},
    ),
    ("Sized", "False", "TracesDropped", {"registry": connected(learning=LEARNED, capture_too_small="p: queue")}),
    ("Sized", "Unknown", "NotReported", {"pods": ready_pods(), "registry": connected()}),
    ("Sized", "Unknown", "NotReported", {}),
]
ADAPTING: list[Case] = [
    ("Adapting", "True", "Adapting", _learning(STABLE)),
    ("Adapting", "True", "Learning", _learning()),
    ("Adapting", "True", "Learning", _learning(version(3, source=pb.SOURCE_IMPORTED))),
    ("Adapting", "False", "NoSamples", _learning(samples=0, steps=0)),
    ("Adapting", "False", "NoSteps", _learning(steps=0, estimates=0)),
    ("Adapting", "True", "Learning", _learning(steps=0, estimates=1)),  # a draft in closed form takes none
    ("Adapting", "False", "FewSamples", _learning(steps=0, samples=7, samples_to_start=8)),
    ("Adapting", "False", "TooSmall", _learning(STABLE, too_small="replay has room for 3 requests")),
    ("Adapting", "Unknown", "NotReported", {"pods": ready_pods(), "registry": connected()}),
    ("Adapting", "False", "TrainerNotReady", {"registry": connected(learning=LEARNED)}),
    ("Adapting", "False", "RegistryNotReady", {"pods": ready_pods()}),
    (
        "Adapting",
        "False",
        "CaptureUnavailable",
        {"pods": ready_pods(), "registry": connected(capture_problem="qwen-serving-0: the verify hook did not bind")},
    ),
    ("Adapting", "False", "Suspended", {"spec": {"suspend": True}, "pods": ready_pods(), "registry": connected()}),
]
SPECULATION: list[Case] = [
    ("SpeculationEffective", "True", "Effective", {"registry": _serves(2.5)}),
    ("SpeculationEffective", "False", "AcceptanceCollapsed", {"registry": _serves(1.01)}),
    ("SpeculationEffective", "True", "Effective", {"registry": _serves(2.5, speedup=pb.Speedup(low=0.99, high=1.1))}),
    # With n-gram lookup, speculation may be worth it whatever the draft is.
    ("SpeculationEffective", "True", "Effective", {"registry": _serves(1.01, speedup=pb.Speedup(low=1.1, high=1.2))}),
    ("SpeculationEffective", "True", "Effective", {"registry": _serves(None, speedup=pb.Speedup(low=1.1, high=1.2))}),
    ("SpeculationEffective", "False", "SlowerThanNone", {"registry": _serves(2.5, speedup=pb.Speedup(high=0.99))}),
    (
        "SpeculationEffective",
        "False",
        "SlowerThanNone",
        {"registry": _serves(None, speedup=pb.Speedup(high=0.99))},  # with speculation off, few steps are counted
    ),
    ("SpeculationEffective", "Unknown", "TooFewSamples", {"registry": _serves(2.5, steps=199)}),
    ("SpeculationEffective", "Unknown", "TooFewSamples", {"registry": _serves(None)}),
    ("SpeculationEffective", "Unknown", "NoDraft", {}),
    ("SpeculationEffective", "Unknown", "NoDraft", {"registry": connected([version(1, pb.PHASE_PENDING)])}),
    (
        "SpeculationEffective",
        "False",
        "DraftNotLoaded",
        {"registry": _serves(2.5, pods=pb.Pods(connected=3, serving_stable=2))},
    ),
    ("SpeculationEffective", "False", "SpeculationDisabled", {"spec": {"draft": {"speculation": "Disabled"}}}),
    ("SpeculationEffective", "Unknown", "Suspended", {"spec": {"suspend": True}, "registry": _serves(2.5)}),
]
PROGRESSING: list[Case] = [
    ("Progressing", "Unknown", "NoVersion", {}),
    ("Progressing", "Unknown", "NoVersion", {"registry": connected()}),
    ("Progressing", "True", "Complete", {"registry": connected([STABLE])}),
    ("Progressing", "True", "Canary", {"registry": _canary("version 4 is in canary")}),
    ("Progressing", "True", "Waiting", {"registry": connected([STABLE, WAITING])}),
    (
        "Progressing",
        "False",
        "Waiting",
        {"spec": {"rollout": {"strategy": "Manual"}}, "registry": connected([STABLE, WAITING])},
    ),
    ("Progressing", "False", "Paused", {"spec": {"rollout": {"paused": True}}, "registry": _canary("paused")}),
    (
        "Progressing",
        "False",
        "Pinned",
        {"spec": {"rollout": {"pinnedVersion": 3}}, "registry": connected([STABLE], pinned=3)},
    ),
    ("Progressing", "False", "Inconclusive", {"registry": _canary("no verdict within 900 s: promote or reject it")}),
    (
        "Progressing",
        "False",
        "CanaryFailed",
        {"registry": _canary("it failed, and automatic rollback is off: promote or reject it")},
    ),
]
READY: list[Case] = [("Ready", "True", "Ready", {"pods": ready_pods(), "registry": connected()})]
CASES = [*READY, *ACCEPTED, *SERVING, *REGISTRY, *TRAINER, *SIZED, *ADAPTING, *SPECULATION, *PROGRESSING]


def _verdicts(spec: dict[str, Any] | None = None, **more: Any) -> dict[str, Assessment]:
    return conditions(observed(spec, **more))


@pytest.mark.parametrize(
    ("kind", "status", "reason", "world"),
    [pytest.param(*case, id=f"{number}-{case[0]}-{case[2]}") for number, case in enumerate(CASES)],
)
def test_every_reason_has_a_world(kind: str, status: str, reason: str, world: dict[str, Any]) -> None:
    verdict = _verdicts(**world)[kind]
    assert (verdict.status, verdict.reason) == (status, reason)
    assert verdict.message


def test_every_reason_that_is_given_is_explained_to_people() -> None:
    given = {(kind, verdict.reason) for *_, world in CASES for kind, verdict in _verdicts(**world).items()}
    explained = {(kind, reason) for kind, reasons in CONDITION_HELP.items() for reason in reasons}
    copies = ("Ready", "Reconciling", "Stalled")
    assert {pair for pair in given if pair[0] not in copies} - explained == set()


_SOMETIMES = ("Reconciling", "AcceleratorInUse", "PasswordsRotated")
"""Conditions that exist only while traces move, for a spec with accelerators, or after a request."""


def test_conditions_come_in_the_order_in_which_a_person_asks() -> None:
    own = [kind for kind in CONDITION_HELP if kind not in _SOMETIMES]
    runtime = true("UpToDate", "")
    assert list(conditions(observed(), runtime)) == [kind for kind in own if kind != "Attached"]
    assert list(conditions(observed(ATTACHED), runtime)) == own


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        pytest.param({**_refused("NameConflict")}, "NameConflict", id="the spec first"),
        pytest.param({"registry": connected()}, "ModelLoading", id="then serving"),
    ],
)
def test_ready_has_the_reason_of_the_first_that_is_not(world: dict[str, Any], reason: str) -> None:
    ready = _verdicts(**world)["Ready"]
    assert (ready.status, ready.reason) == ("False", reason)


def test_neither_trainer_nor_draft_makes_a_resource_unready() -> None:
    assert _verdicts(pods=(pod(is_ready=True),), registry=connected())["Ready"].status == "True"


@pytest.mark.parametrize("connection", ConnectionState)
def test_the_absence_of_a_registry_is_no_outage_of_clients(connection: ConnectionState) -> None:
    verdicts = _verdicts(pods=(pod(is_ready=True),), registry=RegistryView(connection=connection))
    assert {verdicts[kind].status for kind in ("Ready", "Available", "FullyScaled")} == {"True"}


def _scaled(
    num_ready: int, replicas: int = 100, *, reached: int | None = None, **serving: Any
) -> dict[str, Assessment]:
    """With so many pods ready of so many, after `reached` were."""
    spec = {"serving": {"replicas": replicas, **serving}}
    before = {} if reached is None else {"serving": {"reachedReplicas": reached}}
    pods = tuple(pod(f"qwen-serving-{number}", is_ready=number < num_ready) for number in range(replicas))
    return _verdicts(speculator=speculator(spec, status=before), pods=pods)


@pytest.mark.parametrize(
    ("num_ready", "replicas", "budget", "is_available"),
    [
        (98, 100, None, True),
        (90, 100, None, True),
        (89, 100, None, False),
        (1, 2, None, True),
        (0, 1, None, False),
        (10, 11, None, True),
        (8, 11, None, False),
        (95, 100, 5, True),
        (94, 100, 5, False),
        (99, 100, 0, True),
        (98, 100, 0, False),
        (1, 100, "100%", True),
    ],
)
def test_as_many_pods_may_be_missing_as_the_disruption_budget_allows_and_always_one(
    num_ready: int, replicas: int, budget: Any, is_available: object
) -> None:
    chosen = {} if budget is None else {"disruptionBudget": {"maxUnavailable": budget}}
    verdicts = _scaled(num_ready, replicas, reached=replicas, **chosen)
    assert (verdicts["Available"].status == "True") == is_available
    assert verdicts["FullyScaled"].status == "False"


def test_a_scale_up_makes_nothing_unavailable_and_is_progress() -> None:
    verdicts = _scaled(2, 100, reached=2)
    assert verdicts["Available"].status == "True"
    assert verdicts["Reconciling"].reason == "ModelLoading"


def test_pods_that_are_lost_after_all_were_ready_are_no_progress() -> None:
    assert "Reconciling" not in _scaled(98, 100, reached=100)
    assert "Reconciling" in _scaled(98, 100)


def test_a_scale_down_needs_no_more_than_it_asks_for() -> None:
    verdicts = _scaled(4, 4, reached=100)
    assert {verdicts[kind].status for kind in ("Available", "FullyScaled")} == {"True"}


def test_a_change_that_the_deployment_has_not_seen_is_rolled_out() -> None:
    from dataclasses import replace

    told = workload("Deployment", "serving", {"replicas": 1, "updatedReplicas": 1, "observedGeneration": 4})
    changed = {ref: replace(child, generation=5) for ref, child in told.items()}
    assert _verdicts(pods=(pod(is_ready=True),), children=told)["FullyScaled"].status == "True"
    assert _verdicts(pods=(pod(is_ready=True),), children=changed)["Reconciling"].reason == "RollingOut"


@pytest.mark.parametrize(
    "reason", ["NameConflict", "InvalidPodTemplate", "GPUMismatch", "KeyInArguments", "Forbidden", "InvalidRollout"]
)
def test_what_only_a_person_can_change_stalls_a_resource(reason: str) -> None:
    assert _verdicts(**_refused(reason))["Stalled"].message == "said the API server"


def test_what_may_come_by_itself_does_not_stall_a_resource() -> None:
    for world in ({"missing_secrets": (MissingSecret("hub"),)}, _refused("QuotaExceeded"), {"pods": (pod(),)}):
        assert "Stalled" not in _verdicts(**world)


def test_pods_of_a_changed_template_may_be_in_trouble_while_the_old_ones_serve() -> None:
    pods = (pod("old", is_ready=True), pod("new", problem=("ImagePullBackOff", "no such image")))
    children = workload("Deployment", "serving", {"replicas": 2, "updatedReplicas": 1})
    verdicts = _verdicts(pods=pods, children=children, registry=connected())
    assert verdicts["Ready"].status == "True"
    assert verdicts["FullyScaled"].status == "False"
    assert verdicts["Reconciling"].message.endswith("new: ImagePullBackOff: no such image")


def test_a_pod_that_goes_counts_for_nothing() -> None:
    pods = (pod("a", is_ready=True, is_ending=True), pod("b", is_ready=True))
    verdict = _verdicts({"serving": {"replicas": 3}}, pods=pods)["Available"]
    assert verdict.message == "1 of 3 pods are ready; the others are starting"


def test_the_message_names_the_pod_and_its_trouble() -> None:
    message = _verdicts(pods=(pod("qwen-serving-x", problem=("OOMKilled", "too much")),))["Available"].message
    assert message == "0 of 1 pods are ready; qwen-serving-x: too much"


def test_the_wish_of_an_autoscaler_counts_for_readiness() -> None:
    from dataclasses import replace

    scaled = {
        ref: replace(child, is_scaled_by_others=True)
        for ref, child in workload("Deployment", "serving", {}, replicas=5).items()
    }
    assert _verdicts(children=scaled)["Available"].message.startswith("0 of 5")


def test_an_old_promotion_of_a_version_that_is_gone_is_no_mistake() -> None:
    verdict = _verdicts({"rollout": {"promotedVersion": 2}}, registry=connected([STABLE]))["Accepted"]
    assert verdict.status == "True"


def test_a_version_that_is_not_there_is_told_with_those_that_are() -> None:
    message = _verdicts({"rollout": {"pinnedVersion": 9}}, registry=connected([STABLE, TRIED]))["Accepted"].message
    assert message == "spec.rollout.pinnedVersion is 9, but the registry has no such version: it has 3, 4"


def test_a_registry_with_one_ready_pod_is_not_in_trouble_over_another() -> None:
    pods = (pod("a", "registry", problem=("OOMKilled", "x")), pod("b", "registry", is_ready=True))
    assert _verdicts(pods=pods)["RegistryReady"].reason == "Starting"


def _told(*conditions: tuple[str, str, str]) -> dict[str, Any]:
    return {"speculator": speculator(status=_status(*conditions))}


def _status(*conditions: tuple[str, str, str]) -> dict[str, Any]:
    """As it was an hour ago."""
    written = [
        {"type": kind, "status": status, "reason": reason, "message": "x", "lastTransitionTime": "2026-11-25T11:00:00Z"}
        for kind, status, reason in conditions
    ]
    return {"conditions": written}


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("RegistryReady", "True", "Connected"),
        ("SpeculationEffective", "True", "Effective"),
        ("Progressing", "True", "Canary"),
        ("Sized", "False", "TooSmall"),
    ],
)
def test_what_a_registry_said_stands_until_it_has_answered_a_new_operator(kind: str, status: str, reason: str) -> None:
    world = _told((kind, status, reason))
    verdict = _verdicts(**world, registry=RegistryView(connection=ConnectionState.CONNECTING))[kind]
    assert (verdict.status, verdict.reason) == (status, reason)


def test_a_registry_that_does_not_answer_any_more_is_not_ready_whatever_was_said() -> None:
    world = _told(("RegistryReady", "True", "Connected"), ("SpeculationEffective", "Unknown", "Suspended"))
    verdicts = _verdicts(**world, registry=RegistryView(connection=ConnectionState.UNREACHABLE))
    assert verdicts["RegistryReady"].reason == "Unreachable"
    assert verdicts["SpeculationEffective"].reason == "NoDraft"


@pytest.mark.parametrize("reason", ["VersionNotFound", "VersionUnusable"])
def test_a_version_that_is_no_good_stays_so_until_the_registry_says_otherwise(reason: str) -> None:
    owner = speculator({"rollout": {"pinnedVersion": 9}}, status=_status(("Accepted", "False", reason)))
    assert _verdicts(speculator=owner)["Accepted"].reason == reason
    assert _verdicts(**_told(("Accepted", "False", reason)))["Accepted"].status == "True"


def test_a_registry_that_is_asked_for_the_first_time_starts() -> None:
    assert _verdicts(registry=RegistryView(connection=ConnectionState.CONNECTING))["RegistryReady"].reason == "Starting"


@pytest.mark.parametrize("length", [None, 1.01, 2.5])
def test_that_speculation_is_effective_is_said_in_words_that_hold_for_drafts_and_for_lookup(
    length: float | None,
) -> None:
    for speedup in (None, pb.Speedup(low=0.99, high=1.1), pb.Speedup(low=1.1, high=1.2)):
        verdict = _verdicts(registry=_serves(length, speedup=speedup))["SpeculationEffective"]
        is_faster = speedup is not None and speedup.low > 1.0
        is_effective = verdict.message == "speculation saves decoding steps on this traffic"
        assert is_effective == (verdict.reason == "Effective") == (is_faster or length == 2.5)


def test_a_long_message_is_cut() -> None:
    long = status(observed(pods=(pod(problem=("OOMKilled", "x" * 9999)),)), NOW).conditions
    assert [len(condition.message) for condition in long if condition.type == "Available"] == [2000]


def test_adapting_is_evidence_and_never_that_a_pod_is_ready() -> None:
    assert _verdicts(pods=ready_pods(), registry=connected([STABLE]))["Adapting"].status == "Unknown"
    assert _verdicts(**_learning(STABLE))["Adapting"].message == (
        "version 3 is the last one that was published: not sure yet; 1,200 requests to train on and 130 held-out ones,"
        " 500 steps, 20 estimates since the trainer started"
    )
    recent = _verdicts(**_learning(STABLE, last_step_unix_ms=1_795_867_200_000))["Adapting"].message
    assert recent.endswith("since the trainer started, the last step at 2026-11-28 12:00 UTC")
    assert _verdicts(**_learning())["Adapting"].message.startswith(
        "nothing was published yet: not sure yet; 1,200 requests"
    )


def test_a_registry_that_cannot_store_the_versions_in_use_is_too_small_before_the_first_is_published() -> None:
    verdict = _verdicts(**_learning(volume_bytes=2 * 2**30))["Sized"]
    assert verdict.message == (
        "the registry's volume has 2.15 GB, but the stable version, the one before it, a canary, an upload of 800 MB each need"
        " 3.20 GB: expand the claim itself to at least 10Gi, because spec.registry.storage cannot change"
    )


def test_a_registry_that_accepts_no_version_of_this_size_is_too_small_before_the_first_is_published() -> None:
    verdict = _verdicts(**_learning(max_draft_bytes=512 * 10**6))["Sized"]
    assert verdict.message == (
        "a version has 800 MB, but the registry accepts at most 512 MB: set UPDRAFT_REGISTRY_MAX_DRAFT_BYTES to at least"
        " 800000000 in spec.registry.env"
    )


@pytest.mark.parametrize("volume_bytes", [0, 10 * 2**30], ids=["a bucket", "an expanded claim"])
def test_a_registry_has_the_room_that_it_sees_whatever_the_spec_says(volume_bytes: int) -> None:
    spec = {"registry": {"storage": {"size": "2Gi"}}}
    assert _verdicts(spec=spec, **_learning(volume_bytes=volume_bytes))["Sized"].status == "True"


def test_an_operator_that_has_just_started_keeps_what_the_trainer_had_done() -> None:
    world = {**_told(("Adapting", "True", "Adapting"), ("RegistryReady", "True", "Connected")), "pods": ready_pods()}
    verdict = _verdicts(**world, registry=RegistryView(connection=ConnectionState.CONNECTING))["Adapting"]
    assert (verdict.status, verdict.reason) == ("True", "Adapting")


def test_what_keeps_cert_manager_from_signing_is_told() -> None:
    tls = Tls(mode=TlsMode.CERT_MANAGER, issuer=Issuer(name="corporate"))
    denied = {"conditions": [{"type": "Ready", "status": "False", "message": "Issuer corporate not found"}]}
    request = workload("Certificate", "registry-tls", denied)
    seen = observed(config=replace(CONFIG, tls=tls), children=request)
    assert conditions(seen)["RegistryReady"].message == (
        "cert-manager has not signed Certificate qwen-registry-tls: Issuer corporate not found"
    )
