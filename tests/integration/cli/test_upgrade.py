"""`kubectl updraft upgrade` against an API server: what is shown, and what a request writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support import speculator_objects as objects
from tests.support.api_server import ApiServer, api_server

from updraft_cli.kubectl import plugin

SPECULATORS = "adaptivespeculators"
WAITING = "waits for its turn; then the pods of Deployment/qwen-serving"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with api_server(tmp_path) as server:
        yield server


def put(api: ApiServer, name: str, reason: str, *, current: str = "0.1.0-a", message: str = WAITING) -> None:
    """A resource as the operator describes it."""
    content: dict[str, Any] = objects.speculator()
    content["metadata"]["name"] = name
    status = "True" if reason == "UpToDate" else "False"
    first = content["status"]["conditions"][0]
    own = {**first, "type": "RuntimeUpToDate", "status": status, "reason": reason, "message": message}
    content["status"]["conditions"] = [*content["status"]["conditions"], own]
    content["status"]["runtime"] = {"current": current, "available": "0.2.0-b"}
    api.put(SPECULATORS, content)


def run(api: ApiServer, *words: str) -> Result:
    return CliRunner().invoke(plugin, ["upgrade", *words, "--kubeconfig", str(api.kubeconfig)])


def test_the_plan_shows_failures_first_and_resources_that_are_up_to_date_last(api: ApiServer) -> None:
    put(api, "a", "UpToDate", current="0.2.0-b", message="all pods have runtime 0.2.0-b")
    put(api, "b", "WaitingForWindow", message="waits for the window that opens at 2026-12-01T22:00:00Z")
    put(api, "c", "WaitingForTurn")
    put(api, "d", "UpdateFailed", message="the pods do not come back")
    result = run(api, "plan", "-o", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["resources"]
    assert [one["speculator"] for one in found] == ["d", "c", "b", "a"]
    assert [one["is_current"] for one in found] == [False, False, False, True]
    text = run(api, "plan").stdout
    assert "0.1.0-a" in text
    assert "3 resources of 4 not up to date." in text


@pytest.mark.parametrize(
    ("verb", "annotation"), [("start", "updraft.dev/upgrade"), ("skip", "updraft.dev/skip-upgrade")]
)
def test_a_request_names_the_runtime_so_that_it_ends_with_it(api: ApiServer, verb: str, annotation: str) -> None:
    put(api, "qwen", "UpdateFailed")
    result = run(api, verb, "qwen")
    assert result.exit_code == 0, result.output
    assert api.patches == [{"metadata": {"annotations": {annotation: "0.2.0-b"}}}]
    assert "team/qwen" in result.stdout


def test_a_request_to_start_says_what_the_resource_waits_for(api: ApiServer) -> None:
    put(api, "qwen", "WaitingForTurn", message="waits, because other does not come back from its update")
    assert "other does not come back" in run(api, "start", "qwen").stdout


def test_one_that_is_not_being_updated_cannot_be_skipped(api: ApiServer) -> None:
    put(api, "qwen", "WaitingForTurn")
    result = run(api, "skip", "qwen")
    assert result.exit_code == 1
    assert "stops no other" in result.stderr
    assert api.patches == []


def test_what_is_up_to_date_needs_no_request(api: ApiServer) -> None:
    put(api, "qwen", "UpToDate", current="0.2.0-b")
    result = run(api, "start", "qwen")
    assert result.exit_code == 1
    assert "is up to date with runtime 0.2.0-b" in result.stderr
    assert api.patches == []


def test_an_operator_that_has_said_nothing_is_asked_for_nothing(api: ApiServer) -> None:
    api.put(SPECULATORS, objects.speculator())
    result = run(api, "start", "qwen")
    assert result.exit_code == 1
    assert "has not said yet" in result.stderr


def test_a_dry_run_keeps_nothing(api: ApiServer) -> None:
    put(api, "qwen", "WaitingForTurn")
    assert run(api, "start", "qwen", "--dry-run", "server").stdout.startswith("Dry run, nothing was kept")
