"""A cluster as the console uses it: read from the API server and, with the person's rights, from the registries.

Decisions are patches of the resource, as those of the commands; the registry is only read.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Self

from updraft_chassis.errors import NotFound, UpdraftError
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.drafts import DraftDetails
from updraft_cli.backends.forwarded import joined
from updraft_cli.backends.forwarded.reports import Report, Reports
from updraft_cli.backends.forwarded.tunnels import tunnels
from updraft_cli.backends.protocol import Decision, Verb, Version
from updraft_cli.backends.snapshot import PodDetails, Snapshot, SpeculatorSnapshot

_OLD_S = 5.0
"""A report that is older is shown with its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardedBackend:
    cluster: ClusterBackend
    reports: Reports

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
            reports = self.reports.read(snapshot.speculators)
            yield replace(snapshot, speculators=tuple(map(_joined, snapshot.speculators, reports)))

    def draft(self, version: Version) -> DraftDetails:
        ours = self.cluster.draft(version)
        number, registry = ours.draft.version, self.reports.registry(self.cluster.speculator)
        if registry is None or number is None:
            return ours
        try:
            return joined.details(ours, self.reports.details(self.cluster.speculator, partial(registry.draft, number)))
        except UpdraftError:
            return ours

    def pod(self, name: str) -> PodDetails:
        ours, registry = self.cluster.pod(name), self.reports.registry(self.cluster.speculator)
        if registry is None:
            return ours
        try:
            return joined.pod_details(ours, self.reports.details(self.cluster.speculator, partial(registry.pod, name)))
        except NotFound:
            return ours  # it has not reported yet
        except UpdraftError as error:
            return replace(ours, capture_problem=f"the registry cannot be read: {error}")


def _joined(one: SpeculatorSnapshot, report: Report) -> SpeculatorSnapshot:
    if report.snapshot is None:
        return replace(one, registry_problem=report.problem)
    is_old = report.time is not None and (datetime.now(UTC) - report.time).total_seconds() > _OLD_S
    return replace(joined.joined(one, report.snapshot), reported=report.time if is_old else None)


@contextmanager
def forwarded(cluster: ClusterBackend) -> Iterator[ForwardedBackend]:
    """Yield the cluster with its registries; the ways to these are closed at the end of the block."""
    with tunnels(cluster.context) as opened:
        reports = Reports(opened)
        try:
            yield ForwardedBackend(cluster=cluster, reports=reports)
        finally:
            reports.close()
