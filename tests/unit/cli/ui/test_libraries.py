"""The libraries of the console's pages come from npm's lock into the wheel, and an install without npm works."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hatch_build
import pytest
from hatch_build import PACKAGE, STAMP, VENDOR, VENDORED

CHECKOUT = Path(hatch_build.__file__).parent
LOCK = json.loads((CHECKOUT / PACKAGE / "package-lock.json").read_text())

FAKE_NPM = """#!/bin/bash
echo "$*" >> {log}
for file in {files}; do mkdir -p "node_modules/$(dirname "$file")" && echo "content of $file" > "node_modules/$file"; done
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout without kernels: the hook, the lock, and the folder of the console."""
    root = tmp_path / "checkout"
    (root / VENDOR).parent.mkdir(parents=True)
    (root / VENDOR).with_name("console.js").touch()
    for name in ("hatch_build.py", f"{PACKAGE}/package.json", f"{PACKAGE}/package-lock.json", ".gitignore"):
        shutil.copy(CHECKOUT / name, root / name)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "updraft"\nversion = "1"\nrequires-python = ">=3.11"\n'
        "[tool.hatch.build.targets.wheel.hooks.custom]\n"
        '[tool.hatch.build.targets.wheel]\npackages = ["cli/updraft_cli"]\n'
    )
    return root


@pytest.fixture
def npm_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that makes every file that is vendored; this is the log of its arguments."""
    log = tmp_path / "npm.log"
    fake_npm(tmp_path / "bin", FAKE_NPM.format(log=log, files=" ".join(VENDORED.values())), monkeypatch)
    return log


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def build(checkout: Path, kind: str = "build_wheel") -> tuple[set[str], str]:
    """The names of the vendored files in the wheel, and what the build printed."""
    script = f"import hatchling.build as b; print(b.{kind}({str(checkout.parent)!r}))"
    result = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(checkout.parent / result.stdout.split()[-1]) as archive:
        names = {Path(name) for name in archive.namelist()}
    return {name.name for name in names if name.parent.name == "vendor"}, result.stdout + result.stderr


@pytest.mark.usefixtures("npm_calls")
def test_a_wheel_has_the_libraries_and_their_licences_and_nothing_else_of_them(checkout: Path) -> None:
    names, _ = build(checkout)
    assert names == set(VENDORED)
    assert len([name for name in names if name.endswith(".LICENSE")]) == len(LOCK["packages"][""]["dependencies"])


@pytest.mark.usefixtures("npm_calls")
def test_an_editable_install_leaves_the_libraries_with_the_sources(checkout: Path) -> None:
    build(checkout, "build_editable")
    assert set(VENDORED) <= {path.name for path in (checkout / VENDOR).iterdir()}


def test_npm_runs_no_script_of_a_package_and_installs_what_the_lock_says(checkout: Path, npm_calls: Path) -> None:
    build(checkout)
    words = npm_calls.read_text().split()
    assert words[0] == "ci"
    assert {"--ignore-scripts", "--omit=dev"} <= set(words)


def test_npm_runs_once_for_each_lock(checkout: Path, npm_calls: Path) -> None:
    for _ in range(2):
        build(checkout)
    assert len(npm_calls.read_text().splitlines()) == 1
    lock = checkout / PACKAGE / "package-lock.json"
    lock.write_text(lock.read_text() + "\n")
    build(checkout)
    assert len(npm_calls.read_text().splitlines()) == 2


def test_without_npm_the_install_works_and_says_what_is_missing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    names, printed = build(checkout)
    assert names == set()
    assert "The pages of `updraft ui` may not change by themselves: there is no npm" in printed


def test_where_npm_fails_the_install_works_says_why_and_leaves_what_is_there(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / VENDOR).mkdir()
    (checkout / VENDOR / "htmx.min.js").write_text("of another lock")
    fake_npm(tmp_path / "bin", '#!/bin/bash\necho "no route to the registry" >&2; exit 1\n', monkeypatch)
    names, printed = build(checkout)
    assert names == set()
    assert "npm failed: no route to the registry" in printed
    assert (checkout / VENDOR / "htmx.min.js").read_text() == "of another lock"


@pytest.mark.parametrize("script", ["#!/bin/bash\nexit 0\n", "#!/no/such/interpreter\n"])
def test_an_npm_that_is_broken_breaks_no_install(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_npm(tmp_path / "bin", script, monkeypatch)
    names, printed = build(checkout)
    assert names == set()
    assert "may not change by themselves: [Errno 2] No such file or directory" in printed


@pytest.mark.usefixtures("npm_calls")
def test_what_is_in_the_way_of_the_libraries_breaks_no_install(checkout: Path) -> None:
    (checkout / VENDOR).touch()
    names, printed = build(checkout)
    assert names == set()
    assert "may not change by themselves: [Errno 20] Not a directory" in printed


@pytest.mark.parametrize("name", ["htmx.min.js", "uPlot.LICENSE", STAMP])
def test_a_file_that_npm_did_not_install_is_replaced_and_not_trusted(
    checkout: Path, npm_calls: Path, name: str
) -> None:
    build(checkout)
    original = (checkout / VENDOR / name).read_bytes()
    (checkout / VENDOR / name).write_text("changed")
    names, _ = build(checkout)
    assert (checkout / VENDOR / name).read_bytes() == original
    assert names == set(VENDORED)
    assert len(npm_calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("path", ["cli/node_modules", VENDOR])
def test_what_npm_leaves_in_a_checkout_comes_neither_into_a_commit_nor_into_an_image(path: str) -> None:
    ignored = (CHECKOUT / ".gitignore").read_text().splitlines()
    kept_out = (CHECKOUT / ".dockerignore").read_text().splitlines()
    assert f"{path}/" in ignored
    assert kept_out.index(path) > kept_out.index("!cli")  # the last line that matches decides


def test_every_package_of_the_lock_has_a_digest_and_no_address() -> None:
    packages = {name: package for name, package in LOCK["packages"].items() if name}
    assert [name for name, package in packages.items() if not package.get("integrity", "").startswith("sha512-")] == []
    assert [name for name, package in packages.items() if "resolved" in package] == []


def test_versions_are_pinned_and_the_lock_has_the_same() -> None:
    package = json.loads((CHECKOUT / PACKAGE / "package.json").read_text())
    wanted = package["dependencies"] | package["devDependencies"]
    assert wanted == {name: LOCK["packages"][f"node_modules/{name}"]["version"] for name in wanted}


def test_a_licence_of_each_library_comes_with_it() -> None:
    packages = {re.sub(r"/(dist|LICENSE).*", "", source) for source in VENDORED.values()}
    licensed = {source.removesuffix("/LICENSE") for source in VENDORED.values() if source.endswith("/LICENSE")}
    assert packages == licensed
