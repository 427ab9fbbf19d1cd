"""Tokens per second of two ranks over those of one, each with one thread, on SmolLM2's recorded answers.

Ranks are processes that sum gradients by gloo. Arms take turns, one step at a time:

- `each a batch`: the ranks take a step on two batches of four requests, one process a step on each of them in turn.
- `half a batch each`: the ranks take a step on the requests of one batch, two each, and one process a step on that batch.
- `two processes apart`: processes that sum nothing take a step on a batch each, at the same time. No ranks can be faster.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bench import harness
from bench.harness import Spread
from tests.support.ranks import environment
from torch._C._distributed_c10d import TCPStore

ARMS = ("each a batch", "half a batch each", "two processes apart")


@dataclass(frozen=True, slots=True)
class Comparison:
    """`ratios` of tokens per second, by arm, and the steps behind them."""

    ratios: dict[str, Spread]
    samples: list[dict[str, Any]]


def measure(command: Sequence[str], variables: Mapping[str, str], rounds: int) -> Comparison:
    """`command` starts a worker, with these environment variables."""
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
    samples = list[dict[str, Any]]()
    with ExitStack() as stack:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        alone, other = (_started(stack, command, variables) for _ in range(2))
        ranks = [_started(stack, command, {**variables, **environment(rank, 2, store.port)}) for rank in range(2)]
        for worker in (alone, other, *ranks):
            _wait_for(worker)
        for number in range(-1, rounds):
            first, second = str(number % rounds), str((number + 1) % rounds)
            singles = {one: _steps([alone], [one])[0] for one in (first, second)}
            pairs = {
                ARMS[0]: (_steps(ranks, [first, second]), [singles[first], singles[second]]),
                ARMS[1]: (_steps(ranks, [f"{first} 0 2", f"{first} 1 2"]), [singles[first]]),
                ARMS[2]: (_steps([alone, other], [first, second]), [singles[first], singles[second]]),
            }
            for arm, (together, one_by_one) in pairs.items() if number >= 0 else ():
                ratios[arm].append(_seconds(one_by_one, sum) / _seconds(together, max))
                samples.append({"ranks": arm, "together": together, "alone": one_by_one})
    spreads = {arm: harness.spread(values) for arm, values in ratios.items()}
    return Comparison({arm: one for arm, one in spreads.items() if one is not None}, samples)


def _seconds(steps: Sequence[dict[str, Any]], combined: Any) -> float:
    return float(combined(step["seconds"] for step in steps))


def _started(stack: ExitStack, command: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    worker = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(worker.wait)
    stack.callback(worker.kill)
    return worker


def _wait_for(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdout is not None
    while (line := worker.stdout.readline().strip()) != "ready":
        if not line and worker.poll() is not None:
            raise RuntimeError(f"a learner ended with {worker.returncode} before its first step")


def _steps(workers: Sequence["subprocess.Popen[str]"], orders: Sequence[str]) -> list[dict[str, Any]]:
    """One step, for which each worker is given its part."""
    for worker, order in zip(workers, orders, strict=True):
        assert worker.stdin is not None
        print(order, file=worker.stdin, flush=True)
    return [_answer(worker) for worker in workers]


def _answer(worker: "subprocess.Popen[str]") -> dict[str, Any]:
    assert worker.stdout is not None
    figures: dict[str, Any] = json.loads(worker.stdout.readline())
    return figures
