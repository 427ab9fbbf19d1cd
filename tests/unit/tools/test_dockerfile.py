"""The Dockerfile builds on a base image that is named by its digest, or says how to name one."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TAG = "python:3.11-slim-bookworm"


def check(**arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the Dockerfile that refuses a base without a digest, with these build arguments."""
    (command,) = re.findall(
        r"^RUN (case \"\$PYTHON\".*?esac)$", (ROOT / "Dockerfile").read_text(), re.DOTALL | re.MULTILINE
    )
    return subprocess.run(["/bin/sh", "-ec", command], env=arguments, capture_output=True, text=True, check=False)


@pytest.mark.attack(
    boundary="images",
    attack="a base image that was exchanged behind its tag",
    outcome="the build refuses a base without a digest, unless told to take it",
)
def test_a_base_image_without_a_digest_is_refused_with_the_command_that_finds_it() -> None:
    refused = check(PYTHON=TAG, UNPINNED="no")

    assert refused.returncode == 1
    assert f"skopeo inspect --format '{{{{.Name}}}}@{{{{.Digest}}}}' docker://{TAG}" in refused.stderr
    assert "--build-arg PYTHON=IMAGE@DIGEST" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"PYTHON": f"{TAG}@sha256:{'0' * 64}", "UNPINNED": "no"}, id="pinned"),
        pytest.param({"PYTHON": TAG, "UNPINNED": "yes"}, id="as it is today"),
    ],
)
def test_a_pinned_base_or_one_that_is_wanted_as_it_is_today_is_taken(arguments: dict[str, str]) -> None:
    taken = check(**arguments)
    assert (taken.returncode, taken.stderr) == (0, "")


def test_the_default_is_not_to_take_an_unpinned_base() -> None:
    assert "ARG UNPINNED=no\n" in (ROOT / "Dockerfile").read_text()
