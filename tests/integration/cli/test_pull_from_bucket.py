"""`updraft model pull s3://...` and `updraft draft import s3://...` from a real S3 server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from google.protobuf import json_format
from obstore.store import from_url
from tests.integration.cli.conftest import Run
from tests.support import checkpoints
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.s3_server import MISSING, S3Server

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

WEIGHTS = os.urandom(40_000_000)
"""More than two ranges, and no whole number of them."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server whose address and keys are in the environment, with a model at s3://drafts/models/one."""
    with S3Server(tmp_path / "s3") as started:
        for name, value in started.environ.items():
            monkeypatch.setenv(name, value)
        _put("models/one", {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"not taken"})
        _put("models/one/onnx", {"model.onnx": b"not taken"})
        _put("models/none", {"README.md": b"nothing else"})
        yield started


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """An empty registry."""
    port = free_port()
    variables = {
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
        "UPDRAFT_REGISTRY_DATA_DIR": str(tmp_path / "data"),
    }
    with Process("updraft_registry", variables, tmp_path / "log") as process:
        process.wait_for_log("Registry serves")
        yield f"127.0.0.1:{port}"


@pytest.fixture
def draft(server: S3Server) -> str:
    """The digest of a draft at s3://drafts/imports/first, as `draft pull` would have left it."""
    checkpoint = checkpoints.draft(1)
    files = {"config.json": checkpoints.CONFIG.encode(), "model.safetensors": checkpoint.data}
    _put("imports/first", {**files, "manifest.json": json_format.MessageToJson(checkpoint.manifest()).encode()})
    return checkpoint.digest


def test_a_model_arrives_whole_and_then_needs_no_server(run: Run, server: S3Server, tmp_path: Path) -> None:
    result = run("model", "pull", "s3://drafts/models/one", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'model'}\n"), result.output
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS
    assert {path.name for path in (tmp_path / "model").iterdir()} == {".updraft", "config.json", "model.safetensors"}
    assert "s3://drafts/models/one: model.safetensors, 40.0 MB of 40.0 MB" in result.stderr
    server.kill()
    assert run("model", "pull", "s3://drafts/models/one", tmp_path / "model").exit_code == 0


@pytest.mark.attack(boundary="models", attack="reading the bucket's key from an error", outcome="it is not in it")
@pytest.mark.usefixtures("server")
def test_wrong_keys_are_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-one")
    result = run("model", "pull", "s3://drafts/models/one", tmp_path / "model")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: cannot read s3://drafts/models/one: SignatureDoesNotMatch")
    assert "a-wrong-one" not in result.output


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        pytest.param("s3://drafts/models/two", "it holds no file", id="no such prefix"),
        pytest.param("s3://drafts/models/none", "it holds README.md", id="no model"),
        pytest.param("s3://nobucket/models/one", "NoSuchBucket", id="no such bucket"),
    ],
)
def test_what_is_not_there_is_one_sentence(run: Run, tmp_path: Path, uri: str, sentence: str) -> None:
    result = run("model", "pull", uri, tmp_path / "model")
    assert result.exit_code == 1
    assert sentence in result.stderr.splitlines()[-1]
    assert result.stderr.count("Error: ") == 1


def test_a_server_that_is_away_is_one_sentence(run: Run, server: S3Server, tmp_path: Path) -> None:
    server.kill()
    result = run("model", "pull", "s3://drafts/models/one", tmp_path / "model")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: cannot read s3://drafts/models/one: ")


def test_what_is_mounted_is_refused_with_what_can_be_pulled(run: Run, tmp_path: Path) -> None:
    result = run("model", "pull", "pvc://models/one", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "Error: pvc://models/one is a mounted volume or a local path, which needs no download: use hf://ORG"
    )


def test_a_draft_is_imported_from_its_address_as_a_version_that_is_told(run: Run, draft: str, address: str) -> None:
    arguments = ("draft", "import", "s3://drafts/imports/first", "--registry", address, "-o", "json")
    result = run(*arguments, "--digest", draft)
    assert result.exit_code == 0, result.output
    imported = json.loads(result.stdout)
    assert (imported["draft"]["version"], imported["draft"]["digest"], imported["existed"]) == (1, draft, False)
    again = json.loads(run(*arguments).stdout)
    assert (again["draft"]["version"], again["existed"]) == (1, True)


@pytest.mark.attack(
    boundary="models",
    attack="a bucket whose draft was exchanged",
    outcome="refused if the digest was given",
)
@pytest.mark.usefixtures("draft")
def test_a_draft_with_other_bytes_than_asked_for_is_refused(run: Run, address: str) -> None:
    other = f"sha256:{'0' * 64}"
    arguments = ("draft", "import", "s3://drafts/imports/first", "--registry", address)
    result = run(*arguments, "--digest", other)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: the weights of s3://drafts/imports/first are sha256:")
    assert last.endswith(f"expected {other}")
    assert run("draft", "list", "--registry", address).output.startswith("No drafts of default yet.")


def _put(prefix: str, files: dict[str, bytes]) -> None:
    bucket = from_url("s3://drafts", client_options={"allow_http": True})
    for name, content in files.items():
        obstore.put(bucket, f"{prefix}/{name}", content)
