"""What the plugin in a stock SGLang server sends, held against a `transformers` forward over the same tokens, in float32.

The test is the agent here: it listens, and reads the wire itself. Chunks of 16 tokens, a prefix cache, 16 requests at once.
"""

import asyncio
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.contract.engines.tracing_contract import ATTEMPTS
from tests.sglang import build, swapping
from tests.sglang.models import cycle, cycle_draft, write_mixing_target
from tests.sglang.server import Server, eagle3
from tests.support import text_reference
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import Reference, check_step, read_target
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB, make_draft, save_draft
from tests.support.wait import until

from updraft_draft import checkpoint
from updraft_inference.sglang_engine import checksums
from updraft_inference.tap import plugin_folder

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(240)]

WIDTH = 4
WORDS = cycle()
VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}

Setting = text_reference.Setting[Server]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("capture")
    target = write_mixing_target(folder / "target")
    for number, quality in ((0, 0.7), (7, 0.3)):
        save_draft(cycle_draft(target, quality=quality), folder / f"draft-{number}")
    server = Server(
        target,
        folder / "server.log",
        arguments=[
            *eagle3(folder / "draft-0", num_steps=WIDTH - 1),
            *("--skip-tokenizer-init", "--chunked-prefill-size", "16", "--custom-weight-loader", swapping.LOADER),
        ],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={
            "UPDRAFT_SGLANG_SOCKET": str(tap_socket),
            "UPDRAFT_SGLANG_TOP_K": "8",
            "UPDRAFT_SGLANG_QUEUE_BYTES": str(2 << 20),
        },
    )
    with server:
        yield Setting(server=server, folder=folder, socket=tap_socket, target=read_target(target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    rid: str
    prompt: list[int]
    tokens: int
    options: dict[str, Any] | None
    sampling: dict[str, Any] = field(default_factory=dict)


async def answers(setting: Setting, asks: list[Ask]) -> dict[str, dict[str, Any]]:
    """All at once, 16 at a time."""
    slots = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http:

        async def one(ask: Ask) -> dict[str, Any]:
            async with slots:
                response = await http.post("/generate", json=_body(ask))
                assert response.is_success, response.text
                answer: dict[str, Any] = response.json()
                return answer

        found = await asyncio.gather(*map(one, asks))
    return dict(zip([ask.rid for ask in asks], found, strict=True))


def _body(ask: Ask) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": ask.tokens, "ignore_eos": True, **ask.sampling}
    if ask.options is not None:
        sampling["custom_params"] = {"updraft": ask.options}
    return {"rid": ask.rid, "input_ids": ask.prompt, "sampling_params": sampling}


def mixed_asks(count: int) -> list[Ask]:
    """Prompts of 1 to 120 tokens, many with a common beginning; every kind of options and of sampling."""
    rng = random.Random(5)
    stems = [rng.choices(WORDS, k=50) for _ in range(4)]
    asks = []
    for i in range(count):
        own = rng.choices(WORDS, k=rng.randrange(1, 21) if i % 8 else rng.randrange(70, 121))
        prompt = own if i % 8 == 0 else rng.choice(stems)[: rng.randrange(50)] + own
        options = {
            "payload": rng.random() < 0.8,
            "prompt_rows": rng.choice((0, 5, 1000)),
            "counterfactual_rows": rng.choice((0, 1, 3)),
        }
        sampling = rng.choice(({}, {}, {"temperature": 0.8}, {"presence_penalty": 0.7}, {"logit_bias": {"65": 2.0}}))
        asks.append(
            Ask(
                rid=f"mixed-{i}",
                prompt=prompt,
                tokens=rng.randrange(1, 33),
                options=options if rng.random() < 0.9 else None,
                sampling=sampling,
            )
        )
    return asks


def check_request(setting: Setting, ask: Ask, answer: dict[str, Any], seen: Seen) -> None:
    """Sums, positions and rows of one request that was not preempted."""
    options, output, meta, start = ask.options or {}, answer["output_ids"], answer["meta_info"], len(ask.prompt)
    steps = seen.steps
    assert len(steps) == meta.get("spec_verify_ct", 0)
    if steps:
        assert sum(step["accepted"] for step in steps) == meta["spec_num_correct_drafts"]
        assert sum(len(step["drafts"]) for step in steps) == meta["spec_num_proposed_drafts"]
        histogram = Counter(step["accepted"] for step in steps)
        assert [histogram[i] for i in range(WIDTH)] == _padded(meta["spec_correct_drafts_histogram"])

    text = ask.prompt + output[:1]
    for step in steps:
        assert step["position"] == len(text) - 1
        text += step["drafts"][: step["accepted"]]
        text += output[len(text) - start :][:1]
    assert text[: start + len(output)] == ask.prompt + output

    reference = Reference(setting.target, text)
    for step, rejected in zip(steps, seen.rejected, strict=True):
        check_step(setting.target, text, reference, step, rejected)
    if not options.get("payload"):
        assert (seen.rows, seen.prefills) == ([], [])
        return
    assert sum(prefill["cached"] for prefill in seen.prefills) == meta["cached_tokens"]
    first = max(start - options["prompt_rows"], meta["cached_tokens"])
    assert [position for position, _ in seen.rows] == list(range(first, _end(ask, steps)))
    for position, aux in seen.rows:
        reference.check(position, aux, None)
    taught_from = start - 1 if options["prompt_rows"] else start
    assert [position for position, _ in seen.teachers] == list(range(taught_from, _end(ask, steps)))
    for position, teacher in seen.teachers:
        reference.check(position, None, teacher)


def _padded(histogram: list[int]) -> list[int]:
    return histogram + [0] * (WIDTH - len(histogram))


def _end(ask: Ask, steps: list[dict[str, Any]]) -> int:
    """The position behind the last row."""
    return steps[-1]["position"] + steps[-1]["accepted"] + 1 if steps else len(ask.prompt)


async def test_every_row_and_every_count_is_that_of_the_text(setting: Setting) -> None:
    asks = mixed_asks(200)
    async with listening(setting.socket) as agent:
        found = await answers(setting, asks)
        last = [rid for rid in (ask.rid for ask in asks) if rid in agent.seen]
        await until(
            lambda: all(len(agent.seen[r].steps) >= found[r]["meta_info"].get("spec_verify_ct", 0) for r in last)
        )

    assert agent.dropped == 0
    assert agent.numbers == list(range(agent.numbers[0], agent.numbers[0] + len(agent.numbers)))
    for ask in asks:
        if ask.options is None:
            assert ask.rid not in agent.seen
        else:
            check_request(setting, ask, found[ask.rid], agent.seen.get(ask.rid, Seen()))
    assert_all_kinds_were_there(agent, found)


def assert_all_kinds_were_there(agent: Agent, found: dict[str, dict[str, Any]]) -> None:
    """Else the test would be about less than it says."""
    steps = [step for seen in agent.seen.values() for step in seen.steps]
    assert {step["accepted"] for step in steps} == set(range(WIDTH))
    assert {step["counterfactual_rows"] for step in steps} == set(range(WIDTH))
    assert max(step["batch_size"] for step in steps) >= 8
    assert any(answer["meta_info"]["cached_tokens"] for answer in found.values())
    assert any(len(seen.prefills) > 2 for seen in agent.seen.values())


async def test_a_preempted_request_is_sent_again_at_its_positions(setting: Setting) -> None:
    options = {"payload": True, "prompt_rows": 1000, "counterfactual_rows": 1}
    prompt = random.Random(9).choices(WORDS, k=40)
    ask = Ask(rid="preempted", prompt=prompt, tokens=400, options=options)
    async with listening(setting.socket) as agent, asyncio.TaskGroup() as group:
        running = group.create_task(answers(setting, [ask]))
        await until(lambda: len(agent.seen.get(ask.rid, Seen()).steps) > 20)
        async with httpx.AsyncClient(base_url=setting.server.url, timeout=60) as http:
            await http.post("/pause_generation", json={"mode": "retract"})
            await http.post("/flush_cache")
            await http.post("/continue_generation", json={})
        answer = (await running)[ask.rid]
        seen = agent.seen[ask.rid]
        await until(lambda: seen.steps[-1]["position"] + seen.steps[-1]["accepted"] + 1 >= len(prompt) + 399)

    assert answer["meta_info"]["num_retractions"] == 1
    reference = Reference(setting.target, (text := prompt + answer["output_ids"]))
    assert max(prefill["position"] + prefill["rows"] for prefill in seen.prefills) > len(prompt) + 20
    assert {position for position, _ in seen.rows} >= set(range(len(text) - 1))
    for position, aux in seen.rows:
        if position < len(text):
            reference.check(position, aux, None)
    for position, teacher in seen.teachers:
        if position < len(text):
            reference.check(position, None, teacher)


async def test_a_reader_that_stands_still_costs_drops_and_no_request(setting: Setting) -> None:
    options = {"payload": True, "prompt_rows": 1000, "counterfactual_rows": 3}
    asks = [Ask(rid=f"slow-{i}", prompt=[WORDS[i]] * 20, tokens=150, options=options) for i in range(16)]
    async with listening(setting.socket) as agent:
        agent.may_read.clear()
        stuck = await answers(setting, asks)
        agent.may_read.set()
        after = Ask(rid="after", prompt=WORDS[:1], tokens=4, options=options)
        await answers(setting, [after])
        await until(lambda: after.rid in agent.seen)
    alone = await answers(
        setting, [Ask(rid=f"alone-{a.rid}", prompt=a.prompt, tokens=a.tokens, options=options) for a in asks]
    )

    assert agent.dropped > 0
    assert [a["output_ids"] for a in stuck.values()] == [a["output_ids"] for a in alone.values()]


async def test_each_step_names_the_version_that_drafted_it(setting: Setting) -> None:
    async with listening(setting.socket) as agent:
        for attempt in range(ATTEMPTS):
            ask = Ask(rid=f"swapped-{attempt}", prompt=WORDS[:3], tokens=300, options={})
            assert swapping.swap(setting.server, setting.folder / "draft-0", 0).is_success
            async with asyncio.TaskGroup() as group:
                running = group.create_task(answers(setting, [ask]))
                await until(lambda rid=ask.rid: len(agent.seen.get(rid, Seen()).steps) > 10)  # type: ignore[misc] # a default
                swapped = await asyncio.to_thread(swapping.swap, setting.server, setting.folder / "draft-7", 7)
            assert swapped.is_success, swapped.text
            meta = running.result()[ask.rid]["meta_info"]
            if len(meta["weight_versions"]) > 1:
                break
        else:
            pytest.fail(f"no swap of {ATTEMPTS} came within a request")
        steps = agent.seen[ask.rid].steps
        await until(lambda: len(steps) == meta["spec_verify_ct"])

    spans = meta["weight_versions"]
    assert [span["version"] for span in spans] == ["v0", "v7"]
    for step in steps:
        first_token = step["position"] - len(ask.prompt) + 1
        (version,) = [span["version"] for span in spans if span["start"] <= first_token < span["end"]]
        assert f"v{step['version']}" == version


async def test_another_vocabulary_is_exchanged_and_the_server_drafts_with_it(setting: Setting) -> None:
    target, other = setting.folder / "target", setting.folder / "other-vocabulary"
    token_ids = torch.tensor(sorted({*WORDS, *range(VOCAB - DRAFT_VOCAB + len(set(WORDS)), VOCAB)}))
    save_draft(cycle_draft(target, quality=0.7, token_ids=token_ids), other)
    asks = [Ask(rid=rid, prompt=WORDS[:3], tokens=100, options=None) for rid in ("before", "after")]
    assert swapping.swap(setting.server, setting.folder / "draft-0", 0).is_success  # another test may have left its own
    before = await answers(setting, asks[:1])
    try:
        swapped = swapping.swap(setting.server, other, 8)
        after = await answers(setting, asks[1:])
        (rank,) = setting.server.post("/weights_checker", action="checksum", selector="draft")["ranks"]
        config, tensors = checkpoint.load(other)
        wanted = checksums.expected_hashes(config, tensors, dtype=torch.float32, device="cpu", tp=(0, 1))

        assert swapped.is_success, swapped.text
        assert rank["checksums"].items() >= wanted.items()
        steps = [answer["meta_info"]["spec_verify_ct"] for answer in (before["before"], after["after"])]
        assert steps[0] == steps[1] < 50, "the same proposals, by other numbers"
    finally:
        assert swapping.swap(setting.server, setting.folder / "draft-0", 0).is_success


async def test_a_refused_draft_is_answered_and_the_one_before_serves_on(setting: Setting) -> None:
    before = setting.server.post("/weights_checker", action="checksum", selector="draft")
    other = setting.folder / "other-size"
    save_draft(make_draft(setting.folder / "target", token_ids=torch.arange(255)), other)

    refused = swapping.swap(setting.server, other, 8)
    missing = swapping.swap(setting.server, setting.folder / "missing", 9)

    assert (refused.status_code, missing.status_code) == (400, 400)
    assert "draft_vocab_size is 255" in refused.json()["message"]
    assert "cannot read the draft" in missing.json()["message"]
    assert setting.server.post("/weights_checker", action="checksum", selector="draft") == before
    async with listening(setting.socket) as agent:
        assert agent.hellos[-1]["problem"] == ""


BINDING = """
import json
from updraft_sglang import plugin
from updraft_tap import hooks
from updraft_tap.settings import Settings

ours = plugin.Plugin(Settings(socket="/nowhere"))
before = ours._problem(None)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

for binding in ours.bindings:
    HookRegistry.register(binding.target, binding.hook, HookType.AROUND)
HookRegistry.apply_hooks()
print(json.dumps([before, list(hooks.problems(ours.bindings))]))
"""


def test_hooks_that_are_not_in_place_are_told_and_all_of_them_fit_this_sglang(tmp_path: Path) -> None:
    environment = {**os.environ, **VARIABLES, "PYTHONPATH": str(plugin_folder.write(tmp_path))}
    done = subprocess.run([build.python(), "-c", BINDING], env=environment, capture_output=True, text=True, check=True)

    before, after = json.loads(done.stdout.splitlines()[-1])

    assert before.startswith("hooks do not fit SGLang 0.5.23 (tested with 0.5.23): ")
    assert before.count("is not hooked") == 3
    assert after == []
