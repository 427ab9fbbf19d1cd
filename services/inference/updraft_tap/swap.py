"""Swaps the draft of a running engine in place: everything is checked and prepared first, then copied between two steps.

A draft that is refused leaves the one before, which is put back if need be. The proof of a swap is a digest of what the
engine holds afterwards, which must equal that of the file, and one of samples of the target, which must stay the same.
Each of several ranks has a part of the weights and swaps it; a draft that one of them refuses leaves the one before on all.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from updraft_tap import weights
from updraft_tap.between_steps import BetweenSteps, Lockstep, OneRank
from updraft_tap.weights import (
    AS_BEFORE,
    NOT_AS_BEFORE,
    UNKNOWN,
    OtherShapeError,
    RefusedError,
    ServedVersion,
    TargetChangedError,
)

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How long a step of the engine may take before a swap gives up."""

Write = Callable[[], None]
Pieces = Sequence[Callable[[], Tensor]]
"""How to read a weight in pieces, which are joined along the last dimension."""


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

    def part(self, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of a draft (by `weights.served_name`) as far as this rank holds them. Raises RefusedError."""
        ...

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Write]:
        """Copies and assignments that replace the weights, of which it gets its part, and the map. Raises RefusedError."""
        ...

    def kept(self) -> Sequence[Write]:
        """Copies and assignments that put back all weights and the map as they are now."""
        ...

    def readers(self) -> Mapping[str, Pieces]:
        """How to read each weight and "d2t" as the engine holds it."""
        ...

    def target(self) -> Mapping[str, Tensor]:
        """Weights of the target of which samples are compared: those that the draft shares, and some others."""
        ...


class Swap:
    """Obeys `load` messages, one at a time, on a thread of its own. `reply` sends a message to the agent."""

    def __init__(
        self,
        *,
        draft: Draft,
        between: BetweenSteps,
        served: ServedVersion,
        reply: Callable[[dict[str, Any]], None],
        lockstep: Lockstep | None = None,
    ) -> None:
        self._draft = draft
        self._between = between
        self._lockstep = lockstep or OneRank(between)
        self._served = served
        self._reply = reply
        self._busy = threading.Lock()
        self._examining = threading.Lock()
        """Held by a load and by a look at what is served, so that one waits for the other."""
        self._touching = threading.Lock()
        """Held while weights are read or written."""
        self._closed = ""
        self._num_closed = 0
        """How often the engine has closed its weights so far: afterwards they may be others."""
        self._is_touched = False
        """The load in progress has begun to write."""
        self._is_undone = False
        """The load in progress has put back all that it wrote."""
        self._proof, self._proved = "", (0, "")
        """Digest of what the engine held after the last swap that succeeded, and the version and digest that it has."""

    @property
    def served(self) -> dict[str, Any]:
        """The version and the digest that are served now, as answers have them."""
        return {"version": self._served.version, "digest": self._served.digest}

    def load(self, message: Mapping[str, Any]) -> None:
        """Serve the draft in `folder` as `version` with `digest`; answers `loaded` when it is done, or refused."""
        if not self._busy.acquire(blocking=False):
            self._answer(message, refusal="another draft is being loaded")
            return
        threading.Thread(target=self._run, args=(dict(message),), name="updraft-swap", daemon=True).start()

    def close(self, reason: str) -> None:
        """The engine is about to free or to change its weights, so touch them no more until `open`.

        Waits for work that touches them now. What is served afterwards is not known, so its digest is forgotten.
        """
        self._closed = reason
        with self._touching:
            self._num_closed += 1
            self._served.digest = UNKNOWN

    def open(self, changed: Callable[[], None]) -> None:
        """The weights may be touched again, and may be others. Calls `changed` when it is known what is served.

        The draft of several ranks counts as lost, because another rank may have lost its part.
        """
        self._closed = ""
        if not self._lockstep.is_alone:
            with self._touching:
                self._served.version, self._served.digest, self._proof = 0, UNKNOWN, ""
            changed()
            return
        threading.Thread(target=self._look, args=(changed,), name="updraft-swap", daemon=True).start()

    def doubt(self) -> bool:
        """Forget the digest, because other ranks hold another draft, or may do so. Returns whether it was known."""
        with self._touching:
            was_known = self._served.digest != UNKNOWN
            self._served.digest = UNKNOWN
        return was_known

    def _look(self, changed: Callable[[], None]) -> None:
        """Whether the draft that was swapped in is still there. Without a proof it counts as lost."""
        with self._examining:
            held = ""
            if self._proof:
                with suppress(BaseException):  # then it stays unknown, and `changed` is called all the same
                    held, _ = self._held()
            with self._touching:
                if not self._closed:
                    is_there = bool(held) and held == self._proof
                    self._served.version, self._served.digest = self._proved if is_there else (0, UNKNOWN)
                    self._served.written = self._served.version
        changed()

    def _run(self, message: Mapping[str, Any]) -> None:
        try:
            with self._examining:
                result = self._load(*_read(message))
        except BaseException as error:  # noqa: BLE001  (also SystemExit, and a panic of Rust: the next draft may be loaded)
            log.error("Updraft refused a draft: %s", error)
            result = {
                "refusal": str(error) or type(error).__name__,
                "needs_restart": isinstance(error, OtherShapeError),
                "target_changed": isinstance(error, TargetChangedError),
            }
        self._busy.release()  # first, because an agent that is answered may send the next one at once
        self._answer(message, **result)

    def _load(self, folder: Path, version: int, digest: str) -> dict[str, Any]:
        """The proof: digests of the loaded weights and of the target, and how long the engine stood still at most."""
        tensors = weights.read(folder, self._draft.config, self._draft.aux_size)
        prepared, d2t = weights.joined(tensors, self._draft.dtype), tensors["d2t"]
        part = self._draft.part(prepared)
        writes = self._draft.prepare(part, d2t)
        expected = weights.digest({**part, "d2t": d2t})
        whole = expected if part is prepared else weights.digest({**prepared, "d2t": d2t})
        with self._access():
            digest_before, num_closed = self._served.digest, self._num_closed
            restore = self._restoring(self._draft.kept())
        del tensors, prepared, part  # of a large draft, and each rank has read all of it
        target = self._target_before()
        self._is_touched = self._is_undone = False
        try:
            body, undo = partial(self._write, writes, version, restore), partial(self._undo, restore)
            pause_s = self._lockstep.write(body, undo, _PATIENCE_S, whole)
            proof, longest_s = self._agreed(lambda: (self._unchanged(target), self._prove(expected)))
            self._note_proof(expected, digest, num_closed)
        except BaseException as error:  # also SystemExit, and a panic of Rust: a refused draft may not stay
            if not self._is_touched:
                raise
            left = self._put_back(undo, digest_before)
            refusal = f"the draft in {folder} was loaded, but {error}{left}"
            is_changed = self._is_changed(target)
            if is_changed or isinstance(error, TargetChangedError):
                raise TargetChangedError(f"{refusal}; {AS_BEFORE if is_changed is False else NOT_AS_BEFORE}") from error
            raise RefusedError(refusal) from error
        return {"held": whole, "target": proof, "pause_us": round(1e6 * max(pause_s, longest_s))}

    def _target(self) -> tuple[str, int]:
        """A digest of samples of the target, which is comparable while the number is the same."""
        with self._access():
            return weights.sampled(self._draft.target()), self._num_closed

    def _target_before(self) -> tuple[str, int]:
        """Before a swap. The digest is "" if the samples cannot be read, as of tensors of unusual types."""
        try:
            return self._target()
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001  (the draft can be swapped all the same)
            log.warning("Updraft cannot compare the target before and after a swap: %s", error)
            return "", 0

    def _unchanged(self, before: tuple[str, int]) -> str:
        """The digest of the target's samples; "" if they cannot be compared. Raises TargetChangedError if we changed them."""
        digest, num_closed = self._target() if before[0] else before
        if num_closed != before[1]:
            return ""
        if digest != before[0]:
            raise TargetChangedError("that changed weights of the target")
        return digest

    def _is_changed(self, before: tuple[str, int]) -> bool | None:
        """Whether the target differs after the draft was put back; None if that is not known."""
        with suppress(BaseException):  # then it is not known
            digest, num_closed = self._target()
            if before[0] and num_closed == before[1]:
                return digest != before[0]
        return None

    def _agreed(self, check: Callable[[], tuple[str, float]]) -> tuple[str, float]:
        """Return the result of the check once no rank has a problem. Raises what it raises, or RefusedError."""
        try:
            result = check()
        except BaseException as error:  # the other ranks wait to be told
            self._lockstep.agree(str(error) or type(error).__name__)
            raise
        self._lockstep.agree("")
        return result

    def _prove(self, expected: str) -> float:
        """Returns for how many seconds the engine stood still at most. Raises RefusedError if it holds anything else."""
        held, longest_s = self._held()
        if held != expected:
            raise RefusedError(f"the engine holds {held}, expected {expected}")
        return longest_s

    def _note_proof(self, held: str, digest: str, num_closed: int) -> None:
        with self._access():
            if num_closed != self._num_closed and not self._lockstep.is_alone:  # one rank looks at its own again
                raise RefusedError("the engine closed its weights meanwhile, so another rank may have lost its part")
            self._served.digest, self._proof = digest, held
            self._proved = self._served.version, digest

    def _write(self, writes: Sequence[Write], version: int, restore: Write) -> None:
        with self._access():
            self._is_touched = True
            self._served.digest = UNKNOWN  # until the proof, nothing is known of what is served
            try:
                _all(writes)
            except BaseException:
                restore()  # at once, because no step may draft with a mixture
                raise
            self._served.version = self._served.written = version

    def _restoring(self, kept: Sequence[Write]) -> Write:
        """The work that makes all as it is now, except the digest; within `_access`."""
        version, written = self._served.version, self._served.written

        def restore() -> None:
            _all(kept)
            self._served.version, self._served.written = version, written

        return restore

    def _undo(self, restore: Write) -> None:
        if self._is_touched:
            with self._access():
                restore()
            self._is_undone = True

    def _put_back(self, put_back: Write, digest: str) -> str:
        """Waits for as long as it takes, because a refused draft may not go on drafting. Returns why it does; else ""."""
        try:
            if not self._is_undone:
                self._lockstep.write(put_back, None, math.inf)
        except BaseException as error:  # noqa: BLE001  (it is told)
            return f"; the one before cannot be put back, so one may be loaded only in part; load another one: {error}"
        with suppress(BaseException):  # then it stays unknown
            held, _ = self._held()
            with self._access():
                self._served.digest = digest if held == self._proof else UNKNOWN
        return ""

    def _held(self) -> tuple[str, float]:
        """The digest of what the engine holds now, and for how many seconds it stood still at most to read a piece."""
        self._between.settle()
        longest_s, found = 0.0, {}
        for name, pieces in self._draft.readers().items():
            parts = []
            for piece in pieces:
                part, took_s = self._piece(piece)
                parts.append(part)
                longest_s = max(longest_s, took_s)
            found[name] = torch.cat(parts, -1)
        return weights.digest(found), longest_s

    def _piece(self, piece: Callable[[], Tensor]) -> tuple[Tensor, float]:
        found: list[Tensor] = []

        def read() -> None:
            with self._access():
                found.append(piece())

        if self._draft.is_read_at_rest:
            took_s = self._between.run(read, _PATIENCE_S)
        else:
            read()
            took_s = 0.0
        return found[0], took_s

    @contextmanager
    def _access(self) -> Iterator[None]:
        """Within it the weights are there and nobody else changes them. Raises RefusedError if the engine has closed them."""
        with self._touching:
            if self._closed:
                raise RefusedError(self._closed)
            yield

    def _answer(self, message: Mapping[str, Any], **result: Any) -> None:
        self._reply(
            {
                "kind": "loaded",
                "version": message.get("version"),
                "refusal": "",
                **result,
                "served": self.served,
            }
        )


def _all(writes: Sequence[Write]) -> None:
    for write in writes:
        write()


def _read(message: Mapping[str, Any]) -> tuple[Path, int, str]:
    folder, version, digest = (message.get(name) for name in ("folder", "version", "digest"))
    if not isinstance(folder, str) or type(version) is not int or not isinstance(digest, str):
        raise RefusedError("a load needs a folder (text), a version (whole number) and a digest (text)")
    return Path(folder), version, digest
