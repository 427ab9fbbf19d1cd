"""An API server that misbehaves and kill -9: late and repeated work, and in the end the same objects as without them."""

from pathlib import Path

from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.fault_storm import storm
from tests.support.redis_server import RedisServer

SECONDS = 60.0
"""`make bench-faults` goes on for longer."""

SEED = 5


def test_faults_and_kills_change_when_things_are_done_and_nothing_else(
    kubernetes: ControlPlane, redis_server: RedisServer, tmp_path: Path
) -> None:
    seen = storm(kubernetes, tmp_path, redis_server.url, seconds=SECONDS, seed=SEED)

    assert seen.different == []
    assert seen.ended == []
    assert seen.denied == []
    assert seen.writes == []
    assert seen.converged_s is not None
    assert seen.kills >= 2
    assert min(seen.changes[each] for each in ("create", "change", "delete", "edit child", "delete child")) > 0
    assert {"delayed", "unanswered", "lost"} < seen.faults.keys()
    assert {"watch cut", "watch ended", "watch expired", "watch silent"} < seen.faults.keys()
    assert sum(seen.faults[each] for each in ("409", "410", "429", "500", "503")) > 0
