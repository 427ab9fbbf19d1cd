"""`kubectl updraft` against an API server, with the verbs of `updraft`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.support import speculator_objects as objects
from tests.support.api_server import ApiServer, api_server
from tests.support.speculator_objects import moment
from tests.support.wait import LONG_S

from updraft_cli.kubectl import candidates, plugin

Run = Callable[..., Result]
SPECULATORS, VERSIONS, IMPORTS = "adaptivespeculators", "draftversions", "draftimports"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """Version 2 of qwen serves, and version 4 is in canary."""
    with api_server(tmp_path) as server:
        server.put(SPECULATORS, speculator())
        for version in (
            objects.version(
                1, "Superseded", reason="2 took over", history=[moment(1, "Stable"), moment(9, "Superseded")]
            ),
            objects.version(2, "Stable", reason="it won", history=[moment(8, "Stable", "it won")]),
            objects.version(3, "Rejected", reason="too slow"),
            objects.version(4, "Canary", reason="it passed the gate", pods={"loaded": 1, "target": 1}),
        ):
            server.put(VERSIONS, version)
        yield server


def speculator(**fields: Any) -> dict[str, Any]:
    status = {
        "versions": {"stable": 2, "candidate": 4, "previous": 1, "latest": 4},
        "rollout": {"phase": "Canary", "version": 4, "baseline": 2, "step": 1, "steps": 2, "message": "step 2 in 48 s"},
        "acceptance": {"stable": "2.50", "candidate": "2.75", "verifySteps": 12000},
    }
    steps = [{"podsPercent": 10, "holdSeconds": 120}, {"podsPercent": 50, "holdSeconds": 120}]
    return objects.speculator(rollout={"steps": steps}, status=status | fields)


@pytest.fixture
def run(api: ApiServer) -> Run:
    runner = CliRunner()
    return lambda *words: runner.invoke(plugin, [*words, "--kubeconfig", str(api.kubeconfig)])


def test_versions_are_listed_by_noun_and_by_the_older_spelling(run: Run) -> None:
    listed = run("draft", "list", "qwen")
    assert (listed.exit_code, listed.output) == (0, run("versions").output)
    assert [line.split()[:2] for line in listed.output.splitlines()[1:]] == [
        ["4", "canary"],
        ["3", "rejected"],
        ["2", "stable"],
        ["1", "superseded"],
    ]
    assert run("draft", "list", "-o", "name").output.split()[0] == "draftversion.updraft.dev/qwen-v4"
    assert json.loads(run("draft", "list", "-o", "json").output)["stable"] == 2


def test_imports_that_are_no_version_yet_are_listed_with_the_versions(run: Run, api: ApiServer) -> None:
    before = run("draft", "list", "qwen").output
    assert "DraftImport" not in before
    failed = [objects.condition(kind, "True", "ImportFailed", "404 Not Found") for kind in ("Ready", "Stalled")]
    api.put(IMPORTS, objects.draft_import(*failed))
    listed = run("draft", "list", "qwen")
    assert listed.exit_code == 0
    assert listed.output.removeprefix(before) == ("\nThe DraftImport qwen-mine failed (ImportFailed): 404 Not Found.\n")
    (one,) = json.loads(run("draft", "list", "qwen", "-o", "json").output)["imports"]
    assert (one["name"], one["reason"], one["has_failed"]) == ("qwen-mine", "ImportFailed", True)


def test_a_version_is_shown_by_number_or_by_role(run: Run) -> None:
    assert "reason     it passed the gate" in run("draft", "show", "candidate").output
    assert run("draft", "show", "qwen", "9").output == "Error: qwen has no DraftVersion with the number 9\n"
    assert "phase    superseded    stable" in run("draft", "diff", "1", "2").output


def test_the_history_has_the_events_in_wide(run: Run, api: ApiServer) -> None:
    about = {"kind": "DraftVersion", "name": "qwen-v3"}
    api.events.append(
        {"metadata": {}, "involvedObject": about, "reason": "Rejected", "message": "slow", "type": "Warning"}
    )
    assert [line.split()[2:4] for line in run("history").output.splitlines()[1:]] == [
        ["1", "stable"],
        ["2", "stable"],
        ["1", "superseded"],
    ]
    assert "DraftVersion/qwen-v3" in run("draft", "history", "qwen", "-o", "wide").output
    assert [entry["phase"] for entry in json.loads(run("draft", "history", "1", "-o", "json").output)["events"]] == [
        "stable",
        "superseded",
    ]


def test_a_rollout_has_the_view_and_the_exit_codes_of_a_registry(run: Run, api: ApiServer) -> None:
    shown = run("rollout", "status").output
    assert "tokens per step  2.75       2.50    +10.0 % (no bounds yet)" in shown
    assert "step  1 of 2: 10 % of the pods for 2 min" in shown
    assert [run("rollout", "status", version, "--exit-code").exit_code for version in ("1", "2", "3", "4")] == [
        0,
        0,
        3,
        4,
    ]


def test_a_watch_ends_with_the_outcome(run: Run, api: ApiServer) -> None:
    late = run("rollout", "watch", "--timeout", "1s")
    assert (late.exit_code, "Not over within 1 s." in late.output) == (4, True)
    environ = {**os.environ, "KUBECONFIG": str(api.kubeconfig)}
    command = [sys.executable, "-m", "updraft_cli.kubectl", "rollout", "watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().endswith(" step 2 in 48 s\n")
        api.put(VERSIONS, objects.version(4, "RolledBack", reason="acceptance is down"))
        rolled_back = {"versions": {"stable": 2, "latest": 4}, "rollout": {"message": "version 2 is stable"}}
        api.put(SPECULATORS, speculator(**rolled_back))
        out, err = watching.communicate(timeout=LONG_S)
    assert (watching.returncode, err) == (3, "")
    assert out.endswith(" version 2 is stable\n")


LOST = {"version": 5, "reason": "Rejected", "message": "too slow", "time": objects.SINCE}


@pytest.mark.parametrize(
    ("versions", "failure", "code"),
    [
        ({}, None, 0),
        ({"stable": 2, "candidate": 5, "latest": 5}, None, 4),
        ({"stable": 5, "latest": 5}, None, 0),
        ({"stable": 2, "latest": 5}, LOST, 3),
        ({"stable": 2, "latest": 5}, LOST | {"version": 3}, 1),
        ({"stable": 2, "latest": 5}, None, 1),
    ],
)
def test_a_version_without_an_object_has_the_outcome_that_the_speculator_reports(
    run: Run, api: ApiServer, versions: dict[str, int], failure: dict[str, Any] | None, code: int
) -> None:
    api.put(SPECULATORS, speculator(versions=versions, lastFailure=failure))
    assert run("rollout", "status", "--exit-code").exit_code == code
    watched = run("rollout", "watch", "--timeout", "1s")
    assert watched.exit_code == code
    assert run("rollout", "policy").exit_code == 0
    if code == 1:
        assert watched.output == "Error: qwen has no DraftVersion with the number 5\n"


def test_unknown_fields_of_a_newer_crd_are_ignored(run: Run, api: ApiServer) -> None:
    rollout = {"canaryColour": "green", "analysis": {"minSamples": 50, "window": 3}}
    api.put(SPECULATORS, objects.speculator(rollout=rollout))
    assert run("status").exit_code == 0
    policy = yaml.safe_load(run("rollout", "policy", "-o", "yaml").output)
    assert policy == {"strategy": "canary", "analysis": {"min_samples": 50}}


def test_a_history_has_no_limit_by_default(run: Run, api: ApiServer) -> None:
    for number in range(5, 65):
        api.put(VERSIONS, objects.version(number, "Rejected", history=[moment(1, "Rejected")]))
    assert len(run("history").output.splitlines()) > 60
    assert len(run("history", "--limit", "7").output.splitlines()) == 8


def test_a_status_watch_writes_changes_until_it_is_interrupted(api: ApiServer) -> None:
    environ = {**os.environ, "KUBECONFIG": str(api.kubeconfig)}
    command = [sys.executable, "-m", "updraft_cli.kubectl", "status", "--watch", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["candidate"] == 4
        api.put(SPECULATORS, speculator(versions={"stable": 4, "latest": 4}))
        assert json.loads(watching.stdout.readline())["candidate"] == 0
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=LONG_S)
    assert (watching.returncode, err) == (130, "")


def test_decisions_are_fields_of_the_resource(run: Run, api: ApiServer) -> None:
    pinned = run("draft", "pin", "qwen", "previous")
    assert pinned.output.startswith("Version 1 is pinned for qwen: all pods load it now")
    assert run("unpin").output.startswith("Nothing is pinned for qwen: ")
    assert run("rollout", "pause").exit_code == 0
    assert run("resume", "qwen").exit_code == 0
    assert run("promote", "candidate").exit_code == 0
    assert [patch["spec"]["rollout"] for patch in api.patches] == [
        {"pinnedVersion": 1},
        {"pinnedVersion": None},
        {"paused": True},
        {"paused": None},
        {"promotedVersion": 4},
    ]


def test_a_dry_run_keeps_nothing(run: Run, api: ApiServer) -> None:
    decision = json.loads(run("draft", "pin", "1", "--dry-run=server", "-o", "json").output)
    assert (decision["changed"], decision["dry_run"], decision["version"]) == (False, True, 1)
    assert "pinnedVersion" not in api.objects[SPECULATORS]["qwen"]["spec"]["rollout"]


def test_a_policy_is_shown_and_set_as_fields_of_the_resource(run: Run, api: ApiServer, tmp_path: Path) -> None:
    policy = yaml.safe_load(run("rollout", "policy", "-o", "yaml").output)
    assert (policy["strategy"], policy["steps"][0]) == ("canary", {"pods_percent": 10, "hold_seconds": 120})
    changed = run("rollout", "policy", "set", "--strategy", "manual", "--min-samples", "50")
    assert changed.output.splitlines()[0] == "strategy: canary -> manual"
    assert api.patches[-1]["spec"]["rollout"] == {"strategy": "Manual", "analysis": {"minSamples": 50}}
    (tmp_path / "policy.yaml").write_text("strategy: immediate\n")
    run("rollout", "policy", "set", "qwen", "--file", str(tmp_path / "policy.yaml"))
    rollout = api.objects[SPECULATORS]["qwen"]["spec"]["rollout"]
    assert (rollout["strategy"], rollout.get("steps"), rollout["analysis"]) == ("Immediate", None, {})


def test_several_speculators_are_rows_and_a_command_about_one_needs_a_name(run: Run, api: ApiServer) -> None:
    api.put(SPECULATORS, objects.speculator("gemma"))
    assert [line.split()[0] for line in run("status").output.splitlines()] == ["name", "gemma", "qwen"]
    assert run("explain").output == (
        "Error: namespace team has more than one AdaptiveSpeculator, name one: qwen, gemma\n"
    )
    assert "It serves hf://org/qwen" in run("explain", "qwen").output
    assert run("status", "llama").output == (
        "Error: namespace team has no AdaptiveSpeculator llama; it has qwen, gemma\n"
    )


def test_names_and_versions_are_completed(api: ApiServer) -> None:
    config = ["--kubeconfig", str(api.kubeconfig)]
    assert [item.value for item in candidates(["status", *config], "")] == ["qwen"]
    assert [item.value for item in candidates(["draft", "pin", *config, "qwen"], "")][:4] == ["4", "3", "2", "1"]
