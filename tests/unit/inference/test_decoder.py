"""Steps of the decoder itself, without a thread."""

from itertools import count

import pytest
import torch
from tests.support.tiny_target import make_tiny_target

from updraft_inference.engine.port import Delta, Drafter, GenerationRequest, Sampling
from updraft_inference.torch_engine.decoder import LEAST_READ, Decoder, Limits
from updraft_inference.torch_engine.sequence import Sequence
from updraft_inference.torch_engine.target import Target

_ids = count()


class Request:
    """One that is greedy and does not end by itself, and what it was given in each step."""

    def __init__(self, prompt: tuple[int, ...], *, max_tokens: int = 30, drafter: Drafter = Drafter.NONE) -> None:
        self.gained: list[int] = []
        asked = GenerationRequest(
            request_id=f"r{next(_ids)}",
            prompt_ids=prompt,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0),
            ignore_eos=True,
            drafter=drafter,
        )
        self.sequence = Sequence(request=asked, emit=self._take, ids=list(prompt))

    def _take(self, delta: Delta) -> None:
        self.gained += delta.token_ids


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3)
    return Target.open(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def decoder(target: Target) -> Decoder:
    return Decoder(target, Limits(num_slots=6, max_context=250, max_lookahead=5), default=Drafter.NONE)


@pytest.fixture
def reads(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward."""
    found: list[int] = []
    forward = target.forward

    def counted(ids_R: torch.Tensor, *rest: object) -> object:  # noqa: N803 - the target's own name
        found.append(len(ids_R))
        return forward(ids_R, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(target, "forward", counted)
    return found


def test_one_forward_reads_all_prompts_that_come_together(decoder: Decoder, reads: list[int]) -> None:
    requests = [Request(tuple(range(40 + n, 60 + 2 * n))) for n in range(6)]
    for request in requests:
        decoder.add(request.sequence)
    decoder.step()
    assert reads == [sum(20 + n for n in range(6))]
    assert [len(request.gained) for request in requests] == [1] * 6


@pytest.mark.parametrize("drafter", [Drafter.NONE, Drafter.NGRAM])
def test_running_streams_gain_in_every_step_in_which_a_long_prompt_is_read(
    decoder: Decoder, reads: list[int], drafter: Drafter
) -> None:
    streams = [Request(tuple(range(50 + n, 70 + n)), max_tokens=100, drafter=drafter) for n in range(3)]
    for stream in streams:
        decoder.add(stream.sequence)
    decoder.step()
    newcomer = Request(tuple(range(10, 230)), drafter=drafter)
    decoder.add(newcomer.sequence)
    reads.clear()
    steps = 0
    while not newcomer.gained:
        before = [len(stream.gained) for stream in streams]
        decoder.step()
        steps += 1
        assert all(len(stream.gained) > least for stream, least in zip(streams, before, strict=True))
        assert steps <= 220 / LEAST_READ + 1
    assert len(reads) == steps


def test_who_came_first_is_read_first(decoder: Decoder) -> None:
    first, second = Request(tuple(range(2, 232))), Request(tuple(range(232, 2, -1)))
    decoder.add(first.sequence)
    decoder.add(second.sequence)
    decoder.step()
    assert len(first.gained) == 1
    assert 0 < second.sequence.num_read < 230


def test_a_request_that_is_cancelled_in_mid_prompt_leaves_its_slot(decoder: Decoder) -> None:
    stream, long = Request(tuple(range(20, 40)), max_tokens=100), Request(tuple(range(10, 230)))
    decoder.add(stream.sequence)
    decoder.step()
    decoder.add(long.sequence)
    decoder.step()
    decoder.cancel(long.sequence.request.request_id)
    assert decoder.num_running == 1
    before = len(stream.gained)
    decoder.step()
    assert len(stream.gained) == before + 1
    decoder.cancel_all()
    assert decoder.is_idle
