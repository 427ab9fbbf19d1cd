"""`updraft rollout` beside a canary that really runs: a registry process, simulated pods with traffic, the command itself."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import checkpoints
from tests.support.registry import CALL_S, RegistryProcess, client, publish
from tests.support.sim_pods import Behaviour, Quality, pods
from tests.support.wait import LONG_S

from updraft.registry.v1 import registry_pb2 as pb

BETTER, WORSE = 3.0, 1.5

QUICK = {
    "strategy": "Canary",
    "rollout_steps": "50:600",
    "analysis_interval_seconds": 1,
    "analysis_min_samples": 10,
    "settle_seconds": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What the command did."""

    exit_code: int
    out: str
    err: str


class Updraft:
    """The command as its own process, for a registry at an address."""

    def __init__(self, address: str, folder: Path) -> None:
        ours = {"UPDRAFT_REGISTRY": address, "UPDRAFT_DATA": str(folder / "no-stack")}
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")} | ours

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "updraft_cli", *arguments),
            env=self._environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> Ended:
        return await end(await self.start(*arguments))


async def end(process: asyncio.subprocess.Process) -> Ended:
    """Wait for it; what was read of its output before is not in what it says."""
    async with asyncio.timeout(LONG_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(exit_code=process.returncode, out=out.decode(), err=err.decode())


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(LONG_S):
        return (await process.stdout.readline()).decode()


@asynccontextmanager
async def canary(folder: Path, length: float, **settings: object) -> AsyncIterator[tuple[RegistryProcess, Updraft]]:
    """Version 1 serves four pods, and version 2, whose acceptance length is this one, goes on trial."""

    def quality(version: int) -> Quality:
        return Quality(acceptance_length=length if version == 2 else 2.0)

    behaviour = Behaviour(target=checkpoints.TARGET, report_s=0.2, requests_per_s=100, quality=quality)
    with RegistryProcess(folder, **QUICK | settings) as registry:
        async with client(registry.address) as stub, pods(registry.address, 4, behaviour):
            await publish(stub, checkpoints.draft(1))
            await stub.Promote(pb.PromoteRequest(speculator="default", version=1), timeout=CALL_S)
            updraft = Updraft(registry.address, folder)
            assert (await updraft.run("rollout", "watch")).exit_code == 0
            evaluation = checkpoints.evaluation(baseline=1, gain=1.5)
            await publish(stub, checkpoints.draft(2), source=pb.SOURCE_TRAINER, evaluation=evaluation)
            yield registry, updraft


async def test_a_better_version_is_watched_until_all_pods_serve_it(tmp_path: Path) -> None:
    async with canary(tmp_path, BETTER) as (_, updraft):
        watching = await updraft.start("rollout", "watch")
        first = await line(watching)
        shortened = await updraft.run("rollout", "policy", "set", "--step", "50:1s")
        watched = await end(watching)
    assert "version 2 is in canary on 2 of 4 pods (step 1 of 1)" in first
    assert shortened.out.startswith("steps: 50:600s -> 50:1s\n")
    assert (watched.exit_code, watched.err) == (0, "")
    assert watched.out.splitlines()[-1].endswith("version 2 is stable")


async def test_a_worse_version_is_watched_through_a_restart_of_the_registry_until_it_is_rolled_back(
    tmp_path: Path,
) -> None:
    async with canary(tmp_path, WORSE, auto_rollback=False) as (registry, updraft):
        watching = await updraft.start("rollout", "watch")
        await line(watching)
        await asyncio.to_thread(registry.kill)
        assert watching.stderr is not None
        told = (await watching.stderr.readline()).decode()
        await asyncio.to_thread(registry.start)
        allowed = await updraft.run("rollout", "policy", "set", "--auto-rollback")
        assert (allowed.exit_code, allowed.err) == (0, "")
        watched = await end(watching)
        history = await updraft.run("draft", "history", "2")
    assert told.endswith(f"the registry at {registry.address} is away; trying again\n")
    assert (watched.exit_code, watched.err) == (3, "")
    assert watched.out.splitlines()[-1].endswith(("version 1 is stable", "pods to load it"))
    assert "rolled back" in history.out


async def test_a_canary_is_held_and_decided_by_a_person(tmp_path: Path) -> None:
    async with canary(tmp_path, 2.0) as (_, updraft):
        paused = await updraft.run("rollout", "pause", "--reason", "lunch")
        status = await updraft.run("rollout", "status", "--exit-code")
        promoted = await updraft.run("draft", "promote", "candidate", "--reason", "good enough")
        watched = await updraft.run("rollout", "watch", "2")
    assert "the rollout is paused: lunch" in paused.out
    assert status.exit_code == 4
    assert "version            2          1" in status.out
    assert "paused    yes: lunch" in status.out
    assert promoted.out.startswith("Version 2 is promoted for default: version 2 is stable")
    assert watched.exit_code == 0


async def test_ctrl_c_ends_a_watch_without_a_word(tmp_path: Path) -> None:
    async with canary(tmp_path, 2.0) as (_, updraft):
        watching = await updraft.start("rollout", "watch", "--follow", "-o", "json")
        first = await line(watching)
        watching.send_signal(signal.SIGINT)
        watched = await end(watching)
    assert first.startswith('{"name": "default", ')
    assert (watched.exit_code, watched.err) == (130, "")
