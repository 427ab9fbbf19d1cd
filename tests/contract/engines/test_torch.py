"""The built-in engine, on the tiny target whose drafts are accepted, keeps the promises of tracing."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.contract.engine_contract import whole
from tests.contract.engines.tracing_contract import ASKS, LONG, LOOKAHEAD, Answer, Ask, Counts, TracingContract
from tests.sglang.models import cycle_draft, write_mixing_target
from tests.support.tap_agent import Seen, Teacher
from tests.support.text_reference import read_target
from tests.support.tiny_target import save_draft
from torch import Tensor
from transformers import LlamaForCausalLM

from updraft_artifacts.digests import tensors_digest
from updraft_chassis.errors import UpdraftError
from updraft_draft import checkpoint
from updraft_draft.target_weights import read_head
from updraft_inference import engine as port
from updraft_inference.engine import CaptureParams, DraftCheckpoint, Drafter, FinishedRequest, SamplingParams
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

EVERYTHING = CaptureParams(payload=True, prompt_rows=1000, counterfactual_rows=LOOKAHEAD)
TOP_K = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    target = write_mixing_target(folder / "target")
    for version, quality in ((1, 0.7), (2, 0.3)):
        save_draft(cycle_draft(target, quality=quality), folder / str(version))
    return folder


class Torch:
    """The engine, and its head, by which its last hidden states are read."""

    def __init__(self, engine: TorchEngine, head: Tensor) -> None:
        self._engine = engine
        self._head = head
        self._names = map(str, count())

    async def answers(self, asks: Sequence[Ask], *, is_captured: bool = True) -> list[Answer]:
        capture = EVERYTHING if is_captured else CaptureParams()
        ends = await self.ends(asks, drafter=Drafter.EAGLE3, capture=capture)
        return [self._answer(end) for end in ends]

    async def ends(self, asks: Sequence[Ask], *, drafter: Drafter, capture: CaptureParams) -> list[FinishedRequest]:
        requests = [
            port.GenerationRequest(
                request_id=next(self._names),
                prompt_ids=ask.prompt,
                max_tokens=ask.tokens,
                sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
                drafter=drafter,
                lookahead=LOOKAHEAD,
                capture=capture,
            )
            for ask in asks
        ]
        return [end for _, end in await asyncio.gather(*(whole(self._engine, request) for request in requests))]

    async def swap(self, folder: Path, version: int) -> str:
        try:
            digest = _digest(folder)
            await self._engine.swap(DraftCheckpoint(version=version, folder=folder, tensors_digest=digest))
        except UpdraftError as error:
            return str(error)
        return ""

    def _answer(self, end: FinishedRequest) -> Answer:
        sums = end.sums
        drafted = [step for step in end.steps if step.draft_ids]
        counts = Counts(
            steps=len(drafted),
            proposed=sum(sum(one.proposed) for one in sums),
            accepted=sum(sum(one.accepted) for one in sums),
        )
        return Answer(output=end.output_ids, counts=counts, told=None if end.hidden is None else self._seen(end))

    def _seen(self, end: FinishedRequest) -> Seen:
        hidden, seen = end.hidden, Seen()
        assert hidden is not None
        assert isinstance(hidden.teacher, Tensor)
        seen.rows = list(enumerate(hidden.aux[:], hidden.first_position))
        seen.teachers = list(
            enumerate(map(self._teacher, hidden.teacher), hidden.first_position + hidden.first_teacher_row)
        )
        rejected = {one.step: one for one in hidden.counterfactuals}
        for index, step in enumerate(end.steps):
            seen.steps.append(
                {
                    "position": len(end.request.prompt_ids) + step.start - 1,
                    "drafts": list(step.draft_ids),
                    "accepted": step.accepted,
                    "version": step.draft_version,
                    "log_p": step.target_log_probs,
                }
            )
            rows = rejected.get(index)
            seen.rejected.append([] if rows is None else self._rejected(rows))
        return seen

    def _rejected(self, rows: port.Counterfactual) -> list[tuple[Tensor, Teacher]]:
        assert isinstance(rows.teacher, Tensor)
        return list(zip(rows.aux, map(self._teacher, rows.teacher), strict=True))

    def _teacher(self, last_hidden: Tensor) -> Teacher:
        """The likeliest tokens, as a server's plugin gives them; this engine gives the states that they follow from."""
        logits = self._head @ last_hidden
        top = logits.log_softmax(-1).topk(TOP_K)
        return Teacher(ids=top.indices, log_probs=top.values, log_sum_exp=logits.logsumexp(-1))


def _digest(folder: Path) -> str:
    """What a manifest says of a draft; nothing of one that is no draft, which the engine refuses itself."""
    try:
        _, tensors = checkpoint.load(folder)
    except UpdraftError:
        return ""
    return tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))


class TestTorchEngine(TracingContract):
    @pytest.fixture
    async def engine(self, folder: Path) -> AsyncIterator[Torch]:
        limits = Limits(num_slots=4, max_context=512, max_lookahead=LOOKAHEAD)
        options = EngineOptions(limits=limits, dtype=torch.float32, is_lookahead_fixed=True)
        async with TorchEngine.open(folder / "target", options) as engine:
            yield Torch(engine, read_head(folder / "target").head.float())

    @pytest.fixture
    async def plain(self, engine: Torch) -> Mapping[Ask, tuple[int, ...]]:
        """Without a draft, and without capture."""
        asks = [*ASKS, LONG]
        ends = await engine.ends(asks, drafter=Drafter.NONE, capture=CaptureParams())
        assert not any(step.draft_ids for end in ends for step in end.steps)
        return {ask: end.output_ids for ask, end in zip(asks, ends, strict=True)}

    @pytest.fixture
    def target(self, folder: Path) -> LlamaForCausalLM:
        return read_target(folder / "target")

    @pytest.fixture
    def drafts(self, folder: Path) -> list[Path]:
        return [folder / "1", folder / "2"]
