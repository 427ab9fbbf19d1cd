"""Share of a kind's tokens that a draft cannot propose, by the requests that chose its vocabulary.

`python -m bench.learning.vocabulary`. The columns: the first requests of another kind chose it, requests of the kind, or both.
"""

import argparse
from collections.abc import Sequence

from bench import harness
from bench.learning.kinds import TUNED
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import DRAFT_VOCAB, FIRST_SAMPLES

from updraft_artifacts.target_description import TargetDescription
from updraft_cli import output
from updraft_draft import vocabulary
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample

NUM_REQUESTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=DRAFT_VOCAB, help="tokens of the draft vocabulary")
    size = parser.parse_args().size
    recorder, target = open_recorder(), read_head(harness.model()).config
    recorder.record(TUNED, NUM_REQUESTS, NUM_HELD_OUT)
    table = output.table(
        "kind", "other", f">{FIRST_SAMPLES} of the other", f">{NUM_REQUESTS} of the kind", f">{NUM_REQUESTS} of both"
    )
    for kind, other in zip(TUNED, [*TUNED[1:], TUNED[0]], strict=True):
        own, others = (recorder.samples(one, NUM_REQUESTS, held_out=False) for one in (kind, other))
        held_out = recorder.samples(kind, NUM_HELD_OUT, held_out=True)
        choices = (others[:FIRST_SAMPLES], own, [*own, *others])
        table.add_row(kind, other, *(f"{100 * unknown(one, held_out, target, size):.1f} %" for one in choices))
    output.console().print(table)


def unknown(choice: Sequence[Sample], held_out: Sequence[Sample], target: TargetDescription, size: int) -> float:
    """Share of the held-out output outside the vocabulary that `choice` chooses."""
    token_ids = vocabulary.choose(
        (sample.ids for sample in choice), always=target.eos_token_ids, vocab_size=target.vocab_size, size=size
    )
    return vocabulary.unknown_share([sample.ids[sample.first_output :] for sample in held_out], token_ids)


if __name__ == "__main__":
    main()
