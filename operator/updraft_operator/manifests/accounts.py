"""ServiceAccounts and their roles in a speculator's registry. None of them has permissions in the Kubernetes API.

The pods of each part have their own account. No pod runs as the account with the speculator's name: people request tokens for
it. Every registry has its own audience, so that a registry cannot use the tokens that it receives at another registry.
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
    """The name of the ServiceAccount of a part's pods. The spec's pod template may name another one, e.g. for a cloud, and
    attached pods have their own."""
    if part == names.SERVING and (attached := owner.spec.serving.attached) is not None:
        return attached.service_account_name
    templates = {names.SERVING: owner.spec.serving.pod_template, names.TRAINER: owner.spec.trainer.pod_template}
    spec = templates.get(part, {}).get("spec")
    chosen = spec.get("serviceAccountName") if isinstance(spec, dict) else None
    return chosen if isinstance(chosen, str) and chosen else names.child(owner.metadata.name, part)


def objects(owner: AdaptiveSpeculator) -> list[Manifest]:
    """All accounts. A pod gets a token for the API server only if it mounts one."""
    name = owner.metadata.name
    parts = [part for part in _ROLES if part != names.SERVING or not owner.spec.serving.is_attached]
    accounts = {name: "account", **{names.child(name, part): part for part in parts}}
    content = {"automountServiceAccountToken": False}
    return [manifest(owner, "v1", "ServiceAccount", each, part, **content) for each, part in accounts.items()]


def roles(owner: AdaptiveSpeculator, config: OperatorConfig) -> str:
    """Roles by account, as the registry's setting. Serving pods are bound to the speculator, whose tenants only they hash."""
    namespace, name = owner.metadata.namespace, owner.metadata.name
    grants = {part: f"{role}@{name}" if part == names.SERVING else role for part, role in _ROLES.items() if role}
    # Attached pods get their role here too, by the account in their own workload, in which other pods may run as well.
    parts = [f"{grant}:{namespace}/{account(owner, part)}" for part, grant in grants.items()]
    return ",".join([*parts, f"operate:{namespace}/{name}", f"operate:{config.namespace}/{config.account}"])
