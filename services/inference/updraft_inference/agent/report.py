"""Builds the report of the pod for the registry: its complete state at the time of sending."""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.clock import Clock
from updraft_inference.agent.capture import Capture
from updraft_inference.agent.counters import Tallies, folded, with_errors
from updraft_inference.agent.domains import admit, label
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.swap import Swapper
from updraft_inference.agent.trace import Origin
from updraft_inference.engine import CountedRequest, DraftHolder, FinishedRequest


@dataclass(slots=True, kw_only=True)
class PodState:
    """Counts finished requests and builds PodReports. `capture` is None if nothing is captured."""

    origin: Origin
    engine: DraftHolder
    swapper: Swapper
    capture: Capture | None
    is_draining: Callable[[], bool]
    clock: Clock
    _boot_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _tallies: Tallies = field(default_factory=dict)
    _domains: Mapping[str, int] = field(default_factory=dict)
    _faults: Counter[int] = field(default_factory=Counter)

    def count(self, finished: FinishedRequest | CountedRequest, plan: CapturePlan) -> None:
        domain = label(plan.domain)
        if domain:
            self._domains = admit(self._domains, domain)
        self._tallies = folded(self._tallies, finished, domain=domain, domains=self._domains)

    def report(self) -> fleet_pb2.PodReport:
        self._count_faults()
        return fleet_pb2.PodReport(
            identity=self._identity(),
            loaded=self.swapper.loaded,
            prefetched_versions=self.swapper.prefetched,
            versions=self._counters(),
            swaps=self.swapper.counters,
            status=self.swapper.status,
            capture=self._capture_counters(),
            draining=self.is_draining(),
            device=self.engine.device,
            running_requests=self.engine.load.running,
            speedup=self._speedup(),
            sent_unix_ms=int(self.clock.now() * 1000),
        )

    def _counters(self) -> Iterator[fleet_pb2.VersionCounters]:
        """Domains only of the versions at hand, because no other is compared or shown."""
        held = {self.swapper.loaded.version, *self.swapper.prefetched}
        for version, counters in self._tallies.items():
            copy = fleet_pb2.VersionCounters()
            copy.CopyFrom(counters)
            if version not in held:
                copy.ClearField("domains")
            yield copy

    def _count_faults(self) -> None:
        faults = Counter(self.engine.faults)
        for version, num in (faults - self._faults).items():
            self._tallies = with_errors(self._tallies, version, num)
        self._faults = faults

    def _capture_counters(self) -> fleet_pb2.CaptureCounters | None:
        if self.capture is None:
            return None
        counters = self.capture.counters
        counters.problem = self.engine.capture_problem or self.swapper.late.reason or self.capture.problem
        return counters

    def _speedup(self) -> registry_pb2.Speedup | None:
        overall = self.engine.speedups.get(0)
        return None if overall is None else registry_pb2.Speedup(**asdict(overall))

    def _identity(self) -> fleet_pb2.PodIdentity:
        origin = asdict(self.origin)
        del origin["quantization"]
        return fleet_pb2.PodIdentity(**origin, boot_id=self._boot_id)
