"""An operator through an API server that misbehaves, killed at random moments, while everything around it changes: resources
with trainers of one and several pods, their objects and pods, and drafts in their registries, which are one real process.

Then the faults end, and what is there has to become what it is without any: what the plan says, and what an operator
beside it makes of the same resources in a namespace of its own. Nothing may be left of what was deleted.
"""

import math
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from tests.cluster.access import Api, ApiError, Json
from tests.cluster.control_plane import ISSUER, ControlPlane
from tests.cluster.operator import agreement, requests
from tests.cluster.operator.accounts import Account, account
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject, running
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.operator import OperatorProcess
from tests.support.registry import Registry, RegistryProcess
from tests.support.wait import wait_until

from updraft_operator.api import names
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.settings import OperatorSettings
from updraft_operator.watching.cluster import KINDS

SUBJECTS = ("one", "two", "three", "four", "five", "six")
_STAYS, _GOES = SUBJECTS[0], SUBJECTS[-1]
"""Of these two it is certain how they end."""

CONVERGED_S = 60.0
_CHANGE_S = 0.15
LIVES_S = (8.0, 15.0, 25.0)
"""Most that a life takes, from its start or, every other time, from when it has seen everything; it may have to wait for
the Lease.
"""

_LEAST_LIFE_S = 5.0
_LEAST_KILLS = 2
_PATIENCE_S = 120.0
_ONCE_READY = math.inf
"""A life that is not counted yet."""

_RESYNC_S = 5
_LEASE_S = 3
_LOOKS = 2
"""Of both operators, between which nothing may be written."""

EDITS: tuple[tuple[str, str, Json], ...] = (
    ("Deployment", "-serving", {"spec": {"replicas": 7}}),
    ("Deployment", "-serving", {"spec": {"template": {"spec": {"enableServiceLinks": True}}}}),
    ("Deployment", "-trainer", {"spec": {"replicas": 5}}),
    ("StatefulSet", "-registry", {"spec": {"replicas": 0}}),
    ("StatefulSet", "-trainer", {"spec": {"replicas": 0}}),
    ("StatefulSet", "-trainer", {"spec": {"template": {"spec": {"enableServiceLinks": True}}}}),
    ("Service", "", {"spec": {"selector": {names.COMPONENT: "elsewhere"}}}),
    ("Service", "-registry", {"metadata": {"labels": {names.SPECULATOR: None}}}),
    ("ConfigMap", "-serving", {"data": {"UPDRAFT_INFERENCE_PORT": "1"}}),
    ("ConfigMap", "-serving", {"metadata": {"annotations": {names.APPLIED: None}}}),
    ("ConfigMap", "-trainer", {"data": {"UPDRAFT_TRAINER_SPECULATOR": None}}),
    ("ConfigMap", "-registry", {"data": None}),
    ("ConfigMap", "-registry", {"metadata": {"labels": {names.COMPONENT: "stolen"}}}),
    ("ServiceAccount", "", {"automountServiceAccountToken": True}),
    ("ServiceAccount", "-serving", {"automountServiceAccountToken": True}),
    ("Secret", "-redis-writer", {"data": {"url": None}}),
    ("Secret", "-redis-reader", {"data": {"url": "bm8gYWRkcmVzcw=="}}),
    ("PodDisruptionBudget", "-serving", {"spec": {"maxUnavailable": 9}}),
    ("NetworkPolicy", "-serving", {"metadata": {"labels": {names.MANAGED_BY: None}}}),
    ("NetworkPolicy", "-trainer", {"spec": {"ingress": []}}),
)
"""By kind and end of name, of what is ours, with values that no spec here says: what others add stays, and a value that
they said too is theirs as well. No owner reference is taken away: what has none is not deleted with its owner. The label
that the operator lists by goes only from what every spec wants: nobody finds what has lost it and is wanted no longer.
"""

_DELETED = sorted({(kind, end) for kind, end, _ in EDITS} | {("PersistentVolumeClaim", "-trainer-0")})


@dataclass(slots=True)
class StormOutcome:
    """What happened. The last four are what must not be."""

    changes: Counter[str] = field(default_factory=Counter)
    """By what was done."""
    faults: Counter[str] = field(default_factory=Counter)
    """What the proxy did, by name."""
    kills: int = 0
    num_compared: int = 0
    """Objects that were compared at the end."""
    converged_s: float | None = None
    """From the end of the faults; None: not at all."""
    different: list[str] = field(default_factory=list)
    """What is not as it should be, or is left of what was deleted."""
    ended: list[str] = field(default_factory=list)
    """Last words of operators that ended and were not killed."""
    denied: list[str] = field(default_factory=list)
    """What its rights did not allow."""
    writes: list[str] = field(default_factory=list)
    """What was written when all was as it should be."""


class FaultStorm:
    """The operator under test, and what happens around it."""

    def __init__(
        self, api: Api, namespace: str, reference: str, process: OperatorProcess, registry: Registry, seed: int
    ) -> None:
        self._api = api
        self._shelves = {name: Shelf(registry, name) for name in SUBJECTS}
        self._namespace = namespace
        self._reference = reference
        self._process = process
        self._rng = random.Random(seed)
        self._subjects = {name: Subject(api, namespace, name) for name in SUBJECTS}
        self._actions: dict[Callable[[Subject], None], float] = {
            self._create: 6.0,
            self._change: 6.0,
            self._delete: 1.5,
            self._edit_child: 6.0,
            self._delete_child: 3.0,
            self._delete_pod: 2.0,
            self._tell_pod: 6.0,
            self._publish: 1.5,
        }
        self.outcome = StormOutcome()

    def rage(self, seconds: float, lives_s: Sequence[float]) -> None:
        """Change things, and kill the operator now and then; on a slow machine longer, until all of it was done."""
        end_s = time.monotonic() + seconds
        is_down, turn_s = False, _ONCE_READY
        while time.monotonic() < end_s or (time.monotonic() < end_s + _PATIENCE_S and not self._did_all()):
            self._do_something()
            if not is_down:
                self.look_alive()
            if turn_s == _ONCE_READY and self._process.status("/readyz") == 200:
                turn_s = time.monotonic() + self._life_s(lives_s)
            elif time.monotonic() > turn_s:
                is_down = not is_down
                if is_down:
                    self._process.kill()
                    self.outcome.kills += 1
                    turn_s = time.monotonic() + self._rng.uniform(0.0, 2.0)
                else:
                    self._start()
                    is_hasty = self._rng.random() < 0.5
                    turn_s = time.monotonic() + self._life_s(lives_s) if is_hasty else _ONCE_READY
            time.sleep(self._rng.expovariate(1.0 / _CHANGE_S))
        if is_down:
            self._start()

    def look_alive(self) -> None:
        """Note an end that nobody asked for, and start again."""
        if not self._process.is_running:
            self.outcome.ended.append(self._process.log()[-3000:])
            self._process.start()

    def _life_s(self, lives_s: Sequence[float]) -> float:
        return self._rng.uniform(_LEAST_LIFE_S, self._rng.choice(lives_s))

    def _start(self) -> None:
        """As itself, which still has the Lease, or as another pod, which has to wait for it."""
        if self._rng.random() < 0.5:
            identity = {"UPDRAFT_OPERATOR_IDENTITY": f"operator-{self.outcome.kills}"}
            self._process.variables = {**self._process.variables, **identity}
        self._process.start()

    def _do_something(self) -> None:
        """One thing to one resource; what cannot be done just now is not done."""
        (action,) = self._rng.choices([*self._actions], [*self._actions.values()])
        try:
            action(self._subjects[self._rng.choice(SUBJECTS)])
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            self.outcome.changes["impossible"] += 1
        else:
            self.outcome.changes[_name(action)] += 1

    def _did_all(self) -> bool:
        return self.outcome.kills >= _LEAST_KILLS and all(self.outcome.changes[_name(each)] for each in self._actions)

    def _create(self, subject: Subject) -> None:
        subject.create(**wish(self._rng))

    def _change(self, subject: Subject) -> None:
        subject.change(**wish(self._rng))

    def _delete(self, subject: Subject) -> None:
        subject.delete()

    def _edit_child(self, subject: Subject) -> None:
        kind, end, edit = self._rng.choice(EDITS)
        self._api.patch(subject.path(kind, subject.name + end), edit)

    def _delete_child(self, subject: Subject) -> None:
        kind, end = self._rng.choice(_DELETED)
        name = names.claim(subject.name + end) if kind == "PersistentVolumeClaim" else subject.name + end
        self._api.delete(subject.path(kind, name), propagationPolicy="Background")

    def _delete_pod(self, subject: Subject) -> None:
        for pod in self._some_pod(subject):
            self._api.delete(subject.path("Pod", pod["metadata"]["name"]))

    def _tell_pod(self, subject: Subject) -> None:
        """It gets ready, or its image cannot be had."""
        for pod in self._some_pod(subject):
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
            broken = running(pod)
            broken["conditions"][0]["status"] = "False"
            containers = [{**each, "ready": False, "state": waiting} for each in broken["containerStatuses"]]
            status = self._rng.choice((running(pod), {**broken, "containerStatuses": containers}))
            subject.set_pod(pod["metadata"]["name"], status)

    def _publish(self, subject: Subject) -> None:
        """Its trainer has another draft, whether the operator sees the registry now or not."""
        shelf = self._shelves[subject.name]
        shelf.publish(max(shelf.versions(), default=0) + 1)

    def _some_pod(self, subject: Subject) -> list[Json]:
        pods = subject.pods(self._rng.choice((names.SERVING, names.TRAINER, names.REGISTRY)))
        return [self._rng.choice(pods)] if pods else []

    def settle(self) -> None:
        """The last change: one resource is there and one is not, and all pods are new."""
        with _unless_it_is_so():
            self._create(self._subjects[_STAYS])
        with _unless_it_is_so():
            self._delete(self._subjects[_GOES])
        self._api.delete(KINDS["Pod"].path(self._namespace), labelSelector=names.SPECULATOR)

    def look(self, around: OperatorConfig) -> list[str]:
        """Go on with what others than the operator do, and return all that is not as it should be."""
        self._copy()
        self._run_pods()
        owners, copies = (agreement.speculators(self._api, each) for each in (self._namespace, self._reference))
        reference = agreement.made(self._api, self._reference, SUBJECTS)
        live = agreement.without_what_is_kept(agreement.made(self._api, self._namespace, SUBJECTS), owners, reference)
        self.outcome.num_compared = len(live)
        pods = [str(each["metadata"]["name"]) for each in Subject(self._api, self._namespace, "any").all_of("Pod")]
        return [
            *(f"{name} is still there" for name in owners.keys() - copies.keys()),
            *(f"the pod {name} is left" for name in pods if name.partition("-")[0] not in owners),
            *(f"{'/'.join(where)} is still to be collected" for where in agreement.uncollected(live, owners)),
            *agreement.against_plan(owners, live, around, self._drafts()),
            *agreement.against_reference(live, reference),
            *agreement.of_status(owners, copies),
        ]

    def _drafts(self) -> set[str]:
        """Names of the DraftVersions of what the registry keeps."""
        kept = {name: shelf.versions() for name, shelf in self._shelves.items()}
        return {names.draft_version(name, number) for name, versions in kept.items() for number in versions}

    def _copy(self) -> None:
        """The same resources in the reference's namespace."""
        ours, theirs = (agreement.speculators(self._api, each) for each in (self._namespace, self._reference))
        for name in ours.keys() - theirs.keys():
            if "deletionTimestamp" not in ours[name]["metadata"]:
                copied = {key: ours[name][key] for key in ("apiVersion", "kind", "spec")}
                body = {**copied, "metadata": {"name": name}}
                self._api.create(KINDS["AdaptiveSpeculator"].path(self._reference), body)

    def _run_pods(self) -> None:
        """Let all pods be ready, in both namespaces."""
        for namespace in (self._namespace, self._reference):
            subject = Subject(self._api, namespace, "any")
            for pod in subject.all_of("Pod"):
                conditions = pod["status"].get("conditions", ())
                is_ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
                if not is_ready and "deletionTimestamp" not in pod["metadata"]:
                    with _unless_it_is_so():
                        subject.set_pod(pod["metadata"]["name"], running(pod))


def _name(action: Callable[[Subject], None]) -> str:
    return action.__name__.strip("_").replace("_", " ")


@contextmanager
def _unless_it_is_so() -> Iterator[None]:
    """What is there already, or gone already, is no error."""
    try:
        yield
    except ApiError as error:
        if error.code not in (404, 409):
            raise


def wish(rng: random.Random) -> dict[str, Any]:
    """A spec, or what is to be changed in one."""
    return {
        "suspend": rng.random() < 0.15,
        "deletionPolicy": rng.choice(("Retain", "Delete")),
        "engine": {"type": rng.choice(("Torch", "Torch", "SGLang")), "image": rng.choice((None, "mine:1", "mine:2"))},
        "draft": {"lookahead": rng.randrange(1, 6)},
        "serving": {
            "replicas": rng.randrange(4),
            "env": rng.choice(([], [{"name": "HF_HUB_OFFLINE", "value": "1"}])),
            "podTemplate": rng.choice((None, {"spec": {"hostname": "x"}}, {"spec": {"nodeSelector": {"disk": "ssd"}}})),
        },
        "trainer": {
            "nodes": rng.choice((1, 1, 2, 3)),
            "suspend": rng.random() < 0.2,
            "podTemplate": rng.choice((None, {"metadata": {"annotations": {"team": "ours"}}})),
        },
        # As many streams as there may be ranks: without a number, it follows from the past.
        "traces": {"enabled": rng.random() < 0.8, "payloadPercent": rng.randrange(101), "shards": 3},
        "registry": {"image": rng.choice((None, "mine:1"))},
        "rollout": {"paused": rng.random() < 0.3, "strategy": rng.choice(("Canary", "Immediate", "Manual"))},
    }


def storm(
    cluster: ControlPlane,
    folder: Path,
    redis_url: str,
    *,
    seconds: float,
    seed: int,
    lives_s: Sequence[float] = LIVES_S,
    converged_s: float = CONVERGED_S,
) -> StormOutcome:
    """Let it rage for so long, then wait until all is well, for `converged_s` at most; return what was seen."""
    with (
        cluster.api() as api,
        _namespaces(api) as (home, namespace, reference),
        RegistryProcess(folder, settle_seconds=0) as registry,
    ):
        who = account(cluster, api, folder, home, "operator", watched=(namespace, reference))
        chosen: dict[str, object] = {
            "namespace": home,
            "redis_url": redis_url,
            "registry_address": registry.address,
            "resync_seconds": _RESYNC_S,
        }
        settings = OperatorSettings(namespace=home, redis_url=SecretStr(redis_url))
        installation = api.get(f"/api/v1/namespaces/{home}")["metadata"]["uid"]
        around = replace(settings.config, issuer=ISSUER, installation=installation)
        with FaultProxy(cluster.kubeconfig, Faults(), seed) as proxy:
            tossed = {**chosen, "watch_namespaces": namespace, "identity": "operator", "lease_seconds": _LEASE_S}
            process = OperatorProcess(proxy.kubeconfig(who.kubeconfig, folder), folder / "operator.log", **tossed)
            calm = {**chosen, "watch_namespaces": reference, "leader_election": "false"}
            theirs = OperatorProcess(who.kubeconfig, folder / "reference.log", **calm)
            with process:
                raging = FaultStorm(api, namespace, reference, process, registry, seed)
                raging.rage(seconds, lives_s)
                with theirs:
                    theirs.wait_until_ready()
                    raging.settle()
                    proxy.calm()
                    _converge(raging, around, converged_s)
                    _rest(raging.outcome, cluster, who)
                raging.look_alive()
            raging.outcome.faults = proxy.done
        return raging.outcome


@contextmanager
def _namespaces(api: Api) -> Iterator[tuple[str, ...]]:
    """The operators' own, that of the storm, and the reference's."""
    made = tuple(f"{what}-{secrets.token_hex(3)}" for what in ("home", "storm", "reference"))
    for name in made:
        api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield made
    for name in made:
        api.delete(f"/api/v1/namespaces/{name}")


def _converge(raging: FaultStorm, around: OperatorConfig, timeout_s: float) -> None:
    outcome, since_s = raging.outcome, time.monotonic()

    def is_well() -> bool:
        raging.look_alive()
        outcome.different = raging.look(around)
        return not outcome.different

    with suppress(TimeoutError):  # what is different is told
        wait_until(is_well, timeout_s=timeout_s)
        outcome.converged_s = time.monotonic() - since_s


def _rest(outcome: StormOutcome, cluster: ControlPlane, who: Account) -> None:
    """Nothing is written any more, in either namespace, and nothing was ever forbidden."""
    since = requests.now()
    wait_until(lambda: requests.num_listings(cluster, who.user, since) >= 2 * _LOOKS, what="listings of everything")
    written = requests.writes(cluster, who.user, since)
    outcome.writes = [f"{each.verb} {each.resource} {each.namespace}/{each.name} {each.code}" for each in written]
    outcome.denied = requests.denied(cluster, who.user)
