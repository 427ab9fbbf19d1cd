"""Swaps the draft of a running engine in place: everything is checked and prepared first, then copied between two steps.

A draft that is refused leaves the one before as it is. The proof of a swap is a digest of what the engine holds afterwards,
which must equal that of the file.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from updraft_tap import weights
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.weights import RefusedError, ServedVersion

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How long a step of the engine may take before a swap gives up."""

Write = Callable[[], None]


class Draft(Protocol):
    """The draft that the engine serves."""

    @property
    def config(self) -> Any:
        """With the sizes of its config.json as attributes."""
        ...

    @property
    def aux_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_read_at_rest(self) -> bool:
        """Reading a weight uses the engine's own kernels, so it may not happen within a step."""
        ...

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Write]:
        """Copies and assignments that replace the weights (by `weights.served_name`) and the map. Raises RefusedError."""
        ...

    def readers(self) -> Mapping[str, Callable[[], Tensor]]:
        """How to read each weight and "d2t" as the engine holds it."""
        ...


class Swap:
    """Obeys `load` messages, one at a time, on a thread of its own. `reply` sends a message to the agent."""

    def __init__(
        self, *, draft: Draft, between: BetweenSteps, served: ServedVersion, reply: Callable[[dict[str, Any]], None]
    ) -> None:
        self._draft = draft
        self._between = between
        self._served = served
        self._reply = reply
        self._busy = threading.Lock()

    def load(self, message: Mapping[str, Any]) -> None:
        """Serve the draft in `folder` as `version` with `digest`; answers `loaded` when it is done, or refused."""
        if not self._busy.acquire(blocking=False):
            self._answer(message, refusal="another draft is being loaded")
            return
        threading.Thread(target=self._run, args=(dict(message),), name="updraft-swap", daemon=True).start()

    def held(self) -> str:
        """The digest of what the engine holds now. Raises what a reader raises."""
        self._between.settle()
        return weights.digest({name: self._read(reader) for name, reader in self._draft.readers().items()})

    def _read(self, reader: Callable[[], Tensor]) -> Tensor:
        if not self._draft.is_read_at_rest:
            return reader()
        found: list[Tensor] = []
        self._between.run(lambda: found.append(reader()), _PATIENCE_S)
        return found[0]

    def _run(self, message: Mapping[str, Any]) -> None:
        refusal, held, pause_s = "", "", 0.0
        try:
            held, pause_s = self._swap(*_read(message))
        except Exception as error:  # noqa: BLE001  (the agent is told, and the engine serves on)
            log.error("Updraft refused a draft: %s", error)
            refusal = str(error) or type(error).__name__
        self._busy.release()  # first, because an agent that is answered may send the next one at once
        self._answer(message, refusal=refusal, held=held, pause_us=round(1e6 * pause_s))

    def _swap(self, folder: Path, version: int, digest: str) -> tuple[str, float]:
        tensors = weights.read(folder, self._draft.config, self._draft.aux_size)
        prepared = weights.joined(tensors, self._draft.dtype)
        writes = self._draft.prepare(prepared, tensors["d2t"])
        expected = weights.digest({**prepared, "d2t": tensors["d2t"]})

        def write() -> None:
            self._served.digest = ""  # until the proof, nothing is known of what is served
            try:
                for one in writes:
                    one()
            except Exception as error:
                raise RefusedError(
                    f"the draft in {folder} was loaded only in part; load another one: {error}"
                ) from error
            self._served.version = version

        pause_s = self._between.run(write, _PATIENCE_S)
        held = self.held()
        if held != expected:
            raise RefusedError(f"the draft in {folder} was loaded, but the engine holds {held}, expected {expected}")
        self._served.digest = digest
        return held, pause_s

    def _answer(self, message: Mapping[str, Any], *, refusal: str = "", held: str = "", pause_us: int = 0) -> None:
        self._reply(
            {
                "kind": "loaded",
                "version": message.get("version"),
                "refusal": refusal,
                "held": held,
                "pause_us": pause_us,
                "served": {"version": self._served.version, "digest": self._served.digest},
            }
        )


def _read(message: Mapping[str, Any]) -> tuple[Path, int, str]:
    folder, version, digest = (message.get(name) for name in ("folder", "version", "digest"))
    if not isinstance(folder, str) or type(version) is not int or not isinstance(digest, str):
        raise RefusedError("a load needs a folder (text), a version (whole number) and a digest (text)")
    return Path(folder), version, digest
