"""A workload remembers in an annotation how its pods were made, as `kubectl apply` does, so that a newer operator can leave
them as they are until it is their turn.

A template and its settings change for one of two reasons. Either their inputs changed: then pods restart at once, with what
this operator makes of them. Or this operator makes something else of the same inputs, which it finds out by rendering the
remembered ones: then the remembered template stays, and is still defended against others, while other fields follow the spec.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from updraft_chassis.errors import UpdraftError
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest, digest
from updraft_operator.planning.compare import difference
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.runtime.rendering import Inputs, render
from updraft_operator.planning.traces.places import Places

_TEMPLATES = {"Deployment": "template", "StatefulSet": "template", "LeaderWorkerSet": "leaderWorkerTemplate"}
"""The field of the spec with the pod template, by kind of workload."""

_IMMUTABLE = ("volumeClaimTemplates", "podManagementPolicy")
"""Fields of a StatefulSet that the API server never changes, and that releases may choose differently."""

_TEMPLATE, _SETTINGS, _INPUTS = "template", "settings", "inputs"

_MOST_BYTES = 1_000_000
"""Limit for an unpacked record. One has some ten thousand, and an annotation could inflate to hundreds of millions."""

_MOST_WRITTEN_BYTES = 200_000
"""Limit for the annotation. All annotations of an object may have 262,144 bytes, and it would be refused for more."""

_NOT_OURS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    OSError,
    UpdraftError,
    zlib.error,
)
"""Errors from an annotation that somebody else wrote. They must not end a plan: all upgrades wait for each resource's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """When a resource got another runtime in its turn, and how it was then."""

    since_s: float
    """Unix time."""
    num_ready: int
    """Inference pods that were ready."""
    trains: bool
    """Whether no pod of the trainer had a problem."""

    def text(self) -> str:
        return json.dumps([self.since_s, self.num_ready, self.trains])

    @classmethod
    def read(cls, text: str) -> "Turn | None":
        """None for an annotation that somebody else wrote."""
        try:
            since_s, num_ready, trains = json.loads(text)
            datetime.fromtimestamp(since_s, UTC)
            return cls(since_s=float(since_s), num_ready=int(num_ready), trains=bool(trains))
        except _NOT_OURS:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A workload whose pods wait for another runtime."""

    ref: Ref
    runtime: str
    """The one that they have."""
    change: str
    """The first field that would change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The desired objects, with the remembered templates of those that wait."""

    objects: tuple[Manifest, ...]
    held: tuple[Held, ...] = ()


def settle(observed: Observed, decided: Places, turn: Turn | None) -> Settled:
    """The objects to apply. With a `turn`, no workload keeps a remembered template. Those that had to wait get the turn, and so
    do new ones. Once one has it, all get it, so that it is known when one is deleted: none of them shows a turn in which
    everything was refused."""
    inputs, last = Inputs.of(observed, decided), last_turn(observed)
    desired = render(observed, decided, inputs)
    held: list[Held] = []
    is_taken = turn is not None and any(having(observed, turn))
    by_ref = {_ref(each): each for each in desired}
    for workload in [each for each in desired if each["kind"] in _TEMPLATES]:
        child, content = observed.children.get(_ref(workload)), _content(workload, desired)
        kept = _kept(observed, decided, child, content, workload)
        since = _since(child, turn if child is None or kept is not None or is_taken else None, last)
        if child is None or kept is None or turn is not None:
            found = _remembering(workload, observed, inputs, content, since)
        else:
            found = _annotated(_with_template(workload, kept[_TEMPLATE]), child.runtime, child.rendered, since)
            change = _difference(content, kept)
            held.append(Held(ref=child.ref, runtime=child.runtime, change=change))
            by_ref |= {_ref(each): each for each in _former_settings(workload, desired, kept[_SETTINGS])}
        by_ref[_ref(workload)] = found if child is None else _as_created(found, child)
    return Settled(objects=tuple(by_ref.values()), held=tuple(held))


def workloads(observed: Observed) -> Iterator[Child]:
    """Those that run pods of the operator."""
    yield from (child for child in observed.children.values() if child.ref.kind in _TEMPLATES and not child.is_ending)


def ending(observed: Observed) -> Iterator[Child]:
    """Those of them that are being deleted."""
    of_pods = (child for child in observed.children.values() if child.ref.kind in _TEMPLATES and child.is_ending)
    yield from (child for child in of_pods if child.owner_uid in ("", observed.speculator.metadata.uid))


def last_turn(observed: Observed, until_s: float = math.inf) -> Turn | None:
    """The last one that any workload had, until a Unix time."""
    turns = (Turn.read(child.turn) for child in (*workloads(observed), *ending(observed)) if child.turn)
    known = [turn for turn in turns if turn is not None] or [*_lost_turn(observed)]
    return max((turn for turn in known if turn.since_s <= until_s), key=lambda turn: turn.since_s, default=None)


def _lost_turn(observed: Observed) -> Iterator[Turn]:
    """The turn of an update that failed with this runtime and whose workloads were all deleted. The status remembers it,
    and the new ones get it. How it was before is not known, so it is over when clients are served."""
    status = observed.speculator.status
    if status.runtime is None or status.runtime.available != observed.config.runtime:
        return
    ended = status.runtime.last_update_time
    for each in status.conditions:
        if (each.type, each.reason) == ("RuntimeUpToDate", "UpdateFailed"):
            since_s = each.last_transition_time.timestamp()
            after_s = since_s if ended is None else max(since_s, ended.timestamp() + 1.0)
            yield Turn(since_s=after_s, num_ready=1, trains=False)


def having(observed: Observed, turn: Turn) -> Iterator[Child]:
    """The workloads that have this turn."""
    yield from (child for child in workloads(observed) if child.turn and Turn.read(child.turn) == turn)


def _since(child: Child | None, turn: Turn | None, last: Turn | None) -> str:
    """The turn that a workload is to have: a new one, its own, or that of the others."""
    if turn is None and child is not None and child.turn:
        return child.turn
    known = turn or last
    return "" if known is None else known.text()


def _kept(
    observed: Observed, decided: Places, child: Child | None, content: Mapping[str, Any], workload: Manifest
) -> dict[str, Any] | None:
    """The remembered template and settings; None if they have to go, because their inputs changed, or are the same."""
    if child is None or not child.rendered or _digest(child.rendered) == digest(content):
        return None
    try:
        record = _record(child.rendered)
        before = render(observed, decided, Inputs.from_json(record[_INPUTS]))
        same = next((each for each in before if _ref(each) == _ref(workload)), None)
        is_asked = same is None or digest(_content(same, before)) != digest(content)
    except _NOT_OURS:
        return None
    return None if is_asked else record


def _record(rendered: str) -> dict[str, Any]:
    """Raises one of `_NOT_OURS` for one that is not as an operator wrote it."""
    _, mark, body = rendered.split(":")
    inflate = zlib.decompressobj()
    text = inflate.decompress(base64.b64decode(body), _MOST_BYTES)
    record: dict[str, Any] = json.loads(text)
    settings = [value for data in record[_SETTINGS].values() for value in data.values()]
    if (
        digest(record) != mark
        or not isinstance(record[_TEMPLATE], dict)
        or not all(isinstance(x, str) for x in settings)
    ):
        raise ValueError("somebody else wrote it")
    return record


def _content(workload: Manifest, objects: Iterable[Manifest]) -> dict[str, Any]:
    """The part of a workload and its settings that pods see."""
    return {
        _TEMPLATE: workload["spec"][_TEMPLATES[workload["kind"]]],
        _SETTINGS: {each["metadata"]["name"]: each["data"] for each in _settings(workload, objects)},
    }


def _settings(workload: Manifest, objects: Iterable[Manifest]) -> Iterator[Manifest]:
    """The ConfigMap that its pods read when they start."""
    labels = workload["metadata"]["labels"]
    name = names.child(labels[names.SPECULATOR], labels[names.COMPONENT])
    yield from (each for each in objects if _ref(each) == Ref("ConfigMap", name))


def _former_settings(
    workload: Manifest, objects: Iterable[Manifest], former: Mapping[str, Mapping[str, str]]
) -> Iterator[Manifest]:
    for each in _settings(workload, objects):
        yield {**each, "data": former.get(each["metadata"]["name"], each["data"])}


def _remembering(
    workload: Manifest, observed: Observed, inputs: Inputs, content: Mapping[str, Any], turn: str
) -> Manifest:
    """With the annotations of this operator; without a record that is too large, so that another operator's template comes at
    once."""
    record = {_INPUTS: inputs.to_json(), **content}
    packed = zlib.compress(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
    rendered = f"{digest(content)}:{digest(record)}:{base64.b64encode(packed).decode()}"
    return _annotated(workload, observed.config.runtime, rendered if len(rendered) <= _MOST_WRITTEN_BYTES else "", turn)


def _annotated(workload: Manifest, runtime: str, rendered: str, turn: str) -> Manifest:
    metadata = workload["metadata"]
    found = {names.RUNTIME: runtime, names.RENDERED: rendered, names.TURN: turn}
    ours = {name: text for name, text in found.items() if text}
    return {**workload, "metadata": {**metadata, "annotations": {**metadata.get("annotations", {}), **ours}}}


def _with_template(workload: Manifest, template: Mapping[str, Any]) -> Manifest:
    return {**workload, "spec": {**workload["spec"], _TEMPLATES[workload["kind"]]: template}}


def _as_created(workload: Manifest, child: Child) -> Manifest:
    """With the fields of the StatefulSet that cannot be changed any more."""
    if workload["kind"] != "StatefulSet":
        return workload
    spec, live = workload["spec"], child.live()["spec"]
    own = {name: spec[name] for name in _IMMUTABLE if name in spec}
    if not difference({"spec": own, "metadata": {}}, {"spec": live}):
        return workload
    return {**workload, "spec": {**spec, **{name: live.get(name, own[name]) for name in own}}}


def _difference(content: Mapping[str, Any], former: Mapping[str, Any]) -> str:
    """The first field that differs; a removed one is found from the other side."""
    both: Sequence[Mapping[str, Any]] = (content, former)
    paths = (difference({"spec": dict(one), "metadata": {}}, {"spec": other}) for one, other in (both, both[::-1]))
    return next((path.removeprefix("spec.") for path in paths if path), "")


def _digest(rendered: str) -> str:
    return rendered.partition(":")[0]


def _ref(content: Manifest) -> Ref:
    return Ref(content["kind"], content["metadata"]["name"])
