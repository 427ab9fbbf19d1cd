"""Two tensor-parallel ranks of a real SGLang on this CPU: what they draft, what is captured, and how they swap a draft.

SGLang starts them here only where it finds no NCCL library; then its ranks exchange tensors by gloo.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.sglang.agent import beside, greedy
from tests.sglang.beside import NUM_STEPS, Setting, started
from tests.sglang.models import continuation
from tests.support.hanging import check_a_hanging_swap_is_reported
from tests.support.processes import reachable_ports
from tests.support.tap_agent import Seen
from tests.support.wait import until

from updraft_artifacts.model_folder import target_fingerprint
from updraft_chassis.errors import Unavailable
from updraft_cli.__main__ import cli
from updraft_draft import checkpoint
from updraft_inference.engine import LoadedDraft
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.attached import Known
from updraft_inference.sidecar.link import Event, Link
from updraft_inference.sidecar.sglang.attached import AttachedSglang, Folders
from updraft_inference.sidecar.sglang.draft_swap import ServedDraft
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap.server_kind import SGLANG

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.lasts(120),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

PROMPT = tuple(b"hello")
EXPECTED = continuation("hello", 60)
CORES = sorted(os.sched_getaffinity(0))[:2]
NO_NCCL = {
    "SGLANG_NCCL_SO_PATH": "/nowhere/libnccl.so",
    "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES)),
}


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    """It listens as in a pod."""
    with started("--tp-size", "2", "--host", "0.0.0.0", **NO_NCCL) as setting:  # noqa: S104
        yield setting


class Overtaken(SglangServer):
    """Something happens when the server is about to read a draft, or to be paused."""

    before_reading: Callable[[], object] = staticmethod(lambda: None)
    before_pause: Callable[[], object] = staticmethod(lambda: None)

    async def prepare(self, order: str) -> str:
        happen, self.before_reading = self.before_reading, lambda: None  # once
        happen()
        return await super().prepare(order)

    async def pause(self) -> None:
        self.before_pause()
        await super().pause()


@asynccontextmanager
async def opened(setting: Setting) -> AsyncIterator[tuple[ServedDraft, Overtaken]]:
    """The drafts of both ranks, as an agent that starts finds them."""
    async with Overtaken(setting.server.url, admin_key=setting.admin) as server:
        draft = await ServedDraft.open(server, await server.info(), setting.folder / "swap")
        await draft.adopt(LoadedDraft(), None)
        yield draft, server


async def test_two_ranks_draft_nothing_at_first_and_then_in_slices_that_both_take_at_the_same_step(
    setting: Setting,
) -> None:
    """Ranks that took other numbers of drafts would wait for each other for ever."""
    draft = setting.saved(1, 1.0)
    async with beside(setting.socket) as agent, opened(setting) as (served, _):
        assert await greedy(setting.server, PROMPT, len(EXPECTED)) == EXPECTED
        await served.swap(draft)
        for _ in range(12):
            assert await greedy(setting.server, PROMPT, len(EXPECTED)) == EXPECTED
            await agent.settle()
            if any(message["loads"] for message in agent.speedups):
                break
        seen, hellos = list(agent.seen.values()), list(agent.hellos)

    assert set(lengths(seen[0])) == {0}
    assert {number for one in seen[1:] for number in lengths(one)} == {0, NUM_STEPS}
    assert agent.speedups[-1]["loads"], "the first rank has measured what drafts are worth"
    assert all(dict(one.rows).keys() >= set(range(len(PROMPT) + len(EXPECTED) - 1)) for one in seen)
    assert {tuple(hello["ranks"].items()) for hello in hellos} == {(("tensor", 2), ("pipeline", 1), ("data", 1))}
    assert len(hellos) == 2, "one for each role, all of the first rank"


async def test_both_ranks_prepare_a_draft_before_the_pause_and_prove_what_they_hold_after_it(setting: Setting) -> None:
    good, poor = setting.saved(2, 1.0), setting.saved(3, 0.3)
    async with opened(setting) as (served, server):
        for draft in (good, poor, good):
            server.before_pause = partial((draft.folder / checkpoint.WEIGHTS).rename, setting.folder / "away")
            text, swapped = await asyncio.gather(
                asyncio.to_thread(setting.said, "hello", len(EXPECTED)), served.swap(draft)
            )
            (setting.folder / "away").rename(draft.folder / checkpoint.WEIGHTS)  # it was not there within the pause
            assert text == bytes(EXPECTED).decode()
            assert swapped.loaded == LoadedDraft(version=draft.version, tensors_digest=draft.tensors_digest)
            ranks = await server.checksums()
            assert [rank.tp_rank for rank in ranks] == [0, 1]
            assert ranks[0].hashes["draft.lm_head.weight"] != ranks[1].hashes["draft.lm_head.weight"], "each its part"


async def test_a_draft_that_the_ranks_cannot_read_changes_nothing_and_pauses_nobody(setting: Setting) -> None:
    """Its folder goes after the agent has read it."""
    good, missing = setting.saved(4, 1.0), setting.saved(5, 0.3)
    async with opened(setting) as (served, server):
        await served.swap(good)
        before = await server.checksums()
        server.before_reading = partial(shutil.rmtree, missing.folder)
        server.before_pause = lambda: pytest.fail("the server is paused")

        with pytest.raises(Unavailable, match="cannot read the draft in"):
            await served.swap(missing)

        assert await server.checksums() == before
        assert served.loaded.version == good.version
    assert await asyncio.to_thread(setting.said, "hello", len(EXPECTED)) == bytes(EXPECTED).decode()


async def test_a_swap_in_which_a_rank_hangs_is_reported_until_it_ends(setting: Setting, tmp_path: Path) -> None:
    good = setting.saved(6, 1.0)
    async with opened(setting) as (served, _):
        await served.swap(good)

    def hear(event: Event) -> None:
        if not isinstance(event, Ended):
            server.hear(event)

    link = Link(setting.socket, SGLANG, Assembler(max_bytes=1), hear)
    server = AttachedSglang(
        link,
        Known(fingerprints=(target_fingerprint(setting.target), "sha256:k"), initial=setting.seed),
        setting.client(),
        Folders(model=setting.target, drafts=setting.folder / "drafts", note=tmp_path / "swap"),
        on_change=lambda: None,
    )
    async with server.running(), link.listening():
        await until(
            lambda: server.loaded == LoadedDraft(version=6, tensors_digest=good.tensors_digest), what="the draft"
        )
        await check_a_hanging_swap_is_reported(server, setting.server.pid, tmp_path)
    assert await asyncio.to_thread(setting.said, "hello", len(EXPECTED)) == bytes(EXPECTED).decode()


@pytest.mark.attack(
    boundary="plugin",
    attack="reaching anything of an SGLang server of two ranks on one node but its port of clients",
    outcome="nothing else listens beyond the pod",
)
def test_nothing_of_the_ranks_listens_for_other_machines(setting: Setting) -> None:
    assert reachable_ports(setting.server.pid) == {setting.server.port}


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        pytest.param(
            (), ["2 tensor-parallel ranks, the agent needs --attach", "no agent listens on"], id="not confirmed"
        ),
        pytest.param(("--tensor-parallel-size", "2"), ["no agent listens on"], id="confirmed"),
    ],
)
def test_the_check_of_a_running_server_names_its_ranks(
    setting: Setting, options: Sequence[str], problems: list[str]
) -> None:
    command = ["attach", "--engine", "sglang", "--check", setting.server.url, *options]
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(cli, command)

    missing = [line for line in done.output.splitlines() if line.startswith("missing")]
    assert len(missing) == len(problems), done.output
    assert all(problem in line for problem, line in zip(problems, missing, strict=True))
    assert done.exit_code == 1


def lengths(seen: Seen) -> list[int]:
    """Drafts of each step."""
    return [len(step["drafts"]) for step in seen.steps]
