"""`make` takes the newest Python that runs, says what is missing if none does, and repairs an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
REAL = f'exec {sys.executable} "$@"'
SHIM = 'echo "pyenv: command not found" >&2; exit 127'
NO_VENV = 'case "$*" in *ensurepip*) exit 1;; esac'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with nothing but what `make install` looks at first."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str, **scripts: str) -> "subprocess.CompletedProcess[str]":
    """Run it with these interpreters and other programs alone on the PATH."""
    programs = folder / "bin"
    programs.mkdir()
    for program in ("bash", "cat", "cut", "sha256sum", "mkdir"):
        (programs / program).symlink_to(shutil.which(program) or "")
    for word, script in scripts.items():
        executable = programs / word.replace("_", ".")
        executable.write_text(f"#!/bin/sh\n{script}\n")
        executable.chmod(0o755)
    command = [shutil.which("make") or "make", f"CACHE={folder / 'cache'}", *words]
    return subprocess.run(command, cwd=folder, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        ({"python3_11": REAL, "python3_12": REAL, "python3_13": REAL}, "python3.13"),
        ({"python3_11": REAL, "python3_12": REAL, "python3_13": SHIM}, "python3.12"),
        ({"python3_11": REAL, "python3_12": SHIM, "python3_13": NO_VENV}, "python3.11"),
        ({"python3_11": REAL, "python3_14": REAL}, "python3.11"),
        ({"python3_10": REAL}, ""),
    ],
)
def test_the_newest_python_that_runs_is_taken(folder: Path, pythons: dict[str, str], expected: str) -> None:
    result = make(folder, "--eval=show: ; @echo [$(PYTHON)]", "show", **pythons)
    assert result.stdout == f"[{expected}]\n", result.stderr


@pytest.mark.parametrize("words", [(), ("PYTHON=/no/such/python",), ("PYTHON=python3.10",)])
def test_without_a_python_that_will_do_a_sentence_says_which_are_needed(folder: Path, words: tuple[str, ...]) -> None:
    result = make(folder, "install", *words, python3_10=SHIM)
    assert result.returncode != 0
    assert result.stdout == (
        "Updraft needs Python 3.11, 3.12 or 3.13 with its venv module. Install one, or run: make PYTHON=/path/to/python3\n"
    )
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize(
    ("verb", "programs", "libraries", "is_repeated"),
    [
        pytest.param("install", {"npm": "exit 1"}, [], True, id="npm came later"),
        pytest.param("browser", {"npm": "exit 1"}, [], True, id="npm came later, and a browser is wanted"),
        pytest.param("install", {"npm": "exit 1"}, ["lock.sha256"], False, id="complete"),
        pytest.param("install", {}, [], False, id="no npm"),
        pytest.param("type", {"npm": "exit 1"}, [], False, id="npm may fail, and then every verb would wait for it"),
    ],
)
def test_an_installation_without_the_consoles_libraries_is_repeated_once_there_is_npm(
    folder: Path, verb: str, programs: dict[str, str], libraries: list[str], *, is_repeated: bool
) -> None:
    vendor = "cli/updraft_cli/ui/static/vendor"
    older = [
        "cache/deps-k/ready",
        ".venv/k",
        "hatch_build.py",
        "cli/package-lock.json",
        *(f"{vendor}/{x}" for x in libraries),
    ]
    for seconds, name in enumerate(["constraints.txt", "pyproject.toml", *older, ".venv/ready"], start=1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    result = make(folder, "--dry-run", "KEY=k", verb, python3_11=REAL, **programs)
    assert result.returncode == 0, result.stderr
    assert ("pip install" in result.stdout) is is_repeated, result.stdout
