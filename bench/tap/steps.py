"""The CPU time of the plugin's hooks in a step, on the threads of a real server that call them. See `meter`.

It depends less on what else runs on the machine than tokens per second do.
"""

import json
import shutil
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench import harness
from bench.harness import Line, spread
from bench.tap import meter
from bench.tap.arms import MOST, Arm
from rich.console import Console

from updraft_cli import results
from updraft_inference.tap.server_kind import ServerKind

STEPS = frozenset({"Scheduler.update_from_output", "Scheduler.process_batch_result"})
"""The hook that each step calls once: vLLM's, and SGLang's."""
_WRITTEN = "meters"
"""The folder within a server's where its meters write."""
_PACKAGE = "updraft_meter"

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """The sums of all processes of a server since its start."""

    hooks: Mapping[str, tuple[int, int]]
    """By hook, how often it was called, and its own nanoseconds."""
    engine_ns: int
    """Those of the functions that the hooks wrap: the forward, sampling, drafting, and what follows."""
    sender_ns: int
    """Those of the threads that send to the agent."""

    @classmethod
    def read(cls, server: Path) -> Self:
        """The sums that the meters of a server with this folder have written."""
        found = [json.loads(text) for file in (server / _WRITTEN).iterdir() if (text := file.read_text())]
        hooks: dict[str, tuple[int, int]] = {}
        for name, (calls, own_ns) in (hook for one in found for hook in one["hooks"].items()):
            before = hooks.get(name, (0, 0))
            hooks[name] = before[0] + calls, before[1] + own_ns
        return cls(
            hooks=hooks,
            engine_ns=sum(one["engine_ns"] for one in found),
            sender_ns=sum(one["sender_ns"] for one in found),
        )

    def since(self, before: "Sums") -> "Sums":
        """The part that was added."""
        return Sums(
            hooks=dict(_added(self.hooks, before.hooks)),
            engine_ns=self.engine_ns - before.engine_ns,
            sender_ns=self.sender_ns - before.sender_ns,
        )


def _added(
    now: Mapping[str, tuple[int, int]], before: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, (calls, own_ns) in now.items():
        calls_before, own_ns_before = before.get(name, (0, 0))
        yield name, (calls - calls_before, own_ns - own_ns_before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Eight requests at once in one arm: microseconds in each step, on average."""

    round: int
    arm: Arm
    steps: int
    hooks_us: float
    by_hook_us: Mapping[str, float]
    engine_us: float
    sender_us: float

    @property
    def share(self) -> float:
        """The hooks' part of the engine's time, in percent."""
        return 100 * self.hooks_us / self.engine_us

    @classmethod
    def of(cls, number: int, arm: Arm, sums: Sums) -> Self:
        """From the sums of the turn."""
        steps = sum(calls for name, (calls, _) in sums.hooks.items() if name in STEPS)
        if not steps:
            raise SystemExit(f"the hook that counts steps was not called: {' or '.join(sorted(STEPS))}")
        by_hook_us = {name: own_ns / steps / 1e3 for name, (_, own_ns) in sums.hooks.items() if own_ns}
        return cls(
            round=number,
            arm=arm,
            steps=steps,
            hooks_us=sum(by_hook_us.values()),
            by_hook_us=by_hook_us,
            engine_us=sums.engine_ns / steps / 1e3,
            sender_us=sums.sender_ns / steps / 1e3,
        )


async def turns(taken: Callable[[Arm], Awaitable[object]], server: Path, rounds: int) -> list[Turn]:
    """Rounds of the same prompts by each arm on one server with this folder, the arms in turn. `taken` is a turn."""
    found = []
    for number in range(-1, rounds):  # the first round warms up
        for arm in harness.in_turn(tuple(MOST), number):
            _progress.print(f"round {number} of {rounds}: {arm}")
            before = Sums.read(server)
            await taken(arm)
            found.append(Turn.of(number, arm, Sums.read(server).since(before)))
    return [one for one in found if one.round >= 0]


def variables(server: Path, kind: ServerKind, plugin: Path) -> dict[str, str]:
    """Variables of a server whose hooks are timed; writes the module that its processes load to the folder."""
    package, written = server / "meter", server / _WRITTEN
    info = package / f"{_PACKAGE}-0.dist-info"
    info.mkdir(parents=True)
    written.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PACKAGE}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{kind.group}]\n{_PACKAGE} = {_PACKAGE}:register\n")
    shutil.copyfile(meter.__file__, package / f"{_PACKAGE}.py")
    return {"PYTHONPATH": f"{package}:{plugin}", meter.FOLDER: str(written)}  # engines load plugins in this order


def lines(taken: Sequence[Turn]) -> list[Line]:
    """A bar for each arm: the hooks' part of the engine's time, without what the engine waits for Python's lock."""
    found = []
    for arm, most in MOST.items():
        of_arm = [one for one in taken if one.arm is arm]
        shares = [one.share for one in of_arm]
        hooks_us, engine_us, sender_us = (
            statistics.median(getattr(one, name) for one in of_arm) for name in ("hooks_us", "engine_us", "sender_us")
        )
        name = f"hooks, CPU time per step, {arm}"
        note = f"{hooks_us:.0f} of {engine_us:.0f} us; {sender_us:.0f} us more on the thread that sends"
        found.append(Line(results.at_most(name, statistics.median(shares), most, "%"), spread(shares), note))
    return found


def figures(taken: Sequence[Turn]) -> Iterator[str]:
    """The hooks of each arm, by name."""
    for arm in MOST:
        of_arm = [one.by_hook_us for one in taken if one.arm is arm]
        medians = {name: statistics.median(one.get(name, 0.0) for one in of_arm) for name in of_arm[0]}
        yield f"{arm}: " + ", ".join(f"{name} {us:.1f} us" for name, us in sorted(medians.items()) if us >= 0.05)
