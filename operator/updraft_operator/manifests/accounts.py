"""ServiceAccounts, and what a speculator's registry lets each of them do. None of them has a right in the Kubernetes API.

The pods of each part have their own account. No pod has that with the speculator's name: people request tokens for it. Every
registry has its own audience, so that a registry cannot use a token that it receives at another one.
"""

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest

_ROLES = {names.SERVING: "serve", names.TRAINER: "publish", names.IMPORT: "publish", names.REGISTRY: ""}
"""Role by part; empty: none."""


def audience(namespace: str, name: str) -> str:
    """Audience of tokens for the registry of a speculator."""
    return f"updraft-registry/{namespace}/{name}"


def account(owner: AdaptiveSpeculator, part: str) -> str:
    """The name of the ServiceAccount of a part's pods."""
    return names.child(owner.metadata.name, part)


def objects(owner: AdaptiveSpeculator) -> list[Manifest]:
    """No pod gets a token for the API server unless it asks for one."""
    accounts = {owner.metadata.name: "account", **{account(owner, part): part for part in _ROLES}}
    content = {"automountServiceAccountToken": False}
    return [manifest(owner, "v1", "ServiceAccount", name, part, **content) for name, part in accounts.items()]


def roles(owner: AdaptiveSpeculator, config: OperatorConfig) -> str:
    """Roles by account, as the registry's setting."""
    namespace, name = owner.metadata.namespace, owner.metadata.name
    parts = [f"{role}:{namespace}/{account(owner, part)}" for part, role in _ROLES.items() if role]
    return ",".join([*parts, f"operate:{namespace}/{name}", f"operate:{config.namespace}/{config.account}"])
