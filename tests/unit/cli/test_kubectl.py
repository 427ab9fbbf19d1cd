"""The plugin's command line without a cluster."""

import logging
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import click
import pytest
import yaml
from click.testing import CliRunner
from tests.support.ports import free_port

from updraft_cli.__main__ import cli
from updraft_cli.backends.cluster_client import KubeContext, connected
from updraft_cli.cmd.subprograms import operator
from updraft_cli.kubectl import candidates, plugin


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(plugin, words)
    return result.exit_code, result.stdout, result.stderr


def kubeconfig(folder: Path, server: str, **user: object) -> Path:
    path = folder / "config"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": user or {"token": "t"}}],
        "contexts": [{"name": "mine", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "mine",
    }
    path.write_text(yaml.safe_dump(content))
    return path


OLDER = ["versions", "history", "pin", "unpin", "promote", "pause", "resume"]


@pytest.mark.parametrize("command", ["", *plugin.commands, "draft list", "draft show", "rollout watch"])
def test_every_command_has_a_help_page(command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert out.startswith("Usage:")


def test_both_programs_have_the_same_commands() -> None:
    registry_only = {"pull", "import", "reject", "retain", "train"}
    for noun in ("draft", "rollout"):
        ours, theirs = plugin.commands[noun], cli.commands[noun]
        assert isinstance(ours, click.Group)
        assert isinstance(theirs, click.Group)
        assert theirs.commands.keys() - ours.commands.keys() == (registry_only if noun == "draft" else set())
        assert all(theirs.commands[name] is command for name, command in ours.commands.items())
    assert plugin.commands["status"] is cli.commands["status"]


def test_policy_flags_without_a_field_in_the_crd_are_left_out() -> None:
    words = ("rollout", "policy", "set", "--help")
    registry = CliRunner().invoke(cli, words).stdout
    _, cluster, _ = run(*words)
    for flag in ("--confidence", "--gate-min-samples", "--gate-min-gain", "--gate-confidence"):
        assert (flag in registry, flag in cluster) == (True, False)
    assert "--comparison" in cluster


def test_the_older_spellings_are_the_same_commands_and_not_listed() -> None:
    draft, rollout = plugin.commands["draft"], plugin.commands["rollout"]
    assert isinstance(draft, click.Group)
    assert isinstance(rollout, click.Group)
    nouns = {**draft.commands, **rollout.commands, "versions": draft.commands["list"]}
    assert [plugin.commands[name].callback for name in OLDER] == [nouns[name].callback for name in OLDER]
    assert all(plugin.commands[name].hidden for name in OLDER)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["pin"], id="no version"),
        pytest.param(["pin", "qwen", "one"], id="not a number"),
        pytest.param(["promote", "qwen", "0"], id="no draft cannot win"),
        pytest.param(["pin", "qwen", "1", "2"], id="too many words"),
        pytest.param(["pin", "qwen", "1", "--dry-run=client"], id="a dry run of the client's"),
        pytest.param(["pin", "qwen", "1", "-A"], id="a decision about all namespaces"),
        pytest.param(["status", "-o", "xml"], id="unknown format"),
        pytest.param(["roll"], id="no such command"),
    ],
)
def test_wrong_usage_exits_2(words: list[str]) -> None:
    assert run(*words)[0] == 2


def test_nobody_at_the_api_servers_address_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    server = f"https://127.0.0.1:{free_port()}"
    code, out, err = run("status", "--kubeconfig", str(kubeconfig(tmp_path, server)))
    assert (code, out) == (1, "")
    assert err == f"Error: no API server answers at {server}: Connection refused\n"


def test_a_kubeconfig_that_is_not_there_or_lacks_the_context_is_told(tmp_path: Path) -> None:
    missing = run("status", "--kubeconfig", str(tmp_path / "none"))
    assert missing[0] == 1
    assert missing[2].startswith("Error: the kubeconfig names no usable cluster: ")
    code, _, err = run("status", "--kubeconfig", str(kubeconfig(tmp_path, "https://x")), "--context", "other")
    assert code == 1
    assert "other" in err
    assert err.count("\n") == 1


def test_a_credential_plugin_that_fails_is_told_in_one_sentence(tmp_path: Path) -> None:
    plugin_that_fails = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "false",
        "interactiveMode": "Never",
    }
    config = kubeconfig(tmp_path, "https://127.0.0.1:1", exec=plugin_that_fails)
    code, _, err = run("status", "--kubeconfig", str(config))
    assert code == 1
    assert err.startswith("Error: the kubeconfig's credential plugin failed: ")
    assert err.count("\n") == 1


def test_an_error_that_another_thread_logs_is_not_the_credential_plugins(tmp_path: Path) -> None:
    script = tmp_path / "plugin"
    answer = """{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t"}}"""
    script.write_text(f"#!/bin/sh\nsleep 0.2\necho '{answer}'\n")
    script.chmod(0o755)
    works = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "interactiveMode": "Never"}
    context, is_done = KubeContext(kubeconfig=kubeconfig(tmp_path, "https://127.0.0.1:1", exec=works)), Event()

    def complain() -> None:
        while not is_done.wait(0.01):
            logging.getLogger("another").error("not the plugin's")

    thread = Thread(target=complain)
    thread.start()
    try:
        with connected(context) as client:
            assert client.namespace == "default"
    finally:
        is_done.set()
        thread.join()


def test_a_user_that_acts_as_another_is_refused_rather_than_acted_for(tmp_path: Path) -> None:
    config = kubeconfig(tmp_path, "https://127.0.0.1:1", **{"as": "ann"})
    code, _, err = run("status", "--kubeconfig", str(config))
    assert (code, err) == (1, "Error: user me of the kubeconfig impersonates (`as`), which is not supported here\n")


def test_a_kubeconfig_that_is_no_yaml_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("{")
    code, _, err = run("status", "--kubeconfig", str(path))
    assert code == 1
    assert err.startswith("Error: the kubeconfig names no usable cluster: ")
    assert err.count("\n") == 1


def test_commands_and_options_are_completed_and_nothing_is_offered_without_a_cluster(tmp_path: Path) -> None:
    assert [item.value for item in candidates([], "r")] == ["rollout", "rotate"]
    assert [item.value for item in candidates(["draft"], "p")] == ["pin", "promote"]
    assert "--dry-run" in [item.value for item in candidates(["draft", "pin"], "--")]
    config = str(kubeconfig(tmp_path, f"https://127.0.0.1:{free_port()}"))
    assert [item.value for item in candidates(["status", "--kubeconfig", config], "")] == []
    assert [item.value for item in candidates(["status", "--kubeconfig", config, "--context"], "m")] == ["mine"]


def test_the_answer_to_kubectls_completion_ends_with_a_directive() -> None:
    command = [sys.executable, "-c", "from updraft_cli.kubectl import complete; complete()", "draft", "pi"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    offered, directive = result.stdout.splitlines()
    assert offered.startswith("pin\tServe exactly this version")
    assert directive == ":4"


def test_neither_command_line_imports_the_kubernetes_client_before_it_is_needed() -> None:
    code = "import sys, updraft_cli.__main__, updraft_cli.kubectl; print('kubernetes' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_a_plan_needs_a_file() -> None:
    assert CliRunner().invoke(operator, ["plan"]).exit_code == 2
    assert CliRunner().invoke(operator, ["plan", "-f", "/no/such/file"]).exit_code == 2


def test_a_plan_is_the_operators_own_program_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "speculator.yaml"
    path.write_text("kind: Nothing\n")
    direct = [sys.executable, "-m", "updraft_operator", "plan", "-f", str(path), "--output", "text", "--offline"]
    code = "from updraft_cli.cmd.subprograms import operator; operator()"
    ours = [sys.executable, "-c", code, "plan", "-f", str(path), "--offline"]
    expected, got = (subprocess.run(command, capture_output=True, text=True, check=False) for command in (direct, ours))
    assert (got.returncode, got.stdout, got.stderr) == (expected.returncode, expected.stdout, expected.stderr)
