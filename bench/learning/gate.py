"""Does the trainer's gate follow today's traffic? `python -m bench.learning.gate`.

A closed form of mathematics serves. The candidate is one of mathematics and three other kinds. Most held-out requests are
mathematics, as after a shift of traffic. Each draw of them is judged three ways: all requests alike, as if they were one kind;
with a tenth of today's traffic mathematics; and with none.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from bench import harness
from bench.learning.arms import OURS
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_cli import output
from updraft_draft.target_weights import read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.selection import TrafficMix
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.decision import decide
from updraft_trainer.publishing.estimate import compare, num_tokens, verify_steps

OLD, NEW = "math", ("chat", "sql", "json")
NUM_FITTED, NUM_FITTED_NEW = 24, 12
NUM_OLD, NUM_NEW = 24, 3
"""Held-out requests of a draw: of mathematics, and of each other kind."""
DRAWS = 200
SHARES: Mapping[str, Mapping[str, float]] = {
    "all requests alike": {"": 1.0},
    "a tenth of today's traffic is math": {OLD: 0.1, **dict.fromkeys(NEW, 0.3)},
    "none of it is": dict.fromkeys(NEW, 1 / 3),
}


def main() -> None:
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    recorder.record((OLD, *NEW), NUM_FITTED, NUM_HELD_OUT)
    old = recorder.samples(OLD, NUM_FITTED, held_out=False)
    fitted = [*old, *(one for kind in NEW for one in recorder.samples(kind, NUM_FITTED_NEW, held_out=False))]
    token_ids = choose_vocabulary(fitted, target, size=DRAFT_VOCAB)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters())
    serving, candidate = learner.closed_form(old), learner.closed_form(fitted)
    assert serving is not None
    assert candidate is not None
    requests = [(kind, one) for kind in (OLD, *NEW) for one in recorder.samples(kind, NUM_HELD_OUT, held_out=True)]
    requests = [(kind, one) for kind, one in requests if num_tokens(one)]
    samples = [one for _, one in requests]
    steps = [verify_steps(draft, samples, lookahead=LOOKAHEAD) for draft in (serving, candidate)]
    lengths = output.table("kind", ">serving", ">candidate")
    for kind in (OLD, *NEW):
        of_kind = [n for n, (name, _) in enumerate(requests) if name == kind]
        tokens = sum(num_tokens(samples[n]) for n in of_kind)
        lengths.add_row(kind, *(f"{tokens / sum(walked[n] for n in of_kind):.2f}" for walked in steps))
    verdicts = output.table("judged", ">published", ">not sure", ">a kind worse", ">other")
    for name, shares in SHARES.items():
        counts = Counter(judge(requests, steps, shares, seed) for seed in range(DRAWS))
        verdicts.add_row(
            name, *(f"{100 * counts[one] / DRAWS:.0f} %" for one in ("published", "not sure", "worse", "other"))
        )
    output.console().print(lengths, verdicts)


def judge(
    requests: Sequence[tuple[str, Sample]], steps: Sequence[Sequence[int]], shares: Mapping[str, float], seed: int
) -> str:
    """The verdict on one draw of held-out requests."""
    rng = random.Random(seed)
    places = {kind: [n for n, (name, _) in enumerate(requests) if name == kind] for kind in (OLD, *NEW)}
    drawn = [n for kind, of_kind in places.items() for n in rng.sample(of_kind, NUM_OLD if kind == OLD else NUM_NEW)]
    samples = [requests[n][1] for n in drawn]
    kinds = {requests[n][1].trace_id: "" if "" in shares else requests[n][0] for n in drawn}
    serving, candidate = ([walked[n] for n in drawn] for walked in steps)
    estimate = compare(samples, candidate, serving, TrafficMix(kinds=kinds, shares=shares))
    decision = decide(estimate, subject="it", baseline_version=1, thresholds=OURS.thresholds)
    if decision.should_publish:
        return "published"
    return "worse" if estimate.losses() else "not sure" if "not sure" in decision.sentence else "other"


if __name__ == "__main__":
    main()
