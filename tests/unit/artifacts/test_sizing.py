"""Sizes are the arithmetic of real models, and large enough for what their reasons say."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updraft_artifacts.draft_shape import DraftShape, ShapeChoice
from updraft_artifacts.sizing import (
    HELD_OUT_REQUESTS,
    MAX_VERSION_BYTES,
    NUM_VERSIONS,
    QUEUED_REQUESTS,
    TRAINING_REQUESTS,
    CapturedTraffic,
    DraftSizes,
    Sizing,
    kept_requests,
    num_parameters,
    quantity,
    readable,
    redis_too_small,
    replay_for,
    reserved,
    sizing,
    usual,
)
from updraft_draft.tensors import packed
from updraft_inference.agent.chunks import LIGHT_BYTES_PER_TOKEN
from updraft_rollouts.policy import DEFAULT

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Target:
    hidden_size: int
    vocab_size: int = 151_936
    draft_shape: DraftShape


def target(hidden: int, *, vocab: int = 151_936, heads: int = 32, intermediate: int | None = None) -> Target:
    shape = DraftShape(
        num_heads=heads,
        num_kv_heads=3 if heads % 8 else 8,
        head_dim=128,
        intermediate_size=intermediate or 3 * hidden,
        vocab_size=32_000,
    )
    return Target(hidden_size=hidden, vocab_size=vocab, draft_shape=shape)


def drafted(whose: Target, vocab: int) -> DraftSizes:
    return DraftSizes.of(whose, ShapeChoice(draft_vocab_size=vocab))


def sized(whose: Target, draft_vocab_size: int = 32_000, **traffic: object) -> Sizing:
    traffic = {"engine": "sglang", **traffic}
    return sizing(whose, drafted(whose, draft_vocab_size), CapturedTraffic(**traffic))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hidden", "from_sglang", "from_torch"),
    [(576, 2_165, 2_312), (2048, 6_581, 8_200), (3072, 9_653, 12_296), (4096, 12_725, 16_392), (7168, 21_941, 28_680)],
)
def test_a_captured_token_has_three_states_and_a_teacher(hidden: int, from_sglang: int, from_torch: int) -> None:
    assert sized(target(hidden)).captured_token.amount == from_sglang
    assert sized(target(hidden), engine="torch").captured_token.amount == from_torch


def test_bfloat16_takes_two_bytes_a_value_and_no_scales() -> None:
    assert sized(target(4096), encoding="bf16").captured_token.amount == 6 * 4096 + 433
    assert sized(target(4096), engine="torch", encoding="bf16").captured_token.amount == 8 * 4096


def test_ten_thousand_tokens_a_second_of_an_8b_target_are_127_megabytes_and_140_with_what_chunks_repeat() -> None:
    whole = sized(target(4096), tokens_per_second=10_000, answer_tokens=100, prompt_rows=100)
    assert whole.network.amount == pytest.approx(127e6, rel=0.003)
    cut = sized(target(4096), tokens_per_second=10_000)
    assert cut.network.amount == pytest.approx(140e6, rel=0.003)
    assert cut.network.amount * (1_000 + 170) == pytest.approx(10_000 * cut.captured_request.amount)


DRAFTS = [
    pytest.param(target(4096), 8_192, 302, 0.60, 3.36, id="Qwen3-8B with 8,192 tokens"),
    pytest.param(target(4096), 32_000, 400, 0.80, 3.75, id="Qwen3-8B"),
    pytest.param(target(3072, vocab=200_064, heads=48), 200_064, 797, 1.59, 4.65, id="MiniMax-M2 with all tokens"),
    pytest.param(target(7168, heads=56, intermediate=18_432), 32_000, 963, 1.93, 9.73, id="DeepSeek V3"),
]


@pytest.mark.parametrize(("whose", "vocab", "millions", "file_gb", "optimizer_gb"), DRAFTS)
def test_drafts_of_real_models_have_the_size_of_published_ones(
    whose: Target, vocab: int, millions: int, file_gb: float, optimizer_gb: float
) -> None:
    trained, frozen = num_parameters(whose, drafted(whose, vocab))
    sizes = sized(whose, vocab)
    assert (trained + frozen) / 1e6 == pytest.approx(millions, abs=0.6)
    assert sizes.version.amount / GB == pytest.approx(file_gb, abs=0.01)
    assert (12 * trained + 4 * frozen) / GB == pytest.approx(optimizer_gb, abs=0.01)
    assert sizes.state.amount == 16 * trained + 2 * frozen  # the average of the weights is saved too
    assert sizes.registry_volume.amount > 13 * sizes.version.amount


def test_half_a_gibibyte_of_replay_judges_no_draft_of_an_8b_target_by_long_requests() -> None:
    token = sized(target(4096)).captured_token.amount
    assert kept_requests(512 * 2**20, 527 * token)[1] == 8
    assert kept_requests(512 * 2**20, 528 * token)[1] == 7
    assert replay_for(8, 528 * token) > 512 * 2**20


@given(
    hidden=st.integers(64, 16_384),
    engine=st.sampled_from(["torch", "sglang"]),
    tokens=st.integers(1, 200_000),
)
def test_replay_holds_what_learning_needs_for_every_width_and_length(hidden: int, engine: str, tokens: int) -> None:
    sizes = sized(target(hidden), engine=engine, answer_tokens=tokens)
    training, held_out = kept_requests(sizes.replay.amount, sizes.captured_request.amount)
    assert training >= TRAINING_REQUESTS
    assert held_out >= HELD_OUT_REQUESTS
    assert sizes.trainer_volume.amount > sizes.replay.amount + reserved(sizes.state, sizes.version)


def test_sizes_of_one_target_grow_with_length_and_rate_and_no_other_does() -> None:
    long, fast = sized(target(4096), answer_tokens=4_000), sized(target(4096), tokens_per_second=4_000)
    usual_ones = dict(sized(target(4096)))
    grown = {
        name: {key for key, size in dict(sizes).items() if size.amount > usual_ones[key].amount}
        for name, sizes in (("long", long), ("fast", fast))
    }
    cut = {"network", "stream"}  # rows that are in two chunks
    assert grown["long"] == {"captured_request", "queue", "replay", "cache", "trainer_volume", "trainer_memory"} | cut
    assert grown["fast"] == {"network", "stream"}


def test_every_size_has_a_reason_and_nothing_is_below_its_old_default() -> None:
    sizes = sized(target(576, vocab=49_152, heads=9), engine="torch")
    assert all(size.reason and size.amount > 0 for _, size in sizes)
    assert sizes.stream.amount == sizes.cache.amount == 256 * 2**20
    assert sizes.queue.amount == 64 * 2**20


@pytest.mark.parametrize(
    ("encoding", "row"),
    [("fp8", packed(torch.zeros(1, 3 * 4096))), ("bf16", torch.zeros(1, 3 * 4096, dtype=torch.bfloat16))],
)
def test_the_queue_of_an_agent_beside_a_server_counts_rows_as_they_wait(encoding: str, row: torch.Tensor) -> None:
    queue = sized(target(4096), answer_tokens=2_000, prompt_rows=0, encoding=encoding).queue
    teacher = torch.zeros(64, dtype=torch.int64).nbytes + torch.zeros(64 + 1).nbytes
    assert queue.amount == QUEUED_REQUESTS * 2_000 * (row.nbytes + teacher + LIGHT_BYTES_PER_TOKEN)


def test_the_registry_keeps_its_history_and_the_versions_in_use() -> None:
    assert DEFAULT.revision_history_limit + 3 == NUM_VERSIONS


@pytest.mark.parametrize(
    ("hidden", "heads", "intermediate"), [(8192, 64, 28_672), (12_288, 96, 28_672), (16_384, 128, 53_248)]
)
def test_a_registry_accepts_the_default_drafts_of_the_widest_targets(
    hidden: int, heads: int, intermediate: int
) -> None:
    version = sized(target(hidden, heads=heads, intermediate=intermediate)).version
    assert 2 * 2**30 < version.amount < MAX_VERSION_BYTES
    assert "accepts" not in version.reason


def test_a_version_above_the_registrys_limit_says_so() -> None:
    version = sized(target(16_384, vocab=400_000, heads=128), draft_vocab_size=400_000).version
    assert version.amount > MAX_VERSION_BYTES
    assert version.reason.endswith("; a registry accepts 17.2 GB by default, so raise its limit")
    assert version.settings == ("UPDRAFT_REGISTRY_MAX_DRAFT_BYTES",)


@pytest.mark.parametrize(
    ("whose", "state_gb", "memory_gb"),
    [
        pytest.param(target(4096, intermediate=12_288), 4.6, 17.7, id="Qwen3-8B"),
        pytest.param(target(7168, vocab=163_840, heads=56, intermediate=18_432), 12.2, 43.3, id="Kimi K2"),
        pytest.param(target(8192, vocab=128_256, heads=64, intermediate=28_672), 18.8, 62.2, id="Llama 3 70B"),
    ],
)
def test_the_memory_of_a_trainer_has_room_for_the_copy_that_a_save_makes_and_for_two_drafts(
    whose: Target, state_gb: float, memory_gb: float
) -> None:
    sizes = sized(whose)
    assert sizes.state.amount / GB == pytest.approx(state_gb, abs=0.05)
    assert sizes.trainer_memory.amount / GB == pytest.approx(memory_gb, abs=0.05)


def test_a_draft_proposes_no_more_tokens_than_the_target_has() -> None:
    assert DraftSizes.of(target(576, vocab=1_000)).draft_vocab_size == 1_000


def test_volumes_of_an_8b_target_are_rounded_up_as_kubernetes_writes_them() -> None:
    assert quantity(usual().trainer_volume.amount) == "80Gi"
    assert quantity(usual().registry_volume.amount) == "20Gi"
    assert quantity(10 * 2**30) == "10Gi"


def test_bytes_are_readable() -> None:
    assert [readable(n) for n in (12, 12_725, 763.5e6, 3.359e9, 47e9)] == [
        "12 B",
        "12.7 kB",
        "764 MB",
        "3.36 GB",
        "47.0 GB",
    ]


def test_a_redis_with_less_memory_than_the_streams_may_take_is_named() -> None:
    assert redis_too_small(2 * 10**9, 2_980_000_000) == (
        "Redis has 2.00 GB for streams of 2.98 GB: raise its maxmemory, or lower"
        " UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES of the pods"
    )
    assert redis_too_small(2_980_000_000, 2_980_000_000) == ""
    assert redis_too_small(0, 2_980_000_000) == "", "no limit"
