"""kill -9 at random moments of publications and rollouts, with pods connected; `make bench-kill` does it 200 times."""

from pathlib import Path

from tests.support.kill_storm import storm

KILLS = 20


async def test_no_version_is_lost_no_state_torn_and_no_pod_misled_however_often_the_registry_is_killed(
    tmp_path: Path,
) -> None:
    seen = await storm(tmp_path, kills=KILLS, seed=1)
    assert seen.problems == []
    assert len(seen.answered) > KILLS / 2
    assert seen.in_canary > 0
    assert seen.orders > 0
