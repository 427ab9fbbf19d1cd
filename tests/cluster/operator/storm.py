"""Random changes to a few speculators and their objects, while faults are thrown and the operator is killed.

In the end each speculator has a spec that follows from the seed alone; what is made of it must be what a calm operator
makes of the same specs in another namespace.
"""

import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.access import Api, ApiError, Json
from tests.cluster.operator.subject import Subject
from tests.support.operator import OperatorProcess
from tests.support.wait import wait_until

from updraft_operator.api import names

NUM_SUBJECTS = 4
_OF_A_NAMESPACE = {f"f:{names.APPLIED}", f"f:{names.SETTINGS}"}
"""Hashes of what has the namespace or an identity in it."""

_EDITS: list[tuple[str, str, Json]] = [
    ("Deployment", "-serving", {"spec": {"replicas": 9}}),
    ("Service", "", {"spec": {"selector": {"somebody": "else"}}}),
    ("ConfigMap", "-registry", {"data": {"UPDRAFT_REGISTRY_PORT": "1"}}),
]
"""What somebody does to an object: its kind, the end of its name, and what is merged into it."""


@dataclass(slots=True)
class Storm:
    """What happens in one namespace."""

    api: Api
    namespace: str
    seed: int
    specs: dict[str, Json] = field(default_factory=dict)
    """What is wished in the end, by name; who is not in it was deleted last."""
    num_changes: int = 0
    num_kills: int = 0

    def rage(self, seconds: float, process: OperatorProcess, *, kill_s: float, pause_s: float = 0.3) -> None:
        """Change something again and again, and kill the operator now and then."""
        drawn = random.Random(self.seed)
        until_s, kill_at_s = time.monotonic() + seconds, time.monotonic() + drawn.uniform(0, 2 * kill_s)
        while time.monotonic() < until_s:
            self._change(drawn)
            if time.monotonic() > kill_at_s and process.status("/readyz") == 200:
                process.kill()
                self.num_kills += 1
                kill_at_s = time.monotonic() + drawn.uniform(0, 2 * kill_s)
            tend(process)
            time.sleep(drawn.uniform(0, 2 * pause_s))

    def subject(self, name: str) -> Subject:
        return Subject(self.api, self.namespace, name)

    def _change(self, drawn: random.Random) -> None:
        name = f"storm-{drawn.randrange(NUM_SUBJECTS)}"
        act = drawn.choices([self._edit_spec, self._edit_child, self._delete_child, self._end], [6, 3, 3, 1])[0]
        if name not in self.specs:
            act = self._begin
        try:
            act(self.subject(name), drawn)
            self.num_changes += 1
        except ApiError as error:
            if error.code not in (404, 409):  # what is to be changed is not there (yet), or still there
                raise

    def _begin(self, subject: Subject, drawn: random.Random) -> None:
        subject.create()
        self.specs[subject.name] = {}

    def _edit_spec(self, subject: Subject, drawn: random.Random) -> None:
        said: Json = drawn.choice(
            [
                {"serving": {"image": f"image:{drawn.randrange(9)}"}},
                {"serving": {"replicas": drawn.randrange(1, 5)}},
                {"suspend": bool(drawn.randrange(2))},
                {"traces": {"enabled": bool(drawn.randrange(2))}},
                {"deletionPolicy": drawn.choice(["Retain", "Delete"])},
            ]
        )
        subject.change(**said)
        _merge(self.specs[subject.name], said)

    def _edit_child(self, subject: Subject, drawn: random.Random) -> None:
        kind, end, edit = drawn.choice(_EDITS)
        subject.api.patch(subject.path(kind, subject.name + end), edit)

    def _delete_child(self, subject: Subject, drawn: random.Random) -> None:
        kind, end = drawn.choice([("Deployment", "-serving"), ("Service", "-registry"), ("NetworkPolicy", "-serving")])
        subject.api.delete(subject.path(kind, subject.name + end))

    def _end(self, subject: Subject, drawn: random.Random) -> None:
        subject.delete()
        del self.specs[subject.name]


def tend(process: OperatorProcess) -> None:
    """Start it again if it ended, as a kubelet does."""
    if not process.is_running:
        process.start()


def calm(api: Api, namespace: str, specs: dict[str, Json]) -> Storm:
    """The same wishes in another namespace, all at once."""
    there = Storm(api=api, namespace=namespace, seed=0, specs=specs)
    for name, spec in specs.items():
        there.subject(name).create(**spec)
    return there


def outcome(storm: Storm) -> dict[str, Any]:
    """All that the operator made, without what is another one in each namespace."""
    found: dict[str, Any] = {}
    for name in sorted(f"storm-{number}" for number in range(NUM_SUBJECTS)):
        subject = storm.subject(name)
        owner = subject.find("AdaptiveSpeculator")
        if owner is None:
            found[name] = sorted(subject.objects())
            continue
        told = {kind: [each["status"], each["reason"]] for kind, each in sorted(subject.conditions().items())}
        objects = {"/".join(key): _said(key[0], each) for key, each in sorted(subject.objects().items())}
        text = json.dumps({"objects": objects, "conditions": told, "finalizers": owner["metadata"].get("finalizers")})
        found[name] = json.loads(text.replace(owner["metadata"]["uid"], "UID").replace(storm.namespace, "NAMESPACE"))
    return found


def wait_for_the_same(storm: Storm, wished: Storm, process: OperatorProcess, *, timeout_s: float = 60.0) -> None:
    """Until both namespaces are the same; AssertionError with what is not."""

    def are_same() -> bool:
        tend(process)
        return outcome(storm) == outcome(wished)

    try:
        wait_until(are_same, timeout_s=timeout_s)
    except TimeoutError:
        is_, should_be = outcome(storm), outcome(wished)
        told = [
            f"{name}: {_first_difference(is_[name], should_be[name], '')}"
            for name in is_
            if is_[name] != should_be[name]
        ]
        raise AssertionError(f"after {storm.num_changes} changes not as it should be: {told}") from None


def _said(kind: str, content: Json) -> Any:
    """The fields that the operator applied, with their values; of a Secret, whose are random, only their names."""
    (mark,) = [each for each in content["metadata"]["managedFields"] if each["manager"] == names.MANAGER]
    if kind == "Secret":
        return sorted(content["data"])
    return _values(mark["fieldsV1"], content)


def _values(fields: Json, value: Any) -> Any:
    inner = {name: below for name, below in fields.items() if name.startswith("f:")}
    if not inner or not isinstance(value, dict):
        return str(sorted(fields)) if any(name.startswith("k:") for name in fields) else value
    return {name: _values(below, value.get(name[2:])) for name, below in inner.items() if name not in _OF_A_NAMESPACE}


def _merge(into: Json, said: Json) -> None:
    for name, value in said.items():
        if isinstance(value, dict):
            _merge(into.setdefault(name, {}), value)
        else:
            into[name] = value


def _first_difference(left: Any, right: Any, path: str) -> str:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted({*left, *right}, key=str):
            if left.get(name) != right.get(name):
                return _first_difference(left.get(name), right.get(name), f"{path}.{name}")
    return f"{path} is {left!r}, not {right!r}"
