"""The cost of capture in tokens per second. See README.md in this folder."""

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import redis
from bench import harness
from bench.chat import chat_client
from bench.harness import Line, Measurements, spread

from updraft_cli import results
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.prompts import domain_prompts

ARMS = {"light": "0.0", "payload": "1.0"}
"""Fraction of requests whose hidden states are captured too."""
STREAMS = 8
TOKENS = 96
ROUNDS = 8
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tokens per second of one process on the same prompts, captured and opted out."""

    round: int
    arm: str
    captured: float
    off: float

    @property
    def cost(self) -> float:
        """The loss by capture, in percent."""
        return 100 * (1 - self.captured / self.off)


async def tokens_per_s(url: str, prompts: list[str], *, is_captured: bool) -> float:
    """Send all prompts at once, one per stream."""
    async with chat_client(url, is_captured=is_captured) as client:
        started = time.perf_counter()
        usages = await asyncio.gather(*(client.complete(text, TOKENS) for text in prompts))
        return sum(usage["completion_tokens"] for usage in usages) / (time.perf_counter() - started)


def measure(arguments: argparse.Namespace) -> Measurements:
    rounds: list[Round] = []
    with ExitStack() as running:
        stacks = {}
        for arm, fraction in ARMS.items():
            data = Path(running.enter_context(tempfile.TemporaryDirectory()))
            settings = {
                "UPDRAFT_INFERENCE_CAPTURE_PAYLOAD_FRACTION": fraction,
                "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.0",
            }
            config = StackConfig(
                model=harness.model(),
                data=data,
                port=0,
                registry_port=0,
                trainer=False,
                drafter="none",  # the second half of a pair would profit from answers that lookup remembers
                settings=settings,
            )
            stacks[arm] = running.enter_context(Stack(config))
        for n in range(-1, arguments.rounds):  # the first round warms up and is not counted
            prompts = domain_prompts("code", STREAMS, seed=SEED + n)
            for arm, stack in stacks.items():
                rates = {
                    is_captured: asyncio.run(
                        tokens_per_s(stack.addresses.inference_url, prompts, is_captured=is_captured)
                    )
                    for is_captured in harness.in_turn((False, True), n)
                }
                if n >= 0:
                    rounds.append(Round(round=n, arm=arm, captured=rates[True], off=rates[False]))
        traces = {arm: _num_traces(stack) for arm, stack in stacks.items()}
    num_captured = (arguments.rounds + 1) * STREAMS
    return Measurements(
        seed=SEED,
        lines=(
            _cost(rounds, "light", "cost of the light record", 2),
            _cost(rounds, "payload", "cost with every payload", 10),
            Line(results.at_least("traces in Redis, light (opted-out ones leave none)", traces["light"], num_captured)),
            Line(results.at_least("traces in Redis, payload", traces["payload"], num_captured)),
        ),
        samples=[asdict(one) for one in rounds],
    )


def _num_traces(stack: Stack) -> int:
    client = redis.Redis.from_url(stack.addresses.redis_url)
    return sum(int(str(client.xlen(key))) for key in client.scan_iter("updraft:{*}:samples:v1"))


def _cost(rounds: list[Round], arm: str, name: str, target: float) -> Line:
    of_arm = [one for one in rounds if one.arm == arm]
    costs = [one.cost for one in of_arm]
    rate = statistics.median(one.off for one in of_arm)
    note = f"rounds from {min(costs):.1f} to {max(costs):.1f} %; {rate:.1f} tokens/s without capture"
    return Line(results.at_most(name, statistics.median(costs), target, "%"), spread(costs), note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"counted rounds (default {ROUNDS})")
    harness.run("capture", parser, measure)


if __name__ == "__main__":
    main()
