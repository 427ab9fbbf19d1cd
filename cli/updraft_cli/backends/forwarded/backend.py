"""A cluster as the console uses it: read from the API server and, with the person's rights, from the registries.

Decisions are patches of the resource, as those of the commands; the registry is only read.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from updraft_chassis.errors import NotFound, Unauthenticated, UpdraftError
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.drafts import DraftDetails
from updraft_cli.backends.forwarded import joined
from updraft_cli.backends.forwarded.tunnels import Tunnels, tunnels
from updraft_cli.backends.protocol import Decision, Verb, Version
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.snapshot import PodDetails, Snapshot, SpeculatorSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardedBackend:
    cluster: ClusterBackend
    tunnels: Tunnels
    reported: dict[str, Generator[Snapshot]]
    """States of each registry, by its address."""

    @property
    def place(self) -> str:
        return self.cluster.place

    @property
    def has_reasons(self) -> bool:
        return self.cluster.has_reasons

    def about(self, speculator: str, reason: str = "") -> Self:
        return replace(self, cluster=self.cluster.about(speculator, reason))

    def refusal(self) -> str:
        return self.cluster.refusal()

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        return self.cluster.decide(verb, version)

    def snapshots(self) -> Generator[Snapshot]:
        for snapshot in self.cluster.snapshots():
            yield replace(snapshot, speculators=tuple(map(self._joined, snapshot.speculators)))

    def draft(self, version: Version) -> DraftDetails:
        ours = self.cluster.draft(version)
        number, registry = ours.draft.version, self._registry()
        if registry is None or number is None:
            return ours
        try:
            return joined.details(ours, registry.draft(number))
        except UpdraftError:
            return ours

    def pod(self, name: str) -> PodDetails:
        ours, registry = self.cluster.pod(name), self._registry()
        if registry is None:
            return ours
        try:
            return joined.pod_details(ours, registry.pod(name))
        except NotFound:
            return ours  # it has not reported yet
        except UpdraftError as error:
            return replace(ours, capture_problem=f"the registry cannot be read: {error}")

    def _joined(self, one: SpeculatorSnapshot) -> SpeculatorSnapshot:
        tunnel = self.tunnels.to(one.speculator.namespace, one.name)
        if (registry := tunnel.registry()) is None:
            return replace(one, registry_problem=tunnel.problem)
        states = self.reported.setdefault(registry.address, registry.snapshots())
        try:
            (reported,) = next(states).speculators
        except UpdraftError as error:
            self.reported.pop(registry.address)
            tunnel.failed(_sentence(error))
            return replace(one, registry_problem=tunnel.problem)
        except ValueError:
            return replace(one, registry_problem="it has no such speculator")
        return joined.joined(one, reported)

    def _registry(self) -> RegistryBackend | None:
        """The one of this speculator, if it can be asked now."""
        return self.tunnels.of(self.cluster.speculator)


def _sentence(error: UpdraftError) -> UpdraftError:
    """Return an error that a person can act on here, where there are none of the options that the client's sentence names."""
    if isinstance(error, Unauthenticated):
        return Unauthenticated("it does not accept the token of its ServiceAccount; another one is asked for")
    return error


@contextmanager
def forwarded(cluster: ClusterBackend) -> Iterator[ForwardedBackend]:
    """Yield the cluster with its registries; the ways to these are closed at the end of the block."""
    with tunnels(cluster.context) as opened:
        yield ForwardedBackend(cluster=cluster, tunnels=opened, reported={})
