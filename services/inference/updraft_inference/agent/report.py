"""Builds the report of the pod for the registry: its complete state at the time of sending."""

import uuid
from collections import Counter
from collections.abc import Callable

from updraft.fleet.v1 import fleet_pb2
from updraft_chassis.clock import Clock
from updraft_inference.agent.capture import Capture
from updraft_inference.agent.counters import Tallies, folded, with_errors
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.swap import Swapper
from updraft_inference.agent.trace import Origin
from updraft_inference.engine import Engine, FinishedRequest


class PodState:
    """Counts finished requests and builds PodReports. `capture` is None if nothing is captured."""

    def __init__(
        self,
        *,
        origin: Origin,
        engine: Engine,
        swapper: Swapper,
        capture: Capture | None,
        is_draining: Callable[[], bool],
        clock: Clock,
    ) -> None:
        self._origin = origin
        self._engine = engine
        self._swapper = swapper
        self._capture = capture
        self._is_draining = is_draining
        self._clock = clock
        self._boot_id = uuid.uuid4().hex
        self._tallies: Tallies = {}
        self._faults: Counter[int] = Counter()

    def count(self, finished: FinishedRequest, _: CapturePlan) -> None:
        self._tallies = folded(self._tallies, finished)

    def report(self) -> fleet_pb2.PodReport:
        self._count_faults()
        return fleet_pb2.PodReport(
            identity=self._identity(),
            loaded=self._swapper.loaded,
            prefetched_versions=self._swapper.prefetched,
            versions=[tally.counters(version) for version, tally in self._tallies.items()],
            swaps=self._swapper.counters,
            status=self._swapper.status,
            capture=self._capture_counters(),
            draining=self._is_draining(),
            running_requests=self._engine.load.running,
            sent_unix_ms=int(self._clock.now() * 1000),
        )

    def _count_faults(self) -> None:
        faults = Counter(self._engine.faults)
        for version, num in (faults - self._faults).items():
            self._tallies = with_errors(self._tallies, version, num)
        self._faults = faults

    def _capture_counters(self) -> fleet_pb2.CaptureCounters | None:
        if self._capture is None:
            return None
        counters = self._capture.counters
        counters.problem = self._engine.capture_problem
        return counters

    def _identity(self) -> fleet_pb2.PodIdentity:
        return fleet_pb2.PodIdentity(
            speculator=self._origin.speculator,
            pod=self._origin.pod,
            engine=self._origin.engine,
            target_fingerprint=self._origin.target_fingerprint,
            tokenizer_fingerprint=self._origin.tokenizer_fingerprint,
            draft_vocabulary_fingerprint=self._engine.loaded.draft_vocabulary_fingerprint,
            boot_id=self._boot_id,
        )
