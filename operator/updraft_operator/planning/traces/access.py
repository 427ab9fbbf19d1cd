"""Access to a Redis of the operator: for each role of a speculator a Secret in its namespace, and the user that it names.

The Secret is where a password is kept. If it is deleted, there is a new one, and the former stays valid until the pods with it
are gone. The administrator's own address never appears in what this module makes.
"""

import hashlib
from collections.abc import Container, Iterator

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import OURS, Place, secret, stream_namespace
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, password_of, rules, user_name, user_url
from updraft_operator.manifests.servers import attachment
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.serving.attached import with_former_settings
from updraft_operator.planning.traces.places import Places, has_current_template, workloads


def secrets(observed: Observed, decided: Places) -> Iterator[Manifest]:
    """The Secrets to write: those with another address, or without a password of this module's."""
    for place in decided.in_use:
        for role in Role:
            url = _url(observed, place, role)
            if observed.urls_at(place).get(role) != url:
                yield secret(observed.speculator, role, place, url)


def users(observed: Observed, place: Place, decided: Places, pending: Container[Ref]) -> Iterator[RedisUser]:
    """The user of each role on one of `OURS`. It has no password until the Secret is as it should be, which a quota may
    prevent; `pending` are the objects that are not. Users of a Redis that is being left stay as they are until no pod needs
    them."""
    exists = place is Place.SHARED or Ref("StatefulSet", names.child(observed.name, names.REDIS)) in observed.children
    if place not in decided.in_use and place is not decided.drains and (decided.is_settled or not exists):
        return
    owner, namespace = observed.speculator, stream_namespace(observed.speculator, observed.config)
    for role in Role:
        url = _url(observed, place, role) if place in decided.in_use else ""
        is_settled = bool(url) and observed.urls_at(place).get(role) == url
        yield RedisUser(
            name=_user(observed, role),
            rules=rules(role, namespace, owner.metadata.name),
            password_hash=hashed(password_of(url)) if is_settled else "",
            keeps_former=_has_former_pods(observed, role, pending),
        )


def _has_former_pods(observed: Observed, role: Role, pending: Container[Ref]) -> bool:
    """Whether pods may run with a former password: those of a former template, or attached ones with former additions."""
    children = workloads(observed, role)
    if not all(has_current_template(child) and child.ref not in pending for child in children):
        return True
    if role is Role.READER or not observed.speculator.spec.serving.is_attached:
        return False
    described = Ref("ConfigMap", attachment.config_map(observed.name))
    return bool(with_former_settings(observed) or observed.attached.problem or described in pending)


def rotation_waits(observed: Observed, decided: Places) -> str:
    """The next thing that a request for new passwords needs, in a clause; empty if it is done."""
    asked = observed.speculator.metadata.rotation
    if any(observed.rotations.get(place, {}).get(role) != asked for place in decided.in_use for role in Role):
        return "the Secrets have to be written"
    if refused := {refusal.ref for refusal in observed.refusals} & set(_workloads(observed)):
        return f"{'/'.join(min(refused))} has to be changed, which was refused"
    for role in Role:
        for child in workloads(observed, role):
            if not has_current_template(child):
                num_new, num_pods = (child.status.get(name, 0) for name in ("updatedReplicas", "replicas"))
                return f"pods of {child.ref.name} have to be replaced, {num_new} of {num_pods} are new"
    if old := with_former_settings(observed):
        return f"attached pods have to be restarted with `kubectl updraft attach`, such as {old[0].state.name}"
    pending = {user for place in decided.in_use for user in users(observed, place, decided, ())}
    return "" if pending <= observed.right_users else "Redis has to forget the former passwords"


def _workloads(observed: Observed) -> list[Ref]:
    return [child.ref for role in Role for child in workloads(observed, role)]


def marks(observed: Observed, decided: Places) -> dict[Role, str]:
    """Hashes of the addresses, which restart the pods that read them. Passwords are random, so a hash reveals none."""
    at_ours = {role: place for role, place in decided.targets.items() if place in OURS}
    return {role: hashlib.sha256(_url(observed, place, role).encode()).hexdigest() for role, place in at_ours.items()}


def _url(observed: Observed, place: Place, role: Role) -> str:
    administrator = observed.dedicated_url if place is Place.DEDICATED else observed.redis_url
    return user_url(administrator, _user(observed, role), _password(observed, place, role))


def _password(observed: Observed, place: Place, role: Role) -> str:
    """The one in the Secret or about to be written to it. A request for another one is done once: the Secret names it."""
    held, asked = password_of(observed.urls_at(place).get(role, "")), observed.speculator.metadata.rotation
    is_due = bool(asked) and observed.rotations.get(place, {}).get(role, "") != asked
    return observed.fresh_passwords[role] if is_due or not held else held


def _user(observed: Observed, role: Role) -> str:
    metadata = observed.speculator.metadata
    return user_name(observed.config.installation, metadata.namespace, metadata.name, role)
