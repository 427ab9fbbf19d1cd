"""Whether what is there is what should be there: by the operator's own plan, and by another operator without any faults.

The plan knows every value that is applied; the other namespace shows what nobody should have left besides. Only what
cannot be the same twice is left out: identities, times, random tokens, and hashes of these.
"""

import base64
import json
from collections.abc import Collection, Iterator
from typing import Any

from tests.cluster.access import Api, Json

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.redis import URL, Place, secret_name, wanted_place
from updraft_operator.manifests.redis_users import Role, password_of
from updraft_operator.planning.compare import difference
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.plan import hash_of, objects, ref
from updraft_operator.watching.cluster import CHILDREN, KINDS, RESOURCES

_MADE = (*CHILDREN, "Secret", "DraftVersion")
_ANEW = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields")
_MARKS = (names.APPLIED, names.SETTINGS, names.RENDERED, "deployment.kubernetes.io/revision")
"""Annotations that hold hashes of a namespace or an identity, or count."""

_ADDRESSES = ("clusterIP", "clusterIPs")

World = dict[tuple[str, str], Json]
"""All objects of some kinds in a namespace, by kind and name."""


def speculators(api: Api, namespace: str) -> dict[str, Json]:
    """The resources by name."""
    listed = api.get(KINDS["AdaptiveSpeculator"].path(namespace))["items"]
    return {each["metadata"]["name"]: each for each in listed}


def made(api: Api, namespace: str, subjects: tuple[str, ...]) -> World:
    """Objects whose names begin with one of the subjects', and the claims of trainers, whatever their labels are.

    The claims of a registry are made by its StatefulSet.
    """
    claims = tuple(names.claim(names.child(subject, names.TRAINER)) for subject in subjects)
    found = {}
    for kind in _MADE:
        resource = RESOURCES[kind]
        for each in api.get(resource.path(namespace))["items"]:
            name = each["metadata"]["name"]
            if name.partition("-")[0] in subjects or name.startswith(claims):
                found[kind, name] = each
    return found


def without_what_is_kept(live: World, owners: dict[str, Json], reference: World) -> World:
    """The data of an earlier spec and the Secrets of its Redis stay until their owner goes, on purpose."""
    alive = {owner["metadata"]["uid"] for owner in owners.values()}

    def is_kept(where: tuple[str, str]) -> bool:
        held = {each["uid"] for each in live[where]["metadata"].get("ownerReferences", ())}
        return where[0] in ("PersistentVolumeClaim", "Secret") and where not in reference and bool(held & alive)

    return {where: each for where, each in live.items() if not is_kept(where)}


def uncollected(live: World, owners: dict[str, Json]) -> list[tuple[str, str]]:
    """Objects that name an owner of another life: Kubernetes may still delete them, and then the operator makes them again."""
    alive = {owner["metadata"]["uid"] for owner in owners.values()}

    def owned(each: Json) -> set[str]:
        named = each["metadata"].get("ownerReferences", ())
        return {one["uid"] for one in named if one["kind"] == "AdaptiveSpeculator"}

    return [where for where, each in live.items() if owned(each) - alive]


def against_plan(
    owners: dict[str, Json], live: World, config: OperatorConfig, drafts: Collection[str]
) -> Iterator[str]:
    """What differs from what the plan says of these resources; nothing else may be there. `drafts` are the names of all
    DraftVersions of what registries keep."""
    desired = {("DraftVersion", name) for name in drafts if name.rpartition("-v")[0] in owners}
    for owner in owners.values():
        name = owner["metadata"]["name"]
        secrets = {role: live.get(("Secret", secret_name(name, role)), {}) for role in Role}
        urls = {role: _entries(secret).get(URL, "") for role, secret in secrets.items()}
        seen = Observed(
            speculator=AdaptiveSpeculator.model_validate(owner),
            config=config,
            children={Ref(*where): Child.of(where[0], each) for where, each in live.items()},
            redis_url=urls[Role.WRITER],  # of the same Redis
            redis_urls=urls,
            fresh_passwords={(Place.SHARED, role): "" for role in Role},
        )
        if wanted_place(seen.speculator, config) is Place.SHARED:
            desired |= {("Secret", secret_name(name, role)) for role in Role}
        for content in objects(seen):
            where = ref(content)
            desired.add((where.kind, where.name))
            child = seen.children.get(where)
            if child is None:
                yield f"{'/'.join(where)} is missing"
            elif child.applied != hash_of(content):
                yield f"{'/'.join(where)} is not what was applied last"
            elif path := difference(content, child.live()):
                yield f"{'/'.join(where)} differs from the plan in {path}"
    yield from (f"{'/'.join(where)} is there" for where in sorted(live.keys() - desired))
    yield from (
        f"{'/'.join(where)} is missing"
        for where in sorted(desired - live.keys())
        if where[0] in ("Secret", "DraftVersion")
    )


def against_reference(live: World, reference: World) -> Iterator[str]:
    """What differs from the same resources' objects in another namespace."""
    for where in sorted(live.keys() | reference.keys()):
        if where not in live or where not in reference:
            yield f"{'/'.join(where)} is only {'here' if where in live else 'in the reference'}"
        else:
            for path in _differences(_normal(live[where]), _normal(reference[where]), ""):
                yield f"{'/'.join(where)} differs from the reference in {path}"


def of_status(owners: dict[str, Json], reference: dict[str, Json]) -> Iterator[str]:
    """What the resources say that those of the reference do not."""
    for name, owner in owners.items():
        ours, theirs = _told(owner), _told(reference.get(name, {}))
        for path in _differences(ours, theirs, ""):
            yield f"the status of {name} differs in {path}: {ours} is not {theirs}"


def _normal(content: Json) -> Any:
    """Without what is another one each time, and without its namespace and the UID of its owner."""
    metadata = {name: value for name, value in content["metadata"].items() if name not in _ANEW}
    owners = [{**each, "uid": ""} for each in metadata.get("ownerReferences", ())]
    rest = {name: value for name, value in content.items() if name not in ("metadata", "status")}
    if content["metadata"].get("annotations"):
        metadata["annotations"] = _unmarked(metadata["annotations"])
    normal: Any = {**rest, "metadata": {**metadata, "ownerReferences": owners}}
    if rest.get("type") == "Opaque":
        normal["data"] = {name: _shown(text) for name, text in _entries(content).items()}
    if "spec" in rest:
        normal["spec"] = {name: value for name, value in rest["spec"].items() if name not in _ADDRESSES}
    template = normal.get("spec", {}).get("template")
    if template and template["metadata"].get("annotations"):
        kept = {**template["metadata"], "annotations": _unmarked(template["metadata"]["annotations"])}
        normal["spec"]["template"] = {**template, "metadata": kept}
    text = json.dumps(normal).replace(content["metadata"]["namespace"], "NAMESPACE")
    for each in metadata.get("ownerReferences", ()):
        text = text.replace(each["uid"], "OWNER")  # the ranks of a trainer meet under it
    return json.loads(text)


def _unmarked(annotations: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in annotations.items() if name not in _MARKS}


def _entries(secret: Json) -> dict[str, str]:
    return {entry: base64.b64decode(value).decode() for entry, value in secret.get("data", {}).items()}


def _shown(text: str) -> str:
    """Of a Secret: its address without the random password."""
    password = password_of(text)
    return text.replace(password, "PASSWORD") if password else text


def _told(owner: Json) -> Json:
    """A status without times and words."""
    status = owner.get("status", {})
    conditions = {each["type"]: f"{each['status']} {each['reason']}" for each in status.get("conditions", ())}
    serving = {name: value for name, value in status.get("serving", {}).items() if name.endswith("eplicas")}
    is_current = status.get("observedGeneration") == owner.get("metadata", {}).get("generation")
    return {"conditions": conditions, "serving": serving, "is_current": is_current, "trainer": status.get("trainer")}


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(name), theirs.get(name), f"{path}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif ours != theirs:
        yield path or "all"
