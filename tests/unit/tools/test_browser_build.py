"""`make test-browser` installs no packages of the system unasked, and fails nothing where a browser cannot be had."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.browser import build

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may use apt-get")


@pytest.fixture
def apt_calls(tmp_path: Path) -> Path:
    """A machine without Chromium, whose apt-get reaches nothing; this is the log of its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("timeout", "bash"):
        (programs / name).symlink_to(shutil.which(name) or "")
    log = tmp_path / "apt.log"
    log.touch()
    (programs / "apt-get").write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {log}; echo "no route to the mirror" >&2; exit 100\n'
    )
    (programs / "apt-get").chmod(0o755)
    return log


def run_build(machine: Path, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": str(machine / "bin"), "HOME": str(machine), **environ}
    command = [sys.executable, "-m", "tests.browser.build", *words]
    return subprocess.run(command, cwd=build.ROOT, env=environ, capture_output=True, text=True, check=False)


def test_a_run_of_tests_uses_no_apt_get_and_names_the_command(apt_calls: Path) -> None:
    result = run_build(apt_calls.parent, "--for-tests")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Tests in a browser are skipped: Chromium and its driver are missing; ")
    assert "make browser" in result.stdout or "apt-get install chromium" in result.stdout
    assert apt_calls.read_text() == ""


@needs_root
@pytest.mark.parametrize("variable", build.ALLOWED_BY)
def test_ci_may_use_it_and_goes_on_where_it_fails(apt_calls: Path, variable: str) -> None:
    result = run_build(apt_calls.parent, "--for-tests", **{variable: "1"})
    assert result.returncode == 0, result.stderr
    assert "Tests in a browser are skipped: `apt-get " in result.stdout
    assert "failed: no route to the mirror" in result.stdout
    assert len(apt_calls.read_text().splitlines()) == 1


@needs_root
def test_who_asks_for_a_browser_is_told_why_there_is_none(apt_calls: Path) -> None:
    result = run_build(apt_calls.parent)
    assert result.returncode == 1
    assert "failed: no route to the mirror" in result.stderr


def test_a_command_that_hangs_is_ended_with_all_that_it_started() -> None:
    with pytest.raises(build.BuildError, match=r"did not end within 1 seconds$"):
        build.run("bash", "-c", "sleep 3600 & wait", limit_s=1)


def test_a_command_that_fails_is_named_with_its_reason() -> None:
    with pytest.raises(build.BuildError, match=r"^`bash -c echo why >&2; exit 3` failed: why$"):
        build.run("bash", "-c", "echo why >&2; exit 3")
