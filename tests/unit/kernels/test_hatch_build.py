"""Wheels carry the kernels that the compiler could make, and the platform that they were made for."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hatch_build
import pytest
from hatch_build import KERNELS, compile_kernels

CHECKOUT = Path(hatch_build.__file__).parent
VARIANTS = set(hatch_build.VARIANTS[platform.machine()])

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout: the hook, one package, and a kernel that compiles in no time."""
    root = tmp_path / "checkout"
    sources = root / KERNELS
    sources.mkdir(parents=True)
    shutil.copy(CHECKOUT / "hatch_build.py", root)
    (sources / "__init__.py").touch()
    (sources / "one.cpp").write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    (sources / "one.h").write_text("#define ONE 1\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "updraft"\nversion = "1"\nrequires-python = ">=3.11"\n'
        "[tool.hatch.build.targets.wheel.hooks.custom]\n"
        f'[tool.hatch.build.targets.wheel]\npackages = ["{KERNELS}"]\nexclude = ["*.cpp", "*.h"]\n'
    )
    (root / ".gitignore").write_text("*.so\n")
    return root


def build(checkout: Path, build_: str = "build_wheel") -> tuple[str, list[str]]:
    """The name of the wheel and of the kernels' files in it."""
    wheel = run_build(checkout, build_).stdout.split()[-1]
    with zipfile.ZipFile(checkout.parent / wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    return wheel, sorted(name.name for name in names if name.parent.name == "updraft_kernels")


def run_build(checkout: Path, build_: str = "build_wheel") -> subprocess.CompletedProcess[str]:
    script = f"import hatchling.build as b; print(b.{build_}({str(checkout.parent)!r}))"
    result = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def variants(files: list[str]) -> set[str]:
    return {name.partition("-")[0] for name in files if name.endswith(".so")}


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir()
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/bash\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


@needs_compiler
def test_a_wheel_has_all_variants_and_any_python_of_this_platform_can_install_it(checkout: Path) -> None:
    name, files = build(checkout)
    assert name.startswith("updraft-1-py3-none-linux_")
    assert variants(files) == VARIANTS
    assert "__init__.py" in files
    assert not [file for file in files if file.endswith((".cpp", ".h"))]


@needs_compiler
def test_an_editable_install_leaves_the_libraries_with_the_sources(checkout: Path) -> None:
    build(checkout, "build_editable")
    assert variants([path.name for path in (checkout / KERNELS).iterdir()]) == VARIANTS


@needs_compiler
def test_a_changed_source_replaces_the_libraries(checkout: Path) -> None:
    build(checkout)
    before = set((checkout / KERNELS).glob("*.so"))
    (checkout / KERNELS / "one.h").write_text("#define ONE 2\n")
    build(checkout)
    after = set((checkout / KERNELS).glob("*.so"))
    assert len(after) == len(before) == len(VARIANTS)
    assert not before & after


def test_without_a_compiler_the_wheel_is_pure_and_old_libraries_are_gone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / KERNELS / "avx2-0123456789abcdef.so").touch()
    monkeypatch.setenv("PATH", "")
    name, files = build(checkout)
    assert name == "updraft-1-py3-none-any.whl"
    assert files == ["__init__.py"]


def test_with_a_compiler_that_cannot_link_the_wheel_is_pure_and_the_reason_is_printed(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$*" in *-shared*) echo "cannot find -lstdc++" >&2; exit 1;; esac; touch "${@: -1}"'
    fake_compiler(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    built = run_build(checkout)
    assert "cannot find -lstdc++" in built.stdout + built.stderr
    assert "updraft-1-py3-none-any.whl" in built.stdout


@needs_compiler
def test_a_build_that_fails_leaves_the_old_libraries(checkout: Path) -> None:
    build(checkout)
    before = set((checkout / KERNELS).iterdir())
    (checkout / KERNELS / "one.cpp").write_text("int one( {\n")
    with pytest.raises(AssertionError, match=r"one\.cpp:1"):
        build(checkout)
    assert set((checkout / KERNELS).iterdir()) == before


def test_a_wheel_without_the_package_of_kernels_is_pure(checkout: Path) -> None:
    shutil.rmtree(checkout / "services")
    (checkout / "pyproject.toml").write_text((checkout / "pyproject.toml").read_text() + "bypass-selection = true\n")
    assert build(checkout) == ("updraft-1-py3-none-any.whl", [])


@needs_compiler
def test_a_variant_that_the_compiler_does_not_know_is_left_out(checkout: Path, tmp_path: Path) -> None:
    first, *others = hatch_build.VARIANTS[platform.machine()].items()
    flags = " ".join(first[1]) or "-fopenmp"
    old = fake_compiler(tmp_path / "bin", f'case "$*" in *"{flags}"*) exit 1;; esac; exec {shutil.which("g++")} "$@"')
    libraries = compile_kernels(checkout / KERNELS, tmp_path, old)
    assert variants([library.name for library in libraries]) == {name for name, _ in others}


@needs_compiler
def test_a_wrong_source_fails_the_build_with_the_compilers_message(checkout: Path, tmp_path: Path) -> None:
    (checkout / KERNELS / "one.cpp").write_text("int one( {\n")
    with pytest.raises(RuntimeError, match=r"one\.cpp:1:\d+: error"):
        compile_kernels(checkout / KERNELS, tmp_path, shutil.which("g++") or "")


def test_every_source_of_this_checkout_is_known_to_make() -> None:
    command = ["make", "--print-data-base", "--dry-run", "help"]
    rules = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    (ready,) = (line for line in rules.splitlines() if line.startswith(".venv/ready:"))
    sources = [path for path in (CHECKOUT / KERNELS).iterdir() if path.suffix in {".cpp", ".h"}]
    assert {str(path.relative_to(CHECKOUT)) for path in sources} | {"hatch_build.py"} <= set(ready.split())
