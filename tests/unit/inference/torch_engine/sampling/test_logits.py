"""What is verified is what plain decoding would have chosen from: row by row, and in what comes out."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import few_tokens
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_draft.acceptance import filtered_probs
from updraft_inference.engine import Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.model.ops import TorchOps
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sampling.grammar import Grammars
from updraft_inference.torch_engine.sampling.logits import check_sampling, processed
from updraft_inference.torch_engine.sampling.rejection_sampler import VerifyResult, verify
from updraft_inference.torch_engine.sequence import Sequence

VOCAB = 6
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)
samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    top_k=st.sampled_from([0, 2, 4]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5)).map(lambda bias: tuple(bias.items())),
)


def random_rows(seed: int, num: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(num, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def plainly(logits: list[float], sampling: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """The definition, a number at a time, as OpenAI's and vLLM's pages have it."""
    bias = dict(sampling.logit_bias)
    result = []
    for token, logit in enumerate(logits):
        value = logit + bias.get(token, 0.0)
        if token in {*prompt, *output}:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        value -= output.count(token) * sampling.frequency_penalty
        value -= (token in output) * sampling.presence_penalty
        result.append(value)
    return result


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 999), sampling=samplings, prompt=tokens, output=tokens, drafts=tokens)
def test_every_row_is_what_plain_decoding_has_after_the_drafts_before_it(
    seed: int, sampling: SamplingParams, prompt: list[int], output: list[int], drafts: list[int]
) -> None:
    logits = random_rows(seed, len(drafts) + 1)

    rows = processed(logits, sampling, prompt_ids=prompt, output_ids=output, draft_ids=drafts)

    for i, row in enumerate(rows):
        so_far = [*output, *drafts[:i]]
        expected = torch.tensor(plainly(logits[i].tolist(), sampling, prompt, so_far))
        torch.testing.assert_close(row, expected)
        alone = processed(logits[i : i + 1], sampling, prompt_ids=prompt, output_ids=so_far, draft_ids=[])
        assert torch.equal(row, alone[0]), "not even rounding tells a drafted row from a plain one"


def test_what_is_not_asked_for_changes_nothing() -> None:
    logits = random_rows(0, 3)
    rows = processed(logits, SamplingParams(), prompt_ids=[1], output_ids=[2], draft_ids=[3, 3])
    assert torch.equal(rows, logits)


@given(seed=st.integers(0, 999), min_p=st.floats(0.001, 1.0), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(seed: int, min_p: float, temperature: float) -> None:
    logits = random_rows(seed, 1)
    p = (logits / temperature).softmax(-1)
    is_clear = ((p / p.max()) / min_p - 1).abs() > 1e-4  # of rounding

    kept = filtered_probs(logits, temperature=temperature, min_p=min_p)

    assert torch.equal((kept > 0)[is_clear], (p >= min_p * p.max())[is_clear])
    assert kept[0, p.argmax()] > 0
    torch.testing.assert_close(kept.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"sampling": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty is 0"),
        ({"sampling": SamplingParams(repetition_penalty=1e30)}, "0.01 to 100"),
        (
            {"sampling": SamplingParams(logit_bias=((0, 1.0), (VOCAB, 1.0)))},
            "token 6, which is outside the vocabulary of 6",
        ),
        ({"sampling": SamplingParams(logit_bias=((-1, 1.0),))}, "token -1"),
        ({"top_logprobs": VOCAB + 1}, "top_logprobs is 7"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_number(request_fields: dict[str, object], words: str) -> None:
    request = GenerationRequest(request_id="a", prompt_ids=(1,), max_tokens=1, **request_fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=words):
        check_sampling(request, VOCAB)


# -- the whole: a toy model, judged as the engine does ---------------------------------------------------------------

EVERYTHING = SamplingParams(
    temperature=0.9,
    min_p=0.25,
    top_k=4,
    top_p=0.97,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.6,
    logit_bias=((1, 0.8), (4, -0.5)),
)
SCHEMA = '{"enum": ["ab", "aba", "bb", "bab", "ba", "bbb"]}'
PROMPT = (2, 1, 2)
NUM_COMPARED = 4


def toy_logits(context: tuple[int, ...], vocab: int) -> Tensor:
    """A model: logits [V] that depend on all that was said."""
    return random_rows(hash(context) % 10_000, 1, vocab)[0] * 0.6


class Toy:
    """Runs requests on the toy model through `verify`. With a grammar the tokens are those of `few_tokens`."""

    def __init__(self, folder: Path, *, has_grammar: bool) -> None:
        self.tokens = few_tokens(folder)
        self.vocab = len(self.tokens)
        self.eos = self.vocab - 1
        self.grammars = Grammars(folder, self.vocab, frozenset({self.eos}))
        self.schema = SCHEMA if has_grammar else None

    def sequence(self, sampling: SamplingParams, *, generator: torch.Generator | None) -> Sequence:
        request = GenerationRequest(
            request_id="toy", prompt_ids=PROMPT, max_tokens=99, sampling=sampling, json_schema=self.schema
        )
        grammar = None if self.schema is None else self.grammars.of_json_schema(self.schema)
        return Sequence(request=request, emit=lambda _: None, ids=list(PROMPT), generator=generator, grammar=grammar)

    def step(self, sequence: Sequence, proposal: Proposal) -> VerifyResult:
        contexts = [(*sequence.ids, *proposal.ids[:i]) for i in range(len(proposal.ids) + 1)]
        logits = torch.stack([toy_logits(context, self.vocab) for context in contexts])
        (verdict,) = verify([sequence], [proposal], logits, TorchOps())
        assert sequence.grammar is None or sequence.grammar.failure is None
        sequence.extend([*proposal.ids[: verdict.accepted], verdict.bonus_id], frozenset({self.eos}))
        return verdict

    def plain_probs(self, sampling: SamplingParams, output: tuple[int, ...]) -> Tensor:
        """What plain decoding draws from after `output`, by the definitions."""
        logits = toy_logits((*PROMPT, *output), self.vocab)
        row = torch.tensor([plainly(logits.tolist(), sampling, list(PROMPT), list(output))])
        if self.schema is not None:
            row = row.masked_fill(~self.grammars.of_json_schema(self.schema).allowed(list(output), [])[:1], -math.inf)
        return filtered_probs(
            row, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
        )[0]

    def exactly(self, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
        """The probability of every beginning of an output, NUM_COMPARED tokens or up to its end."""
        ended: dict[tuple[int, ...], float] = {}
        alive: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(NUM_COMPARED):
            grown: dict[tuple[int, ...], float] = {}
            for output, probability in alive.items():
                for token, p in enumerate(self.plain_probs(sampling, output).tolist()):
                    if p > 0:
                        place = ended if token == self.eos else grown
                        place[*output, token] = probability * p
            alive = grown
        return {**ended, **alive}


def draft(toy: Toy, sequence: Sequence, kind: Drafter, generator: torch.Generator) -> Proposal:
    """Two drafts: drawn from a wrong model that knows no grammar and no penalty, or looked up."""
    ids: list[int] = []
    q = []
    for _ in range(2):
        logits = toy_logits((*sequence.ids, *ids), toy.vocab) + 0.7 * toy_logits((9, *sequence.ids), toy.vocab)
        q.append(logits.softmax(-1))
        drawn = int(torch.multinomial(q[-1], 1, generator=generator))
        ids.append(drawn if kind is Drafter.EAGLE3 else int(logits.argmax()))
    return Proposal(drafter=kind, ids=ids, q=torch.stack(q) if kind is Drafter.EAGLE3 else None)


@pytest.mark.parametrize("has_grammar", [pytest.param(True, id="grammar"), pytest.param(False, id="no grammar")])
@pytest.mark.parametrize("kind", [Drafter.EAGLE3, Drafter.NGRAM])
@pytest.mark.parametrize("is_seeded", [pytest.param(True, id="seeds"), pytest.param(False, id="no seed")])
def test_drafted_samples_have_the_distribution_of_plain_ones_with_everything_on(
    tmp_path: Path, kind: Drafter, *, has_grammar: bool, is_seeded: bool
) -> None:
    """Chi-square of outputs of a few tokens against their exact probabilities."""
    toy = Toy(tmp_path, has_grammar=has_grammar)
    expected = toy.exactly(EVERYTHING)
    assert math.isclose(sum(expected.values()), 1.0, rel_tol=1e-4)
    generator = torch.Generator().manual_seed(5)
    rounds, kept = 1200, 0
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(rounds):
        sampling = replace(EVERYTHING, seed=seed if is_seeded else None)
        sequence = toy.sequence(sampling, generator=generator)
        while sequence.num_output < NUM_COMPARED and sequence.ids[-1] != toy.eos:
            kept += toy.step(sequence, draft(toy, sequence, kind, generator)).accepted
        counts[tuple(sequence.ids[len(PROMPT) :][:NUM_COMPARED])] += 1

    assert set(counts) <= set(expected), "something impossible was said"
    assert kept > rounds / 10, "kept drafts are what the test is about"
    common = {output: p * rounds for output, p in expected.items() if p * rounds >= 5}
    rest = rounds - sum(common.values())
    cells = [*((counts[output], mean) for output, mean in common.items())]
    if rest >= 5:
        cells.append((sum(n for output, n in counts.items() if output not in common), rest))
    statistic, degrees = sum((n - mean) ** 2 / mean for n, mean in cells), len(cells) - 1
    # Wilson and Hilferty's approximation of the 99.9th percentile.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("has_grammar", [pytest.param(True, id="grammar"), pytest.param(False, id="no grammar")])
@pytest.mark.parametrize("seed", [None, 7])
def test_greedy_and_seeded_output_is_the_same_with_any_drafts(
    tmp_path: Path, seed: int | None, *, has_grammar: bool
) -> None:
    toy = Toy(tmp_path, has_grammar=has_grammar)
    sampling = replace(EVERYTHING, seed=seed, temperature=0.0 if seed is None else 1.0)
    outputs: set[tuple[int, ...]] = set()
    for drafts in [(), *product(range(toy.vocab), repeat=2)]:
        generator = None if seed is None else torch.Generator().manual_seed(len(outputs))
        sequence = toy.sequence(sampling, generator=generator)
        while sequence.num_output < 6 and sequence.ids[-1] != toy.eos:
            toy.step(sequence, Proposal(drafter=Drafter.NGRAM, ids=list(drafts)))
        output = sequence.ids[len(PROMPT) :]
        outputs.add(tuple(output[:6]))
    assert len(outputs) == 1
    if has_grammar:
        text = "".join(toy.tokens[token] for token in outputs.pop()[:-1])
        assert text in {f'"{word}"' for word in ("ab", "aba", "bb", "bab", "ba", "bbb")}
