from pathlib import Path

import pytest
from tests.support.draft_folders import manifest
from tests.support.swapping import ACK, NACK, PENDING, Pod, running
from tests.support.wait import until

from updraft_chassis.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    UpdraftError,
)
from updraft_inference.engine import OtherShapeError, TargetChangedError


@pytest.fixture
async def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


async def test_a_directive_is_fetched_swapped_in_and_acknowledged(pod: Pod) -> None:
    async with running(pod):
        status = await pod.answered(pod.serve(2, 3))

    assert status.outcome == ACK
    assert pod.engine.loaded.version == 2
    assert pod.swapper.loaded.tensors_digest == manifest(b"weights 2").tensors_digest
    assert pod.swapper.prefetched == [2, 3]
    assert pod.changes >= 2
    assert pod.metrics.draft_version._value.get() == 2


async def test_the_same_directive_twice_does_nothing_more(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
        pod.serve(2)
        await pod.answered(pod.serve(2, nonce="the same in another envelope"))

    assert pod.registry.fetched == [2]
    assert pod.swapper.counters.swaps == 1


async def test_version_zero_serves_without_a_draft(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
        assert (await pod.answered(pod.serve(0))).outcome == ACK

    assert pod.engine.loaded.version == 0
    assert pod.drafts.remembered() == 0


async def test_going_back_to_an_earlier_directive_is_followed_again(pod: Pod) -> None:
    async with running(pod):
        for version in (1, 2, 1):
            await pod.answered(pod.serve(version))
            assert pod.engine.loaded.version == version


async def test_a_newer_directive_interrupts_a_download(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.go.clear()
        pod.serve(2)
        await until(lambda: pod.registry.fetched == [1, 2])
        nonce = pod.serve(3)
        await until(lambda: pod.registry.fetched == [1, 2, 3])
        pod.registry.go.set()
        status = await pod.answered(nonce)

    assert status.outcome == ACK
    assert pod.engine.loaded.version == 3
    assert pod.swapper.prefetched == [1, 3]


@pytest.mark.parametrize(
    ("content", "target", "reason"),
    [
        pytest.param(b"nan", "sha256:target", "not finite", id="a draft that is not finite"),
        pytest.param(b"weights", "sha256:other", "sha256:other", id="a draft for another target"),
    ],
)
async def test_what_is_refused_is_told_with_its_reason_and_the_old_draft_serves_on(
    pod: Pod, content: bytes, target: str, reason: str
) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.target = target
        pod.registry.versions[2] = content
        status = await pod.answered(pod.serve(2))
        assert (status.outcome, status.version) == (NACK, 2)
        assert reason in status.reason
        assert pod.engine.loaded.version == 1
        assert pod.drafts.remembered() == 1
        assert pod.swapper.counters.failures == 1

        pod.registry.target = "sha256:target"
        assert (await pod.answered(pod.serve(3))).outcome == ACK


async def test_a_version_that_cannot_be_prefetched_is_named_and_the_other_serves(pod: Pod) -> None:
    async with running(pod):
        nonce = pod.serve(1, 9)
        await until(lambda: pod.swapper.status.reason == "cannot download yet: no version 9")

    assert (pod.swapper.status.nonce, pod.swapper.status.version) == (nonce, 9)
    assert pod.engine.loaded.version == 1


@pytest.mark.parametrize("damage", [InvalidInput("no draft of this target"), Corrupt("it hashes to something else")])
async def test_what_the_registry_sends_that_cannot_be_served_is_refused(pod: Pod, damage: UpdraftError) -> None:
    pod.registry.fails = damage
    async with running(pod):
        status = await pod.answered(pod.serve(2))

    assert (status.outcome, status.version, status.reason) == (NACK, 2, str(damage))


async def test_a_registry_that_is_away_is_waited_for(pod: Pod) -> None:
    pod.registry.is_away = True
    async with running(pod):
        nonce = pod.serve(2)
        await until(lambda: "cannot download yet" in pod.swapper.status.reason)
        assert pod.swapper.status.outcome == PENDING

        pod.registry.is_away = False
        assert (await pod.answered(nonce)).outcome == ACK


async def test_a_fault_of_the_pod_itself_refuses_nothing_and_the_directive_is_followed_once_it_is_over(
    pod: Pod,
) -> None:
    pod.swapper.retry_s = 0.01
    pod.registry.is_disk_full = True
    async with running(pod):
        nonce = pod.serve(2)
        await until(lambda: len(pod.registry.fetched) > 1, what="another try without another directive")
        assert (pod.swapper.status.nonce, pod.swapper.status.outcome) == (nonce, PENDING)

        pod.registry.is_disk_full = False
        assert (await pod.answered(nonce)).outcome == ACK

    assert pod.engine.loaded.version == 2
    assert pod.swapper.counters.failures == 0


@pytest.mark.parametrize("refusal", [OtherShapeError("another shape"), Unavailable("the server does not answer")])
async def test_a_pod_tells_apart_that_its_server_must_restart_for_a_shape_from_other_troubles(
    pod: Pod, refusal: UpdraftError
) -> None:
    pod.engine.swap_refusal = refusal
    async with running(pod):
        pod.serve(2)
        await until(lambda: pod.swapper.status.reason == f"not yet: {refusal}")
        status = pod.swapper.status

    assert (status.outcome, status.version) == (PENDING, 2)
    assert status.needs_restart == isinstance(refusal, OtherShapeError)


async def test_a_pod_that_waits_for_its_disk_tells_why_and_follows_a_newer_directive_at_once(pod: Pod) -> None:
    pod.swapper.retry_s = 3600.0
    pod.registry.is_disk_full = True
    async with running(pod):
        pod.serve(2)
        await until(lambda: "No space left on device" in pod.swapper.status.reason)
        assert (pod.swapper.status.outcome, pod.swapper.status.version) == (PENDING, 2)

        pod.registry.is_disk_full = False
        assert (await pod.answered(pod.serve(3))).outcome == ACK

    assert pod.registry.fetched == [2, 3]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Unauthenticated("a token is missing"), id="no token"),
        pytest.param(Forbidden("another role"), id="another role"),
        pytest.param(UpdraftError("Fetch failed; see the server's log for the reason"), id="a failure of the registry"),
        pytest.param(NotFound("no blob sha256:77 is stored"), id="weights that are not there just now"),
        pytest.param(Conflict("the registry has sha256:88 as version 2"), id="a registry that was set up anew"),
        pytest.param(Exhausted("no room"), id="no room"),
    ],
)
async def test_a_registry_that_does_not_give_a_version_says_nothing_about_it(pod: Pod, failure: UpdraftError) -> None:
    pod.registry.fails = failure
    async with running(pod):
        nonce = pod.serve(2)
        await until(lambda: f"cannot download yet: {failure}" in pod.swapper.status.reason)
        assert pod.swapper.status.outcome == PENDING

        pod.registry.fails = None
        assert (await pod.answered(nonce)).outcome == ACK

    assert pod.swapper.counters.failures == 0


async def test_a_registry_set_up_anew_counts_from_one_again(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.registry.versions[1] = b"other weights"
        await pod.answered(pod.serve(1, nonce="new"))

    assert pod.engine.loaded.tensors_digest == manifest(b"other weights").tensors_digest


async def test_the_last_draft_is_restored_without_the_registry(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))

    again = Pod(tmp_path)
    again.registry.is_away = True
    await again.swapper.restore()

    assert again.engine.loaded.version == 2
    assert not again.registry.fetched


@pytest.mark.parametrize("content", [None, b"weighty 2"])
async def test_a_last_draft_that_is_gone_or_broken_is_not_served(
    pod: Pod, tmp_path: Path, content: bytes | None
) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))
    weights = tmp_path / "2" / "model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)

    again = Pod(tmp_path)
    await again.swapper.restore()

    assert again.engine.loaded.version == 0


async def test_a_pod_that_never_served_a_draft_restores_none(pod: Pod) -> None:
    await pod.swapper.restore()

    assert pod.engine.loaded.version == 0
    assert pod.swapper.counters.swaps == 0


async def test_a_fleet_that_is_told_at_once_does_not_fetch_at_once(pod: Pod) -> None:
    async with running(pod):
        pod.serve(2, prefetch_spread_ms=2**31)
        await pod.swapper.settled.wait()
        assert pod.swapper.status.outcome == PENDING
        assert not pod.registry.fetched

        await pod.answered(pod.serve(2, nonce="a smaller fleet", prefetch_spread_ms=1))

    assert pod.registry.fetched == [2]


async def test_how_far_fetches_are_spread_makes_no_new_directive(pod: Pod) -> None:
    pod.registry.go.clear()
    async with running(pod):
        nonce = pod.serve(2, nonce="one", prefetch_spread_ms=1)
        await until(lambda: pod.registry.fetched == [2])
        pod.serve(2, nonce="one", prefetch_spread_ms=7)
        pod.registry.go.set()
        await pod.answered(nonce)

    assert pod.registry.fetched == [2]


async def test_what_is_on_disk_serves_at_once_however_far_fetches_are_spread(pod: Pod) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1, 2))
        pod.registry.is_away = True
        nonce = pod.serve(2, 3, prefetch_spread_ms=2**31)
        await pod.serves(2)
        assert pod.swapper.status.nonce == nonce

    assert pod.registry.fetched == [1, 2]


async def test_a_start_serves_what_the_registry_says_rather_than_what_served_last(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        await pod.answered(pod.serve(2))

    again = Pod(tmp_path)
    async with running(again):
        again.serve(1)
        await again.swapper.settled.wait()
        assert again.engine.loaded.version == 1
        assert again.swapper.counters.swaps == 1


async def test_a_start_does_not_wait_for_a_download(pod: Pod) -> None:
    pod.registry.go.clear()
    async with running(pod):
        nonce = pod.serve(1)
        await pod.swapper.settled.wait()
        assert pod.swapper.status.outcome == PENDING
        pod.registry.go.set()
        await pod.answered(nonce)


async def test_a_start_without_the_registry_serves_what_served_last(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))

    again = Pod(tmp_path)
    again.swapper.go_alone()
    async with running(again):
        await again.swapper.settled.wait()
        assert again.engine.loaded.version == 2
        await again.answered(again.serve(1))
        assert again.engine.loaded.version == 1


async def test_a_registry_that_says_nothing_holds_a_start_up_for_a_moment_only(pod: Pod, tmp_path: Path) -> None:
    async with running(pod):
        await pod.answered(pod.serve(2))

    again = Pod(tmp_path)
    again.swapper.contact_s = 0.01
    async with running(again):
        await again.swapper.settled.wait()
        assert again.engine.loaded.version == 2


@pytest.mark.attack(
    boundary="drafts",
    attack="a draft whose load changes the target",
    outcome="noticed by the target's checksum, and counted",
)
async def test_a_swap_that_changed_the_target_is_refused_and_counted(pod: Pod) -> None:
    pod.engine.swap_refusal = TargetChangedError("it changed weights of the target")

    async with running(pod):
        status = await pod.answered(pod.serve(2))

    assert (status.outcome, status.reason) == (NACK, "it changed weights of the target")
    assert pod.metrics.target_changes._value.get() == 1
