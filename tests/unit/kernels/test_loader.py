"""The fastest kernels that this CPU runs are loaded, and an engine without any uses torch's operations."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import hatch_build
import pytest
import torch
from tests.support.tiny_target import make_tiny_target

from updraft_inference.torch_engine import engine
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_kernels import loader
from updraft_kernels.loader import CPU_FLAGS, load_kernels, load_variant, supported_variants

X86 = CPU_FLAGS["x86_64"]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder with a copy of the libraries that `make install` compiled."""
    if not supported_variants() or not list(loader.FOLDER.glob("*.so")):
        pytest.skip("no C++ kernels for this CPU")
    for library in loader.FOLDER.glob("*.so"):
        shutil.copy(library, tmp_path)
    return tmp_path


def cpu_with(monkeypatch: pytest.MonkeyPatch, flags: Iterable[str], machine: str = "x86_64") -> None:
    monkeypatch.setattr(loader, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("platform.machine", lambda: machine)


def library(folder: Path, variant: str) -> Path:
    (path,) = folder.glob(f"{variant}-*.so")
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (X86["amx"], ["amx", "vnni", "avx512", "avx2"]),
        (X86["avx512"] | {"avx512_bf16"}, ["avx512", "avx2"]),
        (X86["amx"] - {"amx_tile"}, ["vnni", "avx512", "avx2"]),
        (X86["amx"] - {"avx512_vnni"}, ["avx512", "avx2"]),
        (X86["avx2"], ["avx2"]),
        (X86["amx"] - {"avx2"}, []),
        ((), []),
    ],
)
def test_a_cpu_is_offered_what_its_features_allow_fastest_first(
    monkeypatch: pytest.MonkeyPatch, flags: Iterable[str], expected: list[str]
) -> None:
    cpu_with(monkeypatch, flags)
    assert supported_variants() == expected


def test_other_machines_have_their_own_variants_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, {"fp", "asimd"}, "aarch64")
    assert supported_variants() == ["neon"]
    cpu_with(monkeypatch, X86["amx"], "riscv64")
    assert supported_variants() == []


def test_whatever_is_compiled_can_be_chosen() -> None:
    assert {machine: list(variants) for machine, variants in hatch_build.VARIANTS.items()} == {
        machine: list(variants) for machine, variants in CPU_FLAGS.items()
    }


def test_the_fastest_variant_of_this_cpu_is_loaded(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    kernels = load_kernels(built)
    assert kernels is not None
    assert kernels.variant == supported_variants()[0]
    assert [record.variant for record in caplog.records] == [kernels.variant]  # type: ignore[attr-defined]  # an extra


def test_every_variant_of_this_cpu_loads(built: Path) -> None:
    assert [load_variant(variant, built).variant for variant in supported_variants()] == supported_variants()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one byte changed", "a folder"])
def test_a_damaged_library_is_passed_over(built: Path, damage: str) -> None:
    best, *others = supported_variants()
    path = library(built, best)
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.touch()
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "one byte changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "a folder":
            path.mkdir()
    kernels = load_kernels(built)
    assert (kernels.variant if kernels else None) == (others[0] if others else None)


def test_a_library_without_a_kernel_that_is_called_is_passed_over(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "_SIGNATURES", {"no_such_kernel": ([], None)})
    assert load_kernels(built) is None
    assert "no_such_kernel" in caplog.records[-1].reason  # type: ignore[attr-defined]  # an extra


def test_without_amx_from_the_operating_system_the_next_variant_is_loaded(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    real = load_variant

    def refused(variant: str, folder: Path) -> loader.Kernels:
        if variant == "amx":
            raise PermissionError("refused")
        return real(variant, folder)

    if "vnni" not in supported_variants():
        pytest.skip("this CPU has no AVX-512 VNNI")
    cpu_with(monkeypatch, X86["amx"])
    monkeypatch.setattr(loader, "load_variant", refused)
    kernels = load_kernels(built)
    assert kernels is not None
    assert (kernels.variant, kernels.has_amx, kernels.has_wide_vectors) == ("vnni", False, True)
    assert caplog.records[-1].skipped == ["amx: refused"]  # type: ignore[attr-defined]  # an extra


@pytest.mark.parametrize(
    ("files", "flags", "reason"),
    [
        ([], X86["amx"], "the package was built without a working C++ compiler"),
        (["avx2-0123456789abcdef.so"], {"sse4_2"}, "this CPU lacks the features that they need"),
        (["avx2-0123456789abcdef.so"], X86["avx2"], "avx2: avx2-0123456789abcdef.so is damaged"),
    ],
)
def test_an_engine_without_kernels_uses_torch_and_logs_why_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: list[str],
    flags: Iterable[str],
    reason: str,
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"no library")
    cpu_with(monkeypatch, flags)
    monkeypatch.setattr(engine, "load_kernels", lambda: load_kernels(tmp_path))
    opened = open_engine(tmp_path, use_kernels=True)
    assert opened.info.kernels == "torch"
    (record,) = (record for record in caplog.records if record.name == loader.logger.name)
    assert (record.levelname, record.reason) == ("WARNING", reason)  # type: ignore[attr-defined]  # an extra


def test_an_engine_names_the_kernels_that_it_uses(built: Path, tmp_path: Path) -> None:
    assert open_engine(tmp_path, use_kernels=True).info.kernels == supported_variants()[0]
    assert open_engine(tmp_path, use_kernels=False).info.kernels == "torch"


def open_engine(folder: Path, *, use_kernels: bool) -> TorchEngine:
    limits = Limits(num_slots=1, max_context=64, max_lookahead=2)
    options = EngineOptions(limits=limits, dtype=torch.float32, use_kernels=use_kernels)
    return TorchEngine.open(make_tiny_target(folder / "target"), options)
