"""Loads drafts on several tensor-parallel ranks; in the process of the engine, which alone knows the order of their work.

vLLM's engine calls its workers through one queue (`collective_rpc`), from the thread of its steps. So what we call there
happens on all ranks between the same two steps, and no rank waits for another one: no step can begin with different drafts, and
nothing can deadlock. Each call only starts or asks, except for the write itself, and a thread of ours decides what is next.
"""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from updraft_tap.hooks import Binding, Hook
from updraft_tap.weights import UNKNOWN, RefusedError
from updraft_vllm import names, ranks
from updraft_vllm.ranks import AGREES, ENDED, WORKS, WRITES

log = logging.getLogger(__name__)

_FIRST_S, _LONGEST_S, _GROWTH = 0.05, 1.0, 1.1
"""The ranks are asked where they are at growing intervals. Each time vLLM waits for its steps in progress."""

_BEGINS_S = 60.0
"""How long a server may take from its scheduler to its first step."""

State = Mapping[str, Any]


class MixedRanksError(Exception):
    """Ranks hold different drafts, so answers may be wrong: the server has to end."""


class EngineThread:
    """Calls the workers on the thread of the engine's steps, between two of them. The hook bodies call `original` once."""

    def __init__(self, *, may_skip: bool) -> None:
        """`may_skip`: where an untrained draft proposes nothing, it need not run."""
        self._may_skip = may_skip
        self._engine: Any = None
        self._has_begun = threading.Event()
        self._work: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]]] = SimpleQueue()
        self.bindings = (
            Binding(target=f"{names.ENGINE_CORE}.run_busy_loop", hook=self.loop, parameters=("self",)),
            Binding(
                target=f"{names.ENGINE_CORE}._handle_client_request",
                hook=self.handle,
                parameters=("self", "request_type", "request"),
            ),
        )

    def loop(self, original: Hook, engine: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND run_busy_loop, which runs until the server ends."""
        try:
            if self._may_skip:
                _skip(engine.model_executor)
        except Exception as error:  # noqa: BLE001  (the loop would end)
            log.warning("Updraft cannot skip the untrained draft: %s", error)
        self._engine = engine
        self._has_begun.set()
        return original(engine, *args, **kwargs)

    def handle(self, original: Hook, engine: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND _handle_client_request, which vLLM calls between two steps, and when it is idle as soon as there is one."""
        self._run_waiting(engine)
        return original(engine, *args, **kwargs)

    def run(self, work: Callable[[Any], Any]) -> Any:
        """Return the result of `work(executor)`. Raises what it raises, and RefusedError if the engine does not begin."""
        if not self._has_begun.wait(_BEGINS_S):
            raise RefusedError(f"vLLM's engine has not begun its loop within {_BEGINS_S:.0f} s")
        engine, done = self._engine, Future[Any]()
        self._work.put((work, done))
        engine.input_queue.put_nowait((_wake_up(), None))
        return done.result()

    def _run_waiting(self, engine: Any) -> None:
        while True:
            try:
                work, done = self._work.get_nowait()
            except Empty:
                return
            try:
                done.set_result(work(engine.model_executor))
            except MixedRanksError as error:
                done.set_exception(error)
                raise
            except Exception as error:  # noqa: BLE001  (the thread is the engine's)
                done.set_exception(error)


def _wake_up() -> Any:
    """The kind of request with which vLLM wakes up its own loop."""
    from vllm.v1.engine import EngineCoreRequestType  # noqa: PLC0415  (the server's)

    return EngineCoreRequestType.WAKEUP


class Leader:
    """Obeys `load` messages, one at a time, on a thread of its own. `reply` sends a message to the agent."""

    def __init__(self, engine: EngineThread, reply: Callable[[dict[str, Any]], None]) -> None:
        self._engine = engine
        self._reply = reply
        self._busy = threading.Lock()

    def load(self, message: Mapping[str, Any]) -> None:
        """Serve the draft on all ranks; answers `loaded` when it is done, or refused, with the one before on all."""
        if not self._busy.acquire(blocking=False):
            self._answer(message, {"refusal": "another draft is being loaded"})
            return
        threading.Thread(target=self._run, args=(dict(message),), name="updraft-swap", daemon=True).start()

    def _run(self, message: Mapping[str, Any]) -> None:
        try:
            answer = self._load(message)
        except BaseException as error:  # noqa: BLE001  (the next draft may be loaded)
            log.error("Updraft cannot load a draft on all ranks: %s", error)
            answer = {"refusal": f"the ranks cannot be reached: {error}"}
        self._busy.release()  # first, because an agent that is answered may send the next one at once
        self._answer(message, answer)

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        states, delay_s = self._ask("load", message), _FIRST_S
        while any(state["at"] != ENDED for state in states):
            delay_s = _FIRST_S if self._go_on(states) else min(_GROWTH * delay_s, _LONGEST_S)
            time.sleep(delay_s)
            states = self._ask("state")
        answer = joined([state["answer"] for state in states])
        if answer.get("served", {}).get("digest") == UNKNOWN:
            self._ask("doubt")
        return answer

    def _go_on(self, states: Sequence[State]) -> bool:
        """Let the ranks go on if none of them is at work: with their turn, or without it if another rank has no part in it."""
        at = {state["at"] for state in states}
        if WORKS in at:
            return False
        if at == {WRITES} and not problem(states):
            self._engine.run(_turn)
        else:  # all agree or not, or some have ended, before a turn or by a refusal
            self._ask("release", problem(states) or ("" if at == {AGREES} else _LEFT))
        return True

    def _ask(self, command: str, *arguments: Any) -> list[State]:
        """Tell all ranks, and get their answers."""
        return list(self._engine.run(lambda executor: _called(executor, command, *arguments)))

    def _answer(self, message: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        self._reply({"kind": "loaded", **answer, "version": message.get("version")})


_LEFT = "another rank has ended its load"

_NAMED = re.compile(r"\brank \d+: |" + _LEFT)
"""In a refusal by what happened on another rank."""


def _called(executor: Any, command: str, *arguments: Any) -> list[Any]:
    """Without a time limit: an answer that comes after one would be taken for that of the next call."""
    found: list[Any] = executor.collective_rpc(ranks.obey, args=(command, *arguments))
    return found


def _turn(executor: Any) -> None:
    """Write on all ranks, or on none. Raises MixedRanksError if it is neither."""
    refusal = problem(_called(executor, "turn"))
    left = problem(_called(executor, "undo")) if refusal else ""
    if left:
        message = f"the ranks hold different drafts, so this server ends: {refusal}; {left}"
        log.critical("Updraft: %s", message)
        raise MixedRanksError(message)
    _called(executor, "release", refusal)


def _skip(executor: Any) -> None:
    """Let all ranks leave out a draft that nobody has trained, or none: if one of them ran it alone, it would never end."""
    if all(can is True for can in _called(executor, "can_skip")):
        _called(executor, "skip")


def problem(states: Sequence[State]) -> str:
    """The first one, with its rank; "" if there is none."""
    for rank, state in enumerate(states):
        found = state.get("problem") or state.get("answer", {}).get("refusal")
        if found:
            return f"rank {rank}: {found}"
    drafts = [state.get("draft", "") for state in states]
    other = next((rank for rank, draft in enumerate(drafts) if draft != drafts[0]), None)
    return "" if other is None or "" in drafts else f"rank {other}: it has read another draft than rank 0"


def joined(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer of all ranks to the agent."""
    refused = [(rank, answer["refusal"]) for rank, answer in enumerate(answers) if answer["refusal"]]
    own = (f"rank {rank}: {refusal}" for rank, refusal in refused if not _NAMED.search(refusal))
    result: dict[str, Any] = {"refusal": next(own, refused[0][1] if refused else "")}
    served = [answer["served"] for answer in answers if "served" in answer]
    if served:
        is_same = all(one == served[0] for one in served)  # a rank that does not say has changed nothing
        result["served"] = served[0] if is_same else {**served[0], "digest": UNKNOWN}
    if refused:
        return result | {name: any(one.get(name) for one in answers) for name in ("needs_restart", "target_changed")}
    targets = [answer["target"] for answer in answers]
    whole = hashlib.sha256("\n".join(targets).encode()).hexdigest()
    return result | {
        "held": answers[0]["held"],
        "target": f"sha256:{whole}" if all(targets) else "",
        "pause_us": max(answer["pause_us"] for answer in answers),
    }
