"""The plugin in a stock vLLM: its rows and counts against a `transformers` forward over the same tokens, in float32; its swap.

The test is the agent here: it listens, sends the policy and the drafts, and reads the wire itself. The server has room for few
tokens, so requests are read in chunks, share prefixes and are preempted.
"""

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import Reference, read_target
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB
from tests.support.wait import until
from tests.vllm import build, swapping
from tests.vllm.models import write_draft, write_target
from tests.vllm.server import LOOKAHEAD, serving
from tests.vllm.tapping import (
    EVERYTHING,
    WORDS,
    Ask,
    Setting,
    accepted_of,
    add_plugin,
    answers,
    asked_until,
    check_end,
    check_rows,
    completion_body,
    digest,
    ended,
    mixed_asks,
    of,
    steps_of,
    sums_of,
    swap,
)

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM
from updraft_tap.weights import UNKNOWN
from updraft_vllm.reloads import ASLEEP

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

WIDTH = LOOKAHEAD + 1
OPTIONS = (
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
    *("--block-size", "32", "--num-gpu-blocks-override", "40"),
)
HELD_AFTER = 20
HOLDS = f"""
from functools import wraps
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

schedule, finish_requests = Scheduler.schedule, Scheduler.finish_requests


def is_held(request):
    return "held" in (request.sampling_params.extra_args or {{}}) and request.num_output_tokens >= {HELD_AFTER}


@wraps(schedule)
def hold(self, *args, **kwargs):
    if any(map(is_held, self.running)):
        self.set_pause_state(PauseState.PAUSED_ALL)
    return schedule(self, *args, **kwargs)


@wraps(finish_requests)
def release(self, *args, **kwargs):
    self.set_pause_state(PauseState.UNPAUSED)
    return finish_requests(self, *args, **kwargs)


def register():
    Scheduler.schedule, Scheduler.finish_requests = hold, release
"""
"""A plugin of the test's own: a request that is marked as held runs for so many tokens, and then only an abort ends it."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("tap")
    target = write_target(folder / "target")
    for number, quality in ((0, 0.7), (7, 0.3)):
        write_draft(target, folder / f"draft-{number}", quality=quality)
    plugin = plugin_folder.write(folder / "plugin", VLLM)
    add_plugin(plugin, "holds", HOLDS)
    variables = {
        "PYTHONPATH": str(plugin),
        "UPDRAFT_VLLM_SOCKET": str(tap_socket),
        "UPDRAFT_VLLM_TOP_K": "8",
    }
    with serving(target, folder / "draft-0", folder / "server", options=OPTIONS, variables=variables) as server:
        yield Setting(server=server, folder=folder, socket=tap_socket, target=read_target(target))


async def test_every_row_and_every_count_is_that_of_the_text(setting: Setting) -> None:
    asks = mixed_asks(100)
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        before = setting.server.drafted()
        given = await answers(setting, asks)
        await ended(agent, given)
        sums = [one for header, _ in agent.finished.values() for one in header["counters"]]
        steps, accepted = (sum(map(of_sum, sums)) for of_sum in (steps_of, accepted_of))
        await until(lambda: setting.server.drafted().since(before).steps >= steps, what="vLLM's own counters")
        counted = setting.server.drafted().since(before)

    assert (counted.steps, counted.accepted) == (steps, accepted)
    headers = [check_end(ask, answer, agent, captured=True) for ask, answer in zip(asks, given, strict=True)]
    whole = [(a, b, h) for a, b, h in zip(asks, given, headers, strict=True) if not h["preemptions"]]
    for ask, answer, header in whole:
        check_rows(setting, ask, answer, of(agent.seen, answer, Seen()), header)
    assert_all_kinds_were_there(agent, len(whole))


def assert_all_kinds_were_there(agent: Agent, num_whole: int) -> None:
    """Else the test would be about less than it says."""
    steps = [step for seen in agent.seen.values() for step in seen.steps]
    assert num_whole >= 50
    assert {step["accepted"] for step in steps} == set(range(WIDTH))
    assert {step["counterfactual_rows"] for step in steps} == set(range(WIDTH))
    assert max(step["batch_size"] for step in steps) >= 6
    assert any(prefill["cached"] for seen in agent.seen.values() for prefill in seen.prefills)
    assert any(len(seen.prefills) > 2 for seen in agent.seen.values())


async def test_a_preempted_request_is_sent_again_at_its_positions(setting: Setting) -> None:
    rng = random.Random(9)
    asks = [Ask(prompt=rng.choices(WORDS, k=40), tokens=250) for _ in range(8)]
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        given = await answers(setting, asks)
        await ended(agent, given)

    headers = [check_end(ask, answer, agent, captured=True) for ask, answer in zip(asks, given, strict=True)]
    assert any(header["preemptions"] for header in headers)
    for ask, answer in zip(asks, given, strict=True):
        text, seen = ask.prompt + answer.output, of(agent.seen, answer)
        steps = [step for step in seen.steps if step["drafts"]]
        sums = of(agent.finished, answer)[0]["counters"]
        assert (sum(map(steps_of, sums)), sum(map(accepted_of, sums))) == (
            len(steps),
            sum(step["accepted"] for step in steps),
        )
        cached = min(prefill["position"] for prefill in seen.prefills)
        reference = Reference(setting.target, text)
        assert {position for position, _ in seen.rows} >= set(range(cached, len(text) - 1))
        for position, aux in seen.rows:
            if position < len(text):
                reference.check(position, aux, None)
        for position, teacher in seen.teachers:
            if position < len(text):
                reference.check(position, None, teacher)


async def test_rows_of_a_request_within_a_grammar_are_those_before_the_mask_and_it_says_so(setting: Setting) -> None:
    grammar = {"structured_outputs": {"json": {"type": "string"}}}
    asks = [Ask(prompt=WORDS[:5], tokens=60, sampling=sampling) for sampling in ({}, grammar)]
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        given = await answers(setting, asks)
        await ended(agent, given)

    headers = [check_end(ask, answer, agent, captured=True) for ask, answer in zip(asks, given, strict=True)]
    for ask, answer, header in zip(asks, given, headers, strict=True):
        check_rows(setting, ask, answer, of(agent.seen, answer), header)
    assert [header["constrained"] for header in headers] == [False, True]
    free, within = (bytes(answer.output).decode() for answer in given)
    assert free != within
    assert isinstance(json.loads(f'{within}"'), str), "the limit ends it within the string"
    (all_drafts,), (allowed,) = (header["counters"] for header in headers)
    assert all_drafts["proposed"] == LOOKAHEAD * all_drafts["steps"]
    assert allowed["proposed"] < LOOKAHEAD * allowed["steps"], "the grammar takes drafts away"
    assert accepted_of(allowed) > 0


async def test_without_a_policy_and_for_who_opts_out_there_are_sums_and_nothing_else(setting: Setting) -> None:
    plain = Ask(prompt=WORDS[:9], tokens=20)
    out = Ask(prompt=WORDS[:9], tokens=20, sampling={"vllm_xargs": {"updraft_capture": "off"}})
    async with listening(setting.socket, roles={"scheduler", "worker"}) as agent:
        (first,) = await answers(setting, [plain])
        await ended(agent, [first])
        check_end(plain, first, agent, captured=False)
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        given = await answers(setting, [out, plain])
        await ended(agent, given)
        header = check_end(out, given[0], agent, captured=False)
        check_end(plain, given[1], agent, captured=True)

    assert sum(one["steps"] for one in header["counters"]) > 0
    assert first.output == given[0].output == given[1].output


async def test_a_share_of_the_requests_gives_rows_and_both_processes_choose_the_same(setting: Setting) -> None:
    asks = [Ask(prompt=WORDS[i : i + 3], tokens=4) for i in range(40)]
    async with listening(setting.socket, {**EVERYTHING, "payload": 0.5}, roles={"scheduler", "worker"}) as agent:
        given = await answers(setting, asks)
        await ended(agent, given)

    captured = {rid for rid, (_, tensors) in agent.finished.items() if tensors}
    assert 5 <= len(captured) <= 35
    assert agent.seen.keys() == captured


async def test_an_aborted_request_is_counted(setting: Setting) -> None:
    ask = Ask(prompt=WORDS[:5], tokens=450, sampling={"stream": True, "vllm_xargs": {"held": "yes"}})
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        async with (
            httpx.AsyncClient(base_url=setting.server.url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=completion_body(ask)) as stream,
        ):
            lines, received = stream.aiter_lines(), 0
            while received < HELD_AFTER:
                if line := await anext(lines):
                    received += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
        await until(lambda: bool(agent.finished), what="its end")

    ((header, tensors),) = agent.finished.values()
    assert header["finish"] == "aborted"
    assert len(tensors["tokens"]) == 5 + header["output_tokens"]
    assert HELD_AFTER <= header["output_tokens"] < 450
    assert sum(map(steps_of, header["counters"])) > 0


async def test_a_swap_in_the_middle_of_requests_is_proved_and_changes_no_token(setting: Setting) -> None:
    asks = [Ask(prompt=WORDS[i : i + 3], tokens=tokens) for i, tokens in enumerate((450, 350, 250))]
    alone = await answers(setting, asks)
    async with listening(setting.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        assert (await swap(agent, setting.folder / "draft-0", 0))["refusal"] == ""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(asked_until(stop, setting, ask)) for ask in asks]
            await until(lambda: bool(agent.seen), what="rows")
            swapped = await swap(agent, setting.folder / "draft-7", 7)
            stop.set()
        given = [
            (ask, one, whole) for ask, task, whole in zip(asks, running, alone, strict=True) for one in task.result()
        ]
        await ended(agent, [answer for _, answer, _ in given])
        back = await swap(agent, setting.folder / "draft-0", 0)

    assert (swapped["refusal"], swapped["held"]) == ("", digest(setting.folder / "draft-7"))
    assert swapped["served"] == {"version": 7, "digest": "sha256:7"}
    assert (back["held"], back["version"]) == (digest(setting.folder / "draft-0"), 0)
    assert swapped["target"] == back["target"] != ""
    for ask, answer, whole in given:
        assert answer.output == whole.output
        header = check_end(ask, answer, agent, captured=True)
        steps = [step for step in of(agent.seen, answer).steps if step["drafts"]]
        assert [step["version"] for step in steps] == sorted(step["version"] for step in steps)
        assert sums_of(steps) == {
            one["version"]: (one["steps"], one["proposed"], sum(one["accepted"])) for one in header["counters"]
        }
    assert any(len(header["counters"]) == 2 for header, _ in agent.finished.values()), "a swap in mid-request"


async def test_another_vocabulary_is_exchanged_and_the_server_drafts_with_it(setting: Setting) -> None:
    target, other = setting.folder / "target", setting.folder / "other-vocabulary"
    token_ids = torch.tensor(sorted({*WORDS, *range(VOCAB - DRAFT_VOCAB + len(set(WORDS)), VOCAB)}))
    write_draft(target, other, quality=0.7, token_ids=token_ids)
    ask = Ask(prompt=WORDS[:3], tokens=100)
    async with listening(setting.socket, roles={"scheduler", "worker"}) as agent:
        counts = []
        for folder, version in ((setting.folder / "draft-0", 0), (other, 8)):
            loaded = await swap(agent, folder, version)
            assert (loaded["refusal"], loaded["held"]) == ("", digest(folder))
            (answer,) = await answers(setting, [ask])
            await ended(agent, [answer])
            counts += of(agent.finished, answer)[0]["counters"]
        await swap(agent, setting.folder / "draft-0", 0)

    assert all(one.pop("us") > 0 for one in counts)
    assert [one.pop("version") for one in counts] == [0, 8]
    assert counts[0] == counts[1], "the same proposals, by other numbers"
    assert counts[0]["steps"] < 50


async def test_a_refused_draft_says_why_and_the_one_before_serves_on(setting: Setting) -> None:
    folder, ask = setting.folder, Ask(prompt=WORDS[:3], tokens=60)
    bad = folder / "bad"
    bad.mkdir()
    (bad / "config.json").write_text((folder / "draft-7" / "config.json").read_text())
    tensors = load_file(folder / "draft-7" / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, bad / "model.safetensors")
    async with listening(setting.socket, roles={"scheduler", "worker"}) as agent:
        await swap(agent, folder / "draft-0", 3)
        (before,) = await answers(setting, [ask])
        refused = [await swap(agent, folder / name, 9) for name in ("missing", "bad")]
        nonsense = len(agent.loaded)
        agent.send("worker", {"kind": "load"})
        await until(lambda: len(agent.loaded) > nonsense, what="the answer to a load of nothing")
        (after,) = await answers(setting, [ask])
        await ended(agent, [before, after])
        agent.hang_up()
        hellos = len(agent.hellos)
        await until(lambda: len(agent.hellos) >= hellos + 2, what="both again")

    assert ["cannot read the draft" in refused[0]["refusal"], "not finite" in refused[1]["refusal"]] == [True, True]
    assert agent.loaded[-1]["refusal"] != ""
    assert {one["served"]["digest"] for one in refused} == {"sha256:3"}
    assert after.output == before.output
    counts = [of(agent.finished, one)[0]["counters"] for one in (before, after)]
    assert all(one.pop("us") > 0 for sums in counts for one in sums)
    assert counts[0] == counts[1]
    assert {hello["digest"] for hello in agent.hellos[-2:]} == {"", "sha256:3"}


BREAKS = """
from updraft_vllm.rows import RowHooks


def broken(self, runner):
    raise ZeroDivisionError("of the test's own")


def register():
    RowHooks._read = broken
"""


@pytest.fixture(scope="module")
def broken(setting: Setting) -> Iterator[Setting]:
    """Another server, in which the hook of rows raises, which others may put to sleep or update, and which measures its
    drafts."""
    folder = setting.folder
    plugin = plugin_folder.write(folder / "broken-plugin", VLLM)
    add_plugin(plugin, "breaks", BREAKS)
    socket = Path(f"{setting.socket}-2")
    backend = swapping.install_plugin(folder / "backend")
    variables = {
        **backend,
        "PYTHONPATH": f"{plugin}{os.pathsep}{backend['PYTHONPATH']}",
        "UPDRAFT_VLLM_SOCKET": str(socket),
        "UPDRAFT_VLLM_DRAFTING": "auto",
    }
    model, draft, options = folder / "target", folder / "draft-0", (*OPTIONS, *swapping.OPTIONS)
    with serving(model, draft, folder / "broken", options=options, variables=variables) as server:
        yield Setting(server=server, folder=folder, socket=socket, target=setting.target)
    socket.unlink(missing_ok=True)


async def test_a_hook_that_raises_is_unhooked_and_said_and_serving_goes_on(setting: Setting, broken: Setting) -> None:
    ask = Ask(prompt=WORDS[:5], tokens=40)
    (whole,) = await answers(setting, [ask])
    async with listening(broken.socket, EVERYTHING, roles={"scheduler", "worker"}) as agent:
        (answer,) = await answers(broken, [ask])
        await until(lambda: of(agent.finished, answer) is not None, what="its end")
        problem = "the hook rows raised 3 times and is unhooked, the last: ZeroDivisionError: of the test's own"
        await until(lambda: any(hello["problem"] == problem for hello in agent.hellos), what="the reason")
        swapped = await swap(agent, setting.folder / "draft-7", 7)

    assert answer.output == whole.output
    assert sum(one["steps"] for one in of(agent.finished, answer)[0]["counters"]) > 0
    assert swapped["refusal"] == "", "swaps do not depend on rows"


async def test_slices_of_steps_show_what_a_draft_is_worth_and_change_no_token(
    setting: Setting, broken: Setting
) -> None:
    ask = Ask(prompt=WORDS[:5], tokens=400)
    (whole,) = await answers(setting, [ask])
    async with listening(broken.socket, roles={"scheduler", "worker"}) as agent:
        for version, name in ((7, "draft-7"), (8, "draft-0")):
            assert (await swap(agent, setting.folder / name, version))["refusal"] == ""
            agent.speedups.clear()
            for _ in range(10):
                (answer,) = await answers(broken, [ask])
                assert answer.output == whole.output
                await agent.settle()
                if any(message["loads"] for message in agent.speedups):
                    break
            assert {message["version"] for message in agent.speedups[1:]} == {version}
            assert {batch_size for batch_size, *_ in agent.speedups[-1]["loads"]} <= {0, 1}
            assert all(0 < low <= ratio <= high for _, ratio, low, high in agent.speedups[-1]["loads"])
            assert any(message["loads"] for message in agent.speedups)


async def test_a_server_that_sleeps_takes_no_draft_and_says_what_it_has_when_it_is_awake(broken: Setting) -> None:
    """vLLM on a CPU keeps its weights asleep, so the draft is still there."""
    first, second = (broken.folder / name for name in ("draft-7", "draft-0"))
    async with (
        listening(broken.socket, roles={"scheduler", "worker"}) as agent,
        httpx.AsyncClient(base_url=broken.server.url, timeout=60) as http,
    ):
        assert (await swap(agent, first, 7))["refusal"] == ""
        assert (await http.post("/sleep?level=1")).is_success
        asleep = await swap(agent, second, 8)
        hellos = len(agent.hellos)
        assert (await http.post("/wake_up")).is_success
        await until(lambda: len(agent.hellos) > hellos, what="what is served")
        awake = await swap(agent, second, 0)

    assert asleep["refusal"] == ASLEEP
    assert asleep["served"] == {"version": 7, "digest": UNKNOWN}
    assert [(hello["role"], hello["version"], hello["digest"]) for hello in agent.hellos[hellos:]] == [
        ("worker", 7, "sha256:7")
    ]
    assert awake["served"] == {"version": 0, "digest": "sha256:0"}


async def test_a_draft_that_somebody_else_replaces_is_told_as_lost_and_can_be_loaded_again(broken: Setting) -> None:
    ours, theirs = (broken.folder / name for name in ("draft-7", "draft-0"))
    async with listening(broken.socket, roles={"scheduler", "worker"}) as agent:
        assert (await swap(agent, ours, 7))["refusal"] == ""
        hellos = len(agent.hellos)
        await asyncio.to_thread(swapping.swap, broken.server, theirs, version="of somebody else")
        await until(lambda: len(agent.hellos) > hellos, what="what is served")
        again = await swap(agent, ours, 7)

    assert [(hello["role"], hello["version"], hello["digest"]) for hello in agent.hellos[hellos:]] == [
        ("worker", 0, UNKNOWN)
    ]
    assert (again["refusal"], again["held"]) == ("", digest(ours))


BINDING = """
import json
import torch
from updraft_tap import hooks
from updraft_tap.hooks import Binding
from updraft_tap.settings import DoorSettings, Settings
from updraft_vllm import plugin, reloads, runners
from updraft_vllm.drafting import ProposalHooks
from updraft_vllm.http_process import HttpProcess
from updraft_vllm.lead import EngineThread

settings = Settings(socket="/nowhere")
worker, scheduler = plugin.WorkerPlugin(settings), plugin.SchedulerPlugin(settings, {})
bindings = [*plugin.starts(settings, {}), *scheduler.bindings, *HttpProcess(DoorSettings()).bindings]
bindings += EngineThread(may_skip=True).bindings
for kind in (runners.FIRST, runners.SECOND):
    bindings += worker.bindings(kind, worker.row_hooks(kind))
    bindings += ProposalHooks(runner=kind, served=None, guard=None).bindings
for kind in ("gpu_worker.Worker", "cpu_worker.CPUWorker"):
    name = f"vllm.v1.worker.{kind}"
    bindings += reloads.Reloads(None, None).bindings(name)
    bindings.append(Binding(target=f"{name}.compile_or_warm_up_model", hook=worker.warmed_up, parameters=("self",)))
before = hooks.states(bindings)
hooks.install(bindings)
print(json.dumps([before, hooks.states(bindings)]))
"""


def test_the_hooks_of_both_runners_fit_this_vllm(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(plugin_folder.write(tmp_path, VLLM)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([build.python(), "-c", BINDING], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    before, after = json.loads(done.stdout.splitlines()[-1])
    assert len(before) == 42
    assert all(problem.endswith(" is not hooked") for problem in before.values())
    assert set(after.values()) == {""}
