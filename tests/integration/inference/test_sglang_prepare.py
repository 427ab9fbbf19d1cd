"""`updraft-inference prepare-sglang`, as an init container runs it."""

import subprocess
import sys
from pathlib import Path

from tests.support.tiny_target import make_tiny_target

from updraft_inference.launch import admin_key


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "updraft_inference", *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_server_is_prepared_for_twice_with_the_pods_own_variables(tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target")
    arguments = [
        *("prepare-sglang", "--plugin-dir", str(tmp_path / "plugin"), "--seed", str(tmp_path / "seed")),
        *("--admin-key-file", str(tmp_path / "server.yaml")),
    ]
    variables = {
        "UPDRAFT_INFERENCE_MODEL": str(target),
        "UPDRAFT_INFERENCE_ENGINE": "sglang",
        "UPDRAFT_INFERENCE_DRAFT_VOCAB_SIZE": "64",
    }

    keys = set()
    for _ in range(2):
        done = run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        keys.add(admin_key.read(tmp_path / "server.yaml"))

    assert len(keys) == 1
    assert keys.pop() not in done.stderr

    assert (tmp_path / "seed" / "config.json").exists()
    assert (tmp_path / "plugin" / "updraft_sglang" / "plugin.py").exists()
    assert (tmp_path / "plugin" / "updraft_tap" / "channel.py").exists()


def test_a_model_that_cannot_have_a_draft_is_told_in_a_sentence(tmp_path: Path) -> None:
    done = run(
        "prepare-sglang",
        "--plugin-dir",
        str(tmp_path / "p"),
        "--seed",
        str(tmp_path / "s"),
        UPDRAFT_INFERENCE_MODEL=str(tmp_path),
    )

    assert done.returncode == 1
    assert "config.json does not exist" in done.stderr
    assert "Traceback" not in done.stderr
