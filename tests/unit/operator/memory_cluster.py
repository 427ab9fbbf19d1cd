"""The API server as far as the operator speaks to it, in memory: versions, conflicts, server-side apply, finalizers.

It stands in for what a test of decisions needs; what the real one makes of the same objects is asked in tests/cluster.
Refused: schemas, and controllers that start pods; a test says itself what those would say.
"""

import base64
import pickle
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, TypeVar

from updraft_chassis.errors import Conflict, InvalidInput, NotFound, Unavailable
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.watching.cluster import OURS

T = TypeVar("T")

Where = tuple[str, str, str]
"""Kind, namespace, name."""

Watcher = Callable[[str, Manifest, bool], None]
"""Kind, object, whether it was deleted."""

_OWN = ("labels", "annotations", "ownerReferences", "finalizers")
_FINAL = {"Job": ("template",), "StatefulSet": ("volumeClaimTemplates", "serviceName"), "Deployment": ("selector",)}


class MemoryCluster:
    """See `updraft_operator.watching.cluster.Cluster`."""

    def __init__(self) -> None:
        self.objects: dict[Where, Manifest] = {}
        self.writes: list[tuple[str, str, str]] = []
        """Verb, kind, name."""
        self.watchers: list[Watcher] = []
        self.num_listings = 0
        self.num_reads = 0
        self._applied: dict[tuple[Where, bool], Manifest] = {}
        self._versions, self._uids = count(100), count(1)

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        self.num_reads += 1
        return _copied(self._at((kind, namespace, name)))

    async def apply(self, content: Manifest, *, is_status: bool = False) -> Manifest:
        where = place(content)
        live = self.objects.get(where)
        if is_status and live is None:
            raise NotFound(f"there is no {where}")
        if live is not None and content["metadata"].get("resourceVersion") not in (
            None,
            live["metadata"]["resourceVersion"],
        ):
            raise Unavailable(f"{where} is another one by now")
        desired = _stored(content)
        before = self._applied.get((where, is_status), {})
        merged = applied(live or {"metadata": {}}, before, desired)
        if live is not None:
            _check(where[0], live, merged)
        self._applied[where, is_status] = _copied(desired)
        self.writes.append(("apply", where[0], where[2]))
        return self._put(where, merged)

    async def merge(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Manifest:
        where = (kind, namespace, name)
        live = self._at(where)
        version = patch.get("metadata", {}).get("resourceVersion")
        if version not in (None, live["metadata"]["resourceVersion"]):
            raise Conflict(f"{name} is another one by now")
        self.writes.append(("merge", kind, name))
        return self._put(where, _over(_copied(live), patch))

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self.writes.append(("delete", kind, name))
        live = self.objects.get((kind, namespace, name))
        if live is not None and uid == live["metadata"]["uid"]:
            self.remove((kind, namespace, name))

    async def pods(self, namespace: str, selector: str) -> list[Manifest]:
        wanted = dict(each.split("=") for each in selector.split(","))
        found = [each for each in self.of("Pod") if each["metadata"]["namespace"] == namespace]
        return [_copied(each) for each in found if wanted.items() <= each["metadata"].get("labels", {}).items()]

    async def create(self, content: Manifest) -> Manifest:
        where = place(content)
        if where in self.objects:
            raise Conflict(f"{where} is there already")
        self.writes.append(("create", where[0], where[2]))
        return self._put(where, _stored(content))

    async def replace(self, content: Manifest) -> Manifest:
        where = place(content)
        live = self._at(where)
        if content["metadata"].get("resourceVersion") not in (None, "", live["metadata"]["resourceVersion"]):
            raise Conflict(f"{where} is another one by now")
        self.writes.append(("replace", where[0], where[2]))
        return self._put(where, {**content, "metadata": {**live["metadata"], **content["metadata"]}})

    async def metadata(self, kind: str, namespace: str) -> list[Manifest]:
        self.num_listings += 1
        is_ours = kind in OURS
        return [
            {"metadata": _copied(each["metadata"])}
            for each in self.of(kind, namespace)
            if is_ours or each["metadata"].get("labels", {}).get(names.MANAGED_BY) == names.MANAGER
        ]

    def holds(self, content: Manifest) -> bool:
        """Whether applying this would change nothing."""
        live = self.objects.get(place(content))
        if live is None:
            return False
        return _bare(_defaulted(applied(live, {}, _stored(content)))) == _bare(live)

    # What others do.

    def of(self, kind: str, namespace: str = "") -> list[Manifest]:
        """All objects of a kind."""
        return [each for where, each in self.objects.items() if where[0] == kind and namespace in ("", where[1])]

    def edit(self, where: Where, change: Callable[[Manifest], object]) -> None:
        """Somebody changes an object."""
        content = _copied(self._at(where))
        change(content)
        self._put(where, content)

    def set(self, content: Manifest) -> None:
        """Somebody makes or replaces an object."""
        self._put(place(content), _copied(content))

    def remove(self, where: Where) -> None:
        """Somebody deletes an object; what it owns goes with it."""
        live = self._at(where)
        if live["metadata"].get("finalizers"):
            stamp = {"metadata": {"deletionTimestamp": "2026-11-25T12:00:00Z"}}
            self._put(where, _over(_copied(live), stamp))
            return
        del self.objects[where]
        for is_status in (False, True):
            self._applied.pop((where, is_status), None)
        live["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell(where[0], live, is_deleted=True)
        for each in [place(other) for other in self._owned(live["metadata"]["uid"])]:
            self.remove(each)

    def _owned(self, uid: str) -> Iterator[Manifest]:
        for other in self.objects.values():
            if any(owner["uid"] == uid for owner in other["metadata"].get("ownerReferences", ())):
                yield other

    def _at(self, where: Where) -> Manifest:
        if where not in self.objects:
            raise NotFound(f"there is no {where}")
        return self.objects[where]

    def _put(self, where: Where, content: Manifest) -> Manifest:
        live = self.objects.get(where)
        new = _defaulted(_copied(content))
        metadata = new["metadata"]
        metadata |= {"name": where[2], "namespace": where[1]}
        if live is None:
            metadata |= {"uid": f"uid-{next(self._uids):08}", "generation": 1}
        elif _bare(new) == _bare(live):
            return _copied(live)
        elif new.get("spec") != live.get("spec"):
            metadata["generation"] = live["metadata"]["generation"] + 1
        metadata["resourceVersion"] = str(next(self._versions))
        self.objects[where] = new
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.remove(where)
        else:
            self._tell(where[0], new, is_deleted=False)
        return _copied(new)

    def _tell(self, kind: str, content: Manifest, *, is_deleted: bool) -> None:
        for watcher in self.watchers:
            watcher(kind, _copied(content), is_deleted)


def _copied(content: T) -> T:
    """A deep copy, several times as fast as `copy.deepcopy`."""
    copy: T = pickle.loads(pickle.dumps(content))  # noqa: S301 - our own
    return copy


def place(content: Manifest) -> Where:
    """Where an object is."""
    return content["kind"], content["metadata"]["namespace"], content["metadata"]["name"]


def applied(live: Manifest, before: Manifest, desired: Manifest) -> Manifest:
    """Server-side apply by one manager: what it said before and says no longer goes, what it says is so."""
    left = _without(_copied(live), before, desired)
    result: Manifest = _over_lists(left, desired)
    return result


def _without(live: Any, before: Any, desired: Any) -> Any:
    if isinstance(before, dict) and isinstance(live, dict):
        for name, value in before.items():
            if not isinstance(desired, dict) or name not in desired:
                live.pop(name, None)
            elif name in live:
                live[name] = _without(live[name], value, desired[name])
    elif isinstance(before, list) and isinstance(live, list) and (key := _key(before, live)):
        still = {each[key]: each for each in desired if isinstance(each, dict) and key in each}
        old = {each[key]: each for each in before}
        return [
            _without(each, old.get(each[key], {}), still[each[key]]) if each[key] in still else each
            for each in live
            if each[key] in still or each[key] not in old
        ]
    return live


def _over_lists(live: Any, desired: Any) -> Any:
    if isinstance(desired, dict):
        before = live if isinstance(live, dict) else {}
        return {**before, **{name: _over_lists(before.get(name), value) for name, value in desired.items()}}
    if isinstance(desired, list) and isinstance(live, list) and (key := _key(desired, live)):
        by_key = {each[key]: each for each in live}
        by_key |= {each[key]: _over_lists(by_key.get(each[key]), each) for each in desired}
        return list(by_key.values())
    return _copied(desired) if isinstance(desired, list) else desired


def _key(*lists: list[Any]) -> str:
    for key in ("uid", "mountPath", "name", "type"):
        if all(isinstance(each, dict) and key in each for entries in lists for each in entries):
            return key
    return ""


def _over(live: Any, patch: Mapping[str, Any]) -> Any:
    for name, value in patch.items():
        if value is None:
            live.pop(name, None)
        elif isinstance(value, Mapping):
            live[name] = _over(live.get(name) or {}, value)
        else:
            live[name] = _copied(value)
    return live


def _stored(content: Manifest) -> Manifest:
    new = _copied(content)
    if "stringData" in new:
        entries = new.pop("stringData")
        new["data"] = {name: base64.b64encode(value.encode()).decode() for name, value in entries.items()}
    return new


def _bare(content: Manifest) -> Manifest:
    metadata = {name: content["metadata"].get(name) or None for name in (*_OWN, "deletionTimestamp")}
    return {**content, "metadata": metadata}


def _check(kind: str, live: Manifest, new: Manifest) -> None:
    for field in _FINAL.get(kind, ()):
        if _defaulted(_copied(new))["spec"].get(field) != live["spec"].get(field):
            raise InvalidInput(f"{kind}: spec.{field} is immutable")
    if kind == "PersistentVolumeClaim" and new["spec"] != live["spec"]:
        raise InvalidInput("a claim can only grow, by its user's hand")


def _defaulted(content: Manifest) -> Manifest:
    """Some of what the real one adds, and how it writes amounts."""
    if content.get("kind") == "Deployment":
        content["spec"] = {"replicas": 1, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10, **content["spec"]}
    template = content.get("spec", {}).get("template")
    if template:
        pod = template["spec"]
        pod.setdefault("restartPolicy", "Always")
        pod.setdefault("schedulerName", "default-scheduler")
        pod.setdefault("enableServiceLinks", True)
        for container in (*pod.get("containers", ()), *pod.get("initContainers", ())):
            container.setdefault("terminationMessagePath", "/dev/termination-log")
            requests = container.get("resources", {}).get("requests", {})
            if requests.get("cpu") == "1000m":
                requests["cpu"] = "1"
    return content
