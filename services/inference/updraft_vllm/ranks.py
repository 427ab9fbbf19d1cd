"""One of several tensor-parallel ranks: its swap, which the process of the engine leads.

Each rank swaps its own part of the draft on a thread of its own, and waits wherever all ranks must be at the same place: before
it writes, and before it relies on its proof. The process of the engine asks all ranks through vLLM's own call to its workers,
which each of them gets between the same two steps; see `updraft_vllm.lead`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from updraft_tap.swap import Swap
from updraft_tap.weights import RefusedError
from updraft_vllm.drafting import ProposalHooks

ATTRIBUTE = "updraft_rank"
"""The attribute of vLLM's worker that has its `Rank`."""

WORKS, WRITES, AGREES, ENDED = "works", "writes", "agrees", "ended"
"""Where the swap of a rank is: at work, or it waits to write, or for what the other ranks found, or it has ended."""


def obey(worker: Any, command: str, *arguments: Any) -> Any:
    """Called in the process of each rank, on the thread of its steps. Raises nothing, because that would end the server."""
    try:
        rank = getattr(worker, ATTRIBUTE, None)
        if rank is None:
            return {"at": ENDED, "answer": {"refusal": "the plugin did not start on this rank"}}
        return getattr(rank, command)(*arguments)
    except Exception as error:  # noqa: BLE001
        return {"at": ENDED, "answer": {"refusal": f"{type(error).__name__}: {error}"}}


@dataclass(slots=True, kw_only=True)
class _Stop:
    """Where the swap of this rank waits."""

    at: str
    problem: str = ""
    draft: str = ""
    body: Callable[[], None] | None = None
    undo: Callable[[], None] | None = None
    took_s: float = 0.0
    refusal: str | None = None
    """Why it may not go on; "" if it may; None while it waits."""


class Rank:
    """The lockstep of this rank's swap (see `updraft_tap.between_steps`), and what the leader may ask of it.

    `synchronize` waits until the device has nothing to do.
    """

    is_alone = False

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.swap: Swap | None = None
        self.no_swap = "the worker is starting"
        """Why there is none."""
        self.proposals: ProposalHooks | None = None
        """The hook that leaves out a draft that nobody has trained, if there is one."""
        self.changed: Callable[[], None] = lambda: None
        """Called if it is served something else than was told."""
        self._synchronize = synchronize
        self._change = threading.Condition()
        self._stop: _Stop | None = None
        self._answer: Mapping[str, Any] | None = None

    def answer(self, answer: Mapping[str, Any]) -> None:
        """The swap has ended."""
        with self._change:
            self._answer = answer

    def write(
        self, body: Callable[[], None], undo: Callable[[], None] | None, timeout_s: float, draft: str = ""
    ) -> float:
        """See `Lockstep`. The leader waits for a step as long as vLLM does, so the time limit has no meaning."""
        stop = _Stop(at=WRITES, body=body, undo=undo, draft=draft)
        self._wait(stop)
        return stop.took_s

    def agree(self, problem: str) -> None:
        """See `Lockstep`."""
        stop = _Stop(at=AGREES, problem=problem)
        try:
            self._wait(stop)
        except RefusedError:
            if not problem:
                raise

    def _wait(self, stop: _Stop) -> None:
        with self._change:
            self._stop = stop
            self._change.wait_for(lambda: stop.refusal is not None)
        if stop.refusal:
            raise RefusedError(stop.refusal)

    # Commands of the leader.

    def load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to swap. A load whose leader gave up ends now, or soon."""
        self.release("the leader of this load gave up")
        with self._change:
            self._answer = None
        if self.swap is None or self.no_swap:
            self.answer({"refusal": self.no_swap})
        else:
            self.swap.load(message)
        return self.state()

    def state(self) -> dict[str, Any]:
        """Where the swap is, with its answer or its problem."""
        with self._change:
            if self._answer is not None:
                # Since it ended, somebody else may have changed the weights, and the agent may have been told so.
                served = {"served": self.swap.served} if self.swap is not None and "served" in self._answer else {}
                return {"at": ENDED, "answer": {**self._answer, **served}}
            if self._stop is not None:
                return {"at": self._stop.at, "problem": self._stop.problem, "draft": self._stop.draft}
            return {"at": WORKS}

    def turn(self) -> dict[str, Any]:
        """Write; the problem, or "" if it is done."""
        stop = self._stop
        assert stop is not None
        started = time.perf_counter()
        stop.problem = self._run(stop.body)
        stop.took_s = time.perf_counter() - started
        return {"at": WRITES, "problem": stop.problem}

    def undo(self) -> dict[str, Any]:
        """Make undone what was written in this turn; why something of it is left, or ""."""
        stop = self._stop
        assert stop is not None
        if stop.undo is None:
            return {"at": WRITES, "problem": "" if stop.problem else "this rank has put back its draft"}
        return {"at": WRITES, "problem": self._run(stop.undo)}

    def release(self, refusal: str) -> dict[str, Any]:
        """Let the swap go on, or refuse that with a reason. Nothing if it does not wait."""
        with self._change:
            stop, self._stop = self._stop, None
            if stop is not None:
                stop.refusal = refusal
                self._change.notify_all()
        return {"at": WORKS}

    def can_skip(self) -> bool:
        """Whether an untrained draft can be left out on this rank."""
        return self.proposals is not None

    def skip(self) -> None:
        """All ranks can leave it out, and do so from now on."""
        assert self.proposals is not None
        self.proposals.is_on = True

    def doubt(self) -> dict[str, Any]:
        """The ranks hold different drafts, or may do so."""
        if self.swap is not None and self.swap.doubt():  # else it is no news, and the agent would try again at once
            self.changed()
        return {"at": ENDED}

    def _run(self, body: Callable[[], None] | None) -> str:
        assert body is not None
        try:
            self._synchronize()
            body()
            self._synchronize()
        except Exception as error:  # noqa: BLE001  (it is told, and the thread is the engine's)
            return str(error) or type(error).__name__
        return ""
