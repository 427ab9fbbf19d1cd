"""`kubectl updraft` through the real kubectl against the real API server: it reads, patches, and is held by RBAC."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml
from tests.cluster.access import Api, Json, audited
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.crds import crds
from tests.cluster.kubectl import (
    SPECULATORS,
    Kubectl,
    admin,
    as_user,
    path,
    qwen,
    rollout,
    speculators,
    store,
    viewer,
)
from tests.support import speculator_objects as objects
from tests.support.wait import wait_until

from updraft_cli.backends.speculators import ROLES

__all__ = ["admin", "as_user", "crds", "path", "qwen", "viewer"]  # fixtures


def test_status_and_versions_are_what_the_api_server_holds(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    status = admin("updraft", "status", "qwen")
    assert (status.code, status.err) == (0, "")
    assert status.out.splitlines()[0] == f"qwen in namespace {admin.namespace}: ready"
    assert "stable    version 2, 2.59 tokens per step" in status.out.splitlines()

    versions = [line.split()[:2] for line in admin("updraft", "versions").out.splitlines()[1:]]
    assert versions == [["4", "held"], ["3", "rejected"], ["2", "stable"], ["1", "superseded"]]
    assert admin("updraft", "versions", "qwen", "-o", "name").out.split() == [
        f"draftversion.updraft.dev/qwen-v{number}" for number in (4, 3, 2, 1)
    ]
    everywhere = json.loads(admin("updraft", "status", "-A", "-o", "json").out)["speculators"]
    assert [each["name"] for each in everywhere if each["namespace"] == admin.namespace] == ["qwen"]


def test_names_that_the_plugin_prints_are_names_for_kubectl(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    (name,) = admin("updraft", "status", "-o", "name").out.split()
    assert admin("get", name, "-n", admin.namespace, "-o", "jsonpath={.metadata.name}").out == "qwen"


def test_history_has_the_changes_and_in_wide_the_events(
    admin: Kubectl, qwen: Callable[[], Json], api: Api, namespace: str
) -> None:
    about = {"kind": "DraftVersion", "name": "qwen-v3", "namespace": namespace, "apiVersion": objects.API_VERSION}
    newer = {
        "metadata": {"name": "qwen-v3.1"},
        "regarding": about,
        "reason": "Rejected",
        "note": "too slow",
        "type": "Warning",
        "action": "Judge",
        "reportingController": "updraft-operator",
        "reportingInstance": "updraft-operator-0",
        "eventTime": "2026-11-24T11:30:00.000000Z",
    }
    api.create(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", newer)

    told = admin("updraft", "history").out.splitlines()
    assert [line.split()[2:4] for line in told[1:]] == [["1", "stable"], ["2", "stable"], ["1", "superseded"]]
    only = admin("updraft", "history", "qwen", "previous", "-o", "json")
    assert [change["phase"] for change in json.loads(only.out)["events"]] == ["stable", "superseded"]
    wide = admin("updraft", "history", "-o", "wide").out
    assert "Warning  Rejected  DraftVersion/qwen-v3" in wide
    assert admin("updraft", "history", "7").err == "Error: qwen has no DraftVersion with the number 7\n"


def test_explain_reads_like_a_page(admin: Kubectl, qwen: Callable[[], Json], api: Api) -> None:
    denied = objects.condition("RegistryReady", "False", "Denied", "the token is not known")
    api.patch(
        f"{speculators(admin.namespace)}/qwen/status", {"status": {"conditions": objects.ready(denied)["conditions"]}}
    )
    told = admin("updraft", "explain")
    assert told.code == 0
    assert "Version 2 of the draft serves" in told.out
    assert f"kubectl rollout restart statefulset/qwen-registry -n {admin.namespace}" in told.out


def test_a_pin_and_its_end_are_fields_of_the_resource_that_we_own(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    pinned = admin("updraft", "pin", "qwen", "1")
    assert (pinned.code, pinned.err) == (0, "")
    assert pinned.out.startswith("Version 1 is pinned for qwen: all pods load it now")
    assert rollout(qwen())["pinnedVersion"] == 1
    owners = [
        entry["manager"] for entry in qwen()["metadata"]["managedFields"] if entry["manager"].startswith("kubectl")
    ]
    assert owners == ["kubectl-updraft"]

    again = admin("updraft", "pin", "1")
    assert (again.code, again.out.startswith("qwen is pinned to version 1 already")) == (0, True)

    assert admin("updraft", "unpin").code == 0
    assert "pinnedVersion" not in rollout(qwen())
    assert admin("updraft", "pin", "0").out.startswith("Pinned to no draft for qwen: ")
    assert rollout(qwen())["pinnedVersion"] == "NoDraft"


def test_pause_resume_and_promote_are_fields_too(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    assert admin("updraft", "pause").code == 0
    assert rollout(qwen())["paused"] is True
    assert admin("updraft", "resume").code == 0
    assert rollout(qwen())["paused"] is False  # the default
    assert admin("updraft", "promote", "stable").out == "Version 2 of qwen is stable already.\n"
    assert admin("updraft", "promote", "4").code == 0
    assert rollout(qwen())["promotedVersion"] == 4


def test_a_dry_run_is_checked_by_the_api_server_and_keeps_nothing(
    kubernetes: ControlPlane, admin: Kubectl, qwen: Callable[[], Json]
) -> None:
    before = qwen()
    dry = admin("updraft", "pin", "1", "--dry-run=server", "-o", "json")
    told = json.loads(dry.out)
    assert (told["changed"], told["dry_run"], told["version"]) == (False, True, 1)
    assert told["message"].startswith("Dry run, nothing was kept: ")
    assert qwen() == before
    patches = [
        each for each in audited(kubernetes.audit_log) if each.namespace == admin.namespace and each.verb == "patch"
    ]
    assert patches[-1].name == "qwen"
    assert patches[-1].agent == "kubectl-updraft"


def test_a_version_that_is_not_there_or_lost_is_refused_and_nothing_is_sent(
    admin: Kubectl, qwen: Callable[[], Json]
) -> None:
    before = qwen()
    unknown = admin("updraft", "pin", "qwen", "9")
    assert (unknown.code, unknown.out) == (1, "")
    assert unknown.err == "Error: qwen has no DraftVersion with the number 9; it has versions 1 to 4\n"
    lost = admin("updraft", "promote", "qwen", "3")
    assert (lost.code, lost.err) == (1, "Error: version 3 of qwen is rejected and never serves again: too slow\n")
    assert qwen() == before


def test_a_field_that_a_file_somewhere_sets_is_set_with_a_note(
    admin: Kubectl, qwen: Callable[[], Json], api: Api
) -> None:
    body = {"apiVersion": objects.API_VERSION, "kind": "AdaptiveSpeculator", "metadata": {"name": "qwen"}}
    wished = {"spec": {"targetModel": {"uri": "hf://org/qwen"}, "rollout": {"pinnedVersion": 2}}}
    api.apply(f"{speculators(admin.namespace)}/qwen", {**body, **wished}, manager="argocd-controller", force=True)
    pinned = admin("updraft", "pin", "qwen", "1")
    assert pinned.code == 0
    assert pinned.err == (
        "Note: argocd-controller also set spec.rollout.pinnedVersion, and may set it back: change it there too.\n"
    )


def test_who_may_only_view_is_shown_everything_and_refused_a_patch_in_a_sentence(
    viewer: Kubectl, qwen: Callable[[], Json]
) -> None:
    before = qwen()
    for look in ("status", "versions", "history", "explain"):
        assert viewer("updraft", look, "qwen").code == 0
    refused = viewer("updraft", "pin", "qwen", "1")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith(
        'Error: adaptivespeculators.updraft.dev "qwen" is forbidden: User "system:serviceaccount:'
    )
    assert 'cannot patch resource "adaptivespeculators"' in refused.err
    assert refused.err.count("\n") == 1
    assert qwen() == before
    wide = viewer("updraft", "history", "qwen", "-o", "wide")
    assert wide.code == 0
    assert "Events cannot be read: events is forbidden" in wide.out
    assert viewer("updraft", "status", "-A").err.startswith("Error: adaptivespeculators.updraft.dev is forbidden")


def test_a_name_that_is_not_there_is_told_with_those_that_are(
    admin: Kubectl, qwen: Callable[[], Json], api: Api
) -> None:
    missing = admin("updraft", "status", "llama")
    assert (missing.code, missing.err) == (
        1,
        f"Error: namespace {admin.namespace} has no AdaptiveSpeculator llama; it has qwen\n",
    )
    store(api, admin.namespace, SPECULATORS, objects.speculator("gemma"))
    several = admin("updraft", "unpin")
    assert several.err == (
        f"Error: namespace {admin.namespace} has more than one AdaptiveSpeculator, name one: gemma, qwen\n"
    )
    rows = [line.split()[0] for line in admin("updraft", "status").out.splitlines()]
    assert rows == ["name", "gemma", "qwen"]


def test_a_namespace_without_a_speculator_is_told(admin: Kubectl) -> None:
    assert admin("updraft", "explain").err == f"Error: namespace {admin.namespace} has no AdaptiveSpeculator\n"
    assert admin("updraft", "status").out == f"There is no AdaptiveSpeculator in namespace {admin.namespace}.\n"


def test_a_watch_tells_what_changes_until_it_is_interrupted(
    admin: Kubectl, qwen: Callable[[], Json], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    with told.open("w") as out:
        command = admin.command("updraft", "status", "qwen", "--watch")
        watching = subprocess.Popen(command, env=admin.environment, stdout=out, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: told.read_text().count("\n") == 1, what="the first line")
        assert admin("updraft", "pause", "qwen").code == 0
        wait_until(lambda: told.read_text().count("\n") == 2, what="the line of the change")
    finally:
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (130, b"")
    assert "before the last change of the spec" in told.read_text().splitlines()[1]


def test_kubectl_completes_commands_names_and_versions(admin: Kubectl, qwen: Callable[[], Json]) -> None:
    def offered(*words: str) -> list[str]:
        lines = admin("__complete", "updraft", *words).out.splitlines()
        return [line.partition("\t")[0] for line in lines if not line.startswith(":")]

    assert offered("draft", "un") == ["unpin"]
    assert offered("status", "-n", admin.namespace, "") == ["qwen"]
    assert offered("draft", "pin", "-n", admin.namespace, "qwen", "") == ["4", "3", "2", "1", *ROLES]


def test_credentials_come_from_a_plugin_of_the_kubeconfig(
    as_user: Callable[[Path], Kubectl], kubernetes: ControlPlane, qwen: Callable[[], Json], tmp_path: Path
) -> None:
    config = yaml.safe_load(kubernetes.kubeconfig.read_text())
    kind = "client.authentication.k8s.io/v1"
    credential = {
        "apiVersion": kind,
        "kind": "ExecCredential",
        "status": {"token": config["users"][0]["user"]["token"]},
    }
    helper = tmp_path / "credential"
    helper.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(credential)}\nEND\n")
    helper.chmod(0o755)
    config["users"][0]["user"] = {"exec": {"apiVersion": kind, "command": str(helper), "interactiveMode": "Never"}}
    kubeconfig = tmp_path / "exec.kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    assert as_user(kubeconfig)("updraft", "status", "-o", "name").out == "adaptivespeculator.updraft.dev/qwen\n"


def test_a_cluster_without_our_kinds_and_one_that_does_not_know_us_are_told(
    as_user: Callable[[Path], Kubectl], tmp_path: Path
) -> None:
    with control_plane() as bare:
        told = as_user(bare.kubeconfig)("updraft", "status")
        config = yaml.safe_load(bare.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": "of-nobody"}
        kubeconfig = tmp_path / "nobody.kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(config))
        unknown = as_user(kubeconfig)("updraft", "status")
    server = config["clusters"][0]["cluster"]["server"]
    assert (told.code, unknown.code) == (1, 1)
    assert (
        told.err
        == f"Error: the cluster at {server} has no kinds of updraft.dev/v1alpha1: install Updraft's chart first\n"
    )
    assert unknown.err == f"Error: the API server at {server} refuses your credentials: Unauthorized\n"
