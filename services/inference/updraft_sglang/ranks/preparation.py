"""A draft that each rank reads, checks and prepares on a thread while the server works, before all of them copy it at once.

The agent asks with an action of its own of SGLang's `weights_checker`, which all ranks run at the same step, and asks again
until all are ready. A rank that refuses is told, and then no rank writes anything: `serve` asks all of them once more.
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
"""The messages of answers that refuse nothing; the first one is followed by the ranks that are not ready."""
SEVERAL_NODES = "drafts of ranks on several nodes cannot be swapped"


class PartlyError(RefusedError):
    """A copy failed, and a rank cannot put its former draft back, so it is not known what the ranks hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A draft to prepare."""

    folder: Path
    version: int
    digest: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError, KeyError or TypeError."""
        fields = json.loads(text)
        return cls(folder=Path(fields["folder"]), version=int(fields["version"]), digest=str(fields["digest"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The copies that put a draft in place of the one in `model`, and those that put that one back; `content` is the digest of
    what was read."""

    model: Any
    writes: Sequence[Write]
    kept: Sequence[Write]
    content: str

    def copy(self) -> str:
        """Why that failed; "" if it is done."""
        return self._done(self.writes)

    def put_back(self) -> str:
        """Why that failed; "" if it is done."""
        return self._done(self.kept)

    def _done(self, writes: Sequence[Write]) -> str:
        """On a GPU, wait before and after, because steps may still run there."""
        device = self.model.model.fc.weight.device
        try:
            _synchronize(device)
            for write in writes:
                write()
            _synchronize(device)
        except Exception as error:  # noqa: BLE001  (it is told)
            return str(error) or type(error).__name__
        return ""


@dataclass(slots=True)
class _Job:
    """A thread that prepares a draft, and fills in the `result`: the draft, or why it is refused."""

    text: str
    """The order as it came, by which it is known."""
    order: Order
    result: Prepared | str = ""
    is_dropped: bool = False
    """The ranks have refused it, so its result counts for nothing."""


@dataclass(frozen=True, slots=True)
class _State:
    """How far a rank is."""

    refusal: str = ""
    content: str = ""


class Preparation:
    """`check` and `serve` belong to the scheduler's thread. Without `loader`, a server prepares nothing. `gather` exchanges
    values of the ranks."""

    def __init__(self, loader: str, gather: Callable[[Any, Any], list[Any]] = gathered) -> None:
        self._loader = loader
        self._gather = gather
        self._manager: Any = None
        """SGLang's SchedulerWeightUpdaterManager; None until the first order."""
        self._job: _Job | None = None

    def check(self, original: Hook, manager: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND SchedulerWeightUpdaterManager.check_weights."""
        action = str(getattr(recv_req, "action", ""))
        if not action.startswith(PREPARE):
            return original(manager, recv_req, *args, **kwargs)
        try:
            answer = resolved(names.CHECKED)
        except (ImportError, AttributeError):  # another release of SGLang, which refuses the action itself
            return original(manager, recv_req, *args, **kwargs)
        try:
            refusal, progress = self._checked(action.removeprefix(PREPARE), manager)
        except Exception as error:  # the same in all ranks, as their releases are
            log.exception("Updraft cannot prepare drafts")
            refusal, progress = f"the plugin cannot prepare drafts: {type(error).__name__}: {error}", ""
        return answer(success=not refusal, message=refusal or progress)

    def serve(self, text: str, model: Any, problem: str) -> Order:
        """Copy the draft of this order into `model`. All ranks call it; a `problem` of one of them is one of all.

        Raises RefusedError in all ranks, which then hold the same draft as before; PartlyError if one cannot put it back.
        """
        if not configuration.is_one_node():
            raise RefusedError(SEVERAL_NODES)
        job, result = self._job, self._job.result if self._job is not None else ""
        problem = problem or self._problem(text, model)
        self._drop(text)  # its memory is large, and it may be pinned
        self._agree(problem)
        assert job is not None
        assert isinstance(result, Prepared)
        try:
            self._agree(_reason(f"the draft in {job.order.folder} was loaded only in part", result.copy()))
        except RefusedError as error:
            self._put_back(result, str(error))
            raise
        return job.order

    def _put_back(self, result: Prepared, refusal: str) -> None:
        """A step may not find different drafts in the ranks. Raises PartlyError if it does."""
        try:
            self._agree(_reason("the one before cannot be put back, so load another one", result.put_back()))
        except RefusedError as error:
            raise PartlyError(f"{refusal}; {error}") from error

    def forget(self) -> None:
        """Someone else changes the weights, so those that were kept are not the ones to put back: prepare again."""
        if self._job is not None:
            self._drop(self._job.text)

    def _checked(self, text: str, manager: Any) -> tuple[str, str]:
        """Why the ranks refuse the order, and how far they are."""
        if not configuration.is_one_node():  # another node may lack the plugin, and then would not take part
            return SEVERAL_NODES, ""
        self._manager = manager
        states: list[_State] = self._gather(self._state(text), manager.tp_cpu_group)
        refusal = _refusal(states)
        if refusal:
            self._drop(text)
        return refusal, _progress(states)

    def _problem(self, text: str, model: Any) -> str:
        """Why this rank cannot copy; "" if it can."""
        job = self._job
        if job is None or job.is_dropped or job.text != text or not isinstance(job.result, Prepared):
            return "it has not prepared this draft"
        if self._is_asleep():
            return ASLEEP
        return "" if job.result.model is model else "it has prepared another model than this one; send selector=draft"

    def _agree(self, problem: str) -> None:
        """Raises RefusedError in all ranks if one of them has a problem."""
        manager = self._manager  # of all ranks, or of none
        problems = [problem] if manager is None else self._gather(problem, manager.tp_cpu_group)
        if problem := first_problem(problems):
            raise RefusedError(problem)

    def _drop(self, text: str) -> None:
        """Prepare it again if it is ordered again. A thread that still runs goes on, so that there is one at a time."""
        job = self._job
        if job is not None and job.text == text:
            job.is_dropped = True
            if job.result:
                self._job = None

    def _is_asleep(self) -> bool:
        return self._manager is not None and names.WEIGHTS in self._manager.offload_tags

    def _state(self, text: str) -> _State:
        """Begin if this order is new. Never raises, because the other ranks wait for the answer."""
        try:
            if self._is_asleep():
                return _State(refusal=ASLEEP)
            job = self._job
            if job is None or (job.result and (job.is_dropped or job.text != text)):
                job = self._job = self._begun(text)
        except Exception as error:  # noqa: BLE001  (it is told)
            return _State(refusal=str(error) or type(error).__name__)
        if job.is_dropped or job.text != text:  # its thread still runs, and the agent asks again
            return _State()
        result = job.result
        return _State(content=result.content) if isinstance(result, Prepared) else _State(refusal=result)

    def _begun(self, text: str) -> _Job:
        order, worker = Order.read(text), self._manager.draft_worker
        if getattr(worker, "draft_worker", None) is None:
            raise RefusedError("the server does not draft with EAGLE-3")
        runner = worker.draft_worker.draft_runner
        if self._loader not in (runner.weight_updater.custom_weight_loaders or ()):
            raise RefusedError(f"start the server with --custom-weight-loader {self._loader}")
        job, place = _Job(text, order), configuration.place()
        draft = SglangDraft(runner.model, worker.target_worker.model_runner.model)
        arguments = (job, draft, runner.model, place)
        threading.Thread(target=_run, args=arguments, name="updraft-prepare", daemon=True).start()
        return job


def _run(job: _Job, draft: SglangDraft, model: Any, place: tuple[int, int]) -> None:
    try:
        writes, content = _read(job.order.folder, draft, place)
        prepared = Prepared(model=model, writes=writes, kept=draft.kept(), content=content)
        job.result = "nobody waits for it" if job.is_dropped else prepared
    except BaseException as error:  # noqa: BLE001  (also SystemExit, and a panic of Rust: else the agent waits)
        log.error("Updraft refused a draft: %s", error)
        job.result = str(error) or type(error).__name__


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


def _progress(states: Sequence[_State]) -> str:
    late = [str(rank) for rank, one in enumerate(states) if not one.content]
    return f"{PREPARING}; not ready: {', '.join(late)}" if late else PREPARED


def _reason(what: str, failure: str) -> str:
    return failure and f"{what}: {failure}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
