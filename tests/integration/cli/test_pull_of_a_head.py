"""`updraft model pull --head-only`: embedding, head and final norm of a large model, from real servers with range support."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import obstore
import pytest
import torch
from obstore.store import from_url
from safetensors.torch import load_file
from tests.support import huge_checkpoint
from tests.support.hub_server import COMMIT, HubServer
from tests.support.huge_checkpoint import INDEX, SHARD_BYTES, VOCAB
from tests.support.published_targets import make
from tests.support.s3_server import MISSING, S3Server

from updraft_artifacts.model_folder import describe, target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import Corrupt
from updraft_cli.models.hub import HubSource
from updraft_cli.models.source import File, Listing
from updraft_draft.target_weights import read_head

HIDDEN = 128
TENSORS_BYTES = huge_checkpoint.tensors_bytes(HIDDEN)


def environment(endpoint: str, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}


def command(uri: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "updraft_cli", "model", "pull", uri, str(folder), "--head-only"]


def pull(endpoint: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("hf://org/public", folder),
        env=environment(endpoint, folder.parent / "home"),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def huge(tmp_path: Path) -> dict[str, bytes | Path]:
    return huge_checkpoint.make(tmp_path / "huge", HIDDEN)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def last(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]


def test_the_head_of_a_model_of_230_gb_costs_its_own_bytes(huge: dict[str, bytes | Path], tmp_path: Path) -> None:
    assert sum(one.stat().st_size for one in huge.values() if isinstance(one, Path)) >= 230e9
    with HubServer(huge) as hub:
        result = pull(hub.url, tmp_path / "head")
        assert result.returncode == 0, result.stderr
        assert hub.num_bytes <= 1.1 * TENSORS_BYTES
        fetched = hub.num_bytes
        assert pull(hub.url, tmp_path / "head").returncode == 0
        assert hub.num_bytes == fetched
    head = read_head(tmp_path / "head")
    assert head.embedding.shape == head.head.shape == (VOCAB, HIDDEN)
    assert head.config.draft_shape.intermediate_size == 3 * HIDDEN
    assert INDEX not in {path.name for path in (tmp_path / "head").iterdir()}


def test_a_model_of_230_gb_is_described_by_its_headers(huge: dict[str, bytes | Path], tmp_path: Path) -> None:
    with HubServer(huge) as hub:
        described = subprocess.run(
            [sys.executable, "-m", "updraft_cli", "model", "describe", "hf://org/public"],
            env=environment(hub.url, tmp_path / "home"),
            text=True,
            capture_output=True,
            timeout=120,
            check=True,
        )
        assert hub.num_bytes < 3_000_000
    assert "200,064 tokens" in described.stdout


def test_a_killed_download_goes_on_where_it_stopped(huge: dict[str, bytes | Path], tmp_path: Path) -> None:
    folder = tmp_path / "head"
    with HubServer(huge) as hub:
        hub.stops_after = TENSORS_BYTES // 2
        with subprocess.Popen(
            command("hf://org/public", folder), env=environment(hub.url, tmp_path / "home"), stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 60
            while not hub.waits():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)  # what has arrived is written
            process.send_signal(signal.SIGKILL)
        (part,) = (folder / ".updraft").glob("head-*.part")
        arrived = part.stat().st_size
        assert 0 < arrived < TENSORS_BYTES
        assert not (folder / "model.safetensors").exists()
        hub.stops_after, before = None, hub.num_bytes
        hub.ends.set()
        result = pull(hub.url, folder)
        assert result.returncode == 0, result.stderr
        assert hub.num_bytes - before <= 1.1 * TENSORS_BYTES - arrived
    assert load_file(folder / "model.safetensors").keys() == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    }
    assert not list((folder / ".updraft").glob("*.part"))


@pytest.mark.parametrize("name", ["kimi K2.5, INT4", "gemma 4", "deepseek V4"])
def test_a_head_is_that_of_the_whole_folder_and_of_the_same_target(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "whole")
    with HubServer(files_of(tmp_path / "whole")) as hub:
        result = pull(hub.url, tmp_path / "head")
    assert result.returncode == 0, result.stderr
    _assert_same(tmp_path / "whole", tmp_path / "head")


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_head_comes_from_a_bucket_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama 3, FP8", tmp_path / "whole")
    with S3Server(tmp_path / "s3") as server:
        for variable, value in server.environ.items():
            monkeypatch.setenv(variable, value)
        bucket = from_url("s3://drafts", client_options={"allow_http": True})
        for file, content in files_of(tmp_path / "whole").items():
            obstore.put(bucket, f"models/{file}", content)
        pulled = subprocess.run(
            command("s3://drafts/models", tmp_path / "head"), text=True, capture_output=True, timeout=120, check=False
        )
    assert pulled.returncode == 0, pulled.stderr
    _assert_same(tmp_path / "whole", tmp_path / "head")


@pytest.fixture
def glm(tmp_path: Path) -> Iterator[HubServer]:
    make("GLM 4.5", tmp_path / "whole")
    with HubServer(files_of(tmp_path / "whole")) as hub:
        yield hub


def test_a_truncated_shard_is_one_sentence(glm: HubServer, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    content = glm.files[name]
    assert isinstance(content, bytes)
    glm.files = {**glm.files, name: content[: len(content) // 2]}
    result = pull(glm.url, tmp_path / "head")
    assert result.returncode == 1
    assert last(result).startswith(f"Error: {name} of hf://org/public is truncated or damaged: it has ")


def test_a_missing_shard_and_a_server_without_ranges_are_one_sentence_each(glm: HubServer, tmp_path: Path) -> None:
    glm.has_ranges = False
    assert last(pull(glm.url, tmp_path / "head")) == (
        "Error: the server of hf://org/public sends whole files only: it does not support ranges"
    )
    glm.has_ranges = True
    glm.files = {name: one for name, one in glm.files.items() if "00001" not in name}
    assert "hf://org/public lacks model-00001-of-00002.safetensors" in last(pull(glm.url, tmp_path / "head"))


def test_a_server_that_sends_more_than_was_requested_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(SHARD_BYTES)
    with HubServer({"config.json": tmp_path / "endless"}) as hub:
        hub.has_ranges = False
        url = f"{hub.url}/org/public/resolve/{COMMIT}/config.json"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_args, **_options: url)
        config = File(name="config.json", size_bytes=10, tag="")
        with pytest.raises(Corrupt, match=r"sends more of config\.json than the requested 10 bytes"):
            HubSource("org/public").read(Listing(revision=COMMIT, files=(config,)), config, 0, 10)
        assert hub.num_bytes < 100_000_000


def test_a_folder_of_a_head_is_not_taken_for_the_whole_model(glm: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert pull(glm.url, folder).returncode == 0
    whole = subprocess.run(
        command("hf://org/public", folder)[:-1],
        env=environment(glm.url, tmp_path / "home"),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert whole.returncode == 1
    assert "holds the head of hf://org/public: name another folder" in last(whole)


def _assert_same(whole: Path, head: Path) -> None:
    assert target_fingerprint(head) == target_fingerprint(whole)
    assert tokenizer_fingerprint(head) == tokenizer_fingerprint(whole)
    ours, theirs = read_head(head), read_head(whole)
    for name in ("embedding", "head", "final_norm"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert describe(head).draft_shape == describe(whole).draft_shape
