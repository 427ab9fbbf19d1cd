"""A bad network, a bad API server and a killer: in the end everything is as on a good day."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.access import Api
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import account
from tests.cluster.operator.faults import FaultyApi
from tests.cluster.operator.replicas import replicas
from tests.cluster.operator.storm import Storm, calm, wait_for_the_same
from tests.support.operator import OperatorProcess
from tests.support.redis_server import RedisServer

STORM_S = 25.0
"""`make bench-operator ARGS=--faults` has the bar's 10 minutes."""
SEED = 5


@pytest.fixture
def spaces(api: Api, namespace: str) -> Iterator[tuple[str, str, str]]:
    """A namespace of the operators, one for the storm, and a calm one."""
    home, quiet = namespace.replace("test-", "home-"), namespace.replace("test-", "calm-")
    for name in (home, quiet):
        api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield home, namespace, quiet
    for name in (home, quiet):
        api.delete(f"/api/v1/namespaces/{name}")


def test_a_storm_ends_as_a_calm_day_does(
    kubernetes: ControlPlane, api: Api, spaces: tuple[str, str, str], tmp_path: Path, redis_server: RedisServer
) -> None:
    home, stormy, quiet = spaces
    who = account(kubernetes, api, tmp_path, home, "tossed", watched=[stormy])
    settings: dict[str, object] = {"redis_url": redis_server.url, "lease_seconds": 3.0}
    more = {"namespace": home, "watch_namespaces": stormy, "identity": "tossed", "lease_name": "updraft-operator"}
    storm = Storm(api=api, namespace=stormy, seed=SEED)
    with (
        FaultyApi(who.kubeconfig, tmp_path, SEED) as faulty,
        OperatorProcess(faulty.front, tmp_path / "tossed.log", **settings, **more) as process,
    ):
        storm.rage(STORM_S, process, kill_s=4.0)
        assert storm.num_kills >= 1
        assert {"watch cut", "answer lost", "delayed", "answered 409", "answered 500"} <= set(faulty.told)

        wished = calm(api, quiet, storm.specs)
        with replicas(kubernetes, api, tmp_path, home, [quiet], number=1, leader_election=False, **settings):
            wait_for_the_same(storm, wished, process)
        process.terminate()
    assert requests.denied(kubernetes, who.user) == []
