"""A lineage that starts from a published draft, on a real API server with Kubernetes' controllers, a real registry and the
import's own command.

No engine runs: pods of SGLang are `sglang_pods`, which obey the registry and the template that their pod was made from.
"""

import json
from pathlib import Path

import pytest
import torch
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.imports import apply_import, as_the_job, command, ended, fail, job_pod, refused_as_the_job
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.sglang_pods import sglang_pods, sizes
from tests.cluster.operator.subject import Subject
from tests.support import families
from tests.support.published_drafts import DRAFT_VOCAB, SPECFORGE, VOCAB, Reference, write
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.model_folder import target_fingerprint
from updraft_operator.api import names

URI = "hf://org/eagle3"


@pytest.fixture(scope="module")
def settings(registry: RegistryProcess) -> dict[str, object]:
    return {"registry_address": registry.address}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    families.make("llama, untied, wide heads", folder)
    return folder


def published(folder: Path, *, vocab_size: int = DRAFT_VOCAB, scale: float = 1.0) -> Path:
    """A draft as SpecForge writes it, over the first `vocab_size` tokens of its vocabulary, with `scale` times its norm."""
    tensors = Reference(norm_before_residual=False).tensors("midlayer.")
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    kept[tensors["d2t"][:vocab_size] + torch.arange(vocab_size)] = True
    changed = {
        "d2t": tensors["d2t"][:vocab_size],
        "t2d": kept,
        "lm_head.weight": tensors["lm_head.weight"][:vocab_size],
        "norm.weight": scale * tensors["norm.weight"],
    }
    return write(folder, SPECFORGE | {"draft_vocab_size": vocab_size}, tensors | changed)


def start(subject: Subject, **spec: object) -> None:
    """A speculator that starts from a published draft, and whose registry is heard."""
    known = {"targetModel": {"uri": "hf://org/target"}, "draft": {"initial": {"uri": URI}}}
    subject.create(**known, rollout={"strategy": "Immediate"}, **spec)
    subject.wait_until_built()
    subject.run(names.REGISTRY)
    subject.wait_for("RegistryReady", "True", "Connected")


def bring(subject: Subject, registry: RegistryProcess, folder: Path, target: Path) -> str:
    """Run the import that waits for its pod, from this folder; return the uri that it was told."""
    pod = job_pod(subject)
    said = command(pod)
    uri = said[3]
    subject.set_pod(pod["metadata"]["name"], ended(pod, as_the_job(said, registry, folder, target=target)))
    return uri


def phase_and_import(subject: Subject) -> tuple[str | None, str | None]:
    """The phase and the import that the status of version 1 names so far, None if it does not."""
    status = subject.get("DraftVersion", f"{subject.name}-v1")["status"]
    return status.get("phase"), status.get("draftImportName")


def num_trainers(subject: Subject) -> int:
    return int(subject.get("Deployment", f"{subject.name}-trainer")["spec"]["replicas"])


def test_the_draft_of_the_spec_becomes_version_1_and_only_then_a_trainer_starts(
    operator: Running, subject: Subject, shelf: Shelf, registry: RegistryProcess, target: Path, tmp_path: Path
) -> None:
    start(subject)
    subject.run(names.SERVING)
    message = subject.wait_for("TrainerReady", "False", "WaitingForDraft")
    assert message == f"the trainer waits for the import of {URI}"
    assert (num_trainers(subject), subject.pods(names.TRAINER)) == (0, [])
    subject.wait_for("Available", "True", "PodsReady")  # serving does not wait for a draft

    assert bring(subject, registry, published(tmp_path / "theirs"), target) == URI

    wait_until(lambda: num_trainers(subject) == 1, what="the trainer")
    (imported,) = shelf.versions().values()
    assert (imported.version, imported.manifest.source) == (1, pb.SOURCE_IMPORTED)
    assert imported.manifest.target_fingerprint == target_fingerprint(target)
    assert json.loads(imported.manifest.config_json)["draft_vocab_size"] == DRAFT_VOCAB
    (draft_import,) = subject.all_of("DraftImport")
    assert draft_import["metadata"]["name"].startswith(f"{subject.name}-initial-")
    told = ("Stable", draft_import["metadata"]["name"])
    # The operator watches the registry and the import apart, so either may be known first.
    wait_until(lambda: phase_and_import(subject) == told, what="version 1 that serves and names its import")
    (object_,) = subject.all_of("DraftVersion")
    assert object_["spec"]["source"] == "Imported"
    wait_until(lambda: subject.condition("TrainerReady")[1] != "WaitingForDraft", what="the end of the wait")


def test_a_draft_for_another_target_fails_as_an_import_and_nothing_else_does(
    operator: Running, subject: Subject, shelf: Shelf, registry: RegistryProcess, target: Path, tmp_path: Path
) -> None:
    start(subject)
    subject.run(names.SERVING)
    pod = job_pod(subject)
    folder = published(tmp_path / "theirs")
    (folder / "config.json").write_text(json.dumps(SPECFORGE | {"vocab_size": 600}))

    fail(subject, pod, refused_as_the_job(command(pod), registry, folder, target=target))

    wait_until(lambda: "failed" in subject.conditions()["TrainerReady"]["message"], what="the reason")
    message = subject.conditions()["TrainerReady"]["message"]
    assert message.startswith(f"the import of {URI} failed, so there is no draft to start from: ")
    assert "its vocabulary is 600, the target's is 512" in message
    assert (num_trainers(subject), shelf.versions()) == (0, {})
    subject.wait_for("Available", "True", "PodsReady")


def test_sglang_pods_restart_one_after_the_other_into_a_lineage_of_another_shape(
    operator: Running, subject: Subject, shelf: Shelf, registry: RegistryProcess, target: Path, tmp_path: Path
) -> None:
    start(subject, engine={"type": "SGLang"}, serving={"replicas": 3})
    with sglang_pods(subject, shelf, target_fingerprint(target)) as pods:
        wait_until(lambda: pods.num_ready[-1:] == [3], what="three pods")
        assert pods.now == ["", "", ""], "the sizes of the spec"
        subject.wait_for("Available", "True", "PodsReady")

        bring(subject, registry, published(tmp_path / "first"), target)
        wait_until_serving(shelf, version=1)
        assert [sizes(each) for each in pods.now] == [(64, DRAFT_VOCAB, 80)] * 3
        assert len(pods.built_for) == 6, "each pod was replaced once"

        before = dict(pods.built_for)
        apply_import(subject, f"{subject.name}-same-shape")
        bring(subject, registry, published(tmp_path / "second", scale=0.5), target)
        subject.change(rollout={"promotedVersion": 2})  # nobody has evaluated it against the version before
        wait_until_serving(shelf, version=2)
        assert pods.built_for == before, "a draft of the same shape restarts nothing"

        apply_import(subject, f"{subject.name}-fewer-tokens")
        bring(subject, registry, published(tmp_path / "third", vocab_size=50), target)
        subject.change(rollout={"promotedVersion": 3})
        wait_until_serving(shelf, version=3)
        assert [sizes(each) for each in pods.now] == [(64, 50, 80)] * 3
        assert len(pods.built_for) == 9
        subject.wait_for("Available", "True", "PodsReady")
    assert ("False", "RollingOut") in pods.conditions, "the operator shows it"
    started = pods.num_ready[pods.num_ready.index(3) :]
    assert min(started) == 2, "and no two pods were away at once"


def wait_until_serving(shelf: Shelf, *, version: int) -> None:
    """Until the three pods have proved that they serve it."""

    def is_served() -> bool:
        state = shelf.state()
        return (state.stable, state.pods.serving_stable, state.pods.connected) == (version, 3, 3)

    try:
        wait_until(is_served, timeout_s=60)
    except TimeoutError:
        raise AssertionError(f"no three pods serve version {version}, but {shelf.state()}") from None
