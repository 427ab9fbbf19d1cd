"""The torch engine: what it says never depends on the draft, and its draft can change under it."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_target import every_second_token, make_draft, make_tiny_target, save_draft
from tests.support.wait import LONG_S, until
from transformers import LlamaForCausalLM

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput
from updraft_draft import checkpoint
from updraft_inference.engine import (
    CaptureParams,
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_tap.drafting import speedup

GREEDY = SamplingParams(temperature=0)
PROMPTS = [tuple(range(3, 8)), tuple(range(40, 97)), (7, 7, 7, 7, 7), tuple(range(300, 320))]
_ids = count()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3)


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[DraftCheckpoint]:
    """They have no token in common."""
    folders = tmp_path_factory.mktemp("drafts")
    return [
        DraftCheckpoint(
            version=n,
            folder=folders / str(n),
            tensors_digest=save_draft(make_draft(target, seed=n, token_ids=every_second_token(n)), folders / str(n)),
        )
        for n in (1, 2)
    ]


@pytest.fixture(scope="module")
def wider(target: Path, tmp_path_factory: pytest.TempPathFactory) -> DraftCheckpoint:
    """A version of another shape, which proposes every third token."""
    folder = tmp_path_factory.mktemp("wider")
    shape = ShapeChoice(draft_num_attention_heads=8, draft_num_key_value_heads=4, draft_intermediate_size=192)
    network = make_draft(target, seed=3, token_ids=torch.arange(0, 512, 3), shape=shape)
    return DraftCheckpoint(version=3, folder=folder, tensors_digest=save_draft(network, folder))


@pytest.fixture
async def engine(target: Path) -> AsyncIterator[TorchEngine]:
    async with open_engine(target) as opened:
        yield opened


def open_engine(
    target: Path, *, slots: int = 3, max_queued: int = 500, kind: type[TorchEngine] = TorchEngine
) -> TorchEngine:
    limits = Limits(num_slots=slots, max_context=200, max_lookahead=7)
    return kind.open(target, EngineOptions(limits=limits, dtype=torch.float32, max_queued=max_queued))


def request(prompt: tuple[int, ...], **kwargs: object) -> GenerationRequest:
    defaults: dict[str, object] = {"max_tokens": 40, "sampling": GREEDY, "ignore_eos": True}
    return GenerationRequest(request_id=f"r{next(_ids)}", prompt_ids=prompt, **{**defaults, **kwargs})  # type: ignore[arg-type]


async def run(engine: TorchEngine, wanted: GenerationRequest) -> FinishedRequest:
    tokens: list[int] = []
    async for delta in engine.generate(wanted):
        tokens += delta.token_ids
        if delta.finished is not None:
            assert tuple(tokens) == delta.finished.output_ids
            return delta.finished
    raise AssertionError("the stream ended without its end")


async def run_through_swaps(
    engine: TorchEngine, drafts: list[DraftCheckpoint], wanted: Callable[[], GenerationRequest], *, num_swaps: int
) -> list[FinishedRequest]:
    """Such requests, again and again, while drafts are swapped; at least one of them began with the first draft and went on
    with the second. The engine waits for no swap, so on some machines each single request would end before one."""
    finished: list[FinishedRequest] = []
    while not any({step.draft_version for step in one.steps if step.draft_ids} == {1, 2} for one in finished):
        await engine.swap(drafts[0])
        num_before, is_over = len(finished), asyncio.Event()

        async def ask(is_over: asyncio.Event = is_over) -> None:
            while not is_over.is_set():
                finished.append(await run(engine, wanted()))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask())
            await until(lambda: len(finished) > num_before, what="requests that run")  # noqa: B023 - within this round
            for draft in islice(cycle(reversed(drafts)), num_swaps):
                await engine.swap(draft)
            is_over.set()
    return finished


@pytest.fixture(scope="module")
def reference(target: Path) -> list[tuple[int, ...]]:
    """Greedy continuations by transformers: an implementation that is not ours."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        full = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        outputs.append(tuple(full[0, len(prompt) :].tolist()))
    return outputs


async def test_what_speculation_is_worth_is_measured_where_the_engine_may_choose(
    engine: TorchEngine,
    drafts: list[DraftCheckpoint],
    reference: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speedup, "MIN_BLOCKS", 2)
    monkeypatch.setattr(speedup, "DEVIATIONS", 1e9)  # never surely slower: a turn would begin a new measurement
    await engine.swap(drafts[0])
    for choice in ({"lookahead": 1}, {"drafter": Drafter.NONE}):
        await run(engine, request(PROMPTS[0], max_tokens=150, **choice))
    assert not engine.speedups, "the requests left no choice"
    for _ in range(2):
        assert (await run(engine, request(PROMPTS[0], max_tokens=100, drafter=Drafter.EAGLE3))).output_ids[
            :40
        ] == reference[0]
    assert {0, 1} == set(engine.speedups)
    assert engine.speedups[0].low <= engine.speedups[0].ratio <= engine.speedups[0].high
    await engine.swap(drafts[1])
    assert not engine.speedups, "another draft is worth something else"


async def test_what_was_learnt_from_traffic_can_be_put_aside_and_taken_up_again(target: Path) -> None:
    limits = Limits(num_slots=1, max_context=200, max_lookahead=7, num_remembered=1000)
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32)) as engine:

        async def num_steps() -> int:
            return len((await run(engine, request(PROMPTS[0], drafter=Drafter.NGRAM, lookahead=7))).steps)

        first = await num_steps()
        learnt = await engine.exchange_experience()
        assert await num_steps() == first
        await engine.exchange_experience(learnt)
        assert await num_steps() < first, "it remembers its answer"


@pytest.mark.parametrize("drafter", list(Drafter))
@pytest.mark.parametrize("k", [0, 1, 4, 7])
async def test_greedy_output_is_the_targets_with_any_drafter_and_lookahead(
    engine: TorchEngine, drafts: list[DraftCheckpoint], reference: list[tuple[int, ...]], drafter: Drafter, k: int
) -> None:
    await engine.swap(drafts[0])
    finished = await asyncio.gather(*(run(engine, request(p, drafter=drafter, lookahead=k)) for p in PROMPTS))
    assert [f.output_ids for f in finished] == reference


async def test_greedy_output_is_unchanged_by_swaps_in_mid_request(
    engine: TorchEngine, drafts: list[DraftCheckpoint], reference: list[tuple[int, ...]]
) -> None:
    async def swap_often() -> None:
        for n in range(20):
            await engine.swap([*drafts, None][n % 3])

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run(engine, request(p))) for p in PROMPTS]
        tasks.create_task(swap_often())
    assert [task.result().output_ids for task in running] == reference


async def test_a_draft_of_another_shape_replaces_the_one_that_serves_and_is_replaced_by_it(
    engine: TorchEngine, drafts: list[DraftCheckpoint], wider: DraftCheckpoint, reference: list[tuple[int, ...]]
) -> None:
    for draft in (drafts[0], wider, drafts[1]):
        swapped = await engine.swap(draft)
        assert (swapped.loaded.version, swapped.loaded.tensors_digest) == (draft.version, draft.tensors_digest)
        finished = await run(engine, request(PROMPTS[0], drafter=Drafter.EAGLE3, lookahead=3))
        assert finished.output_ids == reference[0]
        assert {step.draft_version for step in finished.steps if step.draft_ids} == {draft.version}


async def test_greedy_output_is_unchanged_by_swaps_to_another_shape_in_mid_request(
    engine: TorchEngine, drafts: list[DraftCheckpoint], wider: DraftCheckpoint, reference: list[tuple[int, ...]]
) -> None:
    await engine.swap(drafts[0])
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run(engine, request(p))) for p in PROMPTS]
        for draft in cycle((wider, drafts[0])):
            if all(task.done() for task in running):
                break
            await engine.swap(draft)
    assert [task.result().output_ids for task in running] == reference
    assert not engine.faults


async def test_a_draft_of_another_shape_that_fails_its_proof_gives_way_to_the_one_before(
    target: Path, drafts: list[DraftCheckpoint], wider: DraftCheckpoint
) -> None:
    class Misread(TorchEngine):
        def _digest(self) -> str:
            return super()._digest() if self._scheduler.speculation.draft_version != 3 else "sha256:other"

    async with open_engine(target, kind=Misread) as engine:
        held = (await engine.swap(drafts[0])).loaded
        with pytest.raises(Corrupt, match="the engine holds sha256:other after loading version 3"):
            await engine.swap(wider)
        assert await engine.rehash() == held
        steps = (await run(engine, request(PROMPTS[0], drafter=Drafter.EAGLE3, lookahead=3))).steps
    assert {(step.draft_version, token % 2) for step in steps for token in step.draft_ids} == {(1, 1)}


async def test_a_request_is_served_by_the_version_that_each_step_says(
    engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    finished = await run_through_swaps(
        engine, drafts, lambda: request(PROMPTS[0], max_tokens=60, drafter=Drafter.EAGLE3, lookahead=2), num_swaps=1
    )
    versions = [[step.draft_version for step in one.steps if step.draft_ids] for one in finished]
    assert all(of_one == sorted(of_one) for of_one in versions)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1), SamplingParams(temperature=1, seed=3)])
async def test_a_swap_exchanges_the_vocabulary_with_the_weights_and_no_step_mixes_them(
    engine: TorchEngine, drafts: list[DraftCheckpoint], sampling: SamplingParams
) -> None:
    """Version 1 can only propose odd tokens, version 2 only even ones."""
    prompts = cycle(PROMPTS)
    finished = await run_through_swaps(
        engine,
        drafts,
        lambda: request(next(prompts), max_tokens=100, sampling=sampling, drafter=Drafter.EAGLE3, lookahead=3),
        num_swaps=5,
    )
    steps = [step for one in finished for step in one.steps]
    assert {(step.draft_version, token % 2) for step in steps for token in step.draft_ids} == {(1, 1), (2, 0)}
    assert not engine.faults


async def test_a_swap_that_fails_its_proof_restores_the_vocabulary_with_the_weights(
    target: Path, drafts: list[DraftCheckpoint]
) -> None:
    class Misread(TorchEngine):
        def _digest(self) -> str:
            return super()._digest() if self._scheduler.speculation.draft_version != 2 else "sha256:other"

    async with open_engine(target, kind=Misread) as engine:
        held = (await engine.swap(drafts[0])).loaded
        with pytest.raises(Corrupt, match="the engine holds sha256:other after loading version 2"):
            await engine.swap(drafts[1])
        assert await engine.rehash() == held
        steps = (await run(engine, request(PROMPTS[0], drafter=Drafter.EAGLE3, lookahead=3))).steps
    assert {(step.draft_version, token % 2) for step in steps for token in step.draft_ids} == {(1, 1)}


async def test_a_seed_gives_the_same_sample_again(engine: TorchEngine) -> None:
    wanted = [request(PROMPTS[0], sampling=SamplingParams(temperature=1.0, seed=9)) for _ in range(2)]
    first, second = [await run(engine, w) for w in wanted]
    assert first.output_ids == second.output_ids


async def test_capture_gives_the_hidden_rows_of_the_targets_own_forward(target: Path, engine: TorchEngine) -> None:
    prompt = PROMPTS[1]
    finished = await run(engine, request(prompt, max_tokens=9, capture=CaptureParams(payload=True, prompt_rows=5)))
    assert finished.hidden is not None
    first = len(prompt) - 5
    assert finished.hidden.first_position == first
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    everything = torch.tensor([[*prompt, *finished.output_ids]])
    with torch.no_grad():
        states = model(everything, output_hidden_states=True).hidden_states
    # hidden_states[i] is the input of layer i; the last one is after the final norm.
    aux = torch.cat([states[i][0] for i in (2, 4, 5)], -1)
    rows = len(finished.hidden.aux)
    assert rows == 5 + 9 - 1, "every position but the last output token was forwarded"
    torch.testing.assert_close(finished.hidden.aux, aux[first : first + rows], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(finished.hidden.teacher, states[-1][0, first : first + rows], rtol=1e-3, atol=1e-4)


async def test_rows_after_a_rejection_are_those_of_a_fresh_forward_over_the_rejected_drafts(
    target: Path, engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    await engine.swap(drafts[0])
    capture = CaptureParams(payload=True, prompt_rows=5, counterfactual_rows=2)
    # Together, so that rows of other requests and padding stand beside theirs.
    wanted = [
        request(PROMPTS[0], lookahead=4, capture=capture),
        request(PROMPTS[1], lookahead=2, capture=capture),
        request(PROMPTS[3], lookahead=3, capture=capture, sampling=SamplingParams(temperature=1.0, seed=1)),
    ]
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    for finished in await asyncio.gather(*(run(engine, w) for w in wanted)):
        assert finished.hidden is not None
        assert finished.hidden.counterfactuals, "an untrained draft is rejected often"
        for one in finished.hidden.counterfactuals:
            step = finished.steps[one.step]
            prefix = (*finished.request.prompt_ids, *finished.output_ids[: step.start + step.accepted])
            rejected = step.draft_ids[step.accepted : step.accepted + 2]
            assert finished.output_ids[step.start + step.accepted] != rejected[0]
            with torch.no_grad():
                states = model(torch.tensor([[*prefix, *rejected]]), output_hidden_states=True).hidden_states
            aux = torch.cat([states[i][0] for i in (2, 4, 5)], -1)
            torch.testing.assert_close(one.aux, aux[len(prefix) :], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(one.teacher, states[-1][0, len(prefix) :], rtol=1e-3, atol=1e-4)


async def test_a_lookups_rejections_are_not_captured(engine: TorchEngine) -> None:
    capture = CaptureParams(payload=True, counterfactual_rows=2)
    finished = await run(engine, request(PROMPTS[0], lookahead=3, capture=capture, drafter=Drafter.NGRAM))
    assert any(step.accepted < len(step.draft_ids) for step in finished.steps)
    assert finished.hidden is not None
    assert not finished.hidden.counterfactuals


async def test_rows_that_read_a_looked_up_token_are_not_captured_as_the_draft_models(
    target: Path, drafts: list[DraftCheckpoint]
) -> None:
    capture = CaptureParams(payload=True, counterfactual_rows=4)
    mixed, captured = [], 0
    async with open_engine(target) as engine:
        for n in range(6):
            await engine.swap(drafts[n % 2])
            finished = await run(
                engine,
                request(
                    (7, 9, 11, 7, 9, 13, n) * 5,
                    lookahead=4,
                    capture=capture,
                    drafter=Drafter.HYBRID,
                    sampling=SamplingParams(temperature=1.0, seed=n),
                ),
            )
            assert finished.hidden is not None
            rows = {one.step: len(one.aux) for one in finished.hidden.counterfactuals}
            for number, step in enumerate(finished.steps):
                if step.drafter is Drafter.NGRAM or step.start + step.accepted >= len(finished.output_ids):
                    continue
                mixed += [step] * bool(step.looked_up)
                ends = [index for index in step.looked_up if index >= step.accepted]
                assert rows.get(number, 0) == min([*ends, len(step.draft_ids)]) - step.accepted
                captured += rows.get(number, 0)
    assert any(step.accepted in step.looked_up for step in mixed), "lookups were rejected"
    assert captured


async def test_a_request_near_its_end_is_not_disturbed_by_a_newcomers_long_prompt(
    target: Path, engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    await engine.swap(drafts[0])
    old = engine.generate(request(PROMPTS[0], max_tokens=195, lookahead=3))
    tokens = 0
    while tokens < 180:
        tokens += len((await anext(old)).token_ids)
    newcomer = await run(engine, request(tuple(range(3, 153)), max_tokens=30, lookahead=3))
    assert len(newcomer.output_ids) == 30
    async for delta in old:
        tokens += len(delta.token_ids)
    assert tokens == 195


async def test_a_swap_whose_caller_gave_up_leaves_the_engine_serving(
    engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    for _ in range(20):
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await engine.swap(drafts[0])
    assert len((await run(engine, request(PROMPTS[0]))).output_ids) == 40
    assert (await engine.swap(drafts[1])).loaded.version == 2


async def test_a_caller_that_leaves_frees_its_slot(target: Path) -> None:
    async with open_engine(target, slots=1) as engine:
        stream = engine.generate(request(PROMPTS[0], max_tokens=150))
        await anext(stream)
        await stream.aclose()
        finished = await asyncio.wait_for(run(engine, request(PROMPTS[0], max_tokens=3)), LONG_S)
        assert finished.reason is FinishReason.LENGTH
        assert engine.load.running == 0


async def test_a_stop_token_inside_a_kept_chain_ends_the_request_there(target: Path) -> None:
    async with open_engine(target) as engine:
        plain = await run(engine, request(PROMPTS[2], ignore_eos=False, max_tokens=100, drafter=Drafter.NONE))
        drafted = await run(engine, request(PROMPTS[2], ignore_eos=False, max_tokens=100, drafter=Drafter.NGRAM))
        assert plain.output_ids == drafted.output_ids


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        pytest.param({"prompt": ()}, "empty", id="no prompt"),
        pytest.param({"max_tokens": 0}, "at least 1", id="no tokens"),
        pytest.param({"max_tokens": 10**9}, "exceed the context of 200", id="absurd limit"),
        pytest.param({"prompt": (1, 512)}, "vocabulary of 512", id="token outside"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_the_number(
    engine: TorchEngine, wanted: dict[str, object], words: str
) -> None:
    prompt = wanted.pop("prompt", (1, 2))
    with pytest.raises(InvalidInput, match=words):
        await run(engine, request(prompt, **wanted))  # type: ignore[arg-type]


@pytest.mark.attack(
    boundary="client",
    attack="more requests than the engine queues",
    outcome="refused at once",
)
async def test_a_full_queue_refuses_instead_of_growing(target: Path) -> None:
    async with open_engine(target, slots=1, max_queued=1) as engine:
        streams = [engine.generate(request(PROMPTS[0], max_tokens=150)) for _ in range(2)]
        await anext(streams[0])
        waiting = asyncio.ensure_future(anext(streams[1]))  # noqa: TID251  (a request that waits on purpose)
        await asyncio.sleep(0)
        with pytest.raises(Exhausted):
            await run(engine, request(PROMPTS[0]))
        await streams[0].aclose()
        await waiting
        await streams[1].aclose()


@pytest.mark.attack(
    boundary="drafts",
    attack="a draft with other shapes, tensors or values that are not finite",
    outcome="refused; the old draft serves on",
)
async def test_a_draft_that_must_not_serve_is_refused_and_the_old_one_goes_on(
    target: Path, engine: TorchEngine, drafts: list[DraftCheckpoint], tmp_path: Path
) -> None:
    await engine.swap(drafts[0])
    folder, digest = tmp_path / "other", drafts[1].tensors_digest
    shutil.copytree(drafts[1].folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["updraft"]["aux_layers"] = [1, 2, 3]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="the draft reads layers"):
        await engine.swap(DraftCheckpoint(version=3, folder=folder, tensors_digest=digest))
    with pytest.raises(Corrupt, match="its manifest has"):
        await engine.swap(DraftCheckpoint(version=3, folder=drafts[1].folder, tensors_digest=drafts[0].tensors_digest))
    damaged = tmp_path / "damaged"
    save_draft(make_draft(target), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["fc.weight"][:] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(Corrupt, match="not finite"):
        await engine.swap(DraftCheckpoint(version=4, folder=damaged, tensors_digest=digest))
    assert engine.loaded.version == 1
    assert engine.loaded.tensors_digest == drafts[0].tensors_digest


async def test_a_draft_in_another_dtype_is_refused_and_not_rounded(
    engine: TorchEngine, drafts: list[DraftCheckpoint], tmp_path: Path
) -> None:
    """Its manifest is right about it: only the conversion would be silent."""
    await engine.swap(drafts[0])
    wide = tmp_path / "wide"
    shutil.copytree(drafts[1].folder, wide)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(wide / "model.safetensors").items()
    }
    save_file(tensors, wide / "model.safetensors")
    digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    with pytest.raises(InvalidInput, match="is F32, a draft holds it as BF16; convert it before publishing"):
        await engine.swap(DraftCheckpoint(version=3, folder=wide, tensors_digest=digest))
    assert engine.loaded.version == 1


async def test_a_swap_copies_the_draft_that_it_may_restore_off_the_event_loop(
    target: Path, drafts: list[DraftCheckpoint]
) -> None:
    copied_by: list[threading.Thread] = []

    class Watched(TorchEngine):
        def _held(self) -> Any:
            copied_by.append(threading.current_thread())
            return super()._held()

    async with open_engine(target, kind=Watched) as engine:
        for draft in drafts:
            await engine.swap(draft)
    assert len(copied_by) == 2
    assert threading.current_thread() not in copied_by


async def test_what_the_engine_says_it_holds_is_computed_from_its_own_tensors(
    engine: TorchEngine, drafts: list[DraftCheckpoint]
) -> None:
    swapped = await engine.swap(drafts[1])
    _, tensors = checkpoint.load(drafts[1].folder)
    expected = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    assert swapped.loaded.tensors_digest == expected
    assert (await engine.swap(None)).loaded.version == 0
