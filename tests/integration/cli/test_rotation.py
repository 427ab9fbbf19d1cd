"""`kubectl updraft rotate` against an API server: a request, each step once, and the end."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support import speculator_objects as objects
from tests.support.api_server import ApiServer, api_server
from tests.support.wait import wait_until

from updraft_cli.cmd.rotation.state import ROTATE
from updraft_cli.kubectl import plugin

SPECULATORS = "adaptivespeculators"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with api_server(tmp_path) as server:
        server.put(SPECULATORS, objects.speculator())
        yield server


def run(api: ApiServer, *words: str) -> Result:
    return CliRunner().invoke(plugin, ["rotate", *words, "--kubeconfig", str(api.kubeconfig)])


def asked(api: ApiServer) -> str:
    return str(api.objects[SPECULATORS]["qwen"]["metadata"].get("annotations", {}).get(ROTATE, ""))


def tell(api: ApiServer, status: str, message: str) -> None:
    """The operator says how far it is."""
    content: dict[str, Any] = deepcopy(api.objects[SPECULATORS]["qwen"])
    others = [each for each in content["status"]["conditions"] if each["type"] != "PasswordsRotated"]
    own = {**others[0], "type": "PasswordsRotated", "status": status, "reason": "Rotating", "message": message}
    content["status"]["conditions"] = [*others, own]
    api.put(SPECULATORS, content)


def test_it_asks_and_prints_each_step_until_the_operator_is_done(api: ApiServer) -> None:
    results = list[Result]()
    tell(api, "True", "request of yesterday: all pods use the new passwords")
    waiting = Thread(target=lambda: results.append(run(api, "qwen", "--timeout", "10m")))
    waiting.start()
    wait_until(lambda: bool(asked(api)), what="the request")
    tell(api, "False", f"request {asked(api)}: the Secrets have to be written")
    tell(api, "False", f"request {asked(api)}: the Secrets have to be written")
    tell(api, "True", f"request {asked(api)}: all pods use the new passwords")
    waiting.join()
    (result,) = results
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Asked for new passwords of team/qwen."
    assert lines[-1] == "Done: all pods use the new passwords."
    assert lines.count("Waiting: the Secrets have to be written.") <= 1


def test_an_operator_that_does_not_notice_is_not_waited_for_beyond_the_timeout(api: ApiServer) -> None:
    result = run(api, "qwen", "--timeout", "1s")
    assert result.exit_code == 4
    assert "Waiting: the operator has not noticed the request yet." in result.stdout
    assert "the operator continues" in result.stderr


def test_it_may_only_ask(api: ApiServer) -> None:
    first = run(api, "qwen", "--no-wait")
    request = asked(api)
    assert (first.exit_code, bool(request)) == (0, True)
    assert api.patches == [{"metadata": {"annotations": {ROTATE: request}}}]
    assert run(api, "qwen", "--no-wait").exit_code == 0
    assert asked(api) != request, "each call is another request"


def test_a_dry_run_keeps_nothing(api: ApiServer) -> None:
    result = run(api, "qwen", "--dry-run", "server")
    assert result.exit_code == 0, result.output
    assert "nothing was kept" in result.stdout
    assert not asked(api)


def test_who_may_not_patch_gets_one_sentence(api: ApiServer) -> None:
    api.is_reader = True
    result = run(api, "qwen")
    assert result.exit_code == 1
    assert "forbidden" in result.output


def test_a_request_that_somebody_removes_is_not_waited_for(api: ApiServer) -> None:
    results = list[Result]()
    waiting = Thread(target=lambda: results.append(run(api, "qwen")))
    waiting.start()
    wait_until(lambda: bool(asked(api)), what="the request")
    content: dict[str, Any] = deepcopy(api.objects[SPECULATORS]["qwen"])
    del content["metadata"]["annotations"][ROTATE]
    api.put(SPECULATORS, content)
    waiting.join()
    (result,) = results
    assert result.exit_code == 1
    assert "somebody removed the request" in result.output
