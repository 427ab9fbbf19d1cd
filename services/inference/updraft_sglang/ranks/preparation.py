"""A draft that each rank reads, checks and prepares on a thread while the server works, before all of them copy it at once.

The agent asks with an action of its own of SGLang's `weights_checker`, which all ranks run at the same step, and asks again
until all are ready. A rank that refuses is told, and then no rank writes anything: `take` asks all of them once more.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from updraft_sglang import configuration, names
from updraft_sglang.draft import ASLEEP, HEAD, SglangDraft, Write
from updraft_sglang.ranks import layout
from updraft_sglang.ranks.agreement import first_problem, gathered
from updraft_tap import weights
from updraft_tap.hooks import Hook, resolved
from updraft_tap.weights import RefusedError

log = logging.getLogger(__name__)

PREPARE = "updraft_prepare "
"""The action begins with this, and the order follows as JSON."""
PREPARING, PREPARED = "the ranks prepare the draft", "all ranks have prepared the draft"
"""The messages of answers that refuse nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A draft to prepare. `attempt` is another one each time, so that a draft which was refused is read again."""

    attempt: str
    folder: Path
    version: int
    digest: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError, KeyError or TypeError."""
        fields = json.loads(text)
        folder, version = Path(fields["folder"]), int(fields["version"])
        return cls(attempt=str(fields["attempt"]), folder=folder, version=version, digest=str(fields["digest"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The copies that put a draft in place of the one in `model`; `content` is the digest of what was read."""

    order: Order
    model: Any
    writes: Sequence[Write]
    content: str


@dataclass(frozen=True, slots=True)
class _State:
    """How far a rank is."""

    refusal: str = ""
    content: str = ""


class Preparation:
    """`check` and `take` belong to the scheduler's thread. A server without `loader` prepares nothing. `gather` gets the values
    of all ranks."""

    def __init__(self, loader: str, gather: Callable[[Any, Any], list[Any]] = gathered) -> None:
        self._loader = loader
        self._gather = gather
        self._manager: Any = None
        """SGLang's SchedulerWeightUpdaterManager; None until the first order."""
        self._attempt = ""
        self._result: Prepared | str = ""
        """The draft that was prepared in this attempt, or why it cannot be; "" until then. Set by its thread."""

    def check(self, original: Hook, manager: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND SchedulerWeightUpdaterManager.check_weights."""
        action = str(getattr(recv_req, "action", ""))
        if not action.startswith(PREPARE):
            return original(manager, recv_req, *args, **kwargs)
        self._manager = manager
        states: list[_State] = self._gather(self._state(action.removeprefix(PREPARE)), manager.tp_cpu_group)
        refusal = _refusal(states)
        message = refusal or (PREPARED if all(one.content for one in states) else PREPARING)
        return resolved(names.CHECKED)(success=not refusal, message=message)

    def take(self, attempt: str, model: Any) -> Prepared:
        """The draft, once. Raises RefusedError in all ranks unless all of them have prepared it for their `model`."""
        prepared, problem = self._result, ""
        if not isinstance(prepared, Prepared) or prepared.order.attempt != attempt:
            problem = "it has not prepared this draft"
        elif prepared.model is not model:
            problem = "it has prepared another model than this one; send selector=draft"
        elif self._is_asleep():
            problem = ASLEEP
        self.agree(problem)
        assert isinstance(prepared, Prepared)
        self._result = "it was loaded before"  # its memory is large, and it may be pinned
        return prepared

    def agree(self, problem: str) -> None:
        """Raises RefusedError in all ranks if one of them has a problem."""
        manager = self._manager  # of all ranks, or of none
        problems = [problem] if manager is None else self._gather(problem, manager.tp_cpu_group)
        if problem := first_problem(problems):
            raise RefusedError(problem)

    def _is_asleep(self) -> bool:
        return self._manager is not None and names.WEIGHTS in self._manager.offload_tags

    def _state(self, text: str) -> _State:
        """Begin if this attempt is new. Never raises, because the other ranks wait for the answer."""
        try:
            order = Order.read(text)
            if self._is_asleep():
                return _State(refusal=ASLEEP)
            if order.attempt != self._attempt:
                self._begin(order, self._manager.draft_worker)
        except Exception as error:  # noqa: BLE001  (it is told)
            return _State(refusal=str(error) or type(error).__name__)
        result = self._result
        return _State(content=result.content) if isinstance(result, Prepared) else _State(refusal=result)

    def _begin(self, order: Order, worker: Any) -> None:
        runner = worker.draft_worker.draft_runner
        if self._loader not in (runner.weight_updater.custom_weight_loaders or ()):
            raise RefusedError(f"start the server with --custom-weight-loader {self._loader}")
        model, place = runner.model, configuration.place()
        draft = SglangDraft(model, worker.target_worker.model_runner.model)
        self._attempt, self._result = order.attempt, ""
        arguments = (order, draft, model, place)
        threading.Thread(target=self._run, args=arguments, name="updraft-prepare", daemon=True).start()

    def _run(self, order: Order, draft: SglangDraft, model: Any, place: tuple[int, int]) -> None:
        result: Prepared | str
        try:
            writes, content = _read(order.folder, draft, place)
            result = Prepared(order=order, model=model, writes=writes, content=content)
        except BaseException as error:  # noqa: BLE001  (also SystemExit, and a panic of Rust: else the agent waits)
            log.error("Updraft refused a draft: %s", error)
            result = str(error) or type(error).__name__
        if order.attempt == self._attempt:
            self._result = result


def _read(folder: Path, draft: SglangDraft, place: tuple[int, int]) -> tuple[Sequence[Write], str]:
    """The writes of this rank's part, and the digest of the whole draft."""
    if draft.device.type == "cuda":
        torch.cuda.set_device(draft.device)  # of this thread, else it would use the first rank's device to pin memory
    rank, size = place
    tensors: Mapping[str, Any] = weights.read(folder, draft.config, draft.aux_size)
    num_kv_heads, head_rows = int(draft.config.num_key_value_heads), draft.num_rows(HEAD)
    parts = layout.part(tensors, num_kv_heads=num_kv_heads, head_rows=head_rows, rank=rank, size=size)
    return draft.prepare(weights.joined(parts, draft.dtype), tensors["d2t"]), weights.digest(tensors)


def _refusal(states: Sequence[_State]) -> str:
    if refusal := first_problem([one.refusal for one in states]):
        return refusal
    contents = {one.content for one in states if one.content}
    return f"the ranks have read different drafts: {', '.join(sorted(contents))}" if len(contents) > 1 else ""
