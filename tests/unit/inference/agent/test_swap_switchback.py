from pathlib import Path

import pytest
from tests.support.swapping import ACK, NACK, PENDING, Pod, running
from tests.support.wait import until

from updraft_chassis.errors import Unavailable


@pytest.fixture
async def pod(tmp_path: Path) -> Pod:
    pod = Pod(tmp_path)
    pod.swapper.look_s = 0.01
    return pod


async def test_two_versions_take_turns_once_both_are_here(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.go.clear()
        nonce = pod.alternate(1, 2)
        await until(lambda: pod.registry.fetched == [1, 2])
        pod.clock.advance(20)
        assert pod.swapper.status.outcome == PENDING
        assert pod.engine.loaded.version == 1

        pod.registry.go.set()
        assert (await pod.answered(nonce)).outcome == ACK
        assert pod.swapper.prefetched == [1, 2]
        for version in (2, 1, 2, 1):
            await pod.serves(version)
            pod.clock.advance(20)

    assert pod.registry.fetched == [1, 2]


async def test_a_pod_without_either_serves_the_ordered_one_while_it_fetches_the_other(pod: Pod) -> None:
    pod.registry.never.add(2)
    async with running(pod):
        pod.alternate(1, 2)
        await pod.serves(1)
        await until(lambda: pod.registry.fetched == [1, 2])
        assert pod.swapper.status.outcome == PENDING


async def test_a_slice_costs_one_swap_which_is_reported(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        await pod.serves(1)
        swaps, changes = pod.swapper.counters.swaps, pod.changes
        pod.clock.advance(19.999)
        pod.clock.advance(0.001)
        await pod.serves(2)
        await until(lambda: pod.changes > changes)
        assert pod.swapper.counters.swaps == swaps + 1


@pytest.mark.parametrize("jump_s", [-3600.0, -20.0, 20.0, 1e6])
async def test_a_clock_that_jumps_only_shifts_the_slice(pod: Pod, jump_s: float) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        await pod.serves(1)
        pod.clock.unix_s += jump_s
        await pod.serves(1 if int(jump_s // 20) % 2 == 0 else 2)
        before = pod.engine.loaded.version
        pod.clock.advance(20)
        await pod.serves(3 - before)

    assert pod.swapper.status.outcome == ACK
    assert pod.swapper.counters.swaps <= 4


async def test_a_newer_directive_ends_it(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        assert (await pod.answered(pod.serve(2))).outcome == ACK
        swaps = pod.swapper.counters.swaps
        pod.clock.advance(20)

    assert pod.engine.loaded.version == 2
    assert pod.swapper.counters.swaps == swaps
    assert pod.registry.fetched == [1, 2]
    assert pod.drafts.remembered() == 2


async def test_the_same_plan_again_does_not_begin_again(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        pod.clock.advance(20)
        await pod.serves(2)
        changes = pod.changes
        pod.clock.advance(-20)
        pod.alternate(1, 2)
        pod.clock.advance(20)
        await pod.serves(2)

    assert pod.changes == changes


async def test_no_draft_can_be_one_of_the_two(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(0, 1))
        for version in (0, 1, 0):
            await pod.serves(version)
            pod.clock.advance(20)


async def test_a_version_that_is_not_there_is_waited_for_and_the_other_serves_on(pod: Pod) -> None:
    del pod.registry.versions[2]
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.alternate(1, 2)
        await until(lambda: pod.swapper.status.reason == "cannot download yet: no version 2")
        assert (pod.swapper.status.outcome, pod.swapper.status.version) == (PENDING, 2)

    assert pod.engine.loaded.version == 1


async def test_a_version_that_cannot_be_loaded_is_refused_and_the_other_serves_on(pod: Pod) -> None:
    pod.registry.versions[2] = b"nan"
    async with running(pod):
        await pod.answered(pod.serve(1))
        nonce = pod.alternate(1, 2)
        pod.clock.advance(20)
        await until(lambda: pod.swapper.status.outcome == NACK, what="the refusal")
        assert (pod.swapper.status.nonce, pod.swapper.status.version) == (nonce, 2)
        pod.clock.advance(40)

    assert pod.engine.loaded.version == 1
    assert pod.swapper.counters.failures == 1


async def test_a_restart_goes_back_to_what_was_ordered_not_to_what_was_compared_with_it(
    pod: Pod, tmp_path: Path
) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        pod.clock.advance(20)
        await pod.serves(2)

    again = Pod(tmp_path)
    again.swapper.go_alone()
    async with running(again):
        await again.swapper.settled.wait()
        assert again.engine.loaded.version == 1


async def test_a_draft_that_changed_in_memory_is_told_and_loaded_again(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        sound = pod.engine.loaded
        await pod.swapper.verify()
        assert pod.swapper.counters.swaps == 1

        pod.engine.rot()
        changes = pod.changes
        await pod.swapper.verify()
        assert pod.swapper.loaded.tensors_digest == "sha256:rotten"
        assert pod.changes > changes
        await until(lambda: pod.engine.loaded == sound, what="a sound draft")

    assert pod.metrics.draft_mismatches._value.get() == 1
    assert pod.registry.fetched == [1]


async def test_an_engine_that_cannot_be_asked_now_serves_on(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.engine.refusal = Unavailable("the server does not answer")
        await pod.swapper.verify()
        pod.engine.refusal = None
        pod.engine.rot()
        await pod.swapper.verify()

    assert "cannot be verified now" in caplog.text
    assert pod.metrics.draft_mismatches._value.get() == 1


async def test_a_draft_restored_without_the_registry_is_verified_too(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))

    again = Pod(tmp_path)
    again.swapper.go_alone()
    async with running(again):
        await again.swapper.settled.wait()
        sound = again.engine.loaded
        again.engine.rot()
        await again.swapper.verify()
        await until(lambda: again.engine.loaded == sound, what="a sound draft")


async def test_a_draft_that_changed_in_memory_during_a_switchback_is_loaded_again(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.alternate(1, 2))
        await pod.serves(1)
        sound = pod.engine.loaded
        pod.engine.rot()
        await pod.swapper.verify()
        await until(lambda: pod.engine.loaded == sound, what="a sound draft")
