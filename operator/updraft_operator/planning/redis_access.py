"""Access to the operator's Redis: for each role of a speculator a Secret in its namespace, and the user that it names.

The Secret is where a password is kept. If it is deleted, there is a new one, and the former stays valid until the pods with it
are gone. The operator's own address never appears in what this module makes.
"""

import hashlib
from collections.abc import Container, Iterator

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import secret, stream_namespace, uses_operators
from updraft_operator.manifests.redis_users import RedisUser, Role, hashed, password_of, rules, user_name, user_url
from updraft_operator.planning import trainers
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed


def secrets(observed: Observed) -> Iterator[Manifest]:
    """The Secrets to write: those with another address, or without a password of this module's."""
    for role, url in _urls(observed).items():
        if observed.redis_urls.get(role) != url:
            yield secret(observed.speculator, role, url)


def users(observed: Observed, pending: Container[Ref]) -> Iterator[RedisUser]:
    """The user of each role. It has no password until the Secret is as it should be, which a quota may prevent; `pending` are
    the objects that are not."""
    owner, namespace = observed.speculator, stream_namespace(observed.speculator, observed.config)
    for role, url in _urls(observed).items():
        is_settled = observed.redis_urls.get(role) == url
        yield RedisUser(
            name=_user(observed, role),
            rules=rules(role, namespace, owner.metadata.name),
            password_hash=hashed(password_of(url)) if is_settled else "",
            keeps_former=not all(_is_rolled_out(child, pending) for child in _workloads(observed, role)),
        )


def marks(observed: Observed) -> dict[Role, str]:
    """Hashes of the addresses, which restart the pods that read them. Passwords are random, so a hash reveals none."""
    return {role: hashlib.sha256(url.encode()).hexdigest() for role, url in _urls(observed).items()}


def _urls(observed: Observed) -> dict[Role, str]:
    if not uses_operators(observed.speculator, observed.config):
        return {}
    return {role: user_url(observed.redis_url, _user(observed, role), _password(observed, role)) for role in Role}


def _password(observed: Observed, role: Role) -> str:
    """The one in the Secret or about to be written to it."""
    return password_of(observed.redis_urls.get(role, "")) or observed.fresh_passwords[role]


def _user(observed: Observed, role: Role) -> str:
    metadata = observed.speculator.metadata
    return user_name(observed.config.installation, metadata.namespace, metadata.name, role)


def _workloads(observed: Observed, role: Role) -> tuple[Child, ...]:
    if role is Role.READER:
        return trainers.workloads(observed)
    serving = observed.child("Deployment", names.SERVING)
    return () if serving is None else (serving,)


def _is_rolled_out(child: Child, pending: Container[Ref]) -> bool:
    """Whether all its pods are of the current template."""
    is_seen = child.status.get("observedGeneration", child.generation) == child.generation
    is_whole = child.status.get("updatedReplicas", 0) == child.status.get("replicas", 0)
    return is_seen and is_whole and child.ref not in pending
