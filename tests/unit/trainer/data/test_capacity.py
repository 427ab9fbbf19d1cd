"""Replay is as large as learning needs, within the disk; what is too small is named with the setting to raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_artifacts.sizing import (
    CapturedTraffic,
    DraftSizes,
    Sizing,
    UsualTarget,
    kept_requests,
    quantity,
    sizing,
    usual,
)
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.retention import Pool, ReplayLimits, Retention, SampleEntry

EIGHT_B = usual()
CLAIM = 80 * 2**30
LONG = 2_064 * EIGHT_B.captured_token.amount


def of_width(hidden: int) -> Sizing:
    target = UsualTarget(hidden_size=hidden)
    return sizing(target, DraftSizes.of(target), CapturedTraffic(engine="torch"))


def test_without_a_setting_replay_has_room_for_what_learning_needs() -> None:
    assert quantity(EIGHT_B.trainer_volume.amount) == "80Gi"
    capacity = Capacity.of(None, EIGHT_B, volume_bytes=CLAIM)
    assert capacity.replay_bytes == EIGHT_B.replay.amount
    assert capacity.too_small([(0, 0), (0, 0)], min_samples=8) == ""


def test_200_requests_of_2000_tokens_to_an_8b_target_leave_enough_to_judge_a_draft_by() -> None:
    def held_out(replay_bytes: int) -> int:
        retention = Retention(ReplayLimits.of(replay_bytes))
        for order in range(200):
            pool = Pool.WINDOW if order % 10 else Pool.EVALUATION
            retention.add(
                SampleEntry(trace_id=str(order), order=order, cluster="c", pool=pool, num_bytes=LONG, num_tokens=1)
            )
        return retention.num_samples(Pool.EVALUATION)

    assert held_out(512 * 2**20) == 1
    assert held_out(Capacity.of(None, EIGHT_B, volume_bytes=CLAIM).replay_bytes) == 20


def test_requests_that_are_too_long_for_the_setting_are_named_with_the_bytes_that_are_needed() -> None:
    capacity = Capacity.of(512 * 2**20, EIGHT_B, volume_bytes=CLAIM)
    pools = [(7, 7 * LONG), (1, LONG)]
    assert capacity.too_small(pools, min_samples=8) == (
        "replay has room for 1 held-out requests of 33.8 MB, the mean, but 8 are needed to judge a draft:"
        " raise UPDRAFT_TRAINER_REPLAY_MAX_BYTES to at least 2710000000"
    )
    later = [(7, 7 * LONG + 5_000), (1, LONG)]
    assert capacity.too_small(later, min_samples=8) == capacity.too_small(pools, min_samples=8), "not with every trace"
    assert Capacity.of(80 * LONG, EIGHT_B, volume_bytes=CLAIM).too_small(pools, min_samples=8) == ""


def test_a_claim_that_holds_too_few_requests_is_named_with_the_size_that_is_enough() -> None:
    small = Capacity.of(None, EIGHT_B, volume_bytes=18 * 2**30)
    assert small.too_small([(8, 8 * LONG)], min_samples=8) == (
        "replay has room for 7 held-out requests of 33.8 MB, the mean, but 8 are needed to judge a draft:"
        " the disk of UPDRAFT_TRAINER_DATA_DIR needs at least 20Gi; then restart the trainer"
    )
    assert Capacity.of(None, EIGHT_B, volume_bytes=20 * 2**30).too_small([(8, 8 * LONG)], min_samples=8) == ""


def test_a_claim_that_the_training_states_fill_is_named_before_any_request() -> None:
    small = Capacity.of(None, EIGHT_B, volume_bytes=5 * 2**30)
    assert small.replay_bytes == 2**20
    assert small.too_small([(0, 0)], min_samples=8) == (
        "the disk of UPDRAFT_TRAINER_DATA_DIR has 5.37 GB for 3 training states and 3 drafts of 16.1 GB, and for replay of"
        " 1.05 MB: it needs at least 20Gi; then restart the trainer"
    )


def test_a_setting_that_the_volume_has_no_room_for_is_named() -> None:
    capacity = Capacity.of(100 * 2**30, EIGHT_B, volume_bytes=CLAIM)
    assert "replay of 107 GB: it needs at least 160Gi" in capacity.too_small([(0, 0)], min_samples=8)


@given(
    hidden=st.integers(64, 8_192),
    volume=st.integers(0, 2**42),
    setting=st.none() | st.integers(2**20, 2**40),
    request=st.integers(1, 2**31),
    min_samples=st.integers(2, 100),
)
def test_nothing_is_too_small_exactly_if_all_fits_and_enough_held_out_requests_do(
    hidden: int, volume: int, setting: int | None, request: int, min_samples: int
) -> None:
    sizes = of_width(hidden)
    capacity = Capacity.of(setting, sizes, volume_bytes=volume)
    fits = 1.1 * capacity.replay_bytes + capacity.reserved_bytes < volume + 1
    is_enough = kept_requests(capacity.replay_bytes, request)[1] >= min_samples
    sentence = capacity.too_small([(3, 3 * request), (1, request)], min_samples=min_samples)
    assert (sentence == "") is (fits and is_enough)
    assert len(sentence) <= 500


@pytest.mark.parametrize("hidden", [576, 4096, 7168])
def test_a_volume_of_the_size_that_is_printed_is_large_enough(hidden: int) -> None:
    sizes = of_width(hidden)
    capacity = Capacity.of(None, sizes, volume_bytes=sizes.trainer_volume.amount)
    assert capacity.replay_bytes >= 0.999 * sizes.replay.amount
