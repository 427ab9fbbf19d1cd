"""`updraft model pull hf://...` with the hub's own library, against a server that speaks the hub's protocol."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hub_server import COMMIT, TOKEN, HubServer
from tests.support.ports import free_port

FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": os.urandom(3_000_000),
    "model-00002-of-00002.safetensors": os.urandom(100),
    "tokenizer.json": b"{}",
    "README.md": b"not taken",
    "pytorch_model.bin": b"not taken either",
}
TAKEN = {name for name in FILES if name not in {"README.md", "pytorch_model.bin"}}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(dict(FILES)) as server:
        yield server


def pull(endpoint: str, *arguments: str | Path, token: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own, for the library reads its settings once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = Path(arguments[1]).parent / "home"
    return subprocess.run(
        [sys.executable, "-m", "updraft_cli", "model", "pull", *arguments],
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **({"HF_TOKEN": token} if token else {})},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".updraft"}


def test_a_model_arrives_whole_and_a_second_pull_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    result = pull(hub.url, "hf://org/public", folder)
    assert (result.returncode, result.stdout) == (0, f"{folder}\n"), result.stderr
    assert names(folder) == TAKEN
    assert all((folder / name).read_bytes() == FILES[name] for name in TAKEN)
    assert "hf://org/public: model-00001-of-00002.safetensors" in result.stderr
    assert f'"revision": "{COMMIT}"' in (folder / ".updraft" / "pull.json").read_text()
    assert pull(f"http://127.0.0.1:{free_port()}", "hf://org/public", folder).returncode == 0


def test_a_pull_that_failed_goes_on_with_what_is_missing(hub: HubServer, tmp_path: Path) -> None:
    hub.fails_at = "model-00002-of-00002.safetensors"
    failed = pull(hub.url, "hf://org/public", tmp_path / "model")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("Error: cannot read hf://org/public: ")
    hub.fails_at = ""
    hub.asked.clear()
    assert pull(hub.url, "hf://org/public", tmp_path / "model").returncode == 0
    assert "model-00002-of-00002.safetensors" in hub.asked
    assert "model-00001-of-00002.safetensors" not in hub.asked
    assert names(tmp_path / "model") == TAKEN


def test_a_tag_is_pulled_and_one_that_is_not_there_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    assert pull(hub.url, "hf://org/public", tmp_path / "tag", "--revision", "v1").returncode == 0
    result = pull(hub.url, "hf://org/public@v9", tmp_path / "none")
    assert (result.returncode, last(result)) == (1, "Error: hf://org/public has no revision v9")


def test_a_gated_model_opens_with_a_token_only(hub: HubServer, tmp_path: Path) -> None:
    refused = pull(hub.url, "hf://org/gated", tmp_path / "model")
    assert refused.returncode == 1
    assert last(refused).startswith("Error: hf://org/gated is gated: accept its terms")
    opened = pull(hub.url, "hf://org/gated", tmp_path / "model", token=TOKEN)
    assert opened.returncode == 0, opened.stderr
    assert TOKEN not in opened.stderr


def test_a_model_that_is_not_there_and_a_hub_that_is_away_are_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    unknown = pull(hub.url, "hf://org/unknown", tmp_path / "model")
    assert (unknown.returncode, last(unknown)[:50]) == (1, "Error: hf://org/unknown does not exist or is private"[:50])
    away = pull(f"http://127.0.0.1:{free_port()}", "hf://org/public", tmp_path / "model")
    assert (away.returncode, last(away)[:41]) == (1, "Error: cannot read hf://org/public: [Errn")
    assert away.stderr.count("Error") == 1


def last(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]
