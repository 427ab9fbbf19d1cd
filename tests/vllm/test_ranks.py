"""A vLLM of two tensor-parallel ranks on this CPU: its rows and counts are those of one rank, and a swap takes place on both
or on none."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tests.support.hanging import check_a_hanging_swap_is_reported
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.tap_agent import listening
from tests.support.text_reference import read_target
from tests.support.tiny_target import HIDDEN, INNER, VOCAB
from tests.support.wait import until, wait_until
from tests.vllm import build
from tests.vllm.agent import Agent, prepare
from tests.vllm.models import write_draft, write_target
from tests.vllm.server import START_S, serving
from tests.vllm.tapping import (
    EVERYTHING,
    WORDS,
    Ask,
    Setting,
    add_plugin,
    answers,
    asked_until,
    check_end,
    check_rows,
    digest,
    ended,
    mixed_asks,
    of,
    sums_of,
    swap,
)

from updraft_cli.__main__ import cli
from updraft_inference.sidecar.assembly import Assembler, Ended
from updraft_inference.sidecar.attached import AttachedServer, Known
from updraft_inference.sidecar.link import Event, Link
from updraft_inference.tap.server_kind import VLLM
from updraft_tap.drafting.switch import UNTRAINED

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_S + 300), pytest.mark.lasts(90)]

DRAFT_VOCAB = 250
"""vLLM pads it to 256, and each rank holds 128 rows, of which the second one's last 6 are zero."""
ROLES = {"scheduler", "worker"}
LEADER = "scheduler"

RANKS = """
import json
import os
from pathlib import Path

import torch
from updraft_tap import checkpoint, weights
from updraft_vllm.draft import VllmDraft
from vllm.distributed import get_tensor_model_parallel_rank

FOLDER = Path(os.environ["TEST_FOLDER"])
init, prepare, readers = VllmDraft.__init__, VllmDraft.prepare, VllmDraft.readers


def is_due(word):
    order = FOLDER / "second-rank-fails"
    return get_tensor_model_parallel_rank() == 1 and order.exists() and order.read_text() == word


def fail():
    raise RuntimeError("of the test's own")


def look(self, *args, **kwargs):
    init(self, *args, **kwargs)
    _, tensors = checkpoint.read(FOLDER / "first")
    part = self.part(weights.joined(tensors, torch.float32))
    held = {name: torch.cat([read() for read in pieces], -1) for name, pieces in readers(self).items()}
    differing = [name for name, value in part.items() if not torch.equal(held[name], value)]
    note = json.dumps([differing, {name: value.shape for name, value in part.items()}])
    (FOLDER / f"rank-{get_tensor_model_parallel_rank()}").write_text(note)


def prepared(self, part, d2t):
    if is_due("to prepare"):
        fail()
    writes = prepare(self, part, d2t)
    return [*writes, fail] if is_due("to write") else writes


def read(self):
    found = readers(self)
    if is_due("to prove"):
        (FOLDER / "second-rank-fails").unlink()
        found["norm.weight"] = [lambda: torch.zeros(1)]
    return found


def register():
    VllmDraft.__init__, VllmDraft.prepare, VllmDraft.readers = look, prepared, read
"""
"""A plugin of the test's own: it makes the swap of the second rank fail, and compares what vLLM's own loader gave each rank
with our part of the draft."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("ranks")
    target = write_target(folder / "target")
    token_ids = torch.tensor(sorted({*WORDS, *range(VOCAB - DRAFT_VOCAB + len(set(WORDS)), VOCAB)}))
    for number, quality in ((3, 0.7), (7, 0.3)):
        fill(write_draft(target, folder / f"draft-{number}", quality=quality, token_ids=token_ids))
    shutil.copytree(folder / "draft-3", folder / "first")
    config = json.loads((folder / "first" / "config.json").read_text())
    (folder / "first" / "config.json").write_text(json.dumps({**config, UNTRAINED: True}))
    prepare(target, plugin=folder / "plugin", seed=folder / "seed", draft_vocab=DRAFT_VOCAB)
    add_plugin(folder / "plugin", "ranks", RANKS)
    variables = {
        "PYTHONPATH": str(folder / "plugin"),
        "UPDRAFT_VLLM_SOCKET": str(tap_socket),
        "UPDRAFT_VLLM_TOP_K": "8",
        "UPDRAFT_VLLM_DRAFTING": "trained",
        "TEST_FOLDER": str(folder),
        "VLLM_SERVER_DEV_MODE": "1",  # for sleep, which changes nothing on a CPU, but may
    }
    options = ("--tensor-parallel-size", "2", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")
    with serving(target, folder / "first", folder / "server", options=options, variables=variables) as server:
        yield Setting(server=server, folder=folder, socket=tap_socket, target=read_target(target))


def fill(draft: Path) -> None:
    """No weight is zero everywhere, so that each part is told from every other one; what is proposed does not change."""
    tensors = load_file(draft / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() == 2:
            tensors[name] = value + 1e-6 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


async def proposed(setting: Setting, agent: Any) -> list[Any]:
    """Counters of a request: what the draft is worth. The first step of one before tells the scheduler which draft it is."""
    await answers(setting, [Ask(prompt=WORDS[:3], tokens=2)])
    (answer,) = await answers(setting, [Ask(prompt=WORDS[:3], tokens=60)])
    await ended(agent, [answer])
    counters = of(agent.finished, answer)[0]["counters"]
    return [(one["steps"], one["accepted"]) for one in counters]


async def test_a_draft_that_nobody_has_trained_drafts_nothing_on_any_rank(setting: Setting) -> None:
    first, trained = (setting.folder / name for name in ("first", "draft-3"))
    async with listening(setting.socket, roles=ROLES) as agent:
        assert (await swap(agent, first, 0, LEADER))["refusal"] == ""
        nothing = await proposed(setting, agent)
        assert (await swap(agent, trained, 3, LEADER))["refusal"] == ""
        drafts = await proposed(setting, agent)

    assert nothing == []
    assert drafts[0][0] > 0


async def test_rows_and_counts_are_those_of_the_text(setting: Setting) -> None:
    asks = mixed_asks(16)
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        assert (await swap(agent, setting.folder / "draft-3", 3, LEADER))["refusal"] == ""
        given = await answers(setting, asks)
        await ended(agent, given)

    for ask, answer in zip(asks, given, strict=True):
        header = check_end(ask, answer, agent, captured=True)
        check_rows(setting, ask, answer, of(agent.seen, answer), header)
    (worker,) = (hello for hello in agent.hellos if hello["role"] == "worker")
    assert (worker["problem"], worker["ranks"]["tensor"], worker["loader"]) == ("", 2, LEADER)


def test_each_rank_holds_the_part_that_vllms_own_loader_gave_it(setting: Setting) -> None:
    for rank in (0, 1):
        differing, shapes = json.loads((setting.folder / f"rank-{rank}").read_text())
        assert differing == []
        assert shapes["lm_head.weight"] == [128 - 6 * rank, HIDDEN]
        assert shapes["layers.0.self_attn.qkv_proj.weight"] == [32 + 2 * 32, 2 * HIDDEN], (
            "a head, and one of both k and v"
        )
        assert shapes["layers.0.mlp.down_proj.weight"] == [HIDDEN, INNER // 2]


async def test_a_swap_in_the_middle_of_requests_is_proved_on_both_ranks_and_changes_no_token(setting: Setting) -> None:
    asks = [Ask(prompt=WORDS[i : i + 3], tokens=tokens) for i, tokens in enumerate((300, 240, 180))]
    first, second = (setting.folder / f"draft-{number}" for number in (3, 7))
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        assert (await swap(agent, first, 3, LEADER))["refusal"] == ""
        alone, before = await answers(setting, asks), await proposed(setting, agent)
        stop = asyncio.Event()
        agent.seen.clear()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(asked_until(stop, setting, ask)) for ask in asks]
            await until(lambda: bool(agent.seen), what="rows")
            swapped = await swap(agent, second, 7, LEADER)
            stop.set()
        other = await proposed(setting, agent)
        back = await swap(agent, first, 3, LEADER)
        after = await proposed(setting, agent)
        given = [
            (ask, one, whole) for ask, task, whole in zip(asks, running, alone, strict=True) for one in task.result()
        ]
        await ended(agent, [answer for _, answer, _ in given])

    assert (swapped["refusal"], swapped["held"]) == ("", digest(second))
    assert swapped["served"] == {"version": 7, "digest": "sha256:7"}
    assert (back["held"], back["version"], back["target"]) == (digest(first), 3, swapped["target"])
    assert after == before
    assert other[0][0] > before[0][0], "a worse draft needs more steps"
    for ask, answer, whole in given:
        assert answer.output == whole.output
        header = check_end(ask, answer, agent, captured=True)
        steps = [step for step in of(agent.seen, answer).steps if step["drafts"]]
        assert sums_of(steps) == {
            one["version"]: (one["steps"], one["proposed"], sum(one["accepted"])) for one in header["counters"]
        }
    assert any(len(header["counters"]) == 2 for header, _ in agent.finished.values()), "a swap in mid-request"


async def test_a_draft_that_one_rank_refuses_leaves_the_one_before_on_both(setting: Setting) -> None:
    first, second, order = (setting.folder / name for name in ("draft-3", "draft-7", "second-rank-fails"))
    refused, after = [], []
    async with listening(setting.socket, roles=ROLES) as agent:
        assert (await swap(agent, first, 3, LEADER))["refusal"] == ""
        before = await proposed(setting, agent)
        for failing in ("to prepare", "to write", "to prove"):
            order.write_text(failing)
            refused.append(await swap(agent, second, 9, LEADER))
            order.unlink(missing_ok=True)
            after.append(await proposed(setting, agent))
        again = await swap(agent, second, 9, LEADER)

    assert all("rank 1: " in answer["refusal"] for answer in refused)
    assert [answer["served"] for answer in refused] == [{"version": 3, "digest": "sha256:3"}] * 3
    assert after == [before] * 3
    assert again["served"] == {"version": 9, "digest": "sha256:9"}


async def test_a_swap_in_which_a_rank_hangs_is_reported_until_it_ends(setting: Setting, tmp_path: Path) -> None:
    await give(setting, setting.folder / "draft-3", 3)

    def hear(event: Event) -> None:
        if not isinstance(event, Ended):
            server.hear(event)

    link = Link(setting.socket, VLLM, Assembler(max_bytes=1), hear)
    known = Known(fingerprints=("sha256:t", "sha256:k"), initial=setting.folder / "first")
    server = AttachedServer(link, known, on_change=lambda: None)
    async with link.listening():
        await server.met.wait()
        await check_a_hanging_swap_is_reported(server, setting.server.pid, tmp_path)


def test_an_agent_captures_and_loads_again_what_may_be_lost_after_sleep(
    setting: Setting, redis_server: RedisServer
) -> None:
    folder, server, prompt = setting.folder, setting.server, WORDS[:5]
    asyncio.run(give(setting, folder / "draft-7", 7))
    said, steps = asked(setting, prompt)
    assert steps > 0
    # No version is ordered, so the agent goes back to the draft that the server started with, which drafts nothing.
    with (
        RegistryProcess(folder) as registry,
        Agent(folder, folder / "target", setting.socket, redis_server, registry, seed=folder / "first") as agent,
    ):

        def is_captured() -> bool:
            assert server.greedy(prompt, 40) == said
            return agent.metric("captured_traces_total") > 0

        wait_until(lambda: agent.metric("swaps_total") == 1, what="the draft that the server started with")
        wait_until(is_captured, what="a trace")
        assert asked(setting, prompt) == (said, 0)
        for path in ("/sleep?level=1", "/wake_up"):
            assert httpx.post(f"{server.url}{path}", timeout=60).is_success
        wait_until(lambda: agent.metric("swaps_total") == 2, what="the same draft again")
        assert asked(setting, prompt) == (said, 0)
        assert "another vLLM server" not in server.log
        agent.kill()
    assert asked(setting, prompt) == (said, 0)


def asked(setting: Setting, prompt: list[int]) -> tuple[list[int], float]:
    """An answer, and by vLLM's own counters in how many steps it was verified."""
    before = setting.server.drafted()
    answer = setting.server.greedy(prompt, 40)
    return answer, setting.server.drafted().since(before).steps


async def give(setting: Setting, draft: Path, version: int) -> None:
    async with listening(setting.socket, roles=ROLES) as agent:
        assert (await swap(agent, draft, version, LEADER))["refusal"] == ""


def test_the_check_of_a_running_server_finds_nothing_wrong_with_its_ranks(setting: Setting) -> None:
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(
        cli, ["attach", "--engine", "vllm", "--check", setting.server.url]
    )
    assert "parallelism" not in done.output
    assert os.fspath(setting.socket) in done.output, "no agent listens"
