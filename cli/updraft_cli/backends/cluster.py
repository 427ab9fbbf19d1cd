"""A cluster as a backend: AdaptiveSpeculators, DraftVersions and their Events, and fields of spec.rollout to patch.

It never calls a registry or a pod, so the cluster's RBAC, admission and audit apply to everything it does. It knows none of
the operator's code: they share only the API server.
"""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from updraft_chassis.errors import Conflict, Forbidden, InvalidInput, NotFound, Unavailable, UpdraftError
from updraft_cli.backends import objects, pods
from updraft_cli.backends.cluster_client import MANAGER, ClusterClient, KubeContext, connected
from updraft_cli.backends.decisions import patch_fields
from updraft_cli.backends.drafts import Draft, DraftDetails, DraftList, History, HistoryEntry, WaitingImport
from updraft_cli.backends.installation import Installation, Serving
from updraft_cli.backends.objects import GROUP, SPECULATORS, Json
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.protocol import Decision, PolicyChange, Verb, Version, with_outages
from updraft_cli.backends.snapshot import PodDetails, Snapshot, SpeculatorSnapshot
from updraft_cli.backends.speculators import Outcome, RolloutStatus, Speculator, has_served, outcome_of_role
from updraft_cli.local.metrics import serving
from updraft_cli.local.scrape import parse

_BY_HAND = (MANAGER, "kubectl-patch", "kubectl-edit")
"""Field managers that do not apply a file again."""

_CONNECTION_S = 300
"""A console keeps its connection for this long: a credential plugin then runs again."""

_WATCH_S = 50
"""Watches restart this often, so that one whose connection died unnoticed does not stay silent for long."""

_ROLLOUT_WATCH_S = 5
"""Versions change without their speculator, so they are read again this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterBackend:
    """One cluster, and one speculator in it."""

    context: KubeContext
    speculator: str = ""
    """Empty: the only one of the namespace."""
    is_dry_run: bool = False
    """Let the API server check a change without keeping it."""

    def installation(self) -> Installation:
        with self._connected() as client:
            return _installation(client, self._owners(client))

    def watch_installation(self) -> Generator[Installation | Unavailable]:
        def states() -> Generator[Installation]:
            with self._connected() as client:
                for contents in self._changing(client, self.speculator, _WATCH_S):
                    yield _installation(client, contents)

        with self._connected() as client:
            self._owners(client)  # NotFound for a name that does not exist
        return with_outages(states)

    def drafts(self) -> DraftList:
        with self._connected() as client:
            contents = self._owners(client)
            owners = {(s.namespace, s.name): s for s in map(objects.speculator, contents)}
            only = next(iter(owners.values())) if len(owners) == 1 and client.namespace else None
            name = only.name if only else self.speculator
            versions, imports = client.versions(name), client.imports(name)
        drafts = (objects.draft(version, owners.get(objects.owner_key(version))) for version in versions)
        return DraftList(
            speculator=name,
            namespace=client.namespace,
            stable=only.stable if only else 0,
            candidate=only.candidate if only else 0,
            pinned=only.pinned if only else None,
            message=only.message if only else "",
            drafts=objects.newest_first(drafts),
            imports=tuple(objects.waiting_imports(imports)),
        )

    def draft(self, version: Version) -> DraftDetails:
        with self._connected() as client:
            owner, versions = self._one(client)
        content = _numbered(owner, versions, version)
        return DraftDetails(
            draft=objects.draft(content, owner), speculator=owner.name, history=tuple(objects.history(content))
        )

    def history(self, version: Version | None, *, limit: int | None, has_kubernetes_events: bool) -> History:
        with self._connected() as client:
            owner, versions = self._one(client)
            if version is not None:
                versions = (_numbered(owner, versions, version),)
            kubernetes_events, problem = None, ""
            if has_kubernetes_events:
                try:
                    named = versions[0]["metadata"]["name"] if version is not None else ""
                    kubernetes_events = objects.events_of(client.events(), owner.name, named)
                except Forbidden as error:  # the rest does not depend on them
                    problem = str(error)
        entries = _history(versions)
        return History(
            speculator=owner.name,
            namespace=owner.namespace,
            events=entries[-limit:] if limit else entries,
            kubernetes_events=kubernetes_events,
            events_problem=problem,
        )

    def rollout(self, version: Version | None) -> RolloutStatus:
        with self._connected() as client:
            owner, versions = self._one(client)
        return _rollout(owner, versions, _asked(owner, version))

    def watch_rollout(
        self, version: Version | None, *, is_endless: bool, deadline_s: float | None
    ) -> Generator[RolloutStatus | Unavailable]:
        followed = version

        def states() -> Generator[RolloutStatus]:
            nonlocal followed
            with self._connected() as client:
                name = self._chosen(client)["metadata"]["name"]
                for contents in self._changing(client, name, _shortened(_ROLLOUT_WATCH_S, deadline_s)):
                    if not contents:
                        raise NotFound(f"{client.namespace}/{name} is gone")
                    owner = objects.speculator(contents[0])
                    number = _asked(owner, followed)
                    if not is_endless:
                        followed = number or None
                    yield _rollout(owner, client.versions(name), number, is_endless=is_endless)

        return with_outages(states, deadline_s=deadline_s)

    def policy(self) -> Policy:
        with self._connected() as client:
            return objects.speculator(self._chosen(client)).policy

    def set_policy(self, whole: Policy | None, changes: dict[str, Any]) -> PolicyChange:
        with self._connected() as client:
            content = self._chosen(client)
            before = objects.speculator(content)
            if whole is None:
                fields = Policy().with_changes(changes).kubernetes_fields()
            else:  # what the policy leaves out gets the default of the resource
                fields = whole.with_changes(changes).kubernetes_fields(is_whole=True)
            patched = client.patch(before.name, fields, is_dry_run=self.is_dry_run)
            warning = "".join(_warning(content, field) for field in fields)
        return PolicyChange(
            speculator=before.name,
            before=before.policy,
            after=objects.speculator(patched).policy,
            warning=warning,
            message="nothing of this dry run was kept" if self.is_dry_run else "the operator hands it to the registry",
        )

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        with self._connected() as client:
            content = self._chosen(client)
            owner = objects.speculator(content)
            drafts = [objects.draft(version, owner) for version in client.versions(owner.name)]
            number = 0 if version is None else _number(owner, version)
            patch = patch_fields(verb, owner, drafts, number)
            if patch.is_change:
                client.patch(owner.name, {patch.field: patch.value}, is_dry_run=self.is_dry_run)
        prefix = "Dry run, nothing was kept: " if self.is_dry_run and patch.is_change else ""
        return Decision(
            namespace=owner.namespace,
            name=owner.name,
            verb=verb,
            version=None if version is None else number,
            field=f"spec.rollout.{patch.field}",
            value=patch.value,
            changed=patch.is_change and not self.is_dry_run,
            dry_run=self.is_dry_run,
            message=f"{prefix}{patch.message}",
            warning=_warning(content, patch.field) if patch.is_change else "",
        )

    def contents(self) -> tuple[Json, ...]:
        """The AdaptiveSpeculators in question."""
        with self._connected() as client:
            return self._owners(client)

    def content(self) -> Json:
        """The AdaptiveSpeculator in question."""
        with self._connected() as client:
            return self._chosen(client)

    def annotate(self, annotations: Mapping[str, str]) -> Json:
        """Add annotations, and return the AdaptiveSpeculator as it was."""
        with self._connected() as client:
            content = self._chosen(client)
            client.annotate(content["metadata"]["name"], annotations, is_dry_run=self.is_dry_run)
        return content

    def watch_content(self, *, deadline_s: float | None) -> Generator[Json | Unavailable]:
        """Yield the AdaptiveSpeculator, and again after every change. TimeoutError at the deadline."""

        def states() -> Generator[Json]:
            with self._connected() as client:
                name = self._chosen(client)["metadata"]["name"]
                for contents in self._changing(client, name, _shortened(_WATCH_S, deadline_s)):
                    yield from contents

        return with_outages(states, deadline_s=deadline_s)

    @property
    def place(self) -> str:
        return f"the cluster of context {self.context.context}" if self.context.context else "the kubeconfig's cluster"

    @property
    def has_reasons(self) -> bool:
        return False

    def about(self, speculator: str, reason: str = "") -> Self:
        if reason:
            raise InvalidInput("a resource has no field for the reason of a decision")
        return replace(self, speculator=speculator)

    def snapshots(self) -> Generator[Snapshot]:
        while True:
            until_s = time.monotonic() + _CONNECTION_S
            with self._connected() as client:
                while time.monotonic() < until_s:
                    yield _snapshot(client, self._owners(client))

    def pod(self, name: str) -> PodDetails:
        with self._connected() as client:
            for content in _pods(client):
                if content["metadata"]["name"] == name and pods.owner(content) in ("", self.speculator):
                    measured, problem = _metrics(client, name, pods.metrics_port(content))
                    return PodDetails(
                        pod=pods.pod(content),
                        conditions=pods.conditions(content),
                        serving=measured,
                        serving_problem=problem,
                    )
        raise NotFound(f"namespace {client.namespace} has no serving pod {name}")

    def refusal(self) -> str:
        with self._connected() as client:
            may = client.may_patch(self.speculator)
        kind = f"{SPECULATORS}.{GROUP}"
        return "" if may else f"your role does not let you patch {kind} {self.speculator} in {client.namespace}"

    def speculator_with_drafts(self) -> tuple[Speculator, tuple[Draft, ...], tuple[WaitingImport, ...]]:
        """Return the speculator, its versions and the imports that are none yet, in no order."""
        with self._connected() as client:
            owner, versions = self._one(client)
            imports = tuple(objects.waiting_imports(client.imports(owner.name)))
        return owner, tuple(objects.draft(version, owner) for version in versions), imports

    def names(self) -> tuple[str, ...]:
        with self._connected() as client:
            return tuple(content["metadata"]["name"] for content in client.speculators().items)

    def numbers(self) -> tuple[tuple[int, str], ...]:
        with self._connected() as client:
            drafts = objects.newest_first(objects.draft(item, None) for item in client.versions(self.speculator))
        return tuple((draft.version, draft.phase) for draft in drafts)

    def _connected(self) -> AbstractContextManager[ClusterClient]:
        return connected(self.context)

    def _owners(self, client: ClusterClient) -> tuple[Json, ...]:
        """Return the AdaptiveSpeculators in question; NotFound if the named one does not exist."""
        if self.speculator and client.namespace:
            return (client.speculator(self.speculator),)
        contents = client.speculators(self.speculator).items
        if self.speculator and not contents:
            raise NotFound(f"no namespace has an AdaptiveSpeculator {self.speculator}")
        return contents

    def _chosen(self, client: ClusterClient) -> Json:
        contents = self._owners(client)
        if not contents:
            raise NotFound(f"namespace {client.namespace} has no AdaptiveSpeculator")
        if len(contents) > 1:
            names = ", ".join(item["metadata"]["name"] for item in contents)
            raise InvalidInput(f"namespace {client.namespace} has more than one AdaptiveSpeculator, name one: {names}")
        return contents[0]

    def _one(self, client: ClusterClient) -> tuple[Speculator, tuple[Json, ...]]:
        owner = objects.speculator(self._chosen(client))
        return owner, client.versions(owner.name)

    def _changing(self, client: ClusterClient, name: str, within_s: int) -> Iterator[tuple[Json, ...]]:
        """Yield the AdaptiveSpeculators, and again after every change, until the watch ends."""
        listed = client.speculators(name)
        contents = {objects.key(item): item for item in listed.items}
        yield tuple(contents.values())
        for change, item in client.changes(name, listed.resource_version, within_s):
            if change == "DELETED":
                contents.pop(objects.key(item), None)
            else:
                contents[objects.key(item)] = item
            yield tuple(contents.values())


def _installation(client: ClusterClient, contents: tuple[Json, ...]) -> Installation:
    speculators = sorted(map(objects.speculator, contents), key=lambda s: (s.namespace, s.name))
    return Installation(namespace=client.namespace, speculators=tuple(speculators))


def _snapshot(client: ClusterClient, contents: tuple[Json, ...]) -> Snapshot:
    installation = _installation(client, contents)
    problem, versions, imports = "", client.versions(), tuple(objects.waiting_imports(client.imports()))
    of_pods: tuple[Json, ...] = ()
    try:
        of_pods = _pods(client)
    except Forbidden as error:  # the rest does not depend on them
        problem = str(error)
    return Snapshot(
        time=datetime.now(UTC),
        installation=installation,
        speculators=tuple(
            SpeculatorSnapshot(
                speculator=owner,
                drafts=objects.newest_first(objects.draft(content, owner) for content in _owned(versions, owner)),
                history=_history(_owned(versions, owner)),
                pods=tuple(pods.pod(content) for content in of_pods if pods.owner(content) == owner.name),
                pods_problem=problem,
                imports=tuple(
                    one for one in imports if (one.namespace, one.speculator) == (owner.namespace, owner.name)
                ),
            )
            for owner in installation.speculators or ()
        ),
    )


def _owned(versions: tuple[Json, ...], owner: Speculator) -> tuple[Json, ...]:
    return tuple(content for content in versions if objects.owner_key(content) == (owner.namespace, owner.name))


def _history(versions: tuple[Json, ...]) -> tuple[HistoryEntry, ...]:
    """Return the changes of all these versions, oldest first."""
    entries = (entry for content in versions for entry in objects.history(content))
    return tuple(sorted(entries, key=lambda entry: entry.time))


def _pods(client: ClusterClient) -> tuple[Json, ...]:
    """Each once, even with the labels of both selectors."""
    found = (content for selector in pods.SELECTORS for content in client.pods(selector))
    return tuple({objects.key(content): content for content in found}.values())


def _metrics(client: ClusterClient, pod: str, port: pods.MetricsPort | None) -> tuple[Serving | None, str]:
    """Return what a pod tells about itself, or the reason why it cannot be read."""
    if port is None:
        return None, "it has no port for metrics"
    try:
        metrics = parse(client.pod_metrics(pod, port.number, scheme=port.scheme))
        return (serving(metrics), "") if metrics.has("updraft_inference_") else (None, "it has no metrics of Updraft")
    except (UpdraftError, ValueError) as error:
        return None, str(error)


def _asked(owner: Speculator, version: Version | None) -> int:
    """Return the number of the version that a question is about; 0: there is none."""
    return _number(owner, version) if version is not None else owner.candidate or owner.latest


def _rollout(owner: Speculator, versions: tuple[Json, ...], number: int, *, is_endless: bool = False) -> RolloutStatus:
    """Return the rollout of a version; NotFound if nothing tells its outcome, unless the watch goes on anyway."""
    if not number:
        return RolloutStatus.of(owner, None)
    try:
        content = _numbered(owner, versions, number)
    except NotFound:  # the DraftVersion does not exist yet, or is gone
        outcome = _outcome_without_object(owner, number)
        if outcome is None and not is_endless:
            raise
        return replace(RolloutStatus.of(owner, None), outcome=outcome or Outcome.UNDER_WAY)
    return RolloutStatus.of(
        owner, objects.draft(content, owner), has_served=has_served(tuple(objects.history(content)))
    )


def _outcome_without_object(owner: Speculator, number: int) -> Outcome | None:
    failure = owner.resource.last_failure if owner.resource else None
    if (current := outcome_of_role(owner, number)) is not None:
        return current
    return Outcome.LOST if failure is not None and failure.version == number else None


def _number(owner: Speculator, version: Version) -> int:
    """Return the number of a version named by number or by role; Conflict if no version has the role."""
    if isinstance(version, int):
        return version
    number: int = getattr(owner, version)
    if not number:
        raise Conflict(f"{owner.name} has no {version} version now")
    return number


def _numbered(owner: Speculator, versions: tuple[Json, ...], version: Version) -> Json:
    number = _number(owner, version)
    for content in versions:
        if objects.draft(content, None).version == number:
            return content
    raise NotFound(f"{owner.name} has no DraftVersion with the number {number}")


def _warning(content: Json, field: str) -> str:
    """Return a sentence when somebody else manages the field; else nothing."""
    others = [writer for writer in objects.writers(content, field) if writer not in _BY_HAND]
    if not others:
        return ""
    return f"{' and '.join(others)} also set spec.rollout.{field}, and may set it back: change it there too."


def _shortened(seconds: int, deadline_s: float | None) -> int:
    """Return the length of a watch that ends soon after the deadline."""
    return seconds if deadline_s is None else max(1, min(seconds, round(deadline_s - time.monotonic())))
