"""How long idle threads wait is the engine's choice unless the user made one."""

import pytest

from updraft_inference.torch_engine.openmp import wait_briefly


def test_idle_threads_wait_briefly() -> None:
    environ: dict[str, str] = {}
    wait_briefly(environ)
    assert 0 < int(environ["GOMP_SPINCOUNT"]) < 300_000


@pytest.mark.parametrize("variables", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_said_stands(variables: dict[str, str]) -> None:
    environ = variables.copy()
    wait_briefly(environ)
    assert environ == variables
