"""`updraft draft` against a real registry."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.cli.conftest import Run
from tests.support import checkpoints
from tests.support.ports import free_port
from tests.support.processes import Process

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import transfer
from updraft_artifacts.digests import file_digest
from updraft_chassis import rpc


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with three versions of `default`, of which the third lost, and nothing of anybody else."""
    folder = tmp_path_factory.mktemp("registry")
    port = free_port()
    variables = {
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
        "UPDRAFT_REGISTRY_STRATEGY": "Immediate",
        "UPDRAFT_REGISTRY_DATA_DIR": str(folder / "data"),
    }
    with Process("updraft_registry", variables, folder / "log") as process:
        process.wait_for_log("Registry serves")
        asyncio.run(_publish(f"127.0.0.1:{port}", folder))
        yield f"127.0.0.1:{port}"


def test_the_list_shows_every_version_newest_first_with_its_phase_and_reason(run: Run, address: str) -> None:
    result = run("draft", "list", "--registry", address)
    assert result.exit_code == 0
    header, third, second, first = result.output.splitlines()
    assert header.split()[:2] == ["version", "phase"]
    assert third.split()[:2] == ["3", "rejected"]
    assert second.split()[:2] == ["2", "stable"]
    assert first.split()[:2] == ["1", "superseded"]
    assert "version 2 took over" in first


def test_the_list_as_json_is_for_programs(run: Run, address: str) -> None:
    listing = json.loads(run("draft", "list", "-o", "json", "--registry", address).output)
    assert listing["stable"] == 2
    assert [(draft["version"], draft["phase"]) for draft in listing["drafts"]] == [
        (3, "rejected"),
        (2, "stable"),
        (1, "superseded"),
    ]


def test_show_tells_origin_judgement_history_and_tensors(run: Run, address: str) -> None:
    output = run("draft", "show", "2", "--registry", address).output
    assert "from version 1, 40 samples, step 7" in output
    assert re.search(r"[23]\.\d\d tokens per step, [12]\.\d\d with version 1 \(12 held-out requests", output)
    assert "not served by the pods that are connected now" in output
    assert "stable" in output
    assert "fc.weight" in output
    details = json.loads(run("draft", "show", "2", "-o", "json", "--registry", address).output)
    assert [event["phase"] for event in details["history"]][:2] == ["pending", "stable"]
    assert details["draft"]["source"] == "trainer"
    assert {tensor["name"] for tensor in details["tensors"]} == {"d2t", "fc.weight", "norm.weight", "t2d"}


def test_pin_and_unpin_change_what_serves(run: Run, address: str) -> None:
    pinned = run("draft", "pin", "1", "--reason", "a test wants it", "--registry", address)
    assert pinned.output.startswith("Version 1 is pinned for default: version 1 is stable")
    assert "stable, pinned" in run("draft", "list", "--registry", address).output
    unpinned = run("draft", "unpin", "--registry", address)
    assert unpinned.output.startswith("Nothing is pinned for default: version 2 is stable")


def test_pull_writes_a_verified_folder_and_prints_it(run: Run, address: str, tmp_path: Path) -> None:
    result = run("draft", "pull", "2", tmp_path, "--registry", address)
    folder = Path(result.output.strip())
    assert folder == tmp_path / "2"
    assert file_digest(folder / "model.safetensors") == checkpoints.draft(2).digest
    assert (folder / "config.json").read_text() == checkpoints.CONFIG


def test_a_version_that_does_not_exist_is_one_sentence_and_exit_code_1(run: Run, address: str) -> None:
    result = run("draft", "show", "9", "--registry", address)
    assert result.exit_code == 1
    assert result.output == "Error: default has no version 9; its newest is 3\n"


def test_pinning_a_version_that_does_not_exist_is_refused(run: Run, address: str) -> None:
    result = run("draft", "pin", "9", "--registry", address)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(run: Run, address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("draft", "pull", "2", tmp_path / "file" / "here", "--registry", address)
    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot write to ")


def test_a_speculator_without_drafts_has_an_empty_list(run: Run, address: str) -> None:
    result = run("draft", "list", "--speculator", "other", "--registry", address)
    assert result.exit_code == 0
    assert result.output.startswith("No drafts of other yet.")


def test_a_registry_that_is_away_is_one_sentence(run: Run) -> None:
    result = run("draft", "list", "--registry", f"127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "start one with `updraft up`, or name another one with --registry" in result.output


def test_status_of_a_registry_alone_tells_what_does_not_answer(run: Run, address: str) -> None:
    inference = f"http://127.0.0.1:{free_port()}"
    result = run("status", "--registry", address, "--inference", inference)
    assert result.exit_code == 0
    assert "speculator default\nstable   version 2\n" in result.output
    assert "pods     none is connected" in result.output
    assert "inference\n  does not answer" in result.output


def test_status_of_nothing_is_one_sentence(run: Run) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    result = run("status", "--registry", nobody, "--inference", f"http://{nobody}")
    assert result.exit_code == 1
    assert "start everything with `updraft up`" in result.output


async def _publish(address: str, folder: Path) -> None:
    async with rpc.channel(address) as channel:
        for version, gain in ((1, 2.0), (2, 1.5), (3, 0.9)):
            checkpoint = checkpoints.draft(version)
            path = folder / f"{version}.safetensors"
            path.write_bytes(checkpoint.data)
            manifest = checkpoint.manifest(
                source=pb.SOURCE_TRAINER,
                parent_version=version - 1,
                provenance=pb.Provenance(samples=20 * version, step=7),
                evaluation=checkpoints.evaluation(baseline=version - 1, gain=gain),
            )
            await transfer.upload(RegistryStub(channel), manifest, path)
