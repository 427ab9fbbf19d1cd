"""Access to a Redis of the operator: for each role of a speculator a Secret in its namespace, and the user that it names.

The Secret is where a password is kept. If it is deleted, there is a new one, and the former stays valid until the pods with it
are gone. The administrator's own address never appears in what this module makes.
"""

import hashlib
from collections.abc import Container, Iterator

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import OURS, Place, secret, secret_name, stream_namespace
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, password_of, rules, user_name, user_url
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.serving.attached import with_former_settings
from updraft_operator.planning.traces.places import Places, has_current_template, is_rolled_out, workloads


def secrets(observed: Observed, decided: Places) -> Iterator[Manifest]:
    """The Secrets to write: those with another address, or without a password of this module's."""
    for place in decided.in_use:
        for role in Role:
            is_due = _is_due(observed, place, role)
            url = _url(observed, place, role, is_due=is_due)
            if observed.urls_at(place).get(role) != url:
                held = observed.rotations.get(place, {}).get(role, "")
                rotation = observed.speculator.metadata.rotation if is_due else held
                yield secret(observed.speculator, role, place, url, rotation)


def users(observed: Observed, place: Place, decided: Places, pending: Container[Ref]) -> Iterator[RedisUser]:
    """The user of each role on one of `OURS`, with the password that the Secret holds; without one until the Secret exists,
    which a quota may prevent. `pending` are the objects that are not as they should be. Users of a Redis that is being left
    stay as they are until no pod needs them."""
    exists = place is Place.SHARED or Ref("StatefulSet", names.child(observed.name, names.REDIS)) in observed.children
    if place not in decided.in_use and place is not decided.drains and (decided.is_settled or not exists):
        return
    owner, namespace = observed.speculator, stream_namespace(observed.speculator, observed.config)
    for role in Role:
        held = password_of(observed.urls_at(place).get(role, "")) if place in decided.in_use else ""
        yield RedisUser(
            name=_user(observed, role),
            rules=rules(role, namespace, owner.metadata.name),
            password_hash=hashed(held) if held else "",
            keeps_former=_has_former_pods(observed, role, pending),
        )


def _has_former_pods(observed: Observed, role: Role, pending: Container[Ref]) -> bool:
    """Whether pods may run with a former password: those of a former template, or attached ones with former additions."""
    children = workloads(observed, role)
    if any(child.ref in pending for child in children) or not is_rolled_out(observed, role):
        return True
    if role is Role.READER or not observed.speculator.spec.serving.is_attached:
        return False
    described = Ref("ConfigMap", attachment.config_map(observed.name))
    return bool(with_former_settings(observed) or observed.attached.problem or described in pending)


def rotation_waits(observed: Observed, decided: Places) -> str:
    """The next thing that a request for new passwords needs, in a clause; empty if it is done."""
    if waits := _secrets_wait(observed, decided) or _pods_wait(observed):
        return waits
    pending = {user for place in decided.in_use for user in users(observed, place, decided, ())}
    return "" if pending <= observed.right_users else "Redis has to forget the former passwords"


def _secrets_wait(observed: Observed, decided: Places) -> str:
    asked = observed.speculator.metadata.rotation
    if all(observed.rotations.get(place, {}).get(role) == asked for place in decided.in_use for role in Role):
        return ""
    written = _secrets(observed, decided)
    if refused := next((one for one in observed.refusals if one.ref in written), None):
        return f"Secret/{refused.ref.name} has to be written, which was refused: {refused.message}"
    if not observed.ready_places.issuperset(decided.in_use):
        return "Redis has to be ready, and to have the users"
    return "the Secrets have to be written"


def _pods_wait(observed: Observed) -> str:
    if refused := {refusal.ref for refusal in observed.refusals} & set(_workloads(observed)):
        return f"{'/'.join(min(refused))} has to be changed, which was refused"
    for role in Role:
        for child in workloads(observed, role):
            if not has_current_template(child):
                num_new, num_pods = (child.status.get(name, 0) for name in ("updatedReplicas", "replicas"))
                return f"pods of {child.ref.name} have to be replaced, {num_new} of {num_pods} are new"
    if old := with_former_settings(observed):
        return f"attached pods have to be restarted with `kubectl updraft attach`, such as {old[0].state.name}"
    former = [role for role in Role if not is_rolled_out(observed, role)]
    return f"pods with the former password of the {former[0]} have to end" if former else ""


def _secrets(observed: Observed, decided: Places) -> set[Ref]:
    return {Ref("Secret", secret_name(observed.name, role, place)) for place in decided.in_use for role in Role}


def _workloads(observed: Observed) -> list[Ref]:
    return [child.ref for role in Role for child in workloads(observed, role)]


def marks(observed: Observed, decided: Places) -> dict[Role, str]:
    """Hashes of the addresses, which restart the pods that read them. Passwords are random, so a hash reveals none."""
    at_ours = {role: place for role, place in decided.targets.items() if place in OURS}
    return {role: hashlib.sha256(_url(observed, place, role).encode()).hexdigest() for role, place in at_ours.items()}


def _url(observed: Observed, place: Place, role: Role, *, is_due: bool = False) -> str:
    """With the password that the Secret holds, unless another one is due."""
    administrator = observed.dedicated_url if place is Place.DEDICATED else observed.redis_url
    held = password_of(observed.urls_at(place).get(role, ""))
    password = observed.fresh_passwords[place, role] if is_due or not held else held
    return user_url(administrator, _user(observed, role), password)


def _is_due(observed: Observed, place: Place, role: Role) -> bool:
    """Whether to write another password. A request is done once, because the Secret names it, and not before Redis takes
    changes; pods get the password once the Secret holds it."""
    asked, held = observed.speculator.metadata.rotation, observed.urls_at(place).get(role, "")
    if not asked or not held:
        return bool(asked)
    return observed.rotations.get(place, {}).get(role, "") != asked and place in observed.ready_places


def _user(observed: Observed, role: Role) -> str:
    metadata = observed.speculator.metadata
    return user_name(observed.config.installation, metadata.namespace, metadata.name, role)
