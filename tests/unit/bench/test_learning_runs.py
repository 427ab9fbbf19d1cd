"""Runs of `bench/learning` are kept until something changes that they depend on, so that figures add up over sittings."""

from pathlib import Path

from bench.learning import learning
from bench.learning.learning import Job
from bench.learning.recorder import Recorder
from bench.learning.replay import Checkpoint, Run
from bench.learning.streams import scratch
from tests.support.tiny_target import make_tiny_target

from updraft_draft.target_weights import read_head

JOB = Job(arm="ours", stream=scratch("explain", 10), seed=7, num_training=16, num_held_out=16)
RUN = Run(
    checkpoints=(Checkpoint(requests=8, seconds=1.5, version=1, steps={"explain": [3, 4]}, unknown={"explain": 0.25}),),
    published=(8,),
    online=(5, 4),
    sampled={"explain": [0.5, 0.25]},
    looks=((8, "the draft in training is better"),),
)


def test_a_run_that_was_made_is_read_and_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "of-an-earlier-sitting.json"
    learning.write(RUN, JOB, path)
    assert learning.run(JOB, path) == RUN, "nothing is recorded here, so it cannot be made"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_run_is_kept_under_all_that_it_depends_on() -> None:
    others = [
        Job(arm="shipped", stream=JOB.stream, seed=7, num_training=16, num_held_out=16),
        Job(arm="ours", stream=scratch("explain", 11), seed=7, num_training=16, num_held_out=16),
        Job(arm="ours", stream=JOB.stream, seed=8, num_training=16, num_held_out=16),
    ]
    keys = [JOB.key("code", "recordings"), JOB.key("changed", "recordings"), JOB.key("code", "changed")]
    keys += [other.key("code", "recordings") for other in others]
    assert len(set(keys)) == len(keys)
    assert JOB.key("code", "recordings") == keys[0]


def test_recordings_that_were_made_again_are_others(tmp_path: Path) -> None:
    recorder = Recorder(Path(), tmp_path, read_head(make_tiny_target(tmp_path / "target")))
    (tmp_path / "explain").mkdir()
    for name in ("training-0000", "held-out-0000"):
        (tmp_path / "explain" / f"{name}.traces").write_bytes(b"recorded")
    before = learning.recordings_digest(recorder, JOB)
    assert learning.recordings_digest(recorder, JOB) == before
    (tmp_path / "explain" / "held-out-0000.traces").write_bytes(b"recorded again")
    assert learning.recordings_digest(recorder, JOB) != before
