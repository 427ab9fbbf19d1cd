"""An API server that misbehaves and kill -9: late and repeated work, and in the end the same objects as without them."""

from pathlib import Path

import pytest
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.accounts import account
from tests.cluster.operator.fault_storm import storm
from tests.cluster.operator.subject import Subject
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.operator import OperatorProcess
from tests.support.redis_server import RedisServer

pytestmark = [pytest.mark.timeout(600), pytest.mark.lasts(60)]

SECONDS = 30.0
LIVES_S = (7.0, 9.0)
CONVERGED_S = 150.0
"""`make bench-faults` goes on for longer, kills more rarely, and allows less: it has the machine to itself."""

SEED = 5
HISTORY_IS_GONE = Faults(delayed=0, unanswered=0, lost=0, conflict=0, busy=0, broken=0, away=0, gone=0.3, watch_s=1e6)


def test_faults_and_kills_change_when_things_are_done_and_nothing_else(
    kubernetes: ControlPlane, redis_server: RedisServer, tmp_path: Path
) -> None:
    outcome = storm(
        kubernetes,
        tmp_path,
        redis_server.url,
        seconds=SECONDS,
        seed=SEED,
        lives_s=LIVES_S,
        converged_s=CONVERGED_S,
    )

    assert outcome.different == []
    assert outcome.ended == []
    assert outcome.denied == []
    assert outcome.writes == []
    assert outcome.converged_s is not None
    assert outcome.kills >= 2
    assert min(outcome.changes[each] for each in ("create", "change", "delete", "edit child", "delete child")) > 0
    assert {"delayed", "unanswered", "lost"} < outcome.faults.keys()
    assert {"watch cut", "watch ended", "watch expired", "watch silent"} < outcome.faults.keys()
    assert sum(outcome.faults[each] for each in ("409", "410", "429", "500", "503")) > 0


def test_what_ends_the_watches_does_not_end_the_operator(
    kubernetes: ControlPlane, home: str, subject: Subject, tmp_path: Path
) -> None:
    """A listing that is answered with 410 does: kopf has no word for it."""
    with kubernetes.api() as api:
        who = account(kubernetes, api, tmp_path, home, "watcher", watched=(subject.namespace,))
    chosen = {"namespace": home, "watch_namespaces": subject.namespace, "leader_election": "false"}
    with FaultProxy(kubernetes.kubeconfig, HISTORY_IS_GONE, SEED) as proxy:
        config = proxy.kubeconfig(who.kubeconfig, tmp_path)
        with OperatorProcess(config, tmp_path / "operator.log", **chosen) as process:
            process.wait_for_log("Watches ended; restarting")
            proxy.calm()
            subject.create()
            subject.wait_until_built()
            assert process.terminate() == 0
