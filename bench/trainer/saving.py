"""Saves the state of a draft with the learner and the saver of the trainer, in a process of its own; prints its figures."""

import argparse
import asyncio
import itertools
import json
import random
import time
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from updraft_chassis.clock import SystemClock
from updraft_draft.target_weights import read_head
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.schedule import Progress, TrainingSchedule
from updraft_trainer.saving import Saver
from updraft_trainer.states.state import Identity, State, States, TrainingHistory

IDENTITY = Identity(speculator="bench", target_fingerprint="", tokenizer_fingerprint="")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    learner = _learner(arguments.target, arguments.vocab)
    for figures in asyncio.run(_saves(learner, States(arguments.folder), arguments.rounds)):
        print(json.dumps(figures), flush=True)


def _learner(target: Path, vocab: int) -> Learner:
    """With moments in the optimizer, as after a step, and without the memory of a step."""
    head = read_head(target)
    learner = Learner(head, head.draft(draft_vocab_size=vocab), torch.arange(vocab), Hyperparameters())
    state = learner.state_dict()
    trained = [one for one in learner.network.parameters() if one.requires_grad]
    state["optimizer"]["state"] = {
        index: {"exp_avg": torch.zeros_like(one), "exp_avg_sq": torch.zeros_like(one), "step": torch.ones(())}
        for index, one in enumerate(trained)
    }
    learner.load_state_dict(state)
    return learner


async def _saves(learner: Learner, states: States, rounds: int) -> list[dict[str, object]]:
    """Each save of the running trainer, and the one of a stop, which copies nothing."""
    metrics, clock = Metrics(CollectorRegistry()), SystemClock()
    state = State(
        identity=IDENTITY,
        token_ids=learner.network.token_ids,
        learner=learner.state_dict(),
        history=TrainingHistory(),
        rng=random.Random(0).getstate(),
        config_digest="",
        draft_config=learner.network.config,
        taken_s=clock.now(),
    )
    steps = itertools.count()  # a state that has not changed is not written again
    saver = Saver(
        states,
        TrainingSchedule(evaluate_steps=1, evaluate_seconds=1.0, checkpoint_seconds=60.0),
        take=lambda: state,
        progress=lambda: Progress(step=next(steps), num_held_out=0, at_s=clock.monotonic()),
        metrics=metrics,
        clock=clock,
    )
    figures: list[dict[str, object]] = []
    for _ in range(rounds):
        await asyncio.sleep(2.0)  # the copy is freed after a save has ended
        before_gb, started_s = _reset_peak_gb(), time.perf_counter()
        saver.request_save()
        await saver.save_if_due()
        paused_s = time.perf_counter() - started_s
        await saver.written()
        figures.append(_figures("running", started_s, before_gb) | {"pause_s": paused_s})
    await asyncio.sleep(2.0)
    before_gb, started_s = _reset_peak_gb(), time.perf_counter()
    await saver.save()
    figures.append(_figures("stop", started_s, before_gb))
    started_s = time.perf_counter()
    saved = states.newest(IDENTITY)
    assert saved is not None
    states.read(saved)
    loaded_s = time.perf_counter() - started_s
    size = sum(path.stat().st_size for path in states.path(saved).iterdir())
    figures.append({"load_s": loaded_s, "state_gb": size / 1e9})
    return figures


def _figures(kind: str, started_s: float, before_gb: float) -> dict[str, object]:
    return {"save": kind, "seconds": time.perf_counter() - started_s, "extra_gb": _status_gb("VmHWM") - before_gb}


def _reset_peak_gb() -> float:
    """The memory of now, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_gb("VmRSS")


def _status_gb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
