"""The trainer's view of the registry: the speculator's rollout state, and local copies of published drafts.

A separate task refreshes the state, so that an unresponsive registry does not slow down training.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, InvalidInput, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.retry import Backoff
from updraft_chassis.tenants import hashes
from updraft_trainer.metrics import Metrics

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

POLL_S = 2.0
"""Maximum age of the rollout state. Listing one version is cheap for the registry."""

REPEAT_S = 10.0
"""Interval for repeating a message, which the registry forgets."""

MAX_MESSAGE = 500
"""Characters that the registry takes."""

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutState:
    stable: int
    """The version that serves; 0: no draft."""
    candidate: int
    """The version in canary; 0: none."""
    start_version: int
    """The version that a new trainer starts from; 0: none, because none is in use and the newest was turned down."""
    is_unloadable: bool
    """No version has served, and pods cannot load the newest."""
    hold_reason: str
    """Why the registry would not try a new version; empty if it would."""
    target_fingerprint: str

    def check_target(self, fingerprint: str) -> None:
        """Raise Conflict if the registry's drafts are for another target, because ours could never serve."""
        theirs = self.target_fingerprint
        if theirs and theirs != fingerprint:
            raise Conflict(
                f"the registry's drafts are for the target {theirs}, this trainer's is {fingerprint};"
                " set UPDRAFT_TRAINER_SPECULATOR or UPDRAFT_TRAINER_DATA_DIR to another"
            )


class RegistryView:
    """Reads from the registry, and tells it what the trainer does. `state` is None until the first response."""

    def __init__(
        self,
        stub: "RegistryAsyncStub",
        speculator: str,
        folder: Path,
        metrics: Metrics,
        *,
        learning: Callable[[], registry_pb2.Learning],
    ) -> None:
        self._stub = stub
        self._speculator = speculator
        self._folder = folder
        self._metrics = metrics
        self._learning = learning
        self._is_up: bool | None = None
        self._is_refused = False
        """Whether the registry refused the figures of the last report."""
        self._reported: tuple[str, float | None] = ("", None)
        self._next_report_s = float("-inf")
        self.state: RolloutState | None = None
        self.forgotten: Mapping[str, int] = {}
        """When each tenant was ordered to be forgotten last, in Unix milliseconds. Replaced, never changed."""
        self._message = "the trainer waits for the first requests"
        self._demand: float | None = None

    async def run(self, stop: Stop) -> None:
        """Refresh the state until `stop`."""
        backoff = Backoff(initial_s=0.2, cap_s=POLL_S * 5)
        while not stop.requested:
            try:
                await self.refresh()
            except Conflict:
                raise  # another target: waiting does not help
            except UpdraftError as error:
                self._set_up(is_up=False, reason=str(error))
                await stop.wait(next(backoff))
            else:
                await self.report()
                backoff.reset()
                await stop.wait(POLL_S)

    async def refresh(self) -> RolloutState:
        """Unavailable if the registry does not respond."""
        request = registry_pb2.ListRequest(speculator=self._speculator, page_size=1)
        with rpc.errors():
            response = await self._stub.List(request, timeout=_TIMEOUT_S)
        speculator = next(iter(response.speculators), registry_pb2.SpeculatorState())
        if speculator.forgotten_unix_ms > max(self.forgotten.values(), default=0):
            self.forgotten = await self._forgotten()
        is_unloadable = _is_unloadable(speculator, response.versions)
        self._set_up(is_up=True)
        self._metrics.serving_version.set(speculator.stable)
        self.state = RolloutState(
            stable=speculator.stable,
            candidate=speculator.candidate,
            start_version=_start_version(speculator, response.versions),
            is_unloadable=is_unloadable,
            hold_reason=_hold_reason(speculator),
            target_fingerprint=speculator.target_fingerprint,
        )
        return self.state

    async def _forgotten(self) -> Mapping[str, int]:
        with rpc.errors():
            request = registry_pb2.ListForgottenRequest(speculator=self._speculator)
            response = await self._stub.ListForgotten(request, timeout=_TIMEOUT_S)
        return {hashes.text(tenant.hash): tenant.unix_ms for tenant in response.tenants}

    def set_message(self, message: str) -> None:
        """Set the line in the speculator's state: the last publication, or the reason why nothing is published."""
        self._message = "".join(char if char.isprintable() else " " for char in message)[:MAX_MESSAGE]

    def set_demand(self, tokens_per_s: float) -> None:
        """Set the captured tokens per second that the trainer can use."""
        self._demand = float(f"{tokens_per_s:.2g}")  # rounded, so that only changes that matter are reported
        self._metrics.demand.set(tokens_per_s)

    async def report(self) -> None:
        """Send what is new, and repeat the rest from time to time with what was done since."""
        now_s = asyncio.get_running_loop().time()
        if (self._message, self._demand) == self._reported and now_s < self._next_report_s:
            return
        self._reported, self._next_report_s = (self._message, self._demand), now_s + REPEAT_S
        request = registry_pb2.ReportTrainingRequest(
            speculator=self._speculator,
            message=self._message,
            learning=await asyncio.to_thread(self._learning),
            demand_tokens_per_second=self._demand,
        )
        try:
            await self._send(request)
        except UpdraftError as error:
            self._next_report_s = now_s
            logger.debug("The registry does not take the trainer's report: %s", error)

    async def _send(self, request: registry_pb2.ReportTrainingRequest) -> None:
        try:
            with rpc.errors():
                await self._stub.ReportTraining(request, timeout=_TIMEOUT_S)
        except InvalidInput as error:
            if not self._is_refused:
                extra = {"reason": str(error)}
                logger.warning("The registry refuses figures of the trainer; it gets demand without them", extra=extra)
            self._is_refused = True
            request.ClearField("learning")
            with rpc.errors():
                await self._stub.ReportTraining(request, timeout=_TIMEOUT_S)
        else:
            self._is_refused = False

    async def fetch(self, version: int) -> Path:
        """The folder of a version, downloaded if necessary. Deletes other versions."""
        folder = await transfer.download(self._stub, self._speculator, version, self._folder)
        await asyncio.to_thread(_keep_only, folder)
        return folder

    def set_stable(self, version: int) -> None:
        """Apply the response to a publication before the next refresh."""
        if self.state is not None:
            self.state = replace(self.state, stable=version, start_version=version)
            self._metrics.serving_version.set(version)

    def _set_up(self, *, is_up: bool, reason: str = "") -> None:
        """Log each change once."""
        if is_up is not self._is_up:
            self._metrics.registry_up.set(is_up)
            if not is_up:
                logger.warning("The registry is unavailable; training continues", extra={"reason": reason})
            elif self._is_up is not None:
                logger.info("The registry is available again")
                self._next_report_s = float("-inf")  # it may have restarted, and forgotten
        self._is_up = is_up


def provenance_of(folder: Path) -> registry_pb2.Provenance:
    """Where the version in a folder of `fetch` comes from."""
    text = (folder / transfer.MANIFEST).read_text()
    return json_format.Parse(text, registry_pb2.Manifest(), ignore_unknown_fields=True).provenance


_NEVER_AGAIN = frozenset({registry_pb2.PHASE_FAILED, registry_pb2.PHASE_REJECTED, registry_pb2.PHASE_ROLLED_BACK})


def _is_unloadable(state: registry_pb2.SpeculatorState, newest: Sequence[registry_pb2.Version]) -> bool:
    """`newest`: the newest version, if there is one. The registry fails only versions that pods refuse."""
    return not _in_use(state) and any(version.phase == registry_pb2.PHASE_FAILED for version in newest)


def _start_version(state: registry_pb2.SpeculatorState, newest: Sequence[registry_pb2.Version]) -> int:
    """The version in use, or else the newest; 0 if that will never serve, or if the registry names no target."""
    if not state.target_fingerprint or any(version.phase in _NEVER_AGAIN for version in newest if not _in_use(state)):
        return 0
    return _in_use(state) or state.latest


def _in_use(state: registry_pb2.SpeculatorState) -> int:
    """The best version that serves, is in canary or has served; 0 if there is none."""
    return state.stable or state.candidate or state.previous


def _hold_reason(state: registry_pb2.SpeculatorState) -> str:
    if state.HasField("pinned"):
        return f"version {state.pinned} is pinned" if state.pinned else "no draft is pinned"
    if state.paused:
        return "the rollout is paused"
    # What is compared with no draft now has no evidence any more if that version wins, and it is large.
    is_first = state.candidate and not state.stable
    return f"version {state.candidate} is in canary, and is the first" if is_first else ""


def _keep_only(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
