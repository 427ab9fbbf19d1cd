"""A seed fixes the noise of each position; draft and target that use the same noise agree."""

from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import HIDDEN, VOCAB, make_draft, make_tiny_target

from updraft_inference.engine import Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.drafting.eagle import EagleProposer
from updraft_inference.torch_engine.model.ops import TorchOps
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sampling.noise import draw, exponential_noise
from updraft_inference.torch_engine.sampling.rejection_sampler import VerifyResult, verify
from updraft_inference.torch_engine.sequence import Sequence


def test_a_draw_is_that_of_its_seed_and_position_alone() -> None:
    p = torch.rand(5000, generator=torch.Generator().manual_seed(0)).softmax(-1)

    assert draw(p, 3, 10) == draw(p, 3, 10)
    assert len({draw(p, 3, position) for position in range(50)} | {draw(p, seed, 10) for seed in range(50)}) > 80
    assert not torch.equal(exponential_noise(3, 10, 50), exponential_noise(3, 11, 50))
    assert not torch.equal(exponential_noise(3, 10, 50), exponential_noise(4, 10, 50))


def test_what_cannot_be_is_never_drawn() -> None:
    p = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert {draw(p, 0, position) for position in range(300)} == {1}


def test_draws_of_many_positions_have_the_distribution() -> None:
    p, num = torch.tensor([0.02, 0.5, 0.08, 0.1, 0.3]), 4000
    counts = torch.bincount(torch.tensor([draw(p, 5, position) for position in range(num)]), minlength=len(p))
    assert float(((counts - p * num) ** 2 / (p * num)).sum()) < 18.5  # once in a thousand, with 4 degrees of freedom


def test_what_is_no_distribution_is_an_error_and_no_draw() -> None:
    with pytest.raises(RuntimeError, match="nan"):
        draw(torch.tensor([0.5, float("nan")]), 0, 0)


@pytest.mark.parametrize("nearness", [0.1, 0.5, 1.0])
def test_two_distributions_agree_nearly_as_often_as_they_overlap(nearness: float) -> None:
    """At least (1 - d) / (1 + d) of the time, d their distance in total variation (Daliri, Musco and Suresh 2024)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, generator=generator)
    p = logits.softmax(-1)
    q = (logits + nearness * torch.randn(50, generator=generator)).softmax(-1)
    rounds = 3000

    same = sum(draw(p, seed, 0) == draw(q, seed, 0) for seed in range(rounds))

    distance = 1 - float(torch.minimum(p, q).sum())
    assert same / rounds > (1 - distance) / (1 + distance) - 0.03


def test_eagle_draws_by_the_noise_of_the_positions_it_drafts_for(tmp_path: Path) -> None:
    network = make_draft(make_tiny_target(tmp_path), token_ids=torch.arange(100, 228))
    request = GenerationRequest(
        request_id="a", prompt_ids=(101, 102, 103), max_tokens=20, sampling=SamplingParams(temperature=1.0, seed=8)
    )
    sequence = Sequence(
        request=request,
        emit=lambda _: None,
        slot=0,
        ids=[101, 102, 103, 104, 105],
        generator=torch.Generator(),
        pending_aux=[torch.randn(4, 3 * HIDDEN, generator=torch.Generator().manual_seed(2))],
    )

    (proposal,) = EagleProposer(network, num_slots=1, num_positions=64).propose([sequence], 3)

    assert proposal.q is not None
    assert proposal.q.shape == (3, VOCAB)
    assert proposal.ids == [draw(q, 8, 2 + i) for i, q in enumerate(proposal.q)]
    assert set(sequence.drafted_noise) == {2, 3, 4}


def test_the_noise_of_drafting_is_kept_until_a_token_is_decided_there_and_changes_none() -> None:
    sampling = SamplingParams(temperature=1.0, seed=8)
    request = GenerationRequest(request_id="a", prompt_ids=(1, 2), max_tokens=20, sampling=sampling)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    first = [draw(row.softmax(-1), 8, position) for position, row in enumerate(logits)]
    proposal = Proposal(drafter=Drafter.EAGLE3, ids=[first[0], (first[1] + 1) % 50, first[2]])

    def verified(noise: dict[int, torch.Tensor]) -> VerifyResult:
        sequence = Sequence(
            request=request, emit=lambda _: None, ids=[1, 2], generator=torch.Generator(), drafted_noise=noise
        )
        (result,) = verify([sequence], [proposal], logits, TorchOps())
        return result

    drafted = {position: exponential_noise(8, position, 50) for position in range(3)}
    result = verified(drafted)

    assert (result.accepted, result.bonus_id) == (1, first[1])
    assert result == verified({})
    assert set(drafted) == {2}, "the next chain begins there"
