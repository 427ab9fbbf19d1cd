"""DraftImports, on a real API server with Kubernetes' controllers, a real registry and the import's own command."""

import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from tests.cluster.access import Json
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.imports import (
    apply_import,
    as_the_job,
    command,
    ended,
    fail,
    job_pod,
    refused_as_the_job,
)
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject
from tests.support.checkpoints import CONFIG, draft
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_operator.api import names
from updraft_operator.watching.cluster import KINDS


@pytest.fixture(scope="module")
def settings(registry: RegistryProcess) -> dict[str, object]:
    return {"registry_address": registry.address}


@pytest.fixture
def connected(operator: Running, subject: Subject) -> Subject:
    """A speculator whose registry is heard, with nothing published."""
    start(subject)
    return subject


def start(subject: Subject) -> None:
    subject.create(rollout={"strategy": "Immediate"})
    subject.wait_until_built()
    subject.run(names.REGISTRY)
    subject.wait_for("RegistryReady", "True", "Connected")


def conditions(subject: Subject, name: str) -> dict[str, Json]:
    return {each["type"]: each for each in subject.get("DraftImport", name).get("status", {}).get("conditions", ())}


def wait_for_reason(subject: Subject, name: str, reason: str) -> Json:
    """Return the Ready condition of a DraftImport once it has this reason."""
    wait_until(lambda: conditions(subject, name)["Ready"]["reason"] == reason, what=f"{reason} of {name}")
    return conditions(subject, name)["Ready"]


def are_complete(subject: Subject) -> bool:
    found = ({each["type"] for each in job["status"].get("conditions", ())} for job in subject.all_of("Job"))
    return all("Complete" in types for types in found)


def folder_of(tmp_path: Path, speculator: str) -> Path:
    """A draft as `updraft draft pull` leaves it."""
    weights = draft(seed=9)
    (tmp_path / "model.safetensors").write_bytes(weights.data)
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "manifest.json").write_text(json_format.MessageToJson(weights.manifest(speculator)))
    return tmp_path


def test_a_draft_becomes_a_version_that_outlives_its_import(
    operator: Running, connected: Subject, shelf: Shelf, registry: RegistryProcess, tmp_path: Path
) -> None:
    made = apply_import(connected, "mine", digest=draft(seed=9).digest, secretRef={"name": "lab"})
    pod = job_pod(connected)
    (job,) = connected.all_of("Job")
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("DraftImport", made["metadata"]["uid"])
    assert pod["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "lab"}}]
    wait_for_reason(connected, "mine", "Importing")

    result = as_the_job(command(pod), registry, folder_of(tmp_path, connected.name))
    connected.set_pod(pod["metadata"]["name"], ended(pod, result))

    words = ("wait", "--for=condition=Ready", "dimp/mine", "-n", connected.namespace, "--timeout=60s")
    operator.cluster.kubectl(*words)
    status = connected.get("DraftImport", "mine")["status"]
    assert (status["version"], status["digest"]) == (1, shelf.versions()[1].manifest.digest)
    name = f"{connected.name}-v1"
    wait_until(
        lambda: connected.get("DraftVersion", name)["status"].get("draftImportName") == "mine", what="the version"
    )
    version = connected.get("DraftVersion", name)
    assert (version["spec"]["source"], version["spec"]["version"]) == ("Imported", 1)

    connected.api.delete(connected.path("DraftImport", "mine"))
    wait_until(lambda: not connected.all_of("Job"), what="the end of its Job")
    operator.wait_for_listings(1)
    kept = connected.get("DraftVersion", name)
    assert (kept["metadata"]["uid"], kept["status"]["draftImportName"]) == (version["metadata"]["uid"], "mine")
    assert not shelf.versions()[1].pruned


def test_a_refused_draft_is_tried_again_only_when_the_spec_changes(
    operator: Running, connected: Subject, shelf: Shelf, registry: RegistryProcess, tmp_path: Path
) -> None:
    apply_import(connected, "mine")
    pod = job_pod(connected)
    folder = folder_of(tmp_path, connected.name)
    (folder / "config.json").write_text("no JSON")
    fail(connected, pod, refused_as_the_job(command(pod), registry, folder))

    message = wait_for_reason(connected, "mine", "ImportFailed")["message"]
    assert "config.json" in message
    assert conditions(connected, "mine")["Stalled"]["status"] == "True"
    first = connected.get("DraftImport", "mine")
    operator.wait_for_listings(2)
    assert connected.get("DraftImport", "mine") == first
    assert (len(connected.all_of("Job")), shelf.versions()) == (1, {})

    connected.api.patch(connected.path("DraftImport", "mine"), {"spec": {"secretRef": {"name": "lab"}}})
    pod = job_pod(connected)
    (owner,) = pod["metadata"]["ownerReferences"]
    wait_until(lambda: len(connected.all_of("Job")) == 1, what="the end of the Job of before")
    assert connected.all_of("Job")[0]["metadata"]["name"] == owner["name"]
    connected.set_pod(
        pod["metadata"]["name"],
        ended(pod, as_the_job(command(pod), registry, folder_of(tmp_path, connected.name))),
    )
    wait_for_reason(connected, "mine", "Imported")
    assert conditions(connected, "mine").keys() == {"Ready"}
    assert connected.get("DraftImport", "mine")["status"]["version"] == 1


def test_an_operator_that_is_killed_before_it_writes_the_number_imports_nothing_twice(
    operator: Running, connected: Subject, shelf: Shelf, registry: RegistryProcess, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, connected.name)
    for name, is_lost in (("kept", False), ("lost", True)):
        apply_import(connected, name)
        pod = job_pod(connected)
        operator.process.kill()
        try:
            result = as_the_job(command(pod), registry, folder)
            connected.set_pod(pod["metadata"]["name"], ended(pod, result))
            if is_lost:  # its node, for instance
                wait_until(lambda: are_complete(connected), what="a Job that is complete")
                connected.api.delete(connected.path("Pod", pod["metadata"]["name"]))
                wait_until(lambda: len(connected.pods(names.IMPORT)) == 1, what="the end of its pod")
        finally:
            operator.process.start()
            operator.process.wait_until_ready()
        if is_lost:
            again = job_pod(connected)
            connected.set_pod(again["metadata"]["name"], ended(again, as_the_job(command(again), registry, folder)))
        wait_for_reason(connected, name, "Imported")

    numbers = [connected.get("DraftImport", name)["status"]["version"] for name in ("kept", "lost")]
    assert numbers == [1, 1], "the same weights are the same version"
    assert shelf.versions().keys() == {1}
    assert json.loads(result)["version"] == 1
    wait_until(lambda: len(connected.all_of("DraftVersion")) == 1, what="one object")
    wait_until(
        lambda: connected.all_of("DraftVersion")[0]["status"].get("draftImportName") == "kept", what="the first import"
    )


def test_an_import_waits_for_its_speculator(operator: Running, subject: Subject) -> None:
    apply_import(subject, "early")
    message = wait_for_reason(subject, "early", "SpeculatorNotFound")["message"]
    assert message == f"AdaptiveSpeculator {subject.name} does not exist in this namespace"
    assert subject.all_of("Job") == []

    start(subject)

    job_pod(subject)
    wait_for_reason(subject, "early", "Importing")


def test_a_version_that_a_person_made_goes_into_no_registry(operator: Running, subject: Subject) -> None:
    name = f"{subject.name}-v9"
    spec = {"speculatorRef": {"name": subject.name}, "source": "Trainer", "version": 9}
    body = {"apiVersion": names.API_VERSION, "kind": "DraftVersion", "metadata": {"name": name}, "spec": spec}
    subject.api.create(KINDS["DraftVersion"].path(subject.namespace), body)

    def told() -> dict[str, str]:
        found = subject.get("DraftVersion", name)["status"]["conditions"]
        return {each["type"]: each["reason"] for each in found}

    wait_until(lambda: told() == {"Ready": "SpeculatorNotFound", "Stalled": "SpeculatorNotFound"}, what="its status")
    start(subject)
    wait_until(lambda: not subject.exists("DraftVersion", name), what="the end of what no registry has")
