"""What the registry says of our speculator, and the weights of what serves on this disk.

The outlook is refreshed by a task of its own, so that a registry that does not answer costs learning nothing.
"""

import asyncio
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.retry import Backoff
from updraft_trainer.metrics import Metrics

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

POLL_S = 2.0
"""How old the outlook may be; a List of one row costs the registry nothing."""

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutState:
    """`serving`: a version, 0 = none. `hold` says why nothing new would be tried; empty if it would."""

    serving: int
    basis: int
    """The version that a new trainer goes on from; 0: none binds it, for every draft so far was rejected."""
    hold: str
    target_fingerprint: str
    draft_vocabulary_fingerprint: str

    def check_target(self, fingerprint: str) -> None:
        """Raise Conflict if the registry's drafts are for another target: nothing we learn could ever serve."""
        _check("target", self.target_fingerprint, fingerprint)

    def check_vocabulary(self, fingerprint: str) -> None:
        """Raise Conflict if the registry's drafts have another vocabulary than ours."""
        _check("draft vocabulary", self.draft_vocabulary_fingerprint, fingerprint)


class RegistryView:
    """The registry, as far as the trainer reads from it. `outlook` is None until the first answer."""

    def __init__(self, stub: "RegistryAsyncStub", speculator: str, folder: Path, metrics: Metrics) -> None:
        self._stub = stub
        self._speculator = speculator
        self._folder = folder
        self._metrics = metrics
        self._is_up: bool | None = None
        self.outlook: RolloutState | None = None

    async def follow(self, stop: Stop) -> None:
        """Keep the outlook fresh until `stop`."""
        backoff = Backoff(initial_s=0.2, cap_s=POLL_S * 5)
        while not stop.requested:
            try:
                await self.look()
            except Conflict:
                raise  # for another target: waiting cannot mend it
            except UpdraftError as error:
                self._note(is_up=False, why=str(error))
                await stop.wait(next(backoff))
            else:
                backoff.reset()
                await stop.wait(POLL_S)

    async def look(self) -> RolloutState:
        """Ask now. Unavailable if the registry is away."""
        request = registry_pb2.ListRequest(speculator=self._speculator, page_size=1)
        with rpc.errors():
            answer = await self._stub.List(request, timeout=_TIMEOUT_S)
        state = next(iter(answer.speculators), registry_pb2.SpeculatorState())
        self._note(is_up=True)
        self._metrics.serving_version.set(state.stable)
        self.outlook = RolloutState(
            serving=state.stable,
            basis=_basis(state),
            hold=_hold(state),
            target_fingerprint=state.target_fingerprint,
            draft_vocabulary_fingerprint=state.draft_vocabulary_fingerprint,
        )
        return self.outlook

    async def fetch(self, version: int) -> Path:
        """The folder of a version, downloaded if it is not here; others are forgotten."""
        folder = await transfer.download(self._stub, self._speculator, version, self._folder)
        await asyncio.to_thread(_keep_only, folder)
        return folder

    def note_serving(self, version: int) -> None:
        """Take the registry's answer to a publication before the next look."""
        if self.outlook is not None:
            self.outlook = replace(self.outlook, serving=version, basis=version)
            self._metrics.serving_version.set(version)

    def _note(self, *, is_up: bool, why: str = "") -> None:
        """Say once that the registry went away or came back."""
        if is_up is not self._is_up:
            self._metrics.registry_up.set(is_up)
            if not is_up:
                logger.warning("The registry is away; learning goes on", extra={"why": why})
            elif self._is_up is not None:
                logger.info("The registry is back")
        self._is_up = is_up


def _check(what: str, its: str, ours: str) -> None:
    if its and its != ours:
        raise Conflict(
            f"the registry's drafts have the {what} {its}, this trainer's is {ours};"
            " set UPDRAFT_TRAINER_SPECULATOR or UPDRAFT_TRAINER_DATA_DIR to another"
        )


def _basis(state: registry_pb2.SpeculatorState) -> int:
    """The best that there is of the lineage; the registry names its vocabulary once there is a lineage."""
    is_bound = bool(state.draft_vocabulary_fingerprint)
    return (state.stable or state.candidate or state.previous or state.latest) if is_bound else 0


def _hold(state: registry_pb2.SpeculatorState) -> str:
    if state.HasField("pinned"):
        return f"version {state.pinned} is pinned" if state.pinned else "no draft is pinned"
    return "the rollout is paused" if state.paused else ""


def _keep_only(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
