"""Acceptance length of chains in which the draft model and n-gram lookup take turns. Nothing here is timed.

The draft of the arm `ours` after some requests of a kind decodes the held-out requests of that kind, one after another, by the
engine's own classes. Lookup remembers the answers from which the draft learned, and those that it has already decoded.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from bench import harness
from bench.learning import figures
from bench.learning.arms import OURS
from bench.learning.kinds import KINDS
from bench.learning.learning import SEED, open_recorder
from bench.learning.recorder import NUM_HELD_OUT, Recorder
from bench.learning.replay import LOOKAHEAD, Replay, traffic
from bench.learning.streams import scratch
from rich.progress import Progress
from torch import Tensor

from updraft_cli import output
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_inference.engine import GenerationRequest, SamplingParams
from updraft_inference.torch_engine.drafting.chain import Chain, Prediction, Vocabulary
from updraft_inference.torch_engine.drafting.lookahead.acceptance import AcceptanceTable, SequenceStats
from updraft_inference.torch_engine.drafting.mixture import Chooser, Mixture
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.proposal import Proposal, chain_source
from updraft_inference.torch_engine.sequence import Sequence as Running
from updraft_trainer.data.sample import Sample
from updraft_trainer.publishing.estimate import num_tokens

NUM_REMEMBERED = 65_536
"""Tokens of earlier answers; the default of the engine."""
GREEDY = SamplingParams(temperature=0)


@dataclass(slots=True)
class Decoding:
    """A recorded answer on its way. `logits` [k, R, V]: the draft model's, after j drafts that came true; row r is that of the
    newest token, row 0 of the first output."""

    sample: Sample
    text: list[int]
    logits: Tensor
    running: Running = field(init=False)

    def __post_init__(self) -> None:
        request = GenerationRequest(
            request_id=self.sample.trace_id,
            prompt_ids=tuple(self.text[: self._offset + self.sample.first_output]),
            max_tokens=len(self.text),
            sampling=GREEDY,
        )
        self.running = Running(request=request, emit=lambda _: None, ids=self.text[: len(request.prompt_ids) + 1])

    @property
    def _offset(self) -> int:
        """Tokens of the text before the sample."""
        return len(self.text) - len(self.sample.ids)

    @property
    def num_left(self) -> int:
        """Tokens."""
        return len(self.text) - len(self.running.ids)

    def accepted(self, ids: Sequence[int]) -> int:
        """Tokens of a proposal that come true."""
        start = len(self.running.ids)
        pairs = zip(ids, self.text[start : len(self.text) - 1], strict=False)
        return next((n for n, (mine, true) in enumerate(pairs) if mine != true), min(len(ids), self.num_left - 1))

    def advance(self, num: int) -> None:
        """These many tokens more came."""
        self.running.ids += self.text[len(self.running.ids) :][:num]

    def chain(self, draft: DraftNetwork, mixture: Mixture) -> Proposal:
        """At most `LOOKAHEAD` tokens; none after a wrong one, whose states are not known."""
        chain = Chain(self.running, Vocabulary(draft.token_ids, draft.config.vocab_size))
        row = len(self.running.ids) - self._offset - 1 - self.sample.first_output
        for step in range(min(LOOKAHEAD, self.num_left - 1)):
            logits = self.logits[step, row].float()
            chain.extend(
                Prediction(logits, int(logits.argmax()), float(logits.max()), float(logits.logsumexp(-1))), mixture
            )
            if self.accepted(chain.ids) <= step:
                break
        return chain.proposal(mixture)


class Mixed:
    """As the engine mixes; without a chooser the draft model drafts alone."""

    def __init__(self, draft: DraftNetwork, ngram: NgramProposer, chooser: Chooser | None) -> None:
        self._draft, self._ngram, self._chooser = draft, ngram, chooser

    def propose(self, one: Decoding) -> Proposal:
        if self._chooser is None:
            return one.chain(self._draft, Mixture())
        self._ngram.propose(one.running, LOOKAHEAD)
        lookups = {one.running: lambda chain_ids: self._ngram.offers(one.running, chain_ids)}
        return one.chain(self._draft, Mixture(self._chooser, lookups))

    def observe(self, proposal: Proposal, accepted: int, bonus_id: int) -> None:
        if self._chooser is not None:
            self._chooser.learn(proposal, accepted, bonus_id)


class Whole:
    """A whole lookup or a whole chain, whichever promises more tokens by the planner's estimates, as `hybrid` did before the
    mixture. Without a draft: always lookup."""

    def __init__(self, draft: DraftNetwork | None, ngram: NgramProposer) -> None:
        self._draft, self._ngram = draft, ngram
        self._acceptance, self._stats = AcceptanceTable(), SequenceStats()

    def propose(self, one: Decoding) -> Proposal:
        if len(one.running.ids) == len(one.running.request.prompt_ids) + 1:
            self._stats = SequenceStats()
        match = self._ngram.propose(one.running, LOOKAHEAD)
        self._stats.pending.watch(match.ids, match.source)
        self._stats.chain = chain_source(match.source)
        promises = [
            sum(self._acceptance.survival(self._stats, source, length))
            for source, length in ((match.source, len(match.ids)), (self._stats.chain, LOOKAHEAD))
        ]
        if self._draft is None or promises[0] > promises[1]:
            return match
        return one.chain(self._draft, Mixture())

    def observe(self, proposal: Proposal, accepted: int, bonus_id: int) -> None:
        if proposal.is_chain:
            is_rejected = accepted < len(proposal.ids)
            self._acceptance.observe(self._stats, self._stats.chain, accepted, is_rejected=is_rejected)
        score = self._stats.pending.score([*proposal.ids[:accepted], bonus_id])
        if score is not None:
            self._acceptance.observe(self._stats, score.source, score.accepted, is_rejected=score.is_rejected)


def decode(decodings: Iterable[Decoding], arm: Mixed | Whole, ngram: NgramProposer) -> list[int]:
    """Verify steps of each request."""
    steps = []
    for one in decodings:
        steps.append(0)
        while one.num_left:
            proposal = arm.propose(one)
            accepted = one.accepted(proposal.ids)
            arm.observe(proposal, accepted, one.text[len(one.running.ids) + accepted])
            one.advance(accepted + 1)
            steps[-1] += 1
        remember(ngram, one)
    return steps


def remember(ngram: NgramProposer, one: Decoding) -> None:
    """The whole answer."""
    one.advance(one.num_left)
    ngram.finish(one.running)
    ngram.index_all()


@torch.no_grad()
def predictions(draft: DraftNetwork, sample: Sample) -> Tensor:
    """See `Decoding`."""
    following = torch.cat([sample.ids[1:], torch.zeros(LOOKAHEAD, dtype=torch.long)])[
        None, : sample.num_rows + LOOKAHEAD - 1
    ]
    with torch.autocast("cpu", torch.bfloat16):
        states = draft.unroll(
            sample.aux.decoded()[None], following, num_steps=LOOKAHEAD, first_row=max(0, sample.first_output - 1)
        )
        return torch.stack([draft.logits(state[0]) for state in states])


def learned(recorder: Recorder, kind: str, number: int, seed: int) -> DraftNetwork:
    """The draft that serves after so many requests."""
    replay = Replay(OURS, read_head(harness.model()), {}, seed=seed)
    with Progress() as progress:
        bar = progress.add_task(f"{kind}, seed {seed}", total=number)
        samples = recorder.samples(kind, number, held_out=False)
        stream = traffic(scratch(kind, number), {kind: samples}, seed)
        replay.run(stream, lambda done: progress.update(bar, completed=done))
    if replay.served is None:
        sys.exit(f"{number} requests are too few for a draft of {kind}")
    return replay.served


def verify_steps(
    recorder: Recorder, kind: str, draft: DraftNetwork, arguments: argparse.Namespace
) -> dict[str, list[int]]:
    """Values of each held-out request, by arm."""
    samples = recorder.samples(kind, arguments.held_out, held_out=True)
    texts = recorder.texts(kind, arguments.held_out, held_out=True)
    earlier = recorder.texts(kind, arguments.training, held_out=False)
    logits = [predictions(draft, sample) for sample in samples]

    def decoded(arm: Callable[[NgramProposer], Mixed | Whole], num_remembered: int) -> list[int]:
        ngram = NgramProposer(num_remembered)
        decodings = [Decoding(*each) for each in zip(samples, texts, logits, strict=True)]
        for text in earlier:
            request = GenerationRequest(request_id="", prompt_ids=tuple(text[:1]), max_tokens=len(text))
            ngram.finish(Running(request=request, emit=lambda _: None, ids=text))
        ngram.index_all()
        return decode(decodings, arm(ngram), ngram)

    return {
        "draft": decoded(lambda ngram: Mixed(draft, ngram, None), 0),
        "own text": decoded(lambda ngram: Whole(None, ngram), 0),
        "lookup": decoded(lambda ngram: Whole(None, ngram), NUM_REMEMBERED),
        "whole chains": decoded(lambda ngram: Whole(draft, ngram), NUM_REMEMBERED),
        "mixture, own text": decoded(lambda ngram: Mixed(draft, ngram, Chooser()), 0),
        "mixture": decoded(lambda ngram: Mixed(draft, ngram, Chooser()), NUM_REMEMBERED),
    }


def measure(arguments: argparse.Namespace) -> harness.Measurements:
    """All kinds and seeds."""
    torch.set_num_threads(1)
    recorder, samples = open_recorder(), []
    recorder.record(arguments.kinds, arguments.training, arguments.held_out)
    for kind in arguments.kinds:
        for seed in range(SEED, SEED + arguments.seeds):
            draft = learned(recorder, kind, arguments.training, seed)
            steps = verify_steps(recorder, kind, draft, arguments)
            samples += [{"kind": kind, "seed": seed, "arm": arm, "steps": of_arm} for arm, of_arm in steps.items()]
    rows = output.table("arm", *(f">{kind}" for kind in arguments.kinds))
    rows.title = f"tokens per verify step after {arguments.training} requests of the kind (seeds: {arguments.seeds})"
    for arm in dict.fromkeys(str(sample["arm"]) for sample in samples):
        cells = []
        for kind in arguments.kinds:
            tokens = [num_tokens(one) for one in recorder.samples(kind, arguments.held_out, held_out=True)]
            steps_of = [sample["steps"] for sample in samples if (sample["kind"], sample["arm"]) == (kind, arm)]
            cells.append(str(figures.acceptance_length(tokens, steps_of)))
        rows.add_row(arm, *cells)
    return harness.Measurements(seed=SEED, lines=(), samples=samples, figures=[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["math", "sql"])
    parser.add_argument("--training", type=int, default=100, help="requests of the kind to learn from")
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT, help="requests of the kind to measure on")
    parser.add_argument("--seeds", type=int, default=1)
    harness.run("learning-mixture", parser, measure)


if __name__ == "__main__":
    main()
